"""What becomes of an annotator's labels of the unlabeled frames: the external labels of an arm."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import cast

import torch
from frames import Frames
from labels import halves, rules
from student import DECAY, LABELED, LR, Student
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from cpseg import Argmax, Calibration, ClassConditionalCalibrator
from cpseg.filters import SoftLabels
from cpseg.fitted import Recalibrated, recalibrate
from cpseg.quantile import level
from cpseg.training import (
    Correction,
    CrossFitted,
    Example,
    class_weights_from,
    cross_fit,
    refine,
)

ALPHA = 0.1
EDGE = 2  # pixels

Labels = Callable[[Frames, Frames], Tensor]  # labeled and unlabeled frames to labels of the latter


def nothing(labeled: Frames, unlabeled: Frames) -> Tensor:
    del labeled
    return torch.full_like(unlabeled.labels, 255)


def truth(labeled: Frames, unlabeled: Frames) -> Tensor:
    del labeled
    return unlabeled.labels


def raw(labeled: Frames, unlabeled: Frames) -> Tensor:
    del labeled
    return unlabeled.logits.argmax(1)


def right_only(labeled: Frames, unlabeled: Frames) -> Tensor:
    del labeled
    found = unlabeled.logits.argmax(1)
    return torch.where(found == unlabeled.labels, found, 255)


def frame_by_frame(keep: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    return torch.cat([keep(of_frame[None]) for of_frame in logits])


def kept_by(name: str) -> Labels:
    """What a rule of ``labels.py`` keeps at its usual level."""

    def labels(labeled: Frames, unlabeled: Frames) -> Tensor:
        (rule,) = (rule for rule in rules(labeled.classes) if rule.name == name)
        return frame_by_frame(rule.fit(labeled)(rule.usual), unlabeled.logits)

    return labels


def near_edges(labels: Tensor) -> Tensor:
    """Pixels from which another class, or void, is at most ``EDGE`` away. Bool ``(N, H, W)``."""
    whole = labels[:, None].float()
    most, least = (
        sign * max_pool2d(sign * whole, 2 * EDGE + 1, stride=1, padding=EDGE) for sign in (1, -1)
    )
    return (most != least)[:, 0]


def and_edges(labels: Labels) -> Labels:
    """What is kept, and near edges of the annotator's most likely class all of it."""

    def both(labeled: Frames, unlabeled: Frames) -> Tensor:
        kept, top = labels(labeled, unlabeled), raw(labeled, unlabeled)
        return torch.where((kept == 255) & near_edges(top), top, kept)

    return both


def by_class(
    labeled: Frames, alpha: float | Fraction | list[float | Fraction] = ALPHA
) -> Calibration:
    calibrator = ClassConditionalCalibrator(len(labeled.classes))
    return calibrator.update(labeled.logits, labeled.labels).compute(alpha, "pooled")


def recalibrated(labeled: Frames) -> Calibration:
    """Temperature and class biases from every second labeled frame, thresholds from the others.

    A class that too few frames show has the threshold of all.
    """
    before, after = halves(labeled)
    calibrator = recalibrate(
        partial(ClassConditionalCalibrator, len(labeled.classes)),
        [(before.logits, before.labels)],
        [(after.logits, after.labels)],
    )
    return calibrator.compute(ALPHA, "pooled")


def recalibrated_on(known: Frames, frames: Frames) -> Tensor:
    """Probabilities of all classes, temperature and class biases being those of ``known``."""
    make = partial(ClassConditionalCalibrator, len(known.classes))
    score = recalibrate(make, [(known.logits, known.labels)], []).score
    return cast("Recalibrated", score).logits(frames.logits).softmax(1)


def recalibrated_alone(labeled: Frames, unlabeled: Frames) -> Tensor:
    """Recalibrated by every second labeled frame."""
    return recalibrated_on(halves(labeled)[0], unlabeled)


def recalibrated_labels(labeled: Frames, unlabeled: Frames) -> Tensor:
    return recalibrated_alone(labeled, unlabeled).argmax(1)


REFINING_STEPS = 600


def taught(examples: Sequence[Example]) -> Correction:
    """The annotator, refined by what it gets wrong on these."""
    classes = len(examples[0][1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Student(classes, 3 + classes)
    nn.init.zeros_(network.net.head.weight)
    nn.init.zeros_(cast("Tensor", network.net.head.bias))
    return refine(
        network,
        examples,
        class_weights=class_weights_from((labels for _, _, labels in examples), classes),
        steps=REFINING_STEPS,
        batch=LABELED,
        lr=LR,
        ema_decay=DECAY,
    )


def examples_of(labeled: Frames) -> list[Example]:
    return list(zip(labeled.images, labeled.logits, labeled.labels, strict=True))


@torch.no_grad()
def told(corrected: Correction, frames: Frames) -> Tensor:
    """What is said of each frame."""
    each = zip(frames.images, frames.logits, strict=True)
    return torch.cat([corrected(image[None], logits[None]) for image, logits in each])


def refined(labeled: Frames, unlabeled: Frames) -> Tensor:
    """Probabilities of the annotator, refined on every second labeled frame."""
    return told(taught(examples_of(halves(labeled)[0])), unlabeled).softmax(1)


def cross_fitted(labeled: Frames) -> CrossFitted:
    """Two, each refined on what calibrates the other, at the least level where ``ALPHA`` is less."""
    one, other = (examples_of(half) for half in halves(labeled))
    return cross_fit(taught, one, other, max(level(ALPHA), Fraction(2, len(other) + 1)))


def refined_both_ways(labeled: Frames, unlabeled: Frames) -> Tensor:
    """The pool of two annotators, each within its set."""
    return told(cross_fitted(labeled), unlabeled)


def probabilities(labeled: Frames, unlabeled: Frames) -> Tensor:
    """The annotator's, as they are."""
    del labeled
    return unlabeled.logits.softmax(1)


def levels_by_class(labeled: Frames, unlabeled: Frames) -> Tensor:
    """The argmax in the set, where a frequent class is left out more readily than a rare one."""
    classes = len(labeled.classes)
    counts = torch.bincount(labeled.labels[labeled.labels < classes], minlength=classes)
    usual = (ALPHA * (counts / counts.double().mean()).sqrt()).clamp(max=0.5).tolist()
    least = Fraction(1, len(labeled) + 1)  # below it nothing can be promised, and a class is lost
    alphas = [max(alpha, least) for alpha in usual]
    return frame_by_frame(Argmax(by_class(labeled, alphas)), unlabeled.logits)


def thinned_by_size(labeled: Frames, unlabeled: Frames) -> Tensor:
    """The argmax in the set, of one pixel in as many as its set has classes.

    So a pixel's weight is, in the mean, one over the size of its set.
    """
    shares = in_the_set(by_class)(labeled, unlabeled)
    size = (shares > 0).sum(1)
    drawn = torch.rand(size.shape, generator=torch.Generator().manual_seed(0))
    return torch.where((size > 0) & (drawn * size < 1), shares.argmax(1), 255)


def the_set(labeled: Frames, unlabeled: Frames) -> Tensor:
    """One share for each class of the set, 0 for all others."""
    shares = in_the_set(by_class)(labeled, unlabeled)
    return (shares > 0) / (shares > 0).sum(1, keepdim=True).clamp(min=1)


def in_the_set(calibrate: Callable[[Frames], Calibration]) -> Labels:
    """Probabilities of the classes of a set, 0 for all others."""

    def labels(labeled: Frames, unlabeled: Frames) -> Tensor:
        return frame_by_frame(SoftLabels(calibrate(labeled)), unlabeled.logits)

    return labels
