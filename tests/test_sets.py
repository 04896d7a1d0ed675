"""Packed sets tell what bool sets tell."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cpseg.errors import InputError
from cpseg.sets import PackedSets

CLASSES = [1, 2, 31, 32, 33, 64, 150]
SPACES: list[tuple[int, ...]] = [(), (7,), (3, 5), (2, 3, 4), (0, 3)]


def drawn(classes: int, space: tuple[int, ...] = (3, 5), seed: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((batch, classes, *space), generator=generator) < 0.4


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_packing_and_unpacking_loses_nothing(classes: int, space: tuple[int, ...]) -> None:
    sets = drawn(classes, space)
    packed = PackedSets.pack(sets)
    assert packed.words.shape == (2, -(-classes // 32), *space)
    assert torch.equal(packed.unpack(), sets)


@given(st.lists(st.lists(st.booleans(), min_size=70, max_size=70), min_size=1, max_size=4))
def test_bits_are_where_the_definition_puts_them(rows: list[list[bool]]) -> None:
    packed = PackedSets.pack(torch.tensor(rows))
    for row, words in zip(rows, packed.words.tolist(), strict=True):
        for c, member in enumerate(row):
            assert bool((words[c // 32] >> (c % 32)) & 1) == member


@pytest.mark.parametrize("classes", CLASSES)
def test_full_and_empty_sets_have_their_size(classes: int) -> None:
    for member, size in ((True, classes), (False, 0)):
        packed = PackedSets.pack(torch.full((1, classes, 2), member))
        assert packed.size().tolist() == [[size, size]]
        assert packed.size().dtype == torch.int32


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_questions_get_the_answer_of_bool_sets(classes: int, space: tuple[int, ...]) -> None:
    sets, others = drawn(classes, space), drawn(classes, space, seed=1)
    packed, other = PackedSets.pack(sets), PackedSets.pack(others)
    assert packed.size().tolist() == sets.sum(1).tolist()
    assert torch.equal((packed | other).unpack(), sets | others)
    assert torch.equal((packed & other).unpack(), sets & others)
    for c in {0, classes // 2, classes - 1}:
        assert torch.equal(packed.of_class(c), sets[:, c])
        labels = torch.full((2, *space), c)
        assert torch.equal(packed.contains(labels), sets[:, c])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_what_is_no_class_is_in_no_set(dtype: torch.dtype) -> None:
    packed = PackedSets.pack(torch.ones(1, 40, 4, dtype=torch.bool))
    labels = torch.tensor([[39, 40, 63, 255 if dtype == torch.uint8 else -1]]).to(dtype)
    assert packed.contains(labels).tolist() == [[True, False, False, False]]


def test_strides_do_not_matter() -> None:
    sets = drawn(33, (6, 10))
    odd = sets.movedim(1, -1).contiguous().movedim(-1, 1)[:, :, ::2, 1:]
    packed = PackedSets.pack(odd)
    assert torch.equal(packed.unpack(), odd)
    cut = PackedSets(PackedSets.pack(sets).words[:, :, ::2, 1:], 33)
    assert torch.equal(cut.unpack(), odd)
    assert cut.size().tolist() == odd.sum(1).tolist()


BAD: list[tuple[Callable[[PackedSets], object], str]] = [
    (
        lambda _: PackedSets.pack(torch.ones(2, 3)),
        r"sets must be bool .* got torch.float32 \(2, 3\)",
    ),
    (lambda _: PackedSets.pack(torch.ones(3, dtype=torch.bool)), r"sets must be bool"),
    (lambda _: PackedSets.pack(torch.ones(2, 0, 3, dtype=torch.bool)), r"C >= 1"),
    (lambda _: PackedSets(torch.zeros(1, 1, dtype=torch.int64), 3), r"words must be int32"),
    (
        lambda _: PackedSets(torch.zeros(1, 1, dtype=torch.int32), 33),
        r"words must be .* 33 classes",
    ),
    (lambda _: PackedSets(torch.zeros(1, 1, dtype=torch.int32), 0), r"num_classes must be"),
    (
        lambda p: p.contains(torch.zeros(1, 3, dtype=torch.int64)),
        r"labels must have shape \(1, 2\)",
    ),
    (lambda p: p.contains(torch.zeros(1, 2)), r"labels must be an integer tensor"),
    (lambda p: p.of_class(5), r"index must be a class, below 5; got 5"),
    (lambda p: p.of_class(-1), r"index must be an integer >= 0; got -1"),
    (lambda p: p | PackedSets.pack(drawn(6, (2,), batch=1)), r"other must have"),
    (lambda p: p & PackedSets.pack(drawn(5, (3,), batch=1)), r"other must have"),
]


@pytest.mark.parametrize(("ask", "message"), BAD)
def test_what_does_not_fit_is_refused(ask: Callable[[PackedSets], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ask(PackedSets.pack(drawn(5, (2,), batch=1)))
    assert "\n" not in str(caught.value)
