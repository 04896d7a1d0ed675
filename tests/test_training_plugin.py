"""Labels on disk, labels on the crop, and three foreign training steps with our labels in them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cpseg import LAC, ClassConditionalCalibrator, Margin, Singleton, SplitCalibrator
from cpseg.annotators.images import check_images
from cpseg.calibration import Calibration
from cpseg.data import SegmentationFolder, read_split
from cpseg.errors import FileError, InputError
from cpseg.training import (
    Normalize,
    OnlineAnnotator,
    PseudoLabelStore,
    confidence_thresholds,
    masked_cross_entropy,
    merge_pseudo_labels,
)

image_module = pytest.importorskip("PIL.Image")
NAMES = ["sky", "tree", "road"]


def calibration(alpha: float = 0.25, per_class: bool = False, **rest: Any) -> Calibration:  # noqa: FBT001, FBT002
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (9, 4, 5), generator=g)
    logits = torch.randn(9, 3, 4, 5, generator=g) + 3 * functional.one_hot(labels, 3).movedim(3, 1)
    calibrator = ClassConditionalCalibrator(3, **rest) if per_class else SplitCalibrator(**rest)
    return calibrator.update(logits, labels).compute(alpha)


def store(root: Path) -> PseudoLabelStore:
    return PseudoLabelStore.create(
        root, calibration(), classes=NAMES, model="tiny", split="first 9"
    )


def test_labels_return_as_they_were_and_the_manifest_says_how_they_came(tmp_path: Path) -> None:
    made = store(tmp_path / "s")
    labels = torch.tensor([[0, 1, 2], [255, 2, 1]])
    made.write("2007/a", labels)
    made.write("b", labels.to(torch.uint8).t())
    again = PseudoLabelStore(tmp_path / "s")
    assert again.load("2007/a").tolist() == labels.tolist()
    assert again.load("b").tolist() == labels.t().tolist()
    assert again.names() == ["2007/a", "b"]
    manifest = again.manifest
    assert (manifest["alpha"], manifest["model"], manifest["split"]) == (0.25, "tiny", "first 9")
    assert (manifest["classes"], manifest["score"]) == (NAMES, "LAC()")
    assert manifest["guarantee"] == str(calibration().guarantee)
    assert not list((tmp_path / "s").rglob("*.part"))


def test_a_store_refuses_what_a_reader_could_not_trust(tmp_path: Path) -> None:
    made = store(tmp_path / "s")
    for labels, message in (
        (torch.tensor([[3]]), "must be classes"),
        (torch.tensor([[254]]), "must be classes"),
        (torch.tensor([[-1]]), "must be classes"),
        (torch.tensor([1]), "must have shape"),
        (torch.zeros(2, 2), "must be an integer"),
    ):
        with pytest.raises(InputError, match=message):
            made.write("a", labels)
    for name in ("../a", "/a", ""):
        with pytest.raises(InputError, match="name must be a relative path"):
            made.write(name, torch.tensor([[1]]))
    with pytest.raises(FileError, match="missing or damaged"):
        made.load("never")
    with pytest.raises(InputError, match="root must be an empty folder"):
        store(tmp_path / "s")
    with pytest.raises(InputError, match="fewer than 254"):
        PseudoLabelStore.create(
            tmp_path / "t", calibration(), classes=["x"] * 254, model="", split=""
        )
    with pytest.raises(FileError, match="must exist"):
        PseudoLabelStore(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "cpseg pseudo-labels", "version": 9}')
    with pytest.raises(FileError, match="version 9"):
        PseudoLabelStore(tmp_path)
    for content in ("{", "[]", '{"format": "other"}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(FileError, match="no manifest"):
            PseudoLabelStore(tmp_path)


def test_a_split_file_points_at_the_filtered_masks(tmp_path: Path) -> None:
    made = store(tmp_path / "s")
    made.write("a", torch.tensor([[0, 255]]))
    image_module.new("RGB", (2, 1)).save(tmp_path / "a.jpg")
    source, target = tmp_path / "unlabeled.txt", tmp_path / "filtered.txt"
    source.write_text("a.jpg SegmentationClass/a.png\n\n")
    assert made.write_split(source, target) == 1
    ((image, mask),) = read_split(target)
    assert image == "a.jpg"
    assert mask == str((tmp_path / "s" / "a.png").resolve())
    folder = SegmentationFolder(root=tmp_path, pairs=read_split(target), num_classes=3)
    assert folder[0][1].tolist() == [[0, 255]]
    source.write_text("a.jpg\nb.jpg x\nc.jpg\n")
    with pytest.raises(FileError, match=r"got none for 2: b\.png, c\.png"):
        made.write_split(source, target)


# --- the annotator on the crop --------------------------------------------------------------------


def test_an_online_annotator_undoes_the_normalization_and_goes_in_chunks() -> None:
    seen: list[Tensor] = []

    def annotate(images: Tensor) -> Tensor:
        check_images(images)  # what the annotators of cpseg ask for
        seen.append(images)
        assert not torch.is_grad_enabled()
        return annotate_(images)

    raw = torch.randint(0, 256, (5, 3, 4, 6), generator=torch.Generator().manual_seed(0))
    keep = Singleton(calibration())
    online = OnlineAnnotator(annotate, keep, chunk=2)
    labels = online(Normalize()(raw.float() / 255).requires_grad_())
    assert [len(part) for part in seen] == [2, 2, 1]
    assert torch.equal(torch.cat(seen), raw.to(torch.uint8))
    assert labels.dtype == torch.int64
    assert torch.equal(labels, torch.cat([keep(annotate_(raw)) for raw in raw[:, None]]).long())
    assert online(torch.zeros(0, 3, 4, 6)).shape == (0, 4, 6)


def test_an_annotator_of_ones_own_may_take_floats() -> None:
    seen: list[Tensor] = []
    raw = torch.rand((2, 3, 4, 6), generator=torch.Generator().manual_seed(0))

    def annotate(images: Tensor) -> Tensor:
        seen.append(images)
        return annotate_(255 * images)

    OnlineAnnotator(annotate, Singleton(calibration()), scale=1.0)(Normalize()(raw))
    assert torch.allclose(torch.cat(seen), raw, atol=1e-6)


def annotate_(images: Tensor) -> Tensor:
    shown = images.float()[:, 0]
    return torch.stack((shown, 255 - shown, shown - 300), 1) / 10


def test_an_online_annotator_refuses_another_grid_and_another_number_of_classes() -> None:
    keep = Singleton(calibration(per_class=True))
    with pytest.raises(InputError, match="annotator must return logits of"):
        OnlineAnnotator(lambda x: x[..., ::2, :].float(), keep)(torch.zeros(1, 3, 4, 6))
    with pytest.raises(InputError, match="C = 3 classes"):
        OnlineAnnotator(lambda x: x[:, :2].float(), keep)(torch.zeros(1, 3, 4, 6))


def test_a_threshold_per_class_keeps_what_the_sets_hold() -> None:
    found = calibration(alpha=0.3, per_class=True)
    limits = confidence_thresholds(found, 3)
    g = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(4, 3, 6, 7, generator=g)
    confidence, labels = logits.softmax(1).max(1)
    inside = LAC()(logits).gather(1, labels[:, None])[:, 0] <= found.thresholds[labels]
    assert torch.equal(confidence >= limits[labels], inside)
    assert confidence_thresholds(calibration(), 3).shape == (3,)
    starved = confidence_thresholds(calibration(alpha=0.05, per_class=True), 3)
    assert starved.tolist() == [2, 2, 2]
    with pytest.raises(InputError, match="score LAC"):
        confidence_thresholds(calibration(score=Margin()), 3)
    with pytest.raises(InputError, match="num_classes must be the calibration's 3; got 4"):
        confidence_thresholds(calibration(per_class=True), 4)


# --- stand-ins for foreign steps, of the same signatures ------------------------------------------


class Network(nn.Module):
    """Takes the extra arguments that those loops pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor, need_fp: bool = False, comp_drop: bool = False) -> Any:  # noqa: FBT001, FBT002
        features = self.body(x)
        out = self.head(functional.dropout2d(features, 0.5) if comp_drop else features)
        return (out, self.head(functional.dropout2d(features, 0.5))) if need_fp else out


def foreign_batch(filtered: bool = False) -> dict[str, Tensor]:  # noqa: FBT001, FBT002
    g = torch.Generator().manual_seed(0)
    values = torch.tensor([0, 1, 2, 255, 254])
    ext, ext_mix = values[torch.randint(0, 5, (2, 2, 6, 7), generator=g)]
    if filtered:
        ext, ext_mix = (torch.where(e == 254, 254, 255) for e in (ext, ext_mix))
    return {
        "img_x": torch.randn(2, 3, 6, 7, generator=g),
        "mask_x": torch.randint(0, 3, (2, 6, 7), generator=g),
        "img_u": torch.randn(4, 2, 3, 6, 7, generator=g),
        "ignore_mask": torch.where(ext == 254, 255, 0),
        "ignore_mask_mix": torch.where(ext_mix == 254, 255, 0),
        "box": torch.randint(0, 2, (2, 6, 7), generator=g),
        "ext": ext,
        "ext_mix": ext_mix,
    }


def sure(logits: Tensor) -> tuple[Tensor, Tensor]:
    confidence, labels = logits.detach().softmax(1).max(1)
    return labels, confidence


@pytest.mark.parametrize("threshold", [0.0, 0.95])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_steps_of_the_unimatch_kind(threshold: float, filtered: bool, flip: bool) -> None:  # noqa: FBT001
    torch.manual_seed(0)
    model, b = Network(), foreign_batch(filtered)
    strict = nn.CrossEntropyLoss(reduction="none")  # knows no 255: it would raise
    weak, strong = b["img_u"][0], b["img_u"][1]
    mask, conf = merge_pseudo_labels(*sure(model(weak)), b["ext"], mode="replace")
    if flip:
        mix, conf_mix, ignore_mix = mask.flip(0), conf.flip(0), b["ignore_mask"].flip(0)
    else:
        mix, conf_mix = merge_pseudo_labels(*sure(model(b["img_u"][2])), b["ext_mix"])
        ignore_mix = b["ignore_mask_mix"]
    assert bool((conf[b["ext"] >= 254] == -1).all())
    inside = b["box"] == 1
    mixed, sureness = torch.where(inside, mix, mask), torch.where(inside, conf_mix, conf)
    ignore = torch.where(inside, ignore_mix, b["ignore_mask"])
    kept = (sureness >= threshold) & (ignore != 255)
    external = torch.where(inside, b["ext"].flip(0) if flip else b["ext_mix"], b["ext"])
    assert torch.equal(kept, external < 254)  # abstained and padded pixels are out, even at 0
    each = strict(model(strong, comp_drop=True), mixed) * kept
    loss = nn.functional.cross_entropy(model(b["img_x"]), b["mask_x"]) / 2
    loss = loss + each.sum() / (ignore != 255).sum().item() / 2
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("filtered", [False, True])
def test_steps_of_the_allspark_kind(filtered: bool) -> None:  # noqa: FBT001
    torch.manual_seed(0)
    model, b = Network(), foreign_batch(filtered)
    labels, conf = merge_pseudo_labels(*sure(model(b["img_u"][0])), b["ext"])
    pred_x, pred_u = model(torch.cat((b["img_x"], b["img_u"][0]))).split([2, 2])
    loss_u = masked_cross_entropy(pred_u, labels, weight=conf >= 0)
    assert (float(loss_u.detach()) == 0) == filtered
    loss = (nn.functional.cross_entropy(pred_x, b["mask_x"]) + loss_u) / 2
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
