"""Importance scores: which filters matter least.

A criterion scores the filters of one layer, float ``[n, d]``: row i holds all weights
that make channel i. The lowest scores are pruned first. Some criteria need more than
weights: their second argument ``[n, d]`` holds a statistic for each weight, from
:mod:`tpp_jax.pruning.statistics`. A group's channels are scored in each layer that
produces them, and the scores of a channel are reduced to one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from tpp_jax.errors import TPPError
from tpp_jax.graph.groups import Group, Member

Filters = Float[np.ndarray, "n d"]
Scores = Float[np.ndarray, " n"]
Score = Callable[..., Scores]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A way to score the filters of a layer; the lowest scores are pruned.

    Attributes:
      score: Function ``(filters) -> scores``, from float ``[n, d]`` to float ``[n]``;
        with statistics ``(filters, statistics) -> scores``, both float ``[n, d]``.
      statistics: Name of the function of :mod:`tpp_jax` that measures the statistics;
        None if the weights are enough. A user's own function of two arguments needs no
        name: it is called with whatever tree ``make_plan`` is given.
      of: Arrays that are scored: the ``"kernels"`` that make the channels, or the
        scales of the ``"norms"`` that the channels run through.

    Example:
      >>> widest = Criterion(lambda filters: np.ptp(filters, axis=1))
      >>> widest.score(np.array([[1.0, 4.0], [2.0, 2.0]])).tolist()
      [3.0, 0.0]
    """

    score: Score
    statistics: str | None = None
    of: Literal["kernels", "norms"] = "kernels"


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
    "l1": Criterion(l1),
    "l2": Criterion(l2),
    "bn_scale": Criterion(bn_scale, of="norms"),
    "fpgm": Criterion(fpgm),
    "lamp": Criterion(lamp),
    "taylor": Criterion(taylor, statistics="loss_gradient"),
    "taylor_fo": Criterion(taylor_fo, statistics="loss_gradient"),
    "hessian": Criterion(hessian, statistics="hessian_diagonal"),
    "activation": Criterion(activation, statistics="activation_means"),
}
"""The criteria that have a name, in the order in which messages list them."""

REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda scores: np.mean(scores, axis=0),
    "sum": lambda scores: np.sum(scores, axis=0),
    "max": lambda scores: np.max(scores, axis=0),
    "first": lambda scores: scores[0],
}


def find_criterion(
    criterion: str | Criterion | Score, seed: int, has_statistics: bool = False
) -> Criterion:
    """Returns a criterion by name.

    Args:
      criterion: Name in :data:`CRITERIA`, or ``"random"``; a criterion is returned as
        it is, and a function becomes one that scores kernels.
      seed: Seed of ``"random"``, which draws new numbers for every layer.
      has_statistics: Whether there are statistics for it.

    Raises:
      TPPError: The name is unknown, or the statistics are missing or not used.
    """
    if isinstance(criterion, str):
        if criterion == "random":
            draws = np.random.default_rng(seed)
            found = Criterion(lambda filters: draws.random(filters.shape[0]))
        elif criterion in CRITERIA:
            found = CRITERIA[criterion]
        else:
            raise TPPError(
                f"unknown criterion {criterion!r}: choose one of "
                f"{', '.join([*CRITERIA, 'random'])}, or pass a function from filters "
                "[n, d] to scores [n]"
            )
        if has_statistics and found.statistics is None:
            with_statistics = [name for name, c in CRITERIA.items() if c.statistics]
            raise TPPError(
                f"the criterion {criterion!r} has no use for statistics; "
                f"{', '.join(with_statistics)} and functions of two arguments have"
            )
    else:
        found = criterion if isinstance(criterion, Criterion) else Criterion(criterion)
    if found.statistics is not None and not has_statistics:
        raise TPPError(
            f"the criterion {_name(criterion)!r} needs more than weights: pass "
            f"statistics=tpp_jax.{found.statistics}(...)"
        )
    return found


def _name(criterion: str | Criterion | Score) -> str:
    if isinstance(criterion, str):
        return criterion
    score = criterion.score if isinstance(criterion, Criterion) else criterion
    return getattr(score, "__name__", repr(score))


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
      group: Group to score.
      leaves: Parameter arrays by dotted name.
      criterion: Criterion that scores the filters of one layer.
      reduce: Name in :data:`REDUCTIONS`: how a channel's scores in the layers that
        produce it become one; ``"first"`` takes the score in the first layer.
      statistics: Arrays by dotted name that can be broadcast to the parameters; the
        second argument of the criterion.

    Raises:
      TPPError: There is nothing to score, a statistic is missing or of another shape,
        or the criterion did not return one number per filter.
    """
    members = [m for m in group.members if m.role == "produced"]
    if criterion.of == "norms":
        members = _scales(group)
    scores = []
    for member in members:
        arguments = [filters_of(member, leaves[member.leaf])]
        if statistics is not None:
            array = _statistic(member, leaves, statistics)
            arguments.append(filters_of(member, array))
        score = np.asarray(criterion.score(*arguments))
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
            f"a criterion of norms' scales needs a norm after {group.name}, with a "
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
