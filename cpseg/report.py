"""One HTML file about a calibration: what it promises, what happened on labelled images, what to do.

:func:`measure` walks labelled images once, and once more for those it shows; :func:`page` writes
what was found as one file without scripts that loads nothing from anywhere. Figures need
matplotlib: ``pip install 'cpseg[plot]'``.
"""

import html
import io
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite, isnan, nan, sqrt
from typing import TYPE_CHECKING, Protocol, final

import torch
from torch import Tensor

from cpseg import plots
from cpseg.calibration import Calibration
from cpseg.calibrators import ClassConditionalCalibrator, SplitCalibrator
from cpseg.errors import InputError
from cpseg.filters import Argmax, AtMost, BackgroundPriority, Singleton, Top, rule_of
from cpseg.metrics import (
    Coverage,
    CoverageReport,
    SelectiveAccuracy,
    SelectiveAccuracyReport,
    SetSize,
    SetSizeReport,
)
from cpseg.plots import Certified, ConfidenceCounts
from cpseg.predictors import PixelSetPredictor
from cpseg.quantile import level

if TYPE_CHECKING:
    import matplotlib.figure

__all__ = [
    "AnyFilter",
    "Entries",
    "Entry",
    "Findings",
    "Seen",
    "Worry",
    "levels_table",
    "measure",
    "page",
]

AnyFilter = Argmax | Top | BackgroundPriority | Singleton | AtMost
"""A filter of :mod:`cpseg.filters`."""

_LEVELS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
_PLANNED = 32  # images behind the set sizes at other levels
_FEW = 0.5  # a threshold is vague where coverage can lie this share of alpha beside the promise


@final
@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """A labelled image.

    Attributes:
        name: What to call it.
        logits: Shape ``(C, *S)``.
        labels: Integers. Shape ``(*S)``.
        image: Red, green, blue, uint8 ``(3, H, W)``, if there is one.
    """

    name: str
    logits: Tensor
    labels: Tensor
    image: Tensor | None = None


class Entries(Protocol):
    """Labelled images, read one at a time."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int, /) -> Entry:
        """One of them."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """What happened on one image.

    Attributes:
        name: The image.
        coverage: Share of labelled pixels whose class is in the set; NaN without sets or labels.
        set_size: Mean size of those sets.
        right: Share of labelled pixels whose most likely class is right.
    """

    name: str
    coverage: float
    set_size: float
    right: float


@final
@dataclass(frozen=True, slots=True)
class Worry:
    """A class that needs attention.

    Attributes:
        name: The class.
        why: What is the matter, a sentence or more.
        remedy: What would help.
    """

    name: str
    why: str
    remedy: str


@final
@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Findings:
    """What :func:`measure` found.

    Attributes:
        calibration: What was looked at.
        rule: The filter, in words.
        class_names: Of each class.
        coverage: Of the sets; None where the calibration makes none.
        sizes: Of the sets.
        raw: Of the most likely class everywhere.
        kept: Of what the filter keeps.
        confidence: How often the most likely class is right.
        images: Every image, the least covered first.
        levels: Levels, the thresholds these images would give, and mean set sizes. None for
            thresholds per location or group, and where there are no sets.
        same_data: Whether these seem to be the very images of the calibration.
        worries: Classes that need attention.
        shown: The worst images with their figures.
    """

    calibration: Calibration
    rule: str
    class_names: Sequence[str]
    coverage: CoverageReport | None
    sizes: SetSizeReport | None
    raw: SelectiveAccuracyReport
    kept: SelectiveAccuracyReport
    confidence: ConfidenceCounts
    images: Sequence[Seen]
    levels: tuple[list[float], Tensor, list[float]] | None
    same_data: bool
    worries: Sequence[Worry]
    shown: Sequence[tuple[Seen, "matplotlib.figure.Figure"]]


def measure(
    calibration: Calibration,
    entries: Entries,
    keep: AnyFilter,
    *,
    class_names: Sequence[str],
    worst: int = 3,
    walk: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Findings:
    """Look at labelled images that did not calibrate.

    Args:
        calibration: What to look at. Not one with groups: they are not known here.
        entries: The images.
        keep: The filter, of the same calibration.
        class_names: Of each class.
        worst: How many images to draw; those with two spatial axes only.
        walk: Wraps the numbers of the images, for a progress bar.

    Returns:
        What was found.

    Raises:
        InputError: If there are no images, or the calibration has groups.
    """
    if len(entries) == 0:
        raise InputError("entries must hold at least one labelled image; got none")
    if "group" in calibration.axes:
        raise InputError("calibration must have no groups for a report; they are not known here")
    classes, ignore = len(class_names), calibration.ignore_index
    makes_sets = calibration.control is None or calibration.control.rule is None
    predictor = PixelSetPredictor(calibration) if makes_sets else None
    coverage, sizes = Coverage(classes, ignore), SetSize(classes, ignore)
    raw, kept = SelectiveAccuracy(classes, ignore), SelectiveAccuracy(classes, ignore)
    confidence = ConfidenceCounts(ignore)
    planner = _planner(calibration, classes) if makes_sets else None
    seen: list[Seen] = []
    for index in walk(range(len(entries))):
        entry = entries[index]
        logits, labels = entry.logits[None], entry.labels[None]
        top = logits.argmax(1)
        raw.update(top, labels)
        kept.update(keep(logits).long(), labels)
        confidence.update(logits, labels)
        known = labels[0] != ignore
        right = _mean((top == labels)[0][known])
        covered = size = nan
        if predictor is not None:
            sets = predictor(logits)
            coverage.update(sets, labels)
            sizes.update(sets, labels)
            member = sets[0].gather(0, torch.where(known, labels[0], 0).long()[None])[0]
            covered, size = _mean(member[known]), _mean(sets[0].sum(0)[known])
        if planner is not None:
            planner.update(logits, labels)
        seen.append(Seen(entry.name, covered, size, right))
    order = sorted(range(len(seen)), key=lambda index: _badness(seen[index]))
    planned = range(0, len(entries), max(1, ceil(len(entries) / _PLANNED)))
    table = None
    if planner is not None:
        table = levels_table(
            planner, ((e.logits[None], e.labels[None]) for e in map(entries.__getitem__, planned))
        )
    covered_report = coverage.compute() if makes_sets else None
    sizes_report = sizes.compute() if makes_sets else None
    raw_report, kept_report = raw.compute(), kept.compute()
    chosen = [entries[index] for index in order[:worst]]
    return Findings(
        calibration=calibration,
        rule=rule_of(keep),
        class_names=class_names,
        coverage=covered_report,
        sizes=sizes_report,
        raw=raw_report,
        kept=kept_report,
        confidence=confidence,
        images=[seen[index] for index in order],
        levels=table,
        same_data=_same_data(calibration, raw_report),
        worries=_worries(
            calibration,
            class_names,
            coverage=covered_report,
            sizes=sizes_report,
            raw=raw_report,
            kept=kept_report,
        ),
        shown=[
            (seen[index], _drawn(entry, calibration, predictor, keep, class_names))
            for index, entry in zip(order, chosen, strict=False)
            if entry.labels.ndim == 2 and predictor is not None
        ],
    )


def levels_table(
    calibrator: SplitCalibrator | ClassConditionalCalibrator,
    batches: Iterable[tuple[Tensor, Tensor]],
    alphas: Sequence[float] = _LEVELS,
) -> tuple[list[float], Tensor, list[float]]:
    """Thresholds and set sizes at several levels: what another alpha would cost.

    For planning. A level that is chosen on the labels of a calibration voids its guarantee.

    Args:
        calibrator: What gives the thresholds.
        batches: Logits ``(B, C, *S)`` and labels ``(B, *S)`` whose sets are measured.
        alphas: The levels.

    Returns:
        The levels, the thresholds ``(A, 1 or C)``, and the mean over images of the mean set size
        at labelled pixels, NaN without any.
    """
    calibrations = [calibrator.compute(alpha) for alpha in alphas]
    predictors = [PixelSetPredictor(calibration) for calibration in calibrations]
    found: list[list[float]] = [[] for _ in alphas]
    for logits, labels in batches:
        for image, label in zip(logits, labels, strict=True):
            known = label != calibrator.ignore_index
            for sizes, predictor in zip(found, predictors, strict=True):
                sizes.append(_mean(predictor(image[None])[0].sum(0)[known]))
    means = [[size for size in sizes if not isnan(size)] for sizes in found]
    return (
        list(alphas),
        torch.stack([calibration.thresholds for calibration in calibrations]),
        [sum(sizes) / len(sizes) if sizes else nan for sizes in means],
    )


def _planner(
    calibration: Calibration, classes: int
) -> SplitCalibrator | ClassConditionalCalibrator | None:
    limits = calibration.score.range(classes)
    if calibration.control is not None or limits is None:
        return None
    score, unit, ignore = calibration.score, calibration.unit, calibration.ignore_index
    if calibration.axes == ("class",):
        return ClassConditionalCalibrator(classes, score, unit=unit, ignore_index=ignore)
    if calibration.axes == ():
        return SplitCalibrator(score, unit=unit, ignore_index=ignore)
    return None


def _same_data(calibration: Calibration, raw: SelectiveAccuracyReport) -> bool:
    """Whether there are exactly as many pixels of each threshold here as in calibration."""
    pixels = raw.kept_by_true_class.denominator
    if calibration.axes == ("class",):
        return torch.equal(pixels, calibration.num_pixels)
    return calibration.axes == () and int(pixels.sum()) == int(calibration.num_pixels.sum())


def _badness(image: Seen) -> tuple[float, float]:
    first = image.coverage if not isnan(image.coverage) else image.right
    return (inf if isnan(first) else first, image.right)


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else nan


def _drawn(
    entry: Entry,
    calibration: Calibration,
    predictor: PixelSetPredictor,
    keep: AnyFilter,
    class_names: Sequence[str],
) -> "matplotlib.figure.Figure":
    return plots.one_image(
        entry.logits,
        predictor(entry.logits[None])[0],
        image=entry.image,
        pseudo_labels=keep(entry.logits[None])[0],
        labels=entry.labels,
        class_names=class_names,
        ignore_index=calibration.ignore_index,
    )


# --- what to worry about -------------------------------------------------------------------------


def _alphas(calibration: Calibration, classes: int) -> list[float]:
    alpha = calibration.alpha
    return list(alpha) if isinstance(alpha, tuple) else [alpha] * classes


def _worries(
    calibration: Calibration,
    class_names: Sequence[str],
    *,
    coverage: CoverageReport | None,
    sizes: SetSizeReport | None,
    raw: SelectiveAccuracyReport,
    kept: SelectiveAccuracyReport,
) -> list[Worry]:
    """Classes with what is wrong about them, in their order."""
    found: list[Worry] = []
    images = int(raw.kept.num_images)
    alphas = _alphas(calibration, len(class_names))
    counts: list[int] = raw.kept_by_true_class.num_images.tolist()
    for index, name in enumerate(class_names):
        told: list[tuple[str, str] | None] = []
        if calibration.axes == ("class",) and calibration.control is None:
            told.append(_about_threshold(calibration, index, counts[index], images))
        if coverage is not None and sizes is not None and counts[index]:
            if _promises_classes(calibration) and not bool(calibration.fallback_groups[index]):
                told.append(_about_coverage(coverage, index, alphas[index]))
            size = float(sizes.classes.mean_of_images.value[index])
            if size > max(2.0, 1.5 * sizes.mean_of_images):
                told.append(
                    (
                        f"Its sets are vague: they hold {size:.1f} classes on average.",
                        "A better annotator or a larger alpha; no calibration makes it sharp.",
                    )
                )
        told += _about_labels(kept, index, seen=counts[index] > 0)
        sentences = [each for each in told if each is not None]
        if sentences:
            why, remedies = zip(*sentences, strict=True)
            found.append(Worry(name, " ".join(why), " ".join(dict.fromkeys(remedies))))
    return found


def _about_coverage(report: CoverageReport, index: int, alpha: float) -> tuple[str, str] | None:
    covered = report.classes.mean_of_images
    if not float(covered.high[index]) < 1 - alpha:
        return None
    return (
        (
            f"Covered {_percent(float(covered.value[index]))}, and its interval lies below the "
            f"promised {_percent(1 - alpha)}."
        ),
        (
            "Check that the logits were computed as for calibration; if they were, these images "
            "differ from the calibration images: calibrate on images like these."
        ),
    )


def _about_labels(
    kept: SelectiveAccuracyReport, index: int, *, seen: bool
) -> list[tuple[str, str] | None]:
    if not seen:
        return [
            (
                "It is in none of these images, so nothing here was tested.",
                "Add labelled images that contain it.",
            )
        ]
    told: list[tuple[str, str] | None] = []
    accuracy = float(kept.accuracy_of_kept.mean_of_pixels.value)
    right = float(kept.accuracy_by_predicted_class.mean_of_pixels.value[index])
    if right < accuracy - 0.05:
        told.append(
            (
                (
                    f"Of labels kept as this class {_percent(right)} are right, of all kept labels "
                    f"{_percent(accuracy)}."
                ),
                "A stricter rule, or cpseg.risk.KeptError per class, which controls this.",
            )
        )
    share = float(kept.kept_by_true_class.mean_of_pixels.value[index])
    if share < 0.05:
        told.append(
            (
                f"Only {_percent(share)} of its pixels keep a label.",
                "A student will hardly see it: give it labels by hand.",
            )
        )
    return told


def _about_threshold(
    calibration: Calibration, index: int, here: int, images: int
) -> tuple[str, str] | None:
    """What is the matter with a class's threshold, and how many more images it needs."""
    alpha = _alphas(calibration, len(calibration.thresholds))[index]
    n, noun = int(calibration.num_units[index]), f"{calibration.unit}s"
    least = ceil(1 / level(alpha)) - 1
    steady = ceil((1 - alpha) / alpha / _FEW**2)
    if bool(calibration.fallback_groups[index]):
        return (
            (
                f'Its threshold comes from the fallback "{calibration.fallback}", and nothing is '
                f"promised: it is in {n} calibration {noun}, and needs {least}."
            ),
            _more(least - n, noun, here, images),
        )
    if not isfinite(float(calibration.thresholds[index])):
        return (
            (
                f"No threshold: it is in {n} calibration {noun}, and this alpha needs {least}. It "
                "stays in every set and is never kept as a label."
            ),
            _more(least - n, noun, here, images)
            + " Or a fallback, which gives up its promise: pooled, or a fitted one of cpseg.tuning.",
        )
    if calibration.unit == "image" and n < steady:
        spread = sqrt(alpha * (1 - alpha) / (n + 2))
        return (
            (
                f"Its threshold rests on {n} {noun}: with other {noun} its coverage could lie "
                f"up to about {_percent(spread)} to either side."
            ),
            _more(steady - n, noun, here, images),
        )
    return None


def _more(count: int, noun: str, here: int, images: int) -> str:
    text = f"Label {count} more {noun} that contain it"
    if here and noun == "images":
        text += f"; {here} of {images} here do, so about {ceil(count * images / here)} in all"
    return f"{text}."


def _promises_classes(calibration: Calibration) -> bool:
    return calibration.axes == ("class",) and _compares(calibration)


def _compares(calibration: Calibration) -> bool:
    """Whether the mean over images is what the calibration bounds."""
    return calibration.control is None and calibration.unit == "image"


# --- the page ------------------------------------------------------------------------------------


def page(findings: Findings, *, title: str, command: str, version: str) -> str:
    """One HTML file: no script, nothing loaded from anywhere.

    Args:
        findings: What :func:`measure` found.
        title: What it is about, such as the calibration's file.
        command: What made it.
        version: Of cpseg.

    Returns:
        The file's text.
    """
    sections = [
        ("What is promised", _promise(findings)),
        ("What happened on these images", _summary(findings)),
        ("Classes", _classes(findings)),
        ("Classes to worry about", _worries_told(findings.worries)),
        ("What to do", _advice(findings)),
        ("Figures", _figures(findings)),
        ("The worst images", _worst(findings)),
        ("How this was made", _made(command, version)),
    ]
    body = "\n".join(f"<section><h2>{name}</h2>\n{text}\n</section>" for name, text in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}: cpseg report</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f"<header><h1>Calibration report</h1>\n<p>{_text(title)}</p></header>\n"
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _promise(findings: Findings) -> str:
    promised = findings.calibration.guarantee
    parts = [
        (
            f"<p class=lead>{_text(promised.event)}, {_text(promised.probability)} "
            f"({_count(promised.n, promised.unit)}).</p>"
        ),
        "<p>Assumed:</p>",
        _list(_text(assumption) for assumption in promised.assumptions),
    ]
    parts += [f"<p class=note>{_text(exception)}</p>" for exception in promised.exceptions]
    return "\n".join(parts)


def _count(n: tuple[int, int], unit: str) -> str:
    few, many = n
    return f"{few if few == many else f'{few} to {many}'} calibration {unit}s"


def _summary(findings: Findings) -> str:
    calibration, coverage = findings.calibration, findings.coverage
    parts: list[str] = []
    if findings.same_data:
        parts.append(
            "<p class=warning>These seem to be the very images that calibrated: there are exactly "
            "as many labelled pixels of each kind. Coverage on them comes out right by "
            "construction and tests nothing. Take labelled images of their own.</p>"
        )
    facts: list[tuple[str, str]] = [("labelled images", str(len(findings.images)))]
    if coverage is not None and findings.sizes is not None:
        mean = coverage.overall.mean_of_images
        facts.append(("coverage, mean of images", _estimate(mean.value, mean.low, mean.high)))
        if calibration.axes == () and _compares(calibration):
            facts.append(("promised", _percent(1 - _alphas(calibration, 1)[0])))
        facts += [
            ("worst image", _percent(coverage.worst_image)),
            ("worst tenth of images", _percent(coverage.worst_tenth_of_images)),
            ("classes still possible, mean of images", f"{findings.sizes.mean_of_images:.2f}"),
        ]
    right = findings.raw.accuracy_of_kept.mean_of_pixels
    share, kept = findings.kept.kept.mean_of_pixels, findings.kept.accuracy_of_kept.mean_of_pixels
    facts += [
        (
            "the annotator's own labels that are right",
            _estimate(right.value, right.low, right.high),
        ),
        (f"kept by {findings.rule}", _estimate(share.value, share.low, share.high)),
        ("kept labels that are right", _estimate(kept.value, kept.low, kept.high)),
    ]
    rows = "".join(f"<tr><th scope=row>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in facts)
    parts.append(f"<div class=scroll><table class=facts>{rows}</table></div>")
    parts.append(
        "<p class=note>In brackets: 95% intervals, from images drawn again. Coverage bounds how "
        "often the truth is lost from a set; it says nothing about how often a kept label is "
        "wrong.</p>"
    )
    return "\n".join(parts)


def _classes(findings: Findings) -> str:
    calibration = findings.calibration
    own = calibration.axes == ("class",)
    counts: list[int] = findings.raw.kept_by_true_class.num_images.tolist()
    promises = _promises_classes(calibration)
    alphas = _alphas(calibration, len(findings.class_names))
    header = ["class"]
    if findings.coverage is not None:
        header += ["covered", *(["promised"] if promises else []), "set size"]
    header += ["kept", "right of kept", "images here"]
    if own:
        header += [f"calibration {calibration.unit}s", "threshold"]
    rows: list[list[str]] = []
    for index, name in enumerate(findings.class_names):
        row = [name]
        void = bool(calibration.fallback_groups[index]) if own else False
        if findings.coverage is not None and findings.sizes is not None:
            mean = findings.coverage.classes.mean_of_images
            row.append(_estimate(mean.value[index], mean.low[index], mean.high[index]))
            if promises:
                row.append("nothing" if void else _percent(1 - alphas[index]))
            size = float(findings.sizes.classes.mean_of_images.value[index])
            row.append("-" if isnan(size) else f"{size:.2f}")
        share = findings.kept.kept_by_true_class.mean_of_pixels.value[index]
        right = findings.kept.accuracy_by_predicted_class.mean_of_pixels.value[index]
        row += [_percent(float(share)), _percent(float(right)), str(counts[index])]
        if own:
            limit = float(calibration.thresholds[index])
            told = f"{limit:.4f}" if isfinite(limit) else "none"
            told += f" ({calibration.fallback})" if void else ""
            row += [str(int(calibration.num_units[index])), told]
        rows.append(row)
    note = (
        "<p class=note>covered and set size: means over images that contain the class. kept: of "
        "the class's pixels. right of kept: of labels kept as this class.</p>"
    )
    return _table(header, rows) + note


def _worries_told(worries: Sequence[Worry]) -> str:
    if not worries:
        return "<p>None stands out.</p>"
    rows = [[worry.name, worry.why, worry.remedy] for worry in worries]
    return _table(["class", "why", "what helps"], rows, words=True)


def _advice(findings: Findings) -> str:
    calibration, coverage = findings.calibration, findings.coverage
    advice: list[str] = []
    if findings.same_data:
        advice.append("Repeat this report on labelled images that did not calibrate.")
    if coverage is not None and calibration.axes == () and _compares(calibration):
        high = float(coverage.overall.mean_of_images.high)
        if high < 1 - _alphas(calibration, 1)[0]:
            advice.append(
                "Coverage lies below the promise, interval and all: either the logits were "
                "computed in another way than for calibration, or these images differ from the "
                "calibration images. Calibrate on images like these; cpseg.shift has weights and "
                "alarms for such streams."
            )
    starved = (~calibration.thresholds.isfinite()).sum()
    if int(starved) and calibration.control is None:
        advice.append(
            "Where there is no threshold, label more images with those classes first; the table "
            "above says how many. Until then take a larger alpha, or a fallback, which gives up "
            "the promise for these classes only."
        )
    if calibration.fallback is not None and bool(calibration.fallback_groups.any()):
        other = "a fitted one of cpseg.tuning" if calibration.fallback == "pooled" else "pooled"
        advice.append(
            f'The fallback "{calibration.fallback}" stands in for some classes. More images of '
            f"them restore the promise; another fallback, {other}, may fit them better."
        )
    if findings.sizes is not None and findings.sizes.mean_of_images > 2:
        advice.append(
            f"The sets hold {findings.sizes.mean_of_images:.1f} classes on average, too many to "
            "keep labels from. The figure of levels shows what a larger alpha would give; choose "
            "it before calibrating anew, and not on the labels that calibrate."
        )
    if calibration.unit == "pixel":
        advice.append(
            "The unit is the pixel, which promises little about images. Calibrate with the image "
            "as the unit."
        )
    if calibration.control is None:
        advice.append(
            "If labels are kept to train on, control the error among kept labels: "
            "cpseg.risk.KeptError bounds it, as coverage does not."
        )
    return _list(map(_text, advice)) if advice else "<p>Nothing: it does what it promises.</p>"


def _figures(findings: Findings) -> str:
    calibration, names = findings.calibration, findings.class_names
    share = float(findings.kept.kept.mean_of_pixels.value)
    right = float(findings.kept.accuracy_of_kept.mean_of_pixels.value)
    control = calibration.control
    certified = None
    if control is not None and control.rule is not None and isinstance(calibration.alpha, float):
        certified = Certified(share, right, 1 - calibration.alpha)
    own = _promises_classes(calibration)
    whole = calibration.axes == () and _compares(calibration)
    drawn: list[tuple[matplotlib.figure.Figure, str]] = []
    if findings.coverage is not None:
        alpha = calibration.alpha
        promised = None
        if own:  # a fallback voids the promise for its classes
            limits = torch.tensor(_alphas(calibration, len(names)), dtype=torch.float64)
            promised = limits.masked_fill(calibration.fallback_groups, nan).tolist()
        drawn += [
            (
                plots.coverage_by_class(findings.coverage, promised, class_names=names),
                "Coverage of each class, with intervals that take the image as the unit.",
            ),
            (
                plots.coverage_of_images(
                    findings.coverage, alpha if whole and isinstance(alpha, float) else None
                ),
                "Coverage of each image. A promise is about their mean, not about each.",
            ),
        ]
    if findings.levels is not None:
        drawn.append(
            (
                plots.levels(*findings.levels, class_names=names),
                "What other levels would give on these images, for planning the next calibration.",
            )
        )
    drawn.append(
        (
            plots.reliability(findings.confidence),
            "Whether the annotator is as often right as it is confident. Pixels pooled.",
        )
    )
    points = {findings.rule: (share, right)} if certified is None else None
    drawn.append(
        (
            plots.risk_coverage(findings.confidence, points=points, certified=certified),
            "How much is kept, and how much of that is right.",
        )
    )
    figures = "\n".join(_figure(figure, text) for figure, text in drawn)
    return f"<div class=grid>\n{figures}\n</div>"


def _worst(findings: Findings) -> str:
    if findings.coverage is None:
        rows = [[image.name, _percent(image.right)] for image in findings.images[:10]]
        return _table(["image", "annotator right"], rows)
    rows = [
        [
            image.name,
            _percent(image.coverage),
            "-" if isnan(image.set_size) else f"{image.set_size:.2f}",
            _percent(image.right),
        ]
        for image in findings.images[:10]
    ]
    text = _table(["image", "covered", "set size", "annotator right"], rows)
    return text + "\n".join(
        _figure(figure, f"{image.name}: {_percent(image.coverage)} covered", wide=True)
        for image, figure in findings.shown
    )


def _made(command: str, version: str) -> str:
    return f"<pre>{_text(command)}</pre>\n<p class=note>cpseg {_text(version)}</p>"


def _figure(figure: "matplotlib.figure.Figure", caption: str, *, wide: bool = False) -> str:
    buffer = io.BytesIO()
    # Nothing but the picture: the same findings give the same file.
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    data = b64encode(buffer.getvalue()).decode()
    text = _text(caption)
    kind = " class=wide" if wide else ""
    return (
        f'<figure{kind}><div class=scroll><img alt="{text}" src="data:image/png;base64,{data}">'
        f"</div><figcaption>{text}</figcaption></figure>"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> str:
    head = "".join(f"<th scope=col>{_text(cell)}</th>" for cell in header)
    lines = "".join(
        f"<tr><th scope=row>{_text(first)}</th>"
        + "".join(
            f'<td data-label="{_text(name)}">{_text(cell)}</td>'
            for name, cell in zip(header[1:], cells, strict=True)
        )
        + "</tr>"
        for first, *cells in rows
    )
    kind = " class=words" if words else ""
    return (
        f"<div class=scroll><table{kind}><thead><tr>{head}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _estimate(value: Tensor, low: Tensor, high: Tensor) -> str:
    if isnan(float(low)):
        return _percent(float(value))
    return f"{_percent(float(value))} [{_percent(float(low))}, {_percent(float(high))}]"


def _percent(share: float) -> str:
    return "-" if isnan(share) else f"{100 * share:.4g}%" if share > 0.999 else f"{share:.1%}"


def _text(value: str) -> str:
    return html.escape(value, quote=True)


_CSS = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:#222;font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
header,main{max-width:72rem;margin:0 auto;padding:0 1rem}
header{padding-top:1.5rem}
h1{margin:0;font-size:1.7rem;line-height:1.2}
header p{margin:.25rem 0 0;color:#555;overflow-wrap:anywhere}
h2{margin:2.2rem 0 .6rem;padding-top:.6rem;border-top:1px solid #ddd;font-size:1.25rem}
p,ul{max-width:46rem;margin:.5rem 0}
ul{padding-left:1.3rem}
.lead{font-size:1.1rem}
.note{color:#555;font-size:.9rem}
.warning{border-left:4px solid #d55e00;background:#fdf3ec;padding:.6rem .8rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;margin:.5rem 0}
th,td{padding:.3rem .7rem .3rem 0;border-bottom:1px solid #e5e5e5;text-align:right;vertical-align:top;
white-space:nowrap}
thead th{border-bottom:2px solid #bbb;font-weight:600;vertical-align:bottom;white-space:normal}
th:first-child{text-align:left;font-weight:600}
.facts th{font-weight:400;white-space:normal}
.words td{text-align:left;white-space:normal;min-width:14rem}
.words th{text-align:left}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1rem 2rem}
figure{margin:.8rem 0;min-width:0}
figcaption{color:#555;font-size:.9rem}
img{display:block;max-width:100%;height:auto}
.grid img{width:100%;max-width:34rem}
.wide img{width:100%;max-width:60rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f5f5f5;padding:.7rem;font-size:.85rem}
@media (max-width:40rem){
.wide img{width:44rem;max-width:none}
table:not(.words):not(.facts) th:first-child{position:sticky;left:0;background:#fff}
.words thead{display:none}
.words tr,.words th,.words td{display:block;border:0;padding:.1rem 0}
.words tr{border-bottom:1px solid #e5e5e5;padding:.4rem 0}
.words td[data-label]::before{content:attr(data-label) ": ";color:#555}
}
@media print{
@page{margin:15mm}
body{font-size:10pt}
header,main{max-width:none;padding:0}
h2{break-after:avoid}
figure,tr,.warning{break-inside:avoid}
.scroll{overflow:visible}
.grid{grid-template-columns:1fr 1fr}
.grid img{max-width:8cm}
.wide img{width:100%;max-width:17cm}
table{font-size:8pt}
thead{display:table-header-group}
th,td{padding-right:.4rem}
}
"""
