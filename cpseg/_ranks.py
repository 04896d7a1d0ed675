"""Which classes of a pixel rank no later than one: by comparing logits, equal ones by index.

Few classes are compared in pairs, many are sorted; for one label there is nothing to sort.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cpseg._classes import Parts, at_class, class_index

__all__ = ["at_least", "cumulative_odds", "ranks"]


def at_least(parts: Parts, labels: Tensor) -> Parts:
    """The classes that rank no later than the label, itself included: true, or ones and zeros."""
    own, narrow = at_class(parts, labels), labels.int()
    pairs = zip(parts, class_index(parts), strict=True)
    if torch.compiler.is_compiling():
        return [(part > own) | ((part == own) & (index <= narrow)) for part, index in pairs]
    return [_at_least_in_place(part, own, index, narrow) for part, index in pairs]


def _at_least_in_place(part: Tensor, own: Tensor, index: Tensor, narrow: Tensor) -> Tensor:
    """As :func:`cpseg._classes.holds` compares; bools would add and multiply no faster."""
    dtype = part.dtype
    ahead = torch.eq(part, own, out=torch.empty_like(part))
    ahead *= torch.le(index.to(dtype), narrow.to(dtype), out=torch.empty_like(part))
    return ahead.add_(torch.gt(part, own, out=torch.empty_like(part)))


def cumulative_odds(x: Tensor, odds: Tensor) -> Tensor:
    """Of each class: the odds of those that rank no later, added up. ``(C, N)``."""
    if torch.compiler.is_compiling() and len(x) <= _FUSED_PAIRS:
        pairs = [torch.where(mask, odds, 0.0).sum(0) for mask in _pairs(x)]
    elif len(x) <= _PAIRS:
        pairs = [mask.mul_(odds).sum(0) for mask in _pairs_in_place(x)]
    else:
        order = _order(x)
        sums = odds.t().gather(1, order).cumsum(1)
        return torch.empty_like(sums).scatter(1, order, sums).t()
    return torch.stack(pairs)


def ranks(x: Tensor) -> Tensor:
    """Of each class: how many rank no later, itself included. ``(C, N)``, in the dtype of x."""
    if torch.compiler.is_compiling() and len(x) <= _FUSED_PAIRS:
        return torch.stack([torch.where(mask, 1.0, 0.0).sum(0) for mask in _pairs(x)]).to(x.dtype)
    if len(x) <= _PAIRS:
        return torch.stack([mask.sum(0) for mask in _pairs_in_place(x)])
    order = _order(x)
    places = torch.arange(1, len(x) + 1, device=x.device, dtype=x.dtype).expand(order.shape)
    return torch.empty_like(places).scatter(1, order, places).t()


# Classes up to which all pairs are compared sooner than a pixel's classes are sorted.
_FUSED_PAIRS = 32
_PAIRS = 64


def _pairs(x: Tensor) -> Iterator[Tensor]:
    """For each class, those that rank no later than it, itself included. Bool ``(C, N)``."""
    for c, own in enumerate(x.unbind()):
        yield (x > own) | ((x == own) & (class_index((x,))[0] <= c))


def _pairs_in_place(x: Tensor) -> Iterator[Tensor]:
    """As :func:`_pairs`, as ones and zeros, all in the same memory."""
    mask = torch.empty_like(x)
    for c, own in enumerate(x):
        torch.ge(x[:c], own, out=mask[:c])
        mask[c] = 1
        torch.gt(x[c + 1 :], own, out=mask[c + 1 :])
        yield mask


def _order(x: Tensor) -> Tensor:
    """Classes from the largest logit down, equal ones by index. int64 ``(N, C)``."""
    return x.t().contiguous().argsort(dim=1, descending=True, stable=True)
