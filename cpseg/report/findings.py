"""What goes into a report, and what is found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final

from torch import Tensor

from cpseg.calibration import Calibration
from cpseg.filters import Argmax, AtMost, BackgroundPriority, Singleton, Top
from cpseg.metrics import CoverageReport, SelectiveAccuracyReport, SetSizeReport
from cpseg.plots import ConfidenceCounts

if TYPE_CHECKING:
    import matplotlib.figure

__all__ = ["AnyFilter", "Entries", "Entry", "Findings", "Seen", "Worry"]

AnyFilter = Argmax | Top | BackgroundPriority | Singleton | AtMost
"""A filter of :mod:`cpseg.filters`."""


@final
@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """A labeled image.

    Attributes:
        name: What to call it.
        logits: Shape ``(C, *S)``.
        labels: Integers. Shape ``(*S)``.
        image: Red, green, blue, uint8 ``(3, H, W)``, if there is one.
        pseudo_labels: What was kept, where that is not the filter's answer to these logits: a
            compact cache abstains where what it does not store could decide. ``(*S)``.
    """

    name: str
    logits: Tensor
    labels: Tensor
    image: Tensor | None = None
    pseudo_labels: Tensor | None = None


class Entries(Protocol):
    """Labeled images, read one at a time."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int, /) -> Entry:
        """One of them."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """What happened on one image.

    Attributes:
        name: The image.
        coverage: Share of labeled pixels whose class is in the set; NaN without sets or labels.
        set_size: Mean size of those sets.
        right: Share of labeled pixels whose most likely class is right.
    """

    name: str
    coverage: float
    set_size: float
    right: float


@final
@dataclass(frozen=True, slots=True)
class Worry:
    """A class that needs attention.

    Attributes:
        name: The class.
        why: What is the matter, a sentence or more.
        remedy: What would help.
    """

    name: str
    why: str
    remedy: str


@final
@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Findings:
    """What :func:`measure` found.

    Attributes:
        calibration: What was looked at.
        rule: The filter, in words.
        class_names: Of each class.
        coverage: Of the sets; None where the calibration makes none.
        sizes: Of the sets.
        raw: Of the most likely class everywhere.
        kept: Of what the filter keeps.
        confidence: How often the most likely class is right.
        images: Every image, the least covered first.
        levels: Levels, the thresholds these images would give, and mean set sizes. None for
            thresholds per location or group, and where there are no sets.
        same_data: Whether these seem to be the very images of the calibration.
        worries: Classes that need attention.
        shown: The worst images with their figures.
    """

    calibration: Calibration
    rule: str
    class_names: Sequence[str]
    coverage: CoverageReport | None
    sizes: SetSizeReport | None
    raw: SelectiveAccuracyReport
    kept: SelectiveAccuracyReport
    confidence: ConfidenceCounts
    images: Sequence[Seen]
    levels: tuple[list[float], Tensor, list[float]] | None
    same_data: bool
    worries: Sequence[Worry]
    shown: Sequence[tuple[Seen, "matplotlib.figure.Figure"]]
