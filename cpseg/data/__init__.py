"""Images with labels: what calibration and training read."""

from cpseg.data.ade20k import ade20k, ade20k_labeled
from cpseg.data.folder import FolderReport, SegmentationFolder, read_split
from cpseg.data.synthetic import SyntheticShapes
from cpseg.data.transforms import ColorJitter, RandomCrop, Tint, Warp

__all__ = [
    "ColorJitter",
    "FolderReport",
    "RandomCrop",
    "SegmentationFolder",
    "SyntheticShapes",
    "Tint",
    "Warp",
    "ade20k",
    "ade20k_labeled",
    "read_split",
]
