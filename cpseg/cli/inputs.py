"""Folders of logits and labels: what is there, what belongs together, and reading it.

A file's name is its path below the folder without the suffix. Logits are the files of a cache, or
``.npy`` and ``.npz`` arrays ``(C, *S)``; labels are PNG masks, or integer arrays ``(*S)``.
"""

import argparse
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, final
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from cpseg import _checks
from cpseg.annotators import CachedAnnotator
from cpseg.annotators.cache import FilteredAgain
from cpseg.annotators.folder import read_class_names
from cpseg.calibration import Calibration
from cpseg.data.folder import read_image, read_mask
from cpseg.errors import CpsegError, FileError, InputError
from cpseg.report import AnyFilter
from cpseg.scores import logits_from_probabilities

__all__ = [
    "Images",
    "Labels",
    "Logits",
    "add_logits_arguments",
    "add_names_arguments",
    "class_names",
    "matched",
    "selected",
    "unit_ids",
]

_SHOWN = 100
_UNNAMED = "an unnamed source of"
_PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def add_logits_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say where logits are, and what their files hold."""
    parser.add_argument(
        "--logits",
        type=Path,
        required=True,
        metavar="DIR",
        help="a cache that annotate made, or .npy and .npz files (C, H, W)",
    )
    parser.add_argument(
        "--values",
        choices=("logits", "probabilities"),
        help="what .npy and .npz files hold; a cache knows itself",
    )
    parser.add_argument("--key", metavar="NAME", help="array to read from .npz files with several")
    parser.add_argument(
        "--source",
        metavar="TEXT",
        help="what made the .npy and .npz files; a calibration remembers it, and refuses others",
    )


def add_names_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose images and name classes."""
    parser.add_argument(
        "--names", type=Path, metavar="FILE", help="use these images only: a name per line"
    )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="text file, a class per line, for the tables"
    )


@final
@dataclass(frozen=True, slots=True)
class Logits:
    """A folder of logits.

    Attributes:
        files: The file of each name.
        source: What made them; for unnamed arrays what they hold.
        values: What arrays hold.
        key: Which array of an ``.npz`` file.
        cache: The cache, if it is one.
    """

    files: Mapping[str, Path]
    source: str
    values: Literal["logits", "probabilities"]
    key: str | None
    cache: CachedAnnotator | None

    @classmethod
    def open(cls, given: argparse.Namespace) -> "Logits":
        """The folder that the command line names.

        Raises:
            FileError: If it holds no logits.
            InputError: If ``--values`` is missing, or not wanted.
        """
        root: Path = given.logits
        _check_folder(root, "--logits")
        if (root / "cache.json").exists():
            if given.values == "probabilities" or given.key or given.source:
                raise InputError(
                    f"--values, --key and --source must be left out for {root}: a cache of logits "
                    "knows what it holds"
                )
            cache = CachedAnnotator(root)
            return cls(_of_cache(root), cache.source, "logits", None, cache)
        files = _files(root, {".npy", ".npz"}, "logits")
        if given.values is None:
            raise InputError(
                f"--values must say what the files in {root} hold: logits or probabilities"
            )
        # Unnamed as they are, logits are no probabilities: one taken for the other is garbage.
        source = given.source or f"{_UNNAMED} {given.values}"
        return cls(files, source, given.values, given.key, None)

    def calibration(self, path: Path) -> Calibration:
        """What ``cpseg calibrate`` wrote, for these logits.

        Raises:
            FileError: If it is no calibration.
            InputError: If it was made from other logits.
        """
        try:
            loaded = Calibration.load(path)
        except OSError as error:
            raise FileError(
                f"{path} must be a calibration that cpseg calibrate wrote; {error.strerror}"
            ) from error
        made_from = loaded.source  # none if it was made in Python without one
        unnamed = self.source.startswith(_UNNAMED)
        if made_from != self.source and not (made_from is None and unnamed):
            raise InputError(
                f"the calibration must come from the logits it is used with; it was made from "
                f"{made_from or 'an unnamed source'}, these are from {self.source}"
                f"{' (is --values right? Name them with --source)' if unnamed else ''}"
            )
        return loaded

    def read(self, name: str) -> Tensor:
        """Logits of an image, ``(C, *S)``.

        Raises:
            FileError: If the file is damaged, or holds something else.
        """
        path = self.files[name]
        if self.cache is not None:
            return self.cache.read(path)
        array = _array(path, self.key)
        if array.dtype not in (np.float16, np.float32, np.float64) or array.ndim < 2:
            raise FileError(
                f"{path} must hold floats of shape (C, *S); "
                f"got {array.dtype} {_checks.describe(array.shape)}"
            )
        values = torch.from_numpy(array)
        if self.values == "logits":
            return values
        try:
            return logits_from_probabilities(values[None])[0]
        except InputError as error:
            raise FileError(f"{path}: {error}") from error

    def settled(self, name: str, keep: AnyFilter) -> FilteredAgain | None:
        """Labels of a compact cache, which abstain where a class that is not stored could decide.

        None where the filter's own answer to the logits stands: all classes are there, or the
        error of exactly that answer was controlled.
        """
        control = keep.calibration.control
        if self.cache is None or self.cache.best is None:
            return None
        if control is not None and control.rule is not None:
            return None
        return self.cache.filter_file(self.files[name], keep)


@final
@dataclass(frozen=True, slots=True)
class Labels:
    """A folder of labels.

    Attributes:
        files: The file of each name.
        ignore_index: Label of pixels that do not count.
    """

    files: Mapping[str, Path]
    ignore_index: int

    @classmethod
    def open(cls, root: Path, ignore_index: int) -> "Labels":
        """The PNG masks, or integer arrays, of a folder."""
        _check_folder(root, "--labels")
        return cls(_files(root, {".png", ".npy", ".npz"}, "labels"), ignore_index)

    def read(self, name: str, logits: Tensor) -> Tensor:
        """Labels of an image, ``(*S)``, to go with logits ``(C, *S)``.

        Raises:
            FileError: If the file is damaged, of another size, or holds what is no class.
        """
        path = self.files[name]
        labels = read_mask(path) if path.suffix == ".png" else _integers(path)
        if labels.shape != logits.shape[1:]:
            raise FileError(
                f"{path} must be of the size of its logits, {_checks.describe(logits.shape[1:])}; "
                f"got {_checks.describe(labels.shape)}. Logits are (C, *S), classes first; resize them, "
                "not the labels"
            )
        wrong = (labels != self.ignore_index) & ((labels < 0) | (labels >= len(logits)))
        if bool(wrong.any()):
            found = ", ".join(map(str, torch.unique(labels[wrong]).tolist()[:8]))
            raise FileError(
                f"{path} must hold classes in [0, {len(logits)}) or {self.ignore_index}; got "
                f"{found} at {int(wrong.sum())} pixels. Another value for void: --ignore-index"
            )
        return labels


@final
@dataclass(frozen=True, slots=True)
class Images:
    """A folder of pictures.

    Attributes:
        files: The file of each name.
    """

    files: Mapping[str, Path]

    @classmethod
    def open(cls, root: Path) -> "Images":
        """The pictures of a folder."""
        _check_folder(root, "--images")
        return cls(_files(root, _PICTURES, "images"))

    def read(self, name: str) -> Tensor:
        """Red, green, blue, uint8 ``(3, H, W)``."""
        return read_image(self.files[name])


def selected(available: Iterable[str], only: Path | None, what: str) -> list[str]:
    """Names in order: all, or those that a file lists.

    Raises:
        FileError: If the list is empty, or names what is not there; all such names are told.
    """
    there = sorted(available)
    if only is None:
        return there
    wanted = [line.strip() for line in only.read_text("utf-8").splitlines() if line.strip()]
    if not wanted:
        raise FileError(f"{only} must list names, one per line; it lists none")
    missing = sorted(set(wanted) - set(there))
    if missing:
        raise FileError(
            f"{only} must list names that have {what}; these have none: {_all(missing)}"
        )
    return sorted(set(wanted))


def matched(logits: Logits, labels: Labels, only: Path | None) -> list[str]:
    """Names with logits and labels, in order.

    Raises:
        FileError: If any has only one of the two; all of them are told.
    """
    if only is not None:
        return selected(set(logits.files) & set(labels.files), only, "both logits and labels")
    alone = sorted(set(logits.files) - set(labels.files))
    bare = sorted(set(labels.files) - set(logits.files))
    if alone or bare:
        parts = [
            f"{len(names)} with {one} but no {other}: {_all(names)}"
            for names, one, other in ((alone, "logits", "labels"), (bare, "labels", "logits"))
            if names
        ]
        raise FileError(
            f"logits and labels must belong together by name; got {'; and '.join(parts)}. "
            "List those to use in a file: --names"
        )
    return sorted(logits.files)


def unit_ids(path: Path, names: Sequence[str]) -> dict[str, int]:
    """The unit of each name: a number for each text in the second column.

    Args:
        path: A CSV file, ``name,unit``; a first line of just these words is passed over.
        names: Every one must be in it.

    Raises:
        FileError: If it is no such file, or a name is missing or twice there with two units.
    """
    units: dict[str, str] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if not row or (number == 1 and row == ["name", "unit"]):
                continue
            if len(row) != 2:
                raise FileError(f"{path} must have two columns, name,unit; line {number} has not")
            name, unit = row[0].strip(), row[1].strip()
            if units.setdefault(name, unit) != unit:
                raise FileError(f"{path} must give each name one unit; got two for {name}")
    missing = [name for name in names if name not in units]
    if missing:
        raise FileError(f"{path} must give a unit for every image; got none for {_all(missing)}")
    numbers = {unit: number for number, unit in enumerate(sorted(set(units.values())))}
    return {name: numbers[units[name]] for name in names}


def class_names(path: Path | None, num_classes: int) -> list[str]:
    """The name of each class, from a file of one per line; their numbers without one.

    Raises:
        FileError: If there are more or fewer.
    """
    if path is None:
        return [str(index) for index in range(num_classes)]
    names = list(read_class_names(path))
    if len(names) != num_classes:
        raise FileError(f"{path} must name the {num_classes} classes; it names {len(names)}")
    return names


def _check_folder(root: Path, argument: str) -> None:
    if not root.is_dir():
        raise FileError(f"{argument} must be a folder; {root} is none")


def _files(root: Path, suffixes: set[str], what: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in suffixes and path.is_file():
            name = path.relative_to(root).with_suffix("").as_posix()
            if name in found:
                raise FileError(f"{root} must hold one file per name; got {found[name]} and {path}")
            found[name] = path
    if not found:
        raise FileError(f"{root} must hold {what} ({', '.join(sorted(suffixes))}); it holds none")
    return found


def _of_cache(root: Path) -> dict[str, Path]:
    path = root / "images.json"
    try:
        listed = cast("dict[str, str]", json.loads(path.read_text("utf-8")))
    except FileNotFoundError as error:
        raise FileError(
            f"{path} must say which file is whose; got none. cpseg annotate writes it at its end"
        ) from error
    except ValueError as error:
        raise FileError(f"{path} is damaged: {error}") from error
    found: dict[str, Path] = {}
    for image, file in sorted(listed.items()):
        name = Path(image).with_suffix("").as_posix()
        if name in found:
            raise FileError(f"{path} must hold one image per name; got two that are {name}")
        found[name] = root / file
    return found


def _array(path: Path, key: str | None) -> "np.ndarray[Any, Any]":
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            array: Any = loaded
        else:
            with loaded:
                if key is None and len(loaded.files) != 1:
                    raise FileError(
                        f"{path} must hold one array, or --key must name one; "
                        f"it holds {', '.join(loaded.files) or 'none'}"
                    )
                if key is not None and key not in loaded.files:
                    raise FileError(
                        f"{path} must hold the array {key} that --key names; "
                        f"it holds {', '.join(loaded.files) or 'none'}"
                    )
                array = loaded[key or loaded.files[0]]
    except CpsegError:
        raise
    except (ValueError, EOFError, BadZipFile, OSError) as error:
        raise FileError(f"{path} must be a sound {path.suffix} file; {error}") from error
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return cast("np.ndarray[Any, Any]", np.ascontiguousarray(native))


def _integers(path: Path) -> Tensor:
    array = _array(path, None)
    if array.dtype.kind not in "iu":
        raise FileError(f"{path} must hold integers; got {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))


def _all(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
