"""All labeled images teach and all calibrate: two corrections of an annotator.

What a correction learned from an image says nothing of how it does on others, so for one of them
no image can do both. For two it can: each is calibrated on what taught the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from cpseg import _checks
from cpseg.calibration import Calibration, Guarantee
from cpseg.calibrators import ClassConditionalCalibrator
from cpseg.errors import InputError
from cpseg.filters import SoftLabels
from cpseg.quantile import Level, fewest_units, level
from cpseg.training.refining import Example, check_example
from cpseg.training.targets import pool_probabilities

__all__ = ["Correction", "CrossFitted", "cross_fit"]

Correction = Callable[[Tensor, Tensor], Tensor]
"""Images ``(B, 3, H, W)`` and an annotator's logits ``(B, C, H, W)`` to better logits.

A :class:`~cpseg.training.Refined` is one.
"""


@final
@dataclass(frozen=True, eq=False, slots=True)
class CrossFitted:
    """What two corrections of an annotator say together, each within its sets.

    Made by :func:`cross_fit`.

    Guarantee:
        For each class but those that are :attr:`unpromised`: in a new image that contains it, the
        share of its labeled pixels whose probability is 0 is at most :attr:`alpha` in expectation
        over the labeled images and the new one, if images are exchangeable. The annotator's
        logits, and all that a correction rests on, must have been chosen without the labels of
        the half that calibrates it. It does not imply the same for an image as a whole.
        :attr:`guarantee` says it with numbers.

    Attributes:
        corrections: The one taught by the first half, and the one taught by the second.
        calibrations: Of the first on the second half, and of the second on the first.
        alpha: What both together may miss of a class.
    """

    corrections: tuple[Correction, Correction]
    calibrations: tuple[Calibration, Calibration]
    alpha: float

    @property
    def unpromised(self) -> Tensor:
        """Classes that too few images of a half show for a promise. Bool ``(C,)``."""
        one, other = self.calibrations
        return one.fallback_groups | other.fallback_groups

    @property
    def guarantee(self) -> Guarantee:
        """What is promised, on how many images of a half it rests, and what is not."""
        none = self.unpromised
        counts = torch.stack([calibration.num_units for calibration in self.calibrations])
        counts = counts if bool(none.all()) else counts[:, ~none]
        classes = ", ".join(str(c) for c in none.nonzero().flatten().tolist())
        left = (f"Nothing is promised for: {classes}; too few images of a half show them.",)
        return Guarantee(
            event=f"For each class, in a new image that contains it, the share of its labeled "
            f"pixels whose probability is 0 is at most {self.alpha}",
            level=float(1 - level(self.alpha)),
            unit="image",
            n=(int(counts.min()), int(counts.max())),
            probability="in expectation over the labeled images and the new one",
            assumptions=(
                "the labeled images and the new one are exchangeable, or what unit_ids named",
                "alpha and all of a correction were chosen without the labels that calibrate it",
                "the new logits are computed as those of the labeled images were",
            ),
            exceptions=(
                *(left if classes else ()),
                "It does not imply the same for an image as a whole.",
            ),
        )

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
            SoftLabels(calibration)(corrected(images, logits))
            for corrected, calibration in zip(self.corrections, self.calibrations, strict=True)
        )
        return pool_probabilities(one.log(), other)


def cross_fit(
    teach: Callable[[Sequence[Example]], Correction],
    first: Sequence[Example],
    second: Sequence[Example],
    alpha: Level = 0.1,
    *,
    unit_ids: tuple[Sequence[int], Sequence[int]] | None = None,
    ignore_index: int = 255,
) -> CrossFitted:
    """Teach a correction of an annotator on each half of the labeled images, calibrate on the other.

    Each has a threshold per class at half of ``alpha``, so that both together miss no more than
    ``alpha`` in expectation; a class that too few images show has the threshold of all, and is
    promised nothing. That is the price: a class must be in ``2 / alpha - 1`` images of each half,
    where one correction alone would be calibrated on ``1 / alpha - 1``. Ours.

    Args:
        teach: From one half to a correction, in evaluation mode if it is a module. Called twice,
            and to begin anew each time: a network, its class weights and whatever else is fitted
            may come from this half alone. See :func:`~cpseg.training.refine`.
        first: Image, the annotator's logits, and labels of one half of the labeled images; whole
            images, of any sizes.
        second: Of the other half.
        alpha: What both together may miss of a class.
        unit_ids: The unit of each example, half by half, where one unit comes in several: the
            patient, scene or video of images whose like new images come from. No unit may be in
            both halves.
        ignore_index: Label of pixels that do not count.

    Returns:
        Both corrections, calibrated.

    Raises:
        InputError: If examples do not fit, a half has fewer than ``2 / alpha - 1`` labeled units,
            both share one, a correction is in training mode, or both share parameters.

    Examples:
        >>> image, logits = torch.zeros(3, 1, 2, dtype=torch.uint8), torch.zeros(2, 1, 2)
        >>> half = [(image, logits, torch.tensor([[0, 1]]))] * 9
        >>> both = cross_fit(lambda known: lambda images, logits: logits, half, half, alpha=0.2)
        >>> both(image[None], logits[None])[0, :, 0, 0]
        tensor([0.5000, 0.5000])
    """
    share = level(alpha) / 2
    classes = len(first[0][1]) if len(first) else 0
    _checks.check_ignore_index(ignore_index, classes)
    units = _units(len(first), len(second), unit_ids)
    least = fewest_units(share)
    for name, half, ids in (("first", first, units[0]), ("second", second, units[1])):
        labeled = _labeled_units(half, ids, classes, ignore_index)
        if labeled < least:
            raise InputError(
                f"{name} must hold at least 2 / alpha - 1 = {least} labeled units; got {labeled}"
            )
    one, other = teach(first), teach(second)
    _check_apart(one, other)

    def calibrated(
        corrected: Correction, kept: Sequence[Example], ids: Sequence[int]
    ) -> Calibration:
        calibrator = ClassConditionalCalibrator(classes, ignore_index=ignore_index)
        for index, unit in enumerate(ids):
            image, logits, labels = kept[index]
            with torch.no_grad():
                said = corrected(image[None], logits[None])
            calibrator.update(said, labels[None].to(said.device), [unit])
        return calibrator.compute(share, fallback="pooled")

    calibrations = calibrated(one, second, units[1]), calibrated(other, first, units[0])
    return CrossFitted((one, other), calibrations, float(2 * share))


def _units(
    first: int, second: int, unit_ids: tuple[Sequence[int], Sequence[int]] | None
) -> tuple[Sequence[int], Sequence[int]]:
    """The unit of each example of either half; images, unless told otherwise."""
    if unit_ids is None:
        return range(first), range(second)
    one, other = (_checks.check_ids("unit_ids", ids) for ids in unit_ids)
    if (len(one), len(other)) != (first, second):
        raise InputError(
            f"unit_ids must have {first} and {second} ids, one per example; "
            f"got {len(one)} and {len(other)}"
        )
    if shared := set(one) & set(other):
        raise InputError(f"no unit may be in both halves; got {min(shared)} in unit_ids of both")
    return one, other


def _labeled_units(
    half: Sequence[Example], ids: Sequence[int], classes: int, ignore_index: int
) -> int:
    """How many units have a labeled pixel; all examples are checked, since teaching takes minutes."""
    labeled = set[int]()
    for index, unit in enumerate(ids):
        example = half[index]
        check_example(example, ignore_index)
        _, logits, labels = example
        if len(logits) != classes:
            raise InputError(f"examples must have logits of {classes} classes; got {len(logits)}")
        if bool((labels != ignore_index).any()):
            labeled.add(unit)
    return len(labeled)


def _check_apart(one: Correction, other: Correction) -> None:
    modules = [each for each in (one, other) if isinstance(each, nn.Module)]
    if any(module.training for module in modules):
        raise InputError("teach must give corrections in evaluation mode; got one in training mode")
    held = [{id(part) for part in module.parameters()} for module in modules]
    if len(held) == 2 and held[0] & held[1]:
        raise InputError("teach must begin anew each time; got corrections that share parameters")
