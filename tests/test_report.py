"""The report says what was measured, names what to worry about, and is one file."""

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpseg import (
    Argmax,
    Calibration,
    ClassConditionalCalibrator,
    GroupCalibrator,
    PixelSetPredictor,
    Singleton,
    SplitCalibrator,
)
from cpseg.errors import InputError
from cpseg.metrics import Coverage, SelectiveAccuracy
from cpseg.report import Entry, Findings, Observations, levels_table, measure, page
from cpseg.risk import KeptError, RiskCalibrator

pytest.importorskip("matplotlib")

C = 3
NAMES = ["road", "<script>alert(1)</script>", 'car "&"']


def entries(
    count: int, seed: int, size: tuple[int, ...] = (8, 9), *, last: bool = True
) -> list[Entry]:
    """Logits that are mostly right; class 2 in every fourth image, if at all."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Entry] = []
    for index in range(count):
        labels = torch.randint(2, size, generator=generator)
        if last and index % 4 == 0:
            labels[torch.rand(size, generator=generator) < 0.3] = 2
        logits = torch.randn(C, *size, generator=generator)
        logits += 2.0 * torch.nn.functional.one_hot(labels, C).movedim(-1, 0)
        labels[torch.rand(size, generator=generator) < 0.1] = 255
        image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
        found.append(Entry(f"im<{index}>", logits, labels, image if len(size) == 2 else None))
    return found


def seen(calibrator: Any, images: Sequence[Entry]) -> Any:
    for entry in images:
        calibrator.update(entry.logits[None], entry.labels[None])
    return calibrator


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    found: Calibration = seen(ClassConditionalCalibrator(C), entries(24, seed=0)).compute(0.1)
    return found


@pytest.fixture(scope="module")
def findings(calibration: Calibration) -> Findings:
    return measure(calibration, entries(9, seed=1), Singleton(calibration), class_names=NAMES)


@pytest.fixture(scope="module")
def text(findings: Findings) -> str:
    return page(findings, title="<c>.json", command="python -m cpseg report '<c>'", version="1&2")


def worry(found: Findings, name: str) -> str:
    (told,) = [worry for worry in found.worries if worry.name == name]
    return f"{told.why} {told.remedy}"


class Page(HTMLParser):
    """Which elements there are, that they close, and the words between them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_one_file_that_loads_nothing_and_runs_nothing(text: str) -> None:
    found = Page(text)
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "link", "iframe", "object", "a", "base", "form"}
    for tag, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes)
        if "src" in attributes:
            assert tag == "img"
            assert str(attributes["src"]).startswith("data:image/png;base64,")
            assert attributes["alt"]
    assert not re.search(r"https?:|url\(|@import", text)
    assert "@media print" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        found.elements
    )


def test_no_section_is_missing_and_each_says_something(text: str) -> None:
    sections = re.findall(r"<section><h2>(.*?)</h2>\n(.*?)\n</section>", text, re.DOTALL)
    assert [name for name, _ in sections] == [
        "What is promised",
        "What happened on these images",
        "Classes",
        "Classes to worry about",
        "What to do",
        "Figures",
        "The worst images",
        "How this was made",
    ]
    assert all(re.search(r"<(p|table|ul|figure|pre)", body) for _, body in sections)
    drawn = {name: body.count("<img") for name, body in sections}
    assert (drawn["Figures"], drawn["The worst images"]) == (5, 3)


def test_words_of_users_are_escaped_everywhere(text: str) -> None:
    assert "<script" not in text
    assert "im<" not in text
    words = " ".join(Page(text).words)
    for own in (*NAMES, "<c>.json", "python -m cpseg report '<c>'", "cpseg 1&2", "im<0>"):
        assert own in words
    assert 'data-label="right of kept"' in text


def test_the_numbers_are_those_of_the_metrics(calibration: Calibration, findings: Findings) -> None:
    predictor, keep = PixelSetPredictor(calibration), Singleton(calibration)
    coverage, kept = Coverage(C), SelectiveAccuracy(C)
    each: dict[str, float] = {}
    for entry in entries(9, seed=1):
        sets, labels = predictor(entry.logits[None]), entry.labels[None]
        coverage.update(sets, labels)
        kept.update(keep(entry.logits[None]), labels)
        hits = [
            bool(sets[0, label, y, x])
            for y, row in enumerate(entry.labels.tolist())
            for x, label in enumerate(row)
            if label != 255
        ]
        each[entry.name] = sum(hits) / len(hits)
    assert findings.coverage is not None
    assert findings.coverage.mean_of_images == coverage.compute().mean_of_images
    ours, theirs = findings.kept.accuracy_of_kept, kept.compute().accuracy_of_kept
    assert ours.mean_of_pixels.value.item() == theirs.mean_of_pixels.value.item()
    assert [image.coverage for image in findings.images] == pytest.approx(sorted(each.values()))
    assert {image.name: pytest.approx(image.coverage) for image in findings.images} == each
    assert [image.name for image, _ in findings.shown] == [i.name for i in findings.images[:3]]


def test_the_page_tells_the_guarantee_and_the_table(
    calibration: Calibration, findings: Findings, text: str
) -> None:
    words = " ".join(" ".join(Page(text).words).split())
    assert calibration.guarantee.event in words
    for sentence in (*calibration.guarantee.assumptions, *calibration.guarantee.exceptions):
        assert sentence in words
    assert f"{float(calibration.thresholds[0]):.4f}" in words
    assert "90.0%" in words
    assert findings.coverage is not None
    assert f"{findings.coverage.worst_image:.1%}" in words


def test_the_same_findings_give_the_same_file(calibration: Calibration, text: str) -> None:
    again = measure(calibration, entries(9, seed=1), Singleton(calibration), class_names=NAMES)
    command = "python -m cpseg report '<c>'"
    assert page(again, title="<c>.json", command=command, version="1&2") == text


def test_a_class_without_a_threshold_says_how_many_images_it_needs(findings: Findings) -> None:
    told = worry(findings, NAMES[2])  # in 6 of 24 images, and alpha .1 needs 9; here in 3 of 9
    assert "No threshold: it is in 6 calibration images, and this alpha needs 9." in told
    assert "Label 3 more images that contain it; 3 of 9 here do, so about 9 in all." in told
    assert "Or a fallback, which gives up its promise" in told


def test_a_fallback_is_told_to_promise_nothing() -> None:
    calibrator = seen(ClassConditionalCalibrator(C), entries(24, seed=0))
    pooled = calibrator.compute(0.1, fallback="pooled")
    other = entries(9, seed=1)
    for entry in other:
        entry.logits[2] -= 6.0
    found = measure(pooled, other, Singleton(pooled), class_names=NAMES, worst=0)
    assert found.coverage is not None
    assert float(found.coverage.classes.mean_of_images.high[2]) < 0.9
    assert "promised 90" not in worry(found, NAMES[2])
    assert 'the fallback "pooled", and nothing is promised' in worry(found, NAMES[2])
    text = page(found, title="c", command="c", version="1")
    words = " ".join(" ".join(Page(text).words).split())
    assert 'The fallback "pooled" stands in for some classes.' in words
    assert "(pooled)" in words


def test_a_class_that_is_covered_too_little_is_told(calibration: Calibration) -> None:
    other = entries(9, seed=2)
    for entry in other:
        entry.logits[0] -= 4.0
    found = measure(calibration, other, Argmax(calibration), class_names=NAMES, worst=0)
    told = worry(found, NAMES[0])
    assert "its interval lies below the promised 90.0%" in told
    assert "calibrate on images like these" in told


def test_a_class_that_is_not_here_was_not_tested(calibration: Calibration) -> None:
    found = measure(
        calibration,
        entries(5, seed=1, last=False),
        Singleton(calibration),
        class_names=NAMES,
        worst=0,
    )
    assert "It is in none of these images" in worry(found, NAMES[2])


def test_images_that_calibrated_are_noticed(calibration: Calibration, findings: Findings) -> None:
    same = measure(
        calibration, entries(24, seed=0), Singleton(calibration), class_names=NAMES, worst=0
    )
    assert (same.same_data, findings.same_data) == (True, False)
    text = page(same, title="c", command="c", version="1")
    assert "These seem to be the very images that calibrated" in text
    split = seen(SplitCalibrator(), entries(12, seed=0)).compute(0.1)
    for count, wanted in ((12, True), (11, False)):
        found = measure(split, entries(count, seed=0), Singleton(split), class_names=NAMES, worst=0)
        assert found.same_data is wanted


def test_one_threshold_promises_about_images_and_not_about_classes() -> None:
    calibrator = seen(SplitCalibrator(), entries(24, seed=0))
    split = calibrator.compute(0.1)
    other = entries(9, seed=2)
    for entry in other:
        entry.logits.mul_(-1.0)
    found = measure(split, other, Argmax(split), class_names=NAMES, worst=0)
    assert not any("promised" in told.why for told in found.worries)
    text = page(found, title="c", command="c", version="1")
    assert "Coverage lies below the promise, interval and all" in text
    assert '<th scope="row">promised</th>' in text.replace("scope=row", 'scope="row"')


def test_a_certified_filter_has_no_sets_and_its_point_is_marked() -> None:
    control = seen(RiskCalibrator(KeptError(Argmax, C)), entries(60, seed=0)).compute(0.3, 0.2)
    found = measure(control, entries(9, seed=1), Argmax(control), class_names=NAMES)
    assert found.coverage is None
    assert found.levels is None
    assert found.shown == []
    text = page(found, title="c", command="c", version="1")
    assert "covered" not in re.findall(r"<th scope=col>(.*?)</th>", text)
    assert "E[wrong] / E[kept] is at most 0.3" in text


def test_volumes_are_reported_without_pictures() -> None:
    calibrator = seen(SplitCalibrator(), entries(12, seed=0, size=(3, 4, 5)))
    split = calibrator.compute(0.2)
    found = measure(split, entries(4, seed=1, size=(3, 4, 5)), Singleton(split), class_names=NAMES)
    assert found.shown == []
    assert len(found.images) == 4
    assert "im&lt;0&gt;" in page(found, title="c", command="c", version="1")


def test_levels_are_those_of_the_calibrator_and_of_a_loop() -> None:
    images = entries(12, seed=0)
    calibrator = seen(SplitCalibrator(), images)
    batches = [(entry.logits[None], entry.labels[None]) for entry in images[:2]]
    alphas, thresholds, sizes = levels_table(calibrator, batches, [0.1, 0.3])
    assert alphas == [0.1, 0.3]
    for row, alpha, size in zip(thresholds, alphas, sizes, strict=True):
        calibration = calibrator.compute(alpha)
        assert row.tolist() == calibration.thresholds.tolist()
        means = [mean_size(PixelSetPredictor(calibration), entry) for entry in images[:2]]
        assert size == pytest.approx(sum(means) / 2)
    assert levels_table(calibrator, [], [0.1])[2] != levels_table(calibrator, batches, [0.1])[2]


def mean_size(predictor: PixelSetPredictor, entry: Entry) -> float:
    sets: Tensor = predictor(entry.logits[None])[0]
    counted = [
        int(sets[:, y, x].sum())
        for y, row in enumerate(entry.labels.tolist())
        for x, label in enumerate(row)
        if label != 255
    ]
    return sum(counted) / len(counted)


def test_what_cannot_be_reported_is_refused(calibration: Calibration) -> None:
    with pytest.raises(InputError, match="entries must hold at least one labeled image"):
        measure(calibration, [], Singleton(calibration), class_names=NAMES)
    grouped = GroupCalibrator(2).compute(0.1)
    with pytest.raises(InputError, match="must have no groups"):
        measure(grouped, entries(1, seed=0), Singleton(grouped), class_names=NAMES)


@settings(max_examples=15, deadline=None)
@given(share=st.lists(st.integers(0, 2), min_size=9, max_size=9), first=st.permutations(range(3)))
def test_any_cut_and_order_of_merges_gives_the_same_findings(
    share: list[int], first: list[int]
) -> None:
    split = seen(SplitCalibrator(), entries(24, seed=0)).compute(0.1)
    images = entries(9, seed=1)
    whole = measure(split, images, Singleton(split), class_names=NAMES, worst=0)
    parts = [Observations(split, Singleton(split), NAMES) for _ in range(3)]
    for index, part in reversed(list(enumerate(share))):
        parts[part].update(index, images[index])
    one, two, three = (parts[place] for place in first)
    found = one.merge(two).merge(three).compute(images, worst=0)
    assert found.images == whole.images
    for name in ("coverage", "sizes", "raw", "kept"):
        assert str(getattr(found, name)) == str(getattr(whole, name))
    assert found.coverage is not None
    assert found.confidence.pixels.tolist() == whole.confidence.pixels.tolist()
    assert found.confidence.right.tolist() == whole.confidence.right.tolist()
    assert found.worries == whole.worries
    assert found.levels is not None
    assert whole.levels is not None
    assert torch.equal(found.levels[1], whole.levels[1])
    assert found.levels[2] == whole.levels[2]


def test_an_image_is_seen_once_and_all_are_seen(calibration: Calibration) -> None:
    images = entries(3, seed=1)
    one = Observations(calibration, Singleton(calibration), NAMES).update(0, images[0])
    with pytest.raises(InputError, match="index must be new for each image; got 0 twice"):
        one.update(0, images[1])
    other = Observations(calibration, Singleton(calibration), NAMES).update(0, images[1])
    with pytest.raises(InputError, match="got 0 twice"):
        one.merge(other)
    with pytest.raises(InputError, match="worst must be an integer >= 0; got -1"):
        one.compute(images[:1], worst=-1)
    with pytest.raises(InputError, match="entries must be the images that were seen, 1; got 3"):
        one.compute(images)


def test_pseudo_labels_of_an_entry_are_what_was_kept(calibration: Calibration) -> None:
    images = entries(4, seed=1)
    nothing = [
        Entry(e.name, e.logits, e.labels, e.image, torch.full_like(e.labels, 255)) for e in images
    ]
    found = measure(calibration, nothing, Singleton(calibration), class_names=NAMES, worst=1)
    assert float(found.kept.kept.mean_of_pixels.value) == 0
    ((_, figure),) = found.shown
    assert "pseudo-labels, 0% kept" in [axes.get_title() for axes in figure.axes]
