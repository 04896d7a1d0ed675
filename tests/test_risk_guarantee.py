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
    if "guarantee" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes: pytest -m guarantee")


@pytest.mark.guarantee
@pytest.mark.usefixtures("asked")
def test_every_bound_holds_and_the_sum_of_two_maxima_does_not() -> None:
    rows = list(guarantee.bound_rows(2000, sharpness=False))
    assert [row for row in rows if row.ours and not row.holds] == []
    assert any(not row.holds for row in rows if not row.ours)


@pytest.mark.guarantee
@pytest.mark.usefixtures("asked")
def test_every_risk_holds() -> None:
    rows = list(guarantee.risk_rows(2000))
    assert {row.name.removesuffix(", in expectation") for row in rows} == set(guarantee.RISKS)
    assert [row for row in rows if not row.holds] == []


@pytest.mark.guarantee
@pytest.mark.usefixtures("asked")
def test_images_as_units_hold_and_pooled_pixels_do_not() -> None:
    rows = list(guarantee.coverage_rows(2000))
    assert [row for row in rows if row.ours and not row.holds] == []
    assert {row.name for row in rows if not row.holds} == {
        "miscoverage, unit = pixel",
        "torch.quantile, no n + 1",
    }


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
