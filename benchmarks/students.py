"""What filtering is worth to a student: four equal students, three seeds, on synthetic shapes.

Annotator, level, network, steps and the share of self-reliance are the defaults of
``Comparison``; they were settled on the seeds 100 to 106, and the seeds here are others. Printed:
a row per student, its mIoU by seed and the mean; what external labels it had.

    python benchmarks/students.py [steps] [seed ...]
"""

import sys
from statistics import mean

import torch

from cpseg.training import Comparison, compare_on_shapes

torch.set_num_threads(1)
given = [int(word) for word in sys.argv[1:]]
steps = given[0] if given else Comparison().steps
seeds = given[1:] or [10, 11, 12]
rows: dict[str, list[float]] = {}
print(f"{steps} steps; mIoU by seed")
for seed in seeds:
    for result in compare_on_shapes(Comparison(steps=steps, seed=seed)):
        rows.setdefault(result.name, []).append(result.miou)
        labels = f"kept {result.kept:.3f}, of those right {result.right:.3f}"
        print(f"seed {seed}  {result.name:30}{result.miou:.3f}  ({labels})", flush=True)
for name, values in rows.items():
    print(f"| {name} | {' | '.join(f'{v:.3f}' for v in values)} | {mean(values):.3f} |")
