"""An annotator that has learned from the labeled images: its answer, corrected by a network.

An annotator from another domain errs in ways of its own, and a few labeled images show which. A
network that sees its probabilities beside the image has less to learn from them than one that
sees the image alone.
"""

from collections.abc import Sequence
from typing import cast, final

import torch
from torch import Tensor, nn

from cpseg import _checks
from cpseg._tiles import upcast
from cpseg.errors import InputError
from cpseg.training.averaging import MovingAverage
from cpseg.training.batches import Normalize
from cpseg.training.targets import check_classes, masked_cross_entropy

__all__ = ["Example", "Refined", "refine"]

Example = tuple[Tensor, Tensor, Tensor]
"""A labeled image, bytes ``(3, H, W)``, an annotator's logits ``(C, H, W)`` and labels ``(H, W)``."""

_DEEP = 12.0  # a class this far below the others is not told apart from one farther still


@final
class Refined(nn.Module):
    """An annotator's log-probabilities, and what a network adds to them that sees the image too.

    Made by :func:`refine`. Its logits take the place of the annotator's: calibrate them on images
    that it did not learn from, and filter them or train on their probabilities.

    Args:
        network: From the normalized image and the log-probabilities, ``3 + C`` channels, to C.
        class_weights: Of the loss that it is trained with. It then says each class as many times
            too often as its weight, and that is divided out of what it says in the end.
        normalize: Of images.

    Examples:
        >>> refined = Refined(nn.Conv2d(3 + 2, 2, 1), class_weights=(1.0, 1.0))
        >>> refined(torch.zeros(1, 3, 4, 6, dtype=torch.uint8), torch.zeros(1, 2, 4, 6)).shape
        torch.Size([1, 2, 4, 6])
    """

    log_weights: Tensor

    def __init__(
        self,
        network: nn.Module,
        class_weights: tuple[float, ...],
        normalize: Normalize = Normalize(),
    ) -> None:
        super().__init__()
        for index, weight in enumerate(class_weights):
            if not _checks.check_weight(f"class_weights[{index}]", weight):
                raise InputError(f"class_weights[{index}] must be positive to be divided out")
        self.network: nn.Module = network
        self.normalize: Normalize = normalize
        logarithms = torch.tensor(class_weights, dtype=torch.float64).log().float()
        self.register_buffer("log_weights", logarithms)

    def forward(self, images: Tensor, logits: Tensor) -> Tensor:
        """The annotator's logits, refined.

        Args:
            images: Bytes, red, green, blue. Shape ``(B, 3, H, W)``.
            logits: The annotator's. Shape ``(B, C, H, W)``.

        Returns:
            Logits, at least float32, where the network is. Shape ``(B, C, H, W)``.
        """
        size = (len(logits), 3, *logits.shape[2:])
        if images.dtype != torch.uint8 or images.shape != size:
            raise InputError(
                f"images must be bytes {size} beside logits {tuple(logits.shape)}; "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        device = self.log_weights.device
        seen = images.to(device).float() / 255
        return self.weighted(seen, logits.to(device)) - self.log_weights.view(-1, 1, 1)

    def weighted(self, images: Tensor, logits: Tensor) -> Tensor:
        """What the loss sees, class weights not divided out; images in ``[0, 1]``."""
        _checks.check_logits(logits, len(self.log_weights))
        known = upcast(logits).log_softmax(1).clamp(min=-_DEEP)
        seen = torch.cat((self.normalize(images), 2 * known / _DEEP), 1)
        return known + cast("Tensor", self.network(seen))


def refine(
    network: nn.Module,
    examples: Sequence[Example],
    *,
    class_weights: tuple[float, ...],
    steps: int = 600,
    batch: int = 4,
    lr: float = 1e-3,
    ema_decay: float = 0.99,
    normalize: Normalize = Normalize(),
    ignore_index: int = 255,
    seed: int = 0,
) -> Refined:
    """Teach an annotator from labeled images what it gets wrong on images like these.

    AdamW on cross-entropy, the rate falling to 0 by ``(1 - progress) ** 0.9``, gradients clipped
    at 1, on examples mirrored half of the time and of slightly other light and tint. What comes
    back is the average over steps. Ours.

    Guarantee:
        None; a heuristic. A calibration of the refined logits promises what it says if its labels
        had no part in them: none of its images is among the examples, nor among those that
        ``class_weights`` are from.

    Args:
        network: From ``3 + C`` channels to C; trained in place, where it is. A last layer of
            zeros begins with what the annotator says; a :class:`~cpseg.training.UNet` with
            ``channels=3 + C`` and ``norm="batch"`` learns in few steps.
        examples: Image, bytes ``(3, H, W)``; the annotator's logits ``(C, H, W)``; labels
            ``(H, W)``. Read once per step and example, so that they may be cut at random; all
            that are read in one step of one size.
        class_weights: One per class, positive; see :func:`~cpseg.training.class_weights_from`.
        steps: How often the network is changed.
        batch: Examples of a step, drawn with replacement.
        lr: The first rate.
        ema_decay: Of the average over steps.
        normalize: Of images.
        ignore_index: Label of pixels that do not count.
        seed: Of what is drawn; the global generator is not touched.

    Returns:
        The refined annotator, in evaluation mode.

    Raises:
        InputError: If there are no examples, or shapes, dtypes or labels do not fit.
    """
    if not len(examples):
        raise InputError("examples must hold a labeled image; got none")
    _checks.check_integer("steps", steps, 1)
    _checks.check_integer("batch", batch, 1)
    device = next(network.parameters()).device
    chance = torch.Generator().manual_seed(seed)
    refined = Refined(network, class_weights, normalize).to(device).train()
    average = MovingAverage(refined, ema_decay)
    optimizer = torch.optim.AdamW(refined.parameters(), lr, weight_decay=0.01)
    weights = refined.log_weights.exp()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps) ** 0.9
        chosen = torch.randint(len(examples), (batch,), generator=chance).tolist()
        images, logits, labels = _stacked(
            [examples[index] for index in chosen], ignore_index, device
        )
        if torch.rand((), generator=chance) < 0.5:
            images, logits, labels = images.flip(-1), logits.flip(-1), labels.flip(-1)
        light = 1 + 0.2 * torch.randn(batch, 1, 1, 1, generator=chance).to(device)
        tint = 0.05 * torch.randn(batch, 3, 1, 1, generator=chance).to(device)
        loss = masked_cross_entropy(
            refined.weighted((images.float() / 255 * light + tint).clamp(0, 1), logits),
            labels,
            class_weights=weights,
            ignore_index=ignore_index,
            pad_index=ignore_index,
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(refined.parameters(), 1.0)
        optimizer.step()
        average.update(refined)
    return cast("Refined", average.module)


def _stacked(
    examples: list[Example], ignore_index: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Examples as a batch, checked."""
    for example in examples:
        check_example(example, ignore_index)
    sizes = {tuple(logits.shape) for _, logits, _ in examples}
    if len(sizes) > 1:
        raise InputError(f"examples of one step must be of one size; got {sorted(sizes)}")
    images, logits, labels = (
        torch.stack(parts).to(device) for parts in zip(*examples, strict=True)
    )
    return images, logits, labels


def check_example(example: Example, ignore_index: int) -> None:
    """Refuse what is no image with logits and labels of its size."""
    image, logits, label = example
    size = tuple(logits.shape[1:])
    shapes = tuple(image.shape), tuple(label.shape)
    if image.dtype != torch.uint8 or shapes != ((3, *size), size):
        raise InputError(
            "examples must be bytes (3, H, W), logits (C, H, W) and labels (H, W); got "
            f"{image.dtype} {shapes[0]}, {tuple(logits.shape)} and {shapes[1]}"
        )
    check_classes(label, len(logits), ignore_index)
