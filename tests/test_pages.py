"""Plain code blocks of the README and of pages, run as they stand there; links that lead somewhere.

Sphinx runs the ``{doctest}`` blocks (``make docs``).
"""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cpseg import Calibration, Singleton, SplitCalibrator
from cpseg.cli import main
from cpseg.export import CalibratedModule

ROOT = Path(__file__).parents[1]


def run(page: str, **given: Any) -> dict[str, Any]:
    """The names that all the page's code leaves behind."""
    text = (ROOT / page).read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, Any] = {"__name__": "page", **given}
    exec(compile("\n".join(blocks), page, "exec"), names)  # noqa: S102 - our own page
    return names


def held_out(classes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(3):
        labels = torch.randint(classes, (4, 6, 8), generator=generator)
        found.append((nn.functional.one_hot(labels, classes).movedim(-1, 1).float(), labels))
    return found


def test_the_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    for folder in ("probabilities", "new", "test", "masks", "test-masks"):
        Path(folder).mkdir()
    for index, (logits, labels) in enumerate(held_out(3)):
        for part, (one, label) in enumerate(zip(logits, labels, strict=True)):
            name = f"{index}{part}"
            for folder in ("probabilities", "new", "test"):
                np.save(f"{folder}/{name}.npy", (2 * one).softmax(0).numpy())
            for folder in ("masks", "test-masks"):
                image.fromarray(label.byte().numpy()).save(f"{folder}/{name}.png")
    text = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"^python -m cpseg (.*--.*)$", text, re.MULTILINE)
    assert len(commands) == 3
    assert [main(shlex.split(command)) for command in commands] == [0, 0, 0]
    assert len(list(Path("pseudo-labels").glob("*.png"))) == 12
    assert "<html" in Path("report.html").read_text("utf-8")


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_several_processes_runs_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("docs/how-to/several-processes.md", my_share=held_out(3), num_classes=3)
    assert Calibration.load("calibration.json").num_units.tolist() == [12] * 3
    assert names["predictor"].compiled


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_shipping_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (images, labels), *_ = held_out(3)
    calibration = SplitCalibrator().update(images, labels).compute(alpha=0.4)
    shipped = CalibratedModule(Singleton(calibration))
    names = run("docs/how-to/shipping.md", shipped=shipped, images=images)
    assert torch.equal(torch.from_numpy(names["labels"]), shipped(images))


PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


def words(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What links may point at: headings, as GitHub and MyST name them."""
    titles = re.findall(r"^#+ (.+)$", words(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", words(ROOT / page)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# What runs each page's blocks of code, by their language; Sphinx runs {doctest}.
RUN_BY = {
    "README.md": {"python": "readme", "text": "readme", "sh": "pages"},
    "docs/how-to/annotators.md": {"python": "guides", "console": "guides"},
    "docs/how-to/other-frameworks.md": {"python": "other_frameworks"},
    "docs/how-to/several-processes.md": {"python": "pages"},
    "docs/how-to/shipping.md": {"python": "pages"},
    "docs/how-to/training.md": {"python": "guides", "json": "guides"},
    "docs/how-to/training-plugin.md": {"python": "guides", "diff": "guides"},
}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_code_is_run(page: str) -> None:
    languages = re.findall(r"^```(\S+)$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    known = {"{doctest}", "{toctree}", "{eval-rst}"}
    runs = RUN_BY.get(page, {})
    assert set(languages) - known == set(runs)
    for test in runs.values():
        assert Path(page).name in (ROOT / f"tests/test_{test}.py").read_text("utf-8")


def test_the_other_commands_of_the_readme_are_targets_and_extras() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert all(f"\n{target}:" in makefile for target in targets)
    (asked,) = re.findall(r"pip install '\.\[(.+)\]'", text)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(asked.split(",")) <= set(extras["optional-dependencies"])
