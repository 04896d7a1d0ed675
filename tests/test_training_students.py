"""Students: ours learns shapes in seconds; transformers' networks train as they are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpseg.data import SyntheticShapes
from cpseg.errors import InputError
from cpseg.training import Evaluation, TrainConfig, Trainer, UNet, evaluate
from cpseg.training.recipes import conformal_sam, supervised

CPU = torch.device("cpu")


def majority_miou(shapes: list[tuple[Tensor, Tensor]], classes: int) -> float:
    """The mIoU of always answering the most frequent class."""
    counts = torch.stack(
        [torch.bincount(label[label != 255], minlength=classes) for _, label in shapes]
    )
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion[:, int(counts.sum(0).argmax())] = counts.sum(0)
    return Evaluation(confusion).miou


def test_the_small_student_learns_shapes(tmp_path: Path) -> None:
    shapes = list(SyntheticShapes(length=40, size=(32, 32), seed=0))
    unseen = list(SyntheticShapes(length=20, size=(32, 32), seed=1))
    config = replace(
        supervised(6, steps=150, crop=(32, 32)),
        optimizer="adamw",
        lr=1e-2,
        labeled_batch=4,
        scale=(1.0, 1.0),
        log_every=1000,
    )
    torch.manual_seed(0)
    trainer = Trainer(
        UNet(6, width=8, depth=1), config, labeled=shapes, directory=tmp_path, device=CPU
    )
    losses = [step.loss for step in trainer.steps()]
    assert float(torch.stack(losses[-20:]).mean()) < 0.3 * float(losses[0])
    found = evaluate(trainer.student, unseen, num_classes=6)
    assert found.miou > 2 * majority_miou(unseen, 6)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_groups_alone_leave_an_image_to_itself(norm: Any) -> None:
    torch.manual_seed(0)
    network, images = UNet(3, width=4, depth=1, norm=norm), torch.randn(3, 3, 9, 8)
    alone, together = network(images[:1]), network(images)[:1]
    assert torch.allclose(alone, together, atol=1e-5) == (norm == "group")
    with pytest.raises(InputError, match='norm must be "group" or "batch"'):
        UNet(3, norm="layer")  # type: ignore[arg-type]


def run(student: nn.Module, directory: Path, crop: int, **change: Any) -> TrainConfig:
    """Two stages of one step; evaluation at a size that no crop had."""
    config = replace(conformal_sam(6, external_steps=2, self_steps=1, crop=(crop, crop)), **change)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    trainer = Trainer(
        student,
        config,
        labeled=list(SyntheticShapes(length=3, size=(40, 36), seed=0)),
        unlabeled=list(SyntheticShapes(length=3, size=(40, 36), seed=1)),
        validation=list(SyntheticShapes(length=1, size=(37, 45), seed=2)),
        directory=directory,
        device=CPU,
    )
    assert all(bool(step.loss.isfinite()) for step in trainer.steps())
    after = list(student.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return config


def test_a_segformer_trains_as_it_is(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = transformers.SegformerConfig(
        num_labels=6,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=16,
    )
    student = transformers.SegformerForSemanticSegmentation(sizes)
    run(student, tmp_path, 32, head=("decode_head",), head_multiplier=10.0)


class DinoStudent(nn.Module):
    """The recipe of docs/how-to/training.md."""

    def __init__(self, backbone: Any, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(backbone.config.hidden_size, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        patch = self.backbone.config.patch_size
        height, width = images.shape[2] // patch, images.shape[3] // patch
        tokens = self.backbone(images).last_hidden_state[:, 1:]
        features = tokens.transpose(1, 2).unflatten(2, (height, width))
        return self.head(features)  # type: ignore[no-any-return]


def test_a_dinov2_backbone_with_a_head_trains(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    student = DinoStudent(transformers.Dinov2Model(sizes), 6)
    run(student, tmp_path, 28, divisor=14, head=("head",), head_multiplier=40.0)


def test_a_student_of_segmentation_models_pytorch_trains_as_it_is(tmp_path: Path) -> None:
    models = pytest.importorskip("segmentation_models_pytorch")
    student = models.Unet("resnet18", encoder_weights=None, classes=6)
    run(student, tmp_path, 32, divisor=32, head=("decoder", "segmentation_head"))
