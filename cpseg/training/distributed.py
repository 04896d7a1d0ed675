"""The process group that a launcher describes in the environment; one process without it."""

import os
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch import distributed as dist

from cpseg.errors import InputError

__all__ = ["Processes", "processes"]


@final
@dataclass(frozen=True, slots=True)
class Processes:
    """Who this process is among those that train together.

    Attributes:
        rank: Its number.
        count: How many there are.
        local_rank: Its number on its machine, which is its GPU's.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes, in place."""
        return self.sum(value).div_(self.count)

    def all_of(self, value: object) -> list[object]:
        """Every process's value, by rank."""
        if self.count == 1:
            return [value]
        found: list[object] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until every process has come this far."""
        if self.count > 1:
            dist.barrier()


def processes(device: torch.device) -> Processes:
    """Join the group that ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` describe, as torchrun does.

    A group that exists already is used as it is. Without those variables: one process.

    Args:
        device: Where training runs; decides between gloo and nccl.

    Raises:
        InputError: If only some of the variables are there.
    """
    if not dist.is_available():
        return Processes()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not dist.is_initialized():
        given = {name for name in ("RANK", "WORLD_SIZE") if name in os.environ}
        if not given:
            return Processes()
        if len(given) == 1:
            raise InputError(f"RANK and WORLD_SIZE must both be set; got only {given.pop()}")
        if os.environ["WORLD_SIZE"] == "1":
            return Processes()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), local)
