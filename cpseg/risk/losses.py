"""What a risk sees, and what it gives back: one number in [0, 1] per image and threshold."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, final

from torch import Tensor

from cpseg.calibration import Calibration
from cpseg.protocols import Score

__all__ = ["Batch", "Losses", "Risk", "Rule"]

Rule = Callable[[Calibration], Callable[[Tensor], Tensor]]
"""A filter as a function of its calibration, as ``Argmax`` or ``partial(AtMost, k=2)`` are."""


@final
@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """What a risk counts.

    Attributes:
        logits: Shape ``(B, C, *S)``.
        labels: int64 classes, 0 where not valid. Shape ``(B, *S)``.
        valid: Where labels are known. Bool ``(B, *S)``.
        instances: Objects, 0 for none; None where they were not given. int64 ``(B, *S)``.
        grid: Increasing thresholds. float32 ``(K,)``.
        score: The nonconformity score.
        ignore_index: Label of pixels that do not count.
    """

    logits: Tensor
    labels: Tensor
    valid: Tensor
    instances: Tensor | None
    grid: Tensor
    score: Score
    ignore_index: int


@final
@dataclass(frozen=True, eq=False, slots=True)
class Losses:
    """A risk's values.

    Attributes:
        values: In [0, 1]. float64 ``(N, R, K)``: units, thresholds to find, thresholds to try.
        counted: Which units have a risk. Bool ``(N, R)``.
        pixels: Labeled pixels behind it. int64 ``(N, R)``.
    """

    values: Tensor
    counted: Tensor
    pixels: Tensor


class Risk(Protocol):
    """A risk per image, as counts that add up over the tiles of a unit."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of the thresholds it looks for, ``()`` or ``("class",)``."""
        ...

    @property
    def keeps(self) -> bool:
        """Whether it is of kept labels, safest at the lowest threshold; else it is of sets."""
        ...

    @property
    def monotone(self) -> bool:
        """Whether no unit's loss falls as thresholds move away from the safe end."""
        ...

    @property
    def starts(self) -> int:
        """How many starts the tests have if none was tuned; 1 is the safe end itself."""
        ...

    @property
    def rule(self) -> Rule | None:
        """The filter whose labels it is about; None for sets."""
        ...

    def tally(self, batch: Batch, /) -> Tensor:
        """Counts of each batch entry. int64 ``(B, T)``."""
        ...

    def losses(self, tallies: Tensor, alpha: float, /) -> Losses:
        """Of units' counts, ``(N, T)``."""
        ...

    def event(self, alpha: float, /) -> str:
        """What is bounded by alpha, as a sentence without its end."""
        ...
