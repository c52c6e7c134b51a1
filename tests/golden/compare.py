"""Errors and their tolerances."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from md4.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """One compared array: its largest error, in the unit of the tolerance."""

    name: str
    error: float
    tolerance: float

    @property
    def severity(self) -> float:
        if not self.error:
            return 0.0
        return self.error / self.tolerance if self.tolerance else np.inf

    def __str__(self) -> str:
        return f"largest error {self.error:.1e}, allowed {self.tolerance:.2g} ({self.name})"


def _float64(x: Tensor | np.ndarray | float) -> np.ndarray:
    return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)


@dataclass
class Comparisons:
    """The comparisons of one file, and remarks about what was left out."""

    done: list[Comparison] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def close(
        self, name: str, ours, theirs, tolerance: float, *, floor: float = 1.0, widen: np.ndarray | float = 1.0
    ) -> None:
        """Largest |ours - theirs| / (floor + |theirs|) / widen; equal infinities agree, a NaN never does.

        `floor` 1 mixes absolute and relative error alike, 0 is relative alone. `widen` (a factor, or one for each
        element) is for elements that the reference itself holds to fewer digits.
        """
        ours, theirs = self._pair(name, ours, theirs)
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.abs(ours - theirs) / (floor + np.abs(theirs)) / widen
        self._add(name, np.where(ours == theirs, 0.0, error), tolerance)

    def absolute(self, name: str, ours, theirs, tolerance: float) -> None:
        """Largest |ours - theirs|."""
        ours, theirs = self._pair(name, ours, theirs)
        self._add(name, np.abs(ours - theirs), tolerance)

    def norm(self, name: str, ours, theirs, tolerance: float, *, floor: float = 0.0) -> None:
        """||ours - theirs|| / max(||theirs||, floor), Euclidean over the whole array; absolute if both are zero."""
        ours, theirs = self._pair(name, ours, theirs)
        scale = max(np.linalg.norm(theirs.ravel()), floor) or 1.0
        self._add(name, np.linalg.norm((ours - theirs).ravel()) / scale, tolerance)

    def count(self, name: str, wrong) -> None:
        """Number of true elements of `wrong`, of which none is allowed."""
        self._add(f"{name}: number wrong", np.sum(np.asarray(wrong)), 0.0)

    @property
    def worst(self) -> Comparison:
        """The comparison with the largest error relative to its tolerance. Raises UserError if there is none."""
        if not self.done:
            raise UserError("nothing in it could be compared")
        return max(self.done, key=lambda c: c.severity)

    @staticmethod
    def _pair(name: str, ours, theirs) -> tuple[np.ndarray, np.ndarray]:
        ours, theirs = _float64(ours), _float64(theirs)
        if ours.shape != theirs.shape:
            raise UserError(f"{name} has shape {list(theirs.shape)} in the file, {list(ours.shape)} here")
        return ours, theirs

    def _add(self, name: str, error, tolerance: float) -> None:
        error = np.asarray(error, dtype=np.float64)
        largest = float(error.max()) if error.size else 0.0
        self.done.append(Comparison(name, np.inf if np.isnan(largest) else largest, tolerance))
