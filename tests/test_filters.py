"""Filters: one contract over all of them and all axes, and each rule against plain Python."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cpseg._tiles
import cpseg.scores
from cpseg import (
    APS,
    LAC,
    RAPS,
    SAPS,
    Argmax,
    AtMost,
    BackgroundPriority,
    Calibration,
    Margin,
    Singleton,
    SplitCalibrator,
    TopK,
)
from cpseg.errors import InputError
from cpseg.filters import AreaGuard, AreaWarning, Decision, Reason, SoftLabels, Top, each_class
from cpseg.morphology import dilate
from cpseg.protocols import Score

INF = math.inf
PLAIN = LAC()
FilterKind = Argmax | BackgroundPriority | AtMost | Singleton


def calibrated(
    thresholds: Any,
    axes: Sequence[str] = (),
    *,
    score: Score = PLAIN,
    num_classes: int | None = 3,
    ignore_index: int = 255,
    max_share: Sequence[float] | None = None,
) -> Calibration:
    """A calibration written down by hand."""
    values = torch.as_tensor(thresholds, dtype=torch.float32)
    share = [1.0] * (num_classes or 0) if max_share is None else max_share
    return Calibration(
        thresholds=values,
        axes=tuple(axes),
        alpha=0.1,
        score=score,
        unit="image",
        num_classes=num_classes,
        num_units=torch.full(values.shape, 30),
        num_pixels=torch.full(values.shape, 900),
        ignore_index=ignore_index,
        fallback=None,
        fallback_groups=torch.zeros(values.shape, dtype=torch.bool),
        max_share=torch.tensor(share, dtype=torch.float64),
        source=None,
    )


@dataclass(frozen=True)
class Unordered:
    """A score that denies following the logits, which forces the general path."""

    score: Score
    follows_logits: bool = False

    def __call__(self, logits: Tensor) -> Tensor:
        return self.score(logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.score.of_labels(logits, labels)

    def range(self, num_classes: int) -> tuple[float, float] | None:
        return self.score.range(num_classes)

    def tolerance(self, num_classes: int) -> float:
        return self.score.tolerance(num_classes)


@dataclass(frozen=True)
class NeverAllClasses:
    """LAC whose scores of all classes must not be asked for."""

    follows_logits: bool = True

    def __call__(self, logits: Tensor) -> Tensor:
        raise AssertionError(f"scores of all classes were computed for {logits.shape}")

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return LAC().of_labels(logits, labels)

    def range(self, num_classes: int) -> tuple[float, float]:
        return LAC().range(num_classes)

    def tolerance(self, num_classes: int) -> float:
        return LAC().tolerance(num_classes)


FILTERS: dict[str, Callable[[Calibration], FilterKind]] = {
    "argmax": Argmax,
    "background": BackgroundPriority,
    "background 2": lambda calibration: BackgroundPriority(calibration, background=2),
    "singleton": Singleton,
    "at most 2": lambda calibration: AtMost(calibration, k=2),
}
AXES = [(), ("class",), ("group",), ("group", "class"), ("location",)]
SPACES = [(), (7,), (6, 4), (2, 3, 4)]
NUM_GROUPS = 3

every_filter = pytest.mark.parametrize("name", FILTERS)
every_axes = pytest.mark.parametrize("axes", AXES, ids=["split", "class", "group", "both", "place"])


def drawn(
    axes: Sequence[str], space: Sequence[int], classes: int, seed: int, starved: float = 0.2
) -> Calibration:
    """Random thresholds, a share of them +inf."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"class": classes, "group": NUM_GROUPS}
    shape = tuple(space) if axes == ("location",) else tuple(sizes[axis] for axis in axes) or (1,)
    thresholds = 0.3 + 0.65 * torch.rand(shape, generator=generator)
    if axes:
        thresholds[torch.rand(shape, generator=generator) < starved] = INF
    return calibrated(thresholds, axes, num_classes=classes)


def limits_at(calibration: Calibration, group: int | None, place: tuple[int, ...]) -> list[float]:
    """The thresholds of all classes at one pixel, in plain Python."""
    values: Any = calibration.thresholds.tolist()
    classes = calibration.num_classes or 0
    if group is not None and not 0 <= group < NUM_GROUPS:
        return [INF] * classes
    for index in place if calibration.axes == ("location",) else () if group is None else (group,):
        values = values[index]
    if not isinstance(values, list):
        values = [values]
    limits: list[float] = values if "class" in calibration.axes else values * classes
    return limits


def chosen(name: str, logits: list[float], scores: list[float], limits: list[float]) -> int | None:
    """The rules, for one pixel."""
    if any(map(math.isnan, logits)) or not math.isfinite(max(logits)):
        return None
    if limits[logits.index(max(logits))] == INF:
        return None
    inside = [c for c, score in enumerate(scores) if score <= limits[c] < INF]
    if len(inside) > {"singleton": 1, "at most 2": 2}.get(name, len(scores)):
        return None
    background = {"background": 0, "background 2": 2}.get(name)
    inside = [c for c in inside if c != background] or inside
    return max(inside, key=lambda c: (logits[c], -c)) if inside else None


def pixels(batch: int, space: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(p) for p in torch.ones((batch, *space)).nonzero().tolist()]


def oracle(name: str, calibration: Calibration, logits: Tensor, groups: Tensor | None) -> Tensor:
    batch, _, *space = logits.shape
    scores = calibration.score(logits)
    labels = torch.full((batch, *space), 255)
    for at in pixels(batch, space):
        pixel: Any = (at[0], slice(None), *at[1:])
        group = None if groups is None else int(groups.expand(batch, *space)[at])
        label = chosen(
            name, logits[pixel].tolist(), scores[pixel].tolist(),
            limits_at(calibration, group, at[1:]),
        )  # fmt: skip
        labels[at] = 255 if label is None else label
    return labels


def batch_of(
    kind: str, axes: Sequence[str], space: Sequence[int], seed: int
) -> tuple[Tensor, Tensor | None]:
    """Logits of five classes, random or saturated or broken here and there, and groups."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn((3, 5, *space), generator=generator)
    if kind == "saturated":
        logits = (20 * logits).round()
        logits[:, 1] = logits[:, 3]
    if kind == "broken":
        spoiled = torch.rand(logits.shape, generator=generator)
        logits[spoiled < 0.1] = -INF
        logits[spoiled > 0.97] = math.nan
        logits[(spoiled > 0.94) & (spoiled < 0.97)] = INF
        logits[1] = -INF
    if "group" not in axes:
        return logits, None
    shape = space if seed % 2 else (3, *space)
    return logits, torch.randint(-1, NUM_GROUPS + 2, tuple(shape), generator=generator)


# --- the rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probabilities", "label"),
    [
        ((0.9, 0.65, 0.1), 1),
        ((0.9, 0.3, 0.1), 0),
        ((0.5, 0.4, 0.1), 255),
        ((0.2, 0.7, 0.8), 2),
        ((0.2, 0.6, 0.1), 1),
    ],
)
@pytest.mark.parametrize("follows", [True, False])
def test_background_priority_on_the_vectors_of_its_definition(
    probabilities: tuple[float, ...], label: int, *, follows: bool
) -> None:
    @dataclass(frozen=True)
    class OneMinus:  # annotators may give probabilities that do not sum to one
        follows_logits: bool

        def __call__(self, logits: Tensor) -> Tensor:
            return 1 - logits

        def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
            return 1 - logits.gather(1, labels[:, None])[:, 0]

        def range(self, num_classes: int) -> tuple[float, float]:
            return 0.0, float(num_classes > 0)

        def tolerance(self, num_classes: int) -> float:
            return 0.0 * num_classes

    limit = 1 - torch.tensor(0.6)  # the boundary belongs to the set
    calibration = calibrated([float(limit)], score=OneMinus(follows))
    assert BackgroundPriority(calibration)(torch.tensor([probabilities])).tolist() == [label]


@every_filter
@every_axes
@pytest.mark.parametrize("kind", ["random", "saturated", "broken"])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_every_rule_is_what_plain_python_makes_of_a_pixel(
    name: str, axes: tuple[str, ...], kind: str, space: tuple[int, ...]
) -> None:
    if axes == ("location",) and not space:
        pytest.skip("no locations")
    for seed in range(4):
        calibration = drawn(axes, space, 5, seed)
        logits, groups = batch_of(kind, axes, space, seed)
        expected = oracle(name, calibration, logits, groups)
        assert FILTERS[name](calibration)(logits, groups).tolist() == expected.tolist()


@every_axes
@pytest.mark.parametrize("kind", ["random", "saturated", "broken"])
@given(st.integers(0, 2**20))
def test_soft_labels_are_what_plain_python_makes_of_a_pixel(
    axes: tuple[str, ...], kind: str, seed: int
) -> None:
    space = SPACES[seed % len(SPACES)] or (7,)
    calibration = drawn(axes, space, 5, seed)
    logits, groups = batch_of(kind, axes, space, seed)
    found, scores = SoftLabels(calibration)(logits, groups), calibration.score(logits)
    assert found.shape == logits.shape
    for at in pixels(3, space):
        pixel: Any = (at[0], slice(None), *at[1:])
        group = None if groups is None else int(groups.expand(3, *space)[at])
        limits, x = limits_at(calibration, group, at[1:]), logits[pixel].tolist()
        inside = [c for c in range(5) if scores[pixel][c] <= limits[c] < INF]
        if chosen("argmax", x, scores[pixel].tolist(), limits) is None:
            inside = []
        best = max((x[c] for c in inside), default=0.0)
        weight = [math.exp(x[c] - best) if c in inside and best > -INF else 0.0 for c in range(5)]
        shares = [w / (sum(weight) or 1) for w in weight]
        assert found[pixel].tolist() == pytest.approx(shares, abs=1e-6)
        assert found[pixel].nonzero().flatten().tolist() == (inside if best > -INF else [])


def test_a_member_of_the_set_has_a_probability_however_small() -> None:
    calibration = calibrated([0.5, 1.0, 1.0], ("class",))
    object.__setattr__(calibration, "thresholds", torch.tensor([1.0, 1.0, -1.0]))
    found = SoftLabels(calibration)(torch.tensor([[120.0, 0.0, 0.0]]))[0]
    assert 0 < found[1] < 1e-20
    assert found[2] == 0


def test_soft_labels_of_a_far_away_set_still_add_up() -> None:
    calibration = calibrated([0.5, 1.0, 1.0], ("class",))
    object.__setattr__(calibration, "thresholds", torch.tensor([-1.0, 1.0, 1.0]))
    found = SoftLabels(calibration)(torch.tensor([[400.0, 0.0, 0.0]]))
    assert found.tolist() == [[0.0, 0.5, 0.5]]


def test_the_oracle_test_sees_every_reason_and_several_labels() -> None:
    seen, labels = set[int](), set[int]()
    for axes in AXES:
        for kind in ("random", "broken"):
            logits, groups = batch_of(kind, axes, (6, 4), 1)
            for make in FILTERS.values():
                decision = make(drawn(axes, (6, 4), 5, 1)).decide(logits, groups)
                seen |= set(decision.reasons.flatten().tolist())
                labels |= set(decision.labels.flatten().tolist())
    assert seen == {int(reason) for reason in Reason} - {int(Reason.GUARDED)}
    assert labels == {0, 1, 2, 3, 4, 255}


SCORES: dict[str, Score] = {
    "LAC": LAC(),
    "APS": APS(),
    "APS randomized": APS(randomized=True, seed=3),
    "RAPS": RAPS(penalty=0.1, k_reg=1),
    "SAPS randomized": SAPS(randomized=True),
    "Margin": Margin(),
    "TopK": TopK(),
}


def limits(calibration: Calibration, groups: Tensor | None) -> Tensor:
    """The one threshold of each pixel, which broadcasts to ``(B, C, *S)``."""
    thresholds = calibration.thresholds
    if calibration.axes == ("location",):
        return thresholds
    if groups is None:
        return thresholds.view(())
    known = (groups >= 0) & (groups < len(thresholds))
    per_pixel = torch.where(known, thresholds[groups.long() * known], torch.inf)
    return per_pixel[:, None] if groups.ndim == 3 else per_pixel


@every_filter
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("axes", [(), ("group",), ("location",)], ids=["split", "group", "place"])
@pytest.mark.parametrize("kind", ["random", "saturated", "broken"])
def test_trying_classes_in_turn_gives_what_the_sets_give(
    name: str, score: str, axes: tuple[str, ...], kind: str
) -> None:
    space, used = (6, 4), SCORES[score]
    logits, groups = batch_of(kind, axes, space, 2)
    low, high = used.range(5) or (0.0, 1.0)
    thresholds = low + (high - low) * drawn(axes, space, 5, 7).thresholds * 0.7
    quick = FILTERS[name](calibrated(thresholds, axes, score=used, num_classes=5))
    slow = FILTERS[name](calibrated(thresholds, axes, score=Unordered(used), num_classes=5))
    one, other = quick.decide(logits, groups), slow.decide(logits, groups)
    distance = (used(logits) - limits(quick.calibration, groups)).abs()
    assert float(distance.nan_to_num(nan=1.0).min()) > used.tolerance(5)  # no tie: all equal
    assert one.labels.tolist() == other.labels.tolist()
    assert one.reasons.tolist() == other.reasons.tolist()


@given(
    st.lists(st.lists(st.integers(-9, 9), min_size=4, max_size=4), min_size=1, max_size=6),
    st.floats(0, 1),
    st.sampled_from(sorted(FILTERS)),
)
def test_a_kept_label_is_in_the_set_and_quick_and_slow_paths_agree(
    rows: list[list[int]], threshold: float, name: str
) -> None:
    logits = torch.tensor(rows, dtype=torch.float64)
    labels = FILTERS[name](calibrated([threshold], num_classes=4))(logits)
    slow = FILTERS[name](calibrated([threshold], num_classes=4, score=Unordered(LAC())))(logits)
    scores, tolerance = LAC()(logits), LAC().tolerance(4)
    near = ((scores - threshold).abs() <= tolerance + 1e-7).any(1)
    assert labels[~near].tolist() == slow[~near].tolist()
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        assert label == 255 or row[label] <= threshold + tolerance + 1e-7


@pytest.mark.parametrize("follows", [True, False])
def test_background_alone_gives_background_and_an_empty_set_abstains(*, follows: bool) -> None:
    score = LAC() if follows else Unordered(LAC())
    decision = BackgroundPriority(calibrated([0.4], score=score)).decide(
        torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    )
    assert decision.labels.tolist() == [0, 255, 2]
    assert decision.reasons.tolist() == [Reason.KEPT, Reason.EMPTY, Reason.KEPT]


@every_filter
def test_equal_logits_go_to_the_first_class(name: str) -> None:
    labels = FILTERS[name](calibrated([0.7], num_classes=4))(torch.tensor([[-9.0, 2, -9, 2]]))
    assert labels.tolist() == [255 if name == "singleton" else 1]


@every_filter
def test_a_member_with_logit_minus_infinity_can_be_kept(name: str) -> None:
    # Class 0 is most likely and not in its set; class 1 has probability 0 and is.
    calibration = calibrated([0.0, 1.0, 0.5], ("class",))
    labels = FILTERS[name](calibration)(torch.tensor([[0.5, -INF, 0.0]]))
    assert labels.tolist() == [1]


def test_at_most_one_is_singleton() -> None:
    for axes in AXES:
        calibration = drawn(axes, (6, 4), 5, 3)
        for kind in ("random", "saturated", "broken"):
            logits, groups = batch_of(kind, axes, (6, 4), 5)
            one = AtMost(calibration, k=1).decide(logits, groups)
            other = Singleton(calibration).decide(logits, groups)
            assert one.labels.tolist() == other.labels.tolist()
            assert one.reasons.tolist() == other.reasons.tolist()


# --- abstention ----------------------------------------------------------------------------------


@every_filter
def test_classes_without_a_finite_threshold_are_never_proposed_nor_counted(name: str) -> None:
    calibration = calibrated([0.9, INF, 0.9, INF], ("class",), num_classes=4)
    logits = torch.tensor(
        [[9.0, 8.0, 0.0, 0.0], [0.0, 9.0, 8.0, 0.0], [0.0, 0.0, 5.0, 4.9], [0.0, 0.0, 0.0, 1.0]]
    )
    decision = FILTERS[name](calibration).decide(logits)
    assert decision.labels.tolist() == [0, 255, 2, 255]
    assert decision.counts() == {
        "kept": 2, "empty": 0, "starved": 2, "too_many": 0, "unusable": 0, "guarded": 0,
    }  # fmt: skip


@every_filter
@every_axes
def test_a_calibration_that_saw_nothing_abstains_everywhere(
    name: str, axes: tuple[str, ...]
) -> None:
    thresholds = torch.full_like(drawn(axes, (6, 4), 5, 0).thresholds, INF)
    calibration = calibrated(thresholds, axes, num_classes=5)
    logits, groups = batch_of("random", axes, (6, 4), 1)
    decision = FILTERS[name](calibration).decide(logits, groups)
    assert set(decision.labels.flatten().tolist()) == {255}
    assert decision.counts()["starved"] == decision.labels.numel()


@every_filter
@pytest.mark.parametrize("axes", [("group",), ("group", "class")], ids=["group", "both"])
def test_an_unknown_group_abstains(name: str, axes: tuple[str, ...]) -> None:
    calibration = drawn(axes, (), 5, 0, starved=0.0)
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0, 0.0]] * 5)
    groups = torch.tensor([-1, 0, 2, 3, 255])
    decision = FILTERS[name](calibration).decide(logits, groups)
    assert decision.labels.tolist() == [255, 0, 0, 255, 255]
    assert decision.reasons.tolist() == [2, 0, 0, 2, 2]


@every_filter
@every_axes
def test_unusable_logits_abstain(name: str, axes: tuple[str, ...]) -> None:
    space = (3,) if axes == ("location",) else ()
    row = [[math.nan, 0, 9, 0, 0], [9, 0, 0, 0, math.nan], [INF, 0, 0, 0, 0], [-INF] * 5]
    logits = torch.tensor(row).view(4, 5, *(1 for _ in space)).expand(4, 5, *space)
    groups = torch.zeros(4, dtype=torch.int64) if "group" in axes else None
    decision = FILTERS[name](drawn(axes, space, 5, 1)).decide(logits, groups)
    assert set(decision.labels.flatten().tolist()) == {255}
    assert set(decision.reasons.flatten().tolist()) == {int(Reason.UNUSABLE)}


def test_counts_add_up_and_know_every_reason() -> None:
    reasons = torch.tensor([[0, 0, 5], [1, 3, 4]], dtype=torch.uint8)
    counts = Decision(torch.zeros(2, 3), reasons).counts()
    assert counts == {
        "kept": 2, "empty": 1, "starved": 0, "too_many": 1, "unusable": 1, "guarded": 1,
    }  # fmt: skip


# --- types, shapes, memory -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "ignore_index", "dtype"),
    [
        (3, 255, torch.uint8),
        (3, 7, torch.uint8),
        (3, -100, torch.int64),
        (255, 255, torch.uint8),
        (256, 256, torch.int64),
        (300, -1, torch.int64),
        (3, 256, torch.int64),
    ],
)
@every_filter
def test_labels_are_uint8_where_classes_and_ignore_index_fit(
    name: str, classes: int, ignore_index: int, dtype: torch.dtype
) -> None:
    calibration = calibrated([0.3], num_classes=classes, ignore_index=ignore_index)
    logits = torch.zeros(2, classes)
    logits[0, -1] = 99.0
    labels = FILTERS[name](calibration)(logits)
    assert labels.dtype == dtype
    assert labels.tolist() == [classes - 1, ignore_index]


@every_filter
@every_axes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_strides_and_device_give_the_same_labels(
    name: str, axes: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> None:
    calibration = drawn(axes, (6, 4), 5, 3)
    logits, groups = batch_of("random", axes, (6, 4), 4)
    logits = logits.to(dtype)
    expected = FILTERS[name](calibration)(logits.contiguous(), groups)
    odd = logits.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    wide = torch.zeros(3, 10, 6, 8, dtype=dtype)[:, ::2, :, 1::2].copy_(logits)
    moved = None if groups is None else groups.to(device)
    for view in (odd, wide, logits.clone().requires_grad_()):
        labels = FILTERS[name](calibration)(view.to(device), moved)
        assert labels.device.type == device.type
        assert not labels.requires_grad
        assert labels.tolist() == expected.tolist()


@every_filter
@every_axes
def test_an_empty_batch_gives_an_empty_result(name: str, axes: tuple[str, ...]) -> None:
    calibration = drawn(axes, (6, 4), 5, 3)
    groups = torch.zeros((6, 4), dtype=torch.int64) if "group" in axes else None
    decision = FILTERS[name](calibration).decide(torch.zeros(0, 5, 6, 4), groups)
    assert decision.labels.shape == decision.reasons.shape == (0, 6, 4)
    assert decision.labels.dtype == torch.uint8
    assert not any(decision.counts().values())


@every_filter
def test_an_empty_grid_gives_an_empty_result(name: str) -> None:
    guarded = FILTERS[name](calibrated([0.5], max_share=[0.0] * 3))
    assert guarded(torch.zeros(2, 3, 0, 4)).shape == (2, 0, 4)


@every_filter
def test_one_class_is_no_special_case(name: str) -> None:
    if name == "background 2":
        pytest.skip("there is no class 2")
    labels = FILTERS[name](calibrated([0.1], num_classes=1))(torch.tensor([[4.0], [math.nan]]))
    assert labels.tolist() == [0, 255]


@every_filter
@every_axes
def test_nothing_of_the_callers_is_changed(name: str, axes: tuple[str, ...]) -> None:
    calibration = drawn(axes, (6, 4), 5, 3)
    logits, groups = batch_of("broken", axes, (6, 4), 4)
    before = copy.deepcopy((logits, groups, calibration.thresholds))
    state = torch.random.get_rng_state()
    FILTERS[name](calibration)(logits, groups)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(before[0].nan_to_num(), logits.nan_to_num())
    assert torch.equal(before[2], calibration.thresholds)
    assert before[1] is None or (groups is not None and torch.equal(before[1], groups))


@every_filter
@every_axes
@pytest.mark.parametrize("most", [1, 5 * 64, 5 * 24 * 2])
def test_the_cut_of_a_batch_into_parts_does_not_show(
    name: str, axes: tuple[str, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = drawn(axes, (6, 4), 5, 3)
    cases = [batch_of("random", axes, (6, 4), seed) for seed in (1, 2)]
    whole = [FILTERS[name](calibration).decide(*case) for case in cases]
    monkeypatch.setattr(cpseg._tiles, "_EAGER", {"cpu": most})
    monkeypatch.setattr(cpseg.scores, "_PART_ELEMENTS", {"cpu": most})
    for case, expected in zip(cases, whole, strict=True):
        decision = FILTERS[name](calibration).decide(*case)
        assert decision.labels.tolist() == expected.labels.tolist()
        assert decision.reasons.tolist() == expected.reasons.tolist()


class Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest tensor that any operation made, in elements, views left out."""

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {t.untyped_storage().data_ptr() for t in known if t is not None}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in self.known:
                elements = made.untyped_storage().nbytes() // made.element_size()
                self.largest = max(self.largest, elements)
        return result


@every_filter
@every_axes
def test_nothing_as_large_as_the_batchs_logits_is_ever_made(
    name: str, axes: tuple[str, ...]
) -> None:
    space, batch = (220, 200), 9
    calibration = drawn(axes, space, 5, 0)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((3, 5, *space), generator=generator).repeat(batch // 3, 1, 1, 1)
    groups = None
    if "group" in axes:
        groups = torch.randint(0, NUM_GROUPS, (batch, *space), generator=generator)
    with Allocated(logits, groups, calibration.thresholds) as allocated:
        FILTERS[name](calibration)(logits, groups)
    labels = batch * 220 * 200
    assert logits.numel() > 2 * labels
    assert allocated.largest <= max(labels, cpseg._tiles._EAGER["cpu"])


@every_filter
@pytest.mark.parametrize("axes", [(), ("group",), ("location",)], ids=["split", "group", "place"])
def test_one_threshold_for_all_classes_needs_no_scores_of_all_classes(
    name: str, axes: tuple[str, ...]
) -> None:
    logits, groups = batch_of("random", axes, (6, 4), 4)
    thresholds = drawn(axes, (6, 4), 5, 3).thresholds
    quick = calibrated(thresholds, axes, num_classes=5, score=NeverAllClasses())
    expected = FILTERS[name](drawn(axes, (6, 4), 5, 3))(logits, groups)
    assert FILTERS[name](quick)(logits, groups).tolist() == expected.tolist()


def test_many_rows_of_pixels_are_taken_together() -> None:
    calls = 0

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            del types
            nonlocal calls
            calls += 1
            return func(*args, **(kwargs or {}))

    with Counting():  # type: ignore[no-untyped-call]
        Argmax(calibrated([0.5]))(torch.zeros(5000, 3))
    assert calls < 200


# --- the area guard ------------------------------------------------------------------------------


@every_filter
@pytest.mark.parametrize("follows", [True, False])
def test_the_guard_warns_and_abstains_from_a_class_in_the_image_it_floods(
    name: str, *, follows: bool
) -> None:
    score = LAC() if follows else Unordered(LAC())
    calibration = calibrated([0.5], max_share=[1.0, 0.2, 1.0], score=score)
    logits = torch.zeros(3, 3, 10)
    logits[:, 0] = 9.0
    logits[1, 1, :4] = 19.0  # 0.4 = 2 * 0.2: as much as is plausible
    logits[2, 1, :5] = 19.0
    kind = FILTERS[name](calibration)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = kind(logits)
        assert _guarded(kind, AreaGuard(slack=0.0))(logits[:2]).tolist() == plain[:2].tolist()
    with pytest.warns(AreaWarning, match=r"classes \[1\] .* 2 times .* 1 of 3 images$") as record:
        warned = _guarded(kind, AreaGuard(slack=0.0))(logits)
    assert [warning.filename for warning in record] == [__file__]
    assert warned.tolist() == plain.tolist()
    with pytest.warns(AreaWarning, match="abstained$") as asked:
        decision = _guarded(kind, AreaGuard(slack=0.0, action="abstain")).decide(logits)
    assert [warning.filename for warning in asked] == [__file__]
    assert decision.labels[:2].tolist() == plain[:2].tolist()
    assert decision.labels[2].tolist() == [255] * 5 + [0] * 5
    assert decision.counts()["guarded"] == 5
    assert decision.reasons[2].tolist() == [int(Reason.GUARDED)] * 5 + [0] * 5


def _guarded(kind: FilterKind, guard: AreaGuard) -> FilterKind:
    match kind:
        case BackgroundPriority():
            return BackgroundPriority(kind.calibration, kind.background, guard)
        case AtMost():
            return AtMost(kind.calibration, kind.k, guard)
        case Argmax():
            return Argmax(kind.calibration, guard)
        case Singleton():
            return Singleton(kind.calibration, guard)


def test_flooding_compares_shares_of_each_image() -> None:
    labels = torch.tensor([[0, 0, 1, 255], [1, 1, 1, 255], [255, 255, 255, 255]])
    guard = AreaGuard(factor=1.0, slack=0.25)
    flooding = guard.flooding(labels, torch.tensor([0.25, 0.25], dtype=torch.float64))
    assert flooding.tolist() == [[False, False], [False, True], [False, False]]


@pytest.mark.parametrize("ignore_index", [-100, 3, 255])
def test_the_guard_does_not_take_abstention_for_a_class(ignore_index: int) -> None:
    calibration = calibrated([0.1], max_share=[0.0] * 3, ignore_index=ignore_index)
    guard = AreaGuard(action="abstain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = Argmax(calibration, guard=guard)(torch.zeros(2, 3, 4))
    assert labels.tolist() == [[ignore_index] * 4] * 2


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BackgroundPriority(calibrated([0.5]), background=3),
            "background must be a class, below 3; got 3",
        ),
        (
            lambda: BackgroundPriority(calibrated([0.5]), background=-1),
            "background must be an integer >= 0; got -1",
        ),
        (
            lambda: BackgroundPriority(calibrated([0.5], num_classes=None), background=3)(
                torch.zeros(1, 3)
            ),
            "background must be a class, below 3; got 3",
        ),
        (
            lambda: Argmax(calibrated([0.5]), guard="abstain"),  # type: ignore[arg-type]
            "guard must be an AreaGuard or None; got 'abstain'",
        ),
        (lambda: AtMost(calibrated([0.5]), k=0), "k must be an integer >= 1; got 0"),
        (lambda: AtMost(calibrated([0.5]), k=True), "k must be an integer >= 1; got True"),
        (lambda: AreaGuard(factor=-1.0), "factor must be finite and >= 0; got -1.0"),
        (lambda: AreaGuard(slack=INF), "slack must be finite and >= 0; got inf"),
        (
            lambda: AreaGuard(action="stop"),  # type: ignore[arg-type]
            'action must be "warn" or "abstain"; got \'stop\'',
        ),
    ],
)
def test_a_filter_that_cannot_work_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        make()
    assert str(refusal.value) == message


FORGOTTEN = [
    (SplitCalibrator(), "SplitCalibrator. Call its compute(alpha) first"),
    (None, "NoneType"),
    (Calibration, "the class Calibration"),
]


@pytest.mark.parametrize("kind", [Argmax, Top, BackgroundPriority, Singleton, AtMost])
@pytest.mark.parametrize(("given", "told"), FORGOTTEN)
def test_a_filter_names_the_step_that_was_forgotten(kind: Any, given: object, told: str) -> None:
    with pytest.raises(InputError) as refusal:
        kind(given, *([2] if kind is AtMost else []))
    assert str(refusal.value) == f"calibration must be a Calibration; got {told}"


def test_integers_of_numpy_become_pythons() -> None:
    two: Any = np.int64(2)
    assert type(BackgroundPriority(calibrated([0.5]), two).background) is int
    assert type(AtMost(calibrated([0.5]), two).k) is int


@every_filter
@pytest.mark.parametrize(
    ("axes", "logits", "groups", "message"),
    [
        (
            (),
            torch.zeros(2, 4, 6),
            None,
            "logits must have C = 5 classes; got 4 in shape (2, 4, 6)",
        ),
        ((), torch.zeros(5), None, "logits must have shape (B, C, *S); got (5,)"),
        (
            (),
            torch.zeros(2, 5, dtype=torch.int64),
            None,
            "logits must be float16, bfloat16, float32 or float64; got torch.int64",
        ),
        (
            (),
            torch.zeros(2, 5),
            torch.zeros(2, dtype=torch.int64),
            "groups must be None for a calibration with axes ()",
        ),
        (
            ("group",),
            torch.zeros(2, 5),
            None,
            "groups must be given for a calibration with axes ('group',)",
        ),
        (
            ("group", "class"),
            torch.zeros(2, 5, 6),
            torch.zeros(5, dtype=torch.int64),
            "groups must have shape (6,) or (2, 6) to go with logits (2, 5, 6); got (5,)",
        ),
        (
            ("group",),
            torch.zeros(2, 5, 6),
            torch.zeros(6),
            "groups must be an integer tensor; got torch.float32",
        ),
        (
            ("location",),
            torch.zeros(2, 5, 4, 6),
            None,
            "logits must have spatial shape (6, 4), the calibration's locations; got (4, 6)",
        ),
        (
            (),
            torch.zeros(2, 5, 6, device="meta"),
            None,
            "logits must hold data; got a tensor on the device meta, which has none",
        ),
        (
            (),
            torch.zeros(2, 5, 6).to_sparse(),
            None,
            "logits must be a dense tensor; got layout torch.sparse_coo",
        ),
    ],
)
def test_input_that_does_not_fit_is_refused_in_one_line(
    name: str, axes: tuple[str, ...], logits: Tensor, groups: Tensor | None, message: str
) -> None:
    with pytest.raises(InputError) as refusal:
        FILTERS[name](drawn(axes, (6, 4), 5, 0))(logits, groups)
    assert str(refusal.value) == message


@every_filter
def test_a_filter_travels_to_another_process_and_prints_in_one_line(name: str) -> None:
    kind = FILTERS[name](drawn(("class",), (), 5, 0))
    logits, _ = batch_of("random", (), (6, 4), 4)
    assert pickle.loads(pickle.dumps(kind))(logits).tolist() == kind(logits).tolist()  # noqa: S301
    assert "\n" not in repr(kind)
    assert len(repr(kind)) < 300


# --- mask operations on sets ---------------------------------------------------------------------


def test_each_class_is_the_operation_on_every_mask_alone() -> None:
    sets = torch.rand(2, 3, 7, 5, generator=torch.Generator().manual_seed(0)) < 0.3
    before = sets.clone()
    grown = each_class(partial(dilate, radius=1), sets)
    for entry in range(2):
        for label in range(3):
            alone = dilate(sets[entry, label][None], radius=1)[0]
            assert torch.equal(grown[entry, label], alone)
    assert torch.equal(sets, before)


def test_each_class_refuses_what_are_no_sets() -> None:
    with pytest.raises(InputError, match=r"sets must be bool with shape \(B, C, \*S\)"):
        each_class(partial(dilate, radius=1), torch.zeros(2, 3, 4))
    with pytest.raises(InputError, match="a spatial axis"):
        each_class(partial(dilate, radius=1), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(InputError, match=r"^sets must be a torch tensor; got list$"):
        each_class(partial(dilate, radius=1), [[True]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("operation", "told"),
    [
        (lambda masks: masks[:, :3], r"torch\.bool \(6, 3\)"),
        (lambda masks: masks.float(), r"torch\.float32 \(6, 4\)"),
    ],
)
def test_each_class_refuses_what_makes_no_masks(
    operation: Callable[[Tensor], Tensor], told: str
) -> None:
    with pytest.raises(
        InputError, match=rf"^operation must return bool masks \(6, 4\); got {told}$"
    ):
        each_class(operation, torch.zeros(2, 3, 4, dtype=torch.bool))


def test_a_guard_takes_an_empty_batch() -> None:
    guarded = Argmax(calibrated([0.5], max_share=[0.0] * 3), guard=AreaGuard(action="abstain"))
    assert guarded(torch.zeros(0, 3, 4, 5)).shape == (0, 4, 5)
