"""Held-out logits and labels to a frozen :class:`~cpseg.calibration.Calibration`.

All calibrators are one idea with two choices. The *unit* is what is exchangeable, an image unless
said otherwise: its pixels share one vote. The *row* is which threshold a pixel's label is held
against, and all that the four classes below differ in:

===================================== ============================ =========================
calibrator                            row of a pixel               shape of the thresholds
===================================== ============================ =========================
:class:`SplitCalibrator`              0                            ``(1,)``
:class:`ClassConditionalCalibrator`   its label                    ``(C,)``
:class:`GroupCalibrator`              its group                    ``(G,)``
... with ``num_classes``              its group * C + its label    ``(G, C)``
:class:`LocationCalibrator`           its place in the grid        ``(*S)``
... with ``clusters``                 the cluster of its place     ``(*S)``
===================================== ============================ =========================

Scores, masses, units, merges, quantiles and what is promised are the same for all of them, and
stand in ``_calibrator.py``, once.
"""

from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from typing import Any, Self, cast, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg._calibrator import (
    AnyCalibrator,
    Fallback,
    LocationClusters,
    Origin,
    Store,
    Unit,
    check_batch,
    check_origin,
)
from cpseg.accumulate import Evidence
from cpseg.errors import InputError
from cpseg.protocols import Score
from cpseg.quantile import MAX_UNITS, Level, level
from cpseg.scores import LAC

__all__ = [
    "ClassConditionalCalibrator",
    "Fallback",
    "GroupCalibrator",
    "LocationCalibrator",
    "LocationClusters",
    "Origin",
    "SplitCalibrator",
]


@final
class SplitCalibrator(AnyCalibrator):
    """One threshold for all pixels and classes.

    Guarantee:
        With ``unit="image"``: the share of a new image's labeled pixels whose class is missing
        from their set is at most ``alpha`` in expectation over the calibration images and the new
        one, if they are exchangeable. With ``unit="pixel"``: see :class:`GroupCalibrator`.

    Args:
        score: The nonconformity score.
        unit: What is exchangeable: ``"image"`` (each batch entry, or what ``unit_ids`` names), or
            ``"pixel"``, which promises much less than it seems to.
        store: ``"histogram"``: bounded memory, thresholds at most 0.1 % too high; ``"exact"``.
        ignore_index: Label of pixels that do not count; no class.
        source: What the logits come from, if calibration must be tied to it.
        compiled: Fuse the scoring into one kernel, as :class:`cpseg.PixelSetPredictor` does.

    Raises:
        InputError: If an argument breaks its rule, the score is none or does not say what its
            parameters are, or it has no range and the store is a histogram.

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
        compiled: bool = False,
    ) -> None:
        shared = score, unit, store, ignore_index, source, compiled
        super().__init__((), (1,), shared)

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

        Raises:
            InputError: If shapes, dtypes, devices or ids do not fit, the logits have other classes
                than those seen, or the score is none. The state is then as before. (Bad *values*
                are counted, and raise at ``compute``.)
            StateError: If a unit is closed already, there are too many units, or an update was
                interrupted.
        """
        check_batch(logits, labels, self.num_classes)
        row = torch.zeros((), dtype=torch.int64, device=logits.device)
        return self._see(logits, labels, row, unit_ids)


@final
class ClassConditionalCalibrator(AnyCalibrator):
    """One threshold per class.

    Guarantee:
        With ``unit="image"``, for each class: in a new image that contains it, the share of its
        labeled pixels whose set misses it is at most that class's ``alpha`` in expectation over
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
        compiled: Fuse the scoring into one kernel, as :class:`cpseg.PixelSetPredictor` does.

    Raises:
        InputError: As for :class:`SplitCalibrator`, and if there is no class.

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
        compiled: bool = False,
    ) -> None:
        num_classes = _checks.check_integer("num_classes", num_classes, 1)
        shared = score, unit, store, ignore_index, source, compiled
        super().__init__(("class",), (num_classes,), shared, num_classes)

    def update(
        self, logits: Tensor, labels: Tensor, unit_ids: Sequence[int] | Tensor | None = None
    ) -> Self:
        """See a batch; arguments and errors as for :meth:`SplitCalibrator.update`."""
        check_batch(logits, labels, self.num_classes)
        return self._see(logits, labels, labels, unit_ids)

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "num_classes": self._declared_classes}


@final
class GroupCalibrator(AnyCalibrator):
    """One threshold per group of pixels, or per group and class.

    Guarantee:
        With ``unit="image"``, for each group (and class): in a new image that has labeled pixels
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
        compiled: Fuse the scoring into one kernel, as :class:`cpseg.PixelSetPredictor` does.

    Raises:
        InputError: As for :class:`SplitCalibrator`, and if there is no group or class.

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
        compiled: bool = False,
    ) -> None:
        self.num_groups: int = _checks.check_integer("num_groups", num_groups, 1)
        axes: tuple[str, ...] = ("group",)
        rows: tuple[int, ...] = (self.num_groups,)
        if num_classes is not None:
            num_classes = _checks.check_integer("num_classes", num_classes, 1)
            axes, rows = ("group", "class"), (self.num_groups, num_classes)
        shared = score, unit, store, ignore_index, source, compiled
        super().__init__(axes, rows, shared, num_classes)

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

        Raises:
            InputError: As for :meth:`SplitCalibrator.update`, and if the groups do not fit.
            StateError: As for :meth:`SplitCalibrator.update`.
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

    A location of its own keeps only the scores that a level up to ``max_alpha`` can reach. With
    ``k = floor(max_alpha * (max_units + 1))``, that is at most ``k`` scores of 16 bytes, or
    ``16 * locations * k`` bytes in all, however many units are seen: 840 MB for 512 x 512 at
    ``max_alpha=0.2, max_units=1000``. (With ``unit_ids``, ``k`` times the most images of one
    unit.) Batches are sorted in when 4 million scores, or as many as are kept, wait, which takes
    a few times their memory for a moment. A larger level than ``max_alpha`` is refused. All
    locations pooled, which ``fallback="pooled"`` needs, take one row of ``store`` besides: 377 kB
    for a histogram, 16 bytes per distinct score if it is exact.

    Guarantee:
        At each location (or cluster: on average over its locations), the class of a new image is
        missing from its set with probability at most ``alpha`` over the calibration images
        labeled there and the new one, if images are exchangeable and clusters were found
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
        compiled: Fuse the scoring into one kernel, as :class:`cpseg.PixelSetPredictor` does.

    Raises:
        InputError: As for :class:`SplitCalibrator`, and if the shape is no grid, the clusters are
            of another grid, or they were fitted with another score or unit.

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
        compiled: bool = False,
    ) -> None:
        self.shape: tuple[int, ...] = _checks.check_shape("shape", shape)
        _checks.check_alpha(max_alpha, "max_alpha")
        self.max_alpha: float = float(level(max_alpha))
        self.max_units: int = _checks.check_integer("max_units", max_units, 1)
        self.clusters: LocationClusters | None = clusters
        if clusters is None:
            rows = self.shape
            self._most_units = min(self.max_units, MAX_UNITS)
            self._tail_alpha = self.max_alpha
            self._map = torch.arange(prod(self.shape)).view(self.shape)
        else:
            if not isinstance(cast("object", clusters), LocationClusters):
                raise InputError(
                    "clusters must be LocationClusters, as cpseg.tuning makes them, or None; "
                    f"got {_checks.kind_of(clusters)}"
                )
            _checks.check_map(
                "clusters.map", clusters.map, self.shape, f"shape {_checks.describe(self.shape)}"
            )
            self._map = clusters.map.long().cpu()
            self._clustered = True
            rows = (int(self._map.max()) + 1,)
        shared = score, unit, store, ignore_index, source, compiled
        super().__init__(("location",), rows, shared)
        if clusters is not None and clusters.fitted_on is not None:
            check_origin("clusters", clusters.fitted_on, self)

    def update(
        self, logits: Tensor, labels: Tensor, unit_ids: Sequence[int] | Tensor | None = None
    ) -> Self:
        """See a batch on the grid; arguments and errors as for :meth:`SplitCalibrator.update`."""
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
            fitted = self.clusters.fitted_on
            described = {
                "map": self._map.tolist(),
                "fitted_on": None if fitted is None else asdict(fitted),
            }
        return {**super()._config(), "shape": list(self.shape), "clusters": described}

    @classmethod
    def _from_config(cls, config: dict[str, Any], score: Score | None) -> Self:
        clusters = config["clusters"]
        if clusters is not None:
            told: dict[str, Any] | None = clusters["fitted_on"]
            origin = None
            if told is not None:
                origin = Origin(told["data"], told["score"], told["unit"], tuple(told["axes"]))
            clusters = LocationClusters(torch.tensor(clusters["map"]), origin)
        return super()._from_config({**config, "clusters": clusters}, score)

    def evidence(self) -> tuple[Evidence, Evidence]:
        """As for every calibrator, and the clusters must not be fitted on this very data."""
        if self.clusters is not None and self.clusters.fitted_on is not None:
            check_origin("clusters", self.clusters.fitted_on, self)
        return super().evidence()

    def _alphas(self, alpha: Level | Sequence[Level]) -> list[Level]:
        alphas = super()._alphas(alpha)
        if self._tail_alpha is not None and level(alphas[0]) > level(self._tail_alpha):
            raise InputError(
                f"alpha must be at most max_alpha = {self._tail_alpha}, beyond which nothing was "
                f"kept; got {alphas[0]}"
            )
        return alphas

    def _lay_out(self, per_row: Tensor) -> Tensor:
        return per_row[self._map.to(per_row.device)]
