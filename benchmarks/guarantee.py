"""The validity table: how often each promise fails over repeated draws, and how much it gives away.

``python benchmarks/guarantee.py > docs/explanation/validity-table.md``, or ``make guarantee``.
Nothing is timed and nothing random is left open: the table is the same on every run, with any
number of ``--workers``.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import log

import torch
from scipy.stats import binom
from torch import Tensor

from cpseg import APS, LAC, Argmax, BackgroundPriority, SplitCalibrator
from cpseg.bounds import (
    PValue,
    betting,
    clopper_pearson,
    hoeffding,
    hoeffding_bentkus,
)
from cpseg.filters import Top
from cpseg.margins import MarginCalibrator, needed_radius
from cpseg.morphology import dilate
from cpseg.quantile import UNIT_MASS, budget, conformal_quantile
from cpseg.risk import (
    CoverageShare,
    DilutedFalseNegativeRate,
    FalseNegativeRate,
    FalseShare,
    InstanceRecall,
    KeptError,
    Miscoverage,
    Risk,
    RiskCalibrator,
    SetRisk,
    Start,
    WorstFalseNegativeRate,
    threshold_grid,
)
from cpseg.risk import Losses as LossesOfRisk
from cpseg.shift import ExchangeabilityMartingale, WeightedCalibrator

LEVELS = ((0.1, 0.1), (0.1, 0.05), (0.05, 0.1), (0.05, 0.05))
SIZES = (10, 50, 200, 1000)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``failures`` are counted where a probability is promised. Where an expectation is, ``mean`` is
    the mean of the risk and ``error`` its standard error.
    """

    name: str
    kind: str
    n: int
    levels: str
    nominal: float
    draws: int
    failures: int | None = None
    mean: float | None = None
    error: float = 0.0
    sharpness: float | None = None
    given: str = ""
    ours: bool = True

    @property
    def setting(self) -> str:
        """Where it was found."""
        return f"{self.kind}, n = {self.n}, {self.levels}"

    @property
    def found(self) -> float:
        """Share of draws that failed, or the mean risk."""
        return self.failures / self.draws if self.failures is not None else self.mean or 0.0

    @property
    def used(self) -> float:
        """What was found, over what chance allows at a level of 1e-4; above 1 it does not hold."""
        if self.failures is not None:
            return self.failures / float(binom.ppf(0.9999, self.draws, self.nominal))
        return self.found / (self.nominal + 3.72 * self.error)

    @property
    def holds(self) -> bool:
        """Within what chance allows."""
        return self.used <= 1


# --- bounds on a mean ----------------------------------------------------------------------------


Losses = Callable[[float], Tensor]  # of a mean; they rise with it, draw by draw


def bernoulli(shape: tuple[int, int], generator: torch.Generator) -> Losses:
    """All or nothing."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return lambda mean: (uniform < mean).double()


def beta(shape: tuple[int, int], generator: torch.Generator) -> Losses:
    """Smooth: ``U ** (1 / mean - 1)`` has a beta distribution with this mean."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return lambda mean: uniform ** (1 / mean - 1)


def clustered(shape: tuple[int, int], generator: torch.Generator) -> Losses:
    """The wrong share of 16 pixels of an image, with a correlation of 0.5 between any two."""
    image = torch.randn(*shape, 1, generator=generator)
    pixels = torch.randn(*shape, 16, generator=generator)
    place = torch.special.ndtr((image + pixels) / 2**0.5)

    def losses(mean: float) -> Tensor:
        wrong: Tensor = place < mean
        return wrong.double().mean(2)

    return losses


KINDS = {"Bernoulli": bernoulli, "beta": beta, "clustered pixels": clustered}


def split_maxima(losses: Tensor, alpha: float, delta: float = 0.1) -> Tensor:
    """MAPIE 1.6's default bound: the log capitals of two halves, the largest of each, added.

    As a p-value that is ``delta`` where the bound lies below alpha, and 1 where it does not.
    """
    n = len(losses)
    steps = torch.arange(1, n + 1, dtype=torch.float64).view(-1, *[1] * (losses.ndim - 1))
    mean = (0.5 + losses.cumsum(0)) / (steps + 1)
    variance = (0.25 + (losses - mean).square().cumsum(0)) / (steps + 1)
    variance = torch.cat((torch.full_like(losses[:1], 0.25), variance[:-1]))
    bet = (2 * log(1 / delta) / (n * variance)).sqrt().clamp(max=1)
    growth = (1 + bet * (alpha - losses)).log()
    half = n // 2
    best = sum(part.cumsum(0).amax(0) for part in (growth[:half], growth[n - half :]))
    return torch.where(torch.as_tensor(best) > log(1 / delta), delta, 1.0)


def spread_of_thresholds(losses: Tensor, alpha: float, delta: float = 0.1) -> Tensor:
    """MAPIE 1.6's Bernstein bound, where the risk is the same at all thresholds.

    Its variance is that of the mean risk over thresholds, not that of the losses over images, so
    that here it is 0.
    """
    n = len(losses)
    bound = losses.mean(0) + 7 * log(2 / delta) / (3 * (n - 1))
    return torch.where(bound < alpha, delta, 1.0)


OURS: dict[str, PValue] = {
    "Hoeffding": hoeffding,
    "Hoeffding-Bentkus": hoeffding_bentkus,
    "betting": betting,
    "Clopper-Pearson": clopper_pearson,
}
PEERS: dict[str, PValue] = {
    "two maxima added (MAPIE 1.6, its default)": split_maxima,
    "variance over thresholds (MAPIE 1.6, Bernstein)": spread_of_thresholds,
}


def bound_rows(
    draws: int = 2000,
    sizes: Iterable[int] = SIZES,
    kinds: Iterable[str] = tuple(KINDS),
    *,
    sharpness: bool = True,
) -> Iterator[Row]:
    """Every bound where the mean is exactly alpha, and how close to alpha it still certifies."""
    for kind in kinds:
        prepare = KINDS[kind]
        for n in sizes:
            draw = prepare((n, draws), torch.Generator().manual_seed(n))
            for alpha, delta in LEVELS:
                for name, bound in (OURS | PEERS).items():
                    if bound is clopper_pearson and prepare is not bernoulli:
                        continue
                    failures = int((bound(draw(alpha), alpha, delta) <= delta).sum())
                    realized = None
                    if sharpness and name in OURS:
                        realized = 0.0
                        going = torch.ones(draws, dtype=torch.bool)
                        for tenth in range(1, 10):
                            losses = draw(alpha * tenth / 10)
                            going &= bound(losses, alpha, delta) <= delta
                            if not bool(going.any()):
                                break
                            realized += float(going.double().mean()) / 10
                    yield Row(
                        name,
                        kind,
                        n,
                        f"alpha = {alpha:g}, delta = {delta:g}",
                        delta,
                        draws,
                        failures=failures,
                        sharpness=realized,
                        ours=name in OURS,
                    )


# --- controlled risks ----------------------------------------------------------------------------

CLASSES = 3


def population(images: int, seed: int, kind: str = "beta") -> tuple[Tensor, Tensor]:
    """Images of 6 x 8 pixels whose errors are of a kind; class 2 is rare, small, easily missed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(images, 6, 8, dtype=torch.int64)
    edge = torch.randint(1, 8, (images, 1, 1), generator=generator)
    labels[(torch.arange(8) >= edge).expand_as(labels)] = 1
    rare = torch.rand(images, generator=generator) < 0.4
    labels[rare, 1:3, 2:5] = 2
    labels[torch.rand(labels.shape, generator=generator) < 0.03] = 255
    truth = torch.nn.functional.one_hot(labels.clamp(max=CLASSES - 1), CLASSES).movedim(-1, 1)
    level = torch.rand(images, 1, 1, 1, generator=generator)
    noise = torch.randn(images, CLASSES, 6, 8, generator=generator)
    shared = torch.randn(images, CLASSES, 1, 1, generator=generator)
    if kind == "Bernoulli":  # all of an image is right, or all of it is wrong
        ease, noise = torch.where(level < 0.12, -1.0, 3.0), 0.3 * noise
    elif kind == "beta":  # shares of wrong pixels between 0 and a half
        ease = 0.5 + 4.5 * level
    else:  # pixels of an image are wrong together
        ease, noise = torch.tensor(2.5), (shared + noise) / 2**0.5
    return (ease * truth + 1.1 * noise) * 1.5, labels


def confident_misses(sets: Tensor, labels: Tensor) -> Tensor:
    """A loss that is not monotone: labeled pixels with one class in their set, and a wrong one."""
    valid = labels != 255
    held = sets.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
    return ((sets.sum(1) == 1) & ~held & valid).flatten(1).double().mean(1)


RISKS: dict[str, Risk] = {
    "miscoverage": Miscoverage(),
    "false negatives, one class": FalseNegativeRate(CLASSES, classes=(2,)),
    "false negatives, each class": FalseNegativeRate(CLASSES),
    "false negatives, diluted": DilutedFalseNegativeRate(CLASSES, classes=(2,)),
    "false negatives, worst class": WorstFalseNegativeRate(CLASSES),
    "0.9 of the pixels covered": CoverageShare(0.9),
    "objects missed": InstanceRecall(0.5),
    "a function of sets": SetRisk(confident_misses, "share of confident misses"),
    "error among kept, Argmax": KeptError(Argmax, CLASSES),
    "error among kept, BackgroundPriority": KeptError(partial(BackgroundPriority), CLASSES),
    "error among kept, each class": KeptError(Top, CLASSES, per_class=True),
    "false share of an image's kept": FalseShare(Argmax, CLASSES),
}


def risk_rows(
    draws: int = 2000,
    sizes: Iterable[int] = SIZES,
    kinds: Iterable[str] = tuple(KINDS),
    levels: Iterable[tuple[float, float]] = LEVELS,
    names: Iterable[str] = tuple(RISKS),
) -> Iterator[Row]:
    """Every risk, calibrated on images drawn with replacement; the truth is the population."""
    images, grid = 500, threshold_grid(0.0, 1.0, 31)
    ids = range(images)
    for kind in kinds:
        logits, labels = population(images, 0, kind)
        extra = population(200, 1, kind)
        marks = checksums(logits, labels)
        for name in names:
            risk = RISKS[name]
            seen = RiskCalibrator(risk, grid=grid).update(logits, labels, ids)
            rows = torch.stack([seen._units[unit] for unit in ids])
            tuning = RiskCalibrator(risk, grid=grid).update(*extra)
            gain = _gain(risk, logits, labels, grid)
            drawn = {
                n: in_order(
                    rows,
                    marks,
                    torch.randint(images, (n, draws), generator=torch.Generator().manual_seed(n)),
                )
                for n in sizes
            }
            modes: list[tuple[float, float | None]] = list(levels)
            # Of several thresholds in expectation, the largest mean is not what is promised.
            if not isinstance(risk, KeptError) and name != "false negatives, each class":
                modes += [(alpha, None) for alpha in sorted({a for a, _ in modes}, reverse=True)]
            for alpha, delta in modes:
                losses = risk.losses(rows, alpha)
                weight = losses.counted.double()[..., None]
                truth = (losses.values * weight).sum(0) / weight.sum(0).clamp(min=1)  # (R, K)
                start = Start.fit(tuning, alpha) if isinstance(risk, KeptError) else None
                for n, picks in drawn.items():
                    if delta is None:
                        step = in_expectation(risk, losses, picks, alpha)
                    else:
                        step = with_probability(
                            risk, losses, picks, alpha, delta, start=start, grid=grid
                        )
                    # What was calibrated with -inf, nothing kept, or +inf, has no risk.
                    risks = torch.where(
                        step < 0,
                        0.0,
                        truth.expand(draws, -1, -1).gather(2, step.clamp(min=0)[..., None])[..., 0],
                    )
                    values = risks.amax(1)
                    unit = "kept" if risk.keeps else "set size"
                    yield Row(
                        f"{name}" + ("" if delta is not None else ", in expectation"),
                        kind,
                        n,
                        f"alpha = {alpha:g}" + (f", delta = {delta:g}" if delta else ""),
                        delta if delta is not None else alpha,
                        draws,
                        failures=int((risks > alpha).any(1).sum()) if delta is not None else None,
                        mean=float(values.mean()) if delta is None else None,
                        error=float(values.std() / draws**0.5),
                        sharpness=float(values.mean()) / alpha,
                        given=f"{unit} {float(gain(step).mean()):.2f}",
                    )


def checksums(logits: Tensor, labels: Tensor) -> Tensor:
    """What a calibrator remembers of each image beside its counts. int64 ``(N, 2)``."""
    found = [
        RiskCalibrator(Miscoverage()).update(image[None], truth[None])._checksum
        for image, truth in zip(logits, labels, strict=True)
    ]
    return torch.stack(found)


def in_order(rows: Tensor, marks: Tensor, picks: Tensor) -> Tensor:
    """The images of each draw in the order in which ``RiskCalibrator`` tests them.

    Args:
        rows: Each image's counts. int64 ``(P, T)``.
        marks: Each image's checksum. int64 ``(P, 2)``.
        picks: Images of each draw, in any order. int64 ``(n, draws)``.

    Returns:
        The same images of each draw. int64 ``(n, draws)``.
    """
    listed = [row.tobytes() for row in rows.numpy()]
    place = torch.empty(len(rows), dtype=torch.int64)
    place[sorted(range(len(rows)), key=listed.__getitem__)] = torch.arange(len(rows))
    ordered = picks.gather(0, place[picks].argsort(0))
    control = RiskCalibrator(Miscoverage())
    for draw, chosen in enumerate(picks.T):
        control._checksum = marks[chosen].sum(0)
        ordered[:, draw] = ordered[control._order(len(chosen)), draw]
    return ordered


def with_probability(
    risk: Risk,
    losses: LossesOfRisk,
    picks: Tensor,
    alpha: float,
    delta: float,
    *,
    start: Start | None,
    grid: Tensor,
    bound: PValue = betting,
) -> Tensor:
    """What ``RiskCalibrator.compute`` does, for many draws at once.

    Args:
        risk: The risk.
        losses: Its losses on the population, ``(P, R, K)``.
        picks: Images of each draw, in the order of testing. int64 ``(n, draws)``.
        alpha: Its level.
        delta: For all rows at once.
        start: Where tests begin.
        grid: The thresholds.
        bound: The test.

    Returns:
        Position of each threshold on the grid, -1 for none. int64 ``(draws, R)``.
    """
    count, steps = losses.values.shape[1:]
    share = delta / count
    chosen = torch.full((picks.shape[1], count), -1)
    for row in range(count):
        first = 0
        if start is not None:
            first = max(int((grid <= start.thresholds[row]).sum()) - 1, 0)
            first = first if risk.keeps else steps - 1 - first
        values = losses.values[:, row] if risk.keeps else losses.values[:, row].flip(1)
        inside = losses.counted[:, row][picks]
        sizes = inside.sum(0)
        for size in sorted(set(sizes.tolist())):
            draws = (sizes == size).nonzero()[:, 0]
            if size == 0:
                continue
            images = picks[:, draws].T[inside[:, draws].T].view(len(draws), size).T
            live = torch.arange(len(draws))
            column = first
            while column < steps and len(live):
                width = min(max(2048 // len(live), 1), steps - column)
                block = values[:, column : column + width][images[:, live]]
                small = bound(block.flatten(1), alpha, share).view(len(live), width) <= share
                passed = small.cumprod(1).sum(1)
                some = passed > 0
                chosen[draws[live[some]], row] = column + passed[some] - 1
                live = live[passed == width]
                column += width
    return chosen if risk.keeps else torch.where(chosen < 0, -1, steps - 1 - chosen)


def in_expectation(risk: Risk, losses: LossesOfRisk, picks: Tensor, alpha: float) -> Tensor:
    """As :func:`with_probability`, for conformal risk control."""
    count, steps = losses.values.shape[1:]
    draws = picks.shape[1]
    often = torch.zeros(draws, len(losses.values), dtype=torch.float64)
    often.scatter_add_(1, picks.T, torch.ones(draws, len(picks), dtype=torch.float64))
    chosen = torch.full((draws, count), -1)
    for row in range(count):
        values = losses.values[:, row] if risk.keeps else losses.values[:, row].flip(1)
        values = values if risk.monotone else values.cummax(1).values
        counted = losses.counted[:, row].double()
        # Sums of integers below 2**53: exact.
        mass = often @ ((values * UNIT_MASS).ceil() * counted[:, None])
        units = (often @ counted).long()
        limits = torch.tensor([budget(alpha, n, UNIT_MASS) for n in units.tolist()])
        chosen[:, row] = (mass <= limits[:, None]).cumprod(1).sum(1) - 1
    return chosen if risk.keeps else torch.where(chosen < 0, -1, steps - 1 - chosen)


def _gain(risk: Risk, logits: Tensor, labels: Tensor, grid: Tensor) -> Callable[[Tensor], Tensor]:
    """Mean set size, or share of labeled pixels kept, of the thresholds' places ``(draws, R)``."""
    if risk.keeps:
        kind = KeptError(Top, CLASSES, per_class=True) if risk.axes else None
        counted = kind or KeptError(risk.rule or Argmax, CLASSES)
        control = RiskCalibrator(counted, grid=grid).update(logits, labels)
        count = CLASSES if risk.axes else 1
        table = control.table()
        kept = table[:, :-count].view(len(table), 2, count, -1)[:, 1].sum(0)
        given, otherwise = kept.double() / int((labels != 255).sum()), 0.0
    else:
        scores = LAC()(logits)
        given = torch.stack([(scores <= limit).double().mean((0, 2, 3)) for limit in grid], 1)
        otherwise = 1.0

    def total(step: Tensor) -> Tensor:
        places = step.expand(-1, len(given))
        table = given.expand(len(places), -1, -1)
        held = table.gather(2, places.clamp(min=0)[..., None])[..., 0]
        return torch.where(places < 0, otherwise, held).sum(1)

    return total


# --- coverage, ours and pooled -------------------------------------------------------------------


def coverage_rows(
    draws: int = 2000, sizes: Iterable[int] = SIZES, images: int = 500
) -> Iterator[Row]:
    """Image coverage by the unit that is counted; and a quantile without n + 1."""
    logits, labels = population(images, 2)
    labels[torch.arange(0, images, 2), :, 1:] = 255  # images of very unequal size
    for score in (LAC(), APS()):
        raw = score.of_labels(logits, labels.clamp(max=CLASSES - 1)).flatten(1)
        valid = (labels != 255).flatten(1)
        for n in sizes:
            generator = torch.Generator().manual_seed(n)
            missed: dict[tuple[float, str], list[float]] = {
                (alpha, unit): [] for alpha in (0.1, 0.05) for unit in ("image", "pixel")
            }
            for _ in range(draws):
                chosen = torch.randint(images, (n + 1,), generator=generator)
                new, seen = raw[chosen[n]], valid[chosen[n]]
                for unit in ("image", "pixel"):
                    calibrator = SplitCalibrator(score, unit=unit, store="exact")
                    calibrator.update(logits[chosen[:n]], labels[chosen[:n]])
                    for alpha in (0.1, 0.05):
                        limit = calibrator.compute(alpha).thresholds
                        share = ((new > limit) & seen).sum() / seen.sum()
                        missed[alpha, unit].append(float(share))
            for (alpha, unit), values in missed.items():
                found = torch.tensor(values, dtype=torch.float64)
                yield Row(
                    "miscoverage, unit = image"
                    if unit == "image"
                    else "miscoverage, pixels pooled and counted (TorchCP and others)",
                    f"{type(score).__name__}, unequal images",
                    n,
                    f"alpha = {alpha:g}",
                    alpha,
                    draws,
                    mean=float(found.mean()),
                    error=float(found.std() / draws**0.5),
                    sharpness=float(found.mean()) / alpha,
                    ours=unit == "image",
                )
    for n in sizes:
        generator = torch.Generator().manual_seed(n)
        scores = torch.rand(draws, n + 1, generator=generator, dtype=torch.float64)
        for alpha in (0.1, 0.05):
            plain = torch.quantile(scores[:, :n], 1 - alpha, dim=1)
            exact = torch.stack([conformal_quantile(row[:n], alpha) for row in scores])
            peer = "torch.quantile without n + 1 (torch-uncertainty)"
            for name, limit in (("conformal quantile", exact), (peer, plain)):
                outside = (scores[:, n] > limit).double()
                yield Row(
                    name,
                    "independent scores",
                    n,
                    f"alpha = {alpha:g}",
                    alpha,
                    draws,
                    failures=int(outside.sum()),
                    sharpness=float(outside.mean()) / alpha,
                    ours=name == "conformal quantile",
                )


# --- the calibrator itself ------------------------------------------------------------------------

PIXELS = 16


def at_its_limit(
    kind: str, shape: tuple[int, int], alpha: float, *, kept: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images, ``(draws, n)`` of them, whose risk is exactly alpha, and which no two draws share.

    Sure pixels have a score below 0.3 and the others above it. Of what the risk counts, all pixels
    or the sure ones, an image has a share wrong that is of the kind named; the pixels that are
    not sure are all right.
    """
    n, draws = shape
    share = KINDS[kind]((n, draws), generator)(alpha).T[..., None]
    counted = torch.full((draws, n, 1), PIXELS)
    if kept:
        counted = torch.randint(1, 5, (draws, n, 1), generator=generator) * (PIXELS // 4)
    place = torch.arange(PIXELS).expand(draws, n, PIXELS)
    # One offset for all pixels of an image: as many are wrong as the share says, on average.
    offset = torch.rand(draws, n, 1, generator=generator, dtype=torch.float64)
    wrong = (place < counted) & ((place + offset) / counted < share)
    size = torch.rand(draws, n, PIXELS, generator=generator)
    size = torch.where(place < counted, 1 + size, size / 2)
    labels = torch.randint(2, (draws, n, PIXELS), generator=generator)
    top = torch.where(wrong, 1 - labels, labels)
    logits = torch.zeros(draws, n, 2, PIXELS).scatter(2, top[:, :, None], size[:, :, None])
    return logits, labels


CALIBRATED: dict[str, Risk] = {
    "miscoverage": Miscoverage(),
    "error among kept": KeptError(Argmax, 2),
}


def calibrator_rows(
    draws: int = 2000,
    sizes: Iterable[int] = (50, 200),
    kinds: Iterable[str] = tuple(KINDS),
    names: Iterable[str] = tuple(CALIBRATED),
) -> Iterator[Row]:
    """``RiskCalibrator.update`` and ``compute``, where the one threshold has a risk of alpha."""
    grid = torch.tensor([0.3])
    for kind in kinds:
        for name in names:
            risk = CALIBRATED[name]
            for n in sizes:
                for alpha, delta in ((0.1, 0.1), (0.05, 0.05)):
                    generator = torch.Generator().manual_seed(n)
                    made = at_its_limit(
                        kind, (n, draws), alpha, kept=risk.keeps, generator=generator
                    )
                    bounds = dict(OURS)
                    if kind != "Bernoulli" or risk.keeps:
                        del bounds["Clopper-Pearson"]
                    failures = dict.fromkeys(bounds, 0)
                    for logits, labels in zip(*made, strict=True):
                        control = RiskCalibrator(risk, grid=grid).update(logits, labels)
                        for test, bound in bounds.items():
                            found = control.compute(alpha, delta, bound=bound).thresholds
                            failures[test] += bool(found.isfinite())
                    for test, count in failures.items():
                        yield Row(
                            f"{name} by {test}",
                            kind,
                            n,
                            f"alpha = {alpha:g}, delta = {delta:g}",
                            delta,
                            draws,
                            failures=count,
                        )


# --- masks, weights and streams -------------------------------------------------------------------


def mask_rows(draws: int = 2000, sizes: Iterable[int] = SIZES, images: int = 500) -> Iterator[Row]:
    """Whether the outer mask of a new image holds its share of the true one."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, images, 8, 9, generator=generator)
    truth = dilate(noise[0] > 0.95, 1)
    predicted = dilate(noise[1] > 0.95, 1) | (truth & dilate(noise[2] > 0.7, 1))
    tau = 0.9
    radii = needed_radius(predicted, truth, tau)
    radii = radii[~radii.isnan()]
    for n in sizes:
        for alpha in (0.1, 0.05):
            lost, total = 0, 0.0
            for _ in range(draws):
                chosen = radii[torch.randint(len(radii), (n + 1,), generator=generator)]
                seen = MarginCalibrator(tau)
                seen._outer = chosen[:n].sort().values
                radius = seen.compute(alpha).outer_radius
                lost += float(chosen[n]) > radius
                total += min(radius, 9.0)
            yield Row(
                "margin, outer mask",
                "masks with gaps",
                n,
                f"alpha = {alpha:g}",
                alpha,
                draws,
                failures=lost,
                sharpness=lost / draws / alpha,
                given=f"radius {total / draws:.2f}",
            )


def weighted_rows(
    draws: int = 2000, sizes: Iterable[int] = (10, 50, 200), images: int = 500
) -> Iterator[Row]:
    """Miscoverage on a domain where hard images are three times as frequent."""
    logits, labels = population(images, 4)
    hard = logits.softmax(1).amax(1).mean((1, 2))
    ratio = torch.where(hard < hard.median(), 1.5, 0.5)  # of mean 1: all domains' images
    scores = LAC().of_labels(logits, labels.clamp(max=CLASSES - 1)).flatten(1)
    valid = (labels != 255).flatten(1)
    held = {
        "weighted by image": WeightedCalibrator().update(logits, labels, ratio)._units,
        "without weights": WeightedCalibrator().update(logits, labels, torch.ones(images))._units,
    }
    for n in sizes:
        generator = torch.Generator().manual_seed(n)
        missed: dict[tuple[float, str], list[float]] = {
            (alpha, how): [] for alpha in (0.1, 0.05) for how in held
        }
        for _ in range(draws):
            chosen = torch.randint(images, (n,), generator=generator).tolist()
            new = int(torch.multinomial(ratio, 1, generator=generator))
            for how, units in held.items():
                seen = WeightedCalibrator()
                seen.num_classes, seen._units = CLASSES, [units[i] for i in chosen]
                weight = ratio[new : new + 1] if how == "weighted by image" else torch.ones(1)
                for alpha in (0.1, 0.05):
                    limit = seen.compute(alpha).thresholds(weight)
                    lost = ((scores[new] > limit) & valid[new]).sum() / valid[new].sum()
                    missed[alpha, how].append(float(lost))
        for (alpha, how), values in missed.items():
            found = torch.tensor(values, dtype=torch.float64)
            yield Row(
                f"miscoverage, {how}",
                "hard images more often",
                n,
                f"alpha = {alpha:g}",
                alpha,
                draws,
                mean=float(found.mean()),
                error=float(found.std() / draws**0.5),
                sharpness=float(found.mean()) / alpha,
                ours=how == "weighted by image",
            )


def alarm_rows(draws: int = 2000, sizes: Iterable[int] = (50, 200)) -> Iterator[Row]:
    """False alarms over a stream in which nothing changes."""
    generator = torch.Generator().manual_seed(0)
    for n in sizes:
        streams = torch.randn(draws, n, generator=generator)
        fixed = torch.randn(draws, n, generator=generator).sort(1).values
        draw = torch.rand(draws, n, generator=generator)
        above = n - torch.searchsorted(fixed, streams)
        ranked = ((above + draw) / (n + 1)).tolist()
        online = [ExchangeabilityMartingale(i).update(stream) for i, stream in enumerate(streams)]
        against = [ExchangeabilityMartingale() for _ in ranked]
        for martingale, p_values in zip(against, ranked, strict=True):
            for p_value in p_values:
                martingale._bet(p_value)
        names = {
            "alarm, online ranks": online,
            "alarm, ranks against a fixed calibration set": against,
        }
        for delta in (0.1, 0.05):
            for name, watchers in names.items():
                yield Row(
                    name,
                    f"{n} numbers that do not change",
                    n,
                    f"delta = {delta:g}",
                    delta,
                    draws,
                    failures=sum(watcher.alarm(delta) for watcher in watchers),
                    ours=watchers is online,
                )


# --- the page ------------------------------------------------------------------------------------

HEAD = """# Validity table

Every bound, every controlled risk, and coverage, margins, weights and alarms, over repeated draws:
how often each promise fails, and how much it gives away. Written by `make guarantee`; seeds are
fixed, so the page is the same on every run.

A line *holds* if its failures are no more than an exact binomial 99.99 % upper bound of the
nominal probability allows; for expectations, if the mean risk is at most alpha plus 3.72 standard
errors. *Used* is what was found, over the most that this allows: above 1 the line does not hold.
*Realised* is the mean true risk of what was chosen, over alpha: 1 gives nothing away.
Lines in italics are other ways of computing the same, as other libraries do it, on the same draws.
"""

SECTIONS = {
    "Bounds": """Failures: how often a mean of exactly alpha is declared to be below alpha.
Realised: means of 0.1, 0.2, ... times alpha, the largest that is still certified. Among the tests
that serve any loss, betting gives away least from 200 images on, in every line. Of losses that are
0 or 1 Clopper-Pearson is exact, and gives away less than any.""",
    "Calibrators at their limit": """`RiskCalibrator.update` and `compute`, draw by draw, on images
whose risk is exactly alpha at the one threshold that is tried: failures are the calibrations that
certify it. Everything is as for a user: counts from logits, the order of the tests from seed and
data.""",
    "Controlled risks": """Images drawn with replacement from 500, whose errors are all or nothing
(Bernoulli), of smooth shares (beta), or shared by an image's pixels (clustered); the truth is those
500. Tests are by betting, in the order in which `RiskCalibrator` draws the images: a test holds
these lines equal to what its `compute` gives. Failures: how often the true risk of the calibration
exceeds alpha; in expectation, the mean risk. Given: mean number of classes in a set, or share of
the labeled pixels that keep a label.""",
    "Coverage": """Half of the images have an eighth of the labeled pixels of the others.""",
    "Masks, weights and streams": """Margins: how often a new image's outer mask holds less than 0.9
of the true one. Weights: half of the images, those with less sure pixels, are three times as
frequent among new images as the others. Alarms: how often one is raised, ever, where nothing
changes.""",
}


def jobs(draws: int) -> dict[str, list[Callable[[], Iterator[Row]]]]:
    """What makes the lines of each section, in pieces that may run side by side."""
    return {
        "Bounds": [partial(bound_rows, draws, kinds=(kind,)) for kind in KINDS],
        "Calibrators at their limit": [
            partial(calibrator_rows, draws, kinds=(kind,), names=(name,))
            for kind in KINDS
            for name in CALIBRATED
        ],
        "Controlled risks": [
            partial(risk_rows, draws, kinds=(kind,), names=(name,))
            for kind in KINDS
            for name in RISKS
        ],
        "Coverage": [partial(coverage_rows, draws, (n,)) for n in SIZES],
        "Masks, weights and streams": [
            partial(mask_rows, draws),
            partial(weighted_rows, draws),
            partial(alarm_rows, draws),
        ],
    }


def lines_of(job: Callable[[], Iterator[Row]]) -> list[Row]:
    """A job's lines, by one thread."""
    torch.set_num_threads(1)
    return list(job())


def summary(rows: Iterable[Row]) -> Iterator[str]:
    """One line per name: how many hold, the worst of them, and what is given away."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name if row.ours else f"*{row.name}*", []).append(row)
    yield (
        "| what | lines that hold | most used | found / nominal there | where "
        "| realized at n = 10 | 50 | 200 | 1000 |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, lines in by_name.items():
        worst = max(lines, key=lambda row: row.used)
        holding = sum(row.holds for row in lines)
        told = f"{holding} of {len(lines)}"
        told = told if holding == len(lines) else f"**{told}**"
        sharp: list[str] = []
        for n in SIZES:
            found = [row.sharpness for row in lines if row.n == n and row.sharpness is not None]
            sharp.append(f"{sum(found) / len(found):.2f}" if found else "")
        yield (
            f"| {name} | {told} | {worst.used:.2f} | {worst.found / worst.nominal:.2f} "
            f"| {worst.setting} | {' | '.join(sharp)} |"
        )


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Rows as Markdown."""
    yield "| what | setting | nominal | found | holds | realized / alpha | given |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        name = row.name if row.ours else f"*{row.name}*"
        found = f"{row.found:.3f}" if row.failures is not None else f"mean {row.found:.4f}"
        sharp = "" if row.sharpness is None else f"{row.sharpness:.2f}"
        verdict = "yes" if row.holds else "**no**"
        yield (
            f"| {name} | {row.setting} | {row.nominal:g} | {found} | {verdict} | {sharp} "
            f"| {row.given} |"
        )


def page(sections: dict[str, list[Row]], draws: int) -> Iterator[str]:
    """The page: a summary of each section, then all lines, folded."""
    yield HEAD
    total = [row for rows in sections.values() for row in rows]
    ours = [row for row in total if row.ours]
    others = [row for row in total if not row.ours]
    yield (
        f"{draws} draws per line. Of {len(ours)} lines of cpseg {sum(row.holds for row in ours)} "
        f"hold; of {len(others)} of other ways, {sum(row.holds for row in others)}."
    )
    for title, rows in sections.items():
        yield f"\n## {title}\n\n{SECTIONS[title]}\n"
        yield from summary(rows)
        yield f"\n<details><summary>All {len(rows)} lines</summary>\n"
        yield from table(rows)
        yield "\n</details>"


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    arguments = parser.parse_args()
    sections: dict[str, list[Row]] = {}
    with ProcessPoolExecutor(arguments.workers) as pool:
        for title, pieces in jobs(arguments.draws).items():
            sections[title] = []
            for rows in pool.map(lines_of, pieces):
                sections[title] += rows
                print(f"{title}: {len(sections[title])} lines", file=sys.stderr, flush=True)
    for line in page(sections, arguments.draws):
        print(line)


if __name__ == "__main__":
    main()
