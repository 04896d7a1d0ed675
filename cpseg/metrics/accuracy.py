"""How many pseudo-labels were kept, and how many of those are right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, final

from torch import Tensor

from cpseg.metrics._bootstrap import Bootstrap, spread
from cpseg.metrics._estimates import Ratio, names_of, ratio_rows, table, worst_line
from cpseg.metrics._pixels import checked_classes, class_rule, confusion
from cpseg.metrics._rows import Rows, UnitIds, checked_ids, settings_of


@final
@dataclass(frozen=True, eq=False, slots=True)
class SelectiveAccuracyReport:
    """How many pseudo-labels were kept, and how many of those are right, at labeled pixels.

    Attributes:
        kept: Kept over labeled pixels.
        accuracy_of_kept: Correct over kept pixels; its images are those with kept pixels.
        kept_by_true_class: Kept over labeled pixels whose *label* is the class.
        kept_as_class: Pixels kept *as* the class over all labeled pixels; these add up to
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
        rows = ratio_rows(["kept"], self.kept)
        rows += ratio_rows(["accuracy of kept"], self.accuracy_of_kept)
        for title, ratio in (
            ("kept, label is", self.kept_by_true_class),
            ("kept as", self.kept_as_class),
            ("accuracy, label is", self.accuracy_by_true_class),
            ("accuracy, kept as", self.accuracy_by_predicted_class),
        ):
            names = names_of("class_names", "class", class_names, ratio)
            rows += ratio_rows([f"{title} {name}" for name in names], ratio)
        return (
            table("pseudo-labels", rows, self.confidence)
            + "\n"
            + worst_line(self.images, self.worst_image, self.worst_tenth_of_images)
        )

    def __str__(self) -> str:
        return self.table()


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
        >>> import torch
        >>> metric = SelectiveAccuracy(2).update(torch.tensor([[0, 255]]), torch.tensor([[0, 1]]))
        >>> report = metric.compute()
        >>> report.kept.mean_of_pixels.value.item(), report.accuracy_of_kept.denominator.item()
        (0.5, 1)
    """

    num_classes: int
    ignore_index: int = 255
    _rows: Rows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.num_classes, self.ignore_index = checked_classes(self.num_classes, self.ignore_index)
        rules = [
            class_rule("labels", self.num_classes, self.ignore_index),
            class_rule("predictions", self.num_classes, self.ignore_index),
        ]
        self._rows = Rows(self, [self.num_classes] * 4, rules)

    def update(self, predictions: Tensor, labels: Tensor, unit_ids: UnitIds = None) -> Self:
        """Add a batch.

        Args:
            predictions: Integer classes, or ``ignore_index`` to abstain. Shape ``(B, *S)``.
            labels: Integer classes, or ``ignore_index``. Shape ``(B, *S)``.
            unit_ids: The unit of each batch entry (image, patient, scene), where one comes in
                several: integers, on the CPU. None: each entry is a unit of its own.

        Returns:
            Itself.

        Raises:
            InputError: If shapes, dtypes or devices do not fit.
        """
        counts = confusion(predictions, labels, self.num_classes, self.ignore_index)
        self._rows.add(counts, checked_ids(unit_ids, len(labels)))
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
    ) -> SelectiveAccuracyReport:
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
        correct, kept_as, labeled, abstained = self._rows.tables()
        kept = labeled - abstained
        images, worst, tenth = spread(correct.sum(1), kept.sum(1))
        everything = labeled.sum(1)
        kept_ratio, accuracy, by_true, as_class, right_by_true, right_as = intervals.ratios(
            (kept.sum(1), everything),
            (correct.sum(1), kept.sum(1)),
            (kept, labeled),
            (kept_as, everything[:, None].expand_as(kept_as)),
            (correct, kept),
            (correct, kept_as),
        )
        return SelectiveAccuracyReport(
            kept=kept_ratio,
            accuracy_of_kept=accuracy,
            kept_by_true_class=by_true,
            kept_as_class=as_class,
            accuracy_by_true_class=right_by_true,
            accuracy_by_predicted_class=right_as,
            images=images,
            worst_image=worst,
            worst_tenth_of_images=tenth,
            confidence=confidence,
        )
