"""A folder of images to a cache of logits: what ``python -m cpseg annotate`` does.

Images go through the network one at a time, so that a run that was stopped and resumed gives the
cache of the run that was not, to the bit.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from cpseg.annotators.cache import CachedAnnotator, write_whole
from cpseg.annotators.huggingface import TextPromptAnnotator
from cpseg.annotators.images import rgb
from cpseg.annotators.pretrained import check_device, one_line
from cpseg.annotators.seem.annotator import CLIP_TOKENIZER, SEEMAnnotator
from cpseg.annotators.seem.checkpoint import load_checkpoint
from cpseg.errors import FileError, InputError, MissingExtraError

__all__ = [
    "FolderReport",
    "add_arguments",
    "annotate_folder",
    "image_files",
    "read_class_names",
    "run",
]

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@final
@dataclass(frozen=True, slots=True)
class FolderReport:
    """What a run over a folder did.

    Args:
        images: Images found.
        refused: Cache files that were damaged or foreign, and were made again.
        unreadable: Images that could not be read or that the annotator refused, and why.
    """

    images: int
    refused: tuple[str, ...]
    unreadable: tuple[str, ...]


def annotate_folder(
    folder: str | Path,
    cache: CachedAnnotator,
    *,
    progress: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> FolderReport:
    """Put the logits of every image of a folder into a cache.

    Images whose file is there and whole are passed over. ``images.json`` in the cache's folder
    says which file is whose, and is written at the end.

    Args:
        folder: Images, in subfolders too.
        cache: Where the logits go; its annotator makes them.
        progress: Wraps the list of images, such as ``tqdm.tqdm``.

    Returns:
        What was found, made again, and skipped.

    Raises:
        FileError: The folder holds no image.
    """
    root = Path(folder)
    paths = image_files(root)
    if not paths:
        raise FileError(f"{root} must hold images ({', '.join(sorted(_SUFFIXES))}); it holds none")
    # What Pillow raises for damage; its own error for an image too large to be honest is none.
    damage = (OSError, SyntaxError, ValueError, _pillow().DecompressionBombError)
    names: dict[str, str] = {}
    unreadable: list[str] = []
    for path in progress(paths):
        try:
            image = _open(path)
        except damage as error:
            unreadable.append(f"{path}: {one_line(error)}")
            continue
        try:
            names[path.relative_to(root).as_posix()] = cache.ensure(image)
        except InputError as error:  # the annotator has no answer for this one
            unreadable.append(f"{path}: {one_line(error)}")
    index = json.dumps(names, sort_keys=True, indent=0, ensure_ascii=False).encode() + b"\n"
    write_whole(cache.folder / "images.json", index)
    return FolderReport(len(paths), tuple(cache.refused), tuple(unreadable))


def image_files(folder: Path) -> list[Path]:
    """All images of a folder and its subfolders, in order of their names; hidden ones are none."""
    if not folder.is_dir():
        raise FileError(f"{folder} must be a folder of images; there is none")
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_class_names(path: str | Path) -> dict[str, list[str]]:
    """Classes from a text file: a line per class, its texts after a colon, between commas.

    Args:
        path: The file. ``person: man, woman`` prompts with two texts, ``cat`` with its name.

    Returns:
        Each class's texts, in the file's order.
    """
    classes: dict[str, list[str]] = {}
    try:
        content = Path(path).read_text(encoding="utf-8-sig")  # editors put a mark before it
    except UnicodeDecodeError as error:
        raise FileError(f"{path} must be a text file in UTF-8; {one_line(error)}") from error
    for line in content.splitlines():
        name, colon, rest = line.partition(":")
        if not line.strip():
            continue
        if not name.strip():
            raise InputError(f"{path} must name a class before each colon; got {line!r}")
        if name.strip() in classes:
            raise InputError(f"{path} must name each class once; got {name.strip()!r} twice")
        texts = [text.strip() for text in rest.split(",")] if colon else [name.strip()]
        classes[name.strip()] = texts
    return classes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m cpseg annotate``."""
    parser.add_argument("images", type=Path, help="folder of images, searched in subfolders too")
    parser.add_argument(
        "--classes",
        type=Path,
        required=True,
        help="text file, a class per line; 'person: man, woman' gives synonyms",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a SEEM checkpoint (.pt), or a folder or hub name of CLIPSeg, SAM 3 or GroupViT",
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder for the logits")
    parser.add_argument(
        "--background", metavar="NAME", help="the class that is whatever no other class claims"
    )
    parser.add_argument(
        "--best", type=int, metavar="K", help="store only the K best classes and the background"
    )
    parser.add_argument(
        "--tokenizer",
        default=CLIP_TOKENIZER,
        help="SEEM: folder or hub name of CLIP's tokenizer (%(default)s)",
    )
    parser.add_argument(
        "--short",
        type=int,
        default=512,
        help="SEEM: shorter side that the network sees (%(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the network runs (%(default)s)",
    )


def run(
    args: argparse.Namespace, progress: Callable[[Sequence[Path]], Iterable[Path]] = iter
) -> int:
    """Do what the command line says.

    Args:
        args: The words, parsed.
        progress: Wraps the list of images, for a progress bar.

    Returns:
        0 if every image was read, 1 if not, 130 if stopped.
    """
    classes = read_class_names(args.classes)
    background = None
    if args.background is not None:
        if args.background not in classes:
            raise InputError(f"--background must be one of the classes; got {args.background!r}")
        background = list(classes).index(args.background)
    image_files(args.images)  # before a model is loaded for nothing
    check_device(args.device)
    annotator = _annotator(args, classes, background)
    cache = CachedAnnotator(
        args.cache,
        annotator,
        best=args.best,
        background=background if args.best is not None else None,
    )
    try:
        report = annotate_folder(args.images, cache, progress=progress)
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped. What is done is whole; the same command goes on from here.\n")
        return 130
    for line in report.refused:
        sys.stderr.write(f"damaged or foreign, made again: {line}\n")
    for line in report.unreadable:
        sys.stderr.write(f"unreadable, skipped: {line}\n")
    sys.stderr.write(f"{report.images - len(report.unreadable)} images in {args.cache}\n")
    return 1 if report.unreadable else 0


def _annotator(
    args: argparse.Namespace, classes: dict[str, list[str]], background: int | None
) -> Callable[[Tensor], Tensor]:
    if Path(args.model).suffix in (".pt", ".pth"):
        model = load_checkpoint(args.model).to(args.device)
        return SEEMAnnotator(
            model, classes, background=background, tokenizer=args.tokenizer, short=args.short
        )
    return TextPromptAnnotator.from_pretrained(
        args.model, classes, background=background, device=args.device
    )


def _open(path: Path) -> Tensor:
    with _pillow().open(path) as opened:
        return rgb(opened)


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise MissingExtraError("reading images needs Pillow: pip install 'cpseg[data]'") from error
