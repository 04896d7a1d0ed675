"""Risks against their definitions, calibrations against what they promise, and what is refused."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor

from cpseg import (
    APS,
    LAC,
    Argmax,
    AtMost,
    BackgroundPriority,
    Calibration,
    ClassConditionalCalibrator,
    PixelSetPredictor,
    Singleton,
    SplitCalibrator,
    gather,
    merge_all,
)
from cpseg.bounds import PValue, betting, clopper_pearson, hoeffding, hoeffding_bentkus, upper_bound
from cpseg.calibration import _digest
from cpseg.errors import FileError, InputError
from cpseg.filters import AreaGuard, Top
from cpseg.fitted import PAS, RC3P
from cpseg.protocols import Score
from cpseg.risk import (
    CoverageShare,
    DilutedFalseNegativeRate,
    FalseNegativeRate,
    FalseShare,
    InstanceRecall,
    KeptError,
    KeptRisk,
    Miscoverage,
    Risk,
    RiskCalibrator,
    Rule,
    SetRisk,
    Start,
    WorstFalseNegativeRate,
    threshold_grid,
)
from cpseg.risk._rules import trial as make_trial
from cpseg.scores import TopK

C = 3
GRID = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
ONE_OF_FOUR = torch.tensor([-4.0, -1.0, 0.0, 1.0, 3.0, 40.0])  # coarse, so that scores tie


def scene(seed: int, batch: int = 5, shape: tuple[int, ...] = (3, 4)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(ONE_OF_FOUR), (batch, C, *shape), generator=generator)
    labels = torch.randint(C + 1, (batch, *shape), generator=generator)
    return ONE_OF_FOUR[picks], torch.where(labels == C, 255, labels)


def trial(threshold: float, axes: tuple[str, ...] = (), score: Score | None = None) -> Calibration:
    return make_trial(torch.full((C,) if axes else (1,), threshold), axes, score or LAC(), C, 255)


def losses_of(risk: Risk, logits: Tensor, labels: Tensor, alpha: float, **more: Any) -> Any:
    """Losses in the order of the batch, which is that of ids."""
    control = RiskCalibrator(risk, grid=GRID)
    control.update(logits, labels, range(len(labels)), **more)
    rows = torch.stack([control._units[unit] for unit in range(len(labels))])
    return risk.losses(rows, alpha)


def miss(sets: Tensor, labels: Tensor, which: Callable[[Tensor], Tensor]) -> float:
    chosen = which(labels) & (labels != 255)
    held = sets.gather(0, (labels * (labels != 255))[None])[0]
    return float((chosen & ~held).sum() / chosen.sum()) if chosen.any() else 0.0


@pytest.mark.parametrize("seed", range(3))
def test_losses_of_sets_are_what_the_predictor_would_do(seed: int) -> None:
    logits, labels = scene(seed)
    found = {
        "all": losses_of(Miscoverage(), logits, labels, 0.1).values[:, 0],
        "each": losses_of(FalseNegativeRate(C), logits, labels, 0.1).values,
        "worst": losses_of(WorstFalseNegativeRate(C), logits, labels, 0.1).values[:, 0],
        "share": losses_of(CoverageShare(0.75), logits, labels, 0.1).values[:, 0],
    }
    for k, limit in enumerate(GRID.tolist()):
        sets = PixelSetPredictor(trial(limit))(logits)
        for i in range(len(labels)):
            every = miss(sets[i], labels[i], torch.ones_like)
            each = [miss(sets[i], labels[i], lambda x, c=c: x == c) for c in range(C)]  # type: ignore[misc]
            assert found["all"][i, k].item() == pytest.approx(every)
            assert found["each"][i, :, k].tolist() == pytest.approx(each)
            assert found["worst"][i, k].item() == pytest.approx(max(each))
            assert found["share"][i, k].item() == (1 - every < 0.75 - 1e-6)


def test_images_without_a_class_do_not_count_unless_diluted() -> None:
    logits, labels = scene(1)
    labels[:2][labels[:2] == 1] = 0
    strict = losses_of(FalseNegativeRate(C), logits, labels, 0.1)
    diluted = losses_of(DilutedFalseNegativeRate(C), logits, labels, 0.1)
    assert strict.counted[:, 1].tolist() == [False, False, True, True, True]
    assert diluted.counted.all()
    assert bool((diluted.values[:2, 1] == 0).all())
    assert torch.equal(diluted.values[2:], strict.values[2:])
    one = losses_of(FalseNegativeRate(C, classes=(2,)), logits, labels, 0.1)
    assert one.counted.any(0).tolist() == [False, False, True]


RULES: list[Rule] = [
    Argmax,
    Top,
    partial(BackgroundPriority, background=0),
    partial(BackgroundPriority, background=2),
    Singleton,
    partial(AtMost, k=2),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("score", [LAC(), APS()])
@pytest.mark.parametrize("seed", range(3))
def test_kept_and_wrong_are_those_of_the_filter_at_the_very_threshold(
    rule: Rule, score: Any, seed: int
) -> None:
    logits, labels = scene(seed, batch=7)
    # Thresholds that scores are exactly equal to, besides others.
    grid = torch.unique(torch.cat((GRID, score(logits).flatten()[::9].float())))
    grid = grid[grid.isfinite()]
    control = RiskCalibrator(KeptError(rule, C), score, grid=grid)
    control.update(logits, labels, range(7))
    rows = torch.stack([control._units[unit] for unit in range(7)])
    wrong, kept = rows[:, :-1].view(7, 2, -1).unbind(1)
    assert rows[:, -1].tolist() == (labels != 255).flatten(1).sum(1).tolist()
    for k, limit in enumerate(grid.tolist()):
        out: Any = rule(trial(limit, score=score))(logits)
        chosen = (out != 255) & (labels != 255)
        assert kept[:, k].tolist() == chosen.flatten(1).sum(1).tolist()
        assert wrong[:, k].tolist() == (chosen & (out != labels)).flatten(1).sum(1).tolist()


def test_kept_per_class_is_the_top_filter_with_one_threshold_per_class() -> None:
    logits, labels = scene(4, batch=6)
    control = RiskCalibrator(KeptError(Top, C, per_class=True), grid=GRID)
    control.update(logits, labels, range(6))
    rows = torch.stack([control._units[unit] for unit in range(6)])
    wrong, kept = rows[:, :-C].view(6, 2, C, -1).unbind(1)
    top = logits.argmax(1)
    for c in range(C):
        assert rows[:, -C + c].tolist() == [
            int(((top[i] == c) & (labels[i] != 255)).sum()) for i in range(6)
        ]
        for k, limit in enumerate(GRID.tolist()):
            out = Top(trial(limit, ("class",)))(logits)
            chosen = (out == c) & (labels != 255)
            assert kept[:, c, k].tolist() == chosen.flatten(1).sum(1).tolist()
            assert wrong[:, c, k].tolist() == (chosen & (labels != c)).flatten(1).sum(1).tolist()


def test_the_tested_loss_is_negative_on_average_exactly_when_the_claim_holds() -> None:
    logits, labels = scene(5, batch=8)
    rows = losses_of(KeptError(Argmax, C), logits, labels, 0.3)
    share = losses_of(FalseShare(Argmax, C), logits, labels, 0.3)
    for k, limit in enumerate(GRID.tolist()):
        out = Argmax(trial(limit))(logits)
        valid = labels != 255
        m = valid.flatten(1).sum(1).double()
        kept = (valid & (out != 255)).flatten(1).sum(1).double()
        wrong = (valid & (out != 255) & (out != labels)).flatten(1).sum(1).double()
        mean = float((wrong / m - 0.3 * kept / m).mean())
        assert float(rows.values[:, 0, k].mean()) - 0.3 == pytest.approx(mean)
        expected = [float(w / n) if n else 0.0 for w, n in zip(wrong, kept, strict=True)]
        assert share.values[:, 0, k].tolist() == pytest.approx(expected)


def slow_objects(labels: Tensor, objects: Tensor, sets: Tensor, tau: float) -> tuple[int, int]:
    names = {int(name) for name in objects[(labels != 255) & (objects > 0)]}
    held = sets.gather(0, (labels * (labels != 255))[None])[0]
    missed = 0
    for name in names:
        inside = (objects == name) & (labels != 255)
        missed += float((held & inside).sum()) < tau * float(inside.sum()) - 1e-6
    return missed, len(names)


@pytest.mark.parametrize("tau", [0.5, 0.4, 0.999, 0.01])
def test_objects_are_found_by_a_share_of_their_pixels(tau: float) -> None:
    logits, labels = scene(6, shape=(5, 7))
    generator = torch.Generator().manual_seed(0)
    objects = torch.randint(4, labels.shape, generator=generator)
    objects[3] = 0
    found = losses_of(InstanceRecall(tau), logits, labels, 0.1, instances=objects)
    assert found.counted[:, 0].tolist() == [True, True, True, False, True]
    for k, limit in enumerate(GRID.tolist()):
        sets = PixelSetPredictor(trial(limit))(logits)
        for i in range(len(labels)):
            missed, count = slow_objects(labels[i], objects[i], sets[i], tau)
            assert found.values[i, 0, k].item() == pytest.approx(missed / max(count, 1))


def test_without_instances_objects_are_regions_of_equal_labels() -> None:
    labels = torch.tensor([[[0, 0, 1, 255, 1]], [[2, 2, 2, 2, 2]]])
    logits = torch.zeros(2, C, 1, 5)
    logits[:, 0] = 9.0
    found = losses_of(InstanceRecall(0.5), logits, labels, 0.1)
    assert found.values[:, 0, 0].tolist() == pytest.approx([1.0, 1.0])
    assert found.values[:, 0, 2].tolist() == pytest.approx([2 / 3, 1.0])


def flooded(kept: Tensor, labels: Tensor) -> Tensor:
    valid = labels != 255
    return ((kept == 0) & valid).flatten(1).double().mean(1)


def test_functions_of_ones_own_see_sets_and_kept_labels() -> None:
    logits, labels = scene(7)

    def empty(sets: Tensor, truth: Tensor) -> Tensor:
        assert torch.equal(truth, labels)
        return (~sets.any(1)).flatten(1).double().mean(1)

    sets = losses_of(SetRisk(empty, "share of empty sets"), logits, labels, 0.1).values[:, 0]
    kept = losses_of(KeptRisk(flooded, Argmax, C, "flood"), logits, labels, 0.1).values[:, 0]
    for k, limit in enumerate(GRID.tolist()):
        expected = empty(PixelSetPredictor(trial(limit))(logits), labels)
        assert sets[:, k].tolist() == pytest.approx(expected.tolist())
        expected = flooded(Argmax(trial(limit))(logits), labels)
        assert kept[:, k].tolist() == pytest.approx(expected.tolist())


# --- the accumulator -----------------------------------------------------------------------------


def test_any_cut_any_order_and_tiles_give_the_identical_state() -> None:
    logits, labels = scene(8, batch=9, shape=(4, 6))
    risk = KeptError(Argmax, C)

    def made() -> RiskCalibrator:
        return RiskCalibrator(risk, seed=3)

    whole = made().update(logits, labels)
    first, second = made().update(logits[5:], labels[5:]), made().update(logits[:5], labels[:5])
    merged = merge_all([first, second])
    for name, value in whole.state_dict().items():
        other = merged.state_dict()[name]
        same = torch.equal(value, other) if isinstance(value, Tensor) else value == other  # type: ignore[arg-type]
        assert same, name
    ids = torch.arange(9)
    tiles = made().update(logits[..., 3:], labels[..., 3:], ids)
    tiles.merge(made().update(logits[..., :3], labels[..., :3], ids))
    assert torch.equal(tiles.table(), whole.table())
    assert tiles.fingerprint == whole.fingerprint == gather(merged).fingerprint
    assert made().merge(whole).reset().table().numel() == 0
    assert second.table().shape[0] == 5


def test_betting_gives_the_same_whatever_the_order_units_came_in() -> None:
    logits, labels = separable(120)
    results = set()
    for seed in range(4):
        order = torch.randperm(120, generator=torch.Generator().manual_seed(seed))
        control = RiskCalibrator(KeptError(Argmax, 2)).update(logits[order], labels[order])
        results.add(control.compute(0.1, 0.1).thresholds.item())
    assert len(results) == 1


@pytest.mark.parametrize("seed", [0, 5])
def test_betting_fails_no_more_often_than_stated_with_one_seed_for_all_draws(seed: int) -> None:
    # With the same shuffle of sorted losses in every draw, one drawn from the seed alone, these
    # fail in 12 to 21 % of them.
    draws, n, alpha, delta = 400, 100, 0.1, 0.05
    generator = torch.Generator().manual_seed(0)
    failures = 0
    for _ in range(draws):
        labels = (torch.rand(n, generator=generator) < alpha).long()
        logits = torch.stack((1 + torch.rand(n, generator=generator), torch.zeros(n)), 1)
        control = RiskCalibrator(Miscoverage(), grid=torch.tensor([0.5]), seed=seed)
        control.update(logits, labels)
        failures += control.compute(alpha, delta).thresholds.item() < 1
    assert failures <= binom.ppf(0.9999, draws, delta)


@pytest.mark.parametrize("fit", ["PAS", "RC3P"])
def test_a_score_fitted_on_the_very_data_is_refused_as_by_other_calibrators(fit: str) -> None:
    logits, labels = scene(4, batch=25)
    tuning = ClassConditionalCalibrator(C, TopK()).update(logits, labels)
    score = PAS.fit(tuning) if fit == "PAS" else RC3P.fit(tuning, 0.2)
    same = RiskCalibrator(FalseNegativeRate(C), score).update(logits.flip(0), labels.flip(0))
    assert same.fingerprint == tuning.fingerprint
    with pytest.raises(InputError, match="score must be fitted on a split of its own"):
        same.compute(0.2)
    RiskCalibrator(FalseNegativeRate(C), score).update(logits[1:], labels[1:]).compute(0.2)


def test_the_same_data_are_tested_in_an_order_that_only_the_seed_decides() -> None:
    logits, labels = scene(3, batch=40)
    seen: list[Tensor] = []

    def spy(losses: Tensor, alpha: float, delta: float = 0.1) -> Tensor:
        seen.append(losses)
        return hoeffding_bentkus(losses, alpha, delta)

    for seed in (0, 0, 1):
        control = RiskCalibrator(Miscoverage(), grid=GRID, seed=seed).update(logits, labels)
        control.compute(0.3, 0.1, bound=spy)
    first, again, other = (losses.sum(1) for losses in seen)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(first, other)
    assert torch.equal(first.sort().values, other.sort().values)
    # Neither up nor down with the losses: an order by content would break the tests.
    for losses in (first, again, other):
        place = torch.arange(40, dtype=torch.float64)
        assert abs(float(torch.corrcoef(torch.stack((place, losses)))[0, 1])) < 0.5


def separable(n: int, errors: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Confident pixels are right; of the others, half are wrong."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n, 20), generator=generator)
    sure = torch.rand(n, 20, generator=generator) < 0.7
    wrong = ~sure & (torch.rand(n, 20, generator=generator) < 0.5)
    wrong |= sure & (torch.rand(n, 20, generator=generator) < errors)
    guess = torch.where(wrong, 1 - labels, labels)
    size = torch.where(sure, 8.0, 0.5) + torch.rand(n, 20, generator=generator) / 4
    logits = torch.zeros(n, 2, 20).scatter(1, guess[:, None], size[:, None])
    return logits, labels


ALL_RISKS: list[Risk] = [
    Miscoverage(),
    FalseNegativeRate(C, (1,)),
    DilutedFalseNegativeRate(C),
    WorstFalseNegativeRate(C),
    CoverageShare(0.5),
    InstanceRecall(),
    KeptError(partial(AtMost, k=2), C),
    KeptError(Top, C, per_class=True),
    FalseShare(partial(BackgroundPriority, background=1), C),
]


@pytest.mark.parametrize("risk", ALL_RISKS)
@pytest.mark.parametrize("shape", [(0, C, 3, 4), (2, C), (2, C, 3, 2, 2)])
def test_empty_batches_change_nothing_and_any_number_of_axes_will_do(
    risk: Risk, shape: tuple[int, ...]
) -> None:
    control = RiskCalibrator(risk, grid=GRID)
    logits = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    control.update(logits, labels)
    assert control.table().shape[0] == shape[0]
    safe = -torch.inf if risk.keeps else torch.inf
    assert bool((control.compute(0.1, 0.1).thresholds == safe).all())
    unlabeled = RiskCalibrator(risk, grid=GRID).update(logits, torch.full_like(labels, 255))
    calibration = unlabeled.compute(0.1, 0.1)
    assert calibration.num_pixels.sum() == 0
    assert bool((calibration.thresholds == safe).all())


# --- what comes out ------------------------------------------------------------------------------


def test_error_among_kept_labels_is_found_from_a_tuned_start_and_from_several() -> None:
    tuning = RiskCalibrator(KeptError(Argmax, 2)).update(*separable(60, seed=1))
    start = Start.fit(tuning, 0.05)
    for begin in (start, None):
        control = RiskCalibrator(KeptError(Argmax, 2), start=begin).update(*separable(150))
        calibration = control.compute(alpha=0.05, delta=0.1)
        threshold = calibration.thresholds.item()
        assert 0 < threshold < 0.5
        logits, labels = separable(500, seed=2)
        kept = Argmax(calibration)(logits)
        chosen = kept != 255
        assert int((chosen & (kept != labels)).sum()) / int(chosen.sum()) <= 0.05
        assert int(chosen.sum()) / chosen.numel() > 0.6
    from_zero = Start(torch.tensor([0.0]))
    control = RiskCalibrator(KeptError(Argmax, 2), start=from_zero).update(*separable(150))
    assert control.compute(alpha=0.05, delta=0.1).thresholds.item() == -torch.inf


@pytest.mark.parametrize("delta", [None, 0.1])
def test_a_risk_of_ones_own_must_be_small_where_tests_fall_back_to(delta: float | None) -> None:
    # Half of it is lost whatever sets are: +inf does not make it 0, as it does the built-in ones.
    half = SetRisk(lambda sets, _: torch.full((len(sets),), 0.5), "half", monotone=True)
    made = RiskCalibrator(half).update(*scene(0)).compute(0.1, delta)
    assert made.thresholds.isinf().all()
    assert "alpha" in made.guarantee.assumptions[-1]
    assert "where every set holds every class" in made.guarantee.assumptions[-1]
    plain = RiskCalibrator(Miscoverage()).update(*scene(0)).compute(0.1, delta)
    assert "every set" not in " ".join(plain.guarantee.assumptions)


def test_as_many_images_as_are_said_to_do_in_expectation_do() -> None:
    logits = torch.tensor([[9.0, 0.0]] * 5)
    labels = torch.zeros(5, dtype=torch.int64)
    told = str(RiskCalibrator(Miscoverage()).update(logits, labels).compute(0.1).guarantee)
    assert "fewer than 9 can never do. At the errors seen here about 9 would." in told
    enough = RiskCalibrator(Miscoverage()).update(logits[:1].expand(9, 2), labels[:1].expand(9))
    assert enough.compute(0.1).thresholds.isfinite().all()


@pytest.mark.parametrize("bound", [betting, hoeffding_bentkus, hoeffding])
def test_as_many_images_as_are_said_to_do_with_probability_do_and_half_of_them_do_not(
    bound: PValue,
) -> None:
    # Where errors are all but gone, what is kept decides how much there is to bet on.
    risk, start, alpha = KeptError(Argmax, 2), Start(torch.tensor([0.0625])), 0.05

    def certified(n: int, seed: int) -> Calibration:
        control = RiskCalibrator(risk, start=start).update(*separable(n, errors=0.005, seed=seed))
        return control.compute(alpha, 0.1, bound=bound)

    few = certified(46, 0)
    told = re.search(r"At the errors seen here about (\d+) would", str(few.guarantee))
    assert few.thresholds.isinf().all()
    assert told is not None
    enough = int(told[1])
    assert enough > 60  # more than zero losses would need, and than were seen
    do = [bool(certified(round(enough * 1.25), seed).thresholds.isfinite()) for seed in range(20)]
    not_do = [bool(certified(enough // 2, seed).thresholds.isfinite()) for seed in range(20)]
    assert sum(do) >= 15
    assert sum(not_do) <= 5


def test_where_nothing_can_be_certified_nothing_is_kept_and_it_says_what_would_do() -> None:
    control = RiskCalibrator(KeptError(Argmax, 2), start=Start(torch.tensor([0.0625])))
    calibration = control.update(*separable(44)).compute(0.05, 0.1, bound=hoeffding_bentkus)
    assert calibration.thresholds.tolist() == [-torch.inf]
    assert bool((Argmax(calibration)(separable(3)[0]) == 255).all())
    text = str(calibration.guarantee)
    assert "no label is kept" in text
    assert "44 images were seen; fewer than 45 can never do" in text
    bad = RiskCalibrator(KeptError(Argmax, 2)).update(*separable(60, errors=0.6))
    assert "no number of images would" in str(bad.compute(0.05, 0.1).guarantee)
    empty = RiskCalibrator(KeptError(Argmax, 2)).compute(0.05, 0.1)
    assert empty.thresholds.tolist() == [-torch.inf]


def test_sets_of_a_risk_that_cannot_be_certified_hold_everything() -> None:
    logits, labels = scene(0, batch=20)
    calibration = RiskCalibrator(CoverageShare(0.9)).update(logits, labels).compute(0.05, 0.1)
    assert calibration.thresholds.tolist() == [torch.inf]
    assert bool(PixelSetPredictor(calibration)(logits).all())
    assert "fewer than 45 can never do" in str(calibration.guarantee)


@pytest.mark.parametrize("alpha", [0.1, 0.25])
def test_expectation_is_conformal_risk_control_on_the_grid(alpha: float) -> None:
    logits, labels = scene(9, batch=40)
    for risk in (Miscoverage(), WorstFalseNegativeRate(C), CoverageShare(0.5)):
        control = RiskCalibrator(risk, grid=GRID).update(logits, labels)
        got = control.compute(alpha).thresholds.item()
        values = losses_of(risk, logits, labels, alpha).values[:, 0]
        fits = [float(values[:, k].sum()) <= alpha * 41 - 1 + 1e-9 for k in range(len(GRID))]
        best = min((GRID[k].item() for k in range(len(GRID)) if fits[k]), default=torch.inf)
        assert got == pytest.approx(best, abs=1e-5)
        assert got >= best
    exact = SplitCalibrator(store="exact").update(logits, labels).compute(alpha).thresholds
    fine = RiskCalibrator(Miscoverage(), grid=threshold_grid(0, 1, 2001)).update(logits, labels)
    assert exact.item() <= fine.compute(alpha).thresholds.item() <= exact.item() + 1e-3


@pytest.mark.parametrize("n", [9, 8])
def test_the_fewest_units_in_expectation(n: int) -> None:
    logits = torch.tensor([[[5.0], [0.0]]]).repeat(n, 1, 1)
    control = RiskCalibrator(Miscoverage()).update(logits, torch.zeros(n, 1, dtype=torch.int64))
    calibration = control.compute(0.1)
    assert bool(calibration.thresholds.isinf()) == (n == 8)
    if n == 8:
        assert "8 images were seen; fewer than 9 can never do" in str(calibration.guarantee)


def test_certified_thresholds_are_those_the_binomial_tail_allows() -> None:
    logits, labels = scene(10, batch=90)
    control = RiskCalibrator(CoverageShare(0.5), grid=GRID).update(logits, labels)
    values = losses_of(CoverageShare(0.5), logits, labels, 0.3).values[:, 0]
    fits = clopper_pearson(values, 0.3) <= 0.1
    got = control.compute(0.3, 0.1, bound=clopper_pearson).thresholds.item()
    assert got == pytest.approx(min(GRID[fits].tolist()), abs=1e-5)
    assert fits.tolist() == sorted(fits.tolist())


@pytest.mark.parametrize("bound", [betting, hoeffding_bentkus])
@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5])
def test_for_a_monotone_risk_it_is_the_rule_of_an_upper_confidence_bound(
    bound: PValue, alpha: float
) -> None:
    # RCPS (Bates et al., 2021): the tightest threshold, such that from there on every upper
    # bound on the risk is at most alpha.
    logits, labels = scene(13, batch=80)
    seen: list[Tensor] = []

    def spy(losses: Tensor, level: float, delta: float = 0.1) -> Tensor:
        seen.append(losses)
        return bound(losses, level, delta)

    control = RiskCalibrator(Miscoverage(), grid=GRID).update(logits, labels)
    got = control.compute(alpha, 0.1, bound=spy).thresholds.item()
    highest = upper_bound(seen[0], 0.1, bound, steps=100)  # from the safe end on
    fits = (highest <= alpha + 1e-9).double().cumprod(0).bool()
    safest_first = GRID.flip(0)[fits].tolist()
    expected = min(safest_first, default=torch.inf)
    assert got == pytest.approx(expected, abs=1e-5)


def test_classes_share_delta_only_where_asked() -> None:
    logits, labels = scene(11, batch=120)
    control = RiskCalibrator(FalseNegativeRate(C)).update(logits, labels)
    levels: list[float] = []

    def spy(losses: Tensor, alpha: float, delta: float = 0.1) -> Tensor:
        levels.append(delta)
        return hoeffding_bentkus(losses, alpha, delta)

    control.compute(0.3, 0.1, bound=spy)
    control.compute(0.3, 0.1, bound=spy, simultaneous=True)
    assert levels == [0.1] * C + [0.1 / C] * C
    each = control.compute(0.3, 0.1, bound=hoeffding_bentkus)
    all_at_once = control.compute(0.3, 0.1, bound=hoeffding_bentkus, simultaneous=True)
    shared = control.compute(0.3, 0.1 / C, bound=hoeffding_bentkus)
    assert torch.equal(all_at_once.thresholds, shared.thresholds)
    assert bool((each.thresholds <= all_at_once.thresholds).all())
    assert "Each class by itself" in str(each.guarantee)
    assert "All classes at once" in str(all_at_once.guarantee)
    one = (
        RiskCalibrator(FalseNegativeRate(C, classes=(1,))).update(logits, labels).compute(0.3, 0.1)
    )
    assert one.thresholds.isinf().tolist() == [True, False, True]
    assert "could be certified" not in str(one.guarantee)


def test_monotonizing_takes_the_largest_loss_on_the_safe_side() -> None:
    logits, labels = separable(80)
    control = RiskCalibrator(FalseShare(Argmax, 2)).update(logits, labels)
    calibration = control.compute(0.1, monotonize=True)
    values = FalseShare(Argmax, 2).losses(control.table(), 0.1).values[:, 0].cummax(1).values
    assert control.grid is not None
    fits = values.sum(0) <= 0.1 * 81 - 1
    assert calibration.thresholds.item() == control.grid[int(fits.nonzero().max())].item()


# --- bound to a rule -----------------------------------------------------------------------------


def test_a_calibration_is_bound_to_its_filter_also_after_saving(tmp_path: Path) -> None:
    rule = partial(BackgroundPriority, background=1)
    control = RiskCalibrator(KeptError(rule, 2)).update(*separable(150))
    calibration = control.compute(0.3, 0.1)
    calibration.save(tmp_path / "kept.json")
    loaded = Calibration.load(tmp_path / "kept.json")
    assert loaded.control == calibration.control
    assert str(loaded.guarantee) == str(calibration.guarantee)
    assert torch.equal(loaded.thresholds, calibration.thresholds)
    logits, _ = separable(2)
    for bound in (calibration, loaded):
        assert rule(bound)(logits).shape == (2, 20)
        for other in (Argmax, Top, Singleton, partial(AtMost, k=2), BackgroundPriority):
            with pytest.raises(InputError, match=r"with BackgroundPriority\(background=1\), for"):
                other(bound)
        with pytest.raises(InputError, match="got prediction sets"):
            PixelSetPredictor(bound)(logits)
        with pytest.raises(InputError, match='guard must not have action "abstain"'):
            BackgroundPriority(bound, 1, AreaGuard(action="abstain"))
        BackgroundPriority(bound, 1, AreaGuard())
    same = RiskCalibrator(KeptError(Singleton, 2)).update(*separable(9)).compute(0.3, 0.1)
    assert AtMost(same, k=1)(logits).shape == Singleton(same)(logits).shape


def test_minus_infinity_survives_a_file_and_files_without_control_still_load(
    tmp_path: Path,
) -> None:
    nothing = RiskCalibrator(KeptError(Argmax, 2)).update(*separable(5)).compute(0.05, 0.1)
    nothing.save(tmp_path / "nothing.json")
    assert Calibration.load(tmp_path / "nothing.json").thresholds.tolist() == [-torch.inf]
    SplitCalibrator().update(*separable(5)).compute(0.5).save(tmp_path / "plain.json")
    content = json.loads((tmp_path / "plain.json").read_text())
    assert content.pop("control", "missing") is None
    content["sha256"] = _digest({key: content[key] for key in content if key != "sha256"})
    (tmp_path / "old.json").write_text(json.dumps(content))
    for name in ("plain.json", "old.json"):
        assert Calibration.load(tmp_path / name).control is None
    text = (tmp_path / "nothing.json").read_text()
    (tmp_path / "changed.json").write_text(text.replace('"Argmax()"', '"Top()"'))
    with pytest.raises(FileError, match="damaged"):
        Calibration.load(tmp_path / "changed.json")


def test_the_statement_names_event_probability_and_assumptions() -> None:
    calibration = RiskCalibrator(KeptError(Argmax, 2)).update(*separable(150)).compute(0.3, 0.05)
    text = str(calibration.guarantee)
    assert text.startswith("E[wrong] / E[kept] is at most 0.3, with the shares of a new image's")
    assert "with probability at least 0.95 over the calibration images (150 " in text
    assert "independent draws from one distribution" in text
    assert calibration.control is not None
    assert (calibration.control.rule, calibration.control.delta) == ("Argmax()", 0.05)


@settings(max_examples=20)
@given(st.sampled_from(range(9)), st.booleans())
def test_a_state_gives_back_the_calibrator(which: int, filled: bool) -> None:  # noqa: FBT001
    control = RiskCalibrator(ALL_RISKS[which], APS(), seed=5, start=None)
    if filled:
        control.update(*scene(0)).update(*scene(1), range(5))
    again = gather(control)
    assert again.fingerprint == control.fingerprint
    assert again._config() == control._config()
    if filled:
        assert torch.equal(again.compute(0.4, 0.2).thresholds, control.compute(0.4, 0.2).thresholds)


# --- what is refused -----------------------------------------------------------------------------


def test_bad_data_raises_with_counts() -> None:
    logits, labels = scene(0)
    labels[0, 0, :2] = 7
    logits[1, :, 0, 0] = torch.nan
    labels[1, 0, 0] = 0
    control = RiskCalibrator(Miscoverage()).update(logits, labels)
    with pytest.raises(InputError, match=r"got 2 pixels whose label is .* 1 pixels with unusable"):
        control.compute(0.1)


def falling(sets: Tensor, labels: Tensor) -> Tensor:
    del labels
    return sets.flatten(1).double().mean(1)


def test_risks_outside_their_range_or_not_monotone_as_declared_are_refused() -> None:
    logits, labels = scene(0)
    with pytest.raises(InputError, match=r"size must lie in \[0, 1\]; got 30 losses"):
        RiskCalibrator(SetRisk(lambda s, y: falling(s, y) + 2, "size"), grid=GRID).update(
            logits, labels
        )
    with pytest.raises(InputError, match=r"function of size must give shape \(5,\)"):
        RiskCalibrator(SetRisk(lambda s, y: falling(s, y)[:2], "size")).update(logits, labels)
    control = RiskCalibrator(SetRisk(falling, "size", monotone=True)).update(logits, labels)
    with pytest.raises(InputError, match="risk must be monotone, as it is declared; got 5 units"):
        control.compute(0.5, 0.1)
    control = RiskCalibrator(SetRisk(falling, "size")).update(logits, labels)
    with pytest.raises(InputError, match="risk must be monotone to be controlled in expectation"):
        control.compute(0.5)
    control.compute(0.5, monotonize=True)
    control.compute(0.5, 0.1)


def test_arguments_that_do_not_fit_are_refused() -> None:
    logits, labels = scene(0)
    control = RiskCalibrator(KeptError(Argmax, C)).update(logits, labels)
    with pytest.raises(InputError, match="delta must be given for KeptError"):
        control.compute(0.1)
    with pytest.raises(InputError, match="simultaneous must be False without delta"):
        RiskCalibrator(Miscoverage()).compute(0.1, simultaneous=True)
    with pytest.raises(InputError, match="rule must be Top with per_class=True"):
        KeptError(Argmax, C, per_class=True)
    own = RiskCalibrator(KeptError(Argmax, C), start=Start.fit(control, 0.1))
    own.update(logits, labels)
    with pytest.raises(InputError, match="start must be fitted on a split of its own"):
        own.compute(0.1, 0.1)
    unknown = RiskCalibrator(KeptError(Argmax, C), start=Start(torch.tensor([torch.nan])))
    with pytest.raises(InputError, match="start must have thresholds that are numbers; got NaN"):
        unknown.compute(0.1, 0.1)
    two = RiskCalibrator(KeptError(Argmax, C), start=Start(torch.zeros(2)))
    with pytest.raises(InputError, match=r"start must have thresholds of shape \(1,\)"):
        two.compute(0.1, 0.1)
    with pytest.raises(InputError, match="tuning must have seen data"):
        Start.fit(RiskCalibrator(Miscoverage()), 0.1)
    with pytest.raises(InputError, match="grid must be finite and increasing"):
        RiskCalibrator(Miscoverage(), grid=torch.tensor([1.0, 0.0]))
    with pytest.raises(InputError, match=r"grid must be float32 of shape \(K,\)"):
        RiskCalibrator(Miscoverage(), grid=torch.tensor([1]))
    with pytest.raises(InputError, match="logits must have C = 3 classes; got 2"):
        control.update(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="other must have risk"):
        control.merge(RiskCalibrator(KeptError(Top, C)))
    with pytest.raises(InputError, match="unit_ids must have one id per batch entry, 5; got 2"):
        control.update(logits, labels, [1, 2])
    with pytest.raises(InputError, match="classes must lie below 3; got 3"):
        FalseNegativeRate(C, classes=(3,))
    with pytest.raises(InputError, match="tau must lie strictly between"):
        CoverageShare(1.0)
    state = RiskCalibrator(KeptRisk(flooded, Argmax, C, "flood")).state_dict()
    with pytest.raises(InputError, match="risk must be given: this was made with KeptRisk"):
        RiskCalibrator.from_state_dict(state)
    with pytest.raises(
        InputError, match="state must be version 2 of a RiskCalibrator; got version 1"
    ):
        RiskCalibrator.from_state_dict({**state, "version": 1})
    back = RiskCalibrator.from_state_dict(state, risk=KeptRisk(flooded, Argmax, C, "flood"))
    assert back.state_dict()["config"] == state["config"]
    with pytest.raises(InputError, match="risk must be the one that made this"):
        RiskCalibrator.from_state_dict(state, risk=Miscoverage())


def test_a_risk_of_kept_labels_is_monotone_if_it_rises_with_the_threshold() -> None:
    logits, labels = scene(0)

    def kept(made: Tensor, truth: Tensor) -> Tensor:
        del truth
        return (made != 255).flatten(1).double().mean(1)

    rising = KeptRisk(kept, Argmax, C, "share kept", monotone=True)
    RiskCalibrator(rising, grid=GRID).update(logits, labels).compute(0.5, 0.1)
    fading = KeptRisk(lambda x, y: 1 - kept(x, y), Argmax, C, "share dropped", monotone=True)
    with pytest.raises(InputError, match="risk must be monotone, as it is declared; got 5 units"):
        RiskCalibrator(fading, grid=GRID).update(logits, labels).compute(0.5, 0.1)


def test_only_where_more_is_safer_are_thresholds_raised_by_the_tolerance() -> None:
    # A threshold of any other risk is used as it was tested.
    logits, labels = scene(0, batch=60)

    def missed(sets: Tensor, truth: Tensor) -> Tensor:
        held = sets.gather(1, torch.where(truth != 255, truth, 0)[:, None])[:, 0]
        return (~held & (truth != 255)).flatten(1).double().mean(1)

    for monotone in (True, False):
        risk = SetRisk(missed, "share missed", monotone=monotone)
        made = RiskCalibrator(risk, grid=GRID).update(logits, labels).compute(0.6, 0.1)
        threshold = made.thresholds.item()
        assert threshold < 1
        assert (threshold in GRID.tolist()) is not monotone
        assert min((threshold - GRID[threshold >= GRID]).tolist()) < 1e-4


def test_an_image_that_keeps_nothing_has_a_false_share_of_zero_and_counts() -> None:
    logits = torch.tensor([[[9.0, 9.0], [0.0, 0.0]], [[0.1, 0.1], [0.0, 0.0]]])
    labels = torch.tensor([[0, 1], [1, 1]])
    control = RiskCalibrator(FalseShare(Argmax, 2), grid=torch.tensor([0.2, 0.9]))
    rows = control.update(logits, labels, range(2))._units
    losses = control.risk.losses(torch.stack([rows[0], rows[1]]), 0.1)
    assert losses.values[:, 0].tolist() == [[0.5, 0.5], [0.0, 1.0]]
    assert losses.counted.all()
