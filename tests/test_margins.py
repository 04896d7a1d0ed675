"""Radii against growing masks step by step, and what margins promise over draws."""

from math import ceil, inf, isnan, nextafter, sqrt
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor

from cpseg import merge_all
from cpseg.errors import FileError, InputError
from cpseg.margins import MarginCalibrator, Margins, needed_radius
from cpseg.morphology import dilate, erode


def blobs(n: int, shape: tuple[int, ...], seed: int, cut: float = 0.8) -> Tensor:
    noise = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))
    return dilate(noise > cut, 1)


@given(st.integers(0, 30), st.sampled_from([(9,), (5, 7), (3, 4, 5)]), st.sampled_from([0.5, 1.0]))
def test_the_radius_is_the_smallest_that_holds_the_share(
    seed: int, shape: tuple[int, ...], tau: float
) -> None:
    predicted, truth = blobs(3, shape, seed, 0.97), blobs(3, shape, seed + 100, 0.9)
    for i, radius in enumerate(needed_radius(predicted, truth, tau).tolist()):
        count = int(truth[i].sum())
        if not count:
            assert isnan(radius)
        elif not predicted[i].any():
            assert radius == inf
        else:
            wanted = ceil(tau * count)
            grown = dilate(predicted[i : i + 1], radius)[0]
            assert int((grown & truth[i]).sum()) >= wanted
            if radius > 0:
                less = dilate(predicted[i : i + 1], radius - 1e-6)[0]
                assert int((less & truth[i]).sum()) < wanted


def test_a_radius_one_rounding_below_a_root_still_reaches_what_it_measured() -> None:
    # On some processors torch's sqrt(8) is the double below it.
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[0, 0, 0] = True
    squares = sorted({y * y + x * x for y in range(40) for x in range(40)})[:400]
    for square in squares:
        exact = dilate(mask, sqrt(square))
        assert torch.equal(dilate(mask, nextafter(sqrt(square), 0.0)), exact)
        assert int((exact & (dilate(mask, 0.0) != exact)).sum()) == sum(
            0 < y * y + x * x <= square for y in range(40) for x in range(40)
        )


def test_the_inner_mask_is_the_outer_one_of_the_background() -> None:
    predicted, truth = blobs(40, (6, 7), 0), blobs(40, (6, 7), 1)
    margins = MarginCalibrator(0.9).update(predicted, truth).compute(0.2)
    mirrored = MarginCalibrator(0.9).update(~predicted, ~truth).compute(0.2)
    assert (margins.outer_radius, margins.inner_radius) == (
        mirrored.inner_radius,
        mirrored.outer_radius,
    )
    assert torch.equal(margins.inner(predicted), erode(predicted, margins.inner_radius))
    assert torch.equal(margins.outer(predicted), dilate(predicted, margins.outer_radius))


def test_with_too_few_masks_the_outer_one_is_everything_and_the_inner_one_nothing() -> None:
    predicted = blobs(8, (5, 6), 0)
    margins = MarginCalibrator().update(predicted, predicted).compute(0.1)
    assert (margins.outer_radius, margins.inner_radius) == (inf, inf)
    assert bool(margins.outer(predicted).all())
    assert not bool(margins.inner(predicted).any())
    told = str(margins.guarantee)
    assert "The outer mask is everything: 8 images with a true mask were seen; 9 would do." in told
    assert "The inner mask is empty: 8 images with pixels that are not the true mask" in told
    more = MarginCalibrator().update(predicted, predicted).update(predicted[:1], predicted[:1])
    assert more.compute(0.1) == Margins(0.0, 0.0, 0.1, 0.95, (9, 9))
    assert more.compute(0.1).guarantee.exceptions == ()


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3, 0.6])
def test_as_many_masks_as_are_said_to_do_are_enough_and_one_fewer_is_not(alpha: float) -> None:
    predicted = blobs(1, (5, 6), 0)
    (told,) = {
        line.split("; ")[1] for line in MarginCalibrator().compute(alpha).guarantee.exceptions
    }
    needed = int(told.removesuffix(" would do."))
    for n, finite in ((needed, True), (needed - 1, False)):
        many = predicted.expand(n, -1, -1)
        margins = MarginCalibrator().update(many, many).compute(alpha)
        assert (margins.outer_radius < inf) == (margins.inner_radius < inf) == finite


def test_margins_say_what_they_promise_from_how_many_images() -> None:
    predicted, truth = blobs(40, (5, 6), 0), blobs(40, (5, 6), 1)
    truth[:12] = False
    promise = MarginCalibrator(0.9).update(predicted, truth).compute(0.2).guarantee
    assert (promise.n, promise.level, promise.unit) == ((28, 40), 0.8, "image")
    text = str(promise)
    assert text.startswith("The outer mask holds a share 0.9 of the true mask of a new image that")
    assert "each with probability at least 0.8 over the calibration images and the new one" in text
    assert "(28 to 40 calibration images)" in text
    assert "exchangeable" in text
    # Enough images, but too many of them without a prediction to grow: more would not help.
    nothing = MarginCalibrator(0.9).update(torch.zeros_like(predicted), truth).compute(0.2)
    assert nothing.outer_radius == inf
    assert "28 images with a true mask were seen; in too many of them" in str(nothing.guarantee)


def test_merges_and_states_agree_and_images_without_the_mask_do_not_count() -> None:
    predicted, truth = blobs(9, (5, 6), 0), blobs(9, (5, 6), 1)
    truth[4] = False
    whole = MarginCalibrator().update(predicted, truth)
    parts = [MarginCalibrator().update(predicted[s], truth[s]) for s in (slice(5, 9), slice(5))]
    merged = merge_all(parts)
    assert torch.equal(merged._outer, whole._outer)
    assert merged.compute(0.3) == whole.compute(0.3)
    assert whole.compute(0.3).num_units == (8, 9)


def test_what_is_no_mask_is_refused() -> None:
    mask = blobs(2, (5, 6), 0)
    with pytest.raises(InputError, match=r"tau must lie in \(0, 1\]; got 0"):
        MarginCalibrator(0)
    with pytest.raises(InputError, match="truth must be a bool mask"):
        needed_radius(mask, mask.int())
    with pytest.raises(InputError, match=r"truth must have shape \(2, 5, 6\) to go with"):
        needed_radius(mask, mask[:, :4])
    with pytest.raises(InputError, match=r"other must have tau = 0\.5"):
        MarginCalibrator(0.5).merge(MarginCalibrator(0.6))
    with pytest.raises(InputError, match="state must be of a MarginCalibrator"):
        MarginCalibrator.from_state_dict({})


@pytest.mark.guarantee
def test_the_outer_mask_holds_its_share_as_often_as_stated() -> None:
    predicted, truth = blobs(800, (8, 9), 2, 0.95), blobs(800, (8, 9), 3, 0.95)
    predicted |= truth & blobs(800, (8, 9), 4, 0.7)
    radii = needed_radius(predicted, truth, 0.9)
    radii = radii[~radii.isnan()]
    generator = torch.Generator().manual_seed(0)
    lost = 0
    for _ in range(2000):
        chosen = radii[torch.randint(len(radii), (25,), generator=generator)]
        margins = MarginCalibrator(0.9)._add(chosen[:24], chosen[:24]).compute(0.2)
        lost += float(chosen[24]) > margins.outer_radius
    assert 0 < lost <= binom.ppf(0.9999, 2000, 0.2)


def test_margins_are_read_back_exactly_and_damage_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "margins.json"
    for margins in (
        Margins(2.0**0.5, 0.0, 0.1, 0.95, (12, 9)),
        Margins(torch.inf, 1.0 / 3, 0.05, 1, (3, 40)),
    ):
        margins.save(path)
        assert Margins.load(path) == margins
    text = path.read_text("utf-8")
    for damaged, told in (
        (text.replace("0.05", "0.06"), "is damaged: its content does not match its SHA-256"),
        (text[:40], "is not a cpseg margin, or is damaged"),
        (text.replace("cpseg.margins", "cpseg.calibration"), "is not a cpseg margin"),
        (text.replace('"version": 1', '"version": 2'), "has version 2; this cpseg reads version 1"),
    ):
        path.write_text(damaged, "utf-8")
        with pytest.raises(FileError, match=told) as caught:
            Margins.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match="missing"):
        Margins.load(tmp_path / "missing.json")
