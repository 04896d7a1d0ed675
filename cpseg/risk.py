"""Controlled risks beyond miscoverage: recall, objects, and errors among kept labels.

A *risk* is a number in [0, 1] per image that depends on the threshold. Every image leaves one row
of counts, for a grid of thresholds, and :meth:`RiskCalibrator.compute` looks for the best
threshold of the grid whose expected risk is at most alpha: in expectation over the calibration
images too (conformal risk control; Angelopoulos et al., 2024), or with probability ``1 - delta``
over them (learn then test; Angelopoulos et al., 2021; for a monotone risk this is the
upper-confidence-bound rule of Bates et al., 2021). A threshold is chosen among those tested, and
used as it was tested.

Risks of sets fall as the threshold rises, and the tightest certified threshold is taken. Risks of
kept labels are safest where nothing is kept, and the loosest is taken.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, log
from typing import Any, Protocol, Self, cast, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.accumulate import upward
from cpseg.bounds import PValue, betting, fixed_sequence, least_units
from cpseg.calibration import Calibration, Control, describe_score, score_from_description
from cpseg.errors import InputError
from cpseg.filters import Argmax, AtMost, BackgroundPriority, Singleton, Top, proposals, rule_of
from cpseg.morphology import connected_components
from cpseg.protocols import Score
from cpseg.quantile import MAX_UNITS, UNIT_MASS, budget, level
from cpseg.scores import LAC

__all__ = [
    "Batch",
    "CoverageShare",
    "DilutedFalseNegativeRate",
    "FalseNegativeRate",
    "FalseShare",
    "InstanceRecall",
    "KeptError",
    "KeptRisk",
    "Losses",
    "Miscoverage",
    "Risk",
    "RiskCalibrator",
    "Rule",
    "SetRisk",
    "Start",
    "WorstFalseNegativeRate",
    "threshold_grid",
]

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
        pixels: Labelled pixels behind it. int64 ``(N, R)``.
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


# --- risks of sets -------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Miscoverage:
    """The share of an image's labelled pixels whose class is missing from their set.

    In expectation, :class:`cpseg.SplitCalibrator` controls it without a grid.

    Examples:
        >>> control = RiskCalibrator(Miscoverage(), grid=torch.tensor([0.25, 0.75]))
        >>> logits, labels = torch.tensor([[2.0, 0.0]] * 30), torch.tensor([0] * 29 + [1])
        >>> control.update(logits, labels).compute(alpha=0.2, delta=0.1).thresholds.item() < 0.26
        True
    """

    axes = ()
    keeps = False
    monotone = True
    starts = 1
    rule = None

    def tally(self, batch: Batch) -> Tensor:
        """Pixels by the first threshold that covers them. int64 ``(B, K + 1)``."""
        return _by_threshold(batch, torch.zeros_like(batch.labels), 1).flatten(1)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Missed shares."""
        del alpha
        return _missed(tallies[:, None])

    def event(self, alpha: float) -> str:
        """What is bounded."""
        return (
            "The expected share of a new image's labelled pixels whose class is missing from "
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

    axes = ("class",)
    keeps = False
    monotone = True
    starts = 1
    rule = None

    def __post_init__(self) -> None:
        _check_classes(self.num_classes, self.classes)

    def tally(self, batch: Batch) -> Tensor:
        """Pixels by class and first threshold. int64 ``(B, C * (K + 1))``."""
        return _flat(_by_threshold(batch, batch.labels, self.num_classes))

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Missed shares per class."""
        del alpha
        missed = _missed(tallies.view(len(tallies), self.num_classes, -1))
        chosen = _chosen(self.num_classes, self.classes)
        return Losses(missed.values, missed.counted & chosen, missed.pixels * chosen)

    def event(self, alpha: float) -> str:
        """What is bounded."""
        return (
            f"For {_named(self.classes)}, in new images that contain it, the expected share of its "
            f"labelled pixels whose set misses it is at most {alpha:g}"
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

    axes = ("class",)
    keeps = False
    monotone = True
    starts = 1
    rule = None

    def __post_init__(self) -> None:
        _check_classes(self.num_classes, self.classes)

    def tally(self, batch: Batch) -> Tensor:
        """Pixels by class and first threshold. int64 ``(B, C * (K + 1))``."""
        return _flat(_by_threshold(batch, batch.labels, self.num_classes))

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Missed shares per class, 0 where there is none."""
        del alpha
        missed = _missed(tallies.view(len(tallies), self.num_classes, -1))
        chosen = _chosen(self.num_classes, self.classes)
        return Losses(missed.values, chosen.expand_as(missed.counted), missed.pixels * chosen)

    def event(self, alpha: float) -> str:
        """What is bounded."""
        return (
            f"For {_named(self.classes)}, over all new images, the expected share of its labelled "
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

    axes = ()
    keeps = False
    monotone = True
    starts = 1
    rule = None

    def __post_init__(self) -> None:
        _check_classes(self.num_classes, None)

    def tally(self, batch: Batch) -> Tensor:
        """Pixels by class and first threshold. int64 ``(B, C * (K + 1))``."""
        return _flat(_by_threshold(batch, batch.labels, self.num_classes))

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """The largest missed share of the classes present."""
        del alpha
        missed = _missed(tallies.view(len(tallies), self.num_classes, -1))
        worst = missed.values.amax(1, keepdim=True)
        return Losses(
            worst, missed.counted.any(1, keepdim=True), missed.pixels.sum(1, keepdim=True)
        )

    def event(self, alpha: float) -> str:
        """What is bounded."""
        return (
            "The expected share of labelled pixels whose set misses their class, of the class of "
            f"a new image for which it is largest, is at most {alpha:g}"
        )


@final
@dataclass(frozen=True, slots=True)
class CoverageShare:
    """1 if less than a share tau of an image's labelled pixels is covered, else 0.

    Attributes:
        tau: Share of the pixels, in (0, 1), read as the decimal it prints as.
    """

    tau: float

    axes = ()
    keeps = False
    monotone = True
    starts = 1
    rule = None

    def __post_init__(self) -> None:
        _checks.check_alpha(self.tau, "tau")

    def tally(self, batch: Batch) -> Tensor:
        """Pixels by the first threshold that covers them. int64 ``(B, K + 1)``."""
        return _by_threshold(batch, torch.zeros_like(batch.labels), 1).flatten(1)

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
            f"At least a share {self.tau:g} of a new image's labelled pixels have their class in "
            f"their set, but for a share {alpha:g} of images at most"
        )


@final
@dataclass(frozen=True, slots=True)
class InstanceRecall:
    """The share of an image's objects that are not found; images without objects do not count.

    An object is found when its class is in the sets of a share ``tau`` of its labelled pixels.
    Objects are what ``update`` is given as ``instances``, or else regions of equal labels. An
    object cut by tiles counts once per tile.

    Attributes:
        tau: Share of an object's pixels, in (0, 1), read as the decimal it prints as.
    """

    tau: float = 0.5

    axes = ()
    keeps = False
    monotone = True
    starts = 1
    rule = None

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
        first = _first_covering(batch)[inside]
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
        labelled = _flat(batch.valid).sum(1, keepdim=True)
        return torch.cat((found.view(count, steps), labelled), 1)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Shares of objects not found."""
        del alpha
        missed = _missed(tallies[:, None, :-1])
        return Losses(missed.values, missed.counted, tallies[:, -1:])

    def event(self, alpha: float) -> str:
        """What is bounded."""
        return (
            "In new images with objects, the expected share of objects with less than a share "
            f"{self.tau:g} of their labelled pixels covered is at most {alpha:g}"
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

    axes = ()
    keeps = False
    starts = 1
    rule = None

    def tally(self, batch: Batch) -> Tensor:
        """Losses in units of ``1 / UNIT_MASS``, tiles and pixels. int64 ``(B, K + 2)``."""
        scores = batch.score(batch.logits)
        labels = torch.where(batch.valid, batch.labels, batch.ignore_index)
        values = [self.function(~(scores > limit), labels) for limit in batch.grid]
        return _tally_of_function(self.name, values, batch)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Means over a unit's tiles."""
        del alpha
        return _losses_of_function(tallies)

    def event(self, alpha: float) -> str:
        """What is bounded."""
        return f"The expected {self.name} of a new image's sets is at most {alpha:g}"


# --- risks of kept labels ------------------------------------------------------------------------


@final
@dataclass(frozen=True, eq=False, slots=True)
class KeptError:
    """How often a kept label is wrong: ``E[wrong] / E[kept]``, shares of an image's pixels.

    Tested as "the mean of ``wrong - alpha * kept`` is negative", which is not so where nothing is
    kept. So tests do not begin at the strictest threshold but at a tuned :class:`Start`, or at
    several that share delta.

    Attributes:
        rule: Which filter: ``Argmax``, or ``partial(BackgroundPriority, background=0)``. The
            calibration will serve no other.
        num_classes: Number of classes, C.
        per_class: One threshold per class, with shares of the pixels where that class is the most
            likely one. The rule must be :class:`cpseg.filters.Top`.
    """

    rule: Rule
    num_classes: int
    per_class: bool = False

    keeps = True
    monotone = False
    starts = 4

    def __post_init__(self) -> None:
        _check_classes(self.num_classes, None)
        if self.per_class and not isinstance(_probe(self.rule, self.num_classes), Top):
            raise InputError(
                "rule must be Top with per_class=True: with other rules a class's labels depend "
                f"on the thresholds of others; got {_rule_name(self.rule, self.num_classes)}"
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """One threshold, or one per class."""
        return ("class",) if self.per_class else ()

    def tally(self, batch: Batch) -> Tensor:
        """Wrong and kept pixels per row and threshold, and candidates. int64 ``(B, T)``."""
        rows = self.num_classes if self.per_class else 1
        return _tally_kept(batch, self.rule, self.num_classes, rows)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """``wrong - alpha * kept + alpha``: below alpha on average if the claim is true."""
        wrong, kept, pixels = _kept(tallies, self.num_classes if self.per_class else 1)
        candidates = pixels.clamp(min=1)[..., None].double()
        values = wrong / candidates - alpha * (kept / candidates) + alpha
        return Losses(values.clamp(0, 1), pixels > 0, pixels)

    def event(self, alpha: float) -> str:
        """What is bounded."""
        rule = _rule_name(self.rule, self.num_classes)
        if self.per_class:
            return (
                f"For each class, E[wrong] / E[kept] is at most {alpha:g}, with the shares of the "
                "labelled pixels of a new image where the class is the most likely one that "
                f"{rule} labels wrongly, and at all"
            )
        return (
            f"E[wrong] / E[kept] is at most {alpha:g}, with the shares of a new image's labelled "
            f"pixels that {rule} labels wrongly, and at all"
        )


@final
@dataclass(frozen=True, eq=False, slots=True)
class FalseShare:
    """The share of an image's kept labels that are wrong, 0 where none is kept.

    Its mean weighs images equally, whether they keep much or little, and images that keep nothing
    help. :class:`KeptError` is what a student trained on the labels sees.

    Attributes:
        rule: Which filter; the calibration will serve no other.
        num_classes: Number of classes, C.
    """

    rule: Rule
    num_classes: int

    axes = ()
    keeps = True
    monotone = False
    starts = 1

    def __post_init__(self) -> None:
        _check_classes(self.num_classes, None)
        _probe(self.rule, self.num_classes)

    def tally(self, batch: Batch) -> Tensor:
        """Wrong and kept pixels per threshold, and labelled ones. int64 ``(B, 2 * K + 1)``."""
        return _tally_kept(batch, self.rule, self.num_classes, 1)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Wrong shares of what is kept."""
        del alpha
        wrong, kept, pixels = _kept(tallies, 1)
        return Losses(wrong / kept.clamp(min=1), pixels > 0, pixels)

    def event(self, alpha: float) -> str:
        """What is bounded."""
        rule = _rule_name(self.rule, self.num_classes)
        return (
            f"The expected share of the labels {rule} keeps in a new image that are wrong, 0 where "
            f"it keeps none, is at most {alpha:g}"
        )


@final
@dataclass(frozen=True, eq=False, slots=True)
class KeptRisk:
    """A loss of your own, of a filter's labels and the true ones.

    Attributes:
        function: Gives each image's loss in [0, 1], ``(B,)``, from the filter's labels and the
            true ones, both ``(B, *S)`` with ``ignore_index`` where there is none. It is called
            once per threshold of the grid. A unit's loss is the mean of its tiles'.
        rule: Which filter; the calibration will serve no other.
        num_classes: Number of classes, C.
        name: What the guarantee calls its expectation.
        monotone: Whether no image's loss falls as the threshold rises; checked on the data.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    rule: Rule
    num_classes: int
    name: str
    monotone: bool = False

    axes = ()
    keeps = True
    starts = 1

    def __post_init__(self) -> None:
        _check_classes(self.num_classes, None)
        _probe(self.rule, self.num_classes)

    def tally(self, batch: Batch) -> Tensor:
        """Losses in units of ``1 / UNIT_MASS``, tiles and pixels. int64 ``(B, K + 2)``."""
        labels = torch.where(batch.valid, batch.labels, batch.ignore_index)
        values = [self.function(kept, labels) for kept in _run(batch, self.rule, ())]
        return _tally_of_function(self.name, values, batch)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Means over a unit's tiles."""
        del alpha
        return _losses_of_function(tallies)

    def event(self, alpha: float) -> str:
        """What is bounded."""
        rule = _rule_name(self.rule, self.num_classes)
        return f"The expected {self.name} of {rule} in a new image is at most {alpha:g}"


# --- starts --------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, eq=False, slots=True)
class Start:
    """Where tests begin. Fitted on a split of its own, or set by hand without any data.

    Attributes:
        thresholds: One, or one per class. float32 ``(1,)`` or ``(C,)``.
        fitted_on: Fingerprint of the tuning data; None if on no data.
    """

    thresholds: Tensor
    fitted_on: str | None = None

    @classmethod
    def fit(cls, tuning: "RiskCalibrator", alpha: float) -> Self:
        """The threshold whose risk lies below alpha by the most standard errors.

        Args:
            tuning: A calibrator that has seen the tuning split only.
            alpha: The level at which it will be used.

        Returns:
            The start.

        Raises:
            InputError: If the tuning split is empty or holds bad values.
        """
        _checks.check_alpha(alpha)
        table, grid = tuning.table(), tuning.grid
        if grid is None:
            raise InputError("tuning must have seen data; got an empty calibrator")
        losses = tuning.risk.losses(table, alpha)
        chosen: list[int] = []
        for row in range(losses.values.shape[1]):
            values = losses.values[losses.counted[:, row], row]
            if len(values) == 0:
                chosen.append(0)
                continue
            # As if one more image had the largest variance that the mean alpha allows.
            spread = values.var(0, correction=0) + alpha * (1 - alpha) / len(values)
            chosen.append(int(((alpha - values.mean(0)) / spread.sqrt()).argmax()))
        return cls(grid.cpu()[chosen], tuning.fingerprint)


# --- the calibrator ------------------------------------------------------------------------------


@final
class RiskCalibrator:
    """Held-out batches to a calibration that controls a risk.

    It keeps one row of counts per image, some hundred integers per threshold to find, so that any
    alpha, delta and bound can be asked for. Units stay open: tiles of a unit may come at any time.

    Guarantee:
        With ``delta=None``: the risk, expected over the calibration images and the new one, is at
        most alpha, if they are exchangeable. With ``delta``: with probability at least
        ``1 - delta`` over the calibration images, the risk expected over a new one is at most
        alpha, if all are independent draws from one distribution. ``Calibration.guarantee`` says
        which risk, of what.

    Args:
        risk: What to control.
        score: The nonconformity score.
        grid: Increasing thresholds to try, float32 ``(K,)``; by default :func:`threshold_grid` of
            the score's range. Choose it without the calibration labels.
        start: Where tests begin, fitted on a split of its own; None: at the safe end, or for
            :class:`KeptError` at four places that share delta.
        seed: Of the order in which betting sees the units. It does not depend on how they came.
        ignore_index: Label of pixels that do not count; no class.
        source: What the logits come from, if calibration must be tied to it.

    Examples:
        >>> control = RiskCalibrator(KeptError(Argmax, num_classes=2))
        >>> logits, labels = torch.tensor([[9.0, 0.0], [0.0, 9.0]] * 60), torch.tensor([0, 1] * 60)
        >>> calibration = control.update(logits, labels).compute(alpha=0.1, delta=0.1)
        >>> Argmax(calibration)(torch.tensor([[8.0, 0.0], [float("nan"), 0.0]]))
        tensor([  0, 255], dtype=torch.uint8)
    """

    def __init__(
        self,
        risk: Risk,
        score: Score = LAC(),
        *,
        grid: Tensor | None = None,
        start: Start | None = None,
        seed: int = 0,
        ignore_index: int = 255,
        source: str | None = None,
    ) -> None:
        _checks.check_integer("seed", seed)
        classes = cast("int | None", getattr(risk, "num_classes", None))
        _checks.check_ignore_index(ignore_index, classes)
        if grid is not None:
            _check_grid(grid)
        elif score.range(classes or 2) is None:
            raise InputError(f"grid must be given for a score without a range; got {score!r}")
        self.risk: Risk = risk
        self.score: Score = score
        self.start: Start | None = start
        self.seed: int = seed
        self.ignore_index: int = ignore_index
        self.source: str | None = source
        self._declared_grid, self._declared_classes = grid, classes
        self.grid: Tensor | None = grid
        self.num_classes: int | None = classes
        self._rows: list[Tensor] = []
        self._units: dict[int, Tensor] = {}
        self._anonymous = 0
        self._faults = torch.zeros(2, dtype=torch.int64)
        self._max_share = torch.zeros(classes or 0, dtype=torch.float64)

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        unit_ids: Sequence[int] | Tensor | None = None,
        *,
        instances: Tensor | None = None,
    ) -> Self:
        """See a batch.

        Args:
            logits: Shape ``(B, C, *S)``.
            labels: Integers, ``ignore_index`` where unknown. Shape ``(B, *S)``.
            unit_ids: The unit of each batch entry, where one unit comes in several: integers, on
                the CPU if a tensor. Shape ``(B,)``.
            instances: For :class:`InstanceRecall`: the object at each pixel, 0 for none.
                Integers, shape ``(B, *S)``.

        Returns:
            The calibrator itself.

        Raises:
            InputError: If shapes, dtypes or devices do not fit, or a loss of your own is not in
                [0, 1].
        """
        _checks.check_logits(logits, self.num_classes)
        _checks.check_labels(labels, logits)
        if instances is not None:
            beside = f"logits {_checks.describe(logits.shape)}"
            _checks.check_map("instances", instances, labels.shape, beside)
            _checks.check_device("instances", instances, logits, "logits")
        ids = None if unit_ids is None else _ids(unit_ids, len(labels))
        units = len(self._units.keys() | (ids or ())) + self._anonymous
        if units + (len(labels) if ids is None else 0) > MAX_UNITS:
            raise InputError(f"at most {MAX_UNITS} units can be held; got more")
        classes = logits.shape[1]
        grid = self._prepare(classes, logits.device)
        with torch.no_grad():
            wide = labels.long()
            labelled = wide != self.ignore_index
            known = labelled & (wide >= 0) & (wide < classes)
            usable = logits.amax(1).isfinite() & ~logits.isnan().any(1)
            valid = known & usable
            faults = torch.stack(((labelled & ~known).sum(), (known & ~usable).sum()))
            self._faults = self._faults.to(faults.device) + faults
            objects = None if instances is None else instances.long()
            batch = Batch(logits, wide * valid, valid, objects, grid, self.score, self.ignore_index)
            tallies = self.risk.tally(batch)
            self._note_shares(batch, classes)
        if ids is None:
            self._rows.append(tallies)
            self._anonymous += len(labels)
        else:
            for unit, row in zip(ids, tallies, strict=True):
                self._units[unit] = row + self._units[unit] if unit in self._units else row.clone()
        return self

    def _prepare(self, classes: int, device: torch.device) -> Tensor:
        if self.num_classes is None:
            self.num_classes = classes
            self._max_share = torch.zeros(classes, dtype=torch.float64)
        if self.grid is None:
            low, high = cast("tuple[float, float]", self.score.range(classes))
            self.grid = threshold_grid(low, high)
        return self.grid.to(device)

    def _note_shares(self, batch: Batch, classes: int) -> None:
        if batch.labels.numel() == 0:
            return
        pixels = _count(_flat(batch.labels), _flat(batch.valid), classes).double()
        share = pixels / pixels.sum(1, keepdim=True).clamp(min=1)
        self._max_share = self._max_share.to(share.device).maximum(share.amax(0))

    # --- the accumulator's algebra ---

    def merge(self, other: Self) -> Self:
        """Add what another calibrator has seen, which stays as it is.

        Args:
            other: Made with the same arguments.

        Returns:
            The calibrator itself.

        Raises:
            InputError: If the two were made with different arguments or saw other classes.
        """
        mine, theirs = self._config(), other._config()
        for name in mine:
            if mine[name] != theirs[name]:
                raise InputError(
                    f"other must have {name} = {mine[name]!r} to be merged; got {theirs[name]!r}"
                )
        if other.num_classes is not None and self.num_classes not in (None, other.num_classes):
            raise InputError(
                f"other must have seen {self.num_classes} classes to be merged; "
                f"got {other.num_classes}"
            )
        return self._absorb(other.state_dict())

    def reset(self) -> Self:
        """Forget everything seen; returns the calibrator itself."""
        self.grid, self.num_classes = self._declared_grid, self._declared_classes
        self._rows, self._units, self._anonymous = [], {}, 0
        self._faults = torch.zeros(2, dtype=torch.int64)
        self._max_share = torch.zeros(self._declared_classes or 0, dtype=torch.float64)
        return self

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors, numbers and strings: ``torch.save`` it, load ``weights_only``.

        It is the same for any order of the same updates and merges.
        """
        ids = sorted(self._units)
        return {
            "kind": type(self).__name__,
            "version": 1,
            "config": json.dumps(self._config()),
            "num_classes": self.num_classes,
            "ids": torch.tensor(ids, dtype=torch.int64),
            "units": _stack([self._units[unit][None] for unit in ids]),
            "anonymous": _in_order(_stack(self._rows)),
            "faults": self._faults.cpu(),
            "max_share": self._max_share.cpu(),
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, object], risk: Risk | None = None, score: Score | None = None
    ) -> Self:
        """The calibrator that gave this state.

        Args:
            state: What ``state_dict`` returned.
            risk: The risk, if it or its filter rule is of your own.
            score: The score, if it is one of your own.

        Returns:
            A new calibrator.

        Raises:
            InputError: If the state is another class's or version's, or risk or score is missing
                or another one.
        """
        if state.get("kind") != cls.__name__ or state.get("version") != 1:
            raise InputError(
                f"state must be version 1 of a {cls.__name__}; "
                f"got version {state.get('version')} of {state.get('kind')}"
            )
        config = json.loads(cast("str", state["config"]))
        start, grid = config["start"], config["grid"]
        made = cls(
            _risk_from_description(config["risk"], risk),
            score_from_description(config["score"], score),
            grid=None if grid is None else torch.tensor(grid, dtype=torch.float32),
            start=None if start is None else Start(torch.tensor(start[0]), start[1]),
            seed=config["seed"],
            ignore_index=config["ignore_index"],
            source=config["source"],
        )
        return made._absorb(state)

    def _absorb(self, state: Mapping[str, object]) -> Self:
        classes = cast("int | None", state["num_classes"])
        if classes is not None:
            self._prepare(classes, torch.device("cpu"))
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        for unit, row in zip(tensors["ids"].tolist(), tensors["units"], strict=True):
            known = self._units.get(unit)
            self._units[unit] = row.clone() if known is None else known + row.to(known.device)
        if len(tensors["anonymous"]):
            self._rows.append(tensors["anonymous"].clone())
            self._anonymous += len(tensors["anonymous"])
        self._faults = self._faults + tensors["faults"].to(self._faults.device)
        share = tensors["max_share"]
        if len(share):
            self._max_share = self._max_share.to(share.device).maximum(share)
        return self

    def _config(self) -> dict[str, Any]:
        start = self.start
        grid = self._declared_grid
        return {
            "risk": _describe_risk(self.risk),
            "score": describe_score(self.score),
            "grid": None if grid is None else grid.tolist(),
            "start": None if start is None else [start.thresholds.tolist(), start.fitted_on],
            "seed": self.seed,
            "ignore_index": self.ignore_index,
            "source": self.source,
        }

    def table(self) -> Tensor:
        """One row of counts per unit, in an order that does not depend on how units came.

        Returns:
            int64 ``(N, T)``, on the CPU.

        Raises:
            InputError: If bad values were seen, with their counts.
        """
        counts = self._faults.tolist()
        if any(counts):
            faults = ("whose label is neither a class nor ignore_index", "with unusable logits")
            told = [f"{n} pixels {what}" for n, what in zip(counts, faults, strict=True) if n]
            raise InputError(
                f"calibration data must be clean; got {', '.join(told)}. "
                "Fix the data and start from a new calibrator"
            )
        return _in_order(_stack([*self._rows, *(row[None] for row in self._units.values())]))

    @property
    def fingerprint(self) -> str:
        """Identifies the data seen, as fitted objects remember theirs."""
        return hashlib.sha256(self.table().numpy().tobytes()).hexdigest()

    # --- the result ---

    def compute(
        self,
        alpha: float,
        delta: float | None = None,
        *,
        bound: PValue = betting,
        simultaneous: bool = False,
        monotonize: bool = False,
    ) -> Calibration:
        """The best threshold whose risk is at most alpha, if any can be found.

        Args:
            alpha: Largest expected risk.
            delta: Probability of a calibration that exceeds it; None: in expectation.
            bound: The test behind delta, one of :mod:`cpseg.bounds`.
            simultaneous: With one threshold per class: whether delta is for all classes at once
                (each gets ``delta / C``) or for each by itself.
            monotonize: In expectation: replace each loss by the largest of it and those at safer
                thresholds, where the risk is not monotone.

        Returns:
            The frozen calibration. Where nothing can be certified the threshold is the safe end
            of all: ``-inf`` keeps no label, ``+inf`` puts every class into every set.

        Raises:
            InputError: If an argument does not fit, bad values were seen, a risk declared
                monotone is not, or one is asked for in expectation that cannot be.
        """
        _checks.check_alpha(alpha)
        if delta is not None:
            _checks.check_alpha(delta, "delta")
        elif simultaneous:
            raise InputError("simultaneous must be False without delta: expectations hold for each")
        self._check_start()
        table = self.table()
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(self.seed))
        losses = self._losses(table[order], alpha)
        rows, steps = losses.values.shape[1:]
        grid = torch.zeros(1) if self.grid is None else self.grid.cpu()
        safe = -torch.inf if self.risk.keeps else torch.inf
        thresholds = torch.full((rows,), safe)
        notes: list[tuple[int, str]] = []
        for row in range(rows):
            # Columns from the safe end on.
            values = losses.values[losses.counted[:, row], row]
            values = values if self.risk.keeps else values.flip(1)
            test: float | None = None
            if delta is None:
                passed = self._in_expectation(values, alpha, monotonize=monotonize)
                least = ceil(1 / level(alpha)) - 1
            else:
                share = delta / (rows if simultaneous else 1)
                starts = self._starts(row, grid) if len(values) else [0]
                test = share / len(starts)
                passed = fixed_sequence(bound(values, alpha, test), share, starts)
                least = least_units(alpha, test)
            if bool(passed.any()):
                last = int(passed.nonzero().max())
                thresholds[row] = grid[last if self.risk.keeps else steps - 1 - last]
            elif rows == 1 or len(values) or self._wanted(row):
                notes.append((row, _how_many(values, alpha, least, test)))
        if not self.risk.keeps and self.risk.monotone:
            # Another path to a score may lie this far off; for a monotone risk more is safer.
            slack = self.score.tolerance(self.num_classes or 1)
            thresholds = upward(thresholds.double() + slack)
        told = self._told(notes, each=delta is not None and not simultaneous)
        return self._frozen(thresholds, losses, alpha, delta, told)

    def _losses(self, table: Tensor, alpha: float) -> Losses:
        if self.grid is None or not len(table):
            rows = self.num_classes or 1 if self.risk.axes else 1
            return Losses(
                torch.zeros((0, rows, 1), dtype=torch.float64),
                torch.zeros((0, rows), dtype=torch.bool),
                torch.zeros((0, rows), dtype=torch.int64),
            )
        losses = self.risk.losses(table, alpha)
        outside = int((~((losses.values >= 0) & (losses.values <= 1))).sum())
        if outside:
            raise InputError(f"risk must lie in [0, 1]; got {outside} losses that do not")
        if self.risk.monotone:
            steps = losses.values.diff(dim=2)
            falls = steps < 0 if self.risk.keeps else steps > 0
            wrong = int((falls.any(2) & losses.counted).any(1).sum())
            if wrong:
                raise InputError(
                    f"risk must be monotone, as it is declared; got {wrong} units with a loss that "
                    "is larger at a safer threshold. Declare monotone=False"
                )
        return losses

    def _in_expectation(self, values: Tensor, alpha: float, *, monotonize: bool) -> Tensor:
        """Which thresholds, from the safe end on, pass conformal risk control. Bool ``(K,)``."""
        if not self.risk.monotone:
            if isinstance(self.risk, KeptError):
                raise InputError(
                    "delta must be given for KeptError: a ratio of expectations is controlled by "
                    "tests only. FalseShare has an expectation"
                )
            if not monotonize:
                raise InputError(
                    "risk must be monotone to be controlled in expectation; got one that is not. "
                    "Give delta, or monotonize=True"
                )
            values = values.cummax(1).values if values.numel() else values
        mass = (values * UNIT_MASS).ceil().long().sum(0)
        return (mass <= budget(alpha, len(values), UNIT_MASS)).cumprod(0).bool()

    def _starts(self, row: int, grid: Tensor) -> list[int]:
        """Positions of the starts, counted from the safe end."""
        steps = len(grid)
        if self.start is not None:
            position = int((grid <= self.start.thresholds[row]).sum()) - 1
            position = max(position, 0)
            return [position if self.risk.keeps else steps - 1 - position]
        if self.risk.starts == 1:
            return [0]
        parts = self.risk.starts + 1
        return sorted({steps * part // parts for part in range(1, parts)})

    def _check_start(self) -> None:
        if self.start is None:
            return
        rows = self.num_classes if self.risk.axes else 1
        if rows is not None and tuple(self.start.thresholds.shape) != (rows,):
            raise InputError(
                f"start must have thresholds of shape ({rows},); "
                f"got {_checks.describe(self.start.thresholds.shape)}"
            )
        if self.start.fitted_on is not None and self.start.fitted_on == self.fingerprint:
            raise InputError(
                "start must be fitted on a split of its own; got one fitted on this very data"
            )

    def _wanted(self, row: int) -> bool:
        classes = cast("tuple[int, ...] | None", getattr(self.risk, "classes", None))
        return classes is None or row in classes

    def _frozen(
        self,
        thresholds: Tensor,
        losses: Losses,
        alpha: float,
        delta: float | None,
        told: tuple[str, ...],
    ) -> Calibration:
        rule = self.risk.rule
        named = None if rule is None else _rule_name(rule, self.num_classes or 1)
        drawn = (
            "calibration and new images exchangeable"
            if delta is None
            else "calibration and new images independent draws from one distribution"
        )
        return Calibration(
            thresholds=thresholds,
            axes=self.risk.axes,
            alpha=alpha,
            score=self.score,
            unit="image",
            num_classes=self.num_classes,
            num_units=losses.counted.sum(0),
            num_pixels=losses.pixels.sum(0),
            ignore_index=self.ignore_index,
            fallback=None,
            fallback_groups=torch.zeros_like(thresholds, dtype=torch.bool),
            max_share=self._max_share.cpu().clone(),
            source=self.source,
            control=Control(
                risk=_describe_risk(self.risk)["name"],
                rule=named,
                delta=delta,
                event=self.risk.event(alpha),
                assumptions=(
                    f"{drawn} (an image stands for what unit_ids named)",
                    "alpha, delta, score, grid, seed, start chosen without the calibration labels",
                    "logits of the new image computed as those of the calibration images",
                ),
                notes=told,
            ),
        )

    def _told(self, notes: list[tuple[int, str]], *, each: bool) -> tuple[str, ...]:
        """What the guarantee adds: where nothing could be certified, and how classes share delta."""
        nothing = "no label is kept" if self.risk.keeps else "every set holds every such class"
        by_note: dict[str, list[str]] = {}
        for row, note in notes:
            by_note.setdefault(note, []).append(str(row))
        told = [
            f"{'Class ' + ', '.join(where) if self.risk.axes else 'Everywhere'}: {nothing}, as "
            f"no threshold could be certified. {note}"
            for note, where in by_note.items()
        ]
        if self.risk.axes:
            told.append(
                "Each class by itself: of many, some can exceed it."
                if each
                else "All classes at once."
            )
        return tuple(told)


def threshold_grid(low: float, high: float, points: int = 101) -> Tensor:
    """Thresholds to try: half of them evenly, half ever closer to the low end.

    Args:
        low: Least score.
        high: Largest finite score.
        points: How many, at least 3.

    Returns:
        Increasing, from ``low`` to ``high``. float32 ``(K,)``.

    Raises:
        InputError: If points is too small, or the range is empty.

    Examples:
        >>> threshold_grid(0.0, 1.0, 5)
        tensor([0.0000e+00, 9.5367e-07, 2.4414e-04, 6.2500e-02, 1.0000e+00])
    """
    _checks.check_integer("points", points, 3)
    if not low < high:
        raise InputError(f"low must be below high; got {low} and {high}")
    near = (points - 1) // 2
    small = torch.logspace(-20, -4, near + 1, base=2.0, dtype=torch.float64)[:-1]
    even = torch.linspace(1 / 16, 1, points - 1 - near, dtype=torch.float64)
    share = torch.cat((small.new_zeros(1), small, even))
    grid: Tensor = torch.unique((low + (high - low) * share).float())
    return grid


# --- counting ------------------------------------------------------------------------------------


def _first_covering(batch: Batch) -> Tensor:
    """Index of the first threshold that covers each pixel's label; K for none. ``(B, *S)``."""
    return _index(batch.grid, batch.score.of_labels(batch.logits, batch.labels))


def _index(grid: Tensor, scores: Tensor) -> Tensor:
    """Index of the first threshold not below each score; NaN is beyond the last."""
    return torch.searchsorted(grid.to(scores.dtype), scores.contiguous())


def _by_threshold(batch: Batch, row: Tensor, rows: int) -> Tensor:
    """Valid pixels by row and first covering threshold. int64 ``(B, rows, K + 1)``."""
    steps = len(batch.grid) + 1
    index = _flat(row * steps + _first_covering(batch))
    counts = _count(index, _flat(batch.valid), rows * steps)
    return counts.view(-1, rows, steps)


def _flat(x: Tensor) -> Tensor:
    """Spatial axes as one, also where there is none. ``(B, N)``."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def _count(index: Tensor, valid: Tensor, size: int) -> Tensor:
    """How often each of ``0 .. size - 1`` occurs in each row. int64 ``(B, size)``."""
    counts = torch.zeros((len(index), size), dtype=torch.int64, device=index.device)
    return counts.scatter_add_(1, index * valid, valid.long())


def _missed(counts: Tensor) -> Losses:
    """Shares not yet reached at each threshold, of counts by first threshold ``(N, R, K + 1)``."""
    pixels = counts.sum(-1)
    missed = pixels[..., None] - counts[..., :-1].cumsum(-1)
    return Losses(missed / pixels.clamp(min=1)[..., None].double(), pixels > 0, pixels)


def _tally_kept(batch: Batch, rule: Rule, num_classes: int, rows: int) -> Tensor:
    """Wrong and kept pixels by row and threshold, and each row's candidates. ``(B, T)``."""
    count, steps = len(batch.labels), len(batch.grid)
    top: Tensor | None = None
    spans: list[tuple[Tensor, Tensor, Tensor | None]] = []  # label, from, until
    mask_filter = _probe(rule, num_classes)
    follows = batch.score.follows_logits and num_classes > 1
    if isinstance(mask_filter, (Argmax, BackgroundPriority)) and follows and rows == 1:
        # As these filters do it: what is proposed first wins as soon as its score is low enough.

        proposed = proposals(mask_filter, batch.logits)
        until: Tensor | None = None
        for label in proposed:
            first = _index(batch.grid, batch.score.of_labels(batch.logits, label))
            spans.append((label, first, until))
            until = first if until is None else until.minimum(first)
    elif isinstance(mask_filter, Top):
        (top,) = proposals(mask_filter, batch.logits)
        scores = batch.score.of_labels(batch.logits, top)
        spans.append((top, _index(batch.grid, scores), None))
    row = torch.zeros_like(batch.labels) if rows == 1 or top is None else top
    candidates = _count(_flat(row), _flat(batch.valid), rows)
    shape = (count, 2, rows, steps + 1)
    changes = torch.zeros(shape, dtype=torch.int64, device=batch.labels.device)
    if not spans:
        labels = _run(batch, rule, ())
        per_step = torch.stack([_wrong_and_kept(batch, kept) for kept in labels], -1)
        counts = per_step.view(count, 2 * steps)
        return torch.cat((counts, candidates), 1)
    size = rows * (steps + 1)
    for label, first, until in spans:
        last = torch.full_like(first, steps) if until is None else until.maximum(first)
        for part, where in enumerate((batch.valid & (label != batch.labels), batch.valid)):
            for sign, index in ((1, first), (-1, last)):
                pixels = _count(_flat(row * (steps + 1) + index), _flat(where), size)
                changes[:, part] += sign * pixels.view(count, rows, steps + 1)
    counts = changes.cumsum(-1)[..., :-1].reshape(count, 2 * rows * steps)
    return torch.cat((counts, candidates), 1)


def _wrong_and_kept(batch: Batch, kept: Tensor) -> Tensor:
    """Of one threshold's labels. int64 ``(B, 2)``."""
    chosen = batch.valid & (kept != batch.ignore_index)
    wrong = chosen & (kept.long() != batch.labels)
    return torch.stack((_flat(wrong).sum(1), _flat(chosen).sum(1)), 1)


def _kept(tallies: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Wrong ``(N, R, K)``, kept ``(N, R, K)`` and candidates ``(N, R)``, from their tallies."""
    counts, candidates = tallies[:, :-rows], tallies[:, -rows:]
    wrong, kept = counts.view(len(tallies), 2, rows, -1).double().unbind(1)
    return wrong, kept, candidates


def _run(batch: Batch, rule: Rule, axes: tuple[str, ...]) -> list[Tensor]:
    """A rule's labels at each threshold, by running its filter."""
    classes = batch.logits.shape[1]
    return [
        rule(_trial(limit.view(1), axes, batch.score, classes, batch.ignore_index))(batch.logits)
        for limit in batch.grid
    ]


def _trial(
    thresholds: Tensor, axes: tuple[str, ...], score: Score, classes: int, ignore_index: int
) -> Calibration:
    """Thresholds as a calibration that promises nothing."""
    nothing = torch.zeros_like(thresholds, dtype=torch.int64)
    return Calibration(
        thresholds=thresholds,
        axes=axes,
        alpha=0.5,
        score=score,
        unit="image",
        num_classes=classes,
        num_units=nothing,
        num_pixels=nothing,
        ignore_index=ignore_index,
        fallback=None,
        fallback_groups=nothing.bool(),
        max_share=torch.ones(classes, dtype=torch.float64),
        source=None,
    )


def _probe(rule: Rule, num_classes: int) -> Callable[[Tensor], Tensor]:
    """The filter that a rule makes."""
    return rule(_trial(torch.zeros(1), (), LAC(), num_classes, -1))


def _rule_name(rule: Rule, num_classes: int) -> str:
    mask_filter = _probe(rule, num_classes)
    if isinstance(mask_filter, (Argmax, Top, BackgroundPriority, AtMost, Singleton)):
        if mask_filter.guard is not None and mask_filter.guard.action == "abstain":
            raise InputError('rule must not have a guard with action "abstain"')
        return rule_of(mask_filter)
    return f"{type(mask_filter).__module__}.{type(mask_filter).__qualname__}"


def _tally_of_function(name: str, values: list[Tensor], batch: Batch) -> Tensor:
    table = torch.stack(values, 1).double()
    if table.shape[0] != len(batch.labels) or table.ndim != 2:
        raise InputError(
            f"function of {name} must give shape ({len(batch.labels)},); "
            f"got {_checks.describe(values[0].shape)}"
        )
    outside = int((~((table >= 0) & (table <= 1))).sum())
    if outside:
        raise InputError(f"{name} must lie in [0, 1]; got {outside} losses that do not")
    pixels = _flat(batch.valid).sum(1, keepdim=True)
    mass = (table * UNIT_MASS).ceil().long()
    return torch.cat((mass, torch.ones_like(pixels), pixels), 1)


def _losses_of_function(tallies: Tensor) -> Losses:
    mass, tiles, pixels = tallies[:, None, :-2], tallies[:, None, -2:-1], tallies[:, -1:]
    values = mass.double() / (tiles.double() * UNIT_MASS)
    return Losses(values, torch.ones_like(pixels, dtype=torch.bool), pixels)


# --- helpers -------------------------------------------------------------------------------------


def _how_many(values: Tensor, alpha: float, least: int, test: float | None) -> str:
    """How many units would do, in a sentence or two."""
    seen = f"{len(values)} images were seen; fewer than {least} can never do."
    if not len(values):
        return seen
    means = values.mean(0)
    if test is None:
        excess = float(means.min())
        if excess >= alpha:
            return f"{seen} At the errors seen here no number of images would."
        return (
            f"{seen} At the errors seen here about {ceil((1 - excess) / (alpha - excess))} would."
        )
    gaps = alpha - means
    spread = values.var(0, correction=0) + alpha * (1 - alpha) / len(values)
    best = int((gaps / spread.sqrt()).argmax())
    if float(gaps[best]) <= 0:
        return f"{seen} At the errors seen here no number of images would."
    needed = 2 * log(1 / test) * float(spread[best]) / float(gaps[best]) ** 2
    return f"{seen} At the errors seen here about {max(ceil(needed), least)} would."


def _check_classes(num_classes: int, classes: tuple[int, ...] | None) -> None:
    _checks.check_integer("num_classes", num_classes, 1)
    for chosen in classes or ():
        _checks.check_integer("classes", chosen, 0)
        if chosen >= num_classes:
            raise InputError(f"classes must lie below {num_classes}; got {chosen}")


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


def _check_grid(grid: Tensor) -> None:
    _checks.check_tensor("grid", grid)
    if grid.dtype != torch.float32 or grid.ndim != 1 or len(grid) == 0:
        raise InputError(
            f"grid must be float32 of shape (K,); got {grid.dtype} {_checks.describe(grid.shape)}"
        )
    if not bool(grid.isfinite().all() and (grid.diff() > 0).all()):
        raise InputError("grid must be finite and increasing")


def _ids(unit_ids: Sequence[int] | Tensor, batch: int) -> list[int]:
    if isinstance(unit_ids, Tensor):
        _checks.check_integers("unit_ids", unit_ids)
        if unit_ids.ndim != 1 or unit_ids.device.type != "cpu":
            raise InputError("unit_ids must have one axis and be on the CPU")
        listed = cast("list[int]", unit_ids.tolist())
    else:
        listed = list(unit_ids)
        for unit in listed:
            _checks.check_integer("unit_ids", unit)
    if len(listed) != batch:
        raise InputError(f"unit_ids must have one id per batch entry, {batch}; got {len(listed)}")
    return listed


def _stack(rows: list[Tensor]) -> Tensor:
    return torch.cat([row.cpu() for row in rows]) if rows else torch.zeros((0, 0), dtype=torch.long)


def _in_order(table: Tensor) -> Tensor:
    """Rows in an order of their own."""
    listed = [row.tobytes() for row in table.numpy()]
    return table[sorted(range(len(listed)), key=listed.__getitem__)]


_BUILT_IN: dict[str, Callable[..., Risk]] = {
    kind.__name__: kind
    for kind in (
        Miscoverage,
        FalseNegativeRate,
        DilutedFalseNegativeRate,
        WorstFalseNegativeRate,
        CoverageShare,
        InstanceRecall,
        KeptError,
        FalseShare,
    )
}
_RULES: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    kind.__name__: kind for kind in (Argmax, Top, BackgroundPriority, AtMost)
}


def _describe_risk(risk: Risk) -> dict[str, Any]:
    kind = type(risk)
    known = kind.__name__ in _BUILT_IN and kind.__module__ == __name__
    name = (
        kind.__name__ if kind.__module__ == __name__ else f"{kind.__module__}.{kind.__qualname__}"
    )
    classes = getattr(risk, "num_classes", 1)
    parameters: dict[str, Any] = {}
    for field in getattr(risk, "__dataclass_fields__", {}):
        value = getattr(risk, field)
        if field == "rule":
            value = _rule_name(value, classes)
        elif callable(value):
            value = f"{value.__module__}.{value.__qualname__}"
        parameters[field] = list(value) if isinstance(value, tuple) else value
    return {"name": name, "parameters": parameters, "built_in": known}


def _risk_from_description(description: Mapping[str, Any], risk: Risk | None) -> Risk:
    if risk is not None:
        if _describe_risk(risk) != description:
            raise InputError(
                f"risk must be the one that made this, {description['name']} with "
                f"{description['parameters']}; got {_describe_risk(risk)}"
            )
        return risk
    parameters = dict(description["parameters"])
    if "rule" in parameters:
        parts = re.fullmatch(r"(\w+)\((?:(\w+)=(\d+))?\)", parameters["rule"])
        if parts is None or parts[1] not in _RULES:
            raise InputError(f"risk must be given: its rule was {parameters['rule']}")
        kind = _RULES[parts[1]]
        parameters["rule"] = partial(kind, **{parts[2]: int(parts[3])}) if parts[2] else kind
    if parameters.get("classes") is not None:
        parameters["classes"] = tuple(parameters["classes"])
    if not description["built_in"]:
        raise InputError(f"risk must be given: this was made with {description['name']}")
    return _BUILT_IN[description["name"]](**parameters)
