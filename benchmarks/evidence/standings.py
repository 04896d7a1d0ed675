"""How the arms stand: what the rows of ``students.py`` say, as tables and as a figure.

    python benchmarks/evidence/standings.py [--results FILE] [--figure docs/_static/evidence_students.png]

The tables are also written beside the rows, for the docs.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from math import isnan, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from arms import ARMS, BESIDE
from rows import RESULTS, rows_of
from scipy.stats import t as student_t

SHOWN, SIZE = 46, "90x120"  # labeled frames, in the figure, and their size where classes are told
SPREAD = 3  # seeds that an interval of the figure is drawn from; of two it would span the page
ALL = "all of val"


class Match(NamedTuple):
    """Runs that are comparable, and where they were tested."""

    labeled: int
    size: str
    held_out: str
    steps: int
    video: str

    @property
    def tested(self) -> str:
        return f"tested on {self.video}" + (", of which no frame trains" if self.held_out else "")


class Run(NamedTuple):
    """What the standings need of a row."""

    miou: float
    kept: float
    right: float
    iou: Mapping[str, float | None]


Arms = dict[str, dict[str, Run]]  # by arm and seed


def matches(results: Path) -> dict[Match, Arms]:
    """The runs of a results file; where a video was held out, tested on that."""
    found: dict[Match, Arms] = {}
    for (arm, count, seed, size, held_out, steps), row in rows_of(results).items():
        by_video: dict[str, float] = json.loads(row["miou_by_video"])
        whole = {} if len(by_video) == 1 or held_out else {ALL: float(row["miou"])}
        for video, miou in (by_video | whole).items():
            if held_out in ("", video):
                match = Match(int(count), size, held_out, int(steps), video)
                of_arm = found.setdefault(match, {}).setdefault(arm, {})
                of_arm[seed] = Run(
                    miou,
                    float(row["kept"]),
                    float(row["right"]),
                    json.loads(row["iou_by_class"]),
                )
    return {
        match: dict(sorted(arms.items(), key=lambda arm: list(ARMS).index(arm[0])))
        for match, arms in sorted(found.items())
    }


def gains(runs: Mapping[str, Run], others: Mapping[str, Run]) -> list[float]:
    """Differences over the seeds that two arms share."""
    return [run.miou - others[seed].miou for seed, run in runs.items() if seed in others]


def half_width(values: list[float]) -> float:
    """Of the 95 % t-interval of their mean."""
    quantile = float(student_t.ppf(0.975, len(values) - 1))
    return quantile * stdev(values) / sqrt(len(values))


def interval(values: list[float]) -> str:
    """Mean and 95 % t-interval of paired differences, in points."""
    if len(values) < 2:
        return f"{100 * values[0]:+.1f}" if values else ""
    middle, half = mean(values), half_width(values)
    return f"{100 * middle:+.1f} [{100 * (middle - half):+.1f}, {100 * (middle + half):+.1f}]"


def table(results: Path) -> str:
    """Mean and spread of each arm, and its paired differences over the seeds two arms share."""
    lines: list[str] = []
    for match, arms in matches(results).items():
        lines += [
            f"{match.labeled} labeled frames, {match.size}, {match.steps:,} steps, {match.tested}",
            "",
            f"| arm | kept | right | seeds | mIoU | sd | minus {' | minus '.join(BESIDE)} |",
            "|---" * (6 + len(BESIDE)) + "|",
        ]
        for arm, runs in arms.items():
            miou, kept, right, _ = zip(*runs.values(), strict=True)
            cells = [
                arm,
                f"{mean(kept):.4f}",
                "" if isnan(mean(right)) else f"{mean(right):.4f}",
                str(len(runs)),
                f"{100 * mean(miou):.1f}",
                f"{100 * stdev(miou):.1f}" if len(miou) > 1 else "",
            ]
            cells += ["" if arm == o else interval(gains(runs, arms.get(o, {}))) for o in BESIDE]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def classes(results: Path) -> str:
    """What each class gains on raw labels in the fewest steps, in points of IoU.

    Bold where the 95 % t-interval leaves out zero; of arms with three seeds or more.
    """
    found = {
        match.steps: arms
        for match, arms in matches(results).items()
        if (match.labeled, match.size, match.held_out) == (SHOWN, SIZE, "") and "raw" in arms
    }
    arms = found[min(found)]
    raw = arms.pop("raw")
    names = list(next(iter(raw.values())).iou)
    lines = [f"| minus raw | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for arm, runs in arms.items():
        shared = [seed for seed in runs if seed in raw]
        if len(shared) < SPREAD:
            continue
        cells: list[str] = []
        for name in names:
            values = [(runs[s].iou[name] or 0.0) - (raw[s].iou[name] or 0.0) for s in shared]
            told = f"{100 * mean(values):+.1f}"
            cells.append(f"**{told}**" if abs(mean(values)) > half_width(values) else told)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def panels(results: Path) -> dict[str, dict[str, list[float]]]:
    """What arms gain on raw labels, in points seed by seed, the worst first; most steps first."""
    found: dict[str, dict[str, list[float]]] = {}
    for match, arms in sorted(matches(results).items(), key=lambda match: -match[0].steps):
        over = {arm: gains(runs, arms.get("raw", {})) for arm, runs in arms.items() if arm != "raw"}
        points = {arm: [100 * gain for gain in each] for arm, each in over.items() if each}
        if match.labeled == SHOWN and points:
            title = f"{match.steps:,} steps, {match.size}, {match.tested}"
            found[title] = dict(sorted(points.items(), key=lambda arm: mean(arm[1])))
    return found


def figure(results: Path, path: Path) -> None:
    """Draw the panels."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    from cpseg.plots import PALETTE  # noqa: PLC0415

    drawn = panels(results)
    heights = [len(arms) + 1 for arms in drawn.values()]
    drawing = Figure(figsize=(9.5, 0.24 * sum(heights) + 1.2), layout="constrained")
    planes = drawing.subplots(
        len(drawn), squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )
    for axes, (title, arms) in zip(planes.flat, drawn.items(), strict=True):
        for place, points in enumerate(arms.values()):
            axes.plot(points, [place] * len(points), "o", ms=5, mfc="none", mec=PALETTE[0])
            if len(points) >= SPREAD:
                axes.errorbar(
                    mean(points),
                    place,
                    xerr=half_width(points),
                    fmt="|",
                    ms=11,
                    mew=2.2,
                    color=PALETTE[1],
                    capsize=3,
                )
        axes.axvline(0, color="#888888", lw=1)
        axes.set_yticks(range(len(arms)), list(arms), fontsize=8)
        axes.set_ylim(-0.7, len(arms) - 0.3)
        axes.set_title(title, fontsize=9, loc="left")
        axes.grid(axis="x", color="#e5e5e5", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    planes[-1, 0].set_xlabel("points of mIoU over raw labels of the same seed")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=110)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args(words)
    page = table(given.results)
    print(page)
    given.results.with_suffix(".md").write_text(page, encoding="utf-8")
    beside = given.results.with_name(f"{given.results.stem}_classes.md")
    beside.write_text(classes(given.results), encoding="utf-8")
    if given.figure:
        figure(given.results, given.figure)


if __name__ == "__main__":
    main(sys.argv[1:])
