"""How long calibration, sets and pseudo-labels take, beside TorchCP, in one process.

Every round runs each way once, in an order that rotates, so that whatever else the machine does
meets all alike. Printed, and written to ``benchmarks/results/``: medians over rounds in
milliseconds, ratios of medians, the time of the first compiled call, and the peak of extra memory
as a share of the logits' bytes, each in a process of its own whose high-water mark is reset before
the call. TorchCP takes rows ``(N, C)``: what it needs to get there from images is in its time; in
brackets, without.

    python benchmarks/speed.py                    # (4, 21, 512, 512) float32, all operations
    python benchmarks/speed.py --all --threads 2  # the other sizes and bfloat16 as well
    PYTHONPATH=/folder/of/torchcp python benchmarks/speed.py

TorchCP is taken along where it can be imported (``pip install --no-deps torchcp==1.2.1``); it
needs stand-ins for packages that this does not use. On a GPU: ``--device cuda``, sizes are then
repeated until the logits fill 2 GiB, and bandwidth is given as a share of a device copy's.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # threads that wait must not burn the core

import torch
from torch import Tensor

import cpseg
from cpseg import APS, LAC, BackgroundPriority, ClassConditionalCalibrator, PixelSetPredictor

SIZES = [(4, 21, 512, 512), (2, 150, 512, 512), (1, 19, 1024, 2048), (1, 4, 128, 128, 128)]
OPERATIONS = ["LAC update", "LAC sets", "LAC packed", "APS update", "APS sets", "background"]
UNUSED = {
    "torchsort": ["soft_rank", "soft_sort"],
    "torch_geometric": [],
    "torch_geometric.nn": ["GCNConv"],
    "torch_geometric.loader": ["NeighborLoader"],
    "torch_geometric.utils": [],
    "torch_geometric.utils.convert": ["to_networkx"],
    "transformers": ["set_seed", "StoppingCriteria", "StoppingCriteriaList"],
    "torchvision": [],
    "networkx": [],
    "sklearn": [],
    "sklearn.cluster": ["KMeans"],
    "sklearn.metrics": ["accuracy_score"],
    "sklearn.model_selection": ["train_test_split"],
    "tqdm": ["tqdm"],
}
FLOOR = "one compiled logsumexp"


@dataclass(frozen=True)
class Batch:
    """What every way of doing the job starts from."""

    logits: Tensor
    labels: Tensor

    @property
    def rows(self) -> Tensor:
        return self.logits.movedim(1, -1).reshape(-1, self.logits.shape[1])


def drawn(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Batch:
    """Logits of a fair model that is often sure, and a tenth of the pixels void."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(size, generator=generator)
    space = (size[0], *size[2:])
    likely = torch.rand(space, generator=generator) < 0.7
    labels = torch.where(
        likely, logits.argmax(1), torch.randint(0, size[1], space, generator=generator)
    )
    labels[torch.rand(space, generator=generator) < 0.1] = 255
    batch = Batch(logits.to(device, dtype), labels.to(device))
    if device != "cpu":
        times = max(2**31 // (batch.logits.numel() * batch.logits.element_size()), 1)
        repeat = (times, *(1 for _ in size[1:]))
        batch = Batch(batch.logits.repeat(repeat), batch.labels.repeat(repeat[:1] + repeat[2:]))
    return batch


def ours(operation: str, batch: Batch, *, compiled: bool) -> Callable[[], object]:
    """One operation of cpseg, ready to run."""
    classes = batch.logits.shape[1]
    name, _, what = operation.partition(" ")
    score = APS() if name == "APS" else LAC()
    calibrator = ClassConditionalCalibrator(classes, score, compiled=compiled)
    if what == "update":
        return lambda: calibrator.update(batch.logits, batch.labels)
    some = slice(0, 1)
    seen = ClassConditionalCalibrator(classes, score)
    for _ in range(10):
        seen.update(batch.logits[some], batch.labels[some])
    calibration = seen.compute(0.1)
    predictor = PixelSetPredictor(calibration, compiled=compiled)
    if what == "sets":
        return lambda: predictor(batch.logits)
    if what == "packed":
        return lambda: predictor.packed(batch.logits)
    labels = BackgroundPriority(calibration, compiled=compiled)
    return lambda: labels(batch.logits)


def theirs(
    operation: str, batch: Batch
) -> tuple[Callable[[], object], Callable[[], object]] | None:
    """The same by TorchCP, from images and from rows; None where it cannot."""
    name, _, what = operation.partition(" ")
    if name == "background":
        floor = torch.compile(lambda x: torch.logsumexp(x, 1), dynamic=False)
        return (lambda: floor(batch.logits),) * 2
    torchcp = loaded()
    if torchcp is None:
        return None
    classification = import_module("torchcp.classification")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score = getattr(classification.score, name)(
            **({"randomized": False} if name == "APS" else {})
        )
        peer = classification.predictor.ClassConditionalPredictor(score, temperature=1)
        valid = (batch.labels != 255).reshape(-1)
        rows, labels = batch.rows, batch.labels.reshape(-1)
        kept, known = rows[valid], labels[valid]
        peer.calculate_threshold(kept.float(), known, 0.1)

    def calibrate() -> None:
        peer.calculate_threshold(batch.rows[valid].float(), labels[valid], 0.1)

    if what == "update":
        return calibrate, lambda: peer.calculate_threshold(kept.float(), known, 0.1)
    return (
        lambda: peer.predict_with_logits(batch.rows.float(), 0.1),
        lambda: peer.predict_with_logits(rows.float(), 0.1),
    )


def loaded() -> types.ModuleType | None:
    """TorchCP, with empty modules for what it imports and does not use here."""
    if find_spec("torchcp") is None:
        return None
    if "torchcp" in sys.modules:
        return sys.modules["torchcp"]
    heavy = {"torchsort", "torch_geometric", "transformers", "torchvision"}
    packages = {name.split(".")[0] for name in UNUSED} - sys.modules.keys()
    missing = {package for package in packages if package in heavy or find_spec(package) is None}
    for name, members in UNUSED.items():
        if name.split(".")[0] in missing:
            stub: Any = types.ModuleType(name)
            stub.__path__ = []
            for member in members:
                setattr(stub, member, type(member, (), {}))
            sys.modules[name] = stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module("torchcp")


def milliseconds(run: Callable[[], object], device: str) -> float:
    """Of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def memory(arguments: argparse.Namespace, operation: str, way: str) -> float:
    """Peak of extra memory as a share of the logits' bytes, in a process of its own."""
    command = [sys.executable, __file__, "--peak", operation, way, "--threads", "1"]
    command += ["--size", *map(str, arguments.size), "--dtype", arguments.dtype]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def peak(arguments: argparse.Namespace) -> None:
    """Print one operation's peak of extra memory as a share of the logits' bytes."""
    operation, way = arguments.peak
    small = (1, *arguments.size[1:2], *(64 for _ in arguments.size[2:]))
    dtype = getattr(torch, arguments.dtype)
    batch = drawn(tuple(arguments.size), dtype, "cpu")
    if way == "torchcp":
        made = theirs(operation, batch)
        run = made[0] if made else lambda: None
    else:
        ours(operation, drawn(small, dtype, "cpu"), compiled=way == "compiled")()
        run = ours(operation, batch, compiled=way == "compiled")
        if operation.endswith("update"):
            run()  # the state itself is no extra
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    made_last = run()
    extra = status("VmHWM") - before
    del made_last
    print(extra / (batch.logits.numel() * batch.logits.element_size()))


def status(name: str) -> int:
    """Bytes, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(name)]
    return int(line.split()[1]) * 1024


def table(arguments: argparse.Namespace, operations: list[str]) -> list[str]:
    """One size and dtype, as lines of a table."""
    size, dtype = tuple(arguments.size), getattr(torch, arguments.dtype)
    batch = drawn(size, dtype, arguments.device)
    lines = [
        f"### {size} {arguments.dtype}, {torch.get_num_threads()} threads, {arguments.device}",
        "",
        "| operation | eager | compiled | first call | peer | eager is | compiled is | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for operation in operations:
        ways: dict[str, Callable[[], object]] = {"eager": ours(operation, batch, compiled=False)}
        ways["compiled"] = ours(operation, batch, compiled=True)
        first = milliseconds(ways["compiled"], arguments.device) / 1e3
        peer = theirs(operation, batch)
        if peer is not None:
            ways["peer"], ways["rows"] = peer
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for run in ways.values():
            run()
        names = list(ways)
        for round_ in range(arguments.rounds):
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                taken[name].append(milliseconds(ways[name], arguments.device))
        middle = {name: statistics.median(times) for name, times in taken.items()}
        told, eager, fused = "-", "-", "-"
        if "peer" in middle:
            told = f"{middle['peer']:.0f} ({middle['rows']:.0f})"
            eager = f"{middle['peer'] / middle['eager']:.1f}x"
            fused = f"{middle['peer'] / middle['compiled']:.1f}x"
            if operation == "background":
                told = f"{middle['peer']:.0f}, {FLOOR}"
                eager = f"{middle['eager'] / middle['peer']:.1f} of its times"
                fused = f"{middle['compiled'] / middle['peer']:.1f} of its times"
        shares = "-"
        if arguments.device == "cpu" and sys.platform == "linux" and not arguments.no_memory:
            told_by = [memory(arguments, operation, way) for way in ("eager", "compiled")]
            shares = " / ".join(f"{share:.0%}" for share in told_by)
            if operation != "background" and peer is not None:
                shares += f" ({memory(arguments, operation, 'torchcp'):.0%})"
        lines.append(
            f"| {operation} | {middle['eager']:.0f} | {middle['compiled']:.0f} | {first:.1f} s "
            f"| {told} | {eager} | {fused} | {shares} |"
        )
        print(lines[-1], file=sys.stderr)
    return [*lines, ""]


def commit() -> str:
    """The commit this runs at, if git knows one."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--all", action="store_true", help="all sizes, and bfloat16")
    parser.add_argument("--size", type=int, nargs="+", default=list(SIZES[0]))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--only", nargs="+", default=OPERATIONS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        peak(arguments)
        return
    lines = [
        (
            f"cpseg {cpseg.__version__} ({commit()}), torch {torch.__version__}, "
            f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores; "
            f"medians of {arguments.rounds} rounds in ms"
        ),
        "",
    ]
    cases = [(tuple(arguments.size), arguments.dtype)]
    if arguments.all:
        cases = [(size, dtype) for dtype in ("float32", "bfloat16") for size in SIZES]
    for arguments.size, arguments.dtype in cases:
        lines += table(arguments, arguments.only)
    text = "\n".join(lines)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
