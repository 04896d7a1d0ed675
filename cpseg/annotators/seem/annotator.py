"""SEEM as an annotator: class names and images in, logits of every class out."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn

from cpseg import _checks
from cpseg.annotators.images import (
    check_images,
    check_size,
    in_batches,
    resize,
    rgb,
    short_side,
)
from cpseg.annotators.mask_class import (
    log_probabilities,
    mask_class_probabilities,
    resize_masks,
)
from cpseg.annotators.prompts import (
    ClassNames,
    check_background,
    check_templates,
    check_token_ids,
    class_prompts,
    clean_name,
    clip_tokenizer,
    prompt_tokens,
)
from cpseg.annotators.seem.model import _STRIDE, SEEM, SEEMConfig
from cpseg.annotators.seem.text import SEEM_TEMPLATES, embed
from cpseg.annotators.source import check_network, describe_source
from cpseg.errors import InputError

__all__ = ["CLIP_TOKENIZER", "SEEMAnnotator", "UpstreamSEEMAnnotator"]

CLIP_TOKENIZER = "openai/clip-vit-base-patch32"


@final
class SEEMAnnotator:
    """Logits of every class from SEEM prompted with the classes' names.

    A background class of the data is no prompt: with ``mode="complement"`` it is what no class
    claims, with ``mode="void"`` what the queries call nothing. The text for nothing is added
    inside; it is never one of your classes.

    An image's logits do not depend on its batch, but for the last bits: each image is padded only
    to a multiple of 32 and meets only images of its own size.

    Under ``autocast=torch.bfloat16`` the network runs faster on hardware that has it, with other
    logits: the decoder looks inside a mask where it is above one half, and rounding turns some of
    those bits. Calibrate with the setting you predict with; ``source`` records it.

    Guarantee:
        None; it is what a calibration is for.

    Args:
        model: A SEEM, on the device it is to run on; see
            :func:`cpseg.annotators.seem.load_checkpoint`. It is set to eval mode.
        class_names: The C classes in order, or a mapping from a class to its texts: synonyms
            such as ``{"person": ["man", "woman"]}`` add their probabilities.
        background: Index of the background class among ``class_names``, or None where every
            pixel is of a named class.
        mode: Who gets what nothing claims; None: ``"complement"`` with a background, else
            ``"none"``. See :func:`cpseg.annotators.mask_class_probabilities`.
        void_text: What SEEM was trained to call nothing.
        templates: What a text is put into, each with one ``{}``.
        tokenizer: Texts to token ids ``(T, L)``; or a hub name or folder of CLIP's tokenizer
            (extra ``hf``).
        short: Shorter side of the image that the network sees.
        longest: Longest side of it; None: no limit.
        output_size: Height and width of the logits; None: the image's.
        autocast: Lower precision of the network, such as ``torch.bfloat16``; None: the model's.

    Raises:
        InputError: A name is empty or occurs twice, or an argument breaks a rule.
    """

    def __init__(
        self,
        model: SEEM,
        class_names: ClassNames,
        *,
        background: int | None,
        mode: Literal["complement", "void", "none"] | None = None,
        void_text: str = "background",
        templates: Sequence[str] = SEEM_TEMPLATES,
        tokenizer: Callable[[list[str]], Tensor] | str | Path = CLIP_TOKENIZER,
        short: int = 512,
        longest: int | None = None,
        output_size: tuple[int, int] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        check_network("model", model)
        if not isinstance(getattr(model, "config", None), SEEMConfig):
            raise InputError(
                f"model must be a SEEM, as load_checkpoint gives; got {_checks.kind_of(model)}. "
                "For one built with the original's code: UpstreamSEEMAnnotator"
            )
        names, texts = class_prompts(class_names)
        self.class_names: tuple[str, ...] = tuple(names)
        self._prompts = _prompted(names, texts, background, void_text)
        if mode is None:
            mode = "none" if background is None else "complement"
        if mode not in ("complement", "void", "none") or (mode == "none") != (background is None):
            raise InputError(
                "mode must be 'complement' or 'void' with a background class and 'none' without; "
                f"got {mode!r} with background={background}"
            )
        self._templates = check_templates(templates)
        _checks.check_integer("short", short, 1)
        if longest is not None:
            _checks.check_integer("longest", longest, 1)
        if output_size is not None:
            check_size("output_size", output_size)
        if autocast is not None and autocast not in (torch.bfloat16, torch.float16):
            raise InputError(
                f"autocast must be torch.bfloat16, torch.float16 or None; got {autocast}"
            )
        self._model = model.eval()
        self._background = 0 if background is None else background
        self._mode: Literal["complement", "void", "none"] = mode
        self._tokenizer = tokenizer if callable(tokenizer) else clip_tokenizer(tokenizer)
        self._short, self._longest = short, longest
        self._output_size = output_size
        self._autocast = autocast
        self._vocabulary = model.config.text_vocabulary
        flat = [*(text for group in self._prompts for text in group), void_text]
        tokens = prompt_tokens(
            self._tokenizer,
            [clean_name(text) for text in flat],
            self._templates,
            vocabulary=self._vocabulary,
        )
        with torch.no_grad():
            self._embeddings = embed(model, tokens)
        self.source: str = describe_source(
            f"SEEM {model.config.block}, {len(names)} classes",
            model,
            {
                "config": model.config,
                "names": names,
                "texts": self._prompts,
                "tokens": [ids.tolist() for ids in tokens],
                "background": background,
                "mode": mode,
                "void": void_text,
                "templates": self._templates,
                "short": short,
                "longest": longest,
                "output_size": output_size,
                "dtype": str(autocast or self._embeddings.dtype),
            },
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits of a batch: log-probabilities.

        Args:
            images: uint8 RGB on any device. Shape ``(B, 3, H, W)``.

        Returns:
            float32 (or the model's float64), on the model's device. Shape ``(B, C, H, W)``, or
            with ``output_size`` in place of ``(H, W)``.
        """
        return log_probabilities(self.probabilities(images))

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """What the logits are the logarithm of. Images and shape as in a call."""
        check_images(images)
        height, width = int(images.shape[-2]), int(images.shape[-1])
        seen = short_side((height, width), self._short, self._longest)
        device = self._embeddings.device
        with _precision(device, self._autocast):
            classes, masks = self._model(resize(images, seen).to(device), self._embeddings)
        classes = classes.to(torch.promote_types(classes.dtype, torch.float32))
        return mask_class_probabilities(
            _add_synonyms(classes, self._prompts),
            masks,
            self._output_size or (height, width),
            mode=self._mode,
            background=self._background,
            padded_size=_padded(seen),
            image_size=seen,
        )

    def annotate(self, images: Sequence[object], batch_size: int = 1) -> list[Tensor]:
        """Logits of images of any sizes.

        Args:
            images: uint8 tensors ``(3, H, W)``, uint8 arrays ``(H, W, 3)``, or Pillow images.
            batch_size: Most images of one size in one call of the network.

        Returns:
            A tensor ``(C, H, W)`` per image, in order.
        """
        return in_batches(images, batch_size, self)

    @torch.no_grad()
    def refer(self, image: object) -> Tensor:
        """Referring masks: for each class the one object that fits its texts best.

        Only one object per text, and a class that is not there gets a mask too, since SEEM has no
        score of presence; all texts are seen together. So these are no class probabilities, and
        no filter should be fed with them. A class with several texts gets the largest mask logit.

        Args:
            image: One image, as :meth:`annotate` takes them.

        Returns:
            Mask logits of the prompted classes, in order and without background; above 0 means
            inside. Shape ``(K, H, W)``.
        """
        pixels = rgb(image)[None]
        size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
        seen = short_side(size, self._short, self._longest)
        device = self._embeddings.device
        texts = [text for group in self._prompts for text in group]
        ids = self._tokenizer(texts)
        check_token_ids(ids, texts, vocabulary=self._vocabulary)
        ids = ids.to(device)
        ends = ids.argmax(1, keepdim=True)
        within = torch.arange(ids.shape[1], device=device) <= ends
        masks = self._model.refer(resize(pixels, seen).to(device), ids, within)
        resized = resize_masks(masks[None], size, _padded(seen), seen)[0]
        counts = [len(group) for group in self._prompts]
        return torch.stack([part.amax(0) for part in torch.split(resized, counts)])


@final
class UpstreamSEEMAnnotator:
    """A model built with SEEM's own code, as an annotator; nothing of that code is imported.

    The model is what ``BaseModel(opt, build_model(opt)).from_pretrained(...)`` returns. Its text
    embeddings and number of classes are set for each call and put back after it. What it answers
    is summed over queries and is made probabilities as
    :func:`cpseg.annotators.mask_class_probabilities` does, but for ``"void"``, whose channel the
    original throws away.

    Guarantee:
        None; it is what a calibration is for.

    Args:
        model: The original's ``BaseModel``, or the model inside it.
        class_names: The C classes, in order; a background class is no prompt.
        background: Index of the background class, or None.
        void_text: What SEEM was trained to call nothing; added inside.
        short: Shorter side of the image that the network sees.
        source: What to call the model in a cache or calibration.
    """

    def __init__(
        self,
        model: Any,
        class_names: Sequence[str],
        *,
        background: int | None,
        void_text: str = "background",
        short: int = 512,
        source: str = "original SEEM",
    ) -> None:
        names, texts = class_prompts(class_names)
        if isinstance(class_names, Mapping):
            raise InputError(
                "class_names must be a sequence of names; the original has no synonyms"
            )
        _checks.check_integer("short", short, 1)
        self.class_names: tuple[str, ...] = tuple(names)
        prompts = _prompted(names, texts, background, void_text)
        self._texts = [*(text for group in prompts for text in group), void_text]
        inner = getattr(model, "model", model)
        for needed in ("evaluate", "sem_seg_head"):
            if not hasattr(inner, needed):
                raise InputError(
                    f"model must be SEEM's own, with .{needed}; got {type(model).__name__}"
                )
        self._model = inner
        self._background = background
        self._short = short
        self._embeddings: Tensor | None = None
        mode = "none" if background is None else "complement"
        self.source: str = describe_source(
            f"{source}, {len(names)} classes",
            inner if isinstance(inner, nn.Module) else None,
            {
                "names": names,
                "background": background,
                "mode": mode,
                "short": short,
                "void": void_text,
            },
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits of uint8 RGB images ``(B, 3, H, W)``: shape ``(B, C, H, W)``."""
        check_images(images)
        head = self._model.sem_seg_head
        language = head.predictor.lang_encoder
        before_classes = head.num_classes
        before = getattr(language, "default_text_embeddings", None)
        try:
            if self._embeddings is None:
                language.get_text_embeddings(self._texts, is_eval=True)
                self._embeddings = language.default_text_embeddings
            language.default_text_embeddings = self._embeddings
            head.num_classes = len(self._texts) - 1
            rows = [self._one(image) for image in images]
        finally:
            head.num_classes = before_classes
            if before is None:
                if hasattr(language, "default_text_embeddings"):
                    del language.default_text_embeddings
            else:
                language.default_text_embeddings = before
        return log_probabilities(torch.stack(rows))

    def annotate(self, images: Sequence[object]) -> list[Tensor]:
        """Logits ``(C, H, W)`` of each image; see :meth:`SEEMAnnotator.annotate`."""
        return in_batches(images, 1, self)

    def _one(self, image: Tensor) -> Tensor:
        height, width = int(image.shape[-2]), int(image.shape[-1])
        seen = short_side((height, width), self._short, None)
        small = resize(image[None], seen)[0]
        answer = self._model.evaluate([{"image": small, "height": height, "width": width}])
        total = answer[0]["sem_seg"].float()
        if tuple(total.shape) != (len(self._texts) - 1, height, width):
            raise InputError(
                f"model must answer with sem_seg {(len(self._texts) - 1, height, width)}; "
                f"got {tuple(total.shape)}"
            )
        claimed = total.sum(0, keepdim=True)
        if self._background is None:
            even = torch.full_like(total, 1 / len(total))
            return torch.where(claimed > 0, total / claimed.clamp(min=1e-30), even)
        total = total / claimed.clamp(min=1)
        rest = (1 - claimed).clamp(min=0)
        return torch.cat((total[: self._background], rest, total[self._background :]))


def _prompted(
    names: list[str], texts: list[list[str]], background: int | None, void_text: str
) -> list[list[str]]:
    """The texts of the classes that are prompted: all but the background."""
    check_background(background, len(names))
    given = cast("object", void_text)
    if not isinstance(given, str) or not given.strip():
        raise InputError(f"void_text must be a text and not empty; got {given!r}")
    prompts = [group for place, group in enumerate(texts) if place != background]
    if not prompts:
        raise InputError("class_names must name a class besides the background; got none")
    if any(
        text.strip().lower() == void_text.strip().lower() for group in prompts for text in group
    ):
        raise InputError(
            f"class_names must not prompt with void_text, {void_text!r}; if that is the data's "
            "background class give its index as background="
        )
    return prompts


def _add_synonyms(class_logits: Tensor, prompts: list[list[str]]) -> Tensor:
    """Class logits whose softmax sums the synonyms' softmax; the void text stays last."""
    if all(len(group) == 1 for group in prompts):
        return class_logits
    counts = [*(len(group) for group in prompts), 1]
    return torch.stack([part.logsumexp(-1) for part in torch.split(class_logits, counts, -1)], -1)


def _padded(size: tuple[int, int]) -> tuple[int, int]:
    """The size that the network pads an image to."""
    return size[0] + -size[0] % _STRIDE, size[1] + -size[1] % _STRIDE


def _precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype)
