"""What commands say: progress with the time left, tables, JSON."""

import json
import math
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from cpseg.errors import FileError

__all__ = ["Meter", "check_output", "percent", "print_json", "progress", "table", "told", "wrapped"]

_WIDTH = 80
_Item = TypeVar("_Item")


class Meter:
    """A bar with the time left on standard error if that is a terminal, else a line at the end.

    Args:
        total: How many there are.
        task: What is done to them.
        counted: What they are.
    """

    def __init__(self, total: int, task: str, counted: str = "images") -> None:
        self.total: int = total
        self.task: str = task
        self.counted: str = counted
        self.done: int = 0
        self._start = time.monotonic()
        self._bar = sys.stderr.isatty()

    def step(self) -> None:
        """One more is done."""
        self.done += 1
        if self._bar:
            share = self.done / self.total
            left = told((time.monotonic() - self._start) * (1 - share) / share)
            line = f"{self.task:26.26} [{'#' * round(20 * share):20}] {self.done}/{self.total}"
            sys.stderr.write(f"\r{line}, {left} left\x1b[K")
            sys.stderr.flush()

    def close(self) -> None:
        """All are done."""
        took = told(time.monotonic() - self._start)
        start = "\r" if self._bar else ""
        end = "\x1b[K" if self._bar else ""
        sys.stderr.write(f"{start}{self.task}: {self.done} {self.counted} in {took}{end}\n")


def progress(items: Sequence[_Item], task: str) -> Iterator[_Item]:
    """The items, one after the other, with a :class:`Meter`."""
    meter = Meter(len(items), task)
    for item in items:
        yield item
        meter.step()
    meter.close()


def told(seconds: float) -> str:
    """A time as one would say it.

    Examples:
        >>> told(4.2), told(200), told(7500)
        ('4.2 s', '3 min 20 s', '2 h 05 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def percent(share: float, digits: int = 1) -> str:
    """A share in percent, ``-`` where there is none.

    Examples:
        >>> percent(0.999), percent(float("nan"))
        ('99.9%', '-')
    """
    return "-" if math.isnan(share) else f"{share:.{digits}%}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need be: the first to the left, numbers to the right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join((line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:]))).rstrip()
        for line in lines
    )


def check_output(path: Path) -> None:
    """Refuse now where a file could not be written at the end of long work.

    Raises:
        FileError: If it is a folder, or lies in none.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise FileError(f"--output must be a file in a folder that exists; got {path}")


def wrapped(text: str) -> str:
    """Words in lines of a terminal."""
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def print_json(value: Mapping[str, object]) -> None:
    """One JSON document on standard output: NaN is null, infinities are strings."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        fields = cast("Mapping[Any, object]", value)
        return {str(name): _plain(entry) for name, entry in fields.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in cast("Sequence[object]", value)]
    return value
