"""What runs over the classes of a block ``(C, N)``, in parts.

A part is some neighboring classes, ``(K, N)``. Eager, a block is one part. In a kernel of few
classes each class is a part of its own: all of a pixel's classes are then at hand at once, so that
the logits are read once, and nothing between logits and result is written to memory. A kernel of
many classes, which would compile for minutes that way, takes the block as one part again.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

__all__ = [
    "Parts",
    "aligned",
    "any_class",
    "at_class",
    "best_of",
    "class_index",
    "first_class",
    "first_equal",
    "holds",
    "how_many",
    "in_parts",
    "joined",
    "largest",
    "num_classes",
    "of_class",
    "summed",
    "top_class",
]

Parts = Sequence[Tensor]
"""The classes of a block in order, ``(K, N)`` each."""


def in_parts(x: Tensor | Parts) -> Parts:
    """A block as parts: a tensor ``(C, N)`` is one."""
    return (x,) if isinstance(x, Tensor) else x


def num_classes(parts: Parts) -> int:
    """C."""
    return sum(len(part) for part in parts)


def aligned(values: Tensor, parts: Parts) -> Parts:
    """Something else of the same classes, ``(C, N)``, in the same parts."""
    return torch.split(values, [len(part) for part in parts])


def joined(parts: Parts) -> Tensor:
    """Parts as one block ``(C, N)``."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def class_index(parts: Parts) -> Parts:
    """The class of each row, int32 ``(K, 1)``."""
    classes = torch.arange(num_classes(parts), dtype=torch.int32, device=parts[0].device)
    return aligned(classes[:, None], parts)


def of_class(parts: Parts, index: int) -> Tensor:
    """One class's row. ``(N,)``."""
    for part in parts:
        if index < len(part):
            return part[index]
        index -= len(part)
    raise IndexError(index)


def holds(compare: Callable[..., Tensor], part: Tensor, other: Tensor) -> Tensor:
    """A comparison such as ``torch.gt``: bool, of the shape and as elementwise as ``part``."""
    if torch.compiler.is_compiling():
        return compare(part, other)
    # It is vectorized where its result has the type of what it compares, and 4 times as slow else.
    return compare(part, other, out=torch.empty_like(part)).bool()


def largest(parts: Parts) -> Tensor:
    """The largest value over classes, NaN if there is one. ``(N,)``."""
    return reduce(torch.maximum, [part.amax(0) for part in parts])


def summed(parts: Parts) -> Tensor:
    """The sum over classes. ``(N,)``."""
    return reduce(torch.add, [part.sum(0) for part in parts])


def how_many(masks: Parts) -> Tensor:
    """How many classes are marked. Bool to int32 ``(N,)``."""
    return reduce(torch.add, [mask.sum(0, dtype=torch.int32) for mask in masks])


def at_class(values: Parts, labels: Tensor) -> Tensor:
    """Each pixel's value of its label, int64 in ``[0, C)``. ``(N,)``.

    Values may be ``(K, 1)``, the same for all pixels.
    """
    if not torch.compiler.is_compiling():
        return joined(values).expand(-1, len(labels)).gather(0, labels[None])[0]
    # In a kernel, a sum over classes is vectorized and an index is not.
    narrow = labels.int()
    own = [index == narrow for index in class_index(values)]
    if values[0].dtype == torch.bool:
        return any_class([mask & part for mask, part in zip(own, values, strict=True)])
    return summed([torch.where(mask, part, 0) for mask, part in zip(own, values, strict=True)])


def first_class(masks: Parts) -> Tensor:
    """The first class that is marked, 0 where none is. Bool to integers ``(N,)``.

    What ``argmax(0)`` does, an order of magnitude faster: along an axis that is not the last,
    torch vectorizes a maximum but not its index.
    """
    classes = num_classes(masks)
    if torch.compiler.is_compiling():
        indices = class_index(masks)
        marked = zip(masks, indices, strict=True)
        firsts = [torch.where(mask, index, classes).amin(0) for mask, index in marked]
        first = reduce(torch.minimum, firsts)
        return torch.where(first < classes, first, 0)
    dtype = torch.uint8 if classes <= 255 else torch.int32
    mask = joined(masks)
    countdown = torch.arange(classes, 0, -1, dtype=dtype, device=mask.device)
    left = (mask * countdown[:, None]).amax(0).long()
    return (classes - left) * (left > 0)


def any_class(masks: Parts) -> Tensor:
    """Whether any class is marked. Bool to bool ``(N,)``.

    As :func:`first_class`, in the form that is vectorized: floats in a kernel, bytes without.
    """
    if torch.compiler.is_compiling():
        return largest([torch.where(mask, 1.0, 0.0) for mask in masks]) > 0
    return largest([mask.view(torch.uint8) for mask in masks]) > 0


def top_class(parts: Parts) -> Tensor:
    """The class with the largest logit, the first of equals; 0 where a logit is NaN. ``(N,)``."""
    return first_equal(parts, largest(parts))


def first_equal(parts: Parts, values: Tensor) -> Tensor:
    """The first class of that value, 0 where there is none. ``(N,)``."""
    return first_class([holds(torch.eq, part, values) for part in parts])


def best_of(parts: Parts, choice: Parts) -> Tensor:
    """The class with the largest logit among those chosen, the first of equals; 0 where none is.

    Args:
        parts: Logits.
        choice: Bool, in the same parts; may broadcast to them.
    """
    pairs = list(zip(parts, choice, strict=True))
    best = largest([torch.where(chosen, part, -torch.inf) for part, chosen in pairs])
    # A choice may have logit -inf, and must still win.
    return first_class([holds(torch.eq, part, best) & chosen for part, chosen in pairs])
