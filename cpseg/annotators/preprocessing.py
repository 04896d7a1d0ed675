"""What a network sees of an image: resized as bytes, then normalized, without torchvision.

The files that say so in transformers' folders are read strictly: a setting that would change
pixels and is not done here is refused by name.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, lcm
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.annotators.images import check_images, check_size, resize, short_side
from cpseg.annotators.pretrained import import_transformers, one_line
from cpseg.errors import FileError, InputError

__all__ = ["Preprocessing", "check_preprocessing"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_MODES: dict[object, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # Pillow's

# Settings that are carried out.
_DONE = {
    "crop_size", "do_center_crop", "do_flip_channel_order", "do_normalize", "do_pad",
    "do_reduce_labels", "do_rescale", "do_resize", "ensure_multiple_of", "image_mean", "image_std",
    "max_size", "reduce_labels", "resample", "rescale_factor", "size", "size_divisibility",
    "size_divisor",
}  # fmt: skip
# Settings that change nothing about the pixels of an RGB image.
_OTHERWISE = {
    "_valid_processor_keys", "auto_map", "class_info_file", "data_format", "default_to_square",
    "device", "disable_grouping", "do_convert_rgb", "feature_extractor_type", "ignore_index",
    "image_processor_type", "image_seq_length", "input_data_format", "mask_pad_size", "mask_size",
    "metadata", "num_labels", "num_text", "processor_class", "repo_path", "return_tensors",
}  # fmt: skip


@final
@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What a network sees of an image: its size and its normalization.

    Args:
        size: Height and width; None: by ``short``, or else the image's own.
        short: Shorter side, the other in proportion.
        longest: Most of the longer side.
        multiple: Both sides are rounded to a multiple of this; nothing is padded.
        mean: Of each channel, red first, on the scale 0 to 1.
        std: Of each channel, red first, on the scale 0 to 1.
        mode: Filter of the resize; antialiased, on bytes.
        bgr: Blue comes first, as MobileViT was trained.
        reduce_labels: The network's class c is the data's label c + 1, and the data's label 0 is
            none of its classes, as in ADE20K. Pixels are unaffected; labels are yours to lower.

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
    bgr: bool = False
    reduce_labels: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and self.short is not None:
            raise InputError("size must be None where short is given; got both")
        if self.size is not None:
            check_size("size", self.size)
        for name in ("short", "longest"):
            if getattr(self, name) is not None:
                _checks.check_integer(name, getattr(self, name), 1)
        if self.longest is not None and self.short is None:
            raise InputError("short must be given where longest is; got None")
        _checks.check_integer("multiple", self.multiple, 1)
        if self.mode not in _MODES.values():
            raise InputError(f"mode must be 'bilinear' or 'bicubic'; got {self.mode!r}")
        for name in ("mean", "std"):
            values: Sequence[Any] = getattr(self, name)
            if (
                not isinstance(values, (tuple, list))
                or len(values) != 3
                or not all(isinstance(v, (int, float)) and isfinite(v) for v in values)
            ):
                raise InputError(f"{name} must hold three numbers; got {values!r}")
        if not min(self.std) > 0:
            raise InputError(f"std must be greater than 0; got {self.std}")

    @classmethod
    def from_pretrained(cls, name: str | Path, *, multiple: int = 1) -> "Preprocessing":
        """From the files of a folder or of a hub name.

        ``processor_config.json`` is read where it says what is done to images (transformers 5),
        else ``preprocessor_config.json``. Two things are done in another way than there, since
        every pixel needs a class: nothing is padded, sides are rounded to the multiple instead;
        and nothing is cropped, the whole image is resized to the size of the crop.

        Args:
            name: The folder or hub name.
            multiple: See the class; a multiple that the file asks for holds too.

        Raises:
            FileError: There is no such file, it is damaged, or it asks for something that is not
                done here, which the message names.
        """
        path, config = _find(name)
        try:
            return cls._of(config, multiple)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(
                f"{path} must describe an image's size and normalization; {one_line(error)}. "
                "A Preprocessing of your own, as preprocessing=, takes its place"
            ) from error

    @classmethod
    def _of(cls, config: Mapping[str, Any], multiple: int) -> "Preprocessing":
        unknown = sorted(
            key
            for key in config
            if key not in _DONE | _OTHERWISE and config[key] not in (None, False)
        )
        if unknown:
            raise InputError(f"not known here: {unknown[0]} = {config[unknown[0]]!r}")
        divisor = config.get("size_divisor") or config.get("size_divisibility") or 1
        if config.get("do_pad") and divisor == 1:
            raise InputError("padding (do_pad) is not done here")
        size, short, longest = _sizes(config)
        # A processor that flips channels is MobileViT's, which does not normalize unless it says.
        normal = config.get("do_normalize", "do_flip_channel_order" not in config)
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if normal:
            mean, std = _three("image_mean", config), _three("image_std", config)
        # Here bytes are divided by 255; another factor moves mean and std instead.
        factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1
        if factor != 1 / 255:
            red, green, blue = (value / (255 * factor) for value in mean)
            mean = (red, green, blue)
            red, green, blue = (value / (255 * factor) for value in std)
            std = (red, green, blue)
        bgr = bool(config.get("do_flip_channel_order"))
        if bgr and normal:
            raise InputError("do_normalize with do_flip_channel_order is not done here")
        code = config.get("resample", 2)
        if code not in _MODES:
            raise InputError(f"resample must be 2 (bilinear) or 3 (bicubic); got {code!r}")
        return cls(
            size=size,
            short=short,
            longest=longest,
            multiple=lcm(multiple, int(divisor), int(config.get("ensure_multiple_of") or 1)),
            mean=mean,
            std=std,
            mode=_MODES[code],
            bgr=bgr,
            reduce_labels=bool(config.get("do_reduce_labels") or config.get("reduce_labels")),
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
        """Normalized pixels, with the dtype and on the device of ``like``.

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
        pixels = ((pixels - mean) / std).to(like.dtype)
        return pixels.flip(1) if self.bgr else pixels


def check_preprocessing(value: object) -> None:
    """Refuse what is no :class:`Preprocessing`."""
    if not isinstance(value, Preprocessing):
        raise InputError(f"preprocessing must be a Preprocessing; got {_checks.kind_of(value)}")


def _find(name: str | Path) -> tuple[Path, Mapping[str, Any]]:
    """The file that says what is done to images, and what it says."""
    for file in ("processor_config.json", "preprocessor_config.json"):
        path = _locate(name, file)
        if path is None:
            continue
        try:
            config: Any = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FileError(f"{path} must be a JSON file; {one_line(error)}") from error
        if not isinstance(config, Mapping):
            raise FileError(f"{path} must hold settings by name; it holds {config!r:.40}")
        if file == "preprocessor_config.json":
            return path, config
        if isinstance(config.get("image_processor"), Mapping):
            return path, config["image_processor"]
    raise FileError(
        f"{name} must be a folder or reachable hub name with a preprocessor_config.json, or a "
        "processor_config.json with an image_processor; there is none"
    )


def _locate(name: str | Path, file: str) -> Path | None:
    if Path(name).exists():  # what a folder of the user's lacks is not on a hub
        return Path(name) / file if (Path(name) / file).is_file() else None
    try:
        found = import_transformers().utils.cached_file(
            str(name), file, _raise_exceptions_for_missing_entries=False
        )
    except (OSError, ValueError) as error:
        raise FileError(
            f"{name} must be a folder or reachable hub name; {one_line(error)}"
        ) from error
    return None if found is None else Path(str(found))


def _sizes(
    config: Mapping[str, Any],
) -> tuple[tuple[int, int] | None, int | None, int | None]:
    """Size, shorter side and longest side that a file asks for."""
    if config.get("do_center_crop"):
        return _square(config["crop_size"]), None, None
    given = config.get("size") if config.get("do_resize", True) else None
    if given is None:
        return None, None, None
    if config.get("max_size") is not None:  # before sizes were mappings
        short = given["shortest_edge"] if isinstance(given, Mapping) else given
        return None, int(short), int(config["max_size"])
    if isinstance(given, Mapping) and "shortest_edge" in given:
        return None, int(given["shortest_edge"]), given.get("longest_edge")
    return _square(given), None, None


def _square(given: Any) -> tuple[int, int]:
    """Height and width of a mapping, or of one number."""
    if isinstance(given, Mapping):
        if "height" not in given or "width" not in given:
            raise InputError(
                f"size must have height and width, or shortest_edge; got {dict(given)}"
            )
        return int(given["height"]), int(given["width"])
    return int(given), int(given)


def _three(name: str, config: Mapping[str, Any]) -> tuple[float, float, float]:
    values: Any = config.get(name)
    if not isinstance(values, Sequence) or len(values) != 3:
        raise InputError(f"{name} must hold three numbers; got {values!r}")
    return float(values[0]), float(values[1]), float(values[2])
