"""Labels made on the crop by a frozen annotator, inside the trainer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpseg.data import SyntheticShapes
from cpseg.errors import InputError
from cpseg.training import OnlineAnnotator, Stage, TrainConfig, Trainer, UNet

CPU = torch.device("cpu")


class Frozen(nn.Module):
    """An annotator whose class is the brightness of the red channel: it needs no labels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.arange(classes) * 255.0 / (classes - 1))
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return -(images[:, :1] - self.levels.view(1, -1, 1, 1)).abs()


def all_but_dim(logits: Tensor) -> Tensor:
    """A filter that abstains from the third class."""
    labels = logits.argmax(1)
    return torch.where(labels == 2, 255, labels)


def online_run(directory: Path, annotator: Any, *, cached: bool = False, **stage: Any) -> Trainer:
    """A run whose unlabeled images have labels, or none and an annotator."""
    shapes = [(image, label) for image, label in SyntheticShapes(length=6, size=(20, 24), seed=1)]
    if cached:
        scaled = [image[None].float() for image, _ in shapes]
        labels = [all_but_dim(annotator(image))[0] for image in scaled]
        unlabeled = [(image, label) for (image, _), label in zip(shapes, labels, strict=True)]
    else:
        unlabeled = [(image, torch.full_like(label, 255)) for image, label in shapes]
    config = TrainConfig(
        num_classes=6,
        stages=(
            Stage(name="external", steps=3, **stage),
            Stage(name="self", steps=2, source="student"),
        ),
        crop=(20, 24),
        scale=(1.0, 1.0),  # so that labels made before and after the crop are the same
        lr=0.1,
        log_every=1,
        save_every=2,
    )
    torch.manual_seed(0)
    return Trainer(
        UNet(6, width=4, depth=1),
        config,
        labeled=shapes[:3],
        unlabeled=unlabeled,
        directory=directory,
        annotator=None if cached else OnlineAnnotator(annotator, all_but_dim, chunk=1),
        device=CPU,
    )


def logged(directory: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [(line["loss_unlabeled"], line["kept"]) for line in lines if "kept" in line]


def test_labels_made_on_the_crop_train_as_cached_ones_do(tmp_path: Path) -> None:
    annotator = Frozen(6)
    before = annotator.levels.detach().clone()
    online = online_run(tmp_path / "online", annotator)
    online.fit()
    assert len(annotator.seen) == 3 * 2  # two images a step, in the first stage alone
    assert not any(seen.requires_grad for seen in annotator.seen)
    assert not annotator.training
    assert torch.equal(annotator.levels, before)
    assert annotator.levels.grad is None
    online_run(tmp_path / "cached", annotator, cached=True).fit()
    found, expected = logged(tmp_path / "online"), logged(tmp_path / "cached")
    assert [kept for _, kept in found] == [kept for _, kept in expected]
    assert all(0 < kept < 1 for _, kept in found[:3])
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-5)


def test_a_run_with_an_annotator_resumes_to_the_bit(tmp_path: Path) -> None:
    straight = online_run(tmp_path / "a", Frozen(6))
    straight.fit()
    for step in online_run(tmp_path / "b", Frozen(6)).steps():
        if step.number == 2:
            break
    resumed = online_run(tmp_path / "b", Frozen(6))
    resumed.fit(resume=True)
    for a, b in zip(straight.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_annotator_is_asked_where_its_labels_are_merged_and_not_elsewhere(
    tmp_path: Path,
) -> None:
    cases: list[tuple[dict[str, Any], int]] = [
        ({"source": "student", "merge": "agree"}, 6),
        ({"source": "student"}, 0),
    ]
    for index, (stage, asked) in enumerate(cases):
        annotator = Frozen(6)
        online_run(tmp_path / str(index), annotator, **stage).fit()
        assert len(annotator.seen) == asked


def test_an_annotator_with_other_classes_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=r"annotator must return classes in \[0, 6\) or 255; got"):
        online_run(tmp_path, Frozen(60)).fit()
    assert not (tmp_path / "last.pt").exists()
    assert (tmp_path / "log.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda image: torch.zeros(len(image), 5, 5, dtype=torch.int64), r"got \(2, 5, 5\)"),
        (lambda image: image.long(), r"shape \(2, 20, 24\), one per pixel; got \(2, 3, 20, 24\)"),
        (lambda image: image[:, 0], "annotator's labels must"),
    ],
)
def test_an_annotator_without_a_label_per_pixel_is_refused(
    tmp_path: Path, labels: Any, message: str
) -> None:
    run = online_run(tmp_path, Frozen(6))
    run.annotator = labels
    with pytest.raises(InputError, match=message):
        run.fit()
