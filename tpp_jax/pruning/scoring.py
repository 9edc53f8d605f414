"""Scores of the channels of groups: a criterion's, or the user's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from tpp_jax.errors import TPPError
from tpp_jax.graph.functions import split_module
from tpp_jax.graph.naming import longest_known_suffix, named_leaves
from tpp_jax.graph.records import Group, Groups
from tpp_jax.pruning.criteria import (
    CRITERIA,
    REDUCTIONS,
    Criterion,
    Score,
    Scores,
    find_criterion,
    group_scores,
)
from tpp_jax.pruning.moments import Moments


def channel_scores(
    groups: Groups,
    model: nnx.Module | Any,
    scored: Sequence[Group],
    *,
    criterion: str | Criterion | Score = "l1",
    statistics: Any = None,
    scores: Mapping[str, ArrayLike] | None = None,
    reduce: str = "mean",
    seed: int = 0,
) -> dict[str, Scores]:
    """Returns the scores of the channels of some groups, by the group's name.

    Args:
      groups: All groups of the model.
      model: Model with its weights, or parameter pytree.
      scored: Groups that are scored.
      criterion: Criterion of :func:`tpp_jax.make_plan`, as the other arguments.
      statistics: Statistics of the criterion.
      scores: The user's own scores, which replace those of the criterion.
      reduce: Function that combines the scores of several layers.
      seed: Seed of the random criterion.

    Raises:
      TPPError: The criterion or the reduction is unknown, statistics are missing, or
        the scores or the model do not fit the groups.
    """
    if reduce not in REDUCTIONS:
        raise TPPError(
            f"unknown reduce {reduce!r}: choose one of {', '.join(REDUCTIONS)}"
        )
    leaves = _by_parameter(model, groups)
    ranks = _own_scores(groups, scores or {})
    unscored = [g for g in scored if g.name not in ranks]
    _check_leaves(groups, leaves, unscored)
    if unscored or not ranks:
        scorer = find_criterion(criterion, seed, statistics is not None)
        extra = statistics
        if statistics is not None and not isinstance(statistics, Moments):
            extra = _by_parameter(statistics, groups)
        for group in unscored:
            ranks[group.name] = group_scores(group, leaves, scorer, reduce, extra)
    elif isinstance(criterion, str) and criterion not in (*CRITERIA, "random"):
        find_criterion(criterion, seed)  # not needed, but an unknown name is a mistake
    return ranks


def _own_scores(groups: Groups, scores: Mapping[str, Any]) -> dict[str, Scores]:
    """Returns the user's scores as arrays.

    Raises:
      TPPError: The scores name no group, or are not one number for each of its
        channels.
    """
    found = {}
    check_mapping("scores", scores, "scores of its channels")
    for name, score in scores.items():
        if name not in {group.name for group in groups}:
            raise TPPError(
                f"scores name {name!r}, which is not a group: the groups are "
                f"{', '.join(group.name for group in groups)}"
            )
        size = groups[name].size
        abstract = isinstance(score, jax.ShapeDtypeStruct)
        array = np.zeros(0) if abstract else np.asarray(score)
        if array.dtype.kind not in "biuf" and not jnp.issubdtype(
            array.dtype, jnp.floating
        ):
            raise TPPError(
                f"the scores of {name} have dtype {array.dtype}: give real numbers"
            )
        steps = groups[name].steps
        if array.shape != (size,) and array.shape != (steps, size):
            own = f" in each of {steps} layers" if steps else ""
            more = f" or ({steps}, {size})" if steps else ""
            raise TPPError(
                f"the scores of {name} have shape {np.shape(score)}, but it has {size} "
                f"channels{own}: give an array of shape ({size},){more}"
            )
        if np.isnan(array).any():
            raise TPPError(f"the scores of {name} contain nan and cannot be ranked")
        # Half precision and booleans do not sort or compare correctly.
        found[name] = array.astype(np.float64)
    return found


def _by_parameter(tree: Any, groups: Groups) -> dict[str, Any]:
    """Returns the leaves of a tree by the names of the parameters that they belong to.

    The names of a Linen module's variables start with the collection's name.
    """
    found: dict[str, Any] = {}
    if isinstance(tree, nnx.Module):  # faster than through its state
        function = split_module(tree)[1]
        named = dict(zip(function.names, function.params, strict=True))
    else:
        named = named_leaves(tree)
    for name, leaf in named.items():
        parameter = longest_known_suffix(name, groups.shapes) or name
        # A copy of a parameter in another collection does not replace the parameter.
        if parameter not in found or name in (parameter, f"params.{parameter}"):
            found[parameter] = leaf
    return found


def _check_leaves(
    groups: Groups, leaves: Mapping[str, Any], scored: Sequence[Group]
) -> None:
    needed = {m.leaf for group in scored for m in group.members}
    for name, shape in groups.shapes.items():
        found = np.shape(leaves[name]) if name in leaves else None
        if found != shape and name in groups.members:
            here = "missing" if found is None else f"of shape {found}"
            raise TPPError(
                f"the groups are for another model: there {name} is of shape {shape}, "
                f"here it is {here}"
            )
        if name in needed and isinstance(leaves[name], jax.ShapeDtypeStruct):
            raise TPPError(
                f"{name} is abstract: give the weights, or scores for every group that "
                "is pruned"
            )


def check_mapping(name: str, value: Any, of: str) -> None:
    """Raises if an argument is not a mapping of names of groups."""
    if not isinstance(value, Mapping):
        raise TPPError(f"{name} is {value!r}, must be a dict of group → {of}")
