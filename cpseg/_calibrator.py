"""What the four calibrators share: everything but which row of thresholds a pixel belongs to.

Calibrators are accumulators: ``update`` and ``merge`` in any order and any cut give the identical
state, and ``compute`` changes nothing. Values are checked without waiting for the device: labels
out of range, unusable logits, scores outside their range and groups out of range are counted at
labeled pixels and raise at ``compute``, with the counts.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol, Self, cast, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg._pixels import FAULTS, NUM_CODES, Pixels
from cpseg.accumulate import (
    Evidence,
    Exact,
    ExactScale,
    Histogram,
    HistogramScale,
    occurrences,
    upward,
)
from cpseg.calibration import Calibration, call_of, describe_score, score_from_description
from cpseg.errors import CpsegError, InputError, StateError
from cpseg.protocols import Score
from cpseg.quantile import MAX_UNITS, UNIT_MASS, Level, budget, level
from cpseg.scores import score_columns

Unit = Literal["image", "pixel"]
Store = Literal["histogram", "exact"]
# score, unit, store, ignore_index, source, compiled
Shared = tuple[Score, Unit, Store, int, str | None, bool]


@final
@dataclass(frozen=True, slots=True)
class Origin:
    """What something fitted remembers of the calibrator it was fitted on.

    Attributes:
        data: Fingerprint of what that calibrator had seen.
        score: Its score, as text.
        unit: What it counted, ``"image"`` or ``"pixel"``.
        axes: What its thresholds belong to.
    """

    data: str
    score: str
    unit: str
    axes: tuple[str, ...]


class Fallback(Protocol):
    """Thresholds for groups with too few units, fitted on a split of its own.

    See :mod:`cpseg.tuning`.
    """

    @property
    def fitted_on(self) -> Origin:
        """The ``origin`` of the calibrator it was fitted on."""
        ...

    def thresholds(self, own: Evidence, pooled: Evidence, alphas: Sequence[Level], /) -> Tensor:
        """One threshold per group, used where the group's own is ``+inf``. float32 ``(R,)``."""
        ...


@final
@dataclass(frozen=True, eq=False)
class LocationClusters:
    """Which locations share a threshold. Made by :mod:`cpseg.tuning`, or by hand.

    Attributes:
        map: Cluster of each location, int64 from 0. Shape ``(*S)``.
        fitted_on: What they were fitted on; None if on no data.

    Raises:
        InputError: If the map is no integer tensor, is empty or holds a negative number.
    """

    map: Tensor
    fitted_on: Origin | None = None

    def __post_init__(self) -> None:
        _checks.check_integers("map", self.map)
        if self.map.numel() == 0 or int(self.map.min()) < 0:
            raise InputError("map must hold clusters from 0, at least one")

    def __repr__(self) -> str:
        """One line, without the map."""
        shape = _checks.describe(self.map.shape)
        return f"LocationClusters({int(self.map.max()) + 1} clusters of {shape} locations)"


class AnyCalibrator:
    """What the four calibrators share: everything but which row a pixel belongs to."""

    axes: tuple[str, ...]
    score: Score
    unit: Unit
    store: Store
    ignore_index: int
    source: str | None
    compiled: bool
    num_classes: int | None
    _shape: tuple[int, ...]  # of the rows: what has a threshold of its own
    _seen: tuple[Evidence, Evidence] | None
    _faults: Tensor
    _max_share: Tensor
    _checksum: Tensor
    _anonymous: int  # units without an id, closed at once
    _open: set[int]
    _closed: set[int]
    _torn: bool  # an update was interrupted while it was adding
    _most_units: int = MAX_UNITS
    _tail_alpha: float | None = None
    _clustered: bool = False

    def __init__(
        self,
        axes: tuple[str, ...],
        rows: tuple[int, ...],
        shared: Shared,
        num_classes: int | None = None,
    ) -> None:
        score, unit, store, ignore_index, source, compiled = shared
        if unit not in ("image", "pixel"):
            raise InputError(f'unit must be "image" or "pixel"; got {unit!r}')
        if store not in ("histogram", "exact"):
            raise InputError(f'store must be "histogram" or "exact"; got {store!r}')
        if num_classes is not None:
            num_classes = _checks.check_integer("num_classes", num_classes, 1)
        ignore_index = _checks.check_integer("ignore_index", ignore_index)
        _checks.check_ignore_index(ignore_index, num_classes)
        if source is not None and not isinstance(cast("object", source), str):
            raise InputError(f"source must be text or None; got {_checks.kind_of(source)}")
        describe_score(score)  # refuses one that no state, file or merge could tell from another
        if store == "histogram" and score.range(num_classes or 2) is None:
            raise InputError(
                f'store must be "exact" for a score without a range; got "histogram" with {score!r}'
            )
        _checks.check_flag("compiled", compiled)
        self.axes, self._shape = axes, rows
        self.score = score
        self.unit = unit
        self.store = store
        self.ignore_index = ignore_index
        self.source = source
        self.compiled = compiled
        self.num_classes = num_classes
        self._declared_classes = num_classes
        self.reset()

    # --- seeing data ---

    def _see(
        self, logits: Tensor, labels: Tensor, rows: Tensor, unit_ids: Sequence[int] | Tensor | None
    ) -> Self:
        """Add a batch whose labels belong to ``rows``, int64 that broadcasts to ``(B, *S)``."""
        batch, classes, *space = logits.shape
        ids = self._admit(unit_ids, batch)
        if labels.numel() == 0:
            self._open.update(ids or ())
            return self
        _checks.check_ignore_index(self.ignore_index, classes)
        # State made inside a caller's inference mode could not be added to outside it.
        with torch.inference_mode(mode=False), torch.no_grad():
            scales = self._scales(classes)
            cells, *pooled_cells, places, mark = score_columns(
                lambda score: Pixels(score, scales, self.ignore_index),
                self.score,
                logits,
                (labels,),
                summed=True,
                compiled=self.compiled,
            )
            # From here on nothing is refused. If it is interrupted, nothing is computed from half.
            self._torn = True
            own, pooled = self._evidence(classes, logits.device)
            self._open.update(ids or ())
            home = own.num_units.device  # where the first batch was, or the state loaded
            cells, places = (part.to(home).reshape(batch, -1) for part in (cells, places))
            pixels = occurrences(places, classes + NUM_CODES)
            self._note(pixels, places.shape[1], mark.to(home))
            if own is not pooled or "group" in self.axes:
                placed, counted = self._rows(rows.to(home), places, pixels, (batch, *space))
                own.add(cells, placed, counted, ids)
            if own is not pooled or "group" not in self.axes:
                beside = pooled_cells[0].to(home).reshape(batch, -1) if pooled_cells else cells
                pooled.add(beside, None, pixels[:, :classes].sum(1, keepdim=True), ids)
        self._anonymous += batch if ids is None else 0
        self._torn = False
        return self

    def _note(self, pixels: Tensor, size: int, mark: Tensor) -> None:
        """Take note of faults, of classes' shares and of the data itself.

        Args:
            pixels: How many pixels of each entry have each class or code. ``(B, C + codes)``.
            size: How many pixels an entry has, N.
            mark: Of all pixels that count, added up. ``()``.
        """
        classes = len(self._max_share)
        self._faults[: len(FAULTS)] += pixels[:, classes + 1 :].sum(0)
        # Of all its pixels, void ones too: a nearly void image must not make a share of 1 plausible.
        share = pixels[:, :classes].double() / size
        self._max_share = self._max_share.maximum(share.amax(0))
        # Order-free: a wrapped sum over the pixels.
        self._checksum += torch.stack((pixels[:, :classes].sum(), mark))

    def _rows(
        self, rows: Tensor, places: Tensor, pixels: Tensor, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Each pixel's row, the number of rows or more where it does not count, and their counts.

        Args:
            rows: Of what lies beside classes, int64 that broadcasts to ``shape``.
            places: Each pixel's class or code. ``(B, N)``.
            pixels: Their counts. ``(B, C + codes)``.
            shape: ``(B, *S)``.
        """
        classes = len(self._max_share)
        if self.axes == ("class",):
            return places, pixels[:, :classes]
        held = prod(self._shape)
        rows = rows.expand(shape).reshape(places.shape)
        counts = places < classes
        if "group" in self.axes:  # any other row is there if the label is a class
            placed = (rows >= 0) & (rows < held)
            self._faults[-1] += (counts & ~placed).sum()
            counts &= placed
        rows = torch.where(counts, rows, held)
        return rows, occurrences(rows, held + 1)[:, :held]

    def _admit(self, unit_ids: Sequence[int] | Tensor | None, batch: int) -> list[int] | None:
        """The ids of a batch, checked before anything is changed."""
        self._refuse_half()
        if unit_ids is None:
            self._limit(self._anonymous + batch + len(self._open) + len(self._closed))
            return None
        if self.unit == "pixel":
            raise InputError('unit_ids must be None with unit="pixel": every pixel is a unit')
        ids = _checks.check_ids("unit_ids", unit_ids)
        if len(ids) != batch:
            raise InputError(f"unit_ids must have one id per batch entry, {batch}; got {len(ids)}")
        late = sorted(self._closed.intersection(ids))
        if late:
            raise StateError(
                f"unit_ids must not hold closed units; got {late[:5]}. "
                "Close a unit only after its last tile"
            )
        self._limit(self._anonymous + len(self._open.union(ids)) + len(self._closed))
        return ids

    def _refuse_half(self) -> None:
        if self._torn:
            raise StateError(
                "an update was interrupted, and half of its batch may be counted; "
                "start again from a new calibrator, or from a state saved before"
            )

    def _limit(self, units: int) -> None:
        bounded = self.unit == "image" or self._tail_alpha is not None
        if bounded and units > self._most_units:
            raise StateError(f"at most {self._most_units} units can be held; got {units}")

    def _evidence(self, classes: int, device: torch.device) -> tuple[Evidence, Evidence]:
        """What was seen: per row, and pooled over rows (the same object if there is one row)."""
        if self._seen is None:
            self.num_classes = classes
            rows = prod(self._shape)
            tail = self._tail_alpha
            mass = UNIT_MASS if self.unit == "image" else 1
            limit = None if tail is None else budget(tail, self._most_units, mass)
            self._faults = self._faults.to(device, copy=True)
            self._checksum = self._checksum.to(device, copy=True)
            self._max_share = torch.zeros(classes, dtype=torch.float64, device=device)
            own = self._empty(rows, limit, device)
            self._seen = own, own if rows == 1 else self._empty(1, None, device)
        return self._seen

    def _scales(self, classes: int) -> tuple[HistogramScale | ExactScale, ...]:
        """What scores are remembered as: per row, and pooled if that differs."""
        limits = self.score.range(classes)
        pooled: HistogramScale | ExactScale = ExactScale()
        if self.store == "histogram" and limits is not None:
            pooled = HistogramScale(*limits)
        own = ExactScale() if self._tail_alpha is not None else pooled
        return (own,) if own == pooled or prod(self._shape) == 1 else (own, pooled)

    def _empty(self, rows: int, tail: int | None, device: torch.device) -> Evidence:
        held: Histogram | Exact
        scale = self._scales(cast("int", self.num_classes))[0 if tail is not None else -1]
        if isinstance(scale, HistogramScale):
            held = Histogram(rows, scale.low, scale.high, device)
        else:
            held = Exact(rows, tail, device)
        return Evidence(held, by_unit=self.unit == "image", device=device)

    # --- the accumulator's algebra ---

    def close_units(self, ids: Iterable[int] | Tensor) -> Self:
        """Declare that no more tiles of these units will come.

        Args:
            ids: Ids that ``update`` was given and that are still open.

        Returns:
            The calibrator itself.

        Raises:
            InputError: If the ids are no integers.
            StateError: If an id is not open.
        """
        closing = _checks.check_ids("ids", ids)
        unknown = sorted(set(closing) - self._open)
        if unknown:
            raise StateError(f"ids must be open units; got {unknown[:5]}")
        for evidence in self._both():
            evidence.close(sorted(set(closing)))
        self._open -= set(closing)
        self._closed |= set(closing)
        return self

    def merge(self, other: Self) -> Self:
        """Add what another calibrator has seen, which stays as it is.

        Args:
            other: Made with the same arguments. A unit may be open in both; one that is closed
                in either must not be known to the other.

        Returns:
            The calibrator itself.

        Raises:
            InputError: If the two were made with different arguments or saw other classes.
            StateError: If a unit closed in one is known to the other, there are too many units
                together, or an update of either was interrupted.
        """
        if type(other) is not type(self):
            raise InputError(f"other must be a {type(self).__name__}; got {type(other).__name__}")
        self._refuse_half()
        mine, theirs = self._config(), other._config()
        for name in mine:
            if mine[name] != theirs[name]:
                wanted, given = self._told(name), other._told(name)
                raise InputError(
                    f"other must have {name} = {wanted} to be merged; got "
                    + (given if given != wanted else "another one")
                )
        seen = (self.num_classes, other.num_classes)
        if self._seen is not None and other._seen is not None and seen[0] != seen[1]:
            raise InputError(f"other must have seen {seen[0]} classes to be merged; got {seen[1]}")
        both = (self._closed & (other._closed | other._open)) | (self._open & other._closed)
        if both:
            raise StateError(
                f"a closed unit must be known to one calibrator only; got {sorted(both)[:5]} in two"
            )
        opened, closed = self._open | other._open, self._closed | other._closed
        self._limit(self._anonymous + other._anonymous + len(opened) + len(closed))
        return self._absorb(other.state_dict())

    def reset(self) -> Self:
        """Forget everything seen; returns the calibrator itself."""
        self.num_classes = self._declared_classes
        self._seen = None
        self._faults = torch.zeros(len(_FAULTS), dtype=torch.int64)
        self._max_share = torch.zeros(self.num_classes or 0, dtype=torch.float64)
        self._checksum = torch.zeros(2, dtype=torch.int64)
        self._anonymous = 0
        self._open = set()
        self._closed = set()
        self._torn = False
        return self

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors, numbers and strings: ``torch.save`` it, load ``weights_only``.

        Raises:
            StateError: If an update was interrupted.
        """
        self._refuse_half()
        state: dict[str, object] = {
            "kind": type(self).__name__,
            "version": _STATE_VERSION,
            "config": json.dumps(self._config()),
            "num_classes": self.num_classes,
            "anonymous": self._anonymous,
            "open": torch.tensor(sorted(self._open), dtype=torch.int64),
            "closed": torch.tensor(sorted(self._closed), dtype=torch.int64),
            "faults": self._faults.clone(),
            "max_share": self._max_share.clone(),
            "checksum": self._checksum.clone(),
        }
        for name, evidence in zip(_PARTS, self._both(), strict=False):
            state.update({f"{name}.{key}": value for key, value in evidence.state().items()})
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object], score: Score | None = None) -> Self:
        """The calibrator that gave this state.

        Args:
            state: What ``state_dict`` returned.
            score: The score, if it is one of your own.

        Returns:
            A new calibrator, on the device of the state's tensors.

        Raises:
            InputError: If the state is another class's or version's or is not whole, or the
                score is missing or another one.
        """
        if not isinstance(cast("object", state), Mapping):
            raise InputError(f"state must be a mapping; got {_checks.kind_of(state)}")
        if state.get("kind") != cls.__name__ or state.get("version") != _STATE_VERSION:
            raise InputError(
                f"state must be version {_STATE_VERSION} of a {cls.__name__}; "
                f"got version {state.get('version')} of {state.get('kind')}"
            )
        _check_state(state)
        try:
            return cls._from_config(json.loads(str(state["config"])), score)._absorb(state)
        except CpsegError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            told = str(error).splitlines()[0]
            raise InputError(
                f"state must be what state_dict returned; got one that does not fit: {told}"
            ) from error

    def _absorb(self, state: Mapping[str, object]) -> Self:
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        parts = {name: _under(name, tensors) for name in _PARTS}
        if parts["own"]:
            classes = cast("int", state["num_classes"])
            self._evidence(classes, tensors["max_share"].device)
            for part, name in zip(self._both(), _PARTS, strict=False):
                part.absorb(parts[name])
            self._max_share = self._max_share.maximum(
                tensors["max_share"].to(self._max_share.device)
            )
        self._faults += tensors["faults"].to(self._faults.device)
        self._checksum += tensors["checksum"].to(self._checksum.device)
        self._anonymous += cast("int", state["anonymous"])
        self._open |= set(tensors["open"].tolist())
        self._closed |= set(tensors["closed"].tolist())
        return self

    def _arguments(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "score": self.score,
            "unit": self.unit,
            "store": self.store,
            "ignore_index": self.ignore_index,
            "source": self.source,
        }

    def _config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain data."""
        return {**self._arguments(), "score": describe_score(self.score)}

    def _told(self, name: str) -> str:
        """One argument, for a message."""
        return repr(self._arguments()[name])

    def __repr__(self) -> str:
        """One line: how it was made, and how much it has seen."""
        made = ", ".join(f"{name}={self._told(name)}" for name in self._arguments())
        seen = self._anonymous + len(self._open) + len(self._closed)
        noun = "units" if self.unit == "image" else "images, whose pixels are the units"
        still = f", {len(self._open)} of them open" if self._open else ""
        return f"{type(self).__name__}({made}): {seen} {noun} seen{still}"

    @classmethod
    def _from_config(cls, config: dict[str, Any], score: Score | None) -> Self:
        arguments: dict[str, Any] = dict(config)
        arguments["score"] = score_from_description(config["score"], score)
        return cls(**arguments)

    def _both(self) -> tuple[Evidence, ...]:
        """The evidence there is, each once."""
        return () if self._seen is None else tuple(dict.fromkeys(self._seen))

    @property
    def fingerprint(self) -> str:
        """Identifies the data seen with this score, whatever unit and groups.

        A checksum over labeled pixels, of each one's label, that class's logit and its score.
        The very same data gives the same one, in any order; data that overlap do not.
        """
        pixels, bits = self._checksum.tolist()
        return f"{pixels:x}-{bits & (2**64 - 1):016x}"

    @property
    def origin(self) -> Origin:
        """What something fitted on this calibrator remembers of it."""
        score = call_of(describe_score(self.score))
        return Origin(self.fingerprint, score, self.unit, self.axes)

    # --- the result ---

    def evidence(self) -> tuple[Evidence, Evidence]:
        """What was seen, per group and pooled, with open units closed in a copy.

        Raises:
            InputError: If bad values were seen, with their counts.
            StateError: If an update was interrupted.
        """
        self._refuse_half()
        counts = self._faults.tolist()
        if any(counts):
            told = [
                f"{count} pixels {fault}"
                for count, fault in zip(counts, _FAULTS, strict=True)
                if count
            ]
            raise InputError(
                f"calibration data must be clean; got {', '.join(told)}. "
                "Fix the data and start from a new calibrator"
            )
        if not self._open and self._seen is not None:
            return self._seen
        closed = type(self)(**self._arguments())
        closed._absorb(self.state_dict()).close_units(self._open)
        return closed._evidence(self.num_classes or 1, self._faults.device)

    def compute(
        self,
        alpha: Level | Sequence[Level],
        fallback: Literal["pooled"] | Fallback | None = None,
    ) -> Calibration:
        """Thresholds for a level, any number of times, in any order; the state stays as it is.

        Args:
            alpha: Level strictly between 0 and 1, a float read as the decimal it prints as, or
                a fraction; one for all, or one per class where there is a class axis.
            fallback: What to do where too few units have a group for a finite threshold. None:
                ``+inf``, so that the group's classes stay in every set and the promise holds.
                ``"pooled"``: the threshold of all groups together. An object of
                :mod:`cpseg.tuning`, fitted on a split of its own. A fallback voids the promise
                for those groups, and the result lists them.

        Returns:
            The frozen calibration.

        Raises:
            InputError: If alpha or fallback does not fit, the fallback was fitted with another
                score or unit, for other axes or on this very data, or bad values were seen.
            StateError: If an update was interrupted.
        """
        alphas = self._alphas(alpha)
        if getattr(self.score, "fitted_on", None) == self.fingerprint:
            raise InputError(
                "score must be fitted on a split of its own; got one fitted on this very data"
            )
        own, pooled = self.evidence()
        exact = own.quantiles(alphas)
        starved = own.budgets(alphas) < 0
        name = None
        if fallback is not None:
            replacement = self._replacement(fallback, own, pooled, alphas)
            exact = torch.where(starved, replacement, exact)
            name = fallback if isinstance(fallback, str) else type(fallback).__name__
        # Another path to the same score may lie this far away, and must not lose the pixel.
        slack = self.score.tolerance(self.num_classes or 1)
        thresholds = upward(exact.double() + slack)
        replaced = starved & (name is not None)
        return Calibration(
            thresholds=self._lay_out(thresholds),
            axes=self.axes,
            alpha=tuple(float(level(value)) for value in alpha)
            if isinstance(alpha, Sequence)
            else float(level(alpha)),
            score=self.score,
            unit=self.unit,
            num_classes=self.num_classes,
            num_units=self._lay_out(own.num_units),
            num_pixels=self._lay_out(own.num_pixels),
            ignore_index=self.ignore_index,
            fallback=name,
            fallback_groups=self._lay_out(replaced),
            max_share=self._max_share.clone(),
            source=self.source,
            clustered=self._clustered,
        )

    def _alphas(self, alpha: Level | Sequence[Level]) -> list[Level]:
        """One level per row."""
        rows = prod(self._shape)
        if not isinstance(alpha, Sequence) and _checks.is_number(alpha):
            _checks.check_alpha(alpha)
            return [alpha] * rows
        _checks.check_alphas(alpha)
        levels = list(cast("Sequence[Level]", alpha))
        wanted = self._shape[-1] if self.axes[-1:] == ("class",) else None
        if wanted is None:
            raise InputError("alpha must be one number where thresholds have no class axis")
        if len(levels) != wanted:
            raise InputError(
                f"alpha must be one number or one per class, {wanted}; got {len(levels)}"
            )
        return levels * (rows // wanted)

    def _replacement(
        self,
        fallback: Literal["pooled"] | Fallback,
        own: Evidence,
        pooled: Evidence,
        alphas: list[Level],
    ) -> Tensor:
        if isinstance(fallback, str) and fallback == "pooled":
            known = {alpha: pooled.quantiles([alpha])[0] for alpha in set(alphas)}
            return torch.stack([known[alpha] for alpha in alphas])
        fitted = None if isinstance(fallback, type) else getattr(fallback, "fitted_on", None)
        if isinstance(fallback, str) or not isinstance(fitted, Origin):
            told = repr(fallback) if isinstance(fallback, str) else _checks.kind_of(fallback)
            raise InputError(
                f'fallback must be None, "pooled" or an object that cpseg.tuning fitted; got {told}'
            )
        check_origin("fallback", fitted, self)
        return fallback.thresholds(own, pooled, alphas)

    def _lay_out(self, per_row: Tensor) -> Tensor:
        """Rows in the shape that prediction uses."""
        return per_row.view(self._shape).clone()


_STATE_VERSION = 1
_PARTS = ("own", "pooled")
_FAULTS = (*FAULTS, "whose group is out of range")


def check_origin(name: str, fitted_on: Origin, calibrator: AnyCalibrator) -> None:
    """Refuse what was fitted in another way, or on the very data it would calibrate."""
    origin = calibrator.origin
    for part in ("score", "unit", "axes"):
        wanted, given = getattr(origin, part), getattr(fitted_on, part)
        if wanted != given:
            raise InputError(
                f"{name} must be fitted with {part} {wanted}, the calibrator's; got {given}"
            )
    if fitted_on.data == origin.data:
        whose = "their" if name.endswith("s") else "its"
        raise InputError(
            f"{name} must be fitted on a split of {whose} own; got what was fitted on this very data"
        )


def _check_state(state: Mapping[str, object]) -> None:
    """Refuse a state that lacks an entry, or holds one of another type."""
    plain = {"config": (str,), "num_classes": (int, type(None)), "anonymous": (int,)}
    for name in (*plain, "open", "closed", "faults", "max_share", "checksum"):
        if name not in state:
            raise InputError(f"state must hold {name!r}, as state_dict returned it; got none")
        if name in plain and not isinstance(state[name], plain[name]):
            raise InputError(f"state must hold plain {name!r}; got {_checks.kind_of(state[name])}")
        if name not in plain and not isinstance(state[name], Tensor):
            raise InputError(
                f"state must hold {name!r} as a tensor; got {_checks.kind_of(state[name])}"
            )
    for name, value in state.items():
        wanted = torch.float64 if name == "max_share" else torch.int64
        if isinstance(value, Tensor) and value.dtype != wanted:
            raise InputError(f"state must hold {name!r} as {wanted}; got {value.dtype}")


def check_batch(logits: Tensor, labels: Tensor, num_classes: int | None) -> None:
    """Metadata of one batch."""
    _checks.check_logits(logits, num_classes)
    _checks.check_labels(labels, logits)
    _checks.check_data("logits", logits)


def _under(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of one part of a state, without its prefix."""
    start = f"{part}."
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
