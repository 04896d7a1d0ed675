"""Which classes to worry about, why, and what would help."""

from collections.abc import Sequence
from math import ceil, isfinite, sqrt

from cpseg.calibration import Calibration
from cpseg.metrics import CoverageReport, SelectiveAccuracyReport, SetSizeReport
from cpseg.quantile import fewest_units
from cpseg.report._html import percent
from cpseg.report._promises import alphas_of, promises_classes
from cpseg.report.findings import Worry

_FEW = 0.5  # a threshold is vague where coverage can lie this share of alpha beside the promise


def worries_of(
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
    alphas = alphas_of(calibration, len(class_names))
    counts: list[int] = raw.kept_by_true_class.num_images.tolist()
    for index, name in enumerate(class_names):
        told: list[tuple[str, str] | None] = []
        if calibration.axes == ("class",) and calibration.control is None:
            told.append(_about_threshold(calibration, index, counts[index], images))
        if coverage is not None and sizes is not None and counts[index]:
            if promises_classes(calibration) and not bool(calibration.fallback_groups[index]):
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
            f"Covered {percent(float(covered.value[index]))}, and its interval lies below the "
            f"promised {percent(1 - alpha)}."
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
                "Add labeled images that contain it.",
            )
        ]
    told: list[tuple[str, str] | None] = []
    accuracy = float(kept.accuracy_of_kept.mean_of_pixels.value)
    right = float(kept.accuracy_by_predicted_class.mean_of_pixels.value[index])
    if right < accuracy - 0.05:
        told.append(
            (
                (
                    f"Of labels kept as this class {percent(right)} are right, of all kept labels "
                    f"{percent(accuracy)}."
                ),
                "A stricter rule, or cpseg.risk.KeptError per class, which controls this.",
            )
        )
    share = float(kept.kept_by_true_class.mean_of_pixels.value[index])
    if share < 0.05:
        told.append(
            (
                f"Only {percent(share)} of its pixels keep a label.",
                "A student will hardly see it: give it labels by hand.",
            )
        )
    return told


def _about_threshold(
    calibration: Calibration, index: int, here: int, images: int
) -> tuple[str, str] | None:
    """What is the matter with a class's threshold, and how many more images it needs."""
    alpha = alphas_of(calibration, len(calibration.thresholds))[index]
    n, noun = int(calibration.num_units[index]), f"{calibration.unit}s"
    least = fewest_units(alpha)
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
                f"up to about {percent(spread)} to either side."
            ),
            _more(steady - n, noun, here, images),
        )
    return None


def _more(count: int, noun: str, here: int, images: int) -> str:
    text = f"Label {count} more {noun} that contain it"
    if here and noun == "images":
        text += f"; {here} of {images} here do, so about {ceil(count * images / here)} in all"
    return f"{text}."
