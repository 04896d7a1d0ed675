"""An alarm for a stream of images whose distribution changes."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping
from math import exp, log
from typing import Self, cast, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg._draws import uniform
from cpseg.errors import InputError

__all__ = ["ExchangeabilityMartingale"]


@final
class ExchangeabilityMartingale:
    """Watches one number per image for a change in its distribution.

    A conformal test martingale: each number's rank among all up to it, itself included, gives a
    p-value, smoothed where numbers tie, and the simple jumper (Vovk et al., 2021) bets that
    p-values are not uniform. Ranks against a fixed calibration set would not be independent, and
    would raise false alarms.

    Guarantee:
        If the numbers are exchangeable, in the order in which they come, :meth:`alarm` is ever
        raised with probability at most ``delta``, over the stream and the smoothing draws.

    Args:
        seed: Of the draws that smooth ties.
        jump: How readily bets change direction, in (0, 1).

    Examples:
        >>> martingale = ExchangeabilityMartingale().update(torch.arange(60.0))
        >>> martingale.alarm(delta=0.01)
        True
    """

    def __init__(self, seed: int = 0, *, jump: float = 0.01) -> None:
        _checks.check_integer("seed", seed)
        _checks.check_alpha(jump, "jump")
        self.seed: int = seed
        self.jump: float = jump
        self._seen: list[float] = []
        self._shares = [1 / 3, 1 / 3, 1 / 3]  # of the capital, on bets -1, 0 and 1
        self._log_value = self._log_largest = 0.0

    def update(self, statistics: Tensor) -> Self:
        """See numbers in the order in which their images came.

        Args:
            statistics: One per image: mean entropy, share kept, mean score. Shape ``(T,)``.

        Returns:
            The martingale itself.

        Raises:
            InputError: If statistics is not one axis of floats, or holds NaN.
        """
        _checks.check_tensor("statistics", statistics)
        if statistics.ndim != 1 or not statistics.is_floating_point():
            raise InputError(
                "statistics must be floating with shape (T,); "
                f"got {statistics.dtype} {_checks.describe(statistics.shape)}"
            )
        if bool(statistics.isnan().any()):
            raise InputError(f"statistics must not be NaN; got {int(statistics.isnan().sum())}")
        position = torch.arange(len(statistics)) + len(self._seen) + 1
        draws = uniform(self.seed, position).tolist()
        for value, draw in zip(statistics.tolist(), draws, strict=True):
            insort(self._seen, value)
            count = len(self._seen)
            below, upto = bisect_left(self._seen, value), bisect_right(self._seen, value)
            self._bet((count - upto + draw * (upto - below)) / count)
        return self

    def _bet(self, p_value: float) -> None:
        mixed = [(1 - self.jump) * share + self.jump / 3 for share in self._shares]
        won = [
            share * (1 + bet * (p_value - 0.5))
            for share, bet in zip(mixed, (-1, 0, 1), strict=True)
        ]
        growth = sum(won)
        self._shares = [share / growth for share in won]
        self._log_value += log(growth)
        self._log_largest = max(self._log_largest, self._log_value)

    @property
    def value(self) -> float:
        """The capital now, 1 at the start."""
        return exp(min(self._log_value, 700.0))

    @property
    def largest(self) -> float:
        """The largest capital so far."""
        return exp(min(self._log_largest, 700.0))

    def alarm(self, delta: float) -> bool:
        """Whether the capital has ever reached ``1 / delta``.

        Args:
            delta: Probability of a false alarm, ever.

        Returns:
            True if so.
        """
        _checks.check_alpha(delta, "delta")
        return self._log_largest >= -log(delta)

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors and numbers."""
        return {
            "kind": type(self).__name__,
            "seed": self.seed,
            "jump": self.jump,
            "seen": torch.tensor(self._seen, dtype=torch.float64),
            "shares": torch.tensor(self._shares, dtype=torch.float64),
            "log_values": torch.tensor([self._log_value, self._log_largest], dtype=torch.float64),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object]) -> Self:
        """The martingale that gave this state.

        Args:
            state: What ``state_dict`` returned.

        Returns:
            A new martingale that goes on where the other was.

        Raises:
            InputError: If the state is another class's.
        """
        if state.get("kind") != cls.__name__:
            raise InputError(f"state must be of a {cls.__name__}; got {state.get('kind')}")
        made = cls(cast("int", state["seed"]), jump=cast("float", state["jump"]))
        made._seen = cast("Tensor", state["seen"]).tolist()
        made._shares = cast("Tensor", state["shares"]).tolist()
        made._log_value, made._log_largest = cast("Tensor", state["log_values"]).tolist()
        return made
