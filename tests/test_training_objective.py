"""The objective: sources, stages, one forward pass, and a loss that is never NaN."""

from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from cpseg.errors import InputError
from cpseg.training import (
    Batch,
    Complement,
    Constant,
    Exponential,
    JointMode,
    Own,
    Stage,
    Targets,
    TwoStageObjective,
    UNet,
    labeling,
    logits_of,
)


class Pixelwise(nn.Module):
    """Logits that depend on the pixel alone; counts its forward passes and their sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Conv2d(8, 4, 1)
        self.seen: list[tuple[int, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((len(images), self.training))
        return self.head(self.drop(self.features(images).relu()))  # type: ignore[no-any-return]


def make_batch(strong: int = 0, seed: int = 0, unlabeled: int = 3) -> Batch:
    g = torch.Generator().manual_seed(seed)
    shape = (unlabeled, 3, 5, 7)
    external = torch.tensor([0, 1, 2, 3, 255])[torch.randint(0, 5, (unlabeled, 5, 7), generator=g)]
    return Batch(
        images=torch.randn(2, 3, 5, 7, generator=g),
        labels=torch.randint(0, 4, (2, 5, 7), generator=g),
        weak=torch.randn(shape, generator=g),
        strong=tuple(torch.randn(shape, generator=g) for _ in range(strong)),
        external=external,
        valid=torch.rand(unlabeled, 5, 7, generator=g) > 0.2,
    )


def student() -> Pixelwise:
    torch.manual_seed(5)
    return Pixelwise()


def test_stages_switch_at_their_exact_step() -> None:
    stages = (Stage(name="a", steps=3), Stage(name="b", steps=2), Stage(name="c", steps=1))
    objective = TwoStageObjective(stages)
    found = [objective.stage_at(step) for step in range(6)]
    assert [stage.name for stage, _ in found] == ["a", "a", "a", "b", "b", "c"]
    assert [progress for _, progress in found] == [0, 1 / 3, 2 / 3, 0, 0.5, 0]
    assert objective.steps == 6
    with pytest.raises(InputError, match="step must lie below 6; got 6"):
        objective.stage_at(6)


def test_external_labels_make_the_targets() -> None:
    batch = make_batch()
    stage = Stage(name="e", steps=1)
    found = TwoStageObjective((stage,)).targets(stage, student(), batch)
    assert torch.equal(found.kept, (batch.external != 255) & batch.valid)
    assert torch.equal(found.labels[found.kept], batch.external[found.kept])


def soft_batch(strong: int = 0) -> Batch:
    """A batch with external probabilities of two or three classes, and abstentions."""
    batch = make_batch(strong)
    g = torch.Generator().manual_seed(1)
    weight = torch.rand(3, 4, 5, 7, generator=g) * (torch.rand(3, 4, 5, 7, generator=g) > 0.4)
    weight *= (batch.external != 255)[:, None]
    return replace(batch, external=weight / weight.sum(1, keepdim=True).clamp(min=1e-9))


def test_external_probabilities_are_trained_on_as_they_are() -> None:
    batch, network = soft_batch(), student().eval()
    objective = TwoStageObjective((Stage(name="e", steps=1),))
    found = objective.targets(objective.stages[0], network, batch)
    assert torch.equal(found.labels, batch.external)
    assert torch.equal(found.kept, (batch.external.sum(1) > 0) & batch.valid)
    each = -(batch.external * network(batch.weak).log_softmax(1)).sum(1).detach()
    loss = objective(network, batch, step=0).metrics["loss_unlabeled"]
    assert float(loss) == pytest.approx(float(each[found.kept].mean()), rel=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_class_weights_reach_both_losses(soft: bool) -> None:  # noqa: FBT001
    batch, network = soft_batch() if soft else make_batch(), student().eval()
    stages = (Stage(name="e", steps=1),)
    alone = [
        TwoStageObjective(stages, class_weights=tuple(float(c == other) for c in range(4)))
        for other in range(4)
    ]
    for name in ("loss_labeled", "loss_unlabeled"):
        whole = float(TwoStageObjective(stages)(network, batch, step=0).metrics[name])
        parts = [float(only(network, batch, step=0).metrics[name]) for only in alone]
        assert whole == pytest.approx(sum(parts), rel=1e-5)
        assert min(parts) >= 0
        assert max(parts) < whole


def together(own: Tensor, external: Tensor, merge: JointMode | None) -> Tensor:
    """Probabilities of a network and external ones as one, by their definitions."""
    if merge is None:
        return own
    joint = (own * external) ** {"multiply": 1.0, "pool": 0.5}[merge]
    return joint / joint.sum(1, keepdim=True).clamp(min=1e-9)


@pytest.mark.parametrize("merge", get_args(JointMode))
def test_joint_probabilities_choose_among_the_classes_left(merge: JointMode) -> None:
    batch, network = soft_batch(), student().eval()
    stage = Stage(name="m", steps=1, source="teacher", merge=merge, threshold=0.4)
    found = TwoStageObjective((stage,)).targets(stage, network, batch)
    best, labels = together(network(batch.weak).softmax(1), batch.external, merge).max(1)
    assert torch.equal(found.labels[found.kept], labels[found.kept])
    assert torch.equal(found.kept, (best >= 0.4) & batch.valid)
    assert bool((batch.external.gather(1, found.labels[:, None])[:, 0] > 0)[found.kept].all())


@pytest.mark.parametrize("merge", [None, *get_args(JointMode)])
def test_own_probabilities_are_trained_on_as_they_are(merge: JointMode | None) -> None:
    batch, network = soft_batch(), student().eval()
    stage = Stage(name="o", steps=1, source="teacher", merge=merge, own="probabilities")
    stage = replace(stage, threshold=0.4)
    objective = TwoStageObjective((stage,))
    found = objective.targets(stage, network, batch)
    joint = together(network(batch.weak).softmax(1), batch.external, merge)
    torch.testing.assert_close(found.labels, joint)
    assert torch.equal(found.kept, (joint.amax(1) >= 0.4) & batch.valid)
    assert 0 < found.kept.float().mean() < 1
    each = -(joint * network(batch.weak).log_softmax(1)).sum(1).detach()
    output = objective(network, batch, step=0, labeler=network)
    wanted = each[found.kept].mean()
    assert float(output.metrics["loss_unlabeled"]) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("own", get_args(Own))
@pytest.mark.parametrize("merge", [None, *get_args(JointMode)])
def test_class_weights_are_divided_out_of_own_probabilities(
    own: Own, merge: JointMode | None
) -> None:
    batch, network = soft_batch() if merge else make_batch(), student().eval()
    weights = (0.2, 1.0, 5.0, 0.0)  # a weight of 0 taught nothing, and takes nothing away
    stage = Stage(name="o", steps=1, source="teacher", merge=merge, own=own, threshold=0.5)
    found = TwoStageObjective((stage,), class_weights=weights).targets(stage, network, batch)
    shares = network(batch.weak).softmax(1)
    if own == "probabilities":
        shares = shares / torch.tensor([0.2, 1.0, 5.0, 1.0]).view(-1, 1, 1)
        shares = shares / shares.sum(1, keepdim=True)
    shares = together(shares, batch.external, merge)
    confidence, labels = shares.max(1)
    assert torch.equal(found.kept, (confidence >= 0.5) & batch.valid)
    if own == "probabilities":
        torch.testing.assert_close(found.labels, shares)
    else:
        assert torch.equal(found.labels[found.kept], labels[found.kept])


@pytest.mark.parametrize("weights", [None, (0.2, 1.0, 5.0, 3.0)])
def test_equal_shares_of_a_set_ask_for_any_class_of_it(weights: tuple[float, ...] | None) -> None:
    """In each pixel the gradient has the direction of that of -log of the set's probability."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 4, 5, 7, generator=g).requires_grad_()
    inside = torch.rand(3, 4, 5, 7, generator=g) < 0.6
    inside[:, 1] |= ~inside.any(1)
    batch = replace(
        make_batch(),
        images=torch.zeros(2, 4, 5, 7),
        weak=logits,
        external=inside / inside.sum(1, keepdim=True),
        valid=torch.ones(3, 5, 7, dtype=torch.bool),
    )
    stage = Stage(name="s", steps=1, source="student", merge="multiply", own="probabilities")
    stage = replace(stage, labeled_weight=Constant(0.0), unlabeled_weight=Constant(1.0))
    loss = TwoStageObjective((stage,), class_weights=weights)(nn.Identity(), batch, step=0).loss
    (found,) = torch.autograd.grad(loss * batch.valid.numel(), logits)
    shares = logits.softmax(1)
    (wanted,) = torch.autograd.grad(-(shares * inside).sum(1).log().sum(), logits)
    free = shares.detach() / torch.tensor(weights or (1.0,) * 4).view(-1, 1, 1)
    times = (shares.detach() * inside).sum(1) / (free * inside).sum(1)  # 1 without weights
    torch.testing.assert_close(found, wanted * times[:, None])


def test_abstained_pixels_are_not_kept_at_any_threshold() -> None:
    batch, network = soft_batch(), student()
    there = (batch.external > 0).any(1)
    assert not there.all()
    for own, merge in product(get_args(Own), get_args(JointMode)):
        stage = Stage(name="m", steps=1, source="teacher", merge=merge, own=own)
        found = TwoStageObjective((stage,)).targets(stage, network, batch)
        assert torch.equal(found.kept, there & batch.valid)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"own": "soft"}, "own must be"),
        ({"own": "probabilities", "source": "external"}, "own must be"),
        ({"own": "probabilities", "source": "student", "merge": "fill"}, "own must be"),
    ],
)
def test_own_probabilities_need_a_network_that_says_them(wrong: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Stage(name="s", steps=1, **wrong)


def test_own_labels_do_not_look_at_external_probabilities() -> None:
    batch, network = soft_batch(), student().eval()
    stage = Stage(name="s", steps=1, source="student")
    objective = TwoStageObjective((stage,))
    found = objective.targets(stage, network, batch)
    hard = objective.targets(stage, network, make_batch())
    assert torch.equal(found.labels, hard.labels)
    assert torch.equal(found.kept, hard.kept)


@pytest.mark.parametrize(
    "merge", ["replace", "prefer_external", "fill", "agree", "multiply", "pool"]
)
def test_a_merge_refuses_the_other_kind_of_external_labels(merge: str) -> None:
    batch = make_batch() if merge in get_args(JointMode) else soft_batch()
    stage = Stage(name="m", steps=1, source="student", merge=merge)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch's external must be"):
        TwoStageObjective((stage,)).targets(stage, student(), batch)


def test_cutmix_moves_probabilities_with_their_images() -> None:
    batch = soft_batch(strong=1)
    batch = replace(batch, strong=(batch.external[:, :3],))
    stage = Stage(name="e", steps=1, strong_views=1, cutmix=1.0)
    objective = TwoStageObjective((stage,), seed=3)
    found = objective.targets(stage, student(), batch)
    (view,) = objective._views(stage, batch, found, 0, 0)
    assert torch.equal(view.labels[:, :3], view.images)
    assert not torch.equal(view.labels, batch.external)
    assert torch.equal(view.kept, (view.labels.sum(1) > 0) & view.valid)


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_own_labels_come_from_the_labeler_in_evaluation_mode(source: str) -> None:
    batch, network = make_batch(), student()
    network.head.eval()
    stage = Stage(name="s", steps=1, source=source, threshold=0.3)  # type: ignore[arg-type]
    found = TwoStageObjective((stage,)).targets(stage, network, batch)
    assert network.training
    assert not network.head.training  # a frozen part stays frozen
    network.eval()
    best, labels = network(batch.weak).softmax(1).max(1)
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.kept, (best >= 0.3) & batch.valid)
    assert not found.labels.requires_grad


@pytest.mark.parametrize("mode", ["replace", "prefer_external", "fill", "agree"])
def test_a_merge_of_both(mode: str) -> None:
    batch, network = make_batch(), student()
    stage = Stage(name="m", steps=1, source="student", merge=mode, threshold=0.35)  # type: ignore[arg-type]
    found = TwoStageObjective((stage,)).targets(stage, network, batch)
    own, sure = labeling(network, batch.weak)
    there, sure_own = batch.external != 255, sure >= 0.35
    expected = {
        "replace": there,
        "prefer_external": there | sure_own,
        "fill": there | sure_own,
        "agree": sure_own & ~(there & (batch.external != own)),
    }[mode]
    assert torch.equal(found.kept, expected & batch.valid)
    take = {
        "replace": there,
        "prefer_external": there,
        "fill": there & ~sure_own,
        "agree": torch.zeros_like(there),
    }[mode]
    label = torch.where(take, batch.external, own)
    assert torch.equal(found.labels[found.kept], label[found.kept])


def test_the_student_sees_everything_in_one_forward_pass() -> None:
    network = student()
    stage = Stage(name="u", steps=1, source="student", strong_views=2, perturb=("features",))
    TwoStageObjective((stage,))(network, make_batch(strong=2), step=0)
    assert network.seen == [(3, False), (2 + 3 + 3 + 3, True)]


def test_the_weighted_loss_by_hand() -> None:
    batch = make_batch()
    network = student().eval()
    weight = Exponential(0.5, 2.0)
    stage = Stage(
        name="x",
        steps=4,
        labeled_weight=Complement(weight),
        unlabeled_weight=weight,
        denominator="valid",
    )
    output = TwoStageObjective((stage,))(network, batch, step=3)
    ce = nn.CrossEntropyLoss(ignore_index=255, reduction="sum")
    labeled = ce(network(batch.images), batch.labels) / batch.labels.numel()
    target = torch.where(batch.valid, batch.external, 255)
    unlabeled = ce(network(batch.weak), target) / batch.valid.sum()
    w = 0.5 * 2.718281828459045 ** (-2.0 * 0.75)
    assert output.loss.item() == pytest.approx(((1 - w) * labeled + w * unlabeled).item(), rel=1e-5)
    assert float(output.metrics["loss_labeled"]) == pytest.approx(labeled.item(), rel=1e-5)
    kept = (target != 255).sum() / batch.valid.sum()
    assert float(output.metrics["kept"]) == pytest.approx(float(kept))


def test_an_all_filtered_batch_adds_zero_and_reaches_every_parameter() -> None:
    batch = make_batch()
    batch = replace(
        batch,
        external=torch.full_like(batch.external, 255),
        labels=torch.full_like(batch.labels, 255),
    )
    network = student()
    output = TwoStageObjective((Stage(name="e", steps=1),))(network, batch, step=0)
    output.loss.backward()  # type: ignore[no-untyped-call]
    assert output.loss.item() == 0
    assert all(
        p.grad is not None and torch.equal(p.grad, torch.zeros_like(p))
        for p in network.parameters()
    )


def test_labels_alone_need_no_unlabeled_images() -> None:
    batch = make_batch(unlabeled=0)
    for stage in (Stage(name="n", steps=1, source="none"), Stage(name="e", steps=1)):
        output = TwoStageObjective((stage,))(student().eval(), batch, step=0)
        assert output.loss.item() == pytest.approx(float(output.metrics["loss_labeled"]) / 2)
        assert float(output.metrics["kept"]) == 0


def test_dropped_channels_change_their_own_view_alone_and_leave_no_hook() -> None:
    network = student().eval()
    stage = Stage(name="p", steps=1, perturb=("features",))
    plain = replace(stage, perturb=())
    batch = make_batch()
    a = TwoStageObjective((stage,))(network, batch, step=0)
    b = TwoStageObjective((plain,))(network, batch, step=0)
    assert float(a.metrics["loss_labeled"]) == pytest.approx(float(b.metrics["loss_labeled"]))
    assert float(a.metrics["loss_unlabeled"]) != pytest.approx(float(b.metrics["loss_unlabeled"]))
    assert not network.features._forward_hooks
    with pytest.raises(InputError, match="perturb must name submodules of the student; got 'x'"):
        TwoStageObjective((replace(stage, perturb=("x",)),))(network, batch, step=0)


def test_chance_depends_on_seed_step_and_part_alone() -> None:
    network = student().eval()
    stage = Stage(name="c", steps=9, cutmix=1.0)

    def loss(step: int = 0, part: int = 0, seed: int = 0) -> float:
        objective = TwoStageObjective((stage,), seed=seed)
        return objective(network, make_batch(), step=step, part=part).loss.item()

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = loss()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert loss() == first
    assert len({first, loss(step=1), loss(part=1), loss(seed=1)}) == 4


def test_a_shared_denominator_is_used() -> None:
    stage = Stage(name="e", steps=1)
    network, batch = student().eval(), make_batch()
    once = TwoStageObjective((stage,))(network, batch, step=0).loss
    half = TwoStageObjective((stage,))(network, batch, step=0, share=lambda count: 2 * count).loss
    assert half.item() == pytest.approx(once.item() / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"source": "oracle"}, "source must"),
        ({"merge": "fill"}, "merge must go with"),
        ({"merge": "both", "source": "student"}, "merge must be None"),
        ({"denominator": "mean"}, "denominator must"),
        ({"threshold": 1.5}, "threshold must lie in"),
        ({"cutmix": -0.5}, "cutmix must lie in"),
    ],
)
def test_stages_refuse_what_they_cannot_mean(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Stage(**{"name": "x", "steps": 1, **change})  # type: ignore[arg-type]


def test_the_objective_refuses_a_batch_that_lacks_what_the_stage_needs() -> None:
    teacher = Stage(name="t", steps=1, source="teacher")
    with pytest.raises(InputError, match="labeler must be the teacher"):
        TwoStageObjective((teacher,))(student(), make_batch(), step=0)
    strong = Stage(name="s", steps=1, strong_views=2)
    with pytest.raises(InputError, match="must hold 2 strong views in stage 's'; got 1"):
        TwoStageObjective((strong,))(student(), make_batch(strong=1), step=0)
    with pytest.raises(InputError, match="stages must hold"):
        TwoStageObjective(())


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def test_students_may_return_a_tensor_a_mapping_or_an_object() -> None:
    logits = torch.randn(2, 4, 3, 5)
    for output in (logits, {"logits": logits}, {"out": logits}, Output(logits)):
        assert torch.equal(logits_of(output, (3, 5)), logits)
    assert logits_of(logits, (9, 7)).shape == (2, 4, 9, 7)
    for wrong in (None, {"aux": logits}, logits[0], "logits"):
        with pytest.raises(InputError, match="student must return logits"):
            logits_of(wrong, (3, 5))


@pytest.mark.parametrize("size", [(1, 1), (8, 16), (17, 30)])
def test_the_u_net_takes_any_size_and_mixes_no_images(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = UNet(5, width=4, depth=3)
    images = torch.randn(3, 3, *size)
    together = network(images)
    assert together.shape == (3, 5, *size)
    alone = torch.cat([network(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)
    refused: list[dict[str, Any]] = [{"num_classes": 0}, {"num_classes": 2, "width": 6}]
    for wrong in refused:
        with pytest.raises(InputError):
            UNet(**wrong)


def test_cutmix_moves_images_labels_targets_and_validity_together() -> None:
    g = torch.Generator().manual_seed(0)
    found = Targets(
        torch.randint(0, 4, (3, 5, 7), generator=g), torch.rand(3, 5, 7, generator=g) > 0.5
    )
    batch = make_batch()
    coded = torch.stack((found.labels, found.kept, batch.valid), 1).float()
    stage = Stage(name="c", steps=1, cutmix=1.0, strong_views=2)
    batch = replace(batch, weak=coded, strong=(coded, coded))
    views = TwoStageObjective((stage,))._views(stage, batch, found, 0, 0)
    assert len(views) == 2
    for view in views:
        together = torch.stack((view.labels, view.kept, view.valid), 1).float()
        assert torch.equal(view.images, together)
        assert not torch.equal(view.images, coded)
    assert not torch.equal(views[0].images, views[1].images)
