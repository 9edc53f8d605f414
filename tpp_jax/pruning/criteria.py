"""Importance scores: which filters matter least.

A criterion is a function from the filters of one layer, float ``[n, d]`` (row i is all
the weights that make channel i), to scores ``[n]``; the lowest go first. Some need more
than weights: their second argument ``[n, d]`` holds a statistic for each weight, from
:mod:`tpp_jax.pruning.statistics`. The scores of a group's channels are those in each
layer that produces them, reduced to one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from tpp_jax.errors import TPPError
from tpp_jax.graph.groups import Group, Member

Filters = Float[np.ndarray, "n d"]
Scores = Float[np.ndarray, " n"]
Criterion = Callable[..., Scores]

# What libraries call the factors of a norm.
_SCALES = ("scale", "gamma", "weight")


def l1(filters: Filters) -> Scores:
    """Mean absolute weight (TPP section 3.2; Li et al. 2017)."""
    return np.mean(np.abs(filters), axis=1, dtype=np.float64)


def l2(filters: Filters) -> Scores:
    """Root mean squared weight."""
    return np.sqrt(np.mean(np.square(filters), axis=1))


def bn_scale(filters: Filters) -> Scores:
    """Absolute scale of the norm that the channels run through (Liu et al. 2017).

    Its ``filters`` are the norm's scales, where those of other criteria are kernels.
    """
    return l1(filters)


def fpgm(filters: Filters) -> Scores:
    """Distance to the other filters of the layer (FPGM, He et al. 2019).

    The paper's sum of distances, divided by the number of the others and by ``√d``: the
    same order in a layer, and of the size of :func:`l2` in every layer.
    """
    n, d = filters.shape
    wide = filters.astype(np.float64)
    squares = np.sum(np.square(wide), axis=1)
    total = np.zeros(n)
    for start in range(0, n, 1024):  # a part at a time, for layers of many filters
        part = slice(start, start + 1024)
        squared = squares[part, None] + squares - 2 * wide[part] @ wide.T
        total[part] = np.sqrt(np.maximum(squared, 0)).sum(axis=1)
    return total / (max(n - 1, 1) * np.sqrt(d))


def lamp(filters: Filters) -> Scores:
    """Share of a filter in what is left when all smaller ones are gone (LAMP).

    ``‖f‖² / Σ ‖f'‖²`` over the filters ``f'`` of the layer that are no smaller
    (Lee et al. 2021): the largest filter of every layer scores 1, so that scores of
    different layers can be compared.
    """
    squares = np.sum(np.square(filters.astype(np.float64)), axis=1)
    order = np.argsort(squares, kind="stable")
    left = np.cumsum(squares[order][::-1])[::-1]
    scores = np.zeros(len(squares))
    scores[order] = squares[order] / np.where(left > 0, left, 1)
    return scores


def taylor(filters: Filters, gradients: Filters) -> Scores:
    """Change of the loss if the filter goes, to first order: ``|Σ w · g|``.

    Molchanov et al. 2019, with the filter as one set of weights. Take the gradients in
    evaluation mode: a batch norm in training mode makes the sum zero for any filter.
    """
    return np.abs(np.sum(filters * gradients, axis=1))


def taylor_fo(filters: Filters, gradients: Filters) -> Scores:
    """Mean of ``(w · g)²``: each weight's own first-order change of the loss, squared.

    Molchanov et al. 2019, with the weights taken one by one; TPP's ``taylor-fo``.
    """
    return np.mean(np.square(filters * gradients), axis=1)


def hessian(filters: Filters, diagonal: Filters) -> Scores:
    """Change of the loss at a minimum, to second order: ``½ Σ w² · h``.

    The Hessian is taken for diagonal (LeCun et al. 1990).
    """
    return np.sum(np.square(filters) * diagonal, axis=1) / 2


def activation(filters: Filters, means: Filters) -> Scores:
    """Mean absolute activation of the channel; the weights do not matter."""
    del filters
    return np.mean(means, axis=1)


CRITERIA: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "lamp": lamp,
    "taylor": taylor,
    "taylor_fo": taylor_fo,
    "hessian": hessian,
    "activation": activation,
}

# The criteria that need statistics, and what makes them.
STATISTICS: dict[str, str] = {
    "taylor": "loss_gradient",
    "taylor_fo": "loss_gradient",
    "hessian": "hessian_diagonal",
    "activation": "activation_means",
}

REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda scores: np.mean(scores, axis=0),
    "sum": lambda scores: np.sum(scores, axis=0),
    "max": lambda scores: np.max(scores, axis=0),
    "first": lambda scores: scores[0],
}


def find_criterion(
    criterion: str | Criterion, seed: int, with_statistics: bool = False
) -> Criterion:
    """Returns a criterion by name.

    Args:
      criterion: one of :data:`CRITERIA`, ``"random"``, or a function, which is returned
        as it is.
      seed: of ``"random"``; every layer draws anew.
      with_statistics: whether there are statistics for it.

    Raises:
      TPPError: an unknown name, or statistics that are missing or of no use to it.
    """
    if callable(criterion):
        return criterion
    if criterion not in (*CRITERIA, "random"):
        raise TPPError(
            f"unknown criterion {criterion!r}: choose one of "
            f"{', '.join([*CRITERIA, 'random'])}, or pass a function from filters "
            "[n, d] to scores [n]"
        )
    if criterion in STATISTICS and not with_statistics:
        raise TPPError(
            f"the criterion {criterion!r} needs more than weights: pass statistics="
            f"tpp_jax.{STATISTICS[criterion]}(...)"
        )
    if with_statistics and criterion not in STATISTICS:
        raise TPPError(
            f"the criterion {criterion!r} has no use for statistics; "
            f"{', '.join(STATISTICS)} and functions of two arguments have"
        )
    if criterion == "random":
        draws = np.random.default_rng(seed)
        return lambda filters: draws.random(filters.shape[0])
    return CRITERIA[criterion]


def filters_of(member: Member, array: Any) -> Filters:
    """Returns a group's filters in one kernel: row c is all that makes channel c."""
    positions = member.positions
    # On the host: on a device every new shape would be compiled for.
    array = np.asarray(array)
    n = array.shape[member.axis]
    if member.axis == array.ndim - 1 and np.array_equal(positions[:, 0], np.arange(n)):
        rows = array.reshape(-1, n).T  # a view: to copy it would take longest
    else:
        rows = np.moveaxis(array, member.axis, 0)[positions.reshape(-1)]
        rows = rows.reshape(len(positions), -1)
    # Sums in half precision would be mostly rounding.
    return rows.astype(np.float32) if rows.dtype.itemsize < 4 else rows


def group_scores(
    group: Group,
    leaves: Mapping[str, Any],
    criterion: Criterion,
    reduce: str = "mean",
    statistics: Mapping[str, Any] | None = None,
) -> Scores:
    """Returns the score of each of a group's channels, float ``[group.size]``.

    Args:
      group: the group.
      leaves: parameter arrays by dotted name.
      criterion: scores the filters of one layer.
      reduce: one of :data:`REDUCTIONS`: what is made of the scores in the layers that
        produce the channels; ``"first"`` takes those of the first of them.
      statistics: by dotted name, arrays that can be broadcast to the parameters; given
        to the criterion as its second argument.

    Raises:
      TPPError: there is nothing to score, a statistic is missing or of another shape,
        or the criterion returned something that is not one number a filter.
    """
    members = [m for m in group.members if m.role == "produced"]
    if criterion is bn_scale:
        members = _scales(group)
    scores = []
    for member in members:
        arguments = [filters_of(member, leaves[member.leaf])]
        if statistics is not None:
            array = _statistic(member, leaves, statistics)
            arguments.append(filters_of(member, array))
        score = np.asarray(criterion(*arguments))
        if score.shape != (group.size,):
            raise TPPError(
                f"the criterion gave an array of shape {score.shape} for "
                f"{member.leaf}; expected one score for each of its "
                f"{group.size} filters"
            )
        if np.isnan(score).any():
            raise TPPError(
                f"the criterion gave nan for filters of {member.leaf}: are its weights "
                "and their statistics finite?"
            )
        scores.append(score)
    return REDUCTIONS[reduce](np.stack(scores))


def _scales(group: Group) -> list[Member]:
    """Lists the scales of the norms that a group's channels run through."""
    found = [
        member
        for member in group.members
        if member.role == "along" and member.leaf.rpartition(".")[2] in _SCALES
    ]
    if not found:
        raise TPPError(
            f"the criterion 'bn_scale' needs a norm after {group.name}, with a "
            f"parameter named {' or '.join(_SCALES)}: skip that layer, or choose "
            "another criterion"
        )
    return found


def _statistic(
    member: Member, leaves: Mapping[str, Any], statistics: Mapping[str, Any]
) -> np.ndarray:
    shape = np.shape(leaves[member.leaf])
    if member.leaf not in statistics:
        raise TPPError(
            f"there is no statistic for {member.leaf}: the tree of statistics must be "
            "named like the parameters"
        )
    array = np.asarray(statistics[member.leaf])
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise TPPError(
            f"the statistic for {member.leaf} has shape {array.shape}, which does not "
            f"fit the parameter's {shape}"
        ) from None
