"""Synthetic images: the same from the same seed, whatever is asked before, where and in what order."""

import os
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from cpseg.data import SyntheticShapes
from cpseg.errors import InputError

SIZE = (24, 40)
VOID = 255


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def values(label: Tensor) -> set[int]:
    return set(label.flatten().tolist())


def test_an_item_is_a_uint8_image_and_an_int64_label_of_classes_and_void() -> None:
    shapes = SyntheticShapes(length=20, size=SIZE)
    assert len(shapes) == 20
    assert len(list(shapes)) == 20
    for image, label in shapes:
        assert (image.shape, image.dtype) == ((3, *SIZE), torch.uint8)
        assert (label.shape, label.dtype) == (SIZE, torch.int64)
        assert values(label) <= {*range(len(shapes.classes)), VOID}


@given(seed=st.integers(0, 2**64 - 1), order=st.permutations(range(6)), longer=st.integers(6, 1000))
def test_order_of_access_and_length_change_nothing(
    seed: int, order: list[int], longer: int
) -> None:
    straight = list(SyntheticShapes(length=6, size=(16, 20), seed=seed))
    shapes = SyntheticShapes(length=longer, size=(16, 20), seed=seed)
    assert all(same(shapes[i], straight[i]) for i in order)


def test_pixels_stay_what_they_were_in_earlier_versions() -> None:
    image, label = SyntheticShapes(length=3, size=SIZE, seed=5)[2]
    assert image[:, 11, 17:22].tolist() == [
        [60, 39, 89, 92, 106],
        [83, 73, 149, 157, 121],
        [189, 124, 81, 100, 126],
    ]
    assert label[11, 7:25].tolist() == [
        *(1, 1, VOID, VOID, 0, 0, 0, 0, VOID),
        *(VOID, 2, VOID, VOID, 3, 3, 3, 3, VOID),
    ]


def test_seeds_and_indices_give_images_of_their_own() -> None:
    items = [
        SyntheticShapes(length=30, size=SIZE, seed=seed)[i] for seed in range(3) for i in range(30)
    ]
    assert len({image.numpy().tobytes() for image, _ in items}) == 90


def test_a_seed_of_more_than_32_bits_counts_in_full() -> None:
    low = SyntheticShapes(length=1, size=SIZE, seed=1)[0]
    assert not same(low, SyntheticShapes(length=1, size=SIZE, seed=1 + 2**32)[0])
    assert not same(low, SyntheticShapes(length=1, size=SIZE, seed=1 + 2**63)[0])


def test_worker_processes_give_what_this_process_gives() -> None:
    shapes = SyntheticShapes(length=11, size=SIZE, seed=3)
    context = None if os.name == "nt" else "fork"  # spawn would import torch twice more
    loader = DataLoader(shapes, batch_size=4, num_workers=2, multiprocessing_context=context)
    batches: list[tuple[Tensor, Tensor]] = list(loader)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for i, item in enumerate(shapes):
        assert same((images[i], labels[i]), item)


def test_a_copy_through_pickle_is_the_same_dataset() -> None:
    shapes = SyntheticShapes(length=4, size=SIZE, objects=(2, 3), void_width=2, seed=9)
    assert same(pickle.loads(pickle.dumps(shapes))[3], shapes[3])  # noqa: S301 - our own bytes


def test_global_random_states_are_left_alone_and_do_not_matter() -> None:
    shapes = SyntheticShapes(length=2, size=SIZE)
    first = shapes[1]
    torch.rand(7)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
    assert same(shapes[1], first)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]


def test_the_default_dtype_does_not_matter() -> None:
    shapes = SyntheticShapes(length=20)  # many pixels: few of them would round differently
    first = list(shapes)
    torch.set_default_dtype(torch.float64)
    try:
        assert all(map(same, shapes, first))
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_a_caller_writes_into_an_item_stays_there() -> None:
    shapes = SyntheticShapes(length=1, size=SIZE)
    image, label = shapes[0]
    before = image.clone(), label.clone()
    image.zero_()
    label.zero_()
    assert same(shapes[0], before)


def test_negative_indices_count_from_the_end_and_others_raise() -> None:
    shapes = SyntheticShapes(length=5, size=SIZE)
    assert same(shapes[-1], shapes[4])
    assert same(shapes[-5], shapes[0])
    for index in (5, -6):
        with pytest.raises(IndexError, match=rf"^index must lie in \[-5, 5\); got {index}$"):
            shapes[index]


def test_classes_are_imbalanced_and_absent_from_some_images() -> None:
    shapes = SyntheticShapes(length=300, size=(48, 64), seed=1)
    labels = torch.stack([label for _, label in shapes])
    present = torch.tensor([(labels == c).flatten(1).any(1).sum() for c in range(6)]).tolist()
    pixels = torch.bincount(labels.flatten(), minlength=256)[:6].tolist()
    assert present[0] == 300
    assert present == sorted(present, reverse=True), present
    assert all(30 < count < 270 for count in present[1:]), present
    assert pixels[0] > 10 * pixels[1] > 10 * pixels[2] > 10 * pixels[3], pixels
    assert 0.5 < pixels[0] / labels.numel() < 0.9
    assert all(0.003 < count / labels.numel() < 0.02 for count in pixels[4:])


def test_images_differ_in_their_light() -> None:
    means = [image.float().mean() for image, _ in SyntheticShapes(length=100, size=SIZE)]
    assert torch.stack(means).std() > 12


def test_the_number_of_objects_is_drawn_from_the_range_given() -> None:
    empty = SyntheticShapes(length=5, size=SIZE, objects=(0, 0))
    assert all(label.eq(0).all() for _, label in empty)
    single = SyntheticShapes(length=60, size=SIZE, objects=(1, 1))
    classes = [len(values(label) - {0, VOID}) for _, label in single]
    assert set(classes) == {1}
    many = SyntheticShapes(length=60, size=(64, 64), objects=(1, 6))
    assert {len(values(label)) for _, label in many} >= {3, 4, 5, 6}


@pytest.mark.parametrize("width", [1, 2, 3])
def test_void_is_what_lies_within_the_width_of_an_outline(width: int) -> None:
    wanted = SyntheticShapes(length=12, size=SIZE, objects=(1, 1), void_width=width, seed=2)
    clean = SyntheticShapes(length=12, size=SIZE, objects=(1, 1), void_width=0, seed=2)
    for (_, label), (_, truth) in zip(wanted, clean, strict=True):
        assert VOID not in truth
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                rows = slice(max(0, y - width), y + width + 1)
                near = truth[rows, max(0, x - width) : x + width + 1]
                expected = truth[y, x] if (near == truth[y, x]).all() else VOID
                assert label[y, x] == expected, (y, x)


def test_touching_objects_of_one_class_have_void_between_them() -> None:
    wanted = SyntheticShapes(length=200, size=SIZE, objects=(6, 6))
    clean = SyntheticShapes(length=200, size=SIZE, objects=(6, 6), void_width=0)
    inside = 0
    for (_, label), (_, truth) in zip(wanted, clean, strict=True):
        windows = truth[None].float()
        high = torch.nn.functional.max_pool2d(windows, 3, 1, 1)[0]
        low = -torch.nn.functional.max_pool2d(-windows, 3, 1, 1)[0]
        inside += int(((label == VOID) & (high == low)).sum())
    assert inside > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length must be an integer >= 1; got 0"),
        ({"length": True}, "length must be an integer >= 1; got True"),
        ({"size": (15, 32)}, "size must be two integers >= 16, height and width; got (15, 32)"),
        ({"size": 64}, "size must be two integers >= 16, height and width; got 64"),
        ({"size": (32.0, 32)}, "size must be two integers >= 16, height and width; got (32.0, 32)"),
        ({"objects": (3, 2)}, "objects must be two integers, 0 <= fewest <= most; got (3, 2)"),
        ({"objects": (-1, 2)}, "objects must be two integers, 0 <= fewest <= most; got (-1, 2)"),
        ({"void_width": -1}, "void_width must be an integer >= 0; got -1"),
        ({"seed": -1}, "seed must be an integer >= 0; got -1"),
        ({"seed": 2**64}, "seed must be below 2**64; got 18446744073709551616"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        SyntheticShapes(**arguments)
    assert str(caught.value) == message
