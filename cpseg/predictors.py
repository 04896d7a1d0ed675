"""Logits and a calibration to sets: the classes each pixel can still have."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.calibration import Calibration
from cpseg.errors import InputError

__all__ = ["PixelSetPredictor", "check_input", "thresholds_of"]


@final
@dataclass(frozen=True, eq=False, slots=True)
class PixelSetPredictor:
    """The classes whose score does not exceed their threshold.

    A pixel whose logits are unusable (NaN, +inf, or nothing but -inf) gets the full set, and so
    does one whose group the calibration does not know.

    Guarantee:
        That of the calibration, :attr:`cpseg.Calibration.guarantee`. ``force_top`` only enlarges
        sets, and keeps it.

    Attributes:
        calibration: Thresholds and score.
        force_top: Put the most likely class into every set, so that none is empty.

    Examples:
        >>> from cpseg.calibrators import SplitCalibrator
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
        >>> calibrator = SplitCalibrator().update(logits, torch.zeros(4, dtype=torch.int64))
        >>> predictor = PixelSetPredictor(calibrator.compute(alpha=0.4))
        >>> predictor(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor([[ True, False],
                [False, False]])
    """

    calibration: Calibration
    force_top: bool = False

    def __call__(self, logits: Tensor, groups: Tensor | None = None) -> Tensor:
        """Sets of a batch.

        Args:
            logits: Shape ``(B, C, *S)``.
            groups: Integers, ``(*S)`` or ``(B, *S)``, where the calibration has groups.

        Returns:
            Whether each class is in the pixel's set. Bool ``(B, C, *S)``.

        Raises:
            InputError: If the logits have other classes or another grid than the calibration,
                groups are missing or not wanted, or the calibration is bound to a filter rule.
        """
        self.calibration.require_rule(None)
        thresholds = thresholds_of(self.calibration, logits, groups)
        with torch.no_grad():
            sets = ~(self.calibration.score(logits) > thresholds)
            if self.force_top and logits.numel():
                sets.scatter_(1, logits.argmax(1, keepdim=True), value=True)
        return sets


def thresholds_of(calibration: Calibration, logits: Tensor, groups: Tensor | None) -> Tensor:
    """The threshold of every class at every pixel, in a shape that broadcasts to the logits'.

    Args:
        calibration: The thresholds and their axes.
        logits: Shape ``(B, C, *S)``.
        groups: Integers, ``(*S)`` or ``(B, *S)``, where the calibration has groups.

    Returns:
        float32 thresholds, ``+inf`` where the group is out of range. Shape ``(1 or B, 1 or C,
        *S or ones)``.

    Raises:
        InputError: As :class:`PixelSetPredictor`.
    """
    check_input(calibration, logits, groups)
    thresholds = calibration.thresholds.to(logits.device)
    if calibration.axes == ("location",):
        return thresholds[None, None]
    if groups is None:
        return thresholds.view(1, -1, *(1 for _ in logits.shape[2:]))
    index = groups.long() if groups.ndim == logits.ndim - 1 else groups.long()[None]
    known = (index >= 0) & (index < len(thresholds))
    per_pixel = thresholds[index * known]  # (1 or B, *S), with classes last if there are any
    if calibration.axes == ("group", "class"):
        return torch.where(known[..., None], per_pixel, torch.inf).movedim(-1, 1)
    return torch.where(known, per_pixel, torch.inf)[:, None]


def check_input(calibration: Calibration, logits: Tensor, groups: Tensor | None) -> None:
    """Refuse what :func:`thresholds_of` cannot serve; reads no values."""
    _checks.check_logits(logits, calibration.num_classes)
    space, grid = logits.shape[2:], calibration.thresholds.shape
    if calibration.axes == ("location",) and grid != space:
        raise InputError(
            f"logits must have spatial shape {_checks.describe(grid)}, the calibration's "
            f"locations; got {_checks.describe(space)}"
        )
    if "group" not in calibration.axes:
        if groups is not None:
            raise InputError(f"groups must be None for a calibration with axes {calibration.axes}")
    elif groups is None:
        raise InputError(f"groups must be given for a calibration with axes {calibration.axes}")
    else:
        _checks.check_groups(groups, logits)
