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
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, cast, final

import numpy as np
import torch
from torch import Tensor

from cpseg import _checks
from cpseg.annotators.images import check_images, in_batches
from cpseg.annotators.source import check_source, difference
from cpseg.errors import FileError, InputError
from cpseg.filters import AtMost, Singleton

__all__ = ["CachedAnnotator", "FilteredAgain", "write_whole"]

_MAGIC = b"cpseg logits 2\n"
# -log p times this fills float16's range: probabilities down to 1e-55, and up to 1 - 1e-10.
_SCALE = 512.0
_MOST = 65504.0


class _HasSource(Protocol):
    """A calibration or calibrator, as far as a cache looks at it."""

    @property
    def source(self) -> str | None: ...


@final
@dataclass(frozen=True, eq=False, slots=True)
class FilteredAgain:
    """Pseudo-labels from a compact cache.

    Attributes:
        labels: Shape ``(B, H, W)``, or ``(B * L, H, W)`` where an image has L channels.
        open: Pixels that abstain because a class that is not stored could have decided them. Bool,
            the shape of labels.
    """

    labels: Tensor
    open: Tensor

    @property
    def unsettled(self) -> int:
        """How many pixels are open."""
        return int(self.open.sum())


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
            height and width or any other, or to ``(B * L, C, H, W)`` where each image has L
            channels (:class:`cpseg.annotators.SigmoidAnnotator`); None reads only.
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
        if not isinstance(cast("object", folder), (str, Path)):
            raise InputError(f"folder must be a path; got {_checks.kind_of(folder)}")
        if annotator is not None and not callable(annotator):
            raise InputError(
                f"annotator must be a function of images; got {_checks.kind_of(annotator)}"
            )
        self.folder: Path = Path(folder)
        self.refused: list[str] = []
        self._annotator = annotator
        if self.folder.exists() and not self.folder.is_dir():
            raise FileError(f"{self.folder} must be a folder; it is a file")
        _check_compact(best, background)
        note = self.folder / "cache.json"
        known = _read_note(note) if note.exists() else None
        if annotator is None:
            if known is None:
                raise FileError(
                    f"{self.folder} must be a folder of cached logits; it has no cache.json"
                )
            wanted = {"source": source, "best": best, "background": background}
            said = {name: value for name, value in wanted.items() if value is not None}
            self._note: dict[str, Any] = known | said
        else:
            given = _named(annotator, source)
            self._note = {"source": given, "best": best, "background": background}
        if known is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(note, json.dumps(self._note, sort_keys=True).encode())
        elif known != self._note:
            raise FileError(_differs(self.folder, known, self._note))
        if annotator is not None:
            self._clear_leftovers()

    @property
    def best(self) -> int | None:
        """How many best classes the compact form stores. None in the form that stores all."""
        return cast("int | None", self._note["best"])

    @property
    def source(self) -> str:
        """What to give a calibrator as ``source=``, the annotator and the rounding."""
        return f"{self._note['source']}; {_form(self._note)}"

    def check(self, calibration: _HasSource) -> None:
        """:func:`cpseg.annotators.check_source` for this cache's logits.

        Args:
            calibration: What thresholds these logits will meet, or the calibrator.

        Raises:
            InputError: Its ``source`` is another one, or none.
        """
        check_source(self, calibration)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of a batch.

        In the compact form classes that are not stored share evenly what the stored ones leave.

        Args:
            images: uint8 RGB. Shape ``(B, 3, H, W)``.

        Returns:
            float32 log-probabilities on the images' device. Shape ``(B, C, H, W)``, or
            ``(B * L, C, H, W)`` where each image has L channels.
        """
        check_images(images)
        rows = [_spread(row, self._note) for stored in self._stored(images) for row in stored]
        return torch.stack(rows).to(images.device)

    def annotate(self, images: Sequence[object]) -> list[Tensor]:
        """Logits of images of any sizes, tensors, arrays or Pillow images.

        Shape ``(C, H, W)`` each, or ``(L, C, H, W)`` where an image has L > 1 channels.
        """
        return in_batches(images, 1, self)

    def filter_again(
        self, images: Tensor, mask_filter: Callable[[Tensor], Tensor]
    ) -> FilteredAgain:
        """Pseudo-labels of a compact cache, abstaining where it does not hold enough.

        A pixel is settled if no class that is not stored changes the answer when it gets all it
        can have, what the stored ones leave and less than the least of them, and the answer is
        stored or the only class that is not. For filters that count a set's classes
        (:class:`cpseg.filters.AtMost`, :class:`cpseg.filters.Singleton`) as many as can meet in
        the set together are tried, too. The rest abstain and are counted.

        Guarantee:
            For scores that look at a class's own probability only (LAC) and the filters of
            :mod:`cpseg.filters` without a guard: a label is the one that all classes'
            probabilities, rounded as this cache rounds, would give. For other scores, and for
            filters of your own that do more than take the best class of a set: none; a heuristic.

        Args:
            images: uint8 RGB. Shape ``(B, 3, H, W)``.
            mask_filter: Logits ``(B, C, *S)`` to labels ``(B, *S)``; where it abstains the
                ``ignore_index`` of its calibration, 255 if it has none.

        Returns:
            Labels, and which pixels abstain for this reason.

        Raises:
            InputError: The filter's calibration says it comes from other logits, or from none.
        """
        check_images(images)
        self._check_filter(mask_filter)
        return self._again((row for rows in self._stored(images) for row in rows), mask_filter)

    def filter_file(
        self, path: str | Path, mask_filter: Callable[[Tensor], Tensor]
    ) -> FilteredAgain:
        """:meth:`filter_again` of a file of this cache, for those who have no image at hand.

        Args:
            path: The file, as :meth:`read` takes it.
            mask_filter: As :meth:`filter_again` takes it.

        Returns:
            Labels of a batch of one.

        Raises:
            FileError: As :meth:`read` says.
            InputError: The filter's calibration says it comes from other logits, or from none.
        """
        self._check_filter(mask_filter)
        return self._again([self._one_channel(path)], mask_filter)

    def ensure(self, image: Tensor) -> str:
        """Make an image's file if it is not there and whole.

        Args:
            image: uint8 RGB. Shape ``(3, H, W)``.

        Returns:
            The file's path below the folder.
        """
        _checks.check_tensor("image", image)
        check_images(image[None])
        self._stored(image[None])
        return self._place(image)[0].relative_to(self.folder).as_posix()

    def read(self, path: str | Path) -> Tensor:
        """Logits of a file of this cache, for those who have no image at hand.

        Args:
            path: The file, as :meth:`ensure` names it; relative ones start at the folder.

        Returns:
            float32 log-probabilities. Shape ``(C, H, W)``.

        Raises:
            FileError: The file is missing, damaged or foreign, or holds several channels, each
                with classes of its own.
        """
        return _spread(self._one_channel(path), self._note)

    def _check_filter(self, mask_filter: Callable[[Tensor], Tensor]) -> None:
        if not callable(mask_filter):
            raise InputError(f"mask_filter must be a filter; got {_checks.kind_of(mask_filter)}")
        calibration = getattr(mask_filter, "calibration", None)
        if calibration is not None:
            self.check(calibration)

    def _again(
        self, rows: "Iterable[_Stored]", mask_filter: Callable[[Tensor], Tensor]
    ) -> FilteredAgain:
        labels: list[Tensor] = []
        undecided: list[Tensor] = []
        for stored in rows:
            logits = _spread(stored, self._note)
            answer = mask_filter(logits[None])[0]
            if stored.classes is None:
                open_ = torch.zeros(answer.shape, dtype=torch.bool)
            else:
                open_ = _unsettled(stored, logits, answer, mask_filter, self._note)
            labels.append(answer.masked_fill(open_, _abstains(mask_filter)))
            undecided.append(open_)
        return FilteredAgain(torch.stack(labels), torch.stack(undecided))

    def _one_channel(self, path: str | Path) -> "_Stored":
        """A file's content, if that is the logits of one image."""
        place = self.folder / path if not Path(path).is_relative_to(self.folder) else Path(path)
        if not place.exists():
            raise FileError(f"{place} must be a file of cached logits; there is none")
        channels = self._read(place, place.stem)
        if len(channels) != 1:
            raise FileError(
                f"{place} must hold one channel to be read alone; it holds {len(channels)}. "
                "Ask the CachedAnnotator with the image"
            )
        return channels[0]

    def _stored(self, images: Tensor) -> "list[list[_Stored]]":
        """What is stored of each image: one entry, or one per channel."""
        found: list[list[_Stored] | None] = []
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
            _checks.check_logits(logits)
            if not len(logits) or len(logits) % len(missing):
                raise InputError(
                    f"annotator must answer {len(missing)} images with logits (B, C, *S), or "
                    f"(B * L, C, *S) for L channels; got {_checks.describe(logits.shape)}"
                )
            self._check_form(int(logits.shape[1]))
            each = logits.reshape(len(missing), -1, *logits.shape[1:])
            for i, rows in zip(missing, each, strict=True):
                stored = [
                    _compress(row, self._note["best"], self._note["background"]) for row in rows
                ]
                self._save(*places[i], stored)
                found[i] = stored
        return [stored for stored in found if stored is not None]

    def _check_form(self, num_classes: int) -> None:
        """Refuse a compact form that the annotator's classes do not fill."""
        best, background = self._note["best"], self._note["background"]
        if best is None:
            return
        needed = max(best + (background is not None), (background or 0) + 1)
        if needed > num_classes:
            raise FileError(
                f"{self.folder} must store at most the annotator's {num_classes} classes; it is "
                f"for {_form(self._note)}. Take another folder and a smaller best="
            )

    def _place(self, image: Tensor) -> tuple[Path, str]:
        array = image.detach().cpu().contiguous().numpy()
        digest = hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.logits", digest

    def _save(self, path: Path, digest: str, stored: "list[_Stored]") -> None:
        payload = b"".join(row.values.numpy().astype("<f2").tobytes() for row in stored)
        payload += b"".join(
            row.classes.numpy().astype("<u2").tobytes() for row in stored if row.classes is not None
        )
        header = self._note | {
            "image": digest,
            "shape": [len(stored), *stored[0].values.shape],
            "num_classes": stored[0].num_classes,
        }
        head = json.dumps(header, sort_keys=True).encode() + b"\n"
        seal = hashlib.sha256(head + payload).hexdigest().encode() + b"\n"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, _MAGIC + seal + head + payload)

    def _read(self, path: Path, digest: str) -> "list[_Stored]":
        content = path.read_bytes()
        start = len(_MAGIC) + 65  # 64 hexadecimal digits and a line's end
        magic, seal, rest = content[: len(_MAGIC)], content[len(_MAGIC) : start], content[start:]
        if magic != _MAGIC or hashlib.sha256(rest).hexdigest().encode() + b"\n" != seal:
            raise FileError(f"{path} must be a whole file of cached logits; it is damaged")
        line, _, payload = rest.partition(b"\n")
        header: dict[str, Any] = json.loads(line)
        if {name: header[name] for name in self._note} != self._note:
            raise FileError(
                f"{path} must come from this cache's annotator; {_difference(self._note, header)}"
            )
        if header["image"] != digest:
            raise FileError(f"{path} must hold the logits of this image; it holds another's")
        shape = tuple(header["shape"])  # (L, rows, *S)
        count = prod(shape)
        values = torch.from_numpy(np.frombuffer(payload, "<f2", count).reshape(shape).copy())
        classes: list[Tensor | None] = [None] * shape[0]
        if header["best"] is not None:
            kept = np.frombuffer(payload, "<u2", offset=2 * count).astype(np.int64)
            classes = list(torch.from_numpy(kept.reshape(shape)))
        number = int(header["num_classes"])
        return [_Stored(row, held, number) for row, held in zip(values, classes, strict=True)]

    def _clear_leftovers(self) -> None:
        """Remove what a killed process of this machine was writing."""
        host = socket.gethostname()
        for path in self.folder.rglob("*.part"):
            part = re.fullmatch(r".*~(.*)~(\d+)~\.part", path.name)
            if part is not None and part[1] == host and not _alive(int(part[2])):
                path.unlink(missing_ok=True)


@final
@dataclass(frozen=True, eq=False, slots=True)
class _Stored:
    """An image or a channel: scaled -log p in float16, ``(C, *S)`` or ``(best [+ 1], *S)``.

    In the compact form ``classes`` names the class of each row, ``(rows, *S)``.
    """

    values: Tensor
    classes: Tensor | None
    num_classes: int

    def log_probabilities(self) -> Tensor:
        return self.values.float() / -_SCALE


def _compress(logits: Tensor, best: int | None, background: int | None) -> _Stored:
    """Logits ``(C, *S)`` as they are stored."""
    # In float64: a probability beyond 1 - 1e-7 is 1 in float32, and would tie with its like.
    values = -logits.detach().cpu().double().log_softmax(0)
    num_classes = len(values)
    stored = (values * _SCALE).clamp(max=_MOST).half()
    if best is None:
        return _Stored(stored, None, num_classes)
    # Ranked as stored, so that ties of the rounding fall to the lower class index everywhere.
    order = stored.float()
    if background is not None:
        order[background] = -1.0
    rows = best + (background is not None)
    chosen = order.argsort(dim=0, stable=True)[:rows]
    return _Stored(stored.gather(0, chosen), chosen, num_classes)


def _spread(stored: _Stored, note: Mapping[str, Any]) -> Tensor:
    """float32 log-probabilities of all classes ``(C, *S)``; of those not stored, none is the best."""
    known = stored.log_probabilities()
    if stored.classes is None:
        return known
    others = stored.num_classes - len(known)
    # Where all are alike, rounding would give those that are not stored more than any has.
    share = torch.minimum(_rest(known) / max(1, others), _most(known, note)).log()
    full = share.expand(stored.num_classes, *known.shape[1:]).clone()
    return full.scatter_(0, stored.classes, known)


def _rest(known: Tensor) -> Tensor:
    """What the stored classes leave, at least 1e-30. Shape ``(1, *S)``."""
    return (1 - known.double().exp().sum(0, keepdim=True)).clamp(min=1e-30).float()


def _most(known: Tensor, note: Mapping[str, Any]) -> Tensor:
    """What a class that is not stored has at most: less than the least that is. ``(1, *S)``."""
    foreground = known if note["background"] is None else known[1:]  # background is stored first
    least = foreground[-1:].exp() if len(foreground) else torch.ones_like(known[:1])
    return least * (1 - 2**-20)  # a tie would be with a stored class


def _unsettled(
    stored: _Stored,
    logits: Tensor,
    before: Tensor,
    mask_filter: Callable[[Tensor], Tensor],
    note: Mapping[str, Any],
) -> Tensor:
    """Where a class that is not stored could change the answer ``before``. bool ``(*S)``."""
    assert stored.classes is not None  # noqa: S101  (a compact form)
    held = torch.zeros(logits.shape, dtype=torch.bool).scatter_(0, stored.classes, value=True)
    absent, known = ~held, stored.log_probabilities()
    rest = _rest(known)[0]
    most = torch.minimum(rest, _most(known, note)[0])
    others = (rest - most).clamp(min=1e-30) / max(1, len(absent) - len(known) - 1)
    # An answer that is not stored stands only if its share is known: if it is the only such class.
    index = before.long().clamp(0, len(held) - 1)[None]
    labeled = before != _abstains(mask_filter)
    changed = labeled & absent.gather(0, index)[0] & (absent.sum(0) > 1)
    for c in range(len(absent)):
        where = absent[c] & ~changed
        if bool(where.any()):
            trial = torch.where(absent, others.log(), logits)
            trial[c] = torch.where(absent[c], most.log(), trial[c])
            changed |= where & (mask_filter(trial[None])[0] != before)
    if isinstance(mask_filter, (AtMost, Singleton)):
        changed |= _overfilled(mask_filter, logits, held, most, rest)
    return changed


def _overfilled(
    counts: AtMost | Singleton, logits: Tensor, held: Tensor, most: Tensor, rest: Tensor
) -> Tensor:
    """Where the stored classes leave room in a set that the others could fill beyond. ``(*S)``.

    Another class enters the set from ``1 - threshold`` upwards (LAC); none has more than ``most``
    and all together have ``rest``. As many as fit are those that need least.
    """
    k = 1 if isinstance(counts, Singleton) else counts.k
    calibration = counts.calibration
    limit = calibration.thresholds  # one per location, or per class, or one
    if calibration.axes != ("location",):
        limit = limit.view(-1, *(1 for _ in logits.shape[1:]))
    limit = limit.expand(logits.shape).double()
    member = (calibration.score(logits[None])[0] <= limit) & limit.isfinite() & held
    # A little more than there is, and a little less than is needed: rounding settles nothing.
    needed = ((1 - limit) * (1 - 2**-20) - 2**-20).clamp(min=0)
    possible = ~held & limit.isfinite() & (needed <= most)
    needed = torch.where(possible, needed, torch.inf).sort(0).values
    others = (needed.cumsum(0) <= rest * (1 + 2**-20)).sum(0)
    stored = member.sum(0)
    return (stored <= k) & (stored + others > k)


def _abstains(mask_filter: object) -> int:
    """The label with which a filter abstains."""
    calibration = getattr(mask_filter, "calibration", None)
    return int(getattr(calibration, "ignore_index", 255))


def _named(annotator: object, source: str | None) -> str:
    """The source that is given, or the annotator's own."""
    given = source if source is not None else getattr(annotator, "source", None)
    if not isinstance(given, str) or not given:
        raise InputError(
            "source must say what the annotator is, model and prompts; it has no .source of its own"
        )
    return given


def _check_compact(best: int | None, background: int | None) -> None:
    if best is not None:
        _checks.check_integer("best", best, 1)
        if background is not None:
            _checks.check_integer("background", background, 0)
    elif background is not None:
        raise InputError("background must come with best=: only the compact form singles it out")


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note: dict[str, Any] = json.loads(path.read_bytes())
        return {name: note[name] for name in ("source", "best", "background")}
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} must be a cache's note of its source; it is damaged") from error


def _form(note: Mapping[str, Any]) -> str:
    """How logits are stored, as a field of a source."""
    best, background = note["best"], note["background"]
    form = "all classes" if best is None else f"best {best}, background {background}"
    return f"cache=float16, {form}"


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    return difference(f"{ours['source']}; {_form(ours)}", f"{theirs['source']}; {_form(theirs)}")


def _differs(folder: Path, held: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    return (
        f"{folder} must hold logits of the same source and form; {_difference(given, held)}. "
        "Take another folder"
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
