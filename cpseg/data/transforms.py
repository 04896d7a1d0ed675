"""Random crops and colors, in torch, with every map moved exactly as its image.

Chance is drawn first and applied afterwards: a :class:`Warp` or a :class:`Tint` is the drawn one,
and can be applied to as many tensors as must stay together.
"""

from dataclasses import dataclass
from math import exp, log
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from cpseg import _checks
from cpseg.errors import InputError

__all__ = ["ColorJitter", "RandomCrop", "Tint", "Warp"]


@final
@dataclass(frozen=True, slots=True)
class Warp:
    """One resize, flip and crop.

    Attributes:
        resized: Height and width after resizing.
        top: First row of the crop in the resized image.
        left: First column.
        size: Height and width of the crop; what lies outside the image is filled.
        flip: Whether the resized image is mirrored left to right.
    """

    resized: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]
    flip: bool

    def image(self, image: Tensor, fill: float = 0.0) -> Tensor:
        """A floating image ``(3, H, W)``, bilinear, to ``(3, *size)``."""
        grown = image[None]
        if tuple(image.shape[1:]) != self.resized:
            small = self.resized[0] < image.shape[1] or self.resized[1] < image.shape[2]
            grown = functional.interpolate(
                grown, self.resized, mode="bilinear", align_corners=False, antialias=small
            )
        return self._crop(grown[0], fill)

    def labels(self, labels: Tensor, fill: int = 255) -> Tensor:
        """A map of classes ``(H, W)``, each pixel the nearest of the old, to ``size``.

        Maps over leading axes, such as a class's probabilities ``(C, H, W)``, are moved alike.
        """
        grown = labels
        if tuple(labels.shape[-2:]) != self.resized:
            rows, columns = (
                _nearest(old, new) for old, new in zip(labels.shape[-2:], self.resized, strict=True)
            )
            grown = labels[..., rows[:, None], columns]
        return self._crop(grown, fill)

    def valid(self) -> Tensor:
        """Where the crop lies inside the image. bool ``size``."""
        return self._crop(torch.ones(self.resized, dtype=torch.bool), fill=False)

    def _crop(self, value: Tensor, fill: float) -> Tensor:
        if self.flip:
            value = value.flip(-1)
        value = value[..., self.top : self.top + self.size[0], self.left : self.left + self.size[1]]
        below, right = self.size[0] - value.shape[-2], self.size[1] - value.shape[-1]
        if below or right:
            value = functional.pad(value, (0, right, 0, below), value=fill)
        return value.contiguous()


def _nearest(old: int, new: int) -> Tensor:
    """The old pixel whose center is nearest to each new pixel's: bilinear's own coordinates."""
    return ((2 * torch.arange(new) + 1) * old // (2 * new)).clamp(max=old - 1)


@final
@dataclass(frozen=True, slots=True)
class RandomCrop:
    """Resize by a random factor, crop a random place, mirror half of the time.

    Args:
        size: Height and width of the crop.
        scale: The smallest and the largest factor; its logarithm is uniform.
        flip: How likely the image is mirrored left to right.

    Raises:
        InputError: If an argument is out of its range.

    Examples:
        >>> crop = RandomCrop((4, 6))
        >>> warp = crop((5, 9), torch.Generator().manual_seed(0))
        >>> labels = torch.zeros(5, 9, dtype=torch.int64)
        >>> warp.image(torch.zeros(3, 5, 9)).shape, warp.labels(labels).shape
        (torch.Size([3, 4, 6]), torch.Size([4, 6]))
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5

    def __post_init__(self) -> None:
        for name, side in zip(("height", "width"), self.size, strict=True):
            _checks.check_integer(name, side, 1)
        if not 0 < self.scale[0] <= self.scale[1]:
            raise InputError(f"scale must be an increasing pair above 0; got {self.scale}")
        if not 0 <= self.flip <= 1:
            raise InputError(f"flip must lie in [0, 1]; got {self.flip!r}")

    def __call__(self, shape: tuple[int, int], generator: torch.Generator) -> Warp:
        """Draw for an image of ``shape``, height and width."""
        scale, y, x, flip = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        low, high = log(self.scale[0]), log(self.scale[1])
        factor = exp(low + (high - low) * scale)
        height, width = (max(round(side * factor), 1) for side in shape)
        top = int(y * (max(height - self.size[0], 0) + 1))
        left = int(x * (max(width - self.size[1], 0) + 1))
        return Warp((height, width), top, left, self.size, flip < self.flip)


@final
@dataclass(frozen=True, slots=True)
class Tint:
    """One change of colors.

    Attributes:
        brightness: Factor on everything.
        contrast: Factor on the distance from the image's mean gray.
        saturation: Factor on the distance from each pixel's gray.
        hue: Turn of the colors around the gray axis, as a share of a full turn.
        gray: Whether the colors go.
        blur: Standard deviation of the Gaussian blur in pixels; 0: none.
    """

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    gray: bool = False
    blur: float = 0.0

    def __call__(self, image: Tensor) -> Tensor:
        """An image ``(3, H, W)`` in ``[0, 1]``, to the same."""
        changed = image * self.brightness
        changed = changed.clamp(0, 1)
        mean = _gray(changed).mean()
        changed = (mean + (changed - mean) * self.contrast).clamp(0, 1)
        gray = _gray(changed)
        changed = (gray + (changed - gray) * self.saturation).clamp(0, 1)
        if self.hue:
            changed = torch.einsum("ij,jhw->ihw", _turn(self.hue).to(image), changed).clamp(0, 1)
        if self.gray:
            changed = _gray(changed).expand_as(image)
        return _blurred(changed, self.blur) if self.blur else changed.clone()


@final
@dataclass(frozen=True, slots=True)
class ColorJitter:
    """Strong distortion of colors: jitter, sometimes gray, sometimes blurred.

    The defaults are those of FixMatch's descendants in segmentation: factors within 0.5 of 1, a
    quarter turn of hue, applied to 0.8 of the images; gray 0.2, blur 0.5. Hue is turned in RGB,
    around the gray axis.

    Args:
        strength: How far brightness, contrast and saturation may lie from 1.
        hue: How far the colors may turn, as a share of a full turn.
        probability: How likely the colors change at all.
        gray: How likely they go.
        blur: How likely the image is blurred.
        blur_range: The smallest and the largest standard deviation, in pixels.

    Examples:
        >>> tint = ColorJitter()(torch.Generator().manual_seed(0))
        >>> tint(torch.rand(3, 5, 7)).shape
        torch.Size([3, 5, 7])
    """

    strength: float = 0.5
    hue: float = 0.25
    probability: float = 0.8
    gray: float = 0.2
    blur: float = 0.5
    blur_range: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        for name in ("strength", "hue", "probability", "gray", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1]; got {getattr(self, name)!r}")
        if not 0 < self.blur_range[0] <= self.blur_range[1]:
            raise InputError(
                f"blur_range must be an increasing pair above 0; got {self.blur_range}"
            )

    def __call__(self, generator: torch.Generator) -> Tint:
        """Draw a change."""
        u: list[float] = torch.rand(8, generator=generator, dtype=torch.float64).tolist()
        factors = [1 + self.strength * (2 * value - 1) for value in u[:3]]
        if u[4] >= self.probability:
            factors = [1.0, 1.0, 1.0]
        hue = self.hue * (2 * u[3] - 1) if u[4] < self.probability else 0.0
        low, high = self.blur_range
        return Tint(
            brightness=factors[0],
            contrast=factors[1],
            saturation=factors[2],
            hue=hue,
            gray=u[5] < self.gray,
            blur=low + (high - low) * u[7] if u[6] < self.blur else 0.0,
        )


def _gray(image: Tensor) -> Tensor:
    """Luma of an image, ``(1, H, W)``."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=image.dtype, device=image.device)
    return (image * weights[:, None, None]).sum(0, keepdim=True)


def _turn(share: float) -> Tensor:
    """The rotation of RGB around the gray axis, float64 ``(3, 3)``."""
    angle = torch.tensor(2 * torch.pi * share, dtype=torch.float64)
    same = (1 + 2 * angle.cos()) / 3
    after = (1 - angle.cos()) / 3 + angle.sin() / 3**0.5
    before = (1 - angle.cos()) / 3 - angle.sin() / 3**0.5
    return torch.stack(
        (
            torch.stack((same, before, after)),
            torch.stack((after, same, before)),
            torch.stack((before, after, same)),
        )
    )


def _blurred(image: Tensor, deviation: float) -> Tensor:
    """A Gaussian blur in two passes, the border repeated."""
    reach = max(int(3 * deviation + 0.5), 1)
    offsets = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
    kernel = (-0.5 * (offsets / deviation) ** 2).exp()
    kernel = kernel / kernel.sum()
    padded = functional.pad(image[:, None], (reach, reach, reach, reach), mode="replicate")
    rows = functional.conv2d(padded, kernel.view(1, 1, -1, 1))
    return functional.conv2d(rows, kernel.view(1, 1, 1, -1))[:, 0]
