"""Batches as a function of where training stands, so that any step can be made again.

Which images a batch holds and how they are cropped and colored depends on the seed and on how
many samples came before, not on a generator's state, the number of workers or of processes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cpseg import _checks
from cpseg.data.transforms import ColorJitter, RandomCrop
from cpseg.errors import InputError
from cpseg.training.chance import generator_for
from cpseg.training.objective import Batch

__all__ = ["BatchKey", "Batches", "Labeled", "Normalize", "load"]

_SUM_TOLERANCE = 1e-2  # bfloat16 rounds each probability by up to 2**-9 of itself


class Labeled(Protocol):
    """A dataset of images and labels.

    An item is an image, red, green, blue, uint8 ``(3, H, W)``, and its labels, integers
    ``(H, W)``, ``ignore_index`` where there is none. Of unlabeled images, the labels are the
    external ones, abstained from everywhere if there are none; or external probabilities,
    floating ``(C, H, W)``, 0 in all classes where they abstain, for all images alike.
    """

    def __len__(self) -> int:
        """How many images."""
        ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]:
        """The image and the labels at ``index``."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Normalize:
    """From bytes to what a network takes; the defaults are ImageNet's.

    Attributes:
        mean: Of each channel, on the scale of ``[0, 1]``.
        std: Of each channel.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __call__(self, image: Tensor) -> Tensor:
        """Images ``(..., 3, H, W)`` in ``[0, 1]``, normalized."""
        return (image - self._of(self.mean, image)) / self._of(self.std, image)

    def undo(self, image: Tensor) -> Tensor:
        """Normalized images ``(..., 3, H, W)``, back in ``[0, 1]``."""
        return image * self._of(self.std, image) + self._of(self.mean, image)

    @staticmethod
    def _of(values: tuple[float, float, float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(3, 1, 1)


@final
@dataclass(frozen=True, slots=True)
class BatchKey:
    """Which batch: positions in the two endless streams of samples.

    Attributes:
        labeled: Position of the first labeled sample.
        unlabeled: Position of the first unlabeled sample.
        num_labeled: How many labeled samples.
        num_unlabeled: How many unlabeled samples.
        strong_views: How many strong views of each unlabeled sample.
    """

    labeled: int
    unlabeled: int
    num_labeled: int
    num_unlabeled: int
    strong_views: int


@final
class Batches(Dataset[Batch]):
    """Batches by their key, for a ``DataLoader`` without automatic batching.

    Args:
        labeled: Images with labels.
        unlabeled: Images with external labels or probabilities, or with labels abstained from
            everywhere.
        num_classes: Number of classes; a label must be one, or ``ignore_index``.
        crop: The geometry of a training image.
        color: The colors of strong views.
        normalize: What the student expects.
        ignore_index: Label of pixels that do not count.
        seed: Of order, crops and colors.
    """

    def __init__(
        self,
        labeled: Labeled,
        unlabeled: Labeled | None,
        *,
        num_classes: int,
        crop: RandomCrop,
        color: ColorJitter = ColorJitter(),
        normalize: Normalize = Normalize(),
        ignore_index: int = 255,
        seed: int = 0,
    ) -> None:
        _checks.check_integer("num_classes", num_classes, 1)
        _checks.check_ignore_index(ignore_index, num_classes)
        for name, dataset in (("labeled", labeled), ("unlabeled", unlabeled)):
            if dataset is not None and len(dataset) == 0:
                raise InputError(f"{name} must hold at least one image; got none")
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.num_classes = num_classes
        self.crop = crop
        self.color = color
        self.normalize = normalize
        self.ignore_index = ignore_index
        self.seed = seed
        self._order: dict[str, tuple[int, list[int]]] = {}

    def __getitem__(self, key: BatchKey) -> Batch:
        """The batch of ``key``."""
        images: list[Tensor] = []
        labels: list[Tensor] = []
        for place in range(key.labeled, key.labeled + key.num_labeled):
            image, label, _, _ = self._sample("labeled", self.labeled, place)
            images.append(self.normalize(image))
            labels.append(label)
        weak: list[Tensor] = []
        strong: list[list[Tensor]] = [[] for _ in range(key.strong_views)]
        external: list[Tensor] = []
        valid: list[Tensor] = []
        for place in range(key.unlabeled, key.unlabeled + key.num_unlabeled):
            if self.unlabeled is None:
                raise InputError("unlabeled must be a dataset where a stage uses one; got None")
            image, label, inside, generator = self._sample("unlabeled", self.unlabeled, place)
            weak.append(self.normalize(image))
            for view in strong:
                view.append(self.normalize(self.color(generator)(image)))
            external.append(label)
            valid.append(inside)
        shape = self.crop.size
        if len({label.ndim for label in external}) > 1:
            raise InputError(
                "unlabeled must hold labels (H, W) or probabilities (C, H, W) for all images; "
                "got both in one batch"
            )
        soft = bool(external) and external[0].is_floating_point()
        return Batch(
            images=_stacked(images, (3, *shape), torch.float32),
            labels=_stacked(labels, shape, torch.int64),
            weak=_stacked(weak, (3, *shape), torch.float32),
            strong=tuple(_stacked(view, (3, *shape), torch.float32) for view in strong),
            external=torch.stack(external) if soft else _stacked(external, shape, torch.int64),
            valid=_stacked(valid, shape, torch.bool),
        )

    def _sample(
        self, stream: str, dataset: Labeled, place: int
    ) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
        """A cropped image in [0, 1], its labels, where it is valid, and chance for more."""
        turn, rest = divmod(place, len(dataset))
        known, order = self._order.get(stream, (-1, []))
        if known != turn:  # one pass is drawn once, not once per sample
            generator = generator_for(self.seed, stream, turn)
            order = torch.randperm(len(dataset), generator=generator).tolist()
            self._order[stream] = (turn, order)
        image, label = dataset[order[rest]]
        self._check(stream, order[rest], image, label)
        generator = generator_for(self.seed, stream, "view", place)
        warp = self.crop((image.shape[1], image.shape[2]), generator)
        mean = sum(self.normalize.mean) / 3
        soft = label.is_floating_point()
        return (
            warp.image(image.float() / 255, fill=mean),
            warp.labels(label.float(), fill=0)
            if soft
            else warp.labels(label.long(), fill=self.ignore_index),
            warp.valid(),
            generator,
        )

    def _check(self, stream: str, index: int, image: Tensor, label: Tensor) -> None:
        where = f"{stream}[{index}]"
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise InputError(
                f"{where} must hold an image uint8 (3, H, W); "
                f"got {image.dtype} {_checks.describe(image.shape)}"
            )
        if stream == "unlabeled" and label.is_floating_point():
            self._check_probabilities(where, image, label)
            return
        _checks.check_map(f"{where}'s labels", label, image.shape[1:], "the image")
        known = label[label != self.ignore_index]
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < self.num_classes:
            raise InputError(
                f"{where}'s labels must be classes in [0, {self.num_classes}) or "
                f"{self.ignore_index}; got {int(known.min())} to {int(known.max())}"
            )

    def _check_probabilities(self, where: str, image: Tensor, label: Tensor) -> None:
        shape = (self.num_classes, *image.shape[1:])
        if label.shape != shape:
            raise InputError(
                f"{where}'s probabilities must have shape {_checks.describe(shape)}; "
                f"got {_checks.describe(label.shape)}"
            )
        total = label.float().sum(0)
        known = (total == 0) | ((total - 1).abs() <= _SUM_TOLERANCE)
        if not bool(known.all()) or float(label.min()) < 0:
            raise InputError(
                f"{where}'s probabilities must be at least 0 and add up to 1, or to 0 where they "
                f"abstain; got {int((~known).sum())} pixels that do not, least {float(label.min())}"
            )


def load(
    batches: Batches,
    keys: Iterable[BatchKey],
    *,
    workers: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """The batches of ``keys``, in order, made by ``workers`` processes ahead of time."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_as_is,  # a batch comes whole
        generator=torch.Generator(),  # a loader draws a seed; not from the global state
    )
    return iter(loader)


def _as_is(batch: Any) -> Any:  # a DataLoader types it for lists
    return batch


def _stacked(values: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.stack(values) if values else torch.empty((0, *shape), dtype=dtype)
