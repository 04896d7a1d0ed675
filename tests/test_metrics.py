import io
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpseg import metrics
from cpseg.errors import InputError
from cpseg.metrics import (
    Coverage,
    MeanIoU,
    SelectiveAccuracy,
    SetSize,
    StratifiedCoverage,
    _bootstrap,
    _pixels,
    boundary_strata,
    interval_names,
    object_size_strata,
    set_size_strata,
)

torch.set_num_threads(1)

C, K, VOID = 3, 4, 255
Metric = Any  # the contract is what is under test: no base class says it
Batch = tuple[Tensor, ...]


def sets_of(seed: int, batch: int, *space: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    sets = torch.rand(batch, C, *space, generator=generator) < 0.6
    labels = torch.randint(C + 1, (batch, *space), generator=generator)
    return sets, labels.where(labels < C, VOID).to(torch.uint8)


def stratified(seed: int, batch: int, *space: int) -> Batch:
    sets, labels = sets_of(seed, batch, *space)
    generator = torch.Generator().manual_seed(seed + 1000)
    return sets, labels, torch.randint(K, labels.shape, generator=generator)


def guesses(seed: int, batch: int, *space: int) -> Batch:
    _, labels = sets_of(seed, batch, *space)
    _, other = sets_of(seed + 1000, batch, *space)
    return other, labels


METRICS: list[tuple[Callable[[], Metric], Callable[..., Batch]]] = [
    (lambda: Coverage(C), sets_of),
    (lambda: SetSize(C), sets_of),
    (lambda: StratifiedCoverage(C, K), stratified),
    (lambda: SelectiveAccuracy(C), guesses),
    (lambda: MeanIoU(C), guesses),
    (lambda: MeanIoU(C, abstained="ignored"), guesses),
]
every_metric = pytest.mark.parametrize(("make", "data"), METRICS)


def flat(report: object) -> list[object]:
    """Everything a report holds, as Python numbers; NaN as a word, so that it equals itself."""
    if isinstance(report, Tensor):
        return [(report.dtype, tuple(report.shape)), *flat(report.flatten().tolist())]
    if isinstance(report, list):
        return [leaf for item in report for leaf in flat(item)]
    if hasattr(report, "__dataclass_fields__"):
        return flat([getattr(report, name) for name in report.__dataclass_fields__])
    return ["nan" if isinstance(report, float) and math.isnan(report) else report]


def report_of(metric: Metric) -> list[object]:
    return flat(metric.compute(resamples=30, seed=7))


@every_metric
@given(
    cuts=st.lists(st.integers(0, 7), max_size=4),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=15, deadline=None)
def test_any_cut_and_order_gives_the_same_report(
    make: Callable[[], Metric], data: Callable[..., Batch], cuts: list[int], order: Any
) -> None:
    batch = data(1, 7, 5, 2)
    whole = make().update(*batch)
    ends = [0, *sorted(cuts), 7]
    places = [*range(7)]
    order.shuffle(places)
    parts = [make().update(*(x[places[start:end]] for x in batch)) for start, end in pairwise(ends)]
    order.shuffle(parts)
    merged = make()
    for part in parts:
        before = report_of(part), flat([*part.state_dict().values()])
        assert merged.merge(part) is merged
        assert (report_of(part), flat([*part.state_dict().values()])) == before
    assert report_of(merged) == report_of(whole)
    assert flat([*merged.state_dict().values()]) == flat([*whole.state_dict().values()])


@every_metric
def test_state_survives_a_file_and_a_fresh_one_is_the_identity(
    make: Callable[[], Metric], data: Callable[..., Batch]
) -> None:
    metric = make()
    assert metric.update(*data(2, 5, 3)) is metric
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    again = type(metric).from_state_dict(torch.load(file, weights_only=True))
    assert report_of(again) == report_of(metric)
    assert report_of(again.merge(make())) == report_of(metric)
    assert report_of(make().merge(metric)) == report_of(metric)
    again.update(*data(3, 2, 3))
    assert report_of(again) != report_of(metric)
    assert report_of(again.reset()) == report_of(make())
    # The state is the caller's: writing into it reaches no metric.
    state = metric.state_dict()
    before = report_of(metric)
    loaded = type(metric).from_state_dict(state)
    state["rows"].zero_()
    assert report_of(loaded) == report_of(metric) == before


@every_metric
def test_merging_with_itself_counts_twice(
    make: Callable[[], Metric], data: Callable[..., Batch]
) -> None:
    metric, batch = make().update(*data(2, 3, 4)), data(2, 3, 4)
    assert report_of(metric.merge(metric)) == report_of(make().update(*batch).update(*batch))


@every_metric
@pytest.mark.parametrize("space", [(), (5,), (4, 3), (2, 4, 3)])
def test_any_number_of_spatial_axes(
    make: Callable[[], Metric], data: Callable[..., Batch], space: tuple[int, ...]
) -> None:
    batch = data(4, 6, *space)
    copies = [x.clone() for x in batch]
    random = torch.get_rng_state()
    metric = make().update(*batch)
    found = report_of(metric)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(x, y) for x, y in zip(batch, copies, strict=True))
    if space:
        lines = [x.flatten(2 if x.dtype == torch.bool else 1) for x in batch]
        assert report_of(make().update(*lines)) == found
    strided = [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in batch]
    assert report_of(make().update(*strided)) == found
    wide = [x if x.dtype == torch.bool else x.long() for x in batch]
    assert report_of(make().update(*wide)) == found
    for x in batch:
        x.zero_()
    assert report_of(metric) == found


@every_metric
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (0,)])
def test_nothing_adds_nothing(
    make: Callable[[], Metric], data: Callable[..., Batch], shape: tuple[int, ...]
) -> None:
    assert report_of(make().update(*data(0, *shape))) == report_of(make())
    metric = make().update(*data(5, 4, 6))
    before = report_of(metric)
    assert report_of(metric.update(*data(0, *shape))) == before
    # An image without a labeled pixel is not an image that was covered 0 times.
    void = [torch.full_like(x, VOID) if i == 1 else x for i, x in enumerate(data(6, 3, 5))]
    assert report_of(metric.update(*void)) == before
    assert metric.state_dict()["rows"].shape[0] == 4
    assert "no image has" in str(make().compute()) or "-" in str(make().compute())


@every_metric
def test_update_never_waits_for_the_device(
    make: Callable[[], Metric], data: Callable[..., Batch]
) -> None:
    # Tensors without data refuse whatever would read a value.
    make().update(*(x.to("meta") for x in data(0, 2, 4, 3)))


@every_metric
def test_labels_that_are_no_class_raise_at_compute(
    make: Callable[[], Metric], data: Callable[..., Batch]
) -> None:
    batch = data(0, 2, 4)
    batch[1][0, :2] = C
    metric = make().update(*batch)
    metric = type(metric).from_state_dict(make().merge(metric).state_dict())
    rule = rf"^labels must lie in \[0, {C}\) or be 255; got 2 pixels that do not$"
    with pytest.raises(InputError, match=rule):
        metric.compute()


def test_other_faults_raise_at_compute() -> None:
    labels = torch.tensor([[0, 1, 255]])
    iou = MeanIoU(2).update(torch.tensor([[2, -1, 0]]), labels)
    with pytest.raises(InputError, match=r"^predictions must lie in .* got 2 pixels"):
        iou.compute()
    coverage = StratifiedCoverage(2, 3)
    coverage.update(torch.ones(1, 2, 3, dtype=torch.bool), labels, torch.tensor([[3, 0, -9]]))
    with pytest.raises(InputError, match=r"^strata must lie in \[0, 3\) .* got 1 pixels"):
        coverage.compute()


def images_of(batch: Batch) -> list[list[Any]]:
    """Per image, what belongs to each labeled pixel: set or prediction, label, stratum."""
    first, *rest = (x.long() for x in batch)
    first = first.flatten(2).mT if batch[0].dtype == torch.bool else first.flatten(1)
    lines = [first, *(x.flatten(1) for x in rest)]
    images = (zip(*(line[i].tolist() for line in lines), strict=True) for i in range(len(first)))
    found = [[pixel for pixel in image if pixel[1] != VOID] for image in images]
    return [image for image in found if image]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def check(ratio: metrics.Ratio, parts: list[list[tuple[int, int]]]) -> None:
    """A ratio against the (numerator, denominator) of every image, for each class."""
    for index, images in enumerate(parts):
        tops, bottoms = sum(a for a, _ in images), sum(b for _, b in images)
        each = [a / b for a, b in images if b]
        numbers = [
            getattr(ratio, name).flatten()[index].item()
            for name in ("num_images", "numerator", "denominator")
        ]
        assert numbers == [len(each), tops, bottoms]
        for found, value in (
            (ratio.mean_of_images, mean(each)),
            (ratio.mean_of_pixels, tops / bottoms if bottoms else math.nan),
        ):
            assert found.value.flatten()[index].item() == pytest.approx(
                value, rel=1e-12, nan_ok=True
            )
    assert ratio.num_images.numel() == len(parts)


def worst(values: list[float], *, largest: bool = False) -> tuple[float, float]:
    ranked = sorted(values, reverse=largest)
    return ranked[0], mean(ranked[: math.ceil(len(ranked) / 10)])


@pytest.mark.parametrize("seed", range(3))
def test_coverage_and_set_size_are_those_of_plain_python(seed: int) -> None:
    batch = sets_of(seed, 23, 2, 3)
    images = images_of(batch)
    hit = [[(bits[y], sum(bits), y) for bits, y in image] for image in images]
    coverage, size = Coverage(C).update(*batch).compute(), SetSize(C).update(*batch).compute()
    reports: list[Any] = [coverage, size]
    for part, report in enumerate(reports):
        check(report.overall, [[(sum(p[part] for p in im), len(im)) for im in hit]])
        of = [[[p[part] for p in im if p[2] == c] for im in hit] for c in range(C)]
        check(report.classes, [[(sum(ps), len(ps)) for ps in ims] for ims in of])
        each = [sum(p[part] for p in im) / len(im) for im in hit]
        assert report.images.tolist() == pytest.approx(sorted(each))
        found = report.worst_image, report.worst_tenth_of_images
        assert found == pytest.approx(worst(each, largest=part == 1))
        assert report.mean_of_images == pytest.approx(mean(each))
    sizes = [p[1] for im in hit for p in im]
    assert size.num_pixels_of_size.tolist() == [sizes.count(k) for k in range(C + 1)]


def test_strata_are_those_of_plain_python() -> None:
    batch = stratified(3, 9, 4, 2)
    report = StratifiedCoverage(C, K).update(*batch).compute()
    images = images_of(batch)
    of = [[[(b, y) for b, y, s in im if s == k] for im in images] for k in range(K)]
    check(report.coverage, [[(sum(b[y] for b, y in im), len(im)) for im in ims] for ims in of])
    check(report.set_size, [[(sum(sum(b) for b, _ in im), len(im)) for im in ims] for ims in of])


def test_selective_accuracy_is_that_of_plain_python() -> None:
    batch = guesses(5, 12, 3, 2)
    report = SelectiveAccuracy(C).update(*batch).compute()
    images = images_of(batch)
    kept = [[(p, y) for p, y in im if p != VOID] for im in images]
    right = [sum(p == y for p, y in im) for im in kept]
    pairs = [*zip(kept, images, strict=True)]
    check(report.kept, [[(len(k), len(im)) for k, im in pairs]])
    check(report.accuracy_of_kept, [[(r, len(k)) for r, k in zip(right, kept, strict=True)]])
    true = [[[(p, y) for p, y in im if y == c] for im in images] for c in range(C)]
    true_kept = [[[(p, y) for p, y in im if y == c] for im in kept] for c in range(C)]
    as_class = [[[(p, y) for p, y in im if p == c] for im in kept] for c in range(C)]

    def count(ims: list[list[list[Any]]]) -> list[list[int]]:
        return [[len(im) for im in of] for of in ims]

    def correct(ims: list[list[list[Any]]]) -> list[list[int]]:
        return [[sum(p == y for p, y in im) for im in of] for of in ims]

    def both(tops: list[list[int]], bottoms: list[list[int]]) -> list[list[tuple[int, int]]]:
        return [[*zip(a, b, strict=True)] for a, b in zip(tops, bottoms, strict=True)]

    check(report.kept_by_true_class, both(count(true_kept), count(true)))
    check(report.kept_as_class, both(count(as_class), [[len(im) for im in images]] * C))
    check(report.accuracy_by_true_class, both(correct(true_kept), count(true_kept)))
    check(report.accuracy_by_predicted_class, both(correct(as_class), count(as_class)))
    each = [r / len(k) for r, k in zip(right, kept, strict=True) if k]
    assert report.images.tolist() == pytest.approx(sorted(each))
    assert (report.worst_image, report.worst_tenth_of_images) == pytest.approx(worst(each))


def iou_parts(
    images: list[list[Any]], classes: int, *, missed: bool
) -> list[list[tuple[int, int]]]:
    """Intersection and union of each class in each image, by sets of pixels."""
    out: list[list[tuple[int, int]]] = [[] for _ in range(classes)]
    for image in images:
        seen = [(i, p, y) for i, (p, y) in enumerate(image) if missed or p != VOID]
        for c, parts in enumerate(out):
            predicted, true = {i for i, p, _ in seen if p == c}, {i for i, _, y in seen if y == c}
            parts.append((len(predicted & true), len(predicted | true)))
    return out


@pytest.mark.parametrize("abstained", ["missed", "ignored"])
def test_iou_is_that_of_sets_of_pixels(abstained: Any) -> None:
    # Class 3 is only predicted, class 4 never occurs, and class 2 not in every image.
    predictions, labels = guesses(8, 6, 2, 5)
    predictions[1, 0] = 3
    labels[2][labels[2] == 2] = VOID
    batch = predictions, labels
    report = MeanIoU(5, abstained=abstained).update(*batch).compute()
    images = images_of(batch)
    parts = iou_parts(images, 5, missed=abstained == "missed")
    check(report.classes, parts)
    pooled = [(sum(a for a, _ in ims), sum(b for _, b in ims)) for ims in parts]
    iou = [a / b if b else None for a, b in pooled]
    assert iou[4] is None
    assert iou[3] == 0
    seen = [v for v in iou if v is not None]
    assert report.mean_of_occurring_classes.value.item() == pytest.approx(sum(seen) / 4)
    assert report.mean_of_labeled_classes.value.item() == pytest.approx(sum(seen) / 3)
    assert report.mean_of_all_classes_absent_as_zero.value.item() == pytest.approx(sum(seen) / 5)
    each = [mean([a / b for a, b in column if b]) for column in zip(*parts, strict=True)]
    assert report.images.tolist() == pytest.approx(sorted(each))
    assert report.mean_of_images.value.item() == pytest.approx(mean(each))
    gone = [y for image in images for p, y in image if p == VOID]
    assert report.num_abstained.tolist() == [gone.count(c) for c in range(5)]


def test_the_interval_resamples_images() -> None:
    batch = sets_of(11, 8, 6)
    report = Coverage(C).update(*batch).compute(resamples=4000, confidence=0.8)
    each = report.images.tolist()
    generator = torch.Generator().manual_seed(99)
    means = sorted(
        mean([each[i] for i in torch.randint(8, (8,), generator=generator).tolist()])
        for _ in range(4000)
    )
    interval = report.overall.mean_of_images
    assert interval.low.item() == pytest.approx(means[400], abs=0.01)
    assert interval.high.item() == pytest.approx(means[3599], abs=0.01)
    # Pixels of one image say the same thing a thousand times: that must not narrow anything.
    again = Coverage(C).update(*(x.repeat_interleave(50, -1) for x in batch))
    assert flat(again.compute().overall.mean_of_images) == flat(
        Coverage(C).update(*batch).compute().overall.mean_of_images
    )


def test_the_seed_and_nothing_else_decides_the_interval() -> None:
    metric = Coverage(C).update(*sets_of(11, 8, 6))
    torch.manual_seed(1)
    one = flat(metric.compute(seed=1))
    torch.manual_seed(2)
    assert flat(metric.compute(seed=1)) == one
    assert flat(metric.compute(seed=2)) != one


def test_resampling_in_blocks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = Coverage(C).update(*sets_of(11, 8, 6))
    monkeypatch.setattr(_bootstrap, "BLOCK", 40)
    blocks = [*_bootstrap.Bootstrap(23, 0.9, 0).weights(8)]
    assert [len(block) for block in blocks] == [5, 5, 5, 5, 3]
    assert all(block.sum(1).tolist() == [8.0] * len(block) for block in blocks)
    assert metric.compute(resamples=23).overall.mean_of_images.low.isfinite()


def test_a_class_absent_from_some_resamples_has_an_interval_from_the_others() -> None:
    labels = torch.tensor([[0, 0], [0, 1], [0, 0]])
    sets = torch.ones(3, 2, 2, dtype=torch.bool)
    classes = Coverage(2).update(sets, labels).compute().classes
    assert classes.mean_of_images.low.tolist() == [1.0, 1.0]
    assert classes.mean_of_pixels.high.tolist() == [1.0, 1.0]


def test_one_image_has_no_interval() -> None:
    overall = Coverage(C).update(*sets_of(1, 1, 9)).compute().overall
    assert overall.mean_of_images.value.isfinite()
    assert overall.mean_of_images.low.isnan()
    assert overall.mean_of_pixels.high.isnan()


def test_counts_past_float32_are_exact() -> None:
    # A float32 counter stops at 2**24, and a float32 comparison would not see it.
    size = 2**24 + 1
    index = torch.zeros(1, 1, dtype=torch.int64).expand(1, size)
    every = torch.ones(1, 1, dtype=torch.bool).expand(1, size)
    counts = _pixels.tally(index, 2)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[2**24 + 1, 0]]
    labels = torch.zeros(1, 1, dtype=torch.uint8).expand(1, size)
    report = Coverage(2).update(every[None].expand(1, 2, size), labels).compute(resamples=1)
    assert int(report.overall.denominator) == int(report.overall.numerator) == size


def test_sums_of_large_counts_are_exact() -> None:
    rows = torch.tensor([[2**24, 2**30 + 1, 0], [1, 2, 0]])
    state = Coverage(1).state_dict()
    overall = Coverage.from_state_dict({**state, "rows": rows}).compute().overall
    assert int(overall.numerator) == 2**24 + 1
    assert int(overall.denominator) == 2**30 + 3
    assert overall.mean_of_pixels.value.item() == (2**24 + 1) / (2**30 + 3)


def test_more_than_255_classes_are_counted() -> None:
    sets = torch.ones(1, 300, 2, dtype=torch.bool)
    report = SetSize(300, ignore_index=-1).update(sets, torch.tensor([[299, -1]])).compute()
    assert report.mean_of_pixels == 300.0
    assert set_size_strata(sets, (255, 299)).tolist() == [[2, 2]]


def test_strata_by_size_boundary_and_object() -> None:
    sets = torch.tensor([[[True, False, True], [False, False, True]]])
    assert set_size_strata(sets, (0, 1)).tolist() == [[1, 0, 2]]
    labels = torch.tensor([[1, 1, 1, 1, 2, 255, 2]])
    assert boundary_strata(labels, (1, 2.5)).tolist()[0][:5] == [2, 2, 1, 0, 0]
    assert boundary_strata(labels, (1, 2.5), spacing=(2,)).tolist()[0][:5] == [2, 2, 2, 1, 1]
    assert object_size_strata(labels, (1, 3)).tolist()[0][:5] == [2, 2, 2, 2, 0]
    alone = torch.full((1, 3, 4), 7)
    assert boundary_strata(alone, (1, 2)).tolist() == [[[2] * 4] * 3]
    found = StratifiedCoverage(8, 3).update(
        torch.ones(1, 8, 3, 4, dtype=torch.bool), alone, object_size_strata(alone, (1, 12))
    )
    assert found.compute().coverage.denominator.tolist() == [0, 12, 0]


def test_reports_print_as_tables() -> None:
    text = Coverage(C).update(*sets_of(0, 4, 5)).compute().table(["road", "sky", "car"])
    assert text.splitlines()[0].split()[:2] == ["coverage", "mean_of_images"]
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["all", "road", "sky", "car"]
    assert "worst tenth" in text
    assert str(SetSize(C).update(*sets_of(0, 4, 5)).compute()).count("\n") == C + 3
    strata = StratifiedCoverage(C, K).update(*stratified(0, 4, 5)).compute()
    assert "above 4, up to 8" in strata.table(interval_names((2, 4, 8)))
    assert "kept as sky" in SelectiveAccuracy(C).compute().table(["road", "sky", "car"])
    assert "counted as missed" in str(MeanIoU(C).update(*guesses(0, 4, 5)).compute())
    with pytest.raises(InputError, match="class_names must hold 3 names; got 2"):
        Coverage(C).compute().table(["road", "sky"])
    with pytest.raises(InputError, match="stratum_names must hold 4 names; got 3"):
        strata.table(["a", "b", "c"])


SETS, LABELS = sets_of(0, 2, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Coverage(0), "num_classes must be an integer >= 1; got 0"),
        (lambda: SetSize(300), r"ignore_index must lie outside the classes \[0, 300\); got 255"),
        (lambda: StratifiedCoverage(C, 0), "num_strata must be an integer >= 1; got 0"),
        (lambda: MeanIoU(C, abstained="wrong"), "abstained must be 'missed' or 'ignored'; got"),  # type: ignore[arg-type]
        (lambda: Coverage(C).update(SETS.float(), LABELS), "sets must be a bool tensor; got"),
        (lambda: SetSize(4).update(SETS, LABELS), "sets must have C = 4 classes; got 3 in shape"),
        (lambda: Coverage(C).update(SETS, LABELS.mT), r"labels must have shape \(2, 4, 5\) to go"),
        (lambda: Coverage(C).update(SETS, LABELS.float()), "labels must be an integer tensor; got"),
        (lambda: Coverage(C).update(SETS[0, 0, 0], LABELS), r"sets must have shape \(B, C, \*S\)"),
        (
            lambda: StratifiedCoverage(C, K).update(SETS, LABELS, LABELS[0]),
            r"strata must have shape \(2, 4, 5\) to go with labels",
        ),
        (
            lambda: Coverage(C).update(SETS, LABELS.to("meta")),
            r"labels must be on the device of sets \(cpu\); got meta",
        ),
        (
            lambda: MeanIoU(C).update(LABELS.mT, LABELS),
            r"predictions must have shape \(2, 4, 5\) to go with labels",
        ),
        (
            lambda: SelectiveAccuracy(C).update(LABELS.bool(), LABELS),
            "predictions must be an integer tensor; got torch.bool",
        ),
        (lambda: MeanIoU(C).update(LABELS[0, 0, 0], LABELS[0, 0, 0]), r"labels must have shape"),
        (lambda: Coverage(C).merge(Coverage(4)), r"other must be a Coverage\(num_classes=3"),
        (lambda: Coverage(C).merge(SetSize(C)), "other must be a Coverage; got SetSize"),  # type: ignore[arg-type]
        (lambda: MeanIoU(C).merge(MeanIoU(C, abstained="ignored")), "other must be a MeanIoU"),
        (lambda: Coverage(C).compute(confidence=1.0), "confidence must lie strictly between"),
        (lambda: Coverage(C).compute(resamples=0), "resamples must be an integer >= 1; got 0"),
        (lambda: Coverage(C).compute(seed=-1), "seed must be an integer >= 0; got -1"),
        (lambda: Coverage.from_state_dict(SetSize(C).state_dict()), "state must be that of a"),
        (lambda: Coverage.from_state_dict({}), "state must be that of a Coverage; got None"),
        (
            lambda: Coverage.from_state_dict({**Coverage(C).state_dict(), "rows": LABELS}),
            "state must hold rows as an int64 tensor",
        ),
        (
            lambda: Coverage.from_state_dict(
                {**Coverage(C).state_dict(), "rows": LABELS[0].long()}
            ),
            "state must hold rows of 7 counts; got 5 per image",
        ),
        (lambda: set_size_strata(SETS, ()), "edges must be at least one ascending number; got"),
        (lambda: boundary_strata(LABELS, (2, 1)), "edges must be at least one ascending number"),
        (lambda: object_size_strata(LABELS, (math.nan,)), "edges must be at least one ascending"),
        (lambda: interval_names(()), "edges must be at least one ascending"),
    ],
)
def test_bad_input_gets_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def tagged(metric: Metric, batch: Batch, ids: list[int], places: list[int]) -> Metric:
    """The metric after an update with these entries of a batch, in this order."""
    return metric.update(*(x[places] for x in batch), unit_ids=[ids[i] for i in places])


@every_metric
@given(
    ids=st.lists(st.integers(-2, 2), min_size=7, max_size=7),
    cuts=st.lists(st.integers(0, 7), max_size=4),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=15, deadline=None)
def test_any_cut_of_tiles_gives_the_same_report(
    make: Callable[[], Metric],
    data: Callable[..., Batch],
    ids: list[int],
    cuts: list[int],
    order: Any,
) -> None:
    batch, places = data(1, 7, 5, 2), [*range(7)]
    whole = tagged(make(), batch, ids, places)
    order.shuffle(places)
    ends = [0, *sorted(cuts), 7]
    parts: list[Metric] = []
    for start, end in pairwise(ends):
        into = order.choice(parts) if parts and order.random() < 0.5 else make()
        parts = [*(p for p in parts if p is not into), into]
        tagged(into, batch, ids, places[start:end])
    order.shuffle(parts)
    merged = make()
    for part in parts:
        merged.merge(type(part).from_state_dict(part.state_dict()))
    assert flat([*merged.state_dict().values()]) == flat([*whole.state_dict().values()])
    assert report_of(merged) == report_of(whole)
    assert len(whole.state_dict()["rows"]) <= len(set(ids))


@every_metric
def test_tiles_of_a_unit_are_the_unit(
    make: Callable[[], Metric], data: Callable[..., Batch]
) -> None:
    batch = data(1, 6, 4, 3)
    joined = [x.view(2, 3, *x.shape[1:]).movedim(1, -1) for x in batch]  # tiles as one more axis
    found = make().update(*batch, unit_ids=[5, 5, 5, 9, 9, 9])
    assert report_of(found) == report_of(make().update(*joined))
    # Ids that all differ say what no ids say, whatever they are.
    some = torch.tensor([3, -1, 2**62, 8, 0, 7])
    assert report_of(make().update(*batch, unit_ids=some)) == report_of(make().update(*batch))
    again = type(found).from_state_dict(found.state_dict()).merge(found)
    assert len(again.state_dict()["rows"]) == 2
    assert again.state_dict()["unit_ids"].tolist() == [5, 9]
    assert torch.equal(again.state_dict()["rows"], 2 * found.state_dict()["rows"])


def test_weights_are_drawn_once_for_all_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    weights = _bootstrap.Bootstrap.weights

    def counted(self: _bootstrap.Bootstrap, n: int) -> Any:
        drawn.append(n)
        return weights(self, n)

    monkeypatch.setattr(_bootstrap.Bootstrap, "weights", counted)
    for make, data in METRICS:
        make().update(*data(0, 6, 5)).compute(resamples=3)
    assert drawn == [6] * len(METRICS)


STATE = Coverage(C).update(SETS, LABELS, unit_ids=[1, 2]).state_dict()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: 5, r"^unit_ids must be several integers, or a tensor of them; got 5$"),
        (lambda: [1], r"^unit_ids must have one id per batch entry, 2; got 1$"),
        (lambda: "ab", r"^unit_ids must be several integers, or a tensor of them; got 'ab'$"),
        (lambda: [True, 1], r"^unit_ids must be an integer; got True$"),
        (lambda: [0.5, 1], r"^unit_ids must be an integer; got 0.5$"),
        (lambda: [2**63, 1], r"^unit_ids must fit in int64; got 9223372036854775808$"),
        (lambda: torch.ones(2), r"^unit_ids must be an integer tensor; got torch.float32$"),
        (lambda: torch.ones(2, 1).long(), r"^unit_ids must have one axis and be on the CPU"),
    ],
)
@every_metric
def test_bad_ids_get_one_line_and_change_nothing(
    make: Callable[[], Metric], data: Callable[..., Batch], call: Any, message: str
) -> None:
    metric = make()
    with pytest.raises(InputError, match=message):
        metric.update(*data(0, 2, 3), unit_ids=call())
    assert report_of(metric) == report_of(make())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": None}, "state must hold rows as an int64 tensor of shape .* got NoneType"),
        ({"unit_ids": [1, 2]}, "state must hold unit_ids as an int64 tensor .* got list"),
        ({"unit_ids": torch.tensor([1, 1])}, "a row for each of its unit_ids, which differ"),
        ({"unit_ids": torch.tensor([1, 2, 3])}, "got 3 ids and 2 rows"),
        ({"num_classes": "x"}, "num_classes must be an integer >= 1; got 'x'"),
    ],
)
def test_a_damaged_state_gets_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Coverage.from_state_dict({**STATE, **change})
    for name in STATE:
        with pytest.raises(InputError, match="state must be that of a Coverage; got"):
            Coverage.from_state_dict({key: value for key, value in STATE.items() if key != name})
    with pytest.raises(InputError, match="state must be that of a Coverage; got int"):
        Coverage.from_state_dict(5)  # type: ignore[arg-type]


def test_numpy_integers_are_integers() -> None:
    classes: Any = np.int64(C)
    void: Any = np.uint8(VOID)
    ids: Any = np.array([4, 4])
    few: Any = np.int32(2)
    metric = Coverage(classes, void).update(SETS, LABELS, unit_ids=ids)
    assert repr(metric) == "Coverage(num_classes=3, ignore_index=255)"
    assert int(metric.compute(resamples=few).overall.num_images) == 1
    assert torch.load(saved(metric.state_dict()), weights_only=True)["num_classes"] == C


def saved(state: dict[str, object]) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_labels_of_unsigned_16_bits_get_one_line() -> None:
    with pytest.raises(
        InputError, match=r"^labels must be an integer tensor; got torch\.uint16\. "
    ):
        Coverage(C).update(SETS, LABELS.to(torch.uint16))
