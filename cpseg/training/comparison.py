"""What filtering is worth to a student: the same network on raw, filtered and no external labels."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

import torch
from torch import Tensor, nn

from cpseg import _checks
from cpseg.annotators import SyntheticAnnotator
from cpseg.calibrators import SplitCalibrator
from cpseg.data import SyntheticShapes
from cpseg.errors import InputError
from cpseg.filters import BackgroundPriority
from cpseg.training.batches import Labeled
from cpseg.training.recipes import conformal_sam, supervised
from cpseg.training.students import UNet
from cpseg.training.trainer import TrainConfig, Trainer

__all__ = [
    "Comparison",
    "Relabeled",
    "StudentResult",
    "biased_annotator",
    "compare_on_shapes",
]


@final
@dataclass(frozen=True, eq=False, slots=True)
class Relabeled:
    """A dataset's images with other labels, such as external ones.

    Attributes:
        dataset: Where the images are from; their own labels are dropped.
        labels: The labels of each image instead. Integer ``(H, W)`` each.
    """

    dataset: Labeled
    labels: list[Tensor]

    def __post_init__(self) -> None:
        if len(self.dataset) != len(self.labels):
            raise InputError(
                f"labels must hold one map per image, {len(self.dataset)}; got {len(self.labels)}"
            )

    def __len__(self) -> int:
        """How many images."""
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]:
        """The image and its other labels."""
        return self.dataset[index][0], self.labels[index]


@final
@dataclass(frozen=True, slots=True)
class StudentResult:
    """One student.

    Attributes:
        name: What it learned from.
        miou: On images it has not seen, at the end of its training; no step was chosen on them.
    """

    name: str
    miou: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How to compare; the defaults fit a laptop's CPU.

    Attributes:
        labeled_images: Images with labels; they train and they calibrate the frozen annotator.
        unlabeled_images: Images that the annotator labels.
        test_images: Images that measure the students.
        alpha: Level of the calibration; its thresholds are one for all classes.
        steps: Of every student; of the last, a third are self-reliance.
        seed: Of images, annotator, network and training.
        annotator: Whose labels; None: :func:`biased_annotator` of ``seed``.
    """

    labeled_images: int = 24
    unlabeled_images: int = 120
    test_images: int = 60
    alpha: float = 0.05
    steps: int = 300
    seed: int = 0
    annotator: SyntheticAnnotator | None = None

    def __post_init__(self) -> None:
        _checks.check_alpha(self.alpha)
        _checks.check_integer("steps", self.steps, 3)


def biased_annotator(seed: int = 0) -> SyntheticAnnotator:
    """An annotator that fails as foundation models do: over-confident, and too fond of background.

    Its labels miss most of the foreground, where the right class is nearly as likely as the
    background. It was chosen so, after other settings had been tried.

    Args:
        seed: Of its errors.
    """
    return SyntheticAnnotator(
        num_classes=len(SyntheticShapes.classes),
        background_bias=5.5,
        error_rate=0.05,
        temperature=0.5,
        seed=seed,
    )


def compare_on_shapes(settings: Comparison = Comparison()) -> Iterator[StudentResult]:
    """Train four equal students on :class:`~cpseg.data.SyntheticShapes`, one after the other.

    They see the labeled images, and as external labels of the others: none; the annotator's most
    likely class everywhere; what :class:`~cpseg.filters.BackgroundPriority` makes of the
    calibrated sets; the same, then their own.

    Args:
        settings: Sizes, level and seed.

    Yields:
        ``"labels only"``, ``"raw"``, ``"filtered"``, ``"filtered, then self-reliance"``; each
        student is trained when its result is asked for.
    """
    seed = 3 * settings.seed
    labeled = list(SyntheticShapes(length=settings.labeled_images, seed=seed))
    unlabeled = list(SyntheticShapes(length=settings.unlabeled_images, seed=seed + 1))
    test = list(SyntheticShapes(length=settings.test_images, seed=seed + 2))
    classes = len(SyntheticShapes.classes)
    annotator = settings.annotator or biased_annotator(settings.seed)
    calibrator = SplitCalibrator()
    for logits, labels in _annotated(annotator, labeled, 0):
        calibrator.update(logits, labels)
    keep = BackgroundPriority(calibrator.compute(settings.alpha))
    raw: list[Tensor] = []
    filtered: list[Tensor] = []
    for logits, _ in _annotated(annotator, unlabeled, settings.labeled_images):
        raw.append(logits[0].argmax(0))
        filtered.append(keep(logits)[0].long())
    alone = supervised(classes, steps=settings.steps, crop=(64, 64))
    first = conformal_sam(classes, external_steps=settings.steps, self_steps=0, crop=(64, 64))
    last = settings.steps // 3
    both = conformal_sam(
        classes, external_steps=settings.steps - last, self_steps=last, crop=(64, 64)
    )
    runs: list[tuple[str, TrainConfig, list[Tensor] | None]] = [
        ("labels only", alone, None),
        ("raw", first, raw),
        ("filtered", first, filtered),
        ("filtered, then self-reliance", both, filtered),
    ]
    for name, config, external in runs:
        torch.manual_seed(settings.seed)
        others = None if external is None else Relabeled(unlabeled, external)
        miou = _train(
            UNet(classes, width=8),
            config,
            seed=settings.seed,
            labeled=labeled,
            unlabeled=others,
            test=test,
        )
        yield StudentResult(name, miou)


def _annotated(
    annotator: SyntheticAnnotator, shapes: list[tuple[Tensor, Tensor]], first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for index, (_, label) in enumerate(shapes):
        yield annotator(label[None], seeds=[first + index]), label[None]


def _train(
    student: nn.Module,
    config: TrainConfig,
    *,
    seed: int,
    labeled: Labeled,
    unlabeled: Labeled | None,
    test: Labeled,
) -> float:
    config = replace(
        config,
        optimizer="adamw",
        lr=1e-2,
        clip=1.0,
        labeled_batch=8,
        unlabeled_batch=8,
        scale=(0.8, 1.25),
        seed=seed,
    )
    with TemporaryDirectory() as directory:
        trainer = Trainer(
            student,
            config,
            labeled=labeled,
            unlabeled=unlabeled,
            validation=test,
            directory=Path(directory),
            device=torch.device("cpu"),
        )
        return trainer.fit().last_miou
