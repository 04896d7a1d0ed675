"""Every score against one contract, its own oracle, and the other ways of computing it."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf, nan
from shutil import which
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import cpseg._tiles
from cpseg._draws import uniform
from cpseg.errors import InputError
from cpseg.protocols import Score
from cpseg.scores import (
    APS,
    LAC,
    RAPS,
    SAPS,
    Margin,
    TopK,
    logits_from_probabilities,
    logits_from_sigmoid,
)

Oracle = Callable[[list[float], int, float], float]  # row of logits, class, draw: its score


def probabilities(row: list[float]) -> list[float]:
    odds = [exp(x - max(row)) for x in row]
    return [o / sum(odds) for o in odds]


def not_after(row: list[float], k: int) -> list[int]:
    """The classes that rank no later than k: larger logits, then smaller indices."""
    return [j for j, x in enumerate(row) if (-x, j) <= (-row[k], k)]


def lac(row: list[float], k: int, _: float) -> float:
    return 1 - probabilities(row)[k]


def aps(row: list[float], k: int, draw: float) -> float:
    p = probabilities(row)
    return sum(p[j] for j in not_after(row, k)) - draw * p[k]


def raps(row: list[float], k: int, draw: float) -> float:
    return aps(row, k, draw) + 0.125 * max(len(not_after(row, k)) - 2, 0)


def saps(row: list[float], k: int, draw: float) -> float:
    top, rank = max(probabilities(row)), len(not_after(row, k))
    return top * (1 - draw) if rank == 1 else top + 0.3 * (rank - 1 - draw)


def margin(row: list[float], k: int, _: float) -> float:
    p = probabilities(row)
    return max([p[j] for j in range(len(p)) if j != k], default=0.0) - p[k]


def topk(row: list[float], k: int, draw: float) -> float:
    return len(not_after(row, k)) - draw


@dataclass(frozen=True)
class Case:
    """A score, what it should be, and the seed of its draws if it has any."""

    score: Score
    oracle: Oracle
    seed: int | None = None

    def draw(self, position: int) -> float:
        if self.seed is None:
            return 0.0
        return uniform(self.seed, torch.tensor(position)).item()


# A new score is one line here.
CASES = {
    "LAC": Case(LAC(), lac),
    "APS": Case(APS(), aps),
    "APS randomized": Case(APS(randomized=True, seed=3), aps, 3),
    "RAPS": Case(RAPS(0.125, 2), raps),
    "RAPS randomized": Case(RAPS(0.125, 2, randomized=True, seed=2**40 + 1), raps, 2**40 + 1),
    "SAPS": Case(SAPS(0.3), saps),
    "SAPS randomized": Case(SAPS(0.3, randomized=True, seed=-5), saps, -5),
    "Margin": Case(Margin(), margin),
    "TopK": Case(TopK(), topk),
    "TopK randomized": Case(TopK(randomized=True, seed=11), topk, 11),
}
every_score = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
without_draws = pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.seed is None],
    ids=[name for name, case in CASES.items() if case.seed is None],
)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SPACES = [(), (7,), (3, 5), (2, 3, 5)]


def normal(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def saturated(*shape: int, seed: int = 0) -> Tensor:
    """Logits on few levels far apart: most probabilities are 0 or 1, and many scores are equal."""
    levels = torch.tensor([-inf, -60.0, -20.0, 0.0, 0.0, 20.0, 60.0])
    picks = torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(seed))
    logits = levels[picks]
    logits[:, 0] = logits[:, 0].clamp(min=-20.0)  # no row is nothing but -inf
    return logits


def some_labels(logits: Tensor, seed: int = 1) -> Tensor:
    batch, classes, *space = logits.shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, classes, (batch, *space), generator=generator)


KINDS: dict[str, Callable[..., Tensor]] = {
    "ordinary": normal,
    "uniform": lambda *shape: torch.zeros(shape),
    "nearly uniform": lambda *shape: normal(*shape, spread=1e-3),
    "saturated": saturated,
    "integers": lambda *shape: normal(*shape).round(),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


# --- what each score is --------------------------------------------------------------------------


@every_score
@every_kind
@pytest.mark.parametrize("classes", [1, 2, 6])
def test_both_views_are_what_the_oracle_says(
    case: Case, kind: Callable[..., Tensor], classes: int
) -> None:
    logits = kind(2, classes, 3, 4)
    if classes == 1:
        logits = logits.clamp(min=-60.0)
    labels = some_labels(logits)
    everywhere, at_labels = case.score(logits), case.score.of_labels(logits, labels)
    slack = case.score.tolerance(classes)
    for b in range(2):
        for i in range(3):
            for j in range(4):
                row, draw = logits[b, :, i, j].tolist(), case.draw(4 * i + j)
                wanted = [case.oracle(row, k, draw) for k in range(classes)]
                assert everywhere[b, :, i, j].tolist() == pytest.approx(wanted, rel=0, abs=slack)
                label = int(labels[b, i, j])
                assert at_labels[b, i, j].item() == pytest.approx(wanted[label], rel=0, abs=slack)


def test_the_published_conventions_on_one_pixel() -> None:
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log()
    tables: list[tuple[Score, list[float]]] = [
        (LAC(), [0.875, 0.5, 0.75, 0.875]),
        (APS(), [0.875, 0.5, 0.75, 1.0]),
        (RAPS(0.5, 1), [1.875, 0.5, 1.25, 2.5]),
        (SAPS(0.25), [1.0, 0.5, 0.75, 1.25]),
        (Margin(), [0.375, -0.25, 0.25, 0.375]),
        (TopK(), [3.0, 1.0, 2.0, 4.0]),
    ]
    for score, wanted in tables:
        assert score(logits)[0].tolist() == pytest.approx(wanted, rel=0, abs=1e-6)


def test_defaults_are_the_documented_ones() -> None:
    assert APS() == APS(randomized=False, seed=0)
    assert RAPS() == RAPS(penalty=0.01, k_reg=5, randomized=False, seed=0)
    assert SAPS() == SAPS(weight=0.2, randomized=False, seed=0)
    assert TopK() == TopK(randomized=False, seed=0)


# --- the contract --------------------------------------------------------------------------------


@every_score
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("space", SPACES)
def test_shapes_and_dtypes(
    case: Case, dtype: torch.dtype, space: tuple[int, ...], device: torch.device
) -> None:
    logits = normal(4, 6, *space).to(device, dtype)
    labels = some_labels(logits).to(device)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    everywhere, at_labels = case.score(logits), case.score.of_labels(logits, labels)
    assert everywhere.shape == logits.shape
    assert at_labels.shape == labels.shape
    assert everywhere.dtype == at_labels.dtype == wanted
    assert everywhere.device == at_labels.device == logits.device


@every_score
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (0, 3), (2, 1, 0), (0, 1, 0)])
def test_nothing_in_nothing_out(case: Case, shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape)
    labels = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    assert case.score(logits).shape == shape
    assert case.score.of_labels(logits, labels).shape == labels.shape


@every_score
@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_half_precision_is_scored_in_float32(case: Case, dtype: torch.dtype) -> None:
    logits = normal(2, 5, 3, 4).to(dtype)
    labels = some_labels(logits)
    assert torch.equal(case.score(logits), case.score(logits.float()))
    assert torch.equal(
        case.score.of_labels(logits, labels), case.score.of_labels(logits.float(), labels)
    )


def layouts(logits: Tensor) -> dict[str, Tensor]:
    """The same values in memory layouts that models give."""
    batch, classes, height, width = logits.shape
    sliced = torch.full((batch + 1, classes + 2, 2 * height, width + 3), nan)
    sliced[1:, 1:-1, ::2, 3:] = logits
    return {
        "channels last": logits.contiguous(memory_format=torch.channels_last),
        "transposed": logits.transpose(2, 3).contiguous().transpose(2, 3),
        "classes last": logits.movedim(1, -1).contiguous().movedim(-1, 1),
        "sliced": sliced[1:, 1:-1, ::2, 3:],
        "batch last": logits.movedim(0, -1).contiguous().movedim(-1, 0),
    }


@every_score
@pytest.mark.parametrize("shape", [(3, 21, 5, 7), (1, 21, 8, 12)], ids=["copied", "viewed"])
def test_strides_do_not_change_a_bit(case: Case, shape: tuple[int, ...]) -> None:
    logits = normal(*shape)
    labels = some_labels(logits)
    wanted = case.score(logits), case.score.of_labels(logits, labels)
    strided = labels.transpose(1, 2).contiguous().transpose(1, 2)
    for name, given_logits in layouts(logits).items():
        assert torch.equal(case.score(given_logits), wanted[0]), name
        assert torch.equal(case.score.of_labels(given_logits, strided), wanted[1]), name


@every_score
def test_expanded_logits_and_labels(case: Case) -> None:
    logits = normal(1, 6, 1, 7)
    wide = logits.expand(4, 6, 5, 7)
    labels = some_labels(wide[:1, :, :1]).expand(4, 5, 7)
    assert torch.equal(case.score(wide), case.score(wide.contiguous()))
    assert torch.equal(
        case.score.of_labels(wide, labels), case.score.of_labels(wide.clone(), labels.clone())
    )


@every_score
@every_kind
@pytest.mark.parametrize("classes", [2, 3, 21, 150, 1000])
def test_label_view_is_the_all_classes_view_at_the_label(
    case: Case, kind: Callable[..., Tensor], classes: int
) -> None:
    logits = kind(2, classes, 13, 17)
    labels = some_labels(logits)
    gathered = case.score(logits).gather(1, labels[:, None])[:, 0]
    apart = (case.score.of_labels(logits, labels) - gathered).abs().max()
    assert apart.item() <= case.score.tolerance(classes)


ROWS = st.lists(
    st.one_of(
        st.sampled_from([-inf, -1e30, -88.0, -1.0, -0.0, 0.0, 1.0, 1.0 + 2**-23, 88.0, 3e38]),
        st.floats(-50, 50, width=32),
    ),
    min_size=2,
    max_size=9,
).filter(lambda row: max(row) > -inf)


@every_score
@settings(max_examples=50)
@given(row=ROWS)
def test_views_agree_and_obey_range_and_order_on_hostile_rows(case: Case, row: list[float]) -> None:
    classes = len(row)
    logits = torch.tensor(row).expand(classes, classes)
    at_labels = case.score.of_labels(logits, torch.arange(classes))
    # No spatial axes: every batch entry is position 0 and has the same draw.
    everywhere = case.score(logits)[0]
    assert (at_labels - everywhere).abs().max().item() <= case.score.tolerance(classes)
    limits = case.score.range(classes)
    assert limits is not None
    for scores in (everywhere, at_labels):
        assert limits[0] <= scores.min().item()
        assert scores.max().item() <= limits[1]
    larger = logits[0][:, None] > logits[0][None, :]
    assert case.score.follows_logits
    assert not (larger & (everywhere[:, None] > everywhere[None, :])).any()


@every_score
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 2, 150, 1000])
def test_finite_scores_lie_in_the_declared_range(
    case: Case, kind: Callable[..., Tensor], classes: int, dtype: torch.dtype
) -> None:
    logits = kind(2, classes, 70).clamp(min=-1e4).to(dtype)
    limits = case.score.range(classes)
    assert limits is not None
    for scores in (case.score(logits), case.score.of_labels(logits, some_labels(logits))):
        assert limits[0] <= scores.min().item()
        assert scores.max().item() <= limits[1]


@every_score
@every_kind
def test_a_larger_logit_never_scores_higher(case: Case, kind: Callable[..., Tensor]) -> None:
    assert case.score.follows_logits is True
    logits = kind(1, 21, 400)
    largest_first = logits.argsort(dim=1, descending=True, stable=True)
    scores = case.score(logits).gather(1, largest_first)
    assert bool((scores.diff(dim=1) >= 0).all())


@every_score
@pytest.mark.parametrize("bad", [(nan, 0.0), (inf, 0.0), (inf, -inf), (-inf, -inf), (nan, nan)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_unusable_pixels_score_nan_and_only_they(
    case: Case, bad: tuple[float, float], dtype: torch.dtype
) -> None:
    clean = normal(2, 4, 3, 5).to(dtype)
    logits = clean.clone()
    logits[1, :, 2, 3] = bad[1]
    logits[1, 2, 2, 3] = bad[0]
    hit = torch.zeros(2, 3, 5, dtype=torch.bool)
    hit[1, 2, 3] = True
    for labels in (torch.full((2, 3, 5), 2), torch.full((2, 3, 5), 0)):
        at_labels = case.score.of_labels(logits, labels)
        assert torch.equal(at_labels.isnan(), hit)
        assert torch.equal(at_labels[~hit], case.score.of_labels(clean, labels)[~hit])
    everywhere = case.score(logits)
    assert torch.equal(everywhere.isnan(), hit[:, None].expand(2, 4, 3, 5))
    assert torch.equal(everywhere.movedim(1, -1)[~hit], case.score(clean).movedim(1, -1)[~hit])


@every_score
def test_classes_ruled_out_by_minus_infinity_are_finite_scores(case: Case) -> None:
    logits = normal(2, 5, 7)
    logits[:, 3] = -inf
    logits[:, 1] = -inf
    assert bool(case.score(logits).isfinite().all())
    assert bool(case.score.of_labels(logits, torch.full((2, 7), 3)).isfinite().all())


@every_score
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_that_are_no_class_score_nan(case: Case, dtype: torch.dtype) -> None:
    logits = normal(1, 4, 6)
    strange = 255 if dtype == torch.uint8 else -1
    labels = torch.tensor([[0, 3, 4, strange, 2, 100]], dtype=dtype)
    scores = case.score.of_labels(logits, labels)
    assert scores[0].isnan().tolist() == [False, False, True, True, False, True]
    known = case.score(logits)[0]
    for pixel, label in ((0, 0), (1, 3), (4, 2)):
        assert abs(scores[0, pixel] - known[label, pixel]) <= case.score.tolerance(4)


@every_score
def test_nothing_of_the_callers_is_changed(case: Case) -> None:
    logits, labels = normal(2, 5, 3, 4), some_labels(normal(2, 5, 3, 4))
    before = logits.clone(), labels.clone(), torch.get_rng_state(), random.getstate()
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state is the point
    case.score(logits)
    case.score.of_labels(logits, labels)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert random.getstate() == before[3]
    after = np.random.get_state(legacy=False)  # noqa: NPY002
    assert np.array_equal(after["state"]["key"], legacy["state"]["key"])
    assert after["state"]["pos"] == legacy["state"]["pos"]


LABELS = torch.zeros(2, 4, 5, dtype=torch.int64)
LOGIT_REFUSALS: list[tuple[object, str]] = [
    ([[0.0]], "logits must be a torch tensor; got list"),
    (torch.zeros(3), "logits must have shape (B, C, *S); got (3,)"),
    (torch.zeros(()), "logits must have shape (B, C, *S); got ()"),
    (
        torch.zeros(2, 3, 4, 5, dtype=torch.int64),
        "logits must be float16, bfloat16, float32 or float64; got torch.int64",
    ),
    (
        torch.zeros(2, 3, 4, 5, dtype=torch.complex64),
        "logits must be float16, bfloat16, float32 or float64; got torch.complex64",
    ),
    (torch.zeros(2, 0, 4, 5), "logits must have C >= 1 classes; got (2, 0, 4, 5)"),
]
LABEL_REFUSALS: list[tuple[object, str]] = [
    (LABELS.tolist(), "labels must be a torch tensor; got list"),
    (LABELS.float(), "labels must be an integer tensor; got torch.float32"),
    (LABELS.bool(), "labels must be an integer tensor; got torch.bool"),
    (
        LABELS.transpose(1, 2),
        "labels must have shape (2, 4, 5) to go with logits (2, 3, 4, 5); got (2, 5, 4)",
    ),
    (
        LABELS[:, None],
        "labels must have shape (2, 4, 5) to go with logits (2, 3, 4, 5); got (2, 1, 4, 5)",
    ),
    (
        LABELS[:1],
        "labels must have shape (2, 4, 5) to go with logits (2, 3, 4, 5); got (1, 4, 5)",
    ),
]


@every_score
@pytest.mark.parametrize(("logits", "message"), LOGIT_REFUSALS)
def test_wrong_logits_are_refused_in_one_line(case: Case, logits: Tensor, message: str) -> None:
    asks: list[Callable[[], Tensor]] = [
        lambda: case.score(logits),
        lambda: case.score.of_labels(logits, LABELS),
    ]
    for ask in asks:
        with pytest.raises(InputError) as caught:
            ask()
        assert str(caught.value) == message


@every_score
@pytest.mark.parametrize(("labels", "message"), LABEL_REFUSALS)
def test_wrong_labels_are_refused_in_one_line(case: Case, labels: Tensor, message: str) -> None:
    with pytest.raises(InputError) as caught:
        case.score.of_labels(torch.zeros(2, 3, 4, 5), labels)
    assert str(caught.value) == message


def test_labels_on_another_device_are_refused() -> None:
    elsewhere = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    with pytest.raises(InputError) as caught:
        LAC().of_labels(torch.zeros(2, 3, 4), elsewhere)
    assert str(caught.value) == "labels must be on the device of logits (cpu); got meta"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RAPS(penalty=-0.1), "penalty must be finite and >= 0; got -0.1"),
        (lambda: RAPS(penalty=inf), "penalty must be finite and >= 0; got inf"),
        (lambda: RAPS(penalty=nan), "penalty must be finite and >= 0; got nan"),
        (lambda: RAPS(k_reg=-1), "k_reg must be an integer >= 0; got -1"),
        (lambda: RAPS(k_reg=1.5), "k_reg must be an integer >= 0; got 1.5"),  # type: ignore[arg-type]
        (lambda: SAPS(weight=-1), "weight must be finite and >= 0; got -1"),
        (lambda: SAPS(weight="1"), "weight must be finite and >= 0; got '1'"),  # type: ignore[arg-type]
        (lambda: SAPS(weight=True), "weight must be finite and >= 0; got True"),
        (lambda: APS(seed=0.5), "seed must be an integer; got 0.5"),  # type: ignore[arg-type]
        (lambda: TopK(seed=True), "seed must be an integer; got True"),
        (lambda: SAPS(seed=None), "seed must be an integer; got None"),  # type: ignore[arg-type]
        (lambda: RAPS(seed="0"), "seed must be an integer; got '0'"),  # type: ignore[arg-type]
        (lambda: APS(randomized=1), "randomized must be True or False; got 1"),  # type: ignore[arg-type]
        (lambda: RAPS(randomized=None), "randomized must be True or False; got None"),  # type: ignore[arg-type]
        (lambda: SAPS(randomized="no"), "randomized must be True or False; got 'no'"),  # type: ignore[arg-type]
        (lambda: TopK(randomized=0), "randomized must be True or False; got 0"),  # type: ignore[arg-type]
    ],
)
def test_wrong_parameters_are_refused(make: Callable[[], Score], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert str(caught.value) == message


def test_numbers_of_numpy_become_pythons() -> None:
    seed: Any = np.int64(-3)
    rank: Any = np.uint8(2)
    raps = RAPS(penalty=np.float64(0.25), k_reg=rank, seed=seed)
    assert repr(raps) == "RAPS(penalty=0.25, k_reg=2, randomized=False, seed=-3)"
    assert repr(SAPS(np.float64(0.5), seed=seed)) == "SAPS(weight=0.5, randomized=False, seed=-3)"
    assert repr(APS(seed=seed)) == "APS(randomized=False, seed=-3)"
    assert repr(TopK(seed=seed)) == "TopK(randomized=False, seed=-3)"


# --- the same bits, however the data is cut ------------------------------------------------------

CUTS = [(5, 3, 40), (3, 21, 37), (2, 150, 45), (3, 1000, 70)]


@every_score
@pytest.mark.parametrize("shape", CUTS)
def test_a_score_does_not_depend_on_the_batch_it_comes_in(
    case: Case, shape: tuple[int, int, int]
) -> None:
    logits = normal(*shape)
    labels = some_labels(logits)
    everywhere, at_labels = case.score(logits), case.score.of_labels(logits, labels)
    for i in range(shape[0]):
        assert torch.equal(case.score(logits[i : i + 1])[0], everywhere[i])
        one = case.score.of_labels(logits[i : i + 1], labels[i : i + 1])[0]
        assert torch.equal(one, at_labels[i])
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(2))
    assert torch.equal(case.score(logits[order]), everywhere[order])
    assert torch.equal(case.score.of_labels(logits[order], labels[order]), at_labels[order])
    stacked = torch.cat([logits, logits[:1]])
    assert torch.equal(case.score(stacked)[: shape[0]], everywhere)


@every_score
@pytest.mark.parametrize("shape", CUTS)
def test_a_score_does_not_depend_on_the_other_pixels(
    case: Case, shape: tuple[int, int, int]
) -> None:
    logits = normal(*shape)
    labels = some_labels(logits)
    everywhere, at_labels = case.score(logits), case.score.of_labels(logits, labels)
    for end in (1, 2, 31, 33, shape[2]):  # positions are kept, so draws are too
        assert torch.equal(case.score(logits[..., :end]), everywhere[..., :end])
        part = case.score.of_labels(logits[..., :end], labels[..., :end])
        assert torch.equal(part, at_labels[..., :end])
    others = normal(*shape, seed=9)
    others[..., 7] = logits[..., 7]
    assert torch.equal(case.score(others)[..., 7], everywhere[..., 7])
    assert torch.equal(case.score.of_labels(others, labels)[..., 7], at_labels[..., 7])


@without_draws  # draws belong to positions
def test_a_score_does_not_depend_on_where_a_pixel_lies(case: Case) -> None:
    logits = normal(2, 150, 45)
    labels = some_labels(logits)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(4))
    everywhere, at_labels = case.score(logits), case.score.of_labels(logits, labels)
    assert torch.equal(case.score(logits[..., order]), everywhere[..., order])
    mixed = case.score.of_labels(logits[..., order], labels[..., order])
    assert torch.equal(mixed, at_labels[..., order])
    columns = logits.movedim(1, -1).reshape(90, 150)  # every pixel an image of its own
    assert torch.equal(case.score(columns).view(2, 45, 150).movedim(-1, 1), everywhere)


@every_score
def test_large_images_are_walked_in_tiles_without_a_seam(case: Case) -> None:
    # 300,000 pixels of 3 classes are many tiles; four pixels of 70,000 classes are one each.
    logits = normal(2, 3, 300, 501)
    labels = some_labels(logits)
    everywhere, at_labels = case.score(logits), case.score.of_labels(logits, labels)
    if case.seed is None:
        for row in (0, 173, 174, 299):
            assert torch.equal(case.score(logits[:, :, row]), everywhere[:, :, row])
    gathered = everywhere.gather(1, labels[:, None])[:, 0]
    assert (gathered - at_labels).abs().max().item() <= case.score.tolerance(3)
    assert torch.equal(case.score(logits[1:])[0], everywhere[1])
    assert torch.equal(case.score.of_labels(logits[1:], labels[1:])[0], at_labels[1])
    flat = case.score(logits.flatten(2)).view_as(logits)
    assert torch.equal(flat, everywhere)


@every_score
def test_the_cut_into_tiles_changes_no_bit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = normal(3, 5, 7, 30)
    labels = some_labels(logits)
    wanted = case.score(logits), case.score.of_labels(logits, labels)
    monkeypatch.setattr(cpseg._tiles, "_EAGER", {"cpu": 5 * 32})  # a draw belongs to its position
    assert torch.equal(case.score(logits), wanted[0])
    assert torch.equal(case.score.of_labels(logits, labels), wanted[1])


@every_score
def test_more_classes_than_a_tile_holds(case: Case) -> None:
    logits = normal(2, 70_000, 2)
    labels = some_labels(logits)
    everywhere = case.score(logits)
    assert torch.equal(case.score(logits[:1]), everywhere[:1])
    apart = everywhere.gather(1, labels[:, None])[:, 0] - case.score.of_labels(logits, labels)
    assert apart.abs().max().item() <= case.score.tolerance(70_000)


@every_score
def test_threads_do_not_change_a_bit(case: Case) -> None:
    logits = normal(2, 150, 60, 50)
    labels = some_labels(logits)
    wanted = case.score(logits), case.score.of_labels(logits, labels)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(case.score(logits), wanted[0])
        assert torch.equal(case.score.of_labels(logits, labels), wanted[1])
    finally:
        torch.set_num_threads(threads)


@every_score
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_scores_do_not_know_of_the_default_dtype(case: Case, default: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    logits, labels = torch.randn(2, 9, 33, generator=g), torch.randint(0, 9, (2, 33), generator=g)
    plain = case.score(logits), case.score.of_labels(logits, labels)
    torch.set_default_dtype(default)
    try:
        found = case.score(logits), case.score.of_labels(logits, labels)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two in zip(plain, found, strict=True):
        assert two.dtype == torch.float32
        assert torch.equal(one, two)


# --- tolerance covers every path -----------------------------------------------------------------


@every_score
@every_kind
@pytest.mark.parametrize("classes", [2, 21, 150, 1000])
def test_float32_lies_within_tolerance_of_float64(
    case: Case, kind: Callable[..., Tensor], classes: int
) -> None:
    logits = kind(2, classes, 70)
    labels = some_labels(logits)
    slack = case.score.tolerance(classes)
    exact = case.score(logits.double())
    assert exact.dtype == torch.float64
    assert (case.score(logits) - exact).abs().max().item() <= slack
    at_labels = exact.gather(1, labels[:, None])[:, 0]
    assert (case.score.of_labels(logits, labels) - at_labels).abs().max().item() <= slack


COMPILED = [
    "LAC",
    "APS randomized",
    "RAPS",
    "SAPS randomized",
    "Margin",
    "TopK randomized",
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.skipif(which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_scores_lie_within_tolerance_of_eager_ones(name: str) -> None:
    score = CASES[name].score
    torch.compiler.reset()
    everywhere = torch.compile(score.__call__, fullgraph=True)
    at_labels = torch.compile(score.of_labels, fullgraph=True)
    shape = (2, 21, 9, 11)
    for kind in (normal, saturated):
        logits = kind(*shape)
        labels = some_labels(logits)
        wanted = score(logits), score.of_labels(logits, labels)
        slack = score.tolerance(21)
        assert (everywhere(logits) - wanted[0]).abs().max().item() <= slack
        assert (at_labels(logits, labels) - wanted[1]).abs().max().item() <= slack
    strange = logits.clone()
    strange[1, 3, 4, 5] = nan
    assert torch.equal(everywhere(strange).isnan(), score(strange).isnan())


# --- draws ---------------------------------------------------------------------------------------

RANDOMIZED: list[Callable[[int], Score]] = [
    lambda seed: APS(randomized=True, seed=seed),
    lambda seed: RAPS(randomized=True, seed=seed),
    lambda seed: SAPS(randomized=True, seed=seed),
    lambda seed: TopK(randomized=True, seed=seed),
]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32, 2**63 - 1])
def test_draws_are_uniform(seed: int) -> None:
    n = 200_000
    draws = uniform(seed, torch.arange(n)).double().numpy()
    assert draws.min() > 0
    assert draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 1e-6
    for bit in range(1, 12):  # each of the leading bits is a fair coin
        ones = int(((draws * 2**bit).astype(np.int64) & 1).sum())
        assert stats.binomtest(ones, n).pvalue > 1e-6


@pytest.mark.parametrize("stride", [1, 2, 640, 2048, 2**16])
def test_neighbors_draw_independently(stride: int) -> None:
    # Pairs at strides that images have (columns, rows, slices) fall evenly on a 16 x 16 board.
    n = 100_000
    first = (uniform(5, torch.arange(n)) * 16).long()
    second = (uniform(5, torch.arange(n) + stride) * 16).long()
    counts = torch.bincount(16 * first + second, minlength=256).numpy()
    assert stats.chisquare(counts).pvalue > 1e-6


@pytest.mark.parametrize("other", [1, 2, -1, 2**32, 2**33])
def test_seeds_draw_independently(other: int) -> None:
    n = 100_000
    first = (uniform(0, torch.arange(n)) * 16).long()
    second = (uniform(other, torch.arange(n)) * 16).long()
    counts = torch.bincount(16 * first + second, minlength=256).numpy()
    assert stats.chisquare(counts).pvalue > 1e-6


def test_draws_at_far_positions_are_others() -> None:
    near = torch.arange(10_000)
    assert (uniform(0, near) == uniform(0, near + 2**32)).float().mean() < 0.01
    assert (uniform(0, near) == uniform(0, near + 2**31)).float().mean() < 0.01


def test_draws_are_odd_multiples_of_two_to_the_minus_24() -> None:
    draws = uniform(7, torch.arange(100_000)).double() * 2**24
    assert torch.equal(draws % 2, torch.ones_like(draws))


def test_draws_never_change(device: torch.device) -> None:
    # Files hold thresholds found with these draws: they may never change.
    positions = torch.tensor([0, 1, 2, 2**32], device=device)
    draws = uniform(0, positions).cpu().double() * 2**24
    assert draws.tolist() == [11431809, 14917081, 7284687, 10517627]
    draws = uniform(2**40 + 1, positions).cpu().double() * 2**24
    assert draws.tolist() == [10721871, 2738697, 1196917, 5195183]


@given(st.integers(-(2**70), 2**70), st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
def test_a_draw_depends_on_its_position_alone(seed: int, positions: list[int]) -> None:
    together = uniform(seed, torch.tensor(positions)).tolist()
    assert together == [uniform(seed, torch.tensor(p)).item() for p in positions]


@pytest.mark.parametrize("make", RANDOMIZED)
def test_one_draw_per_pixel_shared_by_its_classes(make: Callable[[int], Score]) -> None:
    # Equal images draw equally; the oracle test holds that classes share the draw.
    logits = normal(1, 4, 5, 6).expand(3, 4, 5, 6)
    scores = make(0)(logits)
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
    same = normal(1, 4, 1, 1).expand(1, 4, 5, 6)
    assert len(set(make(0)(same)[0, 0].flatten().tolist())) == 30


@pytest.mark.parametrize("make", RANDOMIZED)
def test_seeds_change_randomized_scores_and_repeat_them(make: Callable[[int], Score]) -> None:
    logits = normal(1, 4, 5, 6)
    assert torch.equal(make(3)(logits), make(3)(logits))
    assert bool((make(3)(logits) != make(4)(logits)).all())


@pytest.mark.parametrize("make", RANDOMIZED)
def test_seeds_do_nothing_to_deterministic_scores(make: Callable[[int], Score]) -> None:
    plain = type(make(0))
    logits = normal(1, 4, 5, 6)
    assert torch.equal(plain()(logits), plain(seed=9)(logits))  # type: ignore[call-arg]


def test_randomized_aps_of_a_fair_label_is_uniform() -> None:
    # If labels follow the probabilities, the randomized score is exactly uniform.
    logits = normal(1, 5, 30_000, spread=1.0)
    generator = torch.Generator().manual_seed(3)
    labels = logits[0].softmax(0).T.multinomial(1, generator=generator).T
    scores = APS(randomized=True).of_labels(logits, labels)
    assert stats.kstest(scores[0].double().numpy(), "uniform").pvalue > 1e-6


# --- ways in -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("space", SPACES)
def test_softmax_undoes_logits_from_probabilities(
    dtype: torch.dtype, space: tuple[int, ...]
) -> None:
    probabilities = normal(2, 4, *space).softmax(1).to(dtype)
    logits = logits_from_probabilities(probabilities)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    near = 1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-5
    assert torch.allclose(logits.softmax(1), probabilities.to(logits.dtype), atol=near, rtol=0)


def test_zero_probabilities_are_minus_infinity_and_score_as_zero() -> None:
    logits = logits_from_probabilities(torch.tensor([[0.75, 0.0, 0.25]]))
    assert logits.tolist()[0][1] == -inf
    assert LAC()(logits)[0].tolist() == pytest.approx([0.25, 1.0, 0.75], rel=0, abs=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_no_probabilities_are_fine(shape: tuple[int, ...]) -> None:
    assert logits_from_probabilities(torch.zeros(shape)).shape == shape


def test_probabilities_are_left_alone() -> None:
    probabilities = torch.tensor([[0.5, 0.5]])
    logits_from_probabilities(probabilities)
    assert probabilities.tolist() == [[0.5, 0.5]]


SIGNED = "Values of any sign are logits already: pass them as they are"


def off_by(most: str, within: str) -> str:
    return (
        f"probabilities must sum to 1 over classes (axis 1) within {within}; got a row that is "
        f"off by {most}. For sigmoid channels use logits_from_sigmoid"
    )


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (
            torch.tensor([[1.5, -0.5]]),
            f"probabilities must be finite and >= 0; got 1 values that are not. {SIGNED}",
        ),
        (
            torch.tensor([[nan, inf], [0.5, 0.5]]),
            f"probabilities must be finite and >= 0; got 2 values that are not. {SIGNED}",
        ),
        (
            torch.tensor([[0.5, 0.5], [0.75, 0.75]]),
            off_by("0.5", within="0.001"),
        ),
        (
            torch.tensor([[0.5, 0.498]]),
            off_by("0.002", within="0.001"),
        ),
        (
            torch.tensor([[0.5, 0.25]], dtype=torch.float16),
            off_by("0.25", within="0.02"),
        ),
        (
            torch.zeros(2, 3),
            off_by("1", within="0.001"),
        ),
        (torch.zeros(3), "probabilities must have shape (B, C, *S); got (3,)"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            "probabilities must be float16, bfloat16, float32 or float64; got torch.int64",
        ),
        ([[1.0]], "probabilities must be a torch tensor; got list"),
    ],
)
def test_what_is_no_distribution_is_refused(probabilities: Tensor, message: str) -> None:
    with pytest.raises(InputError) as caught:
        logits_from_probabilities(probabilities)
    assert str(caught.value) == message


def test_half_precision_probabilities_may_be_off_by_their_rounding() -> None:
    rough = torch.tensor([[0.5, 0.485]], dtype=torch.bfloat16)
    assert logits_from_probabilities(rough).shape == (1, 2)
    with pytest.raises(InputError, match=r"^probabilities must sum to 1"):
        logits_from_probabilities(rough.float())


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_sigmoid_channel_is_two_classes(space: tuple[int, ...], dtype: torch.dtype) -> None:
    channel = normal(3, 1, *space).to(dtype)
    logits = logits_from_sigmoid(channel)
    assert logits.shape == (3, 2, *space)
    assert logits.dtype == dtype
    on = logits.double().softmax(1)[:, 1:]
    assert torch.allclose(on, channel.double().sigmoid(), atol=1e-12, rtol=0)


def test_overlapping_channels_are_binary_problems_of_their_own() -> None:
    channels = normal(2, 4, 3, 5)
    truth = channels.sigmoid() > 0.4  # multi-hot, as data sets have it
    logits = logits_from_sigmoid(channels)
    assert logits.shape == (8, 2, 3, 5)
    labels = truth.long().flatten(0, 1)
    scores = LAC().of_labels(logits, labels).view(2, 4, 3, 5)
    wanted = torch.where(truth, 1 - channels.sigmoid(), channels.sigmoid())
    assert torch.allclose(scores, wanted, atol=1e-6, rtol=0)


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        logits_from_sigmoid(torch.zeros(3))
    assert str(caught.value) == "channels must have shape (B, C, *S); got (3,)"
