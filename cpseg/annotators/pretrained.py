"""What comes from a folder, a hub or onto a device, with one line where it does not."""

import importlib
from pathlib import Path
from typing import Any, cast

import torch

from cpseg import _checks
from cpseg.errors import FileError, InputError, MissingExtraError

__all__ = ["check_device", "import_transformers", "load_pretrained", "one_line"]


def import_transformers() -> Any:
    """The package (extra ``hf``)."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(
            "from_pretrained needs transformers: pip install 'cpseg[hf]'"
        ) from error


def load_pretrained(kind: Any, name: str | Path) -> Any:
    """What ``kind.from_pretrained`` finds in a folder or under a hub name.

    Args:
        kind: A class of transformers.
        name: The folder or hub name.

    Raises:
        FileError: There is none, or it is another kind of model.
    """
    if not isinstance(cast("object", name), (str, Path)):
        raise InputError(f"name must be a folder or hub name; got {_checks.kind_of(name)}")
    if Path(name).is_file():
        raise FileError(f"{name} must be a folder or reachable hub name; it is a file")
    try:
        return kind.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise FileError(
            f"{name} must be a folder or reachable hub name for {kind.__name__}; {one_line(error)}"
        ) from error


def check_device(device: torch.device | str) -> torch.device:
    """A device that is there.

    Args:
        device: Such as ``"cpu"`` or ``"cuda:1"``.

    Raises:
        InputError: torch knows no such device, or this machine has none.

    Examples:
        >>> check_device("cpu")
        device(type='cpu')
    """
    try:
        found = torch.device(device)
        torch.empty((), device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise InputError(
            f"device must be one that torch can use here; got {str(device)!r}: {one_line(error)}"
        ) from error
    return found


def one_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
