"""Sigmoid channels, nnU-Net's files and NIfTI volumes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cpseg.annotators import SigmoidAnnotator, channel_values, load_nifti, load_nnunet
from cpseg.annotators.huggingface import Preprocessing
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
