"""Risks of sets: what they miss. They fall as the threshold rises."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.morphology import connected_components
from cpseg.quantile import level
from cpseg.risk._counting import (
    by_class,
    check_classes,
    first_covering,
    flattened,
    losses_of_function,
    missed_shares,
    tally_of_function,
)
from cpseg.risk.losses import Batch, Losses

__all__ = [
    "CoverageShare",
    "DilutedFalseNegativeRate",
    "FalseNegativeRate",
    "InstanceRecall",
    "Miscoverage",
    "SetRisk",
    "WorstFalseNegativeRate",
]


@final
@dataclass(frozen=True, slots=True)
class Miscoverage:
    """The share of an image's labeled pixels whose class is missing from their set.

    In expectation, :class:`cpseg.SplitCalibrator` controls it without a grid.

    Examples:
        >>> from cpseg.risk import RiskCalibrator
        >>> control = RiskCalibrator(Miscoverage(), grid=torch.tensor([0.25, 0.75]))
        >>> logits, labels = torch.tensor([[2.0, 0.0]] * 30), torch.tensor([0] * 29 + [1])
        >>> control.update(logits, labels).compute(alpha=0.2, delta=0.1).thresholds.item() < 0.26
        True
    """

    keeps = False
    monotone = True
    starts = 1
    rule = None

    @property
    def axes(self) -> tuple[str, ...]:
        """One threshold for all."""
        return ()

    def tally(self, batch: Batch) -> Tensor:
        """Pixels by the first threshold that covers them. int64 ``(B, K + 1)``."""
        return by_class(batch, 1)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Missed shares."""
        del alpha
        return missed_shares(tallies[:, None])

    def event(self, alpha: float) -> str:
        """What is bounded."""
        return (
            "The expected share of a new image's labeled pixels whose class is missing from "
            f"their set is at most {alpha:g}"
        )


@final
@dataclass(frozen=True, slots=True)
class FalseNegativeRate:
    """For each class, the share of its pixels whose set misses it, in images that contain it.

    Images without the class do not count: the risk is conditional on its presence.

    Attributes:
        num_classes: Number of classes, C.
        classes: Classes to control; None for all. The others stay in every set.
    """

    num_classes: int
    classes: tuple[int, ...] | None = None

    keeps = False
    monotone = True
    starts = 1
    rule = None

    @property
    def axes(self) -> tuple[str, ...]:
        """One threshold per class."""
        return ("class",)

    def __post_init__(self) -> None:
        check_classes(self.num_classes, self.classes)

    def tally(self, batch: Batch) -> Tensor:
        """Pixels by class and first threshold. int64 ``(B, C * (K + 1))``."""
        return by_class(batch, self.num_classes)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Missed shares per class."""
        del alpha
        return _missed_of(tallies, self.num_classes, self.classes)

    def event(self, alpha: float) -> str:
        """What is bounded."""
        return (
            f"For {_named(self.classes)}, in new images that contain it, the expected share of its "
            f"labeled pixels whose set misses it is at most {alpha:g}"
        )


@final
@dataclass(frozen=True, slots=True)
class DilutedFalseNegativeRate:
    """As :class:`FalseNegativeRate`, but an image without the class counts as one without misses.

    Smaller by the share of images that contain the class, and so easier to control: a class in
    one image of ten can lose all its pixels at alpha = 0.1.

    Attributes:
        num_classes: Number of classes, C.
        classes: Classes to control; None for all. The others stay in every set.
    """

    num_classes: int
    classes: tuple[int, ...] | None = None

    keeps = False
    monotone = True
    starts = 1
    rule = None

    @property
    def axes(self) -> tuple[str, ...]:
        """One threshold per class."""
        return ("class",)

    def __post_init__(self) -> None:
        check_classes(self.num_classes, self.classes)

    def tally(self, batch: Batch) -> Tensor:
        """Pixels by class and first threshold. int64 ``(B, C * (K + 1))``."""
        return by_class(batch, self.num_classes)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Missed shares per class, 0 where there is none."""
        del alpha
        missed = _missed_of(tallies, self.num_classes, self.classes)
        chosen = _chosen(self.num_classes, self.classes)
        return Losses(missed.values, chosen.expand_as(missed.counted), missed.pixels)

    def event(self, alpha: float) -> str:
        """What is bounded."""
        return (
            f"For {_named(self.classes)}, over all new images, the expected share of its labeled "
            f"pixels whose set misses it, 0 in images without it, is at most {alpha:g}"
        )


@final
@dataclass(frozen=True, slots=True)
class WorstFalseNegativeRate:
    """The largest false negative rate among the classes an image contains: all at once.

    Attributes:
        num_classes: Number of classes, C.
    """

    num_classes: int

    keeps = False
    monotone = True
    starts = 1
    rule = None

    @property
    def axes(self) -> tuple[str, ...]:
        """One threshold for all."""
        return ()

    def __post_init__(self) -> None:
        check_classes(self.num_classes, None)

    def tally(self, batch: Batch) -> Tensor:
        """Pixels by class and first threshold. int64 ``(B, C * (K + 1))``."""
        return by_class(batch, self.num_classes)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """The largest missed share of the classes present."""
        del alpha
        missed = _missed_of(tallies, self.num_classes, None)
        worst = missed.values.amax(1, keepdim=True)
        return Losses(
            worst, missed.counted.any(1, keepdim=True), missed.pixels.sum(1, keepdim=True)
        )

    def event(self, alpha: float) -> str:
        """What is bounded."""
        return (
            "The expected share of labeled pixels whose set misses their class, of the class of "
            f"a new image for which it is largest, is at most {alpha:g}"
        )


@final
@dataclass(frozen=True, slots=True)
class CoverageShare:
    """1 if less than a share tau of an image's labeled pixels is covered, else 0.

    Attributes:
        tau: Share of the pixels, in (0, 1), read as the decimal it prints as.
    """

    tau: float

    keeps = False
    monotone = True
    starts = 1
    rule = None

    @property
    def axes(self) -> tuple[str, ...]:
        """One threshold for all."""
        return ()

    def __post_init__(self) -> None:
        _checks.check_alpha(self.tau, "tau")

    def tally(self, batch: Batch) -> Tensor:
        """Pixels by the first threshold that covers them. int64 ``(B, K + 1)``."""
        return by_class(batch, 1)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Which images have too little covered."""
        del alpha
        share = level(self.tau)
        covered, pixels = tallies[:, None, :-1].cumsum(-1), tallies.sum(1, keepdim=True)
        short = covered * share.denominator < pixels[..., None] * share.numerator
        return Losses(short.double(), pixels > 0, pixels)

    def event(self, alpha: float) -> str:
        """What is bounded."""
        return (
            f"At least a share {self.tau:g} of a new image's labeled pixels have their class in "
            f"their set, but for a share {alpha:g} of images at most"
        )


@final
@dataclass(frozen=True, slots=True)
class InstanceRecall:
    """The share of an image's objects that are not found; images without objects do not count.

    An object is found when its class is in the sets of a share ``tau`` of its labeled pixels.
    Objects are what ``update`` is given as ``instances``, or else regions of equal labels. An
    object cut by tiles counts once per tile.

    Attributes:
        tau: Share of an object's pixels, in (0, 1), read as the decimal it prints as.
    """

    tau: float = 0.5

    keeps = False
    monotone = True
    starts = 1
    rule = None

    @property
    def axes(self) -> tuple[str, ...]:
        """One threshold for all."""
        return ()

    def __post_init__(self) -> None:
        _checks.check_alpha(self.tau, "tau")

    def tally(self, batch: Batch) -> Tensor:
        """Objects by the first threshold that finds them, and pixels. int64 ``(B, K + 2)``."""
        count, steps = len(batch.labels), len(batch.grid) + 1
        objects = batch.instances
        if objects is None:
            known = torch.where(batch.valid, batch.labels, -1)
            flat = known if known.ndim > 1 else known[:, None]
            objects = connected_components(flat, ignore_index=-1).view(known.shape) + 1
        entry = torch.arange(count, device=objects.device).view(-1, *[1] * (objects.ndim - 1))
        inside = batch.valid & (objects > 0)
        owner = entry.expand_as(objects)[inside]
        first = first_covering(batch)[inside]
        names, which = torch.unique(
            torch.stack((owner, objects[inside])), dim=1, return_inverse=True
        )
        # The pixels of each object in the order in which rising thresholds cover them.
        ordered = (which * steps + first).sort().values
        pixels = torch.bincount(which, minlength=names.shape[1])
        share = level(self.tau)
        needed = -(-pixels * share.numerator // share.denominator)
        last = ordered[pixels.cumsum(0) - pixels + needed - 1] % steps
        found = torch.zeros(count * steps, dtype=torch.int64, device=objects.device)
        found.index_add_(0, names[0] * steps + last, torch.ones_like(last))
        labeled = flattened(batch.valid).sum(1, keepdim=True)
        return torch.cat((found.view(count, steps), labeled), 1)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Shares of objects not found."""
        del alpha
        missed = missed_shares(tallies[:, None, :-1])
        return Losses(missed.values, missed.counted, tallies[:, -1:])

    def event(self, alpha: float) -> str:
        """What is bounded."""
        return (
            "In new images with objects, the expected share of objects with less than a share "
            f"{self.tau:g} of their labeled pixels covered is at most {alpha:g}"
        )


@final
@dataclass(frozen=True, eq=False, slots=True)
class SetRisk:
    """A loss of your own, of sets and labels.

    Attributes:
        function: Gives each image's loss in [0, 1], ``(B,)``, from sets, bool ``(B, C, *S)``, and
            labels, ``(B, *S)``. It is called once per threshold of the grid. A unit's loss is the
            mean of its tiles'.
        name: What the guarantee calls its expectation.
        monotone: Whether no image's loss rises with the threshold; checked on the data.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    name: str
    monotone: bool = False

    keeps = False
    starts = 1
    rule = None

    @property
    def axes(self) -> tuple[str, ...]:
        """One threshold for all."""
        return ()

    def tally(self, batch: Batch) -> Tensor:
        """Losses in units of ``1 / UNIT_MASS``, tiles and pixels. int64 ``(B, K + 2)``."""
        scores = batch.score(batch.logits)
        labels = torch.where(batch.valid, batch.labels, batch.ignore_index)
        values = [self.function(~(scores > limit), labels) for limit in batch.grid]
        return tally_of_function(self.name, values, batch)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Means over a unit's tiles."""
        del alpha
        return losses_of_function(tallies)

    def event(self, alpha: float) -> str:
        """What is bounded."""
        return f"The expected {self.name} of a new image's sets is at most {alpha:g}"


def _missed_of(tallies: Tensor, num_classes: int, classes: tuple[int, ...] | None) -> Losses:
    """Missed shares per class, in units that contain it; no unit counts for the other classes."""
    missed = missed_shares(tallies.view(len(tallies), num_classes, -1))
    chosen = _chosen(num_classes, classes)
    return Losses(missed.values, missed.counted & chosen, missed.pixels * chosen)


def _chosen(num_classes: int, classes: tuple[int, ...] | None) -> Tensor:
    chosen = torch.ones(num_classes, dtype=torch.bool)
    if classes is not None:
        chosen = torch.zeros_like(chosen)
        chosen[list(classes)] = True
    return chosen


def _named(classes: tuple[int, ...] | None) -> str:
    if classes is None:
        return "each class"
    return ("class " if len(classes) == 1 else "each of the classes ") + ", ".join(
        map(str, classes)
    )
