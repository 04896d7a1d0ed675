"""Geometry moves maps exactly as the image; colors change nothing but colors."""

import colorsys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpseg.data import ColorJitter, RandomCrop, Tint, Warp
from cpseg.errors import InputError

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.sampled_from([(1.0, 1.0), (0.5, 2.0), (2.5, 3.0)]))
def test_labels_are_warped_exactly_as_the_image(seed: int, scale: tuple[float, float]) -> None:
    h, w = 11, 14
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    code = rows * w + columns  # where a pixel is from, as a label
    image = torch.stack((rows, columns, torch.ones(h, w))).float()  # and as colors
    warp = RandomCrop((9, 12), scale)((h, w), torch.Generator().manual_seed(seed))
    moved, labels, valid = warp.image(image, fill=-1), warp.labels(code), warp.valid()
    assert torch.equal(valid, labels != 255)
    assert torch.equal(valid, moved[2] > -1)
    off = (moved[0] - labels // w).abs()[valid], (moved[1] - labels % w).abs()[valid]
    exact = scale == (1.0, 1.0)
    for distance in off:  # smoothing, when an image shrinks, pulls its border inwards
        assert float(distance.max()) <= (0 if exact else 1.0) + 1e-4
    if min(scale) > 1:
        assert max(float(distance.max()) for distance in off) <= 0.5 + 1e-4


def test_a_warp_in_pixels() -> None:
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert Warp((2, 3), 0, 1, (2, 2), flip=False).labels(labels).tolist() == [[2, 3], [5, 6]]
    assert Warp((2, 3), 0, 0, (2, 2), flip=True).labels(labels).tolist() == [[3, 2], [6, 5]]
    big = Warp((4, 6), 1, 0, (4, 7), flip=False).labels(labels)
    row, last = [4, 4, 5, 5, 6, 6, 255], [255] * 7
    assert big.tolist() == [[1, 1, 2, 2, 3, 3, 255], row, row, last]


def test_crops_reach_every_place_and_flip_half_of_the_time() -> None:
    g = torch.Generator().manual_seed(0)
    crop = RandomCrop((3, 4), (1.0, 1.0))
    warps = [crop((6, 6), g) for _ in range(400)]
    assert {warp.top for warp in warps} == {0, 1, 2, 3}
    assert {warp.left for warp in warps} == {0, 1, 2}
    assert 140 < sum(warp.flip for warp in warps) < 260


def test_colors_against_the_standard_library() -> None:
    g = torch.Generator().manual_seed(0)
    image = torch.rand(3, 4, 5, generator=g) * 0.5
    assert torch.allclose(Tint()(image), image, atol=1e-6)
    assert torch.allclose(Tint(brightness=1.5)(image), image * 1.5)
    gray = Tint(gray=True)(image)
    pixel = image[:, 1, 2].tolist()
    assert torch.equal(gray[0], gray[1])
    luma = 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]
    assert float(gray[0, 1, 2]) == pytest.approx(luma, abs=1e-6)
    assert torch.allclose(Tint(saturation=0.0)(image), gray, atol=1e-6)
    flat = Tint(contrast=0.0)(image)
    assert torch.allclose(flat, flat.flatten()[0])
    third = Tint(hue=1 / 3)(image)
    assert torch.allclose(third, image[[2, 0, 1]], atol=1e-5)
    hue = colorsys.rgb_to_hsv(*third[:, 1, 2].tolist())[0]
    expected = (colorsys.rgb_to_hsv(*pixel)[0] + 1 / 3) % 1
    assert hue == pytest.approx(expected, abs=1e-4)


def test_blur_keeps_a_constant_and_spreads_a_point() -> None:
    assert torch.allclose(Tint(blur=1.3)(torch.full((3, 6, 8), 0.4)), torch.tensor(0.4))
    point = torch.zeros(3, 13, 15)
    point[:, 6, 7] = 1
    spread = Tint(blur=1.0)(point)
    assert float(spread[0].sum()) == pytest.approx(1, abs=1e-5)
    ratio = float(spread[0, 6, 8] / spread[0, 6, 7])
    assert ratio == pytest.approx(2.718281828**-0.5, rel=1e-4)


@given(seeds)
def test_jitter_stays_in_range_and_leaves_the_global_state_alone(seed: int) -> None:
    before = torch.get_rng_state()
    g = torch.Generator().manual_seed(seed)
    image = torch.rand(3, 5, 7, generator=g)
    changed = ColorJitter()(g)(image)
    assert changed.shape == image.shape
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    assert torch.equal(torch.get_rng_state(), before)
    assert ColorJitter(probability=0.0, gray=0.0, blur=0.0)(g) == Tint()


def test_options_out_of_range_are_refused() -> None:
    for make in (
        lambda: RandomCrop((0, 4)),
        lambda: RandomCrop((4, 4), (2.0, 1.0)),
        lambda: RandomCrop((4, 4), flip=2.0),
        lambda: ColorJitter(strength=1.5),
        lambda: ColorJitter(blur_range=(0.0, 1.0)),
    ):
        with pytest.raises(InputError):
            make()
