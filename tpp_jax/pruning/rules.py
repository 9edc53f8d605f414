"""How each primitive ties the positions of its operands' axes together.

A rule takes the labels of a primitive's operands (see labels.py), gives labels to its
results, and says which labels must be kept or removed together.

Working on single positions rather than on whole axes makes padding, concatenation and
flattening fall out without special cases: ``pad`` puts fixed labels beside the
operand's, ``reshape`` of (h, w, c) into h·w·c repeats the labels of c, ``reshape`` of
heads · size into (heads, size) makes each position a pair.

A primitive that is not listed here is never guessed: every position of its operands is
fixed, with the primitive as the reason.
"""

import functools
from collections.abc import Callable

import numpy as np

from tpp_jax.pruning.labels import Labels, NotUnderstood
from tpp_jax.pruning.tracing import Equation

Axes = list[np.ndarray]  # the labels of one array: an int64 vector for each axis


Rule = Callable[[Labels, Equation, list[Axes], list[tuple[int, ...]]], list[Axes]]
"""``rule(labels, equation, operands' axes, results' shapes) -> results' axes``."""


def apply_rule(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    """Gives labels to the results of one equation, by its rule or as unknown."""
    rule = RULES.get(eqn.primitive, _unknown)
    labels.source = eqn.source
    return rule(labels, eqn, operands, shapes)


def _unknown(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    reason = NotUnderstood(
        f"the operation '{eqn.primitive}', which is not one that is understood"
    )
    labels.fix_all(operands, reason)
    return [[labels.stuck(n, reason) for n in shape] for shape in shapes]


def _elementwise(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    [shape, *_] = shapes
    arrays = [axes for axes in operands if len(axes) == len(shape)]
    out = []
    for i, n in enumerate(shape):
        # An axis of size one is broadcast: it does not couple with what it meets.
        met = [axes[i] for axes in arrays if len(axes[i]) == n]
        out.append(functools.reduce(labels.tie, met))
    return [out for _ in shapes]


def _convolution(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    images, kernel = operands
    dims = eqn.params["dimension_numbers"]
    batch, features, *window = dims.lhs_spec
    produced, contracted, *kernel_window = dims.rhs_spec
    for axis in window:
        labels.fix(images[axis], "a spatial axis of a convolution")
    for axis in kernel_window:
        labels.fix(kernel[axis], "the window of a convolution")
    out: Axes = [labels.stuck(n, "a spatial axis of a convolution") for n in shapes[0]]
    out_batch, out_features, *_ = dims.out_spec
    out[out_batch] = images[batch]
    out[out_features] = kernel[produced]
    groups = eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] != 1:
        for axis in (images[batch], images[features], kernel[contracted]):
            labels.fix(axis, "a convolution in groups of the batch")
        labels.fix(kernel[produced], "a convolution in groups of the batch")
    elif groups == 1:
        labels.tie(images[features], kernel[contracted])
    elif len(kernel[contracted]) == 1:
        # Depthwise: each input channel makes its own one or more output channels.
        several = len(kernel[produced]) // groups
        labels.tie(np.repeat(images[features], several), kernel[produced])
    else:
        # Channels may go from all groups alike; the number of groups stays.
        group = labels.stuck(groups, f"the {groups} groups of a convolution")
        within = labels.product([group, kernel[contracted]])
        labels.tie(images[features], within)
        functools.reduce(labels.tie, np.split(kernel[produced], groups))
    return [out]


def _dot_general(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    left, right = operands
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    for i, j in zip(left_sum, right_sum, strict=True):
        labels.tie(left[i], right[j])
    out = [
        labels.tie(left[i], right[j])
        for i, j in zip(left_batch, right_batch, strict=True)
    ]
    gone = {*left_sum, *left_batch}
    out += [axis for i, axis in enumerate(left) if i not in gone]
    gone = {*right_sum, *right_batch}
    out += [axis for j, axis in enumerate(right) if j not in gone]
    return [out]


def _broadcast_in_dim(
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


def _transpose(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    return [[operands[0][i] for i in eqn.params["permutation"]]]


def _reshape(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    old, new = operands[0], shapes[0]
    out: Axes = []
    for old_axes, new_axes in _matching_axes([len(a) for a in old], new):
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


def _matching_axes(
    old: list[int], new: tuple[int, ...]
) -> list[tuple[list[int], list[int]]]:
    """Splits a reshape into the smallest runs of axes of equal size.

    Every new axis is in one run, in order; size-one axes stand alone or join a run.
    """
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while j < len(new):
        olds: list[int] = []
        news = [j]
        size, target = 1, new[j]
        j += 1
        if target == 1:
            runs.append((olds, news))  # a new axis of size one comes from nowhere
            continue
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


def _squeeze(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    gone = eqn.params["dimensions"]
    return [[a for i, a in enumerate(operands[0]) if i not in gone]]


def _reduce(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    gone = eqn.params["axes"]
    for axis in gone:
        labels.reduced.append(operands[0][axis][operands[0][axis] >= 0])
    return [[a for i, a in enumerate(operands[0]) if i not in gone]]


def _reduce_window(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    out = []
    for i, axis in enumerate(operands[0]):
        untouched = (
            eqn.params["window_dimensions"][i] == 1
            and eqn.params["window_strides"][i] == 1
            and tuple(eqn.params["padding"][i]) == (0, 0)
        )
        if untouched:
            out.append(axis)
        else:
            labels.fix(axis, "an axis that pooling runs over")
            out.append(labels.stuck(shapes[0][i], "an axis that pooling runs over"))
    return [out]


def _pad(
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


def _concatenate(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    along = eqn.params["dimension"]
    out = list(operands[0])
    for axes in operands[1:]:
        for i, axis in enumerate(axes):
            if i != along:
                out[i] = labels.tie(out[i], axis)
    out[along] = np.concatenate([axes[along] for axes in operands])
    return [out]


def _slice(
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
        elif len(part) != n:
            reason = f"a slice with fixed bounds [{start}:{limit}:{stride}]"
            labels.fix(axis, NotUnderstood(reason))
        out.append(part)
    return [out]


def _dynamic_slice(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    reason = "an axis that is indexed"
    return [_windows(labels, operands[0], shapes[0], reason)]


def _dynamic_update_slice(
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


def _windows(
    labels: Labels, axes: Axes, sizes: tuple[int, ...], reason: str
) -> list[np.ndarray]:
    """Passes on the axes that are taken whole, and fixes the others."""
    out = []
    for axis, size in zip(axes, sizes, strict=True):
        if len(axis) != size:
            labels.fix(axis, reason)
        out.append(axis if len(axis) == size else labels.stuck(size, reason))
    return out


def _split(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    along, sizes = eqn.params["axis"], eqn.params["sizes"]
    axis = operands[0][along]
    if len(set(sizes)) > 1:
        reason = f"a split into the fixed sizes {tuple(sizes)}"
        labels.fix(axis, NotUnderstood(reason))
    else:
        # Equal parts stay equal only if they lose the same positions.
        labels.suppose(axis)
        functools.reduce(labels.tie, np.split(axis, len(sizes)))
    results = []
    for part in np.split(axis, np.cumsum(sizes)[:-1]):
        axes = list(operands[0])
        axes[along] = part
        results.append(axes)
    return results


def _cumulative(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    along = eqn.params["axis"]
    labels.fix(operands[0][along], f"the axis that '{eqn.primitive}' runs along")
    return [list(operands[0])]


def _reverse(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    turned = eqn.params["dimensions"]
    return [[a[::-1] if i in turned else a for i, a in enumerate(operands[0])]]


def _gather(
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


def _scatter(
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


def _top_k(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    reason = "an axis of which the largest entries are taken"
    axis = eqn.params.get("axis", -1) % len(shapes[0])
    labels.fix(operands[0][axis], reason)
    out = list(operands[0])
    out[axis] = labels.stuck(shapes[0][axis], reason)
    return [out for _ in shapes]


def _tile(
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


def _unstack(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    along = eqn.params["axis"]
    labels.fix(operands[0][along], "an axis that is unstacked")
    rest = [a for i, a in enumerate(operands[0]) if i != along]
    return [rest for _ in shapes]


def _same(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    return [list(axes) for axes in operands]


def _no_results(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    return []


def _random(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    return [[labels.stuck(n, "random numbers") for n in shape] for shape in shapes]


def _sort(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    along = eqn.params["dimension"]
    joint = [functools.reduce(labels.tie, axes) for axes in zip(*operands, strict=True)]
    labels.fix(joint[along], "an axis that is sorted")
    return [joint for _ in shapes]


def _loop_slice(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    labels.fix(operands[0][0], "the axis that a loop runs along")
    return [operands[0][1:]]


def _loop_stack(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    steps = labels.stuck(shapes[0][0], "the axis that a loop runs along")
    rest = operands[0] if operands else [labels.fresh(n) for n in shapes[0][1:]]
    return [[steps, *rest]]


def _arg_reduce(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    for axis in eqn.params["axes"]:
        labels.fix(operands[0][axis], f"the axis that '{eqn.primitive}' runs over")
    gone = eqn.params["axes"]
    return [[a for i, a in enumerate(operands[0]) if i not in gone]]


def _iota(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    return [[labels.stuck(n, "positions that are counted (iota)") for n in shapes[0]]]


_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp clz
    complex conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv
    erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p
    logistic lt max min mul ne neg nextafter not or population_count pow real
    reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
""".split()

_SAME = """
    device_put mesh_cast name optimization_barrier pcast pvary reshard
    sharding_constraint
""".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "argmax": _arg_reduce,
    "argmin": _arg_reduce,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    **dict.fromkeys(
        ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"), _cumulative
    ),
    "debug_callback": _no_results,
    "debug_print": _no_results,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "join": _elementwise,
    "loop_slice": _loop_slice,
    "loop_stack": _loop_stack,
    "pad": _pad,
    "random_bits": _random,
    "reduce_and": _reduce,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "reduce_or": _reduce,
    "reduce_prod": _reduce,
    "reduce_sum": _reduce,
    "reduce_window_max": _reduce_window,
    "reduce_window_sum": _reduce_window,
    "reshape": _reshape,
    "rev": _reverse,
    **dict.fromkeys(_SAME, _same),
    "scatter": _scatter,
    "scatter-add": _scatter,
    "scatter-max": _scatter,
    "scatter-min": _scatter,
    "scatter-mul": _scatter,
    "scatter_add": _scatter,
    "scatter_max": _scatter,
    "scatter_min": _scatter,
    "scatter_mul": _scatter,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "tile": _tile,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}
