"""Training from a JSON file: it runs, resumes, and refuses every key it does not know."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpseg.data import SyntheticShapes
from cpseg.errors import CpsegError, FileError, InputError
from cpseg.training.config import train_from_file, trainer_from_file

image_module = pytest.importorskip("PIL.Image")


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    lines = []
    for index, (image, label) in enumerate(SyntheticShapes(length=3, size=(20, 24), seed=0)):
        image_module.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
        image_module.fromarray(label.byte().numpy()).save(tmp_path / f"m{index}.png")
        lines.append(f"{index}.png m{index}.png\n")
    (tmp_path / "all.txt").write_text("".join(lines))
    data = {"root": ".", "split": "all.txt"}
    return {
        "recipe": {
            "name": "conformal_sam",
            "num_classes": 6,
            "external_steps": 2,
            "self_steps": 1,
            "crop": [16, 12],
        },
        "train": {"lr": 1, "clip": 1.0, "mean": [0.5, 0.5, 0.5], "optimizer": "adamw"},
        "student": {"width": 4, "depth": 1},
        "labeled": data,
        "unlabeled": data,
        "validation": data,
        "directory": "run",
    }


def write(root: Path, content: object) -> Path:
    path = root / "config.json"
    path.write_text(json.dumps(content))
    return path


def test_a_file_trains_reports_and_resumes(tmp_path: Path, run: dict[str, Any]) -> None:
    said: list[str] = []
    path = write(tmp_path, run)
    result = train_from_file(path, report=said.append)
    assert result.steps == 3
    assert said[0].startswith("labeled: 3 images, 3 with a mask")
    assert said[-1].startswith("step 3: mIoU")
    assert (tmp_path / "run" / "last.pt").exists()
    assert train_from_file(path, resume=True) == result
    config = trainer_from_file(path)[0].config
    assert (config.lr, config.mean, config.crop) == (1.0, (0.5, 0.5, 0.5), (16, 12))


@pytest.mark.parametrize(
    "change",
    [
        (None, "labelled", {}, "got 'labelled'. Did you mean 'labeled'?"),
        ("recipe", "name", "conformalsam", "Did you mean 'conformal_sam'?"),
        ("recipe", "extern_steps", 3, "Did you mean 'external_steps'?"),
        ("recipe", "crop", [16], "recipe.crop must be a list of 2; got [16]"),
        ("train", "learning_rate", 3, "keys of train must be of"),
        ("train", "lr", "fast", "train.lr must be float; got 'fast'"),
        ("train", "lr", -1, "lr must be finite and >= 0"),
        ("train", "optimizer", "adam", "Did you mean 'adamw'?"),
        ("train", "compile", 1, "train.compile must be bool; got 1"),
        ("train", "stages", [], "keys of train must be of"),
        ("student", "num_classes", 3, "keys of student must be of"),
        ("labeled", "rot", ".", "Did you mean 'root'?"),
        ("labeled", "split", 3, "labeled.split must be str; got 3"),
        (None, "train", [], "train must be a JSON object; got []"),
    ],
)
def test_every_key_is_checked(
    tmp_path: Path, run: dict[str, Any], change: tuple[str | None, str, object, str]
) -> None:
    part, key, value, message = change
    (run if part is None else run[part])[key] = value
    with pytest.raises(InputError) as found:
        trainer_from_file(write(tmp_path, run))
    assert message in str(found.value)


def test_missing_keys_and_files_are_named(tmp_path: Path, run: dict[str, Any]) -> None:
    for part, key in ((None, "directory"), ("recipe", "crop"), ("labeled", "root")):
        changed = json.loads(json.dumps(run))
        del (changed if part is None else changed[part])[key]
        with pytest.raises(InputError, match=f"must have the key '{key}'"):
            trainer_from_file(write(tmp_path, changed))
    with pytest.raises(FileError, match="must be a readable file"):
        trainer_from_file(tmp_path / "none.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FileError, match="must hold JSON"):
        trainer_from_file(tmp_path / "config.json")
    (tmp_path / "1.png").unlink()
    with pytest.raises(CpsegError, match=r"1\.png is missing"):
        train_from_file(write(tmp_path, run))
