"""Risks of kept labels: how often they are wrong. Safest where nothing is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from cpseg.errors import InputError
from cpseg.filters import Argmax, AtMost, BackgroundPriority, Singleton, Top, proposals
from cpseg.risk._counting import (
    check_classes,
    first_reaching,
    flattened,
    losses_of_function,
    occurrences,
    tally_of_function,
)
from cpseg.risk._rules import labels_at_each, probe, rule_name
from cpseg.risk.losses import Batch, Losses, Rule

__all__ = ["FalseShare", "KeptError", "KeptRisk"]


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
        check_classes(self.num_classes, None)
        if self.per_class and not isinstance(probe(self.rule, self.num_classes), Top):
            raise InputError(
                "rule must be Top with per_class=True: with other rules a class's labels depend "
                f"on the thresholds of others; got {rule_name(self.rule, self.num_classes)}"
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
        rule = rule_name(self.rule, self.num_classes)
        if self.per_class:
            return (
                f"For each class, E[wrong] / E[kept] is at most {alpha:g}, over new images with labeled "
                "pixels where the class is the most likely one, with the shares of these pixels "
                f"that {rule} labels wrongly, and at all"
            )
        return (
            f"E[wrong] / E[kept] is at most {alpha:g}, with the shares of a new image's labeled "
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

    keeps = True
    monotone = False
    starts = 1

    @property
    def axes(self) -> tuple[str, ...]:
        """One threshold for all."""
        return ()

    def __post_init__(self) -> None:
        check_classes(self.num_classes, None)
        probe(self.rule, self.num_classes)

    def tally(self, batch: Batch) -> Tensor:
        """Wrong and kept pixels per threshold, and labeled ones. int64 ``(B, 2 * K + 1)``."""
        return _tally_kept(batch, self.rule, self.num_classes, 1)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Wrong shares of what is kept."""
        del alpha
        wrong, kept, pixels = _kept(tallies, 1)
        return Losses(wrong / kept.clamp(min=1), pixels > 0, pixels)

    def event(self, alpha: float) -> str:
        """What is bounded."""
        rule = rule_name(self.rule, self.num_classes)
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

    keeps = True
    starts = 1

    @property
    def axes(self) -> tuple[str, ...]:
        """One threshold for all."""
        return ()

    def __post_init__(self) -> None:
        check_classes(self.num_classes, None)
        probe(self.rule, self.num_classes)

    def tally(self, batch: Batch) -> Tensor:
        """Losses in units of ``1 / UNIT_MASS``, tiles and pixels. int64 ``(B, K + 2)``."""
        labels = torch.where(batch.valid, batch.labels, batch.ignore_index)
        values = [self.function(kept, labels) for kept in labels_at_each(batch, self.rule)]
        return tally_of_function(self.name, values, batch)

    def losses(self, tallies: Tensor, alpha: float) -> Losses:
        """Means over a unit's tiles."""
        del alpha
        return losses_of_function(tallies)

    def event(self, alpha: float) -> str:
        """What is bounded."""
        rule = rule_name(self.rule, self.num_classes)
        return f"The expected {self.name} of {rule} in a new image is at most {alpha:g}"


def _tally_kept(batch: Batch, rule: Rule, num_classes: int, rows: int) -> Tensor:
    """Wrong and kept pixels by row and threshold, and each row's candidates. ``(B, T)``."""
    count, steps = len(batch.labels), len(batch.grid)
    mask_filter = probe(rule, num_classes)
    row = torch.zeros_like(batch.labels)
    if rows > 1 and isinstance(mask_filter, Top):  # by class: no other rule is allowed
        (row,) = proposals(mask_filter, batch.logits)
    candidates = occurrences(flattened(row), flattened(batch.valid), rows)
    spans = _spans(batch, mask_filter, num_classes)
    if spans is None:
        labels = labels_at_each(batch, rule)
        per_step = torch.stack([_wrong_and_kept(batch, kept) for kept in labels], -1)
        return torch.cat((per_step.view(count, 2 * steps), candidates), 1)
    shape = (count, 2, rows, steps + 1)
    changes = torch.zeros(shape, dtype=torch.int64, device=batch.labels.device)
    size = rows * (steps + 1)
    for span in spans:
        wrong = batch.valid & (span.label != batch.labels)
        for part, where in enumerate((wrong, batch.valid)):
            for sign, index in ((1, span.start), (-1, span.end.maximum(span.start))):
                pixels = occurrences(flattened(row * (steps + 1) + index), flattened(where), size)
                changes[:, part] += sign * pixels.view(count, rows, steps + 1)
    counts = changes.cumsum(-1)[..., :-1].reshape(count, 2 * rows * steps)
    return torch.cat((counts, candidates), 1)


class _Span(NamedTuple):
    """A label and the thresholds at which a pixel keeps it, as positions. Each ``(B, *S)``."""

    label: Tensor
    start: Tensor
    end: Tensor


def _spans(
    batch: Batch, mask_filter: Callable[[Tensor], Tensor], num_classes: int
) -> list[_Span] | None:
    """What the filter keeps from which threshold to which; None if only running it can tell."""
    logits, score, grid = batch.logits, batch.score, batch.grid
    never = torch.full_like(batch.labels, len(grid))
    if isinstance(mask_filter, Top):
        (top,) = proposals(mask_filter, logits)
        return [_Span(top, first_reaching(grid, score.of_labels(logits, top)), never)]
    if not score.follows_logits or num_classes == 1:
        return None
    if isinstance(mask_filter, (AtMost, Singleton)):
        # The top class has the least score; the set outgrows k at that of the first too many.
        top, *following = proposals(mask_filter, logits)
        for one_too_many in following:
            never = first_reaching(grid, score.of_labels(logits, one_too_many))
        return [_Span(top, first_reaching(grid, score.of_labels(logits, top)), never)]
    if not isinstance(mask_filter, (Argmax, BackgroundPriority)):
        return None
    proposed = proposals(mask_filter, logits)
    # As these filters do it: what is proposed first wins as soon as its score is low enough.
    spans: list[_Span] = []
    end = never
    for label in proposed:
        start = first_reaching(grid, score.of_labels(logits, label))
        spans.append(_Span(label, start, end))
        end = end.minimum(start)
    return spans


def _wrong_and_kept(batch: Batch, kept: Tensor) -> Tensor:
    """Of one threshold's labels. int64 ``(B, 2)``."""
    chosen = batch.valid & (kept != batch.ignore_index)
    wrong = chosen & (kept.long() != batch.labels)
    return torch.stack((flattened(wrong).sum(1), flattened(chosen).sum(1)), 1)


def _kept(tallies: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Wrong ``(N, R, K)``, kept ``(N, R, K)`` and candidates ``(N, R)``, from their tallies."""
    counts, candidates = tallies[:, :-rows], tallies[:, -rows:]
    wrong, kept = counts.view(len(tallies), 2, rows, -1).double().unbind(1)
    return wrong, kept, candidates
