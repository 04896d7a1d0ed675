"""The students' benchmark on shapes: rows, resuming, splits and intervals, by hand."""

import csv
import hashlib
import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

EVIDENCE = Path(__file__).parents[1] / "benchmarks" / "evidence"
ARMS = ["labels only", "raw", "recalibrated probabilities in the set, then joint"]


@pytest.fixture
def students(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(EVIDENCE)
    import students as script  # type: ignore[import-not-found]  # noqa: PLC0415

    return script


@pytest.fixture
def standings(students: Any) -> Any:
    """The script beside it that says how the arms stand."""
    del students  # which has made it importable
    import standings as script  # type: ignore[import-not-found]  # noqa: PLC0415

    return script


@pytest.fixture
def external_labels(students: Any) -> Any:
    """The module beside it."""
    del students  # which has made it importable
    import external_labels as module  # type: ignore[import-not-found]  # noqa: PLC0415

    return module


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_says_what_the_rows_say(students: Any, tmp_path: Path) -> None:
    text = students.quick(ARMS, 4, (0, 1), tmp_path)
    rows = rows_of(tmp_path / "students.csv")
    test = students.shapes(12, 3, "valid0")
    shown = [name for c, name in enumerate(test.classes) if (test.labels == c).any()]
    assert [(row["arm"], row["seed"]) for row in rows] == [(a, s) for a in ARMS for s in "01"]
    for row in rows:
        assert json.loads(row["miou_by_video"]) == {"valid0": float(row["miou"])}
        of_class = [json.loads(row["iou_by_class"])[name] for name in shown]
        assert float(row["miou"]) == pytest.approx(mean(of_class), abs=1e-3)
        assert float(row["kept"]) == (
            0 if row["arm"] == "labels only" else pytest.approx(1, abs=0.2)
        )
    first, other = ([float(r["miou"]) for r in rows if r["arm"] == arm] for arm in ARMS[:2])
    assert f"| raw | 1.0000 | {rows[2]['right']} | 2 | {100 * mean(other):.1f} |" in text
    assert f"| {100 * (mean(other) - mean(first)):+.1f} [" in text
    assert not list((tmp_path / "work").glob("*/"))  # checkpoints of runs that ended are gone


def test_a_row_is_never_run_again(students: Any, tmp_path: Path) -> None:
    students.quick(ARMS[:1], 3, (0,), tmp_path)
    before = rows_of(tmp_path / "students.csv")
    students.quick(ARMS[:1], 3, (0, 1), tmp_path)
    students.quick(ARMS[:1], 4, (0,), tmp_path)
    after = rows_of(tmp_path / "students.csv")
    assert after[0] == before[0]
    assert [(row["seed"], row["steps"]) for row in after] == [("0", "3"), ("1", "3"), ("0", "4")]


def test_every_arm_learns_for_a_few_steps(
    students: Any, external_labels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_labels, "REFINING_STEPS", 2)
    students.quick(students.ARMS, 4, (0,), tmp_path)
    rows = rows_of(tmp_path / "students.csv")
    assert [row["arm"] for row in rows] == list(students.ARMS)
    assert all(0 <= float(row["miou"]) < 1 for row in rows)


def test_rows_of_other_frames_take_a_file_of_their_own(
    students: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, said in (("train", b"some"), ("val", b"more")):
        (tmp_path / f"nll_{name}.npz").write_bytes(said)
    data = students.frames.fingerprint(tmp_path)
    assert data == hashlib.sha256(b"somemore").hexdigest()[:12]
    students.quick(ARMS[:1], 3, (0,), tmp_path)
    loaded: list[str] = []
    monkeypatch.setattr(students.frames, "load", lambda *_, **__: loaded.append("frames"))
    words = ["--data", str(tmp_path), "--arms", "raw", "--results", str(tmp_path / "students.csv")]
    with pytest.raises(SystemExit):
        students.main(words)
    assert "has rows of other frames; name another with --results" in capsys.readouterr().err
    assert not loaded
    assert not students.other_data(tmp_path / "students.csv", "shapes")
    assert not students.other_data(tmp_path / "none.csv", "shapes")


def test_a_run_that_was_cut_ends_as_one_that_was_not(students: Any, tmp_path: Path) -> None:
    frames, val = students.shapes(20, 2, "train0"), students.shapes(4, 3, "valid0")
    split = students.split_of(frames, val, list(range(12)), "")
    task = students.Task("raw", 12, 0, "", 5, "fp32")
    external = split.unlabeled.logits.argmax(1)
    whole = students.train(task, split, external, tmp_path / "whole", float("inf"))
    parts = [students.train(task, split, external, tmp_path / "cut", 0.0) for _ in range(5)]
    assert parts[:4] == [None] * 4  # a step each
    for a, b in zip(whole.parameters(), parts[4].parameters(), strict=True):
        assert torch.equal(a, b)


def test_seeds_and_arms_share_external_labels(
    students: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def labels(labeled: Any, unlabeled: Any) -> Any:
        made.append(len(labeled))
        return unlabeled.logits.argmax(1)

    for arm in ("one", "two"):
        monkeypatch.setitem(students.ARMS, arm, replace(students.ARMS["raw"], labels=labels))
    frames, val = students.shapes(20, 2, "train0"), students.shapes(4, 3, "valid0")
    tasks = [
        students.Task(arm, count, seed, "", 1, "fp32")
        for count in (8, 12)
        for seed in (0, 1)
        for arm in ("one", "two")
    ]
    results = tmp_path / "students.csv"
    students.run(
        tasks,
        lambda count, out: students.split_of(frames, val, list(range(count)), out),
        results,
        work=tmp_path / "work",
        minutes=60,
        data="shapes",
    )
    assert made == [8, 12]
    assert len(students.rows_of(results)) == len(tasks)


def test_both_ways_takes_the_least_level_that_its_halves_can_promise(
    students: Any, external_labels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[Any] = []

    def teach(known: Any) -> Any:
        taught.append(known)
        return lambda _, logits: logits

    monkeypatch.setattr(external_labels, "taught", teach)
    unlabeled = students.shapes(4, 3, "train1")
    for count, alpha in ((12, Fraction(2, 7)), (13, Fraction(2, 7)), (40, Fraction(1, 10))):
        labeled = students.shapes(count, 2, "train0")
        both = external_labels.cross_fitted(labeled)
        for known, start in zip(taught[-2:], (0, 1), strict=True):
            images = torch.stack([image for image, _, _ in known])
            assert torch.equal(images, labeled.images[start::2])
        assert [calibration.alpha for calibration in both.calibrations] == [float(alpha / 2)] * 2
        shares = external_labels.refined_both_ways(labeled, unlabeled)
        kept = (shares > 0).any(1)
        assert kept.float().mean() > 0.9
        sets = (shares > 0).sum(1)[kept]
        assert 1 < sets.float().mean() < shares.shape[1]


def test_a_pixel_is_thinned_by_the_size_of_its_set(students: Any, external_labels: Any) -> None:
    labeled, unlabeled = students.shapes(20, 2, "train0"), students.shapes(20, 3, "train1")
    found = external_labels.thinned_by_size(labeled, unlabeled)
    size = (external_labels.the_set(labeled, unlabeled) > 0).sum(1)
    kept = found < 255
    assert torch.equal(kept[size == 1], torch.ones(int((size == 1).sum()), dtype=torch.bool))
    assert not kept[size == 0].any()
    for count in (2, 3):
        pixels = int((size == count).sum())
        assert pixels > 300
        deviation = (1 / count * (1 - 1 / count) / pixels) ** 0.5
        assert float(kept[size == count].float().mean()) == pytest.approx(
            1 / count, abs=5 * deviation
        )
    argmax = external_labels.kept_by("class: Argmax")(labeled, unlabeled)
    assert torch.equal(found[kept], argmax[kept])


def test_what_is_near_an_edge_is_kept_too(students: Any, external_labels: Any) -> None:
    labels = torch.zeros(2, 6, 9, dtype=torch.int64)
    labels[0, :, 5:] = 1
    labels[0, 0, 0] = 255
    found = external_labels.near_edges(labels)
    for y in range(6):
        for x in range(9):
            square = labels[0, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
            assert bool(found[0, y, x]) == (len(set(square.flatten().tolist())) > 1)
    assert not found[1].any()
    labeled, unlabeled = students.shapes(20, 2, "train0"), students.shapes(20, 3, "train1")
    kept = external_labels.kept_by("class: Singleton")
    both = external_labels.and_edges(kept)(labeled, unlabeled)
    alone, top = kept(labeled, unlabeled), unlabeled.logits.argmax(1)
    more = (alone == 255) & external_labels.near_edges(top)
    assert 0 < more.float().mean() < (alone == 255).float().mean()
    assert torch.equal(both, torch.where(more, top, alone))


def test_what_the_loss_sees_by_hand(students: Any) -> None:
    import why  # type: ignore[import-not-found]  # noqa: PLC0415

    frames = students.Frames(
        ["video1_0"],
        ["Road", "Car"],
        torch.zeros(1, 3, 1, 9, dtype=torch.uint8),
        torch.zeros(1, 2, 1, 9),
        torch.tensor([[[0, 0, 0, 0, 0, 1, 1, 1, 255]]]),
    )
    said = torch.tensor([[[0, 255, 0, 0, 1, 1, 255, 0, 1]]])
    rows = {row["name"]: row for row in why.of_labels(said, frames, torch.tensor([1.0, 3.0]))}
    assert rows["Road"]["share of the loss"] == pytest.approx(4 / 13)
    assert rows["Car"]["share of the loss"] == pytest.approx(9 / 13)  # where nobody knows, too
    for name, kept, right in (
        ("Road", 4 / 5, 3 / 4),
        ("Car", 2 / 3, 1 / 2),
        ("video1", 6 / 8, 4 / 6),
        ("near edges", 4 / 5, 2 / 4),  # pixels 3 to 7: class 1 begins at 5, void at 8
        ("far from edges", 2 / 3, 2 / 2),
    ):
        assert (rows[name]["kept"], rows[name]["right"]) == pytest.approx((kept, right))
    soft = torch.stack((1 - (said == 1).float(), (said == 1).float()), 1) * (said < 255)[:, None]
    again = {row["name"]: row for row in why.of_labels(soft, frames, torch.tensor([1.0, 3.0]))}
    assert again == rows

    class Sure(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            car = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 0.0]).view(1, 1, 9)
            return torch.stack((1 - car, car), 1).expand(len(images), 2, 1, 9)

    found = {row["name"]: row for row in why.of_student(Sure(), frames)}
    assert found["Road"] == {"name": "Road", "precision": 3 / 4, "recall": 3 / 5, "iou": 3 / 6}
    assert found["Car"] == {"name": "Car", "precision": 2 / 4, "recall": 2 / 3, "iou": 2 / 5}


def test_a_level_of_its_own_takes_no_class_away(students: Any, external_labels: Any) -> None:
    labeled, unlabeled = students.shapes(12, 2, "train0"), students.shapes(12, 3, "train1")
    rare = len(labeled.classes) - 1
    drawn = torch.rand(labeled.labels.shape, generator=torch.Generator().manual_seed(0))
    labeled.labels[(labeled.labels == rare) & (drawn < 0.98)] = 0
    found = external_labels.levels_by_class(labeled, unlabeled)
    assert (found == rare).any()


def test_external_probabilities_are_judged_by_hand(students: Any) -> None:
    import external  # type: ignore[import-not-found]  # noqa: PLC0415

    frames = students.Frames(
        ["video1_0", "video2_0"],
        ["Road", "Building"],
        torch.zeros(2, 3, 1, 3, dtype=torch.uint8),
        torch.zeros(2, 2, 1, 3),
        torch.tensor([[[0, 0, 1]], [[1, 1, 255]]]),
    )
    road = torch.tensor([[[0.5, 0.0, 1.0]], [[0.25, 0.0, 0.5]]])
    found = external.judged(torch.stack((road, 1 - road), 1), frames)
    assert found["right"] == pytest.approx(3 / 5)  # a tie is the first class
    assert found["classes"] == pytest.approx(7 / 5)
    assert found["-log"] == pytest.approx(-math.log(0.5 * 0.75 * 1.0) / 3)
    assert found["missed Road"] == pytest.approx(1 / 2)  # of the one frame that shows it
    assert found["missed Building"] == pytest.approx((1 + 0) / 2)
    assert (found["missed in video1"], found["missed in video2"]) == pytest.approx((2 / 3, 0.0))


def test_annotators_are_tested_on_videos_that_taught_nothing(
    students: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import external  # noqa: PLC0415

    monkeypatch.setattr(
        external, "measure", lambda known, new: [{"count": len(known), "new": new.names}]
    )
    one, two = students.shapes(6, 2, "train0"), students.shapes(4, 5, "train1")
    both = joined(students, one, two)
    val = students.shapes(3, 3, "train1")
    rows = external.tested(both, val, [0, 1, 7])
    assert rows == [
        {"tested": "val", "count": 3, "new": val.names},
        {"tested": "train0", "count": 1, "new": one.names},
        {"tested": "train1", "count": 2, "new": val.names + two.names},
    ]


def test_a_run_of_another_process_is_left_alone(students: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with students.alone(path) as first, students.alone(path) as second:
        assert (first, second) == (True, False)
    with students.alone(path) as again:
        assert again


def joined(students: Any, one: Any, other: Any) -> Any:
    """The frames of both."""
    return students.Frames(
        one.names + other.names,
        one.classes,
        *(
            torch.cat((getattr(one, part), getattr(other, part)))
            for part in ("images", "logits", "labels")
        ),
    )


def test_a_held_out_video_is_tested_and_never_trained_on(students: Any) -> None:
    old, new = students.shapes(6, 2, "train0"), students.shapes(4, 5, "train1")
    both = joined(students, old, new)
    val = students.shapes(3, 3, "valid0")
    split = students.split_of(both, val, [0, 1, 7], "train1")
    assert split.labeled.videos == ["train0"] * 2
    assert split.unlabeled.videos == ["train0"] * 4
    assert split.test.videos == ["valid0"] * 3 + ["train1"] * 4
    whole = students.split_of(both, val, [0, 1, 7], "")
    assert (len(whole.labeled), len(whole.unlabeled), len(whole.test)) == (3, 7, 3)
    with pytest.raises(SystemExit, match="--hold-out must name a video"):
        students.split_of(both, val, [0], "train2")


def test_a_rows_miou_leaves_the_held_out_video_to_its_own_column(students: Any) -> None:
    class Sure(torch.nn.Module):
        """Says class 0 on dark images, and on others class 1."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            light = images.mean((1, 2, 3)) > 0
            logits = torch.zeros(len(images), 2, *images.shape[2:])
            logits[:, 1] = light[:, None, None] * 2.0 - 1
            return logits

    def some(video: str, value: int, label: int) -> Any:
        return students.Frames(
            [f"{video}_0"],
            ["a", "b"],
            torch.full((1, 3, 4, 4), value, dtype=torch.uint8),
            torch.zeros(1, 2, 4, 4),
            torch.full((1, 4, 4), label),
        )

    old, new = some("train0", 0, 0), some("train1", 255, 0)
    both = students.Frames(
        old.names * 2 + new.names,
        old.classes,
        torch.cat((old.images, old.images, new.images)),
        torch.cat((old.logits, old.logits, new.logits)),
        torch.cat((old.labels, old.labels, new.labels)),
    )
    split = students.split_of(both, some("valid0", 0, 0), [0], "train1")
    task = students.Task("raw", 1, 0, "train1", 5, "fp32")
    row = students.row_of(task, split, Sure(), torch.zeros(1, 4, 4, dtype=torch.int64))
    assert row["miou"] == "1.0000"
    assert json.loads(row["miou_by_video"]) == {"train1": 0.0, "valid0": 1.0}


def test_an_arm_may_take_the_labeled_frames_for_unlabeled_ones(students: Any) -> None:
    frames, val = students.shapes(6, 2, "train0"), students.shapes(2, 3, "valid0")
    split = students.split_of(frames, val, [0, 1], "")
    arm = students.ARMS["labels only, strong views too"]
    taught = arm.taught(split)
    assert taught.names == split.labeled.names
    assert torch.equal(arm.labels(split.labeled, taught), split.labeled.labels)
    assert students.ARMS["raw"].taught(split).names == split.unlabeled.names


def test_the_page_shows_the_rows_that_are_there(standings: Any) -> None:
    page = standings.RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    assert page == standings.table(standings.RESULTS)
    page = standings.RESULTS.with_name("students_classes.md").read_text(encoding="utf-8")
    assert page == standings.classes(standings.RESULTS)


def test_classes_gain_on_raw_labels_seed_by_seed(
    students: Any, standings: Any, tmp_path: Path
) -> None:
    results = tmp_path / "students.csv"
    for arm, seed, steps, road in (
        ("raw", 0, 10, 0.5),
        ("raw", 1, 10, 0.4),
        ("raw", 2, 10, 0.6),
        ("raw", 0, 20, 0.9),
        ("drop every wrong label", 0, 10, 0.51),
        ("drop every wrong label", 1, 10, 0.42),
        ("drop every wrong label", 2, 10, 0.63),
        ("drop every wrong label", 3, 10, 0.9),  # of which there is no raw
        ("drop every wrong label", 0, 20, 0.1),
        ("singletons, by class", 0, 10, 0.1),
        ("singletons, by class", 1, 10, 0.1),
    ):
        iou = {"Road": road, "Car": 0.5 if arm == "raw" else None}
        row = run_of(students, arm, seed, steps, {"new": 0.5}) | {"iou_by_class": json.dumps(iou)}
        students.append(results, row)
    # 2 points, give or take 2.48 (above); 50 points in every seed
    assert standings.classes(results) == (
        "| minus raw | Road | Car |\n|---|---|---|\n| drop every wrong label | +2.0 | **-50.0** |\n"
    )


def run_of(students: Any, arm: str, seed: int, steps: int, miou: dict[str, float]) -> Any:
    """A row of results."""
    held_out = next(reversed(miou)) if len(miou) > 1 else ""
    said = json.dumps(miou), "{}", "", ""
    values = (arm, 46, seed, "90x120", held_out, steps, "", 0.25, 1.0, 0.9, *said)
    return dict(zip(students.COLUMNS, map(str, values), strict=True))


def test_the_figure_shows_what_arms_gain_on_raw_labels(
    students: Any, standings: Any, tmp_path: Path
) -> None:
    results = tmp_path / "students.csv"
    for arm, seed, steps, miou in (
        ("labels only", 0, 10, 0.3),
        ("labels only", 1, 10, 0.5),
        ("labels only", 2, 10, 0.9),  # of which there is no raw
        ("raw", 1, 10, 0.6),
        ("raw", 0, 10, 0.5),
        ("all true labels", 1, 10, 0.7),
        ("drop every wrong label", 0, 10, 0.4),
        ("raw", 0, 20, 0.6),
        ("all true labels", 0, 20, 0.8),
        ("all true labels", 0, 30, 0.8),  # no raw at all
    ):
        students.append(results, run_of(students, arm, seed, steps, {"new": miou}))
    for arm, miou in (("raw", 0.6), ("all true labels", 0.63)):
        students.append(results, run_of(students, arm, 0, 10, {"new": 0.5, "held": miou}))
    found = standings.panels(results)
    assert list(found) == [
        "20 steps, 90x120, tested on new",
        "10 steps, 90x120, tested on new",
        "10 steps, 90x120, tested on held, of which no frame trains",
    ]
    last, first, held = found.values()
    assert held == {"all true labels": pytest.approx([3])}
    assert list(first) == ["labels only", "drop every wrong label", "all true labels"]
    assert first["labels only"] == pytest.approx([-20, -10])
    assert first["drop every wrong label"] == pytest.approx([-10])
    assert last == {"all true labels": pytest.approx([20])}
    text = standings.table(results)
    assert "tested on held, of which no frame trains" in text
    assert text.count("of which no frame trains") == 1
    assert "| 2 | 55.0 | 7.1 | +15.0 [-48.5, +78.5] |" in text  # raw over labels only
    students.append(
        results, run_of(students, "raw", 7, 40, {"a": 0.5, "b": 0.7}) | {"held_out": ""}
    )
    assert [match.video for match in standings.matches(results) if match.steps == 40] == [
        *("a", standings.ALL, "b")
    ]
    assert "40 steps, tested on all of val" in standings.table(results)
    assert "| raw | 1.0000 | 0.9000 | 1 | 25.0 |" in standings.table(results)
    pytest.importorskip("matplotlib")
    standings.figure(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_intervals_are_students(standings: Any) -> None:
    # mean .02, standard deviation .01, t(.975, 2) = 4.3027: half a width of 2.48 points
    assert standings.interval([0.01, 0.02, 0.03]) == "+2.0 [-0.5, +4.5]"
    assert standings.interval([0.012]) == "+1.2"
    assert standings.interval([]) == ""


def test_an_annotator_is_refined_on_every_second_labeled_frame(
    students: Any, external_labels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_labels, "REFINING_STEPS", 4)
    frames, new = students.shapes(6, 2, "train0"), students.shapes(3, 3, "train1")
    state = torch.get_rng_state()
    found = external_labels.refined(frames, new)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(found.sum(1), torch.ones(3, 32, 32))
    frames.labels[1::2] = 0
    torch.testing.assert_close(external_labels.refined(frames, new), found)
    frames.labels[::2] = 0
    assert not torch.allclose(external_labels.refined(frames, new), found)
