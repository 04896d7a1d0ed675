"""What the README shows is what runs, and what it says of it is so."""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found[1]


def printed(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    return " ".join(out.getvalue().split())


def test_the_example_prints_what_stands_below_it() -> None:
    assert printed(block("python")) == " ".join(block("text").split())


def test_background_priority_fares_as_the_text_says() -> None:
    code = block("python")
    for old, new in (
        ("SplitCalibrator()", "ClassConditionalCalibrator(num_classes=6)"),
        ("SplitCalibrator", "ClassConditionalCalibrator"),
        ("Singleton", "BackgroundPriority"),
    ):
        assert old in code
        code = code.replace(old, new)
    said = re.search(r"and (\S+) % of the labels it keeps are right", README.read_text("utf-8"))
    assert said
    assert printed(code).endswith(f"of the labels, {said[1]}% of them right")
