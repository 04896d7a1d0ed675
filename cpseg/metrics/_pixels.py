"""Pixels to counts per batch entry, in int64, without waiting for the device.

A *code* is a class plus one: 0 and ``C + 1`` stand for what lies below and above the classes, the
ignored label among them. Counting codes needs no mask.
"""

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.errors import InputError


def label_in_set(sets: Tensor, codes: Tensor) -> Tensor:
    """Whether each pixel's label is in its set; anything where the code is no class.

    Args:
        sets: Bool ``(B, C, *S)``.
        codes: Codes of the labels, ``(B, N)``.

    Returns:
        uint8 0 or 1, ``(B, N)``.
    """
    index = codes.sub(1).clamp_(0, sets.shape[1] - 1)[:, None]
    columns = sets.flatten(2) if sets.ndim > 2 else sets[..., None]  # gathers faster than in 2-D
    return columns.view(torch.uint8).gather(1, index)[:, 0]


def set_sizes(sets: Tensor) -> Tensor:
    """Classes in each set. int64 ``(B, *S)``."""
    sizes = torch.zeros((), dtype=torch.int64, device=sets.device)
    for few in torch.split(sets.view(torch.uint8), 255, 1):  # sums that uint8 holds, the fast way
        sizes = sizes + few.sum(1, dtype=torch.uint8).long()
    return sizes


def lines(values: Tensor) -> Tensor:
    """``(B, *S)`` as ``(B, N)``."""
    return values.flatten(1) if values.ndim > 1 else values[:, None]


def codes_of(values: Tensor, size: int) -> Tensor:
    """Codes of integers that should lie in ``[0, size)``. int64 ``(B, N)``."""
    return lines(values.long().clamp(-1, size).add_(1))


def ignored(values: Tensor, ignore_index: int) -> Tensor:
    """How many pixels of each batch entry are ignored. int64 ``(B,)``."""
    return lines(values.long() == ignore_index).sum(1)


def outside(codes: Tensor, size: int) -> Tensor:
    """Which codes stand for nothing in ``[0, size)``. Bool, shape of ``codes``."""
    return (codes == 0) | (codes == size + 1)


def tally(codes: Tensor, size: int, amount: Tensor | None = None) -> Tensor:
    """Per batch entry, how often each of ``0 .. size - 1`` occurs, or the sum of amounts there.

    Args:
        codes: int64 ``(B, N)``.
        size: Cells to count in.
        amount: int64 ``(B, N)``; None for 1 each.

    Returns:
        int64 ``(B, size)``.
    """
    counts = torch.zeros(len(codes), size, dtype=torch.int64, device=codes.device)
    return counts.scatter_add_(1, codes, torch.ones_like(codes) if amount is None else amount)


def confusion(
    predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, ...]:
    """Per batch entry and class: correct, predicted, labeled, abstained; then both faults."""
    _checks.check_integers("labels", labels)
    if labels.ndim < 1:
        raise InputError(f"labels must have shape (B, *S); got {_checks.describe(labels.shape)}")
    check_beside("predictions", predictions, labels)
    true, guess = codes_of(labels, num_classes), codes_of(predictions, num_classes)
    none = outside(guess, num_classes)
    # Wrong, right or no prediction, per label: a prediction outside equals no class.
    answer = (true == guess).view(torch.uint8) + 2 * none.view(torch.uint8)
    there = true * 4 + answer
    counts = tally(there, 4 * (num_classes + 2)).view(-1, num_classes + 2, 4)
    of_labels = counts.sum(2)
    predicted = tally(guess.mul_(~outside(true, num_classes)), num_classes + 2)
    return (
        counts[:, 1:-1, 1],
        predicted[:, 1:-1],
        of_labels[:, 1:-1],
        counts[:, 1:-1, 2],
        of_labels[:, 0] + of_labels[:, -1] - ignored(labels, ignore_index),
        none.sum(1) - ignored(predictions, ignore_index),
    )


def checked_classes(num_classes: int, ignore_index: int) -> tuple[int, int]:
    """Both as Python integers, the ignored label being no class."""
    classes = _checks.check_integer("num_classes", num_classes, 1)
    index = _checks.check_integer("ignore_index", ignore_index)
    _checks.check_ignore_index(index, classes)
    return classes, index


def class_rule(name: str, num_classes: int, ignore_index: int) -> str:
    """What labels and predictions must be."""
    return f"{name} must lie in [0, {num_classes}) or be {ignore_index}"


def check_sets(sets: Tensor) -> None:
    """Sets are bool, ``(B, C, *S)``."""
    _checks.check_tensor("sets", sets)
    if sets.dtype != torch.bool:
        raise InputError(f"sets must be a bool tensor; got {sets.dtype}")
    if sets.ndim < 2:
        raise InputError(f"sets must have shape (B, C, *S); got {_checks.describe(sets.shape)}")


def check_sets_and_labels(sets: Tensor, labels: Tensor, num_classes: int) -> None:
    """Sets of ``num_classes``, and labels that go with them."""
    check_sets(sets)
    if sets.shape[1] != num_classes:
        raise InputError(
            f"sets must have C = {num_classes} classes; got {sets.shape[1]} "
            f"in shape {_checks.describe(sets.shape)}"
        )
    shape = (sets.shape[0], *sets.shape[2:])
    _checks.check_map("labels", labels, shape, f"sets {_checks.describe(sets.shape)}")
    _checks.check_device("labels", labels, sets, "sets")


def check_beside(name: str, value: Tensor, labels: Tensor) -> None:
    """A map of integers in the shape of the labels."""
    beside = f"labels {_checks.describe(labels.shape)}"
    _checks.check_map(name, value, labels.shape, beside)
    _checks.check_device(name, value, labels, "labels")
