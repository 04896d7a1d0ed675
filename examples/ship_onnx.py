"""A model with its thresholds as one ONNX file: images in, filtered labels out.

    python examples/ship_onnx.py --output ship_onnx.png

Needs the extra "export". The file is written beside the picture, run without cpseg, and compared
with what cpseg gives.
"""

import argparse
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn
from typing_extensions import override

from cpseg import PixelSetPredictor, Singleton, SplitCalibrator, plots
from cpseg.data import SyntheticShapes
from cpseg.export import CalibratedModule, save_onnx

CLASSES = SyntheticShapes.classes


class Colors(nn.Module):
    """A stand-in for your model: how near each pixel's color is to the mean color of a class."""

    means: Tensor

    def __init__(self, means: Tensor) -> None:
        super().__init__()
        self.register_buffer("means", means)

    @override
    def forward(self, images: Tensor) -> Tensor:
        smooth = nn.functional.avg_pool2d(images, 5, stride=1, padding=2)
        difference = smooth[:, None] - self.means[None, :, :, None, None]
        return -difference.square().sum(2) / 200


def batch(seed: int, images: int) -> tuple[Tensor, Tensor]:
    """Images, float32 ``(B, 3, H, W)``, and labels ``(B, H, W)``."""
    shapes = [SyntheticShapes(length=images, size=(48, 64), seed=seed)[i] for i in range(images)]
    return torch.stack([i for i, _ in shapes]).float(), torch.stack([label for _, label in shapes])


def main(words: list[str] | None = None) -> None:
    """Fit, calibrate, write, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("ship_onnx.png"))
    given = parser.parse_args(words)

    images, labels = batch(0, 60)
    by_class = [images.movedim(1, -1)[labels == c].mean(0) for c in range(len(CLASSES))]
    model = Colors(torch.stack(by_class))
    images, labels = batch(1, 60)
    calibration = SplitCalibrator().update(model(images), labels).compute(alpha=0.2)

    path = given.output.with_suffix(".onnx")
    save_onnx(CalibratedModule(Singleton(calibration), model), images[:2], path)
    session = onnxruntime.InferenceSession(path)
    images, labels = batch(2, 5)  # another batch size than that of the example
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    shipped, ours = torch.from_numpy(found), Singleton(calibration)(model(images))
    print(f"{path.name}: {path.stat().st_size} bytes; {(shipped != ours).sum()} labels differ")
    print(f"{(shipped != 255).float().mean():.1%} of the pixels keep a label")

    logits = model(images[:1])
    figure = plots.one_image(
        logits[0],
        PixelSetPredictor(calibration)(logits)[0],
        image=images[0].byte(),
        pseudo_labels=shipped[0],
        labels=labels[0],
        class_names=CLASSES,
    )
    plots.save(figure, given.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
