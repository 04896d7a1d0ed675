"""Frames made on the fly, for ``--quick``: videos, an annotator that errs, rare classes."""

import torch
from frames import Frames
from torch.nn.functional import interpolate, one_hot

CLASSES = ["Road", "Building", "Car", "Pole"]
SHARES = (0.5, 0.35, 0.12, 0.03)


def miniature(frames: int = 72, size: tuple[int, int] = (12, 16), seed: int = 0) -> Frames:
    """Frames of three videos; the annotator is worse on the second, and confuses the rare classes."""
    generator = torch.Generator().manual_seed(seed)
    count, (height, width) = len(CLASSES), size
    shares = torch.tensor(SHARES).expand(frames * (height // 2) * (width // 2), count)
    coarse = torch.multinomial(shares, 1, generator=generator).view(frames, 1, height // 2, -1)
    labels = interpolate(coarse.float(), size=size)[:, 0].long()
    video = torch.arange(frames) * 3 // frames
    skill = torch.tensor([2.5, 1.2, 3.0])[video].view(-1, 1, 1, 1)
    skill = skill * (0.6 + 0.8 * torch.rand((frames, 1, 1, 1), generator=generator))
    noise = torch.randn((frames, count, *size), generator=generator)
    logits = skill * one_hot(labels, count).movedim(-1, 1) + noise
    logits[:, :2] += 0.8  # what is frequent is said too often
    labels[torch.rand(labels.shape, generator=generator) < 0.05] = 255
    images = (60 * labels.clamp(max=count)).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    names = [f"video{int(place)}_{index:05d}" for index, place in enumerate(video)]
    return Frames(names, CLASSES, images, logits, labels)
