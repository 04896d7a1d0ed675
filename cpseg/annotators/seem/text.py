"""Class names as prompts: templates, synonyms, and the tokenizer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpseg.annotators.seem.model import SEEM
from cpseg.errors import FileError, InputError, MissingExtraError

__all__ = ["SEEM_TEMPLATES", "ClassNames", "Tokenizer", "class_prompts", "clip_tokenizer", "embed"]

ClassNames = Sequence[str] | Mapping[str, Sequence[str]]
Tokenizer = Callable[[list[str]], Tensor]

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

# What COCO's panoptic names carry and the original cuts off.
_SUFFIXES = ("-other", "-merged", "-stuff")


def class_prompts(class_names: ClassNames) -> tuple[list[str], list[list[str]]]:
    """Names of the classes in order, and the texts of each.

    Args:
        class_names: Names, or a mapping from a name to its texts (several synonyms add up).

    Returns:
        The names, and for each the texts to prompt with.

    Raises:
        InputError: A name or text is empty, or occurs twice.

    Examples:
        >>> class_prompts({"person": ["man", "woman"], "car": ["car"]})
        (['person', 'car'], [['man', 'woman'], ['car']])
    """
    if isinstance(class_names, str):
        raise InputError(f"class_names must be a sequence of names; got the text {class_names!r}")
    names = list(class_names)
    if not names:
        raise InputError("class_names must name at least one class; got none")
    texts = [[name] for name in names]
    if isinstance(class_names, Mapping):
        if any(isinstance(given, str) for given in class_names.values()):
            raise InputError("class_names must give a list of texts for each class; got a text")
        texts = [list(class_names[name]) for name in names]
    _refuse_empty_and_twice(names, texts)
    return names, texts


def _refuse_empty_and_twice(names: list[str], texts: list[list[str]]) -> None:
    seen: dict[str, str] = {}
    for name, synonyms in zip(names, texts, strict=True):
        if not name.strip() or not synonyms:
            raise InputError(f"class_names must hold names with texts; got {name!r}: {synonyms}")
        for text in synonyms:
            key = _clean(text).lower()
            if not key:
                raise InputError(f"class_names must not hold an empty text; {name!r} has {text!r}")
            if key in seen:
                raise InputError(
                    f"class_names must give each text once; {text!r} of {name!r} is also a text "
                    f"of {seen[key]!r}"
                )
            seen[key] = name
    if len({name.strip().lower() for name in names}) != len(names):
        raise InputError(f"class_names must name each class once; got {names}")


def clip_tokenizer(source: str | Path) -> Tokenizer:
    """CLIP's tokenizer from transformers (extra ``hf``).

    Args:
        source: A hub name such as ``"openai/clip-vit-base-patch32"`` or a folder with
            ``vocab.json`` and ``merges.txt``.

    Returns:
        Texts to token ids ``(T, L)``, ended by the end-of-text token, at most 77 long.
    """
    try:
        from transformers import CLIPTokenizer  # noqa: PLC0415  (optional)
    except ImportError as error:
        raise MissingExtraError(
            "CLIP's tokenizer needs transformers: pip install 'cpseg[hf]', or pass a tokenizer "
            "of your own, a function from texts to token ids (T, L)"
        ) from error
    tokenizer: Any = CLIPTokenizer.from_pretrained(str(source))
    # transformers 5 answers with an empty vocabulary where it finds no file
    if "a</w>" not in tokenizer.get_vocab():
        raise FileError(
            f"{source} must be a hub name that can be reached, or a folder with CLIP's vocab.json "
            "and merges.txt; no vocabulary was found there"
        )

    def tokenize(texts: list[str]) -> Tensor:
        encoded = tokenizer(
            texts, padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        ids: Tensor = encoded["input_ids"]
        return ids

    return tokenize


def embed(
    model: SEEM,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    templates: Sequence[str],
) -> Tensor:
    """One embedding per text: the mean over the templates, of length 1. Shape ``(T, dim)``."""
    device = model.sem_seg_head.predictor.class_embed.device
    rows: list[Tensor] = []
    for text in texts:
        name = _clean(text)
        ids = tokenizer([template.format(name) for template in templates])
        # Nothing looks past the end of its text, so the common padding can go.
        ids = ids[:, : int(ids.argmax(1).max()) + 1].to(device)
        mean = model.text_embeddings(ids).mean(0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def _clean(text: str) -> str:
    for suffix in _SUFFIXES:
        text = text.replace(suffix, "")
    return text.strip()
