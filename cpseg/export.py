"""A calibrated model as one file: sets or pseudo-labels by ``torch.export`` and ONNX.

The exported graph holds the thresholds as a buffer and does what the predictor or filter does,
on any batch size and any grid (a calibration by location keeps its own).
"""

from importlib.util import find_spec
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn
from typing_extensions import override

from cpseg import filters, predictors
from cpseg._tiles import whole
from cpseg.errors import InputError, MissingExtraError
from cpseg.filters import Argmax, AtMost, BackgroundPriority, Singleton, Top
from cpseg.predictors import PixelSetPredictor, beside_of
from cpseg.scores import ColumnScore

__all__ = ["CalibratedModule", "save_onnx"]


@final
class CalibratedModule(nn.Module):
    """A predictor or a filter as a module, behind a model of your own if there is one.

    Guarantee:
        That of the predictor or filter, as long as the exported model gives the logits that the
        model gave for calibration.

    Args:
        head: What makes sets or labels of logits. A filter must have no guard: that warns.
        model: From inputs to logits ``(B, C, *S)``; None: the inputs are logits.

    Raises:
        InputError: If the head has a guard, or its score is no
            :class:`cpseg.scores.ColumnScore`.

    Examples:
        >>> from cpseg import SplitCalibrator
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
        >>> calibrator = SplitCalibrator().update(logits, torch.zeros(4, dtype=torch.int64))
        >>> module = CalibratedModule(Argmax(calibrator.compute(alpha=0.4)))
        >>> module(torch.tensor([[0.0, 1.0], [0.1, 0.0]]))
        tensor([  1, 255], dtype=torch.uint8)
    """

    thresholds: Tensor

    def __init__(
        self,
        head: PixelSetPredictor | Argmax | Top | BackgroundPriority | AtMost | Singleton,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        calibration = head.calibration
        if not isinstance(calibration.score, ColumnScore):
            raise InputError(
                f"head must have a ColumnScore to be exported; got {calibration.score}"
            )
        if isinstance(head, PixelSetPredictor):
            calibration.require_rule(None)
            self._columns = predictors.columns_of(head, calibration.score)
        elif head.guard is not None:
            raise InputError(f"head must have no guard to be exported; got {head.guard}")
        else:
            self._columns = filters.columns_of(head, calibration.score)
        self._axes = calibration.axes
        self._sets = isinstance(head, PixelSetPredictor)
        self.model = model
        self.register_buffer("thresholds", calibration.thresholds.clone())

    @override
    def forward(self, inputs: Tensor, groups: Tensor | None = None) -> Tensor:
        """Sets, bool ``(B, C, *S)``, or labels ``(B, *S)``.

        Args:
            inputs: What the model takes; logits ``(B, C, *S)`` without one.
            groups: Integers, ``(*S)`` or ``(B, *S)``, where the calibration has groups.
        """
        logits = inputs if self.model is None else self.model(inputs)
        near, fixed = beside_of(self._axes, self.thresholds, logits, groups)
        made = whole(self._columns, logits, near, fixed)[0]
        return made.bool() if self._sets else made


def save_onnx(
    module: CalibratedModule, inputs: Tensor, path: str | Path, groups: Tensor | None = None
) -> None:
    """Write a module as one ONNX file, for any batch size and grid.

    Args:
        module: What to write.
        inputs: An example, of at least two entries and two pixels along every axis: an axis of
            length 1 would stay so.
        path: The file, written whole or not at all.
        groups: An example, where the calibration has groups.

    Raises:
        MissingExtraError: Without the extra ``export``.
        InputError: If an axis of the example has length 1.
    """
    free = {axis: size for axis, size in enumerate(inputs.shape) if axis != 1}
    if min(free.values()) < 2:
        raise InputError(
            f"inputs must have at least 2 along every axis but 1; got {tuple(inputs.shape)}"
        )
    if find_spec("onnxscript") is None:
        raise MissingExtraError("save_onnx needs onnx and onnxscript: pip install 'cpseg[export]'")
    fixed_grid = module._axes == ("location",)
    dim = torch.export.Dim.DYNAMIC
    shapes: list[dict[int, object] | None] = [
        {axis: dim for axis in free if axis == 0 or not fixed_grid}
    ]
    example: tuple[Tensor, ...] = (inputs,)
    if groups is not None:
        example = (inputs, groups)
        shapes.append(dict.fromkeys(range(groups.ndim), dim))
    program = torch.onnx.export(
        module.eval(), example, dynamo=True, dynamic_shapes=tuple(shapes), verbose=False
    )
    if program is None:
        raise InputError(f"module must be exportable; got {module}")
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        program.save(partial, external_data=False)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
