"""What is fitted before calibration, on a split of its own: clusters and fallbacks.

Tuning data is never calibration data. Everything here is fitted from a calibrator that has seen
the tuning split, remembers that calibrator's fingerprint, and is refused by ``compute`` on the
very same data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, prod
from typing import Self, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.accumulate import Evidence
from cpseg.calibrators import (
    ClassConditionalCalibrator,
    GroupCalibrator,
    LocationCalibrator,
    LocationClusters,
)
from cpseg.errors import InputError
from cpseg.quantile import MAX_UNITS, level

__all__ = [
    "GroupClusters",
    "InterpolatedQuantile",
    "annuli",
    "cluster_locations",
    "kmeans",
]

_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@final
@dataclass(frozen=True, eq=False, slots=True)
class InterpolatedQuantile:
    """Between the pooled threshold and that of the hardest class known (after Ding et al., 2025).

    A group with too few units has the class quantile ``+inf``. It is capped: at the largest
    finite threshold a group of the tuning split has. The fallback is ``pooled + weight *
    max(cap - pooled, 0)``; ``weight`` is the smallest of 0, 0.05, ..., 1 that covers the tuning
    split's groups, averaged with equal weights, to ``1 - alpha``.

    Guarantee:
        None; a heuristic. Groups that need it are listed by the calibration.

    Attributes:
        alpha: The level it was fitted for.
        weight: Share of the cap.
        cap: Largest finite threshold of a tuning group; ``-inf`` if there was none.
        fitted_on: Fingerprint of the tuning data.
    """

    alpha: float
    weight: float
    cap: float
    fitted_on: str

    @classmethod
    def fit(cls, tuning: ClassConditionalCalibrator | GroupCalibrator, alpha: float) -> Self:
        """Choose cap and weight.

        Args:
            tuning: A calibrator that has seen the tuning split only.
            alpha: The level at which it will be used.

        Returns:
            The fitted fallback.

        Raises:
            InputError: If the tuning split has no finite pooled threshold at alpha.
        """
        own, pooled = tuning.evidence()
        base = float(pooled.quantiles([alpha])[0])
        if base == torch.inf:
            raise InputError(
                f"tuning must hold enough units for a finite pooled threshold at alpha = {alpha}; "
                f"got {int(pooled.num_units[0])}"
            )
        thresholds = own.quantiles([alpha] * own.store.rows)
        finite = thresholds[thresholds.isfinite()]
        cap = float(finite.max()) if finite.numel() else -torch.inf
        seen = own.num_units > 0
        weight = 0.0
        for step in range(21):
            weight = step / 20
            trial = torch.full_like(thresholds, base + weight * max(cap - base, 0.0))
            missed = own.store.above(trial)[seen] / (own.num_units[seen] * own.unit_mass)
            if float(missed.mean()) <= alpha:
                break
        return cls(alpha, weight, cap, tuning.fingerprint)

    def thresholds(self, own: Evidence, pooled: Evidence, alphas: Sequence[float]) -> Tensor:
        """The fallback threshold of every group. float32 ``(R,)``."""
        if set(alphas) != {self.alpha}:
            raise InputError(
                f"alpha must be {self.alpha}, for which the fallback was fitted; "
                f"got {sorted(set(alphas))}"
            )
        base = pooled.quantiles([self.alpha])[0]
        raised = base + self.weight * (self.cap - base).clamp(min=0)
        return torch.where(base.isinf(), base, raised).expand(own.store.rows)


@final
@dataclass(frozen=True, eq=False, slots=True)
class GroupClusters:
    """Groups (classes, say) with similar score distributions share a threshold.

    After Ding et al. (2023): k-means on the groups' score quantiles. A group with too few units
    gets the threshold of its cluster: the smallest one at which the calibration images' missed
    shares, summed over the cluster's groups, are at most ``alpha * (N + K) - K``, with ``N`` the
    number of (image, group) pairs and ``K`` of groups. Groups the tuning split hardly knows, and
    clusters that are too small, get the pooled threshold.

    It takes some ten images per class of a cluster until the cluster's threshold is finite.

    Guarantee:
        None as it is used: only groups with too few units take the cluster's threshold. Were it
        used for all of a cluster's groups, their missed shares in a new image would add up to at
        most ``alpha`` times the number of them in it, in expectation over exchangeable images.

    Attributes:
        assignment: Cluster of each group, -1 for none. int64 ``(R,)``.
        fitted_on: Fingerprint of the tuning data.
    """

    assignment: Tensor
    fitted_on: str

    @classmethod
    def fit(
        cls,
        tuning: ClassConditionalCalibrator | GroupCalibrator,
        num_clusters: int | None = None,
        *,
        min_units: int = 5,
        seed: int = 0,
        levels: Sequence[float] = _LEVELS,
    ) -> Self:
        """Find clusters.

        Args:
            tuning: A calibrator that has seen the tuning split only.
            num_clusters: How many; by default one per four groups that are known well enough.
            min_units: Fewest tuning units of a group that is clustered.
            seed: Seed of k-means.
            levels: Levels of the score quantiles that are compared.

        Returns:
            The fitted clusters.

        Raises:
            InputError: If more clusters are wanted than groups are known.
        """
        _checks.check_integer("min_units", min_units, 1)
        own, _ = tuning.evidence()
        known = (own.num_units >= min_units).nonzero()[:, 0]
        wanted = max(len(known) // 4, 1) if num_clusters is None else num_clusters
        _checks.check_integer("num_clusters", wanted, 1)
        if wanted > len(known):
            raise InputError(
                f"num_clusters must be at most the {len(known)} groups with {min_units} tuning "
                f"units or more; got {wanted}"
            )
        weights = own.num_units[known].double().sqrt()
        found = kmeans(_curves(own, levels)[known].double(), wanted, weights=weights, seed=seed)
        assignment = torch.full_like(own.num_units, -1)
        assignment[known] = found
        return cls(assignment, tuning.fingerprint)

    def thresholds(self, own: Evidence, pooled: Evidence, alphas: Sequence[float]) -> Tensor:
        """The fallback threshold of every group. float32 ``(R,)``."""
        if len(self.assignment) != own.store.rows:
            raise InputError(
                f"fallback must be fitted for {own.store.rows} groups; got {len(self.assignment)}"
            )
        assignment = self.assignment.to(own.num_units.device)
        count = int(assignment.max()) + 1
        inside = assignment >= 0
        pairs = torch.zeros(count, dtype=torch.int64, device=assignment.device)
        pairs.index_add_(0, assignment[inside], own.num_units[inside])
        if own.unit_mass > 1 and int(pairs.max()) > MAX_UNITS:
            raise InputError(
                f"fallback must have at most {MAX_UNITS} pairs of an image and a group in a "
                f"cluster; got {int(pairs.max())}. Fit more clusters"
            )
        members = torch.bincount(assignment[inside], minlength=count).tolist()
        store = own.store.pool(assignment, count)
        result = torch.empty(own.store.rows, device=assignment.device)
        for alpha in set(alphas):
            budgets = [
                floor(own.unit_mass * (level(alpha) * (n + k) - k))
                for n, k in zip(pairs.tolist(), members, strict=True)
            ]
            shared = store.thresholds(torch.tensor(budgets, device=assignment.device))
            base = pooled.quantiles([alpha])[0]
            usable = inside & shared[assignment].isfinite()
            chosen = torch.tensor([a == alpha for a in alphas], device=assignment.device)
            result[chosen] = torch.where(usable, shared[assignment], base)[chosen]
        return result


def cluster_locations(
    tuning: LocationCalibrator,
    num_clusters: int,
    *,
    seed: int = 0,
    levels: Sequence[float] = (0.6, 0.7, 0.8, 0.9),
) -> LocationClusters:
    """Locations whose score quantiles are alike (k-means, after Kandinsky calibration, 2024).

    Args:
        tuning: A calibrator of single locations that has seen the tuning split only, made with
            ``max_alpha`` of at least one minus the lowest level.
        num_clusters: How many.
        seed: Seed of k-means.
        levels: Levels of the score quantiles that are compared.

    Returns:
        Clusters for a :class:`~cpseg.LocationCalibrator`. Locations never labelled in the tuning
        split join the cluster with the highest quantiles.

    Raises:
        InputError: If the tuning calibrator has clusters itself, or keeps too little of the tail.
    """
    _checks.check_integer("num_clusters", num_clusters, 1)
    if tuning.clusters is not None:
        raise InputError("tuning must be a calibrator of single locations; got one with clusters")
    if 1 - min(levels) > tuning.max_alpha:
        raise InputError(
            f"tuning must have max_alpha >= {1 - min(levels):g} for these levels; "
            f"got {tuning.max_alpha}"
        )
    own, _ = tuning.evidence()
    known = (own.num_units > 0).nonzero()[:, 0]
    if num_clusters > len(known):
        raise InputError(
            f"num_clusters must be at most the {len(known)} labelled locations; got {num_clusters}"
        )
    curves = _curves(own, levels)[known].double()
    found = kmeans(curves, num_clusters, seed=seed)
    total = torch.zeros(num_clusters, dtype=torch.float64, device=curves.device)
    total.index_add_(0, found, curves.mean(1))
    highest = (total / torch.bincount(found, minlength=num_clusters)).argmax()
    clusters = torch.full((prod(tuning.shape),), int(highest), device=found.device)
    clusters[known] = found
    return LocationClusters(clusters.view(tuning.shape), tuning.fingerprint)


def annuli(shape: Sequence[int], rings: int) -> LocationClusters:
    """Rings around the center of the grid, with equally many locations each, up to ties.

    Args:
        shape: The grid, ``*S``; rings are ellipses with its proportions.
        rings: How many; ring 0 is the center.

    Returns:
        Clusters for a :class:`~cpseg.LocationCalibrator`.

    Raises:
        InputError: If there are more rings than different distances from the center.

    Examples:
        >>> annuli((3, 5), 2).map
        tensor([[1, 1, 0, 1, 1],
                [1, 0, 0, 0, 1],
                [1, 1, 0, 1, 1]])
    """
    _checks.check_integer("rings", rings, 1)
    # In integers, so that what is symmetric stays so: twice the distance, times all sizes.
    axes = [(2 * torch.arange(size) + 1 - size) * (prod(shape) // size) for size in shape]
    squared = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0)
    ordered = squared.flatten().sort().values
    edges = ordered[torch.arange(1, rings) * len(ordered) // rings]
    ring = torch.searchsorted(edges, squared.contiguous(), right=True)
    if len(torch.unique(ring)) != rings:
        raise InputError(f"rings must be fewer for a grid {_checks.describe(shape)}; got {rings}")
    return LocationClusters(ring)


def kmeans(
    points: Tensor,
    num_clusters: int,
    *,
    weights: Tensor | None = None,
    seed: int = 0,
    restarts: int = 8,
    rounds: int = 100,
) -> Tensor:
    """Weighted k-means with k-means++ starts; the global random state is not touched.

    Args:
        points: Floating points. Shape ``(N, D)``, with ``N >= num_clusters``.
        num_clusters: K; fewer are used where fewer points differ.
        weights: Positive weights; None for equal ones. Shape ``(N,)``.
        seed: Seed of the starts.
        restarts: Starts, of which the best is kept.
        rounds: Most rounds per start.

    Returns:
        Cluster of each point, numbered from 0 in the order of the points. int64 ``(N,)``.

    Examples:
        >>> kmeans(torch.tensor([[0.0], [5.0], [0.1], [5.1]]), 2)
        tensor([0, 1, 0, 1])
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(len(points)) if weights is None else weights
    weights = weights.to(points)
    best = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    lowest = torch.inf
    for _ in range(restarts):
        centers = points[torch.multinomial(weights.cpu(), 1, generator=generator).to(points.device)]
        for _ in range(num_clusters - 1):
            away = weights * torch.cdist(points, centers).amin(1).square()
            if not bool((away > 0).any()):
                break  # fewer different points than clusters
            drawn = torch.multinomial(away.cpu(), 1, generator=generator).to(points.device)
            centers = torch.cat((centers, points[drawn]))
        nearest = torch.cdist(points, centers).argmin(1)
        for _ in range(rounds):
            mass = weights.new_zeros(len(centers)).index_add(0, nearest, weights)
            sums = torch.zeros_like(centers).index_add(0, nearest, weights[:, None] * points)
            moved = torch.where(mass[:, None] > 0, sums / mass.clamp(min=1e-300)[:, None], centers)
            previous, centers = nearest, moved
            nearest = torch.cdist(points, centers).argmin(1)
            if torch.equal(previous, nearest):
                break
        cost = float((weights * (points - centers[nearest]).square().sum(1)).sum())
        if cost < lowest:
            best, lowest = nearest, cost
    return _in_order(best)


def _in_order(clusters: Tensor) -> Tensor:
    """Clusters renumbered by first appearance, none empty."""
    numbers: dict[int, int] = {}
    listed = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters.tolist()]
    return torch.tensor(listed, dtype=torch.int64, device=clusters.device)


def _curves(evidence: Evidence, levels: Sequence[float]) -> Tensor:
    """Score quantiles of every row, without the conformal correction. float32 ``(R, L)``."""
    columns: list[Tensor] = []
    for value in levels:
        beyond = 1 - level(value)
        units = evidence.num_units.tolist()
        known = {n: floor(evidence.unit_mass * beyond * n) for n in set(units)}
        budgets = torch.tensor([known[n] for n in units], device=evidence.num_units.device)
        columns.append(evidence.store.thresholds(budgets))
    return torch.stack(columns, 1)
