"""A level that follows what was missed, where labels arrive later."""

from dataclasses import replace
from math import inf
from typing import Self, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.calibration import Calibration, Control
from cpseg.calibrators import SplitCalibrator
from cpseg.errors import InputError
from cpseg.predictors import PixelSetPredictor

__all__ = ["AdaptiveLevel"]


@final
class AdaptiveLevel:
    """Adaptive conformal inference: the level follows what was missed (Gibbs and Candes, 2021).

    After each frame the level moves by ``gamma * (alpha - missed)``, where ``missed`` is the share
    of the frame's labeled pixels whose set missed their class. It may leave (0, 1): at 0 or below
    every set is full, at 1 or above every set is empty.

    Guarantee:
        For any sequence of T frames with labels, whatever they are: the mean of the missed shares
        differs from ``alpha`` by at most ``(max(alpha, 1 - alpha) + gamma) / (gamma * T)``. No
        assumption; nothing is said of a single frame.

    Args:
        calibrator: Held-out scores; it must not change while this is used.
        alpha: The share that may be missed in the long run.
        gamma: How fast the level moves, in (0, 1).

    Examples:
        >>> logits, labels = torch.tensor([[2.0, 0.0]] * 20), torch.zeros(20, dtype=torch.int64)
        >>> following = AdaptiveLevel(SplitCalibrator().update(logits, labels), 0.2, gamma=0.5)
        >>> following.update(torch.tensor([[2.0, 0.0]]), torch.tensor([1])).level < 0
        True
        >>> following(torch.tensor([[2.0, 0.0]]))
        tensor([[True, True]])
    """

    def __init__(self, calibrator: SplitCalibrator, alpha: float, *, gamma: float = 0.01) -> None:
        _checks.check_alpha(alpha)
        _checks.check_alpha(gamma, "gamma")
        self.alpha: float = alpha
        self.gamma: float = gamma
        self.level: float = alpha
        self._calibrator = calibrator
        self._base = calibrator.compute(alpha)
        self._at: tuple[float, Calibration] | None = None  # for which level it was made

    @property
    def calibration(self) -> Calibration:
        """What holds for the next frame; it promises nothing by itself."""
        if self._at is None or self._at[0] != self.level:
            if 0 < self.level < 1:
                made = self._calibrator.compute(self.level)
            else:
                edge = inf if self.level <= 0 else -inf
                made = replace(self._base, thresholds=torch.full_like(self._base.thresholds, edge))
            control = Control(
                risk="adaptive miscoverage",
                rule=None,
                delta=None,
                event=(
                    "The mean share of labeled pixels whose class is missing from their set "
                    f"differs from {self.alpha:g} by at most {self._reach():.3g} / T"
                ),
                over="over any T frames, whatever they are",
                assumptions=("the labels of each frame are learned before the next is predicted",),
                notes=("Nothing is promised for one frame.",),
            )
            self._at = self.level, replace(made, control=control)
        return self._at[1]

    def _reach(self) -> float:
        """How far the sum of missed shares can stray from what was asked for."""
        return (max(self.alpha, 1 - self.alpha) + self.gamma) / self.gamma

    def __call__(self, logits: Tensor) -> Tensor:
        """Sets of a frame at the present level. ``(B, C, *S)`` to bool ``(B, C, *S)``."""
        return PixelSetPredictor(self.calibration)(logits)

    def update(self, logits: Tensor, labels: Tensor) -> Self:
        """Learn what was missed, frame by frame in the order of the batch.

        Args:
            logits: Of the frames that were predicted. Shape ``(B, C, *S)``.
            labels: Integers, ``ignore_index`` where unknown. Shape ``(B, *S)``.

        Returns:
            The object itself. Frames without a labeled pixel, or with unusable logits at all of
            them, change nothing.

        Raises:
            InputError: If shapes do not fit, or a label is no class.
        """
        _checks.check_logits(logits, self._base.num_classes)
        _checks.check_labels(labels, logits)
        ignore = self._base.ignore_index
        for entry in range(len(logits)):
            frame, truth = logits[entry : entry + 1], labels[entry : entry + 1].long()
            valid = truth != ignore
            if bool((valid & ((truth < 0) | (truth >= frame.shape[1]))).any()):
                raise InputError("labels must be classes or ignore_index; got others")
            sets = self(frame)
            usable = valid & frame.amax(1).isfinite() & ~frame.isnan().any(1)
            held = sets.gather(1, (truth * valid)[:, None])[:, 0]
            seen = int(usable.sum())
            if seen:
                missed = int((usable & ~held).sum()) / seen
                self.level += self.gamma * (self.alpha - missed)
        return self
