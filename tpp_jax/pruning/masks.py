"""What a plan leaves of each parameter: masks of its axes, and its shape."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from tpp_jax.graph.groups import Group, Member
from tpp_jax.pruning.plan import Plan


def keep_masks(plan: Plan, leaf: str) -> dict[int, tuple[Bool[Array, " n"], int]]:
    """Tells which positions of a parameter's axes stay.

    Args:
      plan: what is pruned.
      leaf: dotted name of the parameter.

    Returns:
      Axis → (bool ``[n]``, True where the position stays; how many stay), for the axes
      that lose something.
    """
    cut = [
        (group, member)
        for group, member in plan.groups.members.get(leaf, ())
        if plan.kept_count(group) < group.size
    ]
    masks: dict[int, tuple[Any, int]] = {}
    for axis in dict.fromkeys(member.axis for _, member in cut):
        n = plan.groups.shapes[leaf][axis]
        here = [(group, member) for group, member in cut if member.axis == axis]
        mask = np.ones(n, bool)
        for group, member in here:
            stays = _stays(plan.kept[group.name], group.size)[:, None]
            if isinstance(mask, np.ndarray) and isinstance(stays, np.ndarray):
                mask[member.positions] &= stays
            else:
                rows = jnp.ones(n, bool).at[member.positions].set(stays)
                mask = jnp.asarray(mask) & rows
        if isinstance(mask, np.ndarray):
            masks[axis] = mask, int(mask.sum())
        else:
            masks[axis] = mask, _kept_positions(plan, n, here)
    return masks


def _stays(kept: Any, size: int) -> Any:
    """Returns bool ``[size]``, True for the kept channels."""
    if not isinstance(kept, jax.core.Tracer):
        kept = np.asarray(kept)
        stays = np.zeros(size, bool)
        stays[kept] = True
        return stays
    return jnp.zeros(size, bool).at[kept].set(True)


def _kept_positions(plan: Plan, n: int, here: list[tuple[Group, Member]]) -> int:
    """Counts the positions of an axis that stay, whichever channels they are.

    Where several groups run through one position (the heads and the channels of a head
    through an attention's projection), it stays if it stays for each of them: such
    positions are all combinations of the groups' channels, so the shares multiply.
    """
    through = np.zeros((n, len(here)), bool)
    for i, (_, member) in enumerate(here):
        through[member.positions.reshape(-1), i] = True
    total = 0
    for row, positions in zip(
        *np.unique(through, axis=0, return_counts=True), strict=True
    ):
        share = int(positions)
        for i in np.flatnonzero(row):
            group, _ = here[i]
            share = share * plan.kept_count(group) // group.size
        total += share
    return total


def cut_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Returns the shape that each parameter is left with that loses something."""
    found = {}
    for leaf in plan.groups.members:
        if masks := keep_masks(plan, leaf):
            whole = plan.groups.shapes[leaf]
            found[leaf] = tuple(
                masks[axis][1] if axis in masks else n for axis, n in enumerate(whole)
            )
    return found
