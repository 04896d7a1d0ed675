"""Held-out logits and labels to a frozen :class:`~cpseg.calibration.Calibration`.

All calibrators are one idea with two choices. The *unit* is what is exchangeable, an image unless
said otherwise: its pixels share one vote. The *group* says which threshold a pixel's label is
held against: one for all (:class:`SplitCalibrator`), one per class
(:class:`ClassConditionalCalibrator`), per region (:class:`GroupCalibrator`), per location
(:class:`LocationCalibrator`). Each class below says only which row of thresholds a pixel belongs
to; ``_calibrator.py`` does the rest, once.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, Self, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg._calibrator import AnyCalibrator, Fallback, LocationClusters, Store, Unit, check_batch
from cpseg.accumulate import Evidence
from cpseg.errors import InputError
from cpseg.protocols import Score
from cpseg.quantile import MAX_UNITS
from cpseg.scores import LAC

__all__ = [
    "ClassConditionalCalibrator",
    "Fallback",
    "GroupCalibrator",
    "LocationCalibrator",
    "LocationClusters",
    "SplitCalibrator",
]


@final
class SplitCalibrator(AnyCalibrator):
    """One threshold for all pixels and classes.

    Guarantee:
        With ``unit="image"``: the share of a new image's labelled pixels whose class is missing
        from their set is at most ``alpha`` in expectation over the calibration images and the new
        one, if they are exchangeable. With ``unit="pixel"``: see :class:`GroupCalibrator`.

    Args:
        score: The nonconformity score.
        unit: What is exchangeable: ``"image"`` (each batch entry, or what ``unit_ids`` names), or
            ``"pixel"``, which promises much less than it seems to.
        store: ``"histogram"``: bounded memory, thresholds at most 0.1 % too high; ``"exact"``.
        ignore_index: Label of pixels that do not count; no class.
        source: What the logits come from, if calibration must be tied to it.

    Examples:
        >>> calibrator = SplitCalibrator(store="exact")
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
        >>> labels = torch.tensor([0, 0, 1])
        >>> calibration = calibrator.update(logits, labels).compute(alpha=0.25)
        >>> calibration.thresholds, calibration.num_units
        (tensor([0.5000]), tensor([3]))
    """

    def __init__(
        self,
        score: Score = LAC(),
        *,
        unit: Unit = "image",
        store: Store = "histogram",
        ignore_index: int = 255,
        source: str | None = None,
    ) -> None:
        super().__init__(
            axes=(),
            rows=(1,),
            score=score,
            unit=unit,
            store=store,
            ignore_index=ignore_index,
            source=source,
        )

    def update(
        self, logits: Tensor, labels: Tensor, unit_ids: Sequence[int] | Tensor | None = None
    ) -> Self:
        """See a batch.

        Args:
            logits: Shape ``(B, C, *S)``.
            labels: Integers, ``ignore_index`` where unknown. Shape ``(B, *S)``.
            unit_ids: The unit of each batch entry, where one unit comes in several: integers,
                on the CPU if a tensor. Shape ``(B,)``.

        Returns:
            The calibrator itself.
        """
        check_batch(logits, labels, self.num_classes)
        return self._see(
            logits, labels, torch.zeros((), dtype=torch.int64, device=logits.device), unit_ids
        )


@final
class ClassConditionalCalibrator(AnyCalibrator):
    """One threshold per class.

    Guarantee:
        With ``unit="image"``, for each class: in a new image that contains it, the share of its
        labelled pixels whose set misses it is at most that class's ``alpha`` in expectation over
        the calibration images that contain it and the new one, if images are exchangeable. It
        does not imply the same for an image as a whole. A class in fewer than ``1 / alpha - 1``
        images has threshold ``+inf``, which keeps the promise and filters nothing.

    Args:
        num_classes: Number of classes, C.
        score: The nonconformity score.
        unit: As for :class:`SplitCalibrator`.
        store: As for :class:`SplitCalibrator`.
        ignore_index: Label of pixels that do not count; no class.
        source: What the logits come from, if calibration must be tied to it.

    Examples:
        >>> calibrator = ClassConditionalCalibrator(2, store="exact")
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        >>> labels = torch.tensor([0, 0, 0, 1])
        >>> calibrator.update(logits, labels).compute(alpha=0.25).thresholds
        tensor([0.5000,    inf])
    """

    def __init__(
        self,
        num_classes: int,
        score: Score = LAC(),
        *,
        unit: Unit = "image",
        store: Store = "histogram",
        ignore_index: int = 255,
        source: str | None = None,
    ) -> None:
        super().__init__(
            axes=("class",),
            rows=(num_classes,),
            score=score,
            unit=unit,
            store=store,
            ignore_index=ignore_index,
            source=source,
            num_classes=num_classes,
        )

    def update(
        self, logits: Tensor, labels: Tensor, unit_ids: Sequence[int] | Tensor | None = None
    ) -> Self:
        """See a batch; arguments as for :meth:`SplitCalibrator.update`."""
        check_batch(logits, labels, self.num_classes)
        rows = labels.long()  # first: 200 compared as int8 is -56
        known = (rows >= 0) & (rows < logits.shape[1])
        return self._see(logits, labels, rows * known, unit_ids)

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "num_classes": self._declared_classes}


@final
class GroupCalibrator(AnyCalibrator):
    """One threshold per group of pixels, or per group and class.

    Guarantee:
        With ``unit="image"``, for each group (and class): in a new image that has labelled pixels
        there, the share of them whose class is missing from their set is at most ``alpha`` in
        expectation over the calibration images that have such pixels and the new one, if images
        are exchangeable and the groups are chosen without the labels. With ``unit="pixel"``:
        nothing more than the average over equally large images, ``alpha + (1 - alpha) / (images
        + 1)``; pixels of one image are not exchangeable with those of another.

    Args:
        num_groups: Number of groups, G.
        num_classes: If given, groups times classes.
        score: The nonconformity score.
        unit: As for :class:`SplitCalibrator`.
        store: As for :class:`SplitCalibrator`.
        ignore_index: Label of pixels that do not count; no class.
        source: What the logits come from, if calibration must be tied to it.

    Examples:
        >>> calibrator = GroupCalibrator(2, store="exact")
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]] * 3)
        >>> labels, groups = torch.tensor([[0, 1]] * 3), torch.tensor([0, 1])
        >>> calibrator.update(logits, labels, groups).compute(alpha=0.25).num_units
        tensor([3, 3])
    """

    def __init__(
        self,
        num_groups: int,
        num_classes: int | None = None,
        score: Score = LAC(),
        *,
        unit: Unit = "image",
        store: Store = "histogram",
        ignore_index: int = 255,
        source: str | None = None,
    ) -> None:
        _checks.check_integer("num_groups", num_groups, 1)
        self.num_groups: int = num_groups
        super().__init__(
            axes=("group",) if num_classes is None else ("group", "class"),
            rows=(num_groups,) if num_classes is None else (num_groups, num_classes),
            score=score,
            unit=unit,
            store=store,
            ignore_index=ignore_index,
            source=source,
            num_classes=num_classes,
        )

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        groups: Tensor,
        unit_ids: Sequence[int] | Tensor | None = None,
    ) -> Self:
        """See a batch.

        Args:
            logits: Shape ``(B, C, *S)``.
            labels: Integers, ``ignore_index`` where unknown. Shape ``(B, *S)``.
            groups: Integers in ``[0, G)``, for the grid, ``(*S)``, or for the batch, ``(B, *S)``.
            unit_ids: As for :meth:`SplitCalibrator.update`.

        Returns:
            The calibrator itself.
        """
        check_batch(logits, labels, self.num_classes)
        _checks.check_groups(groups, logits)
        rows = groups.long()
        if self._declared_classes is not None:
            classes = self._declared_classes
            wide = labels.long()  # first: 200 compared as int8 is -56
            known = (wide >= 0) & (wide < classes)
            inside = (rows >= 0) & (rows < self.num_groups)
            rows = torch.where(inside, rows * classes + wide * known, -1)
        return self._see(logits, labels, rows, unit_ids)

    def _arguments(self) -> dict[str, Any]:
        own = {"num_groups": self.num_groups, "num_classes": self._declared_classes}
        return {**super()._arguments(), **own}


@final
class LocationCalibrator(AnyCalibrator):
    """One threshold per pixel location, or per cluster of locations. Needs one common grid.

    A location of its own keeps only the scores that a level up to ``max_alpha`` can reach, at
    most ``floor(max_alpha * (max_units + 1))`` per location when images are units: ``16`` bytes
    each, so ``16 * locations * floor(max_alpha * (max_units + 1))`` bytes, and as much again
    while a batch is sorted in.

    Guarantee:
        At each location (or cluster: on average over its locations), the class of a new image is
        missing from its set with probability at most ``alpha`` over the calibration images
        labelled there and the new one, if images are exchangeable and clusters were found
        without them.

    Args:
        shape: The grid, ``*S``.
        clusters: Locations that share a threshold; see :func:`cpseg.tuning.cluster_locations`.
        max_alpha: Largest level that ``compute`` will be asked for (without clusters).
        max_units: Most units that will be seen (without clusters).
        score: The nonconformity score.
        unit: As for :class:`SplitCalibrator`.
        store: As for :class:`SplitCalibrator`; for clusters, and for all locations pooled.
        ignore_index: Label of pixels that do not count; no class.
        source: What the logits come from, if calibration must be tied to it.

    Examples:
        >>> calibrator = LocationCalibrator((2,))
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]] * 4)
        >>> labels = torch.tensor([[0, 1]] * 3 + [[255, 1]])
        >>> calibration = calibrator.update(logits, labels).compute(alpha=0.2)
        >>> calibration.num_units, calibration.thresholds.isinf()
        (tensor([3, 4]), tensor([ True, False]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        clusters: LocationClusters | None = None,
        max_alpha: float = 0.2,
        *,
        max_units: int = 1000,
        score: Score = LAC(),
        unit: Unit = "image",
        store: Store = "histogram",
        ignore_index: int = 255,
        source: str | None = None,
    ) -> None:
        self.shape: tuple[int, ...] = tuple(shape)
        for size in self.shape:
            _checks.check_integer("shape", size, 1)
        _checks.check_alpha(max_alpha, "max_alpha")
        _checks.check_integer("max_units", max_units, 1)
        self.clusters: LocationClusters | None = clusters
        self.max_alpha: float = max_alpha
        self.max_units: int = max_units
        if clusters is None:
            rows = self.shape
            self._most_units = min(max_units, MAX_UNITS)
            self._tail_alpha = max_alpha
            self._map = torch.arange(prod(self.shape)).view(self.shape)
        else:
            _checks.check_map(
                "clusters.map", clusters.map, self.shape, f"shape {_checks.describe(self.shape)}"
            )
            self._map = clusters.map.long().cpu()
            self._clustered = True
            rows = (int(self._map.max()) + 1,)
        super().__init__(
            axes=("location",),
            rows=rows,
            score=score,
            unit=unit,
            store=store,
            ignore_index=ignore_index,
            source=source,
        )

    def update(
        self, logits: Tensor, labels: Tensor, unit_ids: Sequence[int] | Tensor | None = None
    ) -> Self:
        """See a batch on the grid; arguments as for :meth:`SplitCalibrator.update`."""
        check_batch(logits, labels, self.num_classes)
        if tuple(logits.shape[2:]) != self.shape:
            raise InputError(
                f"logits must have spatial shape {_checks.describe(self.shape)}; "
                f"got {_checks.describe(logits.shape[2:])}"
            )
        return self._see(logits, labels, self._map.to(logits.device), unit_ids)

    def _arguments(self) -> dict[str, Any]:
        own = {
            "shape": self.shape,
            "clusters": self.clusters,
            "max_alpha": self.max_alpha,
            "max_units": self.max_units,
        }
        return {**super()._arguments(), **own}

    def _config(self) -> dict[str, Any]:
        described = None
        if self.clusters is not None:
            described = {"map": self._map.tolist(), "fitted_on": self.clusters.fitted_on}
        return {**super()._config(), "shape": list(self.shape), "clusters": described}

    @classmethod
    def _from_config(cls, config: dict[str, Any], score: Score | None) -> Self:
        clusters = config["clusters"]
        if clusters is not None:
            clusters = LocationClusters(torch.tensor(clusters["map"]), clusters["fitted_on"])
        return super()._from_config({**config, "clusters": clusters}, score)

    def evidence(self) -> tuple[Evidence, Evidence]:
        """As for every calibrator, and the clusters must not be fitted on this very data."""
        if self.clusters is not None and self.clusters.fitted_on == self.fingerprint:
            raise InputError(
                "clusters must be fitted on a split of their own; got some fitted on this very data"
            )
        return super().evidence()

    def _alphas(self, alpha: float | Sequence[float]) -> list[float]:
        alphas = super()._alphas(alpha)
        if self._tail_alpha is not None and alphas[0] > self._tail_alpha:
            raise InputError(
                f"alpha must be at most max_alpha = {self._tail_alpha}, beyond which nothing was "
                f"kept; got {alphas[0]}"
            )
        return alphas

    def _lay_out(self, per_row: Tensor) -> Tensor:
        return per_row[self._map.to(per_row.device)]
