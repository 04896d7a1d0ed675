"""PASCAL VOC 2012 with the masks of SBD: 10,582 training images, and the published splits."""

import os
import zlib
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from cpseg.data.folder import SegmentationFolder, read_mask
from cpseg.data.splits import check_part, published_split
from cpseg.errors import FileError

__all__ = ["voc2012"]


def voc2012(
    root: str | os.PathLike[str],
    part: Literal["labeled", "unlabeled", "validation"],
    *,
    split: str = "92",
    masks: str = "SegmentationClassAug",
    sbd: str | os.PathLike[str] | None = None,
) -> SegmentationFolder:
    """A part of PASCAL VOC 2012, with the additional masks of SBD.

    21 classes; background is 0 and outlines are 255. The unlabeled images are the 10,582 training
    images without the split's labeled ones; they open no mask.

    Args:
        root: The folder ``VOC2012`` that holds ``JPEGImages`` and the masks.
        part: Which images.
        split: Which images have labels: ``"92"``, ``"183"``, ``"366"``, ``"732"`` and ``"1464"``
            are VOC's own training images, the others draw from SBD's too; see
            :func:`~cpseg.data.published_splits`.
        masks: The folder of masks, one PNG per image, gray or with a palette. VOC's own, in
            ``SegmentationClass``, suffice for the five splits above and for validation.
        sbd: The folder ``dataset`` of SBD's release, for those without a folder of all masks: its
            ``cls/*.mat`` are read for the images that are not VOC's own, and ``masks`` should be
            ``"SegmentationClass"``. SBD marks no outlines. None: ``masks`` holds them all.

    Raises:
        InputError: If there is no such split or part.

    Examples:
        >>> labeled, unlabeled = (voc2012("VOC2012", part) for part in ("labeled", "unlabeled"))
        >>> len(labeled), len(unlabeled)
        (92, 10490)
    """
    check_part(part)
    names = published_split("voc2012", "val" if part == "validation" else split)
    if part == "unlabeled":
        names = sorted(set(published_split("voc2012", "train_aug")) - set(names))
    folder = SegmentationFolder(
        root=root,
        pairs=[
            (f"JPEGImages/{name}.jpg", None if part == "unlabeled" else f"{masks}/{name}.png")
            for name in names
        ],
        num_classes=21,
    )
    if sbd is None or part == "unlabeled":
        return folder
    theirs = set(published_split("voc2012", "train_aug")) - set(published_split("voc2012", "1464"))
    labels = _OfBoth(Path(root) / masks, Path(sbd), frozenset(theirs))
    return replace(folder, load_labels=labels)


@final
@dataclass(frozen=True, slots=True)
class _OfBoth:
    """Labels by name, from VOC's own picture or else from SBD's file."""

    masks: Path
    sbd: Path
    theirs: frozenset[str]

    def __call__(self, name: str) -> Tensor:
        if name not in self.theirs:
            return read_mask(self.masks / f"{name}.png")
        io: Any = import_module("scipy.io")  # here, since few need it and it loads slowly
        # What a file that is not SBD's, or is cut short, raises on its way through scipy.
        wrong = (OSError, ValueError, KeyError, IndexError, TypeError, zlib.error)
        path = self.sbd / "cls" / f"{name}.mat"
        try:
            content: Any = io.loadmat(str(path))
            return torch.from_numpy(content["GTcls"][0, 0]["Segmentation"]).long()
        except FileNotFoundError as error:
            raise FileError(f"{path} is missing") from error
        except (*wrong, io.matlab.MatReadError) as error:
            raise FileError(f"{path} is damaged or not of SBD: {error}") from error
