"""Images as the annotators take them: uint8 RGB, and resized while they are uint8.

Resizing bytes with torch's antialiased bicubic filter gives what Pillow gives to within two grey
levels; resizing floats does not (up to fifteen), because Pillow rounds between its two passes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cpseg import _checks
from cpseg.errors import InputError

__all__ = ["check_images", "check_size", "in_batches", "resize", "rgb", "short_side"]

# Pillow's modes of one byte per channel, and the ones it turns into bytes without loss.
_MODES = {
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
}


def check_images(images: Tensor) -> None:
    """A batch of uint8 RGB images, ``(B, 3, H, W)``; none of it is empty."""
    _checks.check_tensor("images", images)
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise InputError(
            "images must have shape (B, 3, H, W) with at least one image and pixel; "
            f"got {_checks.describe(images.shape)}"
        )
    _check_bytes(images.dtype)


def rgb(image: object) -> Tensor:
    """One image as uint8 ``(3, H, W)`` on the CPU.

    Args:
        image: A uint8 tensor ``(3, H, W)``, a uint8 array ``(H, W, 3)`` or ``(H, W)``, or a
            Pillow image of any mode with 8 bits per channel; transparency is dropped. Pixels are
            taken as they are stored: a camera's note of its orientation (EXIF) is not followed,
            since labels are drawn on the stored pixels.

    Returns:
        The image. Shape ``(3, H, W)``.

    Raises:
        InputError: It is none of these, such as an image of 16 bits, which has no one rendering
            in bytes; the message names its file.

    Examples:
        >>> rgb(np.zeros((4, 6), dtype=np.uint8)).shape
        torch.Size([3, 4, 6])
    """
    if isinstance(image, Tensor):
        _check_bytes(image.dtype)
        if image.ndim != 3 or image.shape[0] != 3:
            raise InputError(
                f"an image tensor must have shape (3, H, W); got {_checks.describe(image.shape)}"
            )
        return image.detach().cpu()
    if isinstance(image, (str, Path)):
        raise InputError(
            f"an image must be a tensor, an array or a Pillow image; got the path {str(image)!r}. "
            "Open it: PIL.Image.open(path)"
        )
    convert: Callable[[str], Any] | None = getattr(image, "convert", None)
    mode = getattr(image, "mode", None)
    if convert is not None and mode not in _MODES:
        raise InputError(
            f"an image must have 8 bits per channel; {getattr(image, 'filename', '') or 'it'} has "
            f"Pillow's mode {mode}. Bring it to bytes the way its values mean it"
        )
    array = np.asarray(image if convert is None else convert("RGB"))
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise InputError(
            f"an image must be uint8 RGB of shape (H, W, 3); got {array.dtype} "
            f"{_checks.describe(array.shape)}"
        )
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def resize(
    images: Tensor, size: tuple[int, int], mode: Literal["bilinear", "bicubic"] = "bicubic"
) -> Tensor:
    """With antialias, in uint8, on the CPU. ``(B, 3, H, W)`` to ``(B, 3, *size)``."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images.cpu()
    return functional.interpolate(
        images.cpu(), size=size, mode=mode, antialias=True, align_corners=False
    )


def short_side(size: tuple[int, int], short: int, longest: int | None) -> tuple[int, int]:
    """The size with its shorter side at ``short``, or less so that no side passes ``longest``.

    Examples:
        >>> short_side((375, 500), 512, None), short_side((500, 2000), 512, 1024)
        ((512, 682), (256, 1024))
    """
    height, width = size
    low, high = min(size), max(size)
    if longest is not None and short * high > longest * low:
        new_low, new_high = max(1, longest * low // high), longest
    else:
        new_low, new_high = short, short * high // low
    return (new_low, new_high) if height <= width else (new_high, new_low)


def check_size(name: str, size: object) -> None:
    """Height and width, two whole numbers of at least 1."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise InputError(f"{name} must be (height, width); got {size!r}")
    for side in size:
        _checks.check_integer(name, side, 1)


def in_batches(
    images: Sequence[object], batch_size: int, annotate: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Logits of each image, in order; images meet in a batch only if they have the same size.

    Args:
        images: Images as :func:`rgb` takes them.
        batch_size: Most images of one call.
        annotate: uint8 ``(B, 3, H, W)`` to logits ``(B, C, H, W)``, or ``(B * L, C, H, W)``
            where each image has L channels of its own.

    Returns:
        A tensor ``(C, H, W)`` per image, or ``(L, C, H, W)`` where L > 1.
    """
    _checks.check_integer("batch_size", batch_size, 1)
    if isinstance(images, str) or not hasattr(images, "__len__"):
        raise InputError(f"images must be a sequence of images; got {type(images).__name__}")
    axes = getattr(images, "shape", None)  # of an array; a list has none
    if axes is not None and len(axes) < 4:
        raise InputError(
            "images must be a sequence of images; got one array of shape "
            f"{_checks.describe(axes)}. For one image: [image]"
        )
    tensors = [rgb(image) for image in images]
    places: dict[tuple[int, ...], list[int]] = {}
    for place, image in enumerate(tensors):
        places.setdefault(tuple(image.shape), []).append(place)
    answers: dict[int, Tensor] = {}
    for same in places.values():
        for start in range(0, len(same), batch_size):
            chosen = same[start : start + batch_size]
            logits = annotate(torch.stack([tensors[i] for i in chosen]))
            rows = logits.reshape(len(chosen), -1, *logits.shape[1:])
            answers.update(zip(chosen, rows[:, 0] if rows.shape[1] == 1 else rows, strict=True))
    return [answers[place] for place in range(len(tensors))]


def _check_bytes(dtype: torch.dtype) -> None:
    if dtype != torch.uint8:
        raise InputError(
            f"images must be uint8 RGB, 0 to 255; got {dtype}. "
            "For floats between 0 and 1: (images * 255).round().to(torch.uint8)"
        )
