"""The layers hold, importing changes nothing, and public names are what is exported and documented.

``LEVELS`` is the table of docs/explanation/architecture.md. A module may import from lower rows
only, wherever the import stands: at the top, in a function, for type checking, or by name.
"""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cpseg"

LEVELS = [
    {"errors", "protocols", "_classes"},
    {"_checks", "_draws", "_odds", "_ranks", "_tiles"},
    {"quantile", "bounds", "scores", "sets", "morphology", "merging"},
    {"accumulate", "fitted"},
    {"calibration", "_pixels"},
    {"_calibrator", "standing"},
    {"calibrators", "margins", "metrics"},
    {"tuning"},
    {"predictors"},
    {"filters", "plots"},
    {"export", "report", "risk", "shift"},
    {"annotators", "data"},
    {"training"},
    {"cli"},
    {"__main__"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}

CORE = {"torch", "numpy", "scipy", "typing_extensions"}
# What an extra brings, by the name it is imported under. torch.utils.tensorboard needs tensorboard.
OPTIONAL = {
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "nibabel": "nibabel",
    "transformers": "transformers",
    "tqdm": "tqdm",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "tensorboard": "tensorboard",
    "torch.utils.tensorboard": "tensorboard",
}

# The names that scripts are written against: a module may export more, never fewer.
FIXED = {
    "cpseg": """
        LAC APS RAPS SAPS Margin TopK SplitCalibrator ClassConditionalCalibrator GroupCalibrator
        LocationCalibrator Calibration Guarantee PixelSetPredictor BackgroundPriority Argmax
        Singleton AtMost logits_from_probabilities logits_from_sigmoid gather merge_all
    """,
    "cpseg.risk": "RiskCalibrator FalseNegativeRate Miscoverage KeptError",
    "cpseg.metrics": "Coverage SetSize SelectiveAccuracy MeanIoU",
    "cpseg.data": "SyntheticShapes SegmentationFolder",
    "cpseg.training": """
        Trainer TrainConfig TwoStageObjective PseudoLabelStore merge_pseudo_labels
        masked_cross_entropy
    """,
    "cpseg.annotators": """
        MaskClassAnnotator SemanticLogitsAnnotator TextPromptAnnotator SamClipAnnotator
        CachedAnnotator mask_class_probabilities
    """,
    "cpseg.annotators.seem": "SEEM SEEMConfig SEEMAnnotator",
}


# Names without an underscore that __all__ leaves out on purpose: for this package alone.
UNLISTED = {
    "cpseg.accumulate": {"ExactScale", "HistogramScale", "cuts", "occurrences", "upward"},
    "cpseg.calibration": {"call_of", "describe_score", "score_from_description"},
    "cpseg.filters": {"columns_of", "proposals", "rule_of"},
    "cpseg.merging": {"ADDED"},
    "cpseg.predictors": {
        *("beside_of", "check_calibration", "check_input", "columns_of", "limits_of", "run")
    },
    "cpseg.quantile": {"UNIT_MASS", "budget", "fewest_units", "mass_above"},
    "cpseg.scores": {
        *("all_scores", "label_scores", "label_scores_in_parts", "score_columns"),
        "scores_in_parts",
    },
    "cpseg.sets": {"pack"},
    "cpseg.training.objective": {"check_external"},
    "cpseg.training.refining": {"check_example"},
    "cpseg.training.targets": {"check_classes"},
}


class Import(NamedTuple):
    """One imported name, as ``a.b.c``; ``lazy`` when importing the file does not run it."""

    line: int
    target: str
    lazy: bool


def imports(code: str, package: str) -> Iterator[Import]:
    """Every import in ``code``, which lies in ``package``; relative ones are resolved."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:  # noqa: FBT001 - recursion
        match node:
            case ast.Import():
                yield from (Import(node.lineno, alias.name, lazy) for alias in node.names)
            case ast.ImportFrom():
                parts = package.split(".")
                above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
                source = ".".join(filter(None, (above, node.module)))
                for alias in node.names:
                    yield Import(node.lineno, f"{source}.{alias.name}", lazy)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(node.lineno, name, lazy)
            case _:
                pass
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for statement in node.body:
                yield from walk(statement, lazy=True)
            for statement in node.orelse:
                yield from walk(statement, lazy)
            return
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy or inner)

    return walk(ast.parse(code), lazy=False)


def layer_faults(code: str, module: str, package: str) -> list[str]:
    """What breaks the table in a file of top-level ``module``, itself inside ``package``."""
    if module not in LEVEL:
        return [f"{module} has no row in LEVELS"]
    faults = []
    for line, target, _ in imports(code, package):
        top, *rest = target.split(".")
        if top != "cpseg":
            continue
        other = rest[0] if rest else ""
        if other == module:  # a package's files may import each other
            continue
        if other not in LEVEL:
            faults.append(f"line {line}: {target} is no module of the table")
        elif LEVEL[other] >= LEVEL[module]:
            faults.append(f"line {line}: {module} must not import {other}")
    return faults


def third_party_faults(code: str, package: str) -> list[str]:
    """Imports that no extra brings, and optional ones that run when the file is imported."""
    faults = []
    for line, target, lazy in imports(code, package):
        top = target.split(".")[0]
        if top == "cpseg" or top in sys.stdlib_module_names:
            continue
        if any(f"{target}.".startswith(f"{name}.") for name in OPTIONAL):
            if not lazy:
                faults.append(f"line {line}: {target} is optional, import it where it is used")
        elif top not in CORE:
            faults.append(f"line {line}: {target} is neither core nor in an extra")
    return faults


FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]


def dotted(path: Path) -> str:
    """``cpseg.data.synthetic`` for its file, ``cpseg.data`` for a package's ``__init__``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(path: Path) -> str:
    """The package a file lies in: what its relative imports start from."""
    return ".".join(path.relative_to(ROOT).parent.parts)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts != ("__init__",):  # the facade stands above all
        assert layer_faults(path.read_text("utf-8"), parts[0], package_of(path)) == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    assert third_party_faults(path.read_text("utf-8"), package_of(path)) == []


@pytest.mark.parametrize(
    "code",
    [
        "from cpseg.calibrators import SplitCalibrator",
        "import cpseg.calibrators",
        "from cpseg import calibrators",
        "from . import calibrators",
        "from .calibrators import SplitCalibrator",
        "def f():\n    from cpseg.calibrators import SplitCalibrator",
        "if TYPE_CHECKING:\n    import cpseg.calibrators",
        "class A:\n    import cpseg.calibrators",
        "try:\n    import cpseg.calibrators\nexcept ImportError:\n    pass",
        "importlib.import_module('cpseg.calibrators')",
        "import cpseg.bounds",  # sideways
        "from cpseg import LAC",  # through the facade
        "import cpseg",
        "from cpseg import utils",
        "from cpseg.helpers import x",
    ],
)
def test_the_check_refuses_imports_up_sideways_and_unknown(code: str) -> None:
    assert len(layer_faults(code, "scores", "cpseg")) == 1


def test_the_check_refuses_a_module_the_table_does_not_know() -> None:
    assert layer_faults("", "utils", "cpseg") == ["utils has no row in LEVELS"]


def test_the_check_allows_imports_down_and_within_a_package() -> None:
    assert layer_faults("from cpseg import _checks\nimport math", "scores", "cpseg") == []
    inside = (
        "from cpseg.data import splits\nfrom . import synthetic\nfrom ..errors import InputError"
    )
    assert layer_faults(inside, "data", "cpseg.data") == []


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ("import matplotlib.pyplot as plt", 1),
        ("try:\n    from PIL import Image\nexcept ImportError:\n    pass", 1),
        ("from torch.utils import tensorboard", 1),
        ("class A:\n    import tqdm", 1),
        ("def f():\n    import torchvision", 1),
        ("def f():\n    from PIL import Image", 0),
        ("f = lambda: importlib.import_module('transformers')", 0),
        ("if TYPE_CHECKING:\n    import transformers\nelse:\n    import tqdm", 1),
        ("import torch, numpy\nfrom scipy import stats\nfrom typing_extensions import Self", 0),
    ],
)
def test_the_check_tells_lazy_imports_from_others(code: str, faults: int) -> None:
    assert len(third_party_faults(code, "cpseg")) == faults


def requirements(lines: list[str]) -> dict[str, str]:
    """Each required package and what is asked of its version."""
    found = [re.fullmatch(r"([\w.-]+)\s*(.*)", line) for line in lines]
    return {hit[1].lower().replace("-", "_"): hit[2] for hit in found if hit}


def test_dependencies_are_those_of_the_table_and_leave_a_users_torch_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    core = requirements(project["dependencies"])
    assert core.keys() == CORE
    assert all(re.fullmatch(r">=[\d.]+", wanted) for wanted in core.values()), core
    extras = project["optional-dependencies"]
    brought = {
        name for extra, lines in extras.items() if extra != "dev" for name in requirements(lines)
    }
    assert set(OPTIONAL.values()) == brought


def test_the_page_on_architecture_shows_this_table() -> None:
    page = (ROOT / "docs/explanation/architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+) \|$", page, re.MULTILINE)
    assert {module: int(level) for level, module, _ in rows} == LEVEL
    assert len(rows) == len(LEVEL)


PROBE = """
import importlib, json, sys, warnings
import torch

def state():
    return {
        "seed": torch.get_rng_state().sum().item(),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filters": [str(f) for f in warnings.filters],
    }

third_party, first, later = json.loads(sys.argv[1])
for name in third_party:
    importlib.import_module(name)
torch.manual_seed(11)
before, loaded, log = state(), set(sys.modules), []
importlib.import_module(first)
log.append([state() == before, sorted(set(sys.modules) - loaded)])
for name in later:
    importlib.import_module(name)
log.append([state() == before, sorted(set(sys.modules) - loaded)])
print(json.dumps(log))
"""


def test_importing_loads_no_optional_package_and_changes_no_global_state() -> None:
    targets = {
        target.rpartition(".")[0] if target.count(".") else target
        for path in FILES
        for _, target, lazy in imports(path.read_text("utf-8"), package_of(path))
        if not lazy and target.split(".")[0] in CORE
    }
    later = [dotted(path) for path in FILES if path.stem != "__main__"]
    probe = subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-c", PROBE, json.dumps([sorted(targets), "cpseg", later])],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for unchanged, loaded in json.loads(probe.stdout):
        assert unchanged
        foreign = {name.split(".")[0] for name in loaded} - {"cpseg", *sys.stdlib_module_names}
        assert not foreign & {*OPTIONAL, "torchvision"}, foreign


PUBLIC = [path for path in FILES if not re.search(r"\._|^_", dotted(path))]


def defined(path: Path) -> set[str]:
    """The public names that a file itself defines."""
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Assign():
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case _:
                pass
    return {name for name in names if not name.startswith("_")}


def brought_up(path: Path) -> set[str]:
    """What a file may export besides: a package its files' names, a module a private one's."""
    roof = dotted(path) if path.stem == "__init__" else "cpseg._"
    return {
        alias.asname or alias.name
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(roof)
        for alias in node.names
    }


@pytest.mark.parametrize("path", PUBLIC, ids=map(dotted, PUBLIC))
def test_all_lists_what_a_module_defines_and_each_name_has_a_docstring(path: Path) -> None:
    module = importlib.import_module(dotted(path))
    exported: list[str] = getattr(module, "__all__", sorted(defined(path)))
    assert len(set(exported)) == len(exported)
    assert set(exported) - defined(path) <= brought_up(path)
    assert defined(path) - set(exported) == UNLISTED.get(dotted(path), set())
    if path.stem == "__init__":
        assert set(exported) >= brought_up(path)
    for name in exported:
        member = getattr(module, name)
        if inspect.isclass(member) or inspect.isfunction(member):
            assert inspect.getdoc(member), f"{name} has no docstring"


def test_every_public_module_has_a_page_in_the_reference() -> None:
    listed = re.findall(
        r"^   (cpseg[\w.]*)$", (ROOT / "docs/reference/index.md").read_text("utf-8"), re.MULTILINE
    )
    top = {".".join(dotted(path).split(".")[:2]) for path in PUBLIC} - {"cpseg", "cpseg.cli"}
    assert sorted(listed) == sorted(top)


@pytest.mark.parametrize("module", FIXED)
def test_names_that_scripts_rely_on_are_there(module: str) -> None:
    assert module in map(dotted, PUBLIC)
    assert set(FIXED[module].split()) <= set(importlib.import_module(module).__all__)
