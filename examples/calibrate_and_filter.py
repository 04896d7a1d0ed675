"""Calibrate on labeled images, predict sets for new ones, keep the labels that are settled.

    python examples/calibrate_and_filter.py --output calibrate_and_filter.png

The picture shows one new image, the classes still possible, and the labels that are kept.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from cpseg import ClassConditionalCalibrator, PixelSetPredictor, Singleton, plots
from cpseg.annotators import SyntheticAnnotator
from cpseg.data import SyntheticShapes
from cpseg.metrics import Coverage, SelectiveAccuracy

CLASSES = SyntheticShapes.classes
ANNOTATOR = SyntheticAnnotator(num_classes=len(CLASSES), seed=0)
ALPHA = 0.1


def annotated(shapes: SyntheticShapes, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image ``(3, H, W)``, logits ``(1, C, H, W)`` and labels ``(1, H, W)``."""
    image, label = shapes[index]
    return image, ANNOTATOR(label[None], seeds=[shapes.seed << 32 | index]), label[None]


def main(words: list[str] | None = None) -> None:
    """Calibrate, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("calibrate_and_filter.png"))
    parser.add_argument("--images", type=int, default=120, help="to calibrate on")
    given = parser.parse_args(words)
    held_out = SyntheticShapes(length=given.images, seed=0)
    new = SyntheticShapes(length=40, seed=1)

    calibrator = ClassConditionalCalibrator(len(CLASSES))
    for index in range(len(held_out)):
        _, logits, labels = annotated(held_out, index)
        calibrator.update(logits, labels)
    calibration = calibrator.compute(ALPHA)
    print(calibration.guarantee)

    predictor, keep = PixelSetPredictor(calibration), Singleton(calibration)
    coverage, right = Coverage(len(CLASSES)), SelectiveAccuracy(len(CLASSES))
    for index in range(len(new)):
        _, logits, labels = annotated(new, index)
        coverage.update(predictor(logits), labels)
        right.update(keep(logits), labels)
    print(coverage.compute().table(CLASSES))
    kept = right.compute()
    share, accuracy = (float(r.mean_of_pixels.value) for r in (kept.kept, kept.accuracy_of_kept))
    print(f"one class left: {share:.1%} of the pixels, of which {accuracy:.1%} are labeled right")

    image, logits, labels = annotated(new, 8)
    figure = plots.one_image(
        logits[0],
        predictor(logits)[0],
        image=image,
        pseudo_labels=keep(logits)[0],
        labels=labels[0],
        class_names=CLASSES,
    )
    plots.save(figure, given.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
