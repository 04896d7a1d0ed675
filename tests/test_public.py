"""The names and signatures that other people's scripts are written against."""

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cpseg

PARAMETERS = {  # a keyword-only parameter has a star; then its default
    "LAC": "",
    "APS": "randomized=False, seed=0",
    "RAPS": "penalty=0.01, k_reg=5, randomized=False, seed=0",
    "SAPS": "weight=0.2, randomized=False, seed=0",
    "Margin": "",
    "TopK": "randomized=False, seed=0",
    "SplitCalibrator": "score=LAC(), *unit='image', *store='histogram', *ignore_index=255, "
    "*source=None, *compiled=False",
    "ClassConditionalCalibrator": "num_classes, score=LAC(), *unit='image', *store='histogram', "
    "*ignore_index=255, *source=None, *compiled=False",
    "GroupCalibrator": "num_groups, num_classes=None, score=LAC(), *unit='image', "
    "*store='histogram', *ignore_index=255, *source=None, *compiled=False",
    "LocationCalibrator": "shape, clusters=None, max_alpha=0.2, *max_units=1000, *score=LAC(), "
    "*unit='image', *store='histogram', *ignore_index=255, *source=None, *compiled=False",
    "PixelSetPredictor": "calibration, force_top=False, compiled=False",
    "Argmax": "calibration, guard=None, compiled=False",
    "BackgroundPriority": "calibration, background=0, guard=None, compiled=False",
    "Singleton": "calibration, guard=None, compiled=False",
    "AtMost": "calibration, k, guard=None, compiled=False",
    "Guarantee": "event, level, unit, n, probability, assumptions, exceptions",
    "gather": "accumulator",
    "merge_all": "accumulators",
    "logits_from_probabilities": "probabilities",
    "logits_from_sigmoid": "channels",
}
SCORES = ["LAC", "APS", "RAPS", "SAPS", "Margin", "TopK"]
FILTERS = ["Argmax", "BackgroundPriority", "Singleton", "AtMost"]
CALIBRATORS = [
    "SplitCalibrator",
    "ClassConditionalCalibrator",
    "GroupCalibrator",
    "LocationCalibrator",
]
METHODS = {
    **{f"{name}.__call__": "logits" for name in SCORES},
    **{f"{name}.of_labels": "logits, labels" for name in SCORES},
    **{f"{name}.__call__": "logits, groups=None" for name in [*FILTERS, "PixelSetPredictor"]},
    **{f"{name}.decide": "logits, groups=None" for name in FILTERS},
    **{f"{name}.update": "logits, labels, unit_ids=None" for name in CALIBRATORS},
    "GroupCalibrator.update": "logits, labels, groups, unit_ids=None",
    **{f"{name}.compute": "alpha, fallback=None" for name in CALIBRATORS},
    **{f"{name}.close_units": "ids" for name in CALIBRATORS},
    **{f"{name}.merge": "other" for name in CALIBRATORS},
    **{f"{name}.reset": "" for name in CALIBRATORS},
    **{f"{name}.state_dict": "" for name in CALIBRATORS},
    **{f"{name}.from_state_dict": "state, score=None" for name in CALIBRATORS},
    "Calibration.save": "path",
    "Calibration.load": "path, score=None",
}


def told(called: Callable[..., Any]) -> str:
    parts = []
    for name, parameter in inspect.signature(called).parameters.items():
        star = "*" if parameter.kind is parameter.KEYWORD_ONLY else ""
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        parts.append(f"{star}{name}{default}")
    return ", ".join(part for part in parts if part != "self")


def test_from_cpseg_come_these_names_and_no_others() -> None:
    assert set(cpseg.__all__) == {*PARAMETERS, "Calibration"}
    assert all(hasattr(cpseg, name) for name in cpseg.__all__)


@pytest.mark.parametrize("name", PARAMETERS)
def test_constructors_and_functions_keep_their_parameters(name: str) -> None:
    assert told(getattr(cpseg, name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_their_parameters(name: str) -> None:
    owner, method = name.split(".")
    assert told(getattr(getattr(cpseg, owner), method)) == METHODS[name]


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("method", ["update", "close_units", "merge", "reset", "from_state_dict"])
def test_methods_that_change_state_return_the_calibrator(name: str, method: str) -> None:
    annotation = inspect.signature(getattr(getattr(cpseg, name), method)).return_annotation
    assert getattr(annotation, "__name__", annotation) == "Self"


def test_a_calibration_has_these_fields() -> None:
    fixed = "thresholds axes alpha num_units num_pixels guarantee"
    assert all(hasattr(cpseg.Calibration, name) for name in fixed.split())


def test_every_public_class_and_function_takes_no_free_arguments() -> None:
    for name in cpseg.__all__:
        kinds = {p.kind for p in inspect.signature(getattr(cpseg, name)).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


def undocumented(node: ast.AST, name: str) -> Iterator[str]:
    """A module, and all below it that has a public name, without a docstring."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return
    if not ast.get_docstring(node):
        yield name
    if isinstance(node, ast.Module | ast.ClassDef):
        for inner in node.body:
            inner_name = getattr(inner, "name", "_")
            if not inner_name.startswith("_"):
                yield from undocumented(inner, f"{name}.{inner_name}")


PACKAGE = Path(cpseg.__file__).parent
MODULES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem in ("__init__", "__main__") or not path.stem.startswith("_")
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_public_name_has_a_docstring(path: Path) -> None:
    assert list(undocumented(ast.parse(path.read_text("utf-8")), path.stem)) == []


def test_the_check_of_docstrings_can_fail() -> None:
    code = '"""A."""\nclass B:\n    """B."""\n    def c(self): ...\n    def _d(self): ...\ndef e(): ...'
    assert list(undocumented(ast.parse(code), "a")) == ["a.B.c", "a.e"]
    assert list(undocumented(ast.parse("1"), "a")) == ["a"]
