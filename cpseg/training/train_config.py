"""Everything about a training run but its network and its data."""

from dataclasses import dataclass, replace
from typing import Literal, final

from cpseg import _checks
from cpseg.errors import InputError
from cpseg.training.objective import Stage, TwoStageObjective

__all__ = ["TrainConfig"]


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
        class_weights: Of the cross-entropy of each class, so that rare ones are learned at all;
            None: 1.
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
        bar: Whether a progress bar shows, where tqdm is installed and the output is a terminal.
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
    class_weights: tuple[float, ...] | None = None
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
    bar: bool = True
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
        self._check_class_weights()
        TwoStageObjective(self.stages)

    def _check_class_weights(self) -> None:
        if self.class_weights is None:
            return
        if len(self.class_weights) != self.num_classes:
            raise InputError(
                f"class_weights must be {self.num_classes}, one per class; "
                f"got {len(self.class_weights)}"
            )
        for index, weight in enumerate(self.class_weights):
            _checks.check_weight(f"class_weights[{index}]", weight)

    def fingerprint(self) -> str:
        """All that a run's numbers depend on; what it prints and keeps may change on resuming."""
        return repr(replace(self, workers=0, log_every=1, bar=True, save_every=None))
