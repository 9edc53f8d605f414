"""Importance scores: which filters matter least.

A criterion is a function from the filters of one layer, float ``[n, d]`` (row i is all
the weights that make channel i), to scores ``[n]``; the lowest go first. The score of a
group's channel is the mean over the layers that produce it.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from tpp_jax.pruning.groups import Group, Member

Criterion = Callable[[Float[np.ndarray, "n d"]], Float[np.ndarray, " n"]]


def l1(filters: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Mean absolute weight (TPP section 3.2; Li et al. 2017)."""
    return np.mean(np.abs(filters), axis=1)


def l2(filters: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Root mean squared weight."""
    return np.sqrt(np.mean(np.square(filters), axis=1))


CRITERIA: dict[str, Criterion] = {"l1": l1, "l2": l2}


def find_criterion(criterion: str | Criterion, seed: int) -> Criterion:
    """Returns a criterion by name: ``"l1"``, ``"l2"`` or ``"random"``.

    Args:
      criterion: a name, or a function, which is returned as it is.
      seed: of ``"random"``; every layer draws anew.

    Raises:
      ValueError: an unknown name.
    """
    if callable(criterion):
        return criterion
    if criterion == "random":
        draws = np.random.default_rng(seed)
        return lambda filters: draws.random(filters.shape[0])
    if criterion not in CRITERIA:
        known = ", ".join([*CRITERIA, "random"])
        raise ValueError(
            f"unknown criterion {criterion!r}: choose one of {known}, or pass a "
            "function from filters [n, d] to scores [n]"
        )
    return CRITERIA[criterion]


def filters_of(member: Member, kernel: Any) -> Float[np.ndarray, "n d"]:
    """Returns a group's filters in one kernel: row c is all that makes channel c."""
    positions = member.positions
    # On the host: on a device every new shape would be compiled for.
    rows = np.moveaxis(np.asarray(kernel), member.axis, 0)[positions.reshape(-1)]
    return rows.reshape(len(positions), -1)


def group_scores(
    group: Group, leaves: dict[str, jax.Array], criterion: Criterion
) -> Float[np.ndarray, " n"]:
    """Returns the score of each of a group's channels, float ``[group.size]``.

    Args:
      group: the group.
      leaves: parameter arrays by dotted name.
      criterion: scores the filters of one layer.

    Raises:
      ValueError: the criterion returned something that is not one score a filter.
    """
    scores = []
    for member in group.members:
        if member.role == "produced":
            filters = filters_of(member, leaves[member.leaf])
            score = np.asarray(criterion(filters))
            if score.shape != (group.size,):
                raise ValueError(
                    f"the criterion gave an array of shape {score.shape} for "
                    f"{member.leaf}; expected one score for each of its "
                    f"{group.size} filters"
                )
            scores.append(score)
    return np.mean(scores, axis=0)
