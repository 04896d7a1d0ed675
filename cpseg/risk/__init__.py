"""Controlled risks beyond miscoverage: recall, objects, and errors among kept labels.

A *risk* is a number in [0, 1] per image that depends on the threshold. Every image leaves one row
of counts, for a grid of thresholds, and :meth:`RiskCalibrator.compute` looks for the best
threshold of the grid whose expected risk is at most alpha: in expectation over the calibration
images too (conformal risk control; Angelopoulos et al., 2024), or with probability ``1 - delta``
over them (learn then test; Angelopoulos et al., 2021; for a monotone risk this is the
upper-confidence-bound rule of Bates et al., 2021). A threshold is chosen among those tested, and
used as it was tested.

Risks of sets fall as the threshold rises, and the tightest certified threshold is taken. Risks of
kept labels are safest where nothing is kept, and the loosest is taken.
"""

from cpseg.risk.calibrator import RiskCalibrator, Start
from cpseg.risk.grid import threshold_grid
from cpseg.risk.kept import FalseShare, KeptError, KeptRisk
from cpseg.risk.losses import Batch, Losses, Risk, Rule
from cpseg.risk.sets import (
    CoverageShare,
    DilutedFalseNegativeRate,
    FalseNegativeRate,
    InstanceRecall,
    Miscoverage,
    SetRisk,
    WorstFalseNegativeRate,
)

__all__ = [
    "Batch",
    "CoverageShare",
    "DilutedFalseNegativeRate",
    "FalseNegativeRate",
    "FalseShare",
    "InstanceRecall",
    "KeptError",
    "KeptRisk",
    "Losses",
    "Miscoverage",
    "Risk",
    "RiskCalibrator",
    "Rule",
    "SetRisk",
    "Start",
    "WorstFalseNegativeRate",
    "threshold_grid",
]
