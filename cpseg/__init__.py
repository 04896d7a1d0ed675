"""Conformal segmentation: which classes each pixel can still have, with a true guarantee."""

from cpseg.calibration import Calibration, Guarantee
from cpseg.calibrators import (
    ClassConditionalCalibrator,
    GroupCalibrator,
    LocationCalibrator,
    SplitCalibrator,
)
from cpseg.filters import Argmax, AtMost, BackgroundPriority, Singleton
from cpseg.merging import gather, merge_all
from cpseg.predictors import PixelSetPredictor
from cpseg.scores import (
    APS,
    LAC,
    RAPS,
    SAPS,
    Margin,
    TopK,
    logits_from_probabilities,
    logits_from_sigmoid,
)

__all__ = [
    "APS",
    "LAC",
    "RAPS",
    "SAPS",
    "Argmax",
    "AtMost",
    "BackgroundPriority",
    "Calibration",
    "ClassConditionalCalibrator",
    "GroupCalibrator",
    "Guarantee",
    "LocationCalibrator",
    "Margin",
    "PixelSetPredictor",
    "Singleton",
    "SplitCalibrator",
    "TopK",
    "gather",
    "logits_from_probabilities",
    "logits_from_sigmoid",
    "merge_all",
]

__version__ = "0.1.0"
