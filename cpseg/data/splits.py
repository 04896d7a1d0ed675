"""The image names of published splits, shipped with the package and checked whenever they are read."""

import json
import lzma
from base64 import b85decode
from difflib import get_close_matches
from hashlib import sha256
from importlib.resources import files
from typing import Any, Literal, cast

import numpy as np

from cpseg.errors import FileError, InputError

__all__ = ["check_part", "published_split", "published_splits"]


def published_splits(dataset: Literal["voc2012", "cityscapes", "coco"]) -> dict[str, int]:
    """The published splits of a data set, and how many images each has labels for.

    Names are those of the folders in UniMatch's ``splits`` (Yang et al., 2023), since a share
    does not say which images are meant: VOC's ``1_16`` and ``u2pl_1_16`` hold 662 images each,
    and not the same.

    Args:
        dataset: ``"voc2012"``, ``"cityscapes"`` or ``"coco"``.

    Examples:
        >>> published_splits("coco")
        {'1_512': 232, '1_256': 463, '1_128': 925, '1_64': 1849, '1_32': 3697}
    """
    splits: dict[str, dict[str, Any]] = _held(dataset)["splits"]
    return {name: int(split["images"]) for name, split in splits.items()}


def published_split(dataset: Literal["voc2012", "cityscapes", "coco"], split: str) -> list[str]:
    """The names of a split's labeled images, without folder and suffix, sorted.

    Args:
        dataset: ``"voc2012"``, ``"cityscapes"`` or ``"coco"``.
        split: See :func:`published_splits`.

    Raises:
        InputError: If there is no such split; the nearest name is given.
        FileError: If the shipped list is not the published one.

    Examples:
        >>> published_split("voc2012", "92")[:2]
        ['2007_000733', '2007_001960']
    """
    held = _held(dataset)
    splits = cast("dict[str, dict[str, str]]", held["splits"])
    if split not in splits:
        near = get_close_matches(split, splits, n=1, cutoff=0)
        raise InputError(
            f"split must be of {', '.join(splits)}; got {split!r}. Did you mean {near[0]!r}?"
        )
    names = _unpacked(held["names"]).decode().split("\n")
    chosen = np.unpackbits(np.frombuffer(_unpacked(splits[split]["bits"]), np.uint8))
    found = [name for name, there in zip(names, chosen[: len(names)], strict=True) if there]
    if sha256("\n".join(found).encode()).hexdigest() != splits[split]["sha256"]:
        raise FileError(
            f"the names of {dataset}'s split {split} must have SHA-256 {splits[split]['sha256']}; "
            "got another. Install cpseg anew"
        )
    return found


def check_part(part: str) -> None:
    """Refuse a part of a data set that is not one of the three."""
    if part not in ("labeled", "unlabeled", "validation"):
        raise InputError(f'part must be "labeled", "unlabeled" or "validation"; got {part!r}')


def _held(dataset: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        files("cpseg.data").joinpath("splits.json").read_text("utf-8")
    )
    known = [name for name, held in content.items() if isinstance(held, dict)]
    if dataset not in known:
        raise InputError(f"dataset must be of {', '.join(known)}; got {dataset!r}")
    return cast("dict[str, Any]", content[dataset])


def _unpacked(text: str) -> bytes:
    return lzma.decompress(b85decode(text))
