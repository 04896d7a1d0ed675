"""Nothing on a pixel's road waits for the device: it all runs where there are no values to read.

On a fake GPU where torch was built with CUDA; a build without refuses to index there, so that a
fake CPU has to do. Reading a value raises on both.
"""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from cpseg import (
    APS,
    LAC,
    RAPS,
    SAPS,
    Argmax,
    BackgroundPriority,
    Calibration,
    ClassConditionalCalibrator,
    GroupCalibrator,
    LocationCalibrator,
    Margin,
    PixelSetPredictor,
    Singleton,
    SplitCalibrator,
    TopK,
    accumulate,
)
from cpseg.metrics import Coverage, MeanIoU, SelectiveAccuracy, SetSize

if TYPE_CHECKING:
    from collections.abc import Callable

C, SPACE = 5, (8, 16)
DEVICE = torch.device("cuda", 0) if torch.version.cuda else torch.device("cpu")
SCORES: list[Any] = [LAC(), APS(), RAPS(), SAPS(randomized=True), Margin(), TopK()]


def on_a_device_that_is_not_there() -> tuple[Tensor, Tensor]:
    logits = torch.empty((2, C, *SPACE), device=DEVICE)
    return logits, torch.empty((2, *SPACE), dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("store", ["histogram", "exact"])
@pytest.mark.parametrize("score", SCORES, ids=str)
def test_an_update_reads_no_value(score: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accumulate._LANES, DEVICE.type, 32)  # the path of a GPU, on any device
    with FakeTensorMode():
        logits, labels = on_a_device_that_is_not_there()
        groups = torch.empty(SPACE, dtype=torch.int64, device=DEVICE)
        SplitCalibrator(score, store=store).update(logits, labels)
        calibrator = ClassConditionalCalibrator(C, score, store=store)
        assert calibrator.update(logits, labels).update(logits, labels).num_classes == C
        GroupCalibrator(3, C, score, store=store).update(logits, labels, groups)
        LocationCalibrator(SPACE, score=score, store=store).update(logits, labels)


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_sets_and_labels_read_no_value(score: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((20, C, *SPACE), generator=generator)
    calibrations: list[Calibration] = [
        SplitCalibrator(score).update(logits, logits.argmax(1)).compute(0.2),
        ClassConditionalCalibrator(C, score).update(logits, logits.argmax(1)).compute(0.2),
    ]
    heads: list[Callable[[Calibration], Any]] = [
        PixelSetPredictor,
        lambda calibration: PixelSetPredictor(calibration).packed,
        Argmax,
        BackgroundPriority,
        Singleton,
    ]
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch, _ = on_a_device_that_is_not_there()
        for calibration in calibrations:
            for head in heads:
                made = head(calibration)(batch)
                assert (made.words if hasattr(made, "words") else made).device == DEVICE


def test_metrics_read_no_value() -> None:
    with FakeTensorMode():
        sets = torch.empty((2, C, *SPACE), dtype=torch.bool, device=DEVICE)
        _, labels = on_a_device_that_is_not_there()
        Coverage(C).update(sets, labels)
        SetSize(C).update(sets, labels)
        SelectiveAccuracy(C).update(labels, labels)
        MeanIoU(C).update(labels, labels)


def test_a_value_that_is_read_would_be_seen() -> None:
    with FakeTensorMode():
        _, labels = on_a_device_that_is_not_there()
        for read in (lambda: bool(labels.max() > 0), lambda: labels[labels > 0], labels.tolist):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                read()
