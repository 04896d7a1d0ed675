"""The frozen result of calibration: thresholds, what they rest on, and what they promise."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Self, cast, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.errors import FileError, InputError
from cpseg.fitted import PAS, RC3P, Recalibrated
from cpseg.protocols import Score
from cpseg.quantile import fewest_units, level
from cpseg.scores import APS, LAC, RAPS, SAPS, Margin, TopK

__all__ = ["Calibration", "Control", "Guarantee"]

_FORMAT = "cpseg.calibration"
_VERSION = 1
_BUILT_IN: dict[str, Callable[..., Score]] = {
    kind.__name__: kind for kind in (LAC, APS, RAPS, SAPS, Margin, TopK, RC3P, PAS, Recalibrated)
}


@final
@dataclass(frozen=True, slots=True)
class Guarantee:
    """What a calibration promises, in parts; ``str()`` makes it a paragraph.

    Attributes:
        event: What is bounded, and by how much.
        level: ``1 - alpha``, one for all or one per class.
        unit: What is exchangeable: ``"image"`` or ``"pixel"``. For single locations it is the
            image either way: an image has one pixel there.
        n: Number of calibration units behind it: the fewest and the most over groups.
        probability: What the statement is over.
        assumptions: What must be true for it.
        exceptions: Where nothing, or nothing useful, is promised.
    """

    event: str
    level: float | tuple[float, ...]
    unit: str
    n: tuple[int, int]
    probability: str
    assumptions: tuple[str, ...]
    exceptions: tuple[str, ...]

    def __str__(self) -> str:
        few, many = self.n
        units = f"{many}" if few == many else f"{few} to {many}"
        noun = self.unit if few == many == 1 else f"{self.unit}s"
        parts = [
            f"{self.event}, {self.probability} ({units} calibration {noun}).",
            f"Assumptions: {'; '.join(self.assumptions)}.",
            *self.exceptions,
        ]
        return " ".join(parts)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """Which risk a calibration controls, where it is another than miscoverage.

    Made by :class:`cpseg.risk.RiskCalibrator`.

    Attributes:
        risk: The risk, with its parameters.
        rule: The only filter rule that may use the thresholds; None: they make sets.
        delta: Probability of a calibration whose risk exceeds alpha; None: in expectation.
        event: What is bounded, and by how much.
        assumptions: What must be true for it.
        notes: Where nothing, or nothing useful, is promised, and what would help.
        over: What the statement is over, where that is not the calibration images.
    """

    risk: str
    rule: str | None
    delta: float | None
    event: str
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]
    over: str | None = None


@final
@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Calibration:
    """Thresholds and what they rest on. Made by a calibrator's ``compute``.

    A class is in a pixel's set when its score does not exceed the threshold of the pixel's group.

    Guarantee:
        See :attr:`guarantee`: it depends on unit, groups and fallback, and prints as a sentence.

    Attributes:
        thresholds: float32, ``+inf`` where nothing can be promised. Shape ``(1,)``, ``(C,)``,
            ``(G,)``, ``(G, C)`` or that of the locations.
        axes: What those axes are: ``()``, ``("class",)``, ``("group",)``, ``("group", "class")``
            or ``("location",)``.
        alpha: The level, one for all or one per class.
        score: The nonconformity score.
        unit: What is exchangeable, ``"image"`` or ``"pixel"``.
        num_classes: C of the calibration logits; None if there were none.
        num_units: int64 units behind each threshold. Shape of ``thresholds``.
        num_pixels: int64 labeled pixels behind each threshold. Shape of ``thresholds``.
        ignore_index: Label of pixels that do not count.
        fallback: What replaced thresholds of groups with too few units; None for nothing.
        fallback_groups: Which thresholds it replaced. Bool, shape of ``thresholds``.
        max_share: Largest share of a batch entry's pixels, void ones included, that each class
            had in calibration; with ``unit_ids`` too, of an entry and not of a unit. float64
            ``(C,)``.
        source: What the logits came from, where that matters (a cache that rounds names itself).
        control: The risk behind the thresholds, if another than miscoverage; a threshold is then
            ``-inf`` where no label can be kept.
        clustered: Whether locations share thresholds in clusters; then what is promised holds on
            average over a cluster, not at each location.

    Raises:
        InputError: If shapes, dtypes, axes, classes and alpha do not fit each other.
    """

    thresholds: Tensor
    axes: tuple[str, ...]
    alpha: float | tuple[float, ...]
    score: Score
    unit: Literal["image", "pixel"]
    num_classes: int | None
    num_units: Tensor
    num_pixels: Tensor
    ignore_index: int
    fallback: str | None
    fallback_groups: Tensor
    max_share: Tensor
    source: str | None
    clustered: bool = False
    control: Control | None = None

    def __post_init__(self) -> None:
        _check_tensors(self)
        _check_settings(self)

    def __repr__(self) -> str:
        """One line: what was asked for, and what came out."""
        finite = self.thresholds[self.thresholds.isfinite()]
        span = f" in [{finite.min():.4g}, {finite.max():.4g}]" if finite.numel() else ""
        few, many = int(self.num_units.min()), int(self.num_units.max())
        alpha = _span(self.alpha) if isinstance(self.alpha, tuple) else f"{self.alpha}"
        return (
            f"Calibration(axes={self.axes}, alpha={alpha}, score={self.score!r}, "
            f"num_classes={self.num_classes}: {finite.numel()} of {self.thresholds.numel()} "
            f"thresholds finite{span}, {few if few == many else f'{few} to {many}'} {self.unit}s, "
            f"fallback={self.fallback})"
        )

    @property
    def guarantee(self) -> Guarantee:
        """What is promised, about what, and under which assumptions."""
        own = self.num_units[~self.fallback_groups]
        counted = own if own.numel() else self.num_units.flatten()
        if self.control is not None:
            delta = self.control.delta
            often = f"with probability at least {1 - (delta or 0):g} over the calibration images"
            return Guarantee(
                event=self.control.event,
                level=_level(self.alpha),
                unit=self.unit,
                n=(int(counted.min()), int(counted.max())),
                probability=self.control.over
                or (
                    f"{_OVER['image']} the calibration images and the new one"
                    if delta is None
                    else often
                ),
                assumptions=self.control.assumptions,
                exceptions=self.control.notes,
            )
        unit = _unit(self)
        return Guarantee(
            event=_event(self, unit),
            level=_level(self.alpha),
            unit=unit,
            n=(int(counted.min()), int(counted.max())),
            probability=f"{'over' if _is_single(self) else _OVER[unit]} the calibration "
            f"{unit}s and the new one",
            assumptions=_assumptions(self, unit),
            exceptions=_exceptions(self, unit),
        )

    def require_rule(self, rule: str | None) -> None:
        """Refuse whatever the thresholds were not made for.

        Args:
            rule: The filter rule that wants to use them; None for sets.

        Raises:
            InputError: If they are bound to another rule.
        """
        bound = None if self.control is None else self.control.rule
        if bound is not None and bound != rule:
            raise InputError(
                f"calibration must be used with {bound}, for which its error was controlled; "
                f"got {rule or 'prediction sets'}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file that :meth:`load` reads back exactly. Atomic: all of it, or nothing.

        Args:
            path: The file, in a folder that exists; an old one is replaced.

        Raises:
            OSError: If it cannot be written there.
            InputError: If the score cannot be described in a file.
        """
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "guarantee": str(self.guarantee),
            "score": describe_score(self.score),
            "axes": list(self.axes),
            "alpha": list(self.alpha) if isinstance(self.alpha, tuple) else self.alpha,
            "unit": self.unit,
            "num_classes": self.num_classes,
            "ignore_index": self.ignore_index,
            "fallback": self.fallback,
            "source": self.source,
            "clustered": self.clustered,
            **{name: _to_json(getattr(self, name)) for name in _TENSORS},
            "control": None if self.control is None else asdict(self.control),
        }
        _write_checked(Path(path), content)

    @classmethod
    def load(cls, path: str | os.PathLike[str], score: Score | None = None) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.
            score: The score, if it is one of your own; it must be the one the file names.

        Returns:
            The calibration, exactly as it was saved, on the CPU.

        Raises:
            FileError: If the file is no calibration, damaged, or of another version.
            OSError: If there is no such file, or it cannot be read.
            InputError: If ``score`` is needed and missing, or is another one.
        """
        content = _read_checked(Path(path), "calibration", _FORMAT, _VERSION)
        try:
            named = score_from_description(content["score"], score)
        except (KeyError, TypeError) as error:
            raise FileError(f"{path} is not a complete calibration: its score is none") from error
        try:
            alpha = content["alpha"]
            return cls(
                axes=tuple(content["axes"]),
                alpha=tuple(alpha) if isinstance(alpha, list) else float(alpha),
                score=named,
                unit=content["unit"],
                num_classes=content["num_classes"],
                ignore_index=content["ignore_index"],
                fallback=content["fallback"],
                source=content["source"],
                clustered=content["clustered"],
                **{name: _from_json(content[name], dtype) for name, dtype in _TENSORS.items()},
                control=_control(content.get("control")),
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FileError(f"{path} is not a complete calibration: {error}") from error


_AXES: dict[tuple[str, ...], int] = {
    (): 1,
    ("class",): 1,
    ("group",): 1,
    ("group", "class"): 2,
}  # of the thresholds

_TENSORS = {
    "thresholds": torch.float32,
    "num_units": torch.int64,
    "num_pixels": torch.int64,
    "fallback_groups": torch.bool,
    "max_share": torch.float64,
}


def _check_settings(calibration: Calibration) -> None:
    """Refuse score, unit, classes and alpha that do not fit the thresholds."""
    axes, shape = calibration.axes, tuple(calibration.thresholds.shape)
    _checks.check_score(calibration.score)
    if calibration.unit not in ("image", "pixel"):
        raise InputError(f'unit must be "image" or "pixel"; got {calibration.unit!r}')
    classes = calibration.num_classes
    if classes is not None:
        _checks.check_integer("num_classes", classes, 1)
        if axes[-1:] == ("class",) and shape[-1] != classes:
            raise InputError(
                f"thresholds must have one per class, {classes}; got {_checks.describe(shape)}"
            )
        _checks.check_map_shape("max_share", calibration.max_share, (classes,), "num_classes")
    _checks.check_ignore_index(calibration.ignore_index, classes)
    alpha = calibration.alpha
    if isinstance(alpha, tuple):
        _checks.check_alphas(alpha)
        if axes[-1:] != ("class",) or len(alpha) != shape[-1]:
            raise InputError(
                f"alpha must be one number, or one per class of axes {axes} and thresholds "
                f"{_checks.describe(shape)}; got {len(alpha)}"
            )
    else:
        _checks.check_alpha(alpha)


def _check_tensors(calibration: Calibration) -> None:
    """Refuse tensors that do not fit each other; reads no values."""
    for name, dtype in _TENSORS.items():
        value = getattr(calibration, name)
        _checks.check_tensor(name, value)
        if value.dtype != dtype:
            raise InputError(f"{name} must be {dtype}; got {value.dtype}")
    axes, shape = calibration.axes, tuple(calibration.thresholds.shape)
    if axes not in {*_AXES, ("location",)}:
        raise InputError(
            'axes must be (), ("class",), ("group",), ("group", "class") or ("location",); '
            f"got {axes!r}"
        )
    if (
        prod(shape) == 0
        or len(shape) != _AXES.get(axes, len(shape))
        or (not axes and shape != (1,))
    ):
        raise InputError(
            f"thresholds must have the axes {axes}, none empty; got shape {_checks.describe(shape)}"
        )
    for name in ("num_units", "num_pixels", "fallback_groups"):
        _checks.check_map_shape(name, getattr(calibration, name), shape, "thresholds")


def _control(entry: Mapping[str, Any] | None) -> Control | None:
    if entry is None:
        return None
    return Control(
        risk=entry["risk"],
        rule=entry["rule"],
        delta=entry["delta"],
        event=entry["event"],
        assumptions=tuple(entry["assumptions"]),
        notes=tuple(entry["notes"]),
        over=entry.get("over"),
    )


def describe_score(score: Score) -> dict[str, Any]:
    """A score as plain data: its name, and its parameters if it is a dataclass, or its ``repr``.

    Raises:
        InputError: If it is no score, a parameter is not plain data (numbers, strings, lists,
            ...), or nothing tells it from another of its class.
    """
    _checks.check_score(score)
    kind = type(score)
    name = kind.__name__ if kind in _BUILT_IN.values() else f"{kind.__module__}.{kind.__qualname__}"
    if not hasattr(kind, "__dataclass_fields__"):
        if kind.__repr__ in _SAY_NOTHING or " at 0x" in repr(score):
            raise InputError(
                f"score must say what its parameters are; got {name} without a description. "
                "Make the class a frozen dataclass, or give it a __repr__ that shows all of them"
            )
        return {"name": name, "parameters": {}, "repr": repr(score)}
    values = {field.name: getattr(score, field.name) for field in fields(cast("Any", score))}
    parameters = {
        key: describe_score(value) if hasattr(value, "of_labels") else value
        for key, value in values.items()
    }
    try:  # as they will be read back: tuples become lists
        text = json.dumps(parameters, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"score must have parameters that JSON can hold to be saved; got {name}: {error}"
        ) from error
    return {"name": name, "parameters": json.loads(text)}


# A module's text shows its layers, and not what they have learned.
_SAY_NOTHING = (object.__repr__, torch.nn.Module.__repr__)


def _plain(value: object) -> int | float:
    """A number of numpy's as Python's."""
    if not _checks.is_number(value):
        raise TypeError(f"{_checks.kind_of(value)} is no plain data")
    number: Any = value
    return int(number) if isinstance(value, Integral) else float(number)


def score_from_description(description: Mapping[str, Any], score: Score | None = None) -> Score:
    """The score that :func:`describe_score` described.

    Args:
        description: What it returned.
        score: The score itself, if it is not one of cpseg's.

    Returns:
        The score.

    Raises:
        InputError: If ``score`` is needed and missing, or is another one.
    """
    name = description["name"]
    if score is not None:
        given = describe_score(score)
        if given != dict(description):
            raise InputError(
                f"score must be {call_of(description)}, which made this; got {call_of(given)}"
            )
        return score
    if name not in _BUILT_IN:
        raise InputError(f"score must be given: this was made with {call_of(description)}")
    inner = {  # a score inside a score
        key: score_from_description(cast("Mapping[str, Any]", value))
        for key, value in description["parameters"].items()
        if isinstance(value, Mapping) and name in ("RC3P", "Recalibrated")
    }
    return _BUILT_IN[name](**{**description["parameters"], **inner})


def call_of(description: Mapping[str, Any]) -> str:
    """The score that :func:`describe_score` described, as one would write it."""
    if "repr" in description:
        return f"{description['name']}: {description['repr']}"
    arguments = ", ".join(f"{key}={value!r}" for key, value in description["parameters"].items())
    return f"{description['name']}({arguments})"


# --- the statement -------------------------------------------------------------------------------

_OVER = {"image": "in expectation over", "pixel": "over"}
_PLACES: dict[tuple[str, ...], str] = {  # "in a new image ..."
    (): "In a new image, the share of labeled pixels whose class is missing from their set",
    ("class",): (
        "For each class, in a new image that contains it, the share of its labeled pixels whose "
        "set misses it"
    ),
    ("group",): (
        "For each group, in a new image with labeled pixels there, the share of them whose class "
        "is missing from their set"
    ),
    ("group", "class"): (
        "For each group and class, in a new image with labeled pixels of that class in that "
        "group, the share of them whose set misses it"
    ),
    ("location",): (
        "For each cluster of locations, in a new image with labeled pixels there, the share of "
        "them whose class is missing from their set"
    ),
}
_PIXELS: dict[tuple[str, ...], str] = {
    (): "A new labeled pixel has a set that misses its class",
    ("class",): "For each class, a new labeled pixel of that class has a set that misses it",
    ("group",): "For each group, a new labeled pixel there has a set that misses its class",
    ("group", "class"): (
        "For each group and class, a new labeled pixel of that class in that group has a set "
        "that misses it"
    ),
    ("location",): (
        "For each cluster of locations, a new labeled pixel there has a set that misses its class"
    ),
}


def _is_single(calibration: Calibration) -> bool:
    """Whether each location has a threshold of its own."""
    return calibration.axes == ("location",) and not calibration.clustered


def _unit(calibration: Calibration) -> Literal["image", "pixel"]:
    # An image has one pixel at a location, so counting pixels there counts images.
    return "image" if _is_single(calibration) else calibration.unit


def _level(alpha: float | tuple[float, ...]) -> float | tuple[float, ...]:
    if isinstance(alpha, tuple):
        return tuple(float(1 - level(value)) for value in alpha)
    return float(1 - level(alpha))


def _span(values: tuple[float, ...]) -> str:
    least, most = min(values), max(values)
    return f"{least}" if least == most else f"{least} to {most}"


def _event(calibration: Calibration, unit: Literal["image", "pixel"]) -> str:
    alpha = calibration.alpha
    most = f"alpha of that class ({_span(alpha)})" if isinstance(alpha, tuple) else f"{alpha}"
    if _is_single(calibration):
        return (
            "For each location, in a new image labeled there, the class is missing from its set "
            f"with probability at most {most}"
        )
    if unit == "pixel":
        return f"{_PIXELS[calibration.axes]} with probability at most {most}"
    return f"{_PLACES[calibration.axes]} is at most {most}"


def _assumptions(calibration: Calibration, unit: Literal["image", "pixel"]) -> tuple[str, ...]:
    fixed = "alpha and score"
    if "group" in calibration.axes:
        fixed = "alpha, score and groups"
    elif calibration.clustered:
        fixed = "alpha, score and clusters"
    what = (
        "the calibration images and the new one are exchangeable (an image being what unit_ids "
        "named, where they were given)"
        if unit == "image"
        else "the calibration pixels and the new one are exchangeable, each with every other"
    )
    source = "" if calibration.source is None else f", by {calibration.source}"
    return (
        what,
        f"{fixed} were chosen without the calibration labels",
        f"the new logits are computed as those for calibration were{source}",
    )


def _exceptions(calibration: Calibration, unit: Literal["image", "pixel"]) -> tuple[str, ...]:
    axes = calibration.axes
    starved = calibration.thresholds.isinf()
    replaced = calibration.fallback_groups & ~starved
    few = f"with so few calibration {unit}s"
    lines: list[str] = []
    there = " there" if axes else ""
    result = "kept in every set" if "class" in axes else f"every set{there} is full"
    needed = _needed(calibration)
    short = starved & (calibration.num_units < needed)
    for where, why in ((short, few), (starved & ~short, "as too many scores are infinite")):
        if where.any():
            place = f" for {_where(axes, where)}" if axes else ""
            lines.append(f"No finite threshold can promise this{place} {why}: {result}.")
    if short.any():
        least, most = (int(x) for x in needed[short].aminmax())
        count = f"{least}" if least == most else f"{least} to {most}"
        lines.append(f"{count} {unit}s{' each' if axes else ''} would do.")
    full = _at_the_end(calibration)
    if full.any():
        place = f"For {_where(axes, full)} the" if axes else "The"
        lines.append(f"{place} threshold lies at the end of the score's range: {result}.")
    if replaced.any():
        lines.append(
            f"Nothing is promised for {_where(axes, replaced)}: {few} the threshold comes from "
            f'the fallback "{calibration.fallback}".'
        )
    if unit == "pixel":
        lines.append(
            "Pixels of one image are not exchangeable with those of another, so for pixels that "
            f"come in images {_for_images(axes)}."
        )
    elif axes == ("location",) and not replaced.any():
        lines.append(
            "It implies the same for an image as a whole where every image is labeled everywhere, "
            "and not in general otherwise."
        )
    elif axes:
        lines.append("It does not imply the same for an image as a whole.")
    return tuple(lines)


def _needed(calibration: Calibration) -> Tensor:
    """Fewest units that allow a finite threshold. int64, shape of thresholds."""
    alpha = calibration.alpha
    alphas = alpha if isinstance(alpha, tuple) else (alpha,)
    least = torch.tensor([fewest_units(a) for a in alphas])
    return least.expand(calibration.thresholds.shape)


def _at_the_end(calibration: Calibration) -> Tensor:
    """Which thresholds are finite, and yet no score exceeds them. Bool, shape of thresholds."""
    thresholds, classes = calibration.thresholds, calibration.num_classes
    limits = None if classes is None else calibration.score.range(classes)
    if limits is None:
        return torch.zeros_like(thresholds, dtype=torch.bool)
    return thresholds.isfinite() & (thresholds >= limits[1])


def _for_images(axes: tuple[str, ...]) -> str:
    """What pooled pixels promise: CRC on equal images, by the monotone share of missed pixels."""
    if "class" in axes:
        return "nothing is promised"
    places: dict[tuple[str, ...], str] = {
        (): "",
        ("group",): " in the group",
        ("location",): " in the cluster",
    }
    there = places[axes]
    return (
        "the probability is at most alpha + (1 - alpha) / (m + 1) if all images, m of them for "
        f"calibration, have equally many labeled pixels{there}, and nothing is promised otherwise"
    )


def _where(axes: tuple[str, ...], mask: Tensor) -> str:
    """The marked places, the first twelve by name."""
    places = [place[0] if len(place) == 1 else tuple(place) for place in mask.nonzero().tolist()]
    if axes == ("group", "class"):
        name = "(group, class)"
    else:
        plural = {"class": "classes", "group": "groups", "location": "locations"}
        name = axes[0] if len(places) == 1 else plural[axes[0]]
    more = f" and {len(places) - 12} more" if len(places) > 12 else ""
    return f"{name} {', '.join(map(str, places[:12]))}{more}"


# --- the file ------------------------------------------------------------------------------------


def _to_json(tensor: Tensor) -> dict[str, Any]:
    # A float32 printed as the float64 it equals reads back as itself.
    values = tensor.detach().flatten().tolist()
    if tensor.is_floating_point():
        values = [str(value) if abs(value) == torch.inf else value for value in values]
    return {"shape": list(tensor.shape), "values": values}


def _from_json(entry: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    values = [float(value) if value in ("inf", "-inf") else value for value in entry["values"]]
    return torch.tensor(values, dtype=dtype).reshape(entry["shape"])


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_checked(path: Path, content: Mapping[str, Any]) -> None:
    """Write fields and their SHA-256, one per line. Atomic: all of it, or nothing."""
    fields = {**content, "sha256": _digest(content)}
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:  # of the file that was asked for, not of the one on the way there
        if error.filename is not None:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)


def _read_checked(path: Path, what: str, form: str, version: int) -> dict[str, Any]:
    """What :func:`_write_checked` wrote, without the SHA-256; one line if it is something else."""
    try:
        content: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # undecodable, no JSON, or absurdly large or deep
        raise FileError(f"{path} is not a cpseg {what}, or is damaged: {error}") from error
    if not isinstance(content, dict) or cast("dict[str, Any]", content).get("format") != form:
        raise FileError(f"{path} is not a cpseg {what}")
    fields = cast("dict[str, Any]", content)
    if fields.get("version") != version:
        raise FileError(
            f"{path} has version {fields.get('version')}; this cpseg reads version {version}"
        )
    recorded = fields.pop("sha256", None)
    try:
        intact = recorded == _digest(fields)
    except (ValueError, RecursionError):  # NaN or an overflow, which we never write
        intact = False
    if not intact:
        raise FileError(f"{path} is damaged: its content does not match its SHA-256")
    return fields
