"""Training's state in a file that is always whole.

A file is written beside its place, flushed to the disk and moved there, so that a process killed
at any moment leaves the old state or the new one. Reading runs no code from the file.
"""

import os
import random
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cpseg.errors import FileError

__all__ = [
    "load_checkpoint",
    "random_state",
    "save_checkpoint",
    "seed_everything",
    "set_random_state",
]

_FORMAT = "cpseg checkpoint"
_VERSION = 1


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, object]) -> None:
    """Write ``state`` to ``path``, whole or not at all.

    Args:
        path: Where; an existing file is replaced.
        state: Tensors, numbers, strings, and lists, tuples and dicts of those.
    """
    place = Path(path)
    beside = place.with_name(place.name + ".part")
    with beside.open("wb") as file:
        torch.save({**state, "format": _FORMAT, "version": _VERSION}, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(place)
    if os.name == "posix":  # the move itself must reach the disk
        folder = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state in ``path``, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        FileError: If it is damaged, something else, or of another version.
    """
    try:
        state: object = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise FileError(f"{path} is not a cpseg checkpoint, or is damaged: {reason}") from error
    if not isinstance(state, dict) or cast("dict[str, Any]", state).get("format") != _FORMAT:
        raise FileError(f"{path} is not a cpseg checkpoint")
    known = cast("dict[str, Any]", state)
    if known["version"] != _VERSION:
        raise FileError(
            f"{path} has version {known['version']}; this cpseg reads version {_VERSION}"
        )
    return known


def random_state(device: torch.device) -> dict[str, object]:
    """This process's global random state: torch, the device's, NumPy, Python."""
    kind, keys, position, has_gauss, gauss = cast(
        "tuple[str, Any, int, int, float]",
        np.random.get_state(),  # noqa: NPY002 - a student or a dataset may draw from it
    )
    version, words, spare = random.getstate()
    state: dict[str, object] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(words), spare],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def seed_everything(seed: int) -> None:
    """Start the global random states of torch, NumPy and Python anew.

    Args:
        seed: At least 0.
    """
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - as above
    random.seed(seed)


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what :func:`random_state` returned."""
    torch.set_rng_state(cast("Tensor", state["torch"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state(  # noqa: NPY002 - as above
        (kind, keys.numpy().astype(np.uint32), *rest)
    )
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(cast("Tensor", state["cuda"]), device)
