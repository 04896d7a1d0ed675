"""The recipes of docs/how-to/other-frameworks.md, run as they stand there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpseg import Calibration, ClassConditionalCalibrator, PixelSetPredictor, Singleton
from cpseg.metrics import Coverage, SelectiveAccuracy

PAGE = Path(__file__).parents[1] / "docs/how-to/other-frameworks.md"
C = 3

# Theirs warn of what has nothing to do with us.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.parity]


def run(section: str, **given: Any) -> dict[str, Any]:
    """The names that the section's code leaves behind."""
    (text,) = re.findall(
        rf"^## {section}.*?(?=^## |\Z)", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {"num_classes": C, "__name__": "recipe", **given}
    exec(compile(code, str(PAGE), "exec"), names)  # noqa: S102 - our own page
    return names


def batches(*space: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4):
        labels = torch.randint(C, (3, *space), generator=generator)
        logits = torch.randn(3, C, *space, generator=generator)
        logits += 2.0 * nn.functional.one_hot(labels, C).movedim(-1, 1)
        found.append((logits, labels))
    return found


def test_the_view_for_torchmetrics_shows_our_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    seen = batches(4, 5)
    calibrator = ClassConditionalCalibrator(C)
    for logits, labels in seen:
        calibrator.update(logits, labels)
    calibration = calibrator.compute(0.2)
    predictor, keep = PixelSetPredictor(calibration), Singleton(calibration)
    names = run("torchmetrics", batches=seen, predictor=predictor, keep=keep)
    wanted, right = Coverage(C), SelectiveAccuracy(C)
    for logits, labels in seen:
        wanted.update(predictor(logits), labels)
        right.update(keep(logits), labels)
    view = names["coverage"]
    assert float(view.compute()) == wanted.compute().mean_of_images
    accuracy = right.compute().accuracy_of_kept.mean_of_pixels.value
    assert float(names["right"].compute()) == float(accuracy)
    assert capsys.readouterr().out

    # A checkpoint, what a forward pass gives, and starting afresh.
    again = names["View"](Coverage(C), view.number)
    again.load_state_dict(view.state_dict())
    assert float(again.compute()) == float(view.compute())
    logits, labels = seen[0]
    one = Coverage(C).update(predictor(logits), labels).compute().mean_of_images
    assert float(again(predictor(logits), labels)) == one
    wanted.update(predictor(logits), labels)
    assert float(again.compute()) == wanted.compute().mean_of_images
    again.reset()
    again.update(predictor(logits), labels)
    assert float(again.compute()) == one

    # A collection updates each of its metrics, and a copy of it counts for itself.
    collection = torchmetrics.MetricCollection(
        {
            "images": names["View"](Coverage(C), view.number),
            "worst": names["View"](Coverage(C), lambda report: torch.tensor(report.worst_image)),
        }
    )
    copied = collection.clone()
    for logits, labels in seen:
        collection.update(predictor(logits), labels)
        collection["images"].to(torch.device("cpu"))
    report = Coverage(C)
    for logits, labels in seen:
        report.update(predictor(logits), labels)
    wanted_now = report.compute()
    found = collection.compute()
    assert float(found["images"]) == wanted_now.mean_of_images
    assert float(found["worst"]) == pytest.approx(wanted_now.worst_image)
    copied.update(predictor(logits), labels)
    assert float(copied.compute()["images"]) != float(found["images"])


def test_the_callback_for_lightning_calibrates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            del batch_idx
            return {"logits": batch[0] * 1.0}

    seen = batches(4, 5)
    dataset: Any = seen
    loader: Any = torch.utils.data.DataLoader(dataset, batch_size=None)
    run("Lightning", module=Module(), calibration_loader=loader)
    calibrator = ClassConditionalCalibrator(C)
    for logits, labels in seen:
        calibrator.update(logits, labels)
    found, wanted = Calibration.load("calibration.json"), calibrator.compute(0.1)
    assert torch.equal(found.thresholds, wanted.thresholds)
    assert found.num_units.tolist() == wanted.num_units.tolist() == [12] * C


def test_dictionaries_as_monai_has_them(tmp_path: Path) -> None:
    monai = pytest.importorskip("monai.data")
    seen = batches(4, 5, 6)
    loader = [
        {
            "image": monai.MetaTensor(logits),
            "label": monai.MetaTensor(labels[:, None].float()),
            "patient": ["b", "a", f"c{index}"],
        }
        for index, (logits, labels) in enumerate(seen)
    ]
    patients = ["a", "b", "c0", "c1", "c2", "c3"]
    names = run(
        "MONAI",
        loader=loader,
        patients=patients,
        network=nn.Identity(),
        roi_size=(4, 5, 6),
    )
    calibrator = ClassConditionalCalibrator(C)
    for index, (logits, labels) in enumerate(seen):
        calibrator.update(logits, labels, [1, 0, 2 + index])
    wanted = calibrator.compute(0.2)
    assert torch.equal(names["calibration"].thresholds, wanted.thresholds)
    assert names["calibration"].num_units.tolist() == [6] * C
    assert type(names["sets"]) is Tensor
    assert torch.equal(names["sets"], PixelSetPredictor(wanted)(seen[-1][0]))
    names["calibration"].save(tmp_path / "c.json")
