"""The command line, run in this process."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from cpseg import plots
from cpseg.annotators import CachedAnnotator
from cpseg.cli import main
from cpseg.cli.console import progress
from cpseg.cli.workers import one_thread
from cpseg.training import Comparison, FitResult
from cpseg.training.comparison import StudentResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = ["demo", "--no-students", "--calibration-images", "30", "--new-images", "5"]


def test_the_demo_prints_a_row_per_class_its_guarantee_and_what_was_kept(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SMALL, "--alpha", "0.1"]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    for name in ("background", "disc", "square", "triangle", "ring", "stripe"):
        (row,) = [line for line in lines if line.startswith(name)]
        assert "90%" in row.split()
    text = " ".join(told.out.split())
    assert "For each class, in a new image that contains it" in text
    (raw,) = [line for line in lines if line.startswith("the annotator's argmax")]
    kept, right = raw.split()[-2:]
    assert kept == "100.0%"
    assert 50 < float(right.rstrip("%")) < 100
    shares = {
        " ".join(line.split()[:-2]): line.split()[-2:] for line in lines if "singletons" in line
    }
    assert set(shares) == {"one threshold, singletons", "per class, singletons"}
    assert told.err.count("images in") == 2


def test_the_demo_depends_on_its_seed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    main([*SMALL, "--seed", "3"])
    first = capsys.readouterr().out
    main([*SMALL, "--seed", "3"])
    assert capsys.readouterr().out == first
    main([*SMALL, "--seed", "4"])
    assert capsys.readouterr().out != first
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["demo", "--alpha", "1.5"], "alpha must lie strictly between 0 and 1; got 1.5"),
        (["demo", "--new-images", "0"], "length must be an integer >= 1; got 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    words: list[str], rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *words[1:]]) == 2
    told = capsys.readouterr()
    assert f"cpseg: {rule}" in told.err.splitlines()[-1]
    assert "Traceback" not in told.err


def test_annotate_refuses_a_folder_that_is_not_there_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("road\nsky\n")
    words = ["--classes", str(classes), "--model", "m.pt", "--cache", str(tmp_path / "cache")]
    assert main(["annotate", str(tmp_path / "nowhere"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cpseg: ")
    assert "nowhere" in line


@pytest.mark.parametrize("text", ["{", '{"recipee": {}}', "[]"])
def test_train_refuses_a_wrong_file_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(text)
    assert main(["train", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cpseg: ")


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.json"
    assert main(["train", str(missing)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"cpseg: {missing} must be a readable file; No such file or directory"


def test_wrong_usage_is_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--alpha"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cpseg demo: argument --alpha")
    assert "cpseg demo --help" in line


COMMANDS = ["demo", "annotate", "calibrate", "filter", "report", "train"]


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)])
def test_help_fits_80_columns_and_shows_an_example(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) < 80
    if words:
        assert f"  python -m cpseg {words[0]} " in told
        assert "--json" in told
    else:
        assert all(f"    {name}" in told for name in COMMANDS)
        assert "130  interrupted" in told


def test_the_demo_says_plainly_that_a_level_is_out_of_reach(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SMALL, "--alpha", "0.001"]) == 0
    told = capsys.readouterr().out
    assert "nan" not in told
    rows = [line.split() for line in told.splitlines() if line.startswith(("disc", "ring"))]
    assert [row[2:4] for row in rows] == [["none", "99.9%"], ["none", "99.9%"]]
    assert "needs at least 999 calibration images" in " ".join(told.split())
    (row,) = [line for line in told.splitlines() if line.startswith("per class, singletons")]
    assert row.split()[-2:] == ["0.0%", "-"]


def test_the_demo_explains_a_rule_that_is_worse_than_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main([*SMALL, "--alpha", "0.05"])
    assert "this rule needs smaller sets" in " ".join(capsys.readouterr().out.split())
    main([*SMALL, "--calibration-images", "60", "--alpha", "0.4"])
    assert "this rule needs smaller sets" not in " ".join(capsys.readouterr().out.split())


def test_the_demo_ends_with_four_students(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Comparison] = []

    def compare(
        settings: Comparison, *, progress: Callable[[str, int], None], directory: str
    ) -> Iterator[StudentResult]:
        asked.append(settings)
        assert Path(directory).is_dir()
        for name, miou in (("labels only", 0.5), ("raw", 0.25), ("filtered", 0.625), ("both", 0.7)):
            for step in range(settings.steps):
                progress(name, step + 1)
            yield StudentResult(name, miou, 0.5, 0.75)

    monkeypatch.setattr("cpseg.cli.demo.compare_on_shapes", compare)
    words = [word for word in SMALL if word != "--no-students"]
    assert main([*words, "--seed", "2"]) == 0
    told = capsys.readouterr()
    (row,) = [line for line in told.out.splitlines() if line.startswith("filtered")]
    assert row.split() == ["filtered", "50.0%", "75.0%", "62.5%"]
    assert "no order is promised" in " ".join(told.out.split())
    assert "train four students: 1200 steps in" in told.err
    assert [(settings.steps, settings.seed) for settings in asked] == [(300, 2)]
    assert asked[0].evaluate_every is None
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["students"]["raw"] == 0.25
    assert main([*SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["students"] == {}


def test_the_demo_gives_one_json_document_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert main([*SMALL, "--json", "--figures", str(tmp_path / "figures")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["alpha"] == 0.05
    assert len(found["thresholds"]) == len(found["classes"]) == 6
    assert found["filters"]["the annotator's argmax"]["kept"] == 1.0
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert drawn == [
        "coverage.png",
        "image.png",
        "images.png",
        "kept.png",
        "levels.png",
        "reliability.png",
    ]


def test_the_demo_draws_how_the_last_student_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Figure] = []
    training = plots.training

    def draws(log: Path) -> "Figure":
        drawn.append(training(log))
        return drawn[-1]

    monkeypatch.setattr("cpseg.cli.demo._STEPS", 36)
    few = partial(Comparison, labeled_images=20, unlabeled_images=4, test_images=2, size=(24, 24))
    monkeypatch.setattr("cpseg.cli.demo.Comparison", few)
    monkeypatch.setattr(plots, "training", draws)
    words = [word for word in SMALL if word != "--no-students"]
    assert main([*words, "--figures", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    losses, *_, miou = figure.axes
    assert [text.get_text() for text in losses.texts] == ["external", "self"]
    points: list[tuple[float, float]] = np.asarray(miou.lines[0].get_xydata()).tolist()
    assert [step for step, _ in points] == list(range(6, 37, 6))
    assert points[-1][1] == found["students"]["filtered, then self-reliance"]


def test_progress_tells_the_time_left_on_a_terminal_and_one_line_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 30.0, 60.0, 90.0, 90.0])  # start, three steps, end
    monkeypatch.setattr("cpseg.cli.console.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(progress("abc", "think")) == ["a", "b", "c"]
    first, second, third, last = re.split(r"\r", capsys.readouterr().err)[1:]
    assert "1/3, 1 min 00 s left" in first
    assert "2/3, 30 s left" in second
    assert "3/3, 0.0 s left" in third
    assert last.startswith("think: 3 images in 1 min 30 s")
    assert all(len(line.removesuffix("\x1b[K")) < 80 for line in (first, second, third))
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    assert list(progress("abc", "think")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "think: 3 images in 2.0 s\n"


def test_figures_and_files_that_cannot_be_written_are_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert main([*SMALL, "--figures", str(taken)]) == 2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*SMALL, "--figures", str(tmp_path / "figures")]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    first, second = told.err.splitlines()
    assert "--figures must be a folder" in first
    assert "cpseg[plot]" in second


def test_annotate_and_train_give_one_json_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)

    def annotates(_: object, progress: Callable[[Sequence[Path]], Iterable[Path]]) -> int:
        assert list(progress([Path("a.png")])) == [Path("a.png")]
        made = CachedAnnotator(
            tmp_path, lambda images: torch.zeros(len(images), 2, 4, 4), source="s"
        )
        (tmp_path / "images.json").write_text(json.dumps({"a.png": made.ensure(image)}))
        return 1

    monkeypatch.setattr("cpseg.annotators.folder.run", annotates)
    words = ["annotate", "x", "--classes", "y", "--model", "m", "--cache", str(tmp_path)]
    assert main([*words, "--json"]) == 1
    source = CachedAnnotator(tmp_path).source
    told = capsys.readouterr()
    assert told.err.startswith("annotate: 1 images in ")
    assert json.loads(told.out) == {
        "cache": str(tmp_path),
        "images": 1,
        "source": source,
    }

    def trains(path: Path, *, resume: bool, report: Callable[[str], None]) -> FitResult:
        assert (path, resume) == (Path("c.json"), True)
        report("step 1: mIoU 0.5")
        return FitResult(7, math.nan, 0, 0.5, stopped=False)

    monkeypatch.setattr("cpseg.cli.train.train_from_file", trains)
    assert main(["train", "c.json", "--resume", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == {
        "steps": 7,
        "best_miou": None,
        "best_step": 0,
        "last_miou": 0.5,
        "stopped": False,
    }
    assert told.err == "step 1: mIoU 0.5\n"


def test_one_thread_is_for_the_while() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
