"""What each threshold of a calibration rests on: its images, its own or a fallback, what is missing.

A table over 150 classes is read by whoever must decide where more labels are needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch

from cpseg.bounds import least_units
from cpseg.calibration import Calibration
from cpseg.errors import InputError
from cpseg.quantile import fewest_units, level

__all__ = ["Standing", "standing", "standing_table"]


@final
@dataclass(frozen=True, slots=True)
class Standing:
    """One threshold, and what it rests on.

    Attributes:
        place: Where it holds: a class, a group, both; empty where one holds everywhere.
        name: The class's name, if it was given; else its place in words.
        num_units: Images (or pixels, if they are the unit) behind it.
        num_pixels: Labeled pixels behind it.
        threshold: ``+inf`` where every set holds the class, ``-inf`` where no label is kept.
        rests_on: ``"own"``: its own units. ``"fallback"``: see ``fallback``. ``"nothing"``: it is
            infinite.
        fallback: What replaced it; None for nothing.
        level: ``1 - alpha`` of what is promised; None where nothing is.
        needed: Fewest units with which its own threshold can be finite. With a promise of
            probability ``1 - delta``, fewer can never do, and more may be needed.
    """

    place: tuple[int, ...]
    name: str
    num_units: int
    num_pixels: int
    threshold: float
    rests_on: Literal["own", "fallback", "nothing"]
    fallback: str | None
    level: float | None
    needed: int

    @property
    def promise(self) -> str:
        """What is promised here, in a few words."""
        if self.rests_on == "fallback":
            return "nothing"
        if self.rests_on == "own":
            return f"{self.level:g}"
        empty = self.threshold < 0
        return f"{self.level:g}, " + ("as no label is kept" if empty else "as it is in every set")


def standing(calibration: Calibration, names: Sequence[str] | None = None) -> tuple[Standing, ...]:
    """What each threshold rests on, in the order of ``calibration.thresholds``.

    Args:
        calibration: Of any calibrator; locations without clusters are many.
        names: Of the classes, where there is a class axis.

    Returns:
        One entry per threshold.

    Raises:
        InputError: If names are given where there is no class axis, or do not fit it.

    Examples:
        >>> import torch
        >>> from cpseg import ClassConditionalCalibrator
        >>> calibrator = ClassConditionalCalibrator(2)
        >>> logits, labels = torch.tensor([[2.0, 0.0]] * 12), torch.tensor([0] * 9 + [1] * 3)
        >>> rows = standing(calibrator.update(logits, labels).compute(alpha=0.1), ["road", "pole"])
        >>> [(row.name, row.num_units, row.rests_on, row.needed) for row in rows]
        [('road', 9, 'own', 9), ('pole', 3, 'nothing', 9)]
    """
    axes, shape = calibration.axes, calibration.thresholds.shape
    by_class = axes[-1:] == ("class",)
    if names is not None and (not by_class or len(names) != shape[-1]):
        wanted = f"one name per class, {shape[-1]}" if by_class else "None without a class axis"
        raise InputError(f"names must be {wanted}; got {len(names)}")
    rows: list[Standing] = []
    replaced = calibration.fallback_groups
    for index in torch.ones_like(replaced, dtype=torch.bool).nonzero().tolist():
        at = tuple(index)
        alpha = calibration.alpha
        here = alpha[at[-1]] if isinstance(alpha, tuple) else alpha
        threshold = float(calibration.thresholds[at])
        rests_on: Literal["own", "fallback", "nothing"] = "own"
        if bool(replaced[at]):
            rests_on = "fallback" if abs(threshold) != float("inf") else "nothing"
        elif abs(threshold) == float("inf"):
            rests_on = "nothing"
        place = at if axes else ()
        words = ", ".join(f"{axis} {i}" for axis, i in zip(axes, place, strict=False))
        if axes == ("location",):
            words = f"location {place}"
        rows.append(
            Standing(
                place=place,
                name=words or "everywhere" if names is None else _named(axes, place, names),
                num_units=int(calibration.num_units[at]),
                num_pixels=int(calibration.num_pixels[at]),
                threshold=threshold,
                rests_on=rests_on,
                fallback=calibration.fallback if rests_on == "fallback" else None,
                level=None if rests_on == "fallback" else float(1 - level(here)),
                needed=_needed(calibration, here),
            )
        )
    return tuple(rows)


def standing_table(rows: Sequence[Standing]) -> str:
    """The rows as aligned text, those that need units first.

    Args:
        rows: What :func:`standing` gave.

    Returns:
        Lines under a heading.

    Examples:
        >>> row = Standing((1,), "pole", 3, 40, float("inf"), "nothing", None, 0.9, 9)
        >>> print(standing_table([row]))
        what  units  pixels  threshold  rests on  promised                    needs
        pole      3      40        inf  nothing   0.9, as it is in every set  6 more
    """
    heads = ("what", "units", "pixels", "threshold", "rests on", "promised", "needs")
    order = {"nothing": 0, "fallback": 1, "own": 2}
    cells: list[tuple[str, ...]] = [heads]
    for row in sorted(rows, key=lambda row: (order[row.rests_on], row.num_units)):
        missing = row.needed - row.num_units
        needs = (
            "" if row.rests_on == "own" else f"{missing} more" if missing > 0 else "fewer misses"
        )
        source = f"{row.fallback}" if row.fallback else row.rests_on
        cells.append(
            (
                row.name,
                str(row.num_units),
                str(row.num_pixels),
                f"{row.threshold:.4g}",
                source,
                row.promise,
                needs,
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = {1, 2, 3}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _named(axes: tuple[str, ...], place: tuple[int, ...], names: Sequence[str]) -> str:
    name = names[place[-1]]
    return name if len(axes) == 1 else f"{name}, {axes[0]} {place[0]}"


def _needed(calibration: Calibration, alpha: float) -> int:
    delta = None if calibration.control is None else calibration.control.delta
    if delta is not None:
        return least_units(alpha, delta)
    return fewest_units(alpha)
