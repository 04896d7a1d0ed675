"""SAM's segments named by CLIP (after Saito et al., 2025): a zero-shot annotator.

SAM cuts the image into segments, CLIP's dense features are averaged inside each, and the cosine
to the classes' texts gives each segment its probabilities. The paper sets a threshold on that
cosine by hand; here a conformal filter takes its place. How segments overlap and what becomes of
pixels that none covers could not be recovered from the paper: both are explicit options here.

CLIP's own last layers blur where things are. Dense features come from self-self attention after
GEM (Bousselham et al., 2024): beside the network runs a second path in which tokens attend to
tokens that are like themselves, in their queries, keys and values, without feed-forward layers.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from cpseg import _checks
from cpseg.annotators.images import check_images, in_batches, resize
from cpseg.annotators.preprocessing import Preprocessing, check_preprocessing
from cpseg.annotators.prompts import (
    ClassNames,
    Tokenizer,
    check_background,
    check_templates,
    class_prompts,
    prompt_tokens,
)
from cpseg.annotators.source import check_network, describe_source
from cpseg.errors import InputError

__all__ = [
    "CLIP_PREPROCESSING",
    "SamClipAnnotator",
    "dense_clip_features",
    "ignore_unusable",
    "non_maximum_suppression",
    "paint_segments",
    "sam_segments",
    "segment_features",
]

_Overlap = Literal["smallest", "surest", "product"]
_Uncovered = Literal["abstain", "background", "uniform"]

CLIP_PREPROCESSING = Preprocessing(
    size=(448, 448),
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    mode="bicubic",
)
"""CLIP sees a square of 448, as GEM uses, normalized as CLIP was trained."""

_SAM_MEAN = (123.675, 116.28, 103.53)
_SAM_STD = (58.395, 57.12, 57.375)
_POINTS = 64  # prompts of one call of SAM's mask decoder
_CHUNK = 4 * 2**20  # pixels of segments that are brought to floats at a time


@final
class SamClipAnnotator:
    """Logits of every class from SAM's segments and CLIP's names for them.

    Every class is prompted, a background too (several texts help: "sky", "wall", "ground"). A
    pixel that no segment covers has NaN logits by default: a filter abstains there and a set
    holds every class. For calibration give such pixels no label: :func:`cpseg.annotators.sam_clip.ignore_unusable`. What is
    then promised is about covered pixels.

    Guarantee:
        None; it is what a calibration is for.

    Args:
        sam: A ``SamModel`` of transformers. It is set to eval mode.
        clip: A ``CLIPModel`` of transformers, on the same device. It is set to eval mode.
        class_names: The C classes in order, or a mapping from a class to its texts.
        tokenizer: Texts to CLIP's token ids ``(T, L)``; see
            :func:`cpseg.annotators.clip_tokenizer`.
        background: Index of the background class; needed for ``uncovered="background"``.
        templates: What a text is put into; the embeddings are averaged.
        overlap: Which segment a pixel in several takes: the smallest, the surest of its class, or
            the normalized product of all.
        uncovered: What a pixel in none gets: NaN, the background for certain, or equal shares.
        scale: What the cosine is multiplied with before the softmax; None: CLIP's own.
        preprocessing: What CLIP sees of an image.
        depth: Layers beside which the self-self path runs.
        points_per_side: SAM's grid of prompts.
        min_iou: Least quality that SAM itself expects of a segment.
        min_stability: Least share that stays when the mask's threshold moves by one.
        max_overlap: Box overlap from which the worse of two segments goes.
    """

    def __init__(
        self,
        sam: nn.Module,
        clip: nn.Module,
        class_names: ClassNames,
        *,
        tokenizer: Tokenizer,
        background: int | None = None,
        templates: Sequence[str] = ("a photo of a {}.",),
        overlap: _Overlap = "smallest",
        uncovered: _Uncovered = "abstain",
        scale: float | None = None,
        preprocessing: Preprocessing = CLIP_PREPROCESSING,
        depth: int = 7,
        points_per_side: int = 32,
        min_iou: float = 0.88,
        min_stability: float = 0.95,
        max_overlap: float = 0.7,
    ) -> None:
        for name, model, needed in (("sam", sam, "config"), ("clip", clip, "logit_scale")):
            check_network(name, model)
            if not hasattr(model, needed):
                raise InputError(
                    f"{name} must be a model with .{needed}; got {_checks.kind_of(model)}"
                )
        check_preprocessing(preprocessing)
        names, texts = class_prompts(class_names)
        _check_policies(overlap, uncovered, background, len(names))
        _checks.check_integer("points_per_side", points_per_side, 1)
        _checks.check_integer("depth", depth, 1)
        templates = check_templates(templates)
        self.class_names: tuple[str, ...] = tuple(names)
        self._sam, self._clip = sam.eval(), clip.eval()
        self._background = background
        self._overlap: _Overlap = overlap
        self._uncovered: _Uncovered = uncovered
        self._preprocessing, self._depth = preprocessing, depth
        self._points = points_per_side
        self._limits = (min_iou, min_stability, max_overlap)
        self._counts = [len(group) for group in texts]
        network: Any = clip
        self._scale = float(network.logit_scale.detach().exp()) if scale is None else scale
        flat = [text for group in texts for text in group]
        vocabulary = int(network.config.text_config.vocab_size)
        tokens = prompt_tokens(tokenizer, flat, templates, vocabulary=vocabulary)
        with torch.no_grad():
            self._texts = _embed(network, tokens)
        settings = {
            "names": names,
            "texts": texts,
            "tokens": [ids.tolist() for ids in tokens],
            "templates": list(templates),
            "background": background,
            "overlap": overlap,
            "uncovered": uncovered,
            "scale": self._scale,
            "preprocessing": preprocessing,
            "depth": depth,
            "points": points_per_side,
            "limits": self._limits,
        }
        both = nn.ModuleDict({"sam": sam, "clip": clip})
        self.source: str = describe_source(f"SAM+CLIP, {len(names)} classes", both, settings)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits of uint8 RGB images ``(B, 3, H, W)``: float32 of shape ``(B, C, H, W)``."""
        check_images(images)
        return torch.stack([self._one(image[None]) for image in images])

    def annotate(self, images: Sequence[object]) -> list[Tensor]:
        """Logits ``(C, H, W)`` of images of any sizes: tensors, arrays or Pillow images."""
        return in_batches(images, 1, self)

    def _one(self, image: Tensor) -> Tensor:
        min_iou, min_stability, max_overlap = self._limits
        segments = sam_segments(
            self._sam,
            image,
            points_per_side=self._points,
            min_iou=min_iou,
            min_stability=min_stability,
            max_overlap=max_overlap,
        )
        pixels = self._preprocessing(image, next(self._clip.parameters()))
        features = dense_clip_features(self._clip, pixels, depth=self._depth)[0].float()
        named = segment_features(features, segments)
        logits = self._scale * functional.normalize(named, dim=-1) @ self._texts.T  # (K, T)
        parts = torch.split(logits, self._counts, -1)
        classes = torch.stack([part.logsumexp(-1) for part in parts], -1).log_softmax(-1)
        return paint_segments(
            segments,
            classes,
            overlap=self._overlap,
            uncovered=self._uncovered,
            background=self._background,
        )


def paint_segments(
    segments: Tensor,
    log_probabilities: Tensor,
    *,
    overlap: _Overlap,
    uncovered: _Uncovered,
    background: int | None = None,
) -> Tensor:
    """Logits of pixels from those of segments.

    Args:
        segments: bool. Shape ``(K, H, W)``; K may be 0.
        log_probabilities: Of the classes, for each segment. Shape ``(K, C)``.
        overlap: See :class:`SamClipAnnotator`. Ties go to the segment that comes first.
        uncovered: See :class:`SamClipAnnotator`.
        background: Index of the background class, for ``uncovered="background"``.

    Returns:
        Shape ``(C, H, W)``.

    Examples:
        >>> left = torch.tensor([[[True, False]]])
        >>> shares = torch.tensor([[0.75, 0.25]]).log()
        >>> paint_segments(left, shares, overlap="smallest", uncovered="uniform").exp()
        tensor([[[0.7500, 0.5000]],
        <BLANKLINE>
                [[0.2500, 0.5000]]])
    """
    if segments.dtype != torch.bool or segments.ndim != 3 or log_probabilities.ndim != 2:
        raise InputError(
            "segments must be bool (K, H, W) and log_probabilities (K, C); got "
            f"{segments.dtype} {_checks.describe(segments.shape)} and "
            f"{_checks.describe(log_probabilities.shape)}"
        )
    if len(segments) != len(log_probabilities):
        raise InputError(
            f"log_probabilities must have a row for each of {len(segments)} segments; "
            f"got {len(log_probabilities)}"
        )
    classes = log_probabilities.shape[1]
    _check_policies(overlap, uncovered, background, classes)
    size = segments.shape[1:]
    covered = segments.any(0)
    if overlap == "product":
        mixed = log_probabilities.new_zeros((classes, prod(size)))
        step = max(1, _CHUNK // max(1, prod(size)))
        for start in range(0, len(segments), step):
            part = slice(start, start + step)
            inside = segments[part].flatten(1).to(log_probabilities)
            mixed.addmm_(log_probabilities[part].T, inside)
        logits = mixed.view(classes, *size).log_softmax(0)
    else:
        rank = segments.sum((1, 2)) if overlap == "smallest" else -log_probabilities.amax(1)
        owner = segments.new_zeros(size, dtype=torch.int64)
        # The last one painted stays on top: of equals the first.
        for k in reversed(rank.argsort(stable=True).tolist()):
            owner.masked_fill_(segments[k], k)
        rows = (
            log_probabilities if len(log_probabilities) else log_probabilities.new_zeros(1, classes)
        )
        logits = rows[owner].permute(2, 0, 1)
    if uncovered == "abstain":
        return torch.where(covered, logits, torch.nan)
    empty = logits.new_full((classes, 1, 1), -torch.tensor(float(classes)).log().item())
    if uncovered == "background":
        empty.fill_(torch.tensor(torch.finfo(logits.dtype).tiny).log().item())
        empty[background] = 0
    return torch.where(covered, logits, empty)


def ignore_unusable(logits: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Labels without the pixels that an annotator left open (NaN logits): for calibration.

    Args:
        logits: Shape ``(B, C, *S)``.
        labels: Shape ``(B, *S)``.
        ignore_index: What marks a pixel without a label.

    Returns:
        New labels. Shape ``(B, *S)``.

    Examples:
        >>> logits = torch.tensor([[[0.0, torch.nan]]])
        >>> ignore_unusable(logits, torch.tensor([[0, 0]]))
        tensor([[  0, 255]])
    """
    _checks.check_logits(logits)
    _checks.check_labels(labels, logits)
    return labels.masked_fill(logits.isnan().any(1), ignore_index)


def segment_features(features: Tensor, segments: Tensor) -> Tensor:
    """Mean feature of each segment; a cell counts by the share of it that the segment covers.

    Args:
        features: On a coarse grid over the whole image. Shape ``(D, h, w)``.
        segments: bool. Shape ``(K, H, W)``.

    Returns:
        Shape ``(K, D)``; zeros for an empty segment.
    """
    size = (int(features.shape[1]), int(features.shape[2]))
    weights = features.new_zeros((len(segments), *size))
    for segment, out in zip(segments, weights, strict=True):
        out.copy_(functional.adaptive_avg_pool2d(segment[None].to(features), size)[0])
    total = weights.sum((1, 2))[:, None].clamp(min=torch.finfo(features.dtype).tiny)
    return torch.einsum("khw,dhw->kd", weights, features) / total


@torch.no_grad()
def sam_segments(
    sam: nn.Module,
    image: Tensor,
    *,
    points_per_side: int = 32,
    min_iou: float = 0.88,
    min_stability: float = 0.95,
    max_overlap: float = 0.7,
) -> Tensor:
    """Segments of an image: SAM prompted with a grid of points, without near duplicates.

    Args:
        sam: A ``SamModel`` of transformers.
        image: uint8 RGB. Shape ``(1, 3, H, W)``.
        points_per_side: Prompts along each side.
        min_iou: Least quality that SAM itself expects of a segment.
        min_stability: Least share that stays when the mask's threshold moves by one either way.
        max_overlap: Box overlap from which the worse of two segments goes.

    Returns:
        bool, best first. Shape ``(K, H, W)``.
    """
    check_images(image)
    network: Any = sam
    height, width = int(image.shape[-2]), int(image.shape[-1])
    side = int(network.config.vision_config.image_size)
    longest = max(height, width)
    seen = (
        max(1, int(height * side / longest + 0.5)),
        max(1, int(width * side / longest + 0.5)),
    )
    like = next(sam.parameters())
    scale = torch.tensor((_SAM_MEAN, _SAM_STD), device=like.device)[:, None, :, None, None]
    pixels = (resize(image, seen, "bilinear").to(like.device) - scale[0]) / scale[1]
    pixels = functional.pad(pixels, (0, side - seen[1], 0, side - seen[0]))
    embedding = network.get_image_embeddings(pixels.to(like.dtype))
    if not isinstance(embedding, Tensor):  # older releases answer with a tuple
        embedding = embedding[0]
    points = _grid(points_per_side, seen).to(like)
    kept: list[Tensor] = []
    quality: list[Tensor] = []
    rows = columns = side
    for part in torch.split(points, _POINTS):
        output = network(image_embeddings=embedding, input_points=part[None, :, None])
        masks = output.pred_masks[0].flatten(0, 1).float()  # (P * 3, h, w)
        iou = output.iou_scores[0].flatten().float()
        # What lies beyond the image in the padded square is no part of a segment.
        rows, columns = (-(-n * masks.shape[-1] // side) for n in seen)
        inside = masks[:, :rows, :columns]
        wide = (inside > -1).sum((1, 2))
        stable = (inside > 1).sum((1, 2)) / wide.clamp(min=1)
        good = (iou >= min_iou) & (stable >= min_stability) & (inside > 0).any(2).any(1)
        kept.append(masks[good])
        quality.append(iou[good])
    masks, iou = torch.cat(kept), torch.cat(quality)
    chosen = non_maximum_suppression(_boxes(masks[:, :rows, :columns] > 0), iou, max_overlap)
    out = torch.zeros((len(chosen), height, width), dtype=torch.bool, device=masks.device)
    for place, k in enumerate(chosen.tolist()):
        out[place] = _full_mask(masks[k], side, seen, (height, width)) > 0
    return out[out.any(2).any(1)]


def _full_mask(mask: Tensor, side: int, seen: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """One mask ``(h, w)`` of the padded square, on the image's own pixels: ``size``."""
    square = functional.interpolate(
        mask[None, None], size=(side, side), mode="bilinear", align_corners=False
    )
    image = square[..., : seen[0], : seen[1]]
    return functional.interpolate(image, size=size, mode="bilinear", align_corners=False)[0, 0]


def non_maximum_suppression(boxes: Tensor, scores: Tensor, max_overlap: float) -> Tensor:
    """Indices of boxes, best first, none of which overlaps a better one by more than allowed.

    Args:
        boxes: ``x0, y0, x1, y1`` with the far corner outside. Shape ``(N, 4)``.
        scores: Higher is better; ties keep the order. Shape ``(N,)``.
        max_overlap: Most intersection over union with a box that stays.

    Returns:
        int64. Shape ``(K,)``.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [8, 8, 9, 9]])
        >>> non_maximum_suppression(boxes, torch.tensor([0.5, 0.75, 0.25]), 0.7)
        tensor([1, 2])
    """
    order = scores.argsort(descending=True, stable=True)
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    close = shared > max_overlap * (area[:, None] + area[None, :] - shared)
    gone = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    stays: list[int] = []
    for k in order.tolist():
        if not bool(gone[k]):
            stays.append(k)
            gone |= close[k]
    return torch.tensor(stays, dtype=torch.int64, device=boxes.device)


@torch.no_grad()
def dense_clip_features(clip: nn.Module, pixels: Tensor, *, depth: int = 7) -> Tensor:
    """CLIP's features of every patch, in the space of its texts, by self-self attention.

    Args:
        clip: A ``CLIPModel`` of transformers.
        pixels: Normalized. Shape ``(B, 3, H, W)``, multiples of the patch size.
        depth: Last layers beside which the second path runs; all if there are fewer.

    Returns:
        Of length 1. Shape ``(B, D, H / patch, W / patch)``.
    """
    network: Any = clip
    vision = network.vision_model
    x: Tensor = vision.pre_layrnorm(vision.embeddings(pixels, interpolate_pos_encoding=True))
    layers = list(vision.encoder.layers)
    start = max(0, len(layers) - depth)
    path = x
    for place, layer in enumerate(layers):
        normed = layer.layer_norm1(x)
        if place == start:
            path = x
        if place >= start:
            path = path + _self_self_attention(layer.self_attn, normed)
        x = x + layer.self_attn(normed, attention_mask=None)[0]
        x = x + layer.mlp(layer.layer_norm2(x))
    features = network.visual_projection(vision.post_layernorm(path))[:, 1:]  # no class token
    patch = int(vision.embeddings.patch_size)
    grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
    return functional.normalize(features, dim=-1).transpose(1, 2).reshape(len(features), -1, *grid)


def _self_self_attention(attention: Any, x: Tensor) -> Tensor:
    """Values mixed among tokens whose queries, keys or values are alike; ``(B, N, D)``."""
    batch, count, width = x.shape
    heads = int(attention.num_heads)
    # The sharper the tokens stand out, the colder: their mean length over sqrt(channels).
    cold = x.norm(dim=-1).mean(-1)[:, None, None, None] * (width // heads) ** -0.5

    def split(y: Tensor) -> Tensor:
        return y.reshape(batch, count, heads, -1).transpose(1, 2)

    value = split(attention.v_proj(x))
    mixed = torch.zeros_like(value)
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        tokens = functional.normalize(split(projection(x)), dim=-1)
        alike = (tokens @ tokens.transpose(-1, -2) * cold).softmax(-1)
        # One round lets alike tokens draw together before they choose whom to listen to.
        tokens = functional.normalize(alike @ tokens, dim=-1)
        mixed += (tokens @ tokens.transpose(-1, -2) * cold).softmax(-1) @ value
    return attention.out_proj((mixed / 3).transpose(1, 2).reshape(batch, count, width))


def _embed(clip: Any, tokens: Sequence[Tensor]) -> Tensor:
    """One embedding per text, of length 1. Shape ``(T, D)``."""
    rows: list[Tensor] = []
    for ids in tokens:
        features = clip.get_text_features(input_ids=ids.to(clip.logit_scale.device))
        # Older releases answer with the tensor itself.
        features = features if isinstance(features, Tensor) else features.pooler_output
        mean = functional.normalize(features.float(), dim=-1).mean(0)
        rows.append(functional.normalize(mean, dim=-1))
    return torch.stack(rows)


def _grid(points_per_side: int, size: tuple[int, int]) -> Tensor:
    """Centers of a grid's cells as ``x, y`` in pixels; shape ``(points_per_side ** 2, 2)``."""
    place = (torch.arange(points_per_side) + 0.5) / points_per_side
    y, x = torch.meshgrid(place * size[0], place * size[1], indexing="ij")
    return torch.stack((x.flatten(), y.flatten()), 1)


def _boxes(masks: Tensor) -> Tensor:
    """Boxes ``x0, y0, x1, y1`` of masks ``(N, h, w)`` that hold something: ``(N, 4)``."""
    columns, rows = masks.any(1).float(), masks.any(2).float()
    sides = [
        columns.argmax(1),
        rows.argmax(1),
        masks.shape[2] - columns.flip(1).argmax(1),
        masks.shape[1] - rows.flip(1).argmax(1),
    ]
    return torch.stack(sides, 1).float()


def _check_policies(overlap: str, uncovered: str, background: int | None, num_classes: int) -> None:
    if overlap not in get_args(_Overlap):
        raise InputError(f"overlap must be one of {', '.join(get_args(_Overlap))}; got {overlap!r}")
    if uncovered not in get_args(_Uncovered):
        raise InputError(
            f"uncovered must be one of {', '.join(get_args(_Uncovered))}; got {uncovered!r}"
        )
    if background is None and uncovered == "background":
        raise InputError("background must be a class where uncovered pixels become it; got None")
    check_background(background, num_classes)
