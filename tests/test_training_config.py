"""Training from a JSON file: it runs, resumes, and refuses every key it does not know."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cpseg import SplitCalibrator
from cpseg.data import ColorJitter, SyntheticShapes
from cpseg.errors import CpsegError, FileError, InputError
from cpseg.training import PseudoLabelStore, UNet
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
        ("stages", "selfs", {}, "keys of stages must be of external, self; got 'selfs'"),
        ("stages", "self", {"treshold": 1}, "Did you mean 'threshold'?"),
        ("stages", "self", {"name": "x"}, "keys of stages.self must be of"),
        ("stages", "self", {"threshold": 2}, "threshold must lie in [0, 1]; got 2.0"),
        ("stages", "self", {"source": "studnet"}, "Did you mean 'student'?"),
        ("stages", "self", {"perturb": "stem"}, "stages.self.perturb must be a list; got 'stem'"),
        ("stages", "self", {"merge": "agrees"}, "Did you mean 'agree'?"),
        ("stages", "self", {"unlabeled_weight": 0.5}, "unlabeled_weight must be a JSON object"),
        ("stages", "self", {"unlabeled_weight": {"name": "exp"}}, "Did you mean 'exponential'?"),
        (
            "stages",
            "self",
            {"unlabeled_weight": {"name": "linear", "start": 1, "stop": 0}},
            "Did you mean 'start'?",
        ),
        ("color", "hues", 0.1, "Did you mean 'hue'?"),
        ("color", "hue", 2, "hue must lie in [0, 1]; got 2.0"),
        ("color", "blur_range", [1], "color.blur_range must be a list of 2; got [1]"),
        ("labeled", "store", 3, "labeled.store must be str; got 3"),
        ("labeled", "id_map", {"a": 1}, "labeled.id_map must have ids for keys; got 'a'"),
        ("labeled", "dataset", "voc", "Did you mean 'voc2012'?"),
        ("labeled", "num_classes", 3, "keys of labeled must be of"),
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
    (run if part is None else run.setdefault(part, {}))[key] = value
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


def test_stages_colors_and_a_network_of_ones_own_reach_the_trainer(
    tmp_path: Path, run: dict[str, Any]
) -> None:
    quarter = {"name": "constant", "value": 0.25}
    run["stages"] = {
        "external": {"steps": 7, "cutmix": 0.5},
        "self": {
            "merge": "fill",
            "threshold": 0.5,
            "strong_views": 1,
            "perturb": ["stem"],
            "labeled_weight": {"name": "complement", "of": quarter},
            "unlabeled_weight": quarter,
        },
    }
    run["color"] = {"strength": 0.25, "blur_range": [1, 2]}
    trainer = trainer_from_file(write(tmp_path, run))[0]
    first, second = trainer.config.stages
    assert (first.steps, first.cutmix, first.source) == (7, 0.5, "external")
    assert (second.unlabeled_weight(0.9), second.labeled_weight(0.9)) == (0.25, 0.75)
    assert (second.merge, second.perturb, second.strong_views) == ("fill", ("stem",), 1)
    assert trainer.batches.color == ColorJitter(strength=0.25, blur_range=(1.0, 2.0))
    run["stages"]["self"] |= {"merge": "multiply", "own": "probabilities"}
    stages = trainer_from_file(write(tmp_path, run))[0].config.stages
    assert (stages[1].merge, stages[1].own) == ("multiply", "probabilities")
    own = UNet(6, width=8, depth=1)
    with pytest.raises(InputError, match="student must be given by the file or by the caller"):
        trainer_from_file(write(tmp_path, run), student=own)
    del run["student"]
    assert trainer_from_file(write(tmp_path, run), student=own)[0].student is own


def store_labels(root: Path, names: list[str], classes: int) -> None:
    """A store whose labels are 1 in the upper half of 20 x 24 pixels, and abstained from below."""
    logits = torch.zeros(20, classes, 4, 4)
    calibration = SplitCalibrator().update(logits, logits.argmax(1)).compute(0.25)
    store = PseudoLabelStore.create(
        root, calibration, classes=[str(c) for c in range(classes)], model="none", split="all"
    )
    for name in names:
        store.write(name, torch.tensor([[1]] * 10 + [[255]] * 10).expand(20, 24))


def test_split_files_may_map_ids_and_leave_labels_to_a_store(
    tmp_path: Path, run: dict[str, Any]
) -> None:
    run["labeled"] = {**run["labeled"], "id_map": {"0": 5, "1": 4}}
    run["unlabeled"] = {**run["unlabeled"], "store": "filtered"}
    store_labels(tmp_path / "filtered", ["0", "1", "2"], 6)
    folders = trainer_from_file(write(tmp_path, run))[1]
    assert folders["labeled"].id_map == {0: 5, 1: 4}
    assert [set(labels.flatten().tolist()) for _, labels in folders["unlabeled"]] == [{1, 255}] * 3


# Image and mask of a training and a validation image, and one name for each part.
LAYOUTS = {
    "voc2012": (
        ("JPEGImages/{0}.jpg", "SegmentationClassAug/{0}.png"),
        ("JPEGImages/{0}.jpg", "SegmentationClassAug/{0}.png"),
        ("2007_000733", "2007_000032", "2007_000033"),
    ),
    "ade20k": (
        ("images/training/{0}.jpg", "annotations/training/{0}.png"),
        ("images/validation/{0}.jpg", "annotations/validation/{0}.png"),
        ("ADE_train_00000001", "ADE_train_00000002", "ADE_val_00000001"),
    ),
    "coco": (
        ("train2017/{0}.jpg", "masks/{0}.png"),
        ("val2017/{0}.jpg", "masks/{0}.png"),
        ("000000177254", "000000000009", "000000000139"),
    ),
    "cityscapes": (
        (
            "leftImg8bit/train/{1}/{0}_leftImg8bit.png",
            "gtFine/train/{1}/{0}_gtFine_labelIds.png",
        ),
        ("leftImg8bit/val/{1}/{0}_leftImg8bit.png", "gtFine/val/{1}/{0}_gtFine_labelIds.png"),
        ("jena_000078_000019", "jena_000032_000019", "frankfurt_000000_000294"),
    ),
}
CONFIGS = Path(__file__).parents[1] / "examples" / "configs"


def miniature(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    """Three pictures in the folder's own layout, as if the published lists held no more."""
    train, validation, names = LAYOUTS[name]
    labeled, unlabeled, held = names
    places = ((train, labeled), (train[:1], unlabeled), (validation, held))
    for paths, each in places:
        for path in paths:
            place = root / path.format(each, each.partition("_")[0])
            place.parent.mkdir(parents=True, exist_ok=True)
            image_module.new("L", (24, 20), 7).save(place)
    lists = {
        "train_aug": [labeled, unlabeled],
        "train": [labeled, unlabeled],
        "val": [held],
        "1464": [],
    }

    def published_split(dataset: str, split: str) -> list[str]:
        return lists.get(split, [labeled]) if dataset == name else []

    def ade20k_labeled(denominator: int) -> list[str]:
        return [labeled] if denominator > 1 else [labeled, unlabeled]

    for few in (published_split, ade20k_labeled):
        monkeypatch.setattr(sys.modules[f"cpseg.data._{name}"], few.__name__, few, raising=False)
    return names


@pytest.mark.parametrize("name", LAYOUTS)
def test_ready_configurations_train_on_a_miniature_of_their_folder(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    names = miniature(tmp_path / run["labeled"]["root"], name, monkeypatch)
    image = Path(LAYOUTS[name][0][0].format(names[1], "")).stem  # a store goes by file names
    store_labels(tmp_path / run["unlabeled"]["store"], [image], run["recipe"]["num_classes"])
    # What is checked but the sizes, which are made small, and the processes, which are slow.
    run["recipe"] |= {"external_steps": 1, "self_steps": 1, "crop": [16, 16]}
    run["train"] |= {"labeled_batch": 1, "unlabeled_batch": 1, "workers": 0}
    run["student"] = {"width": 4, "depth": 1}
    said: list[str] = []
    assert train_from_file(write(tmp_path, run), report=said.append).steps == 2
    assert [line.partition(",")[0] for line in said[:3]] == [
        f"{part}: 1 images" for part in ("labeled", "unlabeled", "validation")
    ]
    folders = trainer_from_file(tmp_path / "config.json")[1]
    found = [folders[part].name(0).removesuffix("_leftImg8bit") for part in folders]
    assert tuple(found) == names
    assert set(folders["unlabeled"][0][1].flatten().tolist()) == {1, 255}


def test_folders_of_published_sets_start_where_the_file_lies(
    tmp_path: Path, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = miniature(tmp_path / "VOC", "voc2012", monkeypatch)[0]
    run["labeled"] = {"dataset": "voc2012", "root": "VOC", "masks": "none", "sbd": "SBD"}
    del run["unlabeled"], run["validation"]
    run["recipe"] = {"name": "supervised", "num_classes": 21, "steps": 1, "crop": [8, 8]}
    with pytest.raises(FileError, match=rf"{tmp_path}/SBD/cls/{held}\.mat is missing"):
        train_from_file(write(tmp_path, run))
    run["recipe"]["num_classes"] = 20
    with pytest.raises(InputError, match="num_classes must be the 21 of labeled; got 20"):
        trainer_from_file(write(tmp_path, run))


def test_there_is_a_miniature_for_every_ready_configuration() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(LAYOUTS)
