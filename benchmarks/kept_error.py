"""Error among kept labels on a folder of logits and labels, calibrated over and over.

``python benchmarks/kept_error.py --data FOLDER`` wants ``nll_train.npz`` with ``nll``, float16
``(N, C, H, W)`` of negative log-probabilities, ``name`` of N frames, and ``labels/NAME.png`` of
twice the size, 255 where unknown: pixel (y, x) belongs to label (2 y + 1, 2 x + 1).

The frames are the population: calibration sets are drawn from them with replacement, the truth is
all of them. The start of the tests comes from the frames of ``nll_val.npz``. A second table calibrates
on all videos but one (a name's first six characters) and looks at the one left out.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from scipy.stats import binom
from torch import Tensor

from cpseg import Argmax
from cpseg.risk import KeptError, RiskCalibrator, Start


def load(folder: Path, split: str) -> tuple[Tensor, Tensor, list[str]]:
    """Logits, labels on the logits' grid, and names."""
    file = np.load(folder / f"nll_{split}.npz")
    logits = -torch.from_numpy(file["nll"]).float()
    names = [str(name) for name in file["name"]]
    pictures = [np.asarray(Image.open(folder / "labels" / f"{name}.png")) for name in names]
    labels = torch.from_numpy(np.stack(pictures)[:, 1::2, 1::2].astype(np.int64))
    return logits, labels, names


@dataclass(frozen=True)
class Frames:
    """What a calibrator remembers of each frame, so that any of them can be drawn again.

    Attributes:
        risk: What is counted.
        rows: Counts. int64 ``(N, T)``.
        marks: Checksums: the order of the tests is drawn from their sum. int64 ``(N, 2)``.
        grid: The thresholds. float32 ``(K,)``.
    """

    risk: KeptError
    rows: Tensor
    marks: Tensor
    grid: Tensor

    @classmethod
    def of(cls, risk: KeptError, logits: Tensor, labels: Tensor) -> Self:
        """Each frame by itself."""
        rows, marks = [], []
        for frame, truth in zip(logits, labels, strict=True):
            seen = RiskCalibrator(risk).update(frame[None], truth[None])
            rows.append(seen.table())
            marks.append(seen._checksum)
        assert seen.grid is not None  # noqa: S101
        return cls(risk, torch.cat(rows), torch.stack(marks), seen.grid)

    def drawn(self, chosen: Tensor, start: Start | None) -> RiskCalibrator:
        """The calibrator that has seen the chosen frames, without counting them again."""
        control = RiskCalibrator(self.risk, grid=self.grid, start=start)
        control._rows, control._checksum = [self.rows[chosen]], self.marks[chosen].sum(0)
        return control


def error_and_share(rows: Tensor) -> tuple[Tensor, Tensor]:
    """At each threshold: ``E[wrong] / E[kept]``, and the mean share of a frame that is kept."""
    wrong, kept = rows[:, :-1].view(len(rows), 2, -1).double().unbind(1)
    pixels = rows[:, -1:].double().clamp(min=1)
    share = (kept / pixels).mean(0)
    return (wrong / pixels).mean(0) / share.clamp(min=1e-12), share


def main() -> None:
    """Print two tables: frames drawn at random, and each video left out in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--draws", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.data is None:
        print("nothing to do without --data FOLDER")
        return
    torch.set_num_threads(1)
    logits, labels, names = load(arguments.data, "train")
    images, classes = logits.shape[:2]
    risk = KeptError(Argmax, classes)
    frames = Frames.of(risk, logits, labels)
    tuning = RiskCalibrator(risk).update(*load(arguments.data, "val")[:2])
    videos = [name[:6] for name in names]
    everything = torch.ones(images, dtype=torch.bool)
    print(f"{images} frames, {classes} classes, {len(set(videos))} videos; ", end="")
    print(f"error of all labels {float(error_and_share(frames.rows)[0][-1]):.3f}\n")
    print("Frames drawn from all, the truth is all:\n")
    print(HEAD)
    for epsilon in (0.05, 0.1):
        for n in (46, 92, 200):
            for start in (None, Start.fit(tuning, epsilon)):
                split = everything, everything
                found = repeat(frames, split, epsilon, n, start, draws=arguments.draws)
                print(f"| all | {found}", flush=True)
    print("\nFrames drawn from the other videos, the truth is the video left out:\n")
    print(HEAD)
    for video in sorted(set(videos)):
        inside = torch.tensor([name == video for name in videos])
        for epsilon in (0.05, 0.1):
            for n in (46, 92, 200):
                start = Start.fit(tuning, epsilon)
                split = ~inside, inside
                found = repeat(frames, split, epsilon, n, start, draws=arguments.draws)
                print(f"| {video} ({int(inside.sum())}) | {found}", flush=True)


HEAD = """| truth | epsilon | n | start | certified | failures | allowed | kept | oracle keeps |
|---|---|---|---|---|---|---|---|---|"""


def repeat(
    frames: Frames,
    split: tuple[Tensor, Tensor],
    epsilon: float,
    n: int,
    start: Start | None,
    *,
    draws: int,
) -> str:
    """Calibrate on frames drawn with replacement from one part; a line about the other part."""
    pool = split[0].nonzero()[:, 0]
    error, share = error_and_share(frames.rows[split[1]])
    oracle = float(torch.where(error <= epsilon, share, 0.0).max())
    generator = torch.Generator().manual_seed(n)
    failures, certified, total = 0, 0, 0.0
    for _ in range(draws):
        chosen = pool[torch.randint(len(pool), (n,), generator=generator)]
        threshold = frames.drawn(chosen, start).compute(epsilon, 0.1).thresholds
        if bool(threshold.isinf()):
            continue
        place = int((frames.grid == threshold).nonzero())
        certified += 1
        failures += float(error[place]) > epsilon
        total += float(share[place])
    allowed = int(binom.ppf(0.9999, draws, 0.1))
    return (
        f"{epsilon:g} | {n} | {'several' if start is None else 'tuned'} | {certified}/{draws} "
        f"| {failures} | {allowed} | {total / draws:.3f} | {oracle:.3f} |"
    )


if __name__ == "__main__":
    main()
