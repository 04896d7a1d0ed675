"""What lower precision changes in SEEM's logits: ``python benchmarks/seem_precision.py``.

The tiny configurations of the golden numbers, on random images, on the CPU. With real weights:
``python benchmarks/seem_precision.py --model seem_focalt_v1.pt --images folder``.
"""

import argparse
import importlib.util
from collections.abc import Iterator
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpseg.annotators.folder import image_files
from cpseg.annotators.images import rgb
from cpseg.annotators.seem import SEEMAnnotator, load_checkpoint

FLOOR = log(0.001)  # below it, log p magnifies what decides nothing
NAMES = ["sky", "cat", "dog", "car", "tree"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint; default: the tiny ones")
    parser.add_argument("--images", type=Path, help="a folder; default: random images")
    parser.add_argument("--count", type=int, default=50, help="images (default: %(default)s)")
    given = parser.parse_args()
    print(f"{'':24}{'log p':>10}{'p':>10}{'argmax changed':>18}")
    for name, exact, rough in pairs(given.model):
        pixels = argmax = 0
        logits = shares = 0.0
        for image in images(given.images, given.count):
            a, b = exact.annotate([image])[0].double(), rough.annotate([image])[0].double()
            seen = torch.minimum(a, b) > FLOOR
            logits = max(logits, float((a - b).abs()[seen].max()))
            shares = max(shares, float((a.exp() - b.exp()).abs().max()))
            argmax += int((a.argmax(0) != b.argmax(0)).sum())
            pixels += a[0].numel()
        print(f"{name:24}{logits:10.1e}{shares:10.1e}{argmax / pixels:18.3%}")


def pairs(path: Path | None) -> Iterator[tuple[str, SEEMAnnotator, SEEMAnnotator]]:
    """Two annotators that differ in precision alone."""
    if path is not None:
        model = load_checkpoint(path)
        exact = SEEMAnnotator(model, NAMES, background=0)
        yield path.stem, exact, SEEMAnnotator(model, NAMES, background=0, autocast=torch.bfloat16)
        return
    golden = golden_numbers()
    for block in ("focal_dw", "focal"):
        options: dict[str, Any] = {
            "background": 0,
            "templates": ["a {}."],
            "tokenizer": golden.words,
            "short": 64,
        }
        single = golden.golden_model(block, torch.float32)
        exact = SEEMAnnotator(single, NAMES, **options)
        rough = SEEMAnnotator(single, NAMES, autocast=torch.bfloat16, **options)
        double = SEEMAnnotator(golden.golden_model(block), NAMES, **options)
        yield f"{block}, float32", double, exact
        yield f"{block}, bfloat16", exact, rough


def images(folder: Path | None, count: int) -> Iterator[Tensor]:
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            # Smooth colors and some noise: neither flat nor without structure.
            coarse = torch.rand((1, 3, 6, 8), generator=generator)
            smooth = torch.nn.functional.interpolate(coarse, size=(64, 96), mode="bilinear")[0]
            noise = torch.rand((3, 64, 96), generator=generator)
            yield (255 * (0.8 * smooth + 0.2 * noise)).round().to(torch.uint8)
        return
    from PIL import Image  # noqa: PLC0415  (optional)

    for path in image_files(folder)[:count]:
        with Image.open(path) as opened:
            yield rgb(opened)


def golden_numbers() -> Any:
    """The test file that holds the formula of the tiny configurations' weights."""
    path = Path(__file__).parents[1] / "tests" / "test_annotators_seem.py"
    spec = importlib.util.spec_from_file_location("golden", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} cannot be read")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
