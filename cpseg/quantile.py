"""Exact conformal ranks, and the one quantile every threshold of cpseg is.

A threshold is the smallest score with at most a *budget* of mass strictly above it. With mass 1
for each of ``n`` scores the budget is ``floor(alpha * (n + 1) - 1)``, which is the score of rank
``ceil((n + 1) * (1 - alpha))``. With mass ``1 / m`` for each of the ``m`` pixels of an image, and
``n`` images, the same budget gives conformal risk control of the per-image miscoverage. Masses
are integers, ``ceil(UNIT_MASS / m)``: sums do not depend on their order, and rounding up can only
raise a threshold.
"""

from fractions import Fraction
from math import ceil, floor

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.errors import InputError

UNIT_MASS = 2**40
"""Mass of one unit, shared by its pixels."""

MAX_UNITS = 2**22
"""Most units one accumulator may see, so that their mass still fits in int64."""

__all__ = [
    "MAX_UNITS",
    "Level",
    "conformal_quantile",
    "conformal_rank",
    "level",
    "weighted_quantile",
]

Level = float | Fraction
"""A float, numpy's too, or a fraction, strictly between 0 and 1. See :func:`level`."""


def level(alpha: Level) -> Fraction:
    """The rational number that ``alpha`` means.

    A float means the decimal it prints as: the shortest one that rounds to it at its own
    precision. So ``0.1`` and ``numpy.float32(0.1)`` are both one tenth, which neither is in
    binary. A fraction means itself.

    Args:
        alpha: Level strictly between 0 and 1.

    Returns:
        The fraction.

    Raises:
        InputError: If alpha does not lie strictly between 0 and 1.

    Examples:
        >>> level(0.1), level(Fraction(1, 3))
        (Fraction(1, 10), Fraction(1, 3))
    """
    _checks.check_alpha(alpha)
    return Fraction(str(alpha))  # of numpy's floats too, whose repr is no number


def fewest_units(alpha: Level) -> int:
    """Of how many calibration units on a finite threshold can keep the promise."""
    return ceil(1 / level(alpha)) - 1


def conformal_rank(n: int, alpha: Level) -> int:
    """Rank of the score that is the threshold: ``ceil((n + 1) * (1 - alpha))``, exactly.

    Args:
        n: Number of exchangeable calibration scores.
        alpha: Level strictly between 0 and 1.

    Returns:
        The 1-based rank; ``n + 1`` means that no finite threshold keeps the promise.

    Raises:
        InputError: If n is no count, or alpha does not lie strictly between 0 and 1.

    Examples:
        >>> conformal_rank(9, 0.1), conformal_rank(8, 0.1), conformal_rank(999, 0.059)
        (9, 9, 941)
    """
    return ceil((_checks.check_integer("n", n, 0) + 1) * (1 - level(alpha)))


def budget(alpha: Level, n: int, unit_mass: int = 1) -> int:
    """Most mass that may lie strictly above a threshold.

    Args:
        alpha: Level strictly between 0 and 1.
        n: Number of units.
        unit_mass: Mass of one unit.

    Returns:
        ``floor(unit_mass * (alpha * (n + 1) - 1))``; negative when no finite threshold exists.

    Raises:
        InputError: If alpha does not lie strictly between 0 and 1.

    Examples:
        >>> budget(0.1, 9), budget(0.1, 8), budget(0.1, 99)
        (0, -1, 9)
    """
    return floor(unit_mass * (level(alpha) * (n + 1) - 1))


def conformal_quantile(scores: Tensor, alpha: Level) -> Tensor:
    """The split-conformal threshold of exchangeable scores.

    Guarantee:
        With probability at least ``1 - alpha`` over these scores and a fresh one, if they are
        exchangeable and alpha was chosen without them, the fresh one is at most the result.

    Args:
        scores: Floating scores. Shape ``(N,)``.
        alpha: Level strictly between 0 and 1.

    Returns:
        The score of rank :func:`conformal_rank`, ``+inf`` if that exceeds ``N``. Shape ``()``.

    Raises:
        InputError: If scores is not one axis of floats, or holds NaN, or alpha does not lie
            strictly between 0 and 1.

    Examples:
        >>> conformal_quantile(torch.tensor([3.0, 1.0, 2.0, 4.0]), 0.25)
        tensor(4.)
        >>> conformal_quantile(torch.tensor([3.0, 1.0, 2.0]), 0.2)
        tensor(inf)
    """
    _checks.check_tensor("scores", scores)
    return weighted_quantile(
        scores,
        torch.ones(scores.shape, dtype=torch.int64, device=scores.device),
        budget(alpha, scores.numel()),
    )


def weighted_quantile(scores: Tensor, mass: Tensor, above: int) -> Tensor:
    """The smallest score with mass at most ``above`` strictly above it.

    Args:
        scores: Floating scores, in any order, ties welcome. Shape ``(N,)``.
        mass: Non-negative int64 mass of each score. Shape ``(N,)``.
        above: The budget; negative gives ``+inf``.

    Returns:
        One of the scores, or ``+inf``. Shape ``()``.

    Raises:
        InputError: If shapes or dtypes do not fit, or a score is NaN.

    Examples:
        >>> weighted_quantile(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5, 2, 2]), 3)
        tensor(2.)
    """
    _checks.check_tensor("scores", scores)
    if scores.ndim != 1 or scores.dtype not in _checks.FLOATS:
        raise InputError(
            "scores must be floating with shape (N,); "
            f"got {scores.dtype} {_checks.describe(scores.shape)}"
        )
    _checks.check_map("mass", mass, scores.shape, f"scores {_checks.describe(scores.shape)}")
    if scores.isnan().any():
        raise InputError(f"scores must not be NaN; got {int(scores.isnan().sum())} of them")
    infinite = scores.new_full((), torch.inf)
    if above < 0 or scores.numel() == 0:
        return infinite
    values, index = torch.unique(scores, sorted=True, return_inverse=True)
    pooled = torch.zeros(values.shape, dtype=torch.int64, device=mass.device)
    pooled = pooled.index_add(0, index, mass.long())
    over = mass_above(torch.zeros_like(pooled), pooled)
    found: Tensor = values[(over > above).sum()]
    return found


def mass_above(rows: Tensor, mass: Tensor) -> Tensor:
    """Mass strictly above each entry within its row, for entries sorted by row, then score.

    Args:
        rows: Non-decreasing int64 row of each entry. Shape ``(N,)``.
        mass: int64 mass of each entry, no two entries of a row having one score. Shape ``(N,)``.

    Returns:
        int64 mass. Shape ``(N,)``.

    Examples:
        >>> mass_above(torch.tensor([0, 0, 1, 1]), torch.tensor([4, 3, 2, 1]))
        tensor([3, 0, 1, 0])
    """
    # The running total may pass 2**63 over many rows. It wraps, and so does the difference:
    # what is right modulo 2**64 and lies below 2**63 is right.
    total = mass.cumsum(0)
    last = torch.searchsorted(rows, rows, right=True) - 1
    return total[last] - total
