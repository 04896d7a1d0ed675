"""Coverage over repeated draws, held against exact binomial bounds from below and from above.

One draw is a calibration set and one fresh image, of which one random labeled pixel is looked
at: whether its class is missing is a coin whose probability is the expected share of missed
pixels, so the count over draws is binomial. Pixels of an image share a random effect, and images
differ in how many labeled pixels they have, in a way that goes with how hard they are.

From above: with leave-one-out thresholds below the one of all ``n + 1`` images together, at least
``alpha - (1 + jump) / (n + 1)`` is missed in expectation, ``jump`` being the largest loss that one
pixel makes, and never less than one pixel of one image: ``1 / (most_pixels * (n + 1))``. A vacuous
threshold misses nothing and fails.
"""

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from cpseg import ClassConditionalCalibrator, GroupCalibrator, PixelSetPredictor, SplitCalibrator
from cpseg.accumulate import Evidence, Exact, occurrences
from cpseg.filters import SoftLabels
from cpseg.training import pool_probabilities

CHANCE = 1e-6  # that a true statement fails its test
SETTINGS = [(9, 0.1), (19, 0.05), (50, 0.1), (200, 0.1)]
MOST = 6  # pixels of an image, or of a group in it


def least(draws: int, probability: float) -> int:
    return int(binom.ppf(CHANCE, draws, probability))


def most(draws: int, probability: float) -> int:
    return int(binom.ppf(1 - CHANCE, draws, probability))


def ceiling(n: float, alpha: float, most_pixels: int) -> float:
    missed = max(alpha - 2 / (n + 1), 1 / (most_pixels * (n + 1)))
    return 1 - missed


def images(
    generator: torch.Generator, *shape: int, rows: int, present: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, rows and which pixels are labeled; each ``(*shape, rows * MOST)``."""
    effect = torch.randn(*shape, 1, 1, generator=generator)
    of_row = torch.randn(*shape, rows, 1, generator=generator)
    scores = effect + of_row + 0.7 * torch.randn(*shape, rows, MOST, generator=generator)
    # Hard images have few pixels: an average over pixels would flatter.
    share = torch.sigmoid(-2 * (effect + of_row))
    count = 1 + torch.floor(share * MOST).clamp(max=MOST - 1)
    there = torch.rand(*shape, rows, 1, generator=generator) < present
    valid = (torch.arange(MOST) < count) & there
    row = torch.arange(rows)[:, None].expand_as(scores)
    return scores.flatten(-2), row.flatten(-2), valid.flatten(-2)


def one_of(valid: Tensor, generator: torch.Generator) -> Tensor:
    """A random valid pixel of each row: its index, ``(...)``."""
    return (torch.rand(valid.shape, generator=generator) * valid).argmax(-1)


def thresholds(
    scores: Tensor, row: Tensor, valid: Tensor, rows: int, alpha: float, *, by_unit: bool = True
) -> tuple[Tensor, Tensor]:
    """Calibrations of many draws at once, each with rows of its own: ``(draws, rows)``, and n."""
    draws = scores.shape[1]
    evidence = Evidence(Exact(draws * rows), by_unit=by_unit, device="cpu")
    row = row + torch.arange(draws)[:, None] * rows
    held = torch.where(valid, row, draws * rows).flatten(1)
    cells = torch.where(valid, evidence.store.cells(scores), evidence.store.num_cells).flatten(1)
    evidence.add(cells, held, occurrences(held, draws * rows + 1)[:, :-1], None)
    found = evidence.quantiles([alpha] * (draws * rows)).view(draws, rows)
    return found, evidence.num_units.view(draws, rows)


@pytest.mark.guarantee
@pytest.mark.parametrize(("n", "alpha"), SETTINGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_images_are_covered_and_not_vacuously(n: int, alpha: float, rows: int) -> None:
    # One row is the split calibrator; three are classes, or groups, held to each on its own.
    draws = 4000 if n < 100 else 1500
    generator = torch.Generator().manual_seed(n)
    present = 1.0 if n < 50 else 0.8  # so that nine images are nine for every row
    scores, row, valid = images(generator, n, draws, rows=rows, present=present)
    found, units = thresholds(scores, row, valid, rows, alpha)
    assert found.isfinite().float().mean() > 0.999
    if n < 50:
        assert found.isfinite().all()
    new, new_row, new_valid = images(generator, draws, rows=rows, present=1.0)
    for g in range(rows):
        pixel = one_of(new_valid & (new_row == g), generator)
        covered = int((new[torch.arange(draws), pixel] <= found[:, g]).sum())
        assert least(draws, 1 - alpha) <= covered
        assert covered <= most(draws, ceiling(int(units.min()), alpha, MOST)) < draws


@pytest.mark.guarantee
@pytest.mark.parametrize(("n", "equal"), [(5, True), (5, False), (20, False)])
def test_pooled_pixels_are_not_covered(n: int, *, equal: bool) -> None:
    # What the documentation warns of, measured: the deficit is beyond chance.
    draws, alpha, pixels = (10000, 0.1, 30) if n == 5 else (4000, 0.1, 12)
    generator = torch.Generator().manual_seed(n)
    hits = total = 0
    for _ in range(draws // 2000):
        effect = torch.randn(n + 1, 2000, 1, generator=generator)
        scores = effect + 0.6 * torch.randn(n + 1, 2000, pixels, generator=generator)
        count = torch.full_like(effect, pixels) if equal else (effect < 0.7) * (pixels - 1.0) + 1
        valid = torch.arange(pixels) < count
        row = torch.zeros(scores.shape, dtype=torch.int64)
        found, _ = thresholds(scores[:n], row[:n], valid[:n], 1, alpha, by_unit=False)
        pixel = one_of(valid[n], generator)
        hits += int((scores[n][torch.arange(2000), pixel] <= found[:, 0]).sum())
        total += 2000
    print(f"pixel unit, {n} images, equal={equal}: {hits / total:.4f}")  # noqa: T201
    assert hits < least(total, 1 - alpha)


KINDS = ["split", "class", "group"]


def calibrated(
    kind: str, logits: Tensor, labels: Tensor, groups: Tensor, alpha: float
) -> PixelSetPredictor:
    if kind == "split":
        calibration = SplitCalibrator(store="exact").update(logits, labels).compute(alpha)
    elif kind == "class":
        per_class = ClassConditionalCalibrator(2, store="exact").update(logits, labels)
        calibration = per_class.compute(alpha)
    else:
        per_group = GroupCalibrator(2, store="exact").update(logits, labels, groups)
        calibration = per_group.compute(alpha)
    assert calibration.thresholds.isfinite().all()
    return PixelSetPredictor(calibration)


@pytest.mark.guarantee
@pytest.mark.parametrize(("n", "alpha"), SETTINGS[:2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_public_road_covers(kind: str, n: int, alpha: float) -> None:
    # Two to four labeled pixels of six; one or two of each class, and of each group.
    draws = 1200
    generator = torch.Generator().manual_seed(n)
    shape = draws, n + 1, 6
    labels = torch.tensor([0, 1, 0, 1, 0, 1]).expand(shape).clone()
    groups = torch.tensor([0, 0, 1, 1, 0, 1])
    effect = torch.randn(draws, n + 1, 1, generator=generator)
    margin = 1 + effect + 0.5 * torch.randn(shape, generator=generator)
    hidden = torch.rand(draws, n + 1, 1, generator=generator) < torch.sigmoid(effect)
    labels[..., 4:] = 255
    labels[..., 0] = torch.where(hidden[..., 0], 0, 255)
    labels[..., 4] = torch.where(hidden[..., 0], 255, 0)
    side = torch.where(torch.tensor([0, 1, 0, 1, 0, 1]) == 0, margin, -margin)
    logits = torch.stack((side, torch.zeros_like(side)), 2)
    covered = 0
    for draw in range(draws):
        predictor = calibrated(kind, logits[draw, :n], labels[draw, :n], groups, alpha)
        new = logits[draw, n:], labels[draw, n]
        sets = predictor(new[0], groups if kind == "group" else None)[0]
        wanted = {
            "split": new[1] != 255,
            "class": new[1] == draw % 2,
            "group": (new[1] != 255) & (groups == draw % 2),
        }[kind]
        pixel = int(one_of(wanted, generator))
        covered += int(sets[new[1][pixel], pixel])
    assert least(draws, 1 - alpha) <= covered
    assert covered <= most(draws, ceiling(n, alpha, 4)) < draws


@pytest.mark.guarantee
def test_a_pool_of_two_calibrated_crosswise_misses_what_either_may() -> None:
    """Each annotator errs in its own way, and is calibrated on the other's half of the images."""
    draws, n, alpha = 1200, 9, 0.1
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(2, (draws, 2 * n + 1, 6), generator=generator)
    labels[..., 4:] = 255
    shares: list[Tensor] = []
    for half in (slice(0, n), slice(n, 2 * n)):
        effect = torch.randn(draws, 2 * n + 1, 1, generator=generator)
        margin = 1 + effect + 0.5 * torch.randn(labels.shape, generator=generator)
        side = torch.where(labels == 0, margin, -margin)
        logits = torch.stack((side, torch.zeros_like(side)), 2)
        found: list[Tensor] = []
        for draw in range(draws):
            calibrator = SplitCalibrator(store="exact")
            calibrator.update(logits[draw, half], labels[draw, half])
            found.append(SoftLabels(calibrator.compute(alpha))(logits[draw, -1:]))
        shares.append(torch.cat(found))
    left = pool_probabilities(shares[0].log(), shares[1]) > 0
    pixel = one_of(labels[:, -1] != 255, generator)
    every = torch.arange(draws)
    missed = draws - int(left[every, labels[every, -1, pixel], pixel].sum())
    assert missed <= most(draws, 2 * alpha)
    alone = draws - int((shares[0] > 0)[every, labels[every, -1, pixel], pixel].sum())
    assert missed > alone >= least(draws, 1 - ceiling(n, alpha, 4))


@pytest.mark.guarantee
def test_too_few_images_keep_every_class() -> None:
    scores, row, valid = images(torch.Generator().manual_seed(0), 8, 5, rows=3, present=1.0)
    found, _ = thresholds(scores, row, valid, 3, 0.1)
    assert found.isinf().all()
