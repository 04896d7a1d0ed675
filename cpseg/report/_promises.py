"""What a calibration promises that labeled images can be held against."""

from cpseg.calibration import Calibration


def alphas_of(calibration: Calibration, classes: int) -> list[float]:
    alpha = calibration.alpha
    return list(alpha) if isinstance(alpha, tuple) else [alpha] * classes


def promises_classes(calibration: Calibration) -> bool:
    return calibration.axes == ("class",) and compares(calibration)


def compares(calibration: Calibration) -> bool:
    """Whether the mean over images is what the calibration bounds."""
    return calibration.control is None and calibration.unit == "image"
