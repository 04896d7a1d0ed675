"""The command line: ``python -m cpseg``."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from cpseg import _checks
from cpseg.annotators import SyntheticAnnotator, folder
from cpseg.calibration import Calibration
from cpseg.calibrators import ClassConditionalCalibrator, SplitCalibrator
from cpseg.data import SyntheticShapes
from cpseg.errors import CpsegError
from cpseg.filters import Argmax, BackgroundPriority, Singleton
from cpseg.metrics import Coverage, SelectiveAccuracy, SetSize
from cpseg.predictors import PixelSetPredictor
from cpseg.training import train_from_file

__all__ = ["main"]

_WHAT = "Which classes each pixel can still have, with a guarantee that is stated and true."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; None takes them from the process.

    Returns:
        The exit status: 0 done, 1 refused (one line says why), 2 wrong usage, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="cpseg", description=_WHAT)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="the main job on synthetic images: annotate, calibrate, predict, filter",
        description="Annotate synthetic images, calibrate, check the coverage, filter labels.",
        epilog="example: python -m cpseg demo --alpha 0.1",
    )
    demo.add_argument("--alpha", type=float, default=0.05, help="level (default: %(default)s)")
    demo.add_argument(
        "--calibration-images", type=int, default=120, metavar="N", help="default: %(default)s"
    )
    demo.add_argument(
        "--new-images", type=int, default=80, metavar="N", help="default: %(default)s"
    )
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    annotate = commands.add_parser(
        "annotate",
        help="a folder of images and a list of class names to a cache of logits",
        description="Annotate a folder of images into a cache; resumes where it stopped.",
        epilog="example: python -m cpseg annotate photos --classes classes.txt "
        "--model seem_focalt_v1.pt --cache logits",
    )
    folder.add_arguments(annotate)
    train = commands.add_parser(
        "train",
        help="train a student as a JSON file says",
        description="Train a student as a JSON file says; every key is checked.",
        epilog="example: python -m cpseg train config.json --resume",
    )
    train.add_argument("config", type=Path, help="the JSON file")
    train.add_argument("--resume", action="store_true", help="go on with the run in its directory")
    given = parser.parse_args(arguments)
    try:
        if given.command == "annotate":
            return folder.run(given)
        if given.command == "train":
            train_from_file(given.config, resume=given.resume, report=print)
            return 0
        _demo(given.alpha, given.calibration_images, given.new_images, given.seed)
    except CpsegError as error:
        print(f"cpseg: {error}", file=sys.stderr)
        return 1
    except (OSError, UnicodeError) as error:
        print(f"cpseg: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cpseg: interrupted", file=sys.stderr)
        return 130
    return 0


def _demo(alpha: float, calibration_images: int, new_images: int, seed: int) -> None:
    _checks.check_alpha(alpha)  # now, not after annotating
    held_out = SyntheticShapes(length=calibration_images, seed=2 * seed)
    new = SyntheticShapes(length=new_images, seed=2 * seed + 1)
    names = held_out.classes
    annotator = SyntheticAnnotator(num_classes=len(names), seed=seed)
    print(
        f"{len(names)} classes; {calibration_images} labelled images to calibrate on, "
        f"{new_images} new ones. The annotator is over-confident and favors the background."
    )

    by_class, for_all = ClassConditionalCalibrator(len(names)), SplitCalibrator()
    for logits, labels in _annotated(annotator, held_out, "annotate and calibrate"):
        by_class.update(logits, labels)
        for_all.update(logits, labels)
    calibration, pooled = by_class.compute(alpha), for_all.compute(alpha)

    predictor = PixelSetPredictor(calibration)
    filters: dict[str, Argmax | BackgroundPriority | Singleton] = {
        "one threshold, argmax": Argmax(pooled),
        "one threshold, singletons": Singleton(pooled),
        "per class, argmax": Argmax(calibration),
        "per class, background last": BackgroundPriority(calibration),
        "per class, singletons": Singleton(calibration),
    }
    coverage, size = Coverage(len(names)), SetSize(len(names))
    raw, kept = SelectiveAccuracy(len(names)), {n: SelectiveAccuracy(len(names)) for n in filters}
    for logits, labels in _annotated(annotator, new, "annotate, predict, filter"):
        sets = predictor(logits)
        coverage.update(sets, labels)
        size.update(sets, labels)
        raw.update(logits.argmax(1), labels)
        for name, keep in filters.items():
            kept[name].update(keep(logits), labels)

    print()
    _print_coverage(names, calibration, coverage, size)
    print()
    print(_wrapped(str(calibration.guarantee)))
    print()
    print(f"{'labels of the new images':28}{'kept':>8}{'right of those kept':>22}")
    for name, accuracy in {"the annotator's argmax": raw, **kept}.items():
        report = accuracy.compute()
        share = float(report.kept.mean_of_pixels.value)
        right = float(report.accuracy_of_kept.mean_of_pixels.value)
        print(f"{name:28}{share:8.1%}{right:22.1%}")
    print(
        "\nCoverage bounds how often the truth is lost from a set, not how often a kept label is wrong."
    )


def _annotated(
    annotator: SyntheticAnnotator, shapes: SyntheticShapes, task: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels, an image at a time, with a progress bar."""
    for index in _progress(len(shapes), task):
        _, label = shapes[index]
        labels = label[None]
        # Of the data set and the image: two data sets share no image's errors.
        yield annotator(labels, seeds=[shapes.seed << 32 | index]), labels


def _print_coverage(
    names: Sequence[str], calibration: Calibration, coverage: Coverage, size: SetSize
) -> None:
    report, sizes = coverage.compute(), size.compute()
    promised = f"{1 - calibration.alpha:.0%}" if isinstance(calibration.alpha, float) else "-"
    header = ("class", "images", "threshold", "promised", "covered in new images", "set size")
    print("{:12}{:>8}{:>12}{:>10}{:>26}{:>10}".format(*header))
    found = report.classes.mean_of_images
    for index, name in enumerate(names):
        interval = f"{found.value[index]:.1%} ({found.low[index]:.0%} to {found.high[index]:.0%})"
        print(
            f"{name:12}{int(calibration.num_units[index]):8}"
            f"{float(calibration.thresholds[index]):12.4f}{promised:>10}{interval:>26}"
            f"{float(sizes.classes.mean_of_images.value[index]):10.2f}"
        )


def _wrapped(text: str, width: int = 96) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _progress(total: int, task: str) -> Iterator[int]:
    """Count to ``total``, with a bar and the time left on standard error if that is a terminal."""
    start = time.monotonic()
    shown = sys.stderr.isatty()
    for index in range(total):
        yield index
        if shown:
            done = (index + 1) / total
            left = (time.monotonic() - start) * (1 - done) / done
            bar = "#" * round(30 * done)
            print(
                f"\r{task:28}[{bar:30}] {index + 1}/{total}, {left:3.0f} s left",
                end="",
                file=sys.stderr,
            )
    if shown:
        print(file=sys.stderr)
    else:
        print(f"{task}: {total} images in {time.monotonic() - start:.1f} s", file=sys.stderr)
