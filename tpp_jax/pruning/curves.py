"""What each group costs: the loss after it alone was pruned, at several ratios."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int

from tpp_jax.errors import TPPError, TPPTypeError
from tpp_jax.graph.records import Groups

_NOT_READ = "the data are not those of a sensitivity: pass what to_json() returned"


@dataclasses.dataclass(frozen=True, eq=False)
class Sensitivity:
    """Increase of a loss when one group alone loses some of its channels.

    Attributes:
      groups: Names of the groups, in order of execution.
      sizes: Number of channels of each group.
      ratios: Shares of the channels that were removed, ascending.
      removed: Number of channels that each share is, int ``[groups, ratios]``.
      costs: Loss without these channels minus the baseline, float64
        ``[groups, ratios]``; negative where the loss fell.
      baseline: Loss of the unpruned model.

    Example:
      >>> removed, costs = np.array([[2, 4]]), np.array([[0.1, 0.5]])
      >>> found = Sensitivity(("w1",), (8,), (0.25, 0.5), removed, costs, baseline=1.0)
      >>> found.curve("w1").round(2).tolist()
      [0.0, 0.05, 0.1, 0.3, 0.5]
    """

    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    ratios: tuple[float, ...]
    removed: Int[np.ndarray, "groups ratios"]
    costs: Float[np.ndarray, "groups ratios"]
    baseline: float

    def curve(self, name: str) -> Float[np.ndarray, " removed"]:
        """Returns the cost of removing 0, 1, 2, … channels of a group.

        It is linear between the ratios that were measured and ends at the largest.
        Negative costs are taken as zero.
        """
        row = self.groups.index(name)
        removed, first = np.unique(self.removed[row], return_index=True)
        costs = np.maximum(self.costs[row][first], 0)
        counts = np.arange(removed[-1] + 1)
        return np.interp(counts, [0, *removed], [0, *costs])

    def to_json(self) -> dict[str, Any]:
        """Returns the content as plain data, ready for JSON."""
        return {
            "groups": list(self.groups),
            "sizes": list(self.sizes),
            "ratios": list(self.ratios),
            "removed": self.removed.tolist(),
            "costs": self.costs.tolist(),
            "baseline": self.baseline,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Reads the result of :meth:`to_json`.

        Args:
          content: Data that was read from JSON.

        Raises:
          TPPError: The data are something else.
        """
        try:
            found = cls(
                tuple(content["groups"]),
                tuple(content["sizes"]),
                tuple(content["ratios"]),
                np.asarray(content["removed"], np.int64),
                np.asarray(content["costs"], np.float64),
                float(content["baseline"]),
            )
            shape = len(found.sizes), len(found.ratios)
            complete = found.removed.shape == found.costs.shape == shape
        except (TypeError, KeyError, ValueError) as error:
            raise TPPError(_NOT_READ) from error
        if not complete or len(found.groups) != len(found.sizes):
            raise TPPError(_NOT_READ)
        return found


def check_measured(sensitivity: Sensitivity, groups: Groups) -> None:
    """Raises if costs were measured on other groups.

    Raises:
      TPPError: A group is unknown, has another size or cannot be pruned.
      TPPTypeError: The argument is not a :class:`Sensitivity`.
    """
    if not isinstance(sensitivity, Sensitivity):
        raise TPPTypeError(
            f"the sensitivity is a {type(sensitivity).__name__}: pass the result of "
            "tpp_jax.sensitivity(...)"
        )
    sizes = {g.name: g.size for g in groups if g.reason is None}
    for name, size in zip(sensitivity.groups, sensitivity.sizes, strict=True):
        if sizes.get(name) != size:
            here = f"it has {sizes[name]}" if name in sizes else "none can be pruned"
            raise TPPError(
                f"the sensitivity is that of other groups: there {name} has {size} "
                f"channels, here {here}. Measure it with the groups that are planned"
            )
