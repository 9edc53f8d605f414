"""A group, its parameters and their statistics in one layer of a loop over layers.

What is scored is then a layer by itself, as if the layers were written out.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from tpp_jax.graph.records import Group, Member
from tpp_jax.pruning.moments import ConsumerMoments, Moments
from tpp_jax.pruning.scoring_on_devices import can_score


def of_step(
    group: Group,
    leaves: Mapping[str, Any],
    statistics: Mapping[str, Any] | Moments | None,
    step: int,
) -> tuple[Group, dict[str, Any], Any]:
    """Returns a group, its parameters and their statistics in one step of a loop.

    Args:
      group: Group with :attr:`Group.steps`.
      leaves: Parameters by name.
      statistics: Statistics by name, or moments; None if there are none.
      step: Index of the step.
    """
    axes = {m.leaf: m.steps for m in group.members if m.steps is not None}
    shapes = {leaf: np.shape(leaves[leaf]) for leaf in axes}

    def part(leaf: str, array: Any) -> Any:
        if can_score(array):
            array = jnp.broadcast_to(array, shapes[leaf])
        else:  # on the host: on a device every new shape would be compiled for
            array = np.broadcast_to(np.asarray(array), shapes[leaf])
        return array[(slice(None),) * axes[leaf] + (step,)]

    own = {leaf: part(leaf, leaves[leaf]) for leaf in axes}
    if isinstance(statistics, Moments):
        found = [entry for entry in statistics.consumers if entry.leaf in axes]
        entries = (_moments(e, shapes[e.leaf], axes[e.leaf], step) for e in found)
        statistics = Moments(tuple(entries), statistics.skipped)
    elif statistics is not None:
        there = axes.keys() & statistics.keys()
        statistics = {leaf: part(leaf, statistics[leaf]) for leaf in there}
    members = tuple(_without(member) for member in group.members)
    return dataclasses.replace(group, members=members, steps=None), own, statistics


def _without(member: Member) -> Member:
    """Returns a member of an array without the axis that the loop goes through."""
    assert member.steps is not None
    axis = member.axis - (member.axis > member.steps)
    return dataclasses.replace(member, axis=axis, steps=None)


def _moments(
    entry: ConsumerMoments, shape: tuple[int, ...], axis: int, step: int
) -> ConsumerMoments:
    """Returns the moments of one step of a loop, as those of its own kernel.

    Args:
      entry: Moments of all steps.
      shape: Shape of the stacked kernels.
      axis: Axis that the loop goes through.
      step: Index of the step.
    """
    at = np.unravel_index(entry.stacks, shape)[axis]
    here = at == step
    place = functools.partial(_without_axis, shape=shape, axis=axis)
    [first, *_] = entry.stacks[here]
    bias = entry.bias
    if bias is not None:
        bias = dataclasses.replace(bias, index=bias.index[here])
    return dataclasses.replace(
        entry,
        stacks=place(entry.stacks[here]),
        features=place(first + entry.features) - place(first),
        outputs=place(first + entry.outputs) - place(first),
        positions={i - (i > axis): own for i, own in entry.positions.items()},
        rows=entry.rows[here],
        mean=entry.mean[here],
        variance=entry.variance[here],
        covariance=None if entry.covariance is None else entry.covariance[here],
        bias=bias,
        gain=entry.gain[here],
        stream=None if entry.stream is None else entry.stream[here],
        steps=max(entry.steps // np.unique(at).size, 1),
    )


def _without_axis(
    index: Int[np.ndarray, "..."], shape: tuple[int, ...], axis: int
) -> Int[np.ndarray, "..."]:
    """Returns flat indices into an array without one of its axes."""
    places = list(np.unravel_index(index, shape))
    del places[axis]
    rest = (*shape[:axis], *shape[axis + 1 :])
    return np.asarray(np.ravel_multi_index(places, rest))
