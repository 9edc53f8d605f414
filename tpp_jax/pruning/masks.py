"""The parts of each parameter that a plan keeps: masks of its axes, and its shape."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tpp_jax.graph.arrays import Mask, Positions
from tpp_jax.graph.groups import Group, Member
from tpp_jax.pruning.plan import Indices, Plan


def keep_masks(plan: Plan, leaf: str) -> dict[int, Positions]:
    """Returns the positions of a parameter's axes that a plan keeps.

    Args:
      plan: Plan of the channels to keep; may be traced.
      leaf: Dotted name of the parameter.

    Returns:
      Axis → positions that are kept, for the axes that lose positions.
    """
    cut = [
        (group, member)
        for group, member in plan.groups.members.get(leaf, ())
        if plan.kept_count(group) < group.size
    ]
    masks: dict[int, Positions] = {}
    for axis in dict.fromkeys(member.axis for _, member in cut):
        n = plan.groups.shapes[leaf][axis]
        on_axis = [(group, member) for group, member in cut if member.axis == axis]
        mask: Mask = np.ones(n, bool)
        steps = None
        for group, member in on_axis:
            own = _positions_mask(plan.kept[group.name], member, n)
            mask = mask & own
            steps = member.steps if own.ndim > 1 else steps
        if isinstance(mask, np.ndarray):
            count = int(mask.sum()) // (1 if steps is None else len(mask))
        else:
            count = _kept_positions(plan, n, on_axis)
        masks[axis] = Positions(mask, count, steps)
    return masks


def _positions_mask(kept: Indices, member: Member, n: int) -> Mask:
    """Returns bool ``[n]`` or ``[steps, n]``, False where pruned channels are."""
    size = len(member.positions)
    if isinstance(kept, Tracer):
        if kept.ndim > 1:
            return jax.vmap(lambda own: _positions_mask(own, member, n))(kept)
        channels = jnp.zeros(size, bool).at[kept].set(True)[:, None]
        return jnp.ones(n, bool).at[member.positions].set(channels)
    kept = np.asarray(kept)
    channels = np.zeros((*kept.shape[:-1], size), bool)
    layers = np.arange(math.prod(kept.shape[:-1]))[:, None]  # one, if not of a loop
    channels.reshape(-1, size)[layers, kept.reshape(len(layers), -1)] = True
    mask = np.ones((*kept.shape[:-1], n), bool)
    mask[..., member.positions] = channels[..., None]
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
                masks[axis].number if axis in masks else n
                for axis, n in enumerate(shape)
            )
    return found
