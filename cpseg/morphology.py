"""Operations on masks and label maps: regions, distances, growing and shrinking.

Everything here is plain torch on the device of its input, for a batch of maps with one to three
spatial axes ``(B, *S)``; the maps of a batch never touch each other. Regions and distances take a
number of rounds that depends on the picture, so these functions wait for the device between
rounds.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product
from math import inf

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.errors import InputError

__all__ = [
    "boundary_distance",
    "component_areas",
    "connected_components",
    "dilate",
    "distance_transform",
    "erode",
    "fill_holes",
    "remove_small_components",
]

# Distance to the nearest pixel with a class, that class, distance to the nearest pixel of another
# class than that, and that class; a class means nothing where its distance is infinite.
_Two = tuple[Tensor, Tensor, Tensor, Tensor]

# Elements a distance pass works on at once. Some 2**16 float32 columns stay in a core's cache
# through all offsets; a GPU would rather have everything, but a few launches more do not matter.
_TILE = 2**17


def connected_components(
    labels: Tensor, *, ignore_index: int | None = 255, diagonal: bool = False
) -> Tensor:
    """Regions of equal labels, all classes at once.

    Rows of equal pixels are found first; then every region hooks onto its smallest neighbor and
    chains are halved until they are flat. Two rounds at least halve the regions still to be
    joined, so a spiral takes as few rounds as a square.

    Args:
        labels: A label map, or a mask whose True pixels form the regions. Integer or bool
            ``(B, *S)``, one to three spatial axes.
        ignore_index: Label that belongs to no region; None for none. A mask does not ask it.
        diagonal: Whether pixels that share only a corner or an edge are neighbors too. By default
            they must share a side: 4 neighbors of a pixel, 6 of a voxel.

    Returns:
        For each pixel the position of its region's first pixel in the flattened batch, which
        names the region; -1 where there is none. int64 ``(B, *S)``.

    Raises:
        InputError: If labels is no integer or bool map with one to three spatial axes.

    Examples:
        >>> connected_components(torch.tensor([[7, 7, 255, 7, 1]]))
        tensor([[ 0,  0, -1,  3,  4]])
    """
    _check_axes("labels", labels)
    if labels.dtype == torch.bool:
        inside = labels
    else:
        _checks.check_integers("labels", labels)
        inside = _labeled(labels, ignore_index)
    runs, first = _runs(labels)
    parents = torch.arange(len(first), device=labels.device)
    edges = [
        _touching(labels, inside, runs, offset)
        for offset in _offsets(labels.ndim - 1, diagonal=diagonal)
    ]
    one, two = torch.cat([runs.new_zeros((2, 0)), *edges], dim=1)
    while one.numel():
        # Only roots hook, each onto the smallest root next to it; amin makes that one answer.
        one, two = torch.minimum(one, two), torch.maximum(one, two)
        parents.scatter_reduce_(0, two, one, "amin")
        while bool((parents[parents] != parents).any()):
            parents = parents[parents]
        one, two = parents[one], parents[two]
        apart = one != two
        one, two = one[apart], two[apart]
    return torch.where(inside, first[parents][runs], -1)


def component_areas(components: Tensor) -> Tensor:
    """Number of pixels of the region each pixel lies in.

    Args:
        components: What :func:`connected_components` gave. int64 ``(B, *S)``.

    Returns:
        Pixels, 0 where there is no region. int64 ``(B, *S)``.

    Raises:
        InputError: If components is not int64.

    Examples:
        >>> component_areas(connected_components(torch.tensor([[7, 7, 255, 7, 1]])))
        tensor([[2, 2, 0, 1, 1]])
    """
    _check_axes("components", components)
    if components.dtype != torch.int64:
        raise InputError(
            f"components must be int64, as connected_components gives it; got {components.dtype}"
        )
    size = components.numel()
    flat = torch.where(components < 0, size, components).flatten()
    areas = torch.zeros(size + 1, dtype=torch.int64, device=components.device)
    areas.index_add_(0, flat, torch.ones_like(flat))
    areas[size] = 0
    return areas[flat].view(components.shape)


def remove_small_components(
    labels: Tensor, min_area: int, *, ignore_index: int = 255, diagonal: bool = False
) -> Tensor:
    """The map without its regions of fewer than ``min_area`` pixels.

    Guarantee:
        None; a class's mask only shrinks, so coverage can be lost.

    Args:
        labels: A label map or a mask. Integer or bool ``(B, *S)``, one to three spatial axes.
        min_area: Fewest pixels a region keeps its label with.
        ignore_index: What removed pixels of a label map become, and the label that forms no
            region. In a mask they become False.
        diagonal: As in :func:`connected_components`.

    Returns:
        A new map. Shape and dtype of ``labels``.

    Raises:
        InputError: If labels is no such map, min_area no integer of at least 0, or ignore_index
            not of labels' dtype.

    Examples:
        >>> remove_small_components(torch.tensor([[7, 7, 255, 7, 1]]), 2)
        tensor([[  7,   7, 255, 255, 255]])
    """
    _checks.check_integer("min_area", min_area, 0)
    components = connected_components(labels, ignore_index=ignore_index, diagonal=diagonal)
    small = component_areas(components) < min_area
    if labels.dtype == torch.bool:
        return labels & ~small
    limits = torch.iinfo(labels.dtype)
    if not limits.min <= ignore_index <= limits.max:
        raise InputError(f"ignore_index must fit into {labels.dtype}; got {ignore_index}")
    return torch.where(small, labels.new_full((), ignore_index), labels)


def fill_holes(mask: Tensor) -> Tensor:
    """The mask with its holes filled: background that no path of sides leads out of the picture.

    Guarantee:
        Keeps coverage where the mask is a class's place in the sets: it only grows.

    Args:
        mask: Bool ``(B, *S)``, one to three spatial axes.

    Returns:
        A new mask. Bool ``(B, *S)``.

    Raises:
        InputError: If mask is no such mask.

    Examples:
        >>> fill_holes(torch.tensor([[False, True, False, True]]))
        tensor([[False,  True,  True,  True]])
    """
    _check_mask(mask)
    regions = connected_components(~mask)
    rim = torch.zeros_like(mask)
    for axis in range(1, mask.ndim):
        for side in (0, -1):
            if mask.shape[axis]:
                rim.select(axis, side).fill_(value=True)
    size = mask.numel()
    open_regions = torch.zeros(size + 1, dtype=torch.bool, device=mask.device)
    # Pixels that are no background of the rim all write to the last place, which nobody reads.
    open_regions[torch.where(rim & ~mask, regions, size)] = True
    return mask | ~open_regions[regions.clamp(min=0)]


def dilate(mask: Tensor, radius: float) -> Tensor:
    """The mask grown by a Euclidean ball: every pixel within ``radius`` of it.

    A union of shifted masks, one for each row of the ball: the time grows with ``radius``, in
    volumes with its square. A ball, because a margin should be equally wide in every direction; a square reaches 1.4 times
    as far along a diagonal. What lies outside the picture is unknown and adds nothing.

    Guarantee:
        Keeps coverage where the mask is a class's place in the sets: it only grows.

    Args:
        mask: Bool ``(B, *S)``, one to three spatial axes.
        radius: In pixels, at least 0; centers at exactly this distance belong to the ball.

    Returns:
        A new mask. Bool ``(B, *S)``.

    Raises:
        InputError: If mask is no such mask, or radius is negative or not finite.

    Examples:
        >>> dilate(torch.tensor([[False, False, False, True, False]]), 2)
        tensor([[False,  True,  True,  True,  True]])
    """
    _check_mask(mask)
    _checks.check_weight("radius", radius)
    grown, line, wide = mask.clone(), mask, 0  # line: the mask grown by `wide` along its last axis
    for width, offset in _ball(mask.shape[1:], float(radius)):
        while wide < width:
            step = min(width - wide, wide + 1)  # a longer one leaves gaps, first at the border
            along = (0,) * len(offset)
            line = _add(_add(line.clone(), line, (*along, step)), line, (*along, -step))
            wide += step
        _add(grown, line, (*offset, 0))
    return grown


def erode(mask: Tensor, radius: float) -> Tensor:
    """The mask shrunk by a Euclidean ball: pixels more than ``radius`` away from any outside it.

    The mirror of :func:`dilate`: ``erode(mask, r)`` is ``~dilate(~mask, r)``. What lies outside
    the picture is unknown and takes nothing away, so a mask that fills the picture stays.

    Guarantee:
        None; a class's mask only shrinks, so coverage can be lost.

    Args:
        mask: Bool ``(B, *S)``, one to three spatial axes.
        radius: In pixels, at least 0.

    Returns:
        A new mask. Bool ``(B, *S)``.

    Raises:
        InputError: If mask is no such mask, or radius is negative or not finite.

    Examples:
        >>> erode(torch.tensor([[True, True, True, False, True]]), 1)
        tensor([[ True,  True, False, False, False]])
    """
    _check_mask(mask)
    return ~dilate(~mask, radius)


def distance_transform(
    mask: Tensor, *, spacing: Sequence[float] | None = None, limit: float = inf
) -> Tensor:
    """Exact Euclidean distance from each pixel to the nearest True one.

    One axis at a time (Saito and Toriwaki, 1994), nearest offsets first, until no offset can
    come closer: the time grows with the largest distance, or with ``limit``.

    Args:
        mask: Bool ``(B, *S)``, one to three spatial axes.
        spacing: Distance between neighbors along each spatial axis; None for 1.
        limit: Distances above it are not wanted, and are given as ``+inf``.

    Returns:
        Distances between pixel centers, 0 where the mask is True, ``+inf`` where a map has no
        True pixel. float64 ``(B, *S)``.

    Raises:
        InputError: If mask is no such mask, spacing has not one positive number per spatial
            axis, or limit is negative or NaN.

    Examples:
        >>> distance_transform(torch.tensor([[False, False, True, False]]))
        tensor([[2., 1., 0., 1.]], dtype=torch.float64)
    """
    _check_mask(mask)
    _check_limit(limit)
    steps, axes = _plan(mask, spacing)
    if not mask.numel():
        return torch.zeros_like(mask, dtype=torch.float64)
    dtype = _squared_dtype(mask, spacing)
    longest = axes[0]
    ahead = _gap(_nearest(mask, longest), longest, dtype)
    behind = _gap(_nearest(mask.flip(longest), longest), longest, dtype).flip(longest)
    squared = (torch.minimum(ahead, behind) * steps[longest]).square()
    for axis in axes[1:]:
        (squared,) = _by_columns(_closest, axis, steps[axis], limit, squared)
    return _distances(squared, limit)


def boundary_distance(
    labels: Tensor,
    *,
    ignore_index: int | None = 255,
    spacing: Sequence[float] | None = None,
    limit: float = inf,
) -> Tensor:
    """Exact Euclidean distance from each labeled pixel to the nearest pixel of another class.

    The ignored label is no class: nobody knows what is there, so it is no boundary and has no
    distance. Neither is the border of the picture. Pixels that touch a boundary are 1 away.

    All classes are done at once: along each axis a pixel keeps the nearest two pixels of
    different classes, one of which is not its own.

    Args:
        labels: Integer label map ``(B, *S)``, one to three spatial axes.
        ignore_index: Label of pixels without a class; None if there are none.
        spacing: Distance between neighbors along each spatial axis; None for 1.
        limit: Distances above it are not wanted, and are given as ``+inf``. The time grows with
            it, or with the largest distance.

    Returns:
        Distances between pixel centers, ``+inf`` where a map holds no other class, NaN where
        pixels have no class. float64 ``(B, *S)``.

    Raises:
        InputError: If labels is no such map, spacing has not one positive number per spatial
            axis, or limit is negative or NaN.

    Examples:
        >>> boundary_distance(torch.tensor([[3, 3, 3, 255, 5]]))
        tensor([[4., 3., 2., nan, 2.]], dtype=torch.float64)
    """
    _check_axes("labels", labels)
    _checks.check_integers("labels", labels)
    _check_limit(limit)
    steps, axes = _plan(labels, spacing)
    valid = _labeled(labels, ignore_index)
    if not labels.numel():
        return torch.zeros_like(labels, dtype=torch.float64)
    dtype = _squared_dtype(labels, spacing)
    near, near_class, far, far_class = _two_on_lines(labels, valid, axes[0], dtype)
    near, far = (near * steps[axes[0]]).square(), (far * steps[axes[0]]).square()
    for axis in axes[1:-1]:
        near, near_class, far, far_class = _by_columns(
            _closest_two, axis, steps[axis], limit, near, near_class, far, far_class
        )
    if len(axes) > 1:
        (far,) = _by_columns(
            _closest_other, axes[-1], steps[axes[-1]], limit, near, near_class, far, labels
        )
    return torch.where(valid, _distances(far, limit), torch.nan)


def _check_axes(name: str, value: Tensor) -> None:
    _checks.check_tensor(name, value)
    if not 2 <= value.ndim <= 4:
        raise InputError(
            f"{name} must have shape (B, *S) with one to three spatial axes; "
            f"got {_checks.describe(value.shape)}"
        )


def _check_mask(mask: Tensor) -> None:
    _check_axes("mask", mask)
    if mask.dtype != torch.bool:
        raise InputError(f"mask must be a bool tensor; got {mask.dtype}")


def _check_limit(limit: object) -> None:
    if not isinstance(limit, (int, float)) or isinstance(limit, bool) or not limit >= 0:
        raise InputError(f"limit must be a number >= 0; got {limit!r}")


def _labeled(labels: Tensor, ignore_index: int | None) -> Tensor:
    """Which pixels have a class. Bool, shape of ``labels``."""
    if ignore_index is None:
        return torch.ones_like(labels, dtype=torch.bool)
    _checks.check_integer("ignore_index", ignore_index)
    return labels != ignore_index


def _ahead(values: Tensor, offset: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Two views of ``(B, *S)``, each pixel of the first beside the one ``offset`` away from it."""
    here: list[slice] = [slice(None)]
    there: list[slice] = [slice(None)]
    for size, step in zip(values.shape[1:], offset, strict=True):
        here.append(slice(max(-step, 0), size - max(step, 0)))
        there.append(slice(max(step, 0), size - max(-step, 0)))
    return values[tuple(here)], values[tuple(there)]


def _ball(shape: Sequence[int], radius: float) -> list[tuple[int, tuple[int, ...]]]:
    """Rows along the last axis of a Euclidean ball, as far as the picture can show them.

    Returns:
        How far each row reaches to both sides, and where it lies along the other axes; the
        shortest rows first.
    """
    if 0 in shape:
        return []
    radius = min(radius, float(sum(shape)))  # reaches everything
    # The largest whole square within. A distance of torch's may lie a rounding below the root it
    # stands for (its sqrt is not exact on every processor), and must still reach what it measured.
    most = int(radius * radius * (1 + 1e-12))
    spans = [
        range(1 - min(math.isqrt(most) + 1, size), min(math.isqrt(most) + 1, size))
        for size in shape[:-1]
    ]
    squares = ((sum(step**2 for step in offset), offset) for offset in product(*spans))
    return sorted(
        (min(math.isqrt(most - square), shape[-1] - 1), offset)
        for square, offset in squares
        if square <= most
    )


def _add(grown: Tensor, mask: Tensor, offset: Sequence[int]) -> Tensor:
    """``grown``, with each pixel added in place that is ``offset`` away from one of the mask."""
    here, _ = _ahead(grown, offset)
    _, there = _ahead(mask, offset)
    here |= there
    return grown


def _offsets(axes: int, *, diagonal: bool) -> list[tuple[int, ...]]:
    """One of each pair of opposite neighbors, those along the last axis apart: runs have them."""
    around = [
        offset for offset in product((-1, 0, 1), repeat=axes) if offset[:-1] > (0,) * (axes - 1)
    ]
    return [offset for offset in around if diagonal or sum(map(abs, offset)) == 1]


def _runs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Stretches of equal pixels along the last axis.

    Returns:
        The run of each pixel, counted along the flattened batch, int64 ``(B, *S)``; and the
        position of each run's first pixel, int64 ``(R,)``.
    """
    starts = torch.ones_like(labels, dtype=torch.bool)
    starts[..., 1:] = labels[..., 1:] != labels[..., :-1]
    runs = starts.flatten().cumsum(0).view(labels.shape) - 1
    return runs, starts.flatten().nonzero().squeeze(1)


def _touching(labels: Tensor, inside: Tensor, runs: Tensor, offset: Sequence[int]) -> Tensor:
    """Pairs of runs of one class that touch across ``offset``, each pair once. int64 ``(2, E)``."""
    label, label_there = _ahead(labels, offset)
    ok, ok_there = _ahead(inside, offset)
    run, run_there = _ahead(runs, offset)
    touch = (label == label_there) & ok & ok_there
    # Along the last axis the same two runs touch again and again: their first touch is enough.
    again = torch.zeros_like(touch)
    again[..., 1:] = (run[..., 1:] == run[..., :-1]) & (run_there[..., 1:] == run_there[..., :-1])
    touch &= ~again
    return torch.stack((run[touch], run_there[touch]))


def _plan(
    values: Tensor, spacing: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The step along each axis, and the axes, longest first: that one is scanned, not searched."""
    shape = values.shape[1:]
    if spacing is not None and (
        len(spacing) != len(shape) or not all(0 < step < inf for step in spacing)
    ):
        raise InputError(
            f"spacing must hold one positive number per spatial axis of {_checks.describe(shape)}; "
            f"got {tuple(spacing)}"
        )
    steps = (1.0, *(spacing if spacing is not None else [1.0] * len(shape)))
    axes = sorted(range(1, values.ndim), key=lambda axis: -values.shape[axis])
    return tuple(map(float, steps)), tuple(axes)


def _squared_dtype(values: Tensor, spacing: Sequence[float] | None) -> torch.dtype:
    """float32 where it holds every squared distance exactly, as whole numbers below 2**24."""
    whole = spacing is None and sum(size**2 for size in values.shape[1:]) < 2**24
    return torch.float32 if whole else torch.float64


def _distances(squared: Tensor, limit: float) -> Tensor:
    distances = squared.double().sqrt()
    return torch.where(distances <= limit, distances, torch.inf)


def _positions(values: Tensor, axis: int) -> Tensor:
    """0, 1, 2, ... along an axis, to broadcast against ``values``."""
    shape = [1] * values.ndim
    shape[axis] = values.shape[axis]
    return torch.arange(values.shape[axis], device=values.device).view(shape)


def _nearest(mask: Tensor, axis: int) -> Tensor:
    """Position of the nearest True pixel at or before each, -1 for none. int64."""
    return torch.where(mask, _positions(mask, axis), -1).cummax(axis).values


def _gap(place: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """Steps from a place at or before each pixel on its line; ``+inf`` where the place is -1."""
    return torch.where(place < 0, torch.inf, (_positions(place, axis) - place).to(dtype))


def _two_on_lines(labels: Tensor, valid: Tensor, axis: int, dtype: torch.dtype) -> _Two:
    """On each pixel's line: steps to the nearest two classes, and which. Each ``(B, *S)``."""
    sides: list[_Two] = []
    for mirrored in (False, True):
        line = labels.flip(axis) if mirrored else labels
        known = valid.flip(axis) if mirrored else valid
        here = _nearest(known, axis)
        before = here.roll(1, axis)
        before.narrow(axis, 0, 1).fill_(-1)
        changes = known & (before >= 0) & (_at(line, before, axis) != line)
        # `before` grows along the line, so the largest is that of the latest change of class.
        other = torch.where(changes, before, -1).cummax(axis).values
        here_class, other_class = _at(line, here, axis), _at(line, other, axis)
        steps, other_steps = _gap(here, axis, dtype), _gap(other, axis, dtype)
        found = (steps, here_class, other_steps, other_class)
        if mirrored:
            steps, here_class, other_steps, other_class = (x.flip(axis) for x in found)
        sides.append((steps, here_class, other_steps, other_class))
    first, second = sides
    best = _insert(first, second[0], second[1])
    return _insert(best, second[2], second[3])


def _at(line: Tensor, place: Tensor, axis: int) -> Tensor:
    """The class at a place on each pixel's line."""
    return line.gather(axis, place.clamp(min=0))


def _insert(best: _Two, distance: Tensor, kind: Tensor) -> _Two:
    """The two nearest pixels of different classes, given one more pixel."""
    near, near_class, far, far_class = best
    closer = distance < near
    # Nothing is known of a class infinitely far away, so it cannot rule another out.
    other = (kind != near_class) | near.isinf()
    second = other & ~closer & (distance < far)
    moved = closer & other
    return (
        torch.where(closer, distance, near),
        torch.where(closer, kind, near_class),
        torch.where(moved, near, torch.where(second, distance, far)),
        torch.where(moved, near_class, torch.where(second, kind, far_class)),
    )


_Columns = Callable[[float, int, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _by_columns(
    search: _Columns, axis: int, step: float, limit: float, *values: Tensor
) -> tuple[Tensor, ...]:
    """Run a search along one axis over blocks of columns ``(L, M)``, in bounded memory."""
    length = values[0].shape[axis]
    reach = length - 1 if limit >= length * step else min(length - 1, int(limit // step) + 1)
    moved = [value.movedim(axis, 0) for value in values]
    columns = [value.reshape(length, moved[0].numel() // length) for value in moved]
    width = max(1, _TILE // length)
    blocks = zip(*(torch.split(value, width, dim=1) for value in columns), strict=True)
    found = [search(step, reach, tuple(part.contiguous() for part in block)) for block in blocks]
    return tuple(
        torch.cat(parts, dim=1).view(moved[0].shape).movedim(0, axis)
        for parts in zip(*found, strict=True)
    )


def _closest(step: float, reach: int, columns: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Along the first axis, the least of squared distance plus squared offset. ``(L, M)``."""
    (squared,) = columns
    best = squared.clone()
    hopeless = squared.isinf().all(0)
    for offset in range(1, reach + 1):
        cost = (offset * step) ** 2
        if _settled(offset, cost, best, hopeless):
            break
        torch.minimum(best[offset:], squared[:-offset] + cost, out=best[offset:])
        torch.minimum(best[:-offset], squared[offset:] + cost, out=best[:-offset])
    return (best,)


def _closest_other(step: float, reach: int, columns: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As :func:`_closest`, to the nearest class that is not the pixel's own. ``(L, M)``."""
    near, near_class, far, own = columns

    def other(here: slice, there: slice) -> Tensor:
        return torch.where(near_class[there] != own[here], near[there], far[there])

    everything = slice(None)
    best = other(everything, everything)
    hopeless = _one_class(near, near_class, far)
    for offset in range(1, reach + 1):
        cost = (offset * step) ** 2
        if _settled(offset, cost, best, hopeless):
            break
        behind, before = slice(offset, None), slice(None, -offset)
        torch.minimum(best[behind], other(behind, before) + cost, out=best[behind])
        torch.minimum(best[before], other(before, behind) + cost, out=best[before])
    return (best,)


def _closest_two(step: float, reach: int, columns: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As :func:`_closest`, keeping the nearest two pixels of different classes. ``(L, M)``."""
    near, near_class, far, far_class = columns
    best = near.clone(), near_class.clone(), far.clone(), far_class.clone()
    single, empty = _one_class(near, near_class, far), near.isinf().all(0)
    for offset in range(1, reach + 1):
        cost = (offset * step) ** 2
        if _settled(offset, cost, torch.where(single, best[0], best[2]), empty):
            break
        behind, before = slice(offset, None), slice(None, -offset)
        for here, there in ((behind, before), (before, behind)):
            part = best[0][here], best[1][here], best[2][here], best[3][here]
            part = _insert(part, near[there] + cost, near_class[there])
            part = _insert(part, far[there] + cost, far_class[there])
            for whole, new in zip(best, part, strict=True):
                whole[here] = new
    return best


def _settled(offset: int, cost: float, best: Tensor, hopeless: Tensor) -> bool:
    """Whether no offset of this cost or more can help; asked now and then, as asking costs."""
    return offset % 8 == 1 and not bool(((best > cost) & ~hopeless).any())


def _one_class(near: Tensor, near_class: Tensor, far: Tensor) -> Tensor:
    """Columns that know of no second class, so that looking further is vain. Bool ``(M,)``."""
    known = near.isfinite()
    least = torch.where(known, near_class, torch.iinfo(near_class.dtype).max).amin(0)
    most = torch.where(known, near_class, torch.iinfo(near_class.dtype).min).amax(0)
    return (least >= most) & far.isinf().all(0)
