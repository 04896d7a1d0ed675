"""What an annotator's labels are worth to a student, by how they were filtered.

The same small U-Net is trained on the labeled frames of a split and, in all arms but the first,
on external labels of the other frames; ``ARMS`` says what an arm is, the constants below it what
is the same for all. They were settled on seed 100 and on val; seeds 0 to 4 count.
Every run is one row of a results file. A row that is there is never run again, a run that was cut
goes on where it stopped, and several processes may work on one file.

    python benchmarks/evidence/students.py --data PATH [--arms NAME ...] [--counts 46 ...]
        [--seeds 0 1 2 3 4] [--steps 1500] [--hold-out VIDEO] [--whole] [--minutes 50]
        [--precision fp32] [--jobs 2]
    python benchmarks/evidence/students.py --table    # also beside the results, for the docs
    python benchmarks/evidence/students.py --quick

With ``--hold-out`` no frame of that video trains or calibrates, labeled or not, and its frames
are tested beside val's. ``--quick`` is the whole way on synthetic shapes in little time, and its
numbers mean nothing.
"""

import argparse
import csv
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from math import isnan, sqrt
from pathlib import Path
from shutil import rmtree, which
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Literal, cast, get_args

import frames
import torch
from frames import Frames
from labels import rules
from scipy.stats import t as student_t
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from cpseg import Argmax, Calibration, ClassConditionalCalibrator
from cpseg.annotators import SyntheticAnnotator
from cpseg.data import ColorJitter, SyntheticShapes
from cpseg.filters import SoftLabels
from cpseg.fitted import Recalibrated, recalibrate
from cpseg.metrics import MeanIoU, SelectiveAccuracy
from cpseg.training import (
    MovingAverage,
    Own,
    Stage,
    TrainConfig,
    Trainer,
    UNet,
    class_weights_from,
    masked_cross_entropy,
)
from cpseg.training.batches import Normalize
from cpseg.training.recipes import conformal_sam, self_training, supervised, unimatch_like

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "students.csv"
WORK = HERE.parent.parent / "build" / "evidence-students"  # of runs that are not done
COLUMNS = (
    *("arm", "count", "seed", "size", "held_out", "steps", "commit", "miou"),
    *("kept", "right", "miou_by_video", "iou_by_class", "precision"),
)
KEYS = COLUMNS.index("commit")  # what comes before tells runs apart
Key = tuple[str, ...]
Precision = Literal["fp32", "bf16"]  # bfloat16 is slow where the processor does not have it

# The same for all arms. STEPS are the optimizer's, whatever a step sees.
STEPS = 1500
LABELED, UNLABELED = 4, 4  # images a step
LR, DECAY = 1e-3, 0.99  # of AdamW, falling to 0; of the averaged student, which is what is tested
ALPHA = 0.1
SQUARE, WIDTH, DEPTH = 2, 32, 3
COLOR = ColorJitter(strength=0.25, hue=0.02, gray=0.0, blur=0.25)  # of strong views
NORMALIZE = Normalize()


class Student(nn.Module):
    """The library's small U-Net from squares of two by two pixels to squares, for the time saved."""

    def __init__(self, classes: int, channels: int = 3) -> None:
        super().__init__()
        inside, outside = (count * SQUARE**2 for count in (channels, classes))
        self.net = UNet(outside, channels=inside, width=WIDTH, depth=DEPTH, norm="batch")

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images ``(B, channels, H, W)``."""
        height, width = images.shape[2:]
        whole = pad(images, (0, -width % SQUARE, 0, -height % SQUARE))
        return pixel_shuffle(self.net(pixel_unshuffle(whole, SQUARE)), SQUARE)[..., :height, :width]


# --- external labels ------------------------------------------------------------------------------

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


def frame_by_frame(keep: Callable[[Tensor], Tensor], frames: Frames) -> Tensor:
    return torch.cat([keep(logits[None]) for logits in frames.logits])


def kept_by(name: str) -> Labels:
    """What a rule of ``labels.py`` keeps at its usual level."""

    def labels(labeled: Frames, unlabeled: Frames) -> Tensor:
        (rule,) = (rule for rule in rules(labeled.classes) if rule.name == name)
        return frame_by_frame(rule.fit(labeled)(rule.usual), unlabeled)

    return labels


def by_class(labeled: Frames, alpha: float | list[float] = ALPHA) -> Calibration:
    calibrator = ClassConditionalCalibrator(len(labeled.classes))
    return calibrator.update(labeled.logits, labeled.labels).compute(alpha, "pooled")


def recalibrated(labeled: Frames) -> Calibration:
    """Temperature and class biases from every second labeled frame, thresholds from the others.

    A class that too few frames show has the threshold of all.
    """
    every = list(range(len(labeled)))
    before, after = labeled[every[::2]], labeled[every[1::2]]
    calibrator = recalibrate(
        partial(ClassConditionalCalibrator, len(labeled.classes)),
        [(before.logits, before.labels)],
        [(after.logits, after.labels)],
    )
    return calibrator.compute(ALPHA, "pooled")


def recalibrated_alone(labeled: Frames, unlabeled: Frames) -> Tensor:
    """Probabilities after recalibration, of all classes."""
    score = cast("Recalibrated", recalibrated(labeled).score)
    return score.logits(unlabeled.logits).softmax(1)


def recalibrated_on_all(labeled: Frames, unlabeled: Frames) -> Tensor:
    """As :func:`recalibrated_alone`, from all labeled frames: thresholds, which need others, are none."""
    make = partial(ClassConditionalCalibrator, len(labeled.classes))
    score = recalibrate(make, [(labeled.logits, labeled.labels)], []).score
    return cast("Recalibrated", score).logits(unlabeled.logits).softmax(1)


def recalibrated_labels(labeled: Frames, unlabeled: Frames) -> Tensor:
    return recalibrated_alone(labeled, unlabeled).argmax(1)


REFINING_STEPS = 600


class Refined(nn.Module):
    """The annotator's log-probabilities, and what a network adds to them that sees the image too."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.correction = Student(classes, 3 + classes)
        nn.init.zeros_(self.correction.net.head.weight)
        nn.init.zeros_(cast("Tensor", self.correction.net.head.bias))

    def forward(self, images: Tensor, logits: Tensor) -> Tensor:
        """Logits. ``(B, 3, H, W)`` and ``(B, C, H, W)`` to ``(B, C, H, W)``."""
        known = logits.log_softmax(1).clamp(min=-12)
        seen = torch.cat((NORMALIZE(images.float() / 255), known / 6), 1)
        return known + self.correction(seen.to(memory_format=torch.channels_last))


def refined(labeled: Frames, unlabeled: Frames) -> Tensor:
    """Probabilities of an annotator that learned from every second labeled frame.

    Trained as students are, on mirrored frames of other brightness. Class weights, without which
    it would learn nothing of rare classes, are divided out: students have their own.
    """
    classes = len(labeled.classes)
    known = labeled[list(range(0, len(labeled), 2))]
    weights = torch.tensor(class_weights_from([known.labels], classes))
    chance = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Refined(classes).to(memory_format=torch.channels_last)
    average = MovingAverage(network, DECAY)
    optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=0.01)
    for step in range(REFINING_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / REFINING_STEPS) ** 0.9
        some = known[torch.randint(len(known), (LABELED,), generator=chance).tolist()]
        views = [some.images.float(), some.logits, some.labels]
        if torch.rand((), generator=chance) < 0.5:
            views = [view.flip(-1) for view in views]
        images, logits, labels = views
        light = 1 + 0.2 * torch.randn(LABELED, 1, 1, 1, generator=chance)
        tint = 12 * torch.randn(LABELED, 3, 1, 1, generator=chance)
        loss = masked_cross_entropy(
            network((images * light + tint).clamp(0, 255), logits), labels, class_weights=weights
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update(network)
    learned = average.module
    with torch.no_grad():
        told = [
            learned(image[None], logits[None])
            for image, logits in zip(unlabeled.images, unlabeled.logits, strict=True)
        ]
    return (torch.cat(told) - weights.log().view(-1, 1, 1)).softmax(1)


def probabilities(labeled: Frames, unlabeled: Frames) -> Tensor:
    """The annotator's, as they are."""
    del labeled
    return unlabeled.logits.softmax(1)


def levels_by_class(labeled: Frames, unlabeled: Frames) -> Tensor:
    """The argmax in the set, where a frequent class is left out more readily than a rare one."""
    classes = len(labeled.classes)
    counts = torch.bincount(labeled.labels[labeled.labels < classes], minlength=classes)
    alphas = (ALPHA * (counts / counts.double().mean()).sqrt()).clamp(0.01, 0.5).tolist()
    return frame_by_frame(Argmax(by_class(labeled, alphas)), unlabeled)


def the_set(labeled: Frames, unlabeled: Frames) -> Tensor:
    """One share for each class of the set, 0 for all others."""
    shares = in_the_set(by_class)(labeled, unlabeled)
    return (shares > 0) / (shares > 0).sum(1, keepdim=True).clamp(min=1)


def in_the_set(calibrate: Callable[[Frames], Calibration]) -> Labels:
    """Probabilities of the classes of a set, 0 for all others."""

    def labels(labeled: Frames, unlabeled: Frames) -> Tensor:
        return frame_by_frame(SoftLabels(calibrate(labeled)), unlabeled)

    return labels


# --- the arms -------------------------------------------------------------------------------------

Recipe = Callable[[int, int, tuple[int, int]], TrainConfig]  # classes, steps, crop


def labels_only(classes: int, steps: int, crop: tuple[int, int]) -> TrainConfig:
    return supervised(classes, steps=steps, crop=crop)


def external(classes: int, steps: int, crop: tuple[int, int]) -> TrainConfig:
    return strong(conformal_sam(classes, external_steps=steps, self_steps=0, crop=crop))


def then_self(
    classes: int, steps: int, crop: tuple[int, int], own: Own = "labels", share: int = 4
) -> TrainConfig:
    last = steps // share
    return strong(
        conformal_sam(
            classes,
            external_steps=steps - last,
            self_steps=last,
            crop=crop,
            own=own,
            ema_decay=DECAY,
        )
    )


def then_joint(classes: int, steps: int, crop: tuple[int, int], own: Own = "labels") -> TrainConfig:
    last = steps // 4
    first = conformal_sam(classes, external_steps=steps - last, self_steps=0, crop=crop).stages
    second = Stage(name="joint", steps=last, source="teacher", merge="multiply", own=own)
    return strong(
        TrainConfig(num_classes=classes, stages=(*first, second), crop=crop, ema_decay=DECAY)
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
    """External labels, and how they are learned from; with ``again``, of the labeled frames."""

    labels: Labels
    recipe: Recipe
    again: bool = False

    def taught(self, split: "Split") -> Frames:
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
        recalibrated_alone, partial(then_joint, own="probabilities")
    ),
    "all true labels": Arm(truth, external),
    "drop every wrong label": Arm(right_only, external),
    "argmax in the set, by class": Arm(kept_by("class: Argmax"), external),
    "probabilities in the set": Arm(in_the_set(by_class), external),
    "singletons, by class": Arm(kept_by("class: Singleton"), external),
    "singletons, pooled": Arm(kept_by("pooled: Singleton"), external),
    "recalibrated probabilities in the set, then joint": Arm(in_the_set(recalibrated), then_joint),
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
    "road as background, by class": Arm(kept_by("class: Road as background"), external),
    "argmax in the set, by location": Arm(kept_by("location: Argmax"), external),
    "argmax in the set, clustered": Arm(kept_by("clusters: Argmax"), external),
    "controlled error per class": Arm(kept_by("controlled error per class"), external),
    "probabilities": Arm(probabilities, external),
    "recalibrated probabilities, from all labeled frames": Arm(recalibrated_on_all, external),
    "recalibrated labels": Arm(recalibrated_labels, external),
    "refined probabilities": Arm(refined, external),
    "equal shares of the set, by class": Arm(the_set, external),
    "argmax in the set, levels by class": Arm(levels_by_class, external),
    "singletons, by class, over all pixels": Arm(kept_by("class: Singleton"), over_all_pixels),
    "recalibrated probabilities, then joint labels": Arm(recalibrated_alone, then_joint),
    "recalibrated probabilities, then self-reliance for half": Arm(
        recalibrated_alone, partial(then_self, own="probabilities", share=2)
    ),
}


BESIDE = ("labels only", "raw", "recalibrated probabilities")  # what others are compared with


# --- running --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One student to be trained: what it is called in the results, and what it learns from."""

    arm: str
    count: int
    seed: int
    held_out: str
    steps: int
    precision: Precision

    def key(self, size: str) -> Key:
        return (self.arm, str(self.count), str(self.seed), size, self.held_out, str(self.steps))


@dataclass(frozen=True)
class Split:
    """Who trains and who tests."""

    labeled: Frames
    unlabeled: Frames
    test: Frames

    @property
    def size(self) -> str:
        height, width = self.test.labels.shape[1:]
        return f"{height}x{width}"


def config_of(task: Task, split: Split) -> TrainConfig:
    """An arm's recipe with what is the same for all."""
    height, width = split.test.labels.shape[1:]
    return replace(
        ARMS[task.arm].recipe(len(split.test.classes), task.steps, (height, width)),
        scale=(1.0, 1.0),
        labeled_batch=LABELED,
        unlabeled_batch=UNLABELED,
        optimizer="adamw",
        lr=LR,
        class_weights=class_weights_from([split.labeled.labels], len(split.test.classes)),
        clip=1.0,
        ema_decay=DECAY,
        precision=task.precision,
        save_every=200,
        log_every=100,
        bar=False,
        seed=task.seed,
        head_multiplier=1.0,
    )


def split_of(train: Frames, val: Frames, labeled: list[int], held_out: str) -> Split:
    """The frames of a count; those of a held-out video are tested and never trained on."""
    away = [index for index, video in enumerate(train.videos) if video == held_out]
    if held_out and not away:
        raise SystemExit(f"--hold-out must name a video of {sorted(set(train.videos))}")
    chosen, gone = set(labeled), set(away)
    others = [index for index in range(len(train)) if index not in chosen | gone]
    new = train[away]
    test = replace(
        val,
        names=val.names + new.names,
        images=torch.cat((val.images, new.images)),
        logits=torch.cat((val.logits, new.logits)),
        labels=torch.cat((val.labels, new.labels)),
    )
    return Split(train[[index for index in labeled if index not in gone]], train[others], test)


def pairs(of: Frames, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(of.images, labels, strict=True))


def train(
    task: Task, split: Split, directory: Path, until: float
) -> tuple[nn.Module, Tensor] | None:
    """A task's student, trained to the end, and its external labels; None if the time was up."""
    arm = ARMS[task.arm]
    taught = arm.taught(split)
    external = arm.labels(split.labeled, taught)
    torch.manual_seed(task.seed)
    classes = len(split.test.classes)
    trainer = Trainer(
        Student(classes).to(memory_format=torch.channels_last),
        config_of(task, split),
        labeled=pairs(split.labeled, split.labeled.labels),
        unlabeled=pairs(taught, external),
        directory=directory,
        color=COLOR,
        device=torch.device("cpu"),
    )
    for step in trainer.steps(resume=True):
        if time.monotonic() > until and step.number < trainer.objective.steps:
            trainer.save()
            return None
    return trainer.learner.evaluated, external


def row_of(task: Task, split: Split, student: torch.nn.Module, external: Tensor) -> dict[str, str]:
    """What is kept of a run."""
    classes, videos = len(split.test.classes), split.test.videos
    overall = MeanIoU(classes)
    by_video = {video: MeanIoU(classes) for video in sorted(set(videos))}
    with torch.no_grad():
        for image, label, video in zip(split.test.images, split.test.labels, videos, strict=True):
            found = student(NORMALIZE(image[None].float() / 255)).argmax(1)
            by_video[video].update(found, label[None])
            if video != task.held_out:
                overall.update(found, label[None])
    iou = overall.compute(resamples=1)
    quality = SelectiveAccuracy(classes)
    quality.update(hard(external), ARMS[task.arm].taught(split).labels)
    labels = quality.compute(resamples=1)
    videos_iou = {video: round(_miou(metric), 4) for video, metric in by_video.items()}
    per_class = iou.classes.mean_of_pixels.value.tolist()
    return dict(zip(COLUMNS, task.key(split.size), strict=False)) | {
        "commit": commit(),
        "miou": f"{_miou(overall):.4f}",
        "kept": f"{float(labels.kept.mean_of_pixels.value):.4f}",
        "right": f"{float(labels.accuracy_of_kept.mean_of_pixels.value):.4f}",
        "miou_by_video": json.dumps(videos_iou),
        "iou_by_class": json.dumps(
            {
                n: None if isnan(v) else round(v, 3)
                for n, v in zip(split.test.classes, per_class, strict=True)
            }
        ),
        "precision": task.precision,
    }


def hard(external: Tensor) -> Tensor:
    """External labels, or the most likely class of external probabilities."""
    if not external.is_floating_point():
        return external
    best, found = external.max(1)
    return torch.where(best > 0, found, 255)


def _miou(metric: MeanIoU) -> float:
    return float(metric.compute(resamples=1).mean_of_labeled_classes.value)


@cache
def commit() -> str:
    """The commit that this process started from, with a plus if the code is not quite that."""
    git = [which("git") or "git", "-C", str(HERE)]
    code = ["--", str(HERE.parent.parent / "cpseg"), str(HERE)]
    found = subprocess.run(
        [*git, "rev-parse", "--short=9", "HEAD"], check=False, capture_output=True, text=True
    )
    changed = subprocess.run(
        [*git, "status", "--porcelain", *code], check=False, capture_output=True, text=True
    )
    files = [line for line in changed.stdout.splitlines() if line.endswith(".py")]
    return (found.stdout.strip() or "unknown") + ("+" if files else "")


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Whether this process alone holds a file for the while; one that dies lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def rows_of(results: Path) -> dict[Key, dict[str, str]]:
    """The rows of a results file by what was run."""
    if not results.exists():
        return {}
    with results.open(newline="", encoding="utf-8") as file:
        return {tuple(row[c] for c in COLUMNS[:KEYS]): row for row in csv.DictReader(file)}


def append(results: Path, row: dict[str, str]) -> None:
    """Add a row; alone with the file for the while."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if results.stat().st_size == 0:
            writer.writeheader()
        writer.writerow(row)


def run(
    tasks: list[Task],
    splits: Callable[[int, str], Split],
    results: Path,
    *,
    work: Path,
    minutes: float,
) -> None:
    """Train what is not in the results yet, in order, until the time is up."""
    commit()
    until = time.monotonic() + 60 * minutes
    for task in tasks:
        split = splits(task.count, task.held_out)
        key = task.key(split.size)
        place = work / "-".join(key).replace(" ", "_")
        with alone(work / f"{place.name}.lock") as ours:
            if not ours or key in rows_of(results):
                continue
            done = train(task, split, place, until)
            if done is None:
                return
            row = row_of(task, split, *done)
            append(results, row)
            rmtree(place)
            print(row["miou"], *key, flush=True)
        if time.monotonic() > until:
            return


def interval(values: list[float]) -> str:
    """Mean and 95 % t-interval of paired differences, in points."""
    if len(values) < 2:
        return f"{100 * values[0]:+.1f}" if values else ""
    half = float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))
    middle = mean(values)
    return f"{100 * middle:+.1f} [{100 * (middle - half):+.1f}, {100 * (middle + half):+.1f}]"


def table(results: Path) -> str:
    """Mean and spread of each arm, and its paired differences over the seeds two arms share."""
    found: dict[tuple[str, str, str, str], dict[str, dict[str, dict[str, str]]]] = {}
    for (arm, count, seed, size, held_out, steps), row in rows_of(results).items():
        group = found.setdefault((count, size, held_out, steps), {})
        group.setdefault(arm, {})[seed] = row
    lines: list[str] = []
    beside = [f"minus {arm}" for arm in BESIDE]
    for (count, size, held_out, steps), arms in sorted(found.items()):
        tested = sorted(
            {
                v
                for rows in arms.values()
                for row in rows.values()
                for v in json.loads(row["miou_by_video"])
            }
        )
        for video in [held_out] if held_out else tested:
            lines += [
                f"{count} labeled frames, {size}, {int(steps):,} steps, tested on {video}"
                + (", of which no frame trains" if held_out else ""),
                "",
                f"| arm | kept | right | seeds | mIoU | sd | {' | '.join(beside)} |",
                "|---" * (6 + len(BESIDE)) + "|",
            ]
            score = {
                arm: {s: float(json.loads(row["miou_by_video"])[video]) for s, row in rows.items()}
                for arm, rows in arms.items()
            }
            for arm in sorted(arms, key=list(ARMS).index):
                values, any_row = score[arm], next(iter(arms[arm].values()))
                right = any_row["right"].replace("nan", "")
                cells = [arm, any_row["kept"], right, str(len(values))]
                cells.append(f"{100 * mean(values.values()):.1f}")
                cells.append(f"{100 * stdev(values.values()):.1f}" if len(values) > 1 else "")
                for other in BESIDE:
                    pairs = [
                        values[s] - score[other][s] for s in values if s in score.get(other, {})
                    ]
                    cells.append("" if arm == other else interval(pairs))
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


# --- the synthetic run ----------------------------------------------------------------------------


def shapes(length: int, seed: int, video: str) -> Frames:
    """Frames of shapes, annotated with errors."""
    pictures = list(SyntheticShapes(length=length, size=(32, 32), seed=seed))
    labels = torch.stack([label for _, label in pictures]).long()
    # Some rules name a class of the real frames.
    classes = ["Road", "Building", *SyntheticShapes.classes[2:]]
    annotator = SyntheticAnnotator(num_classes=len(classes), error_rate=0.2, seed=1)
    return Frames(
        [f"{video}_{index}" for index in range(length)],
        classes,
        torch.stack([image for image, _ in pictures]),
        annotator(labels, seeds=range(length)),
        labels,
    )


def quick(arms: Iterable[str], steps: int, seeds: Iterable[int], folder: Path) -> str:
    """Everything on shapes, cut once on the way: the table."""
    train_frames, val = shapes(40, 2, "train0"), shapes(12, 3, "valid0")
    tasks = [Task(arm, 20, seed, "", steps, "fp32") for arm in arms for seed in seeds]

    @cache
    def splits(count: int, held_out: str) -> Split:
        return split_of(train_frames, val, list(range(count)), held_out)

    results = folder / "students.csv"
    run(tasks, splits, results, work=folder / "work", minutes=0)
    run(tasks, splits, results, work=folder / "work", minutes=60)
    return table(results)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME")
    parser.add_argument("--counts", nargs="+", type=int, default=[46])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=STEPS, help="whether they are enough")
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16")
    parser.add_argument("--whole", action="store_true", help="images of twice the size")
    parser.add_argument("--hold-out", default="", metavar="VIDEO")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    if given.quick:
        with TemporaryDirectory() as folder:
            print(quick(ARMS, 30, (0, 1), Path(folder)))
        return
    if given.table:
        page = table(given.results)
        print(page)
        given.results.with_suffix(".md").write_text(page, encoding="utf-8")
        return
    if given.data is None:
        parser.error("--data must name the folder of frames, unless --quick or --table is given")
    train_frames, val = (
        frames.load(given.data, part, whole=given.whole) for part in ("train", "val")
    )

    @cache
    def splits(count: int, held_out: str) -> Split:
        labeled = frames.labeled(given.data, count, train_frames)
        return split_of(train_frames, val, labeled, held_out)

    tasks = [
        Task(arm, count, seed, given.hold_out, given.steps, given.precision)
        for count, seed, arm in product(given.counts, given.seeds, given.arms)
    ]
    others: list[int] = []
    for _ in range(given.jobs - 1):  # they share the frames in memory
        others.append(os.fork())
        if not others[-1]:
            others = []
            break
    run(tasks, splits, given.results, work=given.work, minutes=given.minutes)
    for process in others:
        os.waitpid(process, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
