"""What a step of the trainer costs beside the same step written by hand.

Both run the same batches through equal networks, alternating step by step so that whatever else
the machine does meets both. Printed: the median ratio of neighboring steps, the factor to hold
against 1.03, and the growth of memory over the steps.

    python benchmarks/trainer_overhead.py [steps]
"""

import resource
import statistics
import sys
import time
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn import functional

from cpseg.data import SyntheticShapes
from cpseg.training import BatchKey, Trainer, UNet
from cpseg.training.recipes import conformal_sam

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
torch.set_num_threads(1)
torch.manual_seed(0)
student = UNet(6, width=16)
twin = deepcopy(student)
shapes = list(SyntheticShapes(length=8, seed=0))
config = conformal_sam(6, external_steps=steps + 20, self_steps=0, crop=(96, 96))
optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
ratios, ours, theirs = [], [], []
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
    memory = 0
    for step in range(steps + 10):
        if step == 10:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        trainer.advance([batch])
        between = time.perf_counter()
        logits = twin(torch.cat((batch.images, batch.weak)))
        loss = functional.cross_entropy(logits[:2], batch.labels, ignore_index=255) / 2
        loss = loss + functional.cross_entropy(logits[2:], batch.external, ignore_index=255) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        if step >= 10:
            ours.append(between - start)
            theirs.append(end - between)
            ratios.append(ours[-1] / theirs[-1])
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
print(
    f"trainer {1e3 * statistics.median(ours):.1f} ms, by hand {1e3 * statistics.median(theirs):.1f} ms"
)
print(f"ratio {statistics.median(ratios):.3f} (at most 1.03), {steps} steps")
print(f"peak memory grew by {grown} KiB over the last {steps} steps")
