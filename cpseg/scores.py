"""Nonconformity scores: how badly a class fits a pixel, from the logits. Lower fits better.

Every score has two views. ``score(logits)`` scores all classes; ``score.of_labels(logits,
labels)`` scores each pixel's label and never sorts. Both are written on *columns*, a ``(C, N)``
block of pixels, and share what they can: the softmax is one expression, and a class's rank comes
from comparing logits, never probabilities, so that it is the same number however it is computed.
Equal logits rank by class index.

A pixel without a finite log-sum-exp (NaN, +inf, or nothing but -inf) scores NaN for every class.

Randomised scores use one draw per pixel, shared by its classes: a hash of the seed and of the
pixel's position in ``*S``. It does not depend on batch, order or device, and the global random
state is not touched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import final, overload

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.errors import InputError

__all__ = [
    "APS",
    "LAC",
    "RAPS",
    "SAPS",
    "Margin",
    "TopK",
    "logits_from_probabilities",
    "logits_from_sigmoid",
]

_ULP = 2.0**-24  # half a float32 step at 1: what one rounding can cost a number below 1


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
        return _all_classes(self._all, logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        return _of_labels(self._label, logits, labels)

    def range(self, num_classes: int) -> tuple[float, float]:
        """All scores lie in ``[0, 1]``."""
        del num_classes
        return 0.0, 1.0

    def tolerance(self, num_classes: int) -> float:
        """Two sums of C exponentials, each within C roundings of the exact one, and a quotient."""
        return _softmax_tolerance(num_classes)

    def _all(self, x: Tensor, _: Tensor) -> Tensor:
        odds, total = _softmax(x)
        return 1 - odds / total

    def _label(self, x: Tensor, _: Tensor, labels: Tensor) -> Tensor:
        odds, total = _softmax(x)
        return 1 - _at(odds, labels) / total


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
        _checks.check_integer("seed", self.seed)

    @property
    def follows_logits(self) -> bool:
        """A larger logit never scores higher."""
        return True

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of all classes. Shape ``(B, C, *S)``."""
        return _all_classes(self._all, logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        return _of_labels(self._label, logits, labels)

    def range(self, num_classes: int) -> tuple[float, float]:
        """All scores lie in ``[0, 1]``."""
        del num_classes
        return 0.0, 1.0

    def tolerance(self, num_classes: int) -> float:
        """As for :class:`LAC`, and once more for the order in which the top classes are added."""
        return 2 * _softmax_tolerance(num_classes)

    def _all(self, x: Tensor, position: Tensor) -> Tensor:
        odds, total = _softmax(x)
        order, _ = _order(x)
        cumulative = _cumulative(odds, order)
        return _adaptive(cumulative, odds, total, _draws(self, position, odds))

    def _label(self, x: Tensor, position: Tensor, labels: Tensor) -> Tensor:
        odds, total = _softmax(x)
        cumulative = (odds * _at_least(x, labels)).sum(0)
        return _adaptive(cumulative, _at(odds, labels), total, _draws(self, position, odds))


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
        _checks.check_weight("penalty", self.penalty)
        _checks.check_integer("k_reg", self.k_reg, 0)
        _checks.check_integer("seed", self.seed)

    @property
    def follows_logits(self) -> bool:
        """A larger logit never scores higher."""
        return True

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of all classes. Shape ``(B, C, *S)``."""
        return _all_classes(self._all, logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        return _of_labels(self._label, logits, labels)

    def range(self, num_classes: int) -> tuple[float, float]:
        """From 0 to 1 plus the penalty of the last rank."""
        return 0.0, _outward(1.0 + self.penalty * max(num_classes - self.k_reg, 0))

    def tolerance(self, num_classes: int) -> float:
        """As for :class:`APS`, and one rounding of a number as large as the range."""
        return 2 * _softmax_tolerance(num_classes) + 2 * _ULP * self.range(num_classes)[1]

    def _all(self, x: Tensor, position: Tensor) -> Tensor:
        odds, total = _softmax(x)
        order, rank = _order(x)
        cumulative = _cumulative(odds, order)
        return _adaptive(cumulative, odds, total, _draws(self, position, odds)) + self._cost(rank)

    def _label(self, x: Tensor, position: Tensor, labels: Tensor) -> Tensor:
        odds, total = _softmax(x)
        ahead = _at_least(x, labels)
        own, cumulative = _at(odds, labels), (odds * ahead).sum(0)
        score = _adaptive(cumulative, own, total, _draws(self, position, odds))
        return score + self._cost(ahead.sum(0))

    def _cost(self, rank: Tensor) -> Tensor:
        return self.penalty * (rank - self.k_reg).clamp(min=0)


@final
@dataclass(frozen=True, slots=True)
class SAPS:
    """The top probability plus ``weight`` per rank (Huang et al., 2024).

    With rank 1 for the most likely class, of probability ``top``: ``top + weight * (rank - 1)``;
    randomised with a draw ``u``: ``top * (1 - u)`` at rank 1, else ``top + weight * (rank - 1 -
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
        _checks.check_weight("weight", self.weight)
        _checks.check_integer("seed", self.seed)

    @property
    def follows_logits(self) -> bool:
        """A larger logit never scores higher."""
        return True

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of all classes. Shape ``(B, C, *S)``."""
        return _all_classes(self._all, logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        return _of_labels(self._label, logits, labels)

    def range(self, num_classes: int) -> tuple[float, float]:
        """From 0 to 1 plus the weight of the last rank."""
        return 0.0, _outward(1.0 + self.weight * (num_classes - 1))

    def tolerance(self, num_classes: int) -> float:
        """As for :class:`LAC`, and one rounding of a number as large as the range."""
        return _softmax_tolerance(num_classes) + 2 * _ULP * self.range(num_classes)[1]

    def _all(self, x: Tensor, position: Tensor) -> Tensor:
        _, total = _softmax(x)
        _, rank = _order(x)
        return self._score(rank, 1 / total, position)

    def _label(self, x: Tensor, position: Tensor, labels: Tensor) -> Tensor:
        _, total = _softmax(x)
        return self._score(_at_least(x, labels).sum(0), 1 / total, position)

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
        return _all_classes(self._all, logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        return _of_labels(self._label, logits, labels)

    def range(self, num_classes: int) -> tuple[float, float]:
        """All scores lie in ``[-1, 1]``."""
        del num_classes
        return -1.0, 1.0

    def tolerance(self, num_classes: int) -> float:
        """As for :class:`LAC`, twice: a difference of two probabilities."""
        return 2 * _softmax_tolerance(num_classes)

    def _all(self, x: Tensor, _: Tensor) -> Tensor:
        odds, total = _softmax(x)
        top = x.argmax(0, keepdim=True)
        second = odds.scatter(0, top, 0.0).amax(0)  # 0 where there is no other class
        first = odds.amax(0)
        is_top = torch.arange(x.shape[0], device=x.device)[:, None] == top
        return (torch.where(is_top, second, first) - odds) / total

    def _label(self, x: Tensor, _: Tensor, labels: Tensor) -> Tensor:
        odds, total = _softmax(x)
        rival = odds.scatter(0, labels[None], 0.0).amax(0)
        return (rival - _at(odds, labels)) / total


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
        _checks.check_integer("seed", self.seed)

    @property
    def follows_logits(self) -> bool:
        """A larger logit never scores higher."""
        return True

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of all classes. Shape ``(B, C, *S)``."""
        return _all_classes(self._all, logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        return _of_labels(self._label, logits, labels)

    def range(self, num_classes: int) -> tuple[float, float]:
        """From 0 (reached only when randomised) to the number of classes."""
        return 0.0, float(num_classes)

    def tolerance(self, num_classes: int) -> float:
        """None without draws, as ranks are the same numbers in every path; else one rounding."""
        return 2 * _ULP * num_classes if self.randomized else 0.0

    def _all(self, x: Tensor, position: Tensor) -> Tensor:
        _, rank = _order(x)
        return self._score(x, rank, position)

    def _label(self, x: Tensor, position: Tensor, labels: Tensor) -> Tensor:
        return self._score(x, _at_least(x, labels).sum(0), position)

    def _score(self, x: Tensor, rank: Tensor, position: Tensor) -> Tensor:
        score = rank.to(x.dtype)
        if self.randomized:
            score = score - uniform(self.seed, position).to(x.dtype)
        return torch.where(x.amax(0).isfinite(), score, torch.nan)


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
    p = _upcast(probabilities)
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


def uniform(seed: int, position: Tensor) -> Tensor:
    """One draw in (0, 1) per position: the same number on every device, in any order.

    Args:
        seed: Any integer.
        position: int64 positions, non-negative.

    Returns:
        float32 draws, odd multiples of ``2**-24``. Shape of ``position``.

    Examples:
        >>> bool((uniform(0, torch.arange(9)) == uniform(0, torch.arange(9))).all())
        True
    """
    low = _mix((position & _WORD) ^ _mix_key(seed & _WORD))
    mixed = _mix(low ^ (position >> 32) ^ _mix_key((seed >> 32) & _WORD ^ 0x9E3779B9))
    return ((mixed >> 9) * 2 + 1).to(torch.float32) * 2.0**-24


_WORD = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    # A 32-bit finaliser (xor, shift, multiply) in int64: products wrap, their low word is right.
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _WORD
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _WORD
    return h ^ (h >> 16)


def _mix_key(h: int) -> int:
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _WORD
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _WORD
    return h ^ (h >> 16)


# --- columns: x is (C, N), labels (N,) -----------------------------------------------------------


def _softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """``exp(x - max)`` and its sum: probabilities are their quotient. NaN where x is unusable."""
    odds = (x - x.amax(0)).exp()
    return odds, odds.sum(0)


def _softmax_tolerance(num_classes: int) -> float:
    return (2 * num_classes + 16) * _ULP


def _at(values: Tensor, labels: Tensor) -> Tensor:
    return values.gather(0, labels[None])[0]


def _at_least(x: Tensor, labels: Tensor) -> Tensor:
    """The classes that rank no later than the label, itself included. Bool ``(C, N)``."""
    own = _at(x, labels)
    earlier = torch.arange(x.shape[0], device=x.device)[:, None] <= labels
    return (x > own) | ((x == own) & earlier)


def _order(x: Tensor) -> tuple[Tensor, Tensor]:
    """Classes from the largest logit down, equal ones by index, and each one's rank from 1."""
    order = x.argsort(dim=0, descending=True, stable=True)
    places = torch.arange(1, x.shape[0] + 1, device=x.device)[:, None].expand_as(order)
    return order, torch.empty_like(order).scatter(0, order, places)


def _cumulative(odds: Tensor, order: Tensor) -> Tensor:
    """Odds of the classes that rank no later than each class. ``(C, N)``."""
    return torch.empty_like(odds).scatter(0, order, odds.gather(0, order).cumsum(0))


def _draws(score: APS | RAPS, position: Tensor, like: Tensor) -> Tensor | None:
    return uniform(score.seed, position).to(like.dtype) if score.randomized else None


def _adaptive(cumulative: Tensor, own: Tensor, total: Tensor, draw: Tensor | None) -> Tensor:
    kept = cumulative if draw is None else cumulative - draw * own
    return (kept / total).clamp(max=1.0)


# --- from (B, C, *S) to columns and back ---------------------------------------------------------

_AllColumns = Callable[[Tensor, Tensor], Tensor]
_LabelColumns = Callable[[Tensor, Tensor, Tensor], Tensor]

_TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**28}  # a core's cache; a good share of a small GPU


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _all_classes(columns: _AllColumns, logits: Tensor) -> Tensor:
    _checks.check_logits(logits)
    return _walk(columns, logits)


def _of_labels(columns: _LabelColumns, logits: Tensor, labels: Tensor) -> Tensor:
    _checks.check_logits(logits)
    _checks.check_labels(labels, logits)
    labels = labels.long()
    known = (labels >= 0) & (labels < logits.shape[1])
    return _walk(columns, logits, labels * known).masked_fill(~known, torch.nan)


@overload
def _walk(columns: _AllColumns, logits: Tensor) -> Tensor: ...
@overload
def _walk(columns: _LabelColumns, logits: Tensor, labels: Tensor) -> Tensor: ...
def _walk(
    columns: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    """Run ``columns`` over all pixels, a cache-sized tile at a time.

    A tile is contiguous and a multiple of 32 wide: only then does a sum over its first axis add
    in the same order in every column. So a score is the same number, to the bit, whatever the
    batch size, the strides, the other pixels and the cut into batches.
    """
    batch, classes, *space = logits.shape
    size = prod(space)
    if torch.compiler.is_compiling():
        x = _upcast(logits).movedim(1, 0).reshape(classes, -1)
        position = torch.arange(size, device=logits.device).repeat(batch)
        if labels is None:
            return columns(x, position).reshape(classes, batch, *space).movedim(0, 1)
        return columns(x, position, labels.reshape(-1)).reshape(batch, *space)

    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = (batch, classes, size) if labels is None else (batch, size)
    result = torch.empty(shape, dtype=dtype, device=logits.device)
    width = max(_TILE_ELEMENTS.get(logits.device.type, 2**18) // classes // 32 * 32, 32)
    images, pixels = max(width // max(size, 1), 1), max(min(size, width), 1)
    for i in range(0, batch, images):
        block = logits[i : i + images].flatten(2) if space else logits[i : i + images, :, None]
        near = None if labels is None else labels[i : i + images].reshape(block.shape[0], size)
        for j in range(0, size, pixels):
            part = block[:, :, j : j + pixels]
            b, _, n = part.shape
            padded = -(-b * n // 32) * 32
            x = torch.zeros((classes, padded), dtype=dtype, device=logits.device)
            x[:, : b * n].view(classes, b, n).copy_(part.transpose(0, 1))
            position = torch.arange(padded, device=logits.device) % n + j
            if near is None:
                scores = columns(x, position)[:, : b * n].view(classes, b, n)
                result[i : i + b, :, j : j + n] = scores.transpose(0, 1)
            else:
                label = torch.zeros(padded, dtype=torch.int64, device=logits.device)
                label[: b * n].view(b, n).copy_(near[:, j : j + n])
                result[i : i + b, j : j + n] = columns(x, position, label)[: b * n].view(b, n)
    return result.view(logits.shape if labels is None else (batch, *space))


# --- parameters ----------------------------------------------------------------------------------


def _outward(bound: float) -> float:
    """A bound with room for the rounding of the scores below it."""
    return bound * (1 + 4 * _ULP)
