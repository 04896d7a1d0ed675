"""Images and masks in folders, listed by split files."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cpseg import _checks
from cpseg.errors import FileError, InputError, MissingExtraError

_MASK_MODES = ("L", "P", "1", "I", "I;16")

__all__ = ["FolderReport", "SegmentationFolder", "read_image", "read_mask", "read_split"]


def read_split(path: str | os.PathLike[str]) -> list[tuple[str, str | None]]:
    """The lines of a split file: an image's path, and its mask's where there is a second column.

    A line is cut at its first space or tab. Empty lines do not count.

    Raises:
        FileError: If the file is missing, no text or holds no line.
    """
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise FileError(f"{path} must be a split file; {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path} must be a split file, text in UTF-8; {error}") from error
    pairs: list[tuple[str, str | None]] = []
    for line in map(str.strip, text.splitlines()):
        if line:
            image, *mask = line.split(maxsplit=1)
            pairs.append((image, mask[0] if mask else None))
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
            labels already. It may return probabilities of classes instead, floating
            ``(C, H, W)``, 0 in all classes where they abstain.

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
            ``ignore_index``. Shape ``(H, W)``. Or what ``load_labels`` has of probabilities.

        Raises:
            FileError: If a file is missing, damaged or of the wrong kind.
        """
        image_path, mask_path = self.pairs[index]
        image = read_image(Path(self.root) / image_path)
        size = tuple(image.shape[1:])
        if self.load_labels is not None:
            labels, source = self.load_labels(self.name(index)), self.name(index)
            if labels.is_floating_point():
                if tuple(labels.shape) != (self.num_classes, *size):
                    wanted = (self.num_classes, *size)
                    raise FileError(
                        f"{source} must hold probabilities {wanted}; got {tuple(labels.shape)}"
                    )
                return image, labels
            labels = labels.long()
        elif mask_path is None:
            return image, torch.full(size, self.ignore_index)
        else:
            source = str(Path(self.root) / mask_path)
            labels = self._labels(read_mask(Path(source)))
        if tuple(labels.shape) != size:
            raise FileError(_other_size(source, size, tuple(labels.shape)))
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

    def _most_likely(self, labels: Tensor) -> Tensor:
        if not labels.is_floating_point():
            return labels
        best, found = labels.max(0)
        return torch.where(best > 0, found, self.ignore_index)

    def has_labels(self) -> bool:
        """Whether any image has a mask or labels from elsewhere, read or not."""
        return self.load_labels is not None or any(mask is not None for _, mask in self.pairs)

    def faults(self, indices: Iterable[int]) -> list[str]:
        """What is wrong with the files of some images, as far as their headers tell, by name.

        Whether a file is there, a picture, whole, of the right kind, and whether a mask is of its
        image's size. A PNG or JPEG that ends as one does counts as whole; any other file is read.
        Ids are not looked at, nor what ``load_labels`` reads: that is :meth:`check`.

        Args:
            indices: Which images.

        Returns:
            One line per file that is wrong.
        """
        found: list[str] = []
        for index in indices:
            image, mask = self.pairs[index]
            size: tuple[int, int] | None = None
            try:
                _, size = _glance(Path(self.root) / image)
            except FileError as error:
                found.append(str(error))
            if mask is None or self.load_labels is not None:
                continue
            path = Path(self.root) / mask
            try:
                mode, own = _glance(path)
            except FileError as error:
                found.append(str(error))
                continue
            if mode not in _MASK_MODES:
                found.append(_no_mask(path, mode))
            elif size not in (None, own):
                found.append(_other_size(path, size, own))
        return found

    def check(self) -> FolderReport:
        """Open every file, and say what was found.

        Raises:
            FileError: If any file is missing, damaged, of the wrong kind or size, or holds ids
                that are no class; all of them are named.
        """
        sizes: Counter[tuple[int, int]] = Counter()
        pixels: Counter[int] = Counter()
        faults: list[str] = []
        masks = wrong = 0
        for index, (_, mask) in enumerate(self.pairs):
            try:
                image, labels = self[index]
            except (FileError, InputError) as error:
                wrong += 1
                faults.extend(dict.fromkeys((str(error), *self.faults((index,)))))
                continue
            sizes[(image.shape[1], image.shape[2])] += 1
            if mask is not None or self.load_labels is not None:
                masks += 1
                values, counts = torch.unique(self._most_likely(labels), return_counts=True)
                pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if faults:
            raise FileError(
                f"{self.root} must hold {len(self)} sound images; got {wrong} that are not:\n"
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
        raise FileError(_no_mask(path, mode))
    return ids.view(height, width)


def _no_mask(path: Path, mode: str) -> str:
    return f"{path} must be a mask of ids, gray or with a palette; got mode {mode}"


def _other_size(source: object, size: tuple[int, ...], own: tuple[int, ...]) -> str:
    return (
        f"{source} must be of its image's size, {size[0]} x {size[1]}; "
        f"got {' x '.join(map(str, own))}"
    )


def _glance(path: Path) -> tuple[str, tuple[int, int]]:
    """A picture's mode, height and width, from its header, and that it is not cut short.

    Raises:
        FileError: If the file is missing or damaged.
    """
    image = _open(path, whole=False)
    if not _ends(path, image.format):
        _open(path)
    width, height = cast("tuple[int, int]", image.size)
    return cast("str", image.mode), (height, width)


def _ends(path: Path, kind: str) -> bool:
    """Whether the file's last bytes are those of its kind; False where they settle nothing."""
    end = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}.get(kind)
    if end is None:
        return False
    with path.open("rb") as file:
        file.seek(-len(end), os.SEEK_END)
        return file.read() == end


def _open(path: Path, *, whole: bool = True) -> Any:
    """A picture, to its end or its header alone; any fault is one error that names the file."""
    try:
        pillow: Any = import_module("PIL.Image")
    except ImportError as error:
        raise MissingExtraError("pictures need Pillow; install it with cpseg[data]") from error
    try:
        with pillow.open(path) as image:
            if not whole:
                return image  # closed, and still of a mode, size and format
            image.load()
            return image.copy()
    except FileNotFoundError as error:
        raise FileError(f"{path} is missing") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise FileError(f"{path} is damaged or no picture: {error}") from error
