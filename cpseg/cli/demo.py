"""``cpseg demo``: the main job on synthetic images."""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

import torch
from torch import Tensor

from cpseg import _checks, plots
from cpseg.annotators import SyntheticAnnotator
from cpseg.calibration import Calibration
from cpseg.calibrators import ClassConditionalCalibrator, SplitCalibrator
from cpseg.cli.console import Meter, percent, print_json, progress, table, wrapped
from cpseg.cli.workers import one_thread
from cpseg.data import SyntheticShapes
from cpseg.errors import InputError
from cpseg.filters import Argmax, BackgroundPriority, Singleton
from cpseg.metrics import (
    Coverage,
    CoverageReport,
    SelectiveAccuracy,
    SelectiveAccuracyReport,
    SetSize,
    SetSizeReport,
)
from cpseg.plots import ConfidenceCounts
from cpseg.predictors import PixelSetPredictor
from cpseg.quantile import fewest_units
from cpseg.report import levels_table
from cpseg.risk import KeptError, RiskCalibrator
from cpseg.training.comparison import Comparison, StudentResult, compare_on_shapes

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run"]

SUMMARY = "the main job on synthetic images: annotate, calibrate, predict, filter, train"
"""What it does, in a line."""

EXAMPLE = """\
  python -m cpseg demo --alpha 0.1 --figures figures
"""
"""What to type."""

_BATCH = 8
_CERTIFIED, _DELTA = 0.1, 0.1
_STEPS = 300  # of each student: all four take about half a minute
_RAW, _BACKGROUND, _SURE = (
    "the annotator's argmax",
    "per class, background last",
    "at most 10% wrong, certified",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cpseg demo``."""
    parser.add_argument("--alpha", type=float, default=0.05, help="level (default: %(default)s)")
    parser.add_argument(
        "--calibration-images", type=int, default=120, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--new-images", type=int, default=80, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--no-students", action="store_true", help="leave out the training at the end"
    )
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="also draw what was found, and how the last student learned, as PNG files",
    )


@final
@dataclass(frozen=True, eq=False, slots=True)
class _Found:
    """What a run of the demo measured.

    Attributes:
        names: Of the classes.
        calibration: Thresholds per class.
        coverage: Of the new images' sets.
        sizes: Of those sets.
        kept: What each filter kept, by its name; the first is the annotator itself.
        confidence: How often the annotator is right, by its confidence.
        levels: Threshold per class and mean set size at other levels.
        held_out: Images for calibration.
        new: New images.
        annotator: Gives their logits.
    """

    names: Sequence[str]
    calibration: Calibration
    coverage: CoverageReport
    sizes: SetSizeReport
    kept: Mapping[str, SelectiveAccuracyReport]
    confidence: ConfidenceCounts
    levels: tuple[list[float], Tensor, list[float]]
    held_out: SyntheticShapes
    new: SyntheticShapes
    annotator: SyntheticAnnotator


def run(given: argparse.Namespace) -> int:
    """Run the demo; 0 when done."""
    _checks.check_alpha(given.alpha)  # now, not after annotating
    if given.figures is not None:
        plots.check_matplotlib()
        if given.figures.exists() and not given.figures.is_dir():
            raise InputError(f"--figures must be a folder; {given.figures} is a file")
    with one_thread():
        found = _measure(given)
        if not given.json:
            _tell(found)
        if given.figures is not None:
            _draw(found, given.figures)
        students = [] if given.no_students else _train(given.seed, given.figures)
        if given.json:
            print_json({**_as_json(found), "students": {s.name: s.miou for s in students}})
        elif students:
            print()
            print(_students(students))
            print()
            print(
                wrapped(
                    "One seed, small images and short training on another, more biased annotator: "
                    "another seed may rank the students differently, and no order is promised."
                )
            )
        if given.figures is not None and not given.json:
            print(f"\nFigures: {given.figures}")
    return 0


def _train(seed: int, figures: Path | None) -> list[StudentResult]:
    """The students; the last one's run, which has two stages, is drawn."""
    settings = Comparison(
        steps=_STEPS, evaluate_every=None if figures is None else _STEPS // 6, seed=seed
    )
    meter = Meter(4 * _STEPS, "train four students", "steps")
    with TemporaryDirectory() as directory:
        students = list(
            compare_on_shapes(
                settings, progress=lambda _name, _step: meter.step(), directory=directory
            )
        )
        meter.close()
        if figures is not None:
            log = Path(directory, students[-1].name, "log.jsonl")
            plots.save(plots.training(log), figures / "training.png")
    return students


def _students(students: Sequence[StudentResult]) -> str:
    rows = [
        (student.name, percent(student.kept), percent(student.right), percent(student.miou))
        for student in students
    ]
    header = ("a student that learned from", "labels kept", "right of those kept", "its mIoU")
    return table(header, rows)


def _measure(given: argparse.Namespace) -> _Found:
    held_out = SyntheticShapes(length=given.calibration_images, seed=2 * given.seed)
    new = SyntheticShapes(length=given.new_images, seed=2 * given.seed + 1)
    names = held_out.classes
    annotator = SyntheticAnnotator(num_classes=len(names), seed=given.seed)
    if not given.json:
        print(
            wrapped(
                f"{len(names)} classes; {len(held_out)} labeled images to calibrate on, "
                f"{len(new)} new ones. The annotator is over-confident and favors the background."
            )
        )

    by_class, for_all = ClassConditionalCalibrator(len(names)), SplitCalibrator()
    control = RiskCalibrator(KeptError(Argmax, len(names)))
    for logits, labels in _annotated(annotator, held_out, "annotate and calibrate"):
        by_class.update(logits, labels)
        for_all.update(logits, labels)
        control.update(logits, labels)
    calibration, pooled = by_class.compute(given.alpha), for_all.compute(given.alpha)

    predictor = PixelSetPredictor(calibration)
    filters: dict[str, Argmax | BackgroundPriority | Singleton] = {
        "one threshold, argmax": Argmax(pooled),
        "one threshold, singletons": Singleton(pooled),
        "per class, argmax": Argmax(calibration),
        _BACKGROUND: BackgroundPriority(calibration),
        "per class, singletons": Singleton(calibration),
        _SURE: Argmax(control.compute(_CERTIFIED, _DELTA)),
    }
    coverage, size = Coverage(len(names)), SetSize(len(names))
    raw, kept = SelectiveAccuracy(len(names)), {n: SelectiveAccuracy(len(names)) for n in filters}
    confidence = ConfidenceCounts()
    shown: list[tuple[Tensor, Tensor]] = []
    for logits, labels in _annotated(annotator, new, "annotate, predict, filter"):
        sets = predictor(logits)
        coverage.update(sets, labels)
        size.update(sets, labels)
        raw.update(logits.argmax(1), labels)
        confidence.update(logits, labels)
        for name, keep in filters.items():
            kept[name].update(keep(logits), labels)
        if given.figures is not None and len(shown) < 4:
            shown.append((logits, labels))
    return _Found(
        names=names,
        calibration=calibration,
        coverage=coverage.compute(),
        sizes=size.compute(),
        kept={name: metric.compute() for name, metric in {_RAW: raw, **kept}.items()},
        confidence=confidence,
        levels=levels_table(by_class, shown),
        held_out=held_out,
        new=new,
        annotator=annotator,
    )


def _annotated(
    annotator: SyntheticAnnotator, shapes: SyntheticShapes, task: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels, some images at a time, with a progress bar."""
    waiting: list[tuple[int, Tensor]] = []
    for index in progress(range(len(shapes)), task):
        waiting.append((index, shapes[index][1]))
        if len(waiting) == _BATCH or index == len(shapes) - 1:
            labels = torch.stack([label for _, label in waiting])
            # Of the data set and the image: two data sets share no image's errors.
            seeds = [shapes.seed << 32 | place for place, _ in waiting]
            yield annotator(labels, seeds=seeds), labels
            waiting = []


def _tell(found: _Found) -> None:
    calibration = found.calibration
    print()
    print(_coverage(found))
    starved = [
        name
        for name, limit in zip(found.names, calibration.thresholds, strict=True)
        if not math.isfinite(float(limit))
    ]
    if starved and isinstance(calibration.alpha, float):
        print()
        print(
            wrapped(
                f"No threshold for {', '.join(starved)}: a promise of "
                f"{100 * (1 - calibration.alpha):.6g}% needs at least "
                f"{fewest_units(calibration.alpha)} calibration images with the class. It "
                "stays in every set: the promise holds, and nothing is gained. Take more "
                "--calibration-images, or a larger --alpha."
            )
        )
    print()
    print(wrapped(str(calibration.guarantee)))
    print()
    print(_kept(found))
    print()
    print(
        wrapped(
            "Coverage bounds how often the truth is lost from a set, not how often a kept label "
            "is wrong. Only the last row promises something about kept labels: with probability "
            f"{1 - _DELTA:.0%}, at most {_CERTIFIED:.0%} of them are wrong on average."
        )
    )
    accuracy = found.kept[_BACKGROUND].accuracy_of_kept.mean_of_pixels.value
    if float(accuracy) < float(found.kept[_RAW].accuracy_of_kept.mean_of_pixels.value):
        print()
        print(
            wrapped(
                "Background last (ConformalSAM's rule) turns background into foreground wherever a "
                "foreground class is still possible. Here the sets of background pixels hold "
                f"{float(found.sizes.classes.mean_of_pixels.value[0]):.1f} classes on average: "
                "this rule needs smaller sets, so a larger alpha or a sharper annotator. Compare --alpha 0.2."
            )
        )


def _coverage(found: _Found) -> str:
    calibration, report = found.calibration, found.coverage.classes.mean_of_images
    promised = "-"
    if isinstance(calibration.alpha, float):
        promised = f"{100 * (1 - calibration.alpha):.6g}%"
    sizes = found.sizes.classes.mean_of_images.value
    rows: list[tuple[str, ...]] = []
    for index, name in enumerate(found.names):
        value, low, high = (float(x[index]) for x in (report.value, report.low, report.high))
        covered = percent(value)
        if not math.isnan(low):
            covered += f" ({percent(low, 0)} to {percent(high, 0)})"
        limit = float(calibration.thresholds[index])
        rows.append(
            (
                name,
                str(int(calibration.num_units[index])),
                f"{limit:.4f}" if math.isfinite(limit) else "none",
                promised,
                covered,
                "-" if math.isnan(float(sizes[index])) else f"{float(sizes[index]):.2f}",
            )
        )
    header = ("class", "images", "threshold", "promised", "covered in new images", "set size")
    return table(header, rows)


def _kept(found: _Found) -> str:
    rows = [
        (
            name,
            percent(float(report.kept.mean_of_pixels.value)),
            percent(float(report.accuracy_of_kept.mean_of_pixels.value)),
        )
        for name, report in found.kept.items()
    ]
    return table(("labels of the new images", "kept", "right of those kept"), rows)


def _as_json(found: _Found) -> dict[str, object]:
    covered = found.coverage.classes.mean_of_images
    return {
        "alpha": found.calibration.alpha,
        "classes": list(found.names),
        "thresholds": found.calibration.thresholds.tolist(),
        "num_units": found.calibration.num_units.tolist(),
        "covered": covered.value.tolist(),
        "covered_low": covered.low.tolist(),
        "covered_high": covered.high.tolist(),
        "set_size": found.sizes.classes.mean_of_images.value.tolist(),
        "guarantee": str(found.calibration.guarantee),
        "filters": {
            name: {
                "kept": float(report.kept.mean_of_pixels.value),
                "right_of_kept": float(report.accuracy_of_kept.mean_of_pixels.value),
            }
            for name, report in found.kept.items()
        },
    }


def _draw(found: _Found, folder: Path) -> None:
    """Write the figures, each whole or not at all."""
    alpha = found.calibration.alpha
    image, label = found.new[0]
    logits = found.annotator(label[None], seeds=[found.new.seed << 32])
    keep = Singleton(found.calibration)
    points = {
        name: (
            float(report.kept.mean_of_pixels.value),
            float(report.accuracy_of_kept.mean_of_pixels.value),
        )
        for name, report in found.kept.items()
        if name not in (_SURE, _BACKGROUND)
    }
    sure = found.kept[_SURE]
    certified = plots.Certified(
        kept=float(sure.kept.mean_of_pixels.value),
        accuracy=float(sure.accuracy_of_kept.mean_of_pixels.value),
        promised=1 - _CERTIFIED,
    )
    figures = {
        "image": plots.one_image(
            logits[0],
            PixelSetPredictor(found.calibration)(logits)[0],
            image=image,
            pseudo_labels=keep(logits)[0],
            labels=label,
            class_names=found.names,
        ),
        "coverage": plots.coverage_by_class(found.coverage, alpha, class_names=found.names),
        "images": plots.coverage_of_images(found.coverage, None),
        "levels": plots.levels(*found.levels, class_names=found.names),
        "kept": plots.risk_coverage(found.confidence, points=points, certified=certified),
        "reliability": plots.reliability(found.confidence),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        plots.save(figure, folder / f"{name}.png")
