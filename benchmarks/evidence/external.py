"""How good external probabilities are, before a student learns from them.

Of an annotator's probabilities of the unlabeled frames, as they are, recalibrated, refined, and
refined both ways without and with sets: the share of pixels whose most likely class is true and
its mIoU, the mean negative logarithm of the true class's probability where it has one, how many
classes have one, and the share of pixels whose true class has none: of each class, in the mean of
the frames that show it, and of each video. ``results/external.csv`` has all of it.

With ``--test`` it is val's frames, and each video's when no frame of it taught or calibrated, that
are judged, as students are: ``results/external_test.csv``.

    python benchmarks/evidence/external.py --data PATH [--count 46] [--test] [--output FOLDER]
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import frames
import tables
import torch
from external_labels import cross_fitted, frame_by_frame, recalibrated_alone, told
from frames import Frames, split_of
from torch import Tensor

from cpseg.filters import SoftLabels
from cpseg.metrics import MeanIoU
from cpseg.training import pool_probabilities


def named(labeled: Frames, unlabeled: Frames) -> Iterator[tuple[str, Tensor, set[int]]]:
    """Probabilities, and the classes that no set promises anything about."""
    yield "as they are", unlabeled.logits.softmax(1), set()
    yield "recalibrated", recalibrated_alone(labeled, unlabeled), set()
    both = cross_fitted(labeled)
    logits = [told(corrected, unlabeled) for corrected in both.corrections]
    one, other = (each.softmax(1) for each in logits)
    yield "refined on one half", one, set()
    yield "refined on the other", other, set()
    yield "both, pooled", pool_probabilities(one.log(), other), set()
    kept = [
        frame_by_frame(SoftLabels(calibration), said)
        for calibration, said in zip(both.calibrations, logits, strict=True)
    ]
    left = [_marked(calibration.fallback_groups) for calibration in both.calibrations]
    yield "one, in its set", kept[0], left[0]
    yield "the other, in its set", kept[1], left[1]
    pooled = pool_probabilities(kept[0].log(), kept[1])  # as both say, whose networks take long
    yield "both, in both sets, pooled", pooled, _marked(both.unpromised)


def _marked(classes: Tensor) -> set[int]:
    return set(classes.nonzero().flatten().tolist())


def judged(shares: Tensor, of: Frames) -> dict[str, object]:
    """Figures of probabilities ``(N, C, H, W)``, 0 where a class is ruled out."""
    classes = len(of.classes)
    known = of.labels < classes
    own = shares.gather(1, torch.where(known, of.labels, 0)[:, None])[:, 0]
    missed = known & (own == 0)
    found = shares.argmax(1)  # where nothing is left it is the first class, and wrong
    iou = MeanIoU(classes)
    iou.update(found, of.labels)
    each = [_share(missed, known & (of.labels == c)).nanmean() for c in range(classes)]
    of_frame = _share(missed, known)
    by_video = {
        f"missed in {video}": float(of_frame[torch.tensor([v == video for v in of.videos])].mean())
        for video in sorted(set(of.videos))
    }
    return {
        "right": float((found == of.labels)[known].double().mean()),
        "miou": float(iou.compute(resamples=1).mean_of_labeled_classes.value),
        "-log": float(-own[known & ~missed].double().log().mean()),
        "classes": float((shares > 0).sum(1)[known].double().mean()),
        **{f"missed {name}": float(share) for name, share in zip(of.classes, each, strict=True)},
        **by_video,
    }


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Of each frame's pixels of the whole, those of the part; NaN where it has none."""
    return (part & whole).sum((1, 2)).double() / whole.sum((1, 2))


def measure(labeled: Frames, unlabeled: Frames) -> list[dict[str, object]]:
    """One row for each kind of probabilities."""
    rows: list[dict[str, object]] = []
    for name, shares, left in named(labeled, unlabeled):
        figures = judged(shares, unlabeled)
        missed = {
            c: cast("float", figures[f"missed {c}"])
            for index, c in enumerate(unlabeled.classes)
            if index not in left
        }
        worst = max(missed, key=missed.__getitem__)
        rows.append(
            {
                "labels": name,
                "count": len(labeled),
                **figures,
                "worst": f"{worst} {tables.told(missed[worst])}" if missed[worst] else "",
                "no promise": " ".join(unlabeled.classes[index] for index in sorted(left)),
            }
        )
    return rows


def tested(train: Frames, val: Frames, labeled: list[int]) -> list[dict[str, object]]:
    """The same rows of val, and of each video that takes no part in what is learned."""
    rows: list[dict[str, object]] = []
    for video in ("", *sorted(set(train.videos))):
        split = split_of(train, val, labeled, video)
        shown = [i for i, v in enumerate(split.test.videos) if video in ("", v)]
        found = measure(split.labeled, split.test[shown])
        rows += [{"tested": video or "val", **row} for row in found]
    return rows


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=46)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--output", type=Path, help="a folder")
    given = parser.parse_args(words)
    train, val = (frames.load(given.data, part) for part in ("train", "val"))
    labeled = frames.labeled(given.data, given.count, train)
    columns = ["labels", "right", "miou", "-log", "classes", "worst", "no promise"]
    if given.test:
        name, columns = "external_test.csv", ["tested", *columns]
        rows = tested(train, val, labeled)
    else:
        name = "external.csv"
        split = split_of(train, val, labeled, "")
        rows = measure(split.labeled, split.unlabeled)
    tables.write((given.output or tables.RESULTS) / name, rows)
    print(tables.markdown(rows, columns))


if __name__ == "__main__":
    main(sys.argv[1:])
