"""Sets: the definition, for every axes, and what bad pixels and bad input get."""

import math
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cpseg import (
    APS,
    LAC,
    RAPS,
    SAPS,
    Calibration,
    ClassConditionalCalibrator,
    GroupCalibrator,
    LocationCalibrator,
    Margin,
    PixelSetPredictor,
    SplitCalibrator,
    TopK,
)
from cpseg.errors import InputError
from cpseg.protocols import Score

C, SPACE, G = 4, (5, 3), 2
INF = math.inf


def seen(generator: torch.Generator, batch: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels drawn from them, and groups of a batch."""
    logits = 2 * torch.randn((batch, C, *SPACE), generator=generator)
    flat = logits.softmax(1).movedim(1, -1).reshape(-1, C)
    labels = torch.multinomial(flat, 1, generator=generator).view(batch, *SPACE)
    return logits, labels, torch.randint(0, G, (batch, *SPACE), generator=generator)


def split(score: Score, logits: Tensor, labels: Tensor, _: Tensor) -> SplitCalibrator:
    return SplitCalibrator(score).update(logits, labels)


def by_class(score: Score, logits: Tensor, labels: Tensor, _: Tensor) -> Any:
    return ClassConditionalCalibrator(C, score).update(logits, labels)


def by_group(score: Score, logits: Tensor, labels: Tensor, groups: Tensor) -> GroupCalibrator:
    return GroupCalibrator(G, score=score).update(logits, labels, groups)


def by_both(score: Score, logits: Tensor, labels: Tensor, groups: Tensor) -> GroupCalibrator:
    return GroupCalibrator(G, C, score).update(logits, labels, groups)


def by_location(score: Score, logits: Tensor, labels: Tensor, _: Tensor) -> LocationCalibrator:
    return LocationCalibrator(SPACE, max_alpha=0.6, score=score).update(logits, labels)


KINDS: dict[str, Callable[[Score, Tensor, Tensor, Tensor], Any]] = {
    "split": split,
    "class": by_class,
    "group": by_group,
    "both": by_both,
    "location": by_location,
}
SCORES: list[Score] = [
    LAC(),
    APS(),
    APS(randomized=True, seed=5),
    RAPS(),
    SAPS(randomized=True),
    Margin(),
    TopK(),
]
every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def computed(kind: str, score: Any, alpha: float = 0.2) -> Calibration:
    data = seen(torch.Generator().manual_seed(1))
    calibration: Calibration = KINDS[kind](score, *data).compute(alpha)
    return calibration


def threshold_at(kind: str, values: Any, c: int, group: int, place: tuple[int, ...]) -> float:
    known = 0 <= group < G
    match kind:
        case "split":
            return float(values[0])
        case "class":
            return float(values[c])
        case "group":
            return float(values[group]) if known else INF
        case "both":
            return float(values[group][c]) if known else INF
        case _:
            return float(values[place[0]][place[1]])


@every_kind
@pytest.mark.parametrize("score", SCORES, ids=repr)
@pytest.mark.parametrize("per_batch", [True, False], ids=["batch", "grid"])
def test_a_class_is_in_the_set_unless_its_score_exceeds_the_threshold(
    kind: str, score: Any, *, per_batch: bool
) -> None:
    calibration = computed(kind, score)
    logits, _, groups = seen(torch.Generator().manual_seed(2), batch=6)
    groups -= torch.randint(0, 2, groups.shape, generator=torch.Generator().manual_seed(3)) * 3
    groups = groups if per_batch else groups[0]
    sets = PixelSetPredictor(calibration)(logits, groups if "group" in calibration.axes else None)
    scores, values = score(logits).tolist(), calibration.thresholds.tolist()
    where = groups.expand(6, *SPACE).tolist()
    expected = [
        [
            [
                [
                    not scores[b][c][i][j] > threshold_at(kind, values, c, where[b][i][j], (i, j))
                    for j in range(SPACE[1])
                ]
                for i in range(SPACE[0])
            ]
            for c in range(C)
        ]
        for b in range(6)
    ]
    assert sets.dtype == torch.bool
    assert sets.tolist() == expected
    if score == LAC():
        assert 0 < int(sets.sum()) < sets.numel()


@every_kind
@given(first=st.integers(1, 30), second=st.integers(1, 30))
def test_sets_are_nested_in_alpha(kind: str, first: int, second: int) -> None:
    small, large = sorted((first / 50, second / 50))
    logits, _, groups = seen(torch.Generator().manual_seed(2), batch=4)
    near = groups if kind in ("group", "both") else None
    wide = PixelSetPredictor(computed(kind, LAC(), small))(logits, near)
    narrow = PixelSetPredictor(computed(kind, LAC(), large))(logits, near)
    assert not bool((narrow & ~wide).any())


@every_kind
@pytest.mark.parametrize("force_top", [True, False])
def test_unusable_pixels_get_the_full_set(kind: str, *, force_top: bool) -> None:
    calibration = computed(kind, LAC(), 0.5)
    logits, _, groups = seen(torch.Generator().manual_seed(2), batch=4)
    logits[0, 1, 0, 0] = math.nan
    logits[1, 2, 1, 1] = INF
    logits[2, :, 2, 2] = -INF
    near = groups if kind in ("group", "both") else None
    sets = PixelSetPredictor(calibration, force_top=force_top)(logits, near)
    for b, i in ((0, 0), (1, 1), (2, 2)):
        assert sets[b, :, i, i].tolist() == [True] * C


@pytest.mark.parametrize("kind", ["group", "both"])
@pytest.mark.parametrize("unknown", [-1, G, 255])
def test_unknown_groups_get_the_full_set(kind: str, unknown: int) -> None:
    logits, _, groups = seen(torch.Generator().manual_seed(2), batch=4)
    groups[1, 2, 0] = unknown
    predictor = PixelSetPredictor(computed(kind, LAC(), 0.6))
    sets = predictor(logits, groups)
    assert sets[1, :, 2, 0].tolist() == [True] * C
    assert not bool(sets.all())


@every_kind
def test_force_top_adds_the_most_likely_class_and_nothing_else(kind: str) -> None:
    calibration = computed(kind, LAC(), 0.6)
    logits, _, groups = seen(torch.Generator().manual_seed(2), batch=8)
    near = groups if kind in ("group", "both") else None
    plain = PixelSetPredictor(calibration)(logits, near)
    forced = PixelSetPredictor(calibration, force_top=True)(logits, near)
    top = torch.zeros_like(plain).scatter(1, logits.argmax(1, keepdim=True), value=True)
    assert torch.equal(forced, plain | top)
    assert not torch.equal(forced, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every_kind
def test_any_dtype_strides_and_device_give_the_same_sets(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    logits, _, groups = seen(torch.Generator().manual_seed(2), batch=4)
    logits = logits.to(dtype)
    near = groups if kind in ("group", "both") else None
    predictor = PixelSetPredictor(computed(kind, LAC()))
    expected = predictor(logits, near)
    odd = logits.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).to(device)
    moved = None if near is None else near.short().to(device)
    sets = predictor(odd, moved)
    assert sets.device.type == device.type
    assert torch.equal(sets.cpu(), expected)
    assert not predictor(logits.clone().requires_grad_(), near).requires_grad


@pytest.mark.parametrize("space", [(), (7,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("force_top", [True, False])
def test_any_number_of_spatial_axes(space: tuple[int, ...], *, force_top: bool) -> None:
    logits = torch.randn((3, C, *space), generator=torch.Generator().manual_seed(4))
    for kind, near in (("split", None), ("class", None), ("both", torch.zeros(3, *space).long())):
        sets = PixelSetPredictor(computed(kind, LAC()), force_top=force_top)(logits, near)
        assert sets.shape == logits.shape
        flat = None if near is None else near.reshape(-1)
        rows = logits.movedim(1, -1).reshape(-1, C)
        again = PixelSetPredictor(computed(kind, LAC()), force_top=force_top)(rows, flat)
        assert torch.equal(sets.movedim(1, -1).reshape(-1, C), again)


@every_kind
@pytest.mark.parametrize("force_top", [True, False])
def test_an_empty_batch_gives_empty_sets(kind: str, *, force_top: bool) -> None:
    near = torch.zeros(SPACE, dtype=torch.int64) if kind in ("group", "both") else None
    predictor = PixelSetPredictor(computed(kind, LAC()), force_top=force_top)
    assert predictor(torch.zeros(0, C, *SPACE), near).shape == (0, C, *SPACE)
    if kind == "split":
        assert predictor(torch.zeros(2, C, 0, 3)).shape == (2, C, 0, 3)


@every_kind
def test_nothing_of_the_callers_is_changed(kind: str) -> None:
    calibration = computed(kind, APS(randomized=True))
    logits, _, groups = seen(torch.Generator().manual_seed(2), batch=4)
    near = groups if kind in ("group", "both") else None
    before = logits.clone(), groups.clone(), calibration.thresholds.clone()
    state = torch.random.get_rng_state()
    PixelSetPredictor(calibration, force_top=True)(logits, near)
    assert torch.equal(state, torch.random.get_rng_state())
    after = logits, groups, calibration.thresholds
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("kind", "shape", "groups", "message"),
    [
        (
            "class",
            (2, C + 1, 3),
            None,
            "logits must have C = 4 classes; got 5 in shape (2, 5, 3)",
        ),
        ("split", (2, 2), None, "logits must have C = 4 classes; got 2 in shape (2, 2)"),
        (
            "location",
            (2, C, 3, 5),
            None,
            "logits must have spatial shape (5, 3), the calibration's locations; got (3, 5)",
        ),
        (
            "location",
            (2, C),
            None,
            "logits must have spatial shape (5, 3), the calibration's locations; got ()",
        ),
        ("split", (2, C), (2,), "groups must be None for a calibration with axes ()"),
        (
            "location",
            (2, C, 5, 3),
            (5, 3),
            "groups must be None for a calibration with axes ('location',)",
        ),
        (
            "both",
            (2, C),
            None,
            "groups must be given for a calibration with axes ('group', 'class')",
        ),
        (
            "group",
            (2, C, 5, 3),
            (3, 5),
            "groups must have shape (5, 3) or (2, 5, 3) to go with logits (2, 4, 5, 3); got (3, 5)",
        ),
        (
            "group",
            (2, C, 5),
            (2, C, 5),
            "groups must have shape (5,) or (2, 5) to go with logits (2, 4, 5); got (2, 4, 5)",
        ),
    ],
)
def test_input_for_another_calibration_is_refused(
    kind: str, shape: tuple[int, ...], groups: tuple[int, ...] | None, message: str
) -> None:
    near = None if groups is None else torch.zeros(groups, dtype=torch.int64)
    with pytest.raises(InputError) as refusal:
        PixelSetPredictor(computed(kind, LAC()))(torch.zeros(shape), near)
    assert str(refusal.value) == message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_groups_that_are_no_integers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"^groups must be an integer tensor; got torch\."):
        PixelSetPredictor(computed("group", LAC()))(torch.zeros(2, C), torch.zeros(2, dtype=dtype))


def test_the_scores_of_calibration_data_are_covered_as_often_as_promised() -> None:
    # At the image unit the rule reads: mean missed share <= (alpha (n + 1) - 1) / n.
    logits, labels, groups = seen(torch.Generator().manual_seed(1))
    n = len(labels)
    for kind, alpha in product(("split", "group"), (0.1, 0.3, 0.5)):
        near = groups if kind == "group" else None
        sets = PixelSetPredictor(computed(kind, LAC(), alpha))(logits, near)
        missed = ~sets.gather(1, labels[:, None])[:, 0]
        for group in range(G) if kind == "group" else (None,):
            inside = torch.ones_like(groups) if group is None else (groups == group).long()
            share = (missed * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)
            assert float(share.mean()) <= (alpha * (n + 1) - 1) / n + 1e-6


def test_logits_without_data_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"^logits must hold data; got a tensor on the device meta"
    ):
        PixelSetPredictor(computed("split", LAC()))(torch.zeros(2, C, device="meta"))
