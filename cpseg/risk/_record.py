"""A risk as plain data, and back: what files, states and merges go by."""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from torch import Tensor

from cpseg.errors import InputError
from cpseg.filters import Argmax, AtMost, BackgroundPriority, Top
from cpseg.risk._rules import rule_name
from cpseg.risk.kept import FalseShare, KeptError, KeptRisk
from cpseg.risk.losses import Risk
from cpseg.risk.sets import (
    CoverageShare,
    DilutedFalseNegativeRate,
    FalseNegativeRate,
    InstanceRecall,
    Miscoverage,
    SetRisk,
    WorstFalseNegativeRate,
)

_BUILT_IN: dict[str, Callable[..., Risk]] = {
    kind.__name__: kind
    for kind in (
        Miscoverage,
        FalseNegativeRate,
        DilutedFalseNegativeRate,
        WorstFalseNegativeRate,
        CoverageShare,
        InstanceRecall,
        KeptError,
        FalseShare,
    )
}


_RULES: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    kind.__name__: kind for kind in (Argmax, Top, BackgroundPriority, AtMost)
}


def describe_risk(risk: Risk) -> dict[str, Any]:
    """Its name, its parameters, and whether it can be made from them alone."""
    kind = type(risk)
    known = kind in _BUILT_IN.values()
    ours = known or kind in (SetRisk, KeptRisk)
    name = kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}"
    classes = getattr(risk, "num_classes", 1)
    parameters: dict[str, Any] = {}
    instance: Any = risk
    for name_of in [field.name for field in fields(instance)] if is_dataclass(instance) else []:
        value = getattr(risk, name_of)
        if name_of == "rule":
            value = rule_name(value, classes)
        elif callable(value):
            value = f"{value.__module__}.{value.__qualname__}"
        parameters[name_of] = list(value) if isinstance(value, tuple) else value
    return {"name": name, "parameters": parameters, "built_in": known}


def risk_from_description(description: Mapping[str, Any], risk: Risk | None) -> Risk:
    """The risk that :func:`describe_risk` described; ``risk`` itself if it is of the user's own."""
    if risk is not None:
        if describe_risk(risk) != description:
            raise InputError(
                f"risk must be the one that made this, {description['name']} with "
                f"{description['parameters']}; got {describe_risk(risk)}"
            )
        return risk
    parameters = dict(description["parameters"])
    if "rule" in parameters:
        parts = re.fullmatch(r"(\w+)\((?:(\w+)=(\d+))?\)", parameters["rule"])
        if parts is None or parts[1] not in _RULES:
            raise InputError(f"risk must be given: its rule was {parameters['rule']}")
        kind = _RULES[parts[1]]
        parameters["rule"] = partial(kind, **{parts[2]: int(parts[3])}) if parts[2] else kind
    if parameters.get("classes") is not None:
        parameters["classes"] = tuple(parameters["classes"])
    if not description["built_in"]:
        raise InputError(f"risk must be given: this was made with {description['name']}")
    return _BUILT_IN[description["name"]](**parameters)
