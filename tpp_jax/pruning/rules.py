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

from tpp_jax.pruning import moving
from tpp_jax.pruning.labels import Axes, Labels, NotUnderstood
from tpp_jax.pruning.unfolding import Equation

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
    kind = labels.kind
    if kind is None and groups > 1:
        kind = "depthwise" if len(kernel[contracted]) == 1 else "grouped"
    if eqn.params["batch_group_count"] != 1:
        for axis in (images[batch], images[features], kernel[contracted]):
            labels.fix(axis, "a convolution in groups of the batch")
        labels.fix(kernel[produced], "a convolution in groups of the batch")
    elif kind == "depthwise":
        # Each input channel makes its own one or more output channels.
        several = len(kernel[produced]) // groups
        labels.tie(np.repeat(images[features], several), kernel[produced])
    elif groups == 1:
        labels.tie(images[features], kernel[contracted])
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


def _cumulative(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    along = eqn.params["axis"]
    labels.fix(operands[0][along], f"the axis that '{eqn.primitive}' runs along")
    return [list(operands[0])]


def _top_k(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    reason = "an axis of which the largest entries are taken"
    axis = eqn.params.get("axis", -1) % len(shapes[0])
    labels.fix(operands[0][axis], reason)
    out = list(operands[0])
    out[axis] = labels.stuck(shapes[0][axis], reason)
    return [out for _ in shapes]


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
    "broadcast_in_dim": moving.broadcast_in_dim,
    "concatenate": moving.concatenate,
    "conv_general_dilated": _convolution,
    **dict.fromkeys(
        ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"), _cumulative
    ),
    "debug_callback": _no_results,
    "debug_print": _no_results,
    "dot_general": _dot_general,
    "dynamic_slice": moving.dynamic_slice,
    "dynamic_update_slice": moving.dynamic_update_slice,
    "gather": moving.gather,
    "iota": _iota,
    "join": _elementwise,
    "loop_slice": moving.loop_slice,
    "loop_stack": moving.loop_stack,
    "pad": moving.pad,
    "random_bits": _random,
    "reduce_and": _reduce,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "reduce_or": _reduce,
    "reduce_prod": _reduce,
    "reduce_sum": _reduce,
    "reduce_window_max": _reduce_window,
    "reduce_window_sum": _reduce_window,
    "reshape": moving.reshape,
    "rev": moving.reverse_rule,
    **dict.fromkeys(_SAME, _same),
    "scatter": moving.scatter,
    "scatter-add": moving.scatter,
    "scatter-max": moving.scatter,
    "scatter-min": moving.scatter,
    "scatter-mul": moving.scatter,
    "scatter_add": moving.scatter,
    "scatter_max": moving.scatter,
    "scatter_min": moving.scatter,
    "scatter_mul": moving.scatter,
    "slice": moving.slice_rule,
    "sort": _sort,
    "split": moving.split,
    "squeeze": moving.squeeze,
    "stack": moving.stack,
    "tile": moving.tile,
    "top_k": _top_k,
    "transpose": moving.transpose,
    "unstack": moving.unstack,
}
