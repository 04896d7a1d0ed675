"""The shapes that plug-ins must have; nothing here runs.

Axes, here and everywhere: ``B`` batch, ``C`` classes, ``*S`` any number of spatial axes.
"""

from typing import Protocol

from torch import Tensor


class Score(Protocol):
    """A nonconformity score: lower fits better. See :mod:`cpseg.scores` for the built-in ones.

    The two views must agree: ``of_labels(logits, labels)`` is the entry of ``score(logits)`` at
    each pixel's label, up to ``tolerance``. A pixel without a finite log-sum-exp over classes
    scores NaN for every class.
    """

    @property
    def follows_logits(self) -> bool:
        """Whether, at every pixel, a class with a larger logit never scores higher."""
        ...

    def __call__(self, logits: Tensor, /) -> Tensor:
        """Scores of all classes. Shape ``(B, C, *S)``, at least float32."""
        ...

    def of_labels(self, logits: Tensor, labels: Tensor, /) -> Tensor:
        """The label's score at each pixel; labels lie in ``[0, C)``. Shape ``(B, *S)``."""
        ...

    def range(self, num_classes: int, /) -> tuple[float, float] | None:
        """Closed range of the finite scores, or None: then only the exact store can hold them."""
        ...

    def tolerance(self, num_classes: int, /) -> float:
        """How far two ways of computing one score (eager, tiled, compiled) can lie apart."""
        ...


class Annotator(Protocol):
    """Whatever turns images into logits: a foundation model, a cache on disk, your network."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Logits of shape ``(B, C, *S)`` for a batch of images."""
        ...
