"""Argument checks on metadata: shapes, dtypes, numbers. Nothing here reads a tensor's values.

Values are checked where they are used, without waiting for a device: see
:class:`cpseg.calibrators.SplitCalibrator`.
"""

from collections.abc import Sequence
from math import inf
from typing import cast

import torch
from torch import Tensor

from cpseg.errors import InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def describe(shape: Sequence[int]) -> str:
    """A shape as text."""
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def check_tensor(name: str, value: object) -> None:
    """Refuse what is no tensor."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a torch tensor; got {type(value).__name__}")


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
        raise InputError(f"{name} must be an integer tensor; got {value.dtype}")


def check_map(name: str, value: Tensor, shape: Sequence[int], beside: str) -> None:
    """An integer map of exactly ``shape``, said to go with ``beside``."""
    check_integers(name, value)
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


def check_integer(name: str, value: object, minimum: int | None = None) -> None:
    """An integer, of at least ``minimum`` if given; bool is none."""
    rule = "be an integer" if minimum is None else f"be an integer >= {minimum}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name} must {rule}; got {value!r}")
    if minimum is not None and value < minimum:
        raise InputError(f"{name} must {rule}; got {value}")


def check_weight(name: str, value: object) -> None:
    """A finite number of at least zero."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < inf:
        raise InputError(f"{name} must be finite and >= 0; got {value!r}")


def check_ignore_index(ignore_index: int, num_classes: int | None) -> None:
    """The ignored label must not be a class."""
    check_integer("ignore_index", ignore_index)
    if num_classes is not None and 0 <= ignore_index < num_classes:
        raise InputError(
            f"ignore_index must lie outside the classes [0, {num_classes}); got {ignore_index}"
        )


def check_alpha(alpha: object, name: str = "alpha") -> None:
    """A level strictly between 0 and 1."""
    if not isinstance(alpha, (float, int)) or isinstance(alpha, bool) or not 0 < alpha < 1:
        raise InputError(f"{name} must lie strictly between 0 and 1; got {alpha!r}")


def check_alphas(alpha: object) -> None:
    """A sequence of levels."""
    if not isinstance(alpha, Sequence):
        raise InputError(f"alpha must be one number or one per class; got {type(alpha).__name__}")
    for value in cast("Sequence[object]", alpha):
        check_alpha(value)
