"""What a run writes down: the log always, a bar and TensorBoard where they are installed."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpseg.data import SyntheticShapes
from cpseg.training import Evaluation, Journal, Trainer, UNet
from cpseg.training.recipes import supervised

VALUES = {"loss": 1.5, "lr": 0.25}
EVALUATION = Evaluation(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_lines_say_what_happened(tmp_path: Path) -> None:
    with Journal(tmp_path, done=0, total=2) as journal:
        journal.step(1, "external", VALUES)
        journal.evaluation(1, EVALUATION, of="teacher", best=(0.8, 1))
        assert len(lines(tmp_path)) == 2  # each reaches the file at once
    assert lines(tmp_path) == [
        {"step": 1, "stage": "external", "loss": 1.5, "lr": 0.25},
        {
            "step": 1,
            "miou": EVALUATION.miou,
            "miou_absent_as_zero": EVALUATION.miou_absent_as_zero,
            "best_miou": 0.8,
            "best_step": 1,
            "of": "teacher",
            "iou": [0.75, 0.8, None],
        },
    ]


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path) -> None:
    with Journal(tmp_path, done=0, total=9) as journal:
        for number in (1, 2, 3):
            journal.step(number, "external", VALUES)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    with Journal(tmp_path, done=2, total=9) as journal:
        journal.step(3, "self", VALUES)
    assert [(line["step"], line["stage"]) for line in lines(tmp_path)] == [
        (1, "external"),
        (2, "external"),
        (3, "self"),
    ]


@pytest.mark.parametrize("package", ["tqdm", "torch.utils.tensorboard"])
def test_without_an_optional_package_the_log_is_written(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    with Journal(tmp_path, done=0, total=1) as journal:
        journal.step(1, "external", VALUES)
    assert len(lines(tmp_path)) == 1
    boards = list(tmp_path.glob("events*"))
    if package == "torch.utils.tensorboard":
        assert boards == []


def train(directory: Path, *, bar: bool = True) -> Trainer:
    config = replace(supervised(6, steps=3, crop=(16, 16)), bar=bar)
    torch.manual_seed(0)
    shapes = list(SyntheticShapes(length=2, size=(20, 24), seed=0))
    return Trainer(
        UNet(6, width=4, depth=1),
        config,
        labeled=shapes,
        validation=shapes,
        directory=directory,
        device=torch.device("cpu"),
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_step_stage_and_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    train(tmp_path).fit()
    assert "3/3" in terminal.getvalue()
    assert "stage=labeled" in terminal.getvalue()
    assert "loss=" in terminal.getvalue()
    quiet = Terminal()
    monkeypatch.setattr(sys, "stderr", quiet)
    train(tmp_path / "quiet", bar=False).fit()
    assert quiet.getvalue() == ""


def test_no_bar_where_nobody_watches(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path).fit()
    assert capfd.readouterr().err == ""


def test_tensorboard_holds_the_numbers_of_the_log(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    train(tmp_path).fit()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    found = {
        value.tag: (event.step, value.tensor.float_val[0])
        for event in loader.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
    step, evaluation = lines(tmp_path)[-2:]
    assert found["miou"] == (3, pytest.approx(evaluation["miou"], rel=1e-6))
    for name in ("loss", "lr", "kept", "labeled_weight", "seconds"):
        assert found[name] == (3, pytest.approx(step[name], rel=1e-6)), name
