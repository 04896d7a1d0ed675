"""Published splits are the published ones; VOC, COCO and Cityscapes from folders of their layout."""

import hashlib
import json
import pickle
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from scipy import io

from cpseg import data
from cpseg.data import (
    CITYSCAPES_IDS,
    COCO_STUFF_IDS,
    COCO_THING_IDS,
    SegmentationFolder,
    cityscapes,
    coco,
    published_split,
    published_splits,
    voc2012,
)
from cpseg.errors import FileError, InputError

# SHA-256 of the sorted names, joined by newlines, of lists in UniMatch's folder splits.
PUBLISHED = {
    ("voc2012", "92"): "124b0aab2fcd1767214bf465d8fa24dd179c3abe99951a063a92d11c48663987",
    ("voc2012", "u2pl_1_16"): "feea4692738362e449721faff842a3aa103bf984f7d6dd748eeb511a6f722fe5",
    ("cityscapes", "1_16"): "1e5363dd012cdc467f638ea0ab2cd0315cc7243146c81b47e12e9bb97c50266c",
    ("coco", "1_512"): "7a80d0605a2a43838cb7d3c3a90aa7258d597f0556e45dd1ba504a5a5ebb3a10",
}
PARTS: list[Literal["labeled", "unlabeled", "validation"]] = [
    "labeled",
    "unlabeled",
    "validation",
]
SIZES = {
    "voc2012": [92, 183, 366, 732, 1464, 662, 1323, 2646, 662, 1323, 2646, 10582, 1449],
    "cityscapes": [100, 186, 372, 744, 1488, 2975, 500],
    "coco": [232, 463, 925, 1849, 3697],
}


@pytest.mark.parametrize(("dataset", "split"), PUBLISHED)
def test_names_are_those_of_the_published_lists(dataset: Any, split: str) -> None:
    text = "\n".join(published_split(dataset, split))
    assert hashlib.sha256(text.encode()).hexdigest() == PUBLISHED[(dataset, split)]


@pytest.mark.parametrize("dataset", SIZES)
def test_every_shipped_list_passes_its_checksum_and_has_its_size(dataset: Any) -> None:
    sizes = published_splits(dataset)
    assert list(sizes.values()) == SIZES[dataset]
    for split, size in sizes.items():
        names = published_split(dataset, split)
        assert len(set(names)) == size
        assert names == sorted(names)


def test_vocs_splits_overlap_as_the_published_ones_do() -> None:
    names = {split: set(published_split("voc2012", split)) for split in published_splits("voc2012")}
    pairs = (("92", "183"), ("183", "366"), ("366", "732"))
    assert [len(names[a] & names[b]) for a, b in pairs] == [9, 42, 188]
    assert all(names[split] < names["1464"] for split in ("92", "183", "366", "732"))
    assert [len(names[split] & names["1464"]) for split in ("1_16", "u2pl_1_16")] == [93, 662]
    assert not names["val"] & names["train_aug"]


def test_a_list_that_was_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads(files("cpseg.data").joinpath("splits.json").read_text("utf-8"))
    assert "MIT License" in content["notice"]
    voc = content["voc2012"]
    voc["splits"]["92"]["bits"] = voc["splits"]["183"]["bits"]

    def changed(text: str) -> object:
        return content if text else None

    monkeypatch.setattr(json, "loads", changed)
    with pytest.raises(FileError, match="split 92 must have SHA-256"):
        published_split("voc2012", "92")


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"got '1/16'\. Did you mean '1_16'\?"):
        voc2012("x", "labeled", split="1/16")
    with pytest.raises(InputError, match="dataset must be of voc2012, cityscapes, coco"):
        published_split("voc", "92")  # type: ignore[arg-type]
    for build in (voc2012, cityscapes, coco):
        with pytest.raises(InputError, match='part must be "labeled"'):
            build("x", "labelled")  # type: ignore[arg-type]


def test_labeled_and_unlabeled_parts_make_up_the_training_images() -> None:
    for build, split, size in ((voc2012, "366", 10582), (cityscapes, "1_8", 2975)):
        parts = [build("x", part, split=split) for part in PARTS[:2]]
        names = [{folder.name(i) for i in range(len(folder))} for folder in parts]
        assert len(names[0] | names[1]) == size
        assert not names[0] & names[1]
        assert all(mask is not None for _, mask in parts[0].pairs)
        assert all(mask is None for _, mask in parts[1].pairs)


def draw(folder: SegmentationFolder, ids: list[int], *, palette: bool = False) -> None:
    """Write the first image, and its mask where there is one."""
    pillow = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    row = numpy.array([ids], dtype=numpy.uint8)
    image, mask = folder.pairs[0]
    for name in filter(None, (image, mask)):
        path = Path(folder.root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = pillow.fromarray(row)
        if name == mask and palette:
            picture.putpalette([7, 7, 7] * 256)
        picture.save(path)


def test_voc_reads_gray_and_palette_masks(tmp_path: Path) -> None:
    for masks, palette in (("SegmentationClassAug", False), ("SegmentationClass", True)):
        labeled = voc2012(tmp_path, "labeled", masks=masks)
        draw(labeled, [0, 20, 255], palette=palette)
        assert labeled.pairs[0][1] == f"{masks}/2007_000733.png"
        assert labeled[0][1].tolist() == [[0, 20, 255]]
    unlabeled = voc2012(tmp_path, "unlabeled")
    draw(unlabeled, [9, 9, 9])
    assert unlabeled[0][1].tolist() == [[255, 255, 255]]
    with pytest.raises(FileError, match=r"got 91 that are not") as found:
        labeled.check()
    assert "2011_003216.jpg is missing" in str(found.value)


def test_voc_reads_sbds_own_files_for_the_images_that_are_not_vocs(tmp_path: Path) -> None:
    voc, sbd = tmp_path / "VOC2012", tmp_path / "dataset"
    folder = voc2012(voc, "labeled", split="1_16", masks="SegmentationClass", sbd=sbd)
    own = published_split("voc2012", "1464")
    places = [
        next(i for i in range(662) if (folder.name(i) in own) == flag) for flag in (True, False)
    ]
    folder = replace(folder, pairs=[folder.pairs[place] for place in places])
    draw(folder, [0, 20, 255], palette=True)
    other = replace(folder, pairs=folder.pairs[1:], load_labels=None)
    draw(other, [4, 4, 4])  # a picture of the mask is there, and not read
    with pytest.raises(FileError, match=r"cls/\d{4}_\d{6}\.mat is missing"):
        folder[1]
    (sbd / "cls").mkdir(parents=True)
    path = sbd / "cls" / f"{folder.name(1)}.mat"
    ids = torch.tensor([[7, 0, 1]], dtype=torch.uint8).numpy()
    io.savemat(str(path), {"GTcls": {"Segmentation": ids, "Boundaries": 0}}, do_compression=True)
    assert [labels.tolist() for _, labels in folder] == [[[0, 20, 255]], [[7, 0, 1]]]
    whole = path.read_bytes()
    for damaged in (b"", b"no file of matlab's" * 20, whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match="is damaged or not of SBD"):
            folder[1]
    assert voc2012(voc, "unlabeled", sbd=sbd).load_labels is None


def test_cityscapes_maps_its_ids(tmp_path: Path) -> None:
    folder = cityscapes(tmp_path, "validation")
    draw(folder, [*range(34)])
    image, mask = folder.pairs[0]
    assert image == "leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png"
    assert mask == "gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png"
    off = 255
    # Unlabeled and vehicle's own, flat, flat, construction, construction, pole, objects to cars,
    # caravan and trailer, train to bicycle.
    expected = [*[off] * 7, 0, 1, off, off, 2, 3, 4, off, off, off, 5, off, *range(6, 16)]
    assert folder[0][1].tolist() == [[*expected, off, off, 16, 17, 18]]
    assert sorted(CITYSCAPES_IDS.values()) == list(range(19))


def test_coco_reads_each_kind_of_masks(tmp_path: Path) -> None:
    made = coco(tmp_path, "labeled")
    draw(made, [0, 80, 255])
    assert made[0][1].tolist() == [[0, 80, 255]]
    for masks, classes, expected in (
        ("stuffthingmaps", 171, [0, 11, 79, 80, 170, 255]),
        ("stuffthingmaps as things", 81, [1, 12, 80, 0, 0, 255]),
    ):
        folder = coco(tmp_path, "labeled", masks=masks)  # type: ignore[arg-type]
        draw(folder, [0, 12, 89, 91, 181, 255])  # person, stop sign, toothbrush, stuff, stuff
        assert folder.pairs[0][1] == f"stuffthingmaps/train2017/{folder.name(0)}.png"
        assert folder.num_classes == classes
        assert folder[0][1].tolist() == [expected]
    # Street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door, blender, hair brush.
    unused = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
    assert (
        COCO_STUFF_IDS.keys() == COCO_THING_IDS.keys() == set(range(182)) - {i - 1 for i in unused}
    )
    assert list(COCO_STUFF_IDS.values()) == list(range(171))
    assert (len(COCO_STUFF_IDS), max(COCO_STUFF_IDS.values())) == (171, 170)
    assert sorted(set(COCO_THING_IDS.values())) == list(range(81))


def test_cocos_other_images_are_those_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"train2017/\*\.jpg; got none"):
        coco(tmp_path, "unlabeled")
    draw(coco(tmp_path, "labeled"), [1, 2])
    for folder in ("train2017", "val2017"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "000000000000.jpg").touch()
    unlabeled, validation = (coco(tmp_path, part) for part in PARTS[1:])
    assert unlabeled.pairs == [("train2017/000000000000.jpg", None)]
    assert validation.pairs == [("val2017/000000000000.jpg", "masks/000000000000.png")]
    with pytest.raises(InputError, match="masks must be 'masks'"):
        coco(tmp_path, "labeled", masks="stuff")  # type: ignore[arg-type]


def test_every_kind_of_folder_reaches_a_worker_process(tmp_path: Path) -> None:
    for folder in (
        voc2012(tmp_path, "labeled", split="1_16", sbd=tmp_path),
        cityscapes(tmp_path, "labeled"),
        coco(tmp_path, "labeled", masks="stuffthingmaps"),
    ):
        copy: SegmentationFolder = pickle.loads(pickle.dumps(folder))  # noqa: S301 - our own
        assert (copy.pairs, copy.id_map) == (folder.pairs, folder.id_map)


def test_torch_reads_what_the_folder_gives(tmp_path: Path) -> None:
    folder = voc2012(tmp_path, "validation")
    draw(folder, [3, 255])
    image, labels = folder[0]
    assert (image.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert image.shape == (3, 1, 2)


def test_no_function_hides_a_module() -> None:
    for name in ("voc2012", "ade20k", "coco", "cityscapes"):
        assert find_spec(f"cpseg.data.{name}") is None
        assert callable(getattr(data, name))
