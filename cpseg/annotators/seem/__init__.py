"""SEEM, the reference annotator: its own torch, the original's weights."""

from cpseg.annotators.seem.annotator import SEEMAnnotator, UpstreamSEEMAnnotator
from cpseg.annotators.seem.checkpoint import load_checkpoint, load_state
from cpseg.annotators.seem.model import SEEM, SEEMConfig
from cpseg.annotators.seem.text import SEEM_TEMPLATES

__all__ = [
    "SEEM",
    "SEEM_TEMPLATES",
    "SEEMAnnotator",
    "SEEMConfig",
    "UpstreamSEEMAnnotator",
    "load_checkpoint",
    "load_state",
]
