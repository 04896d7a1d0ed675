"""What an annotator's labels are worth to a student, by how they were filtered.

The same small U-Net is trained on the labeled frames of a split and, in all arms but the first,
on external labels of the other frames; ``arms.py`` says what an arm is, ``student.py`` and the
constants here what is the same for all. They were settled on seed 100 and on val; seeds 0 to 4
count.
Every run is one row of a results file. A row that is there is not run again, a run that was cut
goes on where it stopped, and several processes may work on one file; ``standings.py`` says how the
arms stand.

    python benchmarks/evidence/students.py --data PATH [--arms NAME ...] [--counts 46 ...]
        [--seeds 0 1 2 3 4] [--steps 1500] [--hold-out VIDEO] [--whole] [--minutes 50]
        [--precision fp32] [--jobs 2] [--results FILE] [--work FOLDER]
    python benchmarks/evidence/students.py --quick [--arms NAME ...] [--seeds 0 1] [--steps 30]

Rows of other frames than those of the file need a file of their own, ``--results``, and runs that
are not done a folder, ``--work``. Where the processor has no bfloat16, ``--precision fp32`` is many
times as fast.

With ``--hold-out`` no frame of that video trains or calibrates, labeled or not, and its frames
are tested beside val's. ``--quick`` is the whole way on synthetic shapes in little time, and its
numbers mean nothing.
"""

import argparse
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product
from math import isnan
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import frames
import torch
from arms import ARMS, Arm
from frames import Frames, Split, split_of
from rows import COLUMNS, RESULTS, Key, append, other_data, rows_of
from standings import table
from student import DECAY, LABELED, LR, UNLABELED, Student, labels_of
from tables import COMMIT
from torch import Tensor, nn

from cpseg.annotators import SyntheticAnnotator
from cpseg.data import ColorJitter, SyntheticShapes
from cpseg.metrics import MeanIoU, SelectiveAccuracy
from cpseg.training import TrainConfig, Trainer, class_weights_from

# Of runs that are not done.
WORK = Path(__file__).parents[2] / "build" / "evidence-students"
Precision = Literal["fp32", "bf16"]  # bfloat16 is slow where the processor does not have it

# The same for all arms; STEPS are the optimizer's, whatever a step sees.
STEPS = 1500
COLOR = ColorJitter(strength=0.25, hue=0.02, gray=0.0, blur=0.25)  # of strong views


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


def pairs(of: Frames, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(of.images, labels, strict=True))


def train(
    task: Task, split: Split, external: Tensor, directory: Path, until: float
) -> nn.Module | None:
    """A task's student, trained to the end; None if the time was up."""
    taught = ARMS[task.arm].taught(split)
    torch.manual_seed(task.seed)
    classes = len(split.test.classes)
    trainer = Trainer(
        Student(classes),
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
    return trainer.learner.evaluated


def row_of(task: Task, split: Split, student: torch.nn.Module, external: Tensor) -> dict[str, str]:
    """What is kept of a run."""
    classes, videos = len(split.test.classes), split.test.videos
    overall = MeanIoU(classes)
    by_video = {video: MeanIoU(classes) for video in sorted(set(videos))}
    said = labels_of(student, split.test.images)
    for found, label, video in zip(said, split.test.labels, videos, strict=True):
        by_video[video].update(found[None], label[None])
        if video != task.held_out:
            overall.update(found[None], label[None])
    iou = overall.compute(resamples=1)
    quality = SelectiveAccuracy(classes)
    quality.update(hard(external), ARMS[task.arm].taught(split).labels)
    labels = quality.compute(resamples=1)
    videos_iou = {video: round(_miou(metric), 4) for video, metric in by_video.items()}
    per_class = iou.classes.mean_of_pixels.value.tolist()
    return dict(zip(COLUMNS, task.key(split.size), strict=False)) | {
        "commit": COMMIT,
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


def run(
    tasks: list[Task],
    splits: Callable[[int, str], Split],
    results: Path,
    *,
    work: Path,
    minutes: float,
    data: str,
) -> None:
    """Train what is not in the results yet, in order, until the time is up."""
    until = time.monotonic() + 60 * minutes

    @lru_cache(maxsize=1)  # some take minutes, and the seeds of an arm share them
    def external(arm: Arm, count: int, held_out: str) -> Tensor:
        split = splits(count, held_out)
        return arm.labels(split.labeled, arm.taught(split))

    there = 0
    for task in tasks:
        split = splits(task.count, task.held_out)
        key = task.key(split.size)
        place = work / "-".join(key).replace(" ", "_")
        with alone(work / f"{place.name}.lock") as ours:
            if not ours or key in rows_of(results):
                there += 1
                continue
            labels = external(ARMS[task.arm], task.count, task.held_out)
            student = train(task, split, labels, place, until)
            if student is None:
                break
            row = row_of(task, split, student, labels)
            append(results, row | {"data": data})
            rmtree(place)
            print(row["miou"], *key, flush=True)
        if time.monotonic() > until:
            break
    print(f"{there} of {len(tasks)} runs were there or are another process's")


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
    for minutes in (0, 60):
        run(tasks, splits, results, work=folder / "work", minutes=minutes, data="shapes")
    return table(results)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME")
    parser.add_argument("--counts", nargs="+", type=int, default=[46])
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--steps", type=int, help="whether they are enough")
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16")
    parser.add_argument("--whole", action="store_true", help="images of twice the size")
    parser.add_argument("--hold-out", default="", metavar="VIDEO")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    if given.quick:
        with TemporaryDirectory() as folder:
            print(quick(given.arms, given.steps or 30, given.seeds or (0, 1), Path(folder)))
        return
    if given.data is None:
        parser.error("--data must name the folder of frames, unless --quick is given")
    data = frames.fingerprint(given.data)
    if other_data(given.results, data):
        parser.error(f"{given.results} has rows of other frames; name another with --results")
    train_frames, val = (
        frames.load(given.data, part, whole=given.whole) for part in ("train", "val")
    )

    @cache
    def splits(count: int, held_out: str) -> Split:
        labeled = frames.labeled(given.data, count, train_frames)
        return split_of(train_frames, val, labeled, held_out)

    tasks = [
        Task(arm, count, seed, given.hold_out, given.steps or STEPS, given.precision)
        for count, arm, seed in product(given.counts, given.arms, given.seeds or range(5))
    ]
    others: list[int] = []
    for _ in range(given.jobs - 1):  # they share the frames in memory
        others.append(os.fork())
        if not others[-1]:
            others = []
            break
    run(tasks, splits, given.results, work=given.work, minutes=given.minutes, data=data)
    for process in others:
        os.waitpid(process, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
