"""Where zeros are after an operation that only moves data.

A set of axes is followed: those along which the pruned positions of an array are zero.
Each function returns these axes of every result, given those of the operands. Axes that
lose no positions may be among the results.
"""

import itertools
from collections.abc import Callable, Collection, Sequence

from tpp_jax.graph.unfolding import Equation

Zero = frozenset[int]
"""Axes of a value along which its pruned positions are zero."""

Lost = Callable[[int | None], Zero]
"""Function from a value number to the axes that lose positions."""

Shapes = Sequence[tuple[int, ...]]
"""Unpruned shape of each value, by number."""


def renumbered(zero: Zero, gone: Collection[int], rank: int) -> Zero:
    """Returns axes after some of them were removed from an array of a rank."""
    left = [axis for axis in range(rank) if axis not in gone]
    return frozenset(i for i, axis in enumerate(left) if axis in zero)


def _same(eqn: Equation, zero: list[Zero], shapes: Shapes, lost: Lost) -> list[Zero]:
    del shapes, lost
    return [zero[0] for _ in eqn.outputs]


def _broadcast(
    eqn: Equation, zero: list[Zero], shapes: Shapes, lost: Lost
) -> list[Zero]:
    del shapes, lost
    return [frozenset(eqn.params["broadcast_dimensions"][axis] for axis in zero[0])]


def _transpose(
    eqn: Equation, zero: list[Zero], shapes: Shapes, lost: Lost
) -> list[Zero]:
    del shapes, lost
    order = eqn.params["permutation"]
    return [frozenset(i for i, axis in enumerate(order) if axis in zero[0])]


def _reshape(eqn: Equation, zero: list[Zero], shapes: Shapes, lost: Lost) -> list[Zero]:
    """Axes that are merged or split: pruned pairs are zero if either part of them is.

    An axis that is one of several is zero only if all are.
    """
    value, [out] = eqn.operand(0), eqn.outputs
    before, after = shapes[value], shapes[out]
    ends = set(itertools.accumulate(before, int.__mul__))
    ends &= set(itertools.accumulate(after, int.__mul__))
    # Axes between two common products of sizes hold the same positions.
    runs = _runs(before, ends)
    not_zero = {runs[axis] for axis in lost(value) - zero[0]}
    own = _runs(after, ends)
    return [frozenset(axis for axis in lost(out) if own[axis] not in not_zero)]


def _runs(shape: tuple[int, ...], ends: Collection[int]) -> list[int]:
    """Returns the number of the run that each axis is in."""
    starts = itertools.accumulate((1, *shape[:-1]), int.__mul__)
    return [sum(end <= start for end in ends if end > 1) for start in starts]


def _squeeze(eqn: Equation, zero: list[Zero], shapes: Shapes, lost: Lost) -> list[Zero]:
    del lost
    rank = len(shapes[eqn.operand(0)])
    return [renumbered(zero[0], eqn.params["dimensions"], rank)]


def _unstack(eqn: Equation, zero: list[Zero], shapes: Shapes, lost: Lost) -> list[Zero]:
    del lost
    rank = len(shapes[eqn.operand(0)])
    return [renumbered(zero[0], {eqn.params["axis"]}, rank) for _ in eqn.outputs]


def _concatenate(
    eqn: Equation, zero: list[Zero], shapes: Shapes, lost: Lost
) -> list[Zero]:
    del shapes
    along = eqn.params["dimension"]
    [out] = eqn.outputs
    return [
        frozenset(
            axis
            for axis in lost(out)
            if all(
                axis in own or (axis == along and axis not in lost(n))
                for n, own in zip(eqn.inputs, zero, strict=True)
            )
        )
    ]


def _stack(eqn: Equation, zero: list[Zero], shapes: Shapes, lost: Lost) -> list[Zero]:
    del shapes, lost
    along = eqn.params["axis"]
    everywhere = frozenset.intersection(*zero)
    return [frozenset(axis + (axis >= along) for axis in everywhere)]


def _update(eqn: Equation, zero: list[Zero], shapes: Shapes, lost: Lost) -> list[Zero]:
    del shapes, lost, eqn
    return [zero[0] & zero[1]]


def _gather(eqn: Equation, zero: list[Zero], shapes: Shapes, lost: Lost) -> list[Zero]:
    del lost
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    gone = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
    table = shapes[eqn.operand(0)]
    windows = [axis for axis in range(len(table)) if axis not in gone]
    return [
        frozenset(
            at
            for at, axis in zip(dims.offset_dims, windows, strict=True)
            if axis in zero[0] and sizes[axis] == table[axis]
        )
    ]


def _scatter(eqn: Equation, zero: list[Zero], shapes: Shapes, lost: Lost) -> list[Zero]:
    del lost
    dims = eqn.params["dimension_numbers"]
    gone = {*dims.inserted_window_dims, *dims.operand_batching_dims}
    array = shapes[eqn.operand(0)]
    windows = [axis for axis in range(len(array)) if axis not in gone]
    return [
        frozenset(
            axis
            for at, axis in zip(dims.update_window_dims, windows, strict=True)
            if axis in zero[0] and at in zero[2]
        )
    ]


def _loop_slice(
    eqn: Equation, zero: list[Zero], shapes: Shapes, lost: Lost
) -> list[Zero]:
    del lost
    return [renumbered(zero[0], {0}, len(shapes[eqn.operand(0)]))]


def _loop_stack(
    eqn: Equation, zero: list[Zero], shapes: Shapes, lost: Lost
) -> list[Zero]:
    del eqn, shapes, lost
    return [frozenset(axis + 1 for axis in own) for own in zero or [frozenset()]]


Rule = Callable[[Equation, list[Zero], Shapes, Lost], list[Zero]]

ZEROS: dict[str, Rule] = {
    **dict.fromkeys("dynamic_slice pad rev slice split tile".split(), _same),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dynamic_update_slice": _update,
    "gather": _gather,
    "loop_slice": _loop_slice,
    "loop_stack": _loop_stack,
    "reshape": _reshape,
    "scatter": _scatter,
    "scatter-add": _scatter,
    "squeeze": _squeeze,
    "stack": _stack,
    "transpose": _transpose,
    "unstack": _unstack,
}
