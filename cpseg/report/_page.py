"""The page: a section after the other. Private, since the function has the natural name."""

from collections.abc import Sequence
from math import isfinite, isnan, nan
from typing import TYPE_CHECKING

import torch

from cpseg import plots
from cpseg.plots import Certified
from cpseg.report._html import CSS, bullets, escaped, estimate, figure_of, percent, table
from cpseg.report._promises import alphas_of, compares, promises_classes
from cpseg.report.findings import Findings, Worry

if TYPE_CHECKING:
    import matplotlib.figure


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
        f"<title>{escaped(title)}: cpseg report</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<header><h1>Calibration report</h1>\n<p>{escaped(title)}</p></header>\n"
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _promise(findings: Findings) -> str:
    promised = findings.calibration.guarantee
    parts = [
        (
            f"<p class=lead>{escaped(promised.event)}, {escaped(promised.probability)} "
            f"({_count(promised.n, promised.unit)}).</p>"
        ),
        "<p>Assumed:</p>",
        bullets(escaped(assumption) for assumption in promised.assumptions),
    ]
    parts += [f"<p class=note>{escaped(exception)}</p>" for exception in promised.exceptions]
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
            "as many labeled pixels of each kind. Coverage on them comes out right by "
            "construction and tests nothing. Take labeled images of their own.</p>"
        )
    facts: list[tuple[str, str]] = [("labeled images", str(len(findings.images)))]
    if coverage is not None and findings.sizes is not None:
        mean = coverage.overall.mean_of_images
        facts.append(("coverage, mean of images", estimate(mean.value, mean.low, mean.high)))
        if calibration.axes == () and compares(calibration):
            facts.append(("promised", percent(1 - alphas_of(calibration, 1)[0])))
        facts += [
            ("worst image", percent(coverage.worst_image)),
            ("worst tenth of images", percent(coverage.worst_tenth_of_images)),
            ("classes still possible, mean of images", f"{findings.sizes.mean_of_images:.2f}"),
        ]
    right = findings.raw.accuracy_of_kept.mean_of_pixels
    share, kept = findings.kept.kept.mean_of_pixels, findings.kept.accuracy_of_kept.mean_of_pixels
    facts += [
        (
            "the annotator's own labels that are right",
            estimate(right.value, right.low, right.high),
        ),
        (f"kept by {findings.rule}", estimate(share.value, share.low, share.high)),
        ("kept labels that are right", estimate(kept.value, kept.low, kept.high)),
    ]
    rows = "".join(
        f"<tr><th scope=row>{escaped(k)}</th><td>{escaped(v)}</td></tr>" for k, v in facts
    )
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
    promises = promises_classes(calibration)
    alphas = alphas_of(calibration, len(findings.class_names))
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
            row.append(estimate(mean.value[index], mean.low[index], mean.high[index]))
            if promises:
                row.append("nothing" if void else percent(1 - alphas[index]))
            size = float(findings.sizes.classes.mean_of_images.value[index])
            row.append("-" if isnan(size) else f"{size:.2f}")
        share = findings.kept.kept_by_true_class.mean_of_pixels.value[index]
        right = findings.kept.accuracy_by_predicted_class.mean_of_pixels.value[index]
        row += [percent(float(share)), percent(float(right)), str(counts[index])]
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
    return table(header, rows) + note


def _worries_told(worries: Sequence[Worry]) -> str:
    if not worries:
        return "<p>None stands out.</p>"
    rows = [[worry.name, worry.why, worry.remedy] for worry in worries]
    return table(["class", "why", "what helps"], rows, words=True)


def _advice(findings: Findings) -> str:
    calibration, coverage = findings.calibration, findings.coverage
    advice: list[str] = []
    if findings.same_data:
        advice.append("Repeat this report on labeled images that did not calibrate.")
    if coverage is not None and calibration.axes == () and compares(calibration):
        high = float(coverage.overall.mean_of_images.high)
        if high < 1 - alphas_of(calibration, 1)[0]:
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
    return bullets(map(escaped, advice)) if advice else "<p>Nothing: it does what it promises.</p>"


def _figures(findings: Findings) -> str:
    calibration, names = findings.calibration, findings.class_names
    share = float(findings.kept.kept.mean_of_pixels.value)
    right = float(findings.kept.accuracy_of_kept.mean_of_pixels.value)
    control = calibration.control
    certified = None
    if control is not None and control.rule is not None and isinstance(calibration.alpha, float):
        certified = Certified(share, right, 1 - calibration.alpha)
    own = promises_classes(calibration)
    whole = calibration.axes == () and compares(calibration)
    drawn: list[tuple[matplotlib.figure.Figure, str]] = []
    if findings.coverage is not None:
        alpha = calibration.alpha
        promised = None
        if own:  # a fallback voids the promise for its classes
            limits = torch.tensor(alphas_of(calibration, len(names)), dtype=torch.float64)
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
    figures = "\n".join(figure_of(figure, text) for figure, text in drawn)
    return f"<div class=grid>\n{figures}\n</div>"


def _worst(findings: Findings) -> str:
    if findings.coverage is None:
        rows = [[image.name, percent(image.right)] for image in findings.images[:10]]
        return table(["image", "annotator right"], rows)
    rows = [
        [
            image.name,
            percent(image.coverage),
            "-" if isnan(image.set_size) else f"{image.set_size:.2f}",
            percent(image.right),
        ]
        for image in findings.images[:10]
    ]
    text = table(["image", "covered", "set size", "annotator right"], rows)
    return text + "\n".join(
        figure_of(figure, f"{image.name}: {percent(image.coverage)} covered", wide=True)
        for image, figure in findings.shown
    )


def _made(command: str, version: str) -> str:
    return f"<pre>{escaped(command)}</pre>\n<p class=note>cpseg {escaped(version)}</p>"
