"""How time per pixel and memory of calibration grow with images and classes: they should not.

Printed: nanoseconds of one thread per pixel (and per pixel and class), and the growth of the
process's memory from the first batch on, as images go 10 to 10,000 and classes 2 to 1,000.

    python benchmarks/scaling.py [most images]
"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch

from cpseg import APS, LAC, ClassConditionalCalibrator, PixelSetPredictor
from cpseg.protocols import Score

MOST = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
BATCH, SIDE = 10, 128


def resident() -> int:
    """Bytes the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def by_images(score: Score) -> None:
    """One batch after another, each seen and forgotten."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(BATCH, 21, SIDE, SIDE)
    labels = logits.argmax(1)
    calibrator = ClassConditionalCalibrator(21, score).update(logits, labels)
    before, start = resident(), time.thread_time()
    for images in range(BATCH, MOST + 1, BATCH):
        calibrator.update(logits, labels)
        if images in (10, 100, 1_000, 10_000):
            taken = time.thread_time() - start
            pixels = images * SIDE * SIDE
            grown = (resident() - before) / 2**20
            print(f"| {score} | {images:,} | {1e9 * taken / pixels:.0f} | {grown:.1f} MiB |")


def by_classes(score: Score, classes: int) -> None:
    """One image, updates and sets."""
    torch.manual_seed(0)
    side = 256 if classes < 100 else 64
    logits = 3 * torch.randn(1, classes, side, side)
    labels = logits.argmax(1)
    calibrator = ClassConditionalCalibrator(classes, score, ignore_index=-1).update(logits, labels)
    calibration = (
        ClassConditionalCalibrator(classes, score, ignore_index=-1)
        .update(logits, labels)
        .compute(0.5)
    )
    predictor = PixelSetPredictor(calibration)
    taken = []
    for run in (lambda: calibrator.update(logits, labels), lambda: predictor(logits)):
        run()
        start = time.thread_time()
        for _ in range(3):
            run()
        taken.append(1e9 * (time.thread_time() - start) / 3 / side**2 / classes)
    print(f"| {score} | {classes:,} | {taken[0]:.1f} | {taken[1]:.1f} |", flush=True)


torch.set_num_threads(1)
print("| score | images | ns per pixel, update | memory grown |\n|---|---|---|---|")
for score in (LAC(), APS()):
    by_images(score)
print("\n| score | classes | ns per pixel and class, update | sets |\n|---|---|---|---|")
for score in (LAC(), APS()):
    for classes in (2, 21, 64, 65, 150, 1_000):
        by_classes(score, classes)
