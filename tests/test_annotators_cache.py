"""Cached logits: whole or refused, rounded once, and settled only where they hold enough."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpseg import (
    LAC,
    Argmax,
    AtMost,
    BackgroundPriority,
    Calibration,
    ClassConditionalCalibrator,
    LocationCalibrator,
    Singleton,
)
from cpseg.annotators.cache import CachedAnnotator, FilteredAgain
from cpseg.annotators.source import check_source
from cpseg.errors import FileError, InputError
from cpseg.filters import Top

CLASSES = 6


class Model:
    """Logits that are a function of the image; counts the images it sees."""

    source = "a model; prompts"

    def __init__(self, sharpness: float = 3.0) -> None:
        self.seen = 0
        self._sharpness = sharpness

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        x = images.double().sum(1)
        angles = torch.arange(1, CLASSES + 1, dtype=torch.float64)[:, None, None]
        return (torch.sin(x[:, None] * angles) * self._sharpness).float()


@dataclass(frozen=True)
class Calibrated:
    source: str | None


def images(count: int = 3, height: int = 5, width: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator).to(torch.uint8)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_second_call_reads_the_bits_of_the_first_and_runs_no_model(tmp_path: Path) -> None:
    model = Model()
    first = CachedAnnotator(tmp_path, model)(images())
    assert model.seen == 3
    again = CachedAnnotator(tmp_path, model)(images().flip(0)).flip(0)
    reader = CachedAnnotator(tmp_path)(images())
    assert model.seen == 3
    assert torch.equal(first, again)
    assert torch.equal(first, reader)
    exact = Model()(images()).log_softmax(1)
    assert bool(((first - exact).abs() <= 1e-3 * exact.abs() + 1e-6).all())


def test_near_certain_classes_do_not_tie(tmp_path: Path) -> None:
    def sure(batch: Tensor) -> Tensor:
        out = torch.zeros(len(batch), 2, 5, 7)
        out[:, 0] = torch.linspace(8, 22, 35).reshape(5, 7)
        return out

    logits = CachedAnnotator(tmp_path, sure, source="sure")(images(1))
    top = logits[0, 0].flatten().tolist()
    assert len(set(top)) == 35  # float16 logits would keep these too, float16 p not one
    assert top == sorted(top)


def test_calibration_and_prediction_must_share_source_and_rounding(tmp_path: Path) -> None:
    cache = CachedAnnotator(tmp_path, Model())
    cache.check(Calibrated(cache.source))
    for other in (Model.source, None, cache.source + "x"):
        with pytest.raises(InputError, match="calibration must come from the logits") as refusal:
            cache.check(Calibrated(other))
        assert "\n" not in str(refusal.value)
    compact = CachedAnnotator(tmp_path / "compact", Model(), best=2)
    assert compact.source != cache.source != Model.source


def test_a_folder_of_another_source_or_form_is_refused(tmp_path: Path) -> None:
    CachedAnnotator(tmp_path, Model())
    with pytest.raises(FileError, match="source is other prompts here and a model; prompts there"):
        CachedAnnotator(tmp_path, Model(), source="other prompts")
    form = "cache is float16, best 2, background None here and float16, all classes there"
    with pytest.raises(FileError, match=form):
        CachedAnnotator(tmp_path, Model(), best=2)
    with pytest.raises(FileError, match=form):
        CachedAnnotator(tmp_path, best=2)
    with pytest.raises(FileError, match=r"has no cache\.json"):
        CachedAnnotator(tmp_path / "empty")
    (tmp_path / "cache.json").write_text("[")
    with pytest.raises(FileError, match="it is damaged"):
        CachedAnnotator(tmp_path)
    with pytest.raises(InputError, match="source must say what the annotator is"):
        CachedAnnotator(tmp_path / "new", lambda x: x)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_is_refused_by_name_and_only_that_image_is_done_again(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    logits = CachedAnnotator(folder, Model())(images())
    before = files(folder)
    name = data.draw(st.sampled_from(sorted(n for n in before if n.endswith(".logits"))))
    content = bytearray(before[name])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(FileError, match=name):
        CachedAnnotator(folder)(images())
    model = Model()
    repaired = CachedAnnotator(folder, model)
    assert torch.equal(repaired(images()), logits)
    assert model.seen == 1
    assert repaired.refused == [str(folder / name)]
    assert files(folder) == before


def test_a_file_of_another_image_or_annotator_is_refused(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    CachedAnnotator(ours, Model())(images())
    CachedAnnotator(theirs, Model(), source="other")(images())
    name, other, *_ = sorted(n for n in files(ours) if n.endswith(".logits"))
    whole = (ours / name).read_bytes()
    (ours / name).write_bytes((ours / other).read_bytes())
    with pytest.raises(FileError, match="holds another's"):
        CachedAnnotator(ours)(images())
    (ours / name).write_bytes((theirs / name).read_bytes())
    with pytest.raises(FileError, match="source is a model; prompts here and other there"):
        CachedAnnotator(ours)(images())
    model = Model()
    again = CachedAnnotator(ours, model)
    again(images())
    assert model.seen == 1
    assert again.refused == [str(ours / name)]
    assert (ours / name).read_bytes() == whole
    with pytest.raises(FileError, match="there is no annotator to make it"):
        CachedAnnotator(ours)(images(1, seed=5))


def test_leftovers_of_a_dead_process_go_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    CachedAnnotator(tmp_path, Model())(images())
    host = socket.gethostname()
    dead = tmp_path / f"x.logits~{host}~{2**22 + 1}~.part"  # beyond Linux's highest process id
    living = tmp_path / f"x.logits~{host}~{os.getpid()}~.part"
    elsewhere = tmp_path / "x.logits~another-host~1~.part"
    foreign = tmp_path / "download.part"
    for path in (dead, living, elsewhere, foreign):
        path.write_bytes(b"half")
    CachedAnnotator(tmp_path, Model())
    assert [p.exists() for p in (dead, living, elsewhere, foreign)] == [False, True, True, True]


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CachedAnnotator(tmp_path, Model())

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache(images())
    assert list(files(tmp_path)) == ["cache.json"]
    assert json.loads((tmp_path / "cache.json").read_text())["source"] == Model.source


# The compact form


def test_the_compact_form_holds_the_best_classes_and_the_background(tmp_path: Path) -> None:
    full = CachedAnnotator(tmp_path / "full", Model())(images())
    compact = CachedAnnotator(tmp_path / "compact", Model(), best=2, background=3)(images())
    for b, y, x in ((0, 0, 0), (2, 4, 6), (1, 3, 2)):
        row = full[b, :, y, x].tolist()
        best = sorted((c for c in range(CLASSES) if c != 3), key=lambda c: -row[c])[:2]
        answer = compact[b, :, y, x]
        kept = [*best, 3]
        assert [float(answer[c]) for c in kept] == [row[c] for c in kept]
        rest = 1 - sum(float(answer[c].double().exp()) for c in kept)
        for c in set(range(CLASSES)) - set(kept):
            assert float(answer[c].exp()) == pytest.approx(rest / 3, rel=1e-4, abs=1e-7)


def lac_filter(thresholds: Tensor, background: int) -> Any:
    """The best foreground class of a LAC set, else background if in the set, else 255."""

    def apply(logits: Tensor) -> Tensor:
        shares = logits.double().softmax(1)
        column = thresholds.reshape(1, -1, *[1] * (logits.ndim - 2))
        inside = 1 - shares <= column
        fore = torch.where(inside, shares, -1.0)
        fore[:, background] = -1.0
        value, label = fore.max(1)
        empty = torch.where(inside[:, background], background, 255)
        return torch.where(value >= 0, label, empty)

    return apply


@settings(max_examples=40, deadline=None)
@given(
    best=st.integers(1, CLASSES - 1),
    seed=st.integers(0, 99),
    thresholds=st.lists(st.floats(0.3, 1.0), min_size=CLASSES, max_size=CLASSES),
)
@example(best=1, seed=0, thresholds=[0.5, 1.0, 0.5, 0.5, 0.9375, 0.5])
def test_a_label_of_the_compact_form_is_that_of_the_full_one_or_abstains(
    tmp_path_factory: pytest.TempPathFactory, best: int, seed: int, thresholds: list[float]
) -> None:
    batch = images(2, 4, 5, seed)
    levels = torch.tensor(thresholds, dtype=torch.float64)
    chosen = lac_filter(levels, background=1)
    folder = tmp_path_factory.mktemp("cache")
    model = Model(sharpness=2.0)
    full = CachedAnnotator(folder / "full", model)(batch).double().softmax(1)
    cache = CachedAnnotator(folder / "compact", model, best=best, background=1)
    found = cache.filter_again(batch, chosen)
    # The two forms round differently: a score beside its threshold is no evidence.
    clear = (1 - full - levels.reshape(1, -1, 1, 1)).abs().amin(1) > 2e-3
    differs = (found.labels != chosen(full.log())) & clear
    assert bool((found.labels[differs] == 255).all())
    assert int(differs.sum()) <= found.unsettled
    if best == CLASSES - 1:
        assert found.unsettled == 0


def lac(thresholds: list[float], source: str) -> Calibration:
    """LAC's thresholds for each class as they stand."""
    batch = torch.zeros(4, CLASSES, 2)
    calibrator = ClassConditionalCalibrator(CLASSES, source=source)
    calibrator.update(batch, torch.zeros(4, 2).long())
    frozen = calibrator.compute(alpha=0.4)
    object.__setattr__(frozen, "thresholds", torch.tensor(thresholds))
    return frozen


def at_most(thresholds: list[float], k: int, source: str) -> AtMost:
    return AtMost(lac(thresholds, source), k)


RULES: list[Callable[[Calibration], Callable[[Tensor], Tensor]]] = [
    Argmax,
    Top,
    Singleton,
    BackgroundPriority,
    lambda calibration: BackgroundPriority(calibration, background=1),
    lambda calibration: AtMost(calibration, k=2),
    lambda calibration: AtMost(calibration, k=3),
]


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    best=st.integers(1, CLASSES - 2),
    background=st.sampled_from([None, 1]),
    look=st.tuples(st.integers(0, 99), st.sampled_from([0.2, 0.7, 2.0])),
    thresholds=st.lists(
        st.sampled_from([0.3, 0.55, 0.8, 0.85, 0.9, 0.97, float("inf")]),
        min_size=CLASSES,
        max_size=CLASSES,
    ),
)
def test_every_filter_of_ours_says_on_a_compact_cache_what_it_says_on_all_classes(
    *,
    rule: Callable[[Calibration], Callable[[Tensor], Tensor]],
    best: int,
    background: int | None,
    look: tuple[int, float],
    thresholds: list[float],
) -> None:
    seed, sharpness = look
    batch, model = images(1, 4, 5, seed), Model(sharpness)
    with tempfile.TemporaryDirectory() as folder:
        whole = CachedAnnotator(f"{folder}/full", model)(batch)
        compact = f"{folder}/compact"
        cache = CachedAnnotator(compact, model, best=best, background=background)
        keep = rule(lac(thresholds, cache.source))
        found = cache.filter_again(batch, keep)
    # The two forms round differently: a score beside its threshold is no evidence.
    limit = torch.tensor(thresholds).reshape(1, -1, 1, 1)
    clear = ((LAC()(whole) - limit).abs() > 2e-3).all(1)
    differs = (found.labels != keep(whole)) & clear
    assert bool((found.labels[differs] == 255).all())
    assert int(differs.sum()) <= found.unsettled


@settings(max_examples=40, deadline=None)
@given(
    best=st.integers(1, CLASSES - 2),
    k=st.integers(1, CLASSES),
    background=st.sampled_from([None, 1]),
    look=st.tuples(st.integers(0, 99), st.sampled_from([0.2, 0.7, 2.0])),
    thresholds=st.lists(
        st.sampled_from([0.55, 0.8, 0.85, 0.9, 0.97, float("inf")]),
        min_size=CLASSES,
        max_size=CLASSES,
    ),
)
@example(
    best=3,
    k=1,
    background=1,
    look=(64, 0.2),
    thresholds=[0.55, 0.55, 0.55, 0.9, float("inf"), float("inf")],
)
def test_a_filter_that_counts_is_exact_on_what_the_compact_form_settles(
    *, best: int, k: int, background: int | None, look: tuple[int, float], thresholds: list[float]
) -> None:
    seed, sharpness = look
    batch = images(1, 4, 5, seed)
    model = Model(sharpness)
    with tempfile.TemporaryDirectory() as folder:
        whole = CachedAnnotator(f"{folder}/full", model)(batch)
        compact = f"{folder}/compact"
        cache = CachedAnnotator(compact, model, best=best, background=background)
        counts = at_most(thresholds, k, cache.source)
        found = cache.filter_again(batch, counts)
    answer = counts(whole)
    # The two forms round differently: a score beside its threshold is no evidence.
    limit = torch.tensor(thresholds).reshape(1, -1, 1, 1)
    clear = ((LAC()(whole) - limit).abs() > 2e-3).all(1)
    differs = (found.labels != answer) & clear
    assert bool((found.labels[differs] == 255).all())
    assert int(differs.sum()) <= found.unsettled
    # What fills the set already, and what nothing else can enter, needs no more than is stored.
    shares = whole[0].double().exp()
    for y in range(4):
        for x in range(5):
            settled_for_sure = settles(shares[:, y, x].tolist(), thresholds, best, background, k)
            if settled_for_sure and clear[0, y, x]:
                assert found.labels[0, y, x] == answer[0, y, x], (y, x)


def settles(
    shares: list[float], thresholds: list[float], best: int, background: int | None, k: int
) -> bool:
    """Whether the stored classes alone decide what a filter of at most k classes says."""
    order = sorted((c for c in range(CLASSES) if c != background), key=lambda c: -shares[c])
    stored = order[:best] + ([] if background is None else [background])
    inside = [c for c in stored if 1 - shares[c] <= thresholds[c] < float("inf")]
    if len(inside) > k + 1e-9:
        return True
    rest = 1 - sum(shares[c] for c in stored)
    most = min(rest, shares[order[best - 1]])
    others = [c for c in range(CLASSES) if c not in stored and thresholds[c] < float("inf")]
    return all(1 - thresholds[c] > most + 5e-3 for c in others) and shares[order[0]] > most + 5e-3


def test_several_absent_classes_that_fit_together_are_counted_together(tmp_path: Path) -> None:
    """Each alone leaves the set small enough, two of them at once do not."""

    def flat(batch: Tensor) -> Tensor:
        shares = torch.tensor([0.55, 0.15, 0.15, 0.15, 1e-6, 1e-6])
        return shares.log()[None, :, None, None].expand(len(batch), -1, 5, 7)

    cache = CachedAnnotator(tmp_path, flat, source="flat", best=1)

    def again(thresholds: list[float], k: int) -> FilteredAgain:
        return cache.filter_again(images(1), at_most(thresholds, k, cache.source))

    crowded = again([0.6, 0.86, 0.86, 0.9, 0.0, 0.0], 2)
    assert crowded.unsettled == 35  # 0.14 each of the 0.45 that is left: three fit at once
    roomy = again([0.6, 0.7, 0.7, 0.7, 0.0, 0.0], 2)
    assert roomy.unsettled == 0  # 0.3 each: one fits
    assert bool((roomy.labels == 0).all())
    # Enough room for all: who is in the set changes nothing.
    assert again([0.6] + [0.86] * 5, 6).unsettled == 0
    starved = [0.6, float("inf"), float("inf"), float("inf"), 0.0, 0.0]
    assert again(starved, 1).unsettled == 0  # never counted


def test_a_filter_with_one_threshold_per_place_reads_a_compact_cache(tmp_path: Path) -> None:
    cache = CachedAnnotator(tmp_path, Model(), best=3)
    batch = images(12)
    calibrator = LocationCalibrator(shape=(5, 7), source=cache.source)
    calibration = calibrator.update(cache(batch), cache(batch).argmax(1)).compute(alpha=0.2)
    found = cache.filter_again(batch, Argmax(calibration))
    assert found.labels.shape == (12, 5, 7)


def test_abstention_is_the_calibrations_own_mark(tmp_path: Path) -> None:
    def flat(batch: Tensor) -> Tensor:
        return torch.zeros(len(batch), CLASSES, 5, 7)

    cache = CachedAnnotator(tmp_path, flat, source="flat", best=1)
    counts = at_most([0.9] * CLASSES, 1, cache.source)
    object.__setattr__(counts.calibration, "ignore_index", -1)
    found = cache.filter_again(images(1), counts)
    assert found.unsettled == 35
    assert set(found.labels.flatten().tolist()) == {-1}


def test_a_form_or_folder_that_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    attempts: list[tuple[dict[str, Any], str, Any]] = [
        ({"best": 2, "background": -1}, "background must be an integer >= 0; got -1", InputError),
        ({"best": 2, "background": 0.0}, "background must be an integer >= 0; got 0.0", InputError),
        ({"best": 0}, "best must be an integer >= 1", InputError),
        ({"background": 0}, "background must come with best=", InputError),
    ]
    for options, message, kind in attempts:
        with pytest.raises(kind, match=message) as refusal:
            CachedAnnotator(tmp_path / "cache", Model(), **options)
        assert "\n" not in str(refusal.value)
    with pytest.raises(FileError, match="must be a folder; it is a file"):
        CachedAnnotator(tmp_path / "file", Model())
    with pytest.raises(FileError, match="must be a folder; it is a file"):
        CachedAnnotator(tmp_path / "file")
    for best, background in ((99, None), (1, CLASSES)):
        folder = tmp_path / f"best {best}"
        cache = CachedAnnotator(folder, Model(), best=best, background=background)
        with pytest.raises(FileError, match=f"at most the annotator's {CLASSES} classes"):
            cache(images(1))
    full = CachedAnnotator(tmp_path / "all", Model(), best=CLASSES - 1, background=0)
    assert full(images(1)).shape == (1, CLASSES, 5, 7)
    with pytest.raises(InputError, match="at least one image and pixel"):
        full(images(0))


READER = """
import hashlib, sys, torch
torch.set_num_threads(1)
from cpseg.annotators.cache import CachedAnnotator
batch = torch.arange(20 * 3 * 5 * 7).reshape(20, 3, 5, 7).to(torch.uint8)
there, missing = batch[:4], batch[4:]
annotator = torch.Tensor.float if sys.argv[2] == "writes" else None
cache = CachedAnnotator(sys.argv[1], annotator, source="x")
first = cache(there)
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[2] == "writes":
    cache(missing)
for _ in range(20):
    assert torch.equal(cache(there.flip(0)).flip(0), first)
print(hashlib.sha256(first.numpy().tobytes()).hexdigest())
"""


@pytest.mark.dist
def test_many_processes_read_while_others_write(tmp_path: Path) -> None:
    batch = torch.arange(20 * 3 * 5 * 7).reshape(20, 3, 5, 7).to(torch.uint8)
    first = CachedAnnotator(tmp_path, torch.Tensor.float, source="x")(batch[:4])
    command = [sys.executable, "-c", READER, str(tmp_path)]
    running = [
        subprocess.Popen(  # noqa: S603  (our own script)
            [*command, role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for role in ("reads", "writes", "writes")
    ]
    for process in running:  # all have begun before one goes on
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate()[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert set(answers) == {hashlib.sha256(first.numpy().tobytes()).hexdigest()}
    assert not list(tmp_path.rglob("*.part"))
    whole = CachedAnnotator(tmp_path)(batch)
    assert torch.equal(
        whole, CachedAnnotator(tmp_path / "alone", torch.Tensor.float, source="x")(batch)
    )


def test_a_class_that_is_not_stored_but_could_be_in_the_set_abstains(tmp_path: Path) -> None:
    def flat(batch: Tensor) -> Tensor:
        shares = torch.tensor([0.5, 0.25, 0.15, 0.10]).log()
        return shares[None, :, None, None].expand(len(batch), -1, 5, 7)

    cache = CachedAnnotator(tmp_path, flat, source="flat", best=1, background=0)
    loose_for_the_third = torch.tensor([0.6, 0.1, 0.86, 0.1], dtype=torch.float64)
    found = cache.filter_again(images(1), lac_filter(loose_for_the_third, 0))
    assert found.unsettled == 35
    assert bool((found.labels == 255).all())
    tight = torch.tensor([0.6, 0.1, 0.7, 0.7], dtype=torch.float64)
    found = cache.filter_again(images(1), lac_filter(tight, 0))
    assert found.unsettled == 0
    assert bool((found.labels == 0).all())


def test_a_calibration_made_through_the_cache_serves_it_and_no_other_road(tmp_path: Path) -> None:
    cache = CachedAnnotator(tmp_path, Model())
    batch = images(12)
    labels = Model()(batch).argmax(1)
    calibrator = ClassConditionalCalibrator(num_classes=CLASSES, source=cache.source)
    calibration = calibrator.update(cache(batch), labels).compute(alpha=0.5)
    cache.check(calibration)
    with pytest.raises(InputError, match="calibration must come from"):
        CachedAnnotator(tmp_path / "compact", Model(), best=3, background=0).check(calibration)
    compact = CachedAnnotator(tmp_path / "compact", Model(), best=3, background=0)
    assert cache.filter_again(batch, Argmax(calibration)).unsettled == 0
    with pytest.raises(InputError, match="best 3, background 0 here and float16, all classes"):
        compact.filter_again(batch, Argmax(calibration))
    object.__setattr__(calibration, "source", None)
    with pytest.raises(InputError, match="it names no source"):
        cache.filter_again(batch, Argmax(calibration))
    object.__setattr__(calibration, "source", compact.source)
    found = compact.filter_again(batch, BackgroundPriority(calibration, background=0))
    whole = BackgroundPriority(calibration, background=0)(cache(batch))
    assert found.labels.dtype == whole.dtype
    # The two forms round differently: a score beside its threshold is no evidence.
    gap = LAC()(cache(batch)) - calibration.thresholds.reshape(1, -1, 1, 1)
    differs = (found.labels != whole) & (gap.abs() > 2e-3).all(1)
    assert bool((found.labels[differs] == 255).all())
    assert int(differs.sum()) <= found.unsettled


def test_a_live_annotator_refuses_what_was_made_through_its_cache_and_the_other_way_round(
    tmp_path: Path,
) -> None:
    live = Model()
    cache = CachedAnnotator(tmp_path, live)
    for here, there in ((live, cache), (cache, live)):
        calibrator = ClassConditionalCalibrator(num_classes=CLASSES, source=here.source)
        calibration = calibrator.update(here(images()), here(images()).argmax(1)).compute(alpha=0.5)
        for thresholds in (calibrator, calibration):
            check_source(here, thresholds)
            with pytest.raises(InputError, match=r"cache is .* here and .* there\. Calibrate on"):
                check_source(there, thresholds)
    with pytest.raises(InputError, match="it names no source"):
        check_source(live, ClassConditionalCalibrator(num_classes=CLASSES))
    with pytest.raises(InputError, match="it is None"):
        check_source(Calibrated(None), Calibrated(None))
    with pytest.raises(InputError, match=r"calibration must have a \.source; got Argmax"):
        check_source(live, Argmax(calibration))  # type: ignore[arg-type]


def test_what_is_no_cache_no_annotator_and_no_filter_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder must be a path; got NoneType"):
        CachedAnnotator(None, Model())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="annotator must be a function of images; got str"):
        CachedAnnotator(tmp_path, "seem.pt", source="seem")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    cache = CachedAnnotator(tmp_path, Model())
    with pytest.raises(InputError, match="mask_filter must be a filter; got NoneType"):
        cache.filter_again(images(1), None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"calibration must have a \.source; got str"):
        cache.check("calibration.pt")  # type: ignore[arg-type]


def test_no_class_that_is_left_out_becomes_the_best_where_all_are_alike(tmp_path: Path) -> None:
    def even(batch: Tensor) -> Tensor:
        return torch.zeros(len(batch), CLASSES, *batch.shape[2:])

    for background in (None, 1):
        cache = CachedAnnotator(
            tmp_path / str(background), even, source="even", best=2, background=background
        )
        batch = images(1, 2, 3, seed=0)
        assert bool((cache(batch).argmax(1) == 0).all())
        stored = 2 + (background is not None)
        ranked = cache(batch).sort(dim=1, descending=True).values
        assert bool((ranked[:, stored - 1] > ranked[:, stored]).all())
