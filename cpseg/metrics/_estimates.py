"""Numbers with intervals, and how they print."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isnan
from typing import cast, final

from torch import Tensor

from cpseg.errors import InputError


@final
@dataclass(frozen=True, eq=False, slots=True)
class Estimate:
    """A number, or one per class, with an interval from resampled images.

    Guarantee:
        None; percentile bootstrap intervals are approximate, and too short for few images.

    Attributes:
        value: NaN where there was nothing to average. float64 ``()`` or ``(K,)``.
        low: Lower end; NaN with fewer than two images. Shape of ``value``.
        high: Upper end. Shape of ``value``.
    """

    value: Tensor
    low: Tensor
    high: Tensor

    def __str__(self) -> str:
        if self.value.ndim:
            return "; ".join(cells(self))
        return cells(self)[0]


@final
@dataclass(frozen=True, eq=False, slots=True)
class Ratio:
    """One ratio of counts, averaged in both ways. Shapes ``()``, or ``(K,)`` for K classes.

    Attributes:
        mean_of_images: Each image's ratio, averaged over the images that have one.
        mean_of_pixels: Counts summed over images, then divided.
        num_images: Images that have the ratio: their denominator is not 0. int64.
        numerator: Counts summed over images. int64.
        denominator: Counts summed over images. int64.
    """

    mean_of_images: Estimate
    mean_of_pixels: Estimate
    num_images: Tensor
    numerator: Tensor
    denominator: Tensor


def cells(estimate: Estimate) -> list[str]:
    """Each number with its interval, as far as there are any."""
    ends = (estimate.value, estimate.low, estimate.high)
    columns = [cast("list[float]", end.flatten().tolist()) for end in ends]
    cells: list[str] = []
    for value, low, high in zip(*columns, strict=True):
        if isnan(value):
            cells.append("-")
        elif isnan(low):
            cells.append(f"{value:.4f}")
        else:
            cells.append(f"{value:.4f} [{low:.4f}, {high:.4f}]")
    return cells


def names_of(argument: str, kind: str, names: Sequence[str] | None, ratio: Ratio) -> list[str]:
    count = ratio.denominator.numel()
    if names is None:
        return [f"{kind} {index}" for index in range(count)]
    if isinstance(names, str) or len(names) != count:
        raise InputError(f"{argument} must hold {count} names; got {len(names)}")
    return list(names)


def ratio_rows(names: Sequence[str], ratio: Ratio) -> list[tuple[str, ...]]:
    """One line of a table per entry of a ratio."""
    counts = ratio.num_images, ratio.denominator
    columns = [[str(count) for count in each.flatten().tolist()] for each in counts]
    means = cells(ratio.mean_of_images), cells(ratio.mean_of_pixels)
    return list(zip(names, *means, *columns, strict=True))


def table(title: str, rows: Iterable[tuple[str, ...]], confidence: float) -> str:
    level = f"[{100 * confidence:g} %]"
    head = (title, f"mean_of_images {level}", f"mean_of_pixels {level}", "images", "pixels")
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            (
                line[0].ljust(widths[0]),
                *map(str.rjust, line[1:], widths[1:]),
            )  # numbers to the right
        )
        for line in lines
    )


def worst_line(images: Tensor, worst: float, tenth: float) -> str:
    if not len(images):
        return "no image has labeled pixels that count"
    middle = images[len(images) // 2].item()
    return (
        f"{len(images)} images: worst {worst:.4f}, mean of worst tenth {tenth:.4f}, "
        f"upper median {middle:.4f}"
    )
