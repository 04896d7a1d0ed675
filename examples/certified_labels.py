"""Pseudo-labels of which at most a tenth are wrong, with probability 90 %.

    python examples/certified_labels.py --output certified_labels.png

A set that holds the truth says nothing about the one label taken from it. This controls the error
of the labels themselves; the picture marks the certified point on the risk-coverage curve.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cpseg import Argmax, plots
from cpseg.annotators import SyntheticAnnotator
from cpseg.data import SyntheticShapes
from cpseg.metrics import SelectiveAccuracy
from cpseg.risk import KeptError, RiskCalibrator, Start

CLASSES = SyntheticShapes.classes
ANNOTATOR = SyntheticAnnotator(num_classes=len(CLASSES), error_rate=0.3, seed=0)
ALPHA, DELTA = 0.1, 0.1


def annotated(seed: int, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits ``(1, C, H, W)`` and labels ``(1, H, W)``; two seeds share no image."""
    for index, (_, label) in enumerate(SyntheticShapes(length=images, seed=seed)):
        yield ANNOTATOR(label[None], seeds=[seed << 32 | index]), label[None]


def main(words: list[str] | None = None) -> None:
    """Tune on one split, certify on another, measure on a third."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("certified_labels.png"))
    parser.add_argument("--images", type=int, default=150, help="to certify on")
    given = parser.parse_args(words)

    risk = KeptError(Argmax, len(CLASSES))
    tuning = RiskCalibrator(risk)
    for logits, labels in annotated(0, 40):
        tuning.update(logits, labels)
    # Where the tests begin may be chosen on data, as long as it is other data.
    control = RiskCalibrator(risk, start=Start.fit(tuning, ALPHA))
    for logits, labels in annotated(1, given.images):
        control.update(logits, labels)
    calibration = control.compute(ALPHA, DELTA)
    print(calibration.guarantee)

    keep = Argmax(calibration)
    kept, raw = SelectiveAccuracy(len(CLASSES)), SelectiveAccuracy(len(CLASSES))
    confidence = plots.ConfidenceCounts()
    for logits, labels in annotated(2, 60):
        kept.update(keep(logits), labels)
        raw.update(logits.argmax(1), labels)
        confidence.update(logits, labels)
    share, accuracy, before = (
        float(ratio.mean_of_pixels.value)
        for ratio in (
            kept.compute().kept,
            kept.compute().accuracy_of_kept,
            raw.compute().accuracy_of_kept,
        )
    )
    print(f"all labels: {before:.1%} right; {share:.1%} kept, of which {accuracy:.1%} are right")
    point = plots.Certified(kept=share, accuracy=accuracy, promised=1 - ALPHA)
    plots.save(plots.risk_coverage(confidence, certified=point), given.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
