"""Figures: what a calibration, its sets, its pseudo-labels and a training run look like.

Every function returns a matplotlib ``Figure`` and shows nothing; pyplot is never loaded, so no
global state is touched. Colors stay apart for all three kinds of color blindness (as far as there
are no more than twelve classes), what is void is drawn as void, and abstention is hatched.

Needs matplotlib: ``pip install 'cpseg[plot]'``.
"""

from cpseg.plots._canvas import PALETTE, VOID, check_matplotlib, class_color, save
from cpseg.plots._training import training
from cpseg.plots.confidence import ConfidenceCounts
from cpseg.plots.coverage import coverage_by_class, coverage_of_images, levels
from cpseg.plots.image import one_image
from cpseg.plots.kept import Certified, reliability, risk_coverage

__all__ = [
    "PALETTE",
    "VOID",
    "Certified",
    "ConfidenceCounts",
    "check_matplotlib",
    "class_color",
    "coverage_by_class",
    "coverage_of_images",
    "levels",
    "one_image",
    "reliability",
    "risk_coverage",
    "save",
    "training",
]
