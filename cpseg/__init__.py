"""Conformal segmentation: which classes each pixel can still have, with a true guarantee."""
