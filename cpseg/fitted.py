"""Scores that were fitted on a split of their own: for many classes, few images, bad probabilities.

Each wraps or reweighs another score, remembers the fingerprint of the data it was fitted on, and
is refused by a calibrator on that very data. Whatever was fitted, the promise is that of the
calibrator: it holds for any score that was fixed without the calibration images.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg._classes import at_class, in_parts
from cpseg._odds import odds_of, softmax_tolerance
from cpseg._tiles import upcast
from cpseg.errors import InputError
from cpseg.protocols import Score
from cpseg.scores import (
    LAC,
    TopK,
    all_scores,
    label_scores,
)

__all__ = ["PAS", "RC3P", "Found", "Recalibrated", "Tuning", "Updated", "recalibrate"]


class Found(Protocol):
    """What a tuning split says of each class; a :class:`cpseg.Calibration` does."""

    @property
    def thresholds(self) -> Tensor:
        """Shape ``(C,)``."""
        ...

    @property
    def num_pixels(self) -> Tensor:
        """Shape ``(C,)``."""
        ...


class Tuning(Protocol):
    """A calibrator with a class axis that has seen the tuning split only."""

    @property
    def axes(self) -> tuple[str, ...]:
        """``("class",)``."""
        ...

    @property
    def score(self) -> Score:
        """The score it was made with."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies the data seen."""
        ...

    def compute(self, alpha: float, /) -> Found:
        """Thresholds for a level."""
        ...


@final
@dataclass(frozen=True, slots=True)
class RC3P:
    """Another score, but ``+inf`` for a class that ranks beyond a limit of its own.

    After Shi et al. (2024): a class the model knows seldom ranks low where it is the truth, so its
    low ranks can go. Calibrate it class by class: a truth beyond its rank counts as a miss, and
    the threshold makes up for it. A class with too few images has the threshold ``+inf`` and stays
    in every set, beyond its rank too.

    Attributes:
        ranks: Largest rank of each class, from 1, the most likely class having rank 1.
        score: What classes within their ranks score.
        fitted_on: Fingerprint of the tuning data; None if on no data.

    Examples:
        >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> RC3P(ranks=(3, 1, 3))(logits)
        tensor([[0.5000,    inf, 0.7500]])
    """

    ranks: tuple[int, ...]
    score: Score = LAC()
    fitted_on: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(self.ranks))  # a file has lists
        for rank in self.ranks:
            _checks.check_integer("ranks", rank, 1)

    @classmethod
    def fit(cls, tuning: Tuning, alpha: float, score: Score = LAC(), *, share: float = 0.5) -> Self:
        """Ranks that a share of alpha is spent on.

        Args:
            tuning: A :class:`cpseg.ClassConditionalCalibrator` made with ``score=TopK()`` that
                has seen the tuning split only.
            alpha: The level at which it will be used.
            score: What classes within their ranks score.
            share: A class's rank is its conformal quantile at level ``share * alpha``. A larger
                share gives smaller ranks and leaves less of alpha to the threshold.

        Returns:
            The fitted score; a class with too few tuning images keeps all its ranks.

        Raises:
            InputError: If tuning counts something else than ranks per class.
        """
        _checks.check_alpha(alpha)
        _checks.check_alpha(share, "share")
        if tuning.axes != ("class",) or tuning.score != TopK():
            raise InputError(
                "tuning must be a ClassConditionalCalibrator of TopK(); "
                f"got axes {tuning.axes} and {tuning.score!r}"
            )
        limits = tuning.compute(alpha * share).thresholds
        ranks = limits.nan_to_num(posinf=len(limits)).clamp(1, len(limits)).int().tolist()
        return cls(tuple(ranks), score, tuning.fingerprint)

    @property
    def follows_logits(self) -> bool:
        """A larger logit can score higher, beyond its class's rank."""
        return False

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of all classes. Shape ``(B, C, *S)``."""
        _checks.check_logits(logits, len(self.ranks))
        limit = torch.tensor(self.ranks, device=logits.device)
        beyond = TopK()(logits) > limit.view(-1, *(1 for _ in logits.shape[2:]))
        return self.score(logits).masked_fill(beyond, torch.inf)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        _checks.check_logits(logits, len(self.ranks))
        limit = torch.tensor(self.ranks, device=logits.device)
        known = labels.long().clamp(0, len(self.ranks) - 1)
        beyond = TopK().of_labels(logits, labels) > limit[known]
        return self.score.of_labels(logits, labels).masked_fill(beyond, torch.inf)

    def range(self, num_classes: int) -> tuple[float, float] | None:
        """That of the wrapped score; ``+inf`` besides."""
        return self.score.range(num_classes)

    def tolerance(self, num_classes: int) -> float:
        """That of the wrapped score: ranks are the same numbers in every path."""
        return self.score.tolerance(num_classes)


@final
@dataclass(frozen=True, slots=True)
class PAS:
    """The class's probability beside its prevalence: ``prior / (prior + probability)``.

    Prevalence-adjusted softmax (after Ding et al., 2025): it orders classes as ``-probability /
    prior`` does, and lies in [0, 1] whatever the priors are. With one threshold for all classes,
    it favors rare ones, so that coverage averaged over classes is high for the size of the sets.

    Attributes:
        prior: Prevalence of each class, positive.
        fitted_on: Fingerprint of the tuning data; None if on no data.

    Examples:
        >>> PAS(prior=(0.75, 0.25))(torch.tensor([[0.75, 0.25]]).log())
        tensor([[0.5000, 0.5000]])
    """

    prior: tuple[float, ...]
    fitted_on: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prior", tuple(self.prior))  # a file has lists
        wrong = [share for share in self.prior if not 2.0**-60 <= share <= 1]
        if wrong or not self.prior:
            raise InputError(f"prior must hold a share in (0, 1] per class; got {wrong[:5]}")

    @classmethod
    def fit(cls, tuning: Tuning) -> Self:
        """Shares of the tuning split's labeled pixels, each class counted once more.

        Args:
            tuning: A :class:`cpseg.ClassConditionalCalibrator` that has seen the tuning split only.

        Returns:
            The fitted score.

        Raises:
            InputError: If tuning does not count by class.
        """
        if tuning.axes != ("class",):
            raise InputError(f"tuning must count by class; got axes {tuning.axes}")
        pixels = tuning.compute(0.5).num_pixels.double() + 1
        return cls(tuple((pixels / pixels.sum()).tolist()), tuning.fingerprint)

    @property
    def follows_logits(self) -> bool:
        """A larger logit of a more frequent class can score higher."""
        return False

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of all classes. Shape ``(B, C, *S)``."""
        _checks.check_logits(logits, len(self.prior))
        return all_scores(self, logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        _checks.check_logits(logits, len(self.prior))
        return label_scores(self, logits, labels)

    def range(self, num_classes: int) -> tuple[float, float]:
        """All scores lie in ``[0, 1]``."""
        del num_classes
        return 0.0, 1.0

    def tolerance(self, num_classes: int) -> float:
        """As for :class:`cpseg.LAC`: a relative error of a probability moves this by a quarter."""
        return softmax_tolerance(num_classes)

    def columns(self, x: Tensor, position: Tensor, /) -> Tensor:
        """Scores of all classes of a block; see :class:`cpseg.scores.ColumnScore`."""
        del position
        (odds,), total = odds_of((x,))
        prior = torch.tensor(self.prior, dtype=x.dtype, device=x.device)[:, None]
        return prior / (prior + odds / total)

    def label_columns(self, x: Tensor, position: Tensor, labels: Tensor, /) -> Tensor:
        """Scores of labels in a block; see :class:`cpseg.scores.ColumnScore`."""
        del position
        odds, total = odds_of(in_parts(x))
        prior = torch.tensor(self.prior, dtype=x.dtype, device=x.device)[labels]
        return prior / (prior + at_class(odds, labels) / total)


@final
@dataclass(frozen=True, slots=True)
class Recalibrated:
    """Another score, of logits with a temperature and a bias per class.

    The transformation is part of the score, and so of the calibration and its file: calibrators,
    predictors and filters take the model's own logits, and nobody can forget it.

    Attributes:
        temperature: What logits are divided by, positive.
        bias: What is then added to each class's.
        score: The score of the result.
        fitted_on: Fingerprint of the images it was fitted on; None if on no data.

    Examples:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> Recalibrated(2.0, (0.0, 1.0))(logits), LAC()(torch.tensor([[1.0, 1.0]]))
        (tensor([[0.5000, 0.5000]]), tensor([[0.5000, 0.5000]]))
    """

    temperature: float
    bias: tuple[float, ...]
    score: Score = LAC()
    fitted_on: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "bias", tuple(self.bias))  # a file has lists
        if not 1e-4 <= self.temperature <= 1e4:
            raise InputError(f"temperature must lie in [1e-4, 1e4]; got {self.temperature}")
        if not self.bias or not all(abs(value) < 1e4 for value in self.bias):
            raise InputError("bias must hold a number below 1e4 in size per class")

    @property
    def follows_logits(self) -> bool:
        """As the score does, if no class has a bias of its own."""
        return self.score.follows_logits and len(set(self.bias)) == 1

    def logits(self, logits: Tensor) -> Tensor:
        """The model's logits, recalibrated: at least float32. Shape ``(B, C, *S)``."""
        _checks.check_logits(logits, len(self.bias))
        x = upcast(logits)
        bias = torch.tensor(self.bias, dtype=x.dtype, device=x.device)
        return x / self.temperature + bias.view(-1, *(1 for _ in x.shape[2:]))

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of all classes. Shape ``(B, C, *S)``."""
        return self.score(self.logits(logits))

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label's score. Shape ``(B, *S)``; NaN where the label is no class."""
        return self.score.of_labels(self.logits(logits), labels)

    def range(self, num_classes: int) -> tuple[float, float] | None:
        """That of the score."""
        return self.score.range(num_classes)

    def tolerance(self, num_classes: int) -> float:
        """That of the score, and a rounding of logits up to 64 in size, of both signs."""
        return self.score.tolerance(num_classes) + 2.0**-16


class Updated(Protocol):
    """A calibrator."""

    def update(self, logits: Tensor, labels: Tensor, /) -> object:
        """See a batch."""
        ...


_C = TypeVar("_C", bound=Updated)
_Batches = Iterable[tuple[Tensor, Tensor]]


def recalibrate(
    calibrator: Callable[[Score], _C],
    fit_on: _Batches,
    calibrate_on: _Batches,
    score: Score = LAC(),
    *,
    ignore_index: int = 255,
) -> _C:
    """Fit temperature and class biases on one split, and show the other one to a calibrator.

    They minimize the mean over images of the mean negative log-likelihood of an image's labeled
    pixels, with a weak pull towards doing nothing, by Newton's method in float64: the problem is
    convex, and the result the same on every run. Nothing but sums over a batch is held.

    Guarantee:
        That of the calibrator, if the two splits have no image in common. An image that is in
        both, logits and labels alike, is refused.

    Args:
        calibrator: Makes one from a score: ``SplitCalibrator``, or
            ``partial(ClassConditionalCalibrator, 21)``.
        fit_on: Batches of logits ``(B, C, *S)`` and labels ``(B, *S)``; read several times, so a
            list or a loader, not an iterator.
        calibrate_on: Batches of the same kind, read once.
        score: The score of the recalibrated logits.
        ignore_index: Label of pixels that do not count.

    Returns:
        The calibrator, made with a :class:`Recalibrated` score, after all of ``calibrate_on``.

    Raises:
        InputError: If the splits share an image, ``fit_on`` has no labeled pixel or can be read
            only once, or values are bad.

    Examples:
        >>> from cpseg import SplitCalibrator
        >>> logits = torch.tensor([[4.0, 0.0]] * 3 + [[0.0, 4.0]] * 3)  # right twice of three times
        >>> fit_on = [(logits, torch.tensor([0, 0, 1, 1, 1, 0]))]
        >>> calibrate_on = [(logits + 1, torch.tensor([0, 0, 1, 1, 1, 0]))]
        >>> calibration = recalibrate(SplitCalibrator, fit_on, calibrate_on).compute(alpha=0.3)
        >>> calibration.score.logits(logits[:1]).softmax(1).round(decimals=2)
        tensor([[0.6700, 0.3300]])
    """
    if iter(fit_on) is fit_on:
        raise InputError(
            "fit_on must be readable several times, a list or a loader; got an iterator"
        )
    seen: set[bytes] = set()
    for logits, labels in fit_on:
        _check(logits, labels, ignore_index)
        seen.update(_fingerprints(logits, labels))
    digest = hashlib.sha256(b"".join(sorted(seen))).hexdigest()
    temperature, bias = _newton(fit_on, ignore_index)
    made = calibrator(Recalibrated(temperature, bias, score, digest))
    for logits, labels in calibrate_on:
        shared = sum(mark in seen for mark in _fingerprints(logits, labels))
        if shared:
            raise InputError(f"calibrate_on must have no image of fit_on; got {shared}")
        made.update(logits, labels)
    return made


def _check(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    _checks.check_logits(logits)
    _checks.check_labels(labels, logits)
    _checks.check_ignore_index(ignore_index, logits.shape[1])
    wide = labels.long()
    labeled = wide != ignore_index
    outside = int((labeled & ((wide < 0) | (wide >= logits.shape[1]))).sum())
    unusable = ~logits.amax(1).isfinite() | logits.isnan().any(1)
    bad = int((labeled & unusable).sum())
    if outside or bad:
        raise InputError(
            f"fit_on must be clean; got {outside} pixels whose label is no class, "
            f"{bad} with unusable logits"
        )


def _fingerprints(logits: Tensor, labels: Tensor) -> list[bytes]:
    """One per batch entry, of its logits and labels, whatever their dtypes and devices."""
    pairs = zip(logits.detach().cpu().float(), labels.cpu().long(), strict=True)
    return [
        hashlib.sha256(x.contiguous().numpy().tobytes() + y.contiguous().numpy().tobytes()).digest()
        for x, y in pairs
    ]


_PULL = 1e-3  # towards temperature 1 and no bias, of classes that are never seen too
_DEEP = 60.0  # a logit this far below the best one has no probability left


def _newton(batches: _Batches, ignore_index: int) -> tuple[float, tuple[float, ...]]:
    """Temperature and biases of the least mean negative log-likelihood."""
    point: Tensor | None = None
    step = torch.zeros(0)
    best, size = torch.inf, 1.0
    for _ in range(100):
        trial = None if point is None else point + size * step
        if trial is not None and float(trial[0]) <= 1e-3:
            size /= 2
            continue
        loss, gradient, hessian, at = _sums(batches, ignore_index, trial)
        if loss <= best:
            best, point, size = loss, at, 1.0
            step = -torch.linalg.solve(hessian, gradient)
            if float(-(gradient @ step)) < 1e-10:
                break
        else:
            size /= 2
            if size < 1e-6:
                break
    if point is None:
        raise InputError("fit_on must hold a labeled pixel; got none")
    return float(1 / point[0]), tuple(point[1:].tolist())


def _sums(
    batches: _Batches, ignore_index: int, at: Tensor | None
) -> tuple[float, Tensor, Tensor, Tensor]:
    """Loss, gradient and Hessian in ``(1 / temperature, bias)``, and where; by default at 1, 0."""
    images, loss = 0, 0.0
    gradient = hessian = torch.zeros(0, dtype=torch.float64)
    for logits, labels in batches:
        classes = logits.shape[1]
        if at is None:
            at = torch.zeros(classes + 1, dtype=torch.float64)
            at[0] = 1.0
        if not len(gradient):
            gradient = torch.zeros(classes + 1, dtype=torch.float64)
            hessian = torch.zeros((classes + 1, classes + 1), dtype=torch.float64)
        _checks.check_logits(logits, classes)
        place = at.to(logits.device)
        for image, truth in zip(logits, labels.long(), strict=True):
            x = image.flatten(1).double() if image.ndim > 1 else image[:, None].double()
            y = truth.flatten()
            x, y = x[:, y != ignore_index], y[y != ignore_index]
            if not len(y):
                continue
            images += 1
            x = (x - x.amax(0)).clamp(min=-_DEEP)
            log_p = (place[0] * x + place[1:, None]).log_softmax(0)
            p, own = log_p.exp(), torch.nn.functional.one_hot(y, classes).T.double()
            mean = (p * x).sum(0)
            loss -= float((log_p * own).sum() / len(y))
            first = torch.cat((((p - own) * x).sum(0).mean()[None], (p - own).mean(1)))
            gradient += first.cpu()
            curve = torch.empty_like(hessian, device=p.device)
            curve[0, 0] = ((p * x * x).sum(0) - mean**2).mean()
            curve[0, 1:] = curve[1:, 0] = (p * (x - mean)).mean(1)
            curve[1:, 1:] = p.mean(1).diag() - p @ p.T / len(y)
            hessian += curve.cpu()
    if at is None or not images:
        raise InputError("fit_on must hold a labeled pixel; got none")
    away = at.clone()
    away[0] -= 1
    pull = _PULL * torch.eye(len(at), dtype=torch.float64)
    total = loss / images + 0.5 * _PULL * float(away @ away)
    return total, gradient / images + _PULL * away, hessian / images + pull, at
