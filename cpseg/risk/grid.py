"""Which thresholds are tried."""

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.errors import InputError

__all__ = ["threshold_grid"]


def threshold_grid(low: float, high: float, points: int = 101) -> Tensor:
    """Thresholds to try: half of them evenly, half ever closer to the low end.

    Args:
        low: Least score.
        high: Largest finite score.
        points: How many, at least 3.

    Returns:
        Increasing, from ``low`` to ``high``. float32 ``(K,)``.

    Raises:
        InputError: If points is too small, or the range is empty.

    Examples:
        >>> threshold_grid(0.0, 1.0, 5)
        tensor([0.0000e+00, 9.5367e-07, 2.4414e-04, 6.2500e-02, 1.0000e+00])
    """
    _checks.check_integer("points", points, 3)
    if not low < high:
        raise InputError(f"low must be below high; got {low} and {high}")
    near = (points - 1) // 2
    small = torch.logspace(-20, -4, near + 1, base=2.0, dtype=torch.float64)[:-1]
    even = torch.linspace(1 / 16, 1, points - 1 - near, dtype=torch.float64)
    share = torch.cat((small.new_zeros(1), small, even))
    grid: Tensor = torch.unique((low + (high - low) * share).float())
    return grid
