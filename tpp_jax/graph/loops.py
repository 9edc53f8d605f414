"""Groups inside loops over layers: whether each layer may keep channels of its own.

A ``scan`` over stacked layers is read once, with one step's part of every stack. The
channels of a step belong to that step alone unless something that all steps have in
common, or that one hands on to the next, runs along them. The units of an MLP are
such channels; those of the residual stream, which is carried, are not.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Int

from tpp_jax.graph.bundles import rows_of
from tpp_jax.graph.labels import Axis, Channels
from tpp_jax.graph.records import Group
from tpp_jax.graph.tracing import Trace


class Loops:
    """The loops of a computation, and what they go through.

    Attributes:
      axes: Name of a leaf that is read by loops alone → the axis that they go through.
      shared: Whether a channel is that of several steps, bool ``[channels]``.
    """

    def __init__(
        self,
        traced: Trace,
        axes: Mapping[int | None, list[Axis]],
        solution: Channels,
    ) -> None:
        """Finds what steps have in common.

        Args:
          traced: Computation.
          axes: Axes of each value.
          solution: Labels expressed in channels.
        """
        self.axes = _loop_axes(traced) if traced.loops else {}
        self.shared: Bool[np.ndarray, " channels"] = np.zeros(len(solution.stuck), bool)
        if self.axes:
            crossing = {n for loop in traced.loops for n in loop}
            for eqn in traced.equations:
                if eqn.primitive == "loop_stack":
                    crossing.update(n for n in eqn.inputs if n is not None)
            labels = [axis for n in crossing for axis in axes.get(n, ())]
            for _, channels in rows_of(solution, labels):
                self.shared[channels] = True

    def own_steps(
        self,
        group: Group,
        channels: Int[np.ndarray, " size"],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> Group:
        """Returns a group, with its steps if each may keep channels of its own.

        Args:
          group: Group.
          channels: Its channels.
          shapes: Shapes of the leaves by name.
        """
        along = [self.axes.get(member.leaf) for member in group.members]
        if not self.axes or None in along or self.shared[channels].any():
            return group
        pairs = list(zip(group.members, along, strict=True))
        sizes = {
            shapes[member.leaf][axis] for member, axis in pairs if axis is not None
        }
        if len(sizes) > 1 or any(member.axis == axis for member, axis in pairs):
            return group
        members = tuple(dataclasses.replace(m, steps=axis) for m, axis in pairs)
        return dataclasses.replace(group, members=members, steps=sizes.pop())


def _loop_axes(traced: Trace) -> dict[str, int]:
    """Returns the leaves that only loops read, and the axis that these go through.

    A leaf may be cast and transposed before the loop.
    """
    readers: dict[int, list[tuple[str, tuple[int, ...], int]]] = {}
    for eqn in traced.equations:
        for n in eqn.inputs:
            if n is not None:
                order = tuple(eqn.params.get("permutation", ()))
                first = eqn.outputs[0] if eqn.outputs else -1
                readers.setdefault(n, []).append((eqn.primitive, order, first))
    ends = set(traced.outputs)
    found = {}
    for leaf, value in traced.leaves.items():
        axes: set[int | None] = set()
        left = [(value, tuple(range(len(traced.shapes[value]))))]
        while left:
            n, order = left.pop()
            if n in ends or not readers.get(n):
                axes.add(None)
            for primitive, moved, after in readers.get(n, ()):
                if primitive == "loop_slice":
                    axes.add(order[0])
                elif primitive == "transpose":
                    left.append((after, tuple(order[i] for i in moved)))
                elif primitive in ("convert_element_type", "copy", "copy_p"):
                    left.append((after, order))
                else:
                    axes.add(None)
        if len(axes) == 1 and (axis := axes.pop()) is not None:
            found[leaf] = axis
    return found
