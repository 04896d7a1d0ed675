"""Memory and time of SEEM at full size on the CPU: ``python benchmarks/seem_memory.py``.

Random weights, one image of 1024 x 2048 pixels, 19 classes, one thread. Every row is a process of
its own, since a process's peak never falls. Texts are embedded with one template, before the clock
starts. Some minutes and 2.9 GB. POSIX only (``resource``).
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import zlib

import torch
from torch import Tensor

from cpseg.annotators.seem import SEEM, SEEMAnnotator, SEEMConfig

CASES = (("Focal-T", 512), ("Focal-L", 512), ("Focal-T", 1024), ("Focal-L", 1024))
NAMES = [f"class {i}" for i in range(19)]
END = SEEMConfig().text_vocabulary - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=2, metavar=("MODEL", "SHORT"), help="one row, as JSON")
    parser.add_argument("--size", nargs=2, type=int, default=(1024, 2048), metavar=("H", "W"))
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(given.case[0], int(given.case[1]), tuple(given.size))))
        return
    print(f"{'':24}{'peak GB':>10}{'weights':>10}{'idle':>8}{'beside both':>14}{'seconds':>10}")
    for name, short in CASES:
        size = [str(side) for side in given.size]
        command = [sys.executable, __file__, "--case", name, str(short), "--size", *size]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(answer.stdout)
        beside = found["peak"] - found["weights"] - found["idle"]
        print(
            f"{f'{name}, short={short}':24}{found['peak']:10.2f}{found['weights']:10.2f}"
            f"{found['idle']:8.2f}{beside:14.2f}{found['seconds']:10.0f}",
            flush=True,
        )


def measure(name: str, short: int, size: tuple[int, int]) -> dict[str, float]:
    """Gigabytes (10**9 bytes) and seconds of one image."""
    torch.set_num_threads(1)
    idle = peak()
    torch.manual_seed(0)
    config = SEEMConfig.focal_t() if name == "Focal-T" else SEEMConfig.focal_l()
    model = SEEM(config).requires_grad_(requires_grad=False)
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    annotator = SEEMAnnotator(
        model, NAMES, background=0, templates=["a {}."], tokenizer=words, short=short
    )
    image = torch.randint(0, 256, (1, 3, *size)).to(torch.uint8)
    start = time.perf_counter()
    annotator(image)
    seconds = time.perf_counter() - start
    return {"peak": peak(), "weights": weights / 1e9, "idle": idle, "seconds": seconds}


def words(texts: list[str]) -> Tensor:
    """A tokenizer: an id per word, the last id ends a text."""
    rows = [[*(zlib.crc32(word.encode()) % END for word in text.split()), END] for text in texts]
    length = max(map(len, rows))
    return torch.tensor([row + [END] * (length - len(row)) for row in rows])


def peak() -> float:
    """Most memory that this process ever held, in gigabytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    main()
