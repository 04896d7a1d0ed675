"""A plug for the training loops people already have.

Three hooks: labels on disk that another project's loader reads as masks
(:class:`PseudoLabelStore`), labels merged with a network's own just before they are mixed
(:func:`~cpseg.training.targets.merge_pseudo_labels`), and labels made on the crop itself
(:class:`OnlineAnnotator`).
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, cast, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.calibration import Calibration
from cpseg.errors import FileError, InputError, MissingExtraError
from cpseg.protocols import Annotator
from cpseg.training.batches import Normalize

__all__ = ["OnlineAnnotator", "PseudoLabelStore", "confidence_thresholds"]

_FORMAT = "cpseg pseudo-labels"
_VERSION = 1


@final
@dataclass(frozen=True, slots=True)
class PseudoLabelStore:
    """Filtered labels in a folder: one gray PNG per image, and a manifest of how they came about.

    A pixel's value is its class, or 255 where the filter abstained. Values from 254 up are no
    class: training loops of the UniMatch family pad with 254.

    Guarantee:
        None for the labels. The manifest holds the calibration's own statement about its sets.

    Args:
        root: The folder; :meth:`create` makes one.

    Attributes:
        manifest: What :meth:`create` was told, in plain JSON.

    Raises:
        FileError: If there is no manifest, or one that this cpseg does not know.
    """

    root: str | os.PathLike[str]
    manifest: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        path = Path(self.root) / "manifest.json"
        try:
            content: Any = json.loads(path.read_text("utf-8"))
        except FileNotFoundError as error:
            raise FileError(f"{path} must exist; got none. Make it with create") from error
        except ValueError as error:
            raise FileError(f"{path} is no manifest, or is damaged: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise FileError(f"{path} is no manifest of pseudo-labels")
        known = cast("dict[str, Any]", content)
        if known.get("version") != _VERSION:
            raise FileError(
                f"{path} has version {known.get('version')}; this cpseg reads version {_VERSION}"
            )
        object.__setattr__(self, "manifest", known)

    @classmethod
    def create(
        cls,
        root: str | os.PathLike[str],
        calibration: Calibration,
        *,
        classes: Sequence[str],
        model: str,
        split: str,
    ) -> "PseudoLabelStore":
        """Make an empty store.

        Args:
            root: A folder that does not exist, or is empty.
            calibration: What the filter stands on.
            classes: The name of each class, in order; fewer than 254.
            model: Which annotator made the logits.
            split: Which images were labeled, by the name of their split.

        Raises:
            InputError: If the folder holds something, or the classes do not fit.
        """
        place = Path(root)
        if place.exists() and any(place.iterdir()):
            raise InputError(f"root must be an empty folder; got {place}, which holds something")
        if not 1 <= len(classes) < 254:
            raise InputError(f"classes must be fewer than 254 names; got {len(classes)}")
        if calibration.num_classes not in (None, len(classes)):
            raise InputError(
                f"classes must be the calibration's {calibration.num_classes}; got {len(classes)}"
            )
        if calibration.ignore_index != 255:
            raise InputError(
                f"calibration must have ignore_index 255, the value of an abstained pixel; "
                f"got {calibration.ignore_index}"
            )
        place.mkdir(parents=True, exist_ok=True)
        alpha = calibration.alpha
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "alpha": list(alpha) if isinstance(alpha, tuple) else alpha,
            "score": repr(calibration.score),
            "guarantee": str(calibration.guarantee),
            "model": model,
            "classes": list(classes),
            "split": split,
        }
        _replace(place / "manifest.json", json.dumps(manifest, indent=2).encode())
        return cls(place)

    def path(self, name: str) -> Path:
        """Where the labels of the image ``name`` are, written or not.

        Args:
            name: A relative path without its suffix, such as ``"2007_000032"``.

        Raises:
            InputError: If ``name`` leaves the folder.
        """
        parts = PurePosixPath(name)
        if not name or parts.is_absolute() or ".." in parts.parts:
            raise InputError(f"name must be a relative path inside the store; got {name!r}")
        return Path(self.root) / f"{name}.png"

    def write(self, name: str, labels: Tensor) -> None:
        """Keep the labels of an image, whole or not at all.

        Args:
            name: See :meth:`path`.
            labels: Classes, 255 where abstained. Integer ``(H, W)``.

        Raises:
            InputError: If the labels have another shape, or a value is no class.
        """
        _checks.check_integers("labels", labels)
        if labels.ndim != 2 or 0 in labels.shape:
            raise InputError(
                f"labels must have shape (H, W), not empty; got {_checks.describe(labels.shape)}"
            )
        known = labels[labels != 255]
        classes = len(self.manifest["classes"])
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < classes:
            raise InputError(
                f"labels must be classes in [0, {classes}) or 255; "
                f"got {int(known.min())} to {int(known.max())}"
            )
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        image = _pillow().fromarray(labels.to("cpu", torch.uint8).contiguous().numpy())
        beside = path.with_suffix(".part")
        with beside.open("wb") as file:
            image.save(file, format="PNG")
        beside.replace(path)

    def load(self, name: str) -> Tensor:
        """The labels of an image. uint8 ``(H, W)``.

        Raises:
            FileError: If the file is missing or damaged, or no gray picture.
        """
        path = self.path(name)
        try:
            with _pillow().open(path) as image:
                if image.mode != "L":
                    raise FileError(f"{path} must be a gray picture of 8 bits; got {image.mode}")
                data = image.tobytes()
                width, height = cast("tuple[int, int]", image.size)
        except OSError as error:
            raise FileError(f"{path} is missing or damaged: {error}") from error
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(height, width)

    def names(self) -> list[str]:
        """The names of all images with labels, sorted."""
        root = Path(self.root)
        return sorted(
            path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.png")
        )

    def write_split(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> int:
        """Write a split file that points at the filtered masks, for a loader of the UniMatch family.

        Each line of ``source`` names an image, and perhaps a mask. The line of ``target`` names
        the image and the store's mask by its absolute path, which such loaders accept. The mask's
        name in the store is the image's file name without its suffix.

        Args:
            source: One- or two-column split file.
            target: Where to write.

        Returns:
            How many lines were written.

        Raises:
            FileError: If a mask is missing; all of them are named.
            InputError: If the store's path has a space, on which such loaders split lines.
        """
        root = Path(self.root).resolve()
        if " " in str(root):
            raise InputError(f"root must be a path without spaces; got {root}")
        lines: list[str] = []
        missing: list[str] = []
        for line in Path(source).read_text("utf-8").splitlines():
            if not line.strip():
                continue
            image = line.split(" ")[0]
            mask = root / f"{PurePosixPath(image).stem}.png"
            if not mask.exists():
                missing.append(mask.name)
            lines.append(f"{image} {mask}\n")
        if missing:
            raise FileError(
                f"{root} must hold a mask for every image of {source}; "
                f"got none for {len(missing)}: {', '.join(missing)}"
            )
        _replace(Path(target), "".join(lines).encode())
        return len(lines)


@final
@dataclass(frozen=True, eq=False, slots=True)
class OnlineAnnotator:
    """A frozen annotator and its filter on the crop that the student sees.

    Guarantee:
        None for the labels; and the calibration's own holds for crops only if it was computed on
        crops like these.

    Attributes:
        annotator: Images to logits ``(B, C, H, W)``; called without gradients, in evaluation mode
            if it is a module.
        keep: Logits to labels, 255 where it abstains: a filter.
        normalize: What was done to the student's images; undone first.
        scale: Highest value of an annotator's images that are floats; None: it takes uint8, as
            all of :mod:`cpseg.annotators` do.
        chunk: How many images it sees at once.
    """

    annotator: Annotator
    keep: Callable[[Tensor], Tensor]
    normalize: Normalize = Normalize()
    scale: float | None = None
    chunk: int = 4

    def __post_init__(self) -> None:
        _checks.check_integer("chunk", self.chunk, 1)
        if isinstance(self.annotator, torch.nn.Module):
            self.annotator.eval()

    def __call__(self, images: Tensor) -> Tensor:
        """Labels of normalized images ``(B, 3, H, W)``. int64 ``(B, H, W)``.

        Raises:
            InputError: If the annotator's logits are not of the images' size.
        """
        found: list[Tensor] = []
        with torch.no_grad():
            for part in torch.split(images, self.chunk) if len(images) else ():
                shown = self.normalize.undo(part).clamp(0, 1) * (self.scale or 255)
                logits = self.annotator(
                    shown.round().to(torch.uint8) if self.scale is None else shown
                )
                _checks.check_logits(logits)
                if logits.shape[2:] != images.shape[2:]:
                    raise InputError(
                        f"annotator must return logits of {_checks.describe(images.shape[2:])}; "
                        f"got {_checks.describe(logits.shape)}"
                    )
                found.append(self.keep(logits).long())
        return torch.cat(found) if found else images.new_empty(images[:, 0].shape).long()


def confidence_thresholds(calibration: Calibration, num_classes: int) -> Tensor:
    """A softmax confidence per class, in place of one fixed number such as 0.95.

    With the score ``1 - p`` a class is in the set where its probability ``p`` reaches one minus
    its threshold. A class without a finite threshold gets 2: nothing is confident enough.

    Guarantee:
        What ``calibration`` guarantees, no more: thresholds of a coverage calibration bound how
        often the truth is lost, those of a controlled kept error bound how often a kept label is
        wrong. Calibrate on labels that the network did not train on.

    Args:
        calibration: With the score :class:`~cpseg.scores.LAC`, and one threshold for all or one
            per class.
        num_classes: Number of classes, C.

    Returns:
        float32 ``(C,)``; use it as ``confidence >= thresholds[labels]``.

    Raises:
        InputError: If the calibration has another score or other axes.
    """
    if type(calibration.score).__name__ != "LAC" or calibration.axes not in ((), ("class",)):
        raise InputError(
            "calibration must have the score LAC and one threshold for all or one per class; "
            f"got {calibration.score!r} with axes {calibration.axes}"
        )
    if calibration.axes and len(calibration.thresholds) != num_classes:
        raise InputError(
            f"num_classes must be the calibration's {len(calibration.thresholds)}; "
            f"got {num_classes}"
        )
    limit = torch.where(calibration.thresholds.isfinite(), 1 - calibration.thresholds, 2.0)
    return limit.expand(num_classes).clone()


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content)
    beside.replace(path)


def _pillow() -> Any:
    try:
        return import_module("PIL.Image")
    except ImportError as error:
        raise MissingExtraError("masks on disk need Pillow; install it with cpseg[data]") from error
