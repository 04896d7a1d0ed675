"""``cpseg report``: one HTML file about a calibration and labeled images."""

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from cpseg import report
from cpseg.annotators.cache import write_whole
from cpseg.cli.console import check_output, percent, print_json
from cpseg.cli.filter import add_rule_arguments, rule
from cpseg.cli.inputs import (
    Images,
    Labels,
    Logits,
    add_logits_arguments,
    add_names_arguments,
    class_names,
    matched,
)
from cpseg.cli.workers import one_thread, over
from cpseg.errors import CpsegError, FileError, InputError
from cpseg.plots import check_matplotlib
from cpseg.report import AnyFilter, Entry, Findings, Observations

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run"]

SUMMARY = "write one HTML file: what is promised, what happened, what to do"
"""What it does, in a line."""

EXAMPLE = """\
  python -m cpseg report calibration.json --logits test-logits \\
      --labels test-masks --images test-photos --classes classes.txt \\
      -o report.html

  Take labeled images that did not calibrate.
"""
"""What to type."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cpseg report``."""
    parser.add_argument("calibration", type=Path, help="what calibrate wrote")
    add_logits_arguments(parser)
    parser.add_argument(
        "--labels",
        type=Path,
        required=True,
        metavar="DIR",
        help="PNG masks, or integer .npy and .npz, named as the logits are",
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="the pictures, to be shown with the worst"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the HTML file"
    )
    add_rule_arguments(parser)
    add_names_arguments(parser)
    parser.add_argument(
        "--worst", type=int, default=3, metavar="N", help="images to draw (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes (default: %(default)s)"
    )


@final
@dataclass(frozen=True, slots=True)
class _Folder:
    """Labeled images on disk."""

    names: Sequence[str]
    logits: Logits
    labels: Labels
    images: Images | None
    keep: AnyFilter

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> Entry:
        name = self.names[index]
        logits = self.logits.read(name)
        labels = self.labels.read(name, logits)
        image = None if self.images is None else self.images.read(name)
        if image is not None and image.shape[1:] != logits.shape[1:]:
            raise FileError(
                f"the picture of {name} must be of the size of its logits, "
                f"{tuple(logits.shape[1:])}; got {tuple(image.shape[1:])}"
            )
        again = self.logits.settled(name, self.keep)
        return Entry(name, logits, labels, image, None if again is None else again.labels[0])


@final
@dataclass(frozen=True, slots=True)
class _Observe:
    """The work of one process."""

    folder: _Folder
    observations: Observations

    def __call__(self, indices: Iterable[int]) -> Observations:
        for index in indices:
            try:
                self.observations.update(index, self.folder[index])
            except FileError:
                raise
            except CpsegError as error:
                raise InputError(f"{self.folder.names[index]}: {error}") from error
        return self.observations


def run(given: argparse.Namespace) -> int:
    """Write the report; 0 when done."""
    logits = Logits.open(given)
    calibration = logits.calibration(given.calibration)
    labels = Labels.open(given.labels, calibration.ignore_index)
    names = matched(logits, labels, given.names)
    images = None if given.images is None else Images.open(given.images)
    if images is not None and set(names) - set(images.files):
        missing = sorted(set(names) - set(images.files))
        raise FileError(
            f"{given.images} must hold a picture for every image; got none for {missing}"
        )
    titles = class_names(given.classes, len(logits.read(names[0])))
    check_output(given.output)
    check_matplotlib()
    keep = rule(given, calibration)
    folder = _Folder(names, logits, labels, images, keep)
    work = _Observe(folder, Observations(calibration, keep, titles))
    first, *others = over(range(len(names)), work, jobs=given.jobs, task="report")
    for other in others:
        first.merge(other)
    with one_thread():
        findings = first.compute(folder, worst=given.worst)
        text = report.page(
            findings,
            title=given.calibration.name,
            command=shlex.join(["python", "-m", "cpseg", *given.words]),
            version=sys.modules["cpseg"].__version__,  # the facade is above all modules
        )
    write_whole(given.output, text.encode())
    if given.json:
        print_json(_as_json(findings, given.output))
        return 0
    _tell(findings)
    print(f"\n{given.output}: open it in a browser")
    return 0


def _tell(findings: Findings) -> None:
    if findings.same_data:
        print("These seem to be the very images that calibrated: coverage on them tests nothing.")
    if findings.coverage is not None:
        print(f"coverage, mean of images  {percent(findings.coverage.mean_of_images)}")
    kept = findings.kept
    print(f"kept labels               {percent(float(kept.kept.mean_of_pixels.value))}")
    print(f"right of those kept       {percent(float(kept.accuracy_of_kept.mean_of_pixels.value))}")
    worries = ", ".join(worry.name for worry in findings.worries)
    print(f"classes to worry about    {worries or 'none'}")


def _as_json(findings: Findings, path: Path) -> dict[str, object]:
    coverage, kept = findings.coverage, findings.kept
    return {
        "report": str(path),
        "images": len(findings.images),
        "same_data": findings.same_data,
        "coverage_mean_of_images": None if coverage is None else coverage.mean_of_images,
        "coverage_of_classes": None
        if coverage is None
        else coverage.classes.mean_of_images.value.tolist(),
        "classes": list(findings.class_names),
        "kept": float(kept.kept.mean_of_pixels.value),
        "right_of_kept": float(kept.accuracy_of_kept.mean_of_pixels.value),
        "worst_images": [image.name for image in findings.images[:10]],
        "worries": [
            {"class": worry.name, "why": worry.why, "remedy": worry.remedy}
            for worry in findings.worries
        ],
    }
