"""Weights, alarms and moving levels: definitions, edges, and what they promise over draws."""

from fractions import Fraction
from math import ceil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor

from cpseg import APS, LAC, Argmax, Calibration, PixelSetPredictor, SplitCalibrator, merge_all
from cpseg.errors import InputError
from cpseg.shift import AdaptiveLevel, ExchangeabilityMartingale, WeightedCalibrator


def images(n: int, seed: int = 0, pixels: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n, pixels), generator=generator)
    ease = 3 * torch.rand(n, 1, 1, generator=generator)
    truth = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
    logits = ease * truth + torch.randn(n, 3, pixels, generator=generator)
    labels[:, 1:][torch.rand(n, pixels - 1, generator=generator) < 0.2] = 255
    return logits, labels


def slow_threshold(
    logits: Tensor,
    labels: Tensor,
    weights: list[float],
    alpha: Fraction,
    *,
    new: float,
    slack: float,
) -> float:
    scores = LAC().of_labels(logits, labels * (labels != 255))
    seen = [scores[i][labels[i] != 255].tolist() for i in range(len(labels))]
    pairs = [(w, s) for w, s in zip(weights, seen, strict=True) if s]
    for limit in sorted({value for _, s in pairs for value in s}):
        lost = sum(w * sum(v > limit for v in s) / len(s) for w, s in pairs)
        if lost + new + slack <= float(alpha) * (sum(w for w, _ in pairs) + new):
            return float(limit)
    return float("inf")


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=12, max_size=12),
    st.sampled_from([0.0, 0.3, 1.0, 2.0, 50.0]),
    st.sampled_from([0.1, 0.3]),
)
def test_a_weight_stays_with_its_own_scores(weights: list[float], new: float, alpha: float) -> None:
    logits, labels = images(12)
    calibrator = WeightedCalibrator().update(logits, labels, torch.tensor(weights))
    if sum(weights) == 0:
        with pytest.raises(InputError, match=r"weights must have a positive, .* got 12 labeled"):
            calibrator.compute(alpha)
        return
    calibration = calibrator.compute(alpha)
    got = calibration.thresholds(torch.tensor([new])).item()
    level = Fraction(str(alpha))
    least = slow_threshold(logits, labels, weights, level, new=new, slack=0.0)
    most = slow_threshold(logits, labels, weights, level, new=new, slack=1e-9)
    assert least <= got <= most * (1 + 2e-3) + 1e-5


def test_equal_weights_are_the_split_calibration() -> None:
    logits, labels = images(40)
    plain = SplitCalibrator().update(logits, labels).compute(0.1)
    weighted = WeightedCalibrator().update(logits, labels, torch.full((40,), 2.5)).compute(0.1)
    assert torch.equal(weighted.thresholds(torch.tensor([2.5])), plain.thresholds)
    assert weighted.effective_units == pytest.approx(40)


@settings(max_examples=30)
@given(
    st.sampled_from([1.0, 0.1, 1 / 3, 7e-9, 2e12]),
    st.integers(1, 45),
    st.sampled_from([0.05, 0.1, 0.2, 0.7]),
)
def test_equal_weights_of_any_size_are_the_split_calibration_at_every_n(
    weight: float, n: int, alpha: float
) -> None:
    logits, labels = images(n, seed=n)
    weights = torch.full((n,), weight, dtype=torch.float64)
    weighted = WeightedCalibrator().update(logits, labels, weights).compute(alpha)
    plain = SplitCalibrator().update(logits, labels).compute(alpha)
    assert torch.equal(weighted.thresholds(weights[:1]), plain.thresholds)
    assert weighted.num_units == n
    needed = ceil(1 / Fraction(str(alpha))) - 1
    assert weighted.needed_units(weight) == needed
    assert bool(plain.thresholds.isfinite()) == (n >= needed)


def test_as_many_images_as_are_said_to_do_under_weights_do() -> None:
    logits, labels = images(400)
    weights = torch.tensor([0.0, 0.5, 1.5, 1.0]).repeat(100)
    few = WeightedCalibrator().update(logits[:8], labels[:8], weights[:8]).compute(0.1)
    for new in (0.5, 1.0, 3.0):
        needed = few.needed_units(new)  # of mean weight 1
        assert needed == ceil(9 * new)
        n = 4 * ceil(needed / 3)  # three of four weigh something
        enough = WeightedCalibrator().update(logits[:n], labels[:n], weights[:n]).compute(0.1)
        assert enough.num_units >= needed
        assert bool(enough.thresholds(torch.tensor([new])).isfinite())
        fewer = WeightedCalibrator().update(logits[: n - 4], labels[: n - 4], weights[: n - 4])
        if 3 * (n - 4) // 4 < needed:
            assert bool(fewer.compute(0.1).thresholds(torch.tensor([new])).isinf())
    assert few.needed_units(0.0) == 1
    told = few.bounded(1.0).guarantee
    assert told.n == (6, 6)
    assert "Every set holds every class: 6 images were seen; about 9 of their mean weight" in str(
        told
    )
    assert "as much as 5.1 images" in str(told)
    with pytest.raises(InputError, match="weight must be finite and >= 0"):
        few.needed_units(-1.0)


def test_what_weights_promise_is_held_to_the_last_bit_against_exact_sums() -> None:
    # One pixel per image: the mass above a threshold is a sum of weights, as fractions.
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        n = 3 + trial % 20
        weights = torch.rand(n, generator=generator, dtype=torch.float64) * 3
        logits = torch.randint(-6, 7, (n, 2), generator=generator).float()
        labels = torch.zeros(n, dtype=torch.int64)
        calibration = WeightedCalibrator().update(logits, labels, weights).compute(0.3)
        new = float(torch.rand((), generator=generator, dtype=torch.float64))
        limit = calibration.thresholds(torch.tensor([new], dtype=torch.float64)).item()
        scores = LAC().of_labels(logits, labels).tolist()
        exact = [Fraction(weight) for weight in weights.tolist()]
        lost = sum(w for w, score in zip(exact, scores, strict=True) if score > limit)
        total = sum(exact)
        worst = lost + Fraction(new) if limit < 1e9 else Fraction(0)
        assert worst <= Fraction(3, 10) * (total + Fraction(new))


def test_a_weight_too_small_to_count_is_held_against_the_threshold() -> None:
    # The two hardest images weigh 1 + 2**-41 of 2 + 2**-41: by a hair more than half.
    logits = torch.tensor([[0.0, 2.0], [0.0, 1.0], [2.0, 0.0]])
    labels = torch.zeros(3, dtype=torch.int64)
    weights = torch.tensor([1.0, 2.0**-41, 1.0], dtype=torch.float64)
    calibration = WeightedCalibrator().update(logits, labels, weights).compute(0.5)
    limit = calibration.thresholds(torch.zeros(1)).item()
    assert LAC().of_labels(logits, labels)[1] <= limit < LAC().of_labels(logits, labels)[0]


def test_each_image_gets_the_threshold_of_its_weight() -> None:
    logits, labels = images(30)
    weights = torch.linspace(0, 2, 30)
    calibration = WeightedCalibrator().update(logits, labels, weights).compute(0.2)
    new = torch.tensor([0.0, 1.0, 1e9])
    limits = calibration.thresholds(new)
    assert limits.tolist() == sorted(limits.tolist())
    assert limits[2] == torch.inf
    sets = calibration(logits[:3], new)
    assert sets.shape == (3, 3, 7)
    for i in range(3):
        assert torch.equal(sets[i], LAC()(logits[i : i + 1])[0] <= limits[i])
    bound = calibration.bounded(1.0)
    assert torch.equal(bound.thresholds, limits[1:2])
    assert torch.equal(PixelSetPredictor(bound)(logits[1:2]), sets[1:2])
    assert "weight of the new image at most 1" in str(bound.guarantee)
    assert Argmax(bound)(logits).shape == (30, 7)
    assert "Every set holds every class" in str(calibration.bounded(1e9).guarantee)


def test_merges_in_any_order_agree_and_states_come_back() -> None:
    logits, labels = images(9)
    weights = torch.rand(9, generator=torch.Generator().manual_seed(1))
    whole = WeightedCalibrator(APS()).update(logits, labels, weights)
    first = WeightedCalibrator(APS()).update(logits[:4], labels[:4], weights[:4])
    second = WeightedCalibrator(APS()).update(logits[4:], labels[4:], weights[4:])
    merged = second.merge(first)
    for name, value in whole.state_dict().items():
        other = merged.state_dict()[name]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name  # type: ignore[arg-type]
    again = WeightedCalibrator.from_state_dict(merged.state_dict())
    assert torch.equal(again.compute(0.2).above, whole.compute(0.2).above)
    assert first.reset().num_classes is None


def test_tiles_of_a_unit_are_one_image_whatever_their_order_and_split() -> None:
    logits, labels = images(12, 5, pixels=8)
    logits = logits.round()  # so that tiles share scores
    weights = torch.linspace(0.5, 2, 12)
    whole = WeightedCalibrator().update(logits, labels, weights).compute(0.2)
    left = WeightedCalibrator().update(logits[..., :3], labels[:, :3], weights, range(12))
    right = WeightedCalibrator()
    for i in reversed(range(12)):
        part = slice(i, i + 1)
        right.update(logits[part, :, 3:], labels[part, 3:], weights[part], torch.tensor([i]))
    merged = merge_all([right, left])
    again = WeightedCalibrator.from_state_dict(merged.state_dict())
    assert merge_all([left, right]).state_dict()["ids"].tolist() == list(range(12))  # type: ignore[attr-defined]
    for tiled in (merged.compute(0.2), again.compute(0.2), merge_all([left, right]).compute(0.2)):
        new = torch.tensor([0.0, 1.0, 3.0])
        assert torch.equal(tiled.thresholds(new), whole.thresholds(new))
        assert len(tiled.weights) == 12
    apart = WeightedCalibrator().update(logits[..., :3], labels[:, :3], weights)
    apart.update(logits[..., 3:], labels[:, 3:], weights)
    assert len(apart.compute(0.2).weights) == 24


def test_tiles_with_another_weight_are_refused_and_change_nothing() -> None:
    logits, labels = images(2, 6)
    held = WeightedCalibrator().update(logits[:1], labels[:1], torch.ones(1), [7])
    before = held.compute(0.6).above
    with pytest.raises(InputError, match="got 1 and 2 for unit 7"):
        held.update(logits, labels, torch.tensor([1.0, 2.0]), [3, 7])
    with pytest.raises(InputError, match="unit_ids must have one id per batch entry, 2; got 1"):
        held.update(logits, labels, torch.ones(2), [7])
    other = WeightedCalibrator().update(logits[1:], labels[1:], torch.full((1,), 2.0), [7])
    with pytest.raises(InputError, match="got 1 and 2 for unit 7"):
        held.merge(other)
    assert torch.equal(held.compute(0.6).above, before)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_none_are_refused(bad: float) -> None:
    logits, labels = images(2)
    weights = torch.tensor([1.0, bad])
    with pytest.raises(InputError, match="weights must be finite and >= 0; got 1 that are not"):
        WeightedCalibrator().update(logits, labels, weights)
    calibration = WeightedCalibrator().update(logits, labels, torch.ones(2)).compute(0.5)
    with pytest.raises(InputError, match="weights must be finite and >= 0"):
        calibration(logits, weights)
    with pytest.raises(InputError, match=r"weights must have shape \(2,\); got \(3,\)"):
        calibration(logits, torch.ones(3))


def test_bad_data_and_other_arguments_are_refused() -> None:
    logits, labels = images(2)
    with pytest.raises(InputError, match=r"weights must have a positive, .* got 0 labeled"):
        WeightedCalibrator().compute(0.1)
    huge = torch.full((3,), 1e308, dtype=torch.float64)
    many = WeightedCalibrator().update(torch.zeros(3, 2), torch.zeros(3).long(), huge)
    with pytest.raises(InputError, match=r"weights must have a positive, finite sum; got 3"):
        many.compute(0.1)
    wrong = labels.clone()
    wrong[0, 0] = 9
    with pytest.raises(InputError, match="got 1 pixels whose label is no class or"):
        WeightedCalibrator().update(logits, wrong, torch.ones(2))
    with pytest.raises(InputError, match="other must be made with"):
        WeightedCalibrator().merge(WeightedCalibrator(APS()))
    with pytest.raises(InputError, match="state must be version 1 of a WeightedCalibrator"):
        WeightedCalibrator.from_state_dict({"kind": "x"})


@pytest.mark.guarantee
def test_weights_keep_the_promise_where_the_domain_has_shifted() -> None:
    logits, labels = images(4000, seed=3)
    hard = (logits.softmax(1).amax(1).mean(1) < 0.62).double()
    ratio = 0.2 + 3.0 * hard  # the new domain has hard images far more often
    scores = LAC().of_labels(logits, labels * (labels != 255))
    valid = labels != 255
    generator = torch.Generator().manual_seed(0)
    base = WeightedCalibrator().update(logits, labels, ratio)
    missed: list[float] = []
    for _ in range(2000):
        chosen = torch.randint(4000, (30,), generator=generator).tolist()
        new = int(torch.multinomial(ratio, 1, generator=generator))
        calibrator = WeightedCalibrator()
        calibrator.num_classes, calibrator._units = 3, [base._units[i] for i in chosen]
        limit = calibrator.compute(0.1).thresholds(ratio[new : new + 1])
        lost = (scores[new] > limit) & valid[new]
        missed.append(float(lost.sum() / valid[new].sum()))
    found = torch.tensor(missed, dtype=torch.float64)
    assert float(found.mean()) <= 0.1 + 3.72 * float(found.std()) / 2000**0.5


# --- the alarm -----------------------------------------------------------------------------------


def slow_martingale(p_values: list[float], jump: float) -> list[float]:
    capital, path = {-1: 1 / 3, 0: 1 / 3, 1: 1 / 3}, []
    for p in p_values:
        total = sum(capital.values())
        mixed = {bet: (1 - jump) * own + jump * total / 3 for bet, own in capital.items()}
        capital = {bet: own * (1 + bet * (p - 0.5)) for bet, own in mixed.items()}
        path.append(sum(capital.values()))
    return path


def test_the_capital_is_that_of_the_simple_jumper_on_online_smoothed_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(4, (50,), generator=generator).double()
    martingale, p_values = ExchangeabilityMartingale(seed=5), []
    from cpseg._draws import uniform  # noqa: PLC0415

    for t in range(1, 51):
        draw = uniform(5, torch.tensor([t])).item()
        past = values[:t].tolist()
        above = sum(v > past[-1] for v in past)
        p_values.append((above + draw * sum(v == past[-1] for v in past)) / t)
    path = slow_martingale(p_values, 0.01)
    for t in range(50):
        martingale.update(values[t : t + 1])
        assert martingale.value == pytest.approx(path[t], rel=1e-9)
    assert martingale.largest == pytest.approx(max(1.0, *path), rel=1e-9)
    halves = ExchangeabilityMartingale(seed=5).update(values[:20])
    resumed = ExchangeabilityMartingale.from_state_dict(halves.state_dict()).update(values[20:])
    assert resumed.value == pytest.approx(martingale.value, rel=1e-12)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_change_in_either_direction_is_noticed(sign: float) -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(100, generator=generator), torch.randn(100, generator=generator)
    martingale = ExchangeabilityMartingale().update(before)
    assert not martingale.alarm(0.05)
    assert martingale.update(after + 2 * sign).alarm(0.001)


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(InputError, match="statistics must not be NaN; got 1"):
        ExchangeabilityMartingale().update(torch.tensor([torch.nan]))
    with pytest.raises(InputError, match=r"statistics must be floating with shape \(T,\)"):
        ExchangeabilityMartingale().update(torch.tensor([1]))
    with pytest.raises(InputError, match="state must be of a ExchangeabilityMartingale"):
        ExchangeabilityMartingale.from_state_dict({})


@pytest.mark.guarantee
@pytest.mark.parametrize("ties", [False, True])
def test_false_alarms_are_no_more_frequent_than_stated(ties: bool) -> None:  # noqa: FBT001
    generator = torch.Generator().manual_seed(0)
    streams = torch.randn(2000, 100, generator=generator)
    streams = streams.round() if ties else streams
    alarms = sum(
        ExchangeabilityMartingale(seed).update(stream).alarm(0.05)
        for seed, stream in enumerate(streams)
    )
    assert alarms <= binom.ppf(0.9999, 2000, 0.05)


# --- the moving level ----------------------------------------------------------------------------


@pytest.mark.parametrize("worse", [0.0, 6.0])
@pytest.mark.parametrize("gamma", [0.02, 0.3])
def test_the_mean_missed_share_stays_within_its_bound_for_any_sequence(
    worse: float, gamma: float
) -> None:
    calibrator = SplitCalibrator(store="exact").update(*images(60))
    following = AdaptiveLevel(calibrator, 0.2, gamma=gamma)
    logits, labels = images(150, seed=1)
    logits = logits * (1 - worse) if worse else logits
    missed, levels = [], []
    for t in range(150):
        frame, truth = logits[t : t + 1], labels[t : t + 1]
        if not bool((truth != 255).any()):
            continue
        sets = following(frame)
        held = sets.gather(1, (truth * (truth != 255))[:, None])[:, 0]
        missed.append(float((~held)[truth != 255].double().mean()))
        before = following.level
        levels.append(before)
        following.update(frame, truth)
        assert following.level - before == pytest.approx(gamma * (0.2 - missed[-1]), abs=1e-6)
        assert -gamma <= following.level <= 1 + gamma
    gap = abs(sum(missed) / len(missed) - 0.2)
    assert gap <= (0.8 + gamma) / (gamma * len(missed)) + 1e-9
    if gamma == 0.3:
        assert min(levels) < 0


def test_outside_the_unit_interval_sets_are_full_or_empty() -> None:
    logits, labels = images(20)
    following = AdaptiveLevel(SplitCalibrator().update(logits, labels), 0.2, gamma=0.9)
    following.level = -0.01
    assert bool(following(logits).all())
    following.level = 1.0
    assert not bool(following(logits).any())
    assert following.calibration.thresholds.tolist() == [-torch.inf]
    following.level = 0.5
    expected = PixelSetPredictor(SplitCalibrator().update(logits, labels).compute(0.5))(logits)
    assert torch.equal(following(logits), expected)
    assert isinstance(following.calibration, Calibration)


def test_a_moving_level_says_what_it_promises_and_that_this_is_not_about_one_frame(
    tmp_path: Path,
) -> None:
    following = AdaptiveLevel(SplitCalibrator().update(*images(20)), 0.2, gamma=0.5)
    text = str(following.calibration.guarantee)
    assert "their set differs from 0.2 by at most 2.6 / T, over any T frames, whatever" in text
    assert "Nothing is promised for one frame." in text
    assert "expectation" not in text
    following.calibration.save(tmp_path / "frame.json")
    assert str(Calibration.load(tmp_path / "frame.json").guarantee) == text


def test_frames_without_labels_change_nothing() -> None:
    logits, labels = images(20)
    following = AdaptiveLevel(SplitCalibrator().update(logits, labels), 0.2)
    following.update(logits[:1], torch.full_like(labels[:1], 255))
    assert following.level == 0.2
    with pytest.raises(InputError, match="labels must be classes or ignore_index"):
        following.update(logits[:1], torch.full_like(labels[:1], 9))
