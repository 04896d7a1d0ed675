"""Stores and evidence: exact integers, outward edges, a tail that loses nothing, gather."""

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as law
from hypothesis import strategies as st
from torch import Tensor

from cpseg import (
    APS,
    LAC,
    RAPS,
    SAPS,
    ClassConditionalCalibrator,
    Margin,
    SplitCalibrator,
    TopK,
    gather,
    merge_all,
)
from cpseg.accumulate import Evidence, Exact, Histogram, upward
from cpseg.errors import InputError
from cpseg.protocols import Score
from cpseg.quantile import MAX_UNITS, UNIT_MASS, budget

SCORES: list[Score] = [
    LAC(),
    APS(),
    APS(randomized=True),
    RAPS(k_reg=1),
    RAPS(penalty=0.5, k_reg=0, randomized=True),
    SAPS(),
    SAPS(randomized=True),
    Margin(),
    TopK(),
    TopK(randomized=True),
]
IDS = [f"{score}" for score in SCORES]
RANGES = [score.range(7) for score in SCORES]


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stores_with(scores: Tensor, mass: Tensor, ends: tuple[float, float]) -> tuple[Tensor, Tensor]:
    spread = int(mass.sum())  # a budget is always less than all there is
    budgets = [
        above for above in (-1, 0, 1, spread // 10, spread // 3, spread - 1) if above < spread
    ]
    exact, histogram = Exact(len(budgets)), Histogram(len(budgets), *ends)
    assert histogram.fits(scores).all()
    rows = torch.arange(len(budgets))[:, None]
    for store in (exact, histogram):
        store.add(rows * store.num_cells + store.cells(scores), mass.expand(len(budgets), -1))
    return exact.thresholds(torch.tensor(budgets)), histogram.thresholds(torch.tensor(budgets))


def assert_certified(exact: Tensor, coarse: Tensor, ends: tuple[float, float]) -> None:
    low, high = (float(torch.tensor(end)) for end in ends)
    for fine, rough in zip(exact.tolist(), coarse.tolist(), strict=True):
        assert rough >= fine
        if math.isfinite(fine):
            step = (high - low) * 2**-23
            assert rough - fine <= max(1e-3 * min(fine - low, high - fine), step)


@pytest.mark.parametrize("score", SCORES, ids=IDS)
@given(
    seed=st.integers(0, 2**20),
    sharpness=st.sampled_from([0.1, 1.0, 6.0, 30.0, 1e4]),
    whole=st.booleans(),
)
@law(max_examples=8)
def test_histogram_is_never_below_exact_and_close(
    score: Score, seed: int, sharpness: float, *, whole: bool
) -> None:
    logits = draws(seed, 3, 7, 41) * sharpness
    logits = logits.round() * 20 if whole else logits
    labels = torch.randint(0, 7, (3, 41), generator=torch.Generator().manual_seed(seed))
    scores = upward(score.of_labels(logits, labels)).flatten()
    ends = score.range(7)
    assert ends is not None
    mass = torch.randint(1, 9, scores.shape, generator=torch.Generator().manual_seed(seed))
    assert_certified(*stores_with(scores, mass, ends), ends)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-1.0, 1.0), (0.1, 0.7), (-3e20, 5e30), (1e-30, 1.0)])
@given(data=st.data())
@law(max_examples=15)
def test_histogram_of_any_floats_is_certified(
    ends: tuple[float, float], data: st.DataObject
) -> None:
    low, high = (float(torch.tensor(end)) for end in ends)
    floats = st.floats(low, high, width=32) | st.sampled_from([low, high, math.inf])
    scores = torch.tensor(data.draw(st.lists(floats, min_size=1, max_size=30))) + 0.0
    assert_certified(*stores_with(scores, torch.ones(len(scores)).long(), ends), ends)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-1.0, 1.0), (0.0, 1.02), (0.1, 0.7)])
def test_a_cells_edge_is_the_last_float_of_its_cell(ends: tuple[float, float]) -> None:
    histogram = Histogram(1, *ends)
    edges = histogram.edges()
    cells = torch.arange(histogram.num_cells)
    assert (edges.diff() >= 0).all()
    assert edges[-1] == torch.inf
    assert edges[-2] == torch.tensor(ends[1])
    assert (histogram.cells(edges) <= cells).all()
    beyond = edges[:-2].nextafter(torch.tensor(torch.inf))
    assert (histogram.cells(beyond) > cells[:-2]).all()


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (0.0, math.nan)])
def test_a_histogram_needs_a_range(ends: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="finite range"):
        Histogram(1, *ends)


@given(st.lists(st.floats(allow_nan=False), min_size=1))
def test_upward_is_the_least_float32_above(values: list[float]) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    single = upward(scores)
    assert single.dtype == torch.float32
    assert (single.double() >= scores).all()
    lower = single.nextafter(torch.full_like(single, -torch.inf)).double()
    assert ((lower < scores) | (single == -torch.inf)).all()
    assert not (single.signbit() & (single == 0)).any()  # one zero, so one cell


def test_float32_and_halves_pass_upward_unchanged() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        scores = draws(0, 50).to(dtype)
        assert torch.equal(upward(scores), scores.float())


@pytest.mark.parametrize("kind", ["exact", "histogram"])
def test_counts_beyond_float32_are_exact(kind: str) -> None:
    store = Exact(2) if kind == "exact" else Histogram(2, 0.0, 1.0)
    evidence = Evidence(store, by_unit=False, device="cpu")
    many = 2**24
    state = evidence.state()
    state |= {"num_units": torch.tensor([many, many]), "num_pixels": torch.tensor([many, many])}
    evidence.absorb(state)
    cell = store.cells(torch.tensor([0.5]))
    store.add(cell, torch.tensor([2**53]))
    for _ in range(3):
        evidence.add(
            torch.tensor([[0.5]]), torch.tensor([[0]]), torch.tensor([[True]]), unit_ids=None
        )
    assert evidence.num_units.tolist() == [many + 3, many]
    assert evidence.num_pixels.tolist() == [many + 3, many]
    assert int(evidence.state()["mass"].sum()) == 2**53 + 3


@pytest.mark.parametrize("kind", ["exact", "histogram"])
def test_all_units_there_can_be_still_fit_in_int64(kind: str) -> None:
    # Two rows, so that the running total over rows wraps around.
    store = Exact(3) if kind == "exact" else Histogram(3, 0.0, 1.0)
    scores = torch.tensor([0.25, 0.5, 0.75])
    units = MAX_UNITS // 4
    mass = torch.tensor([2 * units, units, units]) * (UNIT_MASS + 2)  # thirds, rounded up
    for row in range(3):
        store.add(store.cells(scores) + row * store.num_cells, mass)
    for alpha, expected in ((0.2, 0.75), (0.3, 0.5), (0.6, 0.25), (0.9, 0.25)):
        above = budget(alpha, MAX_UNITS, UNIT_MASS)
        found = store.thresholds(torch.tensor([above, above, -1]))
        assert found[:2].tolist() == pytest.approx([expected, expected], rel=1e-3)
        assert found[2] == torch.inf


def test_masses_are_rounded_up() -> None:
    for pixels in (1, 3, 7, 1000, 2048 * 1024 - 1):
        evidence = Evidence(Exact(1), by_unit=True, device="cpu")
        zeros = torch.zeros(1, pixels)
        evidence.add(zeros, zeros.long(), zeros == 0, unit_ids=None)
        assert int(evidence.state()["mass"].sum()) == -(-UNIT_MASS // pixels) * pixels >= UNIT_MASS


@given(
    values=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6), min_size=1, max_size=8),
    tail=st.integers(-1, 9),
    data=st.data(),
)
def test_a_pruned_tail_answers_as_if_everything_were_kept(
    values: list[list[int]], tail: int, data: st.DataObject
) -> None:
    # Settling after any batch, or merging pruned parts, must not show.
    kept, pruned, parts = Exact(2), Exact(2, tail), Exact(2, tail)
    for batch in values:
        scores = torch.tensor(batch) / 8
        rows = torch.tensor([value % 2 for value in batch])
        keys, mass = rows * kept.num_cells + kept.cells(scores), torch.ones_like(rows)
        for store in (kept, pruned):
            store.add(keys, mass)
        part = Exact(2, tail)
        part.add(keys, mass)
        parts.absorb(part.state())
        if data.draw(st.booleans()):
            pruned.entries()
    for above in range(-1, tail + 1):
        wanted = kept.thresholds(torch.tensor([above, above]))
        assert torch.equal(pruned.thresholds(torch.tensor([above, above])), wanted)
    for name, value in pruned.state().items():
        assert torch.equal(parts.state()[name], value)


def test_a_store_does_not_follow_the_state_it_came_from() -> None:
    for kind in (Exact(1), Histogram(1, 0.0, 1.0)):
        kind.add(kind.cells(torch.tensor([0.25])), torch.tensor([5]))
        state = kind.state()
        again = Exact(1) if isinstance(kind, Exact) else Histogram(1, 0.0, 1.0)
        again.absorb(state)
        for value in state.values():
            value.zero_()
        assert again.thresholds(torch.tensor([0])).item() == pytest.approx(0.25, rel=1e-3)
        kind.state()["mass"].zero_()
        assert int(kind.state()["mass"].sum()) == 5


def test_pooled_rows_add_up() -> None:
    scores = torch.tensor([0.125, 0.25, 0.5, 0.75])
    for store in (Exact(4), Histogram(4, 0.0, 1.0)):
        store.add(
            store.cells(scores) + torch.arange(4) * store.num_cells, torch.tensor([1, 2, 3, 4])
        )
        pooled = store.pool(torch.tensor([1, -1, 1, 0]), 2)
        found = pooled.thresholds(torch.tensor([0, 3])).tolist()
        assert found == pytest.approx([0.75, 0.125], rel=1e-3)
        assert pooled.above(torch.tensor([0.5, 0.2])).tolist() == [4, 3]


def test_a_list_of_none_is_refused() -> None:
    with pytest.raises(InputError, match="accumulators must hold at least one; got none"):
        merge_all([])


def test_gather_of_one_process_is_a_copy() -> None:
    calibrator = SplitCalibrator().update(draws(0, 3, 2, 5), torch.zeros(3, 5).long())
    copy = gather(calibrator)
    copy.update(draws(1, 3, 2, 5), torch.zeros(3, 5).long())
    assert calibrator.compute(0.4).num_units.tolist() == [3]
    assert copy.compute(0.4).num_units.tolist() == [6]


_RANK = """
    import sys
    import torch
    import torch.distributed as dist
    from cpseg import ClassConditionalCalibrator, gather

    torch.set_num_threads(1)
    rank, path = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    logits = torch.randn(7, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (7, 4, 5), generator=torch.Generator().manual_seed(1))
    ids = [4, 4, 8, 15, 15, 16, 8]
    for name, shares in {
        "uneven": ((0, 5), (5, 7)), "first empty": ((0, 0), (0, 7)), "second empty": ((0, 7), (0, 0))
    }.items():
        start, stop = shares[rank]
        mine = ClassConditionalCalibrator(3, store="exact")
        if stop > start:
            mine.update(logits[start:stop], labels[start:stop], ids[start:stop])
        torch.save(gather(mine).state_dict(), f"{path}/{name} {rank}.pt")
        pixels = torch.tensor(mine.fingerprint.split("-")[0] == f"{20 * (stop - start):x}")
        assert pixels, "what was gathered must stay as it was"
    dist.destroy_process_group()
"""


@pytest.mark.dist
def test_two_processes_equal_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_RANK)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)])  # noqa: S603
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    logits = torch.randn(7, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (7, 4, 5), generator=torch.Generator().manual_seed(1))
    one = ClassConditionalCalibrator(3, store="exact")
    whole = one.update(logits, labels, [4, 4, 8, 15, 15, 16, 8]).state_dict()
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == 6
    for file in files:
        state = torch.load(file, weights_only=True)
        assert state.keys() == whole.keys()
        for name, wanted in whole.items():
            found = state[name]
            assert torch.equal(found, wanted) if isinstance(wanted, Tensor) else found == wanted
