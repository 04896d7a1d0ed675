"""Coverage and set size within strata, and how to number them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Self, cast, final

import torch
from torch import Tensor

from cpseg import _checks, morphology
from cpseg.errors import InputError
from cpseg.metrics._bootstrap import Bootstrap
from cpseg.metrics._estimates import Ratio, names_of, ratio_rows, table
from cpseg.metrics._pixels import (
    check_beside,
    check_sets,
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
class StratifiedCoverageReport:
    """Coverage and set size within each stratum.

    Attributes:
        coverage: Of each stratum; its images are those with labeled pixels in it. ``(K,)``.
        set_size: Of each stratum. ``(K,)``.
        confidence: Level of the intervals.
    """

    coverage: Ratio
    set_size: Ratio
    confidence: float

    def table(self, stratum_names: Sequence[str] | None = None) -> str:
        """The report as text, one line per stratum; :func:`interval_names` has names."""
        names = names_of("stratum_names", "stratum", stratum_names, self.coverage)
        return "\n".join(
            (
                table("coverage", ratio_rows(names, self.coverage), self.confidence),
                table("set size", ratio_rows(names, self.set_size), self.confidence),
            )
        )

    def __str__(self) -> str:
        return self.table()


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
    _rows: Rows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.num_classes, self.ignore_index = checked_classes(self.num_classes, self.ignore_index)
        self.num_strata = _checks.check_integer("num_strata", self.num_strata, 1)
        rules = [
            class_rule("labels", self.num_classes, self.ignore_index),
            f"strata must lie in [0, {self.num_strata}) at labeled pixels",
        ]
        self._rows = Rows(self, [self.num_strata] * 3, rules)

    def update(
        self, sets: Tensor, labels: Tensor, strata: Tensor, unit_ids: UnitIds = None
    ) -> Self:
        """Add a batch.

        Args:
            sets: Which classes are still possible. Bool ``(B, C, *S)``.
            labels: Integer classes, or ``ignore_index``. Shape ``(B, *S)``.
            strata: Integers in ``[0, num_strata)``, anything where the label is ignored.
                Shape ``(B, *S)``.
            unit_ids: The unit of each batch entry (image, patient, scene), where one comes in
                several: integers, on the CPU. None: each entry is a unit of its own.

        Returns:
            Itself.

        Raises:
            InputError: If shapes, dtypes or devices do not fit.
        """
        classes, cells = self.num_classes, self.num_strata + 3
        check_sets_and_labels(sets, labels, classes)
        check_beside("strata", strata, labels)
        ids = checked_ids(unit_ids, len(sets))
        codes = codes_of(labels, classes)
        covered = label_in_set(sets, codes)
        # One more cell, the last, is for pixels without a label.
        where = codes_of(strata, self.num_strata).masked_fill(outside(codes, classes), cells - 1)
        counts = tally((2 * where).add_(covered), 2 * cells).view(-1, cells, 2)
        pixels = counts.sum(2)
        sizes = tally(where, cells, lines(set_sizes(sets)))
        bad = pixels[:, -1] - ignored(labels, self.ignore_index)
        stray = pixels[:, 0] + pixels[:, -2]
        known = slice(1, -2)
        self._rows.add((counts[:, known, 1], sizes[:, known], pixels[:, known], bad, stray), ids)
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
    ) -> StratifiedCoverageReport:
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
        covered, sizes, pixels = self._rows.tables()
        coverage, set_size = intervals.ratios((covered, pixels), (sizes, pixels))
        return StratifiedCoverageReport(coverage=coverage, set_size=set_size, confidence=confidence)


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
    check_sets(sets)
    return _strata(set_sizes(sets), edges)


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

    Raises:
        InputError: If edges are not ascending numbers.

    Examples:
        >>> interval_names((1, 2, 4))
        ['up to 1', 'above 1, up to 2', 'above 2, up to 4', 'above 4']
    """
    _check_edges(edges)
    between = [f"above {low:g}, up to {high:g}" for low, high in pairwise(edges)]
    return [f"up to {edges[0]:g}", *between, f"above {edges[-1]:g}"]


def _strata(values: Tensor, edges: Sequence[float]) -> Tensor:
    _check_edges(edges)
    bounds = torch.tensor(edges, dtype=torch.float64, device=values.device)
    return torch.bucketize(values.double(), bounds)


def _check_edges(edges: object) -> None:
    numbers = isinstance(edges, Sequence) and all(
        isinstance(edge, (int, float)) for edge in cast("Sequence[object]", edges)
    )
    ends = (-inf, *cast("Sequence[float]", edges)) if numbers else ()
    if len(ends) < 2 or not all(a < b for a, b in pairwise(ends)):
        raise InputError(f"edges must be at least one ascending number; got {edges!r}")
