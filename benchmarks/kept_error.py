"""Error among kept labels on a folder of logits and labels, calibrated over and over.

``python benchmarks/kept_error.py --data FOLDER`` wants ``nll_train.npz`` with ``nll``, float16
``(N, C, H, W)`` of negative log-probabilities, ``name`` of N frames, and ``labels/NAME.png`` of
twice the size, 255 where unknown: pixel (y, x) belongs to label (2 y + 1, 2 x + 1).

The frames are the population: calibration sets are drawn from them with replacement, the truth is
all of them. The start of the tests comes from other frames where ``nll_val.npz`` is there.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import binom
from torch import Tensor

from cpseg import Argmax
from cpseg.risk import KeptError, RiskCalibrator, Start


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Logits and labels on the logits' grid."""
    file = np.load(folder / f"nll_{split}.npz")
    logits = -torch.from_numpy(file["nll"]).float()
    names = [str(name) for name in file["name"]]
    pictures = [np.asarray(Image.open(folder / "labels" / f"{name}.png")) for name in names]
    labels = torch.from_numpy(np.stack(pictures)[:, 1::2, 1::2].astype(np.int64))
    return logits, labels


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--draws", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.data is None:
        print("nothing to do without --data FOLDER")
        return
    torch.set_num_threads(1)
    logits, labels = load(arguments.data, "train")
    images, classes = logits.shape[:2]
    risk = KeptError(Argmax, classes)
    seen = RiskCalibrator(risk)
    for first in range(0, images, 16):
        ids = range(first, min(first + 16, images))
        seen.update(logits[first : first + 16], labels[first : first + 16], ids)
    assert seen.grid is not None  # noqa: S101
    rows = torch.stack([seen._units[unit] for unit in range(images)])
    tuning = RiskCalibrator(risk).update(*load(arguments.data, "val"))
    wrong, kept = rows[:, :-1].view(images, 2, -1).double().unbind(1)
    pixels = rows[:, -1:].double()
    error = (wrong / pixels).mean(0) / (kept / pixels).mean(0).clamp(min=1e-12)
    share = (kept / pixels).mean(0)
    print(f"{images} frames, {classes} classes; error of all labels {float(error[-1]):.3f}\n")
    print("| epsilon | n | start | certified | failures of draws | bound | kept | oracle keeps |")
    print("|---|---|---|---|---|---|---|---|")
    for epsilon in (0.05, 0.1):
        oracle = float(torch.where(error <= epsilon, share, 0.0).max())
        for n in (46, 92, 200):
            for start in (None, Start.fit(tuning, epsilon)):
                generator = torch.Generator().manual_seed(n)
                failures, certified, total = 0, 0, 0.0
                for _ in range(arguments.draws):
                    chosen = torch.randint(images, (n,), generator=generator)
                    control = RiskCalibrator(risk, start=start)
                    control.update(logits[:0], labels[:0])
                    control._rows = [rows[chosen]]
                    threshold = control.compute(epsilon, 0.1).thresholds
                    if bool(threshold.isinf()):
                        continue
                    place = int((seen.grid == threshold).nonzero())
                    certified += 1
                    failures += float(error[place]) > epsilon
                    total += float(share[place])
                bound = int(binom.ppf(0.9999, arguments.draws, 0.1))
                print(
                    f"| {epsilon:g} | {n} | {'several' if start is None else 'tuned'} "
                    f"| {certified}/{arguments.draws} | {failures} | {bound} "
                    f"| {total / arguments.draws:.3f} | {oracle:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
