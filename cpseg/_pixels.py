"""What a labeled pixel adds to a calibrator: a cell, a class or a fault, and a mark of the data.

One operation on columns, so that a kernel reads the logits once for all of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cpseg._classes import Parts, at_class, num_classes
from cpseg.accumulate import ExactScale, HistogramScale, upward
from cpseg.scores import ColumnScore, label_scores_in_parts

__all__ = ["FAULTS", "NUM_CODES", "Pixels", "data_mark"]

FAULTS = (
    "whose label is neither a class nor ignore_index",
    "whose logits have no finite maximum, or a NaN",
    "whose score lies outside the range it declares",
)
NUM_CODES = 1 + len(FAULTS)  # in place of a class, from C on: no label, or a fault


@dataclass(frozen=True, slots=True)
class Pixels:
    """The cells of each label's score, its class or code, and a hash of what it came from.

    Where there is a code, the cell is the one past the last, and the hash 0.
    """

    score: ColumnScore
    scales: tuple[HistogramScale | ExactScale, ...]
    ignore_index: int

    def __call__(self, x: Parts, position: Tensor, /, *beside: Tensor) -> tuple[Tensor, ...]:
        labels = beside[0].long()
        classes = num_classes(x)
        clean = labels.clamp(0, classes - 1)
        known = clean == labels
        scores = upward(label_scores_in_parts(self.score, x, position, clean))
        usable = known & (scores == scores)  # noqa: PLR0124 - NaN, vectorized
        counts = known & self.scales[0].fits(scores)
        # The code is how many tests are passed: some label, a class, a score.
        code = (labels != self.ignore_index).int() + known.int() + usable.int()
        cells = [torch.where(counts, s.cells(scores), s.num_cells) for s in self.scales]
        place = torch.where(counts, clean.int(), code + classes)
        small = classes + NUM_CODES <= 256
        mark = data_mark(clean, at_class(x, clean)) * counts.int()
        return *cells, place.to(torch.uint8 if small else torch.int32), mark


def data_mark(labels: Tensor, logits: Tensor) -> Tensor:
    """A hash of each pixel's label and of that class's logit, whatever the score. int32.

    Not narrower: a kernel that holds anything of int16 is not vectorized.
    """
    mark = (labels.int() * 0x5BD1E995) ^ logits.float().view(torch.int32)
    mark = mark * 0x2C1B3C6D
    mark = (mark ^ (mark >> 15)) * 0x297A2D39
    return mark ^ (mark >> 15)
