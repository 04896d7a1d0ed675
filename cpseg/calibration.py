"""The frozen result of calibration: thresholds, what they rest on, and what they promise."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast, final

import torch
from torch import Tensor

from cpseg.errors import FileError, InputError
from cpseg.protocols import Score
from cpseg.scores import APS, LAC, RAPS, SAPS, Margin, TopK

__all__ = ["Calibration", "Guarantee", "describe_score", "score_from_description"]

_FORMAT = "cpseg.calibration"
_VERSION = 1
_BUILT_IN = {kind.__name__: kind for kind in (LAC, APS, RAPS, SAPS, Margin, TopK)}


@final
@dataclass(frozen=True, slots=True)
class Guarantee:
    """What a calibration promises, in parts; ``str()`` makes it a paragraph.

    Attributes:
        event: What is bounded, and by how much.
        level: ``1 - alpha``, one for all or one per class.
        unit: What is exchangeable: ``"image"`` or ``"pixel"``.
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
        parts = [
            f"{self.event}, {self.probability} ({units} calibration {self.unit}s).",
            "Assumes: " + "; ".join(self.assumptions) + ".",
            *self.exceptions,
        ]
        return " ".join(parts)


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
        num_pixels: int64 labelled pixels behind each threshold. Shape of ``thresholds``.
        ignore_index: Label of pixels that do not count.
        fallback: What replaced thresholds of groups with too few units; None for nothing.
        fallback_groups: Which thresholds it replaced. Bool, shape of ``thresholds``.
        max_share: Largest share of a calibration image's labelled pixels that each class had.
            float64 ``(C,)``.
        source: What the logits came from, where that matters (a cache that rounds names itself).
        clustered: Whether locations share thresholds; counts are then those of the cluster.
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

    @property
    def guarantee(self) -> Guarantee:
        """What is promised, about what, and under which assumptions."""
        own = self.num_units[~self.fallback_groups]
        counted = own if own.numel() else self.num_units.flatten()
        return Guarantee(
            event=_event(self.axes, self.unit, self.alpha, clustered=self.clustered),
            level=_level(self.alpha),
            unit=self.unit,
            n=(int(counted.min()), int(counted.max())),
            probability=_OVER[self.unit],
            assumptions=_ASSUMPTIONS[self.unit],
            exceptions=_exceptions(self),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file that :meth:`load` reads back exactly. Atomic: all of it, or nothing."""
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
        }
        target = Path(path)
        text = json.dumps({**content, "sha256": _digest(content)}, indent=1, allow_nan=False)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], score: Score | None = None) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.
            score: The score, if it is one of your own; it must be the one the file names.

        Returns:
            The calibration, exactly as it was saved, on the CPU.

        Raises:
            FileError: If the file is no calibration, damaged, or of a later version.
            InputError: If ``score`` is needed and missing, or is another one.
        """
        content = _read(Path(path))
        try:
            alpha = content["alpha"]
            return cls(
                axes=tuple(content["axes"]),
                alpha=tuple(alpha) if isinstance(alpha, list) else float(alpha),
                score=score_from_description(content["score"], score),
                unit=content["unit"],
                num_classes=content["num_classes"],
                ignore_index=content["ignore_index"],
                fallback=content["fallback"],
                source=content["source"],
                clustered=content["clustered"],
                **{name: _from_json(content[name], dtype) for name, dtype in _TENSORS.items()},
            )
        except (KeyError, TypeError, RuntimeError) as error:
            raise FileError(f"{path} is not a complete calibration: {error}") from error


_TENSORS = {
    "thresholds": torch.float32,
    "num_units": torch.int64,
    "num_pixels": torch.int64,
    "fallback_groups": torch.bool,
    "max_share": torch.float64,
}


def describe_score(score: Score) -> dict[str, Any]:
    """A score as plain data: its name, and its parameters if it is a dataclass."""
    kind = type(score)
    name = kind.__name__ if kind in _BUILT_IN.values() else f"{kind.__module__}.{kind.__qualname__}"
    instance: Any = score
    parameters: dict[str, Any] = {}
    if is_dataclass(instance) and not isinstance(instance, type):
        parameters = asdict(instance)
    return {"name": name, "parameters": parameters}


def score_from_description(description: Mapping[str, Any], score: Score | None = None) -> Score:
    """The score that :func:`describe_score` described.

    Args:
        description: Name and parameters.
        score: The score itself, if it is not one of cpseg's.

    Returns:
        The score.

    Raises:
        InputError: If ``score`` is needed and missing, or is another one.
    """
    name, parameters = description["name"], description["parameters"]
    if score is not None:
        given = describe_score(score)
        if given != {"name": name, "parameters": parameters}:
            raise InputError(
                f"score must be {_call(description)}, which made this; got {_call(given)}"
            )
        return score
    if name not in _BUILT_IN:
        raise InputError(f"score must be given: this was made with {_call(description)}")
    return cast("Score", _BUILT_IN[name](**parameters))


def _call(description: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{key}={value!r}" for key, value in description["parameters"].items())
    return f"{description['name']}({arguments})"


# --- the statement -------------------------------------------------------------------------------

_OVER = {
    "image": "in expectation over the calibration images and the new one",
    "pixel": "only if pixels were exchangeable one by one, which pixels of one image are not",
}
_ASSUMPTIONS = {
    "image": (
        "calibration and new images exchangeable (an image stands for what unit_ids named)",
        "alpha, score and groups chosen without the calibration labels",
        "logits of the new image computed as those of the calibration images",
    ),
    "pixel": (
        "every labelled pixel exchangeable with every other",
        "alpha, score and groups chosen without the calibration labels",
        "logits of the new image computed as those of the calibration images",
    ),
}
_PLACE: dict[tuple[str, ...], str] = {
    (): "{share} pixels",
    ("class",): "for each class, {share} pixels of that class",
    ("location",): "for each cluster of locations, {share} pixels in that cluster",
    ("group",): "for each group, {share} pixels in that group",
    ("group", "class"): "for each group and class, {share} pixels of that class in that group",
}


def _level(alpha: float | tuple[float, ...]) -> float | tuple[float, ...]:
    return tuple(1 - a for a in alpha) if isinstance(alpha, tuple) else 1 - alpha


def _event(
    axes: tuple[str, ...],
    unit: Literal["image", "pixel"],
    alpha: float | tuple[float, ...],
    *,
    clustered: bool,
) -> str:
    most = "alpha[class]" if isinstance(alpha, tuple) else f"{alpha:g}"
    if axes == ("location",) and not clustered:
        event = f"at each location, the class of a new image is missing from its set with probability at most {most}"
    elif unit == "image":
        has = " that has such pixels" if axes else ""
        place = _PLACE[axes].format(share=f"of a new image{has}, the expected share of labelled")
        event = f"{place} whose class is missing from their set is at most {most}"
    else:
        place = _PLACE[axes].format(share="the expected share of new labelled")
        event = f"{place} whose class is missing from their set is at most {most}"
    return event[0].upper() + event[1:]


def _exceptions(calibration: Calibration) -> tuple[str, ...]:
    lines: list[str] = []
    starved = calibration.thresholds.isinf() & ~calibration.fallback_groups
    if starved.any():
        lines.append(
            f"{_where(calibration, starved)}: too few units for a finite threshold, "
            "so every set there holds every such class."
        )
    if calibration.fallback_groups.any():
        lines.append(
            f"{_where(calibration, calibration.fallback_groups)}: threshold from the fallback "
            f"{calibration.fallback}, which promises nothing there, nor for images as a whole."
        )
    if calibration.unit == "pixel":
        lines.append(
            "Pooled pixels promise less than they seem to: for images with equally many labelled "
            "pixels at most alpha + (1 - alpha) / (images + 1) in expectation, else nothing."
        )
    elif calibration.axes:
        lines.append("It does not imply the same share for a whole image.")
    return tuple(lines)


def _where(calibration: Calibration, mask: Tensor) -> str:
    if calibration.axes == ():
        return "Everywhere"
    places = mask.nonzero().tolist()
    name = " and ".join(calibration.axes) if calibration.axes != ("location",) else "location"
    shown = ", ".join(
        str(place[0]) if len(place) == 1 else str(tuple(place)) for place in places[:12]
    )
    more = f" and {len(places) - 12} more" if len(places) > 12 else ""
    return f"{name[0].upper()}{name[1:]} {shown}{more}"


# --- the file ------------------------------------------------------------------------------------


def _to_json(tensor: Tensor) -> dict[str, Any]:
    # A float32 printed as the float64 it equals reads back as itself.
    values = tensor.detach().flatten().tolist()
    if tensor.is_floating_point():
        values = ["inf" if value == torch.inf else value for value in values]
    return {"shape": list(tensor.shape), "values": values}


def _from_json(entry: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    values = [torch.inf if value == "inf" else value for value in entry["values"]]
    return torch.tensor(values, dtype=dtype).reshape(entry["shape"])


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileError(f"{path} is not a cpseg calibration, or is damaged: {error}") from error
    if not isinstance(content, dict) or cast("dict[str, Any]", content).get("format") != _FORMAT:
        raise FileError(f"{path} is not a cpseg calibration")
    fields = cast("dict[str, Any]", content)
    if fields.get("version") != _VERSION:
        raise FileError(
            f"{path} has version {fields.get('version')}; this cpseg reads version {_VERSION}"
        )
    recorded = fields.pop("sha256", None)
    if recorded != _digest(fields):
        raise FileError(f"{path} is damaged: its content does not match its SHA-256")
    return fields
