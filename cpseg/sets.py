"""Sets of classes with one bit per class: 32 classes in the four bytes of one logit.

Sizes, membership, unions and coverage come straight from the words.
"""

from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Self, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg._classes import Parts, aligned
from cpseg.errors import InputError

__all__ = ["PackedSets"]

_BITS = 32


@final
@dataclass(frozen=True, eq=False, slots=True)
class PackedSets:
    """Sets of a batch, packed. Made by :meth:`cpseg.PixelSetPredictor.packed`.

    Attributes:
        words: Bit ``c % 32`` of word ``c // 32`` tells whether class ``c`` is in the set; the bits
            past the last class are 0. int32 ``(B, ceil(C / 32), *S)``.
        num_classes: C.

    Examples:
        >>> sets = PackedSets.pack(torch.tensor([[True, False, True]]))
        >>> sets.size(), sets.contains(torch.tensor([1])), sets.unpack()
        (tensor([2], dtype=torch.int32), tensor([False]), tensor([[ True, False,  True]]))
    """

    words: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        _checks.check_integer("num_classes", self.num_classes, 1)
        _checks.check_tensor("words", self.words)
        count = _num_words(self.num_classes)
        if self.words.dtype != torch.int32 or self.words.ndim < 2 or self.words.shape[1] != count:
            raise InputError(
                f"words must be int32 (B, {count}, *S) for {self.num_classes} classes; "
                f"got {self.words.dtype} {_checks.describe(self.words.shape)}"
            )

    @classmethod
    def pack(cls, sets: Tensor) -> Self:
        """Pack bool sets.

        Args:
            sets: Bool ``(B, C, *S)``.

        Returns:
            The same sets.

        Raises:
            InputError: If ``sets`` is no bool tensor of that shape.
        """
        _checks.check_tensor("sets", sets)
        if sets.dtype != torch.bool or sets.ndim < 2 or sets.shape[1] < 1:
            raise InputError(
                f"sets must be bool (B, C, *S) with C >= 1; "
                f"got {sets.dtype} {_checks.describe(sets.shape)}"
            )
        batch, classes, *space = sets.shape
        flat = sets.reshape(batch, classes, prod(space))
        shape = (batch, _num_words(classes), flat.shape[2])
        words = torch.empty(shape, dtype=torch.int32, device=sets.device)
        for b, part in _parts(flat.shape, sets.device):
            words[b, :, part] = pack((flat[b, :, part],))
        return cls(words.view(batch, shape[1], *space), classes)

    def unpack(self) -> Tensor:
        """As bool ``(B, C, *S)``."""
        batch, count, *space = self.words.shape
        device = self.words.device
        flat = self.words.reshape(batch, count, prod(space))
        shape = (batch, self.num_classes, flat.shape[2])
        sets = torch.empty(shape, dtype=torch.bool, device=device)
        if torch.compiler.is_compiling():
            return torch.stack([_unpack(word, self.num_classes) for word in flat]).view(
                batch, self.num_classes, *space
            )
        for b, part in _parts(shape, device):
            sets[b, :, part] = _unpack(flat[b, :, part], self.num_classes)
        return sets.view(batch, self.num_classes, *space)

    def size(self) -> Tensor:
        """How many classes each set holds. int32 ``(B, *S)``."""
        word = self.words
        pairs = word - ((word >> 1) & 0x55555555)
        nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
        return ((octets * 0x01010101) >> 24).sum(1, dtype=torch.int32)

    def contains(self, labels: Tensor) -> Tensor:
        """Whether each pixel's set holds its label: the coverage of each pixel.

        Args:
            labels: Integers ``(B, *S)``; what is no class is in no set.

        Returns:
            Bool ``(B, *S)``.

        Raises:
            InputError: If labels are no integers of that shape.
        """
        _checks.check_map("labels", labels, self._space, f"words {tuple(self.words.shape)}")
        _checks.check_device("labels", labels, self.words, "words")
        labels = labels.long()
        known = (labels >= 0) & (labels < self.num_classes)
        index = labels * known
        word = self.words.gather(1, (index // _BITS)[:, None])[:, 0]
        return ((word >> (index % _BITS).int()) & known.int()).bool()

    def of_class(self, index: int) -> Tensor:
        """Where the sets hold one class. Bool ``(B, *S)``.

        Raises:
            InputError: If ``index`` is no class.
        """
        _checks.check_integer("index", index, 0)
        if index >= self.num_classes:
            raise InputError(f"index must be a class, below {self.num_classes}; got {index}")
        return (self.words[:, index // _BITS] & _bit(index % _BITS)) != 0

    def __or__(self, other: Self) -> Self:
        """Union.

        Raises:
            InputError: If the two have other classes or another shape.
        """
        self._check_like(other)
        return type(self)(self.words | other.words, self.num_classes)

    def __and__(self, other: Self) -> Self:
        """Intersection.

        Raises:
            InputError: If the two have other classes or another shape.
        """
        self._check_like(other)
        return type(self)(self.words & other.words, self.num_classes)

    @property
    def _space(self) -> tuple[int, ...]:
        return (self.words.shape[0], *self.words.shape[2:])

    def _check_like(self, other: object) -> None:
        if not isinstance(other, PackedSets):
            raise InputError(f"other must be PackedSets; got {type(other).__name__}")
        mine, theirs = (self.num_classes, self._space), (other.num_classes, other._space)
        if mine != theirs:
            raise InputError(f"other must have (classes, shape) = {mine}; got {theirs}")


def pack(members: Parts) -> Tensor:
    """Bool parts of a block ``(C, N)`` to int32 words ``(ceil(C / 32), N)``."""
    classes = sum(len(member) for member in members)
    bits = torch.tensor([_bit(c % _BITS) for c in range(classes)], dtype=torch.int32)
    values = aligned(bits.to(members[0].device)[:, None], members)
    marked = [torch.where(*pair, 0) for pair in zip(members, values, strict=True)]
    if len(marked) > 1:  # a class each, and no more than fit one word
        return reduce(torch.bitwise_or, marked)
    return torch.stack([word.sum(0, dtype=torch.int32) for word in torch.split(marked[0], _BITS)])


def _unpack(words: Tensor, classes: int) -> Tensor:
    """int32 words ``(W, N)`` to bool ``(C, N)``."""
    bits = torch.tensor([_bit(c) for c in range(_BITS)], dtype=torch.int32, device=words.device)
    return (words[:, None] & bits[:, None]).ne(0).flatten(0, 1)[:classes]


def _bit(index: int) -> int:
    """``1 << index`` as an int32, whose highest bit is its sign."""
    return (1 << index) - (1 << _BITS if index == _BITS - 1 else 0)


def _num_words(classes: int) -> int:
    return -(-classes // _BITS)


_PART_ELEMENTS = {"cpu": 2**18, "cuda": 2**28}


def _parts(shape: tuple[int, ...], device: torch.device) -> list[tuple[int, slice]]:
    """Cache-sized parts of ``(B, C, N)``: entry and pixels."""
    batch, classes, pixels = shape
    step = max(_PART_ELEMENTS.get(device.type, 2**18) // classes, 1)
    return [(b, slice(j, j + step)) for b in range(batch) for j in range(0, pixels, step)]
