"""ADE20K's scene parsing challenge, with the splits of the semi-supervised literature by formula."""

import os
import random
from pathlib import Path
from typing import Literal

from cpseg import _checks
from cpseg.data.folder import SegmentationFolder
from cpseg.data.splits import check_part
from cpseg.errors import FileError

__all__ = ["ade20k", "ade20k_labeled"]

_TRAINING = 20210


def ade20k_labeled(denominator: int) -> list[str]:
    """The labeled images of ADE20K's split 1/``denominator``, by name, sorted.

    The splits 1/128 to 1/8 of SemiVL (Hoyer et al., 2024), which ConformalSAM's table follows: all
    training names, sorted, shuffled with seed 0, and the first ``round(20210 / denominator)``.
    UniMatch V2's are the same, but its 1/32 lacks one of the names.

    Args:
        denominator: Such as 128, 64, 32, 16 or 8.

    Examples:
        >>> len(ade20k_labeled(128)), ade20k_labeled(128)[0]
        (158, 'ADE_train_00000186')
    """
    _checks.check_integer("denominator", denominator, 1)
    names = [f"ADE_train_{number:08d}" for number in range(1, _TRAINING + 1)]
    random.Random(0).shuffle(names)  # noqa: S311 - the published order
    return sorted(names[: round(_TRAINING / denominator)])


def ade20k(
    root: str | os.PathLike[str],
    part: Literal["labeled", "unlabeled", "validation"],
    *,
    denominator: int = 64,
) -> SegmentationFolder:
    """A part of ADE20K as ``ADEChallengeData2016`` is unpacked.

    150 classes; the annotation's 0, "other", becomes 255 and all others move down by one.
    Unlabeled images open no mask.

    Args:
        root: The folder that holds ``images`` and ``annotations``.
        part: Which images: a split's labeled ones, the training images without those, or the
            validation images.
        denominator: Of the split; see :func:`ade20k_labeled`.

    Raises:
        FileError: If there are no validation images where they should be.
    """
    check_part(part)
    if part == "validation":
        folder = "validation"
        names = sorted(path.stem for path in (Path(root) / "images" / folder).glob("*.jpg"))
        if not names:
            raise FileError(f"{root} must hold images/validation/*.jpg; got none")
    else:
        folder = "training"
        names = ade20k_labeled(denominator)
        if part == "unlabeled":
            names = sorted(set(ade20k_labeled(1)) - set(names))
    masks = [None if part == "unlabeled" else f"annotations/{folder}/{n}.png" for n in names]
    images = [f"images/{folder}/{name}.jpg" for name in names]
    return SegmentationFolder(
        root=root,
        pairs=list(zip(images, masks, strict=True)),
        num_classes=150,
        reduce_zero_label=True,
    )
