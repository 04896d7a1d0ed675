"""Class names as prompts: what SEEM, CLIP and the text-prompted models share.

Names and their synonyms, the templates they are put into, CLIP's tokenizer, and the checks of
what a tokenizer answered: token ids are what a network sees of a text, so they belong to the
identity of an annotator, and two texts with the same ids would be one class under two names.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cpseg import _checks
from cpseg.annotators.pretrained import load_pretrained
from cpseg.errors import FileError, InputError, MissingExtraError

__all__ = [
    "ClassNames",
    "Tokenizer",
    "check_background",
    "check_templates",
    "check_token_ids",
    "class_prompts",
    "clean_name",
    "clip_tokenizer",
    "prompt_tokens",
]

ClassNames = Sequence[str] | Mapping[str, Sequence[str]]
Tokenizer = Callable[[list[str]], Tensor]

# What COCO's panoptic names carry and SEEM cuts off.
_SUFFIXES = ("-other", "-merged", "-stuff")


def class_prompts(class_names: ClassNames) -> tuple[list[str], list[list[str]]]:
    """Names of the classes in order, and the texts of each.

    Args:
        class_names: Names, or a mapping from a name to its texts (several synonyms add up).

    Returns:
        The names, and for each the texts to prompt with.

    Raises:
        InputError: A name or text is no text, is empty, or occurs twice.

    Examples:
        >>> class_prompts({"person": ["man", "woman"], "car": ["car"]})
        (['person', 'car'], [['man', 'woman'], ['car']])
    """
    if not _lists(class_names):
        raise InputError(
            f"class_names must be a sequence of names or map each to its texts; got {class_names!r}"
        )
    names: list[object] = list(class_names)
    if not names:
        raise InputError("class_names must name at least one class; got none")
    given: list[object] = [[name] for name in names]
    if isinstance(class_names, Mapping):
        given = list(class_names.values())
    prompts: dict[str, list[str]] = {}
    for name, texts in zip(names, given, strict=True):
        if not isinstance(name, str):
            raise InputError(f"class_names must hold texts; got {name!r}")
        if name in prompts:
            raise InputError(f"class_names must name each class once; got {name!r} twice")
        if not isinstance(texts, Sequence) or isinstance(texts, str):
            raise InputError(
                f"class_names must give a list of texts for each class; {name!r} has {texts!r}"
            )
        prompts[name] = [_text(name, text) for text in texts]
    _refuse_empty_and_twice(prompts)
    return list(prompts), list(prompts.values())


def _text(name: str, text: object) -> str:
    if not isinstance(text, str):
        raise InputError(f"class_names must hold texts; {name!r} has {text!r}")
    return text


def _refuse_empty_and_twice(prompts: Mapping[str, list[str]]) -> None:
    seen: dict[str, str] = {}
    for name, synonyms in prompts.items():
        if not name.strip() or not synonyms:
            raise InputError(f"class_names must hold names with texts; got {name!r}: {synonyms}")
        for text in synonyms:
            key = clean_name(text).lower()
            if not key:
                raise InputError(f"class_names must not hold an empty text; {name!r} has {text!r}")
            if key in seen:
                raise InputError(
                    f"class_names must give each text once; {text!r} of {name!r} is also a text "
                    f"of {seen[key]!r}"
                )
            seen[key] = name
    if len({name.strip().lower() for name in prompts}) != len(prompts):
        raise InputError(f"class_names must name each class once; got {list(prompts)}")


def check_background(background: object, num_classes: int) -> None:
    """An index among the classes, or None."""
    if background is None:
        return
    _checks.check_integer("background", background)
    if not isinstance(background, int) or not 0 <= background < num_classes:
        raise InputError(
            f"background must be an index of class_names, in [0, {num_classes}), or None; "
            f"got {background}"
        )


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Templates, each with one ``{}`` for a text."""
    if not _lists(templates) or not templates:
        raise InputError(f"templates must be a sequence of texts; got {templates!r}")
    return tuple(_template(template) for template in templates)


def _template(template: object) -> str:
    if not isinstance(template, str) or template.count("{}") != 1:
        raise InputError(f"templates must each hold one {{}}; got {template!r}")
    return template


def _lists(value: object) -> bool:
    """Whether a value lists things; a text does not."""
    return isinstance(value, (Sequence, Mapping)) and not isinstance(value, str)


def prompt_tokens(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    templates: Sequence[str],
    *,
    vocabulary: int,
) -> list[Tensor]:
    """Token ids of each text in every template, without the padding all of them share.

    Args:
        tokenizer: Texts to token ids ``(T, L)``; the highest id ends a text.
        texts: Of all classes.
        templates: What a text is put into, each with one ``{}``.
        vocabulary: Number of ids the network knows.

    Returns:
        One tensor ``(templates, length)`` per text.

    Raises:
        InputError: The ids have a wrong form, or are the same for two texts.
    """
    found: list[Tensor] = []
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for text in texts:
        prompts = [template.replace("{}", text) for template in templates]
        ids = tokenizer(prompts)
        check_token_ids(ids, prompts, vocabulary=vocabulary)
        # Nothing looks past the end of its text, so the common padding can go.
        ends = ids.argmax(1).tolist()
        ids = ids[:, : max(ends) + 1]
        for place, (row, end) in enumerate(zip(ids.tolist(), ends, strict=True)):
            other = seen.setdefault((place, tuple(row[: end + 1])), text)
            if other != text:
                raise InputError(
                    f"tokenizer must tell texts apart; {other!r} and {text!r} have the same ids "
                    f"in {templates[place]!r}"
                )
        found.append(ids)
    return found


def check_token_ids(ids: object, texts: Sequence[str], *, vocabulary: int) -> None:
    """Refuse what is no integer tensor ``(T, L)`` of known ids, a row per text."""
    if not isinstance(ids, Tensor) or ids.dtype not in _checks.INTEGERS:
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"tokenizer must answer with an integer tensor (T, L); got {kind}")
    if ids.ndim != 2 or len(ids) != len(texts) or not ids.shape[1]:
        raise InputError(
            f"tokenizer must answer with shape (T, L) for T = {len(texts)} texts; "
            f"got {_checks.describe(ids.shape)}"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"tokenizer must answer with ids in [0, {vocabulary}), the model's vocabulary; "
            f"got {low if low < 0 else high}"
        )


def clean_name(text: str) -> str:
    """A name without what COCO's panoptic names carry.

    Examples:
        >>> clean_name("tree-merged")
        'tree'
    """
    for suffix in _SUFFIXES:
        text = text.replace(suffix, "")
    return text.strip()


def clip_tokenizer(source: str | Path) -> Tokenizer:
    """CLIP's tokenizer from transformers (extra ``hf``).

    Args:
        source: A hub name such as ``"openai/clip-vit-base-patch32"`` or a folder with
            ``vocab.json`` and ``merges.txt``.

    Returns:
        Texts to token ids ``(T, L)``, ended by the end-of-text token, at most 77 long.

    Raises:
        FileError: No vocabulary is found there.
    """
    try:
        from transformers import CLIPTokenizer  # noqa: PLC0415  (optional)
    except ImportError as error:
        raise MissingExtraError(
            "CLIP's tokenizer needs transformers: pip install 'cpseg[hf]', or pass a tokenizer "
            "of your own, a function from texts to token ids (T, L)"
        ) from error
    tokenizer: Any = load_pretrained(CLIPTokenizer, source)
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
