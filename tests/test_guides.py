"""The code of the pages on annotators and training, block by block as it stands there.

What nobody can have at hand, weights and whole data sets, is tiny or made up here.
"""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cpseg
from cpseg import Calibration, Singleton, SplitCalibrator, annotators, data, training
from cpseg.annotators import SyntheticAnnotator, seem
from cpseg.cli import main
from cpseg.data import SyntheticShapes
from cpseg.errors import FileError, InputError
from cpseg.training import (
    Batch,
    Normalize,
    OnlineAnnotator,
    PseudoLabelStore,
    TrainConfig,
    Trainer,
    TwoStageObjective,
    UNet,
    conformal_sam,
    refine,
)
from cpseg.training.config import trainer_from_file

PAGES = Path(__file__).parents[1] / "docs/how-to"
CPU = torch.device("cpu")


def blocks(page: str, language: str = "python") -> list[str]:
    text = (PAGES / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def public() -> dict[str, Any]:
    """The names a page may take as known: all that cpseg brings up, torch, and replace."""
    names: dict[str, Any] = {"__name__": "page", "torch": torch, "nn": nn, "replace": replace}
    for module in (cpseg, annotators, data, training):
        names |= {name: getattr(module, name) for name in module.__all__}
    return names


class Guide:
    """A page that is run in pieces; each gets what the text before it takes for granted."""

    def __init__(self, page: str) -> None:
        self.names = public()
        self.left = blocks(page)

    def run(self, start: str, **given: Any) -> dict[str, Any]:
        """Run the next block, which begins so."""
        code = self.left.pop(0)
        assert code.startswith(start)
        self.names |= given
        exec(compile(code, "page", "exec"), self.names)  # noqa: S102 - our own page
        return self.names


def calibration(classes: int = 3, source: str | None = None) -> Calibration:
    logits = torch.randn(20, classes, 4, generator=torch.Generator().manual_seed(0))
    calibrator = SplitCalibrator(source=source).update(logits, logits.argmax(1))
    return calibrator.compute(0.2)


def write_seem(path: Path) -> None:
    """A tiny random SEEM."""
    config = seem.SEEMConfig(
        embed_dim=8,
        depths=(1, 1, 1, 1),
        focal_levels=2,
        dim=32,
        heads=1,
        feedforward=64,
        encoder_layers=1,
        decoder_layers=3,
        queries=7,
        text_vocabulary=64,
        text_context=77,
        text_layers=1,
        text_heads=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(seem.SEEM(config).state_dict(), path)


def letters(texts: list[str]) -> Tensor:
    """A token per letter, between a start and an end."""
    rows = torch.zeros(len(texts), 77, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        ids = [62, *(ord(letter) % 50 + 1 for letter in text[:70]), 63]
        row[: len(ids)] = torch.tensor(ids)
    return rows


def test_annotators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers: Any = pytest.importorskip("transformers")
    nibabel: Any = pytest.importorskip("nibabel")
    monkeypatch.chdir(tmp_path)
    guide = Guide("annotators.md")
    known = SimpleNamespace(source="seem, two classes")
    guide.run(
        "from cpseg.annotators import check_source",
        annotator=known,
        calibrator=SplitCalibrator(source=known.source),
        calibration=calibration(source=known.source),
    )
    images = torch.randint(256, (1, 3, 32, 64), dtype=torch.uint8)
    write_seem(tmp_path / "seem_focalt_v1.pt")
    local = partial(seem.SEEMAnnotator, tokenizer=letters, short=32)
    monkeypatch.setattr(seem, "SEEMAnnotator", local)  # the tokenizer is on the hub
    found = guide.run("from cpseg.annotators.seem", images=images, device="cpu")
    assert found["logits"].shape == (1, 3, 32, 64)

    asked: list[tuple[Any, ...]] = []

    def pretrained(kind: type) -> Callable[..., Any]:
        def load(*given: Any, **named: Any) -> Any:
            asked.append((kind.__name__, *given, *named))
            return SyntheticAnnotator(num_classes=3)

        return load

    for kind in (annotators.MaskClassAnnotator, annotators.TextPromptAnnotator):
        monkeypatch.setattr(kind, "from_pretrained", pretrained(kind))
    guide.run("from cpseg.annotators import MaskClassAnnotator")
    ids = {"input_ids": torch.ones(1, 77).long(), "attention_mask": torch.ones(1, 77).long()}
    tokenizer = SimpleNamespace(from_pretrained=lambda _: lambda *_, **__: ids)
    monkeypatch.setattr(transformers, "CLIPTokenizer", tokenizer)
    guide.run("from transformers import CLIPTokenizer")
    kinds = ["MaskClassAnnotator", "TextPromptAnnotator", "MaskClassAnnotator"]
    assert [given[0] for given in asked] == kinds
    assert asked[1][2] == ["background", "cat", "dog"]
    assert asked[2][2] == "inputs"

    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    logits[0, :, 0, 0] = torch.nan
    calibrator = SplitCalibrator()
    guide.run("from cpseg.annotators.sam_clip", calibrator=calibrator, logits=logits, labels=labels)
    assert int(calibrator.compute(0.5).num_pixels) == 39

    class Brightness:
        source = "brightness"

        def __call__(self, images: Tensor) -> Tensor:
            return torch.stack([images.float().mean(1) / 50, images.float().amax(1) / 60], 1)

    held_out = [
        (torch.randint(256, (4, 3, 4, 5), dtype=torch.uint8), torch.randint(2, (4, 4, 5)))
        for _ in range(3)
    ]
    found = guide.run(
        "from cpseg.annotators import CachedAnnotator",
        annotator=Brightness(),
        num_classes=2,
        held_out=held_out,
    )
    assert found["calibration"].num_units.tolist() == [12, 12]

    network = nn.Conv2d(3, 2, 1)
    found = guide.run(
        "from cpseg import GroupCalibrator",
        network=network,
        B=3,
        L=2,
        H=4,
        W=5,
        images=torch.randint(256, (3, 3, 4, 5), dtype=torch.uint8),
        labels=torch.randint(2, (3, 2, 4, 5)),
        image_ids=torch.arange(3),
    )
    assert found["logits"].shape == (6, 2, 4, 5)

    shares = np.random.default_rng(0).random((2, 3, 4, 5)).astype("f4")
    np.savez("case_001.npz", probabilities=shares / shares.sum(0))
    Path("labels").mkdir()
    for name in ("case_001.nii.gz", "labels/case_001.nii.gz"):
        truth = nibabel.Nifti1Image(np.zeros((5, 4, 3), "u1"), np.diag([1.0, 1.0, 2.0, 1.0]))
        nibabel.save(truth, name)
    found = guide.run("from cpseg import logits_from_probabilities")
    assert found["logits"].shape == (1, 2, 3, 4, 5)
    assert found["truth"].shape == found["case"].values.shape[1:] == (3, 4, 5)
    assert guide.left == []


def test_the_command_of_the_page_on_annotators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image: Any = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("annotators.md", "console")
    (command,) = re.findall(r"^\$ python -m cpseg (.*)", code.replace("\\\n", " "))
    Path("images").mkdir()
    image.fromarray(np.zeros((32, 40, 3), "u1")).save("images/a.png")
    Path("classes.txt").write_text("background\ncat: cat, kitten\n")
    write_seem(tmp_path / "seem_focalt_v1.pt")

    def tokenized(*given: Any, **named: Any) -> Any:  # the tokenizer is on the hub
        return seem.SEEMAnnotator(*given, **{**named, "tokenizer": letters, "short": 32})

    monkeypatch.setattr("cpseg.annotators.folder.SEEMAnnotator", tokenized)
    assert main([*shlex.split(command), "--device", "cpu"]) == 0
    assert Path("cache/images.json").exists()


def test_the_examples_of_help_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image: Any = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_seem(tmp_path / "seem_focalt_v1.pt")
    Path("classes.txt").write_text("background\ncat: cat, kitten\n")
    Path("patients.csv").write_text("".join(f"{name},{name // 2}\n" for name in range(6)))
    for folder in ("photos", "test-photos", "masks", "test-masks", "softmax"):
        Path(folder).mkdir()
    for name in range(6):
        noise = np.random.default_rng(name).integers(0, 255, (32, 40, 3), "u1")
        for folder in ("photos", "test-photos"):
            image.fromarray(noise // (1 + (folder == "photos"))).save(f"{folder}/{name}.png")
        for folder in ("masks", "test-masks"):
            image.fromarray((noise[..., 0] > 200).astype("u1")).save(f"{folder}/{name}.png")
        shares = torch.rand(2, 32, 40, generator=torch.Generator().manual_seed(name)).softmax(0)
        np.save(f"softmax/{name}.npy", shares.numpy())
    write_voc(Path("VOC2012"))
    recipe = {"name": "supervised", "num_classes": 6, "steps": 1, "crop": [16, 16]}
    part = {"root": "VOC2012", "split": "labeled.txt"}
    config = {"recipe": recipe, "student": {"width": 4, "depth": 1}, "labeled": part}
    Path("config.json").write_text(json.dumps({**config, "directory": "run"}))

    def tokenized(*given: Any, **named: Any) -> Any:  # the tokenizer is on the hub
        return seem.SEEMAnnotator(*given, **{**named, "tokenizer": letters, "short": 32})

    monkeypatch.setattr("cpseg.annotators.folder.SEEMAnnotator", tokenized)

    def examples(command: str) -> list[list[str]]:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told = capsys.readouterr().out.replace("\\\n", " ")
        return [shlex.split(words) for words in re.findall(r"  python -m cpseg (.*)", told)]

    (annotate,) = examples("annotate")
    assert main(annotate) == 0
    of_test = {"photos": "test-photos", "logits": "test-logits"}
    assert main([of_test.get(word, word) for word in annotate]) == 0
    by_cache, by_arrays = examples("calibrate")
    assert main(by_arrays) == 0
    assert main(by_cache) == 0
    for command in ("filter", "report", "train"):
        (words,) = examples(command)
        assert main(words) == 0, words
    assert Path("report.html").exists()
    assert len(list(Path("pseudo-labels").glob("*.png"))) == 6
    (demo,) = examples("demo")
    small = ["--no-students", "--calibration-images", "12", "--new-images", "2"]
    assert main([*demo, *small]) == 0
    assert Path("figures/image.png").exists()


def write_voc(root: Path) -> None:
    image: Any = pytest.importorskip("PIL.Image")
    root.mkdir()
    for index, (picture, label) in enumerate(SyntheticShapes(length=3, size=(40, 36), seed=0)):
        image.fromarray(picture.permute(1, 2, 0).numpy()).save(root / f"{index}.png")
        image.fromarray(label.byte().numpy()).save(root / f"m{index}.png")
    Path("labeled.txt").write_text("0.png m0.png\n1.png m1.png\n")
    Path("unlabeled.txt").write_text("2.png m2.png\n")


def short(config: TrainConfig) -> TrainConfig:
    """The same run with a step per stage and small crops, in float32."""
    stages = tuple(replace(stage, steps=1) for stage in config.stages)
    side = 28 if config.crop == (518, 518) else 32
    return replace(config, stages=stages, crop=(side, side), precision="fp32", evaluate_every=1)


def trains_shortly(student: nn.Module, config: TrainConfig, **given: Any) -> Trainer:
    return Trainer(student, short(config), device=CPU, **given)


def test_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers: Any = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    shapes = list(SyntheticShapes(length=3, size=(40, 36), seed=0))
    given = {"labeled": shapes, "unlabeled": shapes, "validation": shapes[:1]}
    guide = Guide("training.md")
    guide.names["Trainer"] = trains_shortly
    found = guide.run("from dataclasses", student=UNet(21, width=4, depth=1), **given)
    assert len(capsys.readouterr().out.split()) == 4  # two steps, each with its mIoU
    assert found["config"].evaluate_every == 1000

    write_voc(Path("VOC2012"))
    store = PseudoLabelStore.create(
        "filtered", calibration(21), classes=[str(c) for c in range(21)], model="m", split="s"
    )
    store.write("2", torch.zeros(40, 36, dtype=torch.int64))
    found = guide.run("labeled = SegmentationFolder")
    assert (len(found["labeled"]), len(found["unlabeled"])) == (2, 1)
    assert found["unlabeled"][0][1].shape == (40, 36)
    logits = {"2": torch.randn(21, 40, 36)}
    found = guide.run("from cpseg.filters", calibration=calibration(21), logits=logits)
    assert found["unlabeled"][0][1].shape == (21, 40, 36)
    folders = {name: found[name] for name in ("labeled", "unlabeled")}
    found = guide.run("from cpseg.training import Stage")
    share = replace(folders["unlabeled"], load_labels=found["shares"])[0][1]
    assert torch.equal(share > 0, folders["unlabeled"][0][1] > 0)
    torch.testing.assert_close(share.sum(0), (share > 0).any(0).float())
    found = guide.run("labeled = voc2012")
    assert len(found["labeled"]) == 92

    torch.manual_seed(0)
    label = torch.randint(21, (40, 36))
    label[0] = 255
    found = guide.run(
        "from cpseg.training import class_weights_from",
        labeled=[(shapes[0][0], label)],
        num_classes=21,
    )
    assert len(set(found["config"].class_weights)) > 1
    known = [(shapes[0][0], torch.randn(21, 40, 36), label) for _ in range(38)]  # 19 in a half
    pictures = {"2": shapes[2][0]}
    monkeypatch.setattr("cpseg.training.refine", partial(refine, steps=2))
    found = guide.run(
        "from torch import nn", labeled_with_logits=known, pictures=pictures, **folders
    )
    told = found["unlabeled"][0][1]
    torch.testing.assert_close(told.sum(0), torch.ones(40, 36))
    assert not torch.equal(told, logits["2"].softmax(0))
    assert [len(each.thresholds) for each in found["both"].calibrations] == [21, 21]
    assert [int(each.num_units.max()) for each in found["both"].calibrations] == [19, 19]
    assert found["trainer"].config.class_weights == found["config"].class_weights
    assert found["trainer"].batches.color == found["mild"]
    found["trainer"].fit()

    sizes = transformers.SegformerConfig(
        num_labels=21,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=16,
    )
    transformers.SegformerForSemanticSegmentation(sizes).save_pretrained("segformer")
    sizes = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(sizes).save_pretrained("dinov2")
    smp = SimpleNamespace(Unet=lambda _, classes: UNet(classes, width=4, depth=1))
    for start, more in (
        ("student = transformers.Segformer", {"weights": "segformer"}),
        ("class DinoStudent", {"weights": "dinov2"}),
        ("student = smp.Unet", {"smp": smp}),
    ):
        found = guide.run(start, transformers=transformers, **more)
        config = found["config"]
        if start.startswith("student = smp"):  # its names of parameters are not our network's
            config = replace(config, head=("head",))
        sets = {name: found[name] for name in ("labeled", "unlabeled")}
        run = trains_shortly(found["student"], config, **sets, directory=f"runs/{start}")
        assert all(bool(step.loss.isfinite()) for step in run.steps())

    guide.run("sure = SyntheticAnnotator")
    student = UNet(6, width=4, depth=1)
    config = conformal_sam(6, external_steps=2, self_steps=1, crop=(8, 8))
    batch = Batch(
        images=torch.randn(1, 3, 8, 8),
        labels=torch.randint(6, (1, 8, 8)),
        weak=torch.randn(1, 3, 8, 8),
        strong=(),
        external=torch.randint(6, (1, 8, 8)),
        valid=torch.ones(1, 8, 8, dtype=torch.bool),
    )
    guide.run(
        "output = objective",
        objective=TwoStageObjective(config.stages),
        student=student,
        teacher=student,
        batch=batch,
        step=0,
    )
    assert any(parameter.grad is not None for parameter in student.parameters())
    assert guide.left == []


def test_the_file_of_the_page_on_training_has_keys_that_are_known(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    (code,) = blocks("training.md", "json")
    path = tmp_path / "config.json"
    path.write_text(code)
    with pytest.raises(FileError, match="filtered"):  # every key was read; no store is here
        trainer_from_file(path)
    path.write_text(code.replace('"threshold"', '"treshold"'))
    with pytest.raises(InputError, match="Did you mean 'threshold'"):
        trainer_from_file(path)


def annotates(images: Tensor) -> Tensor:
    return torch.stack([images.float().mean(1) / 60, images.float().amax(1) / 60, images[:, 0]], 1)


def test_putting_labels_into_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    guide = Guide("training-plugin.md")
    keep = Singleton(calibration())
    Path("splits/pascal/92").mkdir(parents=True)
    Path("splits/pascal/92/unlabeled.txt").write_text("JPEGImages/a.jpg SegmentationClass/a.png\n")
    found = guide.run(
        "store = PseudoLabelStore",
        calibration=calibration(),
        names=["a", "b", "c"],
        annotated=[("a", torch.randn(1, 3, 4, 6))],
        keep=keep,
    )
    assert found["store"].names() == ["a"]
    assert Path("filtered/unlabeled.txt").read_text().split()[1].endswith("a.png")
    mask = torch.randint(3, (2, 4, 6))
    found = guide.run(
        "limits = confidence_thresholds",
        num_classes=3,
        conf_u_w=torch.rand(2, 4, 6),
        mask_u_w=mask,
    )
    assert found["keep"].dtype == torch.bool
    raw = torch.randint(0, 256, (2, 3, 4, 6)).float()
    found = guide.run(
        "online = OnlineAnnotator",
        annotator=annotates,
        keep=keep,
        img_u_w=Normalize()(raw / 255),
    )
    assert found["ext"].shape == (2, 4, 6)
    assert isinstance(found["online"], OnlineAnnotator)
    shapes = list(SyntheticShapes(length=2, size=(16, 16), seed=0))
    guide.names["Trainer"] = partial(Trainer, device=CPU)
    guide.run(
        "Trainer(",
        student=UNet(3, width=4, depth=1),
        config=conformal_sam(3, external_steps=1, self_steps=1, crop=(8, 8)),
        labeled=shapes,
        unlabeled=shapes,
    )
    assert guide.left == []


@pytest.mark.parametrize("number", range(6))
def test_what_the_diffs_call_of_ours_can_be_called_so(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    added = [line[1:] for line in blocks("training-plugin.md", "diff")[number].splitlines()]
    calls = [line for line in added if re.search(r"cpseg|merge_pseudo_labels|masked_cross", line)]
    generator = torch.Generator().manual_seed(number)
    names: dict[str, Any] = {
        name: torch.randint(3, (2, 4, 6), generator=generator)
        for name in ("mask_u_w", "mask_u_w_mix", "pseudo_label")
    }
    names |= {name: torch.rand(2, 4, 6) for name in ("conf_u_w", "conf_u_w_mix")}
    ext = torch.randint(3, (2, 4, 6), generator=generator)
    ext[:, 0] = 255
    names |= {name: torch.randn(2, 3, 4, 6) for name in ("pred_u", "pred_u_pseudo")}
    names |= {"ext": ext, "ext_mix": ext}
    exec("\n".join(map(str.strip, calls)), names)  # noqa: S102 - our own page
    for label, confidence in (
        ("mask_u_w", "conf_u_w"),
        ("mask_u_w_mix", "conf_u_w_mix"),
        ("pseudo_label", "conf"),
    ):
        if any(line.strip().startswith(f"{label}, {confidence} = ") for line in calls):
            assert bool((names[label] < 3).all())
            assert torch.equal(names[confidence] == -1, ext == 255)
    if "loss_u" in names:
        assert bool(names["loss_u"].isfinite())
