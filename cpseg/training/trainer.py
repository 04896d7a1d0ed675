"""One training loop, written out.

The loop is a generator: it yields after each step, and what a callback would do stands in the
body of the caller's own ``for``.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from cpseg import _checks
from cpseg.data.folder import SegmentationFolder
from cpseg.data.transforms import ColorJitter, RandomCrop
from cpseg.errors import FileError, InputError, StateError
from cpseg.training.batches import Batches, BatchKey, Labeled, Normalize, load
from cpseg.training.chance import generator_for
from cpseg.training.checkpoints import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    seed_everything,
    set_random_state,
)
from cpseg.training.distributed import Processes, processes
from cpseg.training.evaluation import Evaluation, evaluate
from cpseg.training.journal import Journal
from cpseg.training.learner import Learner
from cpseg.training.objective import Batch, Stage, TwoStageObjective, check_external
from cpseg.training.train_config import TrainConfig

__all__ = ["FitResult", "Step", "Trainer"]

_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """A step that is done, with everything that belongs to it.

    Attributes:
        number: How many steps are done.
        stage: Name of its stage.
        loss: The weighted loss, a scalar on the device.
        metrics: Its parts; see :class:`~cpseg.training.objective.StepOutput`.
        evaluation: Of the teacher if there is one, else of the student, where one was due.
    """

    number: int
    stage: str
    loss: Tensor
    metrics: dict[str, Tensor]
    evaluation: Evaluation | None


@final
@dataclass(frozen=True, slots=True)
class FitResult:
    """How training ended.

    Attributes:
        steps: How many steps were done.
        best_miou: The best mIoU of all evaluations, chosen on the images it was measured on; NaN
            without validation images.
        best_step: When that was.
        last_miou: The mIoU at the end; NaN without validation images.
        stopped: Whether training stopped before its time.
    """

    steps: int
    best_miou: float
    best_step: int
    last_miou: float
    stopped: bool


@final
class Trainer:
    """Trains a student stage by stage, on one process or on those of the environment.

    A checkpoint holds all that later steps depend on, so a run that was killed and resumed ends
    with the same bits as one that was not, on a CPU and with as many processes. Training owns the
    global random state of its process: it is seeded at the start and put back on resuming.

    Args:
        student: From images to logits; moved to ``device`` and trained in place.
        config: The run.
        labeled: Images with labels.
        unlabeled: Images with external labels, ``ignore_index`` where there are none; None if no
            stage uses them.
        validation: Images with labels to evaluate on; None: no evaluation.
        directory: Where checkpoints and the log go: ``last.pt``, ``best.pt``, ``log.jsonl``.
        color: The colors of strong views.
        annotator: Makes the external labels, int64 ``(U, H, W)``, from the normalized crops,
            ``(U, 3, H, W)`` on the device, in every stage that asks for external labels; see
            :class:`~cpseg.training.plugin.OnlineAnnotator`. Those of ``unlabeled`` are not looked
            at then. Frozen, and the same one where a run is resumed. None: the labels of
            ``unlabeled``.
        device: Where to train; None: the process's GPU if there is one, else the CPU.

    Raises:
        InputError: If a dataset is empty or missing or has no labels where some are needed, or
            ``head`` names no parameter.
    """

    def __init__(
        self,
        student: nn.Module,
        config: TrainConfig,
        *,
        labeled: Labeled,
        unlabeled: Labeled | None = None,
        validation: Labeled | None = None,
        directory: str | Path,
        color: ColorJitter = ColorJitter(),
        annotator: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.objective: TwoStageObjective = TwoStageObjective(
            config.stages,
            config.ignore_index,
            config.seed,
            config.num_classes,
            config.class_weights,
        )
        self.directory: Path = Path(directory)
        self.validation = validation
        self.annotator = annotator
        self.normalize: Normalize = Normalize(config.mean, config.std)
        wanted = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.processes: Processes = processes(wanted)
        if wanted == torch.device("cuda"):
            wanted = torch.device("cuda", self.processes.local_rank)
        self.device = wanted
        if unlabeled is None and any(stage.source != "none" for stage in config.stages):
            raise InputError("unlabeled must be a dataset where a stage uses one; got None")
        external = any(stage.source == "external" or stage.merge for stage in config.stages)
        for name, dataset, needed in (
            ("labeled", labeled, True),
            ("unlabeled", unlabeled, external and annotator is None),
            ("validation", validation, True),
        ):
            if isinstance(dataset, SegmentationFolder) and needed and not dataset.has_labels():
                raise InputError(
                    f"{name} must have labels, from masks or load_labels; got {len(dataset)} "
                    "images without"
                )
        if validation is not None and len(validation) == 0:
            raise InputError("validation must hold at least one image; got none")
        self.batches: Batches = Batches(
            labeled,
            unlabeled,
            num_classes=config.num_classes,
            crop=RandomCrop(config.crop, config.scale),
            color=color,
            normalize=self.normalize,
            ignore_index=config.ignore_index,
            seed=config.seed,
        )
        self.learner: Learner = Learner(
            student, config, device=self.device, processes=self.processes
        )
        self._labeled_seen = 0
        self._unlabeled_seen = 0
        self._strange = torch.zeros((), dtype=torch.int64, device=self.device)
        self.number: int = 0
        self.best_miou: float = float("nan")
        self.best_step: int = 0
        self.last_miou: float = float("nan")
        self._stale = 0
        self.stopped: bool = False

    @property
    def student(self) -> nn.Module:
        """The bare network that is trained."""
        return self.learner.student

    def fit(self, *, resume: bool = False) -> FitResult:
        """Train to the end: :meth:`steps` with nothing in the loop's body."""
        for _ in self.steps(resume=resume):
            pass
        return self.result()

    def result(self) -> FitResult:
        """How training stands."""
        return FitResult(self.number, self.best_miou, self.best_step, self.last_miou, self.stopped)

    def steps(self, *, resume: bool = False) -> Iterator[Step]:
        """Train, yielding after each step, when its evaluation and checkpoint are done.

        Args:
            resume: Go on from ``last.pt``, or start if there is none.

        Raises:
            StateError: If ``directory`` holds a run and ``resume`` is off.
            FileError: If the checkpoint is damaged or of another configuration, or the headers of
                a :class:`~cpseg.data.folder.SegmentationFolder` show files that are wrong; all
                are named, before anything is written.
            InputError: If the annotator's labels are no classes, before a checkpoint is written,
                or have another shape.
        """
        self._prepare(resume=resume)
        config, total = self.config, self.objective.steps
        batches = load(
            self.batches,
            self._keys(),
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )
        self.learner.network.train()
        writes = self.processes.rank == 0
        with (
            Journal(self.directory, done=self.number, total=total, bar=config.bar)
            if writes
            else nullcontext()
        ) as journal:
            start = time.perf_counter()
            while self.number < total and not self.stopped:
                stage, progress = self.objective.stage_at(self.number)
                parts = [next(batches).to(self.device) for _ in range(config.accumulate)]
                loss, metrics = self.advance(parts)
                done = self.number == total
                logged = done or _due(self.number, config.log_every)
                evaluated = done or _due(self.number, config.evaluate_every)
                saved = done or _due(self.number, config.save_every)
                if self.annotator is not None and (logged or evaluated or saved):
                    self._check_annotator()
                evaluation = self._evaluate() if evaluated else None
                if journal is not None and logged:
                    values = {
                        "loss": float(loss),
                        **{name: float(value) for name, value in metrics.items()},
                        "labeled_weight": stage.labeled_weight(progress),
                        "unlabeled_weight": stage.unlabeled_weight(progress),
                        "lr": float(self.learner.optimizer.param_groups[0]["lr"]),
                        "seconds": time.perf_counter() - start,
                    }
                    journal.step(self.number, stage.name, values)
                if journal is not None and evaluation is not None:
                    of = "student" if self.learner.teacher is None else "teacher"
                    best = (self.best_miou, self.best_step)
                    journal.evaluation(self.number, evaluation, of=of, best=best)
                if saved or self.stopped:
                    self.save()
                yield Step(self.number, stage.name, loss, metrics, evaluation)

    def advance(self, parts: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        """One step; the loop's own, for loops that bring their batches themselves.

        Args:
            parts: As many batches as ``accumulate``, on the device.

        Returns:
            The loss and its parts, means over ``parts``, that no one has waited for.
        """
        config = self.config
        stage, _ = self.objective.stage_at(self.number)
        if self.annotator is not None and (stage.source == "external" or stage.merge):
            parts = [self._annotated(batch, self.annotator) for batch in parts]
        if len(parts[0].weak):
            for each in config.stages:  # one data set serves all: do not wait for the last
                check_external(each, parts[0].external)
        found = self.learner.step(self.objective, parts, self.number)
        self.number += 1
        key = self._key(stage)
        self._labeled_seen += key.num_labeled * config.accumulate * self.processes.count
        self._unlabeled_seen += key.num_unlabeled * config.accumulate * self.processes.count
        return found

    def save(self) -> None:
        """Write ``last.pt``; every process must call it."""
        random_states = self.processes.all_of(random_state(self.device))
        if self.processes.rank == 0:
            save_checkpoint(self.directory / "last.pt", self._state(random_states))
        self.processes.wait()

    def _state(self, random_states: list[object]) -> dict[str, object]:
        return {
            "run": self.config.fingerprint(),
            **self.learner.state(),
            "number": self.number,
            "stage": self.objective.stage_at(max(self.number - 1, 0))[0].name,
            "labeled_seen": self._labeled_seen,
            "unlabeled_seen": self._unlabeled_seen,
            "best": [self.best_miou, self.best_step, self.last_miou, self._stale, self.stopped],
            "random": random_states,
            "torch": str(torch.__version__),
        }

    def _prepare(self, *, resume: bool) -> None:
        """Start afresh, or take over what the checkpoint holds."""
        self._check_files()
        path = self.directory / "last.pt"
        if self.processes.rank == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
        if self.number:
            raise StateError(f"a trainer must be iterated once; got one at step {self.number}")
        self.processes.wait()
        rank = self.processes.rank
        if not path.exists():
            # Read before anyone writes: the ranks agree on whether there is a checkpoint.
            self.processes.wait()
            seed_everything(generator_for(self.config.seed, "global", rank).initial_seed())
            return
        if not resume:
            raise StateError(
                f"{self.directory} must hold no run yet; got {path.name}. "
                "Go on with resume=True, or choose another directory"
            )
        state = load_checkpoint(path)
        self.processes.wait()
        self._restore(path, state)

    def _check_files(self) -> None:
        """Each process looks at its share of the files; all of them raise for all that is wrong."""
        rank, count = self.processes.rank, self.processes.count
        own: list[str] = []
        for name, dataset in (
            ("labeled", self.batches.labeled),
            ("unlabeled", self.batches.unlabeled),
            ("validation", self.validation),
        ):
            if isinstance(dataset, SegmentationFolder):
                found = dataset.faults(range(rank, len(dataset), count))
                own.extend(f"{name}: {fault}" for fault in found)
        faults = [fault for part in self.processes.all_of(own) for fault in cast("list[str]", part)]
        if faults:
            raise FileError(
                f"datasets must hold sound files; got {len(faults)} that are not:\n"
                + "\n".join(faults)
            )

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        if state["run"] != self.config.fingerprint():
            raise FileError(f"{path} is of another configuration; resume with its own")
        self.learner.restore(state)
        self.number = state["number"]
        self._labeled_seen = state["labeled_seen"]
        self._unlabeled_seen = state["unlabeled_seen"]
        self.best_miou, self.best_step, self.last_miou, self._stale, self.stopped = state["best"]
        known: list[dict[str, Any]] = state["random"]
        if len(known) != self.processes.count and self.processes.rank == 0:
            _log.warning(
                "%s was written by %d process%s and is resumed by %d: a step sees %d labeled and "
                "%d unlabeled images instead of %d and %d, the learning rate is unchanged, "
                "dropout draws other numbers, and sums are rounded in another order. No sample is "
                "skipped or repeated",
                path,
                len(known),
                "" if len(known) == 1 else "es",
                self.processes.count,
                *(
                    size * self.config.accumulate * count
                    for count in (self.processes.count, len(known))
                    for size in (self.config.labeled_batch, self.config.unlabeled_batch)
                ),
            )
        rank = self.processes.rank
        if rank < len(known):
            set_random_state(known[rank], self.device)
        else:
            seed_everything(
                generator_for(self.config.seed, "global", rank, self.number).initial_seed()
            )

    def _key(self, stage: Stage) -> BatchKey:
        unlabeled = self.config.unlabeled_batch if stage.source != "none" else 0
        return BatchKey(0, 0, self.config.labeled_batch, unlabeled, stage.strong_views)

    def _keys(self) -> Iterator[BatchKey]:
        """This process's batches, from where training stands to its end."""
        labeled, unlabeled = self._labeled_seen, self._unlabeled_seen
        rank, count = self.processes.rank, self.processes.count
        for number in range(self.number, self.objective.steps):
            stage, _ = self.objective.stage_at(number)
            key = self._key(stage)
            for _ in range(self.config.accumulate):
                yield BatchKey(
                    labeled + rank * key.num_labeled,
                    unlabeled + rank * key.num_unlabeled,
                    key.num_labeled,
                    key.num_unlabeled,
                    key.strong_views,
                )
                labeled += count * key.num_labeled
                unlabeled += count * key.num_unlabeled

    def _annotated(self, batch: Batch, annotator: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with the annotator's labels; values that are no classes are counted."""
        ignore = self.config.ignore_index
        with torch.no_grad():
            found = annotator(batch.weak)
        _checks.check_integers("annotator's labels", found)
        if found.shape != batch.valid.shape:
            raise InputError(
                "annotator must return labels of shape "
                f"{_checks.describe(batch.valid.shape)}, one per pixel; "
                f"got {_checks.describe(found.shape)}"
            )
        found = found.long()
        known = (found >= 0) & (found < self.config.num_classes)
        self._strange += (~known & (found != ignore)).sum()
        return replace(batch, external=torch.where(known, found, ignore))

    def _check_annotator(self) -> None:
        """Raise for what was counted; waits for the device."""
        count = int(self.processes.sum(self._strange.clone()))
        if count:
            raise InputError(
                f"annotator must return classes in [0, {self.config.num_classes}) or "
                f"{self.config.ignore_index}; got {count} pixels that are neither"
            )

    def _evaluate(self) -> Evaluation | None:
        if self.validation is None:
            return None
        config = self.config
        evaluation = evaluate(
            self.learner.evaluated,
            self.validation,
            num_classes=config.num_classes,
            normalize=self.normalize,
            ignore_index=config.ignore_index,
            divisor=config.divisor,
            device=self.device,
            processes=self.processes,
        )
        self.last_miou = evaluation.miou
        if not self.last_miou <= self.best_miou:  # NaN: the first
            self.best_miou, self.best_step, self._stale = self.last_miou, self.number, 0
            if self.processes.rank == 0:
                state = self.learner.state()
                best = {key: state[key] for key in ("student", "teacher")}
                best |= {"number": self.number, "miou": self.last_miou}
                save_checkpoint(self.directory / "best.pt", best)
        else:
            self._stale += 1
            self.stopped = config.patience is not None and self._stale >= config.patience
        return evaluation


def _due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0
