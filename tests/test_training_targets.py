"""Schedules, CutMix, merged labels and their loss, held against a few lines of plain Python."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from cpseg.errors import InputError
from cpseg.training import (
    Complement,
    Constant,
    Denominator,
    Exponential,
    Linear,
    MergeMode,
    Poly,
    class_weights_from,
    cutmix,
    generator_for,
    masked_cross_entropy,
    merge_pseudo_labels,
    multiply_probabilities,
    pool_probabilities,
)

seeds = st.integers(0, 2**32 - 1)


@given(st.floats(0, 1), st.floats(0, 4), st.floats(0, 4))
def test_schedules_in_closed_form(r: float, a: float, b: float) -> None:
    assert Constant(a)(r) == a
    assert Linear(a, b)(r) == pytest.approx((1 - r) * a + r * b)
    assert Exponential(a, b)(r) == pytest.approx(a / math.e ** (b * r))
    assert Poly(a, b)(r) == pytest.approx(a * (1 - r) ** b)
    assert Complement(Linear(a, b))(r) == pytest.approx(1 - ((1 - r) * a + r * b))
    assert Linear(a, b)(0) == Exponential(a, b)(0) == Poly(a, b)(0) == a


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_schedules_refuse_what_is_no_weight(value: float) -> None:
    with pytest.raises(InputError, match="must be finite and >= 0"):
        Exponential(value)


# --- CutMix ---------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 6), st.integers(1, 9), st.integers(1, 11))
def test_cutmix_moves_boxes_between_different_images(seed: int, b: int, h: int, w: int) -> None:
    mix = cutmix((b, h, w), probability=1.0, generator=torch.Generator().manual_seed(seed))
    assert all(mix.partner[i] != i for i in range(b))
    assert sorted(mix.partner.tolist()) == list(range(b))
    for inside in mix.inside:
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        top, bottom = int(rows.min()), int(rows.max()) + 1
        left, right = int(columns.min()), int(columns.max()) + 1
        assert bool(inside[top:bottom, left:right].all())
        assert int(inside.sum()) == (bottom - top) * (right - left)


def test_cutmix_keeps_images_labels_and_validity_together() -> None:
    generator = generator_for(3)
    number = torch.arange(5)[:, None, None].expand(5, 7, 9)  # which image a pixel is from
    image = number[:, None].expand(5, 3, 7, 9).float()
    mix = cutmix((5, 7, 9), probability=1.0, generator=generator)
    mixed = mix(image)
    for moved in (mix(number), mix(number % 2 == 0).long()):
        expected = mixed[:, 0].long() if moved.max() > 1 else (mixed[:, 0].long() % 2 == 0).long()
        assert torch.equal(moved, expected)
    assert not torch.equal(mixed, image)
    for i in range(5):
        outside = ~mix.inside[i]
        assert bool((mixed[i, 0][outside] == i).all())
        assert bool((mixed[i, 0][mix.inside[i]] == mix.partner[i]).all())


def test_cutmix_leaves_a_batch_of_one_and_respects_its_probability_and_areas() -> None:
    alone = cutmix((1, 4, 5), probability=1.0, generator=generator_for(0))
    assert not alone.inside.any()
    assert not cutmix((4, 4, 5), probability=0.0, generator=generator_for(0)).inside.any()
    mix = cutmix((400, 50, 60), probability=0.5, generator=generator_for(1))
    share = mix.inside.flatten(1).double().mean(1)
    mixed = share[share > 0]
    assert 150 < len(mixed) < 250
    assert 0.01 < float(mixed.min()) < float(mixed.max()) < 0.42


@pytest.mark.parametrize(
    "wrong", [{"probability": 1.5}, {"area": (0.0, 0.5)}, {"ratio": (2.0, 1.0)}]
)
def test_cutmix_refuses_what_it_cannot_draw(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must"):
        cutmix((2, 4, 5), generator=generator_for(0), **wrong)  # type: ignore[arg-type]


# --- merged labels --------------------------------------------------------------------------------


def merged_pixel(
    own: int, sure: float, ext: int, mode: MergeMode, threshold: float
) -> tuple[int, float]:
    there = ext < 254
    if mode == "replace":
        return (ext, 1.0) if there else (0, -1.0)
    if mode == "agree":
        return own, -1.0 if there and ext != own else sure
    if mode == "fill":
        there = there and sure < threshold
    return (ext, 1.0) if there else (own, sure)


@given(seeds, st.sampled_from(["replace", "prefer_external", "fill", "agree"]))
def test_merging_pixel_by_pixel_and_its_promises(seed: int, mode: MergeMode) -> None:
    g = torch.Generator().manual_seed(seed)
    own = torch.randint(0, 7, (2, 3, 5), generator=g)
    sure = torch.rand(2, 3, 5, generator=g)
    values = torch.tensor([*range(7), 254, 255, 255])
    external = values[torch.randint(0, 10, (2, 3, 5), generator=g)]
    threshold = 0.6 if mode == "fill" else None
    labels, confidence = merge_pseudo_labels(own, sure, external, mode=mode, threshold=threshold)
    flat = zip(own.flatten(), sure.flatten(), external.flatten(), strict=True)
    for index, (a, b, c) in enumerate(flat):
        label, sureness = merged_pixel(int(a), float(b), int(c), mode, 0.6)
        assert int(labels.flatten()[index]) == label
        assert float(confidence.flatten()[index]) == pytest.approx(sureness)
    assert int(labels.max()) < 7  # 255 and 254 never leave
    assert int(labels.min()) >= 0
    assert labels.dtype == own.dtype
    assert confidence.dtype == sure.dtype
    functional.cross_entropy(torch.zeros(2, 7, 3, 5), labels)  # a loss that knows no 255


def test_merging_keeps_own_labels_without_external_ones() -> None:
    own, sure = torch.tensor([2, 1]), torch.tensor([0.5, 0.25])
    assert merge_pseudo_labels(own, sure, None) == (own, sure)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "both"}, "mode must"),
        ({"mode": "fill"}, "threshold must"),
        ({"threshold": 0.5}, "threshold must"),
        ({"external": torch.zeros(3, dtype=torch.int64)}, "external must have shape"),
        ({"external": torch.zeros(2)}, "external must be an integer"),
        ({"confidence": torch.zeros(2, dtype=torch.int64)}, "confidence must be floating"),
        ({"labels": torch.zeros(2)}, "labels must be an integer"),
    ],
)
def test_merging_refuses_what_does_not_fit(change: dict[str, object], message: str) -> None:
    given_: dict[str, object] = {
        "labels": torch.tensor([0, 1]),
        "confidence": torch.tensor([0.5, 0.5]),
        "external": torch.tensor([1, 255]),
    }
    with pytest.raises(InputError, match=message):
        merge_pseudo_labels(**{**given_, **change})  # type: ignore[arg-type]


# --- a network's probabilities times external ones ------------------------------------------------


def some_probabilities(g: torch.Generator) -> Tensor:
    """Of four classes, some of them out, and a pixel in four abstained from."""
    weight = torch.rand(2, 4, 3, 5, generator=g) * (torch.rand(2, 4, 3, 5, generator=g) > 0.3)
    weight *= torch.rand(2, 1, 3, 5, generator=g) > 0.25
    return weight / weight.sum(1, keepdim=True).clamp(min=1e-9)


@given(seeds)
def test_the_product_and_the_pool_pixel_by_pixel(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, external = torch.randn(2, 4, 3, 5, generator=g), some_probabilities(g)
    for join, power in ((multiply_probabilities, 1.0), (pool_probabilities, 0.5)):
        found = join(logits, external)
        for b, y, x in torch.ones(2, 3, 5).nonzero().tolist():
            own = [math.exp(float(value)) for value in logits[b, :, y, x]]
            both = zip(own, external[b, :, y, x].tolist(), strict=True)
            joint = [(p * q) ** power for p, q in both]
            wanted = [value / (sum(joint) or 1) for value in joint]
            assert found[b, :, y, x].tolist() == pytest.approx(wanted, rel=1e-4)


@given(seeds)
def test_those_that_agree_are_no_surer_in_the_pool(seed: int) -> None:
    external = some_probabilities(torch.Generator().manual_seed(seed))
    torch.testing.assert_close(pool_probabilities(external.log(), external), external)


@given(seeds)
def test_the_pool_leaves_possible_what_both_do(seed: int) -> None:
    """So it may miss what either misses: their promises add up."""
    g = torch.Generator().manual_seed(seed)
    first, second = some_probabilities(g), some_probabilities(g)
    pool = pool_probabilities(first.log(), second)
    assert torch.equal(pool > 0, (first > 0) & (second > 0))
    assert torch.equal(pool_probabilities(second.log(), first) > 0, pool > 0)


@given(seeds)
def test_equal_shares_let_the_network_choose_within_the_set(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, sets = torch.randn(2, 4, 3, 5, generator=g), torch.rand(2, 4, 3, 5, generator=g) > 0.4
    shares = sets / sets.sum(1, keepdim=True).clamp(min=1)
    found = multiply_probabilities(logits, shares)
    within = logits.masked_fill(~sets, -torch.inf).softmax(1)
    there = sets.any(1, keepdim=True)
    assert torch.equal(found > 0, sets)
    torch.testing.assert_close(found, torch.where(there, within, 0))


def test_what_is_unlikely_beyond_rounding_stays_possible() -> None:
    logits = torch.tensor([[0.0, -500.0, -math.inf]])
    for join in (multiply_probabilities, pool_probabilities):
        found = join(logits, torch.full((1, 3), 1 / 3))[0]
        assert found[0] == pytest.approx(1)
        assert 0 < found[1] < 1e-20
        assert found[2] == 0


def test_a_product_with_unusable_logits_abstains() -> None:
    logits = torch.tensor([[0.0, math.nan], [-math.inf, -math.inf], [0.0, math.inf], [0.0, 1.0]])
    for join in (multiply_probabilities, pool_probabilities):
        found = join(logits, torch.full((4, 2), 0.5))
        assert found[:3].tolist() == [[0, 0]] * 3
        assert found[3].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("external", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), "external must be floating"),
        (torch.zeros(2, 4), "external must have shape"),
    ],
)
def test_a_product_refuses_what_does_not_fit(external: Tensor, message: str) -> None:
    for join in (multiply_probabilities, pool_probabilities):
        with pytest.raises(InputError, match=message):
            join(torch.zeros(2, 3), external)


# --- the loss -------------------------------------------------------------------------------------


def loss_by_hand(
    logits: Tensor, labels: Tensor, weight: Tensor, valid: Tensor, which: Denominator
) -> float:
    total, kept = 0.0, 0
    for place in range(labels.numel()):
        label, w = int(labels.flatten()[place]), float(weight.flatten()[place])
        if label < 254 and w > 0:
            row = [float(logits[i // 15, c].flatten()[i % 15]) for i in [place] for c in range(4)]
            total += w * (math.log(sum(math.exp(x) for x in row)) - row[label])
            kept += 1
    count = {"kept": kept, "valid": int(valid.sum()), "all": labels.numel()}[which]
    return total / max(count, 1)


@given(seeds, st.sampled_from(["kept", "valid", "all"]), st.booleans())
def test_the_three_denominators_by_hand(seed: int, which: Denominator, flat: bool) -> None:  # noqa: FBT001
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 3, 5, generator=g)
    values = torch.tensor([0, 1, 2, 3, 255, 254])
    labels = values[torch.randint(0, 6, (2, 3, 5), generator=g)]
    weight = torch.rand(2, 3, 5, generator=g) * (torch.rand(2, 3, 5, generator=g) > 0.4)
    used = weight > 0 if flat else weight
    valid = torch.rand(2, 3, 5, generator=g) > 0.3
    found = masked_cross_entropy(logits, labels, weight=used, denominator=which, valid=valid)
    assert float(found) == pytest.approx(
        loss_by_hand(logits, labels, used.float(), valid, which), rel=1e-4, abs=1e-6
    )


@given(seeds, st.sampled_from(["kept", "valid", "all"]), st.booleans())
def test_probabilities_by_hand(seed: int, which: Denominator, flat: bool) -> None:  # noqa: FBT001
    g = torch.Generator().manual_seed(seed)
    logits, target = torch.randn(2, 4, 3, 5, generator=g), some_probabilities(g)
    weight = torch.rand(2, 3, 5, generator=g) * (torch.rand(2, 3, 5, generator=g) > 0.4)
    used = weight > 0 if flat else weight
    valid = torch.rand(2, 3, 5, generator=g) > 0.3
    total, kept = 0.0, 0
    for b, y, x in torch.ones(2, 3, 5).nonzero().tolist():
        row: list[float] = logits[b, :, y, x].tolist()
        shares: list[float] = target[b, :, y, x].tolist()
        w = float(used[b, y, x])
        if w and sum(shares):
            normal = math.log(sum(math.exp(value) for value in row))
            total += w * sum(p * (normal - v) for p, v in zip(shares, row, strict=True))
            kept += 1
    count = {"kept": kept, "valid": int(valid.sum()), "all": 30}[which]
    found = masked_cross_entropy(logits, target, weight=used, denominator=which, valid=valid)
    assert float(found) == pytest.approx(total / max(count, 1), rel=1e-4, abs=1e-6)


@given(seeds, st.sampled_from(["kept", "valid", "all"]))
def test_certain_probabilities_are_labels(seed: int, which: Denominator) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 3, 5, generator=g)
    labels = torch.tensor([0, 1, 2, 3, 255])[torch.randint(0, 5, (2, 3, 5), generator=g)]
    certain = torch.stack([labels == c for c in range(4)], 1).float()
    valid = torch.rand(2, 3, 5, generator=g) > 0.3
    hard, soft = (
        float(masked_cross_entropy(logits, target, denominator=which, valid=valid))
        for target in (labels, certain)
    )
    assert soft == pytest.approx(hard, rel=1e-5)


@given(seeds, st.sampled_from(["kept", "valid", "all"]), st.booleans())
def test_class_weights_by_hand(seed: int, which: Denominator, soft: bool) -> None:  # noqa: FBT001
    g = torch.Generator().manual_seed(seed)
    logits, shares = torch.randn(2, 4, 3, 5, generator=g), some_probabilities(g)
    labels = torch.tensor([0, 1, 2, 3, 255])[torch.randint(0, 5, (2, 3, 5), generator=g)]
    weights, valid = torch.rand(4, generator=g), torch.rand(2, 3, 5, generator=g) > 0.3
    each: list[float] = weights.tolist()
    total, kept = 0.0, 0
    for b, y, x in torch.ones(2, 3, 5).nonzero().tolist():
        row: list[float] = logits[b, :, y, x].tolist()
        target = [float(labels[b, y, x] == c) for c in range(4)]
        if soft:
            target = shares[b, :, y, x].tolist()
        normal = math.log(sum(math.exp(value) for value in row))
        total += sum(w * p * (normal - v) for w, p, v in zip(each, target, row, strict=True))
        kept += sum(target) > 0
    count = {"kept": kept, "valid": int(valid.sum()), "all": 30}[which]
    found = masked_cross_entropy(
        logits, shares if soft else labels, class_weights=weights, denominator=which, valid=valid
    )
    assert float(found) == pytest.approx(total / max(count, 1), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("which", ["kept", "valid", "all"])
@pytest.mark.parametrize("weight", [None, torch.zeros(2, 3, 5)])
def test_nothing_kept_is_a_zero_that_is_attached(which: Denominator, weight: Tensor | None) -> None:
    logits = torch.randn(2, 4, 3, 5, requires_grad=True)
    labels = torch.full((2, 3, 5), 255 if weight is None else 1)
    loss = masked_cross_entropy(logits, labels, weight=weight, denominator=which)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_padding_counts_for_all_alone_when_nothing_says_what_is_valid() -> None:
    logits, labels = torch.zeros(1, 3, 4), torch.tensor([[0, 255, 254, 254]])
    found = [
        float(masked_cross_entropy(logits, labels, denominator=which))
        for which in ("kept", "valid", "all")
    ]
    assert found == pytest.approx([math.log(3), math.log(3) / 2, math.log(3) / 4])


def test_half_precision_logits_make_a_float32_loss() -> None:
    logits = torch.full((1, 3, 2), 60000.0, dtype=torch.float16)
    loss = masked_cross_entropy(logits, torch.tensor([[0, 2]]))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(math.log(3), rel=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"denominator": "mean"}, "denominator must"),
        ({"ignore_index": 2}, "ignore_index must lie outside"),
        ({"pad_index": 0}, "pad_index must lie outside"),
        ({"weight": torch.ones(3)}, "weight must have shape"),
        ({"class_weights": torch.ones(4)}, "class_weights must be floating with shape"),
        ({"class_weights": torch.ones(3, dtype=torch.int64)}, "class_weights must be floating"),
        ({"valid": torch.ones(3)}, "valid must have shape"),
        ({"labels": torch.zeros(1, 3, dtype=torch.int64)}, "labels must have shape"),
        ({"labels": torch.zeros(1, 2)}, "labels must have shape"),
        ({"labels": torch.zeros(1, 3, 2), "denominator": "valid"}, "valid must be given"),
    ],
)
def test_the_loss_refuses_what_does_not_fit(change: dict[str, object], message: str) -> None:
    given_: dict[str, object] = {
        "logits": torch.zeros(1, 3, 2),
        "labels": torch.tensor([[0, 2]]),
    }
    with pytest.raises(InputError, match=message):
        masked_cross_entropy(**{**given_, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_unusable_logits_where_nothing_is_asked_cost_nothing(bad: float, *, soft: bool) -> None:
    logits = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.5]])
    labels = torch.tensor([0, 255])
    shares = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    clean = float(masked_cross_entropy(logits, labels))
    logits[1, 1] = bad
    if bad < 0:
        logits[0, 2] = bad  # a class that has no share
        clean = float(torch.tensor([1.0, 0.0]).logsumexp(0)) - 1
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, shares if soft else labels)
    assert float(loss.detach()) == pytest.approx(clean)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    void=st.integers(0, 9),
    cut=st.integers(0, 200),
)
def test_class_weights_are_what_is_said_of_them(sizes: list[int], void: int, cut: int) -> None:
    labels = torch.tensor([c for c, n in enumerate(sizes) for _ in range(n)] + [255] * void)
    parts = (labels[:cut].to(torch.uint8), labels[cut:])
    found = class_weights_from(iter(parts), len(sizes))
    shares = [n / sum(sizes) for n in sizes]
    assert sum(w * s for w, s in zip(found, shares, strict=True)) == pytest.approx(1)
    for a, b in pairwise(range(len(sizes))):
        ratio = math.sqrt(max(shares[b], 1e-4) / max(shares[a], 1e-4))
        assert found[a] / found[b] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, -1, 255], "ignore_index 255; got 2 other pixels"),
        ([255, 255], "must have a labeled pixel; got none"),
    ],
)
def test_class_weights_of_unusable_labels_are_refused(labels: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        class_weights_from([torch.tensor(labels)], 2)
