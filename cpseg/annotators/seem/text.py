"""SEEM's templates, and the embeddings of prompts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cpseg.annotators.seem.model import SEEM

__all__ = ["SEEM_TEMPLATES", "embed"]

_WITH_ARTICLE = (
    "a bad photo of {a}", "a sculpture of {a}", "a photo of {a} hard to see",
    "a low resolution photo of {a}", "a rendering of {a}", "graffiti of {a}",
    "a cropped photo of {a}", "a tattoo of {a}", "{a} embroidered", "a bright photo of {a}",
    "a photo of {a} clean", "a photo of {a} dirty", "a dark photo of {a}", "a drawing of {a}",
    "{a} plastic", "a photo of {a} cool", "a close-up photo of {a}",
    "a black and white photo of {a}", "a painting of {a}", "a pixelated photo of {a}",
    "a jpeg corrupted photo of {a}", "a blurry photo of {a}", "a photo of {a}",
    "a good photo of {a}", "a doodle of {a}", "{a} origami", "a sketch of {a}", "{a} toy",
    "a rendition of {a}", "a photo of {a} large", "a photo of {a} nice", "a photo of {a} weird",
    "{a} cartoon", "art of {a}", "itap of {a}", "{a} plushie", "a photo of {a} small",
)  # fmt: skip

SEEM_TEMPLATES: tuple[str, ...] = (
    "{}.",
    *(f"{frame.format(a=article)} {{}}." for frame in _WITH_ARTICLE for article in ("a", "the")),
    "a {} in a video game.",
    "the {} in a video game.",
    "a photo of many {}.",
    "a photo of my {}.",
    "a photo of one {}.",
    "itap of my {}.",
)
"""What SEEM puts a class name into: CLIP's eighty templates for ImageNet and the bare name."""


def embed(model: SEEM, tokens: Sequence[Tensor]) -> Tensor:
    """One embedding per text: the mean over its templates, of length 1.

    Args:
        model: Whose text encoder to use.
        tokens: Of each text, ``(templates, L)``; see :func:`cpseg.annotators.prompts.prompt_tokens`.

    Returns:
        Shape ``(T, dim)``.
    """
    device = model.sem_seg_head.predictor.class_embed.device
    rows: list[Tensor] = []
    for ids in tokens:
        mean = model.text_embeddings(ids.to(device)).mean(0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)
