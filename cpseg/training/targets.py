"""Targets and their loss: the functions that every training loop needs, ours and others.

A target is a label and a confidence. Where a label was abstained from, the confidence is -1, so
that no threshold, not even 0, keeps the pixel; and the label there is still a class, so that no
loss ever sees an index it does not know.
"""

from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from cpseg import _checks
from cpseg._odds import POSSIBLE
from cpseg._tiles import upcast
from cpseg.errors import InputError

__all__ = [
    "Denominator",
    "JointMode",
    "MergeMode",
    "class_weights_from",
    "masked_cross_entropy",
    "merge_pseudo_labels",
    "multiply_probabilities",
    "pool_probabilities",
]

MergeMode = Literal["replace", "prefer_external", "fill", "agree"]
"""How external labels meet a network's own; see :func:`merge_pseudo_labels`."""

JointMode = Literal["multiply", "pool"]
"""How external probabilities meet a network's own: :func:`multiply_probabilities` or
:func:`pool_probabilities`.
"""

Denominator = Literal["kept", "valid", "all"]
"""What a sum of pixel losses is divided by; see :func:`masked_cross_entropy`."""


def merge_pseudo_labels(
    labels: Tensor,
    confidence: Tensor,
    external: Tensor | None,
    *,
    mode: MergeMode = "replace",
    threshold: float | Tensor | None = None,
    ignore_index: int = 255,
    pad_index: int = 254,
) -> tuple[Tensor, Tensor]:
    """A network's own labels and external ones, as one target.

    Where the external label is a class its confidence counts as 1. ``"replace"``: external labels
    alone, abstained from where they abstain. ``"prefer_external"``: external, else own.
    ``"fill"``: own where confident, else external. ``"agree"``: own, abstained from where an
    external label says otherwise.

    Args:
        labels: The network's own labels, classes everywhere, with any shape.
        confidence: Its confidence in them, floating. Same shape.
        external: External labels: classes, ``ignore_index`` where they abstain, ``pad_index``
            outside the image. Same shape; None returns ``labels`` and ``confidence`` as they are.
        mode: How the two meet.
        threshold: For ``"fill"`` alone: from which confidence an own label counts, one number or
            one per pixel.
        ignore_index: What an abstained external label is.
        pad_index: What an external label outside the image is.

    Returns:
        Labels, with a class everywhere and never ``ignore_index`` or ``pad_index``, and the dtype
        of ``labels``; confidences, -1 where abstained.

    Raises:
        InputError: If shapes or dtypes do not fit, or ``threshold`` is missing or of no use.

    Examples:
        >>> own, sure = torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.8, 0.4])
        >>> merge_pseudo_labels(own, sure, torch.tensor([2, 255, 1]))
        (tensor([2, 0, 1]), tensor([ 1., -1.,  1.]))
        >>> merge_pseudo_labels(own, sure, torch.tensor([2, 255, 1]), mode="agree")
        (tensor([0, 1, 2]), tensor([-1.0000,  0.8000, -1.0000]))
    """
    if mode not in get_args(MergeMode):
        raise InputError(
            f'mode must be "replace", "prefer_external", "fill" or "agree"; got {mode!r}'
        )
    if (mode == "fill") != (threshold is not None):
        raise InputError(
            f'threshold must be given with mode "fill" and with no other; got {threshold!r} '
            f"with {mode!r}"
        )
    _checks.check_integers("labels", labels)
    _checks.check_tensor("confidence", confidence)
    if not confidence.is_floating_point() or confidence.shape != labels.shape:
        raise InputError(
            f"confidence must be floating with shape {_checks.describe(labels.shape)}; "
            f"got {confidence.dtype} {_checks.describe(confidence.shape)}"
        )
    if external is None:
        return labels, confidence
    _checks.check_map("external", external, labels.shape, "labels")
    _checks.check_device("external", external, labels, "labels")
    there = (external != ignore_index) & (external != pad_index)
    label = torch.where(there, external, 0).to(labels.dtype)
    if mode == "replace":
        return label, torch.where(there, 1.0, -1.0).to(confidence.dtype)
    if mode == "agree":
        return labels, torch.where(there & (label != labels), -1.0, confidence)
    take = there if threshold is None else there & (confidence < threshold)
    return torch.where(take, label, labels), torch.where(take, 1.0, confidence)


def multiply_probabilities(logits: Tensor, external: Tensor) -> Tensor:
    """What a network and an annotator make of the classes together.

    Each class's probability is the product of the network's own and the external one, made to add
    up to 1 again: where the external one is 0 the class is out, whatever the network says, and
    where it is the same for all classes left the network alone chooses among them.

    Guarantee:
        None; a heuristic.

    Args:
        logits: The network's own. Floating ``(B, C, *S)``.
        external: Probabilities, 0 in all classes where the annotator abstains. Floating, same
            shape.

    Returns:
        Probabilities, 0 in all classes where the annotator abstains or either is unusable.
        float32 at least, same shape.

    Raises:
        InputError: If shapes, dtypes or devices do not fit.

    Examples:
        >>> external = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 0.0]])
        >>> logits = torch.tensor([[0.2, 0.3, 0.5]] * 3).log()
        >>> multiply_probabilities(logits, external)
        tensor([[0.4000, 0.6000, 0.0000],
                [0.8571, 0.1429, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    return _joint(logits, external, 1.0)


def pool_probabilities(logits: Tensor, external: Tensor) -> Tensor:
    """What a network and an annotator that have seen the same pixels make of the classes together.

    The geometric mean of the network's own probabilities and the external ones, made to add up to
    1 again. As in :func:`multiply_probabilities`, a class is out where the external probability
    is 0; but two that agree are no surer together than each alone, for they may err alike.

    Guarantee:
        None of its own. A class is possible in the pool where it is possible in both, so what
        both may miss adds up: where the label has probability 0 in a share ``a`` of the cases for
        one and ``b`` for the other, it has in at most ``a + b`` for the pool.

    Args:
        logits: The network's own, or the logarithms of other probabilities. Floating
            ``(B, C, *S)``.
        external: Probabilities, 0 in all classes where the annotator abstains. Floating, same
            shape.

    Returns:
        Probabilities, 0 in all classes where the annotator abstains, either is unusable, or no
        class is left. float32 at least, same shape.

    Raises:
        InputError: If shapes, dtypes or devices do not fit.

    Examples:
        >>> external = torch.tensor([[0.2, 0.3, 0.5], [0.9, 0.1, 0.0], [0.0, 0.0, 0.0]])
        >>> logits = torch.tensor([[0.2, 0.3, 0.5]] * 3).log()
        >>> pool_probabilities(logits, external)
        tensor([[0.2000, 0.3000, 0.5000],
                [0.7101, 0.2899, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    return _joint(logits, external, 0.5)


def _joint(logits: Tensor, external: Tensor, power: float) -> Tensor:
    """A power of the product, made to add up to 1; 0 in all classes where that is impossible."""
    _checks.check_logits(logits)
    _checks.check_tensor("external", external)
    if not external.is_floating_point():
        raise InputError(f"external must be floating probabilities; got {external.dtype}")
    _checks.check_map_shape("external", external, logits.shape, "logits")
    _checks.check_device("external", external, logits, "logits")
    own = upcast(logits).log_softmax(1)
    known = external.to(own.dtype).log()
    joint = (power * (own + known)).softmax(1)
    joint = torch.where(own.isinf() | known.isinf(), 0, joint.clamp(min=POSSIBLE))
    return torch.where(joint.isfinite().all(1, keepdim=True), joint, 0)


def masked_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    class_weights: Tensor | None = None,
    denominator: Denominator = "kept",
    valid: Tensor | None = None,
    ignore_index: int = 255,
    pad_index: int = 254,
    share: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The cross-entropy over the pixels that count; 0, attached to the graph, where none does.

    The denominators differ between published methods, and with them the weight of the loss by
    one over the share of pixels kept. ``"kept"``: pixels whose weight is positive and whose label
    is a class, as in cross-entropy's own mean. ``"valid"``: pixels inside the image, kept or not.
    ``"all"``: every pixel of the batch.

    Args:
        logits: ``(B, C, *S)``; the loss is computed in float32 at least.
        labels: Classes, ``ignore_index`` where abstained, ``pad_index`` outside the image.
            Shape ``(B, *S)``. Or probabilities, floating ``(B, C, *S)``, 0 in all classes where
            abstained; with ``"valid"`` they need ``valid``.
        weight: Of each pixel, bool or floating, at least 0. Shape ``(B, *S)``.
        class_weights: Of the cross-entropy of each class, at least 0; no denominator knows of
            them, so that a pixel counts the same whatever else is in the batch. Shape ``(C,)``.
        denominator: What the sum is divided by.
        valid: Which pixels lie inside the image, for ``"valid"``; None: those whose label is not
            ``pad_index``. bool ``(B, *S)``.
        ignore_index: Label of pixels that do not count.
        pad_index: Label of pixels outside the image; they do not count either.
        share: What to make of the denominator before dividing, such as the mean over processes.

    Returns:
        The loss, a scalar.

    Raises:
        InputError: If shapes or dtypes do not fit, or either index is a class.

    Examples:
        >>> logits = torch.zeros(1, 4, 2, requires_grad=True)
        >>> masked_cross_entropy(logits, torch.tensor([[3, 255]]))
        tensor(1.3863, grad_fn=<DivBackward0>)
        >>> masked_cross_entropy(logits, torch.tensor([[3, 255]]), denominator="valid")
        tensor(0.6931, grad_fn=<DivBackward0>)
        >>> masked_cross_entropy(logits, torch.tensor([[255, 254]]))
        tensor(0., grad_fn=<DivBackward0>)
    """
    _check_loss(logits, labels, (weight, valid), (ignore_index, pad_index), denominator)
    values = upcast(logits)
    if class_weights is not None:
        _check_class_weights(class_weights, logits)
        class_weights = class_weights.to(values.dtype)
    soft = labels.is_floating_point()
    kept = (labels > 0).any(1) if soft else (labels != ignore_index) & (labels != pad_index)
    if weight is not None:
        kept = kept & (weight > 0)
    values = torch.where(kept[:, None], values, 0)  # a gradient of 0, whatever the logits there
    if soft:
        each = _soft_cross_entropy(values, labels.to(values.dtype), class_weights)
        total = (each * torch.where(kept, 1 if weight is None else weight, 0)).sum()
    else:
        target = torch.where(kept, labels.long(), ignore_index)
        whole = weight is None or weight.dtype == torch.bool
        each = functional.cross_entropy(
            values,
            target,
            weight=class_weights,
            ignore_index=ignore_index,
            reduction="sum" if whole else "none",
        )
        total = each if weight is None or whole else (each * torch.where(kept, weight, 0)).sum()
    if denominator == "kept":
        count = kept.sum()
    elif denominator == "valid":
        count = (valid if valid is not None else labels != pad_index).sum()
    else:
        count = torch.tensor(kept.numel(), device=labels.device)
    count = count.to(total.dtype)
    if share is not None:
        count = share(count)
    # A shared count may lie below 1; the smallest that is not 0 is one pixel over all processes.
    return total / torch.where(count > 0, count, 1)


def class_weights_from(
    labels: Iterable[Tensor], num_classes: int, *, ignore_index: int = 255
) -> tuple[float, ...]:
    """Weights under which rare classes are learned from few images, for ``class_weights``.

    One over the square root of a class's share of the labeled pixels: half of the way, on a
    logarithmic scale, to all classes weighing the same. A class of less than one pixel in ten
    thousand, or of none, weighs as much as one of that share. Ours.

    Guarantee:
        None; a heuristic.

    Args:
        labels: Of the labeled images, integers of any shape; read once.
        num_classes: Number of classes, C.
        ignore_index: Label of pixels that do not count.

    Returns:
        C weights, 1 on average over the labeled pixels.

    Raises:
        InputError: If no pixel has a label, or one that is neither a class nor ignore_index.

    Examples:
        >>> labels = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0, 1], [255] * 10])
        >>> [round(weight, 2) for weight in class_weights_from([labels], num_classes=2)]
        [0.83, 2.5]
    """
    counts = torch.zeros(num_classes, dtype=torch.int64)
    for each in labels:
        check_classes(each, num_classes, ignore_index)
        wide = each.long()
        kept = wide[wide != ignore_index].cpu()
        counts += torch.bincount(kept, minlength=num_classes)
    if not counts.any():
        raise InputError("labels must have a labeled pixel; got none")
    shares = counts.double() / counts.sum()
    weights = shares.clamp(min=1e-4).rsqrt()
    return tuple((weights / (weights * shares).sum()).tolist())


def check_classes(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse labels that are neither a class nor ignored; waits for their device."""
    wide = labels.long()
    outside = int(((wide != ignore_index) & ((wide < 0) | (wide >= num_classes))).sum())
    if outside:
        raise InputError(
            f"labels must be classes below {num_classes} or ignore_index {ignore_index}; "
            f"got {outside} other pixels"
        )


def _soft_cross_entropy(logits: Tensor, shares: Tensor, class_weights: Tensor | None) -> Tensor:
    """Of each pixel; a class without a share may have any logit but NaN and ``+inf``."""
    each = torch.where(shares > 0, shares * logits.log_softmax(1), 0)
    if class_weights is not None:
        each = each * class_weights.view(-1, *(1 for _ in each.shape[2:]))
    return -each.sum(1)


def _check_loss(
    logits: Tensor,
    labels: Tensor,
    maps: tuple[Tensor | None, Tensor | None],
    indices: tuple[int, int],
    denominator: str,
) -> None:
    _checks.check_logits(logits)
    soft = labels.is_floating_point()
    if soft:
        _checks.check_map_shape("labels", labels, logits.shape, "logits")
        _checks.check_device("labels", labels, logits, "logits")
    else:
        _checks.check_labels(labels, logits)
    space = (logits.shape[0], *logits.shape[2:])
    for name, index in zip(("ignore_index", "pad_index"), indices, strict=True):
        if 0 <= index < logits.shape[1]:
            raise InputError(
                f"{name} must lie outside the classes [0, {logits.shape[1]}); got {index}"
            )
    for name, value in zip(("weight", "valid"), maps, strict=True):
        if value is not None and tuple(value.shape) != space:
            raise InputError(
                f"{name} must have shape {_checks.describe(space)}; "
                f"got {_checks.describe(value.shape)}"
            )
    if denominator not in get_args(Denominator):
        raise InputError(f'denominator must be "kept", "valid" or "all"; got {denominator!r}')
    if soft and denominator == "valid" and maps[1] is None:
        raise InputError(
            'valid must be given with probabilities and denominator "valid", for they do not say '
            "what lies outside the image; got None"
        )


def _check_class_weights(class_weights: Tensor, logits: Tensor) -> None:
    _checks.check_tensor("class_weights", class_weights)
    if not class_weights.is_floating_point() or class_weights.shape != logits.shape[1:2]:
        raise InputError(
            f"class_weights must be floating with shape ({logits.shape[1]},); "
            f"got {class_weights.dtype} {_checks.describe(class_weights.shape)}"
        )
    _checks.check_device("class_weights", class_weights, logits, "logits")
