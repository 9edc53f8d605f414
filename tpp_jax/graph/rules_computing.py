"""How the primitives that compute tie positions together; see rules.py."""

from collections.abc import Sequence

import numpy as np

from tpp_jax.graph.context import Context
from tpp_jax.graph.labels import Axes, NotUnderstood


def elementwise(ctx: Context) -> list[Axes]:
    """Entry by entry: the axes of arrays of one rank are tied, but for broadcasts."""
    shape = ctx.shapes[0]
    arrays = [axes for axes in ctx.operands if len(axes) == len(shape)]
    out = list(arrays[0])
    for axes in arrays[1:]:
        for i, axis in enumerate(axes):
            # An axis of size one is broadcast: it does not couple with what it meets.
            if axis is not out[i] and len(axis) == shape[i]:
                alone = len(out[i]) != shape[i]
                out[i] = axis if alone else ctx.tie(out[i], axis)
    return [out for _ in ctx.shapes]


def convolution(ctx: Context) -> list[Axes]:
    """Kernels contract the channels of images and produce those of the result."""
    images, kernel = ctx.operands
    dims = ctx.params["dimension_numbers"]
    batch, features, *window = dims.lhs_spec
    produced, contracted, *kernel_window = dims.rhs_spec
    spatial = "a spatial axis of a convolution"
    ctx.fix_all([images[axis] for axis in window], spatial)
    ctx.fix_all([kernel[axis] for axis in kernel_window], "the window of a convolution")
    out = [ctx.fixed(n, spatial) for n in ctx.shapes[0]]
    out_batch, out_features, *_ = dims.out_spec
    out[out_batch] = images[batch]
    out[out_features] = kernel[produced]
    groups = ctx.params["feature_group_count"]
    kind = ctx.kind
    if kind is None and groups > 1:
        kind = "depthwise" if len(kernel[contracted]) == 1 else "grouped"
    if ctx.params["batch_group_count"] != 1:
        met = [images[batch], images[features], kernel[contracted], kernel[produced]]
        ctx.fix_all(met, "a convolution in groups of the batch")
    elif kind == "depthwise":
        # Each input channel makes one or more output channels of its own.
        several = len(kernel[produced]) // groups
        ctx.tie(np.repeat(images[features], several), kernel[produced])
    elif groups == 1:
        ctx.tie(images[features], kernel[contracted])
    else:
        # All groups may lose the same channels; the number of groups is kept.
        group = ctx.fixed(groups, f"the {groups} groups of a convolution")
        within = ctx.product([group, kernel[contracted]])
        ctx.tie(images[features], within)
        ctx.tie_all(np.split(kernel[produced], groups))
    return [out]


def dot_general(ctx: Context) -> list[Axes]:
    """A matrix product: contracted axes are tied, and so are axes of a batch."""
    left, right = ctx.operands
    (left_sum, right_sum), (left_batch, right_batch) = ctx.params["dimension_numbers"]
    for i, j in zip(left_sum, right_sum, strict=True):
        ctx.tie(left[i], right[j])
    out = [
        ctx.tie(left[i], right[j]) for i, j in zip(left_batch, right_batch, strict=True)
    ]
    out += _without(left, {*left_sum, *left_batch})
    out += _without(right, {*right_sum, *right_batch})
    return [out]


def ragged_dot(ctx: Context) -> list[Axes]:
    """A product of rows with the matrix of their group: a mixture of experts."""
    left, right, *sizes = ctx.operands
    ragged = ctx.params["ragged_dot_dimension_numbers"]
    dims, groups = ragged.dot_dimension_numbers, ragged.rhs_group_dimensions
    (left_sum, right_sum), (left_batch, right_batch) = dims
    reason = "the groups of a ragged product"
    if not ctx.free:
        for axes in sizes:
            ctx.fix_all(axes, reason)
    ctx.fix_all([right[j] for j in groups if j not in ctx.free], reason)
    ctx.fix_all([left[i] for i in ragged.lhs_ragged_dimensions], reason)
    for i, j in zip(left_sum, right_sum, strict=True):
        ctx.tie(left[i], right[j])
    out = [
        ctx.tie(left[i], right[j]) for i, j in zip(left_batch, right_batch, strict=True)
    ]
    if set(ragged.lhs_ragged_dimensions) <= set(left_sum):
        out.insert(0, ctx.fixed(ctx.shapes[0][0], reason))
    out += _without(left, {*left_sum, *left_batch})
    out += _without(right, {*right_sum, *right_batch, *groups})
    return [out]


def reduce(ctx: Context) -> list[Axes]:
    """A sum, a maximum, … over some axes."""
    axes = ctx.operands[0]
    gone = ctx.params["axes"]
    for i in gone:
        ctx.sum_over(axes[i])
    return [_without(axes, gone)]


def reduce_several(ctx: Context) -> list[Axes]:
    """A reduction by a function of the user's, of one array or of several at once."""
    joint = ctx.tie_arrays(ctx.operands[: len(ctx.shapes)])
    gone = ctx.params["dimensions"]
    for i in gone:
        ctx.sum_over(joint[i])
    out = _without(joint, gone)
    return [out for _ in ctx.shapes]


def reduce_window(ctx: Context) -> list[Axes]:
    """Pooling."""
    reason = "an axis that pooling runs over"
    out = []
    for i, axis in enumerate(ctx.tie_arrays(ctx.operands[: len(ctx.shapes)])):
        if _untouched(ctx, i):
            out.append(axis)
        else:
            ctx.fix(axis, reason)
            out.append(ctx.fixed(ctx.shapes[0][i], reason))
    return [out for _ in ctx.shapes]


def of_windows(ctx: Context) -> list[Axes]:
    """The gradient of pooling: what is pooled meets what was pooled."""
    reason = "an axis that pooling runs over"
    out = []
    for i, n in enumerate(ctx.shapes[0]):
        met = [axes[i] for axes in ctx.operands]
        if _untouched(ctx, i):
            out.append(ctx.tie_all(met))
        else:
            ctx.fix_all(met, reason)
            out.append(ctx.fixed(n, reason))
    return [out]


def fft(ctx: Context) -> list[Axes]:
    """A Fourier transform along the last axes."""
    return _mixed(ctx, len(ctx.params["fft_lengths"]))


def of_matrices(ctx: Context) -> list[Axes]:
    """A decomposition: the last two axes are a matrix, those before them a batch."""
    return _mixed(ctx, 2)


def triangular_solve(ctx: Context) -> list[Axes]:
    """A system of equations for each column of the right-hand sides."""
    matrix, given = ctx.operands
    solved = len(given) - (2 if ctx.params["left_side"] else 1)
    ctx.fix_all([*matrix[-2:], given[solved]], _mixing(ctx))
    return [[*ctx.tie_arrays([given[:-2], matrix[:-2]]), *given[-2:]]]


def random_gamma(ctx: Context) -> list[Axes]:
    """A random number for each entry of the second operand."""
    _, shape_parameter = ctx.operands
    return [list(shape_parameter)]


def cumulative(ctx: Context) -> list[Axes]:
    """Partial sums, maxima, … along one axis."""
    axes = ctx.operands[0]
    ctx.fix(axes[ctx.params["axis"]], f"the axis that '{ctx.primitive}' runs along")
    return [list(axes)]


def top_k(ctx: Context) -> list[Axes]:
    """The largest entries along one axis, and their places."""
    axes = ctx.operands[0]
    reason = "an axis of which the largest entries are taken"
    along = ctx.params.get("reduction_dimension", ctx.params.get("axis", -1))
    along %= len(ctx.shapes[0])
    _choose(ctx, [along], ctx.shapes[0][along], reason)
    out = list(axes)
    out[along] = ctx.fixed(ctx.shapes[0][along], reason)
    return [out for _ in ctx.shapes]


def same(ctx: Context) -> list[Axes]:
    """Results that are shaped like the operands, one each."""
    return [list(axes) for axes in ctx.operands]


def decide(ctx: Context) -> list[Axes]:
    """Which branch runs, or whether a loop goes on, depends on the operand."""
    ctx.fix_all(ctx.operands[0], "what a branch or a loop depends on")
    return [[]]


def no_results(ctx: Context) -> list[Axes]:
    """An effect, such as a message."""
    del ctx
    return []


def sort(ctx: Context) -> list[Axes]:
    """Arrays that are sorted together along one axis."""
    joint = ctx.tie_arrays(ctx.operands)
    ctx.fix(joint[ctx.params["dimension"]], "an axis that is sorted")
    return [joint for _ in ctx.shapes]


def arg_reduce(ctx: Context) -> list[Axes]:
    """The place of the largest or smallest entry."""
    axes = ctx.operands[0]
    gone = ctx.params["axes"]
    _choose(ctx, gone, 1, f"the axis that '{ctx.primitive}' runs over")
    return [_without(axes, gone)]


def iota(ctx: Context) -> list[Axes]:
    """Numbers counted from 0."""
    reason = "positions that are counted (iota)"
    if not ctx.free:
        return [[ctx.fixed(n, reason) for n in ctx.shapes[0]]]
    out = [ctx.fresh(n) for n in ctx.shapes[0]]
    for i, axis in enumerate(out):
        ctx.suppose(axis, i)
    return [out]


def _choose(ctx: Context, along: Sequence[int], number: int, reason: str) -> None:
    """Some positions are chosen among all along axes of the first operand."""
    for i in along:
        if i in ctx.free:
            ctx.choose(ctx.operands[0][i], number)
        else:
            ctx.fix(ctx.operands[0][i], reason)


def _without(axes: Axes, gone: set[int] | tuple[int, ...]) -> Axes:
    return [axis for i, axis in enumerate(axes) if i not in gone]


def _untouched(ctx: Context, axis: int) -> bool:
    """Reports whether a window leaves an axis unchanged."""
    return (
        ctx.params["window_dimensions"][axis] == 1
        and ctx.params["window_strides"][axis] == 1
        and tuple(ctx.params["padding"][axis]) == (0, 0)
        and ctx.params.get("base_dilation", {axis: 1})[axis] == 1
    )


def _mixed(ctx: Context, rank: int) -> list[Axes]:
    """Passes the first axes of the only operand on; the last ones are mixed.

    Args:
      ctx: Operation.
      rank: Number of axes that are mixed.
    """
    [axes] = ctx.operands
    reason = _mixing(ctx)
    batch, rest = axes[: len(axes) - rank], axes[len(axes) - rank :]
    ctx.fix_all(rest, reason)
    return [
        [*batch, *(ctx.fixed(n, reason) for n in shape[len(batch) :])]
        for shape in ctx.shapes
    ]


def _mixing(ctx: Context) -> NotUnderstood:
    return NotUnderstood(
        f"the operation '{ctx.primitive}', which mixes the positions of an axis"
    )
