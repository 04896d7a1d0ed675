"""One training loop, written out.

The loop is a generator: it yields after each step, and what a callback would do stands in the
body of the caller's own ``for``.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from math import isnan
from pathlib import Path
from typing import Any, Literal, TextIO, cast, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpseg import _checks
from cpseg.data.transforms import ColorJitter, RandomCrop
from cpseg.errors import FileError, InputError, StateError
from cpseg.training.averaging import MovingAverage
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
from cpseg.training.objective import Batch, Stage, TwoStageObjective
from cpseg.training.schedules import Poly

__all__ = ["FitResult", "Step", "TrainConfig", "Trainer"]

_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything about a training run but its network and its data.

    Attributes:
        num_classes: Number of classes, C.
        stages: What the student learns from, one after the other; lengths are in steps.
        crop: Height and width of training images.
        scale: The smallest and the largest factor of a random resize before the crop.
        labeled_batch: Labeled images per forward pass and process.
        unlabeled_batch: Unlabeled images per forward pass and process.
        accumulate: Forward passes per step; each has its own denominators, and their mean counts.
        optimizer: ``"sgd"`` or ``"adamw"``.
        lr: Learning rate at the start; it falls by ``(1 - progress) ** poly_power`` over all
            stages together.
        momentum: Of SGD.
        weight_decay: On every parameter.
        poly_power: How the learning rate falls.
        head: First parts of the names of the parameters that learn ``head_multiplier`` times as
            fast.
        head_multiplier: How much faster; at 1 ``head`` does not matter.
        clip: The largest norm of the gradient; None: any.
        ema_decay: Of the averaged teacher; None: there is no teacher.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``; fp16 scales the loss.
        compile: Whether the student is compiled, in place; not the teacher, nor evaluation.
        global_denominator: Whether losses are divided by what all processes count together,
            rather than each by its own.
        mean: Of each color, subtracted from images in ``[0, 1]``.
        std: Of each color, what they are divided by then.
        divisor: Images to evaluate are padded to multiples of it.
        ignore_index: Label of pixels that do not count.
        evaluate_every: Steps between evaluations; None: at the end alone.
        save_every: Steps between checkpoints; None: at the end alone.
        log_every: Steps between lines of the log.
        patience: Evaluations without a better mIoU after which training stops; None: never.
        workers: Processes that make batches ahead of time; 0: none.
        seed: Of all chance.
    """

    num_classes: int
    stages: tuple[Stage, ...]
    crop: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    labeled_batch: int = 2
    unlabeled_batch: int = 2
    accumulate: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    poly_power: float = 0.9
    head: tuple[str, ...] = ("head",)
    head_multiplier: float = 1.0
    clip: float | None = None
    ema_decay: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    global_denominator: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    divisor: int = 1
    ignore_index: int = 255
    evaluate_every: int | None = None
    save_every: int | None = None
    log_every: int = 10
    patience: int | None = None
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _checks.check_integer("num_classes", self.num_classes, 1)
        _checks.check_ignore_index(self.ignore_index, self.num_classes)
        for name in ("labeled_batch", "unlabeled_batch", "accumulate", "log_every", "divisor"):
            _checks.check_integer(name, getattr(self, name), 1)
        for name in ("evaluate_every", "save_every", "patience"):
            if getattr(self, name) is not None:
                _checks.check_integer(name, getattr(self, name), 1)
        _checks.check_integer("workers", self.workers, 0)
        for name in ("lr", "momentum", "weight_decay", "poly_power", "head_multiplier"):
            _checks.check_weight(name, getattr(self, name))
        if self.optimizer not in ("sgd", "adamw"):
            raise InputError(f'optimizer must be "sgd" or "adamw"; got {self.optimizer!r}')
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise InputError(f'precision must be "fp32", "bf16" or "fp16"; got {self.precision!r}')
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip must be greater than 0; got {self.clip!r}")
        if self.ema_decay is None and any(stage.source == "teacher" for stage in self.stages):
            raise InputError('ema_decay must be given for a stage of source "teacher"; got None')
        if self.compile and any(stage.perturb for stage in self.stages):
            raise InputError("compile must be off where a stage perturbs submodules; got True")
        TwoStageObjective(self.stages)


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
        device: Where to train; None: the process's GPU if there is one, else the CPU.

    Raises:
        InputError: If a dataset is empty or missing, or ``head`` names no parameter.
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
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.objective: TwoStageObjective = TwoStageObjective(
            config.stages, config.ignore_index, config.seed
        )
        self.directory: Path = Path(directory)
        self.validation = validation
        self.normalize: Normalize = Normalize(config.mean, config.std)
        wanted = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.processes: Processes = processes(wanted)
        if wanted == torch.device("cuda"):
            wanted = torch.device("cuda", self.processes.local_rank)
        self.device = wanted
        if unlabeled is None and any(stage.source != "none" for stage in config.stages):
            raise InputError("unlabeled must be a dataset where a stage uses one; got None")
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
        self.student: nn.Module = student.to(self.device)
        self.teacher: MovingAverage | None = (
            None if config.ema_decay is None else MovingAverage(student, config.ema_decay)
        )
        self.optimizer: torch.optim.Optimizer = _optimizer(student, config)
        self.scaler: torch.amp.GradScaler = torch.amp.GradScaler(
            self.device.type, enabled=config.precision == "fp16"
        )
        self._labeled_seen = 0
        self._unlabeled_seen = 0
        self.number = 0
        self.best_miou = float("nan")
        self.best_step = 0
        self.last_miou = float("nan")
        self._stale = 0
        self.stopped = False
        self._wrapped: nn.Module | None = None

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
            FileError: If the checkpoint is damaged or of another configuration.
        """
        self._prepare(resume=resume)
        config = self.config
        batches = load(
            self.batches,
            self._keys(),
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )
        self._wrap().train()
        with ExitStack() as stack:
            journal = _Journal(self, stack) if self.processes.rank == 0 else None
            start = time.perf_counter()
            while self.number < self.objective.steps and not self.stopped:
                stage, _ = self.objective.stage_at(self.number)
                parts = [next(batches).to(self.device) for _ in range(config.accumulate)]
                loss, metrics = self.advance(parts)
                done = self.number == self.objective.steps
                evaluation = None
                if done or _due(self.number, config.evaluate_every):
                    evaluation = self._evaluate()
                if journal is not None and (done or _due(self.number, config.log_every)):
                    journal.step(stage, loss, metrics, time.perf_counter() - start)
                if journal is not None and evaluation is not None:
                    journal.evaluation(evaluation)
                if done or _due(self.number, config.save_every) or self.stopped:
                    self.save()
                yield Step(self.number, stage.name, loss, metrics, evaluation)

    def advance(self, parts: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        """One step: forward and backward through each part, then the optimizer and the teacher.

        Args:
            parts: As many batches as ``accumulate``, on the device.

        Returns:
            The loss and its parts, means over ``parts``, that no one has waited for.
        """
        config, network = self.config, self._wrap()
        stage, _ = self.objective.stage_at(self.number)
        rate = Poly(config.lr, config.poly_power)(self.number / self.objective.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * cast("float", group["multiplier"])
        labeler = self.student
        if stage.source == "teacher" and self.teacher is not None:
            labeler = self.teacher.module
        share = self.processes.mean if config.global_denominator else None
        outputs: list[tuple[Tensor, dict[str, Tensor]]] = []
        for index, batch in enumerate(parts):
            last = index == len(parts) - 1
            with _unsynchronized(network, last=last), self._autocast():
                output = self.objective(
                    network,
                    batch,
                    step=self.number,
                    labeler=labeler,
                    part=self.processes.rank * config.accumulate + index,
                    share=share,
                )
                torch.autograd.backward(self.scaler.scale(output.loss / len(parts)))
            outputs.append((output.loss.detach(), output.metrics))
        if config.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.student.parameters(), config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.teacher is not None:
            self.teacher.update(self.student)
        self.number += 1
        key = self._key(stage)
        self._labeled_seen += key.num_labeled * config.accumulate * self.processes.count
        self._unlabeled_seen += key.num_unlabeled * config.accumulate * self.processes.count
        if len(outputs) == 1:
            return outputs[0]
        metrics = {
            name: torch.stack([each[name] for _, each in outputs]).mean() for name in outputs[0][1]
        }
        return torch.stack([loss for loss, _ in outputs]).mean(), metrics

    def save(self) -> None:
        """Write ``last.pt``; every process must call it."""
        random_states = self.processes.all_of(random_state(self.device))
        if self.processes.rank == 0:
            save_checkpoint(self.directory / "last.pt", self._state(random_states))
        self.processes.wait()

    def _state(self, random_states: list[object]) -> dict[str, object]:
        return {
            "run": _fingerprint(self.config),
            "student": self.student.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.module.state_dict(),
            "teacher_updates": 0 if self.teacher is None else self.teacher.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
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

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        if state["run"] != _fingerprint(self.config):
            raise FileError(f"{path} is of another configuration; resume with its own")
        self.student.load_state_dict(state["student"])
        if self.teacher is not None:
            self.teacher.module.load_state_dict(state["teacher"])
            self.teacher.updates = state["teacher_updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.number = state["number"]
        self._labeled_seen = state["labeled_seen"]
        self._unlabeled_seen = state["unlabeled_seen"]
        self.best_miou, self.best_step, self.last_miou, self._stale, self.stopped = state["best"]
        known: list[dict[str, Any]] = state["random"]
        if len(known) != self.processes.count and self.processes.rank == 0:
            _log.warning(
                "%s was written by %d processes and is resumed by %d: a step sees %d labeled and "
                "%d unlabeled images instead of %d and %d, the learning rate is unchanged, "
                "dropout draws other numbers, and sums are rounded in another order. No sample is "
                "skipped or repeated",
                path,
                len(known),
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

    def _wrap(self) -> nn.Module:
        """The student as it is trained: compiled in place, then wrapped for its processes."""
        if self._wrapped is None:
            if self.config.compile:
                self.student.compile()
            self._wrapped = self.student
            if self.processes.count > 1:
                self._wrapped = DistributedDataParallel(
                    self.student,
                    device_ids=[self.device] if self.device.type == "cuda" else None,
                    broadcast_buffers=False,  # several forward passes before one backward
                )
        return self._wrapped

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

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

    def _evaluate(self) -> Evaluation | None:
        if self.validation is None:
            return None
        config = self.config
        network = self.student if self.teacher is None else self.teacher.module
        evaluation = evaluate(
            network,
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
                save_checkpoint(
                    self.directory / "best.pt",
                    {
                        "student": self.student.state_dict(),
                        "teacher": None if self.teacher is None else network.state_dict(),
                        "number": self.number,
                        "miou": self.last_miou,
                    },
                )
        else:
            self._stale += 1
            self.stopped = config.patience is not None and self._stale >= config.patience
        return evaluation


@final
class _Journal:
    """Lines of JSON, always; a bar and TensorBoard where they are installed."""

    def __init__(self, trainer: Trainer, stack: ExitStack) -> None:
        self.trainer = trainer
        path = trainer.directory / "log.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        kept = [line for line in map(_line, lines) if line and line["step"] <= trainer.number]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        self.file: TextIO = stack.enter_context(path.open("a", encoding="utf-8"))
        self.bar = _progress_bar(trainer, stack)
        self.board = _tensorboard(trainer.directory, trainer.number, stack)

    def step(self, stage: Stage, loss: Tensor, metrics: dict[str, Tensor], seconds: float) -> None:
        """Write a step's numbers; waits for the device."""
        trainer = self.trainer
        _, progress = trainer.objective.stage_at(trainer.number - 1)
        values = {
            "loss": float(loss),
            **{name: float(value) for name, value in metrics.items()},
            "labeled_weight": stage.labeled_weight(progress),
            "unlabeled_weight": stage.unlabeled_weight(progress),
            "lr": float(trainer.optimizer.param_groups[0]["lr"]),
            "seconds": seconds,
        }
        self._write({"step": trainer.number, "stage": stage.name, **values})
        for name, value in values.items():
            self._plot(name, value)
        if self.bar is not None:
            self.bar.n = trainer.number
            self.bar.set_postfix(stage=stage.name, loss=f"{values['loss']:.3f}")

    def evaluation(self, evaluation: Evaluation) -> None:
        """Write an evaluation, with the best so far."""
        trainer = self.trainer
        iou: list[float] = evaluation.iou.tolist()
        values: dict[str, object] = {
            "miou": evaluation.miou,
            "miou_absent_as_zero": evaluation.miou_absent_as_zero,
            "best_miou": trainer.best_miou,
            "best_step": trainer.best_step,
            "of": "student" if trainer.teacher is None else "teacher",
            "iou": [None if isnan(value) else value for value in iou],
        }
        self._write({"step": trainer.number, **values})
        self._plot("miou", evaluation.miou)

    def _write(self, values: dict[str, object]) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def _plot(self, name: str, value: float) -> None:
        if self.board is not None:
            self.board.add_scalar(name, value, self.trainer.number)


def _due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0


def _unsynchronized(network: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Gradients meet once a step, in its last backward pass."""
    if last or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def _optimizer(student: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    head: list[nn.Parameter] = []
    body: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            matches = any(name == part or name.startswith(f"{part}.") for part in config.head)
            (head if matches else body).append(parameter)
    if config.head_multiplier != 1 and not head:
        raise InputError(
            f"head must name parameters of the student where head_multiplier is not 1; "
            f"got {config.head}"
        )
    groups: list[dict[str, Any]] = [
        {"params": parameters, "multiplier": multiplier}
        for parameters, multiplier in ((body, 1.0), (head, config.head_multiplier))
        if parameters
    ]
    if not groups:
        raise InputError("student must have parameters to train; got none")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )


def _fingerprint(config: TrainConfig) -> str:
    """All that a run's numbers depend on; what it prints and keeps may change on resuming."""
    return repr(replace(config, workers=0, log_every=1, save_every=None))


def _line(text: str) -> dict[str, Any] | None:
    """A line of the log; None for one that a killed process left unfinished."""
    try:
        return cast("dict[str, Any]", json.loads(text))
    except ValueError:
        return None


def _progress_bar(trainer: Trainer, stack: ExitStack) -> Any:  # tqdm is optional
    try:
        tqdm: Any = import_module("tqdm")
    except ImportError:
        return None
    total = trainer.objective.steps
    return stack.enter_context(tqdm.tqdm(total=total, initial=trainer.number, disable=None))


def _tensorboard(directory: Path, number: int, stack: ExitStack) -> Any:
    try:
        board: Any = import_module("torch.utils.tensorboard")
    except ImportError:
        return None
    writer = board.SummaryWriter(str(directory), purge_step=number)
    stack.callback(writer.close)
    return writer
