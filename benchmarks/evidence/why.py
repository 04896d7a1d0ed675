"""Why a student gains from some external labels, and not from others that are as right.

Of each arm's external labels: what share of the loss each class has, how many of its pixels keep a
label and how many of these are right; the same by video, and by distance from where classes meet.
Of its students, trained as by ``students.py``: precision and recall of each class on val, which
say whether a class is overlooked or seen where it is not. ``results/why_*.csv`` have all of it.

    python benchmarks/evidence/why.py --data PATH [--arms NAME ...] [--seeds 0] [--steps 1500]
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast, get_args

import frames
import tables
import torch
from arms import ARMS
from external_labels import near_edges
from frames import Frames, Split, split_of
from labels import by_class, confusion
from student import labels_of
from students import STEPS, Precision, Task, hard, train
from torch import Tensor

from cpseg.training import class_weights_from

ASKED = [
    "raw",
    "confidence .95",
    "singletons, by class",
    "drop every wrong label",
    "recalibrated probabilities",
]


def of_labels(external: Tensor, of: Frames, weights: Tensor) -> Iterator[tables.Row]:
    """What the loss sees, class by class, video by video, near edges and far from them."""
    found, classes = hard(external), len(of.classes)
    soft = external.is_floating_point()
    mass = torch.stack(
        [(external[:, c] if soft else external == c).double().sum() for c in range(classes)]
    )
    share = mass * weights / (mass * weights).sum()
    for name, loss, kept, right in zip(
        of.classes,
        share.tolist(),
        *_kept(found, of, [of.labels == c for c in range(classes)]),
        strict=True,
    ):
        yield {"of": "class", "name": name, "share of the loss": loss, "kept": kept, "right": right}
    videos = sorted(set(of.videos))
    shown = [torch.tensor([v == video for v in of.videos])[:, None, None] for video in videos]
    edge = near_edges(of.labels)
    places = dict(zip(videos, shown, strict=True)) | {"near edges": edge, "far from edges": ~edge}
    for name, kept, right in zip(places, *_kept(found, of, list(places.values())), strict=True):
        yield {"of": "place", "name": name, "kept": kept, "right": right}


def _kept(found: Tensor, of: Frames, places: list[Tensor]) -> tuple[list[float], list[float]]:
    """Of the known pixels of each place, how many are kept, and how many of those right."""
    known = of.labels < len(of.classes)
    kept, right = found < len(of.classes), found == of.labels
    shares: tuple[list[float], list[float]] = [], []
    for place in places:
        here = known & place
        shares[0].append(float((kept & here).sum() / here.sum()))
        shares[1].append(float((right & here).sum() / (kept & here).sum()))
    return shares


def of_student(student: torch.nn.Module, test: Frames) -> Iterator[tables.Row]:
    """Precision, recall and IoU of each class."""
    found = labels_of(student, test.images)
    counts = confusion(found, test.labels, len(test.classes))
    union = counts.sum(0)[:-1] + counts.sum(1) - counts.diagonal()
    iou = counts.diagonal() / union
    for name, *values in zip(test.classes, *by_class(counts), iou, strict=True):
        yield {"name": name} | {
            key: float(value)
            for key, value in zip(("precision", "recall", "iou"), values, strict=True)
        }


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ASKED, metavar="NAME")
    parser.add_argument("--count", type=int, default=46)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16")
    parser.add_argument("--output", type=Path, default=tables.RESULTS, help="a folder")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    whole, val = (frames.load(given.data, part) for part in ("train", "val"))
    split: Split = split_of(whole, val, frames.labeled(given.data, given.count, whole), "")
    weights = torch.tensor(class_weights_from([split.labeled.labels], len(val.classes)))
    seen: list[tables.Row] = []
    learned: list[tables.Row] = []
    for arm in given.arms:
        external = ARMS[arm].labels(split.labeled, split.unlabeled)
        seen += [{"arm": arm, **row} for row in of_labels(external, split.unlabeled, weights)]
        tables.write(given.output / "why_labels.csv", seen)
        for seed in given.seeds:
            task = Task(arm, given.count, seed, "", given.steps, given.precision)
            with TemporaryDirectory() as folder:
                student = cast(
                    "torch.nn.Module", train(task, split, external, Path(folder), float("inf"))
                )
            learned += [
                {"arm": arm, "seed": seed, **row} for row in of_student(student, split.test)
            ]
            tables.write(given.output / "why_students.csv", learned)
            print("done:", arm, seed, file=sys.stderr, flush=True)
    print(tables.markdown(seen, ["arm", "of", "name", "share of the loss", "kept", "right"]))
    print(tables.markdown(learned, ["arm", "seed", "name", "precision", "recall", "iou"]))


if __name__ == "__main__":
    main(sys.argv[1:])
