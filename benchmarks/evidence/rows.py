"""Runs of students that are done: a file of one row a run, which several processes may add to."""

import csv
import fcntl
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "students.csv"
COLUMNS = (
    *("arm", "count", "seed", "size", "held_out", "steps", "commit", "miou"),
    *("kept", "right", "miou_by_video", "iou_by_class", "precision", "data"),
)
KEYS = COLUMNS.index("commit")  # what comes before tells runs apart
Key = tuple[str, ...]


def rows_of(results: Path) -> dict[Key, dict[str, str]]:
    """The rows of a results file by what was run."""
    if not results.exists():
        return {}
    with results.open(newline="", encoding="utf-8") as file:
        return {tuple(row[c] for c in COLUMNS[:KEYS]): row for row in csv.DictReader(file)}


def other_data(results: Path, data: str) -> bool:
    """Whether there are rows of other frames than these."""
    return any(row["data"] != data for row in rows_of(results).values())


def append(results: Path, row: dict[str, str]) -> None:
    """Add a row; alone with the file for the while."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if results.stat().st_size == 0:
            writer.writeheader()
        writer.writerow(row)
