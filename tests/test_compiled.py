"""Compiled paths: the same answers, few graphs, and a way on without a compiler."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import cpseg._tiles
from cpseg import (
    APS,
    LAC,
    RAPS,
    SAPS,
    Argmax,
    AtMost,
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
)
from cpseg.filters import Top
from cpseg.predictors import CompileWarning

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")

C, SPACE = 5, (6, 7)
SCORES: list[Any] = [
    LAC(),
    APS(),
    APS(randomized=True),
    RAPS(k_reg=1),
    SAPS(randomized=True),
    Margin(),
    TopK(),
]
FILTERS: list[Callable[..., Any]] = [
    Argmax,
    Top,
    BackgroundPriority,
    Singleton,
    lambda calibration, compiled=False: AtMost(calibration, 2, compiled=compiled),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpseg._tiles, "_COMPILED", {"cpu": 2**10})


@pytest.fixture
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes one by one where thresholds differ by class, all at once elsewhere: it is faster."""
    values = request.node.callspec.params
    one_by_one = values["axes"] == "class" or (values["axes"], values["score"]) == ("both", LAC())
    monkeypatch.setattr(cpseg._tiles, "_ROWS", C if one_by_one else 0)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything of a compiled path but the machine code, in a fraction of the time."""
    compiler = torch.compile

    def trace(function: Any, **options: Any) -> Any:
        return compiler(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", trace)
    cpseg._tiles._compiled.cache_clear()
    yield
    cpseg._tiles._compiled.cache_clear()


def batch_of(kind: str, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn((batch, C, *SPACE), generator=generator)
    if kind == "broken":
        logits[0, :, 1, 2], logits[-1, 2, 0, 0] = -torch.inf, torch.nan
        logits[0, 1, 3, 3], logits[-1, 3:] = torch.inf, -torch.inf
    labels = torch.randint(0, C, (batch, *SPACE), generator=generator)
    likely = torch.rand(labels.shape, generator=generator) < 0.7
    labels = torch.where(likely, logits.nan_to_num().argmax(1), labels)
    return logits, labels, torch.randint(0, 3, SPACE, generator=generator)


def calibrations(score: Any) -> dict[str, tuple[Calibration, Tensor | None]]:
    logits, labels, groups = batch_of("random", 30)
    split = SplitCalibrator(score=score).update(logits, labels)
    by_class = ClassConditionalCalibrator(C, score=score).update(logits, labels)
    both = GroupCalibrator(3, C, score=score).update(logits, labels, groups)
    placed = LocationCalibrator(SPACE, score=score, max_alpha=0.4).update(logits, labels)
    unknown = (groups + 1).expand(3, *SPACE)  # one group no image had
    return {
        "split": (split.compute(0.4), None),
        "class": (by_class.compute([0.3, 0.4, 0.5, 0.01, 0.4]), None),
        "both": (both.compute(0.4), unknown),
        "place": (placed.compute(0.4), None),
    }


CASES = [("split", "random"), ("class", "broken"), ("both", "random"), ("place", "random")]
every_case = pytest.mark.parametrize(("axes", "kind"), CASES, ids=[axes for axes, _ in CASES])


def away(calibration: Calibration, logits: Tensor, groups: Tensor | None) -> Tensor:
    """Pixels where no score lies so near its threshold that rounding would decide. ``(B, *S)``."""
    tolerance = calibration.score.tolerance(C)
    wide = PixelSetPredictor(moved(calibration, 2 * tolerance))(logits, groups)
    narrow = PixelSetPredictor(moved(calibration, -2 * tolerance))(logits, groups)
    return (wide == narrow).all(1)


def moved(calibration: Calibration, by: float) -> Calibration:
    return replace(calibration, thresholds=calibration.thresholds + by)


@pytest.mark.usefixtures("traced", "parts")
@every_case
@pytest.mark.parametrize("score", SCORES, ids=str)
def test_sets_are_those_of_the_eager_path(score: Any, axes: str, kind: str) -> None:
    logits = batch_of(kind)[0]
    calibration, groups = calibrations(score)[axes]
    clear = away(calibration, logits, groups)
    assert clear.float().mean() > 0.5
    eager = PixelSetPredictor(calibration)(logits, groups)
    predictor = PixelSetPredictor(calibration, compiled=True)
    sets = predictor(logits, groups)
    assert sets.dtype == torch.bool
    assert torch.equal(sets.movedim(1, -1)[clear], eager.movedim(1, -1)[clear])
    assert torch.equal(predictor.packed(logits, groups).unpack(), sets)
    assert torch.equal(PixelSetPredictor(calibration).packed(logits, groups).unpack(), eager)


@pytest.mark.usefixtures("traced")
def test_the_top_class_is_forced_in() -> None:
    logits = batch_of("broken")[0]
    calibration, _ = calibrations(LAC())["class"]
    forced = PixelSetPredictor(calibration, force_top=True, compiled=True)(logits)
    plain = PixelSetPredictor(calibration, compiled=True)(logits)
    assert torch.equal(forced, plain.scatter(1, logits.argmax(1, keepdim=True), value=True))


@pytest.mark.usefixtures("traced", "parts")
@every_case
@pytest.mark.parametrize("make", FILTERS)
@pytest.mark.parametrize("score", [LAC(), APS()], ids=str)
def test_labels_are_those_of_the_eager_path(
    score: Any, make: Callable[..., Any], axes: str, kind: str
) -> None:
    logits = batch_of(kind)[0]
    calibration, groups = calibrations(score)[axes]
    eager = make(calibration).decide(logits, groups)
    fused = make(calibration, compiled=True).decide(logits, groups)
    clear = away(calibration, logits, groups)
    assert torch.equal(fused.labels[clear], eager.labels[clear])
    assert torch.equal(fused.reasons[clear], eager.reasons[clear])
    assert fused.labels.dtype == eager.labels.dtype


LAYOUTS: list[Callable[[], Tensor]] = [
    lambda: torch.randn(1, C, 4, 4),
    lambda: torch.randn(2, C, 64, 64),
    lambda: torch.randn(3, C, 33, 65),
    lambda: torch.randn(7, C, 16),
    lambda: torch.randn(300, C),
    lambda: torch.randn(1, C, 3, 4, 5),
    lambda: torch.randn(2, C, 1, 205),
    lambda: torch.randn(2, 9, 9, C).movedim(-1, 1),
    lambda: torch.randn(2, C, 40, 40)[:, :, ::2, 1:],
    lambda: torch.randn(2, C, 8, 8).requires_grad_(),
    lambda: torch.zeros(0, C, 8, 8),
]


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_two_graphs_serve_all_shapes_strides_and_grad_modes(dtype: torch.dtype) -> None:
    logits, labels, _ = batch_of("random", 20)
    calibration = ClassConditionalCalibrator(C).update(logits, labels).compute(0.2)
    filters = [make(calibration, compiled=True) for make in FILTERS]
    predictor = PixelSetPredictor(calibration, compiled=True)
    operations: list[Callable[[Tensor], Any]] = [predictor, predictor.packed, *filters]
    torch.compile(torch.neg)(torch.zeros(2))  # the probe is no operation
    PixelSetPredictor(calibration, compiled=True)(logits)
    for operation in operations:
        cpseg._tiles._compiled.cache_clear()
        counters.clear()
        for make in LAYOUTS:
            with torch.enable_grad():
                operation(make().to(dtype))
            with torch.no_grad():
                operation(make().to(dtype))
            with torch.inference_mode():
                operation(make().to(dtype))
        # A view of a tensor made in inference mode is of another kind; a copy is not.
        assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("classes", [C, 40], ids=["one by one", "all at once"])
def test_two_graphs_serve_all_updates(classes: int) -> None:
    calibrator = ClassConditionalCalibrator(classes, compiled=True)
    for make in LAYOUTS:
        logits = make().repeat_interleave(classes // C, 1)
        labels = torch.randint(0, classes, (len(logits), *logits.shape[2:]))
        for kind in (torch.int64, torch.uint8):
            with torch.enable_grad():
                calibrator.update(logits, labels.to(kind))
        if make is LAYOUTS[0]:  # the probe, and what is made once
            cpseg._tiles._compiled.cache_clear()
            counters.clear()
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


def test_a_kernel_gives_what_the_eager_path_gives() -> None:
    logits = batch_of("random")[0]
    calibration, _ = calibrations(APS())["class"]
    clear = away(calibration, logits, None)
    assert clear.float().mean() > 0.5
    sets = PixelSetPredictor(calibration, compiled=True)(logits).movedim(1, -1)
    assert torch.equal(sets[clear], PixelSetPredictor(calibration)(logits).movedim(1, -1)[clear])


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no compiler here")


def switched_off(function: Any, **_: Any) -> Any:
    """What ``torch.compile`` does where ``TORCHDYNAMO_DISABLE`` is set."""
    return function


@pytest.mark.parametrize(
    ("replaced", "told"), [(broken, "RuntimeError"), (switched_off, "switched off")]
)
def test_without_a_compiler_it_warns_once_and_goes_on(
    replaced: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels, _ = batch_of("random", 20)
    calibration = SplitCalibrator().update(logits, labels).compute(0.2)
    eager = PixelSetPredictor(calibration)(logits)
    monkeypatch.setattr(torch, "compile", replaced)
    cpseg._tiles._compiler_works.cache_clear()
    try:
        predictor = PixelSetPredictor(calibration, compiled=True)
        with pytest.warns(CompileWarning, match=told):
            assert torch.equal(predictor(logits), eager)
        assert torch.equal(predictor(logits), eager)  # a second warning would be an error
        labels = Argmax(calibration, compiled=True)(logits)
        assert torch.equal(labels, Argmax(calibration)(logits))
    finally:
        cpseg._tiles._compiler_works.cache_clear()
