"""The positions of each group's channels in each array, to be compared."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from tpp_jax.graph.records import Group, Groups, Slot
from tpp_jax.pruning.masks import keep_masks
from tpp_jax.pruning.plan import Plan

Place = tuple[str, int, int, bytes]
"""A leaf, an axis, the number of positions of each channel, and the positions."""


def arrangement(groups: Groups, plan: Plan | None = None) -> set[frozenset[Place]]:
    """Returns the positions of all groups' channels in each array, to be compared.

    Args:
      groups: Groups.
      plan: Plan; if given, the positions are those after slicing by it, in the first of
        the layers that a loop goes through.
    """
    plan = None if plan is None else plan.of_step(0)

    @functools.cache
    def masks(leaf: str) -> dict[int, Any]:
        return {} if plan is None else keep_masks(plan, leaf)

    return {_layout(group, plan, masks) for group in groups} - {frozenset()}


def _layout(
    group: Group, plan: Plan | None, masks: Callable[[str], dict[int, Any]]
) -> frozenset[Place]:
    """Returns the positions of a group's channels in each array, as comparable values.

    Args:
      group: Group.
      plan: Plan; if given, the positions are those after slicing by it.
      masks: Function from a leaf to the plan's :func:`keep_masks`, shared by groups.

    Returns:
      Place of every member. The result is empty for a group that cannot be pruned or
      is left with one channel: an axis of size one is not coupled with any other, so
      that such a group cannot be found again.
    """
    size = group.size if plan is None else plan.kept_count(group)
    if size <= 1 or group.reason is not None:
        return frozenset()
    layout = set()
    for member in group.members:
        leaf, axis, positions = member.leaf, member.axis, member.positions
        if plan is not None:
            positions = positions[np.asarray(plan.kept[group.name])]
            if axis in masks(leaf):
                keep = np.asarray(masks(leaf)[axis].mask)
                moved = np.cumsum(keep) - 1
                positions = moved[positions[keep[positions]]].reshape(size, -1)
        if positions.shape[1] == 1:
            positions = np.sort(positions, axis=0)
        else:
            positions = np.sort(positions, axis=1)
            positions = positions[np.argsort(positions[:, 0])]
        layout.add((leaf, axis, positions.shape[1], positions.tobytes()))
    return frozenset(layout)


def alike_slots(groups: Groups, i: int, j: int) -> tuple[Slot, Slot] | None:
    """Returns an axis that each of two groups produces, with the same layout.

    Args:
      groups: All groups.
      i: Index of one group.
      j: Index of the other group.

    Returns:
      The axis of each group; None if no two axes have the same layout.
    """
    for one in groups[i].members:
        for other in groups[j].members:
            slots = (one.leaf, one.axis), (other.leaf, other.axis)
            if one.role == other.role == "produced" and (
                _slot_layout(groups, slots[0], i) == _slot_layout(groups, slots[1], j)
            ):
                return slots
    return None


def _slot_layout(
    groups: Groups, slot: Slot, i: int
) -> tuple[int, dict[int | None, bytes]]:
    """Returns the size of an axis and the positions of its groups, group i unnamed."""
    leaf, axis = slot
    return groups.shapes[leaf][axis], {
        None if n == i else n: member.positions.tobytes()
        for n, group in enumerate(groups)
        for member in group.members
        if (member.leaf, member.axis) == slot
    }
