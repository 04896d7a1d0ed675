"""Annotating a folder: killed anywhere and resumed, the cache is the same to the bit."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpseg.annotators.cache import CachedAnnotator
from cpseg.annotators.folder import (
    add_arguments,
    annotate_folder,
    image_files,
    read_class_names,
    run,
)
from cpseg.annotators.seem import SEEM, SEEMConfig
from cpseg.errors import FileError, InputError

Image = pytest.importorskip("PIL.Image")

COUNT = 5

# Dies by SIGKILL in the middle of a file's bytes, or between two images.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from cpseg.annotators.cache import CachedAnnotator
from cpseg.annotators.folder import annotate_folder

images, cache, moment, place = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
calls = 0

def die_at(n):
    global calls
    calls += 1
    if calls == n:
        os.kill(os.getpid(), signal.SIGKILL)

def annotator(batch):
    if moment == "between":
        die_at(place)
    return torch.stack([batch.float().mean(1), batch.float().amax(1), batch.float().amin(1)], 1)

if moment == "within":
    sync = os.fsync
    os.fsync = lambda descriptor: (die_at(place), sync(descriptor))
annotate_folder(images, CachedAnnotator(cache, annotator, source="test"))
"""


def fill(folder: Path) -> None:
    (folder / "more").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(COUNT):
        pixels = torch.randint(0, 256, (20 + i, 30, 3), generator=generator).to(torch.uint8)
        name = f"more/{i}.png" if i % 2 else f"{i}.png"
        Image.fromarray(pixels.numpy()).save(folder / name)
    (folder / "notes.txt").write_text("no image")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def attempt(images: Path, cache: Path, moment: str, place: int) -> int:
    command = [sys.executable, "-c", KILLED, str(images), str(cache), moment, str(place)]
    return subprocess.run(command, check=False).returncode  # noqa: S603  (our own script)


def test_a_run_killed_between_and_within_files_resumes_to_the_same_bits(tmp_path: Path) -> None:
    images = tmp_path / "images"
    fill(images)
    assert attempt(images, tmp_path / "whole", "never", 0) == 0
    killed = tmp_path / "killed"
    # File writes: 1 is cache.json, 2 to 6 the images, 7 images.json.
    assert attempt(images, killed, "within", 1) == -9
    assert attempt(images, killed, "within", 3) == -9
    assert any(name.endswith(".part") for name in files(killed))
    assert attempt(images, killed, "between", 2) == -9
    assert attempt(images, killed, "within", 4) == -9  # images.json
    assert attempt(images, killed, "never", 0) == 0
    assert files(killed) == files(tmp_path / "whole")


def test_every_image_is_in_the_index_and_unreadable_ones_are_named(tmp_path: Path) -> None:
    images = tmp_path / "images"
    fill(images)
    (images / "broken.png").write_bytes((images / "0.png").read_bytes()[:60])
    (images / "empty.jpg").write_bytes(b"")
    cache = CachedAnnotator(tmp_path / "cache", lambda b: b.float(), source="test")
    report = annotate_folder(images, cache)
    assert report.images == COUNT + 2
    assert [line.split(":")[0] for line in report.unreadable] == [
        str(images / "broken.png"),
        str(images / "empty.jpg"),
    ]
    index = json.loads((tmp_path / "cache" / "images.json").read_text())
    assert sorted(index) == ["0.png", "2.png", "4.png", "more/1.png", "more/3.png"]
    assert all((tmp_path / "cache" / path).exists() for path in index.values())


def test_one_image_that_cannot_be_answered_stops_no_other(tmp_path: Path) -> None:
    images = tmp_path / "images"
    fill(images)
    Image.new("I;16", (30, 20)).save(images / "deep.png")
    Image.new("RGB", (2, 20)).save(images / "narrow.png")

    def annotator(batch: torch.Tensor) -> torch.Tensor:
        if batch.shape[-1] < 8:
            raise InputError("images must be at least 8 wide\nfor this network; got 2")
        return batch.float()

    report = annotate_folder(images, CachedAnnotator(tmp_path / "cache", annotator, source="test"))
    deep, narrow = report.unreadable
    assert deep.startswith(f"{images / 'deep.png'}: an image must have 8 bits per channel;")
    assert narrow == f"{images / 'narrow.png'}: images must be at least 8 wide"
    index = json.loads((tmp_path / "cache" / "images.json").read_text())
    assert len(index) == COUNT


def test_an_image_too_large_to_be_honest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    fill(images)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # 24 x 30 is more than twice that
    cache = CachedAnnotator(tmp_path / "cache", lambda b: b.float(), source="test")
    with pytest.warns(Image.DecompressionBombWarning):
        report = annotate_folder(images, cache)
    assert [line.split(":")[0] for line in report.unreadable] == [
        str(images / name) for name in ("2.png", "4.png", "more/1.png", "more/3.png")
    ]


def test_a_form_that_does_not_fit_stops_at_the_first_image(tmp_path: Path) -> None:
    fill(tmp_path / "images")
    cache = CachedAnnotator(tmp_path / "cache", lambda b: b.float(), source="test", best=99)
    with pytest.raises(FileError, match="at most the annotator's 3 classes"):
        annotate_folder(tmp_path / "images", cache)


def test_a_full_disk_is_no_unreadable_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "images")
    cache = CachedAnnotator(tmp_path / "cache", lambda b: b.float(), source="test")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        annotate_folder(tmp_path / "images", cache)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    cache = CachedAnnotator(tmp_path / "cache", lambda b: b.float(), source="test")
    with pytest.raises(FileError, match="must be a folder of images"):
        annotate_folder(tmp_path / "none", cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"must hold images \(\.bmp"):
        annotate_folder(tmp_path / "empty", cache)


def test_class_files_name_classes_and_their_texts(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("background\nperson: man, woman\n\ncat\n")
    assert read_class_names(path) == {
        "background": ["background"],
        "person": ["man", "woman"],
        "cat": ["cat"],
    }
    path.write_text("cat\ncat\n")
    with pytest.raises(InputError, match="must name each class once; got 'cat' twice"):
        read_class_names(path)


def write_model(folder: Path) -> None:
    """A tiny random SEEM and a CLIP tokenizer with a letter per token."""
    config = SEEMConfig(
        embed_dim=8,
        depths=(1, 1, 1, 1),
        focal_levels=2,
        dim=32,
        heads=1,
        feedforward=64,
        encoder_layers=1,
        decoder_layers=3,
        queries=7,
        text_vocabulary=64,
        text_context=77,
        text_layers=1,
        text_heads=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(SEEM(config).state_dict(), folder / "seem.pt")
    letters = "abcdefghijklmnopqrstuvwxyz.-"
    pieces = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def arguments(folder: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    fixed = [
        str(folder / "images"),
        "--classes",
        str(folder / "classes.txt"),
        "--model",
        str(folder / "seem.pt"),
        "--cache",
        str(folder / "cache"),
        "--tokenizer",
        str(folder),
        "--device",
        "cpu",
        "--short",
        "32",
    ]
    return parser.parse_args([*fixed, *more])


def test_the_command_takes_class_names_and_a_checkpoint_to_a_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    fill(tmp_path / "images")
    write_model(tmp_path)
    (tmp_path / "classes.txt").write_text("sky\nperson: man, woman\n")
    assert run(arguments(tmp_path, "--background", "sky", "--best", "1")) == 0
    assert f"{COUNT} images in {tmp_path / 'cache'}" in capsys.readouterr().err
    cache = CachedAnnotator(tmp_path / "cache")
    assert "SEEM focal_dw, 2 classes" in cache.source
    (logits,) = cache.annotate([Image.open(tmp_path / "images" / "0.png")])
    assert logits.shape == (2, 20, 30)
    before = files(tmp_path / "cache")
    victim = next(name for name in before if name.endswith(".logits"))
    (tmp_path / "cache" / victim).write_bytes(before[victim][:-1])
    assert run(arguments(tmp_path, "--background", "sky", "--best", "1")) == 0
    assert f"made again: {tmp_path / 'cache' / victim}" in capsys.readouterr().err
    assert files(tmp_path / "cache") == before
    with pytest.raises(FileError, match="cache is float16, all classes here"):
        run(arguments(tmp_path, "--background", "sky"))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device must be one that torch can use here"):
            run(arguments(tmp_path, "--device", "cuda"))
    with pytest.raises(InputError, match="--background must be one of the classes"):
        run(arguments(tmp_path, "--background", "sea"))


def test_control_c_ends_with_a_word_and_a_whole_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "images")
    (tmp_path / "classes.txt").write_text("cat\n")
    seen: list[int] = []

    def annotator(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return batch.float()

    monkeypatch.setattr("cpseg.annotators.folder._annotator", lambda *_: annotator)
    annotator.source = "test"  # type: ignore[attr-defined]
    assert run(arguments(tmp_path)) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert sum(name.endswith(".logits") for name in files(tmp_path / "cache")) == 2
    assert run(arguments(tmp_path)) == 0
    assert len(seen) == 3 + COUNT - 2


def test_a_class_file_of_an_editor_is_read_and_a_line_without_a_name_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(b"\xef\xbb\xbfsky\r\ncat: cat, kitten\r\n")  # a mark of UTF-8 before it
    assert read_class_names(path) == {"sky": ["sky"], "cat": ["cat", "kitten"]}
    path.write_text("sky\n: cat\n", encoding="utf-8")
    with pytest.raises(InputError, match="must name a class before each colon; got ': cat'"):
        read_class_names(path)
    path.write_bytes("sky\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(FileError, match="must be a text file in UTF-8"):
        read_class_names(path)


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    (tmp_path / ".thumbnails").mkdir()
    for name in ("a.png", "._a.png", ".thumbnails/a.png"):
        (tmp_path / name).write_bytes(b"")
    hidden = tmp_path / ".thumbnails"
    assert image_files(tmp_path) == [tmp_path / "a.png"]
    assert image_files(hidden) == [hidden / "a.png"]  # asked for by name
