"""Every bound and every risk over 2,000 draws: the lines of the validity table."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

PATH = Path(__file__).parents[1] / "benchmarks" / "guarantee.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guarantee", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["guarantee"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


guarantee = load()


@pytest.fixture
def asked(request: pytest.FixtureRequest) -> None:
    """These take minutes: only ``pytest -m guarantee`` runs them."""
    if "guarantee" not in str(request.config.getoption("markexpr")):
        pytest.skip("takes minutes: pytest -m guarantee")


@pytest.mark.guarantee
@pytest.mark.usefixtures("asked")
def test_every_bound_holds_and_the_sum_of_two_maxima_does_not() -> None:
    rows = list(guarantee.bound_rows(2000, (10, 50, 200), sharpness=False))
    assert len({row.setting for row in rows}) == 36
    assert [row for row in rows if row.ours and not row.holds] == []
    assert {row.name for row in rows if not row.holds} == {
        "two maxima added (MAPIE 1.6, its default)"
    }


@pytest.mark.guarantee
@pytest.mark.usefixtures("asked")
def test_betting_certifies_closest_to_alpha_from_200_images_on() -> None:
    rows = list(guarantee.bound_rows(300, (200, 1000)))
    assert [row for row in rows if row.ours and not row.holds] == []
    assert "variance over thresholds (MAPIE 1.6, Bernstein)" in {
        row.name for row in rows if not row.holds
    }
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        # The exact test of losses that are 0 or 1 gives away less, and serves no others.
        if row.ours and row.name != "Clopper-Pearson":
            found.setdefault(row.setting, {})[row.name] = row.sharpness
    assert len(found) == 24
    for setting, sharpness in found.items():
        behind = max(sharpness.values()) - sharpness["betting"]
        # Hoeffding-Bentkus is nearly exact for losses that are 0 or 1, if few are 1.
        assert behind <= (0.05 if setting.startswith("Bernoulli, n = 200") else 0), setting


@pytest.mark.guarantee
@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("kind", guarantee.KINDS)
def test_every_risk_holds(kind: str) -> None:
    rows = list(guarantee.risk_rows(2000, (10, 50, 200), (kind,), ((0.1, 0.1),)))
    assert {row.name.removesuffix(", in expectation") for row in rows} == set(guarantee.RISKS)
    assert [row for row in rows if not row.holds] == []


@pytest.mark.guarantee
@pytest.mark.usefixtures("asked")
def test_images_as_units_hold_and_pooled_pixels_do_not() -> None:
    rows = list(guarantee.coverage_rows(2000, (10,)))
    assert [row for row in rows if row.ours and not row.holds] == []
    assert {row.name for row in rows if not row.holds} == {
        "miscoverage, pixels pooled and counted (TorchCP and others)",
        "torch.quantile without n + 1 (torch-uncertainty)",
    }


@pytest.mark.parametrize("name", guarantee.RISKS)
def test_many_draws_at_once_are_those_of_the_calibrator(name: str) -> None:
    risk = guarantee.RISKS[name]
    logits, labels = guarantee.population(60, 3, "clustered pixels")
    grid = torch.linspace(0, 1, 9)  # steps wider than a score's tolerance
    seen = guarantee.RiskCalibrator(risk, grid=grid).update(logits, labels, range(60))
    rows = torch.stack([seen._units[unit] for unit in range(60)])
    losses = risk.losses(rows, 0.3)
    picks = torch.randint(60, (40, 20), generator=torch.Generator().manual_seed(0))
    start = guarantee.Start(grid[[5] * losses.values.shape[1]])
    modes = [(0.3, 0.2), (0.3, None)] if risk.monotone else [(0.3, 0.2)]
    for alpha, delta in modes:
        if delta is None:
            found = guarantee.in_expectation(risk, losses, picks, alpha)
        else:
            bound = guarantee.hoeffding_bentkus  # it does not depend on the order
            found = guarantee.with_probability(
                risk, losses, picks, alpha, delta, start=start, grid=grid, bound=bound
            )
        for draw in range(20):
            control = guarantee.RiskCalibrator(risk, grid=grid, start=start if delta else None)
            control.update(logits[:0], labels[:0])
            control._rows = [rows[picks[:, draw]]]
            made = control.compute(
                alpha,
                delta,
                bound=guarantee.hoeffding_bentkus,
                simultaneous=delta is not None and bool(risk.axes),
            )
            place = (made.thresholds.clamp(0, 1)[:, None] - grid).abs().argmin(1)
            assert torch.where(made.thresholds.isinf(), -1, place).tolist() == found[draw].tolist()


def test_a_line_of_the_table_that_fails_too_often_is_seen() -> None:
    for failures, holds in ((200, True), (252, True), (253, False)):
        assert guarantee.Row("x", "y", 0.1, 2000, failures=failures).holds is holds
    assert not guarantee.Row("x", "y", 0.1, 2000, mean=0.11, error=0.002).holds
    assert guarantee.Row("x", "y", 0.1, 2000, mean=0.107, error=0.002).holds
    assert len(list(guarantee.table([guarantee.Row("x", "y", 0.1, 9, failures=1)]))) == 3


@pytest.mark.parity
def test_the_sum_of_two_maxima_is_what_mapie_decides() -> None:
    methods = pytest.importorskip("mapie.risk_control.methods")
    draw = guarantee.bernoulli((60, 40), torch.Generator().manual_seed(0))
    for mean in (0.05, 0.1):
        ours = guarantee.split_maxima(draw(mean), 0.1, 0.1) <= 0.1
        theirs = [
            methods.get_r_hat_plus(
                losses[:, None].numpy(), np.array([0.1]), "rcps", "wsr", 0.1, 0.25
            )[1][0]
            <= 0.1
            for losses in draw(mean).T
        ]
        assert ours.tolist() == theirs
        assert 0 < sum(theirs) < 40
