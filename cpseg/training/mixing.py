"""CutMix inside a batch: a box of each image comes from another image of the same batch."""

from dataclasses import dataclass
from math import sqrt
from typing import final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.errors import InputError

__all__ = ["Mix", "cutmix"]


@final
@dataclass(frozen=True, eq=False, slots=True)
class Mix:
    """Which pixels come from which image: apply it to every tensor that must stay together.

    Attributes:
        partner: The other image of each. int64 ``(B,)``.
        inside: Where the other image shows. bool ``(B, H, W)``.
    """

    partner: Tensor
    inside: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        """Mix images ``(B, C, H, W)`` or maps ``(B, H, W)``; same shape and dtype."""
        inside = self.inside if value.ndim == 3 else self.inside[:, None]
        return torch.where(inside, value[self.partner], value)


def cutmix(
    shape: tuple[int, int, int],
    *,
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    generator: torch.Generator,
    device: torch.device | None = None,
) -> Mix:
    """Draw boxes and partners for a batch.

    Partners are the batch turned by a random number of places, so no image meets itself; a batch
    of one stays as it is.

    Args:
        shape: ``(B, H, W)``.
        probability: How likely an image is mixed at all.
        area: The smallest and the largest share of the image that a box covers.
        ratio: The smallest and the largest width of a box over its height.
        generator: On the CPU; drawing waits for no device.
        device: Where the result is needed.

    Returns:
        What to apply to images, labels, confidences and validity alike.

    Raises:
        InputError: If an argument is out of its range.
    """
    if not 0 <= probability <= 1:
        raise InputError(f"probability must lie in [0, 1]; got {probability!r}")
    for name, (low, high), most in (("area", area, 1.0), ("ratio", ratio, float("inf"))):
        if not 0 < low <= high <= most:
            raise InputError(f"{name} must be an increasing pair above 0; got {(low, high)}")
    batch, height, width = shape
    for name, size in zip(("B", "H", "W"), shape, strict=True):
        _checks.check_integer(name, size, 0)
    turn = int(torch.randint(1, batch, (), generator=generator)) if batch > 1 else 0
    draws = torch.rand((batch, 5), generator=generator, dtype=torch.float64).tolist()
    edges: list[list[int]] = []
    for chosen, share, shape_, x, y in draws:
        if batch < 2 or chosen >= probability:
            edges.append([0, 0, 0, 0])
            continue
        size = (area[0] + (area[1] - area[0]) * share) * height * width
        aspect = ratio[0] + (ratio[1] - ratio[0]) * shape_
        tall = min(max(round(sqrt(size / aspect)), 1), height)
        wide = min(max(round(sqrt(size * aspect)), 1), width)
        top, left = int(y * (height - tall + 1)), int(x * (width - wide + 1))
        edges.append([top, top + tall, left, left + wide])
    box = torch.tensor(edges, dtype=torch.int64).reshape(batch, 4, 1, 1).to(device)
    rows = torch.arange(height, device=device)[:, None]
    columns = torch.arange(width, device=device)
    inside = (rows >= box[:, 0]) & (rows < box[:, 1])
    inside = inside & (columns >= box[:, 2]) & (columns < box[:, 3])
    return Mix(torch.arange(batch, device=device).roll(turn), inside)
