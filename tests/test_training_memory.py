"""A run holds as much after many steps as after few."""

import gc
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


def test_the_number_of_live_tensors_does_not_grow(tmp_path: Path) -> None:
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
        directory=tmp_path,
        device=torch.device("cpu"),
    )
    counts: dict[int, tuple[int, int]] = {}
    for step in trainer.steps():
        if step.number in (50, 200):
            counts[step.number] = live()
    assert counts[50] == counts[200]
