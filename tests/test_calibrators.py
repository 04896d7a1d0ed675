"""One contract over calibrators, stores and units; oracles by sorting and by fractions."""

import io
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as law
from hypothesis import strategies as st
from torch import Tensor

from cpseg import (
    APS,
    LAC,
    ClassConditionalCalibrator,
    GroupCalibrator,
    LocationCalibrator,
    PixelSetPredictor,
    SplitCalibrator,
    TopK,
    gather,
    merge_all,
)
from cpseg.accumulate import Evidence, Exact, Histogram
from cpseg.calibrators import LocationClusters, Origin
from cpseg.errors import InputError, StateError
from cpseg.quantile import MAX_UNITS, UNIT_MASS
from cpseg.tuning import (
    GroupClusters,
    InterpolatedQuantile,
    _curves,
    annuli,
    cluster_locations,
)

C, H, W, G = 3, 4, 5, 2  # all different
GRID = torch.arange(H * W).view(H, W) % 7 % G
OTHER_DATA = Origin("other", "LAC()", "image", ("class",))
CLUSTERS = LocationClusters(torch.arange(H * W).view(H, W) % 4)

KINDS: dict[str, Callable[..., Any]] = {
    "split": SplitCalibrator,
    "class": lambda **rest: ClassConditionalCalibrator(C, **rest),
    "group": lambda **rest: GroupCalibrator(G, **rest),
    "group x class": lambda **rest: GroupCalibrator(G, C, **rest),
    "location": lambda **rest: LocationCalibrator((H, W), max_alpha=0.4, max_units=40, **rest),
    "clusters": lambda **rest: LocationCalibrator((H, W), CLUSTERS, **rest),
}
ALL = [
    pytest.param(kind, {"store": store, "unit": unit}, id=f"{kind}-{store}-{unit}")
    for kind in KINDS
    for store in ("exact", "histogram")
    for unit in ("image", "pixel")
]
IMAGE = [case for case in ALL if case.values[1]["unit"] == "image"]  # type: ignore[index]
contract = pytest.mark.parametrize(("kind", "how"), ALL)
by_image = pytest.mark.parametrize(("kind", "how"), IMAGE)


def data(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, C, H, W, generator=generator) * 2
    labels = torch.randint(0, C, (batch, H, W), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    return logits, labels


def see(
    calibrator: Any, logits: Tensor, labels: Tensor, ids: Any = None, groups: Any = None
) -> Any:
    if isinstance(calibrator, GroupCalibrator):
        return calibrator.update(logits, labels, GRID if groups is None else groups, ids)
    return calibrator.update(logits, labels, ids)


def same(one: Any, two: Any) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], Tensor) else a[name] == b[name]
        for name in a
    )


def rows_of(kind: str, labels: Tensor) -> Tensor:
    grid = torch.arange(H * W).view(H, W)
    row = {
        "split": torch.zeros_like(labels),
        "class": labels,
        "group": GRID.expand_as(labels),
        "group x class": GRID * C + labels,
        "location": grid.expand_as(labels),
        "clusters": (grid % 4).expand_as(labels),
    }[kind]
    return torch.where(labels == 255, -1, row)


# --- an accumulator ------------------------------------------------------------------------------


@contract
@given(st.data())
@law(max_examples=6)
def test_any_cut_order_and_merge_give_the_identical_state(
    kind: str, how: dict[str, Any], draw: st.DataObject
) -> None:
    logits, labels = data(9)
    whole = see(KINDS[kind](**how), logits, labels)
    order = draw.draw(st.permutations(range(9)))
    ends = sorted(draw.draw(st.lists(st.integers(0, 9), max_size=4)))
    parts = [KINDS[kind](**how), KINDS[kind](**how)]
    for start, stop in zip([0, *ends], [*ends, 9], strict=True):
        chosen = order[start:stop]
        see(parts[draw.draw(st.integers(0, 1))], logits[chosen], labels[chosen])
    if draw.draw(st.booleans()):
        parts.reverse()
    before = merge_all([parts[1]])
    merged = parts[0].merge(parts[1])
    assert merged is parts[0]
    assert same(merged, whole)
    assert same(parts[1], before)
    assert same(merge_all([parts[1], KINDS[kind](**how)]), parts[1])


@pytest.mark.parametrize("kind", ["split", "class"])
@pytest.mark.parametrize("unit", ["image", "pixel"])
def test_the_order_of_pixels_does_not_matter(kind: str, unit: str) -> None:
    logits, labels = data(5)
    order = torch.randperm(H * W, generator=torch.Generator().manual_seed(3))
    shuffled = (
        logits.flatten(2)[..., order].view_as(logits),
        labels.flatten(1)[:, order].view_as(labels),
    )
    assert same(see(KINDS[kind](unit=unit), logits, labels), see(KINDS[kind](unit=unit), *shuffled))


@contract
def test_fresh_is_the_identity_and_reset_gives_it(kind: str, how: dict[str, Any]) -> None:
    logits, labels = data(5)
    used = see(KINDS[kind](**how), logits, labels)
    copy = merge_all([used])
    assert same(used.merge(KINDS[kind](**how)), copy)
    assert same(KINDS[kind](**how).merge(used), copy)
    assert same(used.reset(), KINDS[kind](**how))
    assert not same(used, copy)
    assert same(see(used, logits, labels), copy)


@contract
def test_state_survives_a_weights_only_file(kind: str, how: dict[str, Any]) -> None:
    logits, labels = data(5)
    ids = [3, 1, 3, 7, 1] if how["unit"] == "image" else None
    for calibrator in (KINDS[kind](**how), see(KINDS[kind](**how), logits, labels, ids)):
        if ids is not None and calibrator.num_classes and calibrator._open:
            calibrator.close_units([7])
        file = io.BytesIO()
        torch.save(calibrator.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        again = type(calibrator).from_state_dict(state)
        assert same(again, calibrator)
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
        assert same(again, calibrator)  # it owns what it holds
        assert torch.equal(again.compute(0.3).thresholds, calibrator.compute(0.3).thresholds)


@contract
def test_compute_changes_nothing_and_answers_every_alpha(kind: str, how: dict[str, Any]) -> None:
    logits, labels = data(30)
    calibrator = see(KINDS[kind](**how), logits, labels)
    if how["unit"] == "image":
        see(calibrator, *data(2, seed=9), [5, 6])  # left open
    before = merge_all([calibrator])
    alphas = [0.4, 0.05, 0.2, 0.1, 0.3]
    found = {alpha: calibrator.compute(alpha) for alpha in alphas}
    calibrator.compute(0.2, fallback="pooled")
    assert same(calibrator, before)
    fresh = merge_all([calibrator])
    for alpha in alphas:
        assert torch.equal(fresh.compute(alpha).thresholds, found[alpha].thresholds)
    for small, large in pairwise(sorted(alphas)):
        assert (found[small].thresholds >= found[large].thresholds).all()
    new, _ = data(4, seed=5)
    groups = GRID if "group" in kind else None
    sets = [PixelSetPredictor(found[alpha])(new, groups) for alpha in sorted(alphas)]
    for larger, smaller in pairwise(sets):
        assert (larger | ~smaller).all()


@contract
def test_nothing_to_see_adds_nothing(kind: str, how: dict[str, Any]) -> None:
    logits, labels = data(5)
    calibrator = see(KINDS[kind](**how), logits, labels)
    before = merge_all([calibrator]).compute(0.3)
    see(calibrator, logits[:0], labels[:0])
    see(calibrator, logits, torch.full_like(labels, 255))
    after = calibrator.compute(0.3)
    for name in ("thresholds", "num_units", "num_pixels", "max_share"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert KINDS[kind](**how).compute(0.3).thresholds.isinf().all()
    void = see(KINDS[kind](**how), logits, torch.full_like(labels, 255)).compute(0.3)
    assert void.thresholds.isinf().all()
    assert int(void.num_units.sum()) == int(void.num_pixels.sum()) == 0


@contract
def test_callers_tensors_and_global_chance_are_left_alone(kind: str, how: dict[str, Any]) -> None:
    logits, labels = data(4)
    groups = GRID.clone()
    kept = logits.clone(), labels.clone(), torch.get_rng_state()
    calibrator = KINDS[kind](score=APS(randomized=True), **how)
    calibration = see(calibrator, logits, labels, groups=groups).compute(0.4)
    PixelSetPredictor(calibration)(logits, groups if "group" in kind else None)
    calibration.thresholds.zero_()
    assert calibrator.compute(0.4).thresholds.any()
    assert torch.equal(logits, kept[0])
    assert torch.equal(labels, kept[1])
    assert torch.equal(torch.get_rng_state(), kept[2])
    assert torch.equal(groups, GRID)


def test_alpha_per_class_is_each_class_at_its_own() -> None:
    logits, labels = data(60)
    alphas = [0.1, 0.25, 0.4]
    for kind in ("class", "group x class"):
        calibrator = see(KINDS[kind](), logits, labels)
        mixed = calibrator.compute(alphas)
        assert mixed.alpha == tuple(alphas)
        for index, alpha in enumerate(alphas):
            single = calibrator.compute(alpha).thresholds
            assert torch.equal(mixed.thresholds[..., index], single[..., index])


# --- the definition ------------------------------------------------------------------------------


def split_threshold(scores: list[float], alpha: float) -> float:
    rank = math.ceil((len(scores) + 1) * (1 - Fraction(str(alpha))))
    return [*sorted(scores), math.inf][min(rank, len(scores) + 1) - 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3, 0.4])
def test_pixel_unit_is_plain_split_conformal(kind: str, alpha: float) -> None:
    logits, labels = data(17)
    score = LAC()
    scores = score.of_labels(logits, labels.where(labels != 255, 0))
    rows = rows_of(kind, labels)
    calibrator = see(KINDS[kind](score=score, unit="pixel", store="exact"), logits, labels)
    own, _ = calibrator.evidence()
    found = own.quantiles([alpha] * own.store.rows).tolist()
    wanted = [split_threshold(scores[rows == row].tolist(), alpha) for row in range(len(found))]
    assert found == wanted
    assert own.num_units.tolist() == [int((rows == row).sum()) for row in range(len(found))]


def risk_control(
    images: Sequence[list[float]], alpha: float, less: Fraction = Fraction(0)
) -> float:
    """Smallest candidate with ``(sum of losses + 1) / (n + 1) <= alpha``; ``less`` is held back."""
    images = [scores for scores in images if scores]
    most = Fraction(str(alpha)) * (len(images) + 1) - 1 - less
    for candidate in sorted({score for scores in images for score in scores}):
        losses = [Fraction(sum(s > candidate for s in scores), len(scores)) for scores in images]
        if sum(losses) <= most:
            return candidate
    return math.inf


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "alpha"), [(9, 0.1), (8, 0.1), (19, 0.05), (23, 0.1), (12, 0.4)])
@pytest.mark.parametrize("ties", [False, True])
def test_image_unit_is_conformal_risk_control(
    kind: str, n: int, alpha: float, *, ties: bool
) -> None:
    logits, labels = data(n, seed=n)
    logits = logits.round() if ties else logits
    scores = LAC().of_labels(logits, labels.where(labels != 255, 0))
    rows = rows_of(kind, labels)
    calibrator = see(KINDS[kind](store="exact"), logits, labels)
    own, _ = calibrator.evidence()
    for row, found in enumerate(own.quantiles([alpha] * own.store.rows).tolist()):
        images = [s[r == row].tolist() for s, r in zip(scores, rows, strict=True)]
        assert found >= risk_control(images, alpha)
        most = risk_control(images, alpha, Fraction(n * H * W, UNIT_MASS))  # all that is rounded
        assert found <= most
        assert int(own.num_units[row]) == sum(map(bool, images))
    if kind == "split":  # the trap: masses rounded down make these infinite
        assert math.isfinite(found) == (n != 8)


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_equal_counts_that_are_powers_of_two_are_exact(alpha: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(19, C, 8, generator=generator)
    labels = torch.randint(0, C, (19, 8), generator=generator)
    scores = LAC().of_labels(logits, labels)
    own, _ = SplitCalibrator(store="exact").update(logits, labels).evidence()
    assert own.quantiles([alpha]).item() == risk_control(scores.tolist(), alpha)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("classes", [120, 200, 300])
def test_labels_of_any_integer_dtype_find_their_class(dtype: torch.dtype, classes: int) -> None:
    labels = torch.tensor([[5, 100]], dtype=dtype)
    logits = torch.randn(1, classes, 2, generator=torch.Generator().manual_seed(0))
    per_class = ClassConditionalCalibrator(classes, store="exact", ignore_index=-1)
    per_group = GroupCalibrator(1, classes, store="exact", ignore_index=-1)
    per_class.update(logits, labels)
    per_group.update(logits, labels, torch.zeros(2, dtype=dtype))
    for counts in (per_class.compute(0.5).num_units, per_group.compute(0.5).num_units[0]):
        assert counts.nonzero()[:, 0].tolist() == [5, 100]


@pytest.mark.parametrize("unit", ["image", "pixel"])
@pytest.mark.parametrize("max_alpha", [0.05, 0.1, 0.25])
def test_location_forgets_only_what_no_level_can_reach(unit: str, max_alpha: float) -> None:
    logits, labels = data(40)
    every: Any = LocationCalibrator((H, W), max_alpha=0.99, max_units=10**6, unit=unit)  # type: ignore[arg-type]
    made: Callable[[], Any] = lambda: LocationCalibrator(  # noqa: E731
        (H, W),
        max_alpha=max_alpha,
        max_units=40,
        unit=unit,  # type: ignore[arg-type]
    )
    every.update(logits, labels)
    whole, parts = made().update(logits, labels), [made(), made()]
    for i in range(40):
        parts[i % 3 % 2].update(logits[i : i + 1], labels[i : i + 1]).evidence()
    assert same(parts[0].merge(parts[1]), whole)
    for alpha in (max_alpha, max_alpha / 2, 0.03):
        assert torch.equal(every.compute(alpha).thresholds, whole.compute(alpha).thresholds)
    kept = whole.state_dict()["own.keys"]
    assert len(kept) <= H * W * math.floor(max_alpha * 41 + 1e-9)


@pytest.mark.parametrize("unit", ["image", "pixel"])
@pytest.mark.parametrize(
    ("max_alpha", "max_units"), [(0.2, 40), (0.3, 29), (0.05, 39), (0.05, 18), (0.1, 1000)]
)
def test_the_tail_kept_obeys_the_formula_in_bytes(
    unit: Any, max_alpha: float, max_units: int
) -> None:
    calibrator = LocationCalibrator((H, W), max_alpha=max_alpha, max_units=max_units, unit=unit)
    images = min(max_units, 60)
    logits = torch.randn(images, C, H, W, generator=torch.Generator().manual_seed(0))
    calibrator.update(logits, torch.zeros(images, H, W).long())  # no two scores are equal
    state = calibrator.state_dict()
    size = sum(
        entry.numel() * entry.element_size()
        for name in ("own.keys", "own.mass")
        if isinstance(entry := state[name], Tensor)
    )
    k = math.floor(Fraction(str(max_alpha)) * (max_units + 1))
    assert size == 16 * H * W * min(k, images)


def test_clusters_are_found_from_the_tail_as_from_everything() -> None:
    # As many images as the tail was sized for: one score more would be asked for by alpha * n.
    batch = (
        data(30, seed=3)[0],
        torch.randint(0, C, (30, H, W), generator=torch.Generator().manual_seed(4)),
    )
    tail = LocationCalibrator((H, W), max_alpha=0.2, max_units=30).update(*batch)
    whole = LocationCalibrator((H, W), max_alpha=0.99, max_units=30).update(*batch)
    levels: list[Fraction | float] = [Fraction(4, 5), 0.85, 0.9, 0.95]
    curves = [_curves(each.evidence()[0], levels) for each in (tail, whole)]
    assert torch.equal(*curves)
    for column, value in enumerate(levels[:-1]):
        alpha = float(1 - Fraction(str(value)))
        assert torch.equal(curves[0][:, column], whole.evidence()[0].quantiles([alpha] * H * W))
    highest = LAC().of_labels(*batch).amax(0).flatten()
    single = _curves(
        LocationCalibrator((H, W)).update(*(x[:1] for x in batch)).evidence()[0], [0.9]
    )
    assert torch.equal(single[:, 0], LAC().of_labels(*(x[:1] for x in batch)).flatten())
    assert (curves[0] <= highest[:, None]).all()
    assert torch.equal(cluster_locations(tail, 3).map, cluster_locations(whole, 3).map)


# --- units in several tiles ----------------------------------------------------------------------


@by_image
@given(st.data())
@law(max_examples=6)
def test_tiles_of_a_unit_equal_the_whole(
    kind: str, how: dict[str, Any], draw: st.DataObject
) -> None:
    # Tiles keep the grid and hide the rest, so that every calibrator can see them.
    logits, labels = data(5)
    whole = see(KINDS[kind](**how), logits, labels).compute(0.4)
    cut = torch.randint(0, 3, (H, W), generator=torch.Generator().manual_seed(2))
    tiles = [(unit, piece) for unit in range(5) for piece in range(3)]
    tiles = draw.draw(st.permutations(tiles))
    tiled = [KINDS[kind](**how), KINDS[kind](**how)]
    early = draw.draw(st.booleans())
    left = dict.fromkeys(range(5), 3)
    while tiles:
        now, tiles = tiles[:4], tiles[4:]
        units = [unit for unit, _ in now]
        shown = torch.stack([labels[unit].where(cut == piece, 255) for unit, piece in now])
        see(
            tiled[0 if early else len(tiles) % 2], logits[units], shown, [u + 10**12 for u in units]
        )
        for unit in units:
            left[unit] -= 1
            if early and left[unit] == 0:
                tiled[0].close_units([unit + 10**12])
    before = merge_all([tiled[1]])
    found = tiled[0].merge(tiled[1]).compute(0.4)
    assert same(tiled[1], before)
    for name in ("thresholds", "num_units", "num_pixels"):
        assert torch.equal(getattr(found, name), getattr(whole, name))


def test_units_open_close_and_stay_closed() -> None:
    logits, labels = data(4)
    calibrator = SplitCalibrator(store="exact").update(logits, labels, torch.tensor([1, 2, 1, 3]))
    one = calibrator.compute(0.4)
    assert one.num_units.tolist() == [3]
    calibrator.close_units([1, 1])
    assert torch.equal(calibrator.compute(0.4).thresholds, one.thresholds)
    before = merge_all([calibrator])
    with pytest.raises(StateError, match=r"unit_ids must not hold closed units; got \[1\]"):
        calibrator.update(logits[:2], labels[:2], [9, 1])
    with pytest.raises(StateError, match=r"ids must be open units; got \[1\]"):
        calibrator.close_units([1])
    with pytest.raises(StateError, match=r"ids must be open units; got \[4\]"):
        calibrator.close_units([2, 4])
    assert same(calibrator, before)
    for other in ([1], [2]):
        late = SplitCalibrator(store="exact").update(logits[:1], labels[:1], other)
        if other == [2]:
            late.close_units([2])
        with pytest.raises(StateError, match="a closed unit must be known to one calibrator only"):
            calibrator.merge(late)
    assert same(calibrator, before)


def test_an_all_void_tile_opens_a_unit_and_counts_nothing() -> None:
    logits, labels = data(2)
    void = torch.full_like(labels, 255)
    calibrator = SplitCalibrator(store="exact").update(logits, void, [1, 2])
    calibrator.update(logits[:1], labels[:1], [1]).close_units([1, 2])
    whole = SplitCalibrator(store="exact").update(logits[:1], labels[:1]).compute(0.5)
    found = calibrator.compute(0.5)
    assert torch.equal(found.thresholds, whole.thresholds)
    assert found.num_units.tolist() == [1]


def test_too_many_units_raise() -> None:
    logits, labels = data(2)
    calibrator = SplitCalibrator().update(logits, labels)
    calibrator._anonymous = MAX_UNITS - 1
    for ids in (None, [1, 2]):
        with pytest.raises(StateError, match=f"at most {MAX_UNITS} units can be held"):
            calibrator.update(logits, labels, ids)
    calibrator.update(logits[:1], labels[:1])
    with pytest.raises(StateError, match=f"at most {MAX_UNITS} units can be held"):
        calibrator.merge(SplitCalibrator().update(logits, labels))
    few = LocationCalibrator((H, W), max_units=3).update(logits, labels)
    with pytest.raises(StateError, match="at most 3 units can be held; got 4"):
        few.update(logits, labels)


# --- bad input -----------------------------------------------------------------------------------


def test_bad_values_are_counted_and_raise_at_compute() -> None:
    logits, labels = data(3)
    labels[0, 0, :2] = torch.tensor([77, -4])
    labels[1, 0] = 1
    labels[2, 0, 0] = 255
    logits[1, :, 0, 0] = -torch.inf
    logits[1, 0, 0, 1] = torch.nan
    logits[1, 0, 0, 2] = torch.inf
    logits[2, :, 0, 0] = torch.nan  # void: nobody looks
    calibrator = GroupCalibrator(G)
    groups = GRID.expand(3, H, W).clone()
    groups[1, 0, 4], groups[2, 0, 0] = 2, 99
    calibrator.update(logits, labels, groups)
    with pytest.raises(InputError) as caught:
        calibrator.compute(0.1)
    assert "\n" not in str(caught.value)
    assert "2 pixels whose label is neither a class nor ignore_index" in str(caught.value)
    assert "3 pixels whose logits have no finite maximum, or a NaN" in str(caught.value)
    assert "1 pixels whose group is out of range" in str(caught.value)
    merged = GroupCalibrator(G).merge(calibrator)
    with pytest.raises(InputError, match="2 pixels whose label"):
        merged.compute(0.1)
    merged.reset().update(*data(3), GRID).compute(0.1)


class Own:
    """A score of the user's own."""

    follows_logits = True

    def __init__(self, shift: float = 0.0, ends: tuple[float, float] | None = None) -> None:
        self.shift, self.ends = shift, ends

    def __call__(self, logits: Tensor) -> Tensor:
        return self.shift - logits.float()

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self(logits).gather(1, labels[:, None])[:, 0]

    def range(self, num_classes: int) -> tuple[float, float] | None:
        del num_classes
        return self.ends

    def tolerance(self, num_classes: int) -> float:
        del num_classes
        return 0.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shift}, {self.ends})"


class Misshapen(Own):
    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().of_labels(logits, labels).flatten()


class Whole(Own):
    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().of_labels(logits, labels).long()


def test_scores_of_ones_own_work_and_are_checked() -> None:
    logits, labels = data(12)
    calibrator = SplitCalibrator(Own(), store="exact").update(logits, labels)
    merged = merge_all([calibrator, calibrator])
    assert merged.compute(0.3).num_units.tolist() == [24]
    again = SplitCalibrator.from_state_dict(calibrator.state_dict(), score=Own())
    assert same(again, calibrator)
    with pytest.raises(InputError, match="score must be given"):
        SplitCalibrator.from_state_dict(calibrator.state_dict())
    with pytest.raises(InputError, match='store must be "exact" for a score without a range'):
        SplitCalibrator(Own())
    outside = SplitCalibrator(Own(ends=(-1.0, 1.0))).update(logits, labels)
    valid = labels != 255
    scores = Own().of_labels(logits, labels.where(valid, 0))
    many = int((valid & (scores.abs() > 1)).sum())
    with pytest.raises(InputError, match=f"{many} pixels whose score lies outside the range"):
        outside.compute(0.1)
    for score in (Misshapen(), Whole()):
        refused = SplitCalibrator(score, store="exact")
        with pytest.raises(
            InputError, match=r"score.of_labels must give floats of shape \(12, 4, 5\)"
        ):
            refused.update(logits, labels, list(range(12)))
        assert same(refused, SplitCalibrator(score, store="exact"))  # no trace


BAD_UPDATES: list[tuple[str, dict[str, Any]]] = [
    ("logits must have C = 3 classes; got 4", {"logits": torch.zeros(2, 4, H, W)}),
    ("logits must be float16", {"logits": torch.zeros(2, C, H, W).long()}),
    ("logits must have C >= 1", {"logits": torch.zeros(2, 0, H, W)}),
    ("logits must be a torch tensor; got list", {"logits": [[0.0]]}),
    ("labels must have shape", {"labels": torch.zeros(2, W, H).long()}),
    ("labels must be an integer tensor", {"labels": torch.zeros(2, H, W)}),
    ("unit_ids must have one id per batch entry, 2; got 3", {"ids": [1, 2, 3]}),
    ("unit_ids must be an integer", {"ids": [1, 2.5]}),
    ("unit_ids must fit in int64", {"ids": [1, 2**63]}),
    ("unit_ids must have one axis", {"ids": torch.zeros(2, 1).long()}),
]


@pytest.mark.parametrize(("message", "bad"), BAD_UPDATES, ids=[m for m, _ in BAD_UPDATES])
def test_a_bad_batch_is_refused_in_one_line_and_leaves_no_trace(
    message: str, bad: dict[str, Any]
) -> None:
    logits, labels = data(2)
    calibrator = ClassConditionalCalibrator(C)
    with pytest.raises(InputError) as caught:
        see(calibrator, **{"logits": logits, "labels": labels, **bad})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same(calibrator, ClassConditionalCalibrator(C))


def test_other_classes_than_those_seen_are_refused() -> None:
    calibrator = SplitCalibrator().update(*data(2))
    with pytest.raises(InputError, match="logits must have C = 3 classes; got 2"):
        calibrator.update(data(2)[0][:, :2], data(2)[1])
    two = SplitCalibrator().update(data(2)[0][:, :2], data(2)[1] % 2 * 255)
    with pytest.raises(InputError, match="other must have seen 3 classes to be merged; got 2"):
        calibrator.merge(two)


@pytest.mark.parametrize(
    "alpha", [0, 1, 0.0, 1.0, -0.1, 1.5, math.nan, math.inf, True, "0.1", None]
)
def test_alpha_must_lie_between_0_and_1(alpha: Any) -> None:
    calibrator = ClassConditionalCalibrator(C).update(*data(3))
    with pytest.raises(InputError, match="alpha must"):
        calibrator.compute(alpha)
    with pytest.raises(InputError, match="alpha must"):
        calibrator.compute([0.1, alpha, 0.1])


def test_alphas_must_fit_the_axes() -> None:
    with pytest.raises(InputError, match="alpha must be one number or one per class, 3; got 2"):
        ClassConditionalCalibrator(C).compute([0.1, 0.2])
    with pytest.raises(InputError, match="no class axis"):
        GroupCalibrator(G).compute([0.1, 0.2])
    with pytest.raises(InputError, match=r"alpha must be at most max_alpha = 0\.2"):
        LocationCalibrator((H, W)).compute(0.21)


BASE: dict[str, Any] = {
    "score": LAC(),
    "unit": "image",
    "store": "exact",
    "ignore_index": 255,
    "source": "a",
}
OTHER: dict[str, Any] = {
    "score": TopK(),
    "unit": "pixel",
    "store": "histogram",
    "ignore_index": 99,
    "source": "b",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("argument", OTHER)
def test_calibrators_that_differ_are_not_merged(kind: str, argument: str) -> None:
    one, two = KINDS[kind](**BASE), KINDS[kind](**{**BASE, argument: OTHER[argument]})
    with pytest.raises(InputError, match=f"other must have {argument} = "):
        one.merge(two)


@pytest.mark.parametrize(
    ("one", "two", "name"),
    [
        (ClassConditionalCalibrator(3), ClassConditionalCalibrator(4), "num_classes"),
        (GroupCalibrator(3), GroupCalibrator(4), "num_groups"),
        (GroupCalibrator(3), GroupCalibrator(3, 2), "num_classes"),
        (LocationCalibrator((3, 4)), LocationCalibrator((4, 3)), "shape"),
        (LocationCalibrator((3,)), LocationCalibrator((3,), annuli((3,), 2)), "clusters"),
        (LocationCalibrator((3,)), LocationCalibrator((3,), max_alpha=0.3), "max_alpha"),
        (LocationCalibrator((3,)), LocationCalibrator((3,), max_units=9), "max_units"),
        (SplitCalibrator(APS()), SplitCalibrator(APS(seed=1)), "score"),
    ],
)
def test_own_arguments_must_agree_to_merge(one: Any, two: Any, name: str) -> None:
    with pytest.raises(InputError, match=f"other must have {name} = "):
        one.merge(two)
    with pytest.raises(InputError, match=r"other must be a .*; got list"):
        one.merge([])


def test_other_bad_arguments_are_refused() -> None:
    bad: list[tuple[str, Callable[[], object]]] = [
        ("unit must be", lambda: SplitCalibrator(unit="patch")),  # type: ignore[arg-type]
        ("store must be", lambda: SplitCalibrator(store="list")),  # type: ignore[arg-type]
        ("num_classes must be an integer >= 1", lambda: ClassConditionalCalibrator(0)),
        ("num_groups must be an integer >= 1", lambda: GroupCalibrator(0)),
        ("shape must be an integer >= 1", lambda: LocationCalibrator((3, 0))),
        ("max_alpha must", lambda: LocationCalibrator((3,), max_alpha=1.0)),
        ("ignore_index must lie outside", lambda: ClassConditionalCalibrator(3, ignore_index=2)),
        ("ignore_index must lie outside", lambda: SplitCalibrator(ignore_index=1).update(*data(2))),
        ("unit_ids must be None", lambda: SplitCalibrator(unit="pixel").update(*data(2), [1, 2])),
        ("groups must have shape", lambda: GroupCalibrator(2).update(*data(2), GRID.T)),
        ("logits must have spatial shape", lambda: LocationCalibrator((W, H)).update(*data(2))),
        ("clusters.map must", lambda: LocationCalibrator((W, H), CLUSTERS)),
        ("state must be version", lambda: SplitCalibrator.from_state_dict({})),
        ("fallback must be", lambda: SplitCalibrator().compute(0.1, fallback="best")),  # type: ignore[arg-type]
        ("map must hold clusters from 0", lambda: LocationClusters(torch.tensor([-1, 0]))),
    ]
    for message, call in bad:
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value).startswith(message)


def test_arguments_of_a_wrong_kind_are_named_in_one_line() -> None:
    any_score: Any = SplitCalibrator
    location: Any = LocationCalibrator
    rings: Any = annuli
    seen: Any = SplitCalibrator(store="exact").update(*data(3))
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: any_score(LAC), "score must be an object; got the class LAC. Make one: LAC()"),
        (
            lambda: any_score("LAC"),
            (
                "score must have all that cpseg.protocols.Score names; got str without __call__, "
                "of_labels, range, tolerance, follows_logits"
            ),
        ),
        (
            lambda: any_score(lambda logits: logits),
            (
                "score must have all that cpseg.protocols.Score names; got function without of_labels, "
                "range, tolerance, follows_logits"
            ),
        ),
        (
            lambda: any_score(0.5),
            (
                "score must have all that cpseg.protocols.Score names; got float without __call__, "
                "of_labels, range, tolerance, follows_logits"
            ),
        ),
        (lambda: any_score(source=3), "source must be text or None; got int"),
        (lambda: any_score(ignore_index=2.5), "ignore_index must be an integer; got 2.5"),
        (lambda: any_score(ignore_index=True), "ignore_index must be an integer; got True"),
        (
            lambda: any_score(ignore_index=2**63),
            "ignore_index must fit in int64; got 9223372036854775808",
        ),
        (lambda: location(8), "shape must hold one size per spatial axis, as (8, 8); got 8"),
        (lambda: location("88"), "shape must hold one size per spatial axis, as (8, 8); got '88'"),
        (lambda: location((8, 2.5)), "shape must be an integer >= 1; got 2.5"),
        (
            lambda: location((2,), clusters=torch.zeros(2).long()),
            "clusters must be LocationClusters, as cpseg.tuning makes them, or None; got Tensor",
        ),
        (lambda: rings(8, 2), "shape must hold one size per spatial axis, as (8, 8); got 8"),
        (lambda: rings((8,), "2"), "rings must be an integer >= 1; got '2'"),
        (
            lambda: see(seen, *data(2), 5),
            "unit_ids must be several integers, or a tensor of them; got 5",
        ),
        (
            lambda: see(seen, *data(2), "12"),
            "unit_ids must be several integers, or a tensor of them; got '12'",
        ),
        (lambda: seen.close_units(5), "ids must be several integers, or a tensor of them; got 5"),
        (
            lambda: seen.compute("0.1"),
            "alpha must be one number or one per class; got '0.1'",
        ),
        (
            lambda: seen.compute(torch.tensor(0.1)),
            "alpha must be one number or one per class; got Tensor. Pass its tolist()",
        ),
        (
            lambda: seen.compute(0.1, fallback=0.5),
            'fallback must be None, "pooled" or an object that cpseg.tuning fitted; got float',
        ),
        (
            lambda: seen.compute(0.1, fallback=InterpolatedQuantile),
            (
                'fallback must be None, "pooled" or an object that cpseg.tuning fitted; '
                "got the class InterpolatedQuantile"
            ),
        ),
        (
            lambda: seen.compute(0.1, fallback="best"),
            "fallback must be None, \"pooled\" or an object that cpseg.tuning fitted; got 'best'",
        ),
        (lambda: merge_all([3]), "accumulators must hold calibrators or metrics; got int"),  # type: ignore[type-var]
        (lambda: merge_all([seen, "x"]), "accumulators must hold calibrators or metrics; got str"),
        (lambda: merge_all(3), "accumulators must be several; got int"),  # type: ignore[arg-type]
        (
            lambda: merge_all([SplitCalibrator]),  # type: ignore[type-var]
            "accumulators must hold calibrators or metrics; got the class SplitCalibrator",
        ),
        (lambda: gather([seen]), "accumulator must be a calibrator or metric; got list"),  # type: ignore[type-var]
        (
            lambda: InterpolatedQuantile.fit(seen, 0.1),
            (
                "tuning must be a ClassConditionalCalibrator or GroupCalibrator, which has groups; "
                "got SplitCalibrator"
            ),
        ),
        (
            lambda: GroupClusters.fit(seen),
            (
                "tuning must be a ClassConditionalCalibrator or GroupCalibrator, which has groups; "
                "got SplitCalibrator"
            ),
        ),
        (
            lambda: cluster_locations(seen, 2),
            "tuning must be a LocationCalibrator; got SplitCalibrator",
        ),
        (
            lambda: GroupClusters.fit(ClassConditionalCalibrator(3)),
            (
                "tuning must hold a group with 5 units or more; got at most 0. Lower min_units, or "
                "take a larger split"
            ),
        ),
        (
            lambda: GroupClusters(torch.zeros(0).long(), OTHER_DATA),
            "assignment must have shape (R,), R >= 1; got (0,)",
        ),
        (
            lambda: GroupClusters.fit(ClassConditionalCalibrator(3), levels=0.5),  # type: ignore[arg-type]
            "levels must be a list of numbers between 0 and 1; got 0.5",
        ),
    ]
    before = merge_all([seen])
    for call, message in cases:
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value) == message
    assert same(seen, before)


@pytest.mark.parametrize(
    ("logits", "told"),
    [
        (torch.zeros(2, C, H, W).to_sparse(), "a dense tensor; got layout torch.sparse_coo"),
        (torch.zeros(2, C, H, W, device="meta"), "hold data; got a tensor on the device meta"),
    ],
)
def test_tensors_without_plain_values_are_refused(logits: Tensor, told: str) -> None:
    with pytest.raises(InputError, match=f"^logits must (be|hold) .*{told.split(';')[1]}"):
        SplitCalibrator().update(logits, torch.zeros(2, H, W, device=logits.device).long())


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_wide_unsigned_integers_are_refused_with_the_remedy(dtype: torch.dtype) -> None:
    logits, labels = data(2)
    with pytest.raises(InputError) as caught:
        SplitCalibrator().update(logits, labels.to(dtype))
    assert str(caught.value) == (
        f"labels must be an integer tensor; got {dtype}. torch can hardly compute with it: "
        "pass .long()"
    )
    assert same(
        SplitCalibrator().update(logits, labels.to(dtype).long()),
        SplitCalibrator().update(logits, labels),
    )


def test_numbers_of_numpy_and_fractions_are_numbers() -> None:
    logits, labels = data(20)
    made = ClassConditionalCalibrator(np.int64(C), ignore_index=np.uint8(255))  # type: ignore[arg-type]
    made.update(logits, labels, np.arange(20).tolist())
    plain = ClassConditionalCalibrator(C).update(logits, labels, list(range(20)))
    assert same(made, plain)
    for alpha in (np.float32(0.1), np.float64(0.1), np.float16(0.1), Fraction(1, 10)):
        calibration = made.compute(alpha)  # type: ignore[arg-type]
        assert calibration.alpha == 0.1
        assert type(calibration.alpha) is float
        assert torch.equal(calibration.thresholds, plain.compute(0.1).thresholds)
    mixed = made.compute([np.float32(0.3), Fraction(1, 3), 0.1])  # type: ignore[list-item]
    assert mixed.alpha == (0.3, 1 / 3, 0.1)
    location = LocationCalibrator(np.array([H, W]), max_units=np.int32(9))  # type: ignore[arg-type]
    assert same(location, LocationCalibrator((H, W), max_units=9))
    ids = np.array([3, 4])
    one, two = SplitCalibrator().update(*data(2), ids), SplitCalibrator().update(*data(2), [3, 4])  # type: ignore[arg-type]
    assert same(one.close_units(ids), two.close_units([3, 4]))
    scored = SplitCalibrator(APS(seed=np.int64(3)))  # type: ignore[arg-type]
    assert same(scored, SplitCalibrator(APS(seed=3)))


def test_limits_are_compared_as_decimals() -> None:
    # 1 - 0.7 > 0.3 in binary, and 0.1 + 0.2 > 0.3.
    tuning = LocationCalibrator((H, W), max_alpha=0.3).update(*data(40))
    cluster_locations(tuning, 2, levels=[0.7, 0.9])
    tuning.compute(Fraction(3, 10))
    with pytest.raises(InputError, match=r"tuning must have max_alpha >= 0\.4 for these levels"):
        cluster_locations(tuning, 2, levels=[0.6])
    few = LocationCalibrator((H, W), max_units=3).update(*data(2))
    with pytest.raises(InputError, match=r"max_alpha \* \(max_units \+ 1\) >= 1; got max_alpha"):
        cluster_locations(few, 2)


def test_the_line_says_how_a_calibrator_was_made_and_what_it_has_seen() -> None:
    seen = ClassConditionalCalibrator(C, APS()).update(*data(4), [1, 2, 1, 3]).close_units([2])
    assert repr(seen) == (
        "ClassConditionalCalibrator(score=APS(randomized=False, seed=0), unit='image', "
        "store='histogram', ignore_index=255, source=None, num_classes=3): "
        "3 units seen, 2 of them open"
    )
    pixels = repr(SplitCalibrator(unit="pixel").update(*data(4)))
    assert pixels.endswith("source=None): 4 images, whose pixels are the units seen")
    rings = repr(LocationCalibrator((H, W), annuli((H, W), 3)))
    assert "clusters=LocationClusters(3 clusters of (4, 5) locations)" in rings
    for kind in KINDS.values():
        assert "\n" not in repr(kind())


def test_merging_other_clusters_is_refused_without_the_map() -> None:
    one, two = torch.zeros(60, 60).long(), torch.zeros(60, 60).long()
    one[0], two[1] = 1, 1
    first, second = (LocationCalibrator((60, 60), LocationClusters(m)) for m in (one, two))
    with pytest.raises(InputError) as refusal:
        first.merge(second)
    assert str(refusal.value) == (
        "other must have clusters = LocationClusters(2 clusters of (60, 60) locations) to be "
        "merged; got another one"
    )


def test_a_state_that_is_not_whole_is_refused_in_one_line() -> None:
    for kind, build in KINDS.items():
        calibrator = see(build(), *data(4))
        whole = calibrator.state_dict()
        for name, value in whole.items():
            wrong: list[object] = [None, "text", [], 2.5, torch.tensor(0.5)]
            if isinstance(value, Tensor):
                wrong += [value.float(), *([value[:0]] if len(value) > 1 else [])]
            for bad in [{key: whole[key] for key in whole if key != name}] + [
                {**whole, name: other}
                for other in wrong
                if not (name == "num_classes" and other is None)
            ]:
                with pytest.raises(InputError) as refusal:
                    type(calibrator).from_state_dict(bad)
                assert str(refusal.value).startswith("state must")
                assert "\n" not in str(refusal.value)
        assert same(type(calibrator).from_state_dict(whole), calibrator)
        if kind != "split":
            unpooled = {key: whole[key] for key in whole if not key.startswith("pooled.")}
            with pytest.raises(InputError, match="state must be what state_dict returned"):
                type(calibrator).from_state_dict(unpooled)
    with pytest.raises(InputError, match="state must be a mapping; got list"):
        SplitCalibrator.from_state_dict([])  # type: ignore[arg-type]


class Silent(Own):
    __repr__ = object.__repr__


class Layered(torch.nn.Module):
    """A score with weights, of which its text tells nothing."""

    follows_logits = True
    of_labels = range = tolerance = Own.tolerance


class Addressed(Own):
    def __repr__(self) -> str:
        return f"Addressed({object.__repr__(self)})"


@pytest.mark.parametrize("score", [Silent(), Layered(), Addressed()], ids=["default", "nn", "at"])
def test_a_score_that_does_not_say_what_it_is_is_refused(score: Any) -> None:
    for kind in KINDS.values():
        with pytest.raises(InputError) as refusal:
            kind(score=score, store="exact")
        assert str(refusal.value).startswith("score must say what its parameters are; got ")
        assert "frozen dataclass, or give it a __repr__" in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_scores_of_ones_own_that_differ_are_neither_merged_nor_loaded() -> None:
    one, two = (SplitCalibrator(Own(shift), store="exact") for shift in (0.0, 1.0))
    with pytest.raises(
        InputError, match=r"other must have score = Own\(0\.0, None\) .*; got Own\(1"
    ):
        one.merge(two)
    with pytest.raises(
        InputError, match=r"score must be .*Own\(0\.0, None\), which made this; got"
    ):
        SplitCalibrator.from_state_dict(one.state_dict(), score=Own(1.0))


# --- the default dtype ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", ["exact", "histogram"])
@pytest.mark.parametrize("score", [LAC(), APS(randomized=True), TopK()], ids=repr)
def test_the_default_dtype_changes_nothing(kind: str, store: str, score: Any) -> None:
    logits, labels = data(12)
    other = data(28, seed=1)

    def run() -> list[Any]:
        rest = {"score": score, "store": store}
        calibrator = see(KINDS[kind](**rest), logits, labels)
        tuning = see(KINDS[kind](**rest), *other)
        found: list[Any] = [calibrator.state_dict()]
        fallbacks: list[Any] = [None, "pooled"]
        if "class" in kind or kind == "group":
            fallbacks += [
                InterpolatedQuantile.fit(tuning, 0.05),
                GroupClusters.fit(tuning, 2, min_units=1),
            ]
        if kind == "location":
            clusters = cluster_locations(tuning, 3)
            found.append({"map": clusters.map, "rings": annuli((H, W), 3).map})
        for fallback in fallbacks:
            calibration = calibrator.compute(0.05, fallback=fallback)
            names = ("thresholds", "num_units", "num_pixels", "fallback_groups", "max_share")
            found.append({name: getattr(calibration, name) for name in names})
            assert calibration.thresholds.dtype == torch.float32
        again = type(calibrator).from_state_dict(calibrator.state_dict())
        found.append(merge_all([again, tuning]).state_dict())
        return found

    plain = run()
    torch.set_default_dtype(torch.float64)
    try:
        double = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two in zip(plain, double, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            if isinstance(value, Tensor):
                assert value.dtype == two[name].dtype, name
                assert torch.equal(value, two[name]), name
            else:
                assert value == two[name], name


# --- fallbacks -----------------------------------------------------------------------------------


def rare(batch: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """The last class is in two images only."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, 30, generator=generator)
    labels = torch.randint(0, classes - 1, (batch, 30), generator=generator)
    labels[:2, :4] = classes - 1
    return logits + 3 * torch.nn.functional.one_hot(labels, classes).movedim(-1, 1), labels


@pytest.mark.parametrize("classes", [3, 7, 21])
@pytest.mark.parametrize("store", ["exact", "histogram"])
def test_fallbacks_replace_only_what_is_starved_and_are_listed(classes: int, store: Any) -> None:
    calibrator = ClassConditionalCalibrator(classes, store=store).update(*rare(60, classes, 0))
    tuning = ClassConditionalCalibrator(classes, store=store).update(*rare(60, classes, 1))
    alpha = 0.1
    own = calibrator.compute(alpha)
    assert own.thresholds.isinf().tolist() == [False] * (classes - 1) + [True]
    assert not own.fallback_groups.any()
    pooled = calibrator.evidence()[1].quantiles([alpha])[0]
    slack = LAC().tolerance(classes)
    for fallback in (
        "pooled",
        InterpolatedQuantile.fit(tuning, alpha),
        GroupClusters.fit(tuning, 1, min_units=2),
    ):
        calibration = calibrator.compute(alpha, fallback=fallback)
        assert torch.equal(calibration.thresholds[:-1], own.thresholds[:-1])
        assert calibration.thresholds[-1].isfinite()
        assert calibration.fallback_groups.tolist() == [False] * (classes - 1) + [True]
        assert f"Nothing is promised for class {classes - 1}: " in str(calibration.guarantee)
        if isinstance(fallback, str):
            assert float(calibration.thresholds[-1]) == pytest.approx(
                float(pooled) + slack, abs=1e-6
            )
        sets = PixelSetPredictor(calibration)(rare(9, classes, 5)[0])
        assert float(sets.sum(1).float().mean()) < 0.8 * classes  # useful, for few classes too


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.35])
def test_a_clusters_threshold_is_the_definition(alpha: float) -> None:
    classes = 5
    calibrator = ClassConditionalCalibrator(classes, store="exact").update(*rare(60, classes, 0))
    own, pooled = calibrator.evidence()
    assignment = torch.tensor([0, 1, 0, 1, 1])
    found = GroupClusters(assignment, OTHER_DATA).thresholds(own, pooled, [alpha] * classes)
    logits, labels = rare(60, classes, 0)
    scores = LAC().of_labels(logits, labels)
    for cluster in (0, 1):
        members = (assignment == cluster).nonzero()[:, 0].tolist()
        cells = [
            s[y == k].tolist()
            for s, y in zip(scores, labels, strict=True)
            for k in members
            if (y == k).any()
        ]
        most = Fraction(str(alpha)) * (len(cells) + len(members)) - len(members)

        def missed(candidate: float, cells: list[list[float]] = cells) -> Fraction:
            return sum(
                (Fraction(sum(s > candidate for s in c), len(c)) for c in cells), Fraction(0)
            )

        above = found[members[0]].item()
        assert all(found[k] == above for k in members)
        candidates = sorted({s for c in cells for s in c})
        lower = [c for c in candidates if c < above]
        assert missed(above) <= most
        assert missed(lower[-1]) > most - Fraction(60 * 30, UNIT_MASS)


def test_a_cluster_with_more_pairs_than_int64_has_mass_for_is_refused() -> None:
    calibrator = ClassConditionalCalibrator(C).update(*data(4))
    own, pooled = calibrator.evidence()
    own.num_units.fill_(MAX_UNITS // 2)
    with pytest.raises(InputError, match="Fit more clusters"):
        GroupClusters(torch.zeros(C).long(), OTHER_DATA).thresholds(own, pooled, [0.1] * C)


def shares(scores: Tensor, labels: Tensor, k: int, above: float) -> list[Fraction]:
    """Share of class k that each image with it has above a threshold."""
    held = [s[y == k].tolist() for s, y in zip(scores, labels, strict=True) if (y == k).any()]
    return [Fraction(sum(value > above for value in image), len(image)) for image in held]


@pytest.mark.parametrize("alpha", [0.1, 0.15, 0.3])
@pytest.mark.parametrize("seed", [1, 2])
def test_interpolation_is_the_definition(alpha: float, seed: int) -> None:
    classes = 4
    logits, labels = rare(60, classes, seed)
    logits[:, 1] -= 2  # a hard class
    scores = LAC().of_labels(logits, labels)
    tuning = ClassConditionalCalibrator(classes, store="exact").update(logits, labels)
    fitted = InterpolatedQuantile.fit(tuning, alpha)
    own, pooled = tuning.evidence()
    base = float(pooled.quantiles([alpha])[0])
    exact = own.quantiles([alpha] * classes).tolist()
    cap = max(base, *(value for value in exact if math.isfinite(value)))
    assert fitted.cap == cap
    assert math.isinf(exact[-1])  # the rare one decides nothing
    largest = [float(scores[labels == k].max()) for k in range(classes)]

    def missed(step: int) -> Fraction:
        total = Fraction(0)
        hard = [k for k in range(classes) if base < exact[k] < math.inf]
        for k in hard:
            above = base + step / 20 * (max(base, min(largest[k], cap)) - base)
            lost = shares(scores, labels, k, above)
            total += (sum(lost, Fraction(0)) + 1) / (len(lost) + 1)
        return total / len(hard)

    step = round(fitted.weight * 20)
    assert float(missed(step)) <= alpha + 1e-6
    assert step == 0 or float(missed(step - 1)) > alpha - 1e-6
    assert step > 0  # or the classes are too easy for this test


def test_a_starved_groups_largest_score_stands_for_its_quantile() -> None:
    fitted = InterpolatedQuantile(0.1, 0.5, 0.75, OTHER_DATA)
    own, pooled = (
        Evidence(Exact(4), by_unit=True, device="cpu"),
        Evidence(Exact(1), by_unit=True, device="cpu"),
    )
    scores = torch.full((9, 1), 0.25)
    pooled.add(pooled.store.cells(scores), None, torch.ones(9, 1).long(), None)
    for row, highest in ((0, 0.5), (1, 0.125), (2, 0.875)):  # row 3 is never seen
        place = torch.full((1, 2), row)
        counted = torch.tensor([[2 * (group == row) for group in range(4)]])
        own.add(own.store.cells(torch.tensor([[highest, 0.0]])), place, counted, None)
    found = fitted.thresholds(own, pooled, [0.1] * 4)
    # Half of the way from 0.25 to: its own; the pooled one, never below; the cap; the cap.
    assert found.tolist() == [0.375, 0.25, 0.5, 0.5]
    histogram = Histogram(4, 0.0, 1.0)
    histogram.absorb({"mass+": torch.zeros(4 * histogram.num_cells, dtype=torch.int64)})
    empty = Evidence(histogram, by_unit=True, device="cpu")
    assert fitted.thresholds(empty, pooled, [0.1] * 4).tolist() == [0.5] * 4


def test_interpolation_serves_one_level_and_says_so() -> None:
    fitted = InterpolatedQuantile.fit(ClassConditionalCalibrator(4).update(*rare(60, 4, 1)), 0.1)
    calibrator = ClassConditionalCalibrator(4).update(*rare(9, 4, 0))
    for alpha in (0.2, [0.1, 0.1, 0.2, 0.1]):
        with pytest.raises(InputError) as refusal:
            calibrator.compute(alpha, fallback=fitted)
        assert str(refusal.value) == (
            "alpha must be 0.1, the one level for which the fallback was fitted; got 0.2. "
            "Fit another fallback for another level"
        )
    assert torch.equal(
        calibrator.compute(Fraction(1, 10), fallback=fitted).thresholds,
        calibrator.compute(0.1, fallback=fitted).thresholds,
    )


def test_interpolation_covers_hard_starved_classes_better_than_pooling_and_stays_useful() -> None:
    # Ten classes, the odd ones hard; in calibration all but the first four are in three images.
    classes, alpha, covered, size = 10, 0.1, dict.fromkeys(("pooled", "interpolated"), 0.0), 0.0

    def draw(images: int, seed: int, *, scarce: bool) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 4 if scarce else classes, (images, 40), generator=generator)
        if scarce:
            for k in range(4, classes):
                labels[3 * k - 12 : 3 * k - 9, :10] = k
        skill = torch.where(labels % 2 == 1, 1.5, 4.0)
        skill = skill + torch.randn(images, 1, generator=generator)
        hot = torch.nn.functional.one_hot(labels, classes).movedim(-1, 1)
        noise = torch.randn(images, classes, 40, generator=generator)
        return noise + skill[:, None] * hot, labels

    draws = 20
    for seed in range(draws):
        tuning = ClassConditionalCalibrator(classes).update(*draw(60, 3 * seed, scarce=False))
        fitted = InterpolatedQuantile.fit(tuning, alpha)
        calibrator = ClassConditionalCalibrator(classes)
        calibrator.update(*draw(60, 3 * seed + 1, scarce=True))
        logits, labels = draw(30, 3 * seed + 2, scarce=False)
        hard = (labels % 2 == 1) & (labels >= 4)
        fallbacks: list[tuple[str, Any]] = [("pooled", "pooled"), ("interpolated", fitted)]
        for name, fallback in fallbacks:
            calibration = calibrator.compute(alpha, fallback=fallback)
            assert calibration.fallback_groups.tolist() == [False] * 4 + [True] * 6
            sets = PixelSetPredictor(calibration)(logits)
            covered[name] += float(sets.gather(1, labels[:, None])[:, 0][hard].float().mean())
            if name == "interpolated":
                size += float(sets.sum(1).float().mean()) / draws
    assert covered["interpolated"] / draws > covered["pooled"] / draws + 0.05
    assert size < 0.5 * classes


def test_what_was_fitted_on_the_very_data_is_refused() -> None:
    calibrator = ClassConditionalCalibrator(4).update(*rare(60, 4, 0))
    for fallback in (InterpolatedQuantile.fit(calibrator, 0.1), GroupClusters.fit(calibrator, 1)):
        with pytest.raises(InputError, match="fallback must be fitted on a split of its own"):
            calibrator.compute(0.1, fallback=fallback)
        merge_all([calibrator]).update(*rare(9, 4, 3)).compute(0.1, fallback=fallback)
    tuning = LocationCalibrator((H, W)).update(*data(40))
    clusters = cluster_locations(tuning, 3)
    with pytest.raises(InputError, match="clusters must be fitted on a split of their own"):
        LocationCalibrator((H, W), clusters).update(*data(40)).compute(0.1)
    other = LocationCalibrator((H, W), clusters).update(*data(40, seed=1)).compute(0.1)
    assert torch.equal(
        other.thresholds,
        other.thresholds.flatten()[
            torch.stack(
                [(clusters.map.flatten() == k).nonzero()[0, 0] for k in clusters.map.flatten()]
            )
        ].view(H, W),
    )


def test_what_was_fitted_in_another_way_is_refused() -> None:
    batch, other = rare(60, 4, 0), rare(60, 4, 1)
    calibrator = ClassConditionalCalibrator(4).update(*batch)
    groups = torch.arange(30) % 4
    wrong: list[tuple[Any, str]] = [
        (ClassConditionalCalibrator(4, APS()).update(*other), r"score LAC\(\), .*; got APS\(rand"),
        (ClassConditionalCalibrator(4, unit="pixel").update(*other), "unit image, .*; got pixel"),
        (
            GroupCalibrator(4).update(*other, groups),
            r"axes \('class',\), the calibrator's; got \('group',\)",
        ),
    ]
    for tuning, told in wrong:
        for fallback in (InterpolatedQuantile.fit(tuning, 0.1), GroupClusters.fit(tuning, 1)):
            with pytest.raises(InputError, match=f"^fallback must be fitted with {told}"):
                calibrator.compute(0.1, fallback=fallback)
    clusters = cluster_locations(LocationCalibrator((H, W)).update(*data(40)), 3)
    with pytest.raises(InputError, match="clusters must be fitted with score APS"):
        LocationCalibrator((H, W), clusters, score=APS())
    with pytest.raises(InputError, match="clusters must be fitted with unit pixel"):
        LocationCalibrator((H, W), clusters, unit="pixel")


@pytest.mark.parametrize("score", [LAC(), TopK()], ids=repr)
def test_a_fingerprint_is_of_the_very_data(score: Any) -> None:
    # Saturated logits: every score is the same number, and the labels are as often each class.
    labels = torch.arange(C).repeat(20)[: H * W * 2].view(2, H, W)
    logits = 90.0 * torch.nn.functional.one_hot(labels, C).movedim(-1, 1)
    other = logits * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    assert torch.equal(score.of_labels(logits, labels), score.of_labels(other, labels))
    one = SplitCalibrator(score).update(logits, labels).fingerprint
    assert SplitCalibrator(score).update(other, labels).fingerprint != one
    assert ClassConditionalCalibrator(C, score).update(logits, labels).fingerprint == one
    turned = SplitCalibrator(score).update(logits[:1], labels[:1])
    assert turned.fingerprint != one
    assert turned.update(logits[1:].double(), labels[1:].int()).fingerprint == one
    # Two pixels' labels exchanged, or their logits, are other data.
    swapped = labels.clone()
    swapped[0, 0, 0], swapped[0, 0, 1] = labels[0, 0, 1], labels[0, 0, 0]
    noisy = torch.randn(2, C, H, W, generator=torch.Generator().manual_seed(0))
    marks = {SplitCalibrator(score).update(noisy, y).fingerprint for y in (labels, swapped)}
    assert len(marks) == 2


def test_the_sentence_speaks_of_what_is_promised() -> None:
    batch = data(40)
    single = LocationCalibrator((H, W)).update(*batch).compute(0.2)
    shared = LocationCalibrator((H, W), annuli((H, W), 3)).update(*batch).compute(0.2)
    pixel = SplitCalibrator(unit="pixel").update(*batch).compute(0.2)
    per_class = ClassConditionalCalibrator(C).update(*batch).compute(0.2)
    both = ClassConditionalCalibrator(C, unit="pixel").update(*batch).compute(0.2)
    few = ClassConditionalCalibrator(C).update(*data(3)).compute(0.2)
    assert str(single.guarantee).startswith("For each location,")
    assert str(shared.guarantee).startswith("For each cluster of locations,")
    assert "at most alpha + (1 - alpha) / (m + 1) if all images" in str(pixel.guarantee)
    assert "for pixels that come in images nothing is promised" in str(both.guarantee)
    assert "does not imply the same for an image as a whole" in str(per_class.guarantee)
    assert "No finite threshold can promise this for classes 0, 1, 2" in str(few.guarantee)


def test_the_stores_are_the_ones_asked_for() -> None:
    for store, kind in (("exact", Exact), ("histogram", Histogram)):
        calibrator = ClassConditionalCalibrator(C, store=store).update(*data(2))  # type: ignore[arg-type]
        assert all(isinstance(evidence.store, kind) for evidence in calibrator.evidence())


def test_shares_are_of_all_pixels_so_that_a_nearly_void_image_makes_nothing_plausible() -> None:
    labels = torch.full((2, 4, 5), 255)
    labels[0, 0, 0] = 2  # the only labeled pixel of 20
    labels[1, :2] = 1
    logits = torch.zeros(2, 3, 4, 5)
    calibration = ClassConditionalCalibrator(3).update(logits, labels).compute(0.1)
    assert calibration.max_share.tolist() == [0.0, 0.5, 0.05]


@contract
def test_inference_mode_changes_nothing(kind: str, how: dict[str, Any]) -> None:
    logits, labels = data(6)
    with torch.inference_mode():
        inside = see(KINDS[kind](**how), logits[:3].clone(), labels[:3].clone())
    see(inside, logits[3:], labels[3:])
    outside = see(KINDS[kind](**how), logits, labels)
    expected = outside.state_dict()
    for name, value in inside.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected[name]), name


@contract
def test_an_interrupted_update_is_not_half_counted_in_silence(
    kind: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = data(5)
    calibrator = see(KINDS[kind](**how), logits, labels)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Evidence, "_count", interrupt)
        with pytest.raises(KeyboardInterrupt):
            see(calibrator, logits, labels)
    for use in (
        lambda: calibrator.compute(0.3),
        calibrator.state_dict,
        lambda: see(calibrator, logits, labels),
        lambda: merge_all([calibrator]),
        lambda: calibrator.merge(KINDS[kind](**how)),
        lambda: KINDS[kind](**how).merge(calibrator),
    ):
        with pytest.raises(StateError, match="an update was interrupted"):
            use()
    see(calibrator.reset(), logits, labels).compute(0.3)
