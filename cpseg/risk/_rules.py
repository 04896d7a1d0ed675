"""A filter rule, run at thresholds that promise nothing, and named for the record."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from cpseg.calibration import Calibration
from cpseg.errors import InputError
from cpseg.filters import Argmax, AtMost, BackgroundPriority, Singleton, Top, rule_of
from cpseg.protocols import Score
from cpseg.risk.losses import Batch, Rule
from cpseg.scores import LAC


def labels_at_each(batch: Batch, rule: Rule) -> list[Tensor]:
    """A rule's labels at each threshold, by running its filter; the score is computed once."""
    classes = batch.logits.shape[1]
    score = _Scored(batch.score, batch.logits, batch.score(batch.logits))
    return [
        rule(trial(limit.view(1), (), score, classes, batch.ignore_index))(batch.logits)
        for limit in batch.grid
    ]


@final
@dataclass(frozen=True, eq=False, slots=True)
class _Scored:
    """A score that remembers the scores of one batch of logits."""

    score: Score
    logits: Tensor
    scores: Tensor

    @property
    def follows_logits(self) -> bool:
        return self.score.follows_logits

    def __call__(self, logits: Tensor) -> Tensor:
        return self.scores if logits is self.logits else self.score(logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.score.of_labels(logits, labels)

    def range(self, num_classes: int) -> tuple[float, float] | None:
        return self.score.range(num_classes)

    def tolerance(self, num_classes: int) -> float:
        return self.score.tolerance(num_classes)


def trial(
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


def probe(rule: Rule, num_classes: int) -> Callable[[Tensor], Tensor]:
    """The filter that a rule makes."""
    return rule(trial(torch.zeros(1), (), LAC(), num_classes, -1))


def rule_name(rule: Rule, num_classes: int) -> str:
    mask_filter = probe(rule, num_classes)
    if isinstance(mask_filter, (Argmax, Top, BackgroundPriority, AtMost, Singleton)):
        if mask_filter.guard is not None and mask_filter.guard.action == "abstain":
            raise InputError('rule must not have a guard with action "abstain"')
        return rule_of(mask_filter)
    return f"{type(mask_filter).__module__}.{type(mask_filter).__qualname__}"
