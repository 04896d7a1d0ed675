"""The mIoU of a network over a dataset, each image counted once whatever the processes."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from cpseg import _checks
from cpseg.errors import InputError
from cpseg.training.batches import Labeled, Normalize
from cpseg.training.distributed import Processes
from cpseg.training.students import logits_of

__all__ = ["Evaluation", "evaluate"]


@final
@dataclass(frozen=True, eq=False, slots=True)
class Evaluation:
    """How predictions and labels meet over a dataset.

    Attributes:
        confusion: Pixels by label and prediction. int64 ``(C, C)``.
    """

    confusion: Tensor

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class; NaN where neither shows it. float64 ``(C,)``."""
        both = self.confusion.diagonal().double()
        return both / (self.confusion.sum(0) + self.confusion.sum(1) - both)

    @property
    def miou(self) -> float:
        """The mean over classes that a label or a prediction shows."""
        return float(self.iou.nanmean())

    @property
    def miou_absent_as_zero(self) -> float:
        """The mean over all classes where absent ones count 0, as in most published numbers."""
        return float(self.iou.nan_to_num(0).mean())


def evaluate(
    network: nn.Module,
    dataset: Labeled,
    *,
    num_classes: int,
    normalize: Normalize = Normalize(),
    ignore_index: int = 255,
    divisor: int = 1,
    device: torch.device | None = None,
    processes: Processes = Processes(),
) -> Evaluation:
    """Predict every image whole, at its own size, and compare with its labels.

    The processes take every ``count``-th image each and meet once, at the end; no image is
    counted twice to make their shares equal.

    Args:
        network: Images to logits; in evaluation mode for the while.
        dataset: Images and labels.
        num_classes: Number of classes, C.
        normalize: What the network expects.
        ignore_index: Label of pixels that do not count.
        divisor: Images are padded on the right and below to multiples of it, with gray.
        device: Where the network lives; None: the CPU.
        processes: Who shares the work.

    Raises:
        InputError: If the dataset is empty, a label is no class, or the logits' number is wrong.
    """
    _checks.check_integer("divisor", divisor, 1)
    if len(dataset) == 0:
        raise InputError("dataset must hold at least one image; got none")
    confusion = torch.zeros((num_classes + 1) * num_classes, dtype=torch.int64, device=device)
    strange = torch.zeros((), dtype=torch.int64, device=device)
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            for index in range(processes.rank, len(dataset), processes.count):
                image, label = dataset[index]
                labels = label.to(device).long()
                below, right = (-side % divisor for side in image.shape[1:])
                inputs = normalize(image.to(device).float() / 255)[None]
                inputs = torch.nn.functional.pad(inputs, (0, right, 0, below))
                size = (inputs.shape[2], inputs.shape[3])
                logits = logits_of(network(inputs), size)
                _checks.check_logits(logits, num_classes)
                found = logits[0, :, : image.shape[1], : image.shape[2]].argmax(0)
                known = labels != ignore_index
                off = known & ((labels < 0) | (labels >= num_classes))
                strange += off.sum()
                row = torch.where(known & ~off, labels, num_classes)
                confusion += torch.bincount(
                    (row * num_classes + found).flatten(), minlength=len(confusion)
                )
    finally:
        for module, mode in modes:
            module.training = mode
    processes.sum(confusion)
    if int(processes.sum(strange)):
        raise InputError(
            f"labels must be classes in [0, {num_classes}) or {ignore_index}; "
            f"got {int(strange)} pixels that are neither"
        )
    return Evaluation(confusion.view(num_classes + 1, num_classes)[:num_classes].cpu())
