"""What a run writes down: lines of JSON, always; a bar and TensorBoard where they are installed."""

import json
from contextlib import ExitStack
from importlib import import_module
from math import isnan
from pathlib import Path
from typing import Any, Self, TextIO, cast, final

from cpseg.training.evaluation import Evaluation

__all__ = ["Journal"]


@final
class Journal:
    """The log of a run, ``log.jsonl``; lines after the step that a run goes on from are dropped.

    To be used in a ``with`` statement.

    Args:
        directory: Where the log lies.
        done: How many steps are done.
        total: How many steps there will be.
        bar: Whether a progress bar shows, where tqdm is installed and the output is a terminal.
    """

    def __init__(self, directory: Path, *, done: int, total: int, bar: bool = True) -> None:
        path = directory / "log.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        kept = [line for line in map(_line, lines) if line and line["step"] <= done]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        self._stack = ExitStack()
        self._file: TextIO = self._stack.enter_context(path.open("a", encoding="utf-8"))
        self._bar = _progress_bar(done, total, self._stack) if bar else None
        self._board = _tensorboard(directory, done, self._stack)

    def __enter__(self) -> Self:
        """The journal itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close everything."""
        self._stack.close()

    def step(self, number: int, stage: str, values: dict[str, float]) -> None:
        """Write down a step's numbers.

        Args:
            number: How many steps are done.
            stage: Name of its stage.
            values: What to write down; ``"loss"`` must be among them.
        """
        self._write({"step": number, "stage": stage, **values})
        for name, value in values.items():
            self._plot(number, name, value)
        if self._bar is not None:
            self._bar.n = number
            self._bar.set_postfix(stage=stage, loss=f"{values['loss']:.3f}")

    def evaluation(
        self, number: int, evaluation: Evaluation, *, of: str, best: tuple[float, int]
    ) -> None:
        """Write down an evaluation.

        Args:
            number: How many steps are done.
            evaluation: The evaluation.
            of: What was evaluated.
            best: The best mIoU so far, and its step.
        """
        iou: list[float] = evaluation.iou.tolist()
        values: dict[str, object] = {
            "miou": evaluation.miou,
            "miou_absent_as_zero": evaluation.miou_absent_as_zero,
            "best_miou": best[0],
            "best_step": best[1],
            "of": of,
            "iou": [None if isnan(value) else value for value in iou],
        }
        self._write({"step": number, **values})
        self._plot(number, "miou", evaluation.miou)

    def _write(self, values: dict[str, object]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def _plot(self, number: int, name: str, value: float) -> None:
        if self._board is not None:
            self._board.add_scalar(name, value, number)


def _line(text: str) -> dict[str, Any] | None:
    """A line of the log; None for one that a killed process left unfinished."""
    try:
        return cast("dict[str, Any]", json.loads(text))
    except ValueError:
        return None


def _progress_bar(done: int, total: int, stack: ExitStack) -> Any:  # tqdm is optional
    try:
        tqdm: Any = import_module("tqdm")
    except ImportError:
        return None
    return stack.enter_context(tqdm.tqdm(total=total, initial=done, disable=None))


def _tensorboard(directory: Path, done: int, stack: ExitStack) -> Any:
    try:
        board: Any = import_module("torch.utils.tensorboard")
    except ImportError:
        return None
    writer = board.SummaryWriter(str(directory), purge_step=done)
    stack.callback(writer.close)
    return writer
