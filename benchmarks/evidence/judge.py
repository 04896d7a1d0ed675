"""What thresholds cover on frames: scores computed once, calibrators summed from states of frames.

A labeled budget of n frames is all a way of calibrating gets. What is fitted before calibration
(fallbacks, clusters) is fitted on half of it.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from frames import Frames
from torch import Tensor

from cpseg import (
    APS,
    LAC,
    Calibration,
    ClassConditionalCalibrator,
    GroupCalibrator,
    LocationCalibrator,
    SplitCalibrator,
)
from cpseg.calibrators import LocationClusters
from cpseg.errors import InputError
from cpseg.protocols import Score
from cpseg.tuning import GroupClusters, InterpolatedQuantile, annuli, cluster_locations

ALPHAS = (0.05, 0.1)
SCORES: dict[str, Score] = {"LAC": LAC(), "APS": APS()}
BANDS = 3
Make = Callable[..., Any]


# --- what was covered -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """Thresholds, their axes, and, if they are for groups of pixels, the group of each ``(P,)``."""

    thresholds: np.ndarray
    axes: tuple[str, ...]
    places: np.ndarray


NOWHERE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Coverage:
    """Of frames: share covered ``(N,)``, by class ``(N, C)``, NaN where absent; set size ``(N,)``.

    Thresholds of groups of pixels also have it by group (and class) ``(N, G)``; others by none.
    """

    of_images: np.ndarray
    of_classes: np.ndarray
    sizes: np.ndarray
    of_groups: np.ndarray

    def __getitem__(self, chosen: list[int]) -> "Coverage":
        return Coverage(
            self.of_images[chosen],
            self.of_classes[chosen],
            self.sizes[chosen],
            self.of_groups[chosen],
        )

    def summary(self) -> tuple[float, np.ndarray, np.ndarray, float]:
        """Mean over images; of each class and group, over images that show it; mean set size."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a class that no frame contains
            by_class, by_group = np.nanmean(self.of_classes, 0), np.nanmean(self.of_groups, 0)
        return float(np.nanmean(self.of_images)), by_class, by_group, float(self.sizes.mean())


class Judge:
    """Scores of all frames, computed once; thresholds are held against them.

    A frame's pixels are sorted by label, so that coverage is a sum over neighbors. Set sizes are
    taken at every fourth pixel of every fourth row.
    """

    def __init__(self, frames: Frames, name: str) -> None:
        score = SCORES[name]
        count, classes = frames.logits.shape[:2]
        labels = frames.labels.flatten(1)
        place = labels.argsort(stable=True, dim=1)
        known = labels.gather(1, place) < classes
        self.pixel = place[known].numpy()  # in its frame
        self.label = labels.gather(1, place)[known].numpy()
        own = score.of_labels(frames.logits, frames.labels * (frames.labels < classes))
        self.scores = own.flatten(1).gather(1, place)[known].numpy()
        self.frame = torch.arange(count)[:, None].expand_as(labels)[known].numpy()
        self.counts = np.bincount(
            self.frame * classes + self.label, minlength=count * classes
        ).reshape(count, classes)
        self.starts = np.concatenate(([0], self.counts.ravel().cumsum()[:-1]))
        self.sample = np.arange(labels.shape[1]).reshape(frames.labels.shape[1:])[::4, ::4].ravel()
        self.thin = score(frames.logits[:, :, ::4, ::4]).flatten(2).numpy()
        self.sorted = [np.sort(part) for part in np.split(self.scores, self.starts[1:])]
        self.sorted_thin = np.sort(self.thin, axis=2)
        self.classes = classes

    def coverages(self, held: Sequence[Limits]) -> Iterator[Coverage]:
        """Of every frame, at many thresholds for the same axes."""
        if held[0].axes in ((), ("class",)):
            return self._by_rank([limits.thresholds for limits in held])
        return (self._by_place(limits) for limits in held)

    def coverage(self, limits: Limits) -> Coverage:
        """Of every frame."""
        return next(self.coverages([limits]))

    def _by_rank(self, thresholds: Sequence[np.ndarray]) -> Iterator[Coverage]:
        """Thresholds ``(1,)`` or ``(C,)``: ranks in sorted scores, all at once."""
        limits = np.stack([np.broadcast_to(each, self.classes) for each in thresholds], 1)
        frames = len(self.counts)
        sums = np.zeros((len(thresholds), frames, self.classes))
        inside = np.zeros((len(thresholds), frames))
        for frame in range(frames):
            for label in range(self.classes):
                part = self.sorted[frame * self.classes + label]
                sums[:, frame, label] = np.searchsorted(part, limits[label], side="right")
                thin = self.sorted_thin[frame, label]
                inside[:, frame] += np.searchsorted(thin, limits[label], side="right")
        for each, size in zip(sums, inside, strict=True):
            yield self._shares(each, size, np.empty((frames, 0)))

    def _by_place(self, limits: Limits) -> Coverage:
        """Thresholds that differ between pixels."""
        match limits.axes:
            case ("group",):
                limit = np.take(limits.thresholds, limits.places).reshape(1, -1)
            case ("group", "class"):
                limit = np.take(limits.thresholds, limits.places, axis=0).T
            case _:
                limit = limits.thresholds.reshape(1, -1)
        own = limit[0, self.pixel] if len(limit) == 1 else limit[self.label, self.pixel]
        held = (self.scores <= own).astype(np.uint8)
        nonempty = self.counts.ravel() > 0
        sums = np.zeros(self.counts.size)
        sums[nonempty] = np.add.reduceat(held, self.starts[nonempty], dtype=np.int64)
        inside = np.count_nonzero(self.thin <= limit[:, self.sample], axis=(1, 2))
        group, groups = limits.places[self.pixel], int(limits.places.max()) + 1
        if "class" in limits.axes:
            group, groups = group * self.classes + self.label, groups * self.classes
        cell, cells = self.frame * groups + group, len(self.counts) * groups
        with np.errstate(invalid="ignore"):
            of_groups = np.bincount(cell, held, cells) / np.bincount(cell, minlength=cells)
        return self._shares(sums.reshape(self.counts.shape), inside, of_groups.reshape(-1, groups))

    def _shares(self, sums: np.ndarray, inside: np.ndarray, of_groups: np.ndarray) -> Coverage:
        with np.errstate(invalid="ignore"):
            of_images, of_classes = sums.sum(1) / self.counts.sum(1), sums / self.counts
        return Coverage(of_images, of_classes, inside / self.thin.shape[2], of_groups)

    def of_one(self, threshold: float, index: int) -> tuple[float, float]:
        """Coverage and set size of one frame at one threshold."""
        first = self.starts[index * self.classes]
        count = int(self.counts[index].sum())
        held = self.scores[first : first + count] <= np.float32(threshold)
        size = np.count_nonzero(self.thin[index] <= np.float32(threshold)) / self.thin.shape[2]
        return float(held.mean()) if count else np.nan, size


class Stock:
    """One calibrator state per frame, from which that of any frames together is summed."""

    SPARSE = ("own.mass+", "pooled.mass+")

    def __init__(self, make: Make, frames: Frames, groups: Tensor | None = None) -> None:
        self.kind: Any = type(make())
        beside = () if groups is None else (groups,)
        self.states: list[dict[str, Any]] = []
        for index in range(len(frames)):
            one = make().update(
                frames.logits[index : index + 1], frames.labels[index : index + 1], *beside
            )
            state = one.state_dict()
            for name in self.SPARSE:
                if name in state:
                    self.size = {**getattr(self, "size", {}), name: len(state[name])}
                    keys = state[name].nonzero()[:, 0]
                    state[name] = keys.int(), state[name][keys]
            self.states.append(state)

    def of(self, chosen: list[int]) -> Any:
        """The calibrator that has seen these frames."""
        states = [self.states[index] for index in chosen]
        total = dict(states[0])
        for name, first in total.items():
            held = [state[name] for state in states]
            if name in self.SPARSE:
                mass = torch.zeros(self.size[name], dtype=torch.int64)
                keys = torch.cat([keys for keys, _ in held])
                total[name] = mass.index_add_(0, keys, torch.cat([mass for _, mass in held]))
            elif name == "max_share":
                total[name] = torch.stack(held).amax(0)
            elif name == "anonymous" or (isinstance(first, Tensor) and len(first)):
                total[name] = sum(held)
        return self.kind.from_state_dict(total)


# --- which ways of calibrating --------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A calibrator, its unit, and what is done for groups with too few images."""

    group: str
    unit: str
    fallback: str
    score: str

    @property
    def told(self) -> dict[str, object]:
        names = {"group": self.group, "unit": self.unit}
        return {**names, "fallback": self.fallback, "score": self.score}

    @property
    def halves(self) -> bool:
        """Whether half of the budget is spent before calibration."""
        return self.fallback in ("interpolated", "clusters") or self.group == "4 fitted clusters"


class Bench:
    """Frames, with everything that is computed once."""

    def __init__(self, frames: Frames) -> None:
        self.frames = frames
        self.shape = tuple(frames.labels.shape[1:])
        rows = torch.arange(self.shape[0]) * BANDS // self.shape[0]
        self.bands = rows[:, None].expand(self.shape).contiguous()
        self.judge = cache(lambda score: Judge(frames, score))
        self.stock = cache(self._stock)

    def _make(self, group: str, unit: str, score: str) -> tuple[Make, bool]:
        """How to make the calibrator, and whether it is updated with bands."""
        shared: dict[str, Any] = {"score": SCORES[score], "unit": unit}
        classes = len(self.frames.classes)
        match group:
            case "none":
                return partial(SplitCalibrator, **shared), False
            case "class":
                return partial(ClassConditionalCalibrator, classes, **shared), False
            case "4 rings":
                return partial(
                    LocationCalibrator, self.shape, annuli(self.shape, 4), **shared
                ), False
            case "3 bands":
                return partial(GroupCalibrator, BANDS, **shared), True
            case "3 bands x class":
                return partial(GroupCalibrator, BANDS, classes, **shared), True
            case _:
                return partial(LocationCalibrator, self.shape, **shared), False

    def _stock(self, group: str, unit: str, score: str) -> Stock:
        make, banded = self._make(group, unit, score)
        return Stock(make, self.frames, self.bands if banded else None)

    def seen(self, way: Way, chosen: list[int]) -> Any:
        """The calibrator that has seen these frames, and what it needs was fitted before."""
        if way.group not in ("location", "4 fitted clusters"):
            return self.stock(way.group, way.unit, way.score).of(chosen)
        make = self._make(way.group, way.unit, way.score)[0]
        half = chosen[: len(chosen) // 2]
        logits, labels = self.frames.logits, self.frames.labels
        if way.group == "4 fitted clusters":
            found = cluster_locations(make().update(logits[half], labels[half]), 4)
            make = partial(make, clusters=found)
            chosen = chosen[len(half) :]
        return make().update(logits[chosen], labels[chosen])

    def limits(self, way: Way, chosen: list[int]) -> Iterator[tuple[float, Limits]]:
        """Of each level at which the budget affords what the way needs."""
        fallback: Any = {"none": None}.get(way.fallback, way.fallback)
        if way.fallback in ("interpolated", "clusters"):
            half, rest = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
            tuning, seen = self.seen(way, half), self.seen(way, rest)
        else:
            seen = self.seen(way, chosen)
        for alpha in ALPHAS:
            try:
                if way.fallback == "interpolated":
                    fallback = InterpolatedQuantile.fit(tuning, alpha)
                elif way.fallback == "clusters":
                    fallback = GroupClusters.fit(tuning)
            except InputError:  # the half has no finite pooled threshold
                continue
            yield alpha, self.limits_of(seen, seen.compute(alpha, fallback))

    def limits_of(self, seen: Any, made: Calibration) -> Limits:
        """Of a calibrator and what it computed."""
        match seen:
            case GroupCalibrator():
                places = self.bands.flatten().numpy()
            case LocationCalibrator(clusters=None):
                places = np.arange(self.bands.numel())
            case LocationCalibrator(clusters=LocationClusters(map=found)):
                places = found.flatten().numpy()
            case _:
                places = NOWHERE
        return Limits(made.thresholds.numpy(), made.axes, places)
