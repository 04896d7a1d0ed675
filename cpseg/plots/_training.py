"""A training run, from the trainer's log. Private, since the function has the natural name."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cpseg.errors import FileError
from cpseg.plots._canvas import INK, MEASURED, PROMISED, label, new_figure, styled

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure


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
    figure = new_figure(7.0, 7.2)
    panels = [styled(axes) for axes in figure.subplots(4, 1, sharex=True)]
    x = [entry["step"] for entry in steps]
    for (name, text), color, style in zip(
        (("loss_labeled", "labeled"), ("loss_unlabeled", "unlabeled"), ("loss", "weighted")),
        (MEASURED, PROMISED, INK),
        ("-", "--", ":"),
        strict=True,
    ):
        panels[0].plot(x, [_number(e, name) for e in steps], style, color=color, lw=1.3, label=text)
    label(panels[0], "", "loss")
    panels[0].legend(frameon=False, fontsize=8, ncols=3)
    for name, text, color, style in (
        ("labeled_weight", "labeled", MEASURED, "-"),
        ("unlabeled_weight", "unlabeled, lambda", PROMISED, "--"),
    ):
        panels[1].plot(x, [_number(e, name) for e in steps], style, color=color, lw=1.3, label=text)
    panels[1].set_ylim(-0.03, 1.05)
    label(panels[1], "", "weight of loss")
    panels[1].legend(frameon=False, fontsize=8, ncols=2)
    panels[2].plot(x, [_number(e, "kept") for e in steps], color=MEASURED, lw=1.3)
    panels[2].set_ylim(-0.03, 1.05)
    label(panels[2], "", "kept share")
    found = [(e["step"], _number(e, "miou")) for e in evaluations]
    panels[3].plot(
        [step for step, _ in found],
        [miou for _, miou in found],
        "o-",
        color=MEASURED,
        ms=4,
        clip_on=False,  # the last one lies on the edge
    )
    label(panels[3], "step", "mIoU")
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
            color=INK,
        )
    panels[0].set_xlim(0, int(steps[-1]["step"]))
