"""The command line, run in this process."""

from pathlib import Path

import pytest
import torch

from cpseg.cli import main

SMALL = ["demo", "--calibration-images", "30", "--new-images", "5"]


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
    shares = {line[:28].strip(): line.split()[-2:] for line in lines if "singletons" in line}
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
def test_a_mistake_is_one_line_and_exit_status_1(
    words: list[str], rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *words[1:]]) == 1
    told = capsys.readouterr()
    assert f"cpseg: {rule}" in told.err.splitlines()[-1]
    assert "Traceback" not in told.err


def test_annotate_refuses_a_folder_that_is_not_there_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("road\nsky\n")
    words = ["--classes", str(classes), "--model", "m.pt", "--cache", str(tmp_path / "cache")]
    assert main(["annotate", str(tmp_path / "nowhere"), *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cpseg: ")
    assert "nowhere" in line


@pytest.mark.parametrize("text", ["{", '{"recipee": {}}', "[]"])
def test_train_refuses_a_wrong_file_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(text)
    assert main(["train", str(config)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cpseg: ")


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.json"
    assert main(["train", str(missing)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"cpseg: {missing} must be a readable file; No such file or directory"


def test_wrong_usage_is_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--alpha"])
    assert stopped.value.code == 2
    assert "usage: cpseg demo" in capsys.readouterr().err
