"""The parts of each parameter that a plan keeps: masks of its axes, and its shape."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool

from tpp_jax.graph.groups import Group, Member
from tpp_jax.pruning.plan import Indices, Plan

Mask = Bool[Array, " n"] | Bool[np.ndarray, " n"]


def keep_masks(plan: Plan, leaf: str) -> dict[int, tuple[Mask, int]]:
    """Returns the positions of a parameter's axes that a plan keeps.

    Args:
      plan: Plan of the channels to keep; may be traced.
      leaf: Dotted name of the parameter.

    Returns:
      Axis → (bool ``[n]``, True for kept positions; number of kept positions), for the
      axes that lose positions.
    """
    cut = [
        (group, member)
        for group, member in plan.groups.members.get(leaf, ())
        if plan.kept_count(group) < group.size
    ]
    masks: dict[int, tuple[Mask, int]] = {}
    for axis in dict.fromkeys(member.axis for _, member in cut):
        n = plan.groups.shapes[leaf][axis]
        on_axis = [(group, member) for group, member in cut if member.axis == axis]
        mask: Mask = np.ones(n, bool)
        for group, member in on_axis:
            channels = _channel_mask(plan.kept[group.name], group.size)[:, None]
            if isinstance(mask, np.ndarray) and isinstance(channels, np.ndarray):
                mask[member.positions] &= channels
            else:
                rows = jnp.ones(n, bool).at[member.positions].set(channels)
                mask = jnp.asarray(mask) & rows
        if isinstance(mask, np.ndarray):
            masks[axis] = mask, int(mask.sum())
        else:
            masks[axis] = mask, _kept_positions(plan, n, on_axis)
    return masks


def _channel_mask(kept: Indices, size: int) -> Mask:
    """Returns bool ``[size]``, True for the kept channels."""
    if isinstance(kept, Tracer):
        return jnp.zeros(size, bool).at[kept].set(True)
    mask = np.zeros(size, bool)
    mask[np.asarray(kept)] = True
    return mask


def _kept_positions(plan: Plan, n: int, on_axis: list[tuple[Group, Member]]) -> int:
    """Returns the number of positions of an axis that a traced plan keeps.

    Several groups may run through one position (the heads and the channels of a head
    through an attention's projection), which is kept if all of them keep it. Such
    positions are all combinations of the groups' channels, so the shares multiply.
    """
    through = np.zeros((n, len(on_axis)), bool)
    for i, (_, member) in enumerate(on_axis):
        through[member.positions.reshape(-1), i] = True
    total = 0
    for row, positions in zip(
        *np.unique(through, axis=0, return_counts=True), strict=True
    ):
        share = int(positions)
        for i in np.flatnonzero(row):
            group, _ = on_axis[i]
            share = share * plan.kept_count(group) // group.size
        total += share
    return total


def cut_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Returns the shapes, after the cut, of the parameters that a plan cuts."""
    found = {}
    for leaf in plan.groups.members:
        if masks := keep_masks(plan, leaf):
            shape = plan.groups.shapes[leaf]
            found[leaf] = tuple(
                masks[axis][1] if axis in masks else n for axis, n in enumerate(shape)
            )
    return found
