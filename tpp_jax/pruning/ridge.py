"""Ridge regression from moments, with a damping that is given or chosen."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Damping = float | Literal["held-out"] | None

# Dead channels make covariances singular, however many rows there are.
_LEAST_DAMPING = 1e-4
_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Errors(NamedTuple):
    """Moments of what a layer still reads, and of the error of its outputs.

    The error is what the outputs lack, without a change of the weights.

    Attributes:
      rows: Number of rows of data.
      read: Covariances of the kept features, float64 ``[kept, kept]``.
      across: Covariances of the features and the errors, float64 ``[kept, outputs]``.
      mean: Mean of each feature, float64 ``[kept]``.
      lack: Mean of each error, float64 ``[outputs]``.
    """

    rows: float
    read: Float[np.ndarray, "kept kept"]
    across: Float[np.ndarray, "kept outputs"]
    mean: Float[np.ndarray, " kept"]
    lack: Float[np.ndarray, " outputs"]

    def left(
        self,
        change: Float[np.ndarray, "kept outputs"],
        shift: Float[np.ndarray, " outputs"],
    ) -> float:
        """Returns the mean square of the errors after a change, less that before it.

        Args:
          change: Change of the weights.
          shift: What is added to the outputs.
        """
        square = np.sum(change * (self.read @ change - 2 * self.across))
        mean = self.lack - change.T @ self.mean - shift
        return float(square + np.sum(mean**2) - np.sum(self.lack**2))


def merge_errors(one: Errors, other: Errors) -> Errors:
    """Returns the moments over the rows of both."""
    rows = one.rows + other.rows
    a, b = one.rows / rows, other.rows / rows
    mean, lack = other.mean - one.mean, other.lack - one.lack
    return Errors(
        rows,
        a * one.read + b * other.read + a * b * np.outer(mean, mean),
        a * one.across + b * other.across + a * b * np.outer(mean, lack),
        a * one.mean + b * other.mean,
        a * one.lack + b * other.lack,
    )


def default_damping(features: int, rows: float) -> float:
    """Returns a share of the mean variance to add, more for fewer rows of data."""
    return max(0.1 * features / rows, _LEAST_DAMPING)


def refit(
    errors: Errors, held: Errors | None, damping: Damping, shifts: bool
) -> tuple[Float[np.ndarray, "kept outputs"], Float[np.ndarray, " outputs"]]:
    """Returns the change of the weights, and of the outputs' mean, that errors ask for.

    Args:
      errors: Errors on the data to fit.
      held: Errors on other data, on which the damping is chosen; used for the fit too.
      damping: Share of the mean variance that is added to all variances.
      shifts: Whether the mean of the outputs can be changed.
    """
    if held is not None and held.rows:
        tried = []
        for delta in _GRID:
            change, shift = _fit(errors, delta, shifts)
            tried.append(held.left(change, shift))
        errors, damping = merge_errors(errors, held), _GRID[int(np.argmin(tried))]
        if min(tried) >= 0:  # none of them is better than no change at all
            change = np.zeros_like(errors.across)
            return change, errors.lack * shifts
    if not isinstance(damping, int | float):
        damping = default_damping(len(errors.mean), errors.rows)
    return _fit(errors, damping, shifts)


def _fit(
    errors: Errors, damping: float, shifts: bool
) -> tuple[Float[np.ndarray, "kept outputs"], Float[np.ndarray, " outputs"]]:
    read, across = errors.read, errors.across
    if not shifts:  # moments about zero
        read = read + np.outer(errors.mean, errors.mean)
        across = across + np.outer(errors.mean, errors.lack)
    change = _ridge(read, across, damping)
    return change, (errors.lack - change.T @ errors.mean) * shifts


def _ridge(
    moments: Float[np.ndarray, "k k"], target: Float[np.ndarray, "k o"], damping: float
) -> Float[np.ndarray, "k o"]:
    """Returns ``(moments + damping · mean(diag) · I)⁻¹ target``."""
    size = np.trace(moments) / max(len(moments), 1)
    if size <= 0:  # dead channels alone
        return np.zeros_like(target)
    if damping == 0:
        return np.linalg.lstsq(moments, target, rcond=None)[0]
    return np.linalg.solve(moments + damping * size * np.eye(len(moments)), target)
