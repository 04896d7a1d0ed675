"""What filtering is worth to a student: the same network on raw, filtered and no external labels."""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.annotators import SyntheticAnnotator
from cpseg.calibrators import SplitCalibrator
from cpseg.data import SyntheticShapes
from cpseg.errors import InputError
from cpseg.filters import BackgroundPriority
from cpseg.training.batches import Labeled
from cpseg.training.recipes import conformal_sam, supervised
from cpseg.training.students import UNet
from cpseg.training.trainer import Trainer

__all__ = [
    "Comparison",
    "Relabeled",
    "StudentResult",
    "biased_annotator",
    "compare_on_shapes",
]


_DECAY = 0.98  # of the averages: over the last 50 steps or so


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
        kept: Share of the unlabeled pixels that had an external label.
        right: Share of those labels that are true; NaN where there is none.
    """

    name: str
    miou: float
    kept: float
    right: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How to compare; the defaults take a laptop's CPU about two minutes.

    Attributes:
        labeled_images: Images with labels; they train and they calibrate the frozen annotator.
        unlabeled_images: Images that the annotator labels.
        test_images: Images that measure the students.
        size: Height and width of all images; students are trained on crops of two thirds.
        alpha: Level of the calibration; its thresholds are one for all classes.
        steps: Of every student; of the last, a third are self-reliance.
        evaluate_every: Steps between looks at the test images on the way; None: at the end alone.
        seed: Of images, annotator, network and training.
        annotator: Whose labels; None: :func:`biased_annotator` of ``seed``.
    """

    labeled_images: int = 24
    unlabeled_images: int = 120
    test_images: int = 60
    size: tuple[int, int] = (48, 48)
    alpha: float = 0.05
    steps: int = 1000
    evaluate_every: int | None = None
    seed: int = 0
    annotator: SyntheticAnnotator | None = None

    def __post_init__(self) -> None:
        _checks.check_alpha(self.alpha)
        _checks.check_integer("steps", self.steps, 3)


def biased_annotator(seed: int = 0) -> SyntheticAnnotator:
    """An annotator that fails as foundation models do: over-confident, and too fond of background.

    Its labels miss most of the foreground, where the right class is nearly as likely as the
    background. It was chosen so, after other settings had been tried; the others came before the
    protocol of :class:`Comparison`.

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


def compare_on_shapes(
    settings: Comparison = Comparison(),
    *,
    progress: Callable[[str, int], None] | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Iterator[StudentResult]:
    """Train four equal students on :class:`~cpseg.data.SyntheticShapes`, one after the other.

    They see the labeled images, and as external labels of the others: none; the annotator's most
    likely class everywhere; what :class:`~cpseg.filters.BackgroundPriority` makes of the
    calibrated sets; the same for two thirds of the steps, then those of a teacher that averages
    the student. All have such an average, and it is what is measured.

    Args:
        settings: Sizes, level and seed.
        progress: Is told the student's name and how many of its steps are done; None: nobody is.
        directory: Keeps each run's log and checkpoints, in a folder of the student's name; None:
            they are dropped.

    Yields:
        ``"labels only"``, ``"raw"``, ``"filtered"``, ``"filtered, then self-reliance"``; each
        student is trained when its result is asked for.
    """
    seed = 3 * settings.seed
    sizes = (settings.labeled_images, settings.unlabeled_images, settings.test_images)
    labeled, unlabeled, test = (
        list(SyntheticShapes(length=length, size=settings.size, seed=seed + part))
        for part, length in enumerate(sizes)
    )
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
    height, width = settings.size
    classes, crop = len(SyntheticShapes.classes), (2 * height // 3, 2 * width // 3)
    steps, last = settings.steps, settings.steps // 3
    alone = supervised(classes, steps=steps, crop=crop)
    first = conformal_sam(classes, external_steps=steps, self_steps=0, crop=crop)
    both = conformal_sam(
        classes, external_steps=steps - last, self_steps=last, crop=crop, ema_decay=_DECAY
    )
    nothing = [torch.full_like(label, 255) for _, label in unlabeled]
    runs = [
        ("labels only", alone, nothing),
        ("raw", first, raw),
        ("filtered", first, filtered),
        ("filtered, then self-reliance", both, filtered),
    ]
    for name, config, external in runs:
        torch.manual_seed(settings.seed)
        trained = replace(
            config,
            optimizer="adamw",
            lr=1e-2,
            clip=1.0,
            labeled_batch=4,
            unlabeled_batch=4,
            scale=(0.8, 1.25),
            ema_decay=_DECAY,
            evaluate_every=settings.evaluate_every,
            seed=settings.seed,
            bar=progress is None,
        )
        with TemporaryDirectory() if directory is None else nullcontext(directory) as root:
            place = Path(root, name)
            place.mkdir(parents=True)
            trainer = Trainer(
                UNet(classes, width=16, depth=1),
                trained,
                labeled=labeled,
                unlabeled=Relabeled(unlabeled, external),
                validation=test,
                directory=place,
                device=torch.device("cpu"),
            )
            for step in trainer.steps():
                if progress is not None:
                    progress(name, step.number)
        kept, right = _quality(external, [label for _, label in unlabeled])
        yield StudentResult(name, trainer.last_miou, kept, right)


def _annotated(
    annotator: SyntheticAnnotator, shapes: list[tuple[Tensor, Tensor]], first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for index, (_, label) in enumerate(shapes):
        yield annotator(label[None], seeds=[first + index]), label[None]


def _quality(external: list[Tensor], truth: list[Tensor]) -> tuple[float, float]:
    """The share of pixels with an external label, and of those the share that is right."""
    known, kept, right = 0, 0, 0
    for found, label in zip(external, truth, strict=True):
        there = (label != 255) & (found != 255)
        known += int((label != 255).sum())
        kept += int(there.sum())
        right += int((there & (found == label)).sum())
    return kept / known, right / kept if kept else float("nan")
