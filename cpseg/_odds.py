"""A block's softmax, as odds: exponentials beside the largest one, and their sum.

Probabilities are their quotient, and nothing of their size need exist. NaN where a pixel has no
finite log-sum-exp.
"""

from torch import Tensor

from cpseg._classes import Parts, at_class, largest, summed

__all__ = ["POSSIBLE", "ULP", "odds_at", "odds_of", "odds_to", "softmax_tolerance"]

ULP = 2.0**-24  # half a float32 step at 1: what one rounding can cost a number below 1

POSSIBLE = 1e-30  # the least of what is not to round to 0, because 0 says that it is ruled out


def odds_of(parts: Parts) -> tuple[Parts, Tensor]:
    """``exp(x - max)`` and its sum: probabilities are their quotient. NaN where x is unusable."""
    _, odds, total = _from_largest(parts)
    return odds, total


def _from_largest(parts: Parts) -> tuple[Tensor, Parts, Tensor]:
    """The largest logit, and what :func:`odds_of` gives."""
    most = largest(parts)
    odds = [odds_to(most, part) for part in parts]
    return most, odds, summed(odds)


def odds_at(parts: Parts, labels: Tensor) -> tuple[Tensor, Parts, Tensor]:
    """The label's odds, and those of :func:`odds_of`."""
    most, odds, total = _from_largest(parts)
    return odds_to(most, at_class(parts, labels)), odds, total


def odds_to(most: Tensor, logits: Tensor) -> Tensor:
    """``exp(logits - most)``, of logits that are no larger than ``most``.

    By way of ``exp2``, which torch vectorizes itself: for ``exp`` it asks a library that takes
    three times as long on some processors.
    """
    return (logits - most).mul_(_LOG2_E).exp2_()


_LOG2_E = 1.4426950408889634


def softmax_tolerance(num_classes: int) -> float:
    """By how much two ways to a probability can differ; why so is told by :class:`cpseg.LAC`."""
    return (3 * num_classes + 16) * ULP
