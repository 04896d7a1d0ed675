"""A promise under a shift that is known as likelihood ratios of images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, inf, isfinite
from typing import Self, cast, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.accumulate import Histogram, upward
from cpseg.calibration import Calibration, Control, describe_score, score_from_description
from cpseg.errors import InputError
from cpseg.protocols import Score
from cpseg.quantile import UNIT_MASS, level
from cpseg.scores import LAC

__all__ = ["WeightedCalibration", "WeightedCalibrator"]

_Unit = tuple[float, Tensor, Tensor]  # weight, scores, how many pixels have each


@final
@dataclass(frozen=True, eq=False, slots=True)
class WeightedCalibration:
    """Thresholds that depend on the new image's weight. Made by :class:`WeightedCalibrator`.

    Guarantee:
        The share of a new image's labeled pixels whose class is missing from their set, expected
        over the calibration images and the new one, is at most ``alpha``, if calibration images
        are independent draws from P, the new one from Q, weights are proportional to the
        likelihood ratio dQ/dP and were not fitted on the calibration images, and the weight given
        for the new image is its own or larger. It rests on :attr:`num_units` images, that are
        worth :attr:`effective_units` of equal weight. With fewer than :meth:`needed_units` of such
        weights the threshold is ``+inf``, which keeps the promise and says nothing.

    Attributes:
        alpha: The level.
        score: The nonconformity score.
        scores: Scores in rising order. float32 ``(N,)``.
        above: Mass of what lies strictly above each, rounded up. int64 ``(N,)``.
        total: Mass of all calibration images, exact: the largest weight is 2**40.
        weights: Weights of the calibration images. float64 ``(n,)``.
        num_classes: C of the calibration logits.
        num_pixels: Labeled pixels of the calibration images.
        ignore_index: Label of pixels that do not count.
        max_share: As in :class:`cpseg.Calibration`.
    """

    alpha: float
    score: Score
    scores: Tensor
    above: Tensor
    total: Fraction
    weights: Tensor
    num_classes: int
    num_pixels: int
    ignore_index: int
    max_share: Tensor

    @property
    def num_units(self) -> int:
        """Calibration images of positive weight."""
        return int((self.weights > 0).sum())

    @property
    def effective_units(self) -> float:
        """How many images of equal weight vary as much, ``sum(w)**2 / sum(w**2)``."""
        scaled = self.weights / self.weights.max()  # squares of huge weights would overflow
        return float(scaled.sum() ** 2 / scaled.square().sum())

    def needed_units(self, weight: float) -> int:
        """Fewest images, of the mean weight of those seen, that allow a finite threshold.

        Args:
            weight: The new image's, or a bound on it, at least 0.

        Returns:
            As many as have a total weight of ``weight * (1 - alpha) / alpha``; with equal weights
            ``1 / alpha - 1``, rounded up. At least 1.

        Raises:
            InputError: If the weight is negative, NaN or infinite.
        """
        _weights("weight", torch.tensor([weight], dtype=torch.float64), 1)
        mass = _scaled(weight, float(self.weights.max()))
        return max(ceil(mass * (1 / level(self.alpha) - 1) * self.num_units / self.total), 1)

    def thresholds(self, weights: Tensor) -> Tensor:
        """The threshold for images of these weights, or of weights bounded by these.

        Args:
            weights: On the scale of the calibration images' weights, at least 0. Shape ``(B,)``.

        Returns:
            float32 thresholds, ``+inf`` where the weight is too large for a finite one. ``(B,)``.

        Raises:
            InputError: If a weight is negative, NaN or infinite.
        """
        checked = _weights("weights", weights, len(weights))
        new, which = torch.unique(checked, return_inverse=True)
        share = level(self.alpha)
        masses = [_scaled(weight, float(self.weights.max())) for weight in new.tolist()]
        # What may lie strictly above the threshold; exact, and below 0 if even nothing may.
        budget = torch.tensor([max(floor(share * (self.total + m) - m), -1) for m in masses])
        found = self.scores[torch.searchsorted(-self.above, -budget.clamp(min=0))]
        limit = torch.where(budget < 0, torch.inf, found)[which]
        return upward(limit.double() + self.score.tolerance(self.num_classes))

    def __call__(self, logits: Tensor, weights: Tensor) -> Tensor:
        """Sets of a batch.

        Args:
            logits: Shape ``(B, C, *S)``.
            weights: Each image's weight, or a bound on it. Shape ``(B,)``.

        Returns:
            Whether each class is in the pixel's set. Bool ``(B, C, *S)``.

        Raises:
            InputError: If shapes do not fit, or a weight is negative, NaN or infinite.
        """
        _checks.check_logits(logits, self.num_classes)
        _weights("weights", weights, len(logits))
        limit = self.thresholds(weights).to(logits.device)
        with torch.no_grad():
            return ~(self.score(logits) > limit.view(-1, *[1] * (logits.ndim - 1)))

    def bounded(self, weight: float) -> Calibration:
        """One threshold for all images whose weight is at most ``weight``.

        Args:
            weight: The bound, on the scale of the calibration images' weights.

        Returns:
            A calibration for predictors and filters, which can be saved.

        Raises:
            InputError: If the weight is negative, NaN or infinite.
        """
        threshold = self.thresholds(torch.tensor([weight], dtype=torch.float64))
        starved = (
            f"Every set holds every class: {self.num_units} images were seen; "
            f"about {self.needed_units(weight)} of their mean weight would do."
        )
        return Calibration(
            thresholds=threshold,
            axes=(),
            alpha=self.alpha,
            score=self.score,
            unit="image",
            num_classes=self.num_classes,
            num_units=torch.tensor([self.num_units]),
            num_pixels=torch.tensor([self.num_pixels]),
            ignore_index=self.ignore_index,
            fallback=None,
            fallback_groups=torch.zeros(1, dtype=torch.bool),
            max_share=self.max_share.clone(),
            source=None,
            control=Control(
                risk="weighted miscoverage",
                rule=None,
                delta=None,
                event=(
                    "The expected share of a new image's labeled pixels whose class is missing "
                    f"from their set is at most {self.alpha:g} under the shift that the weights "
                    "describe"
                ),
                assumptions=(
                    "calibration images independent draws from one distribution",
                    "weights proportional to the likelihood ratio, not fitted on these images",
                    f"weight of the new image at most {weight:g}",
                    "alpha and score chosen without the calibration labels",
                ),
                notes=(
                    f"The weights leave as much as {self.effective_units:.1f} images.",
                    *((starved,) if bool(threshold.isinf()) else ()),
                ),
            ),
        )


@final
class WeightedCalibrator:
    """Held-out batches with likelihood ratios per image to a :class:`WeightedCalibration`.

    Weighted conformal risk control of the per-image miscoverage (after Tibshirani et al., 2019,
    and Angelopoulos et al., 2024): an image's weight stays with its own scores. A score with a
    declared range is rounded up by at most 0.1 %, as in :class:`cpseg.accumulate.Histogram`.

    Args:
        score: The nonconformity score.
        ignore_index: Label of pixels that do not count; no class.

    Examples:
        >>> logits = torch.tensor([[2.0, 0.0]] * 20)
        >>> calibrator = WeightedCalibrator()
        >>> _ = calibrator.update(logits, torch.zeros(20, dtype=torch.int64), torch.ones(20))
        >>> calibrator.compute(alpha=0.1).thresholds(torch.tensor([0.0, 1.0, 9.0])).isinf()
        tensor([False, False,  True])
    """

    def __init__(self, score: Score = LAC(), *, ignore_index: int = 255) -> None:
        _checks.check_ignore_index(ignore_index, None)
        self.score: Score = score
        self.ignore_index: int = ignore_index
        self.reset()

    def reset(self) -> Self:
        """Forget everything seen; returns the calibrator itself."""
        self.num_classes: int | None = None
        self._units: list[_Unit] = []
        self._named: dict[int, _Unit] = {}
        self._edges: Tensor | None = None
        self._max_share = torch.zeros(0, dtype=torch.float64)
        return self

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor,
        unit_ids: Sequence[int] | Tensor | None = None,
    ) -> Self:
        """See a batch.

        Args:
            logits: Shape ``(B, C, *S)``.
            labels: Integers, ``ignore_index`` where unknown. Shape ``(B, *S)``.
            weights: Likelihood ratio of each unit, at least 0, on any common scale: the same for
                all tiles of a unit. ``(B,)``.
            unit_ids: The unit of each batch entry, where one unit comes in several: integers, on
                the CPU if a tensor. Shape ``(B,)``.

        Returns:
            The calibrator itself.

        Raises:
            InputError: If shapes do not fit, a weight is negative, NaN or infinite, or another
                than that of the unit's earlier tiles, a label is no class, or logits at a
                labeled pixel are unusable.
        """
        _checks.check_logits(logits, self.num_classes)
        _checks.check_labels(labels, logits)
        ratio = _weights("weights", weights, len(logits))
        ids = None if unit_ids is None else _checks.check_ids("unit_ids", unit_ids)
        self._check_units(ids, ratio.tolist())
        classes = logits.shape[1]
        _checks.check_ignore_index(self.ignore_index, classes)
        limits = self.score.range(classes)
        with torch.no_grad():
            labeled = labels.long() != self.ignore_index
            known = labeled & (labels >= 0) & (labels < classes)
            scores = upward(self.score.of_labels(logits, labels.long() * known))
            bad = int((labeled & (~known | scores.isnan())).sum())
            if bad:
                raise InputError(
                    f"calibration data must be clean; got {bad} pixels whose label is no class or "
                    "whose logits are unusable"
                )
            if limits is not None:
                if self._edges is None:
                    histogram = Histogram(1, *limits)
                    self._edges = histogram.edges(torch.arange(histogram.num_cells))
                # The smallest edge no lower than the score: that of its own cell.
                edges = self._edges.to(scores.device)
                scores = edges[torch.searchsorted(edges, scores.contiguous())]
            self.num_classes = classes
            if len(self._max_share) == 0:
                self._max_share = torch.zeros(classes, dtype=torch.float64)
            for entry, weight in enumerate(ratio.tolist()):
                seen = labeled[entry]
                if not bool(seen.any()):
                    continue
                values, counts = torch.unique(scores[entry][seen], return_counts=True)
                self._add(None if ids is None else ids[entry], (weight, values.cpu(), counts.cpu()))
                shares = torch.bincount(labels[entry][seen].long(), minlength=classes).cpu()
                self._max_share = self._max_share.maximum(shares.double() / int(seen.sum()))
        return self

    def _check_units(self, ids: list[int] | None, weights: list[float]) -> None:
        if ids is None:
            return
        if len(ids) != len(weights):
            raise InputError(
                f"unit_ids must have one id per batch entry, {len(weights)}; got {len(ids)}"
            )
        known = {unit: held[0] for unit, held in self._named.items()}
        for unit, weight in zip(ids, weights, strict=True):
            if known.setdefault(unit, weight) != weight:
                raise InputError(
                    f"weights must be the same for all tiles of a unit; got {known[unit]:g} and "
                    f"{weight:g} for unit {unit}"
                )

    def _add(self, unit: int | None, part: _Unit) -> None:
        if unit is None:
            self._units.append(part)
            return
        if unit in self._named:
            weight, values, counts = self._named[unit]
            values, index = torch.unique(torch.cat((values, part[1])), return_inverse=True)
            both = torch.cat((counts, part[2]))
            part = weight, values, torch.zeros_like(values, dtype=torch.int64)
            part[2].index_add_(0, index, both)
        self._named[unit] = part

    def merge(self, other: Self) -> Self:
        """Add what another calibrator has seen, which stays as it is.

        Args:
            other: Made with the same arguments; a unit may have tiles in both.

        Returns:
            The calibrator itself.

        Raises:
            InputError: If the two were made with different arguments or saw other classes.
        """
        if self._arguments() != other._arguments():
            raise InputError(
                f"other must be made with {self._arguments()} to be merged; "
                f"got {other._arguments()}"
            )
        if other.num_classes is not None and self.num_classes not in (None, other.num_classes):
            raise InputError(
                f"other must have seen {self.num_classes} classes to be merged; "
                f"got {other.num_classes}"
            )
        theirs = list(other._named.items())
        self._check_units([unit for unit, _ in theirs], [held[0] for _, held in theirs])
        if other.num_classes is not None:
            mine = self._max_share if len(self._max_share) else torch.zeros_like(other._max_share)
            self._max_share = mine.maximum(other._max_share)
            self.num_classes = other.num_classes
        self._units = self._units + other._units
        for unit, held in theirs:
            self._add(unit, held)
        return self

    def _arguments(self) -> dict[str, object]:
        return {"score": describe_score(self.score), "ignore_index": self.ignore_index}

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors, numbers and strings: ``torch.save`` it, load ``weights_only``."""
        names = sorted(self._named)
        units = [*self._ordered(self._units), *(self._named[name] for name in names)]
        empty = torch.zeros(0)
        return {
            "kind": type(self).__name__,
            "version": 1,
            "score": describe_score(self.score),
            "ignore_index": self.ignore_index,
            "num_classes": self.num_classes,
            "ids": torch.tensor(names, dtype=torch.int64),
            "weights": torch.tensor([unit[0] for unit in units], dtype=torch.float64),
            "sizes": torch.tensor([len(unit[1]) for unit in units], dtype=torch.int64),
            "scores": torch.cat([empty, *(unit[1] for unit in units)]),
            "counts": torch.cat([empty.long(), *(unit[2] for unit in units)]),
            "max_share": self._max_share.clone(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object], score: Score | None = None) -> Self:
        """The calibrator that gave this state.

        Args:
            state: What ``state_dict`` returned.
            score: The score, if it is one of your own.

        Returns:
            A new calibrator.

        Raises:
            InputError: If the state is another class's, or the score is missing.
        """
        if state.get("kind") != cls.__name__ or state.get("version") != 1:
            raise InputError(
                f"state must be version 1 of a {cls.__name__}; "
                f"got version {state.get('version')} of {state.get('kind')}"
            )
        described = cast("Mapping[str, object]", state["score"])
        made = cls(
            score_from_description(described, score),
            ignore_index=cast("int", state["ignore_index"]),
        )
        made.num_classes = cast("int | None", state["num_classes"])
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        sizes = tensors["sizes"].tolist()
        values = torch.split(tensors["scores"], sizes)
        counts = torch.split(tensors["counts"], sizes)
        units: list[_Unit] = list(zip(tensors["weights"].tolist(), values, counts, strict=True))
        names = tensors["ids"].tolist()
        made._units = units[: len(units) - len(names)]
        made._named = dict(zip(names, units[len(made._units) :], strict=True))
        made._max_share = tensors["max_share"].clone()
        return made

    @staticmethod
    def _ordered(units: list[_Unit]) -> list[_Unit]:
        """Units in an order that does not depend on how they came."""

        def key(unit: _Unit) -> tuple[float, bytes, bytes]:
            return unit[0], unit[1].numpy().tobytes(), unit[2].numpy().tobytes()

        return sorted(units, key=key)

    def compute(self, alpha: float) -> WeightedCalibration:
        """Weighted scores for a level; the state stays as it is.

        Args:
            alpha: Level strictly between 0 and 1.

        Returns:
            The frozen calibration.

        Raises:
            InputError: If nothing was seen, all weights are 0, or their sum is infinite.
        """
        _checks.check_alpha(alpha)
        units = self._ordered([*self._units, *self._named.values()])
        weights = torch.tensor([unit[0] for unit in units], dtype=torch.float64)
        if not len(units) or not 0 < float(weights.sum()) < inf:
            raise InputError(
                f"weights must have a positive, finite sum; got {len(units)} labeled images, "
                f"{int((weights > 0).sum())} of positive weight"
            )
        # Whole numbers, as in the other calibrators: with equal weights this is split calibration.
        scaled = [_scaled(weight, float(weights.max())) for weight in weights.tolist()]
        scores = torch.cat([unit[1] for unit in units])
        mass = torch.cat(
            [
                counts * ceil(share / int(counts.sum()))
                for share, (_, _, counts) in zip(scaled, units, strict=True)
            ]
        )
        values, index = torch.unique(scores, sorted=True, return_inverse=True)
        pooled = torch.zeros(len(values), dtype=torch.int64).index_add(0, index, mass)
        above = pooled.flip(0).cumsum(0).flip(0) - pooled
        return WeightedCalibration(
            alpha=alpha,
            score=self.score,
            scores=values,
            above=above,
            total=sum(scaled, Fraction()),
            weights=weights,
            num_classes=self.num_classes or 1,
            num_pixels=int(sum(int(unit[2].sum()) for unit in units)),
            ignore_index=self.ignore_index,
            max_share=self._max_share.clone(),
        )


def _scaled(weight: float, largest: float) -> Fraction:
    """A weight on the scale on which the largest of the calibration images is 2**40. Exact."""
    return Fraction(weight) / Fraction(largest) * UNIT_MASS


def _weights(name: str, weights: Tensor, count: int) -> Tensor:
    """Checked weights, float64 on the CPU. ``(count,)``."""
    _checks.check_tensor(name, weights)
    ratio = weights.detach().double().cpu()
    if tuple(ratio.shape) != (count,):
        raise InputError(f"{name} must have shape ({count},); got {_checks.describe(ratio.shape)}")
    wrong = [value for value in ratio.tolist() if not (isfinite(value) and value >= 0)]
    if wrong:
        raise InputError(f"{name} must be finite and >= 0; got {len(wrong)} that are not")
    return ratio
