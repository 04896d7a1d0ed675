import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from cpseg.errors import InputError
from cpseg.morphology import (
    boundary_distance,
    component_areas,
    connected_components,
    dilate,
    distance_transform,
    erode,
    fill_holes,
    remove_small_components,
)

torch.set_num_threads(1)

SHAPES = [(3, 11), (2, 7, 5), (2, 4, 6, 5)]  # one, two, three spatial axes


@st.composite
def label_maps(draw: st.DrawFn, classes: int = 3) -> Tensor:
    shape = draw(st.sampled_from([(2, 9), (2, 6, 5), (1, 5, 8), (2, 3, 4, 5), (1, 6, 3, 2)]))
    size = math.prod(shape)
    labels = st.sampled_from([*range(classes), 255])
    values = draw(st.lists(labels, min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.uint8).view(shape)


def flooded(labels: Tensor, *, diagonal: bool) -> Tensor:
    """Regions by flooding, one pixel at a time, each named by its first pixel."""
    out = torch.full(labels.shape, -1, dtype=torch.int64)
    steps = [*itertools.product((-1, 0, 1), repeat=labels.ndim - 1)]
    steps = [step for step in steps if diagonal or sum(map(abs, step)) == 1]
    for number, start in enumerate(itertools.product(*map(range, labels.shape))):
        todo = [start] if labels[start] != 255 and out[start] < 0 else []
        while todo:
            here = todo.pop()
            out[here] = number
            for step in steps:
                there = (here[0], *(a + b for a, b in zip(here[1:], step, strict=True)))
                inside = all(0 <= a < n for a, n in zip(there, labels.shape, strict=True))
                if inside and out[there] < 0 and labels[there] == labels[start]:
                    todo.append(there)
    return out


@given(labels=label_maps(), diagonal=st.booleans())
@settings(max_examples=60, deadline=None)
def test_regions_are_those_of_flooding(labels: Tensor, *, diagonal: bool) -> None:
    expected = flooded(labels, diagonal=diagonal).flatten().tolist()
    found = connected_components(labels, diagonal=diagonal)
    assert found.dtype == torch.int64
    assert found.flatten().tolist() == expected
    areas = [expected.count(region) if region >= 0 else 0 for region in expected]
    assert component_areas(found).flatten().tolist() == areas


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("diagonal", [False, True])
def test_regions_of_a_mask_are_those_of_scipy(shape: tuple[int, ...], *, diagonal: bool) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6
    found = connected_components(mask, diagonal=diagonal)
    space = len(shape) - 1
    structure = ndimage.generate_binary_structure(space, space if diagonal else 1)
    for one, regions in zip(mask, found, strict=True):
        expected, count = ndimage.label(one.numpy(), structure)
        pairs = {*zip(expected.ravel().tolist(), regions.flatten().tolist(), strict=True)}
        assert len(pairs) == count + 1  # and the background, which is there at this density
        assert (0, -1) in pairs


def spiral(size: int) -> Tensor:
    """A path one pixel wide that winds to the middle between walls as wide; size is odd."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    row, column, down, right = 0, 0, 0, 1
    for length in (size - 1, *(n for n in range(size - 1, 1, -2) for _ in range(2))):
        for _ in range(length):
            mask[row, column] = True
            row, column = row + down, column + right
        down, right = right, -down
    return mask


def test_a_spiral_takes_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = spiral(127)
    assert ndimage.label(mask.numpy())[1] == 1
    assert mask.sum() > 127**2 * 0.45
    rounds = 0
    hook = Tensor.scatter_reduce_

    def counting(self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str) -> Tensor:
        nonlocal rounds
        rounds += 1
        return hook(self, dim, index, src, reduce)

    monkeypatch.setattr(Tensor, "scatter_reduce_", counting)
    for turned in (mask, mask.T, mask.flip(0), mask.flip(1).T):
        rounds = 0
        regions = connected_components(turned[None])
        assert set(regions[turned[None]].tolist()) == {int(turned.flatten().int().argmax())}
        assert 0 < rounds <= 2 * math.log2(mask.numel())


def test_maps_of_a_batch_do_not_touch() -> None:
    found = connected_components(torch.ones(3, 2, 4, dtype=torch.int64))
    assert torch.unique(found.flatten(1), dim=1).tolist() == [[0], [8], [16]]


def test_without_an_ignored_label_255_is_a_region() -> None:
    labels = torch.tensor([[255, 255, 1]], dtype=torch.uint8)
    assert connected_components(labels, ignore_index=None).tolist() == [[0, 0, 2]]


@given(labels=label_maps(), least=st.integers(0, 6), diagonal=st.booleans())
@settings(max_examples=40, deadline=None)
def test_small_components_go(labels: Tensor, least: int, *, diagonal: bool) -> None:
    regions = flooded(labels, diagonal=diagonal).flatten().tolist()
    expected = [
        label if regions.count(region) >= least else 255
        for label, region in zip(labels.flatten().tolist(), regions, strict=True)
    ]
    found = remove_small_components(labels, least, diagonal=diagonal)
    assert found.dtype == labels.dtype
    assert found.flatten().tolist() == expected


def test_small_components_of_a_mask_become_false() -> None:
    mask = torch.tensor([[True, False, True, True]])
    assert remove_small_components(mask, 2).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("shape", SHAPES)
def test_holes_are_those_of_scipy(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    for density in (0.5, 0.7, 0.9):
        mask = torch.rand(shape, generator=generator) < density
        expected = [ndimage.binary_fill_holes(one.numpy()).tolist() for one in mask]
        assert fill_holes(mask).tolist() == expected


@given(label_maps(2), st.sampled_from([0, 1, 1.0, 2**0.5, 1.5, 2, 3**0.5, 5**0.5, 3, 40]))
@settings(max_examples=60, deadline=None)
def test_a_ball_grows_and_shrinks_a_mask(labels: Tensor, radius: float) -> None:
    mask = labels == 1
    grown = torch.zeros_like(mask)
    for here in itertools.product(*map(range, mask.shape)):
        grown[here] = any(
            there[0] == here[0] and math.dist(there, here) <= radius
            for there in mask.nonzero().tolist()
        )
    assert dilate(mask, radius).tolist() == grown.tolist()
    # The outside of the picture is unknown: it neither enters a mask nor eats it.
    assert erode(~mask, radius).tolist() == (~grown).tolist()


@pytest.mark.parametrize("shape", [(2, 90), (2, 40, 33), (1, 14, 9, 17)])
@pytest.mark.parametrize("radius", [4, 7.3, 12, 29**0.5, 1e300])
def test_a_mask_grows_to_all_within_the_radius(shape: tuple[int, ...], radius: float) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.01
    assert dilate(mask, radius).equal(distance_transform(mask) <= radius)


def test_a_mask_that_fills_the_picture_is_not_eroded() -> None:
    mask = torch.ones(1, 3, 4, dtype=torch.bool)
    assert erode(mask, 2).all()
    assert not dilate(~mask, 2).any()


def all_pairs(labels: Tensor, spacing: tuple[float, ...]) -> list[float]:
    """Distance to another class, by looking at all pairs."""
    places = [*itertools.product(*map(range, labels.shape))]
    out = []
    for here in places:
        known = (x for x in places if x[0] == here[0] and labels[x] != 255)
        others = [x for x in known if labels[x] != labels[here]]
        gaps = ([s * (a - b) for s, a, b in zip(spacing, x[1:], here[1:])] for x in others)  # noqa: B905
        nearest = min((math.hypot(*gap) for gap in gaps), default=math.inf)
        out.append(math.nan if labels[here] == 255 else nearest)
    return out


@given(label_maps(4), st.sampled_from([(1.0, 1.0, 1.0), (2.5, 0.75, 1.25), (0.5, 3.0, 1.0)]))
@settings(max_examples=60, deadline=None)
def test_boundary_distance_is_that_of_all_pairs(labels: Tensor, steps: tuple[float, ...]) -> None:
    spacing = steps[: labels.ndim - 1]
    expected = torch.tensor(all_pairs(labels, spacing), dtype=torch.float64).view(labels.shape)
    found = boundary_distance(labels, spacing=spacing)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-12, atol=0)
    if set(spacing) == {1.0}:
        torch.testing.assert_close(boundary_distance(labels), found, equal_nan=True, rtol=0, atol=0)
    for limit in (0.0, 1.0, 2.0, 2.5):
        near = boundary_distance(labels, spacing=spacing, limit=limit)
        capped = torch.where(found > limit, torch.inf, found)
        torch.testing.assert_close(near, capped, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 90), (2, 70, 41), (1, 37, 90), (2, 23, 30, 19)])
@pytest.mark.parametrize("spaced", [False, True])
def test_distances_are_those_of_scipy(shape: tuple[int, ...], *, spaced: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    spacing = (1.5, 0.7, 2.0)[: len(shape) - 1] if spaced else None
    for density in (0.001, 0.02, 0.5):
        mask = torch.rand(shape, generator=generator) < density
        mask.flatten(1)[:, 3] = True  # scipy has no answer for an empty mask
        found = distance_transform(mask, spacing=spacing)
        for one, distance in zip(mask, found, strict=True):
            expected = ndimage.distance_transform_edt(~one.numpy(), sampling=spacing)
            torch.testing.assert_close(distance, torch.from_numpy(expected), rtol=1e-12, atol=0)


def test_boundary_distance_of_two_classes_is_that_of_scipy() -> None:
    coarse = torch.rand(1, 1, 9, 14, generator=torch.Generator().manual_seed(2))
    labels = (torch.nn.functional.interpolate(coarse, (180, 301), mode="bilinear") > 0.5)[0].long()
    inside = ndimage.distance_transform_edt(labels[0].numpy())
    outside = ndimage.distance_transform_edt(1 - labels[0].numpy())
    expected = torch.from_numpy(inside + outside)
    torch.testing.assert_close(boundary_distance(labels)[0], expected, rtol=1e-12, atol=0)


def test_blocks_of_columns_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.randint(3, (2, 6, 9, 5), generator=torch.Generator().manual_seed(4))
    whole = boundary_distance(labels), distance_transform(labels == 1)
    monkeypatch.setattr("cpseg.morphology._TILE", 20)
    assert torch.equal(boundary_distance(labels), whole[0])
    assert torch.equal(distance_transform(labels == 1), whole[1])


def test_long_lines_keep_exact_distances() -> None:
    # Squared distances past 2**24 do not fit float32.
    mask = torch.zeros(1, 2, 6000, dtype=torch.bool)
    mask[0, 0, 0] = True
    assert distance_transform(mask)[0, 1, 5999].item() == math.sqrt(5999**2 + 1)


def test_no_other_class_is_infinitely_far() -> None:
    labels = torch.tensor([[[4, 4], [4, 255]], [[4, 2], [4, 4]]])
    found = boundary_distance(labels)
    assert found[0].flatten().tolist()[:3] == [math.inf] * 3
    assert found[0, 1, 1].isnan()
    assert found[1].isfinite().all()
    assert distance_transform(torch.zeros(2, 3, 4, dtype=torch.bool)).isinf().all()


def everything(labels: Tensor, mask: Tensor) -> list[Tensor]:
    return [
        connected_components(labels),
        component_areas(connected_components(mask)),
        remove_small_components(labels, 3),
        remove_small_components(mask, 3),
        fill_holes(mask),
        dilate(mask, 1.5),
        erode(mask, 1),
        distance_transform(mask),
        boundary_distance(labels),
    ]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0), (0, 2, 3, 4)])
def test_empty_maps_stay_empty(shape: tuple[int, ...]) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    assert all(found.shape == shape for found in everything(mask.long(), mask))


@pytest.mark.parametrize("shape", [(2, 7), (2, 7, 5), (1, 4, 6, 5)])
def test_strides_do_not_matter_and_nothing_of_the_callers_is_written(
    shape: tuple[int, ...],
) -> None:
    labels = torch.randint(3, shape, generator=torch.Generator().manual_seed(0))
    mask = labels == 1
    kept, kept_mask = labels.clone(), mask.clone()
    strided = labels.movedim(-1, 0).contiguous().movedim(0, -1)
    found = everything(labels, mask)
    for one, two in zip(found, everything(strided, strided == 1), strict=True):
        assert one.tolist() == two.tolist()
        assert one.data_ptr() not in (labels.data_ptr(), mask.data_ptr())
    for result in found:
        result.zero_()
    assert torch.equal(labels, kept)
    assert torch.equal(mask, kept_mask)


MASK = torch.zeros(2, 3, 4, dtype=torch.bool)
LABELS = MASK.long()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: connected_components(LABELS.float()), "labels must be an integer tensor; got"),
        (lambda: connected_components(LABELS[0, 0]), r"labels must have shape \(B, \*S\) with one"),
        (lambda: component_areas(LABELS.int()), "components must be int64, as"),
        (lambda: remove_small_components(LABELS, -1), "min_area must be an integer >= 0; got -1"),
        (
            lambda: remove_small_components(LABELS.to(torch.uint8), 1, ignore_index=-1),
            "ignore_index must fit into torch.uint8; got -1",
        ),
        (lambda: fill_holes(LABELS), "mask must be a bool tensor; got torch.int64"),
        (lambda: dilate(MASK, -1), "radius must be finite and >= 0; got -1"),
        (lambda: erode(MASK, math.inf), "radius must be finite and >= 0; got inf"),
        (lambda: dilate(MASK[0, 0], 1), "mask must have shape"),
        (lambda: distance_transform(MASK, spacing=(1.0,)), "spacing must hold one positive"),
        (lambda: distance_transform(MASK, spacing=(1.0, 0.0)), "spacing must hold one positive"),
        (lambda: boundary_distance(LABELS, limit=math.nan), "limit must be a number >= 0; got nan"),
        (lambda: boundary_distance(MASK), "labels must be an integer tensor; got torch.bool"),
    ],
)
def test_bad_input_gets_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
