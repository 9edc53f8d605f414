"""Where the channels of each group stand in each array, to be compared."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from tpp_jax.graph.records import Group, Groups
from tpp_jax.pruning.masks import keep_masks
from tpp_jax.pruning.plan import Plan

# A leaf, an axis of it, positions along the axis: how many for a channel, and which.
Place = tuple[str, int, int, bytes]


def arrangement(groups: Groups, plan: Plan | None = None) -> set[frozenset[Place]]:
    """Tells where the channels of every group stand in each array, to be compared.

    Args:
      groups: the groups.
      plan: if given, the result is how slicing by it is to leave them.
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
    for member in group.members:
        leaf, axis, positions = member.leaf, member.axis, member.positions
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
