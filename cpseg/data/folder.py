"""Images and masks in folders, listed by split files."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cpseg import _checks
from cpseg.errors import FileError, InputError, MissingExtraError

__all__ = ["FolderReport", "SegmentationFolder", "read_image", "read_mask", "read_split"]


def read_split(path: str | os.PathLike[str]) -> list[tuple[str, str | None]]:
    """The lines of a split file: an image's path, and its mask's where there is a second column.

    A line is cut at its first space. Empty lines do not count.

    Raises:
        FileError: If the file is missing or holds no line.
    """
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise FileError(f"{path} must be a split file; {error.strerror}") from error
    pairs: list[tuple[str, str | None]] = []
    for line in map(str.strip, text.splitlines()):
        if line:
            image, _, mask = line.partition(" ")
            pairs.append((image, mask.strip() or None))
    if not pairs:
        raise FileError(f"{path} must hold at least one line; got none")
    return pairs


@final
@dataclass(frozen=True, slots=True)
class FolderReport:
    """What a look at every file found.

    Attributes:
        images: How many images there are.
        masks: How many of them have a mask.
        sizes: How many images have each height and width.
        pixels: How many pixels have each label, as training sees it.
    """

    images: int
    masks: int
    sizes: dict[tuple[int, int], int]
    pixels: dict[int, int]

    def __str__(self) -> str:
        """A few lines."""
        sizes = ", ".join(f"{h} x {w} ({n})" for (h, w), n in sorted(self.sizes.items())[:8])
        more = "" if len(self.sizes) <= 8 else f" and {len(self.sizes) - 8} more"
        labels = ", ".join(f"{label}: {n}" for label, n in sorted(self.pixels.items()))
        return (
            f"{self.images} images, {self.masks} with a mask\n"
            f"height x width (images): {sizes}{more}\nlabel: pixels: {labels or 'none'}"
        )


@final
@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class SegmentationFolder(Dataset[tuple[Tensor, Tensor]]):
    """Images and masks under one folder, for any loop over a dataset and for ``DataLoader``.

    An image without a mask has the label ``ignore_index`` everywhere, and no mask is opened for
    it. Masks are gray or palette pictures whose values are ids; a palette's colors do not matter.

    Args:
        root: Where relative paths start.
        pairs: Image and mask of each item; a mask may be None. See :func:`read_split`.
        num_classes: Number of classes; labels that are neither a class nor ``ignore_index`` are
            wrong.
        reduce_zero_label: Whether id 0 means "other", and classes start at 1: 0 becomes
            ``ignore_index`` and every other id moves down by one.
        id_map: From ids in the file to labels; ids it does not name become ``ignore_index``.
        ignore_index: Label of pixels that do not count.
        load_labels: Reads the labels instead of the masks, from a name: the image's file name
            without its suffix, as in ``PseudoLabelStore.load``. The ids in what it returns are
            labels already.

    Raises:
        InputError: If there are no pairs, or two options contradict each other.

    Examples:
        >>> folder = SegmentationFolder(root=".", pairs=[("a.jpg", None)], num_classes=3)
        >>> len(folder), folder.name(0)
        (1, 'a')
    """

    root: str | os.PathLike[str]
    pairs: Sequence[tuple[str, str | None]]
    num_classes: int
    reduce_zero_label: bool = False
    id_map: Mapping[int, int] | None = None
    ignore_index: int = 255
    load_labels: Callable[[str], Tensor] | None = None

    def __post_init__(self) -> None:
        _checks.check_integer("num_classes", self.num_classes, 1)
        _checks.check_ignore_index(self.ignore_index, self.num_classes)
        if not self.pairs:
            raise InputError("pairs must hold at least one image; got none")
        if self.reduce_zero_label and self.id_map is not None:
            raise InputError("id_map must be None with reduce_zero_label; got both")

    @classmethod
    def from_split(
        cls,
        root: str | os.PathLike[str],
        split: str | os.PathLike[str],
        *,
        num_classes: int,
        reduce_zero_label: bool = False,
        id_map: Mapping[int, int] | None = None,
        ignore_index: int = 255,
    ) -> "SegmentationFolder":
        """The images and masks that a split file lists, with one column or two."""
        return cls(
            root=root,
            pairs=read_split(split),
            num_classes=num_classes,
            reduce_zero_label=reduce_zero_label,
            id_map=id_map,
            ignore_index=ignore_index,
        )

    def __len__(self) -> int:
        """How many images."""
        return len(self.pairs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every item, in order."""
        return (self[index] for index in range(len(self)))

    def name(self, index: int) -> str:
        """The image's file name without its suffix."""
        return Path(self.pairs[index][0]).stem

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image and its labels.

        Args:
            index: Which one.

        Returns:
            The image, red, green, blue, uint8. Shape ``(3, H, W)``. The labels, int64, classes or
            ``ignore_index``. Shape ``(H, W)``.

        Raises:
            FileError: If a file is missing, damaged or of the wrong kind.
        """
        image_path, mask_path = self.pairs[index]
        image = read_image(Path(self.root) / image_path)
        size = tuple(image.shape[1:])
        if self.load_labels is not None:
            labels, source = self.load_labels(self.name(index)).long(), self.name(index)
        elif mask_path is None:
            return image, torch.full(size, self.ignore_index)
        else:
            source = str(Path(self.root) / mask_path)
            labels = self._labels(read_mask(Path(source)))
        if tuple(labels.shape) != size:
            raise FileError(
                f"{source} must be of its image's size, {size[0]} x {size[1]}; "
                f"got {' x '.join(map(str, labels.shape))}"
            )
        wrong = labels[
            (labels != self.ignore_index) & ((labels < 0) | (labels >= self.num_classes))
        ]
        if len(wrong):
            found = ", ".join(map(str, torch.unique(wrong).tolist()[:8]))
            raise FileError(
                f"{source} must hold classes in [0, {self.num_classes}) or {self.ignore_index}; "
                f"got {found}"
            )
        return image, labels

    def _labels(self, ids: Tensor) -> Tensor:
        if self.reduce_zero_label:
            away = (ids == 0) | (ids == 255) | (ids == self.ignore_index)
            return torch.where(away, self.ignore_index, ids - 1)
        if self.id_map is None:
            return ids
        labels = torch.full_like(ids, self.ignore_index)
        for old, new in self.id_map.items():
            labels[ids == old] = new
        return labels

    def check(self) -> FolderReport:
        """Open every file, and say what was found.

        Raises:
            FileError: If any file is missing, damaged, of the wrong kind or size, or holds ids
                that are no class; all of them are named.
        """
        sizes: Counter[tuple[int, int]] = Counter()
        pixels: Counter[int] = Counter()
        faults: list[str] = []
        masks = 0
        for index, (_, mask) in enumerate(self.pairs):
            try:
                image, labels = self[index]
            except (FileError, InputError) as error:
                faults.append(str(error))
                continue
            sizes[(image.shape[1], image.shape[2])] += 1
            if mask is not None or self.load_labels is not None:
                masks += 1
                values, counts = torch.unique(labels, return_counts=True)
                pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if faults:
            raise FileError(
                f"{self.root} must hold {len(self)} sound images; got {len(faults)} that are not:\n"
                + "\n".join(faults)
            )
        return FolderReport(len(self), masks, dict(sizes), dict(pixels))


def read_image(path: Path) -> Tensor:
    """A picture: red, green, blue, uint8 ``(3, H, W)``.

    Raises:
        FileError: If the file is missing, damaged or no picture.
    """
    rgb = _open(path).convert("RGB")
    width, height = cast("tuple[int, int]", rgb.size)
    data = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return data.view(height, width, 3).permute(2, 0, 1).contiguous()


def read_mask(path: Path) -> Tensor:
    """The ids in a gray or palette picture, int64 ``(H, W)``.

    Raises:
        FileError: If the file is missing, damaged or of colors.
    """
    image = _open(path)
    width, height = cast("tuple[int, int]", image.size)
    mode = cast("str", image.mode)
    if mode in ("L", "P"):  # a palette's indices are its bytes
        ids = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).long()
    elif mode == "1":
        ids = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8)
        ids = ids.long().clamp(max=1)
    elif mode in ("I", "I;16"):
        ids = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32).long()
    else:
        raise FileError(f"{path} must be a mask of ids, gray or with a palette; got mode {mode}")
    return ids.view(height, width)


def _open(path: Path) -> Any:
    """A picture, read to its end; whatever is wrong with the file is one error that names it."""
    try:
        pillow: Any = import_module("PIL.Image")
    except ImportError as error:
        raise MissingExtraError("pictures need Pillow; install it with cpseg[data]") from error
    try:
        with pillow.open(path) as image:
            image.load()
            return image.copy()
    except FileNotFoundError as error:
        raise FileError(f"{path} is missing") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise FileError(f"{path} is damaged or no picture: {error}") from error
