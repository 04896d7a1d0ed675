"""How often the label is in the set, and how large the sets are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, final

from torch import Tensor

from cpseg.metrics._bootstrap import Bootstrap, spread
from cpseg.metrics._estimates import Ratio, names_of, ratio_rows, table, worst_line
from cpseg.metrics._pixels import (
    check_sets_and_labels,
    checked_classes,
    class_rule,
    codes_of,
    ignored,
    label_in_set,
    lines,
    outside,
    set_sizes,
    tally,
)
from cpseg.metrics._rows import Rows, UnitIds, checked_ids, settings_of


@final
@dataclass(frozen=True, eq=False, slots=True)
class CoverageReport:
    """How often the label is in the set.

    Attributes:
        overall: Over all labeled pixels.
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
        rows = ratio_rows(["all"], self.overall) + ratio_rows(
            names_of("class_names", "class", class_names, self.classes), self.classes
        )
        return (
            table("coverage", rows, self.confidence)
            + "\n"
            + worst_line(self.images, self.worst_image, self.worst_tenth_of_images)
        )

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
        >>> import torch
        >>> sets = torch.tensor([[[True, False], [True, True]]])
        >>> report = Coverage(2).update(sets, torch.tensor([[0, 0]])).compute()
        >>> report.mean_of_images, report.classes.denominator.tolist()
        (0.5, [2, 0])
    """

    num_classes: int
    ignore_index: int = 255
    _rows: Rows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.num_classes, self.ignore_index = checked_classes(self.num_classes, self.ignore_index)
        rules = [class_rule("labels", self.num_classes, self.ignore_index)]
        self._rows = Rows(self, (self.num_classes, self.num_classes), rules)

    def update(self, sets: Tensor, labels: Tensor, unit_ids: UnitIds = None) -> Self:
        """Add a batch.

        Args:
            sets: Which classes are still possible. Bool ``(B, C, *S)``.
            labels: Integer classes, or ``ignore_index``. Shape ``(B, *S)``.
            unit_ids: The unit of each batch entry (image, patient, scene), where one comes in
                several: integers, on the CPU. None: each entry is a unit of its own.

        Returns:
            Itself.

        Raises:
            InputError: If shapes, dtypes or devices do not fit.
        """
        classes = self.num_classes
        check_sets_and_labels(sets, labels, classes)
        ids = checked_ids(unit_ids, len(sets))
        codes = codes_of(labels, classes)
        keys = (2 * codes).add_(label_in_set(sets, codes))
        counts = tally(keys, 2 * (classes + 2)).view(-1, classes + 2, 2)
        pixels = counts.sum(2)
        bad = pixels[:, 0] + pixels[:, -1] - ignored(labels, self.ignore_index)
        self._rows.add((counts[:, 1:-1, 1], pixels[:, 1:-1], bad), ids)
        return self

    def merge(self, other: Self) -> Self:
        """Add what another has seen, which stays as it is; rows of one unit id are added up.

        Args:
            other: A metric with the same arguments.

        Returns:
            Itself.

        Raises:
            InputError: If it is another metric, or its arguments differ.
        """
        self._rows.merge(other)
        return self

    def reset(self) -> Self:
        """Forget everything."""
        self._rows.reset()
        return self

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors, numbers and strings, on the CPU; the same for any order."""
        return self._rows.state()

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object]) -> Self:
        """The accumulator that gave this state.

        Raises:
            InputError: If it is the state of something else, or incomplete.
        """
        metric = cls(**settings_of(cls, state))
        metric._rows.load(state)
        return metric

    def compute(
        self, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> CoverageReport:
        """The report so far; changes nothing.

        Args:
            resamples: Resamples of the units behind each interval.
            confidence: Level of the intervals, strictly between 0 and 1.
            seed: Seeds the resampling; the global random state is not touched.

        Returns:
            The report.

        Raises:
            InputError: If labels were no class, or an argument is out of range.
        """
        intervals = Bootstrap(resamples, confidence, seed)
        covered, pixels = self._rows.tables()
        images, worst, tenth = spread(covered.sum(1), pixels.sum(1))
        overall, classes = intervals.ratios((covered.sum(1), pixels.sum(1)), (covered, pixels))
        return CoverageReport(
            overall=overall,
            classes=classes,
            images=images,
            worst_image=worst,
            worst_tenth_of_images=tenth,
            confidence=confidence,
        )


@final
@dataclass(frozen=True, eq=False, slots=True)
class SetSizeReport:
    """How many classes the sets hold, at labeled pixels.

    Attributes:
        overall: Over all labeled pixels.
        classes: Over the pixels whose label is the class.
        images: Mean set size of each image, ascending. float64 ``(n,)``.
        worst_image: The largest of them; NaN without images.
        worst_tenth_of_images: Mean of the largest ``ceil(n / 10)``.
        num_pixels_of_size: Labeled pixels with a set of each size, ``0 .. C``. int64 ``(C + 1,)``.
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
        """Mean set size of all labeled pixels."""
        return self.overall.mean_of_pixels.value.item()

    def table(self, class_names: Sequence[str] | None = None) -> str:
        """The report as text, one line per class."""
        rows = ratio_rows(["all"], self.overall) + ratio_rows(
            names_of("class_names", "label is class", class_names, self.classes), self.classes
        )
        counts: list[int] = self.num_pixels_of_size.tolist()
        sizes = ", ".join(f"{size}: {count}" for size, count in enumerate(counts) if count)
        return "\n".join(
            (
                table("set size", rows, self.confidence),
                worst_line(self.images, self.worst_image, self.worst_tenth_of_images),
                f"labeled pixels by set size: {sizes or 'none'}",
            )
        )

    def __str__(self) -> str:
        return self.table()


@final
@dataclass(eq=False)
class SetSize:
    """How many classes the sets hold at labeled pixels: overall, per class and per image.

    Guarantee:
        None; a measurement.

    Args:
        num_classes: C.
        ignore_index: Label of pixels that do not count.

    Examples:
        >>> import torch
        >>> sets = torch.tensor([[[True, False], [True, True]]])
        >>> report = SetSize(2).update(sets, torch.tensor([[0, 0]])).compute()
        >>> report.mean_of_images, report.num_pixels_of_size.tolist()
        (1.5, [0, 1, 1])
    """

    num_classes: int
    ignore_index: int = 255
    _rows: Rows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.num_classes, self.ignore_index = checked_classes(self.num_classes, self.ignore_index)
        rules = [class_rule("labels", self.num_classes, self.ignore_index)]
        self._rows = Rows(self, (self.num_classes, self.num_classes, self.num_classes + 1), rules)

    def update(self, sets: Tensor, labels: Tensor, unit_ids: UnitIds = None) -> Self:
        """Add a batch.

        Args:
            sets: Which classes are still possible. Bool ``(B, C, *S)``.
            labels: Integer classes, or ``ignore_index``. Shape ``(B, *S)``.
            unit_ids: The unit of each batch entry (image, patient, scene), where one comes in
                several: integers, on the CPU. None: each entry is a unit of its own.

        Returns:
            Itself.

        Raises:
            InputError: If shapes, dtypes or devices do not fit.
        """
        classes = self.num_classes
        check_sets_and_labels(sets, labels, classes)
        ids = checked_ids(unit_ids, len(sets))
        codes, sizes = codes_of(labels, classes), lines(set_sizes(sets))
        pixels = tally(codes, classes + 2)
        bad = pixels[:, 0] + pixels[:, -1] - ignored(labels, self.ignore_index)
        of_labels = tally(codes, classes + 2, sizes)
        of_size = tally(sizes.masked_fill_(outside(codes, classes), classes + 1), classes + 2)
        self._rows.add((of_labels[:, 1:-1], pixels[:, 1:-1], of_size[:, :-1], bad), ids)
        return self

    def merge(self, other: Self) -> Self:
        """Add what another has seen, which stays as it is; rows of one unit id are added up.

        Args:
            other: A metric with the same arguments.

        Returns:
            Itself.

        Raises:
            InputError: If it is another metric, or its arguments differ.
        """
        self._rows.merge(other)
        return self

    def reset(self) -> Self:
        """Forget everything."""
        self._rows.reset()
        return self

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors, numbers and strings, on the CPU; the same for any order."""
        return self._rows.state()

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object]) -> Self:
        """The accumulator that gave this state.

        Raises:
            InputError: If it is the state of something else, or incomplete.
        """
        metric = cls(**settings_of(cls, state))
        metric._rows.load(state)
        return metric

    def compute(
        self, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> SetSizeReport:
        """The report so far; changes nothing.

        Args:
            resamples: Resamples of the units behind each interval.
            confidence: Level of the intervals, strictly between 0 and 1.
            seed: Seeds the resampling; the global random state is not touched.

        Returns:
            The report.

        Raises:
            InputError: If a pixel's value was out of range, or an argument is.
        """
        intervals = Bootstrap(resamples, confidence, seed)
        sizes, pixels, histogram = self._rows.tables()
        images, worst, tenth = spread(sizes.sum(1), pixels.sum(1), largest=True)
        overall, classes = intervals.ratios((sizes.sum(1), pixels.sum(1)), (sizes, pixels))
        return SetSizeReport(
            overall=overall,
            classes=classes,
            images=images,
            worst_image=worst,
            worst_tenth_of_images=tenth,
            num_pixels_of_size=histogram.sum(0),
            confidence=confidence,
        )
