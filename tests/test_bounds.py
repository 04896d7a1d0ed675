"""Bounds against exact oracles, on their edges, and on repeated draws under the hypothesis."""

from math import comb, exp, log, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm
from torch import Tensor

from cpseg.bounds import (
    PValue,
    betting,
    bonferroni,
    clopper_pearson,
    fixed_sequence,
    hoeffding,
    hoeffding_bentkus,
    holm,
    least_units,
    upper_bound,
)
from cpseg.errors import InputError

ALL: list[PValue] = [hoeffding, hoeffding_bentkus, betting, clopper_pearson]


def binary(n: int, ones: int) -> Tensor:
    return torch.cat((torch.ones(ones), torch.zeros(n - ones)))


def binomial_tail(n: int, ones: int, p: float) -> float:
    return sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(ones + 1))


@given(n=st.integers(1, 60), share=st.floats(0, 1), alpha=st.floats(0.01, 0.9))
def test_clopper_pearson_is_the_binomial_tail(n: int, share: float, alpha: float) -> None:
    ones = int(share * n)
    expected = min(binomial_tail(n, ones, alpha), 1.0)
    assert clopper_pearson(binary(n, ones), alpha).item() == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.01, 0.9))
def test_hoeffding_bentkus_is_the_smaller_of_its_two_formulas(
    losses: list[float], alpha: float
) -> None:
    n, mean = len(losses), sum(losses) / len(losses)
    low = min(mean, alpha)
    entropy = (low * log(low / alpha) if low > 0 else 0) + (1 - low) * log((1 - low) / (1 - alpha))
    whole = torch.tensor(losses, dtype=torch.float64).sum().ceil().item()
    expected = min(exp(-n * entropy), exp(1) * float(binom.cdf(whole, n, alpha)), 1.0)
    got = hoeffding_bentkus(torch.tensor(losses, dtype=torch.float64), alpha).item()
    assert got == pytest.approx(expected, rel=1e-6)


def slow_betting(losses: list[float], alpha: float, delta: float) -> float:
    capital, best, seen = 1.0, 1.0, list[float]()
    prior = len(losses) / 25
    squares = prior * alpha * (1 - alpha)
    for step, loss in enumerate(losses):
        weight = prior + len(seen)
        if delta * capital < 1:
            share = min(max(delta * capital, 1e-12), 1 - 1e-9)
            spread = sqrt(squares / weight * (len(losses) - step))
            bet = min(float(norm.pdf(norm.ppf(share))) / share / spread, 1 / (1 - alpha))
            capital *= max(1 + bet * (alpha - loss), 0)
            best = max(best, capital)
        squares += (loss - (prior * alpha + sum(seen)) / weight) ** 2
        seen.append(loss)
    return 1 / best


@given(st.lists(st.floats(0, 1), max_size=25), st.floats(0.02, 0.5), st.floats(0.01, 0.4))
def test_betting_is_its_definition_written_out(
    losses: list[float], alpha: float, delta: float
) -> None:
    got = betting(torch.tensor(losses, dtype=torch.float64), alpha, delta).item()
    assert got == pytest.approx(slow_betting(losses, alpha, delta), rel=1e-6)


def test_bets_know_nothing_of_the_loss_they_are_placed_on() -> None:
    # The expected factor of a single bet at mean alpha is exactly 1, whatever came before.
    before = torch.tensor([0.0, 0.2, 0.05, 0.0], dtype=torch.float64)
    alpha, delta = 0.1, 0.01

    def capital(last: float) -> float:
        # Later losses of 1 keep the maximum where it is; without them n, and so the bets, differ.
        losses = torch.cat((before, torch.tensor([last], dtype=torch.float64)))
        return 1 / betting(losses, alpha, delta).item()

    won, base = capital(0.0), 1 / slow_betting([*before.tolist(), 1.0], alpha, delta)
    bet = (won / base - 1) / alpha
    assert 0 < bet <= 1 / (1 - alpha) + 1e-12
    assert capital(0.05) == pytest.approx(base * (1 + bet * 0.05), rel=1e-9)


@pytest.mark.parametrize("bound", ALL)
def test_columns_are_tested_one_by_one(bound: PValue) -> None:
    losses = (torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) < 0.1).double()
    together = bound(losses, 0.2, 0.1)
    assert together.shape == (3,)
    assert together.dtype == torch.float64
    for column in range(3):
        alone = bound(losses[:, column], 0.2, 0.1)
        assert alone.shape == ()
        assert alone.item() == together[column].item()


@pytest.mark.parametrize("bound", ALL)
def test_without_losses_or_with_bad_ones_nothing_is_found(bound: PValue) -> None:
    assert bound(torch.zeros(0), 0.1, 0.1).item() == 1
    assert bound(torch.zeros(0, 2), 0.1, 0.1).tolist() == [1, 1]
    assert bound(torch.ones(20), 0.1, 0.1).item() == 1


@pytest.mark.parametrize("bound", [hoeffding_bentkus, betting, clopper_pearson])
@pytest.mark.parametrize(("alpha", "delta"), [(0.05, 0.1), (0.1, 0.1), (0.1, 0.05), (0.3, 0.01)])
def test_no_test_finds_anything_with_fewer_units_than_possible(
    bound: PValue, alpha: float, delta: float
) -> None:
    least = least_units(alpha, delta)
    assert (1 - alpha) ** least <= delta < (1 - alpha) ** (least - 1)
    assert bound(torch.zeros(least - 1), alpha, delta).item() > delta
    if bound is not betting:
        assert bound(torch.zeros(least), alpha, delta).item() <= delta
    else:
        assert bound(torch.zeros(2 * least), alpha, delta).item() <= delta


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), float("inf")])
@pytest.mark.parametrize("bound", ALL)
def test_losses_outside_the_unit_interval_are_refused(bound: PValue, bad: float) -> None:
    with pytest.raises(InputError, match=r"losses must lie in \[0, 1\]; got 2 that do not"):
        bound(torch.tensor([0.0, bad, bad]), 0.1, 0.1)


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(InputError, match="losses must be 0 or 1"):
        clopper_pearson(torch.tensor([0.5]), 0.1)
    with pytest.raises(InputError, match=r"losses must have shape \(N,\) or \(N, K\)"):
        hoeffding(torch.zeros(2, 2, 2), 0.1)
    with pytest.raises(InputError, match="alpha must lie strictly between"):
        hoeffding(torch.zeros(2), 0.0)
    with pytest.raises(InputError, match="delta must lie strictly between"):
        betting(torch.zeros(2), 0.1, 1.0)
    with pytest.raises(InputError, match="starts must be positions below 2"):
        fixed_sequence(torch.tensor([0.1, 0.2]), 0.1, starts=(2,))
    with pytest.raises(InputError, match="starts must be positions below 2, at least one"):
        fixed_sequence(torch.tensor([0.1, 0.2]), 0.1, starts=())
    with pytest.raises(InputError, match="p_values must be one axis"):
        holm(torch.tensor([0.1, float("nan")]), 0.1)


def slow_holm(p: list[float], delta: float) -> list[bool]:
    left, rejected = set(range(len(p))), [False] * len(p)
    while left:
        least = min(left, key=lambda k: p[k])
        if p[least] > delta / len(left):
            break
        rejected[least] = True
        left.remove(least)
    return rejected


@given(st.lists(st.sampled_from([0.001, 0.01, 0.02, 0.024, 0.03, 0.05, 0.2]), max_size=8))
def test_holm_is_bonferroni_among_those_left_and_rejects_no_less(p: list[float]) -> None:
    values = torch.tensor(p, dtype=torch.float64)
    assert holm(values, 0.1).tolist() == slow_holm(p, 0.1)
    assert bool((holm(values, 0.1) | ~bonferroni(values, 0.1)).all())


@given(
    st.lists(st.sampled_from([0.01, 0.03, 0.2]), min_size=1, max_size=9),
    st.sets(st.integers(0, 8), min_size=1),
)
def test_a_sequence_stops_at_its_first_failure(p: list[float], drawn: set[int]) -> None:
    starts = {start % len(p) for start in drawn}
    expected = [False] * len(p)
    for start in starts:
        for k in range(start, len(p)):
            if p[k] > 0.05 / len(starts):
                break
            expected[k] = True
    values = torch.tensor(p, dtype=torch.float64)
    assert fixed_sequence(values, 0.05, tuple(starts)).tolist() == expected


def test_an_upper_bound_turns_the_p_value_around() -> None:
    losses = binary(40, 3)[:, None].double()
    bound = upper_bound(losses, 0.1, clopper_pearson, steps=500)
    assert bound.shape == (1,)
    level = bound.item()
    assert binomial_tail(40, 3, level) <= 0.1 < binomial_tail(40, 3, level - 1 / 500)
    assert upper_bound(torch.ones(5), 0.1).item() == 1.0


DRAWS = 2000


def draw(kind: str, n: int, mean: float, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(n, DRAWS, generator=generator, dtype=torch.float64)
    if kind == "bernoulli":
        return (uniform < mean).double()
    return uniform ** (1 / mean - 1)  # a beta distribution: E[U^a] = 1 / (a + 1)


@pytest.mark.guarantee
@pytest.mark.parametrize("alpha", [0.05, 0.1])
@pytest.mark.parametrize("delta", [0.05, 0.1])
@pytest.mark.parametrize("kind", ["bernoulli", "beta"])
@pytest.mark.parametrize("n", [10, 50, 200])
def test_a_true_hypothesis_is_rejected_no_more_often_than_stated(
    kind: str, n: int, alpha: float, delta: float
) -> None:
    generator = torch.Generator().manual_seed(n)
    losses = draw(kind, n, alpha, generator)
    bounds = ALL if kind == "bernoulli" else ALL[:3]
    for bound in bounds:
        rejected = int((bound(losses, alpha, delta) <= delta).sum())
        assert rejected <= binom.ppf(0.9999, DRAWS, delta), bound
