"""One draw per pixel, from a seed and the pixel's position alone."""

import torch
from torch import Tensor

__all__ = ["uniform"]


def uniform(seed: int, position: Tensor) -> Tensor:
    """One draw in (0, 1) per position: the same number on every device, in any order.

    Args:
        seed: Any integer.
        position: int64 positions, non-negative.

    Returns:
        float32 draws, odd multiples of ``2**-24``. Shape of ``position``.

    Examples:
        >>> bool((uniform(0, torch.arange(9)) == uniform(0, torch.arange(9))).all())
        True
    """
    low = _mix((position & _WORD) ^ _mix_key(seed & _WORD))
    mixed = _mix(low ^ (position >> 32) ^ _mix_key((seed >> 32) & _WORD ^ 0x9E3779B9))
    return ((mixed >> 9) * 2 + 1).to(torch.float32) * 2.0**-24


_WORD = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    # A 32-bit finalizer (xor, shift, multiply) in int64: products wrap, their low word is right.
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _WORD
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _WORD
    return h ^ (h >> 16)


def _mix_key(h: int) -> int:
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _WORD
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _WORD
    return h ^ (h >> 16)
