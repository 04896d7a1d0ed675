"""Images with labels: what calibration and training read."""

from cpseg.data._ade20k import ade20k, ade20k_labeled
from cpseg.data._cityscapes import CITYSCAPES_IDS, cityscapes
from cpseg.data._coco import COCO_STUFF_IDS, COCO_THING_IDS, coco
from cpseg.data._voc2012 import voc2012
from cpseg.data.folder import FolderReport, SegmentationFolder, read_split
from cpseg.data.splits import published_split, published_splits
from cpseg.data.synthetic import SyntheticShapes
from cpseg.data.transforms import ColorJitter, RandomCrop, Tint, Warp

__all__ = [
    "CITYSCAPES_IDS",
    "COCO_STUFF_IDS",
    "COCO_THING_IDS",
    "ColorJitter",
    "FolderReport",
    "RandomCrop",
    "SegmentationFolder",
    "SyntheticShapes",
    "Tint",
    "Warp",
    "ade20k",
    "ade20k_labeled",
    "cityscapes",
    "coco",
    "published_split",
    "published_splits",
    "read_split",
    "voc2012",
]
