"""A run holds as much after many steps as after few."""

import gc
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cpseg.data import SyntheticShapes
from cpseg.training import Trainer, UNet
from cpseg.training.recipes import self_training


def live() -> tuple[int, int]:
    """How many tensors there are, and their numbers."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return len(found), sum(tensor.numel() for tensor in found)


def counts_after(directory: Path) -> list[tuple[int, int]]:
    """After 50 steps, and after 200."""
    config = replace(
        self_training(6, warmup_steps=10, steps=190, crop=(8, 8), threshold=0.1),
        labeled_batch=1,
        unlabeled_batch=1,
        log_every=7,
        evaluate_every=50,
        clip=1.0,
    )
    shapes = list(SyntheticShapes(length=3, size=(16, 16), seed=0))
    trainer = Trainer(
        UNet(6, width=4, depth=1),
        config,
        labeled=shapes,
        unlabeled=shapes,
        validation=shapes,
        directory=directory,
        device=torch.device("cpu"),
    )
    return [live() for step in trainer.steps() if step.number in (50, 200)]


def test_the_number_of_live_tensors_does_not_grow(tmp_path: Path) -> None:
    # In an interpreter of its own: what other tests left behind comes and goes when it likes.
    run = subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    early, late = run.stdout.splitlines()
    assert early == late


if __name__ == "__main__":
    sys.stdout.write("\n".join(map(str, counts_after(Path(sys.argv[1])))))
