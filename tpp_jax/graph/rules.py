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

from tpp_jax.graph import rules_collective, rules_moving, rules_random
from tpp_jax.graph.labels import Axes, Labels, NotUnderstood
from tpp_jax.graph.unfolding import Equation

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
        joint = None
        for axes in arrays:
            axis = axes[i]
            if joint is None or axis is joint:
                joint = axis if len(axis) == n else joint
            elif len(axis) == n:
                joint = labels.tie(joint, axis)
        assert joint is not None
        out.append(joint)
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


def _ragged_dot(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    """A product of rows with the matrix of their group: a mixture of experts."""
    left, right, *sizes = operands
    ragged = eqn.params["ragged_dot_dimension_numbers"]
    dims, groups = ragged.dot_dimension_numbers, ragged.rhs_group_dimensions
    (left_sum, right_sum), (left_batch, right_batch) = dims
    reason = "the groups of a ragged product"
    labels.fix_all(sizes, reason)
    for j in groups:
        labels.fix(right[j], reason)
    for i in ragged.lhs_ragged_dimensions:
        labels.fix(left[i], reason)
    for i, j in zip(left_sum, right_sum, strict=True):
        labels.tie(left[i], right[j])
    out = [
        labels.tie(left[i], right[j])
        for i, j in zip(left_batch, right_batch, strict=True)
    ]
    if set(ragged.lhs_ragged_dimensions) <= set(left_sum):
        out.insert(0, labels.stuck(shapes[0][0], reason))
    gone = {*left_sum, *left_batch}
    out += [axis for i, axis in enumerate(left) if i not in gone]
    gone = {*right_sum, *right_batch, *groups}
    out += [axis for j, axis in enumerate(right) if j not in gone]
    return [out]


def _reduce(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    gone = eqn.params["axes"]
    for axis in gone:
        labels.reduced.append(operands[0][axis][operands[0][axis] >= 0])
    return [[a for i, a in enumerate(operands[0]) if i not in gone]]


def _reduce_several(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    """A reduction by a function of the user's, of one array or of several at once."""
    joint = _joint(labels, operands[: len(shapes)])
    gone = eqn.params["dimensions"]
    for axis in gone:
        labels.reduced.append(joint[axis][joint[axis] >= 0])
    out = [a for i, a in enumerate(joint) if i not in gone]
    return [out for _ in shapes]


def _joint(labels: Labels, operands: list[Axes]) -> Axes:
    """Ties arrays of one shape to each other."""
    return [functools.reduce(labels.tie, axes) for axes in zip(*operands, strict=True)]


def _untouched(eqn: Equation, axis: int) -> bool:
    """Tells whether a window leaves an axis as it is."""
    return (
        eqn.params["window_dimensions"][axis] == 1
        and eqn.params["window_strides"][axis] == 1
        and tuple(eqn.params["padding"][axis]) == (0, 0)
        and eqn.params.get("base_dilation", {axis: 1})[axis] == 1
    )


def _reduce_window(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    reason = "an axis that pooling runs over"
    out = []
    for i, axis in enumerate(_joint(labels, operands[: len(shapes)])):
        if not _untouched(eqn, i):
            labels.fix(axis, reason)
            axis = labels.stuck(shapes[0][i], reason)
        out.append(axis)
    return [out for _ in shapes]


def _of_windows(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    """The gradient of pooling: what is pooled meets what was pooled."""
    reason = "an axis that pooling runs over"
    out = []
    for i, n in enumerate(shapes[0]):
        met = [axes[i] for axes in operands]
        if _untouched(eqn, i):
            out.append(functools.reduce(labels.tie, met))
        else:
            labels.fix_all([met], reason)
            out.append(labels.stuck(n, reason))
    return [out]


def _fft(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    return _mixed(labels, eqn, operands, shapes, len(eqn.params["fft_lengths"]))


def _of_matrices(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    """A decomposition: the last two axes are a matrix, those before them a batch."""
    return _mixed(labels, eqn, operands, shapes, 2)


def _mixed(
    labels: Labels,
    eqn: Equation,
    operands: list[Axes],
    shapes: list[tuple[int, ...]],
    rank: int,
) -> list[Axes]:
    """Passes the first axes of the one operand on; each of the others is mixed."""
    [axes] = operands
    reason = _mixing(eqn)
    batch, rest = axes[: len(axes) - rank], axes[len(axes) - rank :]
    labels.fix_all([rest], reason)
    return [
        [*batch, *(labels.stuck(n, reason) for n in shape[len(batch) :])]
        for shape in shapes
    ]


def _mixing(eqn: Equation) -> NotUnderstood:
    return NotUnderstood(
        f"the operation '{eqn.primitive}', which mixes the positions of an axis"
    )


def _triangular_solve(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    matrix, given = operands
    reason = _mixing(eqn)
    solved = len(given) - (2 if eqn.params["left_side"] else 1)
    labels.fix_all([matrix[-2:], [given[solved]]], reason)
    out = [
        *(labels.tie(a, b) for a, b in zip(given[:-2], matrix[:-2], strict=True)),
        *given[-2:],
    ]
    return [out]


def _random_gamma(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    _, shape_parameter = operands
    return [list(shape_parameter)]


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
    axis = eqn.params.get("reduction_dimension", eqn.params.get("axis", -1))
    axis %= len(shapes[0])
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


def _sort(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    along = eqn.params["dimension"]
    joint = _joint(labels, operands)
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
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp clz complex conj convert_element_type copy copy_p cos cosh digamma
    div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a
    igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max
    min mul mulhi ne neg nextafter not or polygamma population_count pow random_fold_in
    random_gamma_grad real reduce_precision regularized_incomplete_beta rem round rsqrt
    select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
    square stop_gradient sub tan tanh xor zeros_like zeta
""".split()

_SAME = """
    device_put layout_constraint mesh_cast name optimization_barrier pbroadcast pcast
    pmax pmin ppermute psum psum_invariant pvary random_clone random_seed reshard
    sharding_constraint
""".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "all_gather": rules_collective.all_gather,
    "all_gather_invariant": rules_collective.all_gather,
    "all_to_all": rules_collective.all_to_all,
    "approx_top_k": _top_k,
    "argmax": _arg_reduce,
    "argmin": _arg_reduce,
    "axis_index": rules_collective.axis_index,
    "bitcast_convert_type": rules_random.bitcast,
    "broadcast_in_dim": rules_moving.broadcast_in_dim,
    "cholesky": _of_matrices,
    "concatenate": rules_moving.concatenate,
    "conv_general_dilated": _convolution,
    **dict.fromkeys(
        ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"), _cumulative
    ),
    "debug_callback": _no_results,
    "debug_print": _no_results,
    "dot_general": _dot_general,
    "dynamic_slice": rules_moving.dynamic_slice,
    "dynamic_update_slice": rules_moving.dynamic_update_slice,
    "eigh": _of_matrices,
    "fft": _fft,
    "gather": rules_moving.gather,
    "iota": _iota,
    "join": _elementwise,
    "loop_slice": rules_moving.loop_slice,
    "loop_stack": rules_moving.loop_stack,
    "lu": _of_matrices,
    "pad": rules_moving.pad,
    "qr": _of_matrices,
    "ragged_dot_general": _ragged_dot,
    "random_bits": rules_random.random_bits,
    "random_gamma": _random_gamma,
    "random_split": rules_random.random_split,
    "random_unwrap": rules_random.random_unwrap,
    "random_wrap": rules_random.random_wrap,
    "reduce": _reduce_several,
    "reduce_and": _reduce,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "reduce_or": _reduce,
    "reduce_prod": _reduce,
    "reduce_scatter": rules_collective.reduce_scatter,
    "reduce_sum": _reduce,
    "reduce_window": _reduce_window,
    "reduce_window_max": _reduce_window,
    "reduce_window_min": _reduce_window,
    "reduce_window_sum": _reduce_window,
    "reduce_xor": _reduce,
    "reshape": rules_moving.reshape,
    "rev": rules_moving.reverse_rule,
    "rng_bit_generator": rules_random.rng_bit_generator,
    "rng_uniform": rules_random.rng_uniform,
    **dict.fromkeys(_SAME, _same),
    "scatter": rules_moving.scatter,
    "scatter-add": rules_moving.scatter,
    "scatter-max": rules_moving.scatter,
    "scatter-min": rules_moving.scatter,
    "scatter-mul": rules_moving.scatter,
    "scatter-sub": rules_moving.scatter,
    "scatter_add": rules_moving.scatter,
    "scatter_max": rules_moving.scatter,
    "scatter_min": rules_moving.scatter,
    "scatter_mul": rules_moving.scatter,
    "select_and_gather_add": _of_windows,
    "select_and_scatter_add": _of_windows,
    "shard": rules_collective.shard,
    "slice": rules_moving.slice_rule,
    "sort": _sort,
    "split": rules_moving.split,
    "squeeze": rules_moving.squeeze,
    "stack": rules_moving.stack,
    "svd": _of_matrices,
    "threefry2x32": rules_random.threefry,
    "tile": rules_moving.tile,
    "top_k": _top_k,
    "transpose": rules_moving.transpose,
    "triangular_solve": _triangular_solve,
    "unshard": rules_collective.unshard,
    "unstack": rules_moving.unstack,
}
