"""Ranks, budgets and quantiles, against exact fractions and plain sorts."""

from decimal import Decimal
from fractions import Fraction
from math import ceil, inf
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from cpseg.errors import InputError
from cpseg.quantile import (
    MAX_UNITS,
    UNIT_MASS,
    budget,
    conformal_quantile,
    conformal_rank,
    level,
    mass_above,
    weighted_quantile,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# Levels at which ceil((n + 1) * (1 - alpha)) in floats is off by one for some n.
TRAPS = [18, 19, *range(41, 47), 57, 58, 59, *range(69, 74), *range(82, 87), *range(94, 100)]
ALPHAS = st.one_of(
    st.integers(1, 99).map(lambda percent: percent / 100),
    st.integers(1, 999).map(lambda permille: permille / 1000),
    st.floats(1e-12, 1, exclude_max=True),
)
SIZES = st.integers(0, 10**10)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def is_least_covering(rank: int, n: int, alpha: float) -> bool:
    """Whether rank is the least k with k / (n + 1) >= 1 - alpha, for the decimal alpha."""
    wanted = 1 - Fraction(repr(alpha))
    return Fraction(rank, n + 1) >= wanted > Fraction(rank - 1, n + 1)


@given(SIZES, ALPHAS)
@example(999, 0.059)
@example(10**9, 1e-9)
@example(0, 0.5)
def test_rank_is_the_least_that_covers(n: int, alpha: float) -> None:
    assert is_least_covering(conformal_rank(n, alpha), n, alpha)


@pytest.mark.parametrize("percent", TRAPS)
def test_rank_is_exact_where_floats_are_off_by_one(percent: int) -> None:
    for n in [*range(400), 10**7 - 1, 10**7, 2**24 + 1, 2**31 + 7]:
        assert conformal_rank(n, percent / 100) == -((-(n + 1) * (100 - percent)) // 100)


def test_float_ranks_really_are_off_at_the_traps() -> None:
    off = [p for p in TRAPS for n in range(400) if ceil((n + 1) * (1 - p / 100)) != rank_of(n, p)]
    assert off, "the traps above trap nothing"


def rank_of(n: int, percent: int) -> int:
    return -((-(n + 1) * (100 - percent)) // 100)


def test_rank_of_999_scores_at_level_059() -> None:
    assert conformal_rank(999, 0.059) == 941
    assert conformal_rank(9, 0.1) == 9
    assert conformal_rank(8, 0.1) == 9
    assert conformal_rank(19, 0.05) == 19


@given(SIZES, ALPHAS)
@example(9, 0.1)
@example(19, 0.05)
@example(999, 0.059)
def test_budget_with_unit_masses_is_what_lies_above_the_rank(n: int, alpha: float) -> None:
    assert budget(alpha, n) == n - conformal_rank(n, alpha)


@given(st.integers(0, MAX_UNITS), ALPHAS, st.sampled_from([1, 7, UNIT_MASS]))
@example(9, 0.1, UNIT_MASS)
@example(19, 0.05, UNIT_MASS)
def test_budget_is_the_largest_mass_that_keeps_the_bound(n: int, alpha: float, unit: int) -> None:
    # (above + unit) / ((n + 1) * unit) <= alpha is conformal risk control of a miscoverage.
    mass = budget(alpha, n, unit)
    exact = Fraction(repr(alpha))
    assert (
        Fraction(mass + unit, (n + 1) * unit) <= exact < Fraction(mass + 1 + unit, (n + 1) * unit)
    )


def test_budget_is_zero_at_the_smallest_sample_with_a_finite_threshold() -> None:
    for n, alpha in [(9, 0.1), (19, 0.05), (99, 0.01), (4, 0.2), (999, 0.001)]:
        assert budget(alpha, n, UNIT_MASS) == 0
        assert budget(alpha, n - 1, UNIT_MASS) < 0


@given(ALPHAS)
def test_level_is_the_printed_decimal(alpha: float) -> None:
    assert float(level(alpha)) == alpha
    assert level(alpha) == Fraction(str(alpha))


@pytest.mark.parametrize("alpha", [0, 1, 0.0, 1.0, -0.1, 1.5, inf, float("nan"), True, "0.1", None])
def test_levels_outside_the_open_interval_are_refused(alpha: float) -> None:
    rule = "alpha must lie strictly between 0 and 1; got "
    asks: list[Callable[[], object]] = [
        lambda: level(alpha),
        lambda: conformal_rank(9, alpha),
        lambda: budget(alpha, 9),
    ]
    for ask in asks:
        with pytest.raises(InputError) as caught:
            ask()
        assert str(caught.value) == rule + repr(alpha)


SCORES = st.lists(st.integers(-6, 6).map(lambda k: k / 4), max_size=60)


def sorted_rank(scores: list[float], alpha: float) -> float:
    rank = ceil((len(scores) + 1) * (1 - Fraction(repr(alpha))))
    return sorted(scores)[rank - 1] if rank <= len(scores) else inf


@given(SCORES, ALPHAS, st.sampled_from(FLOATS))
@example([0.0] * 8, 0.1, torch.float32)
@example([0.0] * 9, 0.1, torch.float32)
def test_quantile_is_the_sorted_score_of_that_rank(
    scores: list[float], alpha: float, dtype: torch.dtype
) -> None:
    result = conformal_quantile(torch.tensor(scores, dtype=dtype), alpha)
    assert result.shape == ()
    assert result.dtype == dtype
    assert result.item() == sorted_rank(scores, alpha)


def test_quantile_of_many_scores_at_every_percent() -> None:
    scores = torch.rand(999, generator=torch.Generator().manual_seed(0))
    listed = scores.tolist()
    for percent in range(1, 100):
        assert conformal_quantile(scores, percent / 100).item() == sorted_rank(
            listed, percent / 100
        )


def test_quantile_is_infinite_below_the_smallest_sample() -> None:
    assert conformal_quantile(torch.zeros(8), 0.1).item() == inf
    assert conformal_quantile(torch.zeros(9), 0.1).item() == 0
    assert conformal_quantile(torch.zeros(18), 0.05).item() == inf
    assert conformal_quantile(torch.zeros(19), 0.05).item() == 0
    assert conformal_quantile(torch.zeros(0), 0.5).item() == inf


def test_quantile_beyond_two_to_the_24_scores_counts_exactly() -> None:
    n = 2**24 + 3
    scores = torch.zeros(n)
    scores[: budget(0.5, n)] = 1.0
    assert conformal_quantile(scores, 0.5).item() == 0
    scores[budget(0.5, n)] = 1.0
    assert conformal_quantile(scores, 0.5).item() == 1


def test_infinite_scores_are_scores() -> None:
    scores = torch.tensor([inf, -inf, 0.0, 1.0])
    assert conformal_quantile(scores, 0.25).item() == inf
    assert conformal_quantile(scores, 0.5).item() == 1
    assert conformal_quantile(scores, 0.9).item() == -inf


@given(SCORES, st.randoms(use_true_random=False), ALPHAS)
def test_quantile_ignores_order_and_leaves_scores_alone(
    scores: list[float], random: Random, alpha: float
) -> None:
    shuffled = scores.copy()
    random.shuffle(shuffled)
    given_scores = torch.tensor(shuffled)
    assert conformal_quantile(given_scores, alpha) == conformal_quantile(
        torch.tensor(scores), alpha
    )
    assert given_scores.tolist() == shuffled


def weighted_oracle(scores: list[float], masses: list[int], above: int) -> float:
    if above < 0:
        return inf
    for score in sorted(scores):
        if sum(m for s, m in zip(scores, masses, strict=True) if s > score) <= above:
            return score
    return inf


@given(
    st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 50)), max_size=30),
    st.integers(-3, 400),
)
def test_weighted_quantile_is_the_smallest_score_within_budget(
    entries: list[tuple[int, int]], above: int
) -> None:
    scores, masses = [float(s) for s, _ in entries], [m for _, m in entries]
    result = weighted_quantile(
        torch.tensor(scores, dtype=torch.float32), torch.tensor(masses, dtype=torch.int64), above
    )
    assert result.item() == weighted_oracle(scores, masses, above)


def risk_control(images: list[list[int]], alpha: Fraction) -> float:
    """The least threshold whose mean miscoverage, with one image lost, stays within alpha."""
    n = len(images)
    for t in sorted({s for image in images for s in image}):
        lost = sum(
            (Fraction(sum(s > t for s in image), len(image)) for image in images), Fraction()
        )
        if (lost + 1) / (n + 1) <= alpha:
            return t
    return inf


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), max_size=25),
    st.sampled_from([0.05, 0.1, 0.19, 0.3, 0.5]),
)
@example([[1]] * 9, 0.1)
@example([[1, 2, 3]] * 19, 0.05)
@example([[0, 0, 5]] + [[0]] * 12, 0.1)
def test_image_masses_give_conformal_risk_control(images: list[list[int]], alpha: float) -> None:
    scores = torch.tensor([float(s) for image in images for s in image])
    mass = torch.tensor(
        [ceil(Fraction(UNIT_MASS, len(image))) for image in images for _ in image],
        dtype=torch.int64,
    )
    result = weighted_quantile(scores, mass, budget(alpha, len(images), UNIT_MASS))
    exact = level(alpha)
    rounding = Fraction(len(scores), UNIT_MASS)  # each mass is rounded up, by less than one
    assert risk_control(images, exact) <= result.item() <= risk_control(images, exact - rounding)
    if all(len(image) in (1, 2, 4) for image in images):
        assert result.item() == risk_control(images, exact)


def test_nan_scores_are_refused_with_their_number() -> None:
    scores = torch.tensor([0.0, float("nan"), 1.0, float("nan")])
    asks: list[Callable[[], Tensor]] = [
        lambda: conformal_quantile(scores, 0.5),
        lambda: weighted_quantile(scores, torch.ones(4, dtype=torch.int64), -1),
    ]
    for ask in asks:
        with pytest.raises(InputError, match=r"^scores must not be NaN; got 2 of them$"):
            ask()


@pytest.mark.parametrize(
    ("scores", "mass", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.ones(2, 3, dtype=torch.int64),
            "scores must be floating with shape (N,); got torch.float32 (2, 3)",
        ),
        (
            torch.zeros(3, dtype=torch.int64),
            torch.ones(3, dtype=torch.int64),
            "scores must be floating with shape (N,); got torch.int64 (3,)",
        ),
        ([0.0], torch.ones(1, dtype=torch.int64), "scores must be a torch tensor; got list"),
        (torch.zeros(3), torch.ones(3), "mass must be an integer tensor; got torch.float32"),
        (
            torch.zeros(3),
            torch.ones(2, dtype=torch.int64),
            "mass must have shape (3,) to go with scores (3,); got (2,)",
        ),
    ],
)
def test_wrong_scores_and_masses_are_refused(scores: Tensor, mass: Tensor, message: str) -> None:
    with pytest.raises(InputError) as caught:
        weighted_quantile(scores, mass, 1)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.0], "scores must be a torch tensor; got list"),
        (
            torch.zeros(2, 3),
            "scores must be floating with shape (N,); got torch.float32 (2, 3)",
        ),
    ],
)
def test_wrong_scores_of_a_conformal_quantile_are_refused(scores: Tensor, message: str) -> None:
    with pytest.raises(InputError) as caught:
        conformal_quantile(scores, 0.5)
    assert str(caught.value) == message


def above_oracle(rows: list[int], mass: list[int]) -> list[int]:
    return [
        sum(m for r, m in zip(rows[i + 1 :], mass[i + 1 :], strict=True) if r == rows[i])
        for i in range(len(rows))
    ]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**50)), max_size=40))
def test_mass_above_adds_the_rest_of_the_row(entries: list[tuple[int, int]]) -> None:
    rows, mass = sorted(r for r, _ in entries), [m for _, m in entries]
    result = mass_above(
        torch.tensor(rows, dtype=torch.int64), torch.tensor(mass, dtype=torch.int64)
    )
    assert result.tolist() == above_oracle(rows, mass)


def test_mass_above_is_right_where_the_running_total_wraps() -> None:
    # Seven rows that each hold almost all an accumulator may: the total passes 2**63 thrice.
    rows = [row for row in range(7) for _ in range(3)]
    mass = [2**61, 2**61 + 3, 2**60 + 5] * 7
    assert sum(mass) > 3 * 2**63
    result = mass_above(torch.tensor(rows), torch.tensor(mass))
    assert result.tolist() == above_oracle(rows, mass)


def test_a_full_accumulator_fits_in_int64() -> None:
    assert MAX_UNITS * UNIT_MASS < 2**63


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, float])
def test_a_float_means_the_decimal_it_prints_as_whatever_its_precision(kind: Any) -> None:
    for percent in range(1, 100):
        assert level(kind(percent / 100)) == Fraction(percent, 100)
    assert conformal_rank(999, kind(0.059)) == 941


def test_a_fraction_means_itself() -> None:
    assert level(Fraction(1, 3)) == Fraction(1, 3)
    assert conformal_rank(2, Fraction(1, 3)) == 2  # a third of three; 0.333... would be 3
    assert conformal_rank(2, 1 / 3) == 3
    assert budget(Fraction(1, 3), 2) == 0


@pytest.mark.parametrize(
    ("alpha", "told"),
    [
        ("0.1", "'0.1'"),
        (Decimal("0.1"), "Decimal('0.1')"),
        (torch.tensor(0.1), "Tensor"),
        (float, "the class float"),
        (Fraction(3, 2), "Fraction(3, 2)"),
    ],
)
def test_what_is_no_level_is_refused(alpha: Any, told: str) -> None:
    with pytest.raises(InputError) as refusal:
        level(alpha)
    assert str(refusal.value) == f"alpha must lie strictly between 0 and 1; got {told}"


@pytest.mark.parametrize("n", [-1, 2.0, True, "9", torch.tensor(9)])
def test_what_is_no_count_is_refused(n: Any) -> None:
    with pytest.raises(InputError, match="n must be an integer >= 0; got "):
        conformal_rank(n, 0.1)
