"""A calibrated model as one file gives what the library gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpseg import (
    APS,
    LAC,
    Argmax,
    AtMost,
    BackgroundPriority,
    ClassConditionalCalibrator,
    GroupCalibrator,
    LocationCalibrator,
    PixelSetPredictor,
    Singleton,
    SplitCalibrator,
)
from cpseg.errors import InputError, MissingExtraError
from cpseg.export import CalibratedModule, save_onnx
from cpseg.filters import AreaGuard, Top

C, SPACE = 5, (6, 8)
Dim = torch.export.Dim.DYNAMIC
HEADS: list[Callable[[Any], Any]] = [
    PixelSetPredictor,
    lambda calibration: PixelSetPredictor(calibration, force_top=True),
    Argmax,
    Top,
    BackgroundPriority,
    Singleton,
    lambda calibration: AtMost(calibration, 2),
]


def drawn(batch: int = 20, space: tuple[int, ...] = SPACE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    logits = 3 * torch.randn((batch, C, *space), generator=generator)
    labels = torch.randint(0, C, (batch, *space), generator=generator)
    likely = torch.rand(labels.shape, generator=generator) < 0.7
    return logits, torch.where(likely, logits.argmax(1), labels)


@pytest.mark.parametrize("make", HEADS)
@pytest.mark.parametrize("score", [LAC(), APS()], ids=str)
def test_the_exported_program_gives_the_same_for_other_shapes(
    score: Any, make: Callable[[Any], Any]
) -> None:
    logits, labels = drawn()
    head = make(ClassConditionalCalibrator(C, score=score).update(logits, labels).compute(0.3))
    module = CalibratedModule(head)
    program = torch.export.export(module, (logits[:2],), dynamic_shapes=({0: Dim, 2: Dim, 3: Dim},))
    assert set(dict(program.named_buffers())) == {"thresholds"}
    other = drawn(3, (9, 5))[0]
    assert torch.equal(program.module()(other), head(other))
    assert torch.equal(module(other), head(other))


def test_groups_and_locations_are_exported() -> None:
    logits, labels = drawn()
    groups = torch.randint(0, 3, SPACE, generator=torch.Generator().manual_seed(0))
    by_group = GroupCalibrator(3, C).update(logits, labels, groups).compute(0.3)
    head = PixelSetPredictor(by_group)
    program = torch.export.export(CalibratedModule(head), (logits[:2], groups))
    assert torch.equal(program.module()(logits[2:4], groups), head(logits[2:4], groups))
    placed = LocationCalibrator(SPACE, max_alpha=0.4).update(logits, labels).compute(0.3)
    filtered = Argmax(placed)
    program = torch.export.export(
        CalibratedModule(filtered), (logits[:2],), dynamic_shapes=({0: Dim},)
    )
    assert torch.equal(program.module()(logits), filtered(logits))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("make", [PixelSetPredictor, BackgroundPriority])
def test_onnx_runs_the_model_and_the_head_from_one_file(
    make: Callable[[Any], Any], tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Conv2d(3, C, 3, padding=1)
    images = torch.randn(20, 3, *SPACE)
    with torch.no_grad():
        logits = 4 * model(images)
        model.weight.mul_(4)
        assert model.bias is not None
        model.bias.mul_(4)
    calibration = SplitCalibrator().update(logits, logits.argmax(1)).compute(0.3)
    head = make(calibration)
    path = tmp_path / "model.onnx"
    save_onnx(CalibratedModule(head, model), images[:2], path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session = runtime.InferenceSession(path)
    other = torch.randn(3, 3, 9, 5)
    (made,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    with torch.no_grad():
        expected = head(model(other))
    assert (torch.from_numpy(made) == expected).float().mean() > 0.99  # a convolution rounds
    assert torch.from_numpy(made).dtype == expected.dtype


def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = drawn()
    calibration = SplitCalibrator().update(logits, labels).compute(0.3)
    with pytest.raises(InputError, match="head must have no guard"):
        CalibratedModule(Argmax(calibration, guard=AreaGuard()))
    module = CalibratedModule(Argmax(calibration))
    with pytest.raises(InputError, match="at least 2 along every axis"):
        save_onnx(module, logits[:1], tmp_path / "m.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"cpseg\[export\]"):
        save_onnx(module, logits, tmp_path / "m.onnx")
