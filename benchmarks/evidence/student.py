"""The student, and how every network here is trained; settled on seed 100 and on val."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from cpseg.training import UNet
from cpseg.training.batches import Normalize

LABELED, UNLABELED = 4, 4  # images a step
LR, DECAY = 1e-3, 0.99  # of AdamW, falling to 0; of the averaged student, which is what is tested
SQUARE, WIDTH, DEPTH = 2, 32, 3
NORMALIZE = Normalize()


class Student(nn.Module):
    """The library's small U-Net from squares of two by two pixels to squares, for the time saved."""

    def __init__(self, classes: int, channels: int = 3) -> None:
        super().__init__()
        inside, outside = (count * SQUARE**2 for count in (channels, classes))
        self.net = UNet(outside, channels=inside, width=WIDTH, depth=DEPTH, norm="batch")
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stubs

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images ``(B, channels, H, W)``."""
        height, width = images.shape[2:]
        whole = pad(images, (0, -width % SQUARE, 0, -height % SQUARE))
        return pixel_shuffle(self.net(pixel_unshuffle(whole, SQUARE)), SQUARE)[..., :height, :width]


@torch.no_grad()
def labels_of(student: nn.Module, images: Tensor) -> Tensor:
    """The most likely class of each pixel of images, bytes ``(N, 3, H, W)``, one after the other."""
    each = (student(NORMALIZE(image[None].float() / 255)).argmax(1) for image in images)
    return torch.cat(list(each))
