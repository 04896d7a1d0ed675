"""Are the labels better? What filters keep of an annotator's labels, and how much of it is right.

    python benchmarks/evidence/labels.py --data FOLDER --figure docs/_static/evidence_labels.png
    python benchmarks/evidence/labels.py --quick

FOLDER is as frames.py says. Each filter is calibrated on the labeled frames of a split, and judged on
the others of the train part, or one of ``--every`` of them; what is fitted before calibration takes half of the
labeled frames. Prints Markdown tables and writes ``results/labels_PART.csv``: ``curves``, every rule
on the three splits, over a range of levels on that of 46; ``classes``, the same on the split of 46
class by class; ``draws``, each rule at one level on labeled frames drawn at random.

Purity of a class: of the labels kept as the class, how many are right. Recall: of the pixels of the
class, how many keep the right label. Their means over classes count each class alike.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frames import Frames, labeled, load
from miniature import miniature
from tables import RESULTS, Row, markdown, write
from torch import Tensor

from cpseg import (
    APS,
    Argmax,
    AtMost,
    BackgroundPriority,
    ClassConditionalCalibrator,
    GroupCalibrator,
    LocationCalibrator,
    Singleton,
    SplitCalibrator,
)
from cpseg.filters import Top
from cpseg.risk import KeptError, RiskCalibrator, Start
from cpseg.tuning import annuli, cluster_locations

LEVELS = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7)
CONFIDENCES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
ERRORS = (0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5)
DELTA = 0.1

Labels = Callable[[Tensor], Tensor]  # logits (B, C, H, W) to labels (B, H, W), 255 to abstain
AtLevel = Callable[[float], Labels]


@dataclass(frozen=True)
class Rule:
    """A way from labeled frames, and then a level, to a filter."""

    name: str
    levels: Sequence[float]
    usual: float  # the level of tables
    fit: Callable[[Frames], AtLevel]


def confident(seen: Frames) -> AtLevel:
    """The most likely class where its probability reaches the level; needs no labels."""
    del seen

    def of(logits: Tensor, level: float) -> Tensor:
        top, label = logits.max(1)
        return torch.where((top - logits.logsumexp(1)).exp() >= level, label, 255)

    return lambda level: partial(of, level=level)


def halves(seen: Frames) -> tuple[Frames, Frames]:
    """Every second frame, and the others."""
    every = list(range(len(seen)))
    return seen[every[::2]], seen[every[1::2]]


def bands(seen: Frames, count: int = 3) -> Tensor:
    """Which third of the height. ``(H, W)``."""
    height, width = seen.labels.shape[1:]
    return (torch.arange(height) * count // height)[:, None].expand(height, width).contiguous()


def of_group(group: str, mask_filter: Any, seen: Frames) -> AtLevel:
    """A filter on sets of this calibrator, with the image as the unit."""
    classes, shape = len(seen.classes), tuple(seen.labels.shape[1:])
    match group:
        case "pooled":
            made: Any = SplitCalibrator()
        case "class":
            made = ClassConditionalCalibrator(classes)
        case "class, APS":
            made = ClassConditionalCalibrator(classes, APS())
        case "location":
            made = LocationCalibrator(shape, max_alpha=max(LEVELS))
        case "rings":
            made = LocationCalibrator(shape, annuli(shape, 4))
        case "clusters":
            tuning, seen = halves(seen)
            one = LocationCalibrator(shape).update(tuning.logits, tuning.labels)
            made = LocationCalibrator(shape, cluster_locations(one, 4))
        case _:
            made, places = GroupCalibrator(3), bands(seen)
            made.update(seen.logits, seen.labels, places)
            return lambda alpha: partial(mask_filter(made.compute(alpha)), groups=places)
    made.update(seen.logits, seen.labels)
    # A class that too few frames show has no threshold of its own, and would never be kept.
    fallback = "pooled" if group.startswith("class") else None
    return lambda alpha: mask_filter(made.compute(alpha, fallback))


def controlled(seen: Frames, *, tuned: bool, per_class: bool) -> AtLevel:
    """The filter whose error among kept labels is controlled with probability 1 - DELTA."""
    rule = Top if per_class else Argmax
    risk = KeptError(rule, len(seen.classes), per_class=per_class)
    if not tuned:
        control = RiskCalibrator(risk).update(seen.logits, seen.labels)
        return lambda epsilon: rule(control.compute(epsilon, DELTA))
    before, rest = halves(seen)
    tuning = RiskCalibrator(risk).update(before.logits, before.labels)

    def at(epsilon: float) -> Labels:
        control = RiskCalibrator(risk, start=Start.fit(tuning, epsilon))
        return rule(control.update(rest.logits, rest.labels).compute(epsilon, DELTA))

    return at


def rules(classes: Sequence[str]) -> list[Rule]:
    """All of them. Any class may be named the background."""
    made = [Rule("confidence", CONFIDENCES, 0.95, confident)]
    usual = {"Argmax": Argmax, "Singleton": Singleton, "AtMost 2": partial(AtMost, k=2)}
    usual |= {
        f"{name} as background": partial(BackgroundPriority, background=classes.index(name))
        for name in ("Road", "Building")
    }
    for name, mask_filter in usual.items():
        for group in ("pooled", "class"):
            fit = partial(of_group, group, mask_filter)
            made.append(Rule(f"{group}: {name}", LEVELS, 0.1, fit))
    extra = [("class", "Top", Top), ("class, APS", "Singleton", Singleton)]
    extra += [(group, "Argmax", Argmax) for group in ("location", "rings", "clusters", "bands")]
    for group, name, kind in extra:
        made.append(Rule(f"{group}: {name}", LEVELS, 0.1, partial(of_group, group, kind)))
    for name, tuned, per_class, level in (
        ("controlled error", False, False, 0.1),
        ("controlled error, tuned start", True, False, 0.1),
        ("controlled error per class", False, True, 0.3),
    ):
        fit = partial(controlled, tuned=tuned, per_class=per_class)
        made.append(Rule(name, ERRORS, level, fit))
    return made


# --- what was kept --------------------------------------------------------------------------------


def confusion(labels: Tensor, truth: Tensor, classes: int) -> np.ndarray:
    """Labeled pixels by true class and label, the last column abstained. ``(C, C + 1)``."""
    known = truth < classes
    said = labels[known].long().clamp(max=classes)
    counts = torch.bincount(truth[known] * (classes + 1) + said, minlength=classes * (classes + 1))
    return counts.view(classes, classes + 1).numpy()


def summary(counts: np.ndarray) -> dict[str, float]:
    """Shares of all pixels, and means over classes."""
    right, kept = np.diag(counts), counts[:, :-1].sum()
    purity, recall = by_class(counts)
    union = counts.sum(1) + counts[:, :-1].sum(0) - right
    return {
        "kept": float(kept / counts.sum()),
        "accuracy": float(right.sum() / kept) if kept else np.nan,
        "mean purity": float(np.nanmean(purity)) if kept else np.nan,
        "mean recall": float(recall.mean()),
        "mean IoU": float((right / union).mean()),
        "classes kept": int((counts[:, :-1].sum(0) > 0).sum()),
    }


def by_class(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Purity, NaN where nothing is kept as the class, and recall. Each ``(C,)``."""
    right = np.diag(counts)
    with np.errstate(invalid="ignore"):
        return right / counts[:, :-1].sum(0), right / counts.sum(1)


def parted(frames: Frames, seen: list[int], every: int) -> tuple[Frames, Frames]:
    """The labeled frames, and one of so many others: neighbors in a video are nearly the same."""
    return frames[seen], frames[sorted(set(range(len(frames))) - set(seen))[::every]]


def judged(made: Labels, rest: Frames) -> np.ndarray:
    """The confusion of a filter on frames."""
    return confusion(made(rest.logits), rest.labels, len(rest.classes))


def curves(
    frames: Frames, budgets: dict[int, list[int]], middle: int, every: int
) -> tuple[list[Row], dict[tuple[str, float], np.ndarray]]:
    """Every rule, over its levels with one budget and at its usual one with others.

    Also the confusions of the middle budget by rule and level.
    """
    rows: list[Row] = []
    held: dict[tuple[str, float], np.ndarray] = {}
    for n, labeled_ones in budgets.items():
        seen, rest = parted(frames, labeled_ones, every)
        for rule in rules(frames.classes):
            at = rule.fit(seen)
            for level in rule.levels if n == middle else (rule.usual,):
                counts = judged(at(level), rest)
                rows.append({"n": n, "rule": rule.name, "level": level, **summary(counts)})
                if n == middle:
                    held[rule.name, level] = counts
            print("done:", n, rule.name, file=sys.stderr, flush=True)
        top = rest.logits.argmax(1)
        right = torch.where(top == rest.labels, top, 255)
        found = summary(confusion(right, rest.labels, len(frames.classes)))
        rows.append({"n": n, "rule": "no wrong label", "level": np.nan, **found})
    return rows, held


def draws(frames: Frames, n: int, count: int, seed: int, every: int) -> list[Row]:
    """Each rule at its usual level on frames drawn at random: mean and standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(count):
        chosen = torch.randperm(len(frames), generator=generator).tolist()
        seen, rest = parted(frames, chosen[:n], every)
        for rule in rules(frames.classes):
            counts = judged(rule.fit(seen)(rule.usual), rest)
            found.setdefault(rule.name, []).append(summary(counts))
        print("done: draw", number, file=sys.stderr, flush=True)
    rows: list[Row] = []
    for rule in rules(frames.classes):
        row: dict[str, object] = {"rule": rule.name, "level": rule.usual, "n": n, "draws": count}
        for name in ("kept", "accuracy", "mean purity", "mean recall"):
            values = np.array([each[name] for each in found[rule.name]])
            held = values[~np.isnan(values)]
            row[name] = float(held.mean()) if len(held) else np.nan
            row[f"sd of {name}"] = float(held.std(ddof=1)) if len(held) > 1 else np.nan
        row["draws that keep none"] = sum(each["kept"] == 0 for each in found[rule.name])
        rows.append(row)
    return rows


def of_classes(counts: dict[tuple[str, float], np.ndarray], names: list[str]) -> list[Row]:
    """Purity and recall of each class, one line per rule and level."""
    rows: list[Row] = []
    for (rule, level), held in counts.items():
        row: dict[str, object] = {"rule": rule, "level": level, "kept": summary(held)["kept"]}
        for label, purity, recall in zip(names, *by_class(held), strict=True):
            row[label] = f"{100 * purity:.0f} / {100 * recall:.0f}" if recall > 0 else "none"
        rows.append(row)
    return rows


# --- the figure -----------------------------------------------------------------------------------

# name, color (of cpseg.plots.PALETTE), marker, line
DRAWN = (
    ("confidence", 5, "", "-"),
    ("class: Argmax", 6, "o", "-"),
    ("class: Singleton", 3, "s", "-"),
    ("class: AtMost 2", 7, "D", "-"),
    ("class: Top", 1, "^", "-"),
    ("pooled: Singleton", 2, "v", "--"),
    ("class: Building as background", 9, "P", ":"),
    ("location: Argmax", 8, "X", ":"),
    ("controlled error, tuned start", 0, "*", "-"),
    ("controlled error per class", 10, "h", "-"),
)


def figure(rows: list[Row], n: int, path: Path) -> None:
    """Kept against right, over all pixels and over classes."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: PLC0415

    from cpseg.plots import PALETTE  # noqa: PLC0415

    drawing = Figure(figsize=(10.5, 6.2), layout=ConstrainedLayoutEngine(wspace=0.06))
    planes = (
        (
            "kept",
            "accuracy",
            "share of labeled pixels kept",
            "share of kept labels that are right",
        ),
        ("mean recall", "mean purity", "recall, mean over classes", "purity, mean over classes"),
    )
    panels = drawing.subplots(1, 2)
    for axes, (across, up, below, beside) in zip(panels, planes, strict=True):
        for name, color, marker, line in DRAWN:
            held = [row for row in rows if row["n"] == n and row["rule"] == name]
            held = [row for row in held if row["kept"] > 0]  # type: ignore[operator]
            axes.plot(
                [row[across] for row in held],
                [row[up] for row in held],
                marker=marker or None,
                ls=line,
                color=PALETTE[color],
                ms=6,
                mec="#222222",
                mew=0.5,
                lw=2.6 if name == "confidence" else 1.4,
                label=name,
                zorder=3 if name == "confidence" else 4,
            )
            for row in held if name == "confidence" else ():
                if row["level"] in (0.9, 0.95):
                    spot = (row[across], row[up])
                    axes.plot(
                        *spot, "o", color="white", mec=PALETTE[color], mew=1.8, ms=8, zorder=5
                    )
                    axes.annotate(
                        f"{row['level']}", spot, xytext=(7, 4), textcoords="offset points"
                    )
        perfect = next(row for row in rows if row["n"] == n and row["rule"] == "no wrong label")
        axes.plot(
            perfect[across],
            perfect[up],
            "k+",
            ms=11,
            mew=2,
            ls="",
            label="every wrong label dropped",
        )
        axes.set_xlabel(below)
        axes.set_ylabel(beside)
        axes.grid(color="#e5e5e5", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, write them, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--quick", action="store_true", help="frames made on the fly, few draws")
    parser.add_argument("--draws", type=int, help="5, or 2 if quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="judge one of so many frames")
    parser.add_argument("--budgets", type=int, nargs="*", default=[23, 46, 92])
    parser.add_argument("--only", nargs="*", default=["curves", "draws"])
    parser.add_argument("--output", type=Path, help="a folder")
    parser.add_argument("--figure", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.data is None and not chosen.quick:
        print("nothing to do without --data FOLDER or --quick")
        return
    torch.set_num_threads(1)
    count = chosen.draws or (2 if chosen.quick else 5)
    if chosen.quick:
        frames, middle = miniature(120), 60
        budgets = {60: list(range(0, 120, 2))}
    else:
        frames, middle = load(chosen.data, "train"), 46
        budgets = {n: labeled(chosen.data, n, frames) for n in chosen.budgets}
    print(f"{len(frames)} frames, {count} draws, seed {chosen.seed}")
    parts: dict[str, tuple[str, list[Row]]] = {}
    if "curves" in chosen.only:
        rows, counts = curves(frames, budgets, middle, chosen.every)
        if chosen.figure:
            figure(rows, middle, chosen.figure)
        parts["curves"] = "Every rule over its levels", rows
        parts["classes"] = "Purity / recall in percent", of_classes(counts, frames.classes)
    if "draws" in chosen.only:
        rows = draws(frames, middle, count, chosen.seed, chosen.every)
        parts["draws"] = "Labeled frames drawn at random", rows
    for name, (title, rows) in parts.items():
        if chosen.output or not chosen.quick:
            write((chosen.output or RESULTS) / f"labels_{name}.csv", rows)
        print(f"\n{title}\n\n{markdown(rows, list(rows[0]))}", flush=True)


if __name__ == "__main__":
    main()
