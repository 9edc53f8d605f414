"""How each primitive ties the positions of its operands' axes together.

A rule takes one operation with the labels of its operands (:class:`Context`), returns
the labels of its results, and records which labels must be kept or removed together.

Working on single positions rather than on entire axes makes padding, concatenation and
flattening work without special cases: ``pad`` puts fixed labels around the operand's,
``reshape`` of (h, w, c) into h·w·c repeats the labels of c, ``reshape`` of heads · size
into (heads, size) makes each position a pair.

Nothing is guessed about a primitive without a rule: every position of its operands is
fixed, with the primitive as the reason.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from tpp_jax.errors import TPPError, TPPTypeError
from tpp_jax.graph import (
    rules_collective,
    rules_computing,
    rules_moving,
    rules_random,
)
from tpp_jax.graph.context import Context
from tpp_jax.graph.labels import Axes, Labels, NotUnderstood
from tpp_jax.graph.unfolding import ENTERED, Equation

Rule = Callable[[Context], Sequence[Axes]]
"""Function from an operation to the axes of each of its results."""

R = TypeVar("R", bound=Rule)


def apply_rule(
    labels: Labels,
    eqn: Equation,
    operands: list[Axes],
    shapes: Sequence[tuple[int, ...]],
    kind: str | None = None,
    free: frozenset[int] = frozenset(),
) -> Sequence[Axes]:
    """Returns the axes of the results of one equation, by its rule or as unknown.

    Args:
      labels: Labels of the computation, which the rule adds to.
      eqn: Equation of the computation.
      operands: Axes of each operand.
      shapes: Shape of each result.
      kind: Kind of a convolution; see :class:`Context`.
      free: Axes that need not be kept; see :class:`Context`.
    """
    labels.source = eqn.source
    rule = RULES.get(eqn.primitive, _unknown)
    return rule(
        Context(eqn.primitive, eqn.params, operands, shapes, labels, kind, free)
    )


def register_rule(primitive_name: str, *, override: bool = False) -> Callable[[R], R]:
    """Returns a decorator that makes a function the rule of a primitive.

    Channels are followed through a primitive by its rule. JAX's own primitives have
    one; your own, and those of other libraries, keep all channels that meet them until
    they are given one. FLOPs are not part of a rule: :func:`tpp_jax.count` lists a
    primitive that it does not know under ``uncounted``.

    Args:
      primitive_name: Name of the primitive, ``primitive.name``.
      override: Whether the rule replaces one that the primitive has already.

    Returns:
      A decorator for a function of one :class:`tpp_jax.Context`, which returns a list
      of axes for each result. The function itself is not changed.

    Raises:
      TPPError: The primitive has a rule, and ``override`` is False; or it is a call, a
        loop or a branch, whose inner operations are followed one by one.
      TPPTypeError: The name is not a string.

    Example:
      >>> @register_rule("my_scaled_sum")
      ... def my_scaled_sum(ctx):
      ...     return [ctx.tie_arrays(ctx.operands)]  # shaped like both operands
    """
    if not isinstance(primitive_name, str):
        raise TPPTypeError(
            "register_rule takes the name of a primitive, not "
            f"{type(primitive_name).__name__}: pass primitive.name"
        )
    if primitive_name in ENTERED:
        raise TPPError(
            f"the primitive {primitive_name!r} needs no rule: the operations inside it "
            "are followed one by one"
        )
    if primitive_name in RULES and not override:
        raise TPPError(
            f"the primitive {primitive_name!r} has a rule already: pass override=True "
            "to replace it"
        )

    def register(rule: R) -> R:
        RULES[primitive_name] = _checked(rule)
        return rule

    return register


def _checked(rule: Rule) -> Rule:
    """Returns a rule that raises a TPPError if its results do not fit the shapes."""

    @functools.wraps(rule)
    def check(ctx: Context) -> Sequence[Axes]:
        results = rule(ctx)
        if problem := _problem(results, ctx):
            name = getattr(rule, "__name__", repr(rule))
            raise TPPError(
                f"the rule {name!r} of the primitive {ctx.primitive!r} {problem}"
            )
        return results

    return check


def _problem(results: Sequence[Axes], ctx: Context) -> str:
    """Returns what is wrong with the results of a rule, or an empty text."""
    if not isinstance(results, list | tuple):
        return f"returned {type(results).__name__}, must return a list of results"
    if len(results) != len(ctx.shapes):
        return (
            f"returned {len(results)} results, but the operation has {len(ctx.shapes)}"
        )
    for i, (axes, shape) in enumerate(zip(results, ctx.shapes, strict=True)):
        if not isinstance(axes, list | tuple) or not all(map(_is_axis, axes)):
            return f"returned, as result {i}, what is no list of vectors of labels"
        if (sizes := tuple(map(len, axes))) != tuple(shape):
            return (
                f"returned axes of lengths {sizes} for result {i}, whose shape is "
                f"{tuple(shape)}"
            )
        if not all(map(ctx.labels.has, axes)):
            return (
                f"returned labels for result {i} that do not exist: take axes of the "
                "operands, or new ones from fresh and fixed"
            )
    return ""


def _is_axis(axis: object) -> bool:
    return (
        isinstance(axis, np.ndarray)
        and axis.ndim == 1
        and np.issubdtype(axis.dtype, np.integer)
    )


def _unknown(ctx: Context) -> list[Axes]:
    reason = NotUnderstood(
        f"the operation '{ctx.primitive}', which is not one that is understood"
    )
    for axes in ctx.operands:
        ctx.fix_all(axes, reason)
    return [[ctx.fixed(n, reason) for n in shape] for shape in ctx.shapes]


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
    **dict.fromkeys(_ELEMENTWISE, rules_computing.elementwise),
    "all_gather": rules_collective.all_gather,
    "all_gather_invariant": rules_collective.all_gather,
    "all_to_all": rules_collective.all_to_all,
    "approx_top_k": rules_computing.top_k,
    "argmax": rules_computing.arg_reduce,
    "argmin": rules_computing.arg_reduce,
    "axis_index": rules_collective.axis_index,
    "bitcast_convert_type": rules_random.bitcast,
    "broadcast_in_dim": rules_moving.broadcast_in_dim,
    "cholesky": rules_computing.of_matrices,
    "concatenate": rules_moving.concatenate,
    "conv_general_dilated": rules_computing.convolution,
    **dict.fromkeys(
        ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"),
        rules_computing.cumulative,
    ),
    "debug_callback": rules_computing.no_results,
    "debug_print": rules_computing.no_results,
    "decide": rules_computing.decide,
    "dot_general": rules_computing.dot_general,
    "dynamic_slice": rules_moving.dynamic_slice,
    "dynamic_update_slice": rules_moving.dynamic_update_slice,
    "eigh": rules_computing.of_matrices,
    "fft": rules_computing.fft,
    "gather": rules_moving.gather,
    "iota": rules_computing.iota,
    "join": rules_computing.elementwise,
    "loop_slice": rules_moving.loop_slice,
    "loop_stack": rules_moving.loop_stack,
    "lu": rules_computing.of_matrices,
    "pad": rules_moving.pad,
    "qr": rules_computing.of_matrices,
    "ragged_dot_general": rules_computing.ragged_dot,
    "random_bits": rules_random.random_bits,
    "random_gamma": rules_computing.random_gamma,
    "random_split": rules_random.random_split,
    "random_unwrap": rules_random.random_split,
    "random_wrap": rules_random.random_wrap,
    "reduce": rules_computing.reduce_several,
    "reduce_and": rules_computing.reduce,
    "reduce_max": rules_computing.reduce,
    "reduce_min": rules_computing.reduce,
    "reduce_or": rules_computing.reduce,
    "reduce_prod": rules_computing.reduce,
    "reduce_scatter": rules_collective.reduce_scatter,
    "reduce_sum": rules_computing.reduce,
    "reduce_window": rules_computing.reduce_window,
    "reduce_window_max": rules_computing.reduce_window,
    "reduce_window_min": rules_computing.reduce_window,
    "reduce_window_sum": rules_computing.reduce_window,
    "reduce_xor": rules_computing.reduce,
    "reshape": rules_moving.reshape,
    "rev": rules_moving.reverse,
    "rng_bit_generator": rules_random.rng_bit_generator,
    "rng_uniform": rules_random.rng_uniform,
    **dict.fromkeys(_SAME, rules_computing.same),
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
    "select_and_gather_add": rules_computing.of_windows,
    "select_and_scatter_add": rules_computing.of_windows,
    "shard": rules_collective.shard,
    "slice": rules_moving.slice_rule,
    "sort": rules_computing.sort,
    "split": rules_moving.split,
    "squeeze": rules_moving.squeeze,
    "stack": rules_moving.stack,
    "svd": rules_computing.of_matrices,
    "threefry2x32": rules_random.threefry,
    "tile": rules_moving.tile,
    "top_k": rules_computing.top_k,
    "transpose": rules_moving.transpose,
    "triangular_solve": rules_computing.triangular_solve,
    "unshard": rules_collective.unshard,
    "unstack": rules_moving.unstack,
}

BUILT_IN = frozenset(RULES)
"""Primitives whose rule comes with the package."""
