"""The frames that the evidence is measured on: images, an annotator's logits, and labels.

A folder holds ``nll_train.npz`` and ``nll_val.npz``, each with ``nll``, negative log-probabilities
float16 ``(N, C, H, W)``, ``name`` of N frames and ``classes``; ``images/NAME.jpg`` and
``labels/NAME.png`` of twice the size, 255 where unknown; and ``splits/COUNT/labeled.txt`` with
lines ``image label``. Pixel (y, x) of the logits belongs to label (2 y + 1, 2 x + 1). A frame's
video is the first six characters of its name.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from cpseg.data.folder import read_image, read_mask, read_split


@dataclass(frozen=True)
class Frames:
    """Frames, all of one size.

    ``images`` are uint8 ``(N, 3, H, W)``; ``logits`` float32 ``(N, C, H, W)``; ``labels`` int64
    ``(N, H, W)``, 255 where unknown.
    """

    names: list[str]
    classes: list[str]
    images: Tensor
    logits: Tensor
    labels: Tensor

    @property
    def videos(self) -> list[str]:
        return [name[:6] for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, chosen: list[int]) -> "Frames":
        """Some of the frames, in the order asked for."""
        return Frames(
            [self.names[index] for index in chosen],
            self.classes,
            self.images[chosen],
            self.logits[chosen],
            self.labels[chosen],
        )


def load(folder: Path, part: str, *, whole: bool = False) -> Frames:
    """All frames of ``"train"`` or ``"val"``, on the annotator's grid, or as large as the images.

    On the annotator's grid images are means of two by two pixels; else the logits between those
    that the annotator gave are means of their neighbors.
    """
    file = np.load(folder / f"nll_{part}.npz")
    names = [str(name) for name in file["name"]]
    images = torch.stack([read_image(folder / "images" / f"{name}.jpg") for name in names])
    labels = torch.stack([read_mask(folder / "labels" / f"{name}.png") for name in names])
    logits = -torch.from_numpy(file["nll"]).float()
    if whole:
        logits = doubled(doubled(logits, 2), 3)
    else:
        images = avg_pool2d(images.float(), 2).round().to(torch.uint8)
        labels = labels[:, 1::2, 1::2].contiguous()
    return Frames(names, [str(name) for name in file["classes"]], images, logits, labels)


def fingerprint(folder: Path) -> str:
    """Which frames a folder holds: digits of the SHA-256 of what the annotator says of them."""
    parts = (folder / f"nll_{part}.npz" for part in ("train", "val"))
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:12]


def doubled(values: Tensor, dim: int) -> Tensor:
    """Twice as many along ``dim``: each with the mean of it and the one before put before it."""
    before = torch.cat(
        (values.narrow(dim, 0, 1), values.narrow(dim, 0, values.shape[dim] - 1)), dim
    )
    return torch.stack(((before + values) / 2, values), dim + 1).flatten(dim, dim + 1)


def labeled(folder: Path, count: int, frames: Frames) -> list[int]:
    """Which of the frames are the labeled ones of a split, by their place in ``frames``."""
    place = {name: index for index, name in enumerate(frames.names)}
    split = folder / "splits" / str(count) / "labeled.txt"
    return [place[Path(image).stem] for image, _ in read_split(split)]


@dataclass(frozen=True)
class Split:
    """Who trains and who tests."""

    labeled: Frames
    unlabeled: Frames
    test: Frames

    @property
    def size(self) -> str:
        height, width = self.test.labels.shape[1:]
        return f"{height}x{width}"


def split_of(train: Frames, val: Frames, labeled: list[int], held_out: str) -> Split:
    """The frames of a count; those of a held-out video are tested and never trained on."""
    away = [index for index, video in enumerate(train.videos) if video == held_out]
    if held_out and not away:
        raise SystemExit(f"--hold-out must name a video of {sorted(set(train.videos))}")
    chosen, gone = set(labeled), set(away)
    others = [index for index in range(len(train)) if index not in chosen | gone]
    new = train[away]
    test = replace(
        val,
        names=val.names + new.names,
        images=torch.cat((val.images, new.images)),
        logits=torch.cat((val.logits, new.logits)),
        labels=torch.cat((val.labels, new.labels)),
    )
    return Split(train[[index for index in labeled if index not in gone]], train[others], test)
