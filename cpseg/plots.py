"""Figures: what a calibration, its sets, its pseudo-labels and a training run look like.

Every function returns a matplotlib ``Figure`` and shows nothing; pyplot is never loaded, so no
global state is touched. Colors stay apart for all three kinds of color blindness (as far as there
are no more than twelve classes), what is void is drawn as void, and abstention is hatched.

Needs matplotlib: ``pip install 'cpseg[plot]'``.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.errors import FileError, InputError, MissingExtraError
from cpseg.metrics import CoverageReport

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

__all__ = [
    "PALETTE",
    "VOID",
    "Certified",
    "ConfidenceCounts",
    "check_matplotlib",
    "class_color",
    "coverage_by_class",
    "coverage_of_images",
    "levels",
    "one_image",
    "reliability",
    "risk_coverage",
    "save",
    "training",
]

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

_INK = "#222222"
_MEASURED, _PROMISED, _BAD = "#0072b2", "#d55e00", "#d55e00"
_SURE, _POSSIBLE, _EXCLUDED = "#08519c", "#9ecae1", "#f4f4f4"
_WRONG, _LOST = "#e69f00", "#a50026"
_MOST_CLASSES = 40
_MARKERS = "osD^vPX<>hp8"
_POINT_COLORS = (3, 7, 1, 2, 8, 9)  # neither of the two that mean measured and promised

# Confidence is binned by the bits of 1 - p: 64 bins per octave, fine where p is nearly 1.
_SHIFT = 17
_FIRST = (127 - 24) << (23 - _SHIFT)
_BINS = (127 << (23 - _SHIFT)) - _FIRST + 1


def class_color(index: int) -> str:
    """The color of a class: the same in every figure.

    Examples:
        >>> class_color(0), class_color(12)
        ('#44546a', '#44546a')
    """
    return PALETTE[index % len(PALETTE)]


@final
@dataclass(eq=False)
class ConfidenceCounts:
    """How often the most likely class is right, by its probability: mergeable counts of pixels.

    Guarantee:
        None; a measurement.

    Args:
        ignore_index: Label of pixels that do not count.

    Attributes:
        pixels: Labelled pixels by confidence. int64 ``(K,)``.
        right: Those whose most likely class is the label. int64 ``(K,)``.

    Examples:
        >>> logits = torch.tensor([[[9.0, 9.0], [0.0, 0.0]]])
        >>> counts = ConfidenceCounts().update(logits, torch.tensor([[0, 1]]))
        >>> kept, accuracy = counts.curve()
        >>> kept.tolist(), accuracy.tolist()
        ([1.0], [0.5])
    """

    ignore_index: int = 255
    pixels: Tensor = field(
        default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64), init=False, repr=False
    )
    right: Tensor = field(
        default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64), init=False, repr=False
    )

    def update(self, logits: Tensor, labels: Tensor) -> Self:
        """Add a batch.

        Args:
            logits: Shape ``(B, C, *S)``.
            labels: Integers. Shape ``(B, *S)``.

        Returns:
            Itself.
        """
        _checks.check_logits(logits)
        _checks.check_labels(labels, logits)
        top = logits.float().log_softmax(1).max(1)
        doubt = -torch.expm1(top.values)
        usable = (labels != self.ignore_index) & ~doubt.isnan()
        bits = doubt.clamp(2.0**-24, 1.0).view(torch.int32) >> _SHIFT
        index = (bits.long() - _FIRST).clamp(0, _BINS - 1)[usable].cpu()
        right = (top.indices == labels)[usable].cpu()
        self.pixels += torch.bincount(index, minlength=_BINS)
        self.right += torch.bincount(index[right], minlength=_BINS)
        return self

    def merge(self, other: Self) -> Self:
        """Add what another has seen; the other stays as it is."""
        self.pixels = self.pixels + other.pixels
        self.right = self.right + other.right
        return self

    def confidence(self) -> Tensor:
        """The probability that each bin stands for, falling. float64 ``(K,)``."""
        ends = (torch.arange(_BINS + 1) + _FIRST) << _SHIFT
        doubt = ends.int().view(torch.float32).double().clamp(max=1.0)
        return 1 - (doubt[:-1] + doubt[1:]) / 2

    def curve(self) -> tuple[Tensor, Tensor]:
        """What is kept, and how much of it is right, as the confidence asked for falls.

        Returns:
            Shares of labelled pixels, rising to 1, and of the kept ones. float64 ``(N,)`` each,
            of the bins that hold pixels.
        """
        filled = self.pixels > 0
        kept = self.pixels[filled].cumsum(0).double()
        right = self.right[filled].cumsum(0).double()
        return kept / max(int(self.pixels.sum()), 1), right / kept

    def deciles(self, bins: int = 10) -> tuple[Tensor, Tensor, Tensor]:
        """Mean confidence, accuracy and share of pixels in equal steps of confidence.

        Args:
            bins: How many steps between 0 and 1.

        Returns:
            float64 ``(bins,)`` each; NaN where there are no pixels.
        """
        confidence = self.confidence()
        step = (confidence * bins).long().clamp(0, bins - 1)

        def summed(values: Tensor) -> Tensor:
            return torch.zeros(bins, dtype=torch.float64).index_add_(0, step, values.double())

        pixels = summed(self.pixels)
        share = pixels / pixels.sum()
        return summed(confidence * self.pixels) / pixels, summed(self.right) / pixels, share


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


# --- one image -----------------------------------------------------------------------------------


def one_image(
    logits: Tensor,
    sets: Tensor,
    *,
    image: Tensor | None = None,
    pseudo_labels: Tensor | None = None,
    labels: Tensor | None = None,
    chosen: int | None = None,
    class_names: Sequence[str] | None = None,
    ignore_index: int = 255,
    title: str | None = None,
) -> "matplotlib.figure.Figure":
    """An image and what is known about its pixels, side by side.

    Args:
        logits: Shape ``(C, H, W)``.
        sets: The classes still possible. Bool ``(C, H, W)``.
        image: Red, green, blue, uint8. Shape ``(3, H, W)``.
        pseudo_labels: A filter's labels, ``ignore_index`` where it abstains. Shape ``(H, W)``.
        labels: True labels, ``ignore_index`` for void. Shape ``(H, W)``.
        chosen: Class whose sets are shown; None: the one that is most often in doubt.
        class_names: The name of each class.
        ignore_index: Label of void and of abstention.
        title: Above all.

    Returns:
        The image, the most likely class, the size of the sets, the sets of the chosen class, the
        pseudo-labels and the errors, as far as there are any, side by side.

    Raises:
        InputError: If shapes do not fit.
    """
    _check_image(logits, sets, image, {"pseudo_labels": pseudo_labels, "labels": labels})
    classes, *space = logits.shape
    names = _names(class_names, classes)
    logits, sets = logits.detach().cpu(), sets.cpu()
    sizes, top = sets.sum(0), logits.argmax(0)
    if chosen is None:
        chosen = int((sets & (sizes > 1)).sum((1, 2)).argmax())

    # A row of panels; two rows if there are more than three.
    count = 3 + (image is not None) + (pseudo_labels is not None) + (labels is not None)
    columns = count if count <= 3 else math.ceil(count / 2)
    rows = math.ceil(count / columns)
    height = 3.1 * space[0] / space[1]
    figure = _figure(3.1 * columns + 0.5, rows * (min(max(height, 1.6), 6.0) + 0.5) + 0.45)
    grid = cast(
        "list[matplotlib.axes.Axes]", list(figure.subplots(rows, columns, squeeze=False).flat)
    )
    panels = iter(grid)
    if image is not None:
        axes = next(panels)
        axes.imshow(image.cpu().permute(1, 2, 0).numpy(), interpolation="nearest")
        _panel(axes, "image")
    _map(next(panels), top, "most likely class", ignore_index)
    _set_sizes(next(panels), sizes, classes)
    _sets_of(next(panels), sets[chosen], sizes, names[chosen])
    if pseudo_labels is not None:
        abstained = pseudo_labels.cpu() == ignore_index
        axes = next(panels)
        _map(axes, pseudo_labels.cpu(), "pseudo-labels", ignore_index)
        axes.imshow(_stripes(abstained), extent=_extent(space), interpolation="nearest")
        _panel(axes, f"pseudo-labels, {1 - float(abstained.float().mean()):.0%} kept")
    if labels is not None:
        _errors(next(panels), top, sets, labels.cpu(), image=image, ignore_index=ignore_index)
    for axes in panels:
        axes.set_axis_off()
    _class_legend(figure, names, [top, pseudo_labels, labels], ignore_index)
    if title is not None:
        figure.suptitle(title, fontsize=10, color=_INK)
    return figure


def _check_image(
    logits: Tensor, sets: Tensor, image: Tensor | None, maps: Mapping[str, Tensor | None]
) -> None:
    _checks.check_tensor("logits", logits)
    if logits.ndim != 3:
        raise InputError(f"logits must be (C, H, W); got {_checks.describe(logits.shape)}")
    _checks.check_logits(logits[None])
    if sets.dtype != torch.bool or sets.shape != logits.shape:
        raise InputError(
            f"sets must be bool and of the shape of logits, {_checks.describe(logits.shape)}; "
            f"got {sets.dtype} {_checks.describe(sets.shape)}"
        )
    space = logits.shape[1:]
    for name, value in maps.items():
        if value is not None:
            _checks.check_map(name, value, space, f"logits {_checks.describe(logits.shape)}")
    if image is not None and tuple(image.shape) != (3, *space):
        raise InputError(
            f"image must have shape {_checks.describe((3, *space))}; "
            f"got {_checks.describe(image.shape)}"
        )


def _map(axes: "matplotlib.axes.Axes", labels: Tensor, title: str, ignore_index: int) -> None:
    axes.imshow(_colored(labels, ignore_index), interpolation="nearest")
    _panel(axes, title)


def _set_sizes(axes: "matplotlib.axes.Axes", sizes: Tensor, classes: int) -> None:
    colors = import_module("matplotlib.colors")
    most = max(int(sizes.max()), 2)
    steps = min(most + 1, 12)
    maps: Any = import_module("matplotlib").colormaps
    shades = maps["cividis_r"].resampled(steps)
    norm = colors.BoundaryNorm(torch.linspace(-0.5, most + 0.5, steps + 1).tolist(), steps)
    drawn = axes.imshow(sizes.numpy(), cmap=shades, norm=norm, interpolation="nearest")
    ticks = list(range(most + 1)) if most < 12 else [0, most // 2, most]
    beside = axes.inset_axes((1.02, 0.0, 0.04, 1.0))  # as high as the picture
    bar = axes.figure.colorbar(drawn, cax=beside, ticks=ticks)
    bar.ax.tick_params(labelsize=7)
    _panel(axes, f"classes still possible (of {classes})")


def _sets_of(axes: "matplotlib.axes.Axes", member: Tensor, sizes: Tensor, name: str) -> None:
    state = torch.where(member, torch.where(sizes == 1, 2, 1), 0)
    colors = import_module("matplotlib.colors")
    shades = colors.ListedColormap([_EXCLUDED, _POSSIBLE, _SURE])
    axes.imshow(state.numpy(), cmap=shades, vmin=-0.5, vmax=2.5, interpolation="nearest")
    _panel(axes, f"is it {name}?")
    _key(axes, {"sure": _SURE, "possible": _POSSIBLE, "excluded": _EXCLUDED})


def _errors(
    axes: "matplotlib.axes.Axes",
    top: Tensor,
    sets: Tensor,
    labels: Tensor,
    *,
    image: Tensor | None,
    ignore_index: int,
) -> None:
    """Gray where the most likely class is right; wrong ones by whether the set holds the truth."""
    void = (labels == ignore_index) | (labels < 0) | (labels >= len(sets))
    truth = torch.where(void, 0, labels.long())
    wrong = ~void & (top != truth)
    lost = ~void & ~sets.gather(0, truth[None])[0]
    gray = torch.full(labels.shape, 0.92)
    if image is not None:
        gray = 0.45 + 0.5 * image.cpu().float().mean(0) / 255
    shown = gray[..., None].expand(*labels.shape, 3).clone()
    for mask, color in ((void, VOID), (wrong, _WRONG), (lost, _LOST)):
        shown[mask] = _rgb(color)
    axes.imshow(shown.numpy(), interpolation="nearest")
    _panel(axes, "errors")
    key = {"wrong, truth in the set": _WRONG, "truth lost": _LOST}
    _key(axes, {**key, "void": VOID} if bool(void.any()) else key)


def _colored(labels: Tensor, ignore_index: int) -> Any:
    """Class colors, void where the label does not count. float32 array ``(H, W, 3)``."""
    table = torch.stack([_rgb(color) for color in PALETTE])
    shown = table[labels.long().clamp(min=0) % len(PALETTE)]
    shown[labels == ignore_index] = _rgb(VOID)
    return shown.numpy()


def _stripes(mask: Tensor) -> Any:
    """Diagonal lines where marked, clear elsewhere, finer than the pixels. ``(kH, kW, 4)``."""
    factor = max(1, math.ceil(480 / max(mask.shape)))
    fine = mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    height, width = fine.shape
    place = torch.arange(height)[:, None] + torch.arange(width)
    period = max(8, min(height, width) // 32)
    shown = torch.ones(height, width, 4)
    shown[place % period < max(2, period // 5)] = torch.tensor([*_rgb(_INK).tolist(), 1.0])
    shown[..., 3] = fine.float()
    return shown.numpy()


def _extent(space: Sequence[int]) -> tuple[float, float, float, float]:
    return (-0.5, space[1] - 0.5, space[0] - 0.5, -0.5)


def _class_legend(
    figure: "matplotlib.figure.Figure",
    names: Sequence[str],
    maps: Iterable[Tensor | None],
    ignore_index: int,
) -> None:
    """The classes that the maps show, and what is no class."""
    shown = torch.cat([labels.flatten().long().cpu() for labels in maps if labels is not None])
    values: list[int] = torch.unique(shown).tolist()
    patch = import_module("matplotlib.patches").Patch
    present = [value for value in values if value != ignore_index and 0 <= value < len(names)]
    handles = [patch(color=class_color(value), label=names[value]) for value in present[:24]]
    if len(present) > 24:
        handles.append(patch(color="none", label=f"and {len(present) - 24} more"))
    if ignore_index in values:
        handles.append(
            patch(facecolor="white", edgecolor=_INK, hatch="////", linewidth=0.5, label="abstained")
        )
    _legend(figure, handles, "outside lower center")


def _key(axes: "matplotlib.axes.Axes", colors: Mapping[str, str]) -> None:
    patch = import_module("matplotlib.patches").Patch
    handles = [
        patch(facecolor=color, edgecolor="#888888", linewidth=0.5, label=name)
        for name, color in colors.items()
    ]
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=len(handles),
        frameon=False,
        fontsize=7,
        handlelength=1.0,
        columnspacing=0.9,
        handletextpad=0.4,
    )


def _panel(axes: "matplotlib.axes.Axes", title: str) -> None:
    axes.set_title(title, fontsize=9, color=_INK)
    axes.set_xticks([])
    axes.set_yticks([])


# --- calibration ---------------------------------------------------------------------------------


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
    names = _names(class_names, classes)
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
    figure = _figure(5.0, 1.5 + 0.27 * max(len(shown), 2))
    axes = _axes(figure)
    places = list(range(len(shown)))
    value, low, high = ([float(x[c]) for c in shown] for x in (means.value, means.low, means.high))
    certain = [i for i in places if not math.isnan(low[i])]
    axes.hlines(
        certain, [low[i] for i in certain], [high[i] for i in certain], colors=_MEASURED, lw=2
    )
    below = [alpha is not None and high[i] < 1 - allowed[shown[i]] for i in places]
    for kind, marker, color, text in (
        (False, "o", _MEASURED, "measured (95%, over images)"),
        (True, "X", _LOST, "below what was promised"),
    ):
        chosen = [i for i in places if below[i] is kind]
        if chosen:
            axes.plot(
                [value[i] for i in chosen], chosen, marker, color=color, ms=6, ls="", label=text
            )
    if alpha is not None:
        ends = [1 - allowed[c] for c in shown]
        axes.plot(ends, places, "|", color=_PROMISED, ms=13, mew=2, label="1 - alpha", ls="")
    counts: list[int] = report.classes.num_images.tolist()
    axes.set_yticks(places, [f"{names[c]} ({counts[c]})" for c in shown])
    axes.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    least = min([0.9, *[v for v in (*low, *value) if not math.isnan(v)]], default=0.9)
    axes.set_xlim(max(0.0, least - 0.03), 1.005)
    axes.grid(axis="x", color="#e5e5e5", lw=0.7)
    more = f"; {len(shown)} least covered of {len(order)}" if len(order) > len(shown) else ""
    _label(axes, f"coverage, mean of images with the class{more}", "class (images)")
    _legend_above(figure, axes)
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
    figure = _figure(5.0, 3.4)
    axes = _axes(figure)
    images: list[float] = report.images.tolist()
    axes.fill_between(range(1, len(images) + 1), 0, images, color="#cfe3f3", step="mid", lw=0)
    axes.plot(
        range(1, len(images) + 1), images, color=_MEASURED, drawstyle="steps-mid", label="an image"
    )
    if images:
        axes.axhline(report.mean_of_images, color=_MEASURED, ls=":", label="their mean")
        axes.set_ylim(max(0.0, min(images[0], 0.9) - 0.03), 1.005)
        axes.set_xlim(0.5, len(images) + 0.5)
    if alpha is not None:
        axes.axhline(1 - alpha, color=_PROMISED, ls="--", label="1 - alpha")
    axes.grid(axis="y", color="#e5e5e5", lw=0.7)
    _label(axes, "images, from the least covered on", "share of labelled pixels covered")
    _legend_above(figure, axes)
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
    names = ["all classes"] if count == 1 else _names(class_names, count)
    figure = _figure(5.0, 5.6)
    above, below = (_style(axes) for axes in figure.subplots(2, 1, sharex=True))
    finite = torch.where(thresholds.isfinite(), thresholds, torch.nan)
    if count <= len(PALETTE):
        for index, name in enumerate(names):
            above.plot(
                alphas,
                finite[:, index].tolist(),
                color=_MEASURED if count == 1 else class_color(index),
                marker=_MARKERS[index],
                ms=4,
                lw=1.3,
                label=name,
            )
    else:
        known = [row[~row.isnan()] for row in finite]
        for share, style, name in ((0.1, ":", "10%"), (0.5, "-", "median"), (0.9, "--", "90%")):
            line = [float(row.quantile(share)) if len(row) else math.nan for row in known]
            above.plot(alphas, line, style, color=_MEASURED, label=f"{name} of {count} classes")
    _label(above, "", "threshold")
    _legend_above(figure, above)
    below.plot(list(alphas), list(set_sizes), "o-", color=_MEASURED, ms=4, lw=1.3)
    below.axhline(1, color="#888888", ls=":", lw=1)
    below.set_ylim(bottom=0)
    _label(below, "alpha", "mean set size")
    for axes in (above, below):
        axes.grid(color="#e5e5e5", lw=0.7)
    return figure


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
    figure = _figure(5.0, 3.8 + 0.2 * math.ceil(entries / 2))
    axes = _axes(figure)
    kept, accuracy = counts.curve()
    axes.plot(
        kept.tolist(), accuracy.tolist(), color=_MEASURED, lw=1.6, label="most confident first"
    )
    lowest = [v for v in accuracy.tolist() if not math.isnan(v)]
    for index, (name, (share, right)) in enumerate((points or {}).items()):
        if not math.isnan(right):
            axes.plot(
                share,
                right,
                _MARKERS[1 + index % (len(_MARKERS) - 1)],
                color=PALETTE[_POINT_COLORS[index % len(_POINT_COLORS)]],
                mec=_INK,
                mew=0.6,
                ms=7,
                ls="",
                label=name,
            )
            lowest.append(right)
    if certified is not None:
        axes.axhline(
            certified.promised,
            color=_PROMISED,
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
                color=_PROMISED,
                mec=_INK,
                mew=0.6,
                ms=15,
                ls="",
                label="certified filter, measured",
            )
            lowest.append(certified.accuracy)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(max(0.0, min([0.9, *lowest]) - 0.03), 1.005)
    axes.grid(color="#e5e5e5", lw=0.7)
    _label(axes, "share of labelled pixels kept", "share of kept labels that are right")
    _legend(figure, axes.get_legend_handles_labels()[0], "outside lower center")
    return figure


def reliability(counts: ConfidenceCounts) -> "matplotlib.figure.Figure":
    """Confidence against accuracy, in ten steps; on the diagonal, confidence is what it says.

    Args:
        counts: Of the annotator.

    Returns:
        The accuracy of each step, and below how many pixels it has.
    """
    figure = _figure(4.6, 4.6)
    above, below = (
        _style(axes)
        for axes in figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
    )
    confidence, accuracy, share = counts.deciles()
    steps = [i for i in range(len(share)) if float(share[i]) > 0]
    above.plot([0, 1], [0, 1], color="#888888", ls=":", lw=1.2, label="as confident as right")
    x, y = [float(confidence[i]) for i in steps], [float(accuracy[i]) for i in steps]
    above.vlines(x, y, x, colors=_PROMISED, lw=5, alpha=0.35, label="too confident, or too little")
    above.plot(x, y, "o-", color=_MEASURED, ms=5, label="measured")
    gap = float(((confidence - accuracy).abs() * share).nansum()) if steps else math.nan
    above.set_xlim(0, 1.01)
    above.set_ylim(0, 1.03)
    above.grid(color="#e5e5e5", lw=0.7)
    _label(above, "", "accuracy")
    above.legend(frameon=False, fontsize=8, loc="upper left")
    above.text(0.98, 0.04, f"mean gap {gap:.3f}", transform=above.transAxes, ha="right", fontsize=8)
    below.bar(
        [(i + 0.5) / len(share) for i in range(len(share))],
        share.nan_to_num(0).tolist(),
        width=0.9 / len(share),
        color=_MEASURED,
    )
    _label(below, "confidence of the most likely class", "pixels")
    return figure


# --- training ------------------------------------------------------------------------------------


def training(log: str | os.PathLike[str]) -> "matplotlib.figure.Figure":
    """A training run from the trainer's log: losses, lambda, what was kept, and mIoU by stage.

    Args:
        log: ``log.jsonl`` of the run's directory.

    Returns:
        Four panels over steps; stages are shaded in turn.

    Raises:
        FileError: If the file is no such log, or empty.
    """
    steps, evaluations = _read_log(Path(log))
    figure = _figure(7.0, 7.2)
    panels = [_style(axes) for axes in figure.subplots(4, 1, sharex=True)]
    x = [entry["step"] for entry in steps]
    for (name, text), color, style in zip(
        (("loss_labeled", "labeled"), ("loss_unlabeled", "unlabeled"), ("loss", "weighted")),
        (_MEASURED, _PROMISED, _INK),
        ("-", "--", ":"),
        strict=True,
    ):
        panels[0].plot(x, [_number(e, name) for e in steps], style, color=color, lw=1.3, label=text)
    _label(panels[0], "", "loss")
    panels[0].legend(frameon=False, fontsize=8, ncols=3)
    for name, text, color, style in (
        ("labeled_weight", "labeled", _MEASURED, "-"),
        ("unlabeled_weight", "unlabeled, lambda", _PROMISED, "--"),
    ):
        panels[1].plot(x, [_number(e, name) for e in steps], style, color=color, lw=1.3, label=text)
    panels[1].set_ylim(-0.03, 1.05)
    _label(panels[1], "", "weight of loss")
    panels[1].legend(frameon=False, fontsize=8, ncols=2)
    panels[2].plot(x, [_number(e, "kept") for e in steps], color=_MEASURED, lw=1.3)
    panels[2].set_ylim(-0.03, 1.05)
    _label(panels[2], "", "kept share")
    found = [(e["step"], _number(e, "miou")) for e in evaluations]
    panels[3].plot(
        [step for step, _ in found], [miou for _, miou in found], "o-", color=_MEASURED, ms=4
    )
    _label(panels[3], "step", "mIoU")
    if not found:
        panels[3].text(
            0.5, 0.5, "no evaluation", transform=panels[3].transAxes, ha="center", fontsize=8
        )
    _shade_stages(panels, steps)
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1, 0.975))  # room for the stages' names
    return figure


def _read_log(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of steps and lines of evaluations."""
    try:
        lines: list[Any] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except OSError as error:
        raise FileError(f"{path} must be a trainer's log; {error.strerror}") from error
    except ValueError as error:
        raise FileError(
            f"{path} must be a trainer's log, a JSON object per line; {error}"
        ) from error
    entries = [
        cast("dict[str, Any]", line) for line in lines if isinstance(line, dict) and "step" in line
    ]
    steps = [entry for entry in entries if "loss" in entry]
    if not steps:
        raise FileError(f"{path} must hold at least one step; it holds none")
    return steps, [entry for entry in entries if "miou" in entry]


def _number(entry: Mapping[str, Any], name: str) -> float:
    value = entry.get(name)
    return math.nan if value is None else float(value)


def _shade_stages(
    panels: Sequence["matplotlib.axes.Axes"], steps: Sequence[Mapping[str, Any]]
) -> None:
    start = 0
    stages: list[tuple[str, int, int]] = []
    for entry, after in zip(steps, [*steps[1:], None], strict=True):
        if after is None or after["stage"] != entry["stage"]:
            stages.append((str(entry["stage"]), start, int(entry["step"])))
            start = int(entry["step"])
    for index, (name, first, last) in enumerate(stages):
        for axes in panels:
            axes.axvspan(first, last, color="#f3f3f3" if index % 2 else "#ffffff", zorder=-2, lw=0)
            if index:
                axes.axvline(first, color="#888888", lw=0.8, zorder=-1)
        panels[0].annotate(
            name,
            ((first + last) / 2, 1.0),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=_INK,
        )
    panels[0].set_xlim(0, int(steps[-1]["step"]))


# --- saving, and what all figures share ----------------------------------------------------------


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


def _figure(width: float, height: float) -> "matplotlib.figure.Figure":
    check_matplotlib()
    module: Any = import_module("matplotlib.figure")
    figure = module.Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return cast("matplotlib.figure.Figure", figure)


def _axes(figure: "matplotlib.figure.Figure") -> "matplotlib.axes.Axes":
    return _style(figure.subplots())


def _style(axes: "matplotlib.axes.Axes") -> "matplotlib.axes.Axes":
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color("#888888")
    axes.tick_params(labelsize=8, color="#888888", labelcolor=_INK)
    axes.set_axisbelow(True)
    return axes


def _label(axes: "matplotlib.axes.Axes", x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9, color=_INK)
    axes.set_ylabel(y, fontsize=9, color=_INK)


def _legend_above(figure: "matplotlib.figure.Figure", axes: "matplotlib.axes.Axes") -> None:
    handles, _ = axes.get_legend_handles_labels()
    _legend(figure, handles, "outside upper left")


def _legend(
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


def _names(names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [str(index) for index in range(count)]
    if isinstance(names, str) or len(names) != count:
        raise InputError(f"class_names must hold {count} names; got {len(names)}")
    return list(names)


def _rgb(color: str) -> Tensor:
    return torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
