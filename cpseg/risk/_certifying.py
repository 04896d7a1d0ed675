"""Losses to the best thresholds that can be certified, or what it would take where none can."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log
from typing import cast

import torch
from torch import Tensor

from cpseg.bounds import (
    PValue,
    clopper_pearson,
    fixed_sequence,
    hoeffding,
    hoeffding_bentkus,
    least_units,
)
from cpseg.errors import InputError
from cpseg.quantile import UNIT_MASS, budget, fewest_units
from cpseg.risk.kept import KeptError
from cpseg.risk.losses import Losses, Risk

__all__ = ["Asked", "Found", "certified", "checked_losses"]

_ANY_ORDER: tuple[PValue, ...] = (hoeffding, hoeffding_bentkus, clopper_pearson)


@dataclass(frozen=True, slots=True)
class Asked:
    """What ``RiskCalibrator.compute`` was asked for."""

    alpha: float
    delta: float | None
    bound: PValue
    simultaneous: bool
    monotonize: bool

    @property
    def by_lot(self) -> bool:
        """Whether the order of the units takes part in the test."""
        return self.delta is not None and self.bound not in _ANY_ORDER


@dataclass(frozen=True, slots=True)
class Found:
    """Of one threshold to find: the one that was certified, or None and what it would take.

    The note is None, too, where nobody asked for the threshold.
    """

    threshold: float | None
    note: str | None = None


def checked_losses(risk: Risk, table: Tensor, alpha: float) -> Losses:
    """What a risk says of units' counts, if it is what the risk is declared to be.

    Args:
        risk: Whose losses.
        table: One row of counts per unit. int64 ``(N, T)``.
        alpha: The level.

    Returns:
        The losses.

    Raises:
        InputError: If losses lie outside of [0, 1], or fall where they are declared monotone.
    """
    losses = risk.losses(table, alpha)
    outside = int((~((losses.values >= 0) & (losses.values <= 1))).sum())
    if outside:
        raise InputError(f"risk must lie in [0, 1]; got {outside} losses that do not")
    if risk.monotone:
        steps = losses.values.diff(dim=2)
        falls = steps < 0 if risk.keeps else steps > 0
        wrong = int((falls.any(2) & losses.counted).any(1).sum())
        if wrong:
            raise InputError(
                f"risk must be monotone, as it is declared; got {wrong} units with a loss that "
                "is larger at a safer threshold. Declare monotone=False"
            )
    return losses


def certified(
    risk: Risk, losses: Losses, grid: Tensor, start: Tensor | None, asked: Asked
) -> Iterator[Found]:
    """The best thresholds whose risk is at most alpha, one after the other.

    Args:
        risk: Whose losses.
        losses: Of units in the order in which tests see them.
        grid: The thresholds tried. float32 ``(K,)``.
        start: Where tests begin, ``(R,)``; None: where the risk's begin.
        asked: Level, probability and test.

    Yields:
        What was found for each of the R thresholds.

    Raises:
        InputError: If the risk cannot be controlled in expectation, and that was asked for.
    """
    rows, steps = losses.values.shape[1:]
    for row in range(rows):
        # Columns from the safe end on.
        values = losses.values[losses.counted[:, row], row]
        values = values if risk.keeps else values.flip(1)
        starts, test = [0], None
        if asked.delta is None:
            passed = _in_expectation(risk, values, asked)
        else:
            if len(values):
                starts = _starts(risk, grid, None if start is None else start[row])
            share = asked.delta / (rows if asked.simultaneous else 1)
            test = share / len(starts)
            passed = fixed_sequence(asked.bound(values, asked.alpha, test), share, starts)
        if bool(passed.any()):
            last = int(passed.nonzero().max())
            yield Found(float(grid[last if risk.keeps else steps - 1 - last]))
        elif rows == 1 or len(values) or _wanted(risk, row):
            yield Found(None, _how_many(values[:, starts], asked.alpha, asked.bound, test))
        else:
            yield Found(None)


def _in_expectation(risk: Risk, values: Tensor, asked: Asked) -> Tensor:
    """Which thresholds, from the safe end on, pass conformal risk control. Bool ``(K,)``."""
    if not risk.monotone:
        if isinstance(risk, KeptError):
            raise InputError(
                "delta must be given for KeptError: a ratio of expectations is controlled by "
                "tests only. FalseShare has an expectation"
            )
        if not asked.monotonize:
            raise InputError(
                "risk must be monotone to be controlled in expectation; got one that is not. "
                "Give delta, or monotonize=True"
            )
        values = values.cummax(1).values if values.numel() else values
    mass = (values * UNIT_MASS).ceil().long().sum(0)
    return (mass <= budget(asked.alpha, len(values), UNIT_MASS)).cumprod(0).bool()


def _starts(risk: Risk, grid: Tensor, start: Tensor | None) -> list[int]:
    """Positions where tests of one threshold begin, counted from the safe end."""
    steps = len(grid)
    if start is not None:
        position = max(int((grid <= start).sum()) - 1, 0)
        return [position if risk.keeps else steps - 1 - position]
    if risk.starts == 1:
        return [0]
    parts = risk.starts + 1
    return sorted({steps * part // parts for part in range(1, parts)})


def _wanted(risk: Risk, row: int) -> bool:
    """Whether a class is among those that a risk was asked to look at."""
    classes = cast("tuple[int, ...] | None", getattr(risk, "classes", None))
    return classes is None or row in classes


def _how_many(begun: Tensor, alpha: float, bound: PValue, test: float | None) -> str:
    """How many units would do, in a sentence or two, by their losses where tests begin."""
    least = fewest_units(alpha) if test is None else least_units(alpha, test)
    seen = f"{len(begun)} images were seen; fewer than {least} can never do."
    if not len(begun):
        return seen
    gain = alpha - float(begun.mean(0).min()) if test is None else _gain(begun, alpha, bound)
    if gain < 1e-12:  # where nothing is kept, losses are alpha but for a rounding
        return f"{seen} At the errors seen here no number of images would."
    if test is None:
        return f"{seen} At the errors seen here about {ceil((1 - alpha) / gain)} would."
    # A fifth more than it takes on average to gain a factor of 1 / test.
    would = max(ceil(1.2 * log(1 / test) / gain), least, len(begun) + 1)
    return f"{seen} At the errors seen here about {would} would."


def _gain(begun: Tensor, alpha: float, bound: PValue) -> float:
    """How fast evidence grows: the mean of its logarithm per image, where it is largest."""
    mean = begun.mean(0).clamp(max=alpha)
    if bound is hoeffding:
        return float(2 * (alpha - mean).square().max())
    if bound in _ANY_ORDER:  # relative entropy
        entropy = torch.xlogy(mean, mean / alpha) + torch.xlogy(1 - mean, (1 - mean) / (1 - alpha))
        return float(entropy.max())
    bets = [step / 40 / (1 - alpha) for step in range(1, 40)]
    return max(float((1 + bet * (alpha - begun)).log().mean(0).max()) for bet in bets)
