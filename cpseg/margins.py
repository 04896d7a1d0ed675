"""Mask-level sets: how far a predicted mask must grow, or shrink, to be trusted.

Morphological prediction sets (after Mossina and Friedrich, 2025): the score of an image is the
smallest radius at which its predicted mask, grown by a Euclidean ball, holds a share tau of the
true one. The conformal quantile of these radii is a margin for new images, in any of one to three
dimensions, on the device of the masks.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.calibration import Guarantee, _read_checked, _write_checked
from cpseg.errors import FileError, InputError
from cpseg.morphology import dilate, distance_transform
from cpseg.quantile import conformal_quantile, conformal_rank, fewest_units, level

__all__ = ["MarginCalibrator", "Margins", "needed_radius"]


def needed_radius(predicted: Tensor, truth: Tensor, tau: float = 1.0) -> Tensor:
    """The smallest radius at which the grown prediction holds a share tau of the truth.

    Args:
        predicted: Masks. Bool ``(B, *S)``, one to three spatial axes.
        truth: Masks. Bool ``(B, *S)``.
        tau: Share of the true pixels, in (0, 1], read as the decimal it prints as.

    Returns:
        Radii in pixels, ``+inf`` where nothing is predicted but something is there, NaN where
        nothing is there. float64 ``(B,)``.

    Raises:
        InputError: If masks are no such masks, or tau does not lie in (0, 1].

    Examples:
        >>> predicted = torch.tensor([[False, True, False, False, False]])
        >>> truth = torch.tensor([[False, True, True, True, False]])
        >>> needed_radius(predicted, truth), needed_radius(predicted, truth, tau=0.6)
        (tensor([2.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    _check_tau(tau)
    for name, mask in (("predicted", predicted), ("truth", truth)):
        _checks.check_tensor(name, mask)
        if mask.dtype != torch.bool:
            raise InputError(f"{name} must be a bool mask; got {mask.dtype}")
    if predicted.shape != truth.shape:
        raise InputError(
            f"truth must have shape {_checks.describe(predicted.shape)} to go with predicted; "
            f"got {_checks.describe(truth.shape)}"
        )
    share = level(tau) if tau < 1 else 1
    distances = distance_transform(predicted).double()
    radii: list[Tensor] = []
    for distance, mask in zip(distances, truth, strict=True):
        ordered = distance[mask].sort().values
        count = len(ordered)
        place = -int(-count * share // 1) - 1  # ceil(tau * count), from 0
        radii.append(ordered[place] if count else ordered.new_full((), torch.nan))
    return torch.stack(radii) if radii else distances.new_zeros(0)


@final
@dataclass(frozen=True, slots=True)
class Margins:
    """How far to grow and to shrink a mask. Made by :class:`MarginCalibrator`.

    Guarantee:
        With probability at least ``1 - alpha`` over the calibration images and the new one, if
        they are exchangeable, and alpha and tau were chosen without them: :meth:`outer` holds a
        share ``tau`` of the true mask, in images that have one. And, as a second statement of the
        same kind: outside :meth:`inner` lies a share ``tau`` of what is not the true mask, in
        images that have such pixels. If every image has pixels of both kinds, both hold together
        with probability at least ``1 - 2 * alpha``. Each rests on as many images as
        :attr:`num_units` says; with fewer than ``1 / alpha - 1`` of them the radius is ``+inf``,
        which keeps the promise and says nothing. :attr:`guarantee` prints all this.

    Attributes:
        outer_radius: In pixels, ``+inf`` where too few images were seen.
        inner_radius: In pixels, ``+inf`` where too few images were seen.
        alpha: The level.
        tau: Share of the pixels.
        num_units: Images behind the outer and the inner radius.
    """

    outer_radius: float
    inner_radius: float
    alpha: float
    tau: float
    num_units: tuple[int, int]

    @property
    def guarantee(self) -> Guarantee:
        """What is promised, about what, from how many images, and under which assumptions."""
        needed = fewest_units(self.alpha)
        kinds = (
            ("outer mask is everything", "a true mask", self.outer_radius),
            ("inner mask is empty", "pixels that are not the true mask", self.inner_radius),
        )
        return Guarantee(
            event=f"The outer mask holds a share {self.tau:g} of the true mask of a new image that "
            f"has one; and, as a statement of its own, outside the inner mask lies a share "
            f"{self.tau:g} of what is not the true mask, in a new image that has such pixels",
            level=float(1 - level(self.alpha)),
            unit="image",
            n=(min(self.num_units), max(self.num_units)),
            probability=f"each with probability at least {float(1 - level(self.alpha)):g} over "
            "the calibration images and the new one",
            assumptions=(
                "the calibration images and the new one are exchangeable",
                "alpha and tau were chosen without the calibration images",
                "the new mask is predicted as those for calibration were",
            ),
            exceptions=tuple(
                f"The {what}: {seen} images with {kind} were seen; "
                + (
                    f"{needed} would do."
                    if seen < needed
                    else "in too many of them nothing was predicted that could be grown."
                )
                for (what, kind, radius), seen in zip(kinds, self.num_units, strict=True)
                if radius == torch.inf
            ),
        )

    def outer(self, mask: Tensor) -> Tensor:
        """The mask grown by the outer radius; everything if that is infinite.

        Args:
            mask: Predicted. Bool ``(B, *S)``.

        Returns:
            A new mask. Bool ``(B, *S)``.
        """
        if self.outer_radius == torch.inf:
            return torch.ones_like(mask)
        return dilate(mask, self.outer_radius)

    def inner(self, mask: Tensor) -> Tensor:
        """The mask shrunk by the inner radius; nothing if that is infinite.

        Args:
            mask: Predicted. Bool ``(B, *S)``.

        Returns:
            A new mask. Bool ``(B, *S)``.
        """
        if self.inner_radius == torch.inf:
            return torch.zeros_like(mask)
        return ~dilate(~mask, self.inner_radius)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file that :meth:`load` reads back exactly. Atomic: all of it, or nothing."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "outer_radius": str(self.outer_radius),
            "inner_radius": str(self.inner_radius),
            "alpha": self.alpha,
            "tau": self.tau,
            "num_units": list(self.num_units),
        }
        _write_checked(Path(path), content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.

        Returns:
            The margins, exactly as they were saved.

        Raises:
            FileError: If the file holds no margins, is damaged, or of another version.
            OSError: If there is no such file, or it cannot be read.
        """
        content = _read_checked(Path(path), "margin", _FORMAT, _VERSION)
        try:
            outer, inner = content["num_units"]
            return cls(
                outer_radius=float(content["outer_radius"]),
                inner_radius=float(content["inner_radius"]),
                alpha=float(content["alpha"]),
                tau=content["tau"],
                num_units=(int(outer), int(inner)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path} does not hold complete margins: {error}") from error


_FORMAT = "cpseg.margins"
_VERSION = 1


@final
class MarginCalibrator:
    """Predicted and true masks to :class:`Margins`; each mask is a unit.

    Args:
        tau: Share of the pixels, in (0, 1].

    Examples:
        >>> predicted = torch.tensor([[False, True, False, False, False]] * 9)
        >>> truth = torch.tensor([[False, True, True, False, False]] * 9)
        >>> margins = MarginCalibrator(tau=1.0).update(predicted, truth).compute(alpha=0.1)
        >>> margins.outer_radius, margins.inner_radius
        (1.0, 0.0)
        >>> margins.guarantee.probability, margins.guarantee.n
        ('each with probability at least 0.9 over the calibration images and the new one', (9, 9))
    """

    def __init__(self, tau: float = 0.95) -> None:
        _check_tau(tau)
        self.tau = tau
        self.reset()

    def reset(self) -> Self:
        """Forget everything seen; returns the calibrator itself."""
        self._outer = torch.zeros(0, dtype=torch.float64)
        self._inner = torch.zeros(0, dtype=torch.float64)
        return self

    def update(self, predicted: Tensor, truth: Tensor) -> Self:
        """See masks.

        Args:
            predicted: Bool ``(B, *S)``, one to three spatial axes.
            truth: Bool ``(B, *S)``.

        Returns:
            The calibrator itself.

        Raises:
            InputError: If masks are no such masks.
        """
        outer = needed_radius(predicted, truth, self.tau).cpu()
        inner = needed_radius(~predicted, ~truth, self.tau).cpu()
        return self._add(outer[~outer.isnan()], inner[~inner.isnan()])

    def _add(self, outer: Tensor, inner: Tensor) -> Self:
        self._outer = torch.cat((self._outer, outer)).sort().values
        self._inner = torch.cat((self._inner, inner)).sort().values
        return self

    def merge(self, other: Self) -> Self:
        """Add what another calibrator has seen, which stays as it is.

        Args:
            other: Made with the same tau.

        Returns:
            The calibrator itself.

        Raises:
            InputError: If it was made with another tau.
        """
        if other.tau != self.tau:
            raise InputError(f"other must have tau = {self.tau} to be merged; got {other.tau}")
        return self._add(other._outer, other._inner)

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors and numbers: the same for any order of updates and merges."""
        return {
            "kind": type(self).__name__,
            "tau": self.tau,
            "outer": self._outer.clone(),
            "inner": self._inner.clone(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object]) -> Self:
        """The calibrator that gave this state.

        Args:
            state: What ``state_dict`` returned.

        Returns:
            A new calibrator.

        Raises:
            InputError: If the state is another class's.
        """
        if state.get("kind") != cls.__name__:
            raise InputError(f"state must be of a {cls.__name__}; got {state.get('kind')}")
        made = cls(cast("float", state["tau"]))
        return made._add(cast("Tensor", state["outer"]), cast("Tensor", state["inner"]))

    def compute(self, alpha: float) -> Margins:
        """Margins for a level; the state stays as it is.

        Args:
            alpha: Level strictly between 0 and 1.

        Returns:
            The frozen margins; a radius is ``+inf`` with fewer than ``1 / alpha - 1`` images.

        Raises:
            InputError: If alpha is no level.
        """
        return Margins(
            outer_radius=_quantile(self._outer, alpha),
            inner_radius=_quantile(self._inner, alpha),
            alpha=alpha,
            tau=self.tau,
            num_units=(len(self._outer), len(self._inner)),
        )


def _quantile(radii: Tensor, alpha: float) -> float:
    if conformal_rank(len(radii), alpha) > len(radii):
        return float("inf")
    return float(conformal_quantile(radii, alpha))


def _check_tau(tau: object) -> None:
    if not isinstance(tau, (int, float)) or isinstance(tau, bool) or not 0 < tau <= 1:
        raise InputError(f"tau must lie in (0, 1]; got {tau!r}")
