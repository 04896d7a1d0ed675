"""Images with labels: what calibration and training read."""

from cpseg.data.synthetic import SyntheticShapes

__all__ = ["SyntheticShapes"]
