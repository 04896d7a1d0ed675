"""What an annotator is, as a line of text: so that a cache or calibration can refuse another."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Protocol

import torch
from torch import nn

from cpseg import _checks
from cpseg.errors import InputError

__all__ = ["check_network", "check_source", "describe_source", "difference"]

_LONGEST = 24  # characters of a setting that are shown; longer ones are hashed
_MOST = 3  # fields that a message names


class _HasSource(Protocol):
    @property
    def source(self) -> str | None: ...


def check_source(annotator: _HasSource, calibration: _HasSource) -> None:
    """Refuse thresholds that were not made from this annotator's logits.

    Logits are plain tensors and do not say where they come from, so this is to be asked once,
    before an annotator's logits meet a filter; and before calibrating, of the calibrator.

    Args:
        annotator: What makes the logits: any annotator, cached or live.
        calibration: What thresholds they meet; or the calibrator that is to see them.

    Raises:
        InputError: Their ``source`` is another one, or one of them has none.

    Examples:
        >>> from cpseg import SplitCalibrator
        >>> from cpseg.annotators import SyntheticAnnotator
        >>> annotator = SyntheticAnnotator(num_classes=3)
        >>> check_source(annotator, SplitCalibrator(source=annotator.source))
    """
    for name, value in (("annotator", annotator), ("calibration", calibration)):
        if not hasattr(value, "source"):
            raise InputError(f"{name} must have a .source; got {_checks.kind_of(value)}")
    if annotator.source is None:
        raise InputError("annotator must say what it is in its .source; it is None")
    if calibration.source != annotator.source:
        found = difference(annotator.source, calibration.source)
        raise InputError(
            "calibration must come from the logits it is used with; "
            f"{'it names no source' if calibration.source is None else found}. "
            "Calibrate on this annotator's logits, with source=annotator.source"
        )


def check_network(name: str, value: object) -> None:
    """Refuse what is no network of torch."""
    if not isinstance(value, nn.Module):
        raise InputError(f"{name} must be a torch.nn.Module; got {_checks.kind_of(value)}")


def describe_source(name: str, model: nn.Module | None, settings: Mapping[str, object]) -> str:
    """A line that changes with the weights or any setting, and not with the device.

    Fields stand between semicolons, so that :func:`difference` can name the one that differs.
    What leaves no trace in the weights, such as strides, belongs among the settings.

    Args:
        name: What kind of annotator.
        model: Its network: names, dtypes, shapes and every bit of its state are hashed.
        settings: Everything else that changes logits; must be JSON, a dataclass, or print the
            same each time.

    Returns:
        The line.

    Examples:
        >>> describe_source("mine", None, {"short": 512, "names": ["cat", "dog", "another cat"]})
        'mine; names=c709e8256064; short=512'
    """
    flat: dict[str, object] = {}
    for key, value in settings.items():
        if is_dataclass(value):
            flat |= {f"{key}.{f.name}": getattr(value, f.name) for f in fields(value)}
        else:
            flat[key] = value
    parts = [name, *(f"{key}={_shown(flat[key])}" for key in sorted(flat))]
    if model is not None:
        parts.append(f"weights={_weights(model)}")
    return "; ".join(parts)


def difference(ours: str | None, theirs: str | None) -> str:
    """Which fields of two sources differ, with both values.

    Args:
        ours: A source of :func:`describe_source` or of a user's own; None: none is known.
        theirs: Another one.

    Returns:
        The first few fields.

    Examples:
        >>> difference("mine; mode=1; short=512", "mine; mode=1; short=640")
        'short is 512 here and 640 there'
    """
    here, there = _fields(ours), _fields(theirs)
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    said = [
        f"{name} is {here.get(name, 'not given')} here and {there.get(name, 'not given')} there"
        for name in names[:_MOST]
    ]
    more = f", and {len(names) - _MOST} more fields" if len(names) > _MOST else ""
    return ", ".join(said) + more


def _fields(source: str | None) -> dict[str, str]:
    """Field names and values; what has no name is the source's first part."""
    found: dict[str, str] = {}
    for part in (source or "").split("; "):
        name, equals, value = part.partition("=")
        if equals:
            found[name] = value
        elif part:
            found["source"] = f"{found['source']}; {part}" if "source" in found else part
    return found


def _shown(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    if len(text) <= _LONGEST and ";" not in text:
        return text
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        flat = flat.as_strided(flat.shape, (1,))  # one value alone may keep a stride of its own
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
