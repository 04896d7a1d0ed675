"""Frames of one video are no independent images: what calibrating them as such costs.

    python examples/video_units.py --output video_units.png

A fifth of the videos was taken at night, where the model is of no use. Nine videos of ten frames
calibrate and a new one is predicted, 300 times over: once with the frame as the unit, once with the
video. The picture has both against what was promised.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from cpseg import PixelSetPredictor, SplitCalibrator, plots
from cpseg.metrics import Coverage

VIDEOS, FRAMES, ALPHA = 9, 10, 0.2


def videos(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``(B, 2, 4, 4)``, labels ``(B, 4, 4)`` and the video of each frame ``(B,)``."""
    names = torch.arange(count).repeat_interleave(FRAMES)
    labels = torch.randint(0, 2, (len(names), 4, 4), generator=generator)
    night = torch.rand(count, generator=generator) < 0.2
    skill = torch.where(night, -2.0, 3.0)[names]  # the frames of a video are alike
    truth = torch.nn.functional.one_hot(labels, 2).movedim(-1, 1)
    noise = torch.randn(truth.shape, generator=generator)
    return skill.view(-1, 1, 1, 1) * truth + noise, labels, names


def covered(by_video: bool, draws: int) -> Tensor:  # noqa: FBT001 - the two things compared
    """Coverage of a new video in each draw."""
    generator = torch.Generator().manual_seed(0)
    found: list[float] = []
    for _ in range(draws):
        logits, labels, names = videos(VIDEOS, generator)
        calibrator = SplitCalibrator().update(logits, labels, names if by_video else None)
        sets = PixelSetPredictor(calibrator.compute(ALPHA))
        logits, labels, names = videos(1, generator)
        report = Coverage(2).update(sets(logits), labels, names).compute(resamples=1)
        found.append(report.mean_of_images)
    return torch.tensor(found)


def main(words: list[str] | None = None) -> None:
    """Compare the two units and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("video_units.png"))
    parser.add_argument("--draws", type=int, default=300)
    given = parser.parse_args(words)

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for place, unit in enumerate(("frame", "video")):
        values = covered(by_video=unit == "video", draws=given.draws)
        error = float(values.std()) / len(values) ** 0.5
        print(f"unit {unit}: {float(values.mean()):.1%} covered (standard error {error:.1%})")
        axes.plot(
            values.sort().values,
            torch.arange(1, len(values) + 1) / len(values),
            color=plots.class_color(place + 1),
            label=f"{unit}: mean {float(values.mean()):.1%}",
        )
    axes.axvline(1 - ALPHA, color="black", ls="--", label=f"promised on average: {1 - ALPHA:.0%}")
    axes.set_xlabel("coverage of a new video")
    axes.set_ylabel("share of draws below")
    axes.legend()
    plots.save(figure, given.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
