"""Every per-pixel operation as one pass over the logits.

An operation is written once, on *columns*: a ``(C, N)`` block of pixels. :func:`walk` cuts a batch
into blocks that fit a core's cache, runs the operation on each and puts the results together, so
that nothing of the logits' size exists but the result. The same operation runs compiled, fused
into one kernel for any number of pixels, so that one graph serves all batches.
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise, repeat
from math import prod
from types import FunctionType
from typing import Protocol

import torch
from torch import Tensor

from cpseg._classes import Parts

__all__ = ["Columns", "CompileWarning", "upcast", "walk", "whole"]

# Elements of a block, by device: eager ones fill a core's cache (a good share of a small GPU) and
# are worth no more where threads share them; compiled ones are worth a call. A device that is not
# listed takes whole images compiled.
_EAGER = {"cpu": 2**19, "cuda": 2**28}
_COMPILED = {"cpu": 2**19}
_VIEWED = 4  # times as many where a kernel reads them in place
_ROWS = 32  # classes up to which a kernel takes each for itself


class CompileWarning(UserWarning):
    """Compiled paths were asked for, and this machine has no working compiler."""


class Columns(Protocol):
    """An operation on a block of pixels; hashable, and equal to one that does the same.

    It gets the block in parts, ``(K, N)`` each in float32 or float64, the pixels' positions in
    ``*S``, int64 ``(N,)``, what lies beside the pixels, ``(N,)`` each, and what is the same for
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
    summed: bool = False,
    compiled: bool = False,
) -> tuple[Tensor, ...]:
    """Run ``columns`` over all pixels, a block at a time.

    A block is a multiple of 32 wide: only then does a sum over the first axis of what is made
    from it add in the same order in every column. So a result is the same, to the bit, whatever
    the batch size, the strides, the other pixels and the cut into batches. No gradient is kept.

    Args:
        columns: The operation.
        logits: Shape ``(B, C, *S)``.
        near: What lies beside the pixels, each ``(1 or B, *S)``.
        fixed: What all pixels share.
        summed: Of the last thing that ``columns`` gives, integers ``(N,)``, the sum is wanted.
        compiled: Fuse the operation with ``torch.compile``.

    Returns:
        What ``columns`` gave, each ``(B, *S)`` or ``(B, K, *S)``; a sum is int64 ``()``.
    """
    if torch.compiler.is_compiling():
        return whole(columns, logits, near, fixed, summed=summed)
    # State and buffers of a caller's inference mode would be other graphs, and could not be
    # written to outside it.
    with torch.inference_mode(mode=False), torch.no_grad():
        device = logits.device.type
        compiled = compiled and _compiler_works(device)
        classes, size = logits.shape[1], prod(logits.shape[2:])
        rows = compiled and classes <= _ROWS
        if compiled:
            run = _compiled(columns, classes, logits.dtype, device)
            most = _COMPILED.get(device, classes * size) // classes
        else:
            run, most = columns, _EAGER.get(device, 2**19) // classes
        results: list[Tensor] = []
        total = torch.zeros((), dtype=torch.int64, device=logits.device)
        blocks = _blocks(logits, near, most, rows=rows, upcasts=not compiled)
        for images, pixels, x, beside in blocks:
            parts = x.unbind() if rows else (x,)
            if compiled:
                for part in (*parts, *beside):
                    torch._dynamo.mark_dynamic(part, part.ndim - 1)
            made = run(parts, *beside, *fixed)
            count, n = images.stop - images.start, pixels.stop - pixels.start
            if summed:
                total += made[-1][: count * n].sum(dtype=torch.int64)
                made = made[:-1]
            results = results or [
                part.new_empty((len(logits), *part.shape[:-1], size)) for part in made
            ]
            for result, part in zip(results, made, strict=True):
                filled = part[..., : count * n].view(*part.shape[:-1], count, n)
                result[images, ..., pixels] = filled if part.ndim == 1 else filled.transpose(0, 1)
        kept = tuple(result.view(*result.shape[:-1], *logits.shape[2:]) for result in results)
        return (*kept, total) if summed else kept


def whole(
    columns: Columns,
    logits: Tensor,
    near: Sequence[Tensor] = (),
    fixed: Sequence[Tensor] = (),
    *,
    summed: bool = False,
) -> tuple[Tensor, ...]:
    """As :func:`walk`, all pixels at once: for a caller's compiler, or an operation of images."""
    batch, classes, *space = logits.shape
    x = upcast(logits).movedim(1, 0).reshape(classes, -1)
    position = torch.arange(prod(space), device=logits.device).repeat(batch)
    beside = [part.expand(batch, *space).reshape(-1) for part in near]
    made = columns((x,), position, *beside, *fixed)
    kept = made[:-1] if summed else made
    shaped = (
        part.reshape(*part.shape[:-1], batch, *space).movedim(part.ndim - 1, 0) for part in kept
    )
    return (*shaped, made[-1].sum(dtype=torch.int64)) if summed else tuple(shaped)


def _blocks(
    logits: Tensor, near: Sequence[Tensor], most: int, *, rows: bool, upcasts: bool
) -> Iterator[tuple[slice, slice, Tensor, list[Tensor]]]:
    """Images, pixels, and their block: ``x``; positions and what is near. One at least, if empty.

    A block is a view where it can be, else a copy of at most ``most`` pixels; copies share their
    memory. With ``rows`` each logit will be read once: rows of a view may lie apart, and are cut
    where 32 of them go into no more. Else a view must be all of an image: what is read again and
    again is better copied than left in rows far apart, which a cache holds few of where the
    distance is a power of 2.
    """
    batch, size = len(logits), prod(logits.shape[2:])
    images = max(most // max(size, 1), 1)
    parts = [(logits, upcast(logits[:0]).dtype if upcasts else logits.dtype)]
    parts += [
        (part[:, None], part.dtype if part.is_floating_point() else torch.int64) for part in near
    ]
    buffers = [_Buffer(dtype, apart=rows) for dtype in (torch.int64, *(kind for _, kind in parts))]
    for some in _spans(batch, images):
        count = some.stop - some.start
        held = [part if len(part) == 1 < batch else part[some] for part, _ in parts]
        flat = [part.reshape(*part.shape[:2], size) for part in held]
        viewed = rows and images == 1 and flat[0].stride(2) == 1
        for pixels in _spans(size, _VIEWED * most, 32) if viewed else _spans(size, most):
            position = torch.arange(pixels.start, pixels.stop, device=logits.device)
            block = [position[None, None], *(part[..., pixels] for part in flat)]
            places, x, *beside = map(_Buffer.filled, buffers, block, repeat(count))
            yield some, pixels, x, [part[0] for part in (places, *beside)]


def _spans(size: int, step: int, unit: int = 1) -> list[slice]:
    """``size`` things, at most ``step`` at a time, and apart what is left of multiples of ``unit``.

    One empty span if there are none.
    """
    step = max(step // unit * unit, unit)
    edges = sorted({0, *range(0, size, step), size // unit * unit, size})
    return [slice(start, stop) for start, stop in pairwise([0, 0] if size == 0 else edges)]


class _Buffer:
    """Memory for one part of every block that is no view; the rows of a view may lie apart."""

    def __init__(self, dtype: torch.dtype, *, apart: bool) -> None:
        self.dtype, self.apart = dtype, apart
        self.held: Tensor | None = None

    def filled(self, part: Tensor, count: int) -> Tensor:
        """``(1 or count, K, n)`` as ``(K, N)``; what lies beyond the pixels is of no account."""
        height, n = part.shape[1:]
        width = max(-(-count * n // 32) * 32, 32)
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
    del classes, dtype, device

    def run(x: Parts, position: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
        # Rows come one by one, so that how far apart they lie is no part of the graph.
        parts = [upcast(part if part.ndim == 2 else part[None]) for part in x]
        return columns(parts, position, *beside)

    own = FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    fused: Columns = torch.compile(own, fullgraph=True, dynamic=False)
    return fused


@cache
def _compiler_works(device: str) -> bool:
    """Whether a kernel can be compiled for this kind of device; warns once where not."""
    try:
        works = torch.compile(_probe, fullgraph=True)(torch.zeros(64, device=device)).numel() > 0
        fault = "it is switched off"
    except Exception as error:  # noqa: BLE001 - a missing compiler fails in many ways
        works, fault = False, type(error).__name__
    if not works:
        warnings.warn(
            f"compiled=True needs a compiler for {device}, and there is none that works "
            f"({fault}); going on without",
            CompileWarning,
            stacklevel=4,
        )
    return works


def _probe(x: Tensor) -> Tensor:
    return x.exp() + 1 if torch.compiler.is_compiling() else x[:0]
