"""Counts per image that add up over its tiles, and the losses they stand for."""

import torch
from torch import Tensor

from cpseg import _checks, accumulate
from cpseg.errors import InputError
from cpseg.quantile import UNIT_MASS
from cpseg.risk.losses import Batch, Losses


def first_covering(batch: Batch) -> Tensor:
    """Index of the first threshold that covers each pixel's label; K for none. ``(B, *S)``."""
    return first_reaching(batch.grid, batch.score.of_labels(batch.logits, batch.labels))


def first_reaching(grid: Tensor, scores: Tensor) -> Tensor:
    """Index of the first threshold not below each score; NaN is beyond the last."""
    return torch.searchsorted(grid.to(scores.dtype), scores.contiguous())


def by_class(batch: Batch, num_classes: int) -> Tensor:
    """Valid pixels by class and first covering threshold. int64 ``(B, C * (K + 1))``.

    With one class, those of all classes together.
    """
    steps = len(batch.grid) + 1
    row = batch.labels if num_classes > 1 else torch.zeros_like(batch.labels)
    index = flattened(row * steps + first_covering(batch))
    return occurrences(index, flattened(batch.valid), num_classes * steps)


def flattened(x: Tensor) -> Tensor:
    """Spatial axes as one, also where there is none. ``(B, N)``."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def occurrences(index: Tensor, valid: Tensor, size: int) -> Tensor:
    """How often each of ``0 .. size - 1`` occurs in each row where valid. int64 ``(B, size)``."""
    return accumulate.occurrences(torch.where(valid, index, size), size + 1)[:, :size]


def missed_shares(counts: Tensor) -> Losses:
    """Shares not yet reached at each threshold, of counts by first threshold ``(N, R, K + 1)``."""
    pixels = counts.sum(-1)
    missed = pixels[..., None] - counts[..., :-1].cumsum(-1)
    return Losses(missed / pixels.clamp(min=1)[..., None].double(), pixels > 0, pixels)


def tally_of_function(name: str, values: list[Tensor], batch: Batch) -> Tensor:
    table = torch.stack(values, 1).double()
    if table.shape[0] != len(batch.labels) or table.ndim != 2:
        raise InputError(
            f"function of {name} must give shape ({len(batch.labels)},); "
            f"got {_checks.describe(values[0].shape)}"
        )
    outside = int((~((table >= 0) & (table <= 1))).sum())
    if outside:
        raise InputError(f"{name} must lie in [0, 1]; got {outside} losses that do not")
    pixels = flattened(batch.valid).sum(1, keepdim=True)
    mass = (table * UNIT_MASS).ceil().long()
    return torch.cat((mass, torch.ones_like(pixels), pixels), 1)


def losses_of_function(tallies: Tensor) -> Losses:
    mass, tiles, pixels = tallies[:, None, :-2], tallies[:, None, -2:-1], tallies[:, -1:]
    values = mass.double() / (tiles.double() * UNIT_MASS)
    return Losses(values, torch.ones_like(pixels, dtype=torch.bool), pixels)


def check_classes(num_classes: int, classes: tuple[int, ...] | None) -> None:
    _checks.check_integer("num_classes", num_classes, 1)
    for chosen in classes or ():
        _checks.check_integer("classes", chosen, 0)
        if chosen >= num_classes:
            raise InputError(f"classes must lie below {num_classes}; got {chosen}")
