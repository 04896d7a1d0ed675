"""Where the new domain is not the calibration's: weights, an alarm, and levels that move.

:class:`WeightedCalibrator` keeps a promise under a shift that is known as likelihood ratios of
images. :class:`ExchangeabilityMartingale` watches a stream for a shift that is not known.
:class:`AdaptiveLevel` follows one, where labels arrive later, frame by frame.
"""

from cpseg.shift.adaptive import AdaptiveLevel
from cpseg.shift.martingale import ExchangeabilityMartingale
from cpseg.shift.weighted import WeightedCalibration, WeightedCalibrator

__all__ = [
    "AdaptiveLevel",
    "ExchangeabilityMartingale",
    "WeightedCalibration",
    "WeightedCalibrator",
]
