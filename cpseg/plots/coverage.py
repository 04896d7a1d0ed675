"""Coverage against what was promised, and what another level would cost."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.errors import InputError
from cpseg.metrics import CoverageReport
from cpseg.plots._canvas import (
    LOST,
    MEASURED,
    PALETTE,
    PROMISED,
    class_color,
    label,
    legend_above,
    names_of,
    new_figure,
    one_axes,
    styled,
)

if TYPE_CHECKING:
    import matplotlib.figure

__all__ = ["coverage_by_class", "coverage_of_images", "levels"]

_MOST_CLASSES = 40
_MARKERS = "osD^vPX<>hp8"  # as many as there are colors


def coverage_by_class(
    report: CoverageReport,
    alpha: float | Sequence[float] | None,
    *,
    class_names: Sequence[str] | None = None,
) -> "matplotlib.figure.Figure":
    """Coverage of each class, with its interval over images, against what was promised.

    Args:
        report: Measured on images that did not calibrate.
        alpha: The level of the calibration, one or one per class, NaN where a fallback voids the
            promise; None if it promises nothing about single classes, as with one threshold for
            all.
        class_names: The name of each class.

    Returns:
        A line per class that occurs, the least covered above; at most 40.
    """
    means = report.classes.mean_of_images
    classes = len(means.value)
    names = names_of(class_names, classes)
    allowed = list(alpha) if isinstance(alpha, Sequence) else [alpha or 0.0] * classes
    if len(allowed) != classes:
        raise InputError(
            f"alpha must be one number or one per class, {classes}; got {len(allowed)}"
        )
    known = [c for c in range(classes) if not math.isnan(float(means.value[c]))]
    order = sorted(
        known, key=lambda c: float(means.value[c]) + (0 if math.isnan(allowed[c]) else allowed[c])
    )
    shown = order[:_MOST_CLASSES]
    figure = new_figure(5.0, 1.5 + 0.27 * max(len(shown), 2))
    axes = one_axes(figure)
    places = list(range(len(shown)))
    value, low, high = ([float(x[c]) for c in shown] for x in (means.value, means.low, means.high))
    certain = [i for i in places if not math.isnan(low[i])]
    axes.hlines(
        certain, [low[i] for i in certain], [high[i] for i in certain], colors=MEASURED, lw=2
    )
    below = [alpha is not None and high[i] < 1 - allowed[shown[i]] for i in places]
    for kind, marker, color, text in (
        (False, "o", MEASURED, "measured (95%, over images)"),
        (True, "X", LOST, "below what was promised"),
    ):
        chosen = [i for i in places if below[i] is kind]
        if chosen:
            axes.plot(
                [value[i] for i in chosen], chosen, marker, color=color, ms=6, ls="", label=text
            )
    if alpha is not None:
        ends = [1 - allowed[c] for c in shown]
        axes.plot(ends, places, "|", color=PROMISED, ms=13, mew=2, label="1 - alpha", ls="")
    counts: list[int] = report.classes.num_images.tolist()
    axes.set_yticks(places, [f"{names[c]} ({counts[c]})" for c in shown])
    axes.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    least = min([0.9, *[v for v in (*low, *value) if not math.isnan(v)]], default=0.9)
    axes.set_xlim(max(0.0, least - 0.03), 1.005)
    axes.grid(axis="x", color="#e5e5e5", lw=0.7)
    more = f"; {len(shown)} least covered of {len(order)}" if len(order) > len(shown) else ""
    label(axes, f"coverage, mean of images with the class{more}", "class (images)")
    legend_above(figure, axes)
    return figure


def coverage_of_images(report: CoverageReport, alpha: float | None) -> "matplotlib.figure.Figure":
    """How coverage spreads over images: the promise is about their mean, not about each.

    Args:
        report: Measured on images that did not calibrate.
        alpha: The level of the calibration; None if it promises nothing about whole images, as
            with a threshold per class.

    Returns:
        Images in order of their coverage.
    """
    figure = new_figure(5.0, 3.4)
    axes = one_axes(figure)
    images: list[float] = report.images.tolist()
    axes.fill_between(range(1, len(images) + 1), 0, images, color="#cfe3f3", step="mid", lw=0)
    axes.plot(
        range(1, len(images) + 1), images, color=MEASURED, drawstyle="steps-mid", label="an image"
    )
    if images:
        axes.axhline(report.mean_of_images, color=MEASURED, ls=":", label="their mean")
        axes.set_ylim(max(0.0, min(images[0], 0.9) - 0.03), 1.005)
        axes.set_xlim(0.5, len(images) + 0.5)
    if alpha is not None:
        axes.axhline(1 - alpha, color=PROMISED, ls="--", label="1 - alpha")
    axes.grid(axis="y", color="#e5e5e5", lw=0.7)
    label(axes, "images, from the least covered on", "share of labeled pixels covered")
    legend_above(figure, axes)
    return figure


def levels(
    alphas: Sequence[float],
    thresholds: Tensor,
    set_sizes: Sequence[float],
    *,
    class_names: Sequence[str] | None = None,
) -> "matplotlib.figure.Figure":
    """Thresholds and set sizes against the level: what another alpha would cost.

    Args:
        alphas: Levels, ascending. ``A`` of them.
        thresholds: Of each level, one or one per class; ``+inf`` is not drawn. ``(A, 1 or C)``.
        set_sizes: Mean set size at each level.
        class_names: The name of each class.

    Returns:
        Two panels.
    """
    if thresholds.ndim != 2 or len(thresholds) != len(alphas) or len(set_sizes) != len(alphas):
        raise InputError(
            f"thresholds and set_sizes must have a row per level, {len(alphas)}; "
            f"got {_checks.describe(thresholds.shape)} and {len(set_sizes)}"
        )
    count = thresholds.shape[1]
    names = ["all classes"] if count == 1 else names_of(class_names, count)
    figure = new_figure(5.0, 5.6)
    above, below = (styled(axes) for axes in figure.subplots(2, 1, sharex=True))
    finite = torch.where(thresholds.isfinite(), thresholds, torch.nan)
    if count <= len(PALETTE):
        for index, name in enumerate(names):
            above.plot(
                alphas,
                finite[:, index].tolist(),
                color=MEASURED if count == 1 else class_color(index),
                marker=_MARKERS[index],
                ms=4,
                lw=1.3,
                label=name,
            )
    else:
        known = [row[~row.isnan()] for row in finite]
        for share, style, name in ((0.1, ":", "10%"), (0.5, "-", "median"), (0.9, "--", "90%")):
            line = [float(row.quantile(share)) if len(row) else math.nan for row in known]
            above.plot(alphas, line, style, color=MEASURED, label=f"{name} of {count} classes")
    label(above, "", "threshold")
    legend_above(figure, above)
    below.plot(list(alphas), list(set_sizes), "o-", color=MEASURED, ms=4, lw=1.3)
    below.axhline(1, color="#888888", ls=":", lw=1)
    below.set_ylim(bottom=0)
    label(below, "alpha", "mean set size")
    for axes in (above, below):
        axes.grid(color="#e5e5e5", lw=0.7)
    return figure
