"""What the evidence is written as: Markdown that is printed, and a CSV file beside the scripts."""

import csv
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import which

RESULTS = Path(__file__).parent / "results"

Row = Mapping[str, object]


def commit() -> str:
    """The commit of this checkout, with a plus if its code has been changed since."""
    here = Path(__file__).parent
    git = [which("git") or "git", "-C", str(here)]
    code = [":(top)cpseg/*.py", str(here / "*.py")]
    head, changed = (
        subprocess.run([*git, *words], capture_output=True, text=True, check=False).stdout.strip()
        for words in (["rev-parse", "--short=9", "HEAD"], ["status", "--porcelain", "--", *code])
    )
    return (head or "unknown") + ("+" if changed else "")


COMMIT = commit()  # when the run begins: it may take hours


def told(value: object) -> str:
    """A number with three digits after the point, without the leading zero of a share."""
    if not isinstance(value, float):
        return str(value)
    if value != value:  # noqa: PLR0124 - NaN
        return ""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


def markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A table of these columns."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(told(row.get(name, "")) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def write(path: Path, rows: Sequence[Row]) -> None:
    """All columns of all rows, numbers with five digits, the commit in the last column."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*names, "commit"])
        for row in rows:
            values = [row.get(name, "") for name in names]
            cells = [f"{v:.5g}" if isinstance(v, float) else v for v in values]
            writer.writerow([*cells, COMMIT])
