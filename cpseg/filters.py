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
from typing import Literal, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.calibration import Calibration
from cpseg.errors import InputError
from cpseg.predictors import check_input, thresholds_of

__all__ = [
    "AreaGuard",
    "AreaWarning",
    "Argmax",
    "AtMost",
    "BackgroundPriority",
    "Decision",
    "Reason",
    "Singleton",
    "Top",
    "each_class",
    "rule_of",
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
    share it had in a calibration image, plus ``slack``. Deciding waits for the device.

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

    Examples:
        >>> from cpseg.calibrators import SplitCalibrator
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
        >>> calibrator = SplitCalibrator().update(logits, torch.zeros(4, dtype=torch.int64))
        >>> Argmax(calibrator.compute(alpha=0.4))(torch.tensor([[0.0, 1.0], [0.1, 0.0]]))
        tensor([  1, 255], dtype=torch.uint8)
    """

    calibration: Calibration
    guard: AreaGuard | None = None

    def __post_init__(self) -> None:
        _check_rule(self)

    def __call__(self, logits: Tensor, groups: Tensor | None = None) -> Tensor:
        """Pseudo-labels ``(B, *S)`` of logits ``(B, C, *S)``; see :class:`Decision`."""
        return self.decide(logits, groups).labels

    def decide(self, logits: Tensor, groups: Tensor | None = None) -> Decision:
        """Pseudo-labels and reasons."""
        return _decide(
            self.calibration, logits, groups, self.guard, choose=_most_likely, propose=_propose_top
        )


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

    Examples:
        >>> from cpseg.calibrators import SplitCalibrator
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
        >>> calibrator = SplitCalibrator().update(logits, torch.zeros(4, dtype=torch.int64))
        >>> Top(calibrator.compute(alpha=0.4))(torch.tensor([[0.0, 1.0], [0.1, 0.0]]))
        tensor([  1, 255], dtype=torch.uint8)
    """

    calibration: Calibration
    guard: AreaGuard | None = None

    def __post_init__(self) -> None:
        _check_rule(self)

    def __call__(self, logits: Tensor, groups: Tensor | None = None) -> Tensor:
        """Pseudo-labels ``(B, *S)`` of logits ``(B, C, *S)``; see :class:`Decision`."""
        return self.decide(logits, groups).labels

    def decide(self, logits: Tensor, groups: Tensor | None = None) -> Decision:
        """Pseudo-labels and reasons."""
        return _decide(
            self.calibration, logits, groups, self.guard, choose=_top_or_none, propose=None
        )


@final
@dataclass(frozen=True, eq=False, slots=True)
class BackgroundPriority:
    """The most likely foreground class of the set; background only if there is none.

    ConformalSAM's rule: a background that overwhelms the foreground must not win where a
    foreground class is still possible.

    Guarantee:
        None; a heuristic on sets that have one.

    Attributes:
        calibration: Thresholds and score.
        background: The background's class.
        guard: Notices classes that flood an image.

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

    def __post_init__(self) -> None:
        _checks.check_integer("background", self.background, 0)
        self._check(self.calibration.num_classes)

    def _check(self, classes: int | None) -> None:
        if classes is not None and self.background >= classes:
            raise InputError(f"background must be a class, below {classes}; got {self.background}")
        _check_rule(self)

    def __call__(self, logits: Tensor, groups: Tensor | None = None) -> Tensor:
        """Pseudo-labels ``(B, *S)`` of logits ``(B, C, *S)``; see :class:`Decision`."""
        return self.decide(logits, groups).labels

    def decide(self, logits: Tensor, groups: Tensor | None = None) -> Decision:
        """Pseudo-labels and reasons."""
        _checks.check_logits(logits)
        self._check(logits.shape[1])  # a calibration without data knows no number of classes
        return _decide(
            self.calibration, logits, groups, self.guard, choose=self._choose, propose=self._propose
        )

    def _choose(self, logits: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        foreground = member.index_fill(
            1, torch.tensor([self.background], device=member.device), value=False
        )
        label, reason = _most_likely(logits, foreground)
        alone = (reason == Reason.EMPTY) & member[:, self.background]
        label = torch.where(alone, self.background, label)
        return label, torch.where(alone, Reason.KEPT, reason)

    def _propose(self, logits: Tensor) -> tuple[Tensor, ...]:
        parts = [
            (0, logits[:, : self.background]),
            (self.background + 1, logits[:, self.background + 1 :]),
        ]
        best = [(part.amax(1), _top(part) + start) for start, part in parts if part.shape[1]]
        background = torch.full_like(logits[:, 0], self.background, dtype=torch.int64)
        if not best:
            return (background,)
        value, foreground = best[0]
        for later, label in best[1:]:
            foreground = torch.where(later > value, label, foreground)
        return foreground, background


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

    def __post_init__(self) -> None:
        _checks.check_integer("k", self.k, 1)
        _check_rule(self)

    def __call__(self, logits: Tensor, groups: Tensor | None = None) -> Tensor:
        """Pseudo-labels ``(B, *S)`` of logits ``(B, C, *S)``; see :class:`Decision`."""
        return self.decide(logits, groups).labels

    def decide(self, logits: Tensor, groups: Tensor | None = None) -> Decision:
        """Pseudo-labels and reasons."""
        return _decide(
            self.calibration, logits, groups, self.guard, choose=self._choose, propose=None
        )

    def _choose(self, logits: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        label, reason = _most_likely(logits, member)
        return label, torch.where(
            member.sum(1, dtype=torch.int32) > self.k, Reason.TOO_MANY, reason
        )


@final
@dataclass(frozen=True, eq=False, slots=True)
class Singleton:
    """The class of a set that holds only one: :class:`AtMost` with ``k=1``.

    Guarantee:
        None; a heuristic on sets that have one.

    Attributes:
        calibration: Thresholds and score.
        guard: Notices classes that flood an image.

    Examples:
        >>> from cpseg.calibrators import SplitCalibrator
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
        >>> calibrator = SplitCalibrator().update(logits, torch.zeros(4, dtype=torch.int64))
        >>> Singleton(calibrator.compute(alpha=0.2))(torch.tensor([[0.1, 0.0], [3.0, 0.0]]))
        tensor([255,   0], dtype=torch.uint8)
    """

    calibration: Calibration
    guard: AreaGuard | None = None

    def __post_init__(self) -> None:
        _check_rule(self)

    def __call__(self, logits: Tensor, groups: Tensor | None = None) -> Tensor:
        """Pseudo-labels ``(B, *S)`` of logits ``(B, C, *S)``; see :class:`Decision`."""
        return self.decide(logits, groups).labels

    def decide(self, logits: Tensor, groups: Tensor | None = None) -> Decision:
        """Pseudo-labels and reasons."""
        choose = AtMost(self.calibration, 1)._choose
        return _decide(self.calibration, logits, groups, self.guard, choose=choose, propose=None)


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
    control, guard = mask_filter.calibration.control, mask_filter.guard
    mask_filter.calibration.require_rule(rule_of(mask_filter))
    if control is not None and control.rule and guard is not None and guard.action == "abstain":
        raise InputError(
            'guard must not have action "abstain" with a calibration bound to a rule: '
            "the errors among the labels it leaves are not controlled"
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
        InputError: If sets is no bool tensor ``(B, C, *S)`` with a spatial axis.

    Examples:
        >>> from functools import partial
        >>> from cpseg.morphology import dilate
        >>> sets = torch.tensor([[[True, False, False], [False, False, True]]])
        >>> each_class(partial(dilate, radius=1), sets)
        tensor([[[ True,  True, False],
                 [False,  True,  True]]])
    """
    if sets.dtype != torch.bool or sets.ndim < 3:
        raise InputError(
            f"sets must be bool with shape (B, C, *S) and a spatial axis; "
            f"got {sets.dtype} {_checks.describe(sets.shape)}"
        )
    return operation(sets.flatten(0, 1)).view(sets.shape)


_Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_Propose = Callable[[Tensor], tuple[Tensor, ...]]


def _decide(
    calibration: Calibration,
    logits: Tensor,
    groups: Tensor | None,
    guard: AreaGuard | None,
    *,
    choose: _Choose,
    propose: _Propose | None,
) -> Decision:
    """Labels by ``choose`` from logits and finite members, or by testing what is proposed.

    ``propose`` names the classes to try in order; their own scores then decide, and no set is
    built. It serves where one threshold holds for all classes of a pixel and the score follows
    the logits. Otherwise sets exist for a part of the batch at a time.
    """
    check_input(calibration, logits, groups)
    batch, classes, *space = logits.shape
    small = classes <= 255 and 0 <= calibration.ignore_index <= 255
    labels = torch.empty(
        (batch, *space), dtype=torch.uint8 if small else torch.int64, device=logits.device
    )
    reasons = torch.empty((batch, *space), dtype=torch.uint8, device=logits.device)
    one_for_all = "class" not in calibration.axes
    quick = propose is not None and one_for_all and calibration.score.follows_logits
    pixels = prod(space)
    most = _PART_ELEMENTS.get(logits.device.type, 2**20)
    step = max(most // (classes * max(pixels, 1)), 1)
    with torch.no_grad():
        for start in range(0, batch if pixels else 0, step):
            part = slice(start, start + step)
            image = logits[part]
            per_batch = groups is not None and groups.ndim == logits.ndim - 1
            near = groups[part] if groups is not None and per_batch else groups
            limit = thresholds_of(calibration, image, near)
            top = _top(image)[:, None]
            if quick and propose is not None:
                label, reason = _try_in_turn(calibration, image, limit, propose(image))
            else:
                member = (calibration.score(image) <= limit) & limit.isfinite()
                label, reason = choose(image, member)
            starved = limit.isinf().expand(image.shape).gather(1, top)[:, 0]
            unusable = ~image.amax(1).isfinite()
            reason = torch.where(starved, Reason.STARVED, reason)
            reason = torch.where(unusable, Reason.UNUSABLE, reason)
            labels[part] = torch.where(reason == Reason.KEPT, label, calibration.ignore_index)
            reasons[part] = reason
        if guard is not None:
            _guard(guard, calibration, labels, reasons)
    return Decision(labels, reasons)


_PART_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # worth the calls, and small beside a batch


def _most_likely(logits: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """The member with the largest logit, the first of equals."""
    best = torch.where(member, logits, -torch.inf).amax(1, keepdim=True)
    label = _first((logits == best) & member)  # a member may have logit -inf, and must still win
    return label, torch.where(member.view(torch.uint8).amax(1) > 0, Reason.KEPT, Reason.EMPTY)


def _top_or_none(logits: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """The class with the largest logit, if it is a member."""
    top = _top(logits)
    inside = member.gather(1, top[:, None])[:, 0]
    return top, torch.where(inside, Reason.KEPT, Reason.EMPTY)


def _first(mask: Tensor) -> Tensor:
    """The first class that is marked, 0 where none is. Bool ``(B, C, *S)`` to ``(B, *S)``.

    What ``argmax(1)`` does, an order of magnitude faster: along an axis that is not the last,
    torch vectorises a maximum but not its index.
    """
    classes = mask.shape[1]
    dtype = torch.uint8 if classes <= 255 else torch.int32
    countdown = torch.arange(classes, 0, -1, dtype=dtype, device=mask.device)
    left = (mask * countdown.view(-1, *(1 for _ in mask.shape[2:]))).amax(1).long()
    return (classes - left) * (left > 0)


def _top(logits: Tensor) -> Tensor:
    """The class with the largest logit, the first of equals; 0 where a logit is NaN."""
    return _first(logits == logits.amax(1, keepdim=True))


def _propose_top(logits: Tensor) -> tuple[Tensor, ...]:
    return (_top(logits),)


def _try_in_turn(
    calibration: Calibration, image: Tensor, limit: Tensor, proposals: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The first proposed class whose score does not exceed the threshold."""
    label = torch.full_like(proposals[0], calibration.ignore_index)
    for proposal in reversed(proposals):
        inside = calibration.score.of_labels(image, proposal) <= limit[:, 0]
        label = torch.where(inside, proposal, label)
    return label, torch.where(label == calibration.ignore_index, Reason.EMPTY, Reason.KEPT)


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
        stacklevel=5,
    )
    if guard.action == "abstain":
        kept = reasons == Reason.KEPT
        flat = torch.where(kept, labels, 0).long().reshape(len(labels), -1)
        caught = kept & flooding.gather(1, flat).view(labels.shape)
        labels.masked_fill_(caught, calibration.ignore_index)
        reasons.masked_fill_(caught, int(Reason.GUARDED))
