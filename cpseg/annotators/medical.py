"""Roads in for medical models: sigmoid channels, nnU-Net's probabilities, NIfTI volumes.

A model with one sigmoid channel, or with channels that overlap, does not choose among classes:
each channel is a question of its own, on or off, and is calibrated as two classes.
"""

import importlib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cpseg import _checks
from cpseg.annotators.huggingface import find_logits
from cpseg.annotators.images import in_batches
from cpseg.annotators.preprocessing import Preprocessing, check_preprocessing
from cpseg.annotators.pretrained import one_line
from cpseg.annotators.source import check_network, describe_source
from cpseg.errors import FileError, InputError, MissingExtraError

__all__ = [
    "SigmoidAnnotator",
    "Volume",
    "channel_values",
    "load_nifti",
    "load_nifti_labels",
    "load_nnunet",
]


@final
@dataclass(frozen=True, eq=False, slots=True)
class Volume:
    """Values on a grid, and the distance between its points.

    Args:
        values: Labels ``(Z, Y, X)``, or probabilities ``(C, Z, Y, X)``.
        spacing: Along Z, Y and X, in the file's unit (millimeters): for margins and boundary
            distances.
    """

    values: Tensor
    spacing: tuple[float, ...]


@final
class SigmoidAnnotator:
    """A network whose L channels are each on or off: two-class logits of every channel.

    One channel gives ``(B, 2, H, W)``, class 1 being "on". L channels, which may overlap, give
    ``(B * L, 2, H, W)``: labels ``(B, L, H, W)`` of 0 and 1 go beside them as
    ``labels.flatten(0, 1)``, with each image's ``unit_ids`` repeated L times and the channel as
    group of a ``GroupCalibrator``.

    Guarantee:
        None; it is what a calibration is for.

    Args:
        model: Pixels ``(B, 3, h, w)`` to values before the sigmoid ``(B, L, h, w)``: a tensor, or
            ``logits`` or ``out`` of what it answers. It is set to eval mode.
        preprocessing: What it sees of an image.
        source: What to call it in a cache or calibration; None: its class's name.
    """

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, *, source: str | None = None
    ) -> None:
        check_network("model", model)
        check_preprocessing(preprocessing)
        self._model = model.eval()
        self._preprocessing = preprocessing
        name = f"{source or type(model).__name__}, sigmoid channels"
        self.source: str = describe_source(name, model, {"preprocessing": preprocessing})

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits of uint8 RGB images ``(B, 3, H, W)``: float32 of shape ``(B * L, 2, H, W)``."""
        like = next(self._model.parameters(), torch.zeros(()))
        values = find_logits(self._model(self._preprocessing(images, like)))
        if values.ndim == 3:
            values = values[:, None]
        if values.ndim != 4 or len(values) != len(images):
            raise InputError(
                "model must answer with values (B, L, h, w) or (B, h, w); "
                f"got {_checks.describe(values.shape)}"
            )
        on = functional.interpolate(
            values.float(), size=images.shape[-2:], mode="bilinear", align_corners=False
        ).flatten(0, 1)
        return torch.stack((torch.zeros_like(on), on), 1)

    def annotate(self, images: Sequence[object]) -> list[Tensor]:
        """Logits of images of any sizes: ``(2, H, W)`` each, ``(L, 2, H, W)`` of L > 1 channels."""
        return in_batches(images, 1, self)


def channel_values(probabilities: Tensor) -> Tensor:
    """What sigmoids were taken of: from saved probabilities of channels that may overlap.

    ``cpseg.logits_from_sigmoid`` makes two-class logits of it.

    Args:
        probabilities: Between 0 and 1. Any shape.

    Returns:
        log p - log(1 - p), at most 87 in size, at least float32. The same shape.

    Examples:
        >>> channel_values(torch.tensor([0.5, 0.75]))
        tensor([0.0000, 1.0986])
    """
    _checks.check_tensor("probabilities", probabilities)
    dtype = torch.promote_types(probabilities.dtype, torch.float32)
    p = probabilities.to(dtype)
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise InputError("probabilities must lie between 0 and 1; some do not")
    return (p.log() - torch.log1p(-p)).clamp(-87, 87)


def load_nnunet(path: str | Path, *, spacing: Sequence[float] | None = None) -> Volume:
    """Probabilities that nnU-Net saved beside a prediction (``--save_probabilities``).

    The axes are nnU-Net's: Z, Y, X, the reverse of the NIfTI file's. The pickle that nnU-Net
    writes beside is not opened, since opening it would run what it says; the spacing comes from
    the prediction's NIfTI file of the same name, or from you.

    Args:
        path: The ``.npz`` file, with ``probabilities`` (version 2) or ``softmax`` (version 1).
        spacing: Along Z, Y and X; None: from the ``.nii.gz`` or ``.nii`` beside (extra
            ``nifti``).

    Returns:
        Probabilities ``(C, Z, Y, X)`` and their spacing. For a model with regions, whose
        channels overlap, see :func:`channel_values`; otherwise
        ``cpseg.logits_from_probabilities`` takes ``volume.values[None]``.

    Raises:
        FileError: The file is damaged or holds no probabilities, no spacing is to be found, or
            the NIfTI file beside it has another grid.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as content:
            name = next((n for n in ("probabilities", "softmax") if n in content.files), None)
            array = None if name is None else np.asarray(content[name])
    except FileNotFoundError:
        raise
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError, TypeError) as error:
        raise FileError(
            f"{path} must be nnU-Net's saved probabilities; {one_line(error)}"
        ) from error
    if array is None or array.ndim != 4 or array.dtype.kind != "f":
        found = "none" if array is None else f"{array.dtype} {array.shape}"
        raise FileError(f"{path} must hold float probabilities (C, Z, Y, X); it holds {found}")
    if spacing is None:
        beside = [path.with_suffix(suffix) for suffix in (".nii.gz", ".nii")]
        found_path = next((p for p in beside if p.exists()), None)
        if found_path is None:
            raise FileError(
                f"{path} must have its spacing in {beside[0].name} beside it, or as spacing="
            )
        beside_array, spacing = _read_nifti(found_path)
        if beside_array.shape != array.shape[1:]:
            raise FileError(
                f"{path} must have the grid of {found_path.name} beside it, {beside_array.shape}; "
                f"it has {array.shape[1:]}"
            )
    if not array.size or not bool(np.isfinite(array).all()):
        raise FileError(f"{path} must hold finite probabilities; it holds none, or NaN or infinity")
    lengths = list(spacing) if hasattr(spacing, "__len__") else []
    if len(lengths) != 3 or not all(_checks.is_number(v) and 0 < v < inf for v in lengths):
        raise InputError(f"spacing must be three positive lengths; got {spacing!r}")
    return Volume(torch.from_numpy(array), tuple(float(length) for length in lengths))


def load_nifti(path: str | Path) -> Volume:
    """A NIfTI volume (extra ``nifti``): int64 where the file stores integers, else float32.

    For labels take :func:`load_nifti_labels`: many tools write them as floats.

    Args:
        path: A ``.nii`` or ``.nii.gz`` file.

    Returns:
        Values ``(Z, Y, X)``, the reverse of the file's axes and nnU-Net's order, and the spacing
        along these axes.

    Raises:
        FileError: The file is damaged, no volume of three axes, or its spacing is no positive
            number.
    """
    array, spacing = _read_volume(Path(path))
    whole = array.dtype.kind in "iu"
    return Volume(torch.from_numpy(array.astype(np.int64 if whole else np.float32)), spacing)


def load_nifti_labels(path: str | Path) -> Volume:
    """The labels in a NIfTI volume (extra ``nifti``), stored as integers or as whole floats.

    Args:
        path: A ``.nii`` or ``.nii.gz`` file.

    Returns:
        int64 labels ``(Z, Y, X)`` and spacing, as :func:`load_nifti`.

    Raises:
        FileError: As :func:`load_nifti`, or a value is no whole number.
    """
    array, spacing = _read_volume(Path(path))
    if array.dtype.kind not in "iu":
        wrong = array[~((array == np.floor(array)) & (np.abs(array) < 2**31))]  # NaN too
        if wrong.size:
            raise FileError(
                f"{path} must hold labels, whole numbers; {wrong.size} of its values are none, "
                f"such as {wrong[0]}"
            )
    return Volume(torch.from_numpy(array.astype(np.int64)), spacing)


def _read_volume(path: Path) -> tuple[Any, tuple[float, ...]]:
    array, spacing = _read_nifti(path)
    if array.ndim != 3:
        raise FileError(f"{path} must be a volume of three axes; it has {array.ndim}")
    if array.dtype.kind not in "iuf":
        raise FileError(f"{path} must hold real numbers; it holds {array.dtype}")
    return array, spacing


def _read_nifti(path: Path) -> tuple[Any, tuple[float, ...]]:
    try:
        nibabel: Any = importlib.import_module("nibabel")
    except ImportError as error:
        raise MissingExtraError("NIfTI files need nibabel: pip install 'cpseg[nifti]'") from error
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        image = nibabel.load(path)
        with nibabel.openers.ImageOpener(path) as file:
            # Unchecked: checking sets a distance of 0 to 1 and takes the size of a negative one.
            header = type(image.header).from_fileobj(file, check=False)
        scaled = image.dataobj.slope != 1 or image.dataobj.inter != 0
        array = np.asarray(image.dataobj) if scaled else np.asarray(image.dataobj.get_unscaled())
        lengths = [float(length) for length in header["pixdim"][1 : 1 + array.ndim]]
    except Exception as error:  # nibabel raises many kinds for a damaged file
        raise FileError(f"{path} must be a NIfTI volume; {one_line(error)}") from error
    spacing = tuple(reversed(lengths))
    if not all(0 < length < inf for length in spacing):
        raise FileError(f"{path} must have positive distances between voxels; it has {spacing}")
    return array.transpose(), spacing
