"""How the primitives that move data about tie positions together; see rules.py.

Reshapes, slices, concatenations, look-ups: nothing is computed here, positions get new
places. Where an operation is told a size, that it follows the channels is noted as
a supposition (``labels.suppose``), to be tried on the model.
"""

import functools
from collections.abc import Sequence

import numpy as np

from tpp_jax.graph.labels import Axes, Labels
from tpp_jax.graph.unfolding import Equation


def broadcast_in_dim(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    # Copies along a new axis are alike: the axis takes on whatever width it meets.
    [shape] = shapes
    placed = dict(zip(eqn.params["broadcast_dimensions"], operands[0], strict=True))
    out = []
    for i, n in enumerate(shape):
        if i in placed and len(placed[i]) == n:
            out.append(placed[i])
        else:
            out.append(labels.fresh(n))
            if n > 1:
                labels.suppose(out[-1])
    return [out]


def transpose(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    return [[operands[0][i] for i in eqn.params["permutation"]]]


def reshape(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    old, new = operands[0], shapes[0]
    out: Axes = []
    for old_axes, new_axes in _matching_axes(tuple(map(len, old)), new):
        block = [old[i] for i in old_axes]
        sizes = tuple(new[j] for j in new_axes)
        if not block:
            out.append(labels.fresh(1))  # a new axis of size one
        elif len(sizes) == 1:
            out.append(labels.product(block))
            if len(block) > 1:
                labels.suppose(out[-1])
        else:
            whole = labels.product(block) if len(block) > 1 else block[0]
            parts = labels.split(whole, sizes)
            for i, part in enumerate(parts):
                labels.suppose(part, i)
            out += parts
    return [out]


@functools.lru_cache(maxsize=1024)
def _matching_axes(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[list[int], list[int]]]:
    """Splits a reshape into the smallest runs of axes of equal size.

    Every new axis is in one run, in order. Axes of size one go on as they are where
    there are as many at a place before as after; others stand alone or join a run.
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


def squeeze(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    gone = eqn.params["dimensions"]
    return [[a for i, a in enumerate(operands[0]) if i not in gone]]


def pad(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    out = []
    for axis, (low, high, interior) in zip(
        operands[0], eqn.params["padding_config"], strict=True
    ):
        reason = f"padding of a fixed width ({low} before, {high} after)"
        if min(low, high) < 0 or interior:
            labels.fix(axis, reason)
            size = max(len(axis) + (len(axis) - 1) * interior, 0) + low + high
            out.append(labels.stuck(size, reason))
        else:
            sides = labels.stuck(low, reason), labels.stuck(high, reason)
            out.append(np.concatenate([sides[0], axis, sides[1]]))
    return [out]


def concatenate(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    along = eqn.params["dimension"]
    out = list(operands[0])
    for axes in operands[1:]:
        for i, axis in enumerate(axes):
            if i != along:
                out[i] = labels.tie(out[i], axis)
    out[along] = np.concatenate([axes[along] for axes in operands])
    labels.pieces[out[along].tobytes()] = [len(axes[along]) for axes in operands]
    return [out]


def slice_rule(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    out = []
    for axis, start, limit, stride in zip(
        operands[0], starts, limits, strides, strict=True
    ):
        n, part = len(axis), axis[start:limit:stride]
        size = limit - start
        if 1 < size < n and n % size == 0 and start % size == 0 and stride == 1:
            # Half of an axis (a third…) stays half if all parts lose the same.
            labels.suppose(axis)
            functools.reduce(labels.tie, np.split(axis, n // size))
        elif stride > 1 and n % stride == 0 and start < stride and limit > n - stride:
            labels.suppose(axis)  # every second position, as in rotary embeddings
            functools.reduce(labels.tie, axis.reshape(-1, stride).T)
        elif size == 1 and n > 1:
            labels.fix(axis, "an axis that is indexed")
        elif len(part) != n:
            # The bounds may follow the channels of each part, or be written down.
            labels.suppose(axis)
        out.append(part)
    return [out]


def dynamic_slice(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    reason = "an axis that is indexed"
    return [windows(labels, operands[0], shapes[0], reason)]


def dynamic_update_slice(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    array, update, *_ = operands
    out = []
    for axis, new in zip(array, update, strict=True):
        if len(axis) == len(new):
            out.append(labels.tie(axis, new))
        else:
            labels.fix_all([[axis, new]], "an axis that is indexed")
            out.append(axis)
    return [out]


def windows(
    labels: Labels, axes: Axes, sizes: tuple[int, ...], reason: str
) -> list[np.ndarray]:
    """Passes on the axes that are taken whole, and fixes the others."""
    out = []
    for axis, size in zip(axes, sizes, strict=True):
        if len(axis) != size:
            labels.fix(axis, reason)
        out.append(axis if len(axis) == size else labels.stuck(size, reason))
    return out


def split(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    along, sizes = eqn.params["axis"], eqn.params["sizes"]
    axis = operands[0][along]
    labels.suppose(axis)
    if len(set(sizes)) == 1:
        # Equal parts stay equal only if they lose the same positions.
        functools.reduce(labels.tie, np.split(axis, len(sizes)))
    results = []
    for part in np.split(axis, np.cumsum(sizes)[:-1]):
        axes = list(operands[0])
        axes[along] = part
        results.append(axes)
    return results


def reverse_rule(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    turned = eqn.params["dimensions"]
    return [[a[::-1] if i in turned else a for i, a in enumerate(operands[0])]]


def gather(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    """Looking rows up (an embedding): axes that are taken whole pass through."""
    table, indices = operands
    dims = eqn.params["dimension_numbers"]
    sizes = eqn.params["slice_sizes"]
    reason = "an axis that is indexed"
    along = dict(
        zip(dims.operand_batching_dims, dims.start_indices_batching_dims, strict=True)
    )
    whole = []
    for i, axis in enumerate(table):
        if i in along:
            labels.tie(axis, indices[along[i]])
        elif i in dims.collapsed_slice_dims:
            labels.fix(axis, reason)
        elif sizes[i] == len(axis) and i not in dims.start_index_map:
            whole.append(axis)
        else:
            labels.fix(axis, reason)
            whole.append(labels.stuck(sizes[i], reason))
    offsets = dict(zip(dims.offset_dims, whole, strict=True))
    looked_up = iter(indices[:-1])
    rank = range(len(shapes[0]))
    return [[offsets[i] if i in offsets else next(looked_up) for i in rank]]


def scatter(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    """Putting rows back (a sum over a graph's neighbours): the reverse of a gather."""
    array, indices, updates = operands
    dims = eqn.params["dimension_numbers"]
    reason = "an axis that is indexed"
    along = dict(
        zip(dims.operand_batching_dims, dims.scatter_indices_batching_dims, strict=True)
    )
    windows = iter(dims.update_window_dims)
    out = []
    for i, axis in enumerate(array):
        if i in along:
            axis = labels.tie(axis, indices[along[i]])
        elif i in dims.inserted_window_dims:
            labels.fix(axis, reason)
        else:
            window = updates[next(windows)]
            moved = i in dims.scatter_dims_to_operand_dims
            if len(window) == len(axis) and not moved:
                axis = labels.tie(axis, window)
            else:
                labels.fix_all([[axis, window]], reason)
        out.append(axis)
    rows = [a for j, a in enumerate(updates) if j not in dims.update_window_dims]
    for row, index in zip(rows, indices[:-1], strict=True):
        labels.tie(row, index)
    return [out]


def stack(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    out = [functools.reduce(labels.tie, axes) for axes in zip(*operands, strict=True)]
    stack = labels.stuck(len(operands), "an axis that arrays are stacked along")
    out.insert(eqn.params["axis"], stack)
    return [out]


def tile(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    # Copies that follow one another are the same channels again; those of an axis of
    # size one are a broadcast.
    out = []
    for axis, times in zip(operands[0], eqn.params["reps"], strict=True):
        if times == 1:
            out.append(axis)
        else:
            out.append(np.tile(axis, times) if len(axis) > 1 else labels.fresh(times))
            labels.suppose(out[-1])
    return [out]


def unstack(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    along = eqn.params["axis"]
    labels.fix(operands[0][along], "an axis that is indexed")
    rest = [a for i, a in enumerate(operands[0]) if i != along]
    return [rest for _ in shapes]


def loop_slice(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    labels.fix(operands[0][0], "the axis that a loop runs along")
    return [operands[0][1:]]


def loop_stack(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    steps = labels.stuck(shapes[0][0], "the axis that a loop runs along")
    rest = operands[0] if operands else [labels.fresh(n) for n in shapes[0][1:]]
    return [[steps, *rest]]
