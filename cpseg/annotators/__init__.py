"""Annotators: whatever turns images into logits ``(B, C, *S)``."""

from cpseg.annotators.synthetic import SyntheticAnnotator

__all__ = ["SyntheticAnnotator"]
