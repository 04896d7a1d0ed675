"""Coverage, set size, selective accuracy and mIoU: mergeable, with intervals over images.

Every number here is a ratio of counts: covered over labelled pixels, correct over kept ones,
intersection over union. An accumulator keeps one row of int64 counts per image, the ratio's two
parts for each class, so a report can average both ways and its intervals can resample images:

- ``mean_of_images``: each image's ratio, averaged over the images that have one (for a class:
  images that contain it). This is what an image-unit calibration promises, and what compares with
  ``1 - alpha``.
- ``mean_of_pixels``: counts summed over images, then divided. Large objects and images rule it.

An image is one entry of a batch. Pixels with the ignored label do not count, and an image without
any other has no ratio. ``update`` never waits for the device: labels that are no class are counted
there, and ``compute`` refuses them. Rows are put in a canonical order before anything is averaged
or resampled, so any cut into batches and any order of merges gives the same report, to the bit.

Memory: 8 bytes per count; 16 (coverage), 24 or 32 bytes per image and class.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, isnan
from typing import Any, Literal, Self, TypeVar, cast, final

import torch
from torch import Tensor

from cpseg import _checks, morphology
from cpseg.errors import InputError

__all__ = [
    "Coverage",
    "CoverageReport",
    "Estimate",
    "MeanIoU",
    "MeanIoUReport",
    "Ratio",
    "SelectiveAccuracy",
    "SelectiveAccuracyReport",
    "SetSize",
    "SetSizeReport",
    "StratifiedCoverage",
    "StratifiedCoverageReport",
    "boundary_strata",
    "interval_names",
    "object_size_strata",
    "set_size_strata",
]

# Draws of one block of resamples: 32 MB of float64 weights.
_BLOCK = 2**22


@final
@dataclass(frozen=True, eq=False, slots=True)
class Estimate:
    """A number, or one per class, with an interval from resampled images.

    Guarantee:
        None; percentile bootstrap intervals are approximate, and too short for few images.

    Attributes:
        value: NaN where there was nothing to average. float64 ``()`` or ``(K,)``.
        low: Lower end; NaN with fewer than two images. Shape of ``value``.
        high: Upper end. Shape of ``value``.
    """

    value: Tensor
    low: Tensor
    high: Tensor

    def __str__(self) -> str:
        if self.value.ndim:
            return "; ".join(_cells(self))
        return _cells(self)[0]


@final
@dataclass(frozen=True, eq=False, slots=True)
class Ratio:
    """One ratio of counts, averaged in both ways. Shapes ``()``, or ``(K,)`` for K classes.

    Attributes:
        mean_of_images: Each image's ratio, averaged over the images that have one.
        mean_of_pixels: Counts summed over images, then divided.
        num_images: Images that have the ratio: their denominator is not 0. int64.
        numerator: Counts summed over images. int64.
        denominator: Counts summed over images. int64.
    """

    mean_of_images: Estimate
    mean_of_pixels: Estimate
    num_images: Tensor
    numerator: Tensor
    denominator: Tensor


@final
@dataclass(frozen=True, eq=False, slots=True)
class CoverageReport:
    """How often the label is in the set.

    Attributes:
        overall: Over all labelled pixels.
        classes: Over the pixels of each class; its images are those that contain the class.
        images: Coverage of each image, ascending. float64 ``(n,)``.
        worst_image: The least of them; NaN without images.
        worst_tenth_of_images: Mean of the lowest ``ceil(n / 10)``.
        confidence: Level of the intervals.
    """

    overall: Ratio
    classes: Ratio
    images: Tensor
    worst_image: float
    worst_tenth_of_images: float
    confidence: float

    @property
    def mean_of_images(self) -> float:
        """What compares with ``1 - alpha`` of an image-unit calibration."""
        return self.overall.mean_of_images.value.item()

    @property
    def mean_of_pixels(self) -> float:
        """What pixels pooled over all images give; promised by nothing."""
        return self.overall.mean_of_pixels.value.item()

    def table(self, class_names: Sequence[str] | None = None) -> str:
        """The report as text, one line per class."""
        rows = _ratio_rows(["all"], self.overall) + _ratio_rows(
            _names("class_names", "class", class_names, self.classes), self.classes
        )
        return (
            _table("coverage", rows, self.confidence)
            + "\n"
            + _worst(self.images, self.worst_image, self.worst_tenth_of_images)
        )

    def __str__(self) -> str:
        return self.table()


@final
@dataclass(frozen=True, eq=False, slots=True)
class SetSizeReport:
    """How many classes the sets hold, at labelled pixels.

    Attributes:
        overall: Over all labelled pixels.
        classes: Over the pixels whose label is the class.
        images: Mean set size of each image, ascending. float64 ``(n,)``.
        worst_image: The largest of them; NaN without images.
        worst_tenth_of_images: Mean of the largest ``ceil(n / 10)``.
        num_pixels_of_size: Labelled pixels with a set of each size, ``0 .. C``. int64 ``(C + 1,)``.
        confidence: Level of the intervals.
    """

    overall: Ratio
    classes: Ratio
    images: Tensor
    worst_image: float
    worst_tenth_of_images: float
    num_pixels_of_size: Tensor
    confidence: float

    @property
    def mean_of_images(self) -> float:
        """Mean over images of each image's mean set size."""
        return self.overall.mean_of_images.value.item()

    @property
    def mean_of_pixels(self) -> float:
        """Mean set size of all labelled pixels."""
        return self.overall.mean_of_pixels.value.item()

    def table(self, class_names: Sequence[str] | None = None) -> str:
        """The report as text, one line per class."""
        rows = _ratio_rows(["all"], self.overall) + _ratio_rows(
            _names("class_names", "label is class", class_names, self.classes), self.classes
        )
        counts: list[int] = self.num_pixels_of_size.tolist()
        sizes = ", ".join(f"{size}: {count}" for size, count in enumerate(counts) if count)
        return "\n".join(
            (
                _table("set size", rows, self.confidence),
                _worst(self.images, self.worst_image, self.worst_tenth_of_images),
                f"labelled pixels by set size: {sizes or 'none'}",
            )
        )

    def __str__(self) -> str:
        return self.table()


@final
@dataclass(frozen=True, eq=False, slots=True)
class StratifiedCoverageReport:
    """Coverage and set size within each stratum.

    Attributes:
        coverage: Of each stratum; its images are those with labelled pixels in it. ``(K,)``.
        set_size: Of each stratum. ``(K,)``.
        confidence: Level of the intervals.
    """

    coverage: Ratio
    set_size: Ratio
    confidence: float

    def table(self, stratum_names: Sequence[str] | None = None) -> str:
        """The report as text, one line per stratum; :func:`interval_names` has names."""
        names = _names("stratum_names", "stratum", stratum_names, self.coverage)
        return "\n".join(
            (
                _table("coverage", _ratio_rows(names, self.coverage), self.confidence),
                _table("set size", _ratio_rows(names, self.set_size), self.confidence),
            )
        )

    def __str__(self) -> str:
        return self.table()


@final
@dataclass(frozen=True, eq=False, slots=True)
class SelectiveAccuracyReport:
    """How many pseudo-labels were kept, and how many of those are right, at labelled pixels.

    Attributes:
        kept: Kept over labelled pixels.
        accuracy_of_kept: Correct over kept pixels; its images are those with kept pixels.
        kept_by_true_class: Kept over labelled pixels whose *label* is the class.
        kept_as_class: Pixels kept *as* the class over all labelled pixels; these add up to
            ``kept`` over classes.
        accuracy_by_true_class: Correct over kept pixels whose *label* is the class.
        accuracy_by_predicted_class: Correct over pixels kept *as* the class (precision): what a
            student trained on that pseudo-label sees.
        images: Accuracy among kept pixels of each image that has any, ascending. float64 ``(n,)``.
        worst_image: The least of them; NaN without any.
        worst_tenth_of_images: Mean of the lowest ``ceil(n / 10)``.
        confidence: Level of the intervals.
    """

    kept: Ratio
    accuracy_of_kept: Ratio
    kept_by_true_class: Ratio
    kept_as_class: Ratio
    accuracy_by_true_class: Ratio
    accuracy_by_predicted_class: Ratio
    images: Tensor
    worst_image: float
    worst_tenth_of_images: float
    confidence: float

    def table(self, class_names: Sequence[str] | None = None) -> str:
        """The report as text, one line per class and ratio."""
        rows = _ratio_rows(["kept"], self.kept)
        rows += _ratio_rows(["accuracy of kept"], self.accuracy_of_kept)
        for title, ratio in (
            ("kept, label is", self.kept_by_true_class),
            ("kept as", self.kept_as_class),
            ("accuracy, label is", self.accuracy_by_true_class),
            ("accuracy, kept as", self.accuracy_by_predicted_class),
        ):
            names = _names("class_names", "class", class_names, ratio)
            rows += _ratio_rows([f"{title} {name}" for name in names], ratio)
        return (
            _table("pseudo-labels", rows, self.confidence)
            + "\n"
            + _worst(self.images, self.worst_image, self.worst_tenth_of_images)
        )

    def __str__(self) -> str:
        return self.table()


@final
@dataclass(frozen=True, eq=False, slots=True)
class MeanIoUReport:
    """Intersection over union per class, and four means of it that are not the same number.

    A class *occurs* where it is the label or the prediction of a labelled pixel: its union is not
    empty. The first three are means over classes of the pooled IoU, ``classes.mean_of_pixels``.

    Attributes:
        mean_of_occurring_classes: Over classes that occur; others do not count. What most papers
            report.
        mean_of_labelled_classes: Over classes that are some pixel's label; one that is only ever
            predicted does not count itself, though it costs the classes it displaces.
        mean_of_all_classes_absent_as_zero: Over all C classes; one that does not occur counts 0.
        mean_of_images: Mean over images of each image's mean over the classes that occur in it.
        classes: IoU per class. ``mean_of_pixels`` pools counts over images; ``mean_of_images``
            averages the IoU of the images in which the class occurs.
        images: Mean IoU of each image over the classes that occur in it, ascending.
            float64 ``(n,)``.
        worst_image: The least of them; NaN without images.
        worst_tenth_of_images: Mean of the lowest ``ceil(n / 10)``.
        num_abstained: Labelled pixels of each class where the prediction abstained. int64 ``(C,)``.
        abstained: How those were counted, ``"missed"`` or ``"ignored"``.
        confidence: Level of the intervals.
    """

    mean_of_occurring_classes: Estimate
    mean_of_labelled_classes: Estimate
    mean_of_all_classes_absent_as_zero: Estimate
    mean_of_images: Estimate
    classes: Ratio
    images: Tensor
    worst_image: float
    worst_tenth_of_images: float
    num_abstained: Tensor
    abstained: Literal["missed", "ignored"]
    confidence: float

    def table(self, class_names: Sequence[str] | None = None) -> str:
        """The report as text, one line per class."""
        names = _names("class_names", "class", class_names, self.classes)
        lines = [_table("IoU", _ratio_rows(names, self.classes), self.confidence)]
        for title, mean in (
            ("mean of occurring classes", self.mean_of_occurring_classes),
            ("mean of labelled classes", self.mean_of_labelled_classes),
            ("mean of all classes, absent as 0", self.mean_of_all_classes_absent_as_zero),
            ("mean of images (their occurring classes)", self.mean_of_images),
        ):
            lines.append(f"{title}: {mean}")
        abstained = int(self.num_abstained.sum())
        lines += [
            _worst(self.images, self.worst_image, self.worst_tenth_of_images),
            f"abstained pixels: {abstained}, counted as {self.abstained}",
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


@final
@dataclass(eq=False)
class Coverage:
    """How often the label is in the set: overall, per class and per image.

    Guarantee:
        None; a measurement. ``mean_of_images`` is what an image-unit calibration bounds in
        expectation.

    Args:
        num_classes: C.
        ignore_index: Label of pixels that do not count.

    Examples:
        >>> sets = torch.tensor([[[True, False], [True, True]]])
        >>> report = Coverage(2).update(sets, torch.tensor([[0, 0]])).compute()
        >>> report.mean_of_images, report.classes.denominator.tolist()
        (0.5, [2, 0])
    """

    num_classes: int
    ignore_index: int = 255
    _rows: list[Tensor] = field(default_factory=list[Tensor], init=False, repr=False)

    def __post_init__(self) -> None:
        _check_classes(self.num_classes, self.ignore_index)

    def update(self, sets: Tensor, labels: Tensor) -> Self:
        """Add a batch.

        Args:
            sets: Which classes are still possible. Bool ``(B, C, *S)``.
            labels: Integer classes, or ``ignore_index``. Shape ``(B, *S)``.

        Returns:
            Itself.

        Raises:
            InputError: If shapes, dtypes or devices do not fit.
        """
        _check_sets(sets, labels, self.num_classes)
        flat, valid, bad = _pixels(labels, self.num_classes, self.ignore_index)
        covered = _columns(sets).gather(1, flat[:, None])[:, 0]
        parts = (
            _count(flat, valid & covered, self.num_classes),
            _count(flat, valid, self.num_classes),
        )
        self._rows.append(torch.cat((*parts, bad), dim=1))
        return self

    def merge(self, other: Self) -> Self:
        """Add what another has seen; the other stays as it is."""
        _check_same(self, other)
        self._rows = [*self._rows, *other._rows]
        return self

    def reset(self) -> Self:
        """Forget everything."""
        self._rows = []
        return self

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors, numbers and strings, on the CPU; the same for any order."""
        return _state(self, self._rows)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object]) -> Self:
        """The accumulator that gave this state."""
        return _load(cls, state)

    def compute(
        self, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> CoverageReport:
        """The report so far; changes nothing.

        Args:
            resamples: Resamples of the images behind each interval.
            confidence: Level of the intervals, strictly between 0 and 1.
            seed: Seeds the resampling; the global random state is not touched.

        Returns:
            The report.

        Raises:
            InputError: If labels were no class, or an argument is out of range.
        """
        intervals = _Bootstrap(resamples, confidence, seed)
        covered, pixels = torch.split(_table_of(self, self._rows), self.num_classes, 1)
        images, worst, tenth = _spread(covered.sum(1), pixels.sum(1))
        return CoverageReport(
            overall=intervals.ratio(covered.sum(1), pixels.sum(1)),
            classes=intervals.ratio(covered, pixels),
            images=images,
            worst_image=worst,
            worst_tenth_of_images=tenth,
            confidence=confidence,
        )


@final
@dataclass(eq=False)
class SetSize:
    """How many classes the sets hold at labelled pixels: overall, per class and per image.

    Guarantee:
        None; a measurement.

    Args:
        num_classes: C.
        ignore_index: Label of pixels that do not count.

    Examples:
        >>> sets = torch.tensor([[[True, False], [True, True]]])
        >>> report = SetSize(2).update(sets, torch.tensor([[0, 0]])).compute()
        >>> report.mean_of_images, report.num_pixels_of_size.tolist()
        (1.5, [0, 1, 1])
    """

    num_classes: int
    ignore_index: int = 255
    _rows: list[Tensor] = field(default_factory=list[Tensor], init=False, repr=False)

    def __post_init__(self) -> None:
        _check_classes(self.num_classes, self.ignore_index)

    def update(self, sets: Tensor, labels: Tensor) -> Self:
        """Add a batch: as :meth:`Coverage.update`."""
        _check_sets(sets, labels, self.num_classes)
        flat, valid, bad = _pixels(labels, self.num_classes, self.ignore_index)
        sizes = _sizes(_columns(sets))
        parts = (
            _count(flat, valid, self.num_classes, sizes),
            _count(flat, valid, self.num_classes),
            _count(sizes, valid, self.num_classes + 1),
        )
        self._rows.append(torch.cat((*parts, bad), dim=1))
        return self

    def merge(self, other: Self) -> Self:
        """Add what another has seen; the other stays as it is."""
        _check_same(self, other)
        self._rows = [*self._rows, *other._rows]
        return self

    def reset(self) -> Self:
        """Forget everything."""
        self._rows = []
        return self

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors, numbers and strings, on the CPU; the same for any order."""
        return _state(self, self._rows)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object]) -> Self:
        """The accumulator that gave this state."""
        return _load(cls, state)

    def compute(
        self, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> SetSizeReport:
        """The report so far; arguments as for :meth:`Coverage.compute`."""
        intervals = _Bootstrap(resamples, confidence, seed)
        classes = self.num_classes
        parts = [classes, classes, classes + 1]
        sizes, pixels, histogram = torch.split(_table_of(self, self._rows), parts, 1)
        images, worst, tenth = _spread(sizes.sum(1), pixels.sum(1), largest=True)
        return SetSizeReport(
            overall=intervals.ratio(sizes.sum(1), pixels.sum(1)),
            classes=intervals.ratio(sizes, pixels),
            images=images,
            worst_image=worst,
            worst_tenth_of_images=tenth,
            num_pixels_of_size=histogram.sum(0),
            confidence=confidence,
        )


@final
@dataclass(eq=False)
class StratifiedCoverage:
    """Coverage and set size within strata that the caller numbers: where do the sets fail?

    See :func:`set_size_strata`, :func:`boundary_strata` and :func:`object_size_strata`, or bring
    any integer map.

    Guarantee:
        None; a measurement. Calibration promises nothing within a stratum it did not know.

    Args:
        num_classes: C.
        num_strata: K.
        ignore_index: Label of pixels that do not count.

    Examples:
        >>> sets = torch.tensor([[[True, False], [True, True]]])
        >>> coverage = StratifiedCoverage(2, num_strata=3)
        >>> _ = coverage.update(sets, torch.tensor([[0, 0]]), set_size_strata(sets, (1, 2)))
        >>> coverage.compute().coverage.mean_of_pixels.value.tolist()
        [0.0, 1.0, nan]
    """

    num_classes: int
    num_strata: int
    ignore_index: int = 255
    _rows: list[Tensor] = field(default_factory=list[Tensor], init=False, repr=False)

    def __post_init__(self) -> None:
        _check_classes(self.num_classes, self.ignore_index)
        _checks.check_integer("num_strata", self.num_strata, 1)

    def update(self, sets: Tensor, labels: Tensor, strata: Tensor) -> Self:
        """Add a batch.

        Args:
            sets: Which classes are still possible. Bool ``(B, C, *S)``.
            labels: Integer classes, or ``ignore_index``. Shape ``(B, *S)``.
            strata: Integers in ``[0, num_strata)``, anything where the label is ignored.
                Shape ``(B, *S)``.

        Returns:
            Itself.

        Raises:
            InputError: If shapes, dtypes or devices do not fit.
        """
        _check_sets(sets, labels, self.num_classes)
        _check_beside("strata", strata, labels)
        flat, valid, bad = _pixels(labels, self.num_classes, self.ignore_index)
        covered = _columns(sets).gather(1, flat[:, None])[:, 0]
        stratum = _lines(strata).long()
        inside = (stratum >= 0) & (stratum < self.num_strata)
        stray = (valid & ~inside).sum(1, keepdim=True)
        known, stratum = valid & inside, torch.where(inside, stratum, 0)
        parts = (
            _count(stratum, known & covered, self.num_strata),
            _count(stratum, known, self.num_strata, _sizes(_columns(sets))),
            _count(stratum, known, self.num_strata),
        )
        self._rows.append(torch.cat((*parts, bad, stray), dim=1))
        return self

    def merge(self, other: Self) -> Self:
        """Add what another has seen; the other stays as it is."""
        _check_same(self, other)
        self._rows = [*self._rows, *other._rows]
        return self

    def reset(self) -> Self:
        """Forget everything."""
        self._rows = []
        return self

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors, numbers and strings, on the CPU; the same for any order."""
        return _state(self, self._rows)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object]) -> Self:
        """The accumulator that gave this state."""
        return _load(cls, state)

    def compute(
        self, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> StratifiedCoverageReport:
        """The report so far; arguments as for :meth:`Coverage.compute`."""
        intervals = _Bootstrap(resamples, confidence, seed)
        covered, sizes, pixels = torch.split(_table_of(self, self._rows), self.num_strata, 1)
        return StratifiedCoverageReport(
            coverage=intervals.ratio(covered, pixels),
            set_size=intervals.ratio(sizes, pixels),
            confidence=confidence,
        )


@final
@dataclass(eq=False)
class SelectiveAccuracy:
    """How many pseudo-labels were kept, and how many of those are right.

    Predictions equal to ``ignore_index`` abstain: they lower the kept fraction, and no accuracy.

    Guarantee:
        None; a measurement.

    Args:
        num_classes: C.
        ignore_index: Label of pixels that do not count, and prediction that abstains.

    Examples:
        >>> metric = SelectiveAccuracy(2).update(torch.tensor([[0, 255]]), torch.tensor([[0, 1]]))
        >>> report = metric.compute()
        >>> report.kept.mean_of_pixels.value.item(), report.accuracy_of_kept.denominator.item()
        (0.5, 1)
    """

    num_classes: int
    ignore_index: int = 255
    _rows: list[Tensor] = field(default_factory=list[Tensor], init=False, repr=False)

    def __post_init__(self) -> None:
        _check_classes(self.num_classes, self.ignore_index)

    def update(self, predictions: Tensor, labels: Tensor) -> Self:
        """Add a batch.

        Args:
            predictions: Integer classes, or ``ignore_index`` to abstain. Shape ``(B, *S)``.
            labels: Integer classes, or ``ignore_index``. Shape ``(B, *S)``.

        Returns:
            Itself.

        Raises:
            InputError: If shapes, dtypes or devices do not fit.
        """
        self._rows.append(_confusion(predictions, labels, self.num_classes, self.ignore_index))
        return self

    def merge(self, other: Self) -> Self:
        """Add what another has seen; the other stays as it is."""
        _check_same(self, other)
        self._rows = [*self._rows, *other._rows]
        return self

    def reset(self) -> Self:
        """Forget everything."""
        self._rows = []
        return self

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors, numbers and strings, on the CPU; the same for any order."""
        return _state(self, self._rows)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object]) -> Self:
        """The accumulator that gave this state."""
        return _load(cls, state)

    def compute(
        self, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> SelectiveAccuracyReport:
        """The report so far; arguments as for :meth:`Coverage.compute`."""
        intervals = _Bootstrap(resamples, confidence, seed)
        correct, kept_as, labelled, abstained = torch.split(
            _table_of(self, self._rows), self.num_classes, 1
        )
        kept = labelled - abstained
        images, worst, tenth = _spread(correct.sum(1), kept.sum(1))
        everything = labelled.sum(1)
        return SelectiveAccuracyReport(
            kept=intervals.ratio(kept.sum(1), everything),
            accuracy_of_kept=intervals.ratio(correct.sum(1), kept.sum(1)),
            kept_by_true_class=intervals.ratio(kept, labelled),
            kept_as_class=intervals.ratio(kept_as, everything[:, None].expand_as(kept_as)),
            accuracy_by_true_class=intervals.ratio(correct, kept),
            accuracy_by_predicted_class=intervals.ratio(correct, kept_as),
            images=images,
            worst_image=worst,
            worst_tenth_of_images=tenth,
            confidence=confidence,
        )


@final
@dataclass(eq=False)
class MeanIoU:
    """Intersection over union of predictions and labels, at labelled pixels.

    Guarantee:
        None; a measurement.

    Args:
        num_classes: C.
        ignore_index: Label of pixels that do not count, and prediction that abstains.
        abstained: ``"missed"``: a labelled pixel without a prediction belongs to the union of its
            class, as any other miss. ``"ignored"``: it does not count at all, which flatters a
            filter that abstains where it is unsure.

    Examples:
        >>> metric = MeanIoU(3).update(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
        >>> report = metric.compute()
        >>> report.mean_of_occurring_classes.value.item()
        0.25
        >>> report.mean_of_labelled_classes.value.item()
        0.5
    """

    num_classes: int
    ignore_index: int = 255
    abstained: Literal["missed", "ignored"] = field(default="missed", kw_only=True)
    _rows: list[Tensor] = field(default_factory=list[Tensor], init=False, repr=False)

    def __post_init__(self) -> None:
        _check_classes(self.num_classes, self.ignore_index)
        if self.abstained not in ("missed", "ignored"):
            raise InputError(f"abstained must be 'missed' or 'ignored'; got {self.abstained!r}")

    def update(self, predictions: Tensor, labels: Tensor) -> Self:
        """Add a batch: as :meth:`SelectiveAccuracy.update`."""
        self._rows.append(_confusion(predictions, labels, self.num_classes, self.ignore_index))
        return self

    def merge(self, other: Self) -> Self:
        """Add what another has seen; the other stays as it is."""
        _check_same(self, other)
        self._rows = [*self._rows, *other._rows]
        return self

    def reset(self) -> Self:
        """Forget everything."""
        self._rows = []
        return self

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors, numbers and strings, on the CPU; the same for any order."""
        return _state(self, self._rows)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object]) -> Self:
        """The accumulator that gave this state."""
        return _load(cls, state)

    def compute(
        self, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> MeanIoUReport:
        """The report so far; arguments as for :meth:`Coverage.compute`."""
        intervals = _Bootstrap(resamples, confidence, seed)
        both, predicted, labelled, abstained = torch.split(
            _table_of(self, self._rows), self.num_classes, 1
        )
        counted = labelled if self.abstained == "missed" else labelled - abstained
        union = predicted + counted - both
        # The mean over an image's own classes, as a ratio so that images without any drop out.
        per_image = _divide(both.double(), union.double()).nansum(1), (union > 0).sum(1).double()
        images, worst, tenth = _spread(*per_image)

        def pooled(weights: Tensor) -> Tensor:
            return _divide(weights @ both.double(), weights @ union.double())

        def occurring(weights: Tensor) -> Tensor:
            return pooled(weights).nanmean(1, keepdim=True)

        def labelled_only(weights: Tensor) -> Tensor:
            seen = weights @ counted.double() > 0
            return torch.where(seen, pooled(weights), torch.nan).nanmean(1, keepdim=True)

        def absent_as_zero(weights: Tensor) -> Tensor:
            iou = pooled(weights)
            nothing = iou.isnan().all(1, keepdim=True)  # no class at all: no mean either
            return torch.where(nothing, torch.nan, iou.nan_to_num(0.0).mean(1, keepdim=True))

        return MeanIoUReport(
            mean_of_occurring_classes=intervals.estimate(occurring, len(both)),
            mean_of_labelled_classes=intervals.estimate(labelled_only, len(both)),
            mean_of_all_classes_absent_as_zero=intervals.estimate(absent_as_zero, len(both)),
            mean_of_images=intervals.mean_of_images(*per_image),
            classes=intervals.ratio(both, union),
            images=images,
            worst_image=worst,
            worst_tenth_of_images=tenth,
            num_abstained=abstained.sum(0),
            abstained=self.abstained,
            confidence=confidence,
        )


def set_size_strata(sets: Tensor, edges: Sequence[float] = (0, 1, 2, 4, 8)) -> Tensor:
    """Strata by the number of classes in the set.

    Args:
        sets: Bool ``(B, C, *S)``.
        edges: Ascending; stratum k holds sizes above ``edges[k - 1]`` and up to ``edges[k]``.

    Returns:
        Strata in ``0 .. len(edges)``. int64 ``(B, *S)``.

    Raises:
        InputError: If sets is no bool tensor with a class axis, or edges do not ascend.

    Examples:
        >>> set_size_strata(torch.tensor([[True, True, True]]), edges=(0, 1, 2))
        tensor([3])
    """
    _check_sets_alone(sets)
    return _strata(_sizes(sets), edges)


def boundary_strata(
    labels: Tensor,
    edges: Sequence[float] = (1, 2, 4, 8, 16, 32),
    *,
    ignore_index: int = 255,
    spacing: Sequence[float] | None = None,
) -> Tensor:
    """Strata by the distance to the nearest pixel of another class.

    Waits for the device; see :func:`cpseg.morphology.boundary_distance` for what is a boundary.

    Args:
        labels: Integer label map ``(B, *S)``, one to three spatial axes.
        edges: Ascending; stratum k holds distances above ``edges[k - 1]`` and up to ``edges[k]``,
            the last one everything farther away. The time grows with the largest.
        ignore_index: Label of pixels without a class; their stratum means nothing.
        spacing: Distance between neighbors along each spatial axis; None for 1.

    Returns:
        Strata in ``0 .. len(edges)``. int64 ``(B, *S)``.

    Raises:
        InputError: If labels is no such map, edges do not ascend, or spacing does not fit.

    Examples:
        >>> boundary_strata(torch.tensor([[3, 3, 3, 5]]), edges=(1, 2))
        tensor([[2, 1, 0, 0]])
    """
    _check_edges(edges)
    distance = morphology.boundary_distance(
        labels, ignore_index=ignore_index, spacing=spacing, limit=max(edges[-1], 0)
    )
    return _strata(distance, edges)


def object_size_strata(
    labels: Tensor,
    edges: Sequence[float] = (64, 256, 1024, 4096, 16384),
    *,
    ignore_index: int = 255,
) -> Tensor:
    """Strata by the area of the connected region of equal labels a pixel lies in.

    Waits for the device; regions join through shared sides.

    Args:
        labels: Integer label map ``(B, *S)``, one to three spatial axes.
        edges: Ascending; stratum k holds areas above ``edges[k - 1]`` and up to ``edges[k]``.
        ignore_index: Label that belongs to no region; its stratum means nothing.

    Returns:
        Strata in ``0 .. len(edges)``. int64 ``(B, *S)``.

    Raises:
        InputError: If labels is no such map, or edges do not ascend.

    Examples:
        >>> object_size_strata(torch.tensor([[3, 3, 3, 5]]), edges=(1, 2))
        tensor([[2, 2, 2, 0]])
    """
    regions = morphology.connected_components(labels, ignore_index=ignore_index)
    return _strata(morphology.component_areas(regions), edges)


def interval_names(edges: Sequence[float]) -> list[str]:
    """What the strata between edges are called in a table.

    Examples:
        >>> interval_names((1, 2, 4))
        ['up to 1', 'above 1, up to 2', 'above 2, up to 4', 'above 4']
    """
    _check_edges(edges)
    between = [f"above {low:g}, up to {high:g}" for low, high in pairwise(edges)]
    return [f"up to {edges[0]:g}", *between, f"above {edges[-1]:g}"]


_Metric = Coverage | SetSize | StratifiedCoverage | SelectiveAccuracy | MeanIoU


@final
@dataclass(frozen=True, slots=True)
class _Bootstrap:
    """Percentile intervals over resampled images (Efron, 1979)."""

    resamples: int
    confidence: float
    seed: int

    def __post_init__(self) -> None:
        _checks.check_integer("resamples", self.resamples, 1)
        _checks.check_alpha(self.confidence, "confidence")
        _checks.check_integer("seed", self.seed, 0)

    def weights(self, n: int) -> Iterator[Tensor]:
        """How often each resample drew each image, in blocks of bounded size. ``(R, n)``."""
        generator = torch.Generator().manual_seed(self.seed)
        block = max(1, _BLOCK // n)
        for start in range(0, self.resamples, block):
            shape = min(block, self.resamples - start), n
            drawn = torch.randint(n, shape, generator=generator)
            counts = torch.zeros(shape, dtype=torch.float64)
            yield counts.scatter_add_(1, drawn, torch.ones_like(counts))

    def estimate(self, statistic: Callable[[Tensor], Tensor], n: int) -> Estimate:
        """A statistic of weighted images, ``(R, n)`` to ``(R, 1)``: its value and interval."""
        found = self._columns(statistic, n)
        return Estimate(found.value[0], found.low[0], found.high[0])

    def mean_of_images(self, numerator: Tensor, denominator: Tensor) -> Estimate:
        """Mean of ``numerator / denominator`` over images with a denominator. ``(n,)`` each."""
        found = self._of_images(numerator[:, None], denominator[:, None])
        return Estimate(found.value[0], found.low[0], found.high[0])

    def ratio(self, numerator: Tensor, denominator: Tensor) -> Ratio:
        """Both means of a ratio of int64 counts, ``(n,)`` or ``(n, K)``."""
        one = numerator.ndim == 1
        top, bottom = (x[:, None] if one else x for x in (numerator, denominator))

        def of_pixels(weights: Tensor) -> Tensor:
            return _divide(weights @ top.double(), weights @ bottom.double())

        images, pixels = self._of_images(top, bottom), self._columns(of_pixels, len(top))
        shape = numerator.shape[1:]
        return Ratio(
            mean_of_images=_shaped(images, shape),
            mean_of_pixels=_shaped(pixels, shape),
            num_images=(denominator > 0).sum(0),
            numerator=numerator.sum(0),
            denominator=denominator.sum(0),
        )

    def _of_images(self, top: Tensor, bottom: Tensor) -> Estimate:
        there = (bottom > 0).double()
        each = _divide(top.double(), bottom.double()).nan_to_num(0.0)

        def of_images(weights: Tensor) -> Tensor:
            return _divide(weights @ each, weights @ there)

        return self._columns(of_images, len(top))

    def _columns(self, statistic: Callable[[Tensor], Tensor], n: int) -> Estimate:
        value = statistic(torch.ones(1, n, dtype=torch.float64))[0]
        if n < 2:  # one image says nothing about how images differ
            return Estimate(value, value + torch.nan, value + torch.nan)
        drawn = torch.cat([statistic(weights) for weights in self.weights(n)]).sort(0).values
        # Resamples without the class sort last, as NaN; the interval is that of the others.
        last = (~drawn.isnan()).sum(0) - 1
        tail = (1 - self.confidence) / 2
        ends: list[Tensor] = []
        for share in (tail, 1 - tail):
            place = (share * last.double()).clamp(min=0.0)
            below = drawn.gather(0, place.floor().long()[None])[0]
            above = drawn.gather(0, place.ceil().long()[None])[0]
            ends.append(below + (above - below) * (place - place.floor()))
        return Estimate(value, ends[0], ends[1])


def _shaped(each: Estimate, shape: torch.Size) -> Estimate:
    return Estimate(each.value.reshape(shape), each.low.reshape(shape), each.high.reshape(shape))


def _divide(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where(bottom > 0, top / bottom, torch.nan)


def _spread(top: Tensor, bottom: Tensor, *, largest: bool = False) -> tuple[Tensor, float, float]:
    """Each image's ratio, ascending; the worst one; the mean of the worst tenth, rounded up."""
    ratios = _divide(top.double(), bottom.double())
    ratios = ratios[~ratios.isnan()].sort().values
    if not len(ratios):
        return ratios, float("nan"), float("nan")
    tenth = -(-len(ratios) // 10)
    worst = ratios[-tenth:].flip(0) if largest else ratios[:tenth]
    return ratios, worst[0].item(), worst.mean().item()


def _columns(sets: Tensor) -> Tensor:
    """``(B, C, *S)`` as ``(B, C, N)``."""
    return sets.flatten(2) if sets.ndim > 2 else sets[..., None]


def _sizes(sets: Tensor) -> Tensor:
    """Classes in each set. int64 ``(B, *S)``."""
    if sets.shape[1] > 255:
        return sets.sum(1)
    # A hundred times the speed of torch's sum of bools into int64.
    return sets.view(torch.uint8).sum(1, dtype=torch.uint8).long()


def _lines(labels: Tensor) -> Tensor:
    """``(B, *S)`` as ``(B, N)``."""
    return labels.flatten(1) if labels.ndim > 1 else labels[:, None]


def _pixels(labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels as an index, which of them count, and how many per image are no class at all.

    Returns:
        int64 ``(B, N)`` within ``[0, C)`` everywhere, bool ``(B, N)``, int64 ``(B, 1)``.
    """
    flat = _lines(labels).long()
    valid = (flat >= 0) & (flat < num_classes)
    bad = (~valid & (flat != ignore_index)).sum(1, keepdim=True)
    return torch.where(valid, flat, 0), valid, bad


def _count(index: Tensor, chosen: Tensor, size: int, amount: Tensor | None = None) -> Tensor:
    """Per image, how often each index is chosen, or the sum of amounts there. int64 ``(B, size)``."""
    add = chosen.long() if amount is None else torch.where(chosen, amount, 0)
    counts = torch.zeros(len(index), size, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(1, index, add)


def _confusion(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Per image and class: correct, predicted, labelled and abstained pixels; and faults."""
    _checks.check_integers("labels", labels)
    _check_batch(labels)
    _check_beside("predictions", predictions, labels)
    flat, valid, bad = _pixels(labels, num_classes, ignore_index)
    guess, kept, stray = _pixels(predictions, num_classes, ignore_index)
    parts = (
        _count(flat, valid & kept & (guess == flat), num_classes),
        _count(guess, valid & kept, num_classes),
        _count(flat, valid, num_classes),
        _count(flat, valid & ~kept, num_classes),
    )
    return torch.cat((*parts, bad, stray), dim=1)


def _faults(metric: _Metric) -> tuple[str, ...]:
    """What the last columns of a metric's rows count."""
    classes = f"lie in [0, {metric.num_classes}) or be {metric.ignore_index}"
    labels = f"labels must {classes}"
    match metric:
        case Coverage() | SetSize():
            return (labels,)
        case StratifiedCoverage():
            return labels, f"strata must lie in [0, {metric.num_strata}) at labelled pixels"
        case SelectiveAccuracy() | MeanIoU():
            return labels, f"predictions must {classes}"


def _width(metric: _Metric) -> int:
    """Columns of a metric's rows."""
    match metric:
        case Coverage():
            counts = 2 * metric.num_classes
        case SetSize():
            counts = 3 * metric.num_classes + 1
        case StratifiedCoverage():
            counts = 3 * metric.num_strata
        case SelectiveAccuracy() | MeanIoU():
            counts = 4 * metric.num_classes
    return counts + len(_faults(metric))


def _all_rows(metric: _Metric, seen: Iterable[Tensor]) -> Tensor:
    """Rows of images that counted for anything, in canonical order, on the CPU. ``(n, K)``."""
    empty = torch.zeros(0, _width(metric), dtype=torch.int64)
    rows = torch.cat([empty, *(rows.cpu() for rows in seen)])
    rows = rows[rows.any(1)]
    if not len(rows):
        return rows
    found = cast("tuple[Tensor, Tensor]", torch.unique(rows, dim=0, return_counts=True))
    return found[0].repeat_interleave(found[1], 0)


def _table_of(metric: _Metric, seen: Iterable[Tensor]) -> Tensor:
    """Rows without their faults, of which there must be none."""
    rows, rules = _all_rows(metric, seen), _faults(metric)
    counts: list[int] = rows[:, -len(rules) :].sum(0).tolist()
    for rule, count in zip(rules, counts, strict=True):
        if count:
            raise InputError(f"{rule}; got {count} pixels that do not")
    return rows[:, : -len(rules)]


def _settings(metric: _Metric) -> dict[str, int | str]:
    """What two metrics must share to be merged."""
    names = [name for name in metric.__dataclass_fields__ if name != "_rows"]
    return {"kind": type(metric).__name__, **{name: getattr(metric, name) for name in names}}


def _check_same(metric: _Metric, other: object) -> None:
    if not isinstance(other, type(metric)):
        raise InputError(f"other must be a {type(metric).__name__}; got {type(other).__name__}")
    if _settings(metric) != _settings(other):
        raise InputError(f"other must be a {metric!r} to be merged; got {other!r}")


def _state(metric: _Metric, seen: Iterable[Tensor]) -> dict[str, object]:
    return {**_settings(metric), "rows": _all_rows(metric, seen)}


_AnyMetric = TypeVar(
    "_AnyMetric", bound=Coverage | SetSize | StratifiedCoverage | SelectiveAccuracy | MeanIoU
)


def _load(kind: type[_AnyMetric], state: Mapping[str, object]) -> _AnyMetric:
    names = [name for name in kind.__dataclass_fields__ if name != "_rows"]
    if state.get("kind") != kind.__name__ or set(state) != {"kind", "rows", *names}:
        raise InputError(
            f"state must be that of a {kind.__name__}; got {state.get('kind')!r} "
            f"with {', '.join(map(str, state)) or 'nothing'}"
        )
    settings: dict[str, Any] = {name: state[name] for name in names}
    metric = kind(**settings)
    rows = state["rows"]
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 2:
        raise InputError("state must hold rows as an int64 tensor of shape (n, K); got others")
    if rows.shape[1] != _width(metric):
        raise InputError(
            f"state must hold rows of {_width(metric)} counts; got {rows.shape[1]} per image"
        )
    metric._rows = [rows.clone()]
    return metric


def _check_classes(num_classes: int, ignore_index: int) -> None:
    _checks.check_integer("num_classes", num_classes, 1)
    _checks.check_ignore_index(ignore_index, num_classes)


def _check_sets_alone(sets: Tensor) -> None:
    _checks.check_tensor("sets", sets)
    if sets.dtype != torch.bool:
        raise InputError(f"sets must be a bool tensor; got {sets.dtype}")
    if sets.ndim < 2:
        raise InputError(f"sets must have shape (B, C, *S); got {_checks.describe(sets.shape)}")


def _check_sets(sets: Tensor, labels: Tensor, num_classes: int) -> None:
    _check_sets_alone(sets)
    if sets.shape[1] != num_classes:
        raise InputError(
            f"sets must have C = {num_classes} classes; got {sets.shape[1]} "
            f"in shape {_checks.describe(sets.shape)}"
        )
    shape = (sets.shape[0], *sets.shape[2:])
    _checks.check_map("labels", labels, shape, f"sets {_checks.describe(sets.shape)}")
    _checks.check_device("labels", labels, sets, "sets")


def _check_batch(labels: Tensor) -> None:
    if labels.ndim < 1:
        raise InputError(f"labels must have shape (B, *S); got {_checks.describe(labels.shape)}")


def _check_beside(name: str, value: Tensor, labels: Tensor) -> None:
    beside = f"labels {_checks.describe(labels.shape)}"
    _checks.check_map(name, value, labels.shape, beside)
    _checks.check_device(name, value, labels, "labels")


def _check_edges(edges: Sequence[float]) -> None:
    if not edges or not all(low < high for low, high in pairwise((-inf, *edges))):
        raise InputError(f"edges must be at least one ascending number; got {tuple(edges)}")


def _strata(values: Tensor, edges: Sequence[float]) -> Tensor:
    _check_edges(edges)
    bounds = torch.tensor(edges, dtype=torch.float64, device=values.device)
    return torch.bucketize(values.double(), bounds)


def _cells(estimate: Estimate) -> list[str]:
    """Each number with its interval, as far as there are any."""
    ends = (estimate.value, estimate.low, estimate.high)
    columns = [cast("list[float]", end.flatten().tolist()) for end in ends]
    cells: list[str] = []
    for value, low, high in zip(*columns, strict=True):
        if isnan(value):
            cells.append("-")
        elif isnan(low):
            cells.append(f"{value:.4f}")
        else:
            cells.append(f"{value:.4f} [{low:.4f}, {high:.4f}]")
    return cells


def _names(argument: str, kind: str, names: Sequence[str] | None, ratio: Ratio) -> list[str]:
    count = ratio.denominator.numel()
    if names is None:
        return [f"{kind} {index}" for index in range(count)]
    if isinstance(names, str) or len(names) != count:
        raise InputError(f"{argument} must hold {count} names; got {len(names)}")
    return list(names)


def _ratio_rows(names: Sequence[str], ratio: Ratio) -> list[tuple[str, ...]]:
    """One line of a table per entry of a ratio."""
    counts = ratio.num_images, ratio.denominator
    columns = [[str(count) for count in each.flatten().tolist()] for each in counts]
    means = _cells(ratio.mean_of_images), _cells(ratio.mean_of_pixels)
    return list(zip(names, *means, *columns, strict=True))


def _table(title: str, rows: Iterable[tuple[str, ...]], confidence: float) -> str:
    level = f"[{100 * confidence:g} %]"
    head = (title, f"mean_of_images {level}", f"mean_of_pixels {level}", "images", "pixels")
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            (
                line[0].ljust(widths[0]),
                *map(str.rjust, line[1:], widths[1:]),
            )  # numbers to the right
        )
        for line in lines
    )


def _worst(images: Tensor, worst: float, tenth: float) -> str:
    if not len(images):
        return "no image has labelled pixels that count"
    middle = images[len(images) // 2].item()
    return (
        f"{len(images)} images: worst {worst:.4f}, mean of worst tenth {tenth:.4f}, "
        f"upper median {middle:.4f}"
    )
