"""Every per-pixel operation as one pass over the logits.

An operation is written once, on *columns*: a ``(C, N)`` block of pixels. :func:`walk` cuts a batch
into blocks that fit a core's cache, runs the operation on each and puts the results together, so
that nothing of the logits' size exists but the result. The same operation runs compiled, fused
into one kernel: every block then has the same shape, whatever the batch, so that one graph serves
all of them.
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from math import prod
from types import FunctionType
from typing import Protocol

import torch
from torch import Tensor

from cpseg._classes import Parts

__all__ = ["Columns", "CompileWarning", "upcast", "walk", "whole"]

# Elements of a block, by device: eager ones fill a core's cache (a good share of a small GPU);
# compiled ones are worth a call. A device that is not listed takes whole images compiled.
_EAGER = {"cpu": 2**18, "cuda": 2**28}
_COMPILED = {"cpu": 2**20}
_ROWS = 32  # classes up to which a kernel takes each for itself


class CompileWarning(UserWarning):
    """Compiled paths were asked for, and this machine has no working compiler."""


class Columns(Protocol):
    """An operation on a block of pixels; hashable, and equal to one that does the same.

    It gets the block in parts, ``(K, N)`` each in float32 or float64, the pixels' positions in
    ``*S``, int64 ``(N,)``, what lies beside the pixels, ``(K, N)`` each, and what is the same for
    all of them. It gives tensors ``(N,)`` or ``(K, N)``, each column from its own column alone,
    and changes nothing that it gets.
    """

    def __call__(self, x: Parts, position: Tensor, /, *beside: Tensor) -> tuple[Tensor, ...]:
        """Run on one block."""
        ...

    def __hash__(self) -> int: ...


def upcast(logits: Tensor) -> Tensor:
    """Logits in at least float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def walk(
    columns: Columns,
    logits: Tensor,
    near: Sequence[Tensor] = (),
    fixed: Sequence[Tensor] = (),
    *,
    compiled: bool = False,
) -> tuple[Tensor, ...]:
    """Run ``columns`` over all pixels, a block at a time.

    A block is a multiple of 32 wide: only then does a sum over the first axis of what is made
    from it add in the same order in every column. So a result is the same, to the bit, whatever
    the batch size, the strides, the other pixels and the cut into batches. No gradient is kept.

    Args:
        columns: The operation.
        logits: Shape ``(B, C, *S)``.
        near: What lies beside the pixels, each ``(1 or B, K, *S)``.
        fixed: What all pixels share.
        compiled: Fuse the operation with ``torch.compile``.

    Returns:
        What ``columns`` gave, each ``(B, *S)`` or ``(B, K, *S)``.
    """
    if torch.compiler.is_compiling():
        return whole(columns, logits, near, fixed)
    # State and buffers of a caller's inference mode would be other graphs, and could not be
    # written to outside it.
    with torch.inference_mode(mode=False), torch.no_grad():
        device = logits.device.type
        compiled = compiled and _compiler_works(device)
        classes, size = logits.shape[1], prod(logits.shape[2:])
        if not compiled:
            width = max(_EAGER.get(device, 2**18) // classes // 32 * 32, 32)
        elif device in _COMPILED:  # a power of 2: so are many images, and none is cut short
            width = max(2 ** ((_COMPILED[device] // classes).bit_length() - 1), 32)
        else:
            width = max(size, 1)
        run = _compiled(columns, classes, logits.dtype, device) if compiled else None
        fill = compiled and device in _COMPILED
        results: list[Tensor] = []
        for images, pixels, block in _blocks(logits, near, width, fill=fill, upcasts=run is None):
            x, position, *beside = block
            if run is None:
                made = columns((x,), position, *beside, *fixed)
            else:
                made = run(x.unbind() if classes <= _ROWS else (x,), position, *beside, *fixed)
            count, n = images.stop - images.start, pixels.stop - pixels.start
            results = results or [
                part.new_empty((len(logits), *part.shape[:-1], size)) for part in made
            ]
            for result, part in zip(results, made, strict=True):
                filled = part[..., : count * n].view(*part.shape[:-1], count, n)
                result[images, ..., pixels] = filled if part.ndim == 1 else filled.transpose(0, 1)
        return tuple(result.view(*result.shape[:-1], *logits.shape[2:]) for result in results)


def whole(
    columns: Columns, logits: Tensor, near: Sequence[Tensor] = (), fixed: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """As :func:`walk`, all pixels at once: for a caller's compiler, or an operation of images."""
    batch, classes, *space = logits.shape
    x = upcast(logits).movedim(1, 0).reshape(classes, -1)
    position = torch.arange(prod(space), device=logits.device).repeat(batch)
    rows = [
        part.expand(batch, -1, *space).movedim(1, 0).reshape(part.shape[1], -1) for part in near
    ]
    made = columns((x,), position, *rows, *fixed)
    return tuple(
        part.reshape(*part.shape[:-1], batch, *space).movedim(part.ndim - 1, 0) for part in made
    )


def _blocks(
    logits: Tensor, near: Sequence[Tensor], width: int, *, fill: bool, upcasts: bool
) -> Iterator[tuple[slice, slice, tuple[Tensor, ...]]]:
    """Images, pixels, and their block: ``x``, positions, what is near. One at least, if empty.

    Blocks that are no views share their memory. With ``fill`` they all have the given width, and
    are views where they can be: a kernel reads each logit once. Else a view must be all of an
    image: what is read again and again is better copied than left in rows far apart, which a cache
    holds few of where the distance is a power of 2.
    """
    batch, size = len(logits), prod(logits.shape[2:])
    images, pixels = max(width // max(size, 1), 1), max(min(size, width), 1)
    position = torch.arange(size, device=logits.device)[None, None]
    single = upcast(logits[:0]).dtype if upcasts else logits.dtype
    parts = [(logits, single), (position, torch.int64)]
    parts += [(part, part.dtype if part.is_floating_point() else torch.int64) for part in near]
    buffers = [_Buffer(dtype, width if fill else 32, apart=fill) for _, dtype in parts]
    for rows in _spans(batch, images):
        count = rows.stop - rows.start
        some = [part if len(part) == 1 < batch else part[rows] for part, _ in parts]
        flat = [part.reshape(*part.shape[:2], size) for part in some]
        for columns in _spans(size, pixels):
            x, places, *beside = (
                buffer.filled(part[..., columns], count)
                for buffer, part in zip(buffers, flat, strict=True)
            )
            yield rows, columns, (x, places[0], *beside)


def _spans(size: int, step: int) -> list[slice]:
    """``size`` things, ``step`` at a time; one empty span if there are none."""
    starts = range(0, max(size, 1), step)
    return [slice(start, min(start + step, size)) for start in starts]


class _Buffer:
    """Memory for one part of every block that is no view; the rows of a view may lie apart."""

    def __init__(self, dtype: torch.dtype, step: int, *, apart: bool) -> None:
        self.dtype, self.step, self.apart = dtype, step, apart
        self.held: Tensor | None = None

    def filled(self, part: Tensor, count: int) -> Tensor:
        """``(1 or count, K, n)`` as ``(K, N)``; what lies beyond the pixels is of no account."""
        height, n = part.shape[1:]
        width = max(-(-count * n // self.step) * self.step, self.step)
        if count == len(part) == 1 and n == width and part.dtype == self.dtype:
            row = part[0]
            if row.stride(1) == 1 if self.apart else row.is_contiguous():
                return row
        if self.held is None or self.held.numel() < height * width:
            # Zeros: what lies beyond may be an index.
            self.held = torch.zeros(height * width, dtype=self.dtype, device=part.device)
        block = self.held[: height * width].view(height, width)
        block[:, : count * n].view(height, count, n).copy_(part.transpose(0, 1))
        return block


@cache
def _compiled(columns: Columns, classes: int, dtype: torch.dtype, device: str) -> Columns:
    """``columns`` as one kernel, for this many classes of this dtype alone.

    Dynamo keeps graphs by code object and gives up after eight: hence a copy of the code for each.
    """
    del classes, dtype

    def run(x: Parts, position: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
        # Rows come one by one, so that how far apart they lie is no part of the graph.
        parts = [upcast(part if part.ndim == 2 else part[None]) for part in x]
        return columns(parts, position, *beside)

    own = FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    fused: Columns = torch.compile(own, fullgraph=True, dynamic=device not in _COMPILED)
    return fused


@cache
def _compiler_works(device: str) -> bool:
    """Whether a kernel can be compiled for this kind of device; warns once where not."""
    try:
        torch.compile(_probe, fullgraph=True)(torch.zeros(64, device=device))
    except Exception as error:  # noqa: BLE001 - a missing compiler fails in many ways
        warnings.warn(
            f"compiled=True needs a compiler for {device}, and there is none that works "
            f"({type(error).__name__}); going on without",
            CompileWarning,
            stacklevel=4,
        )
        return False
    return True


def _probe(x: Tensor) -> Tensor:
    return x.exp() + 1
