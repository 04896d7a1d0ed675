"""One image and what is known about its pixels."""

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.errors import InputError
from cpseg.plots._canvas import (
    INK,
    LOST,
    PALETTE,
    VOID,
    class_color,
    legend,
    names_of,
    new_figure,
    rgb,
)

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

__all__ = ["one_image"]

_SURE, _POSSIBLE, _EXCLUDED = "#08519c", "#9ecae1", "#f4f4f4"
_WRONG = "#e69f00"


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
    names = names_of(class_names, classes)
    logits, sets = logits.detach().cpu(), sets.cpu()
    sizes, top = sets.sum(0), logits.argmax(0)
    if chosen is None:
        chosen = int((sets & (sizes > 1)).sum((1, 2)).argmax())

    # A row of panels; two rows if there are more than three.
    count = 3 + (image is not None) + (pseudo_labels is not None) + (labels is not None)
    columns = count if count <= 3 else math.ceil(count / 2)
    rows = math.ceil(count / columns)
    height = 3.1 * space[0] / space[1]
    figure = new_figure(3.1 * columns + 0.5, rows * (min(max(height, 1.6), 6.0) + 0.5) + 0.45)
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
        figure.suptitle(title, fontsize=10, color=INK)
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
    for mask, color in ((void, VOID), (wrong, _WRONG), (lost, LOST)):
        shown[mask] = rgb(color)
    axes.imshow(shown.numpy(), interpolation="nearest")
    _panel(axes, "errors")
    key = {"wrong, truth in the set": _WRONG, "truth lost": LOST}
    _key(axes, {**key, "void": VOID} if bool(void.any()) else key)


def _colored(labels: Tensor, ignore_index: int) -> Any:
    """Class colors, void where the label does not count. float32 array ``(H, W, 3)``."""
    table = torch.stack([rgb(color) for color in PALETTE])
    shown = table[labels.long().clamp(min=0) % len(PALETTE)]
    shown[labels == ignore_index] = rgb(VOID)
    return shown.numpy()


def _stripes(mask: Tensor) -> Any:
    """Diagonal lines where marked, clear elsewhere, finer than the pixels. ``(kH, kW, 4)``."""
    factor = max(1, math.ceil(480 / max(mask.shape)))
    fine = mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    height, width = fine.shape
    place = torch.arange(height)[:, None] + torch.arange(width)
    period = max(8, min(height, width) // 32)
    shown = torch.ones(height, width, 4)
    shown[place % period < max(2, period // 5)] = torch.tensor([*rgb(INK).tolist(), 1.0])
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
            patch(facecolor="white", edgecolor=INK, hatch="////", linewidth=0.5, label="abstained")
        )
    legend(figure, handles, "outside lower center")


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
    axes.set_title(title, fontsize=9, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
