"""Cached logits: whole or refused, rounded once, and settled only where they hold enough."""

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpseg import LAC, BackgroundPriority, ClassConditionalCalibrator
from cpseg.annotators.cache import CachedAnnotator
from cpseg.errors import FileError, InputError

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
    with pytest.raises(FileError, match="it holds those of"):
        CachedAnnotator(tmp_path, Model(), source="other prompts")
    with pytest.raises(FileError, match="it holds those of"):
        CachedAnnotator(tmp_path, Model(), best=2)
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
    with pytest.raises(FileError, match="its source is 'other'"):
        CachedAnnotator(ours)(images())
    (ours / name).write_bytes(whole)
    with pytest.raises(FileError, match="there is no annotator to make it"):
        CachedAnnotator(ours)(images(1, seed=5))


def test_leftovers_of_a_dead_process_go_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    CachedAnnotator(tmp_path, Model())(images())
    host = socket.gethostname()
    dead = tmp_path / f"x.logits~{host}~{2**22 + 1}~.part"  # beyond Linux's highest process id
    living = tmp_path / f"x.logits~{host}~{os.getpid()}~.part"
    elsewhere = tmp_path / "x.logits~another-host~1~.part"
    for path in (dead, living, elsewhere):
        path.write_bytes(b"half")
    CachedAnnotator(tmp_path, Model())
    assert [p.exists() for p in (dead, living, elsewhere)] == [False, True, True]


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
    found = compact.filter_again(batch, BackgroundPriority(calibration, background=0))
    whole = BackgroundPriority(calibration, background=0)(cache(batch))
    assert found.labels.dtype == whole.dtype
    # The two forms round differently: a score beside its threshold is no evidence.
    gap = LAC()(cache(batch)) - calibration.thresholds.reshape(1, -1, 1, 1)
    differs = (found.labels != whole) & (gap.abs() > 2e-3).all(1)
    assert bool((found.labels[differs] == 255).all())
    assert int(differs.sum()) <= found.unsettled
