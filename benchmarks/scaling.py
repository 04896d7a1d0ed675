"""How time and memory grow: with images, with classes, with processes.

    make bench                          # all of it, to benchmarks/results/
    python benchmarks/scaling.py --quick
    python benchmarks/scaling.py --only images --images 10000

*images*: one stream of images, batch after batch, its units closed as they go; told at every power
of ten. Memory is the most that the process held beyond what it held before the calibrator was made.
*classes*: one image; time per pixel and class, the first compiled call, memory as a share of the
logits' bytes. *processes*: the same images in as many shares as there are processes, on gloo; the
clock runs from the start of the slowest to the end of its ``gather``. One thread each.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from evidence.tables import Row, markdown
from measure import (
    GIVEN_BACK,
    RESULTS,
    Way,
    alone,
    answer,
    answered,
    clock,
    held,
    interleaved,
    machine,
    most_held,
    publish,
    settled,
)
from torch import Tensor

from cpseg import APS, LAC, ClassConditionalCalibrator, PixelSetPredictor, gather
from cpseg.protocols import Score

SCORES: dict[str, Score] = {"LAC": LAC(), "APS": APS()}
BATCH, CLASSES, SIDE = 2, 21, 512


def drawn(images: int, classes: int, side: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a fair model that is often sure, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, classes, side, side, generator=generator)
    return logits, logits.argmax(1)


def by_images(score: str, side: int, images: int) -> list[Row]:
    """One row at every power of ten."""
    batches = [drawn(BATCH, CLASSES, side, seed) for seed in range(3)]
    scratch = ClassConditionalCalibrator(CLASSES, SCORES[score])
    scratch.update(*batches[0], range(BATCH)).close_units(range(BATCH))  # torch's own first time
    del scratch
    before, peak, start = held(), 0, time.perf_counter()
    calibrator = ClassConditionalCalibrator(CLASSES, SCORES[score])
    rows: list[Row] = []
    for seen in range(0, images, BATCH):
        units = range(seen, seen + BATCH)
        calibrator.update(*batches[seen // BATCH % len(batches)], units).close_units(units)
        done = seen + BATCH
        if done in (10, 100, 1_000, 10_000):
            taken, peak = time.perf_counter() - start, max(peak, most_held() - before)
            rows.append(
                {
                    "score": score,
                    "images": done,
                    "side": side,
                    "seconds": taken,
                    "ns per pixel": 1e9 * taken / (done * side**2),
                    "memory MiB": peak / 2**20,
                    "state MiB": size_of(calibrator.state_dict()) / 2**20,
                }
            )
            held()  # what is looked at here is no part of the work, nor of its time
            start = time.perf_counter() - taken
    return rows


def size_of(state: dict[str, object]) -> int:
    """Bytes of its tensors."""
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in tensors)


def jobs(classes: int, side: int, *, compiled: bool) -> dict[tuple[str, str], Way]:
    """An update and sets by each score, on one image."""
    logits, labels = drawn(1, classes, side)
    found: dict[tuple[str, str], Way] = {}
    for name, score in SCORES.items():
        held_out = ClassConditionalCalibrator(classes, score, ignore_index=-1)
        calibration = held_out.update(logits, labels).compute(0.5)
        calibrator = ClassConditionalCalibrator(classes, score, ignore_index=-1, compiled=compiled)
        found[name, "update"] = partial(calibrator.update, logits, labels)
        found[name, "sets"] = partial(PixelSetPredictor(calibration, compiled=compiled), logits)
    return found


def by_classes(classes: int, side: int, seconds: float) -> list[Row]:
    """A row for each score and operation."""
    rows: list[Row] = []
    scale = 1e6 / (side**2 * classes)
    eager, compiled = (jobs(classes, side, compiled=fused) for fused in (False, True))
    for (score, what), run in eager.items():
        ways = {"eager": run, "compiled": compiled[score, what]}
        first, middle, rounds = interleaved(ways, clock, seconds)
        row = {"score": score, "operation": what, "classes": classes, "side": side}
        told = {f"{way} ns per pixel and class": scale * middle[way] for way in ways}
        rows.append({**row, **told, "first call s": first["compiled"] / 1e3, "rounds": rounds})
    return rows


def memory(classes: int, side: int) -> list[Row]:
    """Of one call, as a share of the logits' bytes, in the order of :func:`by_classes`."""
    size = 4 * classes * side**2
    eager, compiled = (jobs(classes, side, compiled=fused) for fused in (False, True))
    return [
        {"eager memory": settled(run) / size, "compiled memory": settled(compiled[key]) / size}
        for key, run in eager.items()
    ]


def by_processes(rank: int, world: int, meeting: str, side: int, images: int) -> dict[str, float]:
    """Milliseconds of one process's share, and of its ``gather``."""
    batch = drawn(BATCH, CLASSES, side)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    calibrator = ClassConditionalCalibrator(CLASSES).update(*batch).reset()
    gather(ClassConditionalCalibrator(CLASSES).update(*batch))  # gloo's own first time
    dist.barrier()

    def share() -> None:
        for _ in range(rank, images // BATCH, world):
            calibrator.update(*batch)

    taken = {"share ms": clock(share)}
    dist.barrier()
    taken["gather ms"] = clock(lambda: gather(calibrator))
    dist.destroy_process_group()
    return taken


def images_rows(arguments: argparse.Namespace, cache: str) -> Iterator[Row]:
    for score, most in (("LAC", arguments.images), ("APS", arguments.images // 10)):
        case = {"by": "images", "score": score, "side": arguments.side, "images": most}
        yield from answered(alone(__file__, case, cache=cache, **GIVEN_BACK))


def classes_rows(arguments: argparse.Namespace, cache: str) -> Iterator[Row]:
    for classes in arguments.classes:
        case = {"classes": classes, "side": arguments.side // 2}
        timed = {**case, "by": "classes", "seconds": arguments.seconds}
        rows = answered(alone(__file__, timed, cache=cache))
        found = answered(alone(__file__, {**case, "by": "memory"}, cache=cache, **GIVEN_BACK))
        yield from ({**row, **shares} for row, shares in zip(rows, found, strict=True))


def processes_rows(arguments: argparse.Namespace, cache: str) -> Iterator[Row]:
    images = max(arguments.images // 100, 2 * BATCH)
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            meeting = Path(folder, "meet").as_uri()
            shared = {"by": "processes", "side": arguments.side, "images": images, "world": world}
            running = [
                alone(__file__, {**shared, "rank": rank, "meeting": meeting}, cache=cache)
                for rank in range(world)
            ]
            found = [answered(process) for process in running]
        slowest = {name: max(each[name] for each in found) for name in found[0]}
        yield {"processes": world, "images": images, "side": arguments.side, **slowest}


PARTS = {"images": images_rows, "classes": classes_rows, "processes": processes_rows}
DIGITS = {"seconds": 1, "ns per pixel": 0, "memory MiB": 1, "state MiB": 2, "first call s": 1}


def told(row: Row) -> Row:
    """A row as text."""
    text: dict[str, object] = {}
    for name, value in row.items():
        if name.endswith("memory"):
            text[name] = f"{value:.0%}"
        elif isinstance(value, float):
            text[name] = f"{value:,.{DIGITS.get(name, 1)}f}"
        elif name not in ("side", "rounds"):
            text[name] = f"{value:,}" if isinstance(value, int) else value
    return text


def page(rows: Sequence[Row]) -> str:
    """A table of what one part found."""
    lines = [told(row) for row in rows]
    return markdown(lines, list(lines[0]))


CASES: dict[str, Callable[..., object]] = {
    "images": by_images,
    "classes": by_classes,
    "memory": memory,
    "processes": by_processes,
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny images, and few of them")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--images", type=int, default=10_000, help="most images")
    parser.add_argument("--side", type=int, default=SIDE, help="of an image, in pixels")
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 21, 150, 1_000])
    parser.add_argument("--seconds", type=float, default=5, help="of rounds per operation")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    if arguments.case is not None:
        case = arguments.case
        answer(CASES[case.pop("by")](**case))
        return
    if arguments.quick:
        arguments.images, arguments.side = 100, 16
        arguments.classes, arguments.seconds = [2], 0
    for part in arguments.only:
        with tempfile.TemporaryDirectory() as cache:
            rows = list(PARTS[part](arguments, cache))
        print(f"by {part}\n\n{page(rows)}\n", flush=True)
        publish(arguments.output, f"scaling_{part}", rows, page(rows), machine())


if __name__ == "__main__":
    main()
