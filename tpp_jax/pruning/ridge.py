"""Ridge regression from moments."""

import numpy as np
from jaxtyping import Float

# Dead channels make covariances singular, however many rows there are.
_LEAST_DAMPING = 1e-4


def default_damping(features: int, rows: float) -> float:
    """Returns a share of the mean variance to add, more for fewer rows of data."""
    return max(0.1 * features / rows, _LEAST_DAMPING)


def ridge(
    moments: Float[np.ndarray, "k k"], target: Float[np.ndarray, "k o"], damping: float
) -> Float[np.ndarray, "k o"]:
    """Returns ``(moments + damping · mean(diag) · I)⁻¹ target``."""
    size = np.trace(moments) / len(moments)
    if size <= 0:  # dead channels alone
        return np.zeros_like(target)
    if damping == 0:
        return np.linalg.lstsq(moments, target, rcond=None)[0]
    return np.linalg.solve(moments + damping * size * np.eye(len(moments)), target)
