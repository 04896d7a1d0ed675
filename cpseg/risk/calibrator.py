"""Held-out batches to the best threshold whose risk can be controlled, and where tests begin."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg._pixels import data_mark
from cpseg.accumulate import upward
from cpseg.bounds import PValue, betting
from cpseg.calibration import Calibration, Control, describe_score, score_from_description
from cpseg.errors import InputError
from cpseg.protocols import Score
from cpseg.quantile import MAX_UNITS
from cpseg.risk._certifying import Asked, Found, certified, checked_losses
from cpseg.risk._counting import flattened, occurrences
from cpseg.risk._record import describe_risk, risk_from_description
from cpseg.risk._rules import rule_name
from cpseg.risk.grid import threshold_grid
from cpseg.risk.losses import Batch, Losses, Risk
from cpseg.scores import LAC

__all__ = ["RiskCalibrator", "Start"]

_BY_LOT = "the order of the tests, a hash of seed and data, as good as drawn by lot"


@final
@dataclass(frozen=True, eq=False, slots=True)
class Start:
    """Where tests begin. Fitted on a split of its own, or set by hand without any data.

    Attributes:
        thresholds: One, or one per class. float32 ``(1,)`` or ``(C,)``.
        fitted_on: Fingerprint of the tuning data; None if on no data.
    """

    thresholds: Tensor
    fitted_on: str | None = None

    @classmethod
    def fit(cls, tuning: "RiskCalibrator", alpha: float) -> Self:
        """The threshold whose risk lies below alpha by the most standard errors.

        Args:
            tuning: A calibrator that has seen the tuning split only.
            alpha: The level at which it will be used.

        Returns:
            The start.

        Raises:
            InputError: If the tuning split is empty or holds bad values.
        """
        _checks.check_alpha(alpha)
        table, grid = tuning.table(), tuning.grid
        if grid is None:
            raise InputError("tuning must have seen data; got an empty calibrator")
        losses = tuning.risk.losses(table, alpha)
        chosen: list[int] = []
        for row in range(losses.values.shape[1]):
            values = losses.values[losses.counted[:, row], row]
            if len(values) == 0:
                chosen.append(0)
                continue
            # As if one more image had the largest variance that the mean alpha allows.
            spread = values.var(0, correction=0) + alpha * (1 - alpha) / len(values)
            chosen.append(int(((alpha - values.mean(0)) / spread.sqrt()).argmax()))
        return cls(grid.cpu()[chosen], tuning.fingerprint)


@final
class RiskCalibrator:
    """Held-out batches to a calibration that controls a risk.

    It keeps one row of counts per image, some hundred integers per threshold to find, so that any
    alpha, delta and bound can be asked for. Units stay open: tiles of a unit may come at any time.

    Guarantee:
        With ``delta=None``: the risk, expected over the calibration images and the new one, is at
        most alpha, if they are exchangeable. With ``delta``: with probability at least
        ``1 - delta`` over the calibration images, the risk expected over a new one is at most
        alpha, if all are independent draws from one distribution. With one threshold per class
        that is said of each class by itself, unless ``simultaneous`` shares delta among them.
        Where nothing can be certified, sets are full or no label is kept: a risk of your own must
        be at most alpha there. Nothing may have been chosen with the calibration labels: not
        alpha, delta, score, grid, start or seed. Where the bound depends on the order of the
        images, as betting does, that order, a hash of seed and data, is taken to be as good as
        drawn by lot. ``Calibration.guarantee`` says which risk, of what, and rests on how many
        images.

    Args:
        risk: What to control.
        score: The nonconformity score.
        grid: Increasing thresholds to try, float32 ``(K,)``; by default :func:`threshold_grid` of
            the score's range. Choose it without the calibration labels.
        start: Where tests begin, fitted on a split of its own; None: at the safe end, or for
            :class:`KeptError` at four places that share delta.
        seed: Of the order in which betting sees the units. It is drawn anew for every set of
            images, and does not depend on how they came.
        ignore_index: Label of pixels that do not count; no class.
        source: What the logits come from, if calibration must be tied to it.

    Examples:
        >>> from cpseg import Argmax
        >>> from cpseg.risk import KeptError
        >>> control = RiskCalibrator(KeptError(Argmax, num_classes=2))
        >>> logits, labels = torch.tensor([[9.0, 0.0], [0.0, 9.0]] * 60), torch.tensor([0, 1] * 60)
        >>> calibration = control.update(logits, labels).compute(alpha=0.1, delta=0.1)
        >>> Argmax(calibration)(torch.tensor([[8.0, 0.0], [float("nan"), 0.0]]))
        tensor([  0, 255], dtype=torch.uint8)
    """

    def __init__(
        self,
        risk: Risk,
        score: Score = LAC(),
        *,
        grid: Tensor | None = None,
        start: Start | None = None,
        seed: int = 0,
        ignore_index: int = 255,
        source: str | None = None,
    ) -> None:
        _checks.check_integer("seed", seed)
        classes = cast("int | None", getattr(risk, "num_classes", None))
        _checks.check_ignore_index(ignore_index, classes)
        if grid is not None:
            _check_grid(grid)
        elif score.range(classes or 2) is None:
            raise InputError(f"grid must be given for a score without a range; got {score!r}")
        self.risk: Risk = risk
        self.score: Score = score
        self.start: Start | None = start
        self.seed: int = seed
        self.ignore_index: int = ignore_index
        self.source: str | None = source
        self._declared_grid, self._declared_classes = grid, classes
        self.grid: Tensor | None = grid
        self.num_classes: int | None = classes
        self._rows: list[Tensor] = []
        self._units: dict[int, Tensor] = {}
        self._anonymous = 0
        self._faults = torch.zeros(2, dtype=torch.int64)
        self._checksum = torch.zeros(2, dtype=torch.int64)
        self._max_share = torch.zeros(classes or 0, dtype=torch.float64)

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        unit_ids: Sequence[int] | Tensor | None = None,
        *,
        instances: Tensor | None = None,
    ) -> Self:
        """See a batch.

        Args:
            logits: Shape ``(B, C, *S)``.
            labels: Integers, ``ignore_index`` where unknown. Shape ``(B, *S)``.
            unit_ids: The unit of each batch entry, where one unit comes in several: integers, on
                the CPU if a tensor. Shape ``(B,)``.
            instances: For :class:`InstanceRecall`: the object at each pixel, 0 for none.
                Integers, shape ``(B, *S)``.

        Returns:
            The calibrator itself.

        Raises:
            InputError: If shapes, dtypes or devices do not fit, or a loss of your own is not in
                [0, 1].
        """
        _checks.check_logits(logits, self.num_classes)
        _checks.check_labels(labels, logits)
        if instances is not None:
            beside = f"logits {_checks.describe(logits.shape)}"
            _checks.check_map("instances", instances, labels.shape, beside)
            _checks.check_device("instances", instances, logits, "logits")
        ids = None if unit_ids is None else _checks.check_ids("unit_ids", unit_ids)
        if ids is not None and len(ids) != len(labels):
            raise InputError(
                f"unit_ids must have one id per batch entry, {len(labels)}; got {len(ids)}"
            )
        units = len(self._units.keys() | (ids or ())) + self._anonymous
        if units + (len(labels) if ids is None else 0) > MAX_UNITS:
            raise InputError(f"at most {MAX_UNITS} units can be held; got more")
        classes = logits.shape[1]
        grid = self._prepare(classes, logits.device)
        with torch.no_grad():
            wide = labels.long()
            labeled = wide != self.ignore_index
            known = labeled & (wide >= 0) & (wide < classes)
            usable = logits.amax(1).isfinite() & ~logits.isnan().any(1)
            valid = known & usable
            faults = torch.stack(((labeled & ~known).sum(), (known & ~usable).sum()))
            self._faults = self._faults.to(faults.device) + faults
            objects = None if instances is None else instances.long()
            batch = Batch(logits, wide * valid, valid, objects, grid, self.score, self.ignore_index)
            tallies = self.risk.tally(batch)
            marks = data_mark(batch.labels, logits.gather(1, batch.labels[:, None])[:, 0]).long()
            bits = torch.stack((valid.sum(), (marks * valid).sum()))
            self._checksum = self._checksum.to(bits.device) + bits
            self._note_shares(batch, classes)
        if ids is None:
            self._rows.append(tallies)
            self._anonymous += len(labels)
        else:
            for unit, row in zip(ids, tallies, strict=True):
                self._units[unit] = row + self._units[unit] if unit in self._units else row.clone()
        return self

    def _prepare(self, classes: int, device: torch.device) -> Tensor:
        if self.num_classes is None:
            self.num_classes = classes
            self._max_share = torch.zeros(classes, dtype=torch.float64)
        if self.grid is None:
            low, high = cast("tuple[float, float]", self.score.range(classes))
            self.grid = threshold_grid(low, high)
        return self.grid.to(device)

    def _note_shares(self, batch: Batch, classes: int) -> None:
        if batch.labels.numel() == 0:
            return
        pixels = occurrences(flattened(batch.labels), flattened(batch.valid), classes).double()
        share = pixels / pixels.sum(1, keepdim=True).clamp(min=1)
        self._max_share = self._max_share.to(share.device).maximum(share.amax(0))

    # --- the accumulator's algebra ---

    def merge(self, other: Self) -> Self:
        """Add what another calibrator has seen, which stays as it is.

        Args:
            other: Made with the same arguments.

        Returns:
            The calibrator itself.

        Raises:
            InputError: If the two were made with different arguments or saw other classes.
        """
        mine, theirs = self._config(), other._config()
        for name in mine:
            if mine[name] != theirs[name]:
                raise InputError(
                    f"other must have {name} = {mine[name]!r} to be merged; got {theirs[name]!r}"
                )
        if other.num_classes is not None and self.num_classes not in (None, other.num_classes):
            raise InputError(
                f"other must have seen {self.num_classes} classes to be merged; "
                f"got {other.num_classes}"
            )
        return self._absorb(other.state_dict())

    def reset(self) -> Self:
        """Forget everything seen; returns the calibrator itself."""
        self.grid, self.num_classes = self._declared_grid, self._declared_classes
        self._rows, self._units, self._anonymous = [], {}, 0
        self._faults = torch.zeros(2, dtype=torch.int64)
        self._checksum = torch.zeros(2, dtype=torch.int64)
        self._max_share = torch.zeros(self._declared_classes or 0, dtype=torch.float64)
        return self

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors, numbers and strings: ``torch.save`` it, load ``weights_only``.

        It is the same for any order of the same updates and merges.
        """
        ids = sorted(self._units)
        return {
            "kind": type(self).__name__,
            "version": 2,
            "config": json.dumps(self._config()),
            "num_classes": self.num_classes,
            "ids": torch.tensor(ids, dtype=torch.int64),
            "units": _stack([self._units[unit][None] for unit in ids]),
            "anonymous": _in_order(_stack(self._rows)),
            "faults": self._faults.cpu(),
            "checksum": self._checksum.cpu(),
            "max_share": self._max_share.cpu(),
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, object], risk: Risk | None = None, score: Score | None = None
    ) -> Self:
        """The calibrator that gave this state.

        Args:
            state: What ``state_dict`` returned.
            risk: The risk, if it or its filter rule is of your own.
            score: The score, if it is one of your own.

        Returns:
            A new calibrator.

        Raises:
            InputError: If the state is another class's or version's, or risk or score is missing
                or another one.
        """
        if state.get("kind") != cls.__name__ or state.get("version") != 2:
            raise InputError(
                f"state must be version 2 of a {cls.__name__}; "
                f"got version {state.get('version')} of {state.get('kind')}"
            )
        config = json.loads(cast("str", state["config"]))
        start, grid = config["start"], config["grid"]
        made = cls(
            risk_from_description(config["risk"], risk),
            score_from_description(config["score"], score),
            grid=None if grid is None else torch.tensor(grid, dtype=torch.float32),
            start=None if start is None else Start(torch.tensor(start[0]), start[1]),
            seed=config["seed"],
            ignore_index=config["ignore_index"],
            source=config["source"],
        )
        return made._absorb(state)

    def _absorb(self, state: Mapping[str, object]) -> Self:
        classes = cast("int | None", state["num_classes"])
        if classes is not None:
            self._prepare(classes, torch.device("cpu"))
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        for unit, row in zip(tensors["ids"].tolist(), tensors["units"], strict=True):
            known = self._units.get(unit)
            self._units[unit] = row.clone() if known is None else known + row.to(known.device)
        if len(tensors["anonymous"]):
            self._rows.append(tensors["anonymous"].clone())
            self._anonymous += len(tensors["anonymous"])
        self._faults = self._faults + tensors["faults"].to(self._faults.device)
        self._checksum = self._checksum + tensors["checksum"].to(self._checksum.device)
        share = tensors["max_share"]
        if len(share):
            self._max_share = self._max_share.to(share.device).maximum(share)
        return self

    def _config(self) -> dict[str, Any]:
        start = self.start
        grid = self._declared_grid
        return {
            "risk": describe_risk(self.risk),
            "score": describe_score(self.score),
            "grid": None if grid is None else grid.tolist(),
            "start": None if start is None else [start.thresholds.tolist(), start.fitted_on],
            "seed": self.seed,
            "ignore_index": self.ignore_index,
            "source": self.source,
        }

    def table(self) -> Tensor:
        """One row of counts per unit, in an order that does not depend on how units came.

        Returns:
            int64 ``(N, T)``, on the CPU.

        Raises:
            InputError: If bad values were seen, with their counts.
        """
        counts = self._faults.tolist()
        if any(counts):
            faults = ("whose label is neither a class nor ignore_index", "with unusable logits")
            told = [f"{n} pixels {what}" for n, what in zip(counts, faults, strict=True) if n]
            raise InputError(
                f"calibration data must be clean; got {', '.join(told)}. "
                "Fix the data and start from a new calibrator"
            )
        return _in_order(_stack([*self._rows, *(row[None] for row in self._units.values())]))

    @property
    def fingerprint(self) -> str:
        """Identifies the data seen, as fitted objects remember theirs.

        That of any other calibrator of the same data, whatever risk, score and grid.
        """
        pixels, bits = self._checksum.tolist()
        return f"{pixels:x}-{bits & (2**64 - 1):016x}"

    def _order(self, count: int) -> Tensor:
        """In which order tests see the rows of the table.

        Rows are sorted there. The same shuffle for every set of images would turn each set's
        sorted losses into nearly the same sequence, and betting against that one sequence can
        fail far more often than delta. So the data take part in the draw.
        """
        drawn = hashlib.sha256(f"{self.seed} {self.fingerprint}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(drawn[:7], "big"))
        return torch.randperm(count, generator=generator)

    # --- the result ---

    def compute(
        self,
        alpha: float,
        delta: float | None = None,
        *,
        bound: PValue = betting,
        simultaneous: bool = False,
        monotonize: bool = False,
    ) -> Calibration:
        """The best threshold whose risk is at most alpha, if any can be found.

        Args:
            alpha: Largest expected risk.
            delta: Probability of a calibration that exceeds it; None: in expectation.
            bound: The test behind delta, one of :mod:`cpseg.bounds`.
            simultaneous: With one threshold per class: whether delta is for all classes at once
                (each gets ``delta / C``) or for each by itself.
            monotonize: In expectation: replace each loss by the largest of it and those at safer
                thresholds, where the risk is not monotone.

        Returns:
            The frozen calibration. Where nothing can be certified the threshold is the safe end
            of all: ``-inf`` keeps no label, ``+inf`` puts every class into every set.

        Raises:
            InputError: If an argument does not fit, bad values were seen, a risk declared
                monotone is not, or one is asked for in expectation that cannot be.
        """
        _checks.check_alpha(alpha)
        if delta is not None:
            _checks.check_alpha(delta, "delta")
        elif simultaneous:
            raise InputError("simultaneous must be False without delta: expectations hold for each")
        self._check_fitted()
        asked = Asked(alpha, delta, bound, simultaneous, monotonize)
        losses = self._losses(alpha)
        grid = torch.zeros(1) if self.grid is None else self.grid.cpu()
        start = None if self.start is None else self.start.thresholds
        found = list(certified(self.risk, losses, grid, start, asked))
        safe = -torch.inf if self.risk.keeps else torch.inf
        thresholds = torch.tensor([safe if f.threshold is None else f.threshold for f in found])
        if not self.risk.keeps and self.risk.monotone:
            # Another path to a score may lie this far off; for a monotone risk more is safer.
            slack = self.score.tolerance(self.num_classes or 1)
            thresholds = upward(thresholds.double() + slack)
        return self._frozen(thresholds, losses, asked, self._told(found, asked))

    def _losses(self, alpha: float) -> Losses:
        """In the order in which tests see the units."""
        table = self.table()
        if self.grid is None or not len(table):
            rows = self.num_classes or 1 if self.risk.axes else 1
            return Losses(
                torch.zeros((0, rows, 1), dtype=torch.float64),
                torch.zeros((0, rows), dtype=torch.bool),
                torch.zeros((0, rows), dtype=torch.int64),
            )
        return checked_losses(self.risk, table[self._order(len(table))], alpha)

    def _check_fitted(self) -> None:
        if getattr(self.score, "fitted_on", None) == self.fingerprint:
            raise InputError(
                "score must be fitted on a split of its own; got one fitted on this very data"
            )
        if self.start is None:
            return
        if bool(self.start.thresholds.isnan().any()):
            raise InputError("start must have thresholds that are numbers; got NaN")
        rows = self.num_classes if self.risk.axes else 1
        if rows is not None and tuple(self.start.thresholds.shape) != (rows,):
            raise InputError(
                f"start must have thresholds of shape ({rows},); "
                f"got {_checks.describe(self.start.thresholds.shape)}"
            )
        if self.start.fitted_on is not None and self.start.fitted_on == self.fingerprint:
            raise InputError(
                "start must be fitted on a split of its own; got one fitted on this very data"
            )

    def _frozen(
        self,
        thresholds: Tensor,
        losses: Losses,
        asked: Asked,
        told: tuple[str, ...],
    ) -> Calibration:
        rule = self.risk.rule
        named = None if rule is None else rule_name(rule, self.num_classes or 1)
        drawn = (
            "calibration and new images exchangeable"
            if asked.delta is None
            else "calibration and new images independent draws from one distribution"
        )
        return Calibration(
            thresholds=thresholds,
            axes=self.risk.axes,
            alpha=asked.alpha,
            score=self.score,
            unit="image",
            num_classes=self.num_classes,
            num_units=losses.counted.sum(0),
            num_pixels=losses.pixels.sum(0),
            ignore_index=self.ignore_index,
            fallback=None,
            fallback_groups=torch.zeros_like(thresholds, dtype=torch.bool),
            max_share=self._max_share.cpu().clone(),
            source=self.source,
            control=Control(
                risk=describe_risk(self.risk)["name"],
                rule=named,
                delta=asked.delta,
                event=self.risk.event(asked.alpha),
                assumptions=(
                    f"{drawn} (an image stands for what unit_ids named)",
                    "alpha, delta, score, grid, seed, start chosen without the calibration labels",
                    "logits of the new image computed as those of the calibration images",
                    *((_BY_LOT,) if asked.by_lot else ()),
                    *self._at_the_safe_end(asked.delta),
                ),
                notes=told,
            ),
        )

    def _at_the_safe_end(self, delta: float | None) -> tuple[str, ...]:
        """What must be true of a risk of the user's own where nothing can be certified."""
        if describe_risk(self.risk)["built_in"]:
            return ()
        where = "no label is kept" if self.risk.keeps else "every set holds every class"
        if delta is None:
            return (f"no loss above alpha, or above that at any threshold, where {where}",)
        return (f"the risk at most alpha where {where}",)

    def _told(self, found: list[Found], asked: Asked) -> tuple[str, ...]:
        """What the guarantee adds: where nothing could be certified, and how classes share delta."""
        nothing = "no label is kept" if self.risk.keeps else "every set holds every such class"
        by_note: dict[str, list[str]] = {}
        for row, each in enumerate(found):
            if each.note is not None:
                by_note.setdefault(each.note, []).append(str(row))
        told = [
            f"{'Class ' + ', '.join(where) if self.risk.axes else 'Everywhere'}: {nothing}, as "
            f"no threshold could be certified. {note}"
            for note, where in by_note.items()
        ]
        if self.risk.axes:
            told.append(
                "Each class by itself: of many, some can exceed it."
                if asked.delta is not None and not asked.simultaneous
                else "All classes at once."
            )
        return tuple(told)


def _stack(rows: list[Tensor]) -> Tensor:
    return torch.cat([row.cpu() for row in rows]) if rows else torch.zeros((0, 0), dtype=torch.long)


def _in_order(table: Tensor) -> Tensor:
    """Rows in an order of their own."""
    listed = [row.tobytes() for row in table.numpy()]
    return table[sorted(range(len(listed)), key=listed.__getitem__)]


def _check_grid(grid: Tensor) -> None:
    _checks.check_tensor("grid", grid)
    if grid.dtype != torch.float32 or grid.ndim != 1 or len(grid) == 0:
        raise InputError(
            f"grid must be float32 of shape (K,); got {grid.dtype} {_checks.describe(grid.shape)}"
        )
    if not bool(grid.isfinite().all() and (grid.diff() > 0).all()):
        raise InputError("grid must be finite and increasing")
