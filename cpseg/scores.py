"""Nonconformity scores: how badly a class fits a pixel, from the logits. Lower fits better.

Every score has two views. ``score(logits)`` scores all classes; ``score.of_labels(logits,
labels)`` scores each pixel's label and never sorts. Both are written on *columns*, a ``(C, N)``
block of pixels, and share what they can: the softmax is one expression, and a class's rank comes
from comparing logits, never probabilities, so that it is the same number however it is computed.
Equal logits rank by class index.

A pixel without a finite log-sum-exp (NaN, +inf, or nothing but -inf) scores NaN for every class.

Randomized scores use one draw per pixel, shared by its classes: a hash of the seed and of the
pixel's position in ``*S``. It does not depend on batch, order or device, and the global random
state is not touched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from cpseg import _checks
from cpseg._classes import (
    Parts,
    aligned,
    at_class,
    class_index,
    how_many,
    in_parts,
    joined,
    largest,
    num_classes,
    summed,
    top_class,
)
from cpseg._draws import uniform
from cpseg._odds import ULP, odds_at, odds_of, softmax_tolerance
from cpseg._ranks import at_least, cumulative_odds, ranks
from cpseg._tiles import Columns, upcast, walk, whole
from cpseg.errors import InputError
from cpseg.protocols import Score

__all__ = [
    "APS",
    "LAC",
    "RAPS",
    "SAPS",
    "ColumnScore",
    "Margin",
    "TopK",
    "logits_from_probabilities",
    "logits_from_sigmoid",
]


@final
@dataclass(frozen=True, slots=True)
class LAC:
    """One minus the class's probability (Sadinle et al., 2019). The smallest sets on average.

    Examples:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> LAC()(logits), LAC().of_labels(logits, torch.tensor([1]))
        (tensor([[0.5000, 0.5000]]), tensor([0.5000]))
    """

    @property
    def follows_logits(self) -> bool:
        """A larger logit never scores higher."""
        return True

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of all classes. Shape ``(B, C, *S)``."""
        return all_scores(self, logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        return label_scores(self, logits, labels)

    def range(self, num_classes: int) -> tuple[float, float]:
        """All scores lie in ``[0, 1]``."""
        del num_classes
        return 0.0, 1.0

    def tolerance(self, num_classes: int) -> float:
        """By how much two ways to add up C exponentials, and a quotient, can differ.

        A sum of C numbers is C - 1 roundings. The argument ``-d`` of an exponential has two, worth
        ``2 * d`` roundings of it; weighed by probabilities that is at most ``2 * log(C)``. With
        a dozen for the rest, twice that is no more than ``3 * C + 16``.
        """
        return softmax_tolerance(num_classes)

    def columns(self, x: Tensor | Parts, position: Tensor, /) -> Tensor:
        """Scores of all classes of a block ``(C, N)``; see :class:`ColumnScore`."""
        return joined(self.parts(x, position))

    def parts(self, x: Tensor | Parts, position: Tensor, /) -> Parts:
        """As :meth:`columns`, in the parts of the block."""
        del position
        odds, total = odds_of(in_parts(x))
        rest = 1 / total  # one division for all classes; at most 1, as the largest odds are
        return [1 - part * rest for part in odds]

    def label_columns(self, x: Tensor | Parts, position: Tensor, labels: Tensor, /) -> Tensor:
        """Scores of labels ``(N,)`` in a block; see :class:`ColumnScore`."""
        del position
        own, _, total = odds_at(in_parts(x), labels)
        return 1 - own * (1 / total)  # as above, to the bit


@final
@dataclass(frozen=True, slots=True)
class APS:
    """Probability of the classes at least as likely (Romano et al., 2020). Adaptive sets.

    Attributes:
        randomized: Subtract a uniform share of the class's own probability.
        seed: Seed of the draws; calibrate and predict with the same.

    Examples:
        >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> APS()(logits)
        tensor([[0.5000, 0.7500, 1.0000]])
    """

    randomized: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _settle(self)

    @property
    def follows_logits(self) -> bool:
        """A larger logit never scores higher."""
        return True

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of all classes. Shape ``(B, C, *S)``."""
        return all_scores(self, logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        return label_scores(self, logits, labels)

    def range(self, num_classes: int) -> tuple[float, float]:
        """All scores lie in ``[0, 1]``."""
        del num_classes
        return 0.0, 1.0

    def tolerance(self, num_classes: int) -> float:
        """As for :class:`LAC`, and once more for the order in which the top classes are added."""
        return 2 * softmax_tolerance(num_classes)

    def columns(self, x: Tensor | Parts, position: Tensor, /) -> Tensor:
        """Scores of all classes of a block ``(C, N)``; see :class:`ColumnScore`."""
        x = joined(in_parts(x))
        (odds,), total = odds_of((x,))
        cumulative = cumulative_odds(x, odds)
        return _adaptive(cumulative, odds, total, _draws(self, position, odds))

    def label_columns(self, x: Tensor | Parts, position: Tensor, labels: Tensor, /) -> Tensor:
        """Scores of labels ``(N,)`` in a block; see :class:`ColumnScore`."""
        parts = in_parts(x)
        own, odds, total = odds_at(parts, labels)
        cumulative = _sum_where(at_least(parts, labels), odds)
        return _adaptive(cumulative, own, total, _draws(self, position, own))


@final
@dataclass(frozen=True, slots=True)
class RAPS:
    """:class:`APS` plus a penalty on ranks beyond ``k_reg`` (Angelopoulos et al., 2021).

    The penalty is ``penalty * max(rank - k_reg, 0)``, the most likely class having rank 1. Choose
    ``penalty`` and ``k_reg`` on data that is not used for calibration.

    Attributes:
        penalty: Added per rank beyond ``k_reg``.
        k_reg: Ranks that cost nothing.
        randomized: Subtract a uniform share of the class's own probability.
        seed: Seed of the draws; calibrate and predict with the same.

    Examples:
        >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> RAPS(penalty=0.5, k_reg=1)(logits)
        tensor([[0.5000, 1.2500, 2.0000]])
    """

    penalty: float = 0.01
    k_reg: int = 5
    randomized: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "penalty", _checks.check_weight("penalty", self.penalty))
        object.__setattr__(self, "k_reg", _checks.check_integer("k_reg", self.k_reg, 0))
        _settle(self)

    @property
    def follows_logits(self) -> bool:
        """A larger logit never scores higher."""
        return True

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of all classes. Shape ``(B, C, *S)``."""
        return all_scores(self, logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        return label_scores(self, logits, labels)

    def range(self, num_classes: int) -> tuple[float, float]:
        """From 0 to 1 plus the penalty of the last rank."""
        return 0.0, _outward(1.0 + self.penalty * max(num_classes - self.k_reg, 0))

    def tolerance(self, num_classes: int) -> float:
        """As for :class:`APS`, and one rounding of a number as large as the range."""
        return 2 * softmax_tolerance(num_classes) + 2 * ULP * self.range(num_classes)[1]

    def columns(self, x: Tensor | Parts, position: Tensor, /) -> Tensor:
        """Scores of all classes of a block ``(C, N)``; see :class:`ColumnScore`."""
        x = joined(in_parts(x))
        (odds,), total = odds_of((x,))
        cumulative, rank = cumulative_odds(x, odds), ranks(x)
        return _adaptive(cumulative, odds, total, _draws(self, position, odds)) + self._cost(rank)

    def label_columns(self, x: Tensor | Parts, position: Tensor, labels: Tensor, /) -> Tensor:
        """Scores of labels ``(N,)`` in a block; see :class:`ColumnScore`."""
        parts = in_parts(x)
        own, odds, total = odds_at(parts, labels)
        ahead = at_least(parts, labels)
        cumulative = _sum_where(ahead, odds)
        score = _adaptive(cumulative, own, total, _draws(self, position, own))
        return score + self._cost(how_many(ahead).to(score.dtype))

    def _cost(self, rank: Tensor) -> Tensor:
        return self.penalty * (rank - self.k_reg).clamp(min=0)


@final
@dataclass(frozen=True, slots=True)
class SAPS:
    """The top probability plus ``weight`` per rank (Huang et al., 2024).

    With rank 1 for the most likely class, of probability ``top``: ``top + weight * (rank - 1)``;
    randomized with a draw ``u``: ``top * (1 - u)`` at rank 1, else ``top + weight * (rank - 1 -
    u)``. Choose ``weight`` on data that is not used for calibration.

    Attributes:
        weight: Added per rank.
        randomized: Smooth the steps with a draw per pixel.
        seed: Seed of the draws; calibrate and predict with the same.

    Examples:
        >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> SAPS(weight=0.25)(logits)
        tensor([[0.5000, 0.7500, 1.0000]])
    """

    weight: float = 0.2
    randomized: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", _checks.check_weight("weight", self.weight))
        _settle(self)

    @property
    def follows_logits(self) -> bool:
        """A larger logit never scores higher."""
        return True

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of all classes. Shape ``(B, C, *S)``."""
        return all_scores(self, logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        return label_scores(self, logits, labels)

    def range(self, num_classes: int) -> tuple[float, float]:
        """From 0 to 1 plus the weight of the last rank."""
        return 0.0, _outward(1.0 + self.weight * (num_classes - 1))

    def tolerance(self, num_classes: int) -> float:
        """As for :class:`LAC`, and one rounding of a number as large as the range."""
        return softmax_tolerance(num_classes) + 2 * ULP * self.range(num_classes)[1]

    def columns(self, x: Tensor | Parts, position: Tensor, /) -> Tensor:
        """Scores of all classes of a block ``(C, N)``; see :class:`ColumnScore`."""
        x = joined(in_parts(x))
        _, total = odds_of((x,))
        rank = ranks(x)
        return self._score(rank, 1 / total, position)

    def label_columns(self, x: Tensor | Parts, position: Tensor, labels: Tensor, /) -> Tensor:
        """Scores of labels ``(N,)`` in a block; see :class:`ColumnScore`."""
        parts = in_parts(x)
        _, total = odds_of(parts)
        rank = how_many(at_least(parts, labels)).to(total.dtype)
        return self._score(rank, 1 / total, position)

    def _score(self, rank: Tensor, top: Tensor, position: Tensor) -> Tensor:
        if not self.randomized:
            return top + self.weight * (rank - 1)
        draw = uniform(self.seed, position).to(top.dtype)
        beyond = top + self.weight * (rank - 1 - draw)
        return torch.where(rank == 1, top * (1 - draw), beyond)


@final
@dataclass(frozen=True, slots=True)
class Margin:
    """The best rival's probability minus the class's own: negative for the most likely class.

    Examples:
        >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> Margin()(logits)
        tensor([[-0.2500,  0.2500,  0.2500]])
    """

    @property
    def follows_logits(self) -> bool:
        """A larger logit never scores higher."""
        return True

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of all classes. Shape ``(B, C, *S)``."""
        return all_scores(self, logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        return label_scores(self, logits, labels)

    def range(self, num_classes: int) -> tuple[float, float]:
        """All scores lie in ``[-1, 1]``."""
        del num_classes
        return -1.0, 1.0

    def tolerance(self, num_classes: int) -> float:
        """As for :class:`LAC`, twice: a difference of two probabilities."""
        return 2 * softmax_tolerance(num_classes)

    def columns(self, x: Tensor | Parts, position: Tensor, /) -> Tensor:
        """Scores of all classes of a block ``(C, N)``; see :class:`ColumnScore`."""
        del position
        x = joined(in_parts(x))
        (odds,), total = odds_of((x,))
        is_top = class_index((x,))[0] == top_class((x,)).int()
        second = torch.where(is_top, 0.0, odds).amax(0)  # 0 where there is no other class
        return (torch.where(is_top, second, odds.amax(0)) - odds) / total

    def label_columns(self, x: Tensor | Parts, position: Tensor, labels: Tensor, /) -> Tensor:
        """Scores of labels ``(N,)`` in a block; see :class:`ColumnScore`."""
        del position
        odds, total = odds_of(in_parts(x))
        narrow, pairs = labels.int(), zip(class_index(odds), odds, strict=True)
        rival = largest([torch.where(index == narrow, 0.0, part) for index, part in pairs])
        return (rival - at_class(odds, labels)) / total


@final
@dataclass(frozen=True, slots=True)
class TopK:
    """The rank of the class, 1 for the most likely: the sets are the k best, one k for all.

    Attributes:
        randomized: Subtract a draw per pixel, which makes the k fractional.
        seed: Seed of the draws; calibrate and predict with the same.

    Examples:
        >>> TopK()(torch.tensor([[0.5, 0.25, 2.0]]))
        tensor([[2., 3., 1.]])
    """

    randomized: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _settle(self)

    @property
    def follows_logits(self) -> bool:
        """A larger logit never scores higher."""
        return True

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of all classes. Shape ``(B, C, *S)``."""
        return all_scores(self, logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        return label_scores(self, logits, labels)

    def range(self, num_classes: int) -> tuple[float, float]:
        """From 0 (reached only when randomized) to the number of classes."""
        return 0.0, float(num_classes)

    def tolerance(self, num_classes: int) -> float:
        """None without draws, as ranks are the same numbers in every path; else one rounding."""
        return 2 * ULP * num_classes if self.randomized else 0.0

    def columns(self, x: Tensor | Parts, position: Tensor, /) -> Tensor:
        """Scores of all classes of a block ``(C, N)``; see :class:`ColumnScore`."""
        x = joined(in_parts(x))
        return self._score(x, ranks(x), position)

    def label_columns(self, x: Tensor | Parts, position: Tensor, labels: Tensor, /) -> Tensor:
        """Scores of labels ``(N,)`` in a block; see :class:`ColumnScore`."""
        return self._score(x, how_many(at_least(in_parts(x), labels)), position)

    def _score(self, x: Tensor | Parts, rank: Tensor, position: Tensor) -> Tensor:
        most = largest(in_parts(x))
        score = rank.to(most.dtype)
        if self.randomized:
            score = score - uniform(self.seed, position).to(most.dtype)
        return torch.where(most.isfinite(), score, torch.nan)


def logits_from_probabilities(probabilities: Tensor) -> Tensor:
    """Logits whose softmax is ``probabilities``: their logarithm.

    Args:
        probabilities: Finite, non-negative, summing to 1 over axis 1 (within 1e-3; 2e-2 in half
            precision). Shape ``(B, C, *S)``.

    Returns:
        Logits, ``-inf`` where a probability is 0, at least float32. Shape ``(B, C, *S)``.

    Raises:
        InputError: If a value is negative or not finite, or a row does not sum to 1.

    Examples:
        >>> logits_from_probabilities(torch.tensor([[1.0, 0.0]]))
        tensor([[0., -inf]])
    """
    _checks.check_logits(probabilities, name="probabilities")
    p = upcast(probabilities)
    if not bool((p.isfinite() & (p >= 0)).all()):
        wrong = int((~(p.isfinite() & (p >= 0))).sum())
        raise InputError(
            f"probabilities must be finite and >= 0; got {wrong} values that are not. "
            "Values of any sign are logits already: pass them as they are"
        )
    slack = 2e-2 if probabilities.dtype in (torch.float16, torch.bfloat16) else 1e-3
    off = (p.sum(1) - 1).abs()
    if off.numel() and float(off.max()) > slack:
        raise InputError(
            f"probabilities must sum to 1 over classes (axis 1) within {slack}; "
            f"got a row that is off by {float(off.max()):.3g}. "
            "For sigmoid channels use logits_from_sigmoid"
        )
    return p.log()


def logits_from_sigmoid(channels: Tensor) -> Tensor:
    """Two-class logits of sigmoid channels: each channel is a binary problem of its own.

    Class 1 is "the channel is on". One channel, ``(B, 1, *S)``, gives ``(B, 2, *S)``.
    Overlapping channels (multi-label) give ``(B * C, 2, *S)``: bring the 0/1 labels there with
    ``labels.flatten(0, 1)``, repeat ``unit_ids`` for each channel of an image, and pass the
    channel as ``groups`` of a :class:`cpseg.GroupCalibrator`.

    Args:
        channels: Values before the sigmoid. Shape ``(B, C, *S)``.

    Returns:
        Logits ``(0, value)``. Shape ``(B * C, 2, *S)``.

    Examples:
        >>> logits_from_sigmoid(torch.tensor([[3.0, -1.0]]))
        tensor([[ 0.,  3.],
                [ 0., -1.]])
    """
    _checks.check_logits(channels, name="channels")
    on = channels.flatten(0, 1)
    return torch.stack((torch.zeros_like(on), on), dim=1)


# --- columns: x is (C, N), labels (N,) -----------------------------------------------------------


def scores_in_parts(score: "ColumnScore", x: Parts, position: Tensor) -> Parts:
    """Scores of all classes of a block, in its parts."""
    if isinstance(score, LAC):
        return score.parts(x, position)
    return aligned(score.columns(joined(x), position), x)


def label_scores_in_parts(
    score: "ColumnScore", x: Parts, position: Tensor, labels: Tensor
) -> Tensor:
    """Scores of labels, int64 in ``[0, C)``, of a block in parts. ``(N,)``."""
    if isinstance(score, (LAC, APS, RAPS, SAPS, Margin, TopK)):
        return score.label_columns(x, position, labels)
    return score.label_columns(joined(x), position, labels)


def _sum_where(masks: Parts, values: Parts) -> Tensor:
    return summed([part * mask for part, mask in zip(values, masks, strict=True)])


def _settle(score: APS | RAPS | SAPS | TopK) -> None:
    """Check what randomized scores share; a seed of numpy's becomes Python's."""
    _checks.check_flag("randomized", score.randomized)
    object.__setattr__(score, "seed", _checks.check_integer("seed", score.seed))


def _draws(score: APS | RAPS, position: Tensor, like: Tensor) -> Tensor | None:
    return uniform(score.seed, position).to(like.dtype) if score.randomized else None


def _adaptive(cumulative: Tensor, own: Tensor, total: Tensor, draw: Tensor | None) -> Tensor:
    kept = cumulative if draw is None else cumulative - draw * own
    return (kept / total).clamp(max=1.0)


# --- from (B, C, *S) to columns and back ---------------------------------------------------------


@runtime_checkable
class ColumnScore(Protocol):
    """A score that is computed pixel by pixel, on columns, as those of this module are.

    Sets and pseudo-labels of such a score are made in one pass over the logits. A score of your
    own needs nothing of this; without it, its scores of all classes exist beside the logits.
    """

    def columns(self, x: Tensor, position: Tensor, /) -> Tensor:
        """Scores of all classes.

        Args:
            x: Logits of a block of pixels, float32 or float64. Shape ``(C, N)``.
            position: Of the pixels in ``*S``, int64 ``(N,)``.

        Returns:
            Scores, each column from its own column alone. Shape ``(C, N)``.
        """
        ...

    def label_columns(self, x: Tensor, position: Tensor, labels: Tensor, /) -> Tensor:
        """Scores of the labels, int64 in ``[0, C)``. Shape ``(N,)``, as ``labels``."""
        ...


@dataclass(frozen=True, slots=True)
class _All:
    score: ColumnScore

    def __call__(self, x: Parts, position: Tensor, /, *_: Tensor) -> tuple[Tensor, ...]:
        return (joined(scores_in_parts(self.score, x, position)),)


@dataclass(frozen=True, slots=True)
class _Labels:
    score: ColumnScore

    def __call__(self, x: Parts, position: Tensor, /, *beside: Tensor) -> tuple[Tensor, ...]:
        (labels,) = beside
        known = (labels >= 0) & (labels < num_classes(x))
        scores = label_scores_in_parts(self.score, x, position, labels * known)
        return (torch.where(known, scores, torch.nan),)


def score_columns(
    build: Callable[[ColumnScore], Columns],
    score: Score,
    logits: Tensor,
    near: Sequence[Tensor] = (),
    fixed: Sequence[Tensor] = (),
    *,
    summed: bool = False,
    compiled: bool = False,
) -> tuple[Tensor, ...]:
    """Run ``build(score)`` over a batch, as :func:`cpseg._tiles.walk` does.

    A score that is no :class:`ColumnScore` sees whole images, a part of the batch at a time.
    """
    if isinstance(score, ColumnScore):
        return walk(build(score), logits, near, fixed, summed=summed, compiled=compiled)
    step = max(_PART_ELEMENTS.get(logits.device.type, 2**20) // max(logits[:1].numel(), 1), 1)
    parts = []
    with torch.inference_mode(mode=False), torch.no_grad():
        for start in range(0, max(len(logits), 1), step):
            some = slice(start, start + step)
            beside = [rows if len(rows) == 1 < len(logits) else rows[some] for rows in near]
            columns = build(_OfImages(score, logits[some]))
            parts.append(whole(columns, logits[some], beside, fixed, summed=summed))
    made = list(zip(*parts, strict=True))
    return tuple(
        torch.cat(pieces) if pieces[0].ndim else torch.stack(pieces).sum() for pieces in made
    )


_PART_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # worth the calls, and small beside a batch


@dataclass(frozen=True, eq=False, slots=True)
class _OfImages:
    """A score of images, on columns: those of all pixels of one part of a batch."""

    score: Score
    logits: Tensor

    def columns(self, x: Tensor, position: Tensor, /) -> Tensor:
        del position
        made = self.score(self.logits)
        _check_made("score", made, self.logits.shape)
        return made.movedim(1, 0).reshape(x.shape)

    def label_columns(self, x: Tensor, position: Tensor, labels: Tensor, /) -> Tensor:
        del x, position
        shape = (len(self.logits), *self.logits.shape[2:])
        made = self.score.of_labels(self.logits, labels.view(shape))
        _check_made("score.of_labels", made, shape)
        return made.reshape(-1)


def _check_made(name: str, made: Tensor, shape: Sequence[int]) -> None:
    if tuple(made.shape) != tuple(shape) or made.dtype not in _checks.FLOATS:
        raise InputError(
            f"{name} must give floats of shape {_checks.describe(shape)}; "
            f"got {made.dtype} {_checks.describe(made.shape)}"
        )


def all_scores(score: ColumnScore, logits: Tensor) -> Tensor:
    """Scores of all classes. Logits and result ``(B, C, *S)``."""
    _checks.check_logits(logits)
    return walk(_All(score), logits)[0]


def label_scores(score: ColumnScore, logits: Tensor, labels: Tensor) -> Tensor:
    """The labels' scores, NaN where a label is no class. ``(B, *S)``."""
    _checks.check_logits(logits)
    _checks.check_labels(labels, logits)
    return walk(_Labels(score), logits, (labels,))[0]


# --- parameters ----------------------------------------------------------------------------------


def _outward(bound: float) -> float:
    """A bound with room for the rounding of the scores below it."""
    return bound * (1 + 4 * ULP)
