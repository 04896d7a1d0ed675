"""What a step of the trainer costs beside the same step written by hand.

Both run the same batches through equal networks, in pairs whose order alternates, so that
whatever else the machine does meets both alike. Printed: the median over pairs of trainer over
hand, to hold against 1.03, in time on the clock and in time of this thread on its core, which
other processes cannot stretch by taking turns; and the growth of memory over the steps.

    python benchmarks/trainer_overhead.py [pairs]
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # threads that wait must not burn the core

import torch
from measure import most_held
from torch.nn import functional

from cpseg.data import SyntheticShapes
from cpseg.training import BatchKey, Trainer, UNet
from cpseg.training.recipes import conformal_sam

WARMUP = 10
PAIRS = int(sys.argv[1]) if len(sys.argv) > 1 else 60


def seconds(step: Callable[[], object]) -> tuple[float, float]:
    """On the clock, and on the core."""
    clock, core = time.perf_counter(), time.thread_time()
    step()
    return time.perf_counter() - clock, time.thread_time() - core


torch.set_num_threads(1)
torch.manual_seed(0)
student = UNet(6, width=16)
twin = deepcopy(student)
shapes = list(SyntheticShapes(length=8, seed=0))
config = conformal_sam(6, external_steps=PAIRS + WARMUP + 1, self_steps=0, crop=(96, 96))
optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
with TemporaryDirectory() as directory:
    trainer = Trainer(
        student,
        config,
        labeled=shapes,
        unlabeled=shapes,
        directory=Path(directory),
        device=torch.device("cpu"),
    )
    batch = trainer.batches[BatchKey(0, 0, 2, 2, 0)]
    trainer.student.train()
    twin.train()

    def ours() -> None:
        trainer.advance([batch])

    def by_hand() -> None:
        logits = twin(torch.cat((batch.images, batch.weak)))
        loss = functional.cross_entropy(logits[:2], batch.labels, ignore_index=255) / 2
        loss = loss + functional.cross_entropy(logits[2:], batch.external, ignore_index=255) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    pairs: list[tuple[tuple[float, float], tuple[float, float]]] = []
    memory = 0
    for pair in range(PAIRS + WARMUP):
        if pair == WARMUP:
            pairs.clear()
            memory = most_held()
        if pair % 2:
            hand = seconds(by_hand)
            pairs.append((seconds(ours), hand))
        else:
            pairs.append((seconds(ours), seconds(by_hand)))
grown = (most_held() - memory) // 1024
for index, name in enumerate(("on the clock", "on the core")):
    ratios = sorted(mine[index] / hand[index] for mine, hand in pairs)
    middle = [1e3 * statistics.median(each[side][index] for each in pairs) for side in (0, 1)]
    print(
        f"{name}: trainer {middle[0]:.1f} ms, by hand {middle[1]:.1f} ms; "
        f"median ratio {statistics.median(ratios):.3f} (at most 1.03), "
        f"quartiles {ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f}"
    )
print(f"{len(pairs)} pairs; peak memory grew by {grown} KiB over them")
