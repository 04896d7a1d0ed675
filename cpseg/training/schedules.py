"""Numbers that change over training, as functions of progress in [0, 1]."""

import math
from dataclasses import dataclass
from typing import Protocol, final

from cpseg import _checks

__all__ = ["Complement", "Constant", "Exponential", "Linear", "Poly", "Schedule"]


class Schedule(Protocol):
    """A number for each progress: 0 at the first step, 1 after the last."""

    def __call__(self, progress: float, /) -> float:
        """The number at ``progress``."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Constant:
    """Always ``value``.

    Examples:
        >>> Constant(0.5)(0.9)
        0.5
    """

    value: float

    def __post_init__(self) -> None:
        _checks.check_weight("value", self.value)

    def __call__(self, progress: float, /) -> float:
        """``value``."""
        del progress
        return self.value


@final
@dataclass(frozen=True, slots=True)
class Linear:
    """From ``start`` to ``end`` in a straight line.

    Examples:
        >>> Linear(1.0, 0.0)(0.25)
        0.75
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        _checks.check_weight("start", self.start)
        _checks.check_weight("end", self.end)

    def __call__(self, progress: float, /) -> float:
        """``start + (end - start) * progress``."""
        return self.start + (self.end - self.start) * progress


@final
@dataclass(frozen=True, slots=True)
class Exponential:
    """From ``start`` down by ``exp(-rate * progress)``.

    Examples:
        >>> round(Exponential(0.5, rate=5.0)(1.0), 5)
        0.00337
    """

    start: float
    rate: float = 5.0

    def __post_init__(self) -> None:
        _checks.check_weight("start", self.start)
        _checks.check_weight("rate", self.rate)

    def __call__(self, progress: float, /) -> float:
        """``start * exp(-rate * progress)``."""
        return self.start * math.exp(-self.rate * progress)


@final
@dataclass(frozen=True, slots=True)
class Poly:
    """From ``start`` to 0 by ``(1 - progress) ** power``.

    Examples:
        >>> Poly(2.0, power=2.0)(0.5)
        0.5
    """

    start: float
    power: float = 0.9

    def __post_init__(self) -> None:
        _checks.check_weight("start", self.start)
        _checks.check_weight("power", self.power)

    def __call__(self, progress: float, /) -> float:
        """``start * (1 - progress) ** power``."""
        return self.start * math.pow(1 - progress, self.power)


@final
@dataclass(frozen=True, slots=True)
class Complement:
    """What another schedule leaves of 1: with lambda for one loss, ``1 - lambda`` for the other.

    Examples:
        >>> Complement(Linear(0.5, 0.0))(0.5)
        0.75
    """

    of: Schedule

    def __call__(self, progress: float, /) -> float:
        """``1 - of(progress)``."""
        return 1 - self.of(progress)
