"""The scripts of benchmarks/evidence/ run on frames made on the fly, and count what they say."""

import csv
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from math import isnan, prod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

EVIDENCE = Path(__file__).parents[1] / "benchmarks" / "evidence"

Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """A module of that folder, by name."""
    monkeypatch.syspath_prepend(EVIDENCE)
    return import_module


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_new_video_breaks_what_holds_at_random(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--quick", "--splits", "4", "--only", "random", "videos", "--output", str(tmp_path)]
    script("promise").main(options)
    assert "| 3 bands x class | image | pooled | LAC | 24 |" in capsys.readouterr().out
    drawn = rows_of(tmp_path / "promise_random.csv")
    assert {row["score"] for row in drawn} == {"LAC", "APS"}
    promised = [row for row in drawn if row["unit"] == "image" and row["fallback"] == "none"]
    assert not [row for row in promised if row["group"] == "none" and row["short"]]
    assert not [row for row in promised if row["group"] == "class" and row["classes short"] != "0"]
    hard = [
        row
        for row in rows_of(tmp_path / "promise_videos.csv")
        if row["test"] == "video1" and row["alpha"] == "0.1" and row["n"] == "24"
    ]
    assert hard
    assert all(float(row["mean of images"]) < 0.85 for row in hard)
    assert all(row["commit"] for row in hard)


def test_torchcp_gets_labeled_pixels_as_rows(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Predictor:
        def __init__(self, score: object, temperature: float) -> None:
            del score, temperature

        def calculate_threshold(
            self, logits: torch.Tensor, labels: torch.Tensor, alpha: float
        ) -> None:
            assert logits.shape == (len(labels), 4)
            assert labels.max() < 4
            self.q_hat = torch.tensor(alpha)

    package, api = ModuleType("torchcp"), ModuleType("torchcp.classification")
    package.__spec__ = ModuleSpec("torchcp", None)
    api.score = SimpleNamespace(LAC=object, APS=lambda *, randomized: randomized)  # type: ignore[attr-defined]
    api.predictor = SimpleNamespace(  # type: ignore[attr-defined]
        SplitPredictor=Predictor, ClassConditionalPredictor=Predictor
    )
    for module in (package, api):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.syspath_prepend(EVIDENCE.parent)
    monkeypatch.setattr(script("speed"), "UNUSED", {})  # no stand-ins for what it would import
    frames = script("miniature").miniature()
    peers = list(script("promise").of_torchcp(frames))
    assert len(peers) == 4
    assert [peer.thresholds(0.5, [0, 3]).tolist() for peer in peers] == [[0.5]] * 4


def test_tools_for_shifts_meet_a_new_video(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script("shift").main(["--quick", "--splits", "4", "--output", str(tmp_path)])
    assert "Levels that move" in capsys.readouterr().out
    moving = {
        row["gamma"]: float(row["mean of images"])
        for row in rows_of(tmp_path / "shift_levels.csv")
        if row["test"] == "video1" and row["alpha"] == "0.1"
    }
    assert moving["fixed"] < moving["0.01"] < moving["0.05"] < moving["0.2"]
    random_order = rows_of(tmp_path / "shift_alarms.csv")[0]
    assert float(random_order["alarm before the new video"]) == 0
    weights = rows_of(tmp_path / "shift_weights.csv")
    assert {row["test"] for row in weights} == {"video0", "video1", "video2", "no shift"}


def test_labels_are_counted_rule_by_rule(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "figure.png"
    options = ["--quick", "--draws", "2", "--output", str(tmp_path), "--figure", str(picture)]
    script("labels").main(options)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Purity / recall in percent" in capsys.readouterr().out
    curves = rows_of(tmp_path / "labels_curves.csv")
    found = {(row["rule"], row["level"]): row for row in curves}
    raw, perfect = found["confidence", "0"], found["no wrong label", "nan"]
    assert (raw["kept"], perfect["accuracy"]) == ("1", "1")
    assert perfect["kept"] == raw["accuracy"]
    assert perfect["mean recall"] == raw["mean recall"]
    assert float(found["confidence", "0.9"]["accuracy"]) > float(raw["accuracy"])
    # Where the claim can be made, it is kept on the frames at hand.
    for row in curves:
        if row["rule"].startswith("controlled error") and row["kept"] != "0":
            assert 1 - float(row["accuracy"]) <= float(row["level"]) + 0.02


def test_kept_labels_are_counted_as_by_hand(script: Script) -> None:
    labels = script("labels")
    said = torch.tensor([[0, 0, 1, 255, 1, 0]])
    truth = torch.tensor([[0, 1, 1, 1, 255, 0]])
    counts = labels.confusion(said, truth, 3)
    assert counts.tolist() == [[2, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]]
    some = labels.confusion(said, truth, 2)
    purity, recall = labels.by_class(some)
    assert purity.tolist() == [2 / 3, 1.0]
    assert recall.tolist() == [1.0, 1 / 3]
    found = labels.summary(some)
    assert (found["kept"], found["accuracy"], found["classes kept"]) == (4 / 5, 3 / 4, 2)
    assert found["mean purity"] == pytest.approx(5 / 6)
    assert found["mean recall"] == pytest.approx(2 / 3)
    assert found["mean IoU"] == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_a_sum_of_states_is_what_an_update_gives(script: Script) -> None:
    judge, frames = script("judge"), script("miniature").miniature(24)
    bench, chosen = judge.Bench(frames), [3, 17, 4, 11, 20, 8, 22, 1, 13, 6]
    logits, labels = frames.logits[chosen], frames.labels[chosen]
    for group in ("none", "class", "4 rings", "3 bands", "3 bands x class"):
        for unit in ("image", "pixel"):
            make, banded = bench._make(group, unit, "LAC")
            beside = (bench.bands,) if banded else ()
            wanted = make().update(logits, labels, *beside)
            summed = bench.stock(group, unit, "LAC").of(chosen)
            assert summed.fingerprint == wanted.fingerprint
            for alpha in (0.1, 0.25):
                first, second = (c.compute(alpha, "pooled") for c in (summed, wanted))
                assert torch.equal(first.thresholds, second.thresholds)
                assert torch.equal(first.num_units, second.num_units)
                assert torch.equal(first.max_share, second.max_share)


def test_coverage_is_what_counting_gives(script: Script) -> None:
    judge, frames = script("judge"), script("miniature").miniature(6, size=(8, 12))
    frames.labels[5] = 255
    bench = judge.Bench(frames)
    generator = torch.Generator().manual_seed(1)
    bands = bench.bands.flatten()
    places: dict[tuple[str, ...], tuple[tuple[int, ...], torch.Tensor]] = {
        (): ((1,), bands),
        ("class",): ((4,), bands),
        ("group",): ((3,), bands),
        ("group", "class"): ((3, 4), bands),
        ("location",): ((8, 12), torch.arange(8 * 12) % 5),
    }
    for name, score in judge.SCORES.items():
        scores = score(frames.logits)
        for axes, (shape, groups) in places.items():
            limit = torch.rand(shape, generator=generator)
            limits = judge.Limits(limit.numpy(), axes, groups.numpy())
            found = bench.judge(name).coverage(limits)

            def own(c: int, y: int, x: int, axes: Any = axes, limit: Any = limit) -> float:
                band = int(bench.bands[y, x])
                place = {"class": c, "group": band}
                index = (y, x) if axes == ("location",) else tuple(place[a] for a in axes) or 0
                return float(limit[index])

            for entry in range(6):
                inside = {
                    (c, y, x): float(scores[entry, c, y, x]) <= own(c, y, x)
                    for c in range(4)
                    for y in range(8)
                    for x in range(12)
                }
                held: dict[int, list[bool]] = {}
                there: dict[int, list[bool]] = {}
                for y in range(8):
                    for x in range(12):
                        label = int(frames.labels[entry, y, x])
                        group = int(groups[12 * y + x])
                        if label < 4:
                            held.setdefault(label, []).append(inside[label, y, x])
                            cell = 4 * group + label if "class" in axes else group
                            there.setdefault(cell, []).append(inside[label, y, x])
                everything = [value for values in held.values() for value in values]
                assert same(found.of_images[entry], everything)
                for c in range(4):
                    assert same(found.of_classes[entry, c], held.get(c, []))
                cells = {(): 0, ("class",): 0, ("location",): 5}.get(axes, prod(shape))
                assert found.of_groups.shape == (6, cells)
                for cell in range(cells):
                    assert same(found.of_groups[entry, cell], there.get(cell, []))
                sampled = [inside[c, y, x] for c in range(4) for y in (0, 4) for x in (0, 4, 8)]
                assert found.sizes[entry] == sum(sampled) / 6


def same(share: float, counted: list[bool]) -> bool:
    """Whether it is the share of what was counted; NaN where there was nothing."""
    return share == sum(counted) / len(counted) if counted else isnan(share)


def test_a_group_is_where_its_threshold_is(script: Script) -> None:
    judge, frames = script("judge"), script("miniature").miniature(40, size=(8, 12))
    bench = judge.Bench(frames)
    for group, count in (("location", 96), ("4 rings", 4), ("4 fitted clusters", 4)):
        ((_, limits), _) = bench.limits(judge.Way(group, "image", "none", "LAC"), list(range(40)))
        assert sorted(set(limits.places.tolist())) == list(range(count))
        for place in range(count):
            assert len(np.unique(limits.thresholds.reshape(-1)[limits.places == place])) == 1
    for group in ("3 bands", "3 bands x class"):
        ((_, limits), _) = bench.limits(judge.Way(group, "image", "none", "LAC"), list(range(40)))
        assert np.array_equal(limits.places, bench.bands.flatten())
    for group in ("none", "class"):
        ((_, limits), _) = bench.limits(judge.Way(group, "image", "none", "LAC"), list(range(40)))
        assert limits.places.size == 0


def test_what_chance_explains_is_not_short(script: Script) -> None:
    promise = script("promise")
    draws = np.random.default_rng(0).normal(0.9, 0.02, (200, 3))
    means, short = promise.over_splits(draws, 0.9)
    assert np.allclose(means, draws.mean(0))
    assert short == 0
    draws[:, 1] -= 0.02
    draws[:, 2] = np.nan
    draws[:5, 2] = 0.2, 0.4, 0.3, 0.3, 0.3
    means, short = promise.over_splits(draws, 0.9)
    assert means[2] == pytest.approx(0.3)
    assert short == 2
    draws[2:, 2] = np.nan
    draws[:2, 2] = 0.60, 0.62  # of two splits, which are no evidence either
    assert promise.over_splits(draws, 0.9)[1] == 1
    assert promise.over_splits(draws[:1], 0.99)[1] == 0  # one split is no evidence


@pytest.mark.parametrize("whole", [False, True])
def test_frames_line_up_with_their_annotator(
    script: Script,
    tmp_path: Path,
    whole: bool,  # noqa: FBT001
) -> None:
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    nll = random.random((2, 3, 4, 5)).astype(np.float16)
    masks = random.integers(0, 3, (2, 8, 10)).astype(np.uint8)
    np.savez(tmp_path / "nll_val.npz", nll=nll, name=["a", "b"], classes=["x", "y", "z"])
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name, mask in zip("ab", masks, strict=True):
        image.fromarray(mask).save(tmp_path / "labels" / f"{name}.png")
        gray = np.full((8, 10, 3), 50 if name == "a" else 90, np.uint8)
        image.fromarray(gray).save(tmp_path / "images" / f"{name}.jpg")
    found = script("frames").load(tmp_path, "val", whole=whole)
    said, labels = torch.from_numpy(-nll.astype(np.float32)), torch.from_numpy(masks).long()
    size = (8, 10) if whole else (4, 5)
    assert found.images.shape == (2, 3, *size)
    assert found.images.double().mean((1, 2, 3)).tolist() == pytest.approx([50, 90], abs=1)
    if whole:
        assert torch.equal(found.labels, labels)
        assert torch.equal(found.logits[..., 1::2, 1::2], said)
        between = found.logits[..., 1::2, 2::2]
        assert torch.allclose(between, (said[..., :-1] + said[..., 1:]) / 2)
        assert torch.equal(found.logits[..., 0, 0], said[..., 0, 0])
    else:
        assert torch.equal(found.labels, labels[:, 1::2, 1::2])
        assert torch.equal(found.logits, said)
