"""How much is kept, how much of it is right, and whether confidence says so."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from cpseg.plots._canvas import (
    INK,
    MEASURED,
    PALETTE,
    PROMISED,
    label,
    legend,
    new_figure,
    one_axes,
    styled,
)
from cpseg.plots.confidence import ConfidenceCounts

if TYPE_CHECKING:
    import matplotlib.figure

__all__ = ["Certified", "reliability", "risk_coverage"]

_MARKERS = "sD^vPX<>hp8"
_COLORS = (3, 7, 1, 2, 8, 9)  # neither of the two that mean measured and promised


@final
@dataclass(frozen=True, slots=True)
class Certified:
    """A filter whose error among kept labels is controlled, as measured on other images.

    Attributes:
        kept: The share of pixels it kept.
        accuracy: The share of those that is right; NaN if it kept nothing.
        promised: The least share that was promised, ``1 - alpha``.
    """

    kept: float
    accuracy: float
    promised: float


def risk_coverage(
    counts: ConfidenceCounts,
    *,
    points: Mapping[str, tuple[float, float]] | None = None,
    certified: Certified | None = None,
) -> "matplotlib.figure.Figure":
    """How much is kept against how much of it is right, with the certified point marked.

    Args:
        counts: Of the annotator; the curve keeps its most confident labels first.
        points: Share kept and accuracy of kept labels of filters, by name.
        certified: A filter whose error among kept labels is controlled.

    Returns:
        The curve and the points.
    """
    entries = 1 + len(points or {}) + 2 * (certified is not None)
    figure = new_figure(5.0, 3.8 + 0.2 * math.ceil(entries / 2))
    axes = one_axes(figure)
    kept, accuracy = counts.curve()
    axes.plot(
        kept.tolist(), accuracy.tolist(), color=MEASURED, lw=1.6, label="most confident first"
    )
    lowest = [v for v in accuracy.tolist() if not math.isnan(v)]
    for index, (name, (share, right)) in enumerate((points or {}).items()):
        if not math.isnan(right):
            axes.plot(
                share,
                right,
                _MARKERS[index % len(_MARKERS)],
                color=PALETTE[_COLORS[index % len(_COLORS)]],
                mec=INK,
                mew=0.6,
                ms=7,
                ls="",
                label=name,
            )
            lowest.append(right)
    if certified is not None:
        axes.axhline(
            certified.promised,
            color=PROMISED,
            ls="--",
            lw=1.2,
            label=f"promised of kept labels: {certified.promised:.0%}",
        )
        lowest.append(certified.promised)
        if not math.isnan(certified.accuracy):
            axes.plot(
                certified.kept,
                certified.accuracy,
                "*",
                color=PROMISED,
                mec=INK,
                mew=0.6,
                ms=15,
                ls="",
                label="certified filter, measured",
            )
            lowest.append(certified.accuracy)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(max(0.0, min([0.9, *lowest]) - 0.03), 1.005)
    axes.grid(color="#e5e5e5", lw=0.7)
    label(axes, "share of labeled pixels kept", "share of kept labels that are right")
    legend(figure, axes.get_legend_handles_labels()[0], "outside lower center")
    return figure


def reliability(counts: ConfidenceCounts) -> "matplotlib.figure.Figure":
    """Confidence against accuracy, in ten steps; on the diagonal, confidence is what it says.

    Args:
        counts: Of the annotator.

    Returns:
        The accuracy of each step, and below how many pixels it has.
    """
    figure = new_figure(4.6, 4.6)
    above, below = (
        styled(axes)
        for axes in figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
    )
    confidence, accuracy, share = counts.deciles()
    steps = [i for i in range(len(share)) if float(share[i]) > 0]
    above.plot([0, 1], [0, 1], color="#888888", ls=":", lw=1.2, label="as confident as right")
    x, y = [float(confidence[i]) for i in steps], [float(accuracy[i]) for i in steps]
    above.vlines(x, y, x, colors=PROMISED, lw=5, alpha=0.35, label="too confident, or too little")
    above.plot(x, y, "o-", color=MEASURED, ms=5, label="measured", clip_on=False)
    gap = float(((confidence - accuracy).abs() * share).nansum()) if steps else math.nan
    above.set_xlim(0, 1.01)
    above.set_ylim(0, 1.03)
    above.grid(color="#e5e5e5", lw=0.7)
    label(above, "", "accuracy")
    above.legend(frameon=False, fontsize=8, loc="upper left")
    above.text(0.98, 0.04, f"mean gap {gap:.3f}", transform=above.transAxes, ha="right", fontsize=8)
    below.bar(
        [(i + 0.5) / len(share) for i in range(len(share))],
        share.nan_to_num(0).tolist(),
        width=0.9 / len(share),
        color=MEASURED,
    )
    label(below, "confidence of the most likely class", "pixels")
    return figure
