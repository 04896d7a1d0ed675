"""What the README shows is what runs, and what it says of it is so."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cpseg import BackgroundPriority, ClassConditionalCalibrator
from cpseg.metrics import SelectiveAccuracy

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the example leaves behind, and under ``printed`` what it prints."""
    left: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block("python"), "README.md", "exec"), left)  # noqa: S102
    return {**left, "printed": " ".join(out.getvalue().split())}


def test_there_are_twelve_lines_of_use() -> None:
    assert len([line for line in block("python").splitlines() if line.strip()]) == 12


def test_the_example_prints_what_stands_below_it(names: dict[str, Any]) -> None:
    assert names["printed"] == " ".join(block("text").split())


def told(pattern: str) -> tuple[str, ...]:
    found = re.search(pattern, " ".join(TEXT.split()))
    assert found, pattern
    return found.groups()


def test_the_numbers_around_the_example_are_so(names: dict[str, Any]) -> None:
    logits, labels = names["logits"], names["labels"]
    worst = names["found"].classes.mean_of_images.value.min()
    assert told(r"the worst class is covered ([\d.]+) %") == (f"{100 * worst:.1f}",)

    def measured(kept: torch.Tensor) -> tuple[str, str]:
        report = SelectiveAccuracy(6).update(kept, labels[60:]).compute()
        share, right = report.kept.mean_of_pixels, report.accuracy_of_kept.mean_of_pixels
        return f"{100 * share.value:.1f}", f"{100 * right.value:.1f}"

    raw, (share, right) = measured(logits[60:].argmax(1)), measured(names["kept"])
    sentence = (
        r"own labels are ([\d.]+) % right, and of the ([\d.]+) % that `Singleton` keeps ([\d.]+) %"
    )
    assert told(sentence) == (raw[1], share, right)
    by_class = ClassConditionalCalibrator(6).update(logits[:60], labels[:60]).compute(0.05)
    background = measured(BackgroundPriority(by_class)(logits[60:]))
    assert told(r"and ([\d.]+) % of the labels it keeps are right") == (background[1],)
