"""The arms: external labels, and how a student learns from them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from external_labels import (
    Labels,
    and_edges,
    by_class,
    in_the_set,
    kept_by,
    levels_by_class,
    nothing,
    probabilities,
    raw,
    recalibrated,
    recalibrated_alone,
    recalibrated_labels,
    recalibrated_on,
    refined,
    refined_both_ways,
    right_only,
    the_set,
    thinned_by_size,
    truth,
)
from frames import Frames, Split
from student import DECAY, DEPTH

from cpseg.training import Merge, Own, Stage, TrainConfig
from cpseg.training.recipes import conformal_sam, self_training, supervised, unimatch_like

Recipe = Callable[[int, int, tuple[int, int]], TrainConfig]  # classes, steps, crop


def labels_only(classes: int, steps: int, crop: tuple[int, int]) -> TrainConfig:
    return supervised(classes, steps=steps, crop=crop)


def external(classes: int, steps: int, crop: tuple[int, int]) -> TrainConfig:
    return strong(conformal_sam(classes, external_steps=steps, self_steps=0, crop=crop))


def then_self(
    classes: int,
    steps: int,
    crop: tuple[int, int],
    *,
    own: Own = "labels",
    merge: Merge | None = None,
    share: int = 4,
) -> TrainConfig:
    """The student's own in the last part; what joins external labels weighs the same to the end."""
    last = steps // share
    return strong(
        conformal_sam(
            classes,
            external_steps=steps - last,
            self_steps=last,
            crop=crop,
            rate=1.0 if merge is None else 0.0,
            own=own,
            merge=merge,
            ema_decay=DECAY,
        )
    )


def over_all_pixels(classes: int, steps: int, crop: tuple[int, int]) -> TrainConfig:
    """The fewer labels are kept, the less the unlabeled frames count."""
    config = external(classes, steps, crop)
    stages = tuple(replace(stage, denominator="valid") for stage in config.stages)
    return replace(config, stages=stages)


def any_of_the_set(classes: int, steps: int, crop: tuple[int, int]) -> TrainConfig:
    """A loss that asks for any class that is left: ``-log`` of their probabilities' sum.

    Its gradient is that of cross-entropy with the student's own probabilities within the set,
    which here are those of the view without other colors.
    """
    stage = Stage(name="set", steps=steps, source="student", merge="multiply", own="probabilities")
    return strong(TrainConfig(num_classes=classes, stages=(stage,), crop=crop, ema_decay=DECAY))


def self_trained(classes: int, steps: int, crop: tuple[int, int]) -> TrainConfig:
    return self_training(
        classes, warmup_steps=steps // 3, steps=steps - steps // 3, crop=crop, ema_decay=DECAY
    )


def weak_to_strong(classes: int, steps: int, crop: tuple[int, int]) -> TrainConfig:
    return unimatch_like(classes, steps=steps, crop=crop, perturb=(f"net.down.{DEPTH - 1}",))


def weak_to_strong_with_labels(classes: int, steps: int, crop: tuple[int, int]) -> TrainConfig:
    config = weak_to_strong(classes, steps, crop)
    return replace(config, stages=(replace(config.stages[0], merge="prefer_external"),))


def strong(config: TrainConfig) -> TrainConfig:
    """With other colors and boxes of other frames in the unlabeled ones, in all stages."""
    return replace(
        config,
        stages=tuple(replace(stage, strong_views=1, cutmix=0.5) for stage in config.stages),
    )


@dataclass(frozen=True)
class Arm:
    """External labels, and how they are learned from; with ``again``, of the labeled frames.

    Two are equal if their external labels are.
    """

    labels: Labels
    recipe: Recipe = field(compare=False)
    again: bool = False

    def taught(self, split: Split) -> Frames:
        """The frames that have external labels."""
        return split.labeled if self.again else split.unlabeled


# In the order in which they are run: those that matter most come first.
ARMS = {
    "labels only": Arm(nothing, labels_only),
    "labels only, strong views too": Arm(truth, external, again=True),
    "raw": Arm(raw, external),
    "recalibrated probabilities": Arm(recalibrated_alone, external),
    "recalibrated probabilities in the set": Arm(in_the_set(recalibrated), external),
    "recalibrated probabilities in the set, then self-reliance": Arm(
        in_the_set(recalibrated), then_self
    ),
    "recalibrated probabilities, then self-reliance": Arm(
        recalibrated_alone, partial(then_self, own="probabilities")
    ),
    "recalibrated probabilities, then joint": Arm(
        recalibrated_alone, partial(then_self, own="probabilities", merge="multiply")
    ),
    "refined probabilities": Arm(refined, external),
    "refined both ways, in both sets": Arm(refined_both_ways, external),
    "refined both ways, in both sets, then pooled with own": Arm(
        refined_both_ways, partial(then_self, own="probabilities", merge="pool", share=2)
    ),
    "all true labels": Arm(truth, external),
    "drop every wrong label": Arm(right_only, external),
    "argmax in the set, by class": Arm(kept_by("class: Argmax"), external),
    "probabilities in the set": Arm(in_the_set(by_class), external),
    "singletons, by class": Arm(kept_by("class: Singleton"), external),
    "singletons, pooled": Arm(kept_by("pooled: Singleton"), external),
    "recalibrated probabilities in the set, then joint": Arm(
        in_the_set(recalibrated), partial(then_self, merge="multiply")
    ),
    "argmax in the set, by class, then self-reliance": Arm(kept_by("class: Argmax"), then_self),
    "self-training alone": Arm(nothing, self_trained),
    "weak to strong": Arm(nothing, weak_to_strong),
    "weak to strong with argmax in the set": Arm(
        kept_by("class: Argmax"), weak_to_strong_with_labels
    ),
    "argmax in the set, pooled": Arm(kept_by("pooled: Argmax"), external),
    "any class of the set, by class": Arm(the_set, any_of_the_set),
    "confidence .95": Arm(kept_by("confidence"), external),
    "most likely class if in the set, by class": Arm(kept_by("class: Top"), external),
    "at most two, by class": Arm(kept_by("class: AtMost 2"), external),
    "at most two, by class, and all near edges": Arm(
        and_edges(kept_by("class: AtMost 2")), external
    ),
    "road as background, by class": Arm(kept_by("class: Road as background"), external),
    "argmax in the set, by location": Arm(kept_by("location: Argmax"), external),
    "argmax in the set, clustered": Arm(kept_by("clusters: Argmax"), external),
    "controlled error per class": Arm(kept_by("controlled error per class"), external),
    "probabilities": Arm(probabilities, external),
    "recalibrated probabilities, from all labeled frames": Arm(recalibrated_on, external),
    "recalibrated labels": Arm(recalibrated_labels, external),
    "equal shares of the set, by class": Arm(the_set, external),
    "argmax in the set, levels by class": Arm(levels_by_class, external),
    "argmax in the set, thinned by its size": Arm(thinned_by_size, external),
    "singletons, by class, over all pixels": Arm(kept_by("class: Singleton"), over_all_pixels),
    "recalibrated probabilities, then joint labels": Arm(
        recalibrated_alone, partial(then_self, merge="multiply")
    ),
    "recalibrated probabilities, then self-reliance for half": Arm(
        recalibrated_alone, partial(then_self, own="probabilities", share=2)
    ),
}


# What others are compared with.
BESIDE = (
    "labels only",
    "raw",
    "recalibrated probabilities",
    "refined both ways, in both sets",
)
