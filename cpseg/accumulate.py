"""What calibration remembers: mergeable integer masses of scores, per row of thresholds.

A *row* is what gets one threshold: everything, a class, a region, a location. A *cell* is what a
score is remembered as. :class:`Histogram` has some fifty thousand cells per row and bounded
memory; :class:`Exact` has one cell per float32 and keeps only those that hold mass.
:class:`Evidence` gives every unit of a row the same mass, shared by its pixels, and holds units
whose tiles are still arriving in a ledger.

All state is int64, so any order of updates and merges gives the identical state.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from torch import Tensor

from cpseg.errors import InputError
from cpseg.merging import ADDED
from cpseg.quantile import UNIT_MASS, Level, budget, mass_above

__all__ = ["Evidence", "Exact", "Histogram"]

_BLOCK = 2**22  # cells of a histogram that are added up at once: 32 MB


def upward(scores: Tensor) -> Tensor:
    """The smallest float32 that is no smaller than each score. Shape of ``scores``.

    Examples:
        >>> upward(torch.tensor(0.1, dtype=torch.float64)).item() >= 0.1
        True
    """
    single = scores.float() + 0.0  # + 0.0 turns -0.0 into 0.0, so that equal scores are one cell
    if scores.dtype != torch.float64:
        return single
    above = single.nextafter(torch.full_like(single, torch.inf)) + 0.0
    return torch.where(single < scores, above, single)


def _ordered(scores: Tensor) -> Tensor:
    """float32 to int64 in ``[0, 2**32)``, order kept."""
    bits = scores.view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() + 2**31


def _unordered(cells: Tensor) -> Tensor:
    bits = (cells - 2**31).int()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)


@final
@dataclass(frozen=True, slots=True)
class HistogramScale:
    """Which cell a score belongs to; elementwise, so that it joins the kernel that scores.

    Attributes:
        low: Least score.
        high: Largest finite score.
    """

    low: float
    high: float
    half: float = field(init=False)
    least: float = field(init=False)
    first: int = field(init=False)
    num_cells: int = field(init=False)

    def __post_init__(self) -> None:
        half = float(np.float32(self.high) - np.float32(self.low)) / 2
        if not 0 < half < torch.inf:
            raise InputError(
                f"a histogram needs a finite range with low < high; got [{self.low}, {self.high}]. "
                'Use store="exact" for scores without one'
            )
        least = half * 2.0**-23
        ends = np.array([least, half], dtype=np.float32)
        first, last = (ends.view(np.int32) >> _DROPPED).tolist()
        fixed = {"half": half, "least": least, "first": first}
        # Both sides, and +inf.
        for name, value in {**fixed, "num_cells": 2 * (last - first + 1) + 1}.items():
            object.__setattr__(self, name, value)

    def fits(self, scores: Tensor) -> Tensor:
        """Whether each float32 score is in range, or ``+inf``. Bool."""
        return (scores.clamp(self.low, self.high) == scores) | (scores == torch.inf)

    def cells(self, scores: Tensor) -> Tensor:
        """The cell of each float32 score, anything for NaN. int32."""
        below, above = scores - self.low, self.high - scores
        nearest = torch.minimum(below, above).clamp(self.least, self.half)
        steps = _mantissa(nearest) - self.first
        # All bits set where the upper end is nearer: from there, steps count down.
        falling = (above - below).view(torch.int32) >> 31
        return (steps ^ falling) + (falling & self.num_cells - 1) + (scores == torch.inf).int()


@final
@dataclass(frozen=True, slots=True)
class ExactScale:
    """A cell for every float32."""

    @property
    def num_cells(self) -> int:
        """As many as there are float32."""
        return 2**32

    def fits(self, scores: Tensor) -> Tensor:
        """Any score but NaN and ``-inf``. Bool."""
        return scores > -torch.inf

    def cells(self, scores: Tensor) -> Tensor:
        """The bits of each float32 score, in order. int64."""
        return _ordered(scores)


@final
class Histogram:
    """Certified histogram: bounded memory, thresholds rounded outward by at most 0.1 %.

    Cells follow the bits of a score's distance to the nearer end of its range: ten bits of
    mantissa per power of two, down to ``2**-24`` of the range, and one more cell for ``+inf``.
    A threshold is the largest float32 of its cell, so it is never below the exact one, and above
    it by at most 0.1 % of the distance to the nearer end, or one float32 step of the range.

    Memory: 47,107 cells of 8 bytes, 377 kB, per row for a range such as [0, 1], whatever is
    added; finding thresholds takes some hundred MB besides, however many rows there are.

    Args:
        rows: Number of thresholds, R.
        low: Least score.
        high: Largest finite score.
        device: Where the counts live: ``8 * R * num_cells`` bytes.

    Raises:
        InputError: If the range is not finite, or empty.

    Examples:
        >>> histogram = Histogram(1, 0.0, 1.0)
        >>> cells = histogram.cells(torch.tensor([0.25, 0.5]))
        >>> histogram.add(cells, torch.tensor([3, 2]))
        >>> round(histogram.thresholds(torch.tensor([2])).item(), 3)
        0.25
    """

    def __init__(
        self, rows: int, low: float, high: float, device: torch.device | str = "cpu"
    ) -> None:
        self.scale: HistogramScale = HistogramScale(low, high)
        self.rows: int = rows
        self.num_cells: int = self.scale.num_cells
        self._lanes: int = _lanes(torch.device(device))
        room = rows * self.num_cells + 1 + (rows + 1) * (self._lanes - 1)
        self._held = torch.zeros(room, dtype=torch.int64, device=device)

    @property
    def mass(self) -> Tensor:
        """What every cell of every row holds, and what was thrown away. int64 ``(R * cells + 1,)``."""
        return self._held[: self.rows * self.num_cells + 1]

    def cells(self, scores: Tensor) -> Tensor:
        """The cell of each float32 score; a larger score never has a smaller cell. int64."""
        return self.scale.cells(scores).long()

    def edges(self, cells: Tensor) -> Tensor:
        """The largest float32 of each of these cells, by bisection on :meth:`cells`.

        Args:
            cells: int64 cells. Any shape.

        Returns:
            float32 scores, ``+inf`` for the last cell. Shape of ``cells``.
        """
        ends = torch.tensor([self.scale.low, self.scale.high], dtype=torch.float32)
        least, most = _ordered(ends).tolist()
        inside, outside = torch.full_like(cells, least), torch.full_like(cells, most + 1)
        for _ in range(33):  # more halvings than there are bits in a float32
            middle = (inside + outside) // 2
            fits = self.cells(_unordered(middle)) <= cells
            inside, outside = torch.where(fits, middle, inside), torch.where(fits, outside, middle)
        return torch.where(cells == self.num_cells - 1, torch.inf, _unordered(inside))

    def add(self, keys: Tensor, mass: Tensor) -> None:
        """Add mass at ``keys = row * num_cells + cell``; the key past the last is thrown away."""
        keys = self._spread(keys.reshape(-1).long())
        # Not index_add_, which takes half as long again where rows do not fit a cache.
        self._held.scatter_add_(0, keys, mass.reshape(-1))
        if self._lanes > 1:
            kept = self.mass
            lanes = self._held[len(kept) :].view(self.rows + 1, self._lanes - 1)
            kept[:: self.num_cells] += lanes.sum(1)
            lanes.zero_()

    def _spread(self, keys: Tensor) -> Tensor:
        """The same places, but for a row's first cell, where saturated logits score, and the last.

        Each of those is many places, lanes, where many threads would wait for each other at one.
        """
        if self._lanes == 1:
            return keys
        lane = torch.arange(len(keys), device=keys.device) % self._lanes
        beside = len(self.mass) + keys // self.num_cells * (self._lanes - 1) + lane - 1
        return torch.where((keys % self.num_cells == 0) & (lane > 0), beside, keys)

    def thresholds(self, budgets: Tensor) -> Tensor:
        """Per row, the smallest cell's edge with at most ``budgets`` above it. float32 ``(R,)``.

        A negative budget gives ``+inf``.
        """
        cells: list[Tensor] = []
        for mass, most in zip(self._blocks(), self._split(budgets), strict=True):
            total = mass.cumsum(1)
            over = total[:, -1:] - total
            cells.append((over > most[:, None]).sum(1).clamp(max=self.num_cells - 1))
        return torch.where(budgets < 0, torch.inf, self.edges(torch.cat(cells)))

    def above(self, thresholds: Tensor) -> Tensor:
        """Per row, the mass in cells above that of a float32 threshold. int64 ``(R,)``."""
        cell = torch.arange(self.num_cells, device=self.mass.device)
        blocks = zip(self._blocks(), self._split(self.cells(thresholds)), strict=True)
        return torch.cat([(mass * (cell > at[:, None])).sum(1) for mass, at in blocks])

    def _blocks(self) -> tuple[Tensor, ...]:
        """The masses, as many rows at once as memory for temporary copies allows."""
        return self._split(self.mass[:-1].view(self.rows, self.num_cells))

    def _split(self, per_row: Tensor) -> tuple[Tensor, ...]:
        rows = max(_BLOCK // self.num_cells, 1)
        return tuple(per_row[start : start + rows] for start in range(0, self.rows, rows))

    def pool(self, groups: Tensor, count: int) -> "Histogram":
        """Rows added up: row ``i`` goes to row ``groups[i]`` of ``count``, < 0 to none."""
        pooled = Histogram(count, self.scale.low, self.scale.high, self.mass.device)
        chosen = groups >= 0
        mass = self.mass[:-1].view(self.rows, self.num_cells)[chosen]
        pooled.mass[:-1].view(count, self.num_cells).index_add_(0, groups[chosen], mass)
        return pooled

    def state(self) -> dict[str, Tensor]:
        """The masses, under the name :class:`~cpseg.merging.Mergeable` has for what merging adds up."""
        return {f"mass{ADDED}": self.mass[:-1].clone()}

    def absorb(self, state: Mapping[str, Tensor]) -> None:
        """Add the :meth:`state` of a histogram of the same rows and range."""
        self.mass[:-1] += state[f"mass{ADDED}"].to(self.mass.device)


def _mantissa(distance: Tensor) -> Tensor:
    """Exponent and ten bits of mantissa of a positive float32. int32."""
    return distance.view(torch.int32) >> _DROPPED


_DROPPED = 13  # bits of a float32's mantissa that do not tell cells apart


@final
class Exact:
    """Every score that holds mass: one cell per float32, sparse and sorted.

    Sixteen bytes per distinct score and row.

    Args:
        rows: Number of thresholds, R.
        tail: If given, forget what can never be a threshold for a budget of at most ``tail``:
            entries with more than ``tail`` mass strictly above them. Mass above only grows, so
            what is forgotten stays irrelevant, whatever follows.
        device: Where the entries live.

    Examples:
        >>> exact = Exact(1)
        >>> exact.add(exact.cells(torch.tensor([0.25, 0.5])), torch.tensor([3, 2]))
        >>> exact.thresholds(torch.tensor([2])).item()
        0.25
    """

    num_cells: int = 2**32
    scale: ExactScale = ExactScale()

    def __init__(
        self, rows: int, tail: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.rows: int = rows
        self.tail: int | None = tail
        self._keys = torch.zeros(0, dtype=torch.int64, device=device)
        self._mass = torch.zeros(0, dtype=torch.int64, device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._num_waiting = 0

    def cells(self, scores: Tensor) -> Tensor:
        """The cell of each float32 score: its bits in order. int64."""
        return self.scale.cells(scores)

    def add(self, keys: Tensor, mass: Tensor) -> None:
        """Add mass at ``keys = row * num_cells + cell``; the key past the last is thrown away."""
        self._waiting.append((keys.reshape(-1), mass.expand_as(keys).reshape(-1)))
        self._num_waiting += keys.numel()
        if self._num_waiting > max(2**22, len(self._keys)):
            self._settle()

    def _settle(self) -> None:
        keys = torch.cat([self._keys, *(keys for keys, _ in self._waiting)])
        mass = torch.cat([self._mass, *(mass for _, mass in self._waiting)])
        self._waiting, self._num_waiting = [], 0
        self._keys, index = torch.unique(keys, sorted=True, return_inverse=True)
        self._mass = torch.zeros_like(self._keys).index_add(0, index, mass)
        keep = self._keys < self.rows * self.num_cells
        if self.tail is not None:
            keep &= mass_above(self._keys // self.num_cells, self._mass) <= self.tail
        self._keys, self._mass = self._keys[keep], self._mass[keep]

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, score and mass of every entry, by row, then score. Each ``(N,)``."""
        if self._waiting:
            self._settle()
        rows = self._keys // self.num_cells
        return rows, _unordered(self._keys - rows * self.num_cells), self._mass

    def thresholds(self, budgets: Tensor) -> Tensor:
        """Per row, the smallest score with at most ``budgets`` above it. float32 ``(R,)``.

        A negative budget gives ``+inf``.
        """
        rows, scores, mass = self.entries()
        within = mass_above(rows, mass) <= budgets[rows]
        least = scores.new_full((self.rows,), torch.inf)
        least.scatter_reduce_(0, rows[within], scores[within], "amin")
        return torch.where(budgets < 0, torch.inf, least)

    def above(self, thresholds: Tensor) -> Tensor:
        """Per row, the mass of scores above a float32 threshold. int64 ``(R,)``."""
        rows, scores, mass = self.entries()
        over = mass * (scores > thresholds[rows])
        return torch.zeros(self.rows, dtype=torch.int64, device=mass.device).index_add(
            0, rows, over
        )

    def pool(self, groups: Tensor, count: int) -> "Exact":
        """Rows added up: row ``i`` goes to row ``groups[i]`` of ``count``, < 0 to none."""
        rows, scores, mass = self.entries()
        chosen = groups[rows] >= 0
        pooled = Exact(count, self.tail, mass.device)
        keys = groups[rows[chosen]] * self.num_cells + self.cells(scores[chosen])
        pooled.add(keys, mass[chosen])
        return pooled

    def state(self) -> dict[str, Tensor]:
        """Keys and masses, sorted."""
        self.entries()
        return {"keys": self._keys.clone(), "mass": self._mass.clone()}

    def absorb(self, state: Mapping[str, Tensor]) -> None:
        """Add the :meth:`state` of a store of the same rows."""
        device = self._keys.device
        # A copy: what waits to be sorted in must not change with the caller's state.
        self.add(state["keys"].to(device, copy=True), state["mass"].to(device, copy=True))


@final
class Evidence:
    """Scores with mass 1 per unit and row, shared by the unit's pixels in that row.

    Args:
        store: Where closed units go.
        by_unit: True: a pixel of unit i and row g weighs ``ceil(UNIT_MASS / m_ig)``. False: every
            pixel weighs 1, and is a unit.
    """

    def __init__(
        self, store: Histogram | Exact, *, by_unit: bool, device: torch.device | str
    ) -> None:
        self.store: Histogram | Exact = store
        self.by_unit: bool = by_unit
        self.unit_mass: int = UNIT_MASS if by_unit else 1
        self.num_units: Tensor = torch.zeros(store.rows, dtype=torch.int64, device=device)
        self.num_pixels: Tensor = torch.zeros(store.rows, dtype=torch.int64, device=device)
        # Tiles of units that are still open: keys and how many pixels each has seen.
        self._open: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def open_ids(self) -> list[int]:
        """Ids of the units in the ledger."""
        return sorted(self._open)

    def add(
        self,
        cells: Tensor,
        rows: Tensor | None,
        pixels: Tensor,
        unit_ids: Sequence[int] | None,
    ) -> None:
        """Add one batch.

        Args:
            cells: Cells of the labels' scores, ``num_cells`` where a pixel does not count. Integers
                ``(B, N)``.
            rows: The row of each pixel, R or more where it does not count; None: there is one.
                Integers ``(B, N)``.
            pixels: How many pixels of each batch entry count in each row. int64 ``(B, R)``.
            unit_ids: The unit of each batch entry, which stays open; None: each is one unit.
        """
        batch, size = cells.shape
        if unit_ids is not None:
            found = self._keys(cells, rows).long()
            for held, unit in zip(found, unit_ids, strict=True):
                self._hold(unit, *torch.unique(held, return_counts=True))
            return
        self._count(pixels)
        share = _share(pixels) if self.by_unit else torch.ones_like(pixels)
        # One more row, for pixels that do not count.
        share = torch.cat((share, torch.zeros_like(share[:, :1])), 1)
        for images, part in cuts(batch, size, cells.device):
            cell = cells[images, part].long()
            if rows is None:
                self.store.add(cell, share[images, :1].expand(cell.shape))
                continue
            row = rows[images, part].clamp(max=self.store.rows).long()
            self.store.add(self._keys(cell, row), share[images].gather(1, row))

    def _keys(self, cells: Tensor, rows: Tensor | None) -> Tensor:
        """Where in the store each pixel's mass goes; the last place is for what does not count."""
        if rows is None:
            return cells
        keys = torch.add(cells.long(), rows, alpha=self.store.num_cells)
        return keys.clamp_(max=self.store.rows * self.store.num_cells)

    def _hold(self, unit: int, keys: Tensor, counts: Tensor) -> None:
        seen = keys < self.store.rows * self.store.num_cells
        keys, counts = keys[seen], counts[seen]
        if unit in self._open:
            keys = torch.cat((self._open[unit][0], keys.to(self.num_units.device)))
            counts = torch.cat((self._open[unit][1], counts.to(self.num_units.device)))
            keys, index = torch.unique(keys, sorted=True, return_inverse=True)
            counts = torch.zeros_like(keys).index_add(0, index, counts)
        self._open[unit] = keys, counts

    def _count(self, pixels: Tensor) -> None:
        """Take note of units with these many pixels per row. int64 ``(units, R)``."""
        self.num_pixels += pixels.sum(0)
        self.num_units += (pixels > 0).sum(0) if self.by_unit else pixels.sum(0)

    def close(self, unit_ids: Iterable[int]) -> None:
        """Move those of these units that are open into the store: their counts are final."""
        for unit in unit_ids:
            if unit not in self._open:
                continue
            keys, counts = self._open.pop(unit)
            rows = keys // self.store.num_cells
            pixels = torch.zeros_like(self.num_pixels).index_add(0, rows, counts)
            self._count(pixels[None])
            self.store.add(keys, counts * _share(pixels)[rows])

    def budgets(self, alphas: Sequence[Level]) -> Tensor:
        """Most mass above each row's threshold at its alpha; negative: none is finite. ``(R,)``."""
        pairs = list(zip(alphas, self.num_units.tolist(), strict=True))
        known = {pair: budget(*pair, self.unit_mass) for pair in set(pairs)}
        budgets = [known[pair] for pair in pairs]
        return torch.tensor(budgets, dtype=torch.int64, device=self.num_units.device)

    def quantiles(self, alphas: Sequence[Level]) -> Tensor:
        """Each row's conformal threshold at its alpha. float32 ``(R,)``."""
        return self.store.thresholds(self.budgets(alphas))

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors: the same for any order of the same updates and merges."""
        held = [self._open[unit] for unit in self.open_ids]
        empty = self.num_units[:0]
        return {
            "num_units": self.num_units.clone(),
            "num_pixels": self.num_pixels.clone(),
            "open_ids": torch.tensor(self.open_ids, dtype=torch.int64),
            "open_sizes": torch.tensor([len(keys) for keys, _ in held], dtype=torch.int64),
            "open_keys": torch.cat([empty, *(keys for keys, _ in held)]),
            "open_counts": torch.cat([empty, *(counts for _, counts in held)]),
            **self.store.state(),
        }

    def absorb(self, state: Mapping[str, Tensor]) -> None:
        """Add the :meth:`state` of evidence of the same kind, open units included."""
        device = self.num_units.device
        self.store.absorb(state)
        self.num_units += state["num_units"].to(device)
        self.num_pixels += state["num_pixels"].to(device)
        sizes = state["open_sizes"].tolist()
        keys = _split(state["open_keys"].to(device), sizes)
        counts = _split(state["open_counts"].to(device), sizes)
        for unit, held, pixels in zip(state["open_ids"].tolist(), keys, counts, strict=True):
            self._hold(unit, held, pixels)


def _split(values: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(torch.split_with_sizes(values, list(sizes)))


def cuts(batch: int, size: int, device: torch.device) -> list[tuple[slice, slice]]:
    """Images and pixels that fit a core's cache and lie next to each other: some whole or one's."""
    step = _PART_PIXELS.get(device.type, 2**24)
    images = max(step // max(size, 1), 1)
    firsts, starts = range(0, batch, images), range(0, size, step)
    return [(slice(b, b + images), slice(i, i + step)) for b in firsts for i in starts]


_PART_PIXELS = {"cpu": 2**15}


def occurrences(values: Tensor, count: int) -> Tensor:
    """How often each entry has each of ``count`` values. ``(B, N)`` to int64 ``(B, count)``."""
    batch, size = values.shape
    lanes = _lanes(values.device)
    found = torch.zeros((batch, count * lanes), dtype=torch.int64, device=values.device)
    one = torch.ones((), dtype=torch.int64, device=values.device)
    for images, part in cuts(batch, size, values.device):
        index = values[images, part].long()
        if lanes > 1:
            lane = torch.arange(index.shape[1], device=index.device) % lanes
            index = index * lanes + lane
        found[images].scatter_add_(1, index, one.expand(index.shape))
    return found.view(batch, count, lanes).sum(2)


def _lanes(device: torch.device) -> int:
    """How many places a cell that most pixels share is, where many threads add at once."""
    return _LANES.get(device.type, 1)


_LANES = {"cuda": 32}  # as many as threads that go in step


def _share(pixels: Tensor) -> Tensor:
    """Mass of one of ``pixels`` pixels of a unit: rounded up, so that it can only raise."""
    return -(-UNIT_MASS // pixels.clamp(min=1))
