"""Queries to class probabilities: the one rule that SEEM, Mask2Former, OneFormer and EoMT share.

A mask-classification model answers with Q queries, each a distribution over the classes and
"nothing" and a mask of independent pixels. What they claim for class c at a pixel is
``S_c = sum over q of softmax(class logits)_qc * sigmoid(mask logits)_q``. That is no probability:
it sums over queries, and several may claim one pixel.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from cpseg import _checks
from cpseg.annotators.images import check_size
from cpseg.errors import InputError

__all__ = ["Mode", "log_probabilities", "mask_class_probabilities", "resize_masks"]

Mode = Literal["complement", "void", "none", "raw"]

# Query masks are brought to the full size this many values at a time (16 MiB of float32).
_CHUNK = 4 * 2**20


def mask_class_probabilities(
    class_logits: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int] | None = None,
    *,
    mode: Mode,
    background: int = 0,
    padded_size: tuple[int, int] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Tensor:
    """Class probabilities of each pixel from queries.

    With ``S`` as in the module's text, over the K classes without "nothing":

    - ``"complement"``: ``S_c / max(1, sum S)``, and the background takes the rest. For data with a
      background class, which is then what nothing claims, not a text.
    - ``"void"``: the queries' claims of "nothing" are the background's; divided by the total.
    - ``"none"``: ``S_c / sum S``; uniform where nothing is claimed. For closed vocabularies.
    - ``"raw"``: ``S`` itself, which is no probability: for comparison with other code.

    Mask logits are resized as the original SEEM does it: bilinear to the padded image, cut to the
    image, bicubic with antialias to ``size``; a few queries at a time, so that no tensor
    ``(B, Q, H, W)`` ever exists.

    Guarantee:
        None; the modes are a convention, to be fixed before calibration.

    Args:
        class_logits: The last class is "nothing". Shape ``(B, Q, K + 1)``.
        mask_logits: Shape ``(B, Q, h, w)``.
        size: Height and width of the answer; None keeps ``image_size``, or else h and w.
        mode: Which rule; see above.
        background: The background's place among the answer's classes (complement, void).
        padded_size: Size of the padded image that the masks cover; None: they cover the image.
        image_size: Size of the image inside the padding, at the top left.

    Returns:
        At least float32. Shape ``(B, K + 1, *size)`` for complement and void, ``(B, K, *size)``
        for none and raw.

    Raises:
        InputError: A shape or an argument breaks a rule.

    Examples:
        >>> classes = torch.tensor([[[9.0, 0.0, 0.0]]])      # one query, surely class 0 of two
        >>> masks = torch.tensor([[[[50.0, -50.0]]]])        # left pixel, not the right one
        >>> mask_class_probabilities(classes, masks, mode="complement")[0, :, 0].round()
        tensor([[0., 1.],
                [1., 0.],
                [0., 0.]])
    """
    _check(class_logits, mask_logits, mode, background)
    for name, value in (("size", size), ("padded_size", padded_size), ("image_size", image_size)):
        if value is not None:
            check_size(name, value)
    dtype = torch.promote_types(class_logits.dtype, torch.float32)
    claims = class_logits.to(dtype).softmax(-1)
    if mode != "void":
        claims = claims[..., :-1]
    shape = size or image_size or (mask_logits.shape[-2], mask_logits.shape[-1])
    batch, queries = mask_logits.shape[:2]
    total = claims.new_zeros((batch, claims.shape[-1], *shape))
    step = max(1, _CHUNK // max(1, batch * shape[0] * shape[1]))
    for start in range(0, queries, step):
        part = mask_logits[:, start : start + step].to(dtype)
        part = resize_masks(part, shape, padded_size, image_size).sigmoid_()
        weights = claims[:, start : start + step].transpose(1, 2)
        total.flatten(2).baddbmm_(weights, part.flatten(2))
    if mode == "raw":
        return total
    claimed = total.sum(1, keepdim=True)
    if mode == "complement":
        total /= claimed.clamp(min=1)
        rest = (1 - claimed).clamp_(min=0)
        return torch.cat((total[:, :background], rest, total[:, background:]), 1)
    # Below the smallest normal number nothing is claimed that a division could resolve.
    empty = claimed < torch.finfo(dtype).tiny
    total /= torch.where(empty, 1, claimed)
    total.masked_fill_(empty, 1 / total.shape[1])
    if mode == "void":
        kept, void = total[:, :-1], total[:, -1:]
        return torch.cat((kept[:, :background], void, kept[:, background:]), 1)
    return total


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Logits whose softmax is the probabilities; zero becomes the smallest normal number.

    Changes its argument. Shape ``(B, C, *S)``.
    """
    return probabilities.clamp_(min=torch.finfo(probabilities.dtype).tiny).log_()


def resize_masks(
    masks: Tensor,
    size: tuple[int, int],
    padded_size: tuple[int, int] | None,
    image_size: tuple[int, int] | None,
) -> Tensor:
    """Mask logits as the original SEEM resizes them.

    Args:
        masks: Shape ``(B, Q, h, w)``.
        size: Of the answer.
        padded_size: Size of the padded image that the masks cover; None: they cover the image,
            and one bilinear step does it.
        image_size: Size of the image inside the padding, at the top left.

    Returns:
        A new tensor. Shape ``(B, Q, *size)``.
    """
    if padded_size is not None:
        masks = functional.interpolate(
            masks, size=padded_size, mode="bilinear", align_corners=False
        )
        if image_size is not None:
            masks = masks[..., : image_size[0], : image_size[1]]
        if tuple(masks.shape[-2:]) == tuple(size):
            return masks.clone()
        return functional.interpolate(
            masks, size=size, mode="bicubic", align_corners=False, antialias=True
        )
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks.clone()
    return functional.interpolate(masks, size=size, mode="bilinear", align_corners=False)


def _check(class_logits: Tensor, mask_logits: Tensor, mode: str, background: int) -> None:
    for name, value, ndim, shape in (
        ("class_logits", class_logits, 3, "(B, Q, K + 1)"),
        ("mask_logits", mask_logits, 4, "(B, Q, h, w)"),
    ):
        _checks.check_tensor(name, value)
        if value.ndim != ndim:
            raise InputError(f"{name} must have shape {shape}; got {_checks.describe(value.shape)}")
    if class_logits.shape[:2] != mask_logits.shape[:2] or class_logits.shape[2] < 2:
        raise InputError(
            "class_logits must have shape (B, Q, K + 1) with K >= 1 to go with mask_logits "
            f"{_checks.describe(mask_logits.shape)}; got {_checks.describe(class_logits.shape)}"
        )
    if mode not in get_args(Mode):
        raise InputError(f"mode must be one of {', '.join(get_args(Mode))}; got {mode!r}")
    classes = class_logits.shape[2] - 1
    _checks.check_integer("background", background)
    if mode in ("complement", "void") and not 0 <= background <= classes:
        raise InputError(f"background must lie in [0, {classes}]; got {background}")
