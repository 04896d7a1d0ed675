"""Stores and evidence: exact integers, outward edges, a tail that loses nothing, gather."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as law
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cpseg import (
    APS,
    LAC,
    RAPS,
    SAPS,
    ClassConditionalCalibrator,
    Margin,
    SplitCalibrator,
    TopK,
    accumulate,
    gather,
    merge_all,
)
from cpseg.accumulate import Evidence, Exact, Histogram, occurrences, upward
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
    assert histogram.scale.fits(scores).all()
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
    edges = histogram.edges(torch.arange(histogram.num_cells))
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
        evidence.add(cell.view(1, 1), torch.tensor([[0]]), torch.tensor([[1, 0]]), unit_ids=None)
    assert evidence.num_units.tolist() == [many + 3, many]
    assert evidence.num_pixels.tolist() == [many + 3, many]
    mass = "mass" if kind == "exact" else "mass+"
    assert int(evidence.state()[mass].sum()) == 2**53 + 3


def test_a_unit_of_more_pixels_than_float32_counts_is_counted() -> None:
    counts = occurrences(torch.zeros((1, 2**24 + 3), dtype=torch.uint8), 2)
    assert counts.tolist() == [[2**24 + 3, 0]]


@given(
    values=st.lists(st.lists(st.integers(0, 6), min_size=5, max_size=5), min_size=1, max_size=4),
    part=st.integers(1, 30),
    lanes=st.integers(1, 3),
)
def test_occurrences_are_those_of_each_entry(
    values: list[list[int]], part: int, lanes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulate, "_PART_PIXELS", {"cpu": part})
        patch.setattr(accumulate, "_LANES", {"cpu": lanes})
        for dtype in (torch.uint8, torch.int32, torch.int64):
            found = occurrences(torch.tensor(values, dtype=dtype), 7)
            assert found.tolist() == [[row.count(value) for value in range(7)] for row in values]


@given(
    rows=st.integers(1, 3),
    entries=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2**40)), max_size=40),
    lanes=st.integers(2, 4),
)
def test_lanes_change_no_mass(rows: int, entries: list[tuple[int, int]], lanes: int) -> None:
    def filled() -> Histogram:
        histogram = Histogram(rows, 0.0, 1.0)
        last = rows * histogram.num_cells
        keys = [min(place // 3 * histogram.num_cells + place % 3, last) for place, _ in entries]
        mass = torch.tensor([mass for _, mass in entries], dtype=torch.int64)
        for half in (slice(None, 15), slice(15, None)):
            histogram.add(torch.tensor(keys, dtype=torch.int64)[half], mass[half])
        return histogram

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulate, "_LANES", {"cpu": lanes})
        spread = filled()
    assert torch.equal(spread.mass, filled().mass)


def test_what_most_pixels_share_is_many_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulate, "_LANES", {"cpu": 32})
    histogram = Histogram(2, 0.0, 1.0)
    size = histogram.num_cells
    for shared in (0, size, 2 * size):  # of each row, and what is thrown away
        places = histogram._spread(torch.full((320,), shared)).tolist()
        assert [places.count(place) for place in set(places)] == [10] * 32
    keys = torch.tensor([1, size - 1, size + 1])
    assert torch.equal(histogram._spread(keys), keys)


@pytest.mark.parametrize("marked", [True, False], ids=["cell too", "row alone"])
def test_pixels_that_do_not_count_are_in_no_row(*, marked: bool) -> None:
    for store in (Exact(2), Histogram(2, 0.0, 1.0)):
        evidence = Evidence(store, by_unit=True, device="cpu")
        cells = store.cells(torch.tensor([[0.5, 0.25, 0.5, 0.75]]))
        if marked:
            cells[0, 3] = store.num_cells
        rows = torch.tensor([[0, 1, 0, 5]], dtype=torch.uint8)
        evidence.add(cells, rows, torch.tensor([[2, 1]]), unit_ids=None)
        evidence.add(cells, rows, torch.tensor([[2, 1]]), unit_ids=[7])
        evidence.close([7])
        assert evidence.num_units.tolist() == [2, 2]
        assert evidence.num_pixels.tolist() == [4, 2]
        assert store.above(torch.tensor([0.0, 0.0])).tolist() == [2 * UNIT_MASS, 2 * UNIT_MASS]


@pytest.mark.parametrize("n", [99, 199, 999])
@pytest.mark.parametrize("by_unit", [False, True])
def test_ranks_are_those_of_the_decimal(n: int, *, by_unit: bool) -> None:
    # 99 percentages, where binary arithmetic is off by one for many.
    evidence = Evidence(Exact(1), by_unit=by_unit, device="cpu")
    scores = torch.arange(1.0, n + 1)[:, None]
    cells = evidence.store.cells(scores)
    evidence.add(cells, None, torch.ones(n, 1).long(), unit_ids=None)
    for percent in range(1, 100):
        rank = -(-(n + 1) * (100 - percent) // 100)
        assert evidence.quantiles([percent / 100]).tolist() == [rank if rank <= n else math.inf]


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
        cells = evidence.store.cells(zeros)
        evidence.add(cells, None, torch.tensor([[pixels]]), unit_ids=None)
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
        (mass,) = (name for name in kind.state() if name.startswith("mass"))
        kind.state()[mass].zero_()
        assert int(kind.state()[mass].sum()) == 5


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Most bytes of any tensor that an operation makes, views apart."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            Largest.bytes = max(Largest.bytes, result.numel() * result.element_size())
        return result


def test_many_rows_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 7
    histogram = Histogram(rows, 0.0, 1.0)
    scores = torch.rand(2000, generator=generator)
    row = torch.randint(0, rows, (2000,), generator=generator)
    mass = torch.randint(1, 9, (2000,), generator=generator)
    histogram.add(row * histogram.num_cells + histogram.cells(scores), mass)
    budgets = torch.tensor([0, 50, 100, 200, -1, 3, 999])
    whole = histogram.thresholds(budgets), histogram.above(torch.linspace(0, 1, rows))
    for cells in (1, 2 * histogram.num_cells, 3 * histogram.num_cells):
        monkeypatch.setattr(accumulate, "_BLOCK", cells)
        Largest.bytes = 0
        with Largest():  # type: ignore[no-untyped-call]
            found = histogram.thresholds(budgets), histogram.above(torch.linspace(0, 1, rows))
        assert torch.equal(found[0], whole[0])
        assert torch.equal(found[1], whole[1])
        assert Largest.bytes <= 8 * max(cells, histogram.num_cells)


def test_a_row_of_a_histogram_takes_the_bytes_that_are_documented() -> None:
    for ends in ((0.0, 1.0), (-1.0, 1.0), (0.0, 1.02)):
        assert Histogram(1, *ends).num_cells <= 47_107
    assert Histogram(3, 0.0, 1.0).mass.nbytes == 8 * (3 * 47_107 + 1)
    assert "47,107 cells of 8 bytes, 377 kB" in " ".join((Histogram.__doc__ or "").split())


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


# What both the processes and the test run: shares are uneven, and one rank may have seen nothing.
_SHARED = """
import torch
from cpseg import (
    APS, ClassConditionalCalibrator, GroupCalibrator, LocationCalibrator, SplitCalibrator, TopK,
    gather,
)
from cpseg.metrics import Coverage, MeanIoU
from cpseg.risk import FalseNegativeRate, RiskCalibrator
from cpseg.shift import WeightedCalibrator

logits = torch.randn(7, 3, 4, 5, generator=torch.Generator().manual_seed(0))
labels = torch.randint(0, 3, (7, 4, 5), generator=torch.Generator().manual_seed(1))
ids = [4, 4, 8, 15, 15, 16, 8]
groups = torch.arange(20).view(4, 5) % 2

class Own:
    follows_logits = True
    def __call__(self, logits):
        return -logits.float()
    def of_labels(self, logits, labels):
        return self(logits).gather(1, labels[:, None])[:, 0]
    def range(self, num_classes):
        return None
    def tolerance(self, num_classes):
        return 0.0
    def __repr__(self):
        return "Own()"

def by_ids(maker):
    return maker, lambda a, part: a.update(logits[part], labels[part], ids[part])

def by_image(maker):
    return maker, lambda a, part: a.update(logits[part], labels[part])

def by_class(store):
    return ClassConditionalCalibrator(3, store=store)

CASES = {
    "exact, open": by_ids(lambda: by_class("exact")),
    "histogram, open": by_ids(lambda: by_class("histogram")),
    "exact": by_image(lambda: by_class("exact")),
    "histogram": by_image(lambda: by_class("histogram")),
    "classes unknown": by_image(lambda: SplitCalibrator(APS(), source="a source")),
    "location": by_image(lambda: LocationCalibrator((4, 5), max_units=20)),
    "pixel": by_image(lambda: SplitCalibrator(TopK(), unit="pixel")),
    "own score": by_image(lambda: SplitCalibrator(Own(), store="exact")),
    "group": (
        lambda: GroupCalibrator(2, 3),
        lambda a, part: a.update(logits[part], labels[part], groups, ids[part]),
    ),
    "coverage": (
        lambda: Coverage(3),
        lambda a, part: a.update(logits[part] > 0, labels[part]),
    ),
    "miou": (lambda: MeanIoU(3), lambda a, part: a.update(logits[part].argmax(1), labels[part])),
    "risk": by_ids(lambda: RiskCalibrator(FalseNegativeRate(3))),
    "weighted": (
        WeightedCalibrator,
        lambda a, part: a.update(logits[part], labels[part], torch.arange(1.0, 8)[part]),
    ),
}
CUTS = {"uneven": (0, 5, 7, 7), "first empty": (0, 0, 6, 7)}
"""

_RANK = """
import sys
import torch.distributed as dist
from cpseg import LAC
from cpseg.errors import InputError

torch.set_num_threads(1)
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=3)
found = {}
for cut, ends in CUTS.items():
    part = slice(ends[rank], ends[rank + 1])
    for name, (maker, update) in CASES.items():
        mine = maker()
        if part.stop > part.start:
            update(mine, part)
        before = mine.state_dict()
        found[f"{name}, {cut}"] = gather(mine).state_dict()
        after = mine.state_dict()
        for key, value in before.items():
            kept = torch.equal(value, after[key]) if hasattr(value, "shape") else value == after[key]
            assert kept, f"what was gathered must stay as it was: {key}"
# Ranks that differ are refused on every rank, and none waits for another.
for differs in (
    SplitCalibrator(TopK() if rank == 1 else LAC()).update(logits, labels),
    SplitCalibrator(store="exact" if rank == 2 else "histogram").update(logits, labels),
    SplitCalibrator().update(logits[:, :3 - rank % 2], labels % (3 - rank % 2)),
    Coverage(3 + rank),
    ClassConditionalCalibrator(3 + rank % 2).update(logits, labels)
    if rank % 2 == 0
    else ClassConditionalCalibrator(4).update(logits[:, [0, 1, 2, 2]], labels),
):
    try:
        gather(differs)
    except InputError as error:
        assert "\\n" not in str(error)
    else:
        raise AssertionError(f"{differs} was gathered")
torch.save(found, f"{path}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.dist
def test_processes_with_uneven_shares_equal_one_to_the_bit(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SHARED + _RANK]
    ranks = [
        subprocess.Popen(  # noqa: S603 - our own interpreter and code
            [*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE
        )
        for rank in range(3)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=300)
            assert rank.returncode == 0, errors.decode()
    finally:
        for rank in ranks:  # one that is left alone would wait for the others
            rank.kill()
            rank.communicate()
    shared: dict[str, Any] = {"__name__": "__main__"}
    exec(_SHARED, shared)  # noqa: S102 - the code above
    files = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for name, (maker, update) in shared["CASES"].items():
        whole = update(maker(), slice(0, 7)).state_dict()
        for cut in shared["CUTS"]:
            for found in (file[f"{name}, {cut}"] for file in files):
                assert found.keys() == whole.keys()
                for key, wanted in whole.items():
                    same = (
                        found[key].dtype == wanted.dtype and torch.equal(found[key], wanted)
                        if isinstance(wanted, Tensor)
                        else found[key] == wanted
                    )
                    assert same, f"{name}, {cut}: {key}"


@pytest.mark.dist
def test_the_example_runs_and_its_processes_equal_one() -> None:
    root = Path(__file__).parents[1]
    run = subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, str(root / "examples" / "distributed_calibration.py")],
        env={**os.environ, "PYTHONPATH": str(root)},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = run.stdout.splitlines()
    assert lines[0] == "2 processes saw [21, 20] images"
    assert lines[-1] == "equal to one process, to the bit"


def test_histograms_are_added_up_and_nothing_is_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    # One process alone: what is reduced, what is sent, and how large it is.
    reduced, sent = [], []

    def reduce(tensor: Tensor) -> None:
        reduced.append(tuple(tensor.shape))
        assert tensor.dtype == torch.int64

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_reduce", reduce)
    monkeypatch.setattr(dist, "broadcast", lambda data, _: sent.append(len(data)))
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, None)
    calibrator = ClassConditionalCalibrator(3).update(draws(0, 3, 3, 5), torch.zeros(3, 5).long())
    cells = Histogram(1, 0.0, 1.0).num_cells
    assert gather(calibrator).compute(0.4).num_units.tolist() == [3, 0, 0]
    assert reduced == [(1,), (3 * cells,), (cells,), (1,)]
    assert sum(sent) < 3000
