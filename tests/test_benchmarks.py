"""The scripts of benchmarks/ run, and count, time and write what they say."""

import csv
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """A module of that folder, by name; what it starts compiles nothing, which would take minutes."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    return import_module


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_speed_writes_a_row_per_operation_with_its_machine(script: Script, tmp_path: Path) -> None:
    only = ["LAC update", "LAC packed"]
    script("speed").main(["--quick", "--threads", "1", "--output", str(tmp_path), "--only", *only])
    rows = rows_of(tmp_path / "speed.csv")
    assert [row["operation"] for row in rows] == only
    for row in rows:
        assert (row["size"], row["dtype"], row["threads"]) == ("1 3 16 16", "float32", "1")
        assert int(row["rounds"]) == 3
        times = [float(row[name]) for name in ("eager ms", "compiled ms", "first call s")]
        assert min(times) > 0
        assert all(row[name] for name in ("processor", "cores", "python", "torch", "commit"))
        assert row["eager memory"] != ""
        assert row["compiled memory"] != ""
    text = (tmp_path / "speed.md").read_text("utf-8")
    assert "(1, 3, 16, 16) float32, cpu, 1 thread" in text
    assert rows[0]["processor"] in text
    assert rows[0]["commit"].rstrip("+") in text


@pytest.mark.dist
def test_scaling_tells_images_classes_and_processes(script: Script, tmp_path: Path) -> None:
    script("scaling").main(["--quick", "--output", str(tmp_path)])
    images = rows_of(tmp_path / "scaling_images.csv")
    assert [(row["score"], row["images"]) for row in images] == [
        ("LAC", "10"),
        ("LAC", "100"),
        ("APS", "10"),
    ]
    state = {row["images"]: float(row["state MiB"]) for row in images if row["score"] == "LAC"}
    assert 7 < state["10"] <= state["100"] < 1.01 * state["10"]  # a histogram, and ids of units
    classes = rows_of(tmp_path / "scaling_classes.csv")
    assert [(row["score"], row["operation"], row["classes"]) for row in classes] == [
        (score, what, "2") for score in ("LAC", "APS") for what in ("update", "sets")
    ]
    processes = rows_of(tmp_path / "scaling_processes.csv")
    assert [row["processes"] for row in processes] == ["1", "2"]
    assert all(float(row["gather ms"]) > 0 and row["commit"] for row in processes)
    assert "| LAC | 100 |" in (tmp_path / "scaling_images.md").read_text("utf-8")


def test_ways_take_turns_and_medians_leave_the_first_call_out(script: Script) -> None:
    calls: list[str] = []
    ways = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    lengths = {"a": iter([900.0, 5.0, 1.0, 3.0]), "b": iter([7.0] * 4), "c": iter([8.0] * 4)}

    def timed(run: Callable[[], object]) -> float:
        run()
        return next(lengths[calls[-1]])

    first, middle, rounds = script("measure").interleaved(ways, timed, 0)
    assert first == {"a": 900.0, "b": 7.0, "c": 8.0}
    assert middle == {"a": 3.0, "b": 7.0, "c": 8.0}
    assert rounds == 3
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (0.1, 10), (9.0, 15)])
def test_rounds_fill_the_time_they_have(script: Script, seconds: float, rounds: int) -> None:
    def ten(run: Callable[[], object]) -> float:
        return 10.0 if run() is None else 0.0

    assert script("measure").interleaved({"only": lambda: None}, ten, seconds)[2] == rounds


def test_memory_counts_what_a_call_frees_again(script: Script) -> None:
    size = 64 * 2**20

    def run() -> int:
        return int(np.ones(size, dtype=np.uint8)[-1])

    extra = script("measure").extra_memory(run)
    assert size <= extra + 2**20  # pages that were held before may be used again
    assert extra < 1.5 * size
    assert script("measure").extra_memory(lambda: None) < size / 4


def test_bytes_moved_are_logits_and_labels_or_sets(script: Script) -> None:
    speed = script("speed")
    batch = speed.Batch(torch.zeros(2, 33, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64))
    pixels, logits = 2 * 4 * 5, 4 * 2 * 33 * 4 * 5
    moved = {what: speed.moved(what, batch) for what in speed.OPERATIONS}
    assert moved["LAC update"] == moved["APS update"] == logits + 8 * pixels
    assert moved["LAC sets"] == logits + 33 * pixels
    assert moved["LAC packed"] == logits + 2 * 4 * pixels  # two words for 33 classes
    assert moved["background"] == logits + pixels
    half = speed.Batch(batch.logits.bfloat16(), batch.labels)
    assert speed.moved("background", half) == logits // 2 + pixels


def test_bandwidth_is_a_share_of_a_copy(script: Script) -> None:
    share = script("speed").share_of_copy
    assert share(100, 2.0, 200, 2.0) == 0.5  # half of the bytes in the same time
    assert share(100, 1.0, 200, 2.0) == 1.0


def test_a_line_tells_ratios_and_passes(script: Script) -> None:
    line = script("speed").line
    row: dict[str, Any] = {"operation": "LAC sets", "peer": "TorchCP", "first call s": 8.25}
    row |= {"eager ms": 50.0, "compiled ms": 10.0, "peer ms": 200.0, "rows ms": 150.0}
    row |= {"eager memory": 0.3, "compiled memory": 0.25, "peer memory": 3.25}
    assert line(row) == {
        "operation": "LAC sets",
        "eager": "50",
        "compiled": "10",
        "first call": "8.2 s",
        "peer": "TorchCP: 200 (150)",
        "eager is": "4.0x",
        "compiled is": "20.0x",
        "memory": "30% / 25% (325%)",
        "bandwidth": "",
    }
    floor = {"operation": "background", "peer": script("speed").FLOOR, "eager ms": 60.0}
    told = line({**floor, "compiled ms": 20.0, "peer ms": 10.0})
    assert (told["eager is"], told["compiled is"]) == ("6.0 passes", "2.0 passes")
    alone = line({"operation": "LAC sets", "peer": "", "eager ms": 50.0, "eager bandwidth": 0.5})
    assert (alone.get("eager is", ""), alone["bandwidth"]) == ("", "50%")


def test_a_page_ends_where_more_than_the_images_differ(script: Script) -> None:
    speed = script("speed")
    row = {
        "dtype": "float32",
        "threads": 1,
        "device": "cpu",
        "operation": "LAC sets",
        "eager ms": 1.0,
    }
    sizes = ["4 21 8 8", "1 21 8 8", "2 150 8 8"]
    text = speed.page([{**row, "size": size} for size in sizes])
    shown, _, others = text.partition(speed.OTHERS)
    assert "(4, 21, 8, 8) float32, cpu, 1 thread;" in shown
    assert "(1, 21, 8, 8)" in shown
    assert "(2, 150, 8, 8)" in others
    assert text.count(speed.OTHERS) == 1
    assert speed.page([{**row, "size": sizes[0]}]).endswith(speed.OTHERS)  # pages look for it
    text = speed.page([{**row, "size": sizes[0], "threads": count} for count in (1, 2)])
    assert text.index("1 thread;") < text.index(speed.OTHERS) < text.index("2 threads;")


def test_a_process_of_its_own_has_its_threads_and_quiet_ones(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "9")
    probe = tmp_path / "probe.py"
    names = "'OMP_NUM_THREADS', 'GOMP_SPINCOUNT', 'TORCHINDUCTOR_CACHE_DIR'"
    probe.write_text(
        f"import json, os\nprint('x')\nprint(json.dumps([os.environ[n] for n in ({names})]))"
    )
    measure = script("measure")
    process = measure.alone(str(probe), {"threads": 2}, cache="there")
    assert measure.answered(process) == ["2", "0", "there"]
    probe.write_text("raise SystemExit(3)")
    with pytest.raises(measure.subprocess.CalledProcessError):
        measure.answered(measure.alone(str(probe), {}, cache="there"))
