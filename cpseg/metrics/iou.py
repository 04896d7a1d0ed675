"""Intersection over union, with its means told apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self, final

import torch
from torch import Tensor

from cpseg.errors import InputError
from cpseg.metrics._bootstrap import Bootstrap, columns_of, divide, spread
from cpseg.metrics._estimates import Estimate, Ratio, names_of, ratio_rows, table, worst_line
from cpseg.metrics._pixels import checked_classes, class_rule, confusion
from cpseg.metrics._rows import Rows, UnitIds, checked_ids, settings_of


@final
@dataclass(frozen=True, eq=False, slots=True)
class MeanIoUReport:
    """Intersection over union per class, and four means of it that are not the same number.

    A class *occurs* where it is the label or the prediction of a labeled pixel: its union is not
    empty. The first three are means over classes of the pooled IoU, ``classes.mean_of_pixels``.

    Attributes:
        mean_of_occurring_classes: Over classes that occur; others do not count. What most papers
            report.
        mean_of_labeled_classes: Over classes that are the label of some pixel that counts; one
            that is only ever predicted does not count itself, though it costs the classes it
            displaces. With ``abstained="ignored"`` pixels without a prediction do not count: a
            class all of whose pixels abstained is left out, as if nobody had labeled it.
        mean_of_all_classes_absent_as_zero: Over all C classes; one that does not occur counts 0.
        mean_of_images: Mean over images of each image's mean over the classes that occur in it.
        classes: IoU per class. ``mean_of_pixels`` pools counts over images; ``mean_of_images``
            averages the IoU of the images in which the class occurs.
        images: Mean IoU of each image over the classes that occur in it, ascending.
            float64 ``(n,)``.
        worst_image: The least of them; NaN without images.
        worst_tenth_of_images: Mean of the lowest ``ceil(n / 10)``.
        num_abstained: Labeled pixels of each class where the prediction abstained. int64 ``(C,)``.
        abstained: How those were counted, ``"missed"`` or ``"ignored"``.
        confidence: Level of the intervals.
    """

    mean_of_occurring_classes: Estimate
    mean_of_labeled_classes: Estimate
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
        names = names_of("class_names", "class", class_names, self.classes)
        lines = [table("IoU", ratio_rows(names, self.classes), self.confidence)]
        for title, mean in (
            ("mean of occurring classes", self.mean_of_occurring_classes),
            ("mean of labeled classes", self.mean_of_labeled_classes),
            ("mean of all classes, absent as 0", self.mean_of_all_classes_absent_as_zero),
            ("mean of images (their occurring classes)", self.mean_of_images),
        ):
            lines.append(f"{title}: {mean}")
        abstained = int(self.num_abstained.sum())
        lines += [
            worst_line(self.images, self.worst_image, self.worst_tenth_of_images),
            f"abstained pixels: {abstained}, counted as {self.abstained}",
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


@final
@dataclass(eq=False)
class MeanIoU:
    """Intersection over union of predictions and labels, at labeled pixels.

    Guarantee:
        None; a measurement.

    Args:
        num_classes: C.
        ignore_index: Label of pixels that do not count, and prediction that abstains.
        abstained: ``"missed"``: a labeled pixel without a prediction belongs to the union of its
            class, as any other miss. ``"ignored"``: it does not count at all, which flatters a
            filter that abstains where it is unsure.

    Examples:
        >>> metric = MeanIoU(3).update(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
        >>> report = metric.compute()
        >>> report.mean_of_occurring_classes.value.item()
        0.25
        >>> report.mean_of_labeled_classes.value.item()
        0.5
    """

    num_classes: int
    ignore_index: int = 255
    abstained: Literal["missed", "ignored"] = field(default="missed", kw_only=True)
    _rows: Rows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.num_classes, self.ignore_index = checked_classes(self.num_classes, self.ignore_index)
        if self.abstained not in ("missed", "ignored"):
            raise InputError(f"abstained must be 'missed' or 'ignored'; got {self.abstained!r}")
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
    ) -> MeanIoUReport:
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
        both, predicted, labeled, abstained = self._rows.tables()
        counted = labeled if self.abstained == "missed" else labeled - abstained
        union = predicted + counted - both
        # The mean over an image's own classes, as a ratio so that images without any drop out.
        per_image = divide(both.double(), union.double()).nansum(1), (union > 0).sum(1).double()
        images, worst, tenth = spread(*per_image)

        *of_classes, each, there, seen = intervals.sums(
            *columns_of(both, union), *columns_of(*per_image)[:2], counted
        )
        iou = divide(*of_classes[2:])
        labeled_only = torch.where(seen > 0, iou, torch.nan).nanmean(1, keepdim=True)
        nothing = iou.isnan().all(1, keepdim=True)  # no class at all: no mean either
        with_zeros = torch.where(nothing, torch.nan, iou.nan_to_num(0.0).mean(1, keepdim=True))
        return MeanIoUReport(
            mean_of_occurring_classes=intervals.estimate(iou.nanmean(1, keepdim=True)),
            mean_of_labeled_classes=intervals.estimate(labeled_only),
            mean_of_all_classes_absent_as_zero=intervals.estimate(with_zeros),
            mean_of_images=intervals.estimate(divide(each, there)),
            classes=intervals.ratio((both, union), of_classes),
            images=images,
            worst_image=worst,
            worst_tenth_of_images=tenth,
            num_abstained=abstained.sum(0),
            abstained=self.abstained,
            confidence=confidence,
        )
