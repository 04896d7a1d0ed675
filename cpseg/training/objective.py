"""A batch in, a loss out: no optimizer, no file, no process group.

Any loop can call it: ours, Lightning's, Accelerate's, one written by hand. A stage says what the
unlabeled images are trained on: filtered external labels, the student's own, an averaged
teacher's, or a merge of those.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, Self, cast, final, get_args

import torch
from torch import Tensor, nn

from cpseg import _checks
from cpseg.errors import InputError
from cpseg.training.chance import generator_for
from cpseg.training.mixing import cutmix
from cpseg.training.schedules import Constant, Schedule
from cpseg.training.students import logits_of
from cpseg.training.targets import (
    Denominator,
    JointMode,
    MergeMode,
    masked_cross_entropy,
    merge_pseudo_labels,
    multiply_probabilities,
    pool_probabilities,
)

__all__ = [
    "Batch",
    "Merge",
    "Own",
    "Stage",
    "StepOutput",
    "Targets",
    "TwoStageObjective",
    "labeling",
]

Merge = Literal[MergeMode, JointMode]
"""How external labels, or external probabilities, meet a network's own."""

_JOINT: dict[Merge | None, Callable[[Tensor, Tensor], Tensor]] = {
    "multiply": multiply_probabilities,
    "pool": pool_probabilities,
}

Own = Literal["labels", "probabilities"]
"""What a network tells of its own, alone or joined: the most likely class, or all of them."""


@final
@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Batch:
    """Labeled and unlabeled images, ready for the student.

    Attributes:
        images: Labeled images, normalized. float32 ``(L, 3, H, W)``.
        labels: Their labels, 255 where unknown. int64 ``(L, H, W)``.
        weak: Unlabeled images, cropped but not distorted, normalized. float32 ``(U, 3, H, W)``.
        strong: The same crops with their colors distorted, as often as the stage asks.
        external: External labels of the unlabeled crops, 255 where they abstain, int64
            ``(U, H, W)``; or external probabilities, which add up to 1 (not checked here), or 0
            in all classes where they abstain, float32 ``(U, C, H, W)``.
        valid: Which pixels of the crops lie inside the image. bool ``(U, H, W)``.
    """

    images: Tensor
    labels: Tensor
    weak: Tensor
    strong: tuple[Tensor, ...]
    external: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> Self:
        """The same batch on ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same batch in pinned memory, as a ``DataLoader`` asks for."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            images=change(self.images),
            labels=change(self.labels),
            weak=change(self.weak),
            strong=tuple(change(view) for view in self.strong),
            external=change(self.external),
            valid=change(self.valid),
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What the student learns from for a number of steps.

    Attributes:
        name: For logs.
        steps: How long it lasts.
        source: Whose labels the unlabeled images have: nobody's (they are not loaded), external
            ones, the student's own, or those of the averaged teacher.
        merge: How external labels join the student's or the teacher's own, or with
            ``"multiply"`` and ``"pool"`` external probabilities; None: not at all.
        own: What the student's or the teacher's own are: labels, or with no merge,
            ``"multiply"`` or ``"pool"`` the probabilities of all classes. Labels turn every doubt
            into certainty, which the student then learns; probabilities leave it a doubt.
        threshold: From which confidence an own target is kept: that of the most likely class, in
            what is trained on. External labels and probabilities have none.
        labeled_weight: Weight of the labeled loss over the stage's progress.
        unlabeled_weight: Weight of the unlabeled loss over the stage's progress.
        denominator: What the unlabeled loss is divided by.
        strong_views: How many color-distorted views are trained on; 0: the weak view itself.
        cutmix: How likely an unlabeled image has a box of another.
        perturb: Names of the student's submodules whose channels are dropped, at a rate of one
            half, in a further view; their outputs must be ``(B, C, ...)``. That view then counts
            as much as all others together.
    """

    name: str
    steps: int
    source: Literal["none", "external", "student", "teacher"] = "external"
    merge: Merge | None = None
    own: Own = "labels"
    threshold: float = 0.0
    labeled_weight: Schedule = Constant(0.5)
    unlabeled_weight: Schedule = Constant(0.5)
    denominator: Denominator = "kept"
    strong_views: int = 0
    cutmix: float = 0.0
    perturb: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _checks.check_integer("steps", self.steps, 1)
        _checks.check_integer("strong_views", self.strong_views, 0)
        if self.source not in ("none", "external", "student", "teacher"):
            raise InputError(
                f'source must be "none", "external", "student" or "teacher"; got {self.source!r}'
            )
        if self.merge is not None and self.source not in ("student", "teacher"):
            raise InputError(
                f'merge must go with source "student" or "teacher"; got {self.source!r}'
            )
        if self.merge is not None and self.merge not in get_args(Merge):
            names = ", ".join(f'"{name}"' for name in get_args(Merge))
            raise InputError(f"merge must be None or one of {names}; got {self.merge!r}")
        if self.own not in get_args(Own):
            raise InputError(f'own must be "labels" or "probabilities"; got {self.own!r}')
        own = self.source in ("student", "teacher")
        if self.own == "probabilities" and not (own and self.merge in (None, *_JOINT)):
            raise InputError(
                'own must be "labels" but for source "student" or "teacher" with merge None, '
                f'"multiply" or "pool"; got {self.own!r} with source {self.source!r} '
                f"and merge {self.merge!r}"
            )
        if self.denominator not in ("kept", "valid", "all"):
            raise InputError(
                f'denominator must be "kept", "valid" or "all"; got {self.denominator!r}'
            )
        for name in ("threshold", "cutmix"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1]; got {getattr(self, name)!r}")


@final
@dataclass(frozen=True, eq=False, slots=True)
class Targets:
    """What unlabeled images are to be.

    Attributes:
        labels: A class at every pixel, int64 ``(U, H, W)``; or probabilities of classes, float32
            ``(U, C, H, W)``.
        kept: Which pixels count. bool ``(U, H, W)``.
    """

    labels: Tensor
    kept: Tensor


@final
@dataclass(frozen=True, eq=False, slots=True)
class StepOutput:
    """The loss of one batch, and what it is made of.

    Attributes:
        loss: A scalar to call ``backward`` on; always attached to the student.
        metrics: Detached scalars that no one has waited for: ``loss_labeled``,
            ``loss_unlabeled``, and ``kept``, the share of the valid unlabeled pixels with a
            target, 0 without unlabeled images.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


@final
@dataclass(frozen=True, slots=True)
class TwoStageObjective:
    """The weighted losses of labeled and unlabeled images, stage after stage.

    One forward pass of the student sees everything that is trained on. A batch of which every
    unlabeled pixel is filtered adds 0 to the loss, never NaN.

    Guarantee:
        None; a heuristic.

    Attributes:
        stages: One after the other.
        ignore_index: Label of pixels that do not count.
        seed: Of CutMix and dropped channels, with the step.
        num_classes: How many classes the student must have; None: not checked.
        class_weights: Of the cross-entropy of each class, on labeled and on unlabeled images;
            None: 1.

    Examples:
        >>> objective = TwoStageObjective((Stage(name="external", steps=10),))
        >>> batch = Batch(
        ...     images=torch.rand(2, 3, 8, 8), labels=torch.zeros(2, 8, 8, dtype=torch.int64),
        ...     weak=torch.rand(1, 3, 8, 8), strong=(),
        ...     external=torch.full((1, 8, 8), 255), valid=torch.ones(1, 8, 8, dtype=torch.bool))
        >>> output = objective(torch.nn.Conv2d(3, 4, 1), batch, step=0)
        >>> float(output.metrics["loss_unlabeled"])
        0.0
    """

    stages: tuple[Stage, ...]
    ignore_index: int = 255
    seed: int = 0
    num_classes: int | None = None
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError("stages must hold at least one stage; got none")

    @property
    def steps(self) -> int:
        """How many steps all stages have."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[Stage, float]:
        """The stage of a step and the progress in it, in ``[0, 1)``.

        Raises:
            InputError: If there is no such step.
        """
        _checks.check_integer("step", step, 0)
        for stage, end in zip(
            self.stages, accumulate(stage.steps for stage in self.stages), strict=True
        ):
            if step < end:
                return stage, (step - end + stage.steps) / stage.steps
        raise InputError(f"step must lie below {self.steps}; got {step}")

    def targets(self, stage: Stage, labeler: nn.Module, batch: Batch) -> Targets:
        """What ``stage`` makes of the unlabeled images.

        Args:
            stage: Which sources, which merge, which threshold.
            labeler: The network that labels, for ``source="student"`` and ``"teacher"``. It is
                put in evaluation mode for that, and back.
            batch: The images and the external labels.
        """
        check_external(stage, batch.external)
        own = stage.source in ("student", "teacher")
        soft = batch.external.is_floating_point()
        if soft and not own:
            return Targets(batch.external, (batch.external > 0).any(1) & batch.valid)
        if stage.merge in _JOINT or stage.own == "probabilities":
            shares = self._shares(stage, labeler, batch)
            confidence, labels = shares.max(1)
            kept = (confidence > 0) & (confidence >= stage.threshold) & batch.valid
            return Targets(shares if stage.own == "probabilities" else labels, kept)
        external: Tensor | None = batch.external
        if own:
            labels, confidence = labeling(labeler, batch.weak)
            external = external if stage.merge else None
        else:
            labels = torch.zeros_like(batch.external)
            confidence = torch.zeros(labels.shape, device=labels.device)
        mode = cast("MergeMode", stage.merge or "replace")
        labels, confidence = merge_pseudo_labels(
            labels,
            confidence,
            external,
            mode=mode,
            threshold=stage.threshold if mode == "fill" else None,
            ignore_index=self.ignore_index,
            pad_index=self.ignore_index,
        )
        return Targets(labels, (confidence >= stage.threshold) & batch.valid)

    def _shares(self, stage: Stage, labeler: nn.Module, batch: Batch) -> Tensor:
        """A network's own probabilities, or those joined with external ones. ``(U, C, H, W)``.

        With class weights a network says each class as many times too often as its weight. From
        probabilities it would learn to do so once more, and more with every step: there the
        weights are divided out. A label is its answer, weights and all.
        """
        logits = _own_logits(labeler, batch.weak)
        weights = self._weights(logits)
        if stage.own == "probabilities" and weights is not None:
            logits = logits - torch.where(weights > 0, weights, 1).log().view(-1, 1, 1)
        if stage.merge is None:
            return multiply_probabilities(logits, torch.ones_like(logits))
        return _JOINT[stage.merge](logits, batch.external)

    def __call__(
        self,
        student: nn.Module,
        batch: Batch,
        *,
        step: int,
        labeler: nn.Module | None = None,
        part: int = 0,
        share: Callable[[Tensor], Tensor] | None = None,
    ) -> StepOutput:
        """The loss of a batch.

        Args:
            student: Images to logits; may be wrapped for distribution or compiled.
            batch: Labeled and unlabeled images.
            step: Counted over all stages, from 0.
            labeler: The bare network that labels the unlabeled images: the averaged teacher for
                ``source="teacher"``; for ``"student"`` the student where it is wrapped.
            part: Tells apart batches of one step: of several processes, or of accumulation.
            share: What to make of denominators, such as the mean over processes.

        Raises:
            InputError: If the batch lacks what the stage needs, or the student has another number
                of classes.
        """
        stage, progress = self.stage_at(step)
        if stage.source == "teacher" and labeler is None:
            raise InputError('labeler must be the teacher for source "teacher"; got None')
        if stage.source == "none" or batch.weak.shape[0] == 0:
            logits = self._logits(student(batch.images), batch)
            labeled = self._cross_entropy(logits, batch.labels, "kept", share=share)
            nothing = torch.zeros((), device=labeled.device)
            return StepOutput(
                stage.labeled_weight(progress) * labeled,
                {"loss_labeled": labeled.detach(), "loss_unlabeled": nothing, "kept": nothing},
            )
        if len(batch.strong) != stage.strong_views:
            raise InputError(
                f"batch must hold {stage.strong_views} strong views in stage {stage.name!r}; "
                f"got {len(batch.strong)}"
            )
        found = self.targets(stage, labeler or student, batch)
        views = self._views(stage, batch, found, step, part)
        perturbed = len(batch.weak) if stage.perturb else 0
        generator = generator_for(self.seed, "perturb", step, part)
        with _dropped(student, stage.perturb, perturbed, generator):
            output = student(torch.cat((batch.images, *(view.images for view in views))))
        logits = self._logits(output, batch)
        parts = torch.split(logits, [len(batch.images), *(len(view.images) for view in views)])
        labeled = self._cross_entropy(parts[0], batch.labels, "kept", share=share)
        losses = [
            self._cross_entropy(
                part_logits,
                view.labels,
                stage.denominator,
                weight=view.kept,
                valid=view.valid,
                share=share,
            )
            for part_logits, view in zip(parts[1:], views, strict=True)
        ]
        distorted = _mean(losses[:-1] if stage.perturb else losses)
        unlabeled = (distorted + losses[-1]) / 2 if stage.perturb else distorted
        loss = stage.labeled_weight(progress) * labeled
        loss = loss + stage.unlabeled_weight(progress) * unlabeled
        share_kept = found.kept.sum() / batch.valid.sum().clamp(min=1)
        return StepOutput(
            loss,
            {
                "loss_labeled": labeled.detach(),
                "loss_unlabeled": unlabeled.detach(),
                "kept": share_kept,
            },
        )

    def _logits(self, output: object, batch: Batch) -> Tensor:
        logits = logits_of(output, _size(batch.labels))
        if self.num_classes not in (None, logits.shape[1]):
            raise InputError(
                f"student must give logits of {self.num_classes} classes; got {logits.shape[1]}"
            )
        return logits

    def _views(
        self, stage: Stage, batch: Batch, found: Targets, step: int, part: int
    ) -> "list[_View]":
        """What the student sees of the unlabeled images, and what it is to say."""
        plain = _View(batch.weak, found.labels, found.kept, batch.valid)
        views: list[_View] = []
        for index, images in enumerate(batch.strong or (batch.weak,)):
            view = replace(plain, images=images)
            if stage.cutmix:
                mix = cutmix(
                    (images.shape[0], images.shape[2], images.shape[3]),
                    probability=stage.cutmix,
                    generator=generator_for(self.seed, "cutmix", step, part, index),
                    device=images.device,
                )
                view = _View(mix(images), mix(view.labels), mix(view.kept), mix(view.valid))
            views.append(view)
        return [*views, plain] if stage.perturb else views

    def _cross_entropy(
        self,
        logits: Tensor,
        labels: Tensor,
        denominator: Denominator,
        *,
        weight: Tensor | None = None,
        valid: Tensor | None = None,
        share: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        return masked_cross_entropy(
            logits,
            labels,
            weight=weight,
            class_weights=self._weights(logits),
            denominator=denominator,
            valid=valid,
            ignore_index=self.ignore_index,
            pad_index=self.ignore_index,
            share=share,
        )

    def _weights(self, logits: Tensor) -> Tensor | None:
        """Those of classes, where the logits are. ``(C,)``."""
        if self.class_weights is None:
            return None
        return torch.tensor(self.class_weights, device=logits.device)


def check_external(stage: Stage, external: Tensor) -> None:
    """Refuse external labels where a stage joins probabilities, and the other way round."""
    soft = external.is_floating_point()
    if stage.merge is not None and soft != (stage.merge in _JOINT):
        raise InputError(
            f"batch's external must be {'labels' if soft else 'probabilities'} for merge "
            f"{stage.merge!r} of stage {stage.name!r}; got {external.dtype}"
        )


def labeling(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """A network's own labels, in evaluation mode and without gradients.

    Every submodule returns to the mode it was in, frozen ones too.

    Args:
        network: Images to logits.
        images: Normalized. ``(B, 3, H, W)``.

    Returns:
        The most likely class, int64 ``(B, H, W)``, and its probability, float32 ``(B, H, W)``.
    """
    logits = _own_logits(network, images)
    best, labels = logits.max(1)
    return labels, (best - logits.logsumexp(1)).exp()


def _own_logits(network: nn.Module, images: Tensor) -> Tensor:
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            return logits_of(network(images), (images.shape[2], images.shape[3])).float().detach()
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True, eq=False, slots=True)
class _View:
    images: Tensor
    labels: Tensor
    kept: Tensor
    valid: Tensor


@contextmanager
def _dropped(
    student: nn.Module, names: Sequence[str], rows: int, generator: torch.Generator
) -> Generator[None, None, None]:
    """Drop channels of the named submodules' outputs, in the last ``rows`` of the batch."""
    if not names:
        yield
        return
    modules = dict(student.named_modules())

    def drop(module: nn.Module, inputs: object, output: object) -> Tensor:
        del module, inputs
        if not isinstance(output, Tensor) or output.ndim < 2:
            raise InputError(
                "perturb must name submodules that return (B, C, ...); "
                f"got one that returns {type(output).__name__}"
            )
        shape = (rows, output.shape[1], *(1 for _ in output.shape[2:]))
        scale = 2 * torch.randint(2, shape, generator=generator).to(output.device, output.dtype)
        return torch.cat((output[:-rows], output[-rows:] * scale))

    with ExitStack() as hooks:
        for name in names:
            module = modules.get(name, modules.get(f"module.{name}"))
            if module is None:
                raise InputError(f"perturb must name submodules of the student; got {name!r}")
            hooks.callback(module.register_forward_hook(drop).remove)
        yield


def _size(labels: Tensor) -> tuple[int, int]:
    return (labels.shape[1], labels.shape[2])


def _mean(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()
