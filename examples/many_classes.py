"""Classes that only a few images hold: what each rests on, and what a fallback gains and costs.

    python examples/many_classes.py --output many_classes.png

The picture has the coverage of every class with the fallback; "1 - alpha" is drawn only where it
is still promised.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from cpseg import Calibration, ClassConditionalCalibrator, PixelSetPredictor, plots
from cpseg.metrics import Coverage, CoverageReport, SetSize
from cpseg.standing import standing, standing_table
from cpseg.tuning import InterpolatedQuantile

CLASSES, COMMON, ALPHA = 20, 12, 0.1
NAMES = [f"common {c}" if c < COMMON else f"rare {c - COMMON}" for c in range(CLASSES)]


def batch(images: int, seed: int, share: float) -> tuple[Tensor, Tensor]:
    """Logits ``(B, C, H, W)`` and labels ``(B, H, W)``; rare classes are in a share of images."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(images, CLASSES)
    weights[:, COMMON:] = (torch.rand(images, CLASSES - COMMON, generator=generator) < share) * 1.0
    labels = torch.multinomial(weights, 16 * 16, replacement=True, generator=generator)
    skill = 3 + torch.randn(images, 1, 1, generator=generator)
    skill = (skill - (labels >= COMMON).float()[:, None]).clamp(min=0)  # rare classes are harder
    truth = torch.nn.functional.one_hot(labels, CLASSES).movedim(-1, 1)
    logits = skill * truth + torch.randn(truth.shape, generator=generator)
    return logits.view(images, CLASSES, 16, 16), labels.view(images, 16, 16)


def measure(calibration: Calibration, logits: Tensor, labels: Tensor) -> CoverageReport:
    """Coverage of new images; prints it beside the size of the sets."""
    sets = PixelSetPredictor(calibration)(logits)
    report = Coverage(CLASSES).update(sets, labels).compute()
    size = SetSize(CLASSES).update(sets, labels).compute().mean_of_pixels
    rare = float(report.classes.mean_of_images.value[COMMON:].mean())
    print(f"fallback {calibration.fallback}: {size:.1f} classes per set, rare covered {rare:.1%}")
    return report


def main(words: list[str] | None = None) -> None:
    """Calibrate with and without a fallback."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("many_classes.png"))
    given = parser.parse_args(words)

    # Fallbacks are tuned on a split of their own: what has tuned does not calibrate.
    tuning = ClassConditionalCalibrator(CLASSES).update(*batch(60, 0, 0.5))
    calibrator = ClassConditionalCalibrator(CLASSES).update(*batch(60, 1, 0.06))
    new = batch(200, 2, 0.3)

    strict = calibrator.compute(ALPHA)
    print(standing_table(standing(strict, NAMES)))
    measure(strict, *new)
    measure(calibrator.compute(ALPHA, fallback="pooled"), *new)
    helped = calibrator.compute(ALPHA, fallback=InterpolatedQuantile.fit(tuning, ALPHA))
    report = measure(helped, *new)

    promised = [math.nan if lost else ALPHA for lost in helped.fallback_groups.tolist()]
    plots.save(plots.coverage_by_class(report, promised, class_names=NAMES), given.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
