"""An average of the student over steps: the teacher of self-training."""

from copy import deepcopy
from typing import final

import torch
from torch import Tensor, nn

from cpseg.errors import InputError

__all__ = ["MovingAverage"]


@final
class MovingAverage:
    """An exponential moving average of a network's parameters and buffers.

    The decay grows as ``min(1 - 1 / (t + 1), decay)`` over updates ``t = 1, 2, ...``, so that the
    start is soon forgotten. Integers, such as batch normalization's counter, are copied.

    Args:
        network: What to average; it is copied, and neither wrapped nor compiled.
        decay: The largest share that the past keeps.

    Attributes:
        module: The averaged network, in evaluation mode, without gradients.
        updates: How often :meth:`update` was called.
    """

    def __init__(self, network: nn.Module, decay: float = 0.996) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"decay must lie in [0, 1); got {decay!r}")
        self.module: nn.Module = deepcopy(network).eval().requires_grad_(requires_grad=False)
        self.decay = decay
        self.updates: int = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move a step towards ``network``."""
        self.updates += 1
        rate = max(1 / (self.updates + 1), 1 - self.decay)
        own = self._tensors(self.module)
        new = self._tensors(network)
        for average, value in zip(own, new, strict=True):
            if average.is_floating_point():
                average.lerp_(value, rate)
            else:
                average.copy_(value)

    @staticmethod
    def _tensors(network: nn.Module) -> list[Tensor]:
        return [*network.parameters(), *network.buffers()]
