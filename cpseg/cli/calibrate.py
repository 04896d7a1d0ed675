"""``cpseg calibrate``: held-out logits and labels to a calibration."""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from cpseg.calibration import Calibration
from cpseg.calibrators import ClassConditionalCalibrator, LocationCalibrator, SplitCalibrator
from cpseg.cli.console import check_output, print_json, table, wrapped
from cpseg.cli.inputs import (
    Labels,
    Logits,
    add_logits_arguments,
    add_names_arguments,
    class_names,
    matched,
    unit_ids,
)
from cpseg.cli.workers import over
from cpseg.errors import CpsegError, FileError, InputError
from cpseg.merging import merge_all
from cpseg.protocols import Score
from cpseg.quantile import fewest_units
from cpseg.scores import APS, LAC, RAPS, SAPS, Margin, TopK

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run"]

SUMMARY = "turn held-out logits and labels into thresholds with a guarantee"
"""What it does, in a line."""

EXAMPLE = """\
  python -m cpseg calibrate --logits logits --labels masks --alpha 0.1 \\
      --classes classes.txt -o calibration.json

  .npy or .npz files of probabilities, several images per patient:
  python -m cpseg calibrate --logits softmax --values probabilities \\
      --labels masks --unit-ids patients.csv -o calibration.json
"""
"""What to type."""

_SCORES: dict[str, Score] = {
    "lac": LAC(),
    "aps": APS(),
    "raps": RAPS(),
    "saps": SAPS(),
    "margin": Margin(),
    "topk": TopK(),
}
_AnyCalibrator = SplitCalibrator | ClassConditionalCalibrator | LocationCalibrator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cpseg calibrate``."""
    add_logits_arguments(parser)
    parser.add_argument(
        "--labels",
        type=Path,
        required=True,
        metavar="DIR",
        help="PNG masks, or integer .npy and .npz, named as the logits are",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the calibration, JSON"
    )
    parser.add_argument(
        "--alpha",
        type=float,
        nargs="+",
        default=[0.1],
        metavar="A",
        help="share of misses allowed, one or one per class (default: 0.1)",
    )
    parser.add_argument(
        "--calibrator",
        choices=("split", "class", "location"),
        default="class",
        help="one threshold, one per class, or one per pixel of a common grid "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--score", choices=tuple(_SCORES), default="lac", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--unit",
        choices=("image", "pixel"),
        default="image",
        help="what is exchangeable; pixels promise far less (default: %(default)s)",
    )
    parser.add_argument(
        "--unit-ids",
        type=Path,
        metavar="CSV",
        help="name,unit: which images belong to one patient, scene or video",
    )
    parser.add_argument(
        "--fallback",
        choices=("none", "pooled"),
        default="none",
        help="for classes in too few images: keep them in every set, or take the threshold of all "
        "and promise nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--ignore-index", type=int, default=255, metavar="N", help="void label (default: 255)"
    )
    add_names_arguments(parser)
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes (default: %(default)s)"
    )


@final
@dataclass(frozen=True, slots=True)
class _Calibrate:
    """The work of one process."""

    logits: Logits
    labels: Labels
    calibrator: _AnyCalibrator
    units: Mapping[str, int] | None

    def __call__(self, names: Iterable[str]) -> Mapping[str, object]:
        calibrator = self.calibrator
        for name in names:
            try:
                logits = self.logits.read(name)
                labels = self.labels.read(name, logits)
                self._check_usable(name, logits, labels)
                unit = None if self.units is None else [self.units[name]]
                calibrator.update(logits[None], labels[None], unit)
            except FileError:
                raise
            except CpsegError as error:
                raise InputError(f"{name}: {error}") from error
        return calibrator.state_dict()

    def _check_usable(self, name: str, logits: Tensor, labels: Tensor) -> None:
        """Name the file whose logits a calibrator would only count as unusable."""
        unusable = ~logits.amax(0).isfinite() & (labels != self.labels.ignore_index)
        if bool(unusable.any()):
            raise FileError(
                f"{self.logits.files[name]} must have a finite logit at every labeled pixel and "
                f"no NaN; got {int(unusable.sum())} pixels that have not"
            )


def run(given: argparse.Namespace) -> int:
    """Calibrate; 0 when done."""
    alpha: float | list[float] = given.alpha[0] if len(given.alpha) == 1 else given.alpha
    logits = Logits.open(given)
    labels = Labels.open(given.labels, given.ignore_index)
    names = matched(logits, labels, given.names)
    units = None if given.unit_ids is None else unit_ids(given.unit_ids, names)
    first = logits.read(names[0])
    titles = class_names(given.classes, len(first))
    calibrator = _calibrator(given, len(first), first.shape[1:], len(names), logits.source)
    calibrator.compute(alpha)  # refuses a wrong level now, not after hours
    check_output(given.output)
    work = _Calibrate(logits, labels, calibrator, units)
    states = over(names, work, jobs=given.jobs, task="calibrate")
    merged = merge_all(type(calibrator).from_state_dict(state) for state in states)
    calibration = merged.compute(alpha, "pooled" if given.fallback == "pooled" else None)
    calibration.save(given.output)
    if given.json:
        print_json(_as_json(calibration, titles, len(names), given.output))
        return 0
    print(_thresholds(calibration, titles))
    print()
    print(wrapped(str(calibration.guarantee)))
    print(f"\n{given.output}: from {len(names)} images")
    return 0


def _calibrator(
    given: argparse.Namespace, classes: int, shape: Sequence[int], images: int, source: str
) -> _AnyCalibrator:
    score = _SCORES[given.score]
    ignore: int = given.ignore_index
    if given.calibrator == "split":
        return SplitCalibrator(score, unit=given.unit, ignore_index=ignore, source=source)
    if given.calibrator == "class":
        return ClassConditionalCalibrator(
            classes, score, unit=given.unit, ignore_index=ignore, source=source
        )
    return LocationCalibrator(
        shape,
        max_alpha=given.alpha[0],
        max_units=images,
        score=score,
        unit=given.unit,
        ignore_index=ignore,
        source=source,
    )


def _thresholds(calibration: Calibration, titles: Sequence[str]) -> str:
    """A line per threshold; of locations only how they spread."""
    limits, units = calibration.thresholds.flatten(), calibration.num_units.flatten()
    pixels = calibration.num_pixels.flatten()
    if calibration.axes == ("location",):
        finite = limits[limits.isfinite()]
        span = f"{finite.min():.4f} to {finite.max():.4f}" if len(finite) else "none finite"
        return (
            f"{len(limits)} locations, {len(finite)} with a finite threshold: {span}; "
            f"labeled in {int(units.min())} to {int(units.max())} images"
        )
    alphas = calibration.alpha if isinstance(calibration.alpha, tuple) else (calibration.alpha,)
    alphas = alphas * (len(limits) // len(alphas))
    rows = titles if calibration.axes == ("class",) else ["all classes"]
    replaced: list[bool] = calibration.fallback_groups.flatten().tolist()
    noun = "images" if calibration.unit == "image" else "pixels"
    lines = [
        (
            name,
            *((str(int(units[i])),) if noun == "images" else ()),
            str(int(pixels[i])),
            f"{float(limits[i]):.4f}" if math.isfinite(float(limits[i])) else "none",
            "nothing" if replaced[i] else f"{100 * (1 - alphas[i]):.6g}%",
        )
        for i, name in enumerate(rows)
    ]
    middle = ("units", "pixels") if noun == "images" else ("pixels",)
    promised = "promised" if noun == "images" else "of pixels alone"
    text = table(("class", *middle, "threshold", promised), lines)
    starved = [line[0] for line in lines if line[-2] == "none"]
    if starved:
        least = fewest_units(min(alphas))
        text += "\n" + wrapped(
            f"No threshold for {', '.join(starved)}: too few {noun} for this alpha "
            f"(at least {least}). They stay in every set, so the promise holds and nothing is "
            "gained. Label more, take a larger --alpha, or a --fallback."
        )
    return text


def _as_json(
    calibration: Calibration, titles: Sequence[str], images: int, path: Path
) -> dict[str, object]:
    by_class = calibration.axes == ("class",)
    return {
        "calibration": str(path),
        "images": images,
        "alpha": calibration.alpha,
        "axes": calibration.axes,
        "unit": calibration.unit,
        "score": repr(calibration.score),
        "classes": titles if by_class else None,
        "thresholds": calibration.thresholds.tolist(),
        "num_units": calibration.num_units.tolist(),
        "num_pixels": calibration.num_pixels.tolist(),
        "fallback_groups": calibration.fallback_groups.tolist(),
        "guarantee": str(calibration.guarantee),
    }
