"""Calibrate in one arithmetic path, predict in another, on saturated logits full of ties.

Whatever label was within the threshold where it was calibrated stays in the set where it is
predicted: for every score, store and pair of paths.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import cpseg._tiles
from cpseg import APS, LAC, RAPS, SAPS, Margin, PixelSetPredictor, SplitCalibrator, TopK
from cpseg.protocols import Score

SCORES: list[Any] = [
    LAC(),
    APS(),
    APS(randomized=True),
    RAPS(k_reg=1),
    RAPS(penalty=0.3, k_reg=0, randomized=True),
    SAPS(),
    SAPS(randomized=True),
    Margin(),
    TopK(),
    TopK(randomized=True),
]
B, C, H, W = 6, 5, 7, 9
ALPHAS = (0.15, 0.25, 0.4, 0.6)


def saturated(kind: str) -> tuple[Tensor, Tensor]:
    """Logits that bfloat16 can hold; no memory is shared between entries."""
    generator = torch.Generator().manual_seed(len(kind))
    logits = torch.randn(B, C, H, W, generator=generator)
    labels = torch.randint(0, C, (B, H, W), generator=generator)
    logits = logits + 2 * torch.nn.functional.one_hot(labels, C).movedim(-1, 1)
    scale = {"ties": 1.0, "saturated": 20.0, "extreme": 60.0}[kind]
    logits = (logits.round() * scale).bfloat16().float()
    assert torch.equal(logits, logits.bfloat16().float())
    return logits, labels


@cache
def compiled(score: Any, backend: str, *, labeled: bool) -> Callable[..., Tensor]:
    view: Callable[..., Tensor] = score.of_labels if labeled else score
    return torch.compile(view, backend=backend, dynamic=False)


@dataclass(frozen=True)
class Path:
    """A score, computed in a way of its own."""

    score: Any
    before: Callable[[Tensor], Tensor] = lambda logits: logits
    tile: int | None = None
    one_by_one: bool = False
    compiled: str | None = None

    @property
    def follows_logits(self) -> bool:
        return bool(self.score.follows_logits)

    def __call__(self, logits: Tensor) -> Tensor:
        return self._run(self.score, logits)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self._run(self.score.of_labels, logits, labels)

    def range(self, num_classes: int) -> tuple[float, float] | None:
        ends: tuple[float, float] | None = self.score.range(num_classes)
        return ends

    def tolerance(self, num_classes: int) -> float:
        return float(self.score.tolerance(num_classes))

    def _run(self, view: Callable[..., Tensor], logits: Tensor, *labels: Tensor) -> Tensor:
        logits = self.before(logits)
        if self.compiled is not None:
            view = compiled(self.score, self.compiled, labeled=bool(labels))
        with pytest.MonkeyPatch.context() as patch:
            if self.tile is not None:
                patch.setattr(cpseg._tiles, "_EAGER", {"cpu": self.tile})
            if self.one_by_one:
                return torch.cat(
                    [
                        view(logits[i : i + 1], *(part[i : i + 1] for part in labels))
                        for i in range(len(logits))
                    ]
                )
            return view(logits, *labels)


def strided(logits: Tensor) -> Tensor:
    return logits.movedim(1, -1).contiguous().movedim(-1, 1)


PATHS: dict[str, dict[str, Any]] = {
    "eager": {},
    "small tiles": {"tile": 5 * 32},
    "one by one": {"one_by_one": True},
    "classes last": {"before": strided},
    "float64": {"before": Tensor.double},
    "bfloat16": {"before": Tensor.bfloat16},
    "traced": {"compiled": "aot_eager"},
}


def assert_covered_stays(score: Score, ways: dict[str, dict[str, Any]], kind: str) -> None:
    logits, labels = saturated(kind)
    paths = {name: Path(score, **how) for name, how in ways.items()}
    views = {name: (path(logits), path.of_labels(logits, labels)) for name, path in paths.items()}
    stores: tuple[Literal["exact", "histogram"], ...] = ("exact", "histogram")
    for (start, path), store in product(paths.items(), stores):
        calibrator = SplitCalibrator(Seen(path, *views[start]), store=store)
        calibrator.update(logits, labels)
        for alpha in ALPHAS:
            calibration = calibrator.compute(alpha)
            exact = calibrator.evidence()[0].quantiles([alpha])
            covered = views[start][1] <= exact
            assert covered.float().mean() >= 1 - alpha
            for end, other in paths.items():
                there = replace(calibration, score=Seen(other, *views[end]))
                sets = PixelSetPredictor(there)(logits)
                kept = sets.gather(1, labels[:, None])[:, 0]
                assert (kept | ~covered).all(), (start, end, alpha)


class Seen:
    """A path's scores, computed once."""

    follows_logits = True

    def __init__(self, path: Path, every: Tensor, own: Tensor) -> None:
        self.path, self.every, self.own = path, every, own

    def __repr__(self) -> str:
        return "Seen()"  # never merged or saved

    def __call__(self, logits: Tensor) -> Tensor:
        del logits
        return self.every

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        del logits, labels
        return self.own

    def range(self, num_classes: int) -> tuple[float, float] | None:
        return self.path.range(num_classes)

    def tolerance(self, num_classes: int) -> float:
        return self.path.tolerance(num_classes)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("kind", ["ties", "saturated", "extreme"])
def test_what_one_path_covers_no_other_loses(score: Score, kind: str) -> None:
    assert_covered_stays(score, PATHS, kind)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("score", [LAC(), APS()], ids=str)
def test_fused_kernels_lose_nothing(score: Score) -> None:
    ways = {"eager": {}, "fused": {"compiled": "inductor"}, "float64": PATHS["float64"]}
    assert_covered_stays(score, ways, "ties")


def test_ties_and_saturation_are_there() -> None:
    for kind in ("saturated", "extreme"):
        logits, labels = saturated(kind)
        scores = LAC().of_labels(logits, labels)
        assert (scores == 0).sum() > 50
        assert (scores == 1).sum() > 0
        assert len(set(scores.flatten().tolist())) < scores.numel() / 4
