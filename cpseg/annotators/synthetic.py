"""An annotator whose errors are known, for the demo and for tests.

It is given the true labels and answers with logits that are wrong in a stated way, so that what a
filter or a calibration does to the errors can be compared with what it should do. Its call takes
labels where every other annotator takes images: an error is a departure from the truth, and a
picture does not hold the truth.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, TypeGuard, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.annotators.source import describe_source
from cpseg.errors import InputError

__all__ = ["SyntheticAnnotator"]

_NUMBERS = (
    *("error_rate", "confident", "image_effect", "background_bias", "noise"),
    *("signal", "temperature", "shift", "grain"),
)


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class SyntheticAnnotator:
    """Logits with mistakes that cluster in space, differ by image and class, and can be confident.

    A pixel of class ``c`` in an image with the effect ``z ~ N(0, 1)`` is mistaken with odds
    ``error_rate / (1 - error_rate) * difficulty[c] * exp(image_effect * z + shift)``. Mistakes
    are the places where a smooth random field is low, so they come in blobs about ``grain``
    pixels wide. A mistaken pixel shows another class, drawn from the class's row of
    ``confusion``; with probability ``confident`` it shows nothing of the truth, otherwise the
    truth's logit lies between half and all of the wrong class's. The shown class has the logit
    ``signal``, all others 0; then come smooth noise, the background's bonus, and the division by
    the temperature.

    The same labels and seeds give the same logits, whatever the batch; the global random state
    is not touched.

    Guarantee:
        None; a simulation.

    Args:
        num_classes: Number of classes, C.
        background: Index of the background class, or None for a vocabulary without one.
        error_rate: Share of mistaken pixels at difficulty 1 in a typical image.
        difficulty: Factor on the odds of a mistake, one per class; None: from 0.5 for the first
            class to 2 for the last, in equal ratios.
        confusion: Which class a mistaken one shows: C rows of C weights, of which the diagonal
            must be 0; None: half background and half the next foreground class; for background
            any foreground class.
        confident: Share of the mistakes that show nothing of the truth.
        image_effect: Standard deviation, between images, of the log-odds of a mistake.
        background_bias: Added to the background's logit everywhere.
        noise: Standard deviation of the smooth noise on every class's logit.
        signal: Logit of the shown class.
        temperature: Divides the logits at the end; below 1 the annotator is over-confident.
        shift: Added to the log-odds of a mistake in every image: another domain.
        displacement: Pixels by which everything is shown too far along each axis: masks that do
            not lie on their objects.
        grain: Width of the blobs, in pixels.
        seed: Seed of everything; images differ by their own seeds.

    Examples:
        >>> labels = torch.zeros(1, 8, 8, dtype=torch.int64)
        >>> annotator = SyntheticAnnotator(num_classes=3, error_rate=0.0, noise=0.0)
        >>> logits = annotator(labels)
        >>> logits.shape, bool((logits.argmax(1) == labels).all())
        (torch.Size([1, 3, 8, 8]), True)
    """

    num_classes: int
    background: int | None = 0
    error_rate: float = 0.15
    difficulty: Sequence[float] | None = None
    confusion: Sequence[Sequence[float]] | None = None
    confident: float = 0.3
    image_effect: float = 0.75
    background_bias: float = 1.0
    noise: float = 0.75
    signal: float = 5.0
    temperature: float = 0.75
    shift: float = 0.0
    displacement: int = 0
    grain: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        _checks.check_integer("num_classes", self.num_classes, 2)
        if self.background is not None:
            _checks.check_integer("background", self.background)
            if not 0 <= self.background < self.num_classes:
                raise InputError(
                    f"background must be a class in [0, {self.num_classes}) or None; "
                    f"got {self.background}"
                )
        for name in ("displacement", "seed"):
            _checks.check_integer(name, getattr(self, name))
        self._check_numbers()
        if self.difficulty is not None and not self._weights(self.difficulty):
            raise InputError(
                f"difficulty must hold {self.num_classes} numbers >= 0; got {self.difficulty!r}"
            )
        self._confusion()  # refuses a bad matrix here, not at the first image

    def _check_numbers(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if not _checks.is_number(value) or not isfinite(value):
                raise InputError(f"{name} must be a finite number; got {value!r}")
        for name in ("error_rate", "confident"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "error_rate" and value == 1):
                raise InputError(f"{name} must be a probability below 1; got {value!r}")
        for name in ("temperature", "grain", "signal"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be greater than 0; got {getattr(self, name)!r}")
        for name in ("noise", "image_effect"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must not be negative; got {getattr(self, name)!r}")

    @property
    def source(self) -> str:
        """What to give a calibrator as ``source=``: every setting."""
        return describe_source("synthetic", None, {"settings": self})

    def __call__(self, labels: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Logits for the true labels.

        Args:
            labels: True classes; a value that is no class (such as 255) is taken as background,
                or as class 0 without one. Shape ``(B, *S)``.
            seeds: One number per image, such as its index in the data set; None takes a checksum
                of the image's labels.

        Returns:
            float32 logits on the labels' device. Shape ``(B, C, *S)``.
        """
        _checks.check_integers("labels", labels)
        if labels.ndim < 2:
            raise InputError(
                f"labels must have shape (B, *S) with at least one spatial axis; "
                f"got {_checks.describe(labels.shape)}"
            )
        if seeds is not None and len(seeds) != len(labels):
            raise InputError(
                f"seeds must hold one number per image, {len(labels)}; got {len(seeds)}"
            )
        # On the CPU, so that a device never changes what is drawn.
        truth = labels.detach().to("cpu", torch.int64)
        truth = torch.where((truth < 0) | (truth >= self.num_classes), self.background or 0, truth)
        keys = [_checksum(image) for image in truth] if seeds is None else list(seeds)
        logits = truth.new_empty(
            (len(truth), self.num_classes, *truth.shape[1:]), dtype=torch.float32
        )
        for image, key, out in zip(truth, keys, logits, strict=True):
            out.copy_(self._image(image, key))
        return logits.to(labels.device)

    def _image(self, truth: Tensor, key: int) -> Tensor:
        """Logits ``(C, *S)`` of one image."""
        generator = torch.Generator()
        generator.manual_seed(zlib.crc32(f"{self.seed},{int(key)}".encode()))
        shape = tuple(truth.shape)
        for axis, size in enumerate(shape):
            shown = (torch.arange(size) - self.displacement).clamp(0, size - 1)
            truth = truth.index_select(axis, shown)
        effect = float(torch.randn((), generator=generator, dtype=torch.float64))
        fields = _smooth_normal(3 + self.num_classes, shape, self.grain, generator)
        where, which, doubt = torch.special.ndtr(fields[:3])  # each pixel uniform on (0, 1)

        odds = self.error_rate / (1 - self.error_rate) * self._difficulty()
        odds = odds * torch.tensor(self.image_effect * effect + self.shift).exp()
        mistaken = where < (odds / (1 + odds))[truth]
        steps = self._confusion().cumsum(1)[truth]  # (*S, C)
        wrong = (which[..., None] >= steps).sum(-1).clamp(max=self.num_classes - 1)

        shown = torch.where(mistaken, wrong, truth)
        # (*S, C); where a mistake is in doubt the truth keeps half to all of the signal
        confidence = (doubt - self.confident) / max(1 - self.confident, 1e-9)
        kept = torch.where(doubt < self.confident, 0.0, 0.5 + 0.5 * confidence)
        logits = torch.zeros((*shape, self.num_classes), dtype=torch.float64)
        logits.scatter_(-1, truth[..., None], (self.signal * kept)[..., None])
        logits.scatter_(-1, shown[..., None], self.signal)
        logits = logits.movedim(-1, 0) + self.noise * fields[3:]
        if self.background is not None:
            logits[self.background] += self.background_bias
        return logits / self.temperature

    def _weights(self, row: object) -> bool:
        """Whether these are finite weights, one per class."""
        return _lists(row, self.num_classes) and all(
            _checks.is_number(v) and 0 <= v < inf for v in row
        )

    def _difficulty(self) -> Tensor:
        """Factor on the odds of a mistake, ``(C,)``."""
        if self.difficulty is not None:
            return torch.tensor(self.difficulty, dtype=torch.float64)
        return torch.logspace(-1, 1, self.num_classes, base=2.0, dtype=torch.float64)

    def _confusion(self) -> Tensor:
        """Rows that sum to 1: the class a mistaken one shows, ``(C, C)``."""
        if self.confusion is not None:
            count = self.num_classes
            if not _lists(self.confusion, count) or not all(map(self._weights, self.confusion)):
                raise InputError(f"confusion must be {count} rows of {count} weights >= 0")
            weights = torch.tensor([list(row) for row in self.confusion], dtype=torch.float64)
            if bool(weights.diagonal().any()) or not bool(weights.sum(1).all()):
                raise InputError(
                    "confusion must have a diagonal of 0 and in each row a weight above 0; "
                    "how often a class is mistaken is its difficulty"
                )
        else:
            weights = torch.zeros(self.num_classes, self.num_classes, dtype=torch.float64)
            others = [c for c in range(self.num_classes) if c != self.background]
            for place, c in enumerate(others):
                if len(others) > 1:
                    weights[c, others[(place + 1) % len(others)]] = 0.5
                if self.background is not None:
                    weights[c, self.background] = 0.5
                    weights[self.background, c] = 1.0
        return weights / weights.sum(1, keepdim=True)


def _lists(value: object, count: int) -> TypeGuard[Sequence[Any]]:
    """Whether this is a list, or its like, of so many things; a text is none."""
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == count


def _checksum(image: Tensor) -> int:
    """A number that depends on the image's labels and shape alone."""
    return zlib.crc32(image.contiguous().numpy().tobytes(), zlib.crc32(repr(image.shape).encode()))


def _smooth_normal(
    count: int, shape: tuple[int, ...], grain: float, generator: torch.Generator
) -> Tensor:
    """Independent random fields, smooth over ``grain`` pixels, each pixel exactly N(0, 1).

    Normals on a coarse grid with a random origin, interpolated linearly along each axis and
    divided by the standard deviation that the weights leave. float64 ``(count, *shape)``.
    """
    cells = [int(size / grain) + 3 for size in shape]
    field = torch.randn((count, *cells), generator=generator, dtype=torch.float64)
    origins = torch.rand(len(shape), generator=generator, dtype=torch.float64).tolist()
    for axis, (size, origin) in enumerate(zip(shape, origins, strict=True), start=1):
        place = torch.arange(size, dtype=torch.float64) / grain + origin
        low = place.floor().to(torch.int64)
        part = place - low
        spread = ((1 - part) ** 2 + part**2).sqrt()
        column = [-1] + [1] * (len(shape) - axis)
        near = field.index_select(axis, low) * ((1 - part) / spread).reshape(column)
        far = field.index_select(axis, low + 1) * (part / spread).reshape(column)
        field = near + far
    return field
