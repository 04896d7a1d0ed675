"""Models of Hugging Face's transformers as annotators (extra ``hf``; torchvision never needed).

Logits come from the models' raw outputs. Their post-processors are no road to a calibration:
one returns logits, another sums over queries, a third sigmoids, and some resize in between.
Images are resized and normalized here, because several of their processors need torchvision.

A model that is already built needs no transformers at all: give it with its
:class:`cpseg.annotators.Preprocessing`. ``from_pretrained`` takes a folder or a hub name.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from cpseg import _checks
from cpseg.annotators.images import in_batches
from cpseg.annotators.mask_class import log_probabilities, mask_class_probabilities
from cpseg.annotators.preprocessing import Preprocessing, check_preprocessing
from cpseg.annotators.pretrained import check_device, import_transformers, load_pretrained
from cpseg.annotators.prompts import (
    ClassNames,
    check_background,
    check_templates,
    check_token_ids,
    class_prompts,
)
from cpseg.annotators.source import check_network, describe_source
from cpseg.errors import InputError

__all__ = [
    "MaskClassAnnotator",
    "SemanticLogitsAnnotator",
    "TextPromptAnnotator",
    "find_logits",
]

_Tokenizer = Callable[[list[str]], Mapping[str, Tensor]]


@final
class SemanticLogitsAnnotator:
    """SegFormer and its kind (BEiT, DPT, UPerNet, MobileViT, your network): logits per pixel.

    The network answers with a tensor ``(B, C, h, w)``, or with an object or mapping that holds it
    as ``logits`` or ``out``. It is resized bilinearly to the image.

    Guarantee:
        None; it is what a calibration is for.

    Args:
        model: Takes pixels ``(B, 3, h, w)``. It is set to eval mode.
        preprocessing: What it sees of an image.
        source: What to call it in a cache or calibration; None: its class's name. Weights and
            preprocessing are added.
    """

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, *, source: str | None = None
    ) -> None:
        check_network("model", model)
        check_preprocessing(preprocessing)
        self._model = model.eval()
        self._preprocessing = preprocessing
        self.source: str = _source(model, source, {"preprocessing": preprocessing})

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        preprocessing: Preprocessing | None = None,
        device: torch.device | str = "cpu",
    ) -> "SemanticLogitsAnnotator":
        """From a folder or hub name of a semantic segmentation model.

        Args:
            name: The folder or hub name.
            preprocessing: What the model sees of an image; None: as its files say.
            device: Where it runs.
        """
        place = check_device(device)
        preprocessing = preprocessing or Preprocessing.from_pretrained(name)
        kind = import_transformers().AutoModelForSemanticSegmentation
        return cls(load_pretrained(kind, name).to(place), preprocessing, source=str(name))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits of uint8 RGB images ``(B, 3, H, W)``: float32 of shape ``(B, C, H, W)``."""
        output = self._model(self._preprocessing(images, _parameter(self._model)))
        logits = find_logits(output)
        if logits.ndim != 4 or len(logits) != len(images):
            raise InputError(
                f"model must answer with logits (B, C, h, w); got {_checks.describe(logits.shape)}"
            )
        return functional.interpolate(
            logits.float(), size=images.shape[-2:], mode="bilinear", align_corners=False
        )

    def annotate(self, images: Sequence[object], batch_size: int = 1) -> list[Tensor]:
        """Logits ``(C, H, W)`` of images of any sizes: tensors, arrays or Pillow images."""
        return in_batches(images, batch_size, self)


@final
class MaskClassAnnotator:
    """Mask2Former, MaskFormer, OneFormer, EoMT: queries, made probabilities by the shared rule.

    Guarantee:
        None; it is what a calibration is for.

    Args:
        model: Answers with ``class_queries_logits`` and ``masks_queries_logits``. It is set to
            eval mode.
        preprocessing: What it sees of an image.
        mode: See :func:`cpseg.annotators.mask_class_probabilities`. ``"none"`` keeps the model's
            classes; the others add a background class.
        background: Where the background goes among the classes (complement, void).
        inputs: Further inputs, the same for every image: OneFormer's ``task_inputs`` ``(1, L)``.
        source: What to call it in a cache or calibration; None: its class's name.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        *,
        mode: Literal["complement", "void", "none"] = "none",
        background: int = 0,
        inputs: Mapping[str, Tensor] | None = None,
        source: str | None = None,
    ) -> None:
        check_network("model", model)
        check_preprocessing(preprocessing)
        self._model = model.eval()
        self._preprocessing = preprocessing
        if mode not in ("complement", "void", "none"):
            raise InputError(f"mode must be complement, void or none; got {mode!r}")
        _checks.check_integer("background", background, 0)
        self._mode: Literal["complement", "void", "none"] = mode
        self._background = background
        if inputs is not None and not isinstance(cast("object", inputs), Mapping):
            raise InputError(f"inputs must map names to tensors; got {_checks.kind_of(inputs)}")
        self._inputs = dict(inputs or {})
        for name, value in self._inputs.items():
            _checks.check_tensor(f"inputs[{name!r}]", value)
        settings = {
            "preprocessing": preprocessing,
            "mode": mode,
            "background": background,
            "inputs": {name: value.tolist() for name, value in self._inputs.items()},
        }
        self.source: str = _source(model, source, settings)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        mode: Literal["complement", "void", "none"] = "none",
        background: int = 0,
        inputs: Mapping[str, Tensor] | None = None,
        preprocessing: Preprocessing | None = None,
        device: torch.device | str = "cpu",
    ) -> "MaskClassAnnotator":
        """From a folder or hub name of a universal segmentation model.

        Args:
            name: The folder or hub name.
            mode: See the class.
            background: See the class.
            inputs: See the class.
            preprocessing: What the model sees of an image; None: as its files say, with sides
                rounded to multiples of 32.
            device: Where it runs.
        """
        place = check_device(device)
        preprocessing = preprocessing or Preprocessing.from_pretrained(name, multiple=32)
        kind = import_transformers().AutoModelForUniversalSegmentation
        return cls(
            load_pretrained(kind, name).to(place),
            preprocessing,
            mode=mode,
            background=background,
            inputs=inputs,
            source=str(name),
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits of uint8 RGB images ``(B, 3, H, W)``: float32 of shape ``(B, C, H, W)``."""
        like = _parameter(self._model)
        pixels = self._preprocessing(images, like)
        further = {
            name: value.to(like.device).expand(len(images), *value.shape[1:])
            for name, value in self._inputs.items()
        }
        output = self._model(pixel_values=pixels, **further)
        for name in ("class_queries_logits", "masks_queries_logits"):
            if getattr(output, name, None) is None:
                raise InputError(
                    f"model must answer with {name}, as Mask2Former, MaskFormer, OneFormer and "
                    f"EoMT do; got {type(output).__name__}"
                )
        return log_probabilities(
            mask_class_probabilities(
                output.class_queries_logits,
                output.masks_queries_logits,
                (int(images.shape[-2]), int(images.shape[-1])),
                mode=self._mode,
                background=self._background,
            )
        )

    def annotate(self, images: Sequence[object], batch_size: int = 1) -> list[Tensor]:
        """Logits ``(C, H, W)`` of images of any sizes: tensors, arrays or Pillow images."""
        return in_batches(images, batch_size, self)


@final
class TextPromptAnnotator:
    """CLIPSeg, SAM 3, GroupViT: classes by their names.

    CLIPSeg and SAM 3 say for each text how sure a pixel is part of it, independently. Those
    shares become probabilities by the complement rule: divided by their sum where that passes 1,
    and the background takes what they leave; without a background, divided by their sum. The
    background is then no prompt, and a class with several texts takes the surest. GroupViT's
    scores compete already: softmax over all texts, the background's among them, and a class's
    texts add up.

    Guarantee:
        None; it is what a calibration is for.

    Args:
        model: A CLIPSeg, SAM 3 or GroupViT model. It is set to eval mode.
        class_names: The C classes in order, or a mapping from a class to its texts.
        preprocessing: What it sees of an image; all three want a square.
        background: Index of the background class, or None.
        tokenizer: Texts to ``input_ids`` and ``attention_mask``, both ``(T, L)``.
        template: What a text is put into, with one ``{}``.
        presence: SAM 3: multiply by the model's own belief that the concept is in the image.
        source: What to call it in a cache or calibration; None: its class's name.
    """

    def __init__(
        self,
        model: nn.Module,
        class_names: ClassNames,
        preprocessing: Preprocessing,
        *,
        background: int | None,
        tokenizer: _Tokenizer,
        template: str = "{}",
        presence: bool = True,
        source: str | None = None,
    ) -> None:
        names, texts = class_prompts(class_names)
        check_background(background, len(names))
        config: Any = getattr(model, "config", None)
        kind = str(getattr(config, "model_type", type(model).__name__))
        if kind not in ("clipseg", "sam3", "groupvit"):
            raise InputError(f"model must be a CLIPSeg, SAM 3 or GroupViT model; got {kind}")
        check_network("model", model)
        check_preprocessing(preprocessing)
        (template,) = check_templates([template])
        prompts = [
            group for place, group in enumerate(texts) if kind == "groupvit" or place != background
        ]
        if not prompts:
            raise InputError("class_names must name a class besides the background; got none")
        self.class_names: tuple[str, ...] = tuple(names)
        self._model: Any = model.eval()
        self._kind = kind
        self._preprocessing = preprocessing
        self._background = background
        self._presence = presence
        self._counts = [len(group) for group in prompts]
        like = _parameter(model)
        flat = [template.replace("{}", text) for group in prompts for text in group]
        ids, mask = _tokens(tokenizer, flat, model)
        self._ids, self._mask = ids.to(like.device), mask.to(like.device)
        self._embeddings: Any = None
        with torch.no_grad():
            if kind == "clipseg":
                network: Any = model
                self._embeddings = network.get_conditional_embeddings(
                    batch_size=len(flat), input_ids=self._ids, attention_mask=self._mask
                )
        settings = {
            "preprocessing": preprocessing,
            "names": names,
            "texts": flat,
            "tokens": [ids.tolist(), mask.tolist()],
            "counts": self._counts,
            "background": background,
            "presence": presence,
        }
        self.source: str = _source(model, source, settings)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        class_names: ClassNames,
        *,
        background: int | None,
        template: str = "{}",
        presence: bool = True,
        preprocessing: Preprocessing | None = None,
        device: torch.device | str = "cpu",
    ) -> "TextPromptAnnotator":
        """From a folder or hub name of a CLIPSeg, SAM 3 or GroupViT model.

        Args:
            name: The folder or hub name.
            class_names: See the class.
            background: See the class.
            template: See the class.
            presence: See the class.
            preprocessing: What the model sees of an image; None: as its files say.
            device: Where it runs.
        """
        package, place = import_transformers(), check_device(device)
        kind = load_pretrained(package.AutoConfig, name).model_type
        classes = {
            "clipseg": "CLIPSegForImageSegmentation",
            "sam3": "Sam3Model",
            "groupvit": "GroupViTModel",
        }
        if kind not in classes:
            raise InputError(f"name must be a CLIPSeg, SAM 3 or GroupViT model; got {kind}")
        preprocessing = preprocessing or Preprocessing.from_pretrained(name)
        tokenize: Any = load_pretrained(package.AutoTokenizer, name)
        model = load_pretrained(getattr(package, classes[kind]), name).to(place)

        def tokenizer(texts: list[str]) -> Mapping[str, Tensor]:
            encoded: Mapping[str, Tensor] = tokenize(
                texts, padding=True, truncation=True, return_tensors="pt"
            )
            return encoded

        return cls(
            model,
            class_names,
            preprocessing,
            background=background,
            tokenizer=tokenizer,
            template=template,
            presence=presence,
            source=str(name),
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits of uint8 RGB images ``(B, 3, H, W)``: float32 of shape ``(B, C, H, W)``."""
        pixels = self._preprocessing(images, _parameter(self._model))
        size = (int(images.shape[-2]), int(images.shape[-1]))
        if self._kind == "groupvit":
            return self._groupvit(pixels, size)
        rows = [
            (self._clipseg if self._kind == "clipseg" else self._sam3)(row[None]) for row in pixels
        ]
        shares = functional.interpolate(
            torch.stack(rows), size=size, mode="bilinear", align_corners=False
        )
        parts = torch.split(shares, self._counts, 1)
        shares = torch.cat([part.amax(1, keepdim=True) for part in parts], 1)
        return log_probabilities(_simplex(shares, self._background))

    def annotate(self, images: Sequence[object], batch_size: int = 1) -> list[Tensor]:
        """Logits ``(C, H, W)`` of images of any sizes: tensors, arrays or Pillow images."""
        return in_batches(images, batch_size, self)

    def _clipseg(self, pixels: Tensor) -> Tensor:
        """Shares of one image ``(T, h, w)``; the image is encoded once for all texts."""
        model = self._model
        seen = model.clip.vision_model(pixel_values=pixels, output_hidden_states=True)
        count = len(self._embeddings)
        layers = [seen.hidden_states[i + 1].expand(count, -1, -1) for i in model.extract_layers]
        logits: Tensor = model.decoder(layers, self._embeddings).logits
        return logits.reshape(count, *logits.shape[-2:]).float().sigmoid()

    def _sam3(self, pixels: Tensor) -> Tensor:
        """Shares of one image ``(T, h, w)``; the image is encoded once for all texts."""
        seen = self._model.get_vision_features(pixel_values=pixels)
        rows: list[Tensor] = []
        for ids, mask in zip(self._ids, self._mask, strict=True):
            output = self._model(vision_embeds=seen, input_ids=ids[None], attention_mask=mask[None])
            share: Tensor = output.semantic_seg[0, 0].float().sigmoid()
            if self._presence:
                share = share * output.presence_logits.flatten()[0].float().sigmoid()
            rows.append(share)
        return torch.stack(rows)

    def _groupvit(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        output = self._model(
            input_ids=self._ids,
            attention_mask=self._mask,
            pixel_values=pixels,
            output_segmentation=True,
        )
        logits = functional.interpolate(
            output.segmentation_logits.float(), size=size, mode="bilinear", align_corners=False
        )
        parts = torch.split(logits, self._counts, 1)
        return torch.stack([part.logsumexp(1) for part in parts], 1).log_softmax(1)


def _tokens(tokenizer: _Tokenizer, texts: list[str], model: nn.Module) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask ``(T, L)`` of texts that the tokenizer tells apart."""
    found: Any = tokenizer(texts)
    for name in ("input_ids", "attention_mask"):
        if not isinstance(found, Mapping) or name not in found:
            raise InputError(
                f"tokenizer must answer with input_ids and attention_mask; got {type(found).__name__} "
                f"without {name}"
            )
    ids, mask = found["input_ids"], found["attention_mask"]
    config: Any = model.config
    check_token_ids(ids, texts, vocabulary=int(config.text_config.vocab_size))
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise InputError(
            f"tokenizer must answer with attention_mask of shape {_checks.describe(ids.shape)}; "
            f"got {_checks.describe(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
        )
    rows = [
        tuple(i for i, kept in zip(row, keep, strict=True) if kept)
        for row, keep in zip(ids.tolist(), mask.tolist(), strict=True)
    ]
    for place, row in enumerate(rows):
        if (first := rows.index(row)) != place:
            raise InputError(
                f"tokenizer must tell texts apart; {texts[first]!r} and {texts[place]!r} have the "
                "same ids"
            )
    return ids, mask


def _simplex(shares: Tensor, background: int | None) -> Tensor:
    """Independent shares ``(B, K, *S)`` to probabilities; the background takes the rest."""
    total = shares.sum(1, keepdim=True)
    if background is None:
        empty = total < torch.finfo(shares.dtype).tiny
        return torch.where(empty, 1 / shares.shape[1], shares / torch.where(empty, 1, total))
    shares = shares / total.clamp(min=1)
    rest = (1 - total).clamp(min=0)
    return torch.cat((shares[:, :background], rest, shares[:, background:]), 1)


def find_logits(output: Any) -> Tensor:
    """The tensor of logits in what a network answered: itself, or under ``logits`` or ``out``."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise InputError(
        "model must answer with a tensor, or with one under 'logits' or 'out'; "
        f"got {type(output).__name__}"
    )


def _parameter(model: nn.Module) -> Tensor:
    """A tensor of the model's dtype and device."""
    return next(model.parameters(), torch.zeros(()))


def _source(model: nn.Module, name: str | None, settings: Mapping[str, object]) -> str:
    if name is not None and not isinstance(cast("object", name), str):
        raise InputError(f"source must be text or None; got {_checks.kind_of(name)}")
    return describe_source(name or type(model).__name__, model, settings)
