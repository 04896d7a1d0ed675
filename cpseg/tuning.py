"""What is fitted before calibration, on a split of its own: clusters and fallbacks.

Tuning data is never calibration data. Everything here is fitted from a calibrator that has seen
the tuning split, and remembers where it comes from: the score, the unit, and a checksum of the
data. A calibrator with another score or unit refuses it, and ``compute`` refuses it on the very
same data. Splits that only overlap are not found out: keeping them apart is up to you.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, prod
from typing import Self, cast, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.accumulate import Evidence
from cpseg.calibrators import (
    ClassConditionalCalibrator,
    GroupCalibrator,
    LocationCalibrator,
    LocationClusters,
    Origin,
)
from cpseg.errors import InputError
from cpseg.quantile import MAX_UNITS, Level, budget, level

__all__ = [
    "GroupClusters",
    "InterpolatedQuantile",
    "annuli",
    "cluster_locations",
]

_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@final
@dataclass(frozen=True, eq=False, slots=True)
class InterpolatedQuantile:
    """Between the pooled threshold and the largest score seen (after Ding et al., 2025).

    A group with too few units has the quantile ``+inf``. Its place takes the group's largest
    calibration score, ``cap`` if there is none, but at most ``cap`` and at least the pooled
    threshold. The fallback goes from the pooled threshold that share of the way there which
    ``weight`` says. The tuning split gives both: ``cap`` is the largest finite threshold there,
    of a group or pooled; ``weight`` is the smallest of 0, 0.05, ..., 1 at which the groups with
    a finite threshold above the pooled one, given the fallback instead, have ``(missed + 1) / (n
    + 1)`` of at most ``alpha`` on average. ``missed`` is the sum of a group's missed shares in
    its n units. Easier groups do not count: the pooled threshold serves them, and averaging them
    in would let it pass for the hard ones too (``benchmarks/fallbacks.py`` has both).

    Ding et al. interpolate for *every* class, rare or not, take 1 for ``+inf``, and leave the
    weight to the user. Here groups with a finite threshold keep it, and with it their promise.

    Guarantee:
        None; a heuristic. Groups that need it are listed by the calibration.

    Attributes:
        alpha: The one level it was fitted for, and serves.
        weight: Share of the way from the pooled threshold.
        cap: Largest finite threshold on the tuning split.
        fitted_on: The tuning calibrator.
    """

    alpha: float
    weight: float
    cap: float
    fitted_on: Origin

    @classmethod
    def fit(cls, tuning: ClassConditionalCalibrator | GroupCalibrator, alpha: Level) -> Self:
        """Choose cap and weight.

        Args:
            tuning: A calibrator that has seen the tuning split only, with the score, the unit
                and the groups of the one to come.
            alpha: The level at which it will be used.

        Returns:
            The fitted fallback.

        Raises:
            InputError: If tuning is another calibrator, alpha does not lie strictly between 0
                and 1, or the tuning split has no finite pooled threshold at alpha.
        """
        _check_tuning(tuning)
        own, pooled = tuning.evidence()
        base = pooled.quantiles([alpha])[0]
        if bool(base.isinf()):
            raise InputError(
                f"tuning must hold enough units for a finite pooled threshold at alpha = {alpha}; "
                f"got {int(pooled.num_units[0])}"
            )
        exact = own.quantiles([alpha] * own.store.rows)
        finite = exact.isfinite()
        cap = torch.cat((exact[finite], base[None])).max()
        hard = finite & (exact > base)
        units = own.num_units[hard].double()
        weight = 0.0
        for step in range(21):
            weight = step / 20
            trial = _toward(own, base, cap, weight)
            missed = own.store.above(trial)[hard].double() / own.unit_mass
            # The added one is the new unit's, as in risk control; weight 1 always suffices.
            if not bool(hard.any()) or float(((missed + 1) / (units + 1)).mean()) <= level(alpha):
                break
        return cls(float(level(alpha)), weight, float(cap), tuning.origin)

    def thresholds(self, own: Evidence, pooled: Evidence, alphas: Sequence[Level]) -> Tensor:
        """The fallback threshold of every group. float32 ``(R,)``.

        Raises:
            InputError: If a level is another than the one it was fitted for.
        """
        others = sorted({float(level(alpha)) for alpha in alphas} - {self.alpha})
        if others:
            raise InputError(
                f"alpha must be {self.alpha}, the one level for which the fallback was fitted; "
                f"got {', '.join(map(str, others))}. Fit another fallback for another level"
            )
        base = pooled.quantiles([self.alpha])[0]
        cap = torch.full_like(base, self.cap)
        return _toward(own, base, cap, self.weight)


def _toward(own: Evidence, base: Tensor, cap: Tensor, weight: float) -> Tensor:
    """From ``base``, ``weight`` of the way to each row's largest score, if that is higher."""
    largest = own.store.thresholds(torch.zeros_like(own.num_units))
    ends = torch.where(own.num_units > 0, largest.minimum(cap), cap).maximum(base)
    # Where base is +inf so is the end, and their difference is none.
    return torch.where(base.isinf(), base, base + weight * (ends - base))


def _check_tuning(tuning: object) -> None:
    if not isinstance(tuning, ClassConditionalCalibrator | GroupCalibrator):
        raise InputError(
            "tuning must be a ClassConditionalCalibrator or GroupCalibrator, which has groups; "
            f"got {_checks.kind_of(tuning)}"
        )


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
        fitted_on: The tuning calibrator.
    """

    assignment: Tensor
    fitted_on: Origin

    def __post_init__(self) -> None:
        _checks.check_integers("assignment", self.assignment)
        if self.assignment.ndim != 1 or self.assignment.numel() == 0:
            shape = _checks.describe(self.assignment.shape)
            raise InputError(f"assignment must have shape (R,), R >= 1; got {shape}")

    @classmethod
    def fit(
        cls,
        tuning: ClassConditionalCalibrator | GroupCalibrator,
        num_clusters: int | None = None,
        *,
        min_units: int = 5,
        seed: int = 0,
        levels: Sequence[Level] = _LEVELS,
    ) -> Self:
        """Find clusters.

        Args:
            tuning: A calibrator that has seen the tuning split only, with the score, the unit
                and the groups of the one to come.
            num_clusters: How many; by default one per four groups that are known well enough.
            min_units: Fewest tuning units of a group that is clustered.
            seed: Seed of k-means.
            levels: Levels of the score quantiles that are compared.

        Returns:
            The fitted clusters.

        Raises:
            InputError: If tuning is another calibrator, no group is known, or more clusters are
                wanted than groups are known.
        """
        _check_tuning(tuning)
        _check_levels(levels)
        min_units = _checks.check_integer("min_units", min_units, 1)
        own, _ = tuning.evidence()
        known = (own.num_units >= min_units).nonzero()[:, 0]
        if not len(known):
            raise InputError(
                f"tuning must hold a group with {min_units} units or more; got at most "
                f"{int(own.num_units.max())}. Lower min_units, or take a larger split"
            )
        wanted = max(len(known) // 4, 1)
        if num_clusters is not None:
            wanted = _checks.check_integer("num_clusters", num_clusters, 1)
        if wanted > len(known):
            raise InputError(
                f"num_clusters must be at most the {len(known)} groups with {min_units} tuning "
                f"units or more; got {wanted}"
            )
        weights = own.num_units[known].double().sqrt()
        curves = _curves(own, levels)[known].double()
        found = _kmeans(curves, wanted, weights=weights, seed=seed)
        assignment = torch.full_like(own.num_units, -1)
        assignment[known] = found
        return cls(assignment, tuning.origin)

    def thresholds(self, own: Evidence, pooled: Evidence, alphas: Sequence[Level]) -> Tensor:
        """The fallback threshold of every group. float32 ``(R,)``.

        Raises:
            InputError: If the groups are others, or too many pairs of an image and a group are in
                one cluster.
        """
        if len(self.assignment) != own.store.rows:
            raise InputError(
                f"fallback must be fitted for {own.store.rows} groups; got {len(self.assignment)}"
            )
        assignment = self.assignment.to(own.num_units.device, torch.int64)
        count = max(int(assignment.max()) + 1, 1)
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
        result = torch.empty(own.store.rows, dtype=torch.float32, device=assignment.device)
        for alpha in set(alphas):
            budgets = [
                floor(own.unit_mass * (level(alpha) * (n + k) - k))
                for n, k in zip(pairs.tolist(), members, strict=True)
            ]
            most = torch.tensor(budgets, dtype=torch.int64, device=assignment.device)
            shared = store.thresholds(most)
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
    levels: Sequence[Level] = (0.8, 0.85, 0.9, 0.95),
) -> LocationClusters:
    """Locations whose score quantiles are alike (k-means, after Kandinsky calibration, 2024).

    Args:
        tuning: A calibrator of single locations that has seen the tuning split only, with the
            score and unit of the one to come, made with ``max_alpha`` of at least one minus the
            lowest level: the defaults of both go together.
        num_clusters: How many.
        seed: Seed of k-means.
        levels: Levels of the score quantiles that are compared.

    Returns:
        Clusters for a :class:`~cpseg.LocationCalibrator`. Locations never labeled in the tuning
        split join the cluster with the highest quantiles.

    Raises:
        InputError: If tuning is another calibrator or has clusters itself, keeps too little of
            the tail, or has fewer labeled locations than clusters are wanted.
    """
    num_clusters = _checks.check_integer("num_clusters", num_clusters, 1)
    if not isinstance(cast("object", tuning), LocationCalibrator):
        raise InputError(f"tuning must be a LocationCalibrator; got {_checks.kind_of(tuning)}")
    if tuning.clusters is not None:
        raise InputError("tuning must be a calibrator of single locations; got one with clusters")
    _check_levels(levels)
    reach = max(1 - level(value) for value in levels)
    if reach > level(tuning.max_alpha):
        raise InputError(
            f"tuning must have max_alpha >= {float(reach)} for these levels; got {tuning.max_alpha}"
        )
    if budget(tuning.max_alpha, tuning.max_units) < 0:
        raise InputError(
            "tuning must keep a score per location, max_alpha * (max_units + 1) >= 1; got "
            f"max_alpha = {tuning.max_alpha} and max_units = {tuning.max_units}"
        )
    own, _ = tuning.evidence()
    known = (own.num_units > 0).nonzero()[:, 0]
    if num_clusters > len(known):
        raise InputError(
            f"num_clusters must be at most the {len(known)} labeled locations; got {num_clusters}"
        )
    curves = _curves(own, levels)[known].double()
    found = _kmeans(curves, num_clusters, seed=seed)
    total = torch.zeros(num_clusters, dtype=torch.float64, device=curves.device)
    total.index_add_(0, found, curves.mean(1))
    highest = (total / torch.bincount(found, minlength=num_clusters)).argmax()
    clusters = torch.full((prod(tuning.shape),), int(highest), device=found.device)
    clusters[known] = found
    return LocationClusters(clusters.view(tuning.shape), tuning.origin)


def annuli(shape: Sequence[int], rings: int) -> LocationClusters:
    """Rings around the center of the grid, with equally many locations each, up to ties.

    Args:
        shape: The grid, ``*S``; rings are ellipses with its proportions.
        rings: How many; ring 0 is the center.

    Returns:
        Clusters for a :class:`~cpseg.LocationCalibrator`.

    Raises:
        InputError: If shape is no grid, or there are more rings than different distances from
            the center.

    Examples:
        >>> annuli((3, 5), 2).map
        tensor([[1, 1, 0, 1, 1],
                [1, 0, 0, 0, 1],
                [1, 1, 0, 1, 1]])
    """
    shape, rings = _checks.check_shape("shape", shape), _checks.check_integer("rings", rings, 1)
    # In integers, so that what is symmetric stays so: twice the distance, times all sizes.
    axes = [(2 * torch.arange(size) + 1 - size) * (prod(shape) // size) for size in shape]
    squared = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0)
    ordered = squared.flatten().sort().values
    edges = ordered[torch.arange(1, rings) * len(ordered) // rings]
    ring = torch.searchsorted(edges, squared.contiguous(), right=True)
    if len(torch.unique(ring)) != rings:
        raise InputError(f"rings must be fewer for a grid {_checks.describe(shape)}; got {rings}")
    return LocationClusters(ring)


def _kmeans(
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
        >>> _kmeans(torch.tensor([[0.0], [5.0], [0.1], [5.1]]), 2)
        tensor([0, 1, 0, 1])
    """
    generator = torch.Generator().manual_seed(seed)
    weights = points.new_ones(len(points)) if weights is None else weights.to(points)
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


def _check_levels(levels: Sequence[Level]) -> None:
    if not isinstance(cast("object", levels), list | tuple) or not levels:
        raise InputError(f"levels must be a list of numbers between 0 and 1; got {levels!r}")
    for value in levels:
        _checks.check_alpha(value, "levels")


def _curves(evidence: Evidence, levels: Sequence[Level]) -> Tensor:
    """Conformal thresholds of every row, its largest score where none is. float32 ``(R, L)``.

    The budgets are those of calibration, since a store may have forgotten all below them.
    """
    columns: list[Tensor] = []
    for value in levels:
        budgets = evidence.budgets([1 - level(value)] * evidence.store.rows)
        columns.append(evidence.store.thresholds(budgets.clamp(min=0)))
    return torch.stack(columns, 1)
