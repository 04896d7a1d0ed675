"""Scores, thresholds and sets against TorchCP 1.2.1, on pixels laid out as rows.

To run: ``pip install --no-deps torchcp==1.2.1`` beside a development install, then
``pytest -m parity``. Optional dependencies of TorchCP that scores and predictors do not use are
replaced by empty modules while it is imported. Where TorchCP is wrong, a test says how and holds
that cpseg is not.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor

from cpseg import APS, LAC, RAPS, SAPS, ClassConditionalCalibrator, Margin, SplitCalibrator, TopK
from cpseg._draws import uniform
from cpseg.calibration import Calibration
from cpseg.predictors import PixelSetPredictor
from cpseg.protocols import Score
from cpseg.quantile import conformal_quantile, conformal_rank

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:The 'temperature' parameter:DeprecationWarning"),
]

UNUSED = {
    "torchsort": ["soft_rank", "soft_sort"],
    "torch_geometric": [],
    "torch_geometric.nn": ["GCNConv"],
    "torch_geometric.loader": ["NeighborLoader"],
    "torch_geometric.utils": [],
    "torch_geometric.utils.convert": ["to_networkx"],
    "transformers": ["set_seed", "StoppingCriteria", "StoppingCriteriaList"],
    "torchvision": [],
    "networkx": [],
    "sklearn": [],
    "sklearn.cluster": ["KMeans"],
    "sklearn.metrics": ["accuracy_score"],
    "sklearn.model_selection": ["train_test_split"],
    "tqdm": ["tqdm"],
}
CLASSES, HEIGHT, WIDTH, BATCH = 6, 5, 7, 3


@pytest.fixture(scope="module")
def torchcp() -> Iterator[types.ModuleType]:
    """The package, imported with empty modules for what is not installed; all undone after."""
    if importlib.util.find_spec("torchcp") is None:
        pytest.skip("torchcp is not installed")
    before = dict(sys.modules)
    packages = {name.split(".")[0] for name in UNUSED} - before.keys()
    missing = {package for package in packages if not installed(package)}
    for name, members in UNUSED.items():
        if name.split(".")[0] in missing:
            stub: Any = types.ModuleType(name)
            stub.__path__ = []
            for member in members:
                setattr(stub, member, type(member, (), {}))
            sys.modules[name] = stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield importlib.import_module("torchcp")
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in {"torchcp", *UNUSED}:
            del sys.modules[name]


def installed(package: str) -> bool:
    heavy = {"torchsort", "torch_geometric", "transformers", "torchvision"}
    return package not in heavy and importlib.util.find_spec(package) is not None


def images(seed: int = 0, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, CLASSES, HEIGHT, WIDTH), generator=generator) * 2


def fair_labels(logits: Tensor, seed: int = 1) -> Tensor:
    rows = to_rows(logits).softmax(-1)
    picks = rows.multinomial(1, generator=torch.Generator().manual_seed(seed))
    return picks.view(logits.shape[0], HEIGHT, WIDTH)


def to_rows(maps: Tensor) -> Tensor:
    return maps.movedim(1, -1).reshape(-1, CLASSES)


def to_maps(rows: Tensor) -> Tensor:
    return rows.view(-1, HEIGHT, WIDTH, CLASSES).movedim(-1, 1)


@contextmanager
def our_draws(seed: int) -> Iterator[None]:
    """``torch.rand`` gives one draw of ours per row, the same in every column."""

    def rand(*size: Any, device: torch.device | None = None) -> Tensor:
        shape = tuple(size[0]) if isinstance(size[0], (tuple, list, torch.Size)) else size
        pixels = torch.arange(HEIGHT * WIDTH, device=device)
        draw = uniform(seed, pixels).repeat(shape[0] // len(pixels))
        return draw if len(shape) == 1 else draw[:, None].expand(shape)

    genuine = torch.rand
    torch.rand = rand  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.rand = genuine


Theirs = Callable[[Any], Any]
PLAIN: dict[str, tuple[Score, Theirs]] = {
    "LAC": (LAC(), lambda s: s.LAC()),
    "APS": (APS(), lambda s: s.APS(randomized=False)),
    "RAPS": (RAPS(0.125, 2), lambda s: s.RAPS(randomized=False, penalty=0.125, kreg=2)),
    "Margin": (Margin(), lambda s: s.Margin()),
    "TopK": (TopK(), lambda s: s.TOPK(randomized=False)),
    "APS randomized": (APS(randomized=True), lambda s: s.APS()),
    "RAPS randomized": (
        RAPS(0.125, 2, randomized=True),
        lambda s: s.RAPS(penalty=0.125, kreg=2),
    ),
    "TopK randomized": (TopK(randomized=True), lambda s: s.TOPK()),
}
ALL_VIEW: dict[str, tuple[Score, Theirs]] = {
    **PLAIN,
    "SAPS": (SAPS(0.3), lambda s: s.SAPS(randomized=False, weight=0.3)),
    "SAPS randomized": (SAPS(0.3, randomized=True), lambda s: s.SAPS(weight=0.3)),
}


@pytest.mark.parametrize("name", ALL_VIEW)
def test_scores_of_all_classes(torchcp: Any, name: str) -> None:
    ours, theirs = ALL_VIEW[name]
    logits = images()
    with our_draws(0):
        wanted = to_maps(theirs(torchcp.classification.score)(to_rows(logits)))
    assert (ours(logits) - wanted).abs().max().item() <= slack(ours)


@pytest.mark.parametrize("name", PLAIN)
def test_scores_of_labels(torchcp: Any, name: str) -> None:
    ours, theirs = PLAIN[name]
    logits = images()
    labels = fair_labels(logits)
    with our_draws(0):
        wanted = theirs(torchcp.classification.score)(to_rows(logits), labels.flatten())
    apart = ours.of_labels(logits, labels).flatten() - wanted
    assert apart.abs().max().item() <= slack(ours)


def slack(score: Score) -> float:
    """Ours, and theirs: their softmax and sums are another path to the same number."""
    return 2 * score.tolerance(CLASSES) + 1e-7


def test_saps_of_labels_off_the_top_and_at_the_top_by_their_other_view(torchcp: Any) -> None:
    """Their label path scores the top class ``u * top`` where their other path has (1 - u)."""
    logits = images()
    labels = logits.argmax(1)
    theirs = torchcp.classification.score.SAPS(randomized=False, weight=0.3)
    assert theirs(to_rows(logits), labels.flatten()).abs().max() == 0  # so their sets cover nothing
    everywhere = theirs(to_rows(logits))
    wanted = everywhere.gather(1, labels.flatten()[:, None])[:, 0]
    ours = SAPS(0.3).of_labels(logits, labels).flatten()
    assert (ours - wanted).abs().max().item() <= slack(SAPS(0.3))
    with our_draws(0):
        randomized = torchcp.classification.score.SAPS(weight=0.3)
        rest = labels.remainder(CLASSES - 1) + (labels == 0)  # any class, often not the top one
        off = rest.flatten() != labels.flatten()
        wanted = randomized(to_rows(logits), rest.flatten())[off]
    ours = SAPS(0.3, randomized=True).of_labels(logits, rest).flatten()[off]
    assert off.any()
    assert (ours - wanted).abs().max().item() <= slack(SAPS(0.3, randomized=True))


def test_margin_of_labels_leaves_its_input_alone(torchcp: Any) -> None:
    """Theirs writes -1 over the label's entry of what it is given."""
    logits = images()
    labels = fair_labels(logits)
    rows = to_rows(logits).softmax(-1)
    torchcp.classification.score.Margin(score_type="identity")(rows, labels.flatten())
    assert bool((rows == -1).any())
    before = logits.clone()
    Margin().of_labels(logits, labels)
    assert torch.equal(logits, before)


# --- thresholds and sets -------------------------------------------------------------------------

ALPHAS = [0.05, 0.1, 0.25, 0.3]  # where their float ranks are right


def calibrate(ours: Score, logits: Tensor, labels: Tensor, alpha: float) -> Calibration:
    return SplitCalibrator(ours, unit="pixel", store="exact").update(logits, labels).compute(alpha)


def clear_of(scores: Tensor, thresholds: Tensor, room: float) -> Tensor:
    """Where a set does not hang on the last bits of a score."""
    return (scores - thresholds).abs() > room


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_split_thresholds_and_sets(torchcp: Any, name: str, alpha: float) -> None:
    ours, theirs = PLAIN[name]
    logits, fresh = images(2, 8), images(3)
    labels = fair_labels(logits)
    predictor = torchcp.classification.predictor.SplitPredictor(
        theirs(torchcp.classification.score), alpha=alpha
    )
    with our_draws(0):
        predictor.calculate_threshold(to_rows(logits), labels.flatten())
        wanted = to_maps(predictor.predict_with_logits(to_rows(fresh))).bool()
    calibration = calibrate(ours, logits, labels, alpha)
    apart = calibration.thresholds.item() - float(predictor.q_hat)
    room = 4 * ours.tolerance(CLASSES) + 1e-6  # thresholds are raised by a tolerance
    assert abs(apart) <= room
    sets = PixelSetPredictor(calibration)(fresh)
    decided = clear_of(ours(fresh), calibration.thresholds, room)
    assert torch.equal(sets[decided], wanted[decided])
    if ours == TopK():
        assert torch.equal(sets, wanted)  # ranks are whole numbers: nothing is undecided
    else:
        assert decided.double().mean().item() > 0.99


@pytest.mark.parametrize("name", PLAIN)
def test_class_conditional_thresholds_and_sets(torchcp: Any, name: str) -> None:
    ours, theirs = PLAIN[name]
    logits, fresh = images(4, 12), images(5)
    labels = fair_labels(logits)
    labels[labels == 4] = 0  # an absent class: +inf for both, and in every set
    predictor = torchcp.classification.predictor.ClassConditionalPredictor(
        theirs(torchcp.classification.score), alpha=0.25
    )
    with our_draws(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs warns of the absent class
        predictor.calculate_threshold(to_rows(logits), labels.flatten())
        wanted = to_maps(predictor.predict_with_logits(to_rows(fresh))).bool()
    calibrator = ClassConditionalCalibrator(CLASSES, ours, unit="pixel", store="exact")
    calibration = calibrator.update(logits, labels).compute(0.25)
    room = 4 * ours.tolerance(CLASSES) + 1e-6
    mine, others = calibration.thresholds.tolist(), predictor.q_hat.tolist()
    assert mine[4] == others[4] == inf
    assert mine == pytest.approx(others, rel=0, abs=room)
    sets = PixelSetPredictor(calibration)(fresh)
    assert bool(sets[:, 4].all())
    decided = clear_of(ours(fresh), calibration.thresholds.view(1, -1, 1, 1), room)
    assert torch.equal(sets[decided], wanted[decided])


def test_sets_of_saps_cover_where_theirs_cover_nothing(torchcp: Any) -> None:
    logits = torch.zeros(4, CLASSES, HEIGHT, WIDTH)
    logits[:, 2] = 4.0
    labels = torch.full((4, HEIGHT, WIDTH), 2)
    theirs = torchcp.classification.predictor.SplitPredictor(
        torchcp.classification.score.SAPS(randomized=False), alpha=0.1
    )
    theirs.calculate_threshold(to_rows(logits), labels.flatten())
    assert theirs.predict_with_logits(to_rows(logits)).sum() == 0
    sets = PixelSetPredictor(calibrate(SAPS(), logits, labels, 0.1))(logits)
    assert bool(sets[:, 2].all())


def test_ranks_where_float_arithmetic_is_off_by_one(torchcp: Any) -> None:
    """Theirs rounds ``(n + 1) * (1 - alpha)`` up after floats have put it above an integer."""
    scores = torch.arange(1, 100, dtype=torch.float64)
    value = torchcp.utils.common.calculate_conformal_value
    off = [p for p in range(1, 100) if value(scores, p / 100).item() != 100 - p]
    assert off
    for p in range(1, 100):
        assert conformal_rank(99, p / 100) == 100 - p
        assert conformal_quantile(scores, p / 100).item() == 100 - p
