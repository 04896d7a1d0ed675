"""Cityscapes: 19 classes from its 34 ids, and the published splits."""

import os
from types import MappingProxyType
from typing import Literal

from cpseg.data.folder import SegmentationFolder
from cpseg.data.splits import check_part, published_split

__all__ = ["CITYSCAPES_IDS", "cityscapes"]

_EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

CITYSCAPES_IDS: MappingProxyType[int, int] = MappingProxyType(
    {id_: class_ for class_, id_ in enumerate(_EVALUATED)}
)
"""The class, from road to bicycle, of each id in ``*_labelIds.png`` that is evaluated."""


def cityscapes(
    root: str | os.PathLike[str],
    part: Literal["labeled", "unlabeled", "validation"],
    *,
    split: str = "1_16",
) -> SegmentationFolder:
    """A part of Cityscapes as it is unpacked: fine masks, with their own ids.

    19 classes; every id that is not evaluated becomes 255. ``*_labelIds.png`` are read, so nothing
    needs to be converted first. The unlabeled images are the 2,975 training images without the
    split's labeled ones; they open no mask.

    Args:
        root: The folder that holds ``leftImg8bit`` and ``gtFine``.
        part: Which images.
        split: Which images have labels: ``"1_30"``, ``"1_16"``, ``"1_8"``, ``"1_4"`` or ``"1_2"``.

    Raises:
        InputError: If there is no such split or part.

    Examples:
        >>> folder = cityscapes("cityscapes", "labeled", split="1_30")
        >>> folder.pairs[0][0]
        'leftImg8bit/train/aachen/aachen_000005_000019_leftImg8bit.png'
    """
    check_part(part)
    names = published_split("cityscapes", "val" if part == "validation" else split)
    if part == "unlabeled":
        names = sorted(set(published_split("cityscapes", "train")) - set(names))
    folder = "val" if part == "validation" else "train"
    pairs: list[tuple[str, str | None]] = []
    for name in names:
        place = f"{folder}/{name.partition('_')[0]}/{name}"
        mask = None if part == "unlabeled" else f"gtFine/{place}_gtFine_labelIds.png"
        pairs.append((f"leftImg8bit/{place}_leftImg8bit.png", mask))
    # A proxy would not reach a worker process.
    return SegmentationFolder(root=root, pairs=pairs, num_classes=19, id_map=dict(CITYSCAPES_IDS))
