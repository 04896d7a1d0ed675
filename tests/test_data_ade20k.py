"""ADE20K's published splits from a formula, and its parts from its folders."""

import hashlib
from pathlib import Path

import pytest
import torch

from cpseg.data import ade20k, ade20k_labeled
from cpseg.errors import FileError, InputError

# SHA-256 of the sorted names, joined by newlines, of the lists that UniMatch V2 publishes.
PUBLISHED = {
    64: "a18f9332ac059d5f4062c8a264d4b5acdceeb555ee92a48880676b8f72ae7349",
    16: "d8fe7e5e32582782d363ee3db89ea8c5e6b1a4cb89357290381ba8421ff97d21",
    8: "dda7634ecffd1e2e19dd178b16ea7254583a301bc1d6237c0e529d6b88a49128",
}


@pytest.mark.parametrize("denominator", PUBLISHED)
def test_the_formula_gives_the_published_lists(denominator: int) -> None:
    names = "\n".join(ade20k_labeled(denominator))
    assert hashlib.sha256(names.encode()).hexdigest() == PUBLISHED[denominator]


def test_sizes_and_parts() -> None:
    sizes = [len(ade20k_labeled(k)) for k in (128, 64, 32, 16, 8, 1)]
    assert sizes == [158, 316, 632, 1263, 2526, 20210]
    labeled = ade20k("x", "labeled", denominator=32)
    unlabeled = ade20k("x", "unlabeled", denominator=32)
    names = [{folder.name(i) for i in range(len(folder))} for folder in (labeled, unlabeled)]
    assert len(names[0] | names[1]) == 20210
    assert not names[0] & names[1]
    assert all(mask is None for _, mask in unlabeled.pairs)
    with pytest.raises(InputError, match="denominator must be"):
        ade20k_labeled(0)


def test_annotations_move_down_by_one(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    with pytest.raises(FileError, match=r"images/validation/\*\.jpg"):
        ade20k(tmp_path, "validation")
    for kind, name in (("images", "v.jpg"), ("annotations", "v.png")):
        (tmp_path / kind / "validation").mkdir(parents=True)
        ids = numpy.array([[0, 1, 150]], dtype=numpy.uint8)
        pillow.fromarray(ids).save(tmp_path / kind / "validation" / name)
    image, labels = ade20k(tmp_path, "validation")[0]
    assert image.shape == (3, 1, 3)
    assert torch.equal(labels, torch.tensor([[255, 0, 149]]))
