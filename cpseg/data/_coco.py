"""COCO: 81 classes of things and background, or 171 of things and stuff, and the published splits."""

import os
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from cpseg.data.folder import SegmentationFolder
from cpseg.data.splits import check_part, published_split
from cpseg.errors import FileError, InputError

__all__ = ["COCO_STUFF_IDS", "COCO_THING_IDS", "coco"]

# Of the 182 ids in COCO-Stuff's masks, counted from 0, those that no picture shows.
_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
_USED = [id_ for id_ in range(182) if id_ not in _UNUSED]

COCO_STUFF_IDS: MappingProxyType[int, int] = MappingProxyType(
    {id_: class_ for class_, id_ in enumerate(_USED)}
)
"""The class of each id in COCO-Stuff's masks: 80 things, then 91 kinds of stuff."""

COCO_THING_IDS: MappingProxyType[int, int] = MappingProxyType(
    {id_: class_ + 1 if class_ < 80 else 0 for class_, id_ in enumerate(_USED)}
)
"""The class of each id in COCO-Stuff's masks where all stuff is background, 0, and things follow."""


def coco(
    root: str | os.PathLike[str],
    part: Literal["labeled", "unlabeled", "validation"],
    *,
    split: str = "1_512",
    masks: Literal["masks", "stuffthingmaps", "stuffthingmaps as things"] = "masks",
) -> SegmentationFolder:
    """A part of COCO 2017.

    The semi-supervised literature trains on 81 classes, background and the 80 things, with masks
    of its own making in one folder, ``masks``. Without those, COCO-Stuff's masks give the same 81
    classes, though not the same pixels: which of two objects lies on top is not known of the
    former. They also give 171 classes of things and stuff. The unlabeled images are all in
    ``train2017`` but the split's labeled ones; they open no mask.

    Args:
        root: The folder that holds ``train2017``, ``val2017`` and the masks.
        part: Which images.
        split: Which images have labels: ``"1_512"``, ``"1_256"``, ``"1_128"``, ``"1_64"`` or
            ``"1_32"``.
        masks: ``"masks"``: ``masks/*.png``, 81 classes. ``"stuffthingmaps"``: COCO-Stuff's
            ``stuffthingmaps/train2017/*.png`` and ``val2017``, 171 classes;
            ``"stuffthingmaps as things"``: the same files, 81 classes.

    Raises:
        InputError: If there is no such split, part or kind of masks.
        FileError: If no image is where unlabeled or validation images should be.
    """
    check_part(part)
    kinds = {
        "masks": (81, None),
        "stuffthingmaps": (171, COCO_STUFF_IDS),
        "stuffthingmaps as things": (81, COCO_THING_IDS),
    }
    if masks not in kinds:
        raise InputError(f"masks must be {', '.join(repr(kind) for kind in kinds)}; got {masks!r}")
    num_classes, id_map = kinds[masks]
    folder = "val2017" if part == "validation" else "train2017"
    names = published_split("coco", split)
    if part != "labeled":
        there = {path.stem for path in (Path(root) / folder).glob("*.jpg")}
        if not there:
            raise FileError(f"{root} must hold {folder}/*.jpg; got none")
        names = sorted(there - set(names) if part == "unlabeled" else there)
    source = "masks" if masks == "masks" else f"stuffthingmaps/{folder}"
    return SegmentationFolder(
        root=root,
        pairs=[
            (f"{folder}/{name}.jpg", None if part == "unlabeled" else f"{source}/{name}.png")
            for name in names
        ],
        num_classes=num_classes,
        id_map=None if id_map is None else dict(id_map),  # a proxy would not reach a worker
    )
