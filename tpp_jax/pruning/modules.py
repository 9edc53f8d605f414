"""Pruning a Flax NNX module: its arrays, and the sizes that Flax keeps next to them.

The sliced state merged with the old structure is the smaller model, once its layers'
static sizes follow their arrays.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.pruning.bridge import follow_arrays, follow_inputs
from tpp_jax.pruning.functions import set_evaluation
from tpp_jax.pruning.groups import Group, Groups, read_groups
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.slicing import keep_masks, slice_tree
from tpp_jax.pruning.tracing import trace

# A leaf, an axis of it, positions along the axis: how many for a channel, and which.
Place = tuple[str, int, int, bytes]


def prune(model: nnx.Module, plan: Plan) -> nnx.Module:
    """Returns a smaller model; the given one is untouched.

    The result is checked: its own groups must be those of the plan, narrower. So a
    size that a layer has written into it is found out here, even where the sliced
    model would run and compute something else.

    Args:
      model: the model that the plan was made for.
      plan: what is pruned; concrete.

    Returns:
      A new module of the same class with narrower layers.

    Raises:
      TPPError: the sliced model does not run, or arranges its channels in another
        way than the plan has it, since a layer has a size of its own written into it.
    """
    graphdef, state = nnx.split(model)
    sliced = slice_tree(plan, state)
    small = nnx.merge(graphdef, sliced)
    follow_arrays(small, plan.kept_blocks, plan.groups.shapes)
    name = type(model).__name__
    inputs = plan.groups.inputs
    try:
        # Without the names of what is trained, which splitting once more would tell.
        traced = trace(sliced_call(graphdef, plan), *inputs, params=sliced)
        found, _ = read_groups(traced, inputs, joined=plan.groups.joined)
    except (TypeError, ValueError) as error:
        raise TPPError(
            f"the sliced {name} does not run: one of its layers has a size written "
            "into it that does not follow its arrays. Skip that layer's channels in "
            f"the plan. The layer says: {error}"
        ) from error
    there = arrangement(found)
    masks = functools.cache(functools.partial(keep_masks, plan))
    for group in plan.groups:
        layout = _layout(group, plan, masks)
        if layout and layout not in there:
            raise TPPError(
                f"the sliced {name} runs, but arranges the channels of {group.name} in "
                "another way than planned: a size (a number of heads, say) is written "
                "into it that does not follow its arrays. Skip that layer in the plan"
            )
    follow_inputs(small, *inputs)
    return small


def sliced_call(graphdef: nnx.GraphDef, plan: Plan) -> Callable[..., Any]:
    """Returns ``call(state, *inputs)``: the smaller module run in evaluation mode."""

    def call(state: Any, *inputs: Any) -> Any:
        merged = nnx.merge(graphdef, state)
        follow_arrays(merged, plan.kept_blocks, plan.groups.shapes)
        set_evaluation(merged)
        return merged(*inputs)

    return call


def arrangement(groups: Groups, plan: Plan | None = None) -> set[frozenset[Place]]:
    """Tells where the channels of every group stand in each array, to be compared.

    Args:
      groups: the groups.
      plan: if given, what is told is how slicing by it is to leave them.
    """
    masks = functools.cache(functools.partial(keep_masks, plan))
    return {_layout(group, plan, masks) for group in groups} - {frozenset()}


def _layout(
    group: Group, plan: Plan | None, masks: Callable[[str], dict[int, Any]]
) -> frozenset[Place]:
    """Tells where a group's channels stand in each array, as comparable values.

    Args:
      group: the group.
      plan: if given, the layout is the one that slicing by it is to give.
      masks: the plan's :func:`keep_masks` of a leaf, which most groups share.

    Returns:
      ``(leaf, axis, positions)`` of every member; nothing for a group that cannot be
      pruned or is left with one channel: an axis of size one couples with nothing, so
      there would be nothing to be found of it.
    """
    size = group.size if plan is None else plan.kept_count(group)
    if size <= 1 or group.reason is not None:
        return frozenset()
    layout = set()
    for leaf, axis, positions, _, _ in group.members:
        if plan is not None:
            positions = positions[np.asarray(plan.kept[group.name])]
            if axis in masks(leaf):
                stays = np.asarray(masks(leaf)[axis][0])
                moved = np.cumsum(stays) - 1
                positions = moved[positions[stays[positions]]].reshape(size, -1)
        if positions.shape[1] == 1:
            positions = np.sort(positions, axis=0)
        else:
            positions = np.sort(positions, axis=1)
            positions = positions[np.argsort(positions[:, 0])]
        layout.add((leaf, axis, positions.shape[1], positions.tobytes()))
    return frozenset(layout)
