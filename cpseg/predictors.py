"""Logits and a calibration to sets: the classes each pixel can still have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg._classes import Parts, aligned, class_index, holds, joined, num_classes, top_class
from cpseg._tiles import Columns, CompileWarning
from cpseg.calibration import Calibration
from cpseg.errors import InputError
from cpseg.scores import ColumnScore, score_columns, scores_in_parts
from cpseg.sets import PackedSets, pack

__all__ = ["CompileWarning", "PixelSetPredictor"]


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
        compiled: Fuse the work into one kernel with ``torch.compile``. The first call with a
            number of classes compiles for seconds. Without a compiler it warns once and goes on.

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
    compiled: bool = False

    def __post_init__(self) -> None:
        check_calibration(self.calibration)
        _checks.check_flag("force_top", self.force_top)
        _checks.check_flag("compiled", self.compiled)

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
        return self._made(logits, groups, _Sets).view(torch.bool)

    def packed(self, logits: Tensor, groups: Tensor | None = None) -> PackedSets:
        """The same sets, one bit per class.

        Args:
            logits: Shape ``(B, C, *S)``.
            groups: Integers, ``(*S)`` or ``(B, *S)``, where the calibration has groups.

        Returns:
            Sets of which :meth:`~cpseg.sets.PackedSets.unpack` gives what calling gives.

        Raises:
            InputError: As calling does.
        """
        return PackedSets(self._made(logits, groups, _Words), logits.shape[1])

    def _made(self, logits: Tensor, groups: Tensor | None, kind: "type[_Sets | _Words]") -> Tensor:
        self.calibration.require_rule(None)
        axes, force_top = self.calibration.axes, self.force_top
        (made,) = run(
            lambda score: kind(score, axes, force_top),
            self.calibration,
            logits,
            groups,
            compiled=self.compiled,
        )
        return made


# --- one pass, from logits and thresholds --------------------------------------------------------


def run(
    columns: Callable[[ColumnScore], Columns],
    calibration: Calibration,
    logits: Tensor,
    groups: Tensor | None,
    *,
    compiled: bool,
) -> tuple[Tensor, ...]:
    """Run ``columns(score)`` over a batch, with what :func:`limits_of` needs beside the logits."""
    check_input(calibration, logits, groups)
    thresholds = calibration.thresholds.to(logits.device)
    near, fixed = beside_of(calibration.axes, thresholds, logits, groups)
    return score_columns(columns, calibration.score, logits, near, fixed, compiled=compiled)


def beside_of(
    axes: tuple[str, ...], thresholds: Tensor, logits: Tensor, groups: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """What :func:`limits_of` needs: near each pixel, and for all of them."""
    if axes == ("location",):
        return [thresholds[None]], []
    near = [] if groups is None else [groups if groups.ndim == logits.ndim - 1 else groups[None]]
    return near, [thresholds]


def limits_of(axes: tuple[str, ...], beside: tuple[Tensor, ...], x: Parts) -> Parts:
    """The threshold of every class at every pixel of a block, in its parts.

    Each ``(K, N)``, or ``(K, 1)`` where a class has one for all pixels; ``+inf`` where the group is
    out of range.
    """
    if axes == ("location",):
        limit = beside[0][None]
    elif "group" not in axes:
        limit = beside[0][:, None]
    else:
        index, thresholds = beside
        known = (index >= 0) & (index < len(thresholds))
        limit = thresholds.view(len(thresholds), -1)[index * known].t()
        limit = torch.where(known, limit, torch.inf)
    return aligned(limit.expand(num_classes(x), -1), x)


@dataclass(frozen=True, slots=True)
class _Sets:
    """Whether each class of a block is in its pixel's set."""

    score: ColumnScore
    axes: tuple[str, ...]
    force_top: bool

    def __call__(self, x: Parts, position: Tensor, /, *beside: Tensor) -> tuple[Tensor, ...]:
        members = self.members(x, position, beside)
        if torch.compiler.is_compiling():  # a kernel stores bytes faster than bools
            members = [torch.where(member, 1.0, 0.0).to(torch.uint8) for member in members]
        return (joined(members),)

    def members(self, x: Parts, position: Tensor, beside: tuple[Tensor, ...]) -> Parts:
        """Whether each class is in, in the parts of the block."""
        scores = scores_in_parts(self.score, x, position)
        limits = limits_of(self.axes, beside, x)
        pairs = zip(scores, limits, strict=True)
        members = [~holds(torch.gt, part, limit) for part, limit in pairs]
        if not self.force_top:
            return members
        top = top_class(x).int()
        pairs = zip(members, class_index(x), strict=True)
        return [member | (index == top) for member, index in pairs]


@dataclass(frozen=True, slots=True)
class _Words:
    """As :class:`_Sets`, packed."""

    score: ColumnScore
    axes: tuple[str, ...]
    force_top: bool

    def __call__(self, x: Parts, position: Tensor, /, *beside: Tensor) -> tuple[Tensor, ...]:
        sets = _Sets(self.score, self.axes, self.force_top)
        return (pack(sets.members(x, position, beside)),)


def columns_of(predictor: PixelSetPredictor, score: ColumnScore) -> Columns:
    """What a predictor does on columns: to sets, as bool or bytes.

    Args:
        predictor: The predictor.
        score: Its calibration's score, on columns.

    Returns:
        An operation that takes, beside the logits, what :func:`beside_of` gives.
    """
    return _Sets(score, predictor.calibration.axes, predictor.force_top)


# --- checks --------------------------------------------------------------------------------------


def check_calibration(calibration: object) -> None:
    """Refuse what is no calibration, and name the step that was forgotten."""
    if not isinstance(calibration, Calibration):
        remedy = ". Call its compute(alpha) first" if hasattr(calibration, "compute") else ""
        told = _checks.kind_of(calibration)
        raise InputError(f"calibration must be a Calibration; got {told}{remedy}")


def check_input(calibration: Calibration, logits: Tensor, groups: Tensor | None) -> None:
    """Refuse logits and groups that do not fit the calibration; reads no values."""
    _checks.check_logits(logits, calibration.num_classes)
    _checks.check_data("logits", logits)
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
