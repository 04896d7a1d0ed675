"""Percentile intervals over resampled units (Efron, 1979)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.errors import InputError
from cpseg.metrics._estimates import Estimate, Ratio

# Draws of one block of resamples: 32 MB of float64 weights.
BLOCK = 2**22


@final
@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How units are resampled.

    Every statistic is a function of sums over units, so one set of weights serves all of them.
    Memory: one block of weights, and 8 bytes per column and resample.
    """

    resamples: int
    confidence: float
    seed: int

    def __post_init__(self) -> None:
        _checks.check_alpha(self.confidence, "confidence")
        object.__setattr__(self, "resamples", _checks.check_integer("resamples", self.resamples, 1))
        object.__setattr__(self, "seed", _checks.check_integer("seed", self.seed, 0))
        if self.seed >= 2**63:
            raise InputError(f"seed must fit in int64; got {self.seed}")

    def weights(self, n: int) -> Iterator[Tensor]:
        """How often each resample drew each unit, in blocks of bounded size. ``(R, n)``."""
        generator = torch.Generator().manual_seed(self.seed)
        block = max(1, BLOCK // n)
        for start in range(0, self.resamples, block):
            shape = min(block, self.resamples - start), n
            drawn = torch.randint(n, shape, generator=generator)
            counts = torch.zeros(shape, dtype=torch.float64)
            yield counts.scatter_add_(1, drawn, torch.ones_like(counts))

    def sums(self, *columns: Tensor) -> list[Tensor]:
        """Sums of columns over all units, then over each resample of them.

        Args:
            columns: Numbers per unit, ``(n, k)`` each.

        Returns:
            float64 ``(1 + R, k)`` for each; ``(1, k)`` with fewer than two units, since one says
            nothing about how units differ.
        """
        found = [[column.double().sum(0, keepdim=True)] for column in columns]
        n = len(columns[0])
        for weights in self.weights(n) if n > 1 else ():
            for sums, column in zip(found, columns, strict=True):
                sums.append(weights @ column.double())
        return [torch.cat(sums) for sums in found]

    def estimate(self, values: Tensor, shape: Sequence[int] = ()) -> Estimate:
        """A statistic of :meth:`sums`, ``(1 + R, k)``: its value and interval, as ``shape``."""
        value, drawn = values[0].reshape(shape), values[1:].sort(0).values
        if not len(drawn):
            return Estimate(value, value + torch.nan, value + torch.nan)
        # Resamples without the class sort last, as NaN; the interval is that of the others.
        last = (~drawn.isnan()).sum(0) - 1
        tail = (1 - self.confidence) / 2
        ends: list[Tensor] = []
        for share in (tail, 1 - tail):
            place = (share * last.double()).clamp(min=0.0)
            below = drawn.gather(0, place.floor().long()[None])[0]
            above = drawn.gather(0, place.ceil().long()[None])[0]
            ends.append((below + (above - below) * (place - place.floor())).reshape(shape))
        return Estimate(value, *ends)

    def ratios(self, *parts: tuple[Tensor, Tensor]) -> list[Ratio]:
        """Ratios of int64 counts, numerator and denominator ``(n,)`` or ``(n, K)`` each."""
        sums = self.sums(*(column for part in parts for column in columns_of(*part)))
        return [self.ratio(part, sums[4 * i : 4 * i + 4]) for i, part in enumerate(parts)]

    def ratio(self, part: tuple[Tensor, Tensor], sums: Sequence[Tensor]) -> Ratio:
        """One ratio from the sums of its :func:`columns_of`."""
        numerator, denominator = part
        each, there, top, bottom = sums
        shape = numerator.shape[1:]
        return Ratio(
            mean_of_images=self.estimate(divide(each, there), shape),
            mean_of_pixels=self.estimate(divide(top, bottom), shape),
            num_images=(denominator > 0).sum(0),
            numerator=numerator.sum(0),
            denominator=denominator.sum(0),
        )


def columns_of(numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a ratio sums over units: each unit's ratio, whether it has one, and both parts."""
    top, bottom = (x[:, None] if x.ndim == 1 else x for x in (numerator, denominator))
    return divide(top, bottom).nan_to_num(0.0), bottom > 0, top, bottom


def divide(top: Tensor, bottom: Tensor) -> Tensor:
    """The quotient in float64; NaN where there is nothing to divide by."""
    return torch.where(bottom > 0, top.double() / bottom.double(), torch.nan)


def spread(top: Tensor, bottom: Tensor, *, largest: bool = False) -> tuple[Tensor, float, float]:
    """Each unit's ratio, ascending; the worst one; the mean of the worst tenth, rounded up."""
    ratios = divide(top, bottom)
    ratios = ratios[~ratios.isnan()].sort().values
    if not len(ratios):
        return ratios, float("nan"), float("nan")
    tenth = -(-len(ratios) // 10)
    worst = ratios[-tenth:].flip(0) if largest else ratios[:tenth]
    return ratios, worst[0].item(), worst.mean().item()
