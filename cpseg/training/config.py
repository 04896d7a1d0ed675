"""A training run as a JSON file: every key is checked before anything starts.

.. code-block:: json

    {
      "recipe": {"name": "conformal_sam", "num_classes": 21, "external_steps": 30000,
                 "self_steps": 10000, "crop": [512, 512]},
      "stages": {"self": {"threshold": 0.5,
                          "unlabeled_weight": {"name": "linear", "start": 0.5, "end": 0.1}}},
      "train": {"lr": 0.001, "labeled_batch": 4, "evaluate_every": 1000, "save_every": 1000},
      "color": {"strength": 0.3},
      "student": {"width": 32},
      "labeled": {"dataset": "voc2012", "root": "VOC2012", "split": "92"},
      "unlabeled": {"dataset": "voc2012", "root": "VOC2012", "split": "92", "store": "filtered"},
      "validation": {"root": "VOC2012", "split": "val.txt"},
      "directory": "runs/first"
    }

``recipe`` names a function of :mod:`cpseg.training.recipes` and gives its arguments; ``stages``
replaces fields of the :class:`~cpseg.training.objective.Stage` of that name, ``train`` those of the
:class:`~cpseg.training.train_config.TrainConfig`. A schedule is a class of
:mod:`cpseg.training.schedules` in lower case, with its arguments. ``color`` gives the arguments of
:class:`~cpseg.data.transforms.ColorJitter`, ``student`` those of
:class:`~cpseg.training.students.UNet`.

A data set with the key ``dataset`` is one of :func:`~cpseg.data.voc2012`,
:func:`~cpseg.data.ade20k`, :func:`~cpseg.data.coco` and
:func:`~cpseg.data.cityscapes`, and gives its arguments; the part is that of its place in
the file. Without it, ``split`` is a split file, read by :meth:`SegmentationFolder.from_split
<cpseg.data.folder.SegmentationFolder.from_split>`. ``store`` is the folder of a
:class:`~cpseg.training.plugin.PseudoLabelStore` that holds the labels instead of masks. Relative
paths start where the file lies.
"""

import inspect
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from torch import nn

from cpseg.data import ColorJitter, SegmentationFolder, ade20k, cityscapes, coco, voc2012
from cpseg.errors import FileError, InputError
from cpseg.training import recipes, schedules
from cpseg.training.objective import Stage
from cpseg.training.plugin import PseudoLabelStore
from cpseg.training.schedules import Schedule
from cpseg.training.students import UNet
from cpseg.training.train_config import TrainConfig
from cpseg.training.trainer import FitResult, Trainer

__all__ = ["train_from_file", "trainer_from_file"]

_PARTS = (
    "recipe",
    "stages",
    "train",
    "color",
    "student",
    "labeled",
    "unlabeled",
    "validation",
    "directory",
)
_REQUIRED = ("recipe", "labeled", "directory")
_RECIPES: dict[str, Callable[..., TrainConfig]] = {
    name: getattr(recipes, name) for name in recipes.__all__
}
_SCHEDULES: dict[str, Callable[..., Schedule]] = {
    name.lower(): getattr(schedules, name) for name in schedules.__all__ if name != "Schedule"
}
_DATASETS: dict[str, Callable[..., SegmentationFolder]] = {
    "voc2012": voc2012,
    "ade20k": ade20k,
    "coco": coco,
    "cityscapes": cityscapes,
}


def train_from_file(
    path: str | os.PathLike[str],
    *,
    student: nn.Module | None = None,
    resume: bool = False,
    report: Callable[[str], None] | None = None,
) -> FitResult:
    """Train as a JSON file says.

    Args:
        path: The file.
        student: A network of your own, in place of the file's.
        resume: Whether to go on with a run that its directory holds.
        report: Is told what each data set holds, and each evaluation; None: nobody is.

    Raises:
        FileError: If the file or a data set is not sound; every bad picture is named.
        InputError: If a key is unknown, missing or of the wrong kind.
    """
    trainer, folders = trainer_from_file(path, student=student)
    for name, folder in folders.items():
        found = folder.check()
        if report is not None:
            report(f"{name}: {found}")
    for step in trainer.steps(resume=resume):
        if report is not None and step.evaluation is not None:
            report(f"step {step.number}: mIoU {step.evaluation.miou:.4f}")
    return trainer.result()


def trainer_from_file(
    path: str | os.PathLike[str], *, student: nn.Module | None = None
) -> tuple[Trainer, dict[str, SegmentationFolder]]:
    """The trainer that a JSON file describes, and its data sets by name.

    Args:
        path: The file.
        student: A network of your own, in place of the file's.

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
    config: TrainConfig = _named(parts["recipe"], _RECIPES, "recipe")
    config = replace(config, stages=_stages(parts.get("stages", {}), config))
    left = [f.name for f in fields(TrainConfig) if f.name not in ("num_classes", "stages", "crop")]
    config = _changed(config, parts.get("train", {}), "train", left)
    color = _called(ColorJitter, _object(parts.get("color", {}), "color"), "color")
    sets = ("labeled", "unlabeled", "validation")
    folders = {key: _folder(parts[key], key, place.parent, config) for key in sets if key in parts}
    if student is None:
        sizes = _object(parts.get("student", {}), "student")
        network: nn.Module = _called(
            UNet, sizes, "student", fixed={"num_classes": config.num_classes}
        )
    elif "student" in parts:
        raise InputError("student must be given by the file or by the caller; got both")
    else:
        network = student
    directory = _typed(parts["directory"], str, "directory")
    trainer = Trainer(
        network,
        config,
        labeled=folders["labeled"],
        unlabeled=folders.get("unlabeled"),
        validation=folders.get("validation"),
        directory=place.parent / directory,
        color=color,
    )
    return trainer, folders


def _stages(value: object, config: TrainConfig) -> tuple[Stage, ...]:
    """The recipe's stages with the changed fields."""
    changes = _object(value, "stages")
    names = [stage.name for stage in config.stages]
    _known(changes, names, "stages")
    left = [f.name for f in fields(Stage) if f.name != "name"]
    return tuple(
        _changed(stage, changes.get(stage.name, {}), f"stages.{stage.name}", left)
        for stage in config.stages
    )


def _folder(value: object, where: str, start: Path, config: TrainConfig) -> SegmentationFolder:
    given = dict(_object(value, where))
    store = given.pop("store", None)
    for key in {"root", "sbd"} & given.keys():
        given[key] = str(start / _typed(given[key], str, f"{where}.{key}"))
    if "dataset" in given:
        name = _choice(given.pop("dataset"), _DATASETS, f"{where}.dataset")
        folder: SegmentationFolder = _called(_DATASETS[name], given, where, fixed={"part": where})
        if folder.num_classes != config.num_classes:
            raise InputError(
                f"recipe.num_classes must be the {folder.num_classes} of {where}; "
                f"got {config.num_classes}"
            )
        folder = replace(folder, ignore_index=config.ignore_index)
    else:
        if "split" in given:
            given["split"] = str(start / _typed(given["split"], str, f"{where}.split"))
        fixed = {"num_classes": config.num_classes, "ignore_index": config.ignore_index}
        folder = _called(SegmentationFolder.from_split, given, where, fixed=fixed)
    if store is None:
        return folder
    labels = PseudoLabelStore(start / _typed(store, str, f"{where}.store"))
    return replace(folder, load_labels=labels.load)


def _changed(value: Any, changes: object, where: str, allowed: Sequence[str]) -> Any:
    """A dataclass with some of its fields replaced."""
    given = _object(changes, where)
    _known(given, allowed, where)
    hints = get_type_hints(type(value))
    return replace(value, **{k: _typed(v, hints[k], f"{where}.{k}") for k, v in given.items()})


def _called(
    function: Any,
    given: Mapping[str, object],
    where: str,
    *,
    fixed: Mapping[str, object] = MappingProxyType({}),
) -> Any:
    """What a function returns for the arguments in ``given``, checked by its own annotations.

    Args:
        function: A function or a class.
        given: Arguments by name.
        where: Their place in the file.
        fixed: Arguments that the file may not give.
    """
    parameters = [
        p for name, p in inspect.signature(function).parameters.items() if name not in fixed
    ]
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    _known(given, [p.name for p in parameters], where, required)
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    typed = {key: _typed(value, hints[key], f"{where}.{key}") for key, value in given.items()}
    return function(**typed, **fixed)


def _named(value: object, functions: Mapping[str, Any], where: str) -> Any:
    """What the function called ``name`` returns for the other keys."""
    given = dict(_object(value, where))
    name = _choice(given.pop("name", None), functions, f"{where}.name")
    return _called(functions[name], given, where)


def _choice(value: object, allowed: Collection[str], where: str) -> str:
    if value not in allowed:
        raise InputError(_unknown(where, str(value), list(allowed)))
    return cast("str", value)


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
    if hint is Schedule:
        return _named(value, _SCHEDULES, where)
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in options:
            return None
        return _typed(value, next(o for o in options if o is not type(None)), where)
    if origin is Literal:
        return _choice(value, options, where)
    if origin in (tuple, Mapping):
        return _collected(value, hint, where)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise InputError(f"{where} must be {hint.__name__}; got {value!r}")
    return value


def _collected(value: object, hint: Any, where: str) -> Any:
    """A list as a tuple, or an object as a mapping from ids, which JSON has as text."""
    options = get_args(hint)
    if get_origin(hint) is Mapping:
        given = _object(value, where)
        for key in given:
            if not key.isdecimal():
                raise InputError(f"{where} must have ids for keys; got {key!r}")
        return {int(key): _typed(each, options[1], where) for key, each in given.items()}
    endless = len(options) == 2 and options[1] is Ellipsis
    if not isinstance(value, list) or (not endless and len(value) != len(options)):
        size = "a list" if endless else f"a list of {len(options)}"
        raise InputError(f"{where} must be {size}; got {value!r}")
    kinds = [options[0]] * len(value) if endless else options
    pairs = zip(cast("list[object]", value), kinds, strict=True)
    return tuple(_typed(each, kind, where) for each, kind in pairs)
