"""Is a mean at most alpha? p-values from independent losses, and testing many at once.

Every p-value here is for the hypothesis that the mean of the losses is *at least* alpha: a small
one says that the risk is controlled. All are valid for every number of losses, not only for many.
They share one signature, so that any of them can be passed where a ``bound`` is asked for.
"""

from collections.abc import Sequence
from math import ceil, log
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import binom
from torch import Tensor

from cpseg import _checks
from cpseg.errors import InputError

__all__ = [
    "PValue",
    "betting",
    "bonferroni",
    "clopper_pearson",
    "fixed_sequence",
    "hoeffding",
    "hoeffding_bentkus",
    "holm",
    "least_units",
    "upper_bound",
]

_Array = NDArray[np.float64]


class PValue(Protocol):
    """A p-value for "the mean is at least alpha"; ``delta`` is what it will be compared with."""

    def __call__(self, losses: Tensor, alpha: float, delta: float = ..., /) -> Tensor:
        """Losses ``(N,)`` or ``(N, K)`` to float64 p-values ``()`` or ``(K,)``."""
        ...


def hoeffding(losses: Tensor, alpha: float, delta: float = 0.1) -> Tensor:
    """Hoeffding's p-value: ``exp(-2 n (alpha - mean)^2)`` where the mean lies below alpha.

    Guarantee:
        If the losses are independent draws from one distribution on [0, 1] whose mean is at least
        ``alpha``, the result is at most ``d`` with probability at most ``d``, over the losses,
        for every ``d`` in (0, 1).

    Args:
        losses: Values in [0, 1], one per unit. Shape ``(N,)``, or ``(N, K)`` for K risks.
        alpha: The risk that is tested.
        delta: Not used.

    Returns:
        float64 p-values. Shape ``()`` or ``(K,)``.

    Raises:
        InputError: If losses are no numbers in [0, 1], or alpha is no level.

    Examples:
        >>> round(hoeffding(torch.zeros(200), 0.1).item(), 4)
        0.0183
    """
    del delta
    values, like = _losses(losses, alpha)
    n = len(values)
    gap = np.maximum(alpha - _means(values), 0.0)
    return _as_tensor(np.exp(-2 * n * gap**2), like)


def hoeffding_bentkus(losses: Tensor, alpha: float, delta: float = 0.1) -> Tensor:
    """The smaller of Hoeffding's relative-entropy bound and Bentkus' binomial one.

    After Bates et al. (2021). Without any loss it is ``(1 - alpha) ** n``.

    Guarantee:
        That of :func:`hoeffding`.

    Args:
        losses: Values in [0, 1], one per unit. Shape ``(N,)``, or ``(N, K)`` for K risks.
        alpha: The risk that is tested.
        delta: Not used.

    Returns:
        float64 p-values. Shape ``()`` or ``(K,)``.

    Raises:
        InputError: If losses are no numbers in [0, 1], or alpha is no level.

    Examples:
        >>> [hoeffding_bentkus(torch.zeros(n), 0.05).item() <= 0.1 for n in (44, 45)]
        [False, True]
    """
    del delta
    values, like = _losses(losses, alpha)
    n = len(values)
    mean = np.minimum(_means(values), alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.where(mean > 0, mean * np.log(mean / alpha), 0.0)
    entropy = below + (1 - mean) * np.log((1 - mean) / (1 - alpha))
    bentkus = np.e * binom.cdf(np.ceil(values.sum(0)), n, alpha)
    return _as_tensor(np.minimum(np.exp(-n * entropy), bentkus), like)


def clopper_pearson(losses: Tensor, alpha: float, delta: float = 0.1) -> Tensor:
    """The exact binomial p-value of losses that are 0 or 1.

    Guarantee:
        That of :func:`hoeffding`; for such losses no valid p-value that rises with their sum is
        smaller.

    Args:
        losses: 0 or 1, one per unit. Shape ``(N,)``, or ``(N, K)`` for K risks.
        alpha: The risk that is tested.
        delta: Not used.

    Returns:
        float64 p-values. Shape ``()`` or ``(K,)``.

    Raises:
        InputError: If a loss is neither 0 nor 1, or alpha is no level.

    Examples:
        >>> round(clopper_pearson(torch.tensor([0, 0, 1, 0]), 0.5).item(), 4)
        0.3125
    """
    del delta
    values, like = _losses(losses, alpha)
    between = int(((values != 0) & (values != 1)).sum())
    if between:
        raise InputError(
            f"losses must be 0 or 1 for clopper_pearson; got {between} between. "
            "Use hoeffding_bentkus or betting"
        )
    return _as_tensor(binom.cdf(values.sum(0), len(values), alpha), like)


def betting(losses: Tensor, alpha: float, delta: float = 0.1) -> Tensor:
    """One over the largest capital of a gambler who bets that losses stay below alpha.

    The capital process is that of Waudby-Smith and Ramdas (2024): it starts at 1 and is
    multiplied by ``1 + bet * (alpha - loss)``, each bet in ``[0, 1 / (1 - alpha)]`` and chosen
    from earlier losses only. Their bets maximize growth. Ours maximize the chance of reaching
    ``1 / delta`` within the N losses: they are those that would copy the payoff of the normal
    test if the losses were normal, with a variance that is learned as losses come. Whatever the
    bets are worth, the guarantee does not rest on it.

    The order of the losses matters. Use one that does not depend on their values.

    Guarantee:
        That of :func:`hoeffding`; it is enough that each loss has a mean of at least ``alpha``
        given the earlier ones. ``delta`` is an aim, not part of the guarantee: it must be chosen
        without the losses.

    Args:
        losses: Values in [0, 1], one per unit. Shape ``(N,)``, or ``(N, K)`` for K risks.
        alpha: The risk that is tested.
        delta: The level the result will be compared with.

    Returns:
        float64 p-values; hardly any lies far below delta, where betting stops. Shape ``()`` or
        ``(K,)``.

    Raises:
        InputError: If losses are no numbers in [0, 1], or alpha or delta is no level.

    Examples:
        >>> losses = torch.tensor([0.01, 0.03]).repeat(50)
        >>> betting(losses, 0.05).item() <= 0.1, hoeffding_bentkus(losses, 0.05).item() <= 0.1
        (True, False)
    """
    _checks.check_alpha(delta, "delta")
    values, like = _losses(losses, alpha)
    n = len(values)
    # Losses that were imagined: of mean alpha and the largest variance it allows. Few losses are
    # not to be swamped by them; among many, a start without misses is not to pass for certainty.
    prior = n / 25
    capital = np.ones(values.shape[1:])
    best = capital.copy()
    total, squares = np.zeros_like(capital), np.zeros_like(capital)
    for step, loss in enumerate(values):
        betting_on = (delta * capital < 1) & (capital > 0)
        if not betting_on.any():
            break
        variance = (prior * alpha * (1 - alpha) + squares) / (prior + step)
        share = np.clip(delta * capital, 1e-12, 1 - 1e-9)  # of the way to 1 / delta
        quantile = ndtri(share)
        slope = np.exp(-(quantile**2) / 2) / (np.sqrt(2 * np.pi) * share)
        bet = np.minimum(slope / np.sqrt(variance * (n - step)), 1 / (1 - alpha))
        bet = np.where(betting_on, bet, 0.0)
        # At the largest bet, a loss of 1 takes all: rounding must not leave a debt.
        capital = capital * np.maximum(1 + bet * (alpha - loss), 0.0)
        best = np.maximum(best, capital)
        squares += (loss - (prior * alpha + total) / (prior + step)) ** 2
        total += loss
    return _as_tensor(1 / best, like)


def upper_bound(
    losses: Tensor,
    delta: float,
    p_value: PValue = betting,
    *,
    steps: int = 1000,
) -> Tensor:
    """What the mean lies below, by turning a p-value around on a grid of levels.

    Guarantee:
        If the losses are independent draws from one distribution on [0, 1] and ``p_value`` is
        valid at each level of the grid, the mean is at most the result with probability at least
        ``1 - delta``, over the losses.

    Args:
        losses: Values in [0, 1], one per unit. Shape ``(N,)``, or ``(N, K)`` for K risks.
        delta: Probability of failing.
        p_value: One of this module, or your own.
        steps: The grid is ``1 / steps, 2 / steps, ..., 1``.

    Returns:
        The smallest level of the grid from which on every level is rejected; float64. Shape
        ``()`` or ``(K,)``.

    Raises:
        InputError: If losses are no numbers in [0, 1], or delta is no level.

    Examples:
        >>> upper_bound(torch.zeros(45), 0.1, hoeffding_bentkus, steps=100).item()
        0.05
    """
    _checks.check_alpha(delta, "delta")
    _checks.check_integer("steps", steps, 2)
    _losses(losses, delta)
    bound = torch.ones(losses.shape[1:], dtype=torch.float64, device=losses.device)
    going = torch.ones_like(bound, dtype=torch.bool)
    for step in range(steps - 1, 0, -1):
        going &= p_value(losses, step / steps, delta) <= delta
        if not bool(going.any()):
            break
        bound = torch.where(going, step / steps, bound)
    return bound


def least_units(alpha: float, delta: float) -> int:
    """Fewest losses with which any valid test can find a mean below alpha at level delta.

    Fewer losses may all be 0 with a probability above delta though the mean is alpha. (A test is
    meant here that rejects no losses without rejecting smaller ones too.)

    Args:
        alpha: The risk that is tested.
        delta: The level of the test.

    Returns:
        The least n with ``(1 - alpha) ** n <= delta``.

    Raises:
        InputError: If alpha or delta is no level.

    Examples:
        >>> least_units(0.05, 0.1), least_units(0.1, 0.1)
        (45, 22)
    """
    _checks.check_alpha(alpha)
    _checks.check_alpha(delta, "delta")
    n = max(ceil(log(delta) / log(1 - alpha)) - 1, 1)
    while (1 - alpha) ** n > delta:
        n += 1
    return n


def bonferroni(p_values: Tensor, delta: float) -> Tensor:
    """Reject what is at most ``delta / K``.

    Guarantee:
        If each p-value is valid, the probability that any true hypothesis is rejected is at most
        ``delta``, over the data, whatever their dependence.

    Args:
        p_values: Floating. Shape ``(K,)``.
        delta: Probability of any false rejection.

    Returns:
        What is rejected. Bool ``(K,)``.

    Raises:
        InputError: If p-values are not one axis of numbers in [0, 1], or delta is no level.

    Examples:
        >>> bonferroni(torch.tensor([0.01, 0.04, 0.2]), 0.1)
        tensor([ True, False, False])
    """
    _check_p_values(p_values, delta)
    return p_values <= delta / max(len(p_values), 1)


def holm(p_values: Tensor, delta: float) -> Tensor:
    """Bonferroni among those not yet rejected, smallest first (Holm, 1979). Rejects no less.

    Guarantee:
        That of :func:`bonferroni`.

    Args:
        p_values: Floating. Shape ``(K,)``.
        delta: Probability of any false rejection.

    Returns:
        What is rejected. Bool ``(K,)``.

    Raises:
        InputError: If p-values are not one axis of numbers in [0, 1], or delta is no level.

    Examples:
        >>> holm(torch.tensor([0.01, 0.04, 0.2]), 0.1)
        tensor([ True,  True, False])
    """
    _check_p_values(p_values, delta)
    ordered, order = p_values.sort()
    levels = delta / torch.arange(len(p_values), 0, -1, device=p_values.device)
    passed = (ordered <= levels).cumprod(0).bool()
    return torch.zeros_like(passed).scatter(0, order, passed)


def fixed_sequence(p_values: Tensor, delta: float, starts: Sequence[int] = (0,)) -> Tensor:
    """Reject in the given order until the first that cannot be, from each of several starts.

    Each start has ``delta / len(starts)``, and walks towards the last hypothesis.

    Guarantee:
        That of :func:`bonferroni`, if order and starts do not depend on the data.

    Args:
        p_values: In the order of testing. Floating, shape ``(K,)``.
        delta: Probability of any false rejection.
        starts: Where walks begin.

    Returns:
        What is rejected. Bool ``(K,)``.

    Raises:
        InputError: If p-values are not one axis of numbers in [0, 1], delta is no level, or there
            is no start or one beyond the last p-value.

    Examples:
        >>> fixed_sequence(torch.tensor([0.2, 0.01, 0.02, 0.3, 0.01]), 0.1, starts=(0, 1))
        tensor([False,  True,  True, False, False])
    """
    _check_p_values(p_values, delta)
    chosen = sorted(set(starts))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(p_values):
        raise InputError(
            f"starts must be positions below {len(p_values)}, at least one; got {list(starts)}"
        )
    rejected = torch.zeros_like(p_values, dtype=torch.bool)
    for start in chosen:
        rejected[start:] |= (p_values[start:] <= delta / len(chosen)).cumprod(0).bool()
    return rejected


def _losses(losses: Tensor, alpha: float) -> tuple[_Array, Tensor]:
    """Checked losses, as float64 of shape ``(N, *)``."""
    _checks.check_tensor("losses", losses)
    _checks.check_alpha(alpha)
    if losses.ndim not in (1, 2):
        raise InputError(
            f"losses must have shape (N,) or (N, K); got {_checks.describe(losses.shape)}"
        )
    values: _Array = losses.detach().double().cpu().numpy()
    outside = int((~((values >= 0) & (values <= 1))).sum())
    if outside:
        raise InputError(f"losses must lie in [0, 1]; got {outside} that do not")
    return values, losses


def _means(values: _Array) -> _Array:
    return np.asarray(values.sum(0) / max(len(values), 1))


def _as_tensor(p_values: _Array, like: Tensor) -> Tensor:
    clipped = np.asarray(np.minimum(p_values, 1.0), dtype=np.float64)
    return torch.from_numpy(clipped).view(like.shape[1:]).to(like.device)


def _check_p_values(p_values: Tensor, delta: float) -> None:
    _checks.check_tensor("p_values", p_values)
    _checks.check_alpha(delta, "delta")
    if p_values.ndim != 1 or not bool(((p_values >= 0) & (p_values <= 1)).all()):
        raise InputError("p_values must be one axis of numbers in [0, 1]")
