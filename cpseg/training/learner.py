"""One step of training: forward and backward, the optimizer, the averaged teacher."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpseg.errors import InputError
from cpseg.training.averaging import MovingAverage
from cpseg.training.distributed import Processes
from cpseg.training.objective import Batch, TwoStageObjective
from cpseg.training.schedules import Poly
from cpseg.training.train_config import TrainConfig

__all__ = ["Learner"]


@final
class Learner:
    """A student with all that changes it and all that changes with it.

    Args:
        student: From images to logits; moved to ``device`` and trained in place.
        config: Learning rate, precision, clipping, decay of the teacher.
        device: Where to train.
        processes: Who trains together.

    Attributes:
        student: The bare network.
        teacher: Its average over steps; None without ``ema_decay``.
        optimizer: Of its parameters, those of the head in a group of their own.
        scaler: Of the loss, for fp16.

    Raises:
        InputError: If there is nothing to train, or ``head`` names no parameter.
    """

    def __init__(
        self,
        student: nn.Module,
        config: TrainConfig,
        *,
        device: torch.device,
        processes: Processes = Processes(),
    ) -> None:
        self.config = config
        self.device = device
        self.processes = processes
        self.student: nn.Module = student.to(device)
        self.teacher: MovingAverage | None = (
            None if config.ema_decay is None else MovingAverage(student, config.ema_decay)
        )
        self.optimizer: torch.optim.Optimizer = _optimizer(student, config)
        self.scaler: torch.amp.GradScaler = torch.amp.GradScaler(
            device.type, enabled=config.precision == "fp16"
        )
        self._wrapped: nn.Module | None = None

    @property
    def network(self) -> nn.Module:
        """The student as it is trained, compiled in place and wrapped for its processes."""
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

    @property
    def evaluated(self) -> nn.Module:
        """The network whose mIoU counts, teacher before student, never compiled."""
        if self.teacher is not None:
            return self.teacher.module
        return _Eager(self.student) if self.config.compile else self.student

    def step(
        self, objective: TwoStageObjective, parts: list[Batch], number: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward through each part, then the optimizer and the teacher, once.

        Args:
            objective: What to lower.
            parts: As many batches as ``accumulate``, on the device.
            number: How many steps came before.

        Returns:
            The loss and its parts, means over ``parts``, that no one has waited for.
        """
        config, network = self.config, self.network
        rate = Poly(config.lr, config.poly_power)(number / objective.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * cast("float", group["multiplier"])
        labeler = self.student
        if objective.stage_at(number)[0].source == "teacher" and self.teacher is not None:
            labeler = self.teacher.module
        share: Callable[[Tensor], Tensor] | None = None
        if config.global_denominator:
            share = self.processes.mean
        outputs: list[tuple[Tensor, dict[str, Tensor]]] = []
        for index, batch in enumerate(parts):
            last = index == len(parts) - 1
            with _unsynchronized(network, last=last), self._autocast():
                output = objective(
                    network,
                    batch,
                    step=number,
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
        if len(outputs) == 1:
            return outputs[0]
        metrics = {
            name: torch.stack([each[name] for _, each in outputs]).mean() for name in outputs[0][1]
        }
        return torch.stack([loss for loss, _ in outputs]).mean(), metrics

    def state(self) -> dict[str, object]:
        """What later steps depend on, for a checkpoint."""
        return {
            "student": self.student.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.module.state_dict(),
            "teacher_updates": 0 if self.teacher is None else self.teacher.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.student.load_state_dict(state["student"])
        if self.teacher is not None:
            self.teacher.module.load_state_dict(state["teacher"])
            self.teacher.updates = state["teacher_updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)


@final
class _Eager(nn.Module):
    """A compiled network's own ``forward``: whole images of many sizes would each be compiled."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: nn.Module = network

    def forward(self, images: Tensor) -> object:
        return self.network.forward(images)


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
