"""Models of Hugging Face's transformers as annotators (extra ``hf``; torchvision never needed).

Logits come from the models' raw outputs. Their post-processors are no road to a calibration:
one returns logits, another sums over queries, a third sigmoids, and some resize in between.
Images are resized and normalised here, because several of their processors need torchvision.

A model that is already built needs no transformers at all: give it with its
:class:`Preprocessing`. ``from_pretrained`` takes a folder or a hub name.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from cpseg import _checks
from cpseg.annotators.images import check_images, in_batches, resize, short_side
from cpseg.annotators.mask_class import log_probabilities, mask_class_probabilities
from cpseg.annotators.seem.text import ClassNames, class_prompts
from cpseg.annotators.source import describe_source
from cpseg.errors import FileError, InputError, MissingExtraError

__all__ = [
    "MaskClassAnnotator",
    "Preprocessing",
    "SemanticLogitsAnnotator",
    "TextPromptAnnotator",
    "find_logits",
]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_Tokenizer = Callable[[list[str]], Mapping[str, Tensor]]


@final
@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What a network sees of an image: its size and its normalisation.

    Args:
        size: Height and width; None: by ``short``, or else the image's own.
        short: Shorter side, the other in proportion.
        longest: Most of the longer side.
        multiple: Both sides are rounded to a multiple of this; nothing is padded.
        mean: Of each channel, on the scale 0 to 1.
        std: Of each channel, on the scale 0 to 1.
        mode: Filter of the resize; antialiased, on bytes.

    Examples:
        >>> Preprocessing(short=64, multiple=32).seen((50, 75))
        (64, 96)
    """

    size: tuple[int, int] | None = None
    short: int | None = None
    longest: int | None = None
    multiple: int = 1
    mean: tuple[float, float, float] = _IMAGENET[0]
    std: tuple[float, float, float] = _IMAGENET[1]
    mode: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.size is not None and self.short is not None:
            raise InputError("size must be None where short is given; got both")
        _checks.check_integer("multiple", self.multiple, 1)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, multiple: int = 1) -> "Preprocessing":
        """From the ``preprocessor_config.json`` of a folder or of a hub name.

        Args:
            name: The folder or hub name.
            multiple: See the class.
        """
        path = Path(name) / "preprocessor_config.json"
        if not path.exists():
            found = _transformers().utils.cached_file(str(name), "preprocessor_config.json")
            path = Path(str(found))
        try:
            config: dict[str, Any] = json.loads(path.read_text())
            return cls._of(config, multiple)
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"{path} must describe an image's size and normalisation: {error}"
            ) from error

    @classmethod
    def _of(cls, config: dict[str, Any], multiple: int) -> "Preprocessing":
        given = config.get("size") if config.get("do_resize", True) else None
        size: tuple[int, int] | None = None
        short = longest = None
        if isinstance(given, int):
            size = (given, given)
        elif given and "height" in given:
            size = (int(given["height"]), int(given["width"]))
        elif given:
            short, longest = given.get("shortest_edge"), given.get("longest_edge")
            if short is None:
                # Only a longest edge: the model's own square, as SAM pads to it.
                size, longest = (int(longest), int(longest)), None
        normal = config.get("do_normalize", True)
        mean = config.get("image_mean", _IMAGENET[0]) if normal else (0.0, 0.0, 0.0)
        std = config.get("image_std", _IMAGENET[1]) if normal else (1.0, 1.0, 1.0)
        return cls(
            size=size,
            short=short,
            longest=longest,
            multiple=multiple,
            mean=(float(mean[0]), float(mean[1]), float(mean[2])),
            std=(float(std[0]), float(std[1]), float(std[2])),
            mode="bicubic" if config.get("resample") == 3 else "bilinear",
        )

    def seen(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that the network gets for an image's."""
        if self.size is not None:
            height, width = self.size
        elif self.short is not None:
            height, width = short_side(size, self.short, self.longest)
        else:
            height, width = size
        m = self.multiple
        return max(m, round(height / m) * m), max(m, round(width / m) * m)

    def __call__(self, images: Tensor, like: Tensor) -> Tensor:
        """Normalised pixels, with the dtype and on the device of ``like``.

        Args:
            images: uint8 RGB. Shape ``(B, 3, H, W)``.
            like: A parameter of the network.

        Returns:
            Shape ``(B, 3, h, w)``.
        """
        check_images(images)
        seen = self.seen((int(images.shape[-2]), int(images.shape[-1])))
        pixels = resize(images, seen, self.mode).to(like.device, torch.float32) / 255
        mean, std = (
            torch.tensor(v, device=like.device)[:, None, None] for v in (self.mean, self.std)
        )
        return ((pixels - mean) / std).to(like.dtype)


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
        self._model = model.eval()
        self._preprocessing = preprocessing
        self.source: str = _source(model, source, {"preprocessing": preprocessing})

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: torch.device | str = "cpu"
    ) -> "SemanticLogitsAnnotator":
        """From a folder or hub name of a semantic segmentation model."""
        model = _transformers().AutoModelForSemanticSegmentation.from_pretrained(str(name))
        model = model.to(device)
        return cls(model, Preprocessing.from_pretrained(name), source=str(name))

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
        self._model = model.eval()
        self._preprocessing = preprocessing
        self._mode: Literal["complement", "void", "none"] = mode
        self._background = background
        self._inputs = dict(inputs or {})
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
        device: torch.device | str = "cpu",
    ) -> "MaskClassAnnotator":
        """From a folder or hub name of a universal segmentation model."""
        model = _transformers().AutoModelForUniversalSegmentation.from_pretrained(str(name))
        model = model.to(device)
        preprocessing = Preprocessing.from_pretrained(name, multiple=32)
        return cls(
            model, preprocessing, mode=mode, background=background, inputs=inputs, source=str(name)
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
        if background is not None and not 0 <= background < len(names):
            raise InputError(
                f"background must be an index of class_names, in [0, {len(names)}), or None; "
                f"got {background}"
            )
        config: Any = getattr(model, "config", None)
        kind = str(getattr(config, "model_type", type(model).__name__))
        if kind not in ("clipseg", "sam3", "groupvit"):
            raise InputError(f"model must be a CLIPSeg, SAM 3 or GroupViT model; got {kind}")
        if template.count("{}") != 1:
            raise InputError(f"template must hold one {{}}; got {template!r}")
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
        flat = [template.format(text) for group in prompts for text in group]
        tokens = tokenizer(flat)
        self._ids = tokens["input_ids"].to(like.device)
        self._mask = tokens["attention_mask"].to(like.device)
        self._embeddings: Any = None
        with torch.no_grad():
            if kind == "clipseg":
                network: Any = model
                self._embeddings = network.get_conditional_embeddings(
                    batch_size=len(flat), input_ids=self._ids, attention_mask=self._mask
                )
        settings = {
            "preprocessing": preprocessing,
            "texts": flat,
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
        device: torch.device | str = "cpu",
    ) -> "TextPromptAnnotator":
        """From a folder or hub name of a CLIPSeg, SAM 3 or GroupViT model."""
        package = _transformers()
        kind = package.AutoConfig.from_pretrained(str(name)).model_type
        classes = {
            "clipseg": "CLIPSegForImageSegmentation",
            "sam3": "Sam3Model",
            "groupvit": "GroupViTModel",
        }
        if kind not in classes:
            raise InputError(f"name must be a CLIPSeg, SAM 3 or GroupViT model; got {kind}")
        model = getattr(package, classes[kind]).from_pretrained(str(name)).to(device)
        tokenize: Any = package.AutoTokenizer.from_pretrained(str(name))

        def tokenizer(texts: list[str]) -> Mapping[str, Tensor]:
            encoded: Mapping[str, Tensor] = tokenize(
                texts, padding=True, truncation=True, return_tensors="pt"
            )
            return encoded

        return cls(
            model,
            class_names,
            Preprocessing.from_pretrained(name),
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
    return describe_source(name or type(model).__name__, model, settings)


def _transformers() -> Any:
    try:
        import transformers  # noqa: PLC0415  (optional)
    except ImportError as error:
        raise MissingExtraError(
            "from_pretrained needs transformers: pip install 'cpseg[hf]'"
        ) from error
    return transformers
