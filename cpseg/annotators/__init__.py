"""Annotators: whatever turns images into logits ``(B, C, *S)``."""

from cpseg.annotators.cache import CachedAnnotator, FilteredAgain
from cpseg.annotators.huggingface import (
    MaskClassAnnotator,
    SemanticLogitsAnnotator,
    TextPromptAnnotator,
)
from cpseg.annotators.mask_class import mask_class_probabilities
from cpseg.annotators.medical import (
    SigmoidAnnotator,
    Volume,
    channel_values,
    load_nifti,
    load_nifti_labels,
    load_nnunet,
)
from cpseg.annotators.preprocessing import Preprocessing
from cpseg.annotators.prompts import clip_tokenizer
from cpseg.annotators.sam_clip import SamClipAnnotator
from cpseg.annotators.source import check_source
from cpseg.annotators.synthetic import SyntheticAnnotator

__all__ = [
    "CachedAnnotator",
    "FilteredAgain",
    "MaskClassAnnotator",
    "Preprocessing",
    "SamClipAnnotator",
    "SemanticLogitsAnnotator",
    "SigmoidAnnotator",
    "SyntheticAnnotator",
    "TextPromptAnnotator",
    "Volume",
    "channel_values",
    "check_source",
    "clip_tokenizer",
    "load_nifti",
    "load_nifti_labels",
    "load_nnunet",
    "mask_class_probabilities",
]
