"""How long calibration, sets and pseudo-labels take, beside TorchCP and MAPIE, and in what memory.

    make bench                                # all of it: an hour, to benchmarks/results/
    python benchmarks/speed.py --quick        # whether it runs
    python benchmarks/speed.py --device cuda  # sizes repeated until the logits fill 2 GiB

Every size, dtype and number of threads is measured in a process of its own (``measure.py``), ours
and theirs interleaved. The first call compiles, and finds nothing compiled before. Memory is what
a call needs beyond the logits and, for an update, the state; with one thread.

Peers are taken along where they can be imported. TorchCP takes rows ``(N, C)``: what it needs to
get there from images is in its time; in brackets, without. It needs stand-ins for packages that
this does not use. MAPIE's segmentation controller has one operation of ours, the risk of a class
missing from its set: it counts recall at a hundred thresholds, images of two axes, probabilities
in numpy. It takes one image at a time, and 13 bytes per class, pixel and threshold: where half of
the memory does not hold that, it is left out. It has no thresholds per class, no scores but
probabilities, and no labels.

On a GPU no peer is run; bandwidth is bytes read plus written, as a share of a copy's.
"""

import argparse
import json
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from evidence.tables import Row, markdown
from measure import (
    GIVEN_BACK,
    RESULTS,
    Way,
    alone,
    answer,
    answered,
    clock,
    cuda_clock,
    extra_memory,
    interleaved,
    machine,
    publish,
    settled,
)
from torch import Tensor

from cpseg import APS, LAC, BackgroundPriority, ClassConditionalCalibrator, PixelSetPredictor
from cpseg.risk import Miscoverage, RiskCalibrator

SIZES = [(4, 21, 512, 512), (2, 150, 512, 512), (1, 19, 1024, 2048), (1, 4, 128, 128, 128)]
OPERATIONS = [
    "LAC update",
    "LAC sets",
    "LAC packed",
    "APS update",
    "APS sets",
    "background",
    "risk update",
    "risk sets",
]
UNFUSED = ("risk update", "compiled")  # which there is not
IGNORED = 255
OTHERS = "<!-- other sizes, dtypes and threads -->"  # the page of the docs ends here
FLOOR = "one compiled logsumexp"
ENOUGH = 2**31  # bytes of logits on a GPU: less is bound by launches
MAPIE_BYTES = 100 * (4 + 1 + 8)  # per class and pixel: a float, a bool and an int per threshold
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


@dataclass(frozen=True)
class Case:
    """What a process measures: times of some operations, or their memory."""

    size: tuple[int, ...]
    dtype: str
    threads: int
    device: str
    seconds: float
    operations: tuple[str, ...]
    what: str = "times"

    @classmethod
    def told(cls, text: str) -> Self:
        """From the command line of the process."""
        given = json.loads(text)
        return cls(**{**given, "size": tuple(given["size"])})


@dataclass(frozen=True)
class Batch:
    """What every way of doing the job starts from."""

    logits: Tensor
    labels: Tensor

    @classmethod
    def drawn(cls, case: Case) -> Self:
        """Logits of a fair model that is often sure, and a tenth of the pixels void."""
        generator = torch.Generator().manual_seed(0)
        size = case.size
        logits = 3 * torch.randn(size, generator=generator)
        space = (size[0], *size[2:])
        likely = torch.rand(space, generator=generator) < 0.7
        guessed = torch.randint(0, size[1], space, generator=generator)
        labels = torch.where(likely, logits.argmax(1), guessed)
        labels[torch.rand(space, generator=generator) < 0.1] = IGNORED
        logits = logits.to(case.device, getattr(torch, case.dtype))
        labels = labels.to(case.device)
        if case.device != "cpu":
            times = -(-ENOUGH // (logits.numel() * logits.element_size()))
            logits = logits.repeat(times, *(1 for _ in size[1:]))
            labels = labels.repeat(times, *(1 for _ in size[2:]))
        return cls(logits, labels)

    @property
    def first(self) -> "Batch":
        """Its first image."""
        return Batch(self.logits[:1], self.labels[:1])

    @property
    def rows(self) -> Tensor:
        """Pixels as rows, as TorchCP takes them."""
        return self.logits.movedim(1, -1).reshape(-1, self.logits.shape[1])


def moved(operation: str, batch: Batch) -> int:
    """Bytes that an operation must read and write: logits, labels, sets."""
    logits, pixels = batch.logits, batch.labels.numel()
    read = logits.numel() * logits.element_size()
    _, _, what = operation.partition(" ")
    if what == "update":
        return read + pixels * batch.labels.element_size()
    words = -(-logits.shape[1] // 32)
    written = {"sets": logits.numel(), "packed": 4 * words * pixels, "": pixels}
    return read + written[what]


def ours(operation: str, batch: Batch, *, compiled: bool) -> Way:
    """One operation of cpseg, ready to run."""
    logits, labels = batch.logits, batch.labels
    classes = logits.shape[1]
    name, _, what = operation.partition(" ")
    if name == "risk":
        risk = RiskCalibrator(Miscoverage())
        if what == "update":
            return lambda: risk.update(logits, labels)
        ten = risk.update(
            logits.expand(10, *logits.shape[1:]), labels.expand(10, *labels.shape[1:])
        )
        return sets_of(PixelSetPredictor(ten.compute(0.1), compiled=compiled), logits)
    score = APS() if name == "APS" else LAC()
    calibrator = ClassConditionalCalibrator(classes, score, compiled=compiled)
    if what == "update":
        return lambda: calibrator.update(logits, labels)
    seen = ClassConditionalCalibrator(classes, score)
    for _ in range(10):
        seen.update(logits[:1], labels[:1])
    calibration = seen.compute(0.1)
    if what == "":
        labeled = BackgroundPriority(calibration, compiled=compiled)
        return lambda: labeled(logits)
    predictor = PixelSetPredictor(calibration, compiled=compiled)
    return sets_of(predictor, logits) if what == "sets" else lambda: predictor.packed(logits)


def sets_of(predictor: PixelSetPredictor, logits: Tensor) -> Way:
    return lambda: predictor(logits)


def peer_of(operation: str) -> str:
    """Who else does it."""
    return {"risk": "MAPIE", "background": FLOOR}.get(operation.split(maxsplit=1)[0], "TorchCP")


def theirs(operation: str, batch: Batch) -> dict[str, Way]:
    """The same by a peer: from images, and from rows that are there. Empty where it cannot."""
    peer = peer_of(operation)
    if peer == FLOOR:
        floor = torch.compile(lambda x: torch.logsumexp(x, 1), dynamic=False)
        return {"peer": lambda: floor(batch.logits)}
    if batch.logits.device.type != "cpu":
        return {}
    return (of_mapie if peer == "MAPIE" else of_torchcp)(operation, batch)


def of_torchcp(operation: str, batch: Batch) -> dict[str, Way]:
    name, _, what = operation.partition(" ")
    if find_spec("torchcp") is None:
        return {}
    stand_in()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classification = import_module("torchcp.classification")
        options = {"randomized": False} if name == "APS" else {}
        score = getattr(classification.score, name)(**options)
        peer = classification.predictor.ClassConditionalPredictor(score, temperature=1)
        valid = (batch.labels != IGNORED).reshape(-1)
        rows, labels = batch.rows, batch.labels.reshape(-1)
        kept, known = rows[valid], labels[valid]
        peer.calculate_threshold(kept.float(), known, 0.1)

    def calibrate() -> None:
        peer.calculate_threshold(batch.rows[valid].float(), labels[valid], 0.1)

    if what == "update":
        return {
            "peer": calibrate,
            "rows": lambda: peer.calculate_threshold(kept.float(), known, 0.1),
        }
    return {
        "peer": lambda: peer.predict_with_logits(batch.rows.float(), 0.1),
        "rows": lambda: peer.predict_with_logits(rows.float(), 0.1),
    }


def stand_in() -> None:
    """Empty modules for what TorchCP imports and does not use here."""
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


def of_mapie(operation: str, batch: Batch) -> dict[str, Way]:
    """Void pixels are of no class: recall skips them."""
    if find_spec("mapie") is None or find_spec("sklearn") is None or not taken_by_mapie(batch):
        return {}
    classes = batch.logits.shape[1]

    def probabilities(logits: Tensor) -> Any:
        return logits.softmax(1).numpy()

    def calibrate() -> Any:
        hot = torch.nn.functional.one_hot(batch.labels.clamp(max=classes), classes + 1)
        truth = hot[..., :classes].movedim(-1, 1).reshape(len(hot), -1).numpy()
        return controller().compute_risks(batch.logits, truth)

    def controller() -> Any:
        return import_module("mapie.risk_control").SemanticSegmentationController(probabilities)

    if operation == "risk update":
        return {"peer": calibrate}
    seen = controller()
    seen.best_predict_param, seen._is_fitted = seen.predict_params[50:51], True
    return {"peer": lambda: seen.predict(batch.logits)}


def taken_by_mapie(batch: Batch) -> bool:
    """Whether it knows the shape and dtype, and half of the memory that is left holds its work."""
    logits = batch.logits
    left = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    known = logits.ndim == 4 and logits.dtype == torch.float32
    return known and MAPIE_BYTES * logits.numel() < left / 2


def started_from(operation: str, batch: Batch) -> Batch:
    """All images, or the one that MAPIE can take."""
    return batch.first if operation.startswith("risk") else batch


def times(case: Case) -> Iterator[Row]:
    """A row for each operation."""
    whole = Batch.drawn(case)
    timed = clock if case.device == "cpu" else cuda_clock
    for operation in case.operations:
        batch = started_from(operation, whole)
        peer = theirs(operation, batch)
        if operation.startswith("risk") and not peer:
            continue  # nothing to stand beside
        ways = {
            name: ours(operation, batch, compiled=name == "compiled")
            for name in ("eager", "compiled")
            if (operation, name) != UNFUSED
        }
        first, middle, rounds = interleaved({**ways, **peer}, timed, case.seconds)
        row: dict[str, object] = {
            "size": " ".join(map(str, batch.logits.shape)),
            "dtype": case.dtype,
            "threads": case.threads,
            "device": case.device,
            "operation": operation,
            "peer": peer_of(operation) if peer else "",
            "rounds": rounds,
            **{f"{name} ms": value for name, value in middle.items()},
        }
        if "compiled" in first:
            row["first call s"] = first["compiled"] / 1e3
        if case.device != "cpu":
            row |= on_gpu(operation, batch, ways, middle)
        print(operation, {name: round(value, 1) for name, value in middle.items()}, file=sys.stderr)
        yield row


def on_gpu(
    operation: str, batch: Batch, ways: Mapping[str, Way], middle: Mapping[str, float]
) -> Row:
    """Bandwidth as a share of a copy's, and memory by the allocator's count."""
    logits = batch.logits
    _, copied, _ = interleaved({"copy": copy_of(logits)}, cuda_clock, 1)
    size = logits.numel() * logits.element_size()
    row: dict[str, object] = {"copy ms": copied["copy"]}
    for name, run in ways.items():
        row[f"{name} bandwidth"] = share_of_copy(
            moved(operation, batch), middle[name], 2 * size, copied["copy"]
        )
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        row[f"{name} memory"] = (torch.cuda.max_memory_allocated() - before) / size
        del result
    return row


def copy_of(logits: Tensor) -> Way:
    target = torch.empty_like(logits)
    return lambda: target.copy_(logits)


def share_of_copy(moved: int, taken: float, copied: int, copying: float) -> float:
    """How near bytes per time come to those of a copy, which reads all it writes."""
    return (moved / taken) / (copied / copying)


def memory(case: Case) -> Iterator[Row]:
    """The most extra memory of each way of each operation, as a share of the logits' bytes."""
    whole = Batch.drawn(case)
    for operation in case.operations:
        batch = started_from(operation, whole)
        size = batch.logits.numel() * batch.logits.element_size()
        row = {
            f"{name} memory": settled(ours(operation, batch, compiled=name == "compiled")) / size
            for name in ("eager", "compiled")
            if (operation, name) != UNFUSED
        }
        if peer_of(operation) != FLOOR and (peer := theirs(operation, batch)):
            row["peer memory"] = extra_memory(peer["peer"]) / size
        yield row


def measured(case: Case) -> list[Row]:
    """Times, and memory with one thread; whatever is compiled is compiled anew."""
    with tempfile.TemporaryDirectory() as cache:
        rows = answered(alone(__file__, asdict(case), cache=cache))
        if case.device != "cpu" or case.threads > 1:
            return list(rows)
        there = [row["operation"] for row in rows]
        one = asdict(replace(case, operations=tuple(there), what="memory"))
        found = answered(alone(__file__, one, cache=cache, **GIVEN_BACK))
    return [{**row, **shares} for row, shares in zip(rows, found, strict=True)]


def table(rows: Sequence[Row]) -> str:
    """What a reader wants to see of one case's rows."""
    columns = ["operation", "eager", "compiled", "first call", "peer", "eager is", "compiled is"]
    columns += [name for name in ("memory", "bandwidth") if any(f"eager {name}" in r for r in rows)]
    return markdown([line(row) for row in rows], columns)


def line(row: Row) -> Row:
    """One of its lines, as text."""

    def number(name: str, form: str, after: str = "") -> str:
        return f"{row[name]:{form}}{after}" if name in row else ""

    def ways(what: str) -> str:
        given = [number(f"{way} {what}", ".0%") for way in ("eager", "compiled", "peer")]
        own = " / ".join(share for share in given[:2] if share)
        return f"{own} ({given[2]})" if given[2] else own

    told: dict[str, Any] = {
        "operation": row["operation"],
        "eager": number("eager ms", ".0f"),
        "compiled": number("compiled ms", ".0f"),
        "first call": number("first call s", ".1f", " s"),
        "memory": ways("memory"),
        "bandwidth": ways("bandwidth"),
    }
    if "peer ms" not in row:
        return told
    told["peer"] = f"{row['peer']}: {row['peer ms']:.0f}"
    if "rows ms" in row:
        told["peer"] += f" ({row['rows ms']:.0f})"
    for way in ("eager", "compiled"):
        if f"{way} ms" in row:
            told[f"{way} is"] = ratio(row, way)
    return told


def ratio(row: Mapping[str, Any], way: str) -> str:
    """How much faster than a peer, or how many passes over the logits."""
    ours, peer = row[f"{way} ms"], row["peer ms"]
    return f"{ours / peer:.1f} passes" if row["peer"] == FLOOR else f"{peer / ours:.1f}x"


def page(rows: Sequence[Row]) -> str:
    """A table for each case; those after :data:`OTHERS` differ from the first in more than images.

    One image of a case stands below its whole batch.
    """
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("size", "dtype", "threads", "device"))
        cases.setdefault(key, []).append(row)
    parts: list[str] = []
    begun = ""
    for (size, dtype, threads, device), held in cases.items():
        _, _, image = size.partition(" ")
        kind = f"{image} {dtype} {threads}"
        if begun and kind != begun and OTHERS not in parts:
            parts.append(OTHERS)
        begun = begun or kind
        plural = "" if threads == 1 else "s"
        told = f"({size.replace(' ', ', ')}) {dtype}, {device}, {threads} thread{plural}"
        parts += [f"{told}; times in ms:", table(held)]
    return "\n\n".join(parts if OTHERS in parts else [*parts, OTHERS])


def cases_of(arguments: argparse.Namespace) -> Iterator[Case]:
    """By threads, dtype and size."""
    sizes = [(1, 3, 16, 16)] if arguments.quick else arguments.size or SIZES
    for threads in arguments.threads:
        for dtype in ("float32",) if arguments.quick else arguments.dtype:
            for size in sizes:
                yield Case(
                    tuple(size),
                    dtype,
                    threads,
                    arguments.device,
                    0 if arguments.quick else arguments.seconds,
                    tuple(arguments.only),
                )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one tiny size, three rounds")
    parser.add_argument("--size", type=int, nargs="+", action="append", help="may be repeated")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", default=OPERATIONS, help="some of the operations")
    parser.add_argument("--seconds", type=float, default=8, help="of rounds per operation")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--case", type=Case.told, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.case is not None:
        torch.set_num_threads(arguments.case.threads)
        answer(list({"times": times, "memory": memory}[arguments.case.what](arguments.case)))
        return
    rows: list[Row] = []
    name = "speed" if arguments.device == "cpu" else f"speed_{arguments.device}"
    for case in cases_of(arguments):
        found = measured(case)
        rows += found
        print(page(found), flush=True)
        publish(arguments.output, name, rows, page(rows), machine(arguments.device))


if __name__ == "__main__":
    main()
