"""One way of timing, of measuring memory, of telling the machine and of writing a table.

A case is measured in a process of its own: threads, their waiting and the compiler's cache are set
in its environment, and a case that dies takes no other along. There all ways of doing a job are
timed in rounds, each way once per round in an order that rotates, so that whatever else the
machine does meets all alike. Memory is the most that the process held during one call, its
high-water mark reset before, beyond what it held then.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from evidence.tables import COMMIT, Row, write

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("cpseg", "torch", "torchcp", "mapie")
FEWEST, MOST = 3, 15
QUIET = "GOMP_SPINCOUNT"  # 0: threads that wait must not burn the core that others need

Way = Callable[[], object]
Clock = Callable[[Way], float]


def alone(
    script: str, case: Mapping[str, object], *, cache: str = "", **environment: str
) -> subprocess.Popen[str]:
    """Start a process for a case: ``script --case CASE``, which is to call :func:`answer`."""
    threads = str(case.get("threads", 1))
    settings = {"OMP_NUM_THREADS": threads, QUIET: "0"}
    if cache:  # a folder for what is compiled, empty if compiling is to be timed
        settings["TORCHINDUCTOR_CACHE_DIR"] = cache
    return subprocess.Popen(
        [sys.executable, script, "--case", json.dumps(case)],
        env={**os.environ, **settings, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def answered(process: subprocess.Popen[str]) -> Any:
    """What a process that :func:`alone` started had to say."""
    told, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return json.loads(told.splitlines()[-1])


def answer(found: object) -> None:
    """The last line of a case's process."""
    print(json.dumps(found), flush=True)


def clock(run: Way) -> float:
    """Milliseconds of one call on the CPU."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def cuda_clock(run: Way) -> float:
    """Milliseconds of one call on the GPU, between two events of its stream."""
    import torch  # noqa: PLC0415 - not where cases are only started

    timer: Callable[..., Any] = torch.cuda.Event
    start, stop = timer(enable_timing=True), timer(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def interleaved(
    ways: Mapping[str, Way], timed: Clock, seconds: float
) -> tuple[dict[str, float], dict[str, float], int]:
    """Milliseconds of each way's first call, the median of those after, and their number.

    Args:
        ways: What to time, by name.
        timed: Milliseconds of one call.
        seconds: Rounds go on for about that long, if that is no fewer than 3 and no more than 15.
    """
    first = {name: timed(run) for name, run in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names, rounds, round_ = list(ways), FEWEST, 0
    while round_ < rounds:
        at = round_ % len(names)
        for name in names[at:] + names[:at]:
            taken[name].append(timed(ways[name]))
        if round_ == 0:
            whole = sum(times[0] for times in taken.values())
            rounds = min(max(int(1e3 * seconds / whole), FEWEST), MOST)
        round_ += 1
    return first, {name: statistics.median(times) for name, times in taken.items()}, rounds


def extra_memory(run: Way) -> int:
    """Bytes that a call needs beyond what the process holds when it begins, result included.

    Start the process with :data:`GIVEN_BACK`, or memory that was freed before hides some of it.
    """
    before = held()
    result = run()
    extra = most_held() - before
    del result
    return extra


def settled(run: Way) -> int:
    """The extra memory of a call after those that compile and make a state: they are no extra."""
    for _ in range(3):
        run()
    return extra_memory(run)


GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def held() -> int:
    """Bytes the process holds; its high-water mark is reset to them."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def most_held() -> int:
    """The most bytes the process held since :func:`held`, or since it began."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def machine(device: str = "cpu") -> dict[str, str]:
    """What the figures were measured on, and with."""
    told = {"processor": _processor(), "cores": str(os.cpu_count())}
    if device != "cpu":
        import torch  # noqa: PLC0415 - not where cases are only started

        told["gpu"] = torch.cuda.get_device_name(device)
    return (
        told | {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def publish(folder: Path, name: str, rows: Sequence[Row], text: str, on: Mapping[str, str]) -> None:
    """Write all rows with the machine to ``NAME.csv``, and what a page includes to ``NAME.md``."""
    write(folder / f"{name}.csv", [{**row, **on} for row in rows])
    told = ", ".join(f"{key} {value}" for key, value in on.items() if value != "none")
    folder.joinpath(f"{name}.md").write_text(f"Measured at {COMMIT}: {told}.\n\n{text}\n")
