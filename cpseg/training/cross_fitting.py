"""All labeled images teach and all calibrate: two annotators, each taught by half of them.

What an annotator has learned from an image says nothing of how it does on others, so for one
annotator no image can do both. For two it can: each is calibrated on what taught the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.calibration import Calibration
from cpseg.calibrators import ClassConditionalCalibrator
from cpseg.errors import InputError
from cpseg.filters import SoftLabels
from cpseg.quantile import Level, level
from cpseg.training.targets import pool_probabilities

__all__ = ["Corrected", "CrossFitted", "Example", "Side", "cross_fit"]

Example = tuple[Tensor, Tensor, Tensor]
"""Image ``(3, H, W)``, the annotator's logits ``(C, H, W)`` and labels ``(H, W)``."""

Corrected = Callable[[Tensor, Tensor], Tensor]
"""Images and the annotator's logits to better logits: :class:`~cpseg.training.Refined` is one."""


@final
@dataclass(frozen=True, slots=True)
class Side:
    """One of two annotators.

    Attributes:
        annotator: Taught by one half of the labeled images.
        calibration: Of what it says, on the other half.
    """

    annotator: Corrected
    calibration: Calibration


@final
@dataclass(frozen=True, slots=True)
class CrossFitted:
    """What two annotators say together, each within its sets. Made by :func:`cross_fit`.

    Guarantee:
        For each class but those that are :attr:`unpromised`: in a new image that contains it, the
        share of its labeled pixels whose probability is 0 is at most ``alpha`` in expectation over
        the labeled images and the new one, if images are exchangeable and each annotator learned
        from nothing but its half. It does not imply the same for an image as a whole.

    Attributes:
        sides: Both annotators and their calibrations.
    """

    sides: tuple[Side, Side]

    @property
    def unpromised(self) -> Tensor:
        """Classes that too few images of a half show for a promise. Bool ``(C,)``."""
        one, other = self.sides
        return one.calibration.fallback_groups | other.calibration.fallback_groups

    @torch.no_grad()
    def __call__(self, images: Tensor, logits: Tensor) -> Tensor:
        """Probabilities: external labels for :class:`~cpseg.training.Stage`.

        Args:
            images: Bytes. Shape ``(B, 3, H, W)``.
            logits: The annotator's. Shape ``(B, C, H, W)``.

        Returns:
            The geometric mean of both within both sets, made to add up to 1. 0 outside of them,
            and in all classes where that leaves none. float32 at least, ``(B, C, H, W)``.
        """
        one, other = (
            SoftLabels(side.calibration)(side.annotator(images, logits)) for side in self.sides
        )
        return pool_probabilities(one.log(), other)


def cross_fit(
    teach: Callable[[Sequence[Example]], Corrected],
    examples: Sequence[Example],
    num_classes: int,
    alpha: Level = 0.1,
    *,
    ignore_index: int = 255,
) -> CrossFitted:
    """Teach an annotator on each half of the labeled images, and calibrate it on the other.

    Every second image is one half. Each annotator has a threshold per class at half of ``alpha``,
    so that both together miss no more than ``alpha``; a class that too few images show has the
    threshold of all. Ours.

    Args:
        teach: From half of the examples to an annotator. All that it fits, class weights too, is
            to come from what it is given. See :func:`~cpseg.training.refine`.
        examples: Of the labeled images; slices of it are the halves.
        num_classes: Number of classes, C.
        alpha: What both together may miss of a class.
        ignore_index: Label of pixels that do not count.

    Returns:
        Both annotators, calibrated.

    Raises:
        InputError: If the smaller half has fewer than ``2 / alpha - 1`` images, of which nothing
            follows at this level.

    Examples:
        >>> image, logits = torch.zeros(3, 1, 2, dtype=torch.uint8), torch.zeros(2, 1, 2)
        >>> examples = [(image, logits, torch.tensor([[0, 1]]))] * 18
        >>> both = cross_fit(lambda half: lambda images, logits: logits, examples, 2, alpha=0.2)
        >>> both(image[None], logits[None])[0, :, 0, 0]
        tensor([0.5000, 0.5000])
    """
    share = level(alpha) / 2
    few = len(examples) // 2
    if share * (few + 1) < 1:
        raise InputError(
            f"alpha must be at least 2 / {few + 1} for {len(examples)} labeled images, of which "
            f"halves calibrate; got {alpha}"
        )
    _checks.check_integer("num_classes", num_classes, 1)

    def side(known: Sequence[Example], kept: Sequence[Example]) -> Side:
        annotator = teach(known)
        calibrator = ClassConditionalCalibrator(num_classes, ignore_index=ignore_index)
        for image, logits, labels in kept:
            with torch.no_grad():
                said = annotator(image[None], logits[None])
            calibrator.update(said, labels[None].to(said.device))
        return Side(annotator, calibrator.compute(share, fallback="pooled"))

    first, second = examples[::2], examples[1::2]
    return CrossFitted((side(first, second), side(second, first)))
