"""What all figures share: colors, axes, legends, and a file that is whole."""

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from cpseg.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

# Slate for a background, the seven colors of Okabe and Ito (2008), then the farthest from all.
PALETTE: tuple[str, ...] = (
    "#44546a",
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#f0e442",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
    "#9600ff",
    "#691e00",
    "#00ff87",
    "#4b0096",
)
"""The color of each class; after the last they repeat."""

VOID = "#d9d9d9"
"""The color of pixels whose label does not count."""

INK = "#222222"
MEASURED, PROMISED = "#0072b2", "#d55e00"
LOST = "#a50026"


def class_color(index: int) -> str:
    """The color of a class: the same in every figure.

    Examples:
        >>> class_color(0), class_color(12)
        ('#44546a', '#44546a')
    """
    return PALETTE[index % len(PALETTE)]


def save(
    figure: "matplotlib.figure.Figure", path: str | os.PathLike[str], *, dpi: int = 150
) -> None:
    """Write a figure, whole or not at all; the suffix says the format (``.png``, ``.svg``).

    Args:
        figure: What one of these functions returned.
        path: Where to.
        dpi: Dots per inch of formats that have dots.
    """
    target = Path(path)
    partial = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        figure.savefig(partial, dpi=dpi)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def check_matplotlib() -> None:
    """Refuse now what could not be drawn at the end of long work.

    Raises:
        MissingExtraError: If matplotlib is missing; the message names the extra that brings it.
    """
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingExtraError("figures need matplotlib; install it with cpseg[plot]") from error


def new_figure(width: float, height: float) -> "matplotlib.figure.Figure":
    check_matplotlib()
    module: Any = import_module("matplotlib.figure")
    figure = module.Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return cast("matplotlib.figure.Figure", figure)


def one_axes(figure: "matplotlib.figure.Figure") -> "matplotlib.axes.Axes":
    return styled(figure.subplots())


def styled(axes: "matplotlib.axes.Axes") -> "matplotlib.axes.Axes":
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color("#888888")
    axes.tick_params(labelsize=8, color="#888888", labelcolor=INK)
    axes.set_axisbelow(True)
    return axes


def label(axes: "matplotlib.axes.Axes", x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)


def legend_above(figure: "matplotlib.figure.Figure", axes: "matplotlib.axes.Axes") -> None:
    handles, _ = axes.get_legend_handles_labels()
    legend(figure, handles, "outside upper left")


def legend(
    figure: "matplotlib.figure.Figure",
    handles: Sequence[Any],
    place: Literal["outside upper left", "outside lower center"],
) -> None:
    """Beside the axes, in as many columns as there is room for."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    columns = int((figure.get_figwidth() - 0.2) / (0.6 + 0.056 * longest))
    figure.legend(
        handles=list(handles),
        loc=place,
        ncols=max(1, min(len(handles), columns)),
        frameon=False,
        fontsize=8,
        columnspacing=1.2,
    )


def names_of(names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [str(index) for index in range(count)]
    if isinstance(names, str) or len(names) != count:
        raise InputError(f"class_names must hold {count} names; got {len(names)}")
    return list(names)


def rgb(color: str) -> Tensor:
    return torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
