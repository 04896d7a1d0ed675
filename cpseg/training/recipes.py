"""Recipes: functions that return a configuration, with every default said to be whose.

What a paper does not state is ours, and marked so. Whatever else a run needs, such as learning
rate or precision, is changed with :func:`dataclasses.replace` on what comes back.
"""

from cpseg.training.objective import Merge, Own, Stage
from cpseg.training.schedules import Complement, Constant, Exponential
from cpseg.training.train_config import TrainConfig

__all__ = ["conformal_sam", "self_training", "supervised", "unimatch_like"]


def conformal_sam(
    num_classes: int,
    *,
    external_steps: int,
    self_steps: int,
    crop: tuple[int, int],
    start: float = 0.5,
    rate: float = 1.0,
    own: Own = "labels",
    merge: Merge | None = None,
    threshold: float = 0.0,
    ema_decay: float | None = None,
) -> TrainConfig:
    """ConformalSAM (Chen et al., 2025): filtered external labels, then self-reliance.

    Stage I trains on ground truth and on external labels, cross-entropy on both. Stage II drops
    the external labels for the student's own, unless ``merge`` joins them, with
    ``(1 - w) L_s + w L_u`` and ``w`` falling exponentially. Ours, because the paper's text could
    not be had: equal weights in stage I, ``start`` and ``rate``, no confidence threshold, no
    teacher, one learning-rate schedule over both stages. ``rate`` is low because a high one ends
    on the labeled images alone, which few labels do not bear.

    Guarantee:
        None; a heuristic.

    Args:
        num_classes: Number of classes, C.
        external_steps: Steps of stage I. The paper: three quarters of all.
        self_steps: Steps of stage II; 0 leaves it out.
        crop: Height and width of training images.
        start: ``w`` where stage II begins.
        rate: How fast it falls: by ``exp(-rate)`` over the stage.
        own: What the student's own are in stage II. The paper: labels, as they may be read;
            probabilities leave its doubts doubts, and cost less where it knows less than the
            annotator does.
        merge: How external labels or probabilities join the student's own in stage II. The
            paper: not at all. A student that knows less than the annotator loses by that; with
            ``"pool"`` both have their say.
        threshold: From which confidence stage II keeps a label.
        ema_decay: Of a teacher that averages the student over steps and labels in its place in
            stage II; None: the student itself.

    Examples:
        >>> config = conformal_sam(21, external_steps=300, self_steps=100, crop=(64, 64))
        >>> [(stage.name, stage.steps) for stage in config.stages]
        [('external', 300), ('self', 100)]
    """
    weight = Exponential(start, rate)
    stages = [Stage(name="external", steps=external_steps, source="external")]
    if self_steps:
        stages.append(
            Stage(
                name="self",
                steps=self_steps,
                source="student" if ema_decay is None else "teacher",
                merge=merge,
                own=own,
                threshold=threshold,
                labeled_weight=Complement(weight),
                unlabeled_weight=weight,
            )
        )
    return TrainConfig(
        num_classes=num_classes, stages=tuple(stages), crop=crop, ema_decay=ema_decay
    )


def supervised(num_classes: int, *, steps: int, crop: tuple[int, int]) -> TrainConfig:
    """Labeled images alone: what every other recipe is compared with.

    Args:
        num_classes: Number of classes, C.
        steps: How long.
        crop: Height and width of training images.
    """
    stage = Stage(
        name="labeled",
        steps=steps,
        source="none",
        labeled_weight=Constant(1.0),
        unlabeled_weight=Constant(0.0),
    )
    return TrainConfig(num_classes=num_classes, stages=(stage,), crop=crop)


def self_training(
    num_classes: int,
    *,
    warmup_steps: int,
    steps: int,
    crop: tuple[int, int],
    threshold: float = 0.95,
    ema_decay: float = 0.996,
) -> TrainConfig:
    """A teacher that averages the student labels weak views; the student learns strong ones.

    FixMatch with an averaged teacher and CutMix; the lengths are ours.

    Guarantee:
        None; a heuristic.

    Args:
        num_classes: Number of classes, C.
        warmup_steps: Steps on labeled images alone before the teacher is listened to.
        steps: Steps with its labels.
        crop: Height and width of training images.
        threshold: From which confidence a label is kept.
        ema_decay: Of the teacher.
    """
    first = supervised(num_classes, steps=warmup_steps, crop=crop).stages
    second = Stage(
        name="teacher",
        steps=steps,
        source="teacher",
        threshold=threshold,
        denominator="valid",
        strong_views=1,
        cutmix=0.5,
    )
    return TrainConfig(
        num_classes=num_classes, stages=(*first, second), crop=crop, ema_decay=ema_decay
    )


def unimatch_like(
    num_classes: int,
    *,
    steps: int,
    crop: tuple[int, int],
    perturb: tuple[str, ...],
    threshold: float = 0.95,
) -> TrainConfig:
    """Weak to strong, after UniMatch (Yang et al., 2023): two strong views and dropped channels.

    Its weights: half for labels, an eighth for each strong view, a quarter for the view with
    dropped channels, sums divided by all pixels inside the images. Unlike UniMatch, the student
    labels in evaluation mode, and mixed images come from the same batch.

    Guarantee:
        None; a heuristic.

    Args:
        num_classes: Number of classes, C.
        steps: How long.
        crop: Height and width of training images.
        perturb: Names of the student's submodules whose channels are dropped.
        threshold: From which confidence a label is kept.
    """
    stage = Stage(
        name="weak to strong",
        steps=steps,
        source="student",
        threshold=threshold,
        denominator="valid",
        strong_views=2,
        cutmix=0.5,
        perturb=perturb,
    )
    return TrainConfig(num_classes=num_classes, stages=(stage,), crop=crop, head_multiplier=10.0)
