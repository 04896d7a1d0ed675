"""Folders of images and masks: what is read, and that every bad file is named at once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cpseg.data import SegmentationFolder, read_split
from cpseg.errors import FileError, InputError

image_module = pytest.importorskip("PIL.Image")

IDS = np.arange(20, dtype=np.uint8).reshape(4, 5) % 3


def picture(path: Path, array: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = image_module.fromarray(array)
    if mode == "P":
        made.putpalette([value for i in range(256) for value in (255 - i, i, 7)])
    elif mode:
        made = made.convert(mode)
    made.save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rgb = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    for name in ("a", "b", "c"):
        picture(tmp_path / "images" / f"{name}.png", rgb)
    picture(tmp_path / "masks" / "a.png", IDS)
    picture(tmp_path / "masks" / "b.png", IDS, "P")
    (tmp_path / "two.txt").write_text(
        "images/a.png masks/a.png\n\nimages/b.png masks/b.png\nimages/c.png\n"
    )
    return tmp_path


def folder(root: Path, *pairs: tuple[str, str | None], classes: int = 3) -> SegmentationFolder:
    return SegmentationFolder(root=root, pairs=pairs, num_classes=classes)


def test_gray_and_palette_masks_and_images_without_one(root: Path) -> None:
    read = SegmentationFolder.from_split(root, root / "two.txt", num_classes=3)
    assert len(read) == 3
    for index in (0, 1):
        image, labels = read[index]
        assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 4, 5))
        assert labels.tolist() == IDS.tolist()
    with image_module.open(root / "images/a.png") as picture_:
        assert read[0][0].permute(1, 2, 0).tolist() == np.asarray(picture_).tolist()
    assert read[2][1].tolist() == [[255] * 5] * 4
    report = read.check()
    assert (report.images, report.masks, report.sizes) == (3, 2, {(4, 5): 3})
    assert report.pixels == {0: 14, 1: 14, 2: 12}
    assert "4 x 5 (3)" in str(report)
    assert [labels.shape for _, labels in read] == [(4, 5)] * 3


@pytest.mark.parametrize(("mode", "expected"), [("I;16", 2), ("1", 1)])
def test_masks_of_other_depths(root: Path, mode: str, expected: int) -> None:
    array = IDS.astype(np.uint16) if mode == "I;16" else IDS > 0
    picture(root / "masks" / "d.png", array)
    _, labels = folder(root, ("images/a.png", "masks/d.png"))[0]
    assert int(labels.max()) == expected
    assert torch.equal(labels > 0, torch.from_numpy(IDS > 0))


def test_reduce_zero_label_and_id_maps(root: Path) -> None:
    values = np.array([[0, 1, 2, 150, 255]] * 4, dtype=np.uint8)
    picture(root / "masks" / "d.png", values)
    pairs = [("images/a.png", "masks/d.png")]
    reduced = SegmentationFolder(root=root, pairs=pairs, num_classes=150, reduce_zero_label=True)
    assert reduced[0][1][0].tolist() == [255, 0, 1, 149, 255]
    mapped = SegmentationFolder(root=root, pairs=pairs, num_classes=2, id_map={150: 1, 1: 0})
    assert mapped[0][1][0].tolist() == [255, 0, 255, 1, 255]
    with pytest.raises(InputError, match="id_map must be None"):
        SegmentationFolder(
            root=root, pairs=pairs, num_classes=2, id_map={1: 0}, reduce_zero_label=True
        )


def test_labels_from_elsewhere_by_name(root: Path) -> None:
    asked: list[str] = []

    def load(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.full((4, 5), 1, dtype=torch.uint8)

    read = SegmentationFolder(
        root=root, pairs=[("images/c.png", "missing.png")], num_classes=3, load_labels=load
    )
    assert int(read[0][1].sum()) == 20
    assert read[0][1].dtype == torch.int64
    assert asked[0] == "c"


def test_probabilities_from_elsewhere_come_as_they_are(root: Path) -> None:
    shares = torch.zeros(3, 4, 5)
    shares[0], shares[2] = 0.25, 0.75
    shares[:, 0] = 0
    given = {"a": shares, "c": shares[:2]}
    read = SegmentationFolder(
        root=root,
        pairs=[("images/a.png", None), ("images/c.png", None)],
        num_classes=3,
        load_labels=given.__getitem__,
    )
    assert torch.equal(read[0][1], shares)
    with pytest.raises(FileError, match=r"c must hold probabilities \(3, 4, 5\); got \(2, 4, 5\)"):
        read[1]
    only = SegmentationFolder(
        root=root, pairs=read.pairs[:1], num_classes=3, load_labels=given.__getitem__
    )
    assert only.check().pixels == {2: 15, 255: 5}


def test_every_bad_file_is_named_at_once(root: Path) -> None:
    (root / "images" / "cut.png").write_bytes((root / "images" / "a.png").read_bytes()[:60])
    picture(root / "masks" / "rgb.png", np.zeros((4, 5, 3), dtype=np.uint8))
    picture(root / "masks" / "small.png", IDS[:3])
    picture(root / "masks" / "ids.png", IDS + 7)
    bad = folder(
        root,
        ("images/a.png", "masks/a.png"),
        ("images/gone.png", None),
        ("images/cut.png", None),
        ("images/a.png", "masks/rgb.png"),
        ("images/a.png", "masks/small.png"),
        ("images/a.png", "masks/ids.png"),
        ("images/a.png", "masks/gone.png"),
    )
    with pytest.raises(FileError) as found:
        bad.check()
    message = str(found.value)
    assert "7 sound images; got 6 that are not" in message
    for name, why in (
        ("images/gone.png", "is missing"),
        ("images/cut.png", "is damaged or no picture"),
        ("masks/rgb.png", "must be a mask of ids, gray or with a palette; got mode RGB"),
        ("masks/small.png", "must be of its image's size, 4 x 5; got 3 x 5"),
        ("masks/ids.png", "must hold classes in [0, 3) or 255; got 7, 8, 9"),
        ("masks/gone.png", "is missing"),
    ):
        assert any(name in line and why in line for line in message.splitlines()), name


def test_split_files_with_nothing_to_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="must be a split file"):
        read_split(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(FileError, match="at least one line"):
        read_split(tmp_path / "empty.txt")
    with pytest.raises(InputError, match="pairs must hold"):
        folder(tmp_path)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match="text in UTF-8"):
        read_split(tmp_path / "bytes.txt")


def test_columns_are_parted_by_a_space_or_a_tab(tmp_path: Path) -> None:
    (tmp_path / "split.txt").write_text("a.jpg\ta.png\nb.jpg  b c.png \nc.jpg\n")
    pairs = [("a.jpg", "a.png"), ("b.jpg", "b c.png"), ("c.jpg", None)]
    assert read_split(tmp_path / "split.txt") == pairs


def test_headers_tell_of_every_file_but_not_of_ids(root: Path) -> None:
    whole = (root / "images" / "a.png").read_bytes()
    (root / "images" / "cut.png").write_bytes(whole[:-30])
    image_module.open(root / "images" / "a.png").save(root / "images" / "a.jpg")
    jpeg = (root / "images" / "a.jpg").read_bytes()
    (root / "images" / "long.jpg").write_bytes(jpeg + b"more")  # as some cameras leave them
    (root / "images" / "cut.jpg").write_bytes(jpeg[: len(jpeg) - 40])
    (root / "images" / "empty.png").write_bytes(b"")
    picture(root / "masks" / "rgb.png", np.zeros((4, 5, 3), dtype=np.uint8))
    picture(root / "masks" / "small.png", IDS[:3])
    picture(root / "masks" / "ids.png", IDS + 7)
    bad = folder(
        root,
        ("images/a.png", "masks/ids.png"),
        ("images/a.jpg", "masks/a.png"),
        ("images/long.jpg", "masks/b.png"),
        ("images/gone.png", "masks/gone.png"),
        ("images/cut.png", None),
        ("images/cut.jpg", None),
        ("images/empty.png", None),
        ("images/a.png", "masks/rgb.png"),
        ("images/a.png", "masks/small.png"),
    )
    expected = [
        ("images/gone.png", "is missing"),
        ("masks/gone.png", "is missing"),
        ("images/cut.png", "is damaged or no picture"),
        ("images/cut.jpg", "is damaged or no picture"),
        ("images/empty.png", "is damaged or no picture"),
        ("masks/rgb.png", "must be a mask of ids, gray or with a palette; got mode RGB"),
        ("masks/small.png", "must be of its image's size, 4 x 5; got 3 x 5"),
    ]
    found = bad.faults(range(len(bad)))
    assert len(found) == len(expected), found
    for line, (name, why) in zip(found, expected, strict=True):
        assert name in line
        assert why in line
    with pytest.raises(FileError, match="9 sound images; got 7 that are not") as error:
        bad.check()
    assert "masks/gone.png is missing" in str(error.value)  # with its image, not after it
