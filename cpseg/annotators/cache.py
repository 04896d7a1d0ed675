"""Logits on disk: one file per image, checked when read, safe to interrupt.

What is stored is -log p of every class in half precision. Logits in half precision would tie at
the top, where scores decide; -log p of a class near certainty is near zero, where half precision
is finest. Rounding still changes scores, so a calibration and the predictions it serves must both
read the cache or both run live: ``source`` differs between the two, and ``check`` refuses.
"""

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor

from cpseg import _checks
from cpseg.annotators.images import check_images, rgb
from cpseg.errors import FileError, InputError

__all__ = ["CachedAnnotator", "FilteredAgain", "write_whole"]

_MAGIC = b"cpseg logits 1\n"
# -log p times this fills float16's range: probabilities down to 1e-55, and up to 1 - 1e-10.
_SCALE = 512.0
_MOST = 65504.0
_ABSTAINS = 255


class _HasSource(Protocol):
    """A frozen calibration, as far as a cache looks at it."""

    @property
    def source(self) -> str | None: ...


@final
@dataclass(frozen=True, eq=False, slots=True)
class FilteredAgain:
    """Pseudo-labels from a compact cache.

    Args:
        labels: Shape ``(B, H, W)``.
        unsettled: Pixels that abstain because a class that is not stored could have decided them.
    """

    labels: Tensor
    unsettled: int


@final
class CachedAnnotator:
    """Logits from files, or from an annotator whose answers become files.

    An image is known by the SHA-256 of its pixels, so a changed image is another image. A file
    holds that, the source, and a SHA-256 of everything in it. Files appear whole or not at all;
    any number of processes may read, and those that write the same image write the same bytes.
    A damaged or foreign file is refused by name where there is no annotator, and made again where
    there is one; ``refused`` lists those.

    The first call for an image returns what later calls read: rounded, the same bits.

    Guarantee:
        Calibrated and used through one ``source``, a calibration keeps what it promises: rounding
        is part of the annotator. :meth:`check` refuses a calibration from elsewhere.

    Args:
        folder: Where the files are; made if missing.
        annotator: uint8 images ``(B, 3, H, W)`` to logits ``(B, C, H, W)``, with the image's own
            height and width or any other; None reads only.
        source: What the annotator is: model, weights, prompts; None takes ``annotator.source``,
            or, without an annotator, what the folder says.
        best: Store only this many best classes besides the background (the compact form);
            None: all.
        background: Class that the compact form always stores; None: no class is special.

    Raises:
        FileError: The folder holds logits of another source or form, or is no cache.
        InputError: An argument breaks a rule.
    """

    def __init__(
        self,
        folder: str | Path,
        annotator: Callable[[Tensor], Tensor] | None = None,
        *,
        source: str | None = None,
        best: int | None = None,
        background: int | None = None,
    ) -> None:
        self.folder: Path = Path(folder)
        self.refused: list[str] = []
        self._annotator = annotator
        if best is not None:
            _checks.check_integer("best", best, 1)
        elif background is not None:
            raise InputError(
                "background must come with best=: only the compact form singles it out"
            )
        self._note: dict[str, Any]
        note = self.folder / "cache.json"
        known = _read_note(note) if note.exists() else None
        if annotator is None:
            if known is None:
                raise FileError(
                    f"{self.folder} must be a folder of cached logits; it has no cache.json"
                )
            self._note = known
            if source is not None and source != known["source"]:
                raise FileError(_differs(self.folder, known["source"], source))
        else:
            given = source if source is not None else getattr(annotator, "source", None)
            if not isinstance(given, str) or not given:
                raise InputError(
                    "source must say what the annotator is, model and prompts; "
                    "it has no .source of its own"
                )
            self._note = {"source": given, "best": best, "background": background}
            if known is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(note, json.dumps(self._note, sort_keys=True).encode())
            elif known != self._note:
                raise FileError(_differs(self.folder, str(known), str(self._note)))
            self._clear_leftovers()

    @property
    def source(self) -> str:
        """What to give a calibrator as ``source=``, the annotator and the rounding."""
        best, background = self._note["best"], self._note["background"]
        form = "all classes" if best is None else f"best {best}, background {background}"
        return f"{self._note['source']}; cached float16, {form}"

    def check(self, calibration: _HasSource) -> None:
        """Refuse a calibration that was not made from this cache's logits.

        Args:
            calibration: What thresholds these logits will meet.

        Raises:
            InputError: Its ``source`` is another one, or none.
        """
        if calibration.source != self.source:
            raise InputError(
                f"calibration must come from the logits it is used with, source {self.source!r}; "
                f"got {calibration.source!r}. Calibrate through the cache too, with "
                "source=annotator.source"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of a batch.

        In the compact form classes that are not stored share evenly what the stored ones leave.

        Args:
            images: uint8 RGB. Shape ``(B, 3, H, W)``.

        Returns:
            float32 log-probabilities on the images' device. Shape ``(B, C, H, W)``.
        """
        check_images(images)
        rows = [_spread(stored) for stored in self._stored(images)]
        return torch.stack(rows).to(images.device)

    def annotate(self, images: Sequence[object]) -> list[Tensor]:
        """Logits ``(C, H, W)`` of images of any sizes: tensors, arrays or Pillow images."""
        return [self(rgb(image)[None])[0] for image in images]

    def filter_again(
        self, images: Tensor, mask_filter: Callable[[Tensor], Tensor]
    ) -> FilteredAgain:
        """Pseudo-labels of a compact cache, abstaining where it does not hold enough.

        A pixel is settled if no class that is not stored changes the answer when it gets all it
        can have, what the stored ones leave and less than the least of them, and the answer is
        stored or the only class that is not. The rest abstain and are counted.

        Guarantee:
            For scores that look at a class's own probability only (LAC) and filters that take
            the best class of a set: a label is the one that all classes' probabilities, rounded
            as this cache rounds, would give. A heuristic for others.

        Args:
            images: uint8 RGB. Shape ``(B, 3, H, W)``.
            mask_filter: Logits ``(B, C, *S)`` to labels ``(B, *S)``, 255 where it abstains.

        Returns:
            Labels and the number of pixels that abstain for this reason.
        """
        check_images(images)
        labels: list[Tensor] = []
        unsettled = 0
        for stored in self._stored(images):
            logits = _spread(stored)
            answer = mask_filter(logits[None])[0]
            if stored.classes is not None:
                open_ = _unsettled(stored, logits, answer, mask_filter, self._note["background"])
                answer = answer.masked_fill(open_, _ABSTAINS)
                unsettled += int(open_.sum())
            labels.append(answer)
        return FilteredAgain(torch.stack(labels), unsettled)

    def ensure(self, image: Tensor) -> str:
        """Make an image's file if it is not there and whole.

        Args:
            image: uint8 RGB. Shape ``(3, H, W)``.

        Returns:
            The file's path below the folder.
        """
        check_images(image[None])
        self._stored(image[None])
        return self._place(image)[0].relative_to(self.folder).as_posix()

    def _stored(self, images: Tensor) -> "list[_Stored]":
        found: list[_Stored | None] = []
        places = [self._place(image) for image in images]
        for path, digest in places:
            try:
                found.append(self._read(path, digest) if path.exists() else None)
            except FileError:
                if self._annotator is None:
                    raise
                self.refused.append(str(path))
                found.append(None)
        missing = [i for i, stored in enumerate(found) if stored is None]
        if missing:
            if self._annotator is None:
                raise FileError(
                    f"{places[missing[0]][0]} must be there to read image {missing[0]}; "
                    "it is not, and there is no annotator to make it"
                )
            logits = self._annotator(images[missing])
            for i, row in zip(missing, logits, strict=True):
                stored = _compress(row, self._note["best"], self._note["background"])
                self._save(*places[i], stored)
                found[i] = stored
        return [stored for stored in found if stored is not None]

    def _place(self, image: Tensor) -> tuple[Path, str]:
        array = image.detach().cpu().contiguous().numpy()
        digest = hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.logits", digest

    def _save(self, path: Path, digest: str, stored: "_Stored") -> None:
        payload = stored.values.numpy().astype("<f2").tobytes()
        if stored.classes is not None:
            payload += stored.classes.numpy().astype("<u2").tobytes()
        header = {
            "source": self._note["source"],
            "best": self._note["best"],
            "background": self._note["background"],
            "image": digest,
            "shape": list(stored.values.shape),
            "num_classes": stored.num_classes,
        }
        head = json.dumps(header, sort_keys=True).encode() + b"\n"
        seal = hashlib.sha256(head + payload).hexdigest().encode() + b"\n"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, _MAGIC + seal + head + payload)

    def _read(self, path: Path, digest: str) -> "_Stored":
        content = path.read_bytes()
        start = len(_MAGIC) + 65  # 64 hexadecimal digits and a line's end
        magic, seal, rest = content[: len(_MAGIC)], content[len(_MAGIC) : start], content[start:]
        if magic != _MAGIC or hashlib.sha256(rest).hexdigest().encode() + b"\n" != seal:
            raise FileError(f"{path} must be a whole file of cached logits; it is damaged")
        line, _, payload = rest.partition(b"\n")
        header: dict[str, Any] = json.loads(line)
        for name in ("source", "best", "background"):
            if header[name] != self._note[name]:
                raise FileError(
                    f"{path} must come from this cache's annotator; its {name} is {header[name]!r}"
                )
        if header["image"] != digest:
            raise FileError(f"{path} must hold the logits of this image; it holds another's")
        shape = tuple(header["shape"])
        count = int(np.prod(shape))
        values = torch.from_numpy(np.frombuffer(payload, "<f2", count).reshape(shape).copy())
        classes = None
        if header["best"] is not None:
            kept = np.frombuffer(payload, "<u2", offset=2 * count).astype(np.int64)
            classes = torch.from_numpy(kept.reshape(-1, *shape[1:]))
        return _Stored(values, classes, int(header["num_classes"]))

    def _clear_leftovers(self) -> None:
        """Remove what a killed process of this machine was writing."""
        host = socket.gethostname()
        for path in self.folder.rglob("*.part"):
            *_, there, pid, _ = path.name.rsplit("~", 3)
            if there == host and not _alive(int(pid)):
                path.unlink(missing_ok=True)


@final
@dataclass(frozen=True, eq=False, slots=True)
class _Stored:
    """One image: scaled -log p in float16, ``(C, H, W)`` or ``(best [+ 1], H, W)``.

    In the compact form ``classes`` names the class of each row, ``(rows, H, W)``.
    """

    values: Tensor
    classes: Tensor | None
    num_classes: int

    def log_probabilities(self) -> Tensor:
        return self.values.float() / -_SCALE


def _compress(logits: Tensor, best: int | None, background: int | None) -> _Stored:
    """One image's logits ``(C, *S)`` as they are stored."""
    _checks.check_logits(logits[None])
    # In float64: a probability beyond 1 - 1e-7 is 1 in float32, and would tie with its like.
    values = -logits.detach().cpu().double().log_softmax(0)
    num_classes = len(values)
    stored = (values * _SCALE).clamp(max=_MOST).half()
    if best is None:
        return _Stored(stored, None, num_classes)
    # Ranked as stored, so that ties of the rounding fall to the lower class index everywhere.
    order = stored.float()
    if background is not None:
        if not 0 <= background < num_classes:
            raise InputError(f"background must be a class in [0, {num_classes}); got {background}")
        order[background] = -1.0
    rows = min(num_classes, best + (background is not None))
    chosen = order.argsort(dim=0, stable=True)[:rows]
    return _Stored(stored.gather(0, chosen), chosen, num_classes)


def _spread(stored: _Stored) -> Tensor:
    """float32 log-probabilities of all classes ``(C, *S)``."""
    known = stored.log_probabilities()
    if stored.classes is None:
        return known
    others = stored.num_classes - len(known)
    share = (_rest(known) / max(1, others)).log()
    full = share.expand(stored.num_classes, *known.shape[1:]).clone()
    return full.scatter_(0, stored.classes, known)


def _rest(known: Tensor) -> Tensor:
    """What the stored classes leave, at least 1e-30. Shape ``(1, *S)``."""
    return (1 - known.double().exp().sum(0, keepdim=True)).clamp(min=1e-30).float()


def _unsettled(
    stored: _Stored,
    logits: Tensor,
    answer: Tensor,
    mask_filter: Callable[[Tensor], Tensor],
    background: int | None,
) -> Tensor:
    """Where a class that is not stored could change the answer. bool ``(*S)``."""
    assert stored.classes is not None  # noqa: S101  (a compact form)
    held = torch.zeros(logits.shape, dtype=torch.bool).scatter_(0, stored.classes, value=True)
    columns, known = logits.flatten(1), stored.log_probabilities().flatten(1)
    absent = ~held.flatten(1)  # (C, N)
    rest = _rest(known)[0]
    foreground = known if background is None else known[1:]  # the background is stored first
    least = foreground[-1].exp() if len(foreground) else torch.ones_like(rest)
    most = torch.minimum(rest, least * (1 - 2**-20))  # a tie would be with a stored class
    others = (rest - most).clamp(min=1e-30) / max(1, len(absent) - len(known) - 1)
    before = answer.flatten()
    # An answer that is not stored stands only if its share is known: if it is the only such class.
    index = before.long().clamp(max=len(held) - 1)[None]
    changed = (before != _ABSTAINS) & absent.gather(0, index)[0] & (absent.sum(0) > 1)
    for c in range(len(absent)):
        where = absent[c] & ~changed
        if bool(where.any()):
            trial = torch.where(absent, others.log(), columns)
            trial[c] = torch.where(absent[c], most.log(), trial[c])
            changed |= where & (mask_filter(trial[None])[0] != before)
    return changed.view(answer.shape)


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note: dict[str, Any] = json.loads(path.read_bytes())
        return {name: note[name] for name in ("source", "best", "background")}
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} must be a cache's note of its source; it is damaged") from error


def _differs(folder: Path, held: str, given: str) -> str:
    return (
        f"{folder} must hold the logits of {given}; it holds those of {held}. Take another folder"
    )


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all, also after a power cut."""
    part = path.with_name(f"{path.name}~{socket.gethostname()}~{os.getpid()}~.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        raise


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
