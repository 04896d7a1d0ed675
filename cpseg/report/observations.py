"""What labeled images show, one after the other, and what follows from all of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, inf, isnan, nan
from typing import TYPE_CHECKING, Any, Self, cast, final

import torch
from torch import Tensor

from cpseg import _checks, plots
from cpseg.calibration import Calibration
from cpseg.calibrators import ClassConditionalCalibrator, SplitCalibrator
from cpseg.errors import InputError
from cpseg.filters import Singleton, rule_of
from cpseg.metrics import Coverage, SelectiveAccuracy, SelectiveAccuracyReport, SetSize
from cpseg.plots import ConfidenceCounts
from cpseg.predictors import PixelSetPredictor
from cpseg.report._worries import worries_of
from cpseg.report.findings import AnyFilter, Entries, Entry, Findings, Seen

if TYPE_CHECKING:
    import matplotlib.figure

__all__ = ["Observations", "levels_table", "measure"]

_LEVELS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
_PLANNED = 32  # images behind the set sizes at other levels


@final
@dataclass(eq=False)
class Observations:
    """What labeled images that did not calibrate show about a calibration: mergeable.

    Any cut into shares and any order of merges gives the same findings, to the bit.

    Guarantee:
        None; a measurement.

    Args:
        calibration: What to look at. Not one with groups: they are not known here.
        keep: The filter, of the same calibration.
        class_names: Of each class.

    Raises:
        InputError: If the calibration has groups.
    """

    calibration: Calibration
    keep: AnyFilter
    class_names: Sequence[str]
    _seen: dict[int, Seen] = field(default_factory=dict[int, Seen], init=False, repr=False)

    def __post_init__(self) -> None:
        calibration, classes = self.calibration, len(self.class_names)
        if "group" in calibration.axes:
            raise InputError(
                "calibration must have no groups for a report; they are not known here"
            )
        ignore = calibration.ignore_index
        makes_sets = calibration.control is None or calibration.control.rule is None
        self._predictor = PixelSetPredictor(calibration) if makes_sets else None
        self._planner = _planner(calibration, classes) if makes_sets else None
        self._coverage, self._sizes = Coverage(classes, ignore), SetSize(classes, ignore)
        self._raw, self._kept = (SelectiveAccuracy(classes, ignore) for _ in range(2))
        self._confidence = ConfidenceCounts(ignore)

    def update(self, index: int, entry: Entry) -> Self:
        """Look at an image.

        Args:
            index: Its number among all images.
            entry: The image.

        Returns:
            Itself.

        Raises:
            InputError: If an image of this number was seen before, or shapes do not fit.
        """
        self._check_new([index])
        ignore = self.calibration.ignore_index
        logits, labels = entry.logits[None], entry.labels[None]
        top = logits.argmax(1)
        self._raw.update(top, labels)
        self._kept.update(self._labels_of(entry).long()[None], labels)
        self._confidence.update(logits, labels)
        known = labels[0] != ignore
        covered = size = nan
        if self._predictor is not None:
            sets = self._predictor(logits)
            self._coverage.update(sets, labels)
            self._sizes.update(sets, labels)
            member = sets[0].gather(0, torch.where(known, labels[0], 0).long()[None])[0]
            covered, size = _mean(member[known]), _mean(sets[0].sum(0)[known])
        if self._planner is not None:
            self._planner.update(logits, labels)
        right = _mean((top == labels)[0][known])
        self._seen[index] = Seen(entry.name, covered, size, right)
        return self

    def merge(self, other: Self) -> Self:
        """Add what another has seen of other images, which stays as it is.

        Args:
            other: Observations about the same calibration and filter.

        Returns:
            Itself.

        Raises:
            InputError: If both have seen an image of the same number.
        """
        self._check_new(other._seen)
        self._coverage.merge(other._coverage)
        self._sizes.merge(other._sizes)
        self._raw.merge(other._raw)
        self._kept.merge(other._kept)
        self._confidence.merge(other._confidence)
        if self._planner is not None:  # then the other's is of the same kind, or refused
            self._planner.merge(cast("Any", other._planner))
        self._seen |= other._seen
        return self

    def compute(self, entries: Entries, *, worst: int = 3) -> Findings:
        """What follows; changes nothing.

        Args:
            entries: All images; some are read once more: every so many for the sizes of sets at
                other levels, and the worst to draw them.
            worst: How many images to draw; those with two spatial axes only.

        Returns:
            What was found.

        Raises:
            InputError: If there are no images, or not all of them were seen, or ``worst`` is
                negative.
        """
        worst = _checks.check_integer("worst", worst, 0)
        count = len(entries)
        if count == 0:
            raise InputError("entries must hold at least one labeled image; got none")
        if self._seen.keys() != set(range(count)):
            raise InputError(
                f"entries must be the images that were seen, {len(self._seen)}; got {count}"
            )
        order = sorted(range(count), key=lambda index: (*_badness(self._seen[index]), index))
        sets = self._predictor is not None
        covered = self._coverage.compute() if sets else None
        sizes = self._sizes.compute() if sets else None
        raw, kept = self._raw.compute(), self._kept.compute()
        return Findings(
            calibration=self.calibration,
            rule="Singleton" if isinstance(self.keep, Singleton) else rule_of(self.keep),
            class_names=self.class_names,
            coverage=covered,
            sizes=sizes,
            raw=raw,
            kept=kept,
            confidence=self._confidence,
            images=[self._seen[index] for index in order],
            levels=self._levels(entries),
            same_data=_same_data(self.calibration, raw),
            worries=worries_of(
                self.calibration,
                self.class_names,
                coverage=covered,
                sizes=sizes,
                raw=raw,
                kept=kept,
            ),
            shown=self._shown(entries, order[:worst]),
        )

    def _check_new(self, indices: Iterable[int]) -> None:
        for index in indices:
            if index in self._seen:
                raise InputError(f"index must be new for each image; got {index} twice")

    def _labels_of(self, entry: Entry) -> Tensor:
        if entry.pseudo_labels is not None:
            return entry.pseudo_labels
        return self.keep(entry.logits[None])[0]

    def _levels(self, entries: Entries) -> tuple[list[float], Tensor, list[float]] | None:
        if self._planner is None:
            return None
        planned = range(0, len(entries), max(1, ceil(len(entries) / _PLANNED)))
        read = map(entries.__getitem__, planned)
        return levels_table(self._planner, ((e.logits[None], e.labels[None]) for e in read))

    def _shown(
        self, entries: Entries, chosen: Sequence[int]
    ) -> list[tuple[Seen, "matplotlib.figure.Figure"]]:
        if self._predictor is None:
            return []
        drawn = ((self._seen[index], entries[index]) for index in chosen)
        return [
            (seen, self._drawn(entry, self._predictor))
            for seen, entry in drawn
            if entry.labels.ndim == 2
        ]

    def _drawn(self, entry: Entry, predictor: PixelSetPredictor) -> "matplotlib.figure.Figure":
        return plots.one_image(
            entry.logits,
            predictor(entry.logits[None])[0],
            image=entry.image,
            pseudo_labels=self._labels_of(entry),
            labels=entry.labels,
            class_names=self.class_names,
            ignore_index=self.calibration.ignore_index,
        )


def measure(
    calibration: Calibration,
    entries: Entries,
    keep: AnyFilter,
    *,
    class_names: Sequence[str],
    worst: int = 3,
    walk: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Findings:
    """Look at labeled images that did not calibrate.

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
    observed = Observations(calibration, keep, class_names)
    for index in walk(range(len(entries))):
        observed.update(index, entries[index])
    return observed.compute(entries, worst=worst)


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
        at labeled pixels, NaN without any.
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
