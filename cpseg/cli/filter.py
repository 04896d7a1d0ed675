"""``cpseg filter``: logits and a calibration to pseudo-labels on disk."""

import argparse
import os
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from cpseg.calibration import Calibration
from cpseg.cli.console import percent, print_json, table, wrapped
from cpseg.cli.inputs import (
    Logits,
    add_logits_arguments,
    add_names_arguments,
    class_names,
    selected,
)
from cpseg.cli.workers import over
from cpseg.errors import CpsegError, FileError, InputError
from cpseg.filters import (
    AreaGuard,
    AreaWarning,
    Argmax,
    AtMost,
    BackgroundPriority,
    Reason,
    Singleton,
    Top,
)
from cpseg.report import AnyFilter
from cpseg.training import PseudoLabelStore

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "add_rule_arguments", "rule", "run"]

SUMMARY = "keep the labels that can be trusted, as PNG masks with 255 elsewhere"
"""What it does, in a line."""

EXAMPLE = """\
  python -m cpseg filter calibration.json --logits logits -o pseudo-labels \\
      --rule singleton --classes classes.txt
"""
"""What to type."""

_REASONS = {
    Reason.EMPTY: "no class is left in the set that the rule would take",
    Reason.STARVED: "the most likely class has no finite threshold",
    Reason.TOO_MANY: "too many classes in the set",
    Reason.UNUSABLE: "the logits are unusable (NaN)",
    Reason.GUARDED: "the class floods the image",
}


def add_rule_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose a filter."""
    parser.add_argument(
        "--rule",
        choices=("argmax", "top", "background", "singleton", "at-most"),
        default="singleton",
        help="argmax: the likeliest class of the set; top: the likeliest of all, if in the set; "
        "background: the background last; singleton: sets of one class; at-most: of --k classes "
        "(default: %(default)s)",
    )
    parser.add_argument("--k", type=int, default=2, help="for at-most (default: %(default)s)")
    parser.add_argument(
        "--background", type=int, default=0, metavar="N", help="its class (default: %(default)s)"
    )
    parser.add_argument(
        "--guard",
        action="store_true",
        help="abstain from a class that takes far more of an image than in calibration",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cpseg filter``."""
    parser.add_argument("calibration", type=Path, help="what calibrate wrote")
    add_logits_arguments(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="a new or empty folder"
    )
    add_rule_arguments(parser)
    add_names_arguments(parser)
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes (default: %(default)s)"
    )


def rule(given: argparse.Namespace, calibration: Calibration) -> AnyFilter:
    """The filter that the command line names."""
    guard = AreaGuard(action="abstain") if given.guard else None
    match given.rule:
        case "argmax":
            return Argmax(calibration, guard)
        case "top":
            return Top(calibration, guard)
        case "background":
            return BackgroundPriority(calibration, given.background, guard)
        case "at-most":
            return AtMost(calibration, given.k, guard)
        case _:
            return Singleton(calibration, guard)


@final
@dataclass(frozen=True, slots=True)
class _Counts:
    """Pixels of a share of the images.

    Attributes:
        likely: With each class the most likely one. int64 ``(C,)``.
        kept: Kept as each class. int64 ``(C,)``.
        reasons: By :class:`Reason`. int64.
        unsettled: Whose label a class that a compact cache does not store could change.
    """

    likely: Tensor
    kept: Tensor
    reasons: Tensor
    unsettled: int

    @property
    def pixels(self) -> int:
        """All of them."""
        return int(self.reasons.sum()) + self.unsettled

    def __add__(self, other: "_Counts") -> "_Counts":
        return _Counts(
            self.likely + other.likely,
            self.kept + other.kept,
            self.reasons + other.reasons,
            self.unsettled + other.unsettled,
        )


@final
@dataclass(frozen=True, slots=True)
class _Filter:
    """The work of one process."""

    logits: Logits
    keep: AnyFilter
    store: PseudoLabelStore
    num_classes: int

    def __call__(self, names: Iterable[str]) -> _Counts:
        classes = self.num_classes
        total = _nothing(classes)
        for name in names:
            try:
                logits = self.logits.read(name)
                if logits.ndim != 3:
                    raise InputError(
                        f"logits must be (C, H, W) to become a picture; got {tuple(logits.shape)}"
                    )
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", AreaWarning)  # counted as a reason
                    decision = self.keep.decide(logits[None])
                    again = self.logits.settled(name, self.keep)
                labels, reasons, unsettled = decision.labels, decision.reasons, 0
                if again is not None:
                    labels, reasons, unsettled = again.labels, reasons[~again.open], again.unsettled
                self.store.write(name, labels[0])
            except FileError:
                raise
            except CpsegError as error:
                raise InputError(f"{name}: {error}") from error
            ignore = self.keep.calibration.ignore_index
            total += _Counts(
                torch.bincount(logits.argmax(0).flatten(), minlength=classes),
                torch.bincount(labels[labels != ignore].long(), minlength=classes),
                torch.bincount(reasons.flatten().long(), minlength=len(Reason)),
                unsettled,
            )
        return total


def _nothing(classes: int) -> _Counts:
    likely, kept = torch.zeros(2, classes, dtype=torch.int64)
    return _Counts(likely, kept, torch.zeros(len(Reason), dtype=torch.int64), 0)


def run(given: argparse.Namespace) -> int:
    """Filter; 0 when done."""
    logits = Logits.open(given)
    calibration = logits.calibration(given.calibration)
    names = selected(logits.files, given.names, "logits")
    keep = rule(given, calibration)
    classes = len(logits.read(names[0]))
    titles = class_names(given.classes, classes)
    output = given.output.absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output must be a new or empty folder; {output} holds something")
    # Written beside and moved at the end: a run that was stopped leaves no folder that looks done.
    beside = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        store = PseudoLabelStore.create(
            beside,
            calibration,
            classes=titles,
            model=logits.source,
            split=given.names.name if given.names is not None else given.logits.name,
        )
        work = _Filter(logits, keep, store, classes)
        parts = over(names, work, jobs=given.jobs, task="filter")
        if output.exists():
            output.rmdir()
        beside.replace(output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    total = sum(parts, _nothing(classes))
    if given.json:
        print_json(_as_json(total, titles, len(names), given.output))
    else:
        print(_told(total, titles))
        print(f"\n{given.output}: {len(names)} masks and manifest.json")
    return 0


def _told(counts: _Counts, titles: Sequence[str]) -> str:
    pixels = max(counts.pixels, 1)
    rows = [
        (name, percent(int(likely) / pixels), percent(int(kept) / pixels))
        for name, likely, kept in zip(titles, counts.likely, counts.kept, strict=True)
    ]
    kept_at_all = int(counts.reasons[Reason.KEPT]) / pixels
    lines = [
        table(
            ("class", "likeliest at", "kept at"), [*rows, ("all", "100.0%", percent(kept_at_all))]
        )
    ]
    abstained = [
        f"  {percent(int(counts.reasons[reason]) / pixels):>6}  {text}"
        for reason, text in _REASONS.items()
        if int(counts.reasons[reason])
    ]
    if counts.unsettled:
        abstained.append(
            f"  {percent(counts.unsettled / pixels):>6}  a class that the compact cache does not "
            "store could decide"
        )
    if abstained:
        lines += ["\nabstained, as", *abstained]
    lines.append(
        "\n"
        + wrapped(
            "Shares are of all pixels. Nothing here says how many of the kept labels are right: "
            "see cpseg report, with labels."
        )
    )
    return "\n".join(lines)


def _as_json(counts: _Counts, titles: Sequence[str], images: int, path: Path) -> dict[str, object]:
    return {
        "folder": str(path),
        "images": images,
        "pixels": counts.pixels,
        "classes": list(titles),
        "pixels_likeliest": counts.likely.tolist(),
        "pixels_kept": counts.kept.tolist(),
        "reasons": {reason.name.lower(): int(counts.reasons[reason]) for reason in Reason},
        "unsettled": counts.unsettled,
    }
