"""How often the most likely class is right, by its probability."""

from dataclasses import dataclass, field
from typing import Self, final

import torch
from torch import Tensor

from cpseg import _checks

__all__ = ["ConfidenceCounts"]

# Confidence is binned by the bits of 1 - p: 64 bins per octave, fine where p is nearly 1.
_SHIFT = 17
_FIRST = (127 - 24) << (23 - _SHIFT)
_BINS = (127 << (23 - _SHIFT)) - _FIRST + 1


@final
@dataclass(eq=False)
class ConfidenceCounts:
    """How often the most likely class is right, by its probability: mergeable counts of pixels.

    Guarantee:
        None; a measurement.

    Args:
        ignore_index: Label of pixels that do not count.

    Attributes:
        pixels: Labeled pixels by confidence. int64 ``(K,)``.
        right: Those whose most likely class is the label. int64 ``(K,)``.

    Examples:
        >>> logits = torch.tensor([[[9.0, 9.0], [0.0, 0.0]]])
        >>> counts = ConfidenceCounts().update(logits, torch.tensor([[0, 1]]))
        >>> kept, accuracy = counts.curve()
        >>> kept.tolist(), accuracy.tolist()
        ([1.0], [0.5])
    """

    ignore_index: int = 255
    pixels: Tensor = field(
        default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64), init=False, repr=False
    )
    right: Tensor = field(
        default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64), init=False, repr=False
    )

    def update(self, logits: Tensor, labels: Tensor) -> Self:
        """Add a batch.

        Args:
            logits: Shape ``(B, C, *S)``.
            labels: Integers. Shape ``(B, *S)``.

        Returns:
            Itself.
        """
        _checks.check_logits(logits)
        _checks.check_labels(labels, logits)
        top = logits.float().log_softmax(1).max(1)
        doubt = -torch.expm1(top.values)
        usable = (labels != self.ignore_index) & ~doubt.isnan()
        bits = doubt.clamp(2.0**-24, 1.0).view(torch.int32) >> _SHIFT
        index = (bits.long() - _FIRST).clamp(0, _BINS - 1)[usable].cpu()
        right = (top.indices == labels)[usable].cpu()
        self.pixels += torch.bincount(index, minlength=_BINS)
        self.right += torch.bincount(index[right], minlength=_BINS)
        return self

    def merge(self, other: Self) -> Self:
        """Add what another has seen; the other stays as it is."""
        self.pixels = self.pixels + other.pixels
        self.right = self.right + other.right
        return self

    def confidence(self) -> Tensor:
        """The probability that each bin stands for, falling. float64 ``(K,)``."""
        ends = (torch.arange(_BINS + 1) + _FIRST) << _SHIFT
        doubt = ends.int().view(torch.float32).double().clamp(max=1.0)
        return 1 - (doubt[:-1] + doubt[1:]) / 2

    def curve(self) -> tuple[Tensor, Tensor]:
        """What is kept, and how much of it is right, as the confidence asked for falls.

        Returns:
            Shares of labeled pixels, rising to 1, and of the kept ones. float64 ``(N,)`` each,
            of the bins that hold pixels.
        """
        filled = self.pixels > 0
        kept = self.pixels[filled].cumsum(0).double()
        right = self.right[filled].cumsum(0).double()
        return kept / max(int(self.pixels.sum()), 1), right / kept

    def deciles(self, bins: int = 10) -> tuple[Tensor, Tensor, Tensor]:
        """Mean confidence, accuracy and share of pixels in equal steps of confidence.

        Args:
            bins: How many steps between 0 and 1.

        Returns:
            float64 ``(bins,)`` each; NaN where there are no pixels.
        """
        confidence = self.confidence()
        step = (confidence * bins).long().clamp(0, bins - 1)

        def summed(values: Tensor) -> Tensor:
            return torch.zeros(bins, dtype=torch.float64).index_add_(0, step, values.double())

        pixels = summed(self.pixels)
        share = pixels / pixels.sum()
        return summed(confidence * self.pixels) / pixels, summed(self.right) / pixels, share
