"""Memory and time of SEEM at full size on the CPU: ``python benchmarks/seem_memory.py``.

Random weights, one image of 1024 x 2048 pixels, 19 classes, one thread. Every row is a process of
its own, since a process's peak never falls. Texts are embedded with one template, before the clock
starts. Some minutes and 2.9 GB. Linux only.
"""

import argparse
import json
import zlib

import torch
from measure import alone, answer, answered, clock, most_held
from torch import Tensor

from cpseg.annotators.seem import SEEM, SEEMAnnotator, SEEMConfig

CASES = (("Focal-T", 512), ("Focal-L", 512), ("Focal-T", 1024), ("Focal-L", 1024))
NAMES = [f"class {i}" for i in range(19)]
END = SEEMConfig().text_vocabulary - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", nargs=2, type=int, default=(1024, 2048), metavar=("H", "W"))
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        answer(measured(**given.case))
        return
    print(f"{'':24}{'peak GB':>10}{'weights':>10}{'idle':>8}{'beside both':>14}{'seconds':>10}")
    for name, short in CASES:
        case = {"name": name, "short": short, "size": given.size}
        found = answered(alone(__file__, case))
        beside = found["peak"] - found["weights"] - found["idle"]
        print(
            f"{f'{name}, short={short}':24}{found['peak']:10.2f}{found['weights']:10.2f}"
            f"{found['idle']:8.2f}{beside:14.2f}{found['seconds']:10.0f}",
            flush=True,
        )


def measured(name: str, short: int, size: list[int]) -> dict[str, float]:
    """Gigabytes (10**9 bytes) and seconds of one image."""
    torch.set_num_threads(1)
    idle = most_held()
    torch.manual_seed(0)
    config = SEEMConfig.focal_t() if name == "Focal-T" else SEEMConfig.focal_l()
    model = SEEM(config).requires_grad_(requires_grad=False)
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    annotator = SEEMAnnotator(
        model, NAMES, background=0, templates=["a {}."], tokenizer=words, short=short
    )
    image = torch.randint(0, 256, (1, 3, *size)).to(torch.uint8)
    seconds = clock(lambda: annotator(image)) / 1e3
    held = {"peak": most_held() / 1e9, "weights": weights / 1e9, "idle": idle / 1e9}
    return {**held, "seconds": seconds}


def words(texts: list[str]) -> Tensor:
    """A tokenizer: an id per word, the last id ends a text."""
    rows = [[*(zlib.crc32(word.encode()) % END for word in text.split()), END] for text in texts]
    length = max(map(len, rows))
    return torch.tensor([row + [END] * (length - len(row)) for row in rows])


if __name__ == "__main__":
    main()
