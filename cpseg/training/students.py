"""Students: any module from images to logits, and a small one of our own."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from cpseg import _checks
from cpseg.errors import InputError

__all__ = ["UNet", "logits_of"]


def logits_of(output: object, size: tuple[int, int]) -> Tensor:
    """The logits in what a segmentation network returns, at the label's size.

    Args:
        output: Logits ``(B, C, h, w)``; or a mapping that holds them as ``"logits"`` or
            ``"out"``; or an object that holds them as ``logits``.
        size: ``(H, W)`` of the labels.

    Returns:
        Logits ``(B, C, H, W)``, bilinear where the network's grid is another.

    Raises:
        InputError: If there are no logits in ``output``.
    """
    found = output
    if isinstance(output, Mapping):
        held = cast("Mapping[str, object]", output)
        found = held.get("logits", held.get("out"))
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.ndim != 4:
        what = _checks.describe(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise InputError(
            "student must return logits (B, C, h, w), a mapping with 'logits' or 'out', or an "
            f"object with .logits; got {what}"
        )
    if tuple(found.shape[2:]) == size:
        return found
    return functional.interpolate(found, size, mode="bilinear", align_corners=False)


@final
class UNet(nn.Module):
    """A small U-Net, for demos, tests and work on a CPU.

    Any height and width. With ``norm="group"`` nothing in it depends on the batch: a pixel's logits
    are the same whatever else is in the batch, in training too. With ``"batch"`` it learns in fewer
    steps.

    Args:
        num_classes: Number of classes, C.
        channels: Channels of the images.
        width: Channels at full resolution, a multiple of 4; each level below has twice as many.
        depth: How many times the resolution is halved.
        norm: What is normalized over: groups of channels of an image, or the batch.

    Examples:
        >>> UNet(5, width=4, depth=2)(torch.zeros(2, 3, 17, 30)).shape
        torch.Size([2, 5, 17, 30])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 3,
        width: int = 16,
        depth: int = 3,
        norm: Literal["group", "batch"] = "group",
    ) -> None:
        super().__init__()
        _checks.check_integer("num_classes", num_classes, 1)
        _checks.check_integer("channels", channels, 1)
        _checks.check_integer("width", width, 4)
        _checks.check_integer("depth", depth, 0)
        if width % 4:
            raise InputError(f"width must be a multiple of 4; got {width}")
        if norm not in ("group", "batch"):
            raise InputError(f'norm must be "group" or "batch"; got {norm!r}')
        widths = [width * 2**level for level in range(depth + 1)]
        self.stem: nn.Sequential = _block(channels, width, norm)
        self.down: nn.ModuleList = nn.ModuleList(_block(a, b, norm) for a, b in pairwise(widths))
        self.up: nn.ModuleList = nn.ModuleList(_block(a + b, a, norm) for a, b in pairwise(widths))
        self.head: nn.Conv2d = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C, H, W)`` of images ``(B, channels, H, W)``."""
        x: Tensor = self.stem(images)
        passed: list[Tensor] = []
        for block in self.down:
            passed.append(x)
            x = block(functional.max_pool2d(x, 2, ceil_mode=True))
        for block in reversed(self.up):
            across = passed.pop()
            size = (across.shape[2], across.shape[3])
            up = functional.interpolate(x, size, mode="bilinear", align_corners=False)
            x = block(torch.cat((across, up), 1))
        return cast("Tensor", self.head(x))


def _block(inside: int, outside: int, norm: str) -> nn.Sequential:
    def normalize() -> nn.Module:
        return nn.BatchNorm2d(outside) if norm == "batch" else _Norm(4, outside)

    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1, bias=False),
        normalize(),
        nn.ReLU(inplace=True),
        nn.Conv2d(outside, outside, 3, padding=1, bias=False),
        normalize(),
        nn.ReLU(inplace=True),
    )


class _Norm(nn.GroupNorm):
    """Group normalization of a single pixel too, which torch refuses channel by channel."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - its name in torch
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
