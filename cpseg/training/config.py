"""A training run as a JSON file: every key is checked before anything starts.

.. code-block:: json

    {
      "recipe": {"name": "conformal_sam", "num_classes": 21, "external_steps": 30000,
                 "self_steps": 10000, "crop": [512, 512]},
      "train": {"lr": 0.001, "labeled_batch": 4, "evaluate_every": 1000, "save_every": 1000},
      "student": {"width": 32},
      "labeled": {"root": "VOC2012", "split": "labeled.txt"},
      "unlabeled": {"root": "VOC2012", "split": "filtered.txt"},
      "validation": {"root": "VOC2012", "split": "val.txt"},
      "directory": "runs/first"
    }

``recipe`` names a function of :mod:`cpseg.training.recipes` and gives its arguments; ``train``
replaces fields of the :class:`~cpseg.training.trainer.TrainConfig` that comes back; ``student``
gives the arguments of :class:`~cpseg.training.students.UNet`; data sets are read by
:meth:`SegmentationFolder.from_split <cpseg.data.folder.SegmentationFolder.from_split>`. Relative
paths start where the file lies.
"""

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from cpseg.data import SegmentationFolder
from cpseg.errors import FileError, InputError
from cpseg.training import recipes
from cpseg.training.students import UNet
from cpseg.training.trainer import FitResult, TrainConfig, Trainer

__all__ = ["train_from_file", "trainer_from_file"]

_PARTS = ("recipe", "train", "student", "labeled", "unlabeled", "validation", "directory")
_REQUIRED = ("recipe", "labeled", "directory")
_RECIPES: dict[str, Callable[..., TrainConfig]] = {
    name: getattr(recipes, name) for name in recipes.__all__
}


def train_from_file(
    path: str | os.PathLike[str],
    *,
    resume: bool = False,
    report: Callable[[str], None] | None = None,
) -> FitResult:
    """Train as a JSON file says.

    Args:
        path: The file.
        resume: Whether to go on with a run that its directory holds.
        report: Is told what each data set holds, and each evaluation; None: nobody is.

    Raises:
        FileError: If the file or a data set is not sound; every bad picture is named.
        InputError: If a key is unknown, missing or of the wrong kind.
    """
    trainer, folders = trainer_from_file(path)
    for name, folder in folders.items():
        found = folder.check()
        if report is not None:
            report(f"{name}: {found}")
    for step in trainer.steps(resume=resume):
        if report is not None and step.evaluation is not None:
            report(f"step {step.number}: mIoU {step.evaluation.miou:.4f}")
    return trainer.result()


def trainer_from_file(
    path: str | os.PathLike[str],
) -> tuple[Trainer, dict[str, SegmentationFolder]]:
    """The trainer that a JSON file describes, and its data sets by name.

    Args:
        path: The file.

    Raises:
        FileError: If it is missing or no JSON.
        InputError: If a key is unknown, missing or of the wrong kind.
    """
    place = Path(path)
    try:
        content: Any = json.loads(place.read_text("utf-8"))
    except OSError as error:
        raise FileError(f"{place} must be a readable file; {error.strerror}") from error
    except ValueError as error:
        raise FileError(f"{place} must hold JSON; got {error}") from error
    parts = _object(content, "the file")
    _known(parts, _PARTS, "the file", _REQUIRED)
    recipe = dict(_object(parts["recipe"], "recipe"))
    name = recipe.pop("name", None)
    if name not in _RECIPES:
        raise InputError(_unknown("recipe.name", str(name), list(_RECIPES)))
    config: TrainConfig = _RECIPES[name](**_arguments(_RECIPES[name], recipe, "recipe"))
    changes = _object(parts.get("train", {}), "train")
    free = [f.name for f in fields(TrainConfig) if f.name not in ("num_classes", "stages", "crop")]
    _known(changes, free, "train")
    hints = get_type_hints(TrainConfig)
    config = replace(
        config,
        **{key: _typed(value, hints[key], f"train.{key}") for key, value in changes.items()},
    )
    sets: tuple[str, ...] = ("labeled", "unlabeled", "validation")
    folders = {key: _folder(parts[key], key, place.parent, config) for key in sets if key in parts}
    student = _arguments(UNet, _object(parts.get("student", {}), "student"), "student", 1)
    directory = _typed(parts["directory"], str, "directory")
    trainer = Trainer(
        UNet(config.num_classes, **student),
        config,
        labeled=folders["labeled"],
        unlabeled=folders.get("unlabeled"),
        validation=folders.get("validation"),
        directory=place.parent / directory,
    )
    return trainer, folders


def _folder(value: object, where: str, start: Path, config: TrainConfig) -> SegmentationFolder:
    given = _object(value, where)
    _known(given, ("root", "split", "reduce_zero_label"), where, ("root", "split"))
    root = start / _typed(given["root"], str, f"{where}.root")
    zero = _typed(given.get("reduce_zero_label", False), bool, f"{where}.reduce_zero_label")
    return SegmentationFolder.from_split(
        root,
        start / _typed(given["split"], str, f"{where}.split"),
        num_classes=config.num_classes,
        reduce_zero_label=zero,
        ignore_index=config.ignore_index,
    )


def _arguments(
    function: Callable[..., object], given: Mapping[str, object], where: str, skip: int = 0
) -> dict[str, Any]:
    """The arguments of a function, by name, each of its type."""
    target = function.__init__ if inspect.isclass(function) else function
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    _known(given, [p.name for p in parameters], where, required)
    hints = get_type_hints(target)
    return {key: _typed(value, hints[key], f"{where}.{key}") for key, value in given.items()}


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a JSON object; got {value!r}")
    return cast("dict[str, Any]", value)


def _known(
    given: Mapping[str, object], allowed: Sequence[str], where: str, required: Sequence[str] = ()
) -> None:
    for key in given:
        if key not in allowed:
            raise InputError(_unknown(f"keys of {where}", key, allowed))
    for key in required:
        if key not in given:
            raise InputError(f"{where} must have the key {key!r}; got {sorted(given)}")


def _unknown(what: str, key: str, allowed: Sequence[str]) -> str:
    near = get_close_matches(key, allowed, n=1, cutoff=0)
    return f"{what} must be of {', '.join(allowed)}; got {key!r}. Did you mean {near[0]!r}?"


def _typed(value: Any, hint: Any, where: str) -> Any:
    """A JSON value as its annotation wants it: lists become tuples, whole numbers floats."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in options:
            return None
        return _typed(value, next(o for o in options if o is not type(None)), where)
    if origin is Literal:
        if value not in options:
            raise InputError(_unknown(where, str(value), [str(option) for option in options]))
        return value
    if origin is tuple:
        endless = len(options) == 2 and options[1] is Ellipsis
        if not isinstance(value, list) or (not endless and len(value) != len(options)):
            size = "a list" if endless else f"a list of {len(options)}"
            raise InputError(f"{where} must be {size}; got {value!r}")
        kinds = [options[0]] * len(value) if endless else options
        pairs = zip(cast("list[object]", value), kinds, strict=True)
        return tuple(_typed(each, kind, where) for each, kind in pairs)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{where} must be {hint.__name__}; got {value!r}")
    return value
