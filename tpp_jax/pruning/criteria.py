"""Importance scores of filters.

A criterion scores the filters of one layer, float ``[n, d]``: row i holds all weights
that produce channel i. The lowest scores are pruned first. Some criteria need more than
weights: their second argument ``[n, d]`` holds a statistic for each weight, from
:mod:`tpp_jax.pruning.statistics`. The channels of a group are scored in each layer that
produces them, and the scores of a channel are reduced to one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import on_host
from tpp_jax.graph.groups import Group, Member
from tpp_jax.pruning.loops import of_step
from tpp_jax.pruning.moments import Moments
from tpp_jax.pruning.obs import obs
from tpp_jax.pruning.scoring_on_devices import can_score, scores_on_devices

Filters = Float[np.ndarray | Array, "n d"]
Scores = Float[np.ndarray | Array, " n"]
Score = Callable[..., Scores]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A way to score the filters of a layer; the lowest scores are pruned.

    Attributes:
      score: Function ``(filters) -> scores``, from float ``[n, d]`` to float ``[n]``;
        with statistics ``(filters, statistics) -> scores``, both float ``[n, d]``. Of
        consumers ``(weights, means, variances) -> scores``, all float ``[n, d]``: the
        weights that read a channel, and the moments of what they are multiplied with.
        Of groups ``(group, leaves, moments) -> scores``, float ``[group.size]``: the
        parameters by name, and the result of :func:`tpp_jax.input_moments`.
      statistics: Name of the function of :mod:`tpp_jax` that measures the statistics;
        None if the weights are enough. A user's own function of two arguments needs no
        name: it is called with the statistics that ``make_plan`` receives.
      of: Arrays that are scored: the ``"kernels"`` that produce the channels, the
        scales of the ``"norms"`` that the channels run through, or the kernels of the
        ``"consumers"`` that read them; scores of several consumers are added. Or all
        arrays of the ``"groups"``.
      additive: Whether scores are errors that add up, so that of several groups those
        channels are removed first that save most for a given error.

    Example:
      >>> widest = Criterion(lambda filters: np.ptp(filters, axis=1))
      >>> widest.score(np.array([[1.0, 4.0], [2.0, 2.0]])).tolist()
      [3.0, 0.0]
    """

    score: Score
    statistics: str | None = None
    of: Literal["kernels", "norms", "consumers", "groups"] = "kernels"
    additive: bool = False


# Names that libraries give to the scale of a norm.
_SCALES = ("scale", "gamma", "weight")


def l1(filters: Filters) -> Scores:
    """Mean absolute weight (TPP section 3.2; Li et al. 2017)."""
    xp = _numpy_of(filters)
    return xp.asarray(xp.mean(xp.abs(filters), axis=1, dtype=np.float64))


def l2(filters: Filters) -> Scores:
    """Root mean squared weight."""
    xp = _numpy_of(filters)
    return xp.sqrt(xp.mean(xp.square(filters), axis=1))


def bn_scale(filters: Filters) -> Scores:
    """Absolute scale of the norm that the channels run through (Liu et al. 2017).

    Its ``filters`` are the scales of the norm; those of other criteria are kernels.
    """
    return l1(filters)


def fpgm(filters: Filters) -> Scores:
    """Distance to the other filters of the layer (FPGM, He et al. 2019).

    The sum of distances of the paper, divided by the number of other filters and by
    ``√d``. The division keeps the order within a layer and gives the scores of every
    layer the magnitude of :func:`l2`.
    """
    xp, (n, d) = _numpy_of(filters), filters.shape
    exact = filters.astype(np.float64)
    squares = xp.sum(xp.square(exact), axis=1)
    totals = []
    for start in range(0, n, 1024):  # in blocks: all pairs at once may not fit
        block = slice(start, start + 1024)
        squared = squares[block, None] + squares - 2 * exact[block] @ exact.T
        totals.append(xp.sqrt(xp.maximum(squared, 0)).sum(axis=1))
    return xp.concatenate(totals) / (max(n - 1, 1) * np.sqrt(d))


def lamp(filters: Filters) -> Scores:
    """Squared norm of a filter, relative to all that are no smaller (LAMP).

    ``‖f‖² / Σ ‖f'‖²`` over the filters ``f'`` of the layer that are no smaller than
    ``f`` (Lee et al. 2021). The largest filter of every layer scores 1, so that scores
    of different layers can be compared.
    """
    xp = _numpy_of(filters)
    squares = xp.sum(xp.square(filters.astype(np.float64)), axis=1)
    order = xp.argsort(squares, stable=True)
    remaining = xp.cumsum(squares[order][::-1])[::-1]
    scores = squares[order] / xp.where(remaining > 0, remaining, 1)
    return scores[xp.argsort(order)]


def taylor(filters: Filters, gradients: Filters) -> Scores:
    """First-order change of the loss when the filter is removed: ``|Σ w · g|``.

    Molchanov et al. 2019, for the filter as one set of weights. Take the gradients in
    evaluation mode: a batch norm in training mode makes the sum zero for any filter.
    """
    return abs((filters * gradients).sum(axis=1))


def taylor_fo(filters: Filters, gradients: Filters) -> Scores:
    """Mean of ``(w · g)²``, the squared first-order change of the loss per weight.

    Molchanov et al. 2019, for each weight on its own; ``taylor-fo`` in TPP's code.
    """
    return ((filters * gradients) ** 2).mean(axis=1)


def hessian(filters: Filters, diagonal: Filters) -> Scores:
    """Second-order change of the loss at a minimum: ``½ Σ w² · h``.

    The Hessian is approximated by its diagonal (LeCun et al. 1990).
    """
    return (filters**2 * diagonal).sum(axis=1) / 2


def activation(filters: Filters, means: Filters) -> Scores:
    """Mean absolute activation of the channel; the weights are not used."""
    del filters
    return means.mean(axis=1)


def wanda(weights: Filters, means: Filters, variances: Filters) -> Scores:
    """Mean square of what the channel adds to its readers: ``E[h²]·‖w‖²``.

    Sun et al. 2023 for weights, An et al. 2024 for channels; ``w`` are the weights that
    read the channel ``h``.
    """
    return (weights**2 * (variances + means**2)).sum(axis=1)


def variance(weights: Filters, means: Filters, variances: Filters) -> Scores:
    """Variance of what the channel adds to its readers: ``Var[h]·‖w‖²`` (FLAP).

    An et al. 2024. The mean of a channel is lost with it, unless it is moved into a
    bias, as :func:`tpp_jax.compensate` does.
    """
    del means
    return (weights**2 * variances).sum(axis=1)


def _numpy_of(array: Any) -> Any:
    """Returns ``jax.numpy`` for filters that several devices hold."""
    return np if isinstance(array, np.ndarray) else jnp


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
    "wanda": Criterion(wanda, statistics="input_moments", of="consumers"),
    "variance": Criterion(variance, statistics="input_moments", of="consumers"),
    "obs": Criterion(obs, statistics="input_moments", of="groups", additive=True),
}
"""Criteria by name, in the order in which messages list them."""

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
      criterion: Name in :data:`CRITERIA`, or ``"random"``; a criterion is returned
        unchanged, and a function becomes a criterion that scores kernels.
      seed: Seed of ``"random"``, which draws new numbers for every layer.
      has_statistics: Whether the caller has statistics for the criterion.

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
                f"the criterion {criterion!r} uses no statistics; only "
                f"{', '.join(with_statistics)} and functions of two arguments do"
            )
    else:
        found = criterion if isinstance(criterion, Criterion) else Criterion(criterion)
    if found.statistics is not None and not has_statistics:
        raise TPPError(
            f"the criterion {_name(criterion)!r} needs more than weights: pass "
            f"statistics=tpp_jax.{found.statistics}(...)"
        )
    return found


def is_additive(criterion: str | Criterion | Score) -> bool:
    """Reports whether a criterion that is known is additive."""
    found = CRITERIA.get(criterion) if isinstance(criterion, str) else criterion
    return isinstance(found, Criterion) and found.additive


def _name(criterion: str | Criterion | Score) -> str:
    if isinstance(criterion, str):
        return criterion
    score = criterion.score if isinstance(criterion, Criterion) else criterion
    return getattr(score, "__name__", repr(score))


def filters_of(member: Member, array: Any) -> Filters:
    """Returns the filters in one kernel; row c holds all weights of channel c."""
    positions = member.positions
    # On the host: on a device every new shape would be compiled for.
    array = np.asarray(array)
    n = array.shape[member.axis]
    if member.axis == array.ndim - 1 and np.array_equal(positions[:, 0], np.arange(n)):
        rows = array.reshape(-1, n).T  # a view: a copy would dominate the run time
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
    statistics: Mapping[str, Any] | Moments | None = None,
) -> Scores:
    """Returns the score of each of a group's channels, float ``[group.size]``.

    Channels of layers in a loop that may keep different ones are scored in each layer
    by itself, ``[group.steps, group.size]``.

    Args:
      group: Group to score.
      leaves: Parameter arrays by dotted name.
      criterion: Criterion that scores the filters of one layer.
      reduce: Name in :data:`REDUCTIONS` of the function that combines the scores of a
        channel in the layers that produce it; ``"first"`` takes that of the first.
      statistics: Arrays by dotted name that can be broadcast to the parameters, the
        second argument of the criterion; or input moments.

    Raises:
      TPPError: There is nothing to score, a statistic is missing or has the wrong
        shape, or the criterion did not return one number per filter.
    """
    if group.steps is not None:
        if isinstance(statistics, Mapping):
            members = (m for m in group.members if m.leaf in statistics)
            statistics = {m.leaf: _statistic(m, leaves, statistics) for m in members}
        steps = range(group.steps)
        parts = [of_step(group, leaves, statistics, step) for step in steps]
        return np.stack(
            [group_scores(one, own, criterion, reduce, s) for one, own, s in parts]
        )
    if criterion.of in ("consumers", "groups"):
        if not isinstance(statistics, Moments):
            raise TPPError(
                "a criterion of consumers needs the moments of what they read: pass "
                "statistics=tpp_jax.input_moments(...)"
            )
        if criterion.of == "groups":
            scores = criterion.score(group, leaves, statistics)
            return _checked(scores, group.name, group)
        return _consumers_score(group, leaves, criterion, statistics)
    if isinstance(statistics, Moments):
        raise TPPError(
            "input moments are for criteria of consumers: wanda, variance, obs. Other "
            "criteria need statistics named like the parameters"
        )
    members = [m for m in group.members if m.role == "produced"]
    if criterion.of == "norms":
        members = _scales(group)
    # Kernels of a removed branch have filters without weights.
    members = [member for member in members if np.size(leaves[member.leaf])]
    if not members:
        return np.zeros(group.size)
    scores = []
    for member in members:
        arrays = [leaves[member.leaf]]
        if statistics is not None:
            arrays.append(_statistic(member, leaves, statistics))
        found = _score(criterion, member, arrays)
        scores.append(_checked(found, member.leaf, group))
    return REDUCTIONS[reduce](np.stack(scores))


def _score(criterion: Criterion, member: Member, arrays: list[Any]) -> Any:
    """Returns the scores of one kernel, from it and its statistics."""
    found = None
    if can_score(arrays[0]):
        pure = criterion in CRITERIA.values()
        found = scores_on_devices(criterion.score, member, arrays, pure=pure)
    if found is None:
        kernel, *others = (np.asarray(array) for array in arrays)
        others = [np.broadcast_to(array, kernel.shape) for array in others]
        filters = (filters_of(member, array) for array in (kernel, *others))
        found = criterion.score(*filters)
    return found


def _checked(score: Any, leaf: str, group: Group) -> Scores:
    """Returns scores of a group's channels in one parameter, if they are such."""
    score = np.asarray(score)
    if score.shape != (group.size,):
        raise TPPError(
            f"the criterion returned an array of shape {score.shape} for "
            f"{leaf}; expected one score for each of its "
            f"{group.size} filters"
        )
    if np.isnan(score).any():
        raise TPPError(
            f"the criterion returned nan for filters of {leaf}: check that "
            "its weights and their statistics are finite"
        )
    return score


def _consumers_score(
    group: Group,
    leaves: Mapping[str, Any],
    criterion: Criterion,
    moments: Moments,
) -> Scores:
    """Returns the scores of a group's channels, summed over the kernels that read them.

    Raises:
      TPPError: There are no moments of a kernel that reads the channels.
    """
    total = np.zeros(group.size)
    for member, entry in moments.readers_of(group):
        leaf = leaves[member.leaf]
        if can_score(leaf) and entry.reads_all(leaf.shape, member.axis):
            shape = [-1 if i == member.axis else 1 for i in range(leaf.ndim)]
            order = np.argsort(entry.positions[member.axis])
            means, variances = entry.mean[0][order], entry.variance[0][order]
            arrays = [leaf, means.reshape(shape), variances.reshape(shape)]
            total += _checked(_score(criterion, member, arrays), member.leaf, group)
            continue
        leaf = on_host(leaf)
        index = entry.weight_index()
        moments_of_rows = entry.mean[:, :, None], entry.variance[:, :, None]
        arguments = []
        for array in (leaf.reshape(-1)[index], *moments_of_rows):
            placed = np.zeros(leaf.size)  # weights that are not read here have no part
            placed[index] = array
            arguments.append(filters_of(member, placed.reshape(leaf.shape)))
        total += _checked(criterion.score(*arguments), member.leaf, group)
    return total


def _scales(group: Group) -> list[Member]:
    """Lists the scales of the norms that a group's channels run through."""
    found = [
        member
        for member in group.members
        if member.role == "along" and member.leaf.rpartition(".")[2] in _SCALES
    ]
    if not found:
        raise TPPError(
            f"a criterion that scores norms needs a norm after {group.name}, with a "
            f"parameter named {' or '.join(_SCALES)}: skip that layer, or choose "
            "another criterion"
        )
    return found


def _statistic(
    member: Member, leaves: Mapping[str, Any], statistics: Mapping[str, Any]
) -> Any:
    shape = np.shape(leaves[member.leaf])
    if member.leaf not in statistics:
        raise TPPError(
            f"there is no statistic for {member.leaf}: the leaves of the statistics "
            "must have the names of the parameters"
        )
    array = statistics[member.leaf]
    try:
        fits = np.broadcast_shapes(np.shape(array), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise TPPError(
            f"the statistic for {member.leaf} has shape {np.shape(array)}, which does "
            f"not fit the parameter's {shape}"
        )
    return array
