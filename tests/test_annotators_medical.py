"""Sigmoid channels, nnU-Net's files and NIfTI volumes."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cpseg import GroupCalibrator
from cpseg.annotators import (
    CachedAnnotator,
    Preprocessing,
    SigmoidAnnotator,
    channel_values,
    load_nifti,
    load_nifti_labels,
    load_nnunet,
)
from cpseg.annotators.folder import annotate_folder
from cpseg.errors import FileError, InputError


def shares() -> np.ndarray[Any, Any]:
    values = np.random.default_rng(0).random((2, 3, 4, 5)).astype(np.float32)
    normal: np.ndarray[Any, Any] = values / values.sum(0)
    return normal


def write_nifti(path: Path, array: np.ndarray[Any, Any], spacing: tuple[float, ...]) -> None:
    nibabel: Any = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(array, np.diag([*spacing, 1.0]))
    nibabel.save(image, path)


class Channels(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.mean(1) * (k + 1) for k in range(self.count)], 1)


@pytest.mark.parametrize("count", [1, 3])
def test_every_channel_is_on_with_its_sigmoid(count: int) -> None:
    images = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(torch.uint8)
    label = SigmoidAnnotator(Channels(count), Preprocessing())
    logits = label(images)
    assert logits.shape == (2 * count, 2, 4, 5)
    values = Channels(count)(Preprocessing()(images, torch.zeros(())))
    for b in range(2):
        for k in range(count):
            torch.testing.assert_close(logits[b * count + k].softmax(0)[1], values[b, k].sigmoid())


def test_saved_channel_probabilities_go_back_before_the_sigmoid() -> None:
    values = torch.linspace(-9, 9, 19, dtype=torch.float64)
    torch.testing.assert_close(channel_values(values.sigmoid()), values)
    ends = channel_values(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [-87.0, 87.0]
    with pytest.raises(InputError, match="must lie between 0 and 1"):
        channel_values(torch.tensor([1.5]))
    with pytest.raises(InputError, match="must lie between 0 and 1"):
        channel_values(torch.tensor([torch.nan]))


@pytest.mark.parametrize("name", ["probabilities", "softmax"])
def test_nnunet_probabilities_come_with_the_spacing_of_their_prediction(
    tmp_path: Path, name: str
) -> None:
    save: Any = np.savez_compressed
    save(tmp_path / "case.npz", **{name: shares()})
    labels = shares().argmax(0).astype(np.uint8)  # (Z, Y, X)
    write_nifti(tmp_path / "case.nii.gz", labels.transpose(), (0.5, 0.75, 3.0))
    volume = load_nnunet(tmp_path / "case.npz")
    assert volume.spacing == (3.0, 0.75, 0.5)
    assert torch.equal(volume.values, torch.from_numpy(shares()))
    truth = load_nifti(tmp_path / "case.nii.gz")
    assert truth.spacing == volume.spacing
    assert truth.values.dtype == torch.int64
    assert torch.equal(truth.values, volume.values.argmax(0))
    given = load_nnunet(tmp_path / "case.npz", spacing=(1, 2, 3))
    assert given.spacing == (1.0, 2.0, 3.0)


def test_float_volumes_and_scaled_ones_are_float(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    write_nifti(tmp_path / "ct.nii", array, (1.0, 1.0, 2.5))
    volume = load_nifti(tmp_path / "ct.nii")
    assert volume.values.dtype == torch.float32
    assert volume.values.shape == (5, 4, 3)
    assert volume.values[4, 3, 2].item() == array[2, 3, 4].item()


def test_labels_stored_as_floats_are_taken_if_they_are_whole(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 4, (3, 4, 5))
    write_nifti(tmp_path / "float.nii.gz", labels.astype(np.float64), (1.0, 2.0, 3.0))
    write_nifti(tmp_path / "byte.nii.gz", labels.astype(np.uint8), (1.0, 2.0, 3.0))
    for name in ("float", "byte"):
        volume = load_nifti_labels(tmp_path / f"{name}.nii.gz")
        assert volume.values.dtype == torch.int64
        assert volume.values.tolist() == labels.transpose().tolist()
        assert volume.spacing == (3.0, 2.0, 1.0)
    for wrong in (0.5, np.nan, np.inf, 1e12):
        array = labels.astype(np.float64)
        array[1, 2, 3] = wrong
        write_nifti(tmp_path / "wrong.nii", array, (1.0, 2.0, 3.0))
        with pytest.raises(FileError, match=r"wrong\.nii must hold labels.*1 of its values") as no:
            load_nifti_labels(tmp_path / "wrong.nii")
        assert "\n" not in str(no.value)


def test_a_grid_or_spacing_that_cannot_be_is_refused(tmp_path: Path) -> None:
    save: Any = np.savez_compressed
    save(tmp_path / "case.npz", probabilities=shares())  # Z, Y, X = 3, 4, 5
    for shape in ((3, 4, 5), (5, 4, 2)):  # X, Y, Z: axes not reversed, and too few slices
        write_nifti(tmp_path / "case.nii.gz", np.zeros(shape, np.uint8), (1.0, 1.0, 1.0))
        with pytest.raises(FileError, match=r"must have the grid of case\.nii\.gz beside it"):
            load_nnunet(tmp_path / "case.npz")
    assert load_nnunet(tmp_path / "case.npz", spacing=(1, 1, 1)).spacing == (1.0, 1.0, 1.0)
    for spacing in ((1.0, float("nan"), 1.0), (1.0, 1.0, float("inf")), (1.0, 1.0), (-1, 1, 1)):
        with pytest.raises(InputError, match="spacing must be three positive lengths"):
            load_nnunet(tmp_path / "case.npz", spacing=spacing)
    for bad in (float("nan"), 0.0, -2.0):
        write_nifti(tmp_path / "case.nii", np.zeros((5, 4, 3), np.uint8), (1.0, 1.0, 1.0))
        content = bytearray((tmp_path / "case.nii").read_bytes())
        content[84:88] = struct.pack("<f", bad)  # the header's pixdim[2]
        (tmp_path / "case.nii").write_bytes(content)
        for load in (load_nifti, load_nifti_labels):
            with pytest.raises(FileError, match=r"case\.nii must have positive distances") as no:
                load(tmp_path / "case.nii")
            assert "\n" not in str(no.value)


def images_of(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, h, w), generator=generator).to(torch.uint8) for h, w in sizes]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("best", [None, 1])
def test_channels_go_through_a_cache_and_come_back_in_their_order(
    tmp_path: Path, count: int, best: int | None
) -> None:
    label = SigmoidAnnotator(Channels(count), Preprocessing())
    cached = CachedAnnotator(tmp_path, label, best=best)
    batch = torch.stack(images_of((4, 5), (4, 5)))
    live = label(batch).log_softmax(1)
    for _ in range(2):
        logits = cached(batch)
        assert logits.shape == (2 * count, 2, 4, 5)
        torch.testing.assert_close(logits, live, rtol=2e-3, atol=1e-3)
    assert torch.equal(CachedAnnotator(tmp_path)(batch), cached(batch))
    mixed = images_of((4, 5), (3, 7))
    for answers in (label.annotate(mixed), cached.annotate(mixed)):
        sizes = [(4, 5), (3, 7)]
        lead = () if count == 1 else (count,)
        assert [tuple(a.shape) for a in answers] == [(*lead, 2, *size) for size in sizes]
    calibrator = GroupCalibrator(num_groups=count, num_classes=2, source=cached.source)
    truth = (live.argmax(1) == 1).long()
    groups = torch.arange(count).repeat(2)[:, None, None].expand_as(truth)
    units = torch.arange(2).repeat_interleave(count)
    calibration = calibrator.update(cached(batch), truth, groups, unit_ids=units).compute(0.4)
    cached.check(calibration)


def test_a_folder_of_images_takes_an_annotator_of_many_channels(tmp_path: Path) -> None:
    pillow: Any = pytest.importorskip("PIL.Image")
    (tmp_path / "images").mkdir()
    for place, image in enumerate(images_of((4, 5), (6, 5))):
        array = image.permute(1, 2, 0).numpy()
        pillow.fromarray(array).save(tmp_path / "images" / f"{place}.png")
    label = SigmoidAnnotator(Channels(3), Preprocessing())
    cache = CachedAnnotator(tmp_path / "cache", label)
    report = annotate_folder(tmp_path / "images", cache)
    assert report.unreadable == ()
    shapes = [
        tuple(a.shape) for a in CachedAnnotator(tmp_path / "cache").annotate(images_of((4, 5)))
    ]
    assert shapes == [(3, 2, 4, 5)]


def test_an_annotator_whose_rows_do_not_divide_among_images_is_refused(tmp_path: Path) -> None:
    cache = CachedAnnotator(tmp_path, lambda _: torch.zeros(3, 2, 4, 5), source="three")
    with pytest.raises(InputError, match=r"annotator must answer 2 images with logits"):
        cache(torch.stack(images_of((4, 5), (4, 5))))
    with pytest.raises(InputError, match=r"model must answer with values \(B, L, h, w\)"):
        SigmoidAnnotator(nn.Flatten(), Preprocessing())(torch.stack(images_of((4, 5))))


def test_files_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    path.write_bytes(b"PK half a file")
    with pytest.raises(FileError, match=r"case\.npz must be nnU-Net's saved probabilities"):
        load_nnunet(path)
    np.savez(path, other=shares())
    with pytest.raises(FileError, match="it holds none"):
        load_nnunet(path)
    np.savez(path, probabilities=shares()[0])
    with pytest.raises(FileError, match=r"must hold float probabilities \(C, Z, Y, X\)"):
        load_nnunet(path)
    np.savez(path, probabilities=np.array([{"a": 1}], dtype=object))
    with pytest.raises(FileError, match="saved probabilities"):
        load_nnunet(path)
    np.savez(path, probabilities=shares())
    with pytest.raises(FileError, match=r"must have its spacing in case\.nii\.gz beside it"):
        load_nnunet(path)
    with pytest.raises(InputError, match="spacing must be three positive lengths"):
        load_nnunet(path, spacing=(1, 2, 0))
    pytest.importorskip("nibabel")
    (tmp_path / "bad.nii").write_bytes(b"bad")
    with pytest.raises(FileError, match="must be a NIfTI volume"):
        load_nifti(tmp_path / "bad.nii")


def test_damaged_probabilities_and_spacings_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    np.savez_compressed(path, probabilities=shares())
    content = bytearray(path.read_bytes())
    name, extra = struct.unpack_from("<HH", content, 26)
    content[30 + name + extra] = 255  # no block of deflate begins so
    path.write_bytes(bytes(content))
    with pytest.raises(FileError, match=r"case\.npz must be nnU-Net's saved probabilities"):
        load_nnunet(path, spacing=(1, 1, 1))
    for array in (np.full((2, 3, 4, 5), np.nan, np.float16), np.ones((2, 0, 4, 5), np.float32)):
        np.savez(path, probabilities=array)
        with pytest.raises(FileError, match="must hold finite probabilities"):
            load_nnunet(path, spacing=(1, 1, 1))
    np.save(tmp_path / "case.npy", shares())
    with pytest.raises(FileError, match=r"case\.npy must be nnU-Net's"):
        load_nnunet(tmp_path / "case.npy", spacing=(1, 1, 1))
    np.savez(path, probabilities=shares())
    for spacing in ("abc", 1.0, (1, 1), (1, 1, "1"), (1, 0, 1)):
        with pytest.raises(InputError, match="spacing must be three positive lengths; got"):
            load_nnunet(path, spacing=spacing)  # type: ignore[arg-type]
    assert load_nnunet(path, spacing=np.array([1.0, 2.0, 3.0])).spacing == (1, 2, 3)  # type: ignore[arg-type]
