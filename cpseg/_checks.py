"""Argument checks on metadata: shapes, dtypes, numbers. Nothing here reads a tensor's values.

Values are checked where they are used, without waiting for a device: see
:class:`cpseg.calibrators.SplitCalibrator`.
"""

import operator
from collections.abc import Iterable, Sequence
from math import inf
from numbers import Real
from typing import SupportsFloat, SupportsIndex, cast

import torch
from torch import Tensor

from cpseg.errors import InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def describe(shape: Sequence[int]) -> str:
    """A shape as text."""
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def kind_of(value: object) -> str:
    """What a value of the wrong kind is, for a message."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_tensor(name: str, value: object) -> None:
    """Refuse what is no tensor, or one that is no plain array."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a torch tensor; got {kind_of(value)}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise InputError(f"{name} must be a dense tensor; got {layout}")


def check_data(name: str, value: Tensor) -> None:
    """Refuse a tensor of which only the metadata exist."""
    if value.is_meta:
        raise InputError(f"{name} must hold data; got a tensor on the device meta, which has none")


def check_logits(logits: Tensor, num_classes: int | None = None, name: str = "logits") -> None:
    """Logits are ``(B, C, *S)``, floating, with ``C >= 1`` (and ``C == num_classes`` if given)."""
    check_tensor(name, logits)
    if logits.ndim < 2:
        raise InputError(f"{name} must have shape (B, C, *S); got {describe(logits.shape)}")
    if logits.dtype not in FLOATS:
        raise InputError(
            f"{name} must be float16, bfloat16, float32 or float64; got {logits.dtype}"
        )
    if logits.shape[1] < 1:
        raise InputError(f"{name} must have C >= 1 classes; got {describe(logits.shape)}")
    if num_classes is not None and logits.shape[1] != num_classes:
        raise InputError(
            f"{name} must have C = {num_classes} classes; got {logits.shape[1]} "
            f"in shape {describe(logits.shape)}"
        )


def check_integers(name: str, value: Tensor) -> None:
    """Refuse what is no integer tensor; bool is none."""
    check_tensor(name, value)
    if value.dtype not in INTEGERS:
        wide = value.dtype in (torch.uint16, torch.uint32, torch.uint64)
        remedy = ". torch can hardly compute with it: pass .long()" if wide else ""
        raise InputError(f"{name} must be an integer tensor; got {value.dtype}{remedy}")


def check_map(name: str, value: Tensor, shape: Sequence[int], beside: str) -> None:
    """An integer map of exactly ``shape``, said to go with ``beside``."""
    check_integers(name, value)
    check_map_shape(name, value, shape, beside)


def check_map_shape(name: str, value: Tensor, shape: Sequence[int], beside: str) -> None:
    """A tensor of exactly ``shape``, said to go with ``beside``."""
    if tuple(value.shape) != tuple(shape):
        raise InputError(
            f"{name} must have shape {describe(shape)} to go with {beside}; "
            f"got {describe(value.shape)}"
        )


def check_device(name: str, value: Tensor, like: Tensor, beside: str) -> None:
    """Two tensors that meet must live on one device."""
    if value.device != like.device:
        raise InputError(
            f"{name} must be on the device of {beside} ({like.device}); got {value.device}"
        )


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Labels are integers of shape ``(B, *S)`` beside logits ``(B, C, *S)``."""
    shape = (logits.shape[0], *logits.shape[2:])
    check_map("labels", labels, shape, f"logits {describe(logits.shape)}")
    check_device("labels", labels, logits, "logits")


def check_groups(groups: Tensor, logits: Tensor) -> None:
    """Groups are integers for the grid, ``(*S)``, or for the batch, ``(B, *S)``."""
    check_integers("groups", groups)
    batch, _, *space = logits.shape
    if tuple(groups.shape) not in (tuple(space), (batch, *space)):
        raise InputError(
            f"groups must have shape {describe(space)} or {describe((batch, *space))} "
            f"to go with logits {describe(logits.shape)}; got {describe(groups.shape)}"
        )
    check_device("groups", groups, logits, "logits")


def check_integer(name: str, value: object, minimum: int | None = None) -> int:
    """An integer, numpy's too, of at least ``minimum`` if given; bool is none. As Python's int."""
    rule = "be an integer" if minimum is None else f"be an integer >= {minimum}"
    if isinstance(value, bool | Tensor) or not isinstance(value, SupportsIndex):
        raise InputError(f"{name} must {rule}; got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:  # an array of more than one
        raise InputError(f"{name} must {rule}; got {kind_of(value)}") from None
    if minimum is not None and number < minimum:
        raise InputError(f"{name} must {rule}; got {number}")
    return number


def check_ids(name: str, ids: Iterable[int] | Tensor) -> list[int]:
    """Unit ids as Python integers; a tensor must be on the CPU, so that nothing waits."""
    if isinstance(ids, Tensor):
        check_integers(name, ids)
        if ids.ndim != 1 or ids.device.type != "cpu":
            raise InputError(
                f"{name} must have one axis and be on the CPU; "
                f"got {describe(ids.shape)} on {ids.device}"
            )
        return cast("list[int]", ids.tolist())
    if isinstance(ids, str | bytes) or not isinstance(cast("object", ids), Iterable):
        raise InputError(f"{name} must be several integers, or a tensor of them; got {ids!r}")
    listed = [check_integer(name, unit) for unit in ids]
    for unit in listed:
        if not -(2**63) <= unit < 2**63:
            raise InputError(f"{name} must fit in int64; got {unit}")
    return listed


def check_shape(name: str, value: object) -> tuple[int, ...]:
    """Sizes of a grid, one integer >= 1 per spatial axis."""
    if isinstance(value, str | Tensor) or not isinstance(value, Iterable):
        raise InputError(f"{name} must hold one size per spatial axis, as (8, 8); got {value!r}")
    return tuple(check_integer(name, size, 1) for size in cast("Iterable[object]", value))


def is_number(value: object) -> bool:
    """Whether this is a real number: Python's, numpy's or a fraction; bool and tensors are none."""
    return not isinstance(value, bool) and isinstance(value, Real)


def check_flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False; got {value!r}")


def check_weight(name: str, value: object) -> float:
    """A finite number of at least zero, as Python's float."""
    if not is_number(value) or not 0 <= float(cast("SupportsFloat", value)) < inf:
        raise InputError(f"{name} must be finite and >= 0; got {value!r}")
    return float(cast("SupportsFloat", value))


def check_ignore_index(ignore_index: int, num_classes: int | None) -> None:
    """The ignored label must not be a class, and some integer tensor must be able to hold it."""
    check_integer("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise InputError(f"ignore_index must fit in int64; got {ignore_index}")
    if num_classes is not None and 0 <= ignore_index < num_classes:
        raise InputError(
            f"ignore_index must lie outside the classes [0, {num_classes}); got {ignore_index}"
        )


def check_alpha(alpha: object, name: str = "alpha") -> None:
    """A level strictly between 0 and 1."""
    if not is_number(alpha) or not 0 < float(cast("SupportsFloat", alpha)) < 1:
        told = kind_of(alpha) if isinstance(alpha, type | Tensor) else repr(alpha)
        raise InputError(f"{name} must lie strictly between 0 and 1; got {told}")


def check_alphas(alpha: object) -> None:
    """A sequence of levels."""
    if not isinstance(alpha, Sequence) or isinstance(alpha, str | bytes):
        told = repr(alpha) if isinstance(alpha, str | bytes) else kind_of(alpha)
        remedy = ". Pass its tolist()" if hasattr(alpha, "tolist") else ""
        raise InputError(f"alpha must be one number or one per class; got {told}{remedy}")
    for value in cast("Sequence[object]", alpha):
        check_alpha(value)


def check_score(score: object) -> None:
    """A nonconformity score, with the parts that :class:`cpseg.protocols.Score` names."""
    if isinstance(score, type):
        raise InputError(
            f"score must be an object; got the class {score.__name__}. Make one: {score.__name__}()"
        )
    parts = ("__call__", "of_labels", "range", "tolerance", "follows_logits")
    missing = [part for part in parts if not hasattr(score, part)]
    if missing:
        raise InputError(
            f"score must have all that cpseg.protocols.Score names; got {type(score).__name__} "
            f"without {', '.join(missing)}"
        )
