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

from tpp_jax.pruning.labels import Labels
from tpp_jax.pruning.tracing import Equation

Axes = list[np.ndarray]  # the labels of one array: an int64 vector for each axis


Rule = Callable[[Labels, Equation, list[Axes], list[tuple[int, ...]]], list[Axes]]
"""``rule(labels, equation, operands' axes, results' shapes) -> results' axes``."""


def apply_rule(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    """Gives labels to the results of one equation, by its rule or as unknown."""
    rule = RULES.get(eqn.primitive, _unknown)
    return rule(labels, eqn, operands, shapes)


def _unknown(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    reason = f"the operation '{eqn.primitive}' is not one whose channels are understood"
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
    return [
        [
            placed[i] if i in placed and len(placed[i]) == n else labels.fresh(n)
            for i, n in enumerate(shape)
        ]
    ]


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
        else:
            whole = labels.product(block) if len(block) > 1 else block[0]
            out += labels.split(whole, sizes)
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
        part = axis[start:limit:stride]
        if len(part) != len(axis):
            labels.fix(axis, f"a slice with fixed bounds [{start}:{limit}:{stride}]")
        out.append(part)
    return [out]


def _split(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    along, sizes = eqn.params["axis"], eqn.params["sizes"]
    axis = operands[0][along]
    if len(set(sizes)) > 1:
        labels.fix(axis, f"a split into the fixed sizes {tuple(sizes)}")
    else:
        # Equal parts stay equal only if they lose the same positions.
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
    if dims.operand_batching_dims or dims.start_indices_batching_dims:
        return _unknown(labels, eqn, operands, shapes)
    whole = []
    for i, axis in enumerate(table):
        if i in dims.collapsed_slice_dims:
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
    abs acos add add_any and asin atan atan2 cbrt ceil clamp convert_element_type copy
    copy_p cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow
    is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow
    reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient
    sub tan tanh xor
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
    "dot_general": _dot_general,
    "gather": _gather,
    "iota": _iota,
    "join": _elementwise,
    "loop_slice": _loop_slice,
    "loop_stack": _loop_stack,
    "pad": _pad,
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
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
