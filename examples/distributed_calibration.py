"""Calibrate with several processes: each sees a share of the data, ``gather`` gives all the same.

Run it plainly, and it starts two processes of its own:

    python examples/distributed_calibration.py

or let torch start them:

    torchrun --nproc-per-node 2 examples/distributed_calibration.py

Each process says what it has seen, and the first compares with one process that saw everything.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cpseg import Calibration, ClassConditionalCalibrator, PixelSetPredictor, gather
from cpseg.metrics import Coverage

CLASSES, IMAGES = 4, 41  # an odd number: shares are uneven


def image(index: int) -> tuple[Tensor, Tensor]:
    """Logits ``(1, C, H, W)`` and labels ``(1, H, W)``: the same whichever process asks."""
    generator = torch.Generator().manual_seed(index)
    labels = torch.randint(0, CLASSES, (1, 24, 32), generator=generator)
    hot = torch.nn.functional.one_hot(labels, CLASSES).movedim(-1, 1)
    skill = 2 + torch.randn((), generator=generator)
    return skill * hot + torch.randn(hot.shape, generator=generator), labels


def calibrate(indices: range) -> ClassConditionalCalibrator:
    """A calibrator that has seen these images."""
    calibrator = ClassConditionalCalibrator(CLASSES)
    for index in indices:
        calibrator.update(*image(index))
    return calibrator


def measure(calibration: Calibration, indices: range) -> Coverage:
    """Coverage of the sets on these images."""
    coverage, predictor = Coverage(CLASSES), PixelSetPredictor(calibration)
    for index in indices:
        logits, labels = image(index)
        coverage.update(predictor(logits), labels)
    return coverage


def same(one: dict[str, object], other: dict[str, object]) -> bool:
    """Whether two states are equal to the bit."""
    pairs = [(value, other[name]) for name, value in one.items()]
    return one.keys() == other.keys() and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in pairs
    )


def work() -> None:
    """What each process does."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = calibrate(range(rank, IMAGES, world))
    whole = gather(mine)  # every process must make this call
    calibration = whole.compute(alpha=0.1)
    fresh = range(IMAGES + rank, 2 * IMAGES, world)
    coverage = gather(measure(calibration, fresh))
    if rank == 0:
        alone = calibrate(range(IMAGES))
        assert same(whole.state_dict(), alone.state_dict())  # noqa: S101 - what is shown here
        assert torch.equal(calibration.thresholds, alone.compute(alpha=0.1).thresholds)  # noqa: S101
        of_all = measure(calibration, range(IMAGES, 2 * IMAGES))
        assert same(coverage.state_dict(), of_all.state_dict())  # noqa: S101
        shares = [len(range(other, IMAGES, world)) for other in range(world)]
        print(f"{world} processes saw {shares} images")
        print(f"all together: {calibration.num_units.tolist()} images per class")
        print(f"thresholds: {[round(value, 4) for value in calibration.thresholds.tolist()]}")
        print(f"coverage of new images: {coverage.compute().mean_of_images:.3f}")
        print("equal to one process, to the bit", flush=True)


def main() -> int:
    """One of several processes, or the one that starts them."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:  # torchrun, or the lines below
        backend = "nccl" if torch.cuda.device_count() > 1 else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        meeting = os.environ.get("MEETING")
        dist.init_process_group(
            backend,
            init_method=meeting,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
        work()
        dist.destroy_process_group()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        shared = {**os.environ, "WORLD_SIZE": "2", "MEETING": Path(folder, "meet").as_uri()}
        running = [
            subprocess.Popen(  # noqa: S603 - this very file
                [sys.executable, __file__],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]
        return max(abs(process.wait()) for process in running)


if __name__ == "__main__":
    sys.exit(main())
