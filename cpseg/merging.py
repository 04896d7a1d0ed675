"""One accumulator that has seen what several have, in one process or in many.

Merging is exact and in any order the same, so that how data were shared out never shows.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from typing import Any, Protocol, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from cpseg import _checks
from cpseg.errors import InputError

__all__ = ["Mergeable", "gather", "merge_all"]

ADDED = "+"  # ends the names of what merging adds up


class Mergeable(Protocol):
    """What :func:`merge_all` and :func:`gather` take: calibrators and metrics."""

    def merge(self, other: Self, /) -> Self:
        """Add what another has seen; the other stays as it is."""
        ...

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors and plain data that JSON can hold.

        An entry whose name ends in ``+`` is an integer tensor that merging adds up: processes
        add it together, where they send each other all the rest.
        """
        ...

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object], /) -> Self:
        """The accumulator that gave this state."""
        ...


_Kind = TypeVar("_Kind", bound=Mergeable)


def merge_all(accumulators: Iterable[_Kind]) -> _Kind:
    """One accumulator that has seen what all of them have; they stay as they are.

    Args:
        accumulators: At least one, all made with the same arguments.

    Returns:
        A new accumulator. The order does not matter, to the bit.

    Raises:
        InputError: If there are none, one is no accumulator, or two differ in their arguments.
    """
    if not isinstance(cast("object", accumulators), Iterable):
        raise InputError(f"accumulators must be several; got {_checks.kind_of(accumulators)}")
    merged: _Kind | None = None
    for item in accumulators:
        _check_mergeable("accumulators", item)
        merged = _another(item, item.state_dict()) if merged is None else merged.merge(item)
    if merged is None:
        raise InputError("accumulators must hold at least one; got none")
    return merged


def gather(accumulator: _Kind) -> _Kind:
    """What all processes of the default process group have seen, on every one of them.

    The only call of cpseg that talks to other processes, and only tensors travel. Every process
    must make it. Ranks may have seen any share of the data, or nothing, on any device. Histograms
    are added up in one reduction; scores of exact stores, open units and rows of metrics are sent
    by each rank to all. Without an initialized process group it is a copy.

    Args:
        accumulator: This process's accumulator, which stays as it is.

    Returns:
        The merged accumulator, identical on every rank and to one process that has seen it all,
        to the bit.

    Raises:
        InputError: If ranks hold accumulators that differ in their arguments; on every rank.
    """
    _check_mergeable("accumulator", accumulator)
    if not (dist.is_available() and dist.is_initialized()):
        return merge_all([accumulator])
    states = iter(_all_states(accumulator.state_dict()))
    merged = _another(accumulator, next(states))
    for state in states:  # one at a time: each may be as large as all of a store
        merged = merged.merge(_another(accumulator, state))
    return merged


def _check_mergeable(name: str, value: object) -> None:
    parts = ("merge", "state_dict", "from_state_dict")
    if isinstance(value, type) or not all(hasattr(value, part) for part in parts):
        rule = "hold calibrators or metrics" if name.endswith("s") else "be a calibrator or metric"
        raise InputError(f"{name} must {rule}; got {_checks.kind_of(value)}")


def _another(like: _Kind, state: Mapping[str, object]) -> _Kind:
    """The accumulator that gave this state: a score of the user's own is not in it, but here."""
    build: Callable[..., _Kind] = type(like).from_state_dict
    score = getattr(like, "score", None)
    return build(state) if score is None else build(state, score=score)


def _all_states(mine: Mapping[str, object]) -> list[dict[str, object]]:
    """Every rank's state, the same list on every rank.

    All that is sent is sent before anything is merged: a refusal then finds every rank alike,
    and leaves none waiting.
    """
    road = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    own = {name: value for name, value in mine.items() if isinstance(value, Tensor)}
    outline = {
        "plain": {name: value for name, value in mine.items() if name not in own},
        "tensors": {
            name: [str(value.dtype).removeprefix("torch."), list(value.shape)]
            for name, value in own.items()
        },
    }
    sent = bytearray(json.dumps(outline, default=index).encode())  # numpy's integers too
    told = _exchange(torch.frombuffer(sent, dtype=torch.uint8).to(road))
    outlines: list[Any] = [json.loads(text.cpu().numpy().tobytes()) for text in told]
    forms: list[dict[str, Any]] = [outline["tensors"] for outline in outlines]
    totals = {
        name: _added_up(own.get(name), dtype, shape, road)
        for name, (dtype, shape) in _same_everywhere(forms).items()
    }
    whole = [value for name, value in own.items() if name not in totals]
    parts = [value.to(road).contiguous().flatten().view(torch.uint8) for value in whole]
    received = _exchange(torch.cat([torch.zeros(0, dtype=torch.uint8, device=road), *parts]))
    nothing: dict[str, Tensor] = {}
    states: list[dict[str, object]] = [dict(outline["plain"]) for outline in outlines]
    for state, form, data in zip(states, forms, received, strict=True):
        start = 0
        for name, (kind, shape) in form.items():
            dtype, home = getattr(torch, kind), own[name].device if name in own else road
            if name in totals:
                # The first rank that has it brings the sum, the others nothing.
                state[name] = totals.pop(name).to(home)
                nothing[name] = torch.zeros((), dtype=dtype, device=home).expand(shape)
            elif name in nothing:
                state[name] = nothing[name]
            else:
                stop = start + torch.Size(shape).numel() * dtype.itemsize
                # A copy: bytes in the middle of others need not be aligned.
                state[name] = data[start:stop].clone().view(dtype).view(shape).to(home)
                start = stop
    return states


def _same_everywhere(forms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Form of each tensor that merging adds up and that no two ranks hold in different shapes."""
    names = dict.fromkeys(name for form in forms for name in form if name.endswith(ADDED))
    held = {name: [form[name] for form in forms if name in form] for name in names}
    return {
        name: kinds[0] for name, kinds in held.items() if all(kind == kinds[0] for kind in kinds)
    }


def _added_up(mine: Tensor | None, kind: str, shape: list[int], road: torch.device) -> Tensor:
    """The sum over ranks; one that has nothing adds zeros."""
    total = (
        torch.zeros(shape, dtype=getattr(torch, kind), device=road)
        if mine is None
        else mine.to(road, copy=True).contiguous()
    )
    dist.all_reduce(total)
    return total


def _exchange(mine: Tensor) -> list[Tensor]:
    """Every rank's bytes, in order of rank. uint8 ``(N,)`` each."""
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = torch.zeros(world, dtype=torch.int64, device=mine.device)
    sizes[rank] = len(mine)
    dist.all_reduce(sizes)
    received: list[Tensor] = []
    for source, size in enumerate(sizes.tolist()):
        data = mine if source == rank else mine.new_empty(size)
        if size:
            dist.broadcast(data, source)
        received.append(data)
    return received
