"""Logits and a calibration to pseudo-labels: a class where it can be trusted, else abstention.

A filter looks at the classes in a pixel's set and proposes one, or abstains. Two rules hold for
all of them. A class whose threshold is ``+inf`` is in every set for want of calibration images,
not for being likely: it is never proposed nor counted, and where it is the pixel's most likely
class the filter abstains. And a pixel with unusable logits is abstained from.

Guarantee:
    None for the labels. A calibration bounds how often the truth is lost from a set; it does not
    bound how often a kept label is wrong.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from typing import Literal, Protocol, cast, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg._classes import (
    Parts,
    any_class,
    at_class,
    best_of,
    class_index,
    first_equal,
    holds,
    how_many,
    joined,
    largest,
    num_classes,
    of_class,
    summed,
    top_class,
)
from cpseg._odds import POSSIBLE, odds_to
from cpseg._tiles import Columns, walk
from cpseg.calibration import Calibration
from cpseg.errors import InputError
from cpseg.predictors import check_calibration, limits_of, run
from cpseg.scores import ColumnScore, label_scores_in_parts, scores_in_parts

__all__ = [
    "AreaGuard",
    "AreaWarning",
    "Argmax",
    "AtMost",
    "BackgroundPriority",
    "Decision",
    "Reason",
    "Singleton",
    "SoftLabels",
    "Top",
    "each_class",
]


class Reason(IntEnum):
    """Why a pixel has the pseudo-label it has."""

    KEPT = 0
    EMPTY = 1
    """No class with a finite threshold is in the set, or none that the rule would take."""
    STARVED = 2
    """The most likely class, or the pixel's group, has an infinite threshold."""
    TOO_MANY = 3
    """More classes in the set than the filter allows."""
    UNUSABLE = 4
    """NaN, +inf, or nothing but -inf among the logits."""
    GUARDED = 5
    """The image would have far more of the class than calibration images had."""


@final
@dataclass(frozen=True, eq=False, slots=True)
class Decision:
    """Pseudo-labels and the reason behind each.

    Attributes:
        labels: Classes, the calibration's ``ignore_index`` where abstained; uint8 if classes and
            ``ignore_index`` fit, else int64. Shape ``(B, *S)``.
        reasons: A :class:`Reason` for each pixel. uint8 ``(B, *S)``.
    """

    labels: Tensor
    reasons: Tensor

    def counts(self) -> dict[str, int]:
        """How many pixels each reason has, by its name in lower case."""
        counts = torch.bincount(self.reasons.flatten().long(), minlength=len(Reason)).tolist()
        return {reason.name.lower(): counts[reason] for reason in Reason}


class AreaWarning(UserWarning):
    """A filter labels far more of a class than calibration images ever had of it."""


@final
@dataclass(frozen=True, slots=True)
class AreaGuard:
    """Notices a class that floods an image.

    A class is flooding when its share of an image's pixels exceeds ``factor`` times the largest
    share it had in a calibration image, plus ``slack``. An image is a batch entry here, whatever
    ``unit_ids`` said: a tile can be all of one class where the whole image cannot, so let both be
    tiles, or both be whole. Deciding waits for the device.

    Guarantee:
        None; a heuristic.

    Attributes:
        factor: How many times the largest calibration share is still plausible.
        slack: Share of an image that is plausible for any class.
        action: ``"warn"``: an :class:`AreaWarning`. ``"abstain"``: that, and abstention from the
            class in that image.
    """

    factor: float = 2.0
    slack: float = 0.01
    action: Literal["warn", "abstain"] = "warn"

    def __post_init__(self) -> None:
        _checks.check_weight("factor", self.factor)
        _checks.check_weight("slack", self.slack)
        if self.action not in ("warn", "abstain"):
            raise InputError(f'action must be "warn" or "abstain"; got {self.action!r}')

    def flooding(self, labels: Tensor, max_share: Tensor) -> Tensor:
        """Which class floods which image. Labels ``(B, *S)`` to bool ``(B, C)``."""
        batch, classes = labels.shape[0], len(max_share)
        flat = labels.long().reshape(batch, prod(labels.shape[1:]))
        known = (flat >= 0) & (flat < classes)
        pixels = torch.zeros((batch, classes + 1), dtype=torch.int64, device=labels.device)
        pixels.scatter_add_(1, torch.where(known, flat, classes), torch.ones_like(flat))
        share = pixels[:, :-1].double() / max(flat.shape[1], 1)
        return share > self.factor * max_share.to(share.device) + self.slack


@final
@dataclass(frozen=True, eq=False, slots=True)
class Argmax:
    """The most likely class of the set.

    Guarantee:
        None; a heuristic on sets that have one.

    Attributes:
        calibration: Thresholds and score.
        guard: Notices classes that flood an image.
        compiled: Fuse the work into one kernel, as :class:`cpseg.PixelSetPredictor` does.

    Examples:
        >>> from cpseg.calibrators import SplitCalibrator
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
        >>> calibrator = SplitCalibrator().update(logits, torch.zeros(4, dtype=torch.int64))
        >>> Argmax(calibrator.compute(alpha=0.4))(torch.tensor([[0.0, 1.0], [0.1, 0.0]]))
        tensor([  1, 255], dtype=torch.uint8)
    """

    calibration: Calibration
    guard: AreaGuard | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        _check_rule(self)

    def __call__(self, logits: Tensor, groups: Tensor | None = None) -> Tensor:
        """Pseudo-labels ``(B, *S)`` of logits ``(B, C, *S)``; see :class:`Decision`."""
        return _decide(self, logits, groups).labels

    def decide(self, logits: Tensor, groups: Tensor | None = None) -> Decision:
        """Pseudo-labels and reasons."""
        return _decide(self, logits, groups)


@final
@dataclass(frozen=True, eq=False, slots=True)
class Top:
    """The most likely class where it is in the set, and never another.

    As :class:`Argmax` with one threshold. With one per class, a pixel's label depends on its own
    class's threshold alone, so that errors can be controlled class by class.

    Guarantee:
        None; a heuristic on sets that have one. With a calibration of
        :class:`cpseg.risk.KeptError`: that one's.

    Attributes:
        calibration: Thresholds and score.
        guard: Notices classes that flood an image.
        compiled: Fuse the work into one kernel, as :class:`cpseg.PixelSetPredictor` does.

    Examples:
        >>> from cpseg.calibrators import SplitCalibrator
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
        >>> calibrator = SplitCalibrator().update(logits, torch.zeros(4, dtype=torch.int64))
        >>> Top(calibrator.compute(alpha=0.4))(torch.tensor([[0.0, 1.0], [0.1, 0.0]]))
        tensor([  1, 255], dtype=torch.uint8)
    """

    calibration: Calibration
    guard: AreaGuard | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        _check_rule(self)

    def __call__(self, logits: Tensor, groups: Tensor | None = None) -> Tensor:
        """Pseudo-labels ``(B, *S)`` of logits ``(B, C, *S)``; see :class:`Decision`."""
        return _decide(self, logits, groups).labels

    def decide(self, logits: Tensor, groups: Tensor | None = None) -> Decision:
        """Pseudo-labels and reasons."""
        return _decide(self, logits, groups)


@final
@dataclass(frozen=True, eq=False, slots=True)
class BackgroundPriority:
    """The most likely foreground class of the set; background only if there is none.

    ConformalSAM's rule: a background that overwhelms the foreground must not win where a
    foreground class is still possible. It needs small sets: a foreground class whose threshold is
    so high that it is possible nearly everywhere takes the background's place there, for which
    ``guard`` warns. Look at :class:`cpseg.metrics.SelectiveAccuracy` before a student learns.

    Guarantee:
        None; a heuristic on sets that have one.

    Attributes:
        calibration: Thresholds and score.
        background: The background's class.
        guard: Notices classes that flood an image.
        compiled: Fuse the work into one kernel, as :class:`cpseg.PixelSetPredictor` does.

    Examples:
        >>> from cpseg.calibrators import SplitCalibrator
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
        >>> calibrator = SplitCalibrator().update(logits, torch.zeros(4, dtype=torch.int64))
        >>> filter = BackgroundPriority(calibrator.compute(alpha=0.2))
        >>> filter(torch.tensor([[0.4, 0.0], [3.0, 0.0]]))
        tensor([1, 0], dtype=torch.uint8)
    """

    calibration: Calibration
    background: int = 0
    guard: AreaGuard | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        background = _checks.check_integer("background", self.background, 0)
        object.__setattr__(self, "background", background)
        _check_rule(self)
        _check_background(self, self.calibration.num_classes)

    def __call__(self, logits: Tensor, groups: Tensor | None = None) -> Tensor:
        """Pseudo-labels ``(B, *S)`` of logits ``(B, C, *S)``; see :class:`Decision`."""
        return _decide(self, logits, groups).labels

    def decide(self, logits: Tensor, groups: Tensor | None = None) -> Decision:
        """Pseudo-labels and reasons."""
        return _decide(self, logits, groups)


@final
@dataclass(frozen=True, eq=False, slots=True)
class AtMost:
    """The most likely class of a set of at most ``k`` classes.

    Guarantee:
        None; a heuristic on sets that have one.

    Attributes:
        calibration: Thresholds and score.
        k: Most classes in the set.
        guard: Notices classes that flood an image.
        compiled: Fuse the work into one kernel, as :class:`cpseg.PixelSetPredictor` does.

    Examples:
        >>> from cpseg.calibrators import SplitCalibrator
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
        >>> calibrator = SplitCalibrator().update(logits, torch.zeros(4, dtype=torch.int64))
        >>> AtMost(calibrator.compute(alpha=0.2), k=1)(torch.tensor([[0.1, 0.0], [3.0, 0.0]]))
        tensor([255,   0], dtype=torch.uint8)
    """

    calibration: Calibration
    k: int
    guard: AreaGuard | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", _checks.check_integer("k", self.k, 1))
        _check_rule(self)

    def __call__(self, logits: Tensor, groups: Tensor | None = None) -> Tensor:
        """Pseudo-labels ``(B, *S)`` of logits ``(B, C, *S)``; see :class:`Decision`."""
        return _decide(self, logits, groups).labels

    def decide(self, logits: Tensor, groups: Tensor | None = None) -> Decision:
        """Pseudo-labels and reasons."""
        return _decide(self, logits, groups)


@final
@dataclass(frozen=True, eq=False, slots=True)
class Singleton:
    """The class of a set that holds only one: :class:`AtMost` with ``k=1``.

    Guarantee:
        None; a heuristic on sets that have one.

    Attributes:
        calibration: Thresholds and score.
        guard: Notices classes that flood an image.
        compiled: Fuse the work into one kernel, as :class:`cpseg.PixelSetPredictor` does.

    Examples:
        >>> from cpseg.calibrators import SplitCalibrator
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
        >>> calibrator = SplitCalibrator().update(logits, torch.zeros(4, dtype=torch.int64))
        >>> Singleton(calibrator.compute(alpha=0.2))(torch.tensor([[0.1, 0.0], [3.0, 0.0]]))
        tensor([255,   0], dtype=torch.uint8)
    """

    calibration: Calibration
    guard: AreaGuard | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        _check_rule(self)

    def __call__(self, logits: Tensor, groups: Tensor | None = None) -> Tensor:
        """Pseudo-labels ``(B, *S)`` of logits ``(B, C, *S)``; see :class:`Decision`."""
        return _decide(self, logits, groups).labels

    def decide(self, logits: Tensor, groups: Tensor | None = None) -> Decision:
        """Pseudo-labels and reasons."""
        return _decide(self, logits, groups)


@final
@dataclass(frozen=True, eq=False, slots=True)
class SoftLabels:
    """All classes of the set, each with its probability; the others have none.

    What a student can learn from without anyone having chosen: the annotator's own softmax over
    the classes that are still possible, made to add up to 1 again. As with the other filters, a
    class with an infinite threshold is left out, and a pixel where it is the most likely one is
    abstained from. For :class:`cpseg.training.Stage`, as external probabilities.

    Guarantee:
        None for the probabilities; those that are not 0 are of the classes of the set whose
        threshold is finite, where the filter does not abstain.

    Attributes:
        calibration: Thresholds and score.
        compiled: Fuse the work into one kernel, as :class:`cpseg.PixelSetPredictor` does.

    Examples:
        >>> from cpseg.calibrators import SplitCalibrator
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
        >>> calibrator = SplitCalibrator().update(logits, torch.zeros(4, dtype=torch.int64))
        >>> soft = SoftLabels(calibrator.compute(alpha=0.2))
        >>> soft(torch.tensor([[0.4, 0.0], [3.0, 0.0]]))
        tensor([[0.5987, 0.4013],
                [1.0000, 0.0000]])
    """

    calibration: Calibration
    compiled: bool = False

    def __post_init__(self) -> None:
        check_calibration(self.calibration)
        _checks.check_flag("compiled", self.compiled)
        self.calibration.require_rule(None)

    def __call__(self, logits: Tensor, groups: Tensor | None = None) -> Tensor:
        """Probabilities of logits ``(B, C, *S)``, 0 in all classes where abstained.

        Args:
            logits: Shape ``(B, C, *S)``.
            groups: Integers, ``(*S)`` or ``(B, *S)``, where the calibration has groups.

        Returns:
            float32 ``(B, C, *S)``; float64 of float64.
        """
        axes = self.calibration.axes
        with torch.no_grad():
            (made,) = run(
                lambda score: _Soften(score, axes),
                self.calibration,
                logits,
                groups,
                compiled=self.compiled,
            )
        return made


_AnyFilter = Argmax | Top | BackgroundPriority | AtMost | Singleton


def rule_of(mask_filter: _AnyFilter) -> str:
    """A filter's rule, without calibration and guard: what a calibration can be bound to.

    Args:
        mask_filter: One of the filters of this module.

    Returns:
        Its name and parameters. :class:`Singleton` is :class:`AtMost` with ``k=1``.
    """
    match mask_filter:
        case BackgroundPriority():
            return f"BackgroundPriority(background={mask_filter.background})"
        case AtMost():
            return f"AtMost(k={mask_filter.k})"
        case Singleton():
            return "AtMost(k=1)"
        case Argmax() | Top():
            return f"{type(mask_filter).__name__}()"


def _check_rule(mask_filter: _AnyFilter) -> None:
    """A calibration bound to a rule serves no other, nor that rule with labels taken away."""
    check_calibration(mask_filter.calibration)
    guard = mask_filter.guard
    if guard is not None and not isinstance(cast("object", guard), AreaGuard):
        raise InputError(f"guard must be an AreaGuard or None; got {guard!r}")
    _checks.check_flag("compiled", mask_filter.compiled)
    control = mask_filter.calibration.control
    mask_filter.calibration.require_rule(rule_of(mask_filter))
    if control is not None and control.rule and guard is not None and guard.action == "abstain":
        raise InputError(
            'guard must not have action "abstain" with a calibration bound to a rule: '
            "the errors among the labels it leaves are not controlled"
        )


def _check_background(mask_filter: BackgroundPriority, classes: int | None) -> None:
    """The background must be a class; a calibration without data knows no number of them."""
    if classes is not None and mask_filter.background >= classes:
        raise InputError(
            f"background must be a class, below {classes}; got {mask_filter.background}"
        )


def each_class(operation: Callable[[Tensor], Tensor], sets: Tensor) -> Tensor:
    """A mask operation of :mod:`cpseg.morphology` on the mask of every class of the sets.

    Guarantee:
        That of the sets, if the operation only grows masks (``dilate``, ``fill_holes``). None, if
        it can shrink them (``erode``, ``remove_small_components``).

    Args:
        operation: From masks, bool ``(N, *S)``, to masks.
        sets: Bool ``(B, C, *S)``.

    Returns:
        New sets. Bool ``(B, C, *S)``.

    Raises:
        InputError: If sets is no bool tensor ``(B, C, *S)`` with a spatial axis, or the operation
            returns no masks of the shape it was given.

    Examples:
        >>> from functools import partial
        >>> from cpseg.morphology import dilate
        >>> sets = torch.tensor([[[True, False, False], [False, False, True]]])
        >>> each_class(partial(dilate, radius=1), sets)
        tensor([[[ True,  True, False],
                 [False,  True,  True]]])
    """
    _checks.check_tensor("sets", sets)
    if sets.dtype != torch.bool or sets.ndim < 3:
        raise InputError(
            f"sets must be bool with shape (B, C, *S) and a spatial axis; "
            f"got {sets.dtype} {_checks.describe(sets.shape)}"
        )
    masks = sets.flatten(0, 1)
    made = operation(masks)
    if made.dtype != torch.bool or made.shape != masks.shape:
        raise InputError(
            f"operation must return bool masks {_checks.describe(masks.shape)}; "
            f"got {made.dtype} {_checks.describe(made.shape)}"
        )
    return made.view(sets.shape)


# --- the rules, on columns -----------------------------------------------------------------------

_KEPT, _EMPTY, _STARVED = int(Reason.KEPT), int(Reason.EMPTY), int(Reason.STARVED)
_TOO_MANY, _UNUSABLE = int(Reason.TOO_MANY), int(Reason.UNUSABLE)

_Inside = Callable[[Tensor], Tensor]  # labels (N,) to whether each is in its pixel's set


class _Rule(Protocol):
    """What a filter makes of a block of logits, in parts: labels and reasons, each ``(N,)``."""

    def proposed(self, parts: Parts) -> tuple[Tensor, ...]:
        """The classes that :meth:`by_tests` tests, in order."""
        ...

    def by_tests(self, parts: Parts, inside: _Inside) -> tuple[Tensor, Tensor]:
        """From tests of single classes, where a larger logit is never less inside."""
        ...

    def by_sets(self, parts: Parts, members: Parts) -> tuple[Tensor, Tensor]:
        """From the members with a finite threshold, bool."""
        ...


@dataclass(frozen=True, slots=True)
class _MostLikely:
    def proposed(self, parts: Parts) -> tuple[Tensor, ...]:
        return (top_class(parts),)

    def by_tests(self, parts: Parts, inside: _Inside) -> tuple[Tensor, Tensor]:
        return _in_turn(self.proposed(parts), inside)

    def by_sets(self, parts: Parts, members: Parts) -> tuple[Tensor, Tensor]:
        return _best(parts, members)


@dataclass(frozen=True, slots=True)
class _TopOnly:
    def proposed(self, parts: Parts) -> tuple[Tensor, ...]:
        return (top_class(parts),)

    def by_tests(self, parts: Parts, inside: _Inside) -> tuple[Tensor, Tensor]:
        return _in_turn(self.proposed(parts), inside)

    def by_sets(self, parts: Parts, members: Parts) -> tuple[Tensor, Tensor]:
        return _in_turn(self.proposed(parts), lambda labels: at_class(members, labels))


@dataclass(frozen=True, slots=True)
class _ForegroundFirst:
    background: int

    def proposed(self, parts: Parts) -> tuple[Tensor, ...]:
        background = torch.full_like(parts[0][0], self.background, dtype=torch.int64)
        foreground = self._foreground(parts)
        alone = num_classes(parts) == 1
        return (background,) if alone else (best_of(parts, foreground), background)

    def by_tests(self, parts: Parts, inside: _Inside) -> tuple[Tensor, Tensor]:
        return _in_turn(self.proposed(parts), inside)

    def by_sets(self, parts: Parts, members: Parts) -> tuple[Tensor, Tensor]:
        pairs = zip(members, self._foreground(parts), strict=True)
        label, reason = _best(parts, [member & mask for member, mask in pairs])
        alone = (reason == _EMPTY) & of_class(members, self.background)
        return torch.where(alone, self.background, label), torch.where(alone, _KEPT, reason)

    def _foreground(self, parts: Parts) -> Parts:
        return [index != self.background for index in class_index(parts)]


@dataclass(frozen=True, slots=True)
class _AtMostSo:
    k: int

    def proposed(self, parts: Parts) -> tuple[Tensor, ...]:
        """The most likely class, and the first that would be one too many, if there is one."""
        top = following = top_class(parts)
        if self.k >= num_classes(parts):
            return (top,)
        indices = class_index(parts)
        left = [torch.ones_like(part, dtype=torch.bool) for part in parts]
        for _ in range(self.k):
            last = following.int()
            left = [mask & (index != last) for mask, index in zip(left, indices, strict=True)]
            following = best_of(parts, left)
        return top, following

    def by_tests(self, parts: Parts, inside: _Inside) -> tuple[Tensor, Tensor]:
        top, *following = self.proposed(parts)
        label, reason = _in_turn((top,), inside)
        for one_too_many in following:
            reason = torch.where(inside(one_too_many), _TOO_MANY, reason)
        return label, reason

    def by_sets(self, parts: Parts, members: Parts) -> tuple[Tensor, Tensor]:
        label, reason = _best(parts, members)
        return label, torch.where(how_many(members) > self.k, _TOO_MANY, reason)


@dataclass(frozen=True, slots=True)
class _Decide:
    """A rule, and abstention from starved and unusable pixels."""

    score: ColumnScore
    follows_logits: bool
    axes: tuple[str, ...]
    rule: _Rule
    ignore_index: int

    def __call__(self, x: Parts, position: Tensor, /, *beside: Tensor) -> tuple[Tensor, ...]:
        limits = limits_of(self.axes, beside, x)

        def inside(labels: Tensor) -> Tensor:
            own = at_class(limits, labels)
            scores = label_scores_in_parts(self.score, x, position, labels)
            return (scores <= own) & own.isfinite()

        if self._tests_suffice:
            label, reason = self.rule.by_tests(x, inside)
        else:
            members = _members(scores_in_parts(self.score, x, position), limits)
            label, reason = self.rule.by_sets(x, members)
        most = largest(x)
        starved = at_class(limits, first_equal(x, most)).isinf()
        reason = torch.where(starved, _STARVED, reason)
        reason = torch.where(most.isfinite(), reason, _UNUSABLE)
        label = torch.where(reason == _KEPT, label, self.ignore_index)
        small = num_classes(x) <= 255 and 0 <= self.ignore_index <= 255
        return label.to(torch.uint8) if small else label, reason.to(torch.uint8)

    @property
    def _tests_suffice(self) -> bool:
        """Whether one class tells of others: they share a threshold, and scores follow logits."""
        if isinstance(self.rule, _TopOnly):
            return True
        return "class" not in self.axes and self.follows_logits


@dataclass(frozen=True, slots=True)
class _Soften:
    """The members with a finite threshold and their probabilities; none where starved or unusable."""

    score: ColumnScore
    axes: tuple[str, ...]

    def __call__(self, x: Parts, position: Tensor, /, *beside: Tensor) -> tuple[Tensor, ...]:
        limits = limits_of(self.axes, beside, x)
        members = _members(scores_in_parts(self.score, x, position), limits)
        most = largest(x)
        usable = most.isfinite() & ~at_class(limits, first_equal(x, most)).isinf()
        pairs = list(zip(x, members, strict=True))
        # The best member may lie far below the most likely class.
        best = largest([torch.where(member, part, -torch.inf) for part, member in pairs])
        usable &= best.isfinite()
        odds = [
            torch.where(member & usable, odds_to(best, part).clamp(min=POSSIBLE), 0)
            for part, member in pairs
        ]
        total = summed(odds)
        return (joined([torch.where(total > 0, part / total, 0) for part in odds]),)


def _members(scores: Parts, limits: Parts) -> Parts:
    """The members of the set with a finite threshold: nothing is at most ``-inf``."""
    pairs = zip(scores, limits, strict=True)
    return [
        holds(torch.le, part, torch.where(limit.isinf(), -torch.inf, limit))
        for part, limit in pairs
    ]


def _decide(mask_filter: _AnyFilter, logits: Tensor, groups: Tensor | None) -> Decision:
    calibration = mask_filter.calibration
    if isinstance(mask_filter, BackgroundPriority):
        _checks.check_logits(logits)
        _check_background(mask_filter, logits.shape[1])
    with torch.no_grad():
        made = run(
            lambda score: columns_of(mask_filter, score),
            calibration,
            logits,
            groups,
            compiled=mask_filter.compiled,
        )
        decision = Decision(*made)
        if mask_filter.guard is not None:
            _guard(mask_filter.guard, calibration, decision.labels, decision.reasons)
    return decision


def columns_of(mask_filter: _AnyFilter, score: ColumnScore) -> Columns:
    """What a filter does on columns: to labels and reasons.

    Args:
        mask_filter: The filter, whose guard does not count.
        score: Its calibration's score, on columns.

    Returns:
        An operation that takes, beside the logits, what :func:`cpseg.predictors.beside_of` gives.
    """
    calibration = mask_filter.calibration
    follows = calibration.score.follows_logits
    return _Decide(score, follows, calibration.axes, _rule(mask_filter), calibration.ignore_index)


def proposals(mask_filter: _AnyFilter, logits: Tensor) -> tuple[Tensor, ...]:
    """The classes that a filter tests where one threshold holds for all classes, in order.

    Args:
        mask_filter: Its rule counts, its calibration does not.
        logits: Shape ``(B, C, *S)``.

    Returns:
        Labels, each ``(B, *S)``. Of :class:`AtMost` and :class:`Singleton`: the most likely class,
        and the first that would be one too many, if there are so many.
    """
    return walk(_Propose(_rule(mask_filter)), logits)


def _rule(mask_filter: _AnyFilter) -> _Rule:
    match mask_filter:
        case Argmax():
            return _MostLikely()
        case Top():
            return _TopOnly()
        case BackgroundPriority():
            return _ForegroundFirst(mask_filter.background)
        case AtMost():
            return _AtMostSo(mask_filter.k)
        case Singleton():
            return _AtMostSo(1)


@dataclass(frozen=True, slots=True)
class _Propose:
    rule: _Rule

    def __call__(self, x: Parts, position: Tensor, /, *_: Tensor) -> tuple[Tensor, ...]:
        del position
        return self.rule.proposed(x)


def _best(parts: Parts, members: Parts) -> tuple[Tensor, Tensor]:
    return best_of(parts, members), torch.where(any_class(members), _KEPT, _EMPTY)


def _in_turn(proposed: tuple[Tensor, ...], inside: _Inside) -> tuple[Tensor, Tensor]:
    """The first proposed class that is inside."""
    label, reason = torch.zeros_like(proposed[0]), torch.full_like(proposed[0], _EMPTY)
    for proposal in reversed(proposed):
        kept = inside(proposal)
        label, reason = torch.where(kept, proposal, label), torch.where(kept, _KEPT, reason)
    return label, reason


def _guard(guard: AreaGuard, calibration: Calibration, labels: Tensor, reasons: Tensor) -> None:
    """Warn of flooding classes, and take their labels back in place if the guard abstains."""
    flooding = guard.flooding(labels, calibration.max_share)
    if not flooding.any():
        return
    warnings.warn(
        f"classes {flooding.any(0).nonzero()[:, 0].tolist()} take more than {guard.factor:g} times "
        f"the largest share of an image they had in calibration, plus {guard.slack:g}, in "
        f"{int(flooding.any(1).sum())} of {len(labels)} images"
        + (": abstained" if guard.action == "abstain" else ""),
        AreaWarning,
        stacklevel=4,  # whoever called the filter
    )
    if guard.action == "abstain":
        kept = reasons == Reason.KEPT
        flat = torch.where(kept, labels, 0).long().reshape(len(labels), -1)
        caught = kept & flooding.gather(1, flat).view(labels.shape)
        labels.masked_fill_(caught, calibration.ignore_index)
        reasons.masked_fill_(caught, int(Reason.GUARDED))
