"""Images of textured shapes, made on the fly from a seed: for demos, tests and first steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi, sin
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from cpseg._checks import check_integer
from cpseg.errors import InputError

_SMALLEST_SIDE = 16
_VOID = 255

# One row per class: of 100 objects, how many; its color; how its two texture axes mix.
# Colors lie close and jitter per object, so that neither color nor texture alone tells a class.
_OF_100 = np.array([0, 36, 27, 19, 11, 7])
_COLORS = (
    (112, 118, 108),
    (168, 92, 84),
    (88, 104, 168),
    (92, 156, 92),
    (166, 146, 84),
    (140, 92, 150),
)
_MIXES = ((0.2, 0.2), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (1.0, -1.0), (0.5, 0.5))


@final
@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class SyntheticShapes(Dataset[tuple[Tensor, Tensor]]):
    """Images of shapes and their labels, for any loop over a dataset and for ``DataLoader``.

    Item ``i`` depends on ``seed`` and ``i`` alone: not on the order of access, the worker process,
    ``length`` or any global random state. Nothing is stored. Two seeds share no image, so the parts
    of a split (training, tuning, calibration, test) are one dataset each, with a seed of its own.

    Each image has its own lighting, so the errors of a model are alike within an image and differ
    between images, as in photographs. Objects are drawn one over the other; the later hides the
    earlier, and an image need not hold every class. Discs are frequent, stripes are rare and thin.

    Args:
        length: How many images.
        size: Height and width of every image, each at least 16.
        objects: The fewest and the most objects per image.
        void_width: How many pixels on either side of an object's outline are labeled 255.
        seed: Which images; at least 0 and below 2**64.

    Raises:
        InputError: If an argument is out of its range.

    Examples:
        >>> shapes = SyntheticShapes(length=4, size=(32, 48), seed=7)
        >>> image, label = shapes[3]
        >>> image.dtype, tuple(image.shape), label.dtype, tuple(label.shape)
        (torch.uint8, (3, 32, 48), torch.int64, (32, 48))
        >>> shapes.classes
        ('background', 'disc', 'square', 'triangle', 'ring', 'stripe')
    """

    length: int = 256
    size: tuple[int, int] = (96, 128)
    objects: tuple[int, int] = (1, 6)
    void_width: int = 1
    seed: int = 0

    classes: ClassVar[tuple[str, ...]] = (
        "background",
        "disc",
        "square",
        "triangle",
        "ring",
        "stripe",
    )
    """The name of each class; a label is an index into it, or 255."""

    def __post_init__(self) -> None:
        check_integer("length", self.length, 1)
        if not _is_pair(self.size, _SMALLEST_SIDE):
            raise InputError(
                f"size must be two integers >= {_SMALLEST_SIDE}, height and width; "
                f"got {self.size!r}"
            )
        if not _is_pair(self.objects, 0) or self.objects[0] > self.objects[1]:
            raise InputError(
                f"objects must be two integers, 0 <= fewest <= most; got {self.objects!r}"
            )
        check_integer("void_width", self.void_width, 0)
        check_integer("seed", self.seed, 0)
        if self.seed >= 2**64:
            raise InputError(f"seed must be below 2**64; got {self.seed}")

    def __len__(self) -> int:
        """How many images."""
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every item, in order."""
        return (self[index] for index in range(self.length))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image and its label.

        Args:
            index: Which one; a negative index counts from the end.

        Returns:
            The image, red, green, blue, uint8. Shape ``(3, H, W)``. The label, int64, a class or
            255. Shape ``(H, W)``.

        Raises:
            IndexError: If there is no such image.
        """
        if not -self.length <= index < self.length:
            raise IndexError(f"index must lie in [{-self.length}, {self.length}); got {index}")
        # Philox is keyed by both numbers in full: no hash, so no two images can coincide.
        key = np.array([self.seed, index % self.length], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        return _draw(rng, self.size, self.objects, self.void_width)


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_pair(value: object, least: int) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and _is_integer(value[0], least)
        and _is_integer(value[1], least)
    )


def _draw(
    rng: np.random.Generator, size: tuple[int, int], objects: tuple[int, int], void_width: int
) -> tuple[Tensor, Tensor]:
    """One image, uint8 (3, H, W), and its label, int64 (H, W)."""
    rows = torch.arange(size[0], dtype=torch.float64, device="cpu")[:, None]
    columns = torch.arange(size[1], dtype=torch.float64, device="cpu")[None, :]
    image = _texture(rng, 0, rows, columns)
    label = torch.zeros(size, dtype=torch.int64, device="cpu")
    instances = torch.zeros(size, dtype=torch.float32, device="cpu")
    for instance in range(1, 1 + int(rng.integers(objects[0], objects[1] + 1))):
        class_ = int(np.searchsorted(np.cumsum(_OF_100), rng.integers(100), side="right"))
        inside = _shape(rng, class_, rows, columns)
        image = torch.where(inside, _texture(rng, class_, rows, columns), image)
        label[inside] = class_
        instances[inside] = instance
    light = rng.uniform(0.7, 1.25) + rng.uniform(-0.2, 0.2) * (columns / size[1] - 0.5)
    noise = torch.from_numpy(rng.uniform(-1, 1, (3, *size))) * rng.uniform(8, 40)
    label[_outlines(instances, void_width)] = _VOID
    return (image * light + noise).round().clamp(0, 255).to(torch.uint8), label


def _wave(phase: Tensor) -> Tensor:
    """A triangle wave of period 1 in [-1, 1]: unlike a sine, rounded alike on every machine."""
    return 4 * (phase - phase.floor() - 0.5).abs() - 1


def _texture(rng: np.random.Generator, class_: int, rows: Tensor, columns: Tensor) -> Tensor:
    """The class's color and pattern everywhere, float64 (3, H, W)."""
    color = torch.from_numpy(np.array(_COLORS[class_]) + rng.uniform(-28, 28, 3))
    period = rng.uniform(5, 9)
    offset = rng.random(2)
    along, across = _MIXES[class_]
    if along * across < 0 or class_ == 0:  # diagonal
        pattern = _wave((along * rows + across * columns) / period + offset[0])
    else:
        pattern = along * _wave(rows / period + offset[0])
        pattern = pattern + across * _wave(columns / period + offset[1])
    return color[:, None, None] + rng.uniform(12, 26) * pattern


def _shape(rng: np.random.Generator, class_: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Where an object of this class lies, bool (H, W)."""
    height, width = len(rows), columns.shape[1]
    radius = max(6.0, min(height, width) * rng.uniform(0.12, 0.26))  # smaller is all outline
    y = rows - rng.uniform(0.05, 0.95) * height
    x = columns - rng.uniform(0.05, 0.95) * width
    turn = rng.uniform(0, 2 * pi)
    u = cos(turn) * x + sin(turn) * y
    v = cos(turn) * y - sin(turn) * x
    name = SyntheticShapes.classes[class_]
    if name == "square":
        return torch.maximum(u.abs(), v.abs()) < 0.85 * radius
    if name == "triangle":
        sides = [cos(a) * u + sin(a) * v for a in (pi / 2, 7 * pi / 6, 11 * pi / 6)]
        return torch.stack(sides).amax(0) < 0.6 * radius
    if name == "stripe":  # from edge to edge
        return u.abs() < 1.5 + 0.15 * radius
    distance = u * u + v * v
    if name == "ring":
        return (distance < radius * radius) & (distance > 0.2 * radius * radius)
    return distance < 0.9 * radius * radius


def _outlines(instances: Tensor, width: int) -> Tensor:
    """Pixels with another instance within ``width`` steps, diagonal ones too, bool (H, W)."""
    both = torch.stack((instances, -instances))[:, None]
    highest = functional.max_pool2d(both, 2 * width + 1, stride=1, padding=width)
    return (highest[0, 0] + highest[1, 0]) != 0  # the highest minus the lowest
