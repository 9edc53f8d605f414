"""How the primitives that move data about tie positions together; see rules.py.

Reshapes, slices, concatenations, look-ups: nothing is computed here, positions get new
places. Where a size is a parameter of the operation, a supposition is noted
(``ctx.suppose``): that the size follows the channels, which is tried on the model.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jax.lax import GatherScatterMode

from tpp_jax.graph.context import Context
from tpp_jax.graph.labels import Axes

_INDEXED = "an axis that is indexed"
_LOOP = "the axis that a loop runs along"


def broadcast_in_dim(ctx: Context) -> list[Axes]:
    """Copies along new axes, and along axes of size one."""
    [shape] = ctx.shapes
    placed = dict(zip(ctx.params["broadcast_dimensions"], ctx.operands[0], strict=True))
    out = []
    for i, n in enumerate(shape):
        if i in placed and len(placed[i]) == n:
            out.append(placed[i])
        else:
            # Copies are all equal: the axis takes on whatever width it meets.
            out.append(ctx.fresh(n))
            if n > 1:
                ctx.suppose(out[-1])
    return [out]


def transpose(ctx: Context) -> list[Axes]:
    """The axes in another order."""
    return [[ctx.operands[0][i] for i in ctx.params["permutation"]]]


def reshape(ctx: Context) -> list[Axes]:
    """Axes merged, split, or both."""
    old, new = ctx.operands[0], ctx.shapes[0]
    out: Axes = []
    if 0 in new:  # nothing moves; which axes are the same is not known of the others
        same = [len(axis) == n > 0 for axis, n in zip(old, new, strict=False)]
        first = [*same, False].index(False)
        return [old[:first] + [ctx.fresh(n) for n in new[first:]]]
    for old_axes, new_axes in _matching_axes(tuple(map(len, old)), new):
        block = [old[i] for i in old_axes]
        sizes = tuple(new[j] for j in new_axes)
        if not block:
            out.append(ctx.fresh(1))  # a new axis of size one
        elif len(sizes) == 1:
            out.append(ctx.product(block))
            if len(block) > 1:
                ctx.suppose(out[-1])
        else:
            whole = ctx.product(block) if len(block) > 1 else block[0]
            parts = ctx.split(whole, sizes)
            for i, part in enumerate(parts):
                ctx.suppose(part, i)
            out += parts
    return [out]


@functools.lru_cache(maxsize=1024)
def _matching_axes(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[list[int], list[int]]]:
    """Splits a reshape into the smallest runs of axes of equal size.

    Every new axis is in one run, in order. Axes of size one are passed on where there
    are as many in a place before as after; others form a run of their own or join one.
    """
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while j < len(new):
        olds: list[int] = []
        news = [j]
        size, target = 1, new[j]
        if target == 1:
            ones = _ones(new, j)
            kept = ones == _ones(old, i)  # or one of them comes from nowhere
            runs += [([i + n] if kept else [], [j + n]) for n in range(ones)]
            i, j = i + ones * kept, j + ones
            continue
        j += 1
        while size != target:
            if size < target:
                if old[i] != 1:
                    olds.append(i)
                size *= old[i]
                i += 1
            else:
                news.append(j)
                target *= new[j]
                j += 1
        runs.append((olds, news))
    return runs


def _ones(sizes: Sequence[int], start: int) -> int:
    """Returns how many sizes from a place on are one."""
    rest = sizes[start:]
    return next((n for n, size in enumerate(rest) if size != 1), len(rest))


def squeeze(ctx: Context) -> list[Axes]:
    """The array without some axes of size one."""
    gone = ctx.params["dimensions"]
    return [[a for i, a in enumerate(ctx.operands[0]) if i not in gone]]


def pad(ctx: Context) -> list[Axes]:
    """Fixed positions before and after those of an axis."""
    out = []
    for axis, (low, high, interior) in zip(
        ctx.operands[0], ctx.params["padding_config"], strict=True
    ):
        reason = f"padding of a fixed width ({low} before, {high} after)"
        if min(low, high) < 0 or interior:
            ctx.fix(axis, reason)
            size = max(len(axis) + (len(axis) - 1) * interior, 0) + low + high
            out.append(ctx.fixed(size, reason))
        else:
            before, after = ctx.fixed(low, reason), ctx.fixed(high, reason)
            out.append(np.concatenate([before, axis, after]))
    return [out]


def concatenate(ctx: Context) -> list[Axes]:
    """The positions of several axes in one."""
    along = ctx.params["dimension"]
    out = list(ctx.operands[0])
    for axes in ctx.operands[1:]:
        for i, axis in enumerate(axes):
            if i != along:
                out[i] = ctx.tie(out[i], axis)
    out[along] = ctx.concatenate([axes[along] for axes in ctx.operands])
    return [out]


def slice_rule(ctx: Context) -> list[Axes]:
    """A range of the positions of each axis, or every n-th of them."""
    starts, limits = ctx.params["start_indices"], ctx.params["limit_indices"]
    strides = ctx.params["strides"] or (1,) * len(starts)
    out = []
    for axis, start, limit, stride in zip(
        ctx.operands[0], starts, limits, strides, strict=True
    ):
        n, part = len(axis), axis[start:limit:stride]
        size = limit - start
        if 1 < size < n and n % size == 0 and start % size == 0 and stride == 1:
            # Half of an axis (a third…) remains half if all parts lose the same.
            ctx.suppose(axis)
            ctx.tie_all(np.split(axis, n // size))
        elif stride > 1 and n % stride == 0 and start < stride and limit > n - stride:
            ctx.suppose(axis)  # every second position, as in rotary embeddings
            ctx.tie_all(axis.reshape(-1, stride).T)
        elif size == 1 and n > 1:
            ctx.fix(axis, _INDEXED)
        elif len(part) != n:
            # The bounds may follow the channels of each part, or be written down.
            ctx.suppose(axis)
        out.append(part)
    return [out]


def dynamic_slice(ctx: Context) -> list[Axes]:
    """Windows whose place is computed."""
    out = []
    for axis, size in zip(ctx.operands[0], ctx.shapes[0], strict=True):
        if len(axis) == size:
            out.append(axis)
        else:
            ctx.fix(axis, _INDEXED)
            out.append(ctx.fixed(size, _INDEXED))
    return [out]


def dynamic_update_slice(ctx: Context) -> list[Axes]:
    """An array into which another is written at a computed place."""
    array, update, *_ = ctx.operands
    out = []
    for axis, new in zip(array, update, strict=True):
        if len(axis) == len(new):
            out.append(ctx.tie(axis, new))
        else:
            ctx.fix_all([axis, new], _INDEXED)
            out.append(axis)
    return [out]


def split(ctx: Context) -> list[Axes]:
    """Consecutive parts of one axis."""
    along, sizes = ctx.params["axis"], ctx.params["sizes"]
    axis = ctx.operands[0][along]
    ctx.suppose(axis)
    if len(set(sizes)) == 1:
        # Equal parts remain equal only if they lose the same positions.
        ctx.tie_all(np.split(axis, len(sizes)))
    results = []
    for part in np.split(axis, np.cumsum(sizes)[:-1]):
        axes = list(ctx.operands[0])
        axes[along] = part
        results.append(axes)
    return results


def reverse(ctx: Context) -> list[Axes]:
    """Some axes in reverse order."""
    turned = ctx.params["dimensions"]
    return [[a[::-1] if i in turned else a for i, a in enumerate(ctx.operands[0])]]


def gather(ctx: Context) -> list[Axes]:
    """Rows that are looked up (an embedding): axes that are not indexed pass."""
    table, indices = ctx.operands
    dims = ctx.params["dimension_numbers"]
    sizes = ctx.params["slice_sizes"]
    # A slice as long as its axis starts at 0 then, as those of a mapped loop do.
    inside = ctx.params["mode"] != GatherScatterMode.FILL_OR_DROP
    along = dict(
        zip(dims.operand_batching_dims, dims.start_indices_batching_dims, strict=True)
    )
    whole = []
    for i, axis in enumerate(table):
        if i in along:
            ctx.tie(axis, indices[along[i]])
        elif i in dims.collapsed_slice_dims:
            if i not in ctx.free:
                ctx.fix(axis, _INDEXED)
        elif sizes[i] == len(axis) and (inside or i not in dims.start_index_map):
            whole.append(axis)
        else:
            if i not in ctx.free:
                ctx.fix(axis, _INDEXED)
            whole.append(ctx.fixed(sizes[i], _INDEXED))
    offsets = dict(zip(dims.offset_dims, whole, strict=True))
    looked_up = iter(indices[:-1])
    rank = range(len(ctx.shapes[0]))
    return [[offsets[i] if i in offsets else next(looked_up) for i in rank]]


def scatter(ctx: Context) -> list[Axes]:
    """Rows that are put back (a sum over neighbours in a graph): a gather reversed."""
    array, indices, updates = ctx.operands
    dims = ctx.params["dimension_numbers"]
    along = dict(
        zip(dims.operand_batching_dims, dims.scatter_indices_batching_dims, strict=True)
    )
    windows = iter(dims.update_window_dims)
    out = []
    for i, axis in enumerate(array):
        if i in along:
            axis = ctx.tie(axis, indices[along[i]])
        elif i in dims.inserted_window_dims:
            if i not in ctx.free:
                ctx.fix(axis, _INDEXED)
        else:
            window = updates[next(windows)]
            moved = i in dims.scatter_dims_to_operand_dims
            if len(window) == len(axis) and not moved:
                axis = ctx.tie(axis, window)
            else:
                ctx.fix_all([axis, window], _INDEXED)
        out.append(axis)
    rows = [a for j, a in enumerate(updates) if j not in dims.update_window_dims]
    for row, index in zip(rows, indices[:-1], strict=True):
        ctx.tie(row, index)
    return [out]


def stack(ctx: Context) -> list[Axes]:
    """Several arrays along a new axis."""
    out = ctx.tie_arrays(ctx.operands)
    stacked = ctx.fixed(len(ctx.operands), "an axis that arrays are stacked along")
    out.insert(ctx.params["axis"], stacked)
    return [out]


def tile(ctx: Context) -> list[Axes]:
    """Copies of an array next to each other."""
    # Copies that follow one another are the same channels again; those of an axis of
    # size one are a broadcast.
    out = []
    for axis, times in zip(ctx.operands[0], ctx.params["reps"], strict=True):
        if times == 1:
            out.append(axis)
        else:
            out.append(np.tile(axis, times) if len(axis) > 1 else ctx.fresh(times))
            ctx.suppose(out[-1])
    return [out]


def unstack(ctx: Context) -> list[Axes]:
    """The arrays along one axis."""
    along = ctx.params["axis"]
    ctx.fix(ctx.operands[0][along], _INDEXED)
    rest = [a for i, a in enumerate(ctx.operands[0]) if i != along]
    return [rest for _ in ctx.shapes]


def loop_slice(ctx: Context) -> list[Axes]:
    """The part of an array that one step of a loop reads."""
    ctx.fix(ctx.operands[0][0], _LOOP)
    return [ctx.operands[0][1:]]


def loop_stack(ctx: Context) -> list[Axes]:
    """The results of all steps of a loop."""
    steps = ctx.fixed(ctx.shapes[0][0], _LOOP)
    rest = (
        ctx.operands[0] if ctx.operands else [ctx.fresh(n) for n in ctx.shapes[0][1:]]
    )
    return [[steps, *rest]]
