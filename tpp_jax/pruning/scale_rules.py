"""How each primitive changes the factors and zeros of :mod:`scales`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tpp_jax.graph.unfolding import Equation
from tpp_jax.pruning.scales import NOTHING, Comparison, NotZero, Scaled, plus
from tpp_jax.pruning.zeros import ZEROS, renumbered


def results(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    """Returns the results of an equation.

    Raises:
      NotZero: They depend on pruned channels that are not zero.
    """
    pairs = zip(eqn.inputs, eqn.scalars, strict=True)
    if any(n is None and scalar is None for n, scalar in pairs):
        return run.other(eqn, operands)
    rule = _RULES.get(eqn.primitive)
    if rule is not None:
        return rule(run, eqn, operands)
    if eqn.primitive in ZEROS:
        zero = [x.zero for x in operands]
        zero = ZEROS[eqn.primitive](eqn, zero, run.old.shapes, run.lost)
        return _moved(run, eqn, operands, zero)
    return run.other(eqn, operands)


def literal(before: Any, after: Any) -> Scaled:
    """Returns a number in the code, which may be another one in the cut network."""
    if before is None:  # what a loop carries
        return Scaled(NOTHING)
    try:
        number, other = float(before), float(after)
    except TypeError:  # a complex number, a random key
        same = np.array_equal(before, after)
        return Scaled(NOTHING if same else {"": math.inf})
    if number == other == 0:
        return Scaled(None, empty=True, number=0.0)
    if not math.isfinite(number) and str(number) == str(other):
        return Scaled(None, number=number)
    if number == other:
        return Scaled(NOTHING, number=number)
    if number * other > 0 and math.isfinite(number) and math.isfinite(other):
        return Scaled({"": math.log(other / number)})
    return Scaled({"": math.inf})


def _moved(
    run: Comparison,
    eqn: Equation,
    operands: list[Scaled],
    zero: Sequence[frozenset[int]],
) -> list[Scaled]:
    """Entries in other places, next to others of the same factor."""
    arrays = [
        x
        for i, x in enumerate(operands)
        if i == 0 or eqn.primitive in _SEVERAL or i in _MORE.get(eqn.primitive, ())
    ]
    log = run.equal(eqn, arrays) if arrays else NOTHING
    empty = bool(arrays) and all(x.empty for x in arrays)
    number = arrays[0].number if eqn.primitive == "broadcast_in_dim" else None
    return [Scaled(log, axes, empty, number) for axes in zero]


# Operations that move entries of all operands, or of some after the first.
_SEVERAL = {"concatenate", "stack", "pad"}
_MORE = {"dynamic_update_slice": (1,), "scatter": (2,), "scatter-add": (2,)}


def _alike(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    """Sums, maxima, choices: zero where all operands are."""
    [out] = eqn.outputs
    arrays = operands[1:] if eqn.primitive == "select_n" else operands
    inputs = eqn.inputs[-len(arrays) :]
    rank = len(run.old.shapes[out])
    if eqn.primitive == "select_n":
        run.unscaled(eqn, operands[:1])
    zero = [
        axis
        for axis in run.lost(out)
        if all(
            x.empty or (axis in x.zero and run.rank(n) == rank)
            for n, x in zip(inputs, arrays, strict=True)
        )
    ]
    empty = all(x.empty for x in arrays)
    return [Scaled(run.equal(eqn, arrays), frozenset(zero), empty)]


def _bounded(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    """Values between bounds: zeros are kept by bounds on either side of them."""
    if eqn.primitive == "clamp":
        low, x, high = operands
        kept = (low.number or 0.0) <= 0 <= (high.number or 0.0)
        known = low.number is not None and high.number is not None
    else:
        sign = 1 if eqn.primitive == "max" else -1
        bounds = [one.number for one in operands if one.number is not None]
        x = next((one for one in operands if one.number is None), operands[0])
        kept = all(sign * bound <= 0 for bound in bounds)
        known = len(bounds) == 1
    if known and kept:
        return [Scaled(run.equal(eqn, operands), x.zero, x.empty)]
    return _alike(run, eqn, operands)


def _join(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    """What a loop carries: zero at the end where it was zero at the start."""
    first, *others = operands
    if any(not first.zero <= x.zero and not x.empty for x in others):
        raise NotZero(eqn)
    return _alike(run, eqn, operands)


def _multiply(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    del run, eqn
    a, b = operands
    return [Scaled(plus(a.log, b.log), a.zero | b.zero, a.empty or b.empty)]


def _divide(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    del run, eqn
    a, b = operands
    return [Scaled(plus(a.log, b.log, -1.0), a.zero - b.zero, a.empty and not b.empty)]


def _power_of(x: Scaled, power: float) -> list[Scaled]:
    log = None if x.log is None else plus(NOTHING, x.log, power)
    if power > 0:
        return [Scaled(log, x.zero, x.empty)]
    return [Scaled(log)]


def _integer_power(run: Any, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    del run
    return _power_of(operands[0], float(eqn.params["y"]))


def _any_power(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    if operands[1].number is None:
        return run.other(eqn, operands)
    return _power_of(operands[0], operands[1].number)


def _fixed_power(power: float) -> "Rule":
    def rule(run: Any, eqn: Any, operands: list[Scaled]) -> list[Scaled]:
        del run, eqn
        return _power_of(operands[0], power)

    return rule


def _same(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    """Results that are homogeneous in the operands, and zero where they are."""
    del run
    return [x._replace(number=None) for x in operands[: len(eqn.outputs)]]


def _convert(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    dtype = eqn.params["new_dtype"]
    if jnp.issubdtype(dtype, jnp.inexact):
        return operands
    if dtype != jnp.bool_:
        run.unscaled(eqn, operands)
    return [operands[0]._replace(log=NOTHING)]


def _sign(run: Any, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    del run, eqn
    return [Scaled(NOTHING, operands[0].zero, operands[0].empty)]


def _odd(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    """A function that is zero at zero."""
    run.unscaled(eqn, operands)
    return [Scaled(NOTHING, operands[0].zero, operands[0].empty)]


def _comparing(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    run.equal(eqn, operands)
    return [Scaled(NOTHING)]


def _invariant(run: Any, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    del run, operands
    return [Scaled(NOTHING) for _ in eqn.outputs]


def _along(eqn: Equation) -> set[int]:
    """Returns the axes that an operation runs over."""
    for name in ("axes", "axis", "dimension"):
        if name in eqn.params:
            axes = eqn.params[name]
            return {axes} if isinstance(axes, int) else set(axes)
    return set()


def _reduce(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    [x] = operands
    gone = run.lost(eqn.inputs[0]) & _along(eqn)
    if eqn.outputs[0] in run.means:
        return [Scaled(None, empty=True)]
    summed = eqn.primitive == "reduce_sum"
    if gone and not x.empty and not (summed and gone <= x.zero):
        raise NotZero(eqn)
    zero = renumbered(x.zero, _along(eqn), run.rank(eqn.inputs[0]))
    if eqn.primitive in ("argmax", "argmin"):
        return [Scaled(NOTHING, zero)]
    return [Scaled(x.log, zero, x.empty)]


def centrings(run: Comparison) -> dict[int, Equation]:
    """Finds sums over pruned channels whose mean is subtracted from the channels.

    Returns:
      Value number of a sum → the subtraction.
    """
    made_by: dict[int | None, Equation] = {
        n: eqn for eqn in run.old.equations for n in eqn.outputs
    }
    found = {}
    for eqn in run.old.equations:
        if eqn.primitive != "sub" or not run.lost(eqn.inputs[0]):
            continue
        made = made_by.get(eqn.inputs[1])
        while made is not None and made.primitive in _BETWEEN:
            made = made_by.get(made.inputs[0])
        if made is None or made.primitive != "reduce_sum":
            continue
        if run.lost(made.inputs[0]) & _along(made):
            found[made.outputs[0]] = eqn
    return found


# Operations between a sum and the subtraction of the mean.
_BETWEEN = set("broadcast_in_dim convert_element_type div mul reshape squeeze".split())


def _in_order(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    """Sorts and partial sums, along an axis that keeps all of its positions."""
    if run.lost(eqn.inputs[0]) & _along(eqn):
        raise NotZero(eqn)
    return [x._replace(number=None) for x in operands]


def _fft(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    """A Fourier transform along the last axes."""
    [x] = operands
    rank = run.rank(eqn.inputs[0])
    along = set(range(rank - len(eqn.params["fft_lengths"]), rank))
    if run.lost(eqn.inputs[0]) & along:
        raise NotZero(eqn)
    return [Scaled(x.log, x.zero, x.empty)]


def _top_k(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    along = eqn.params.get("reduction_dimension", eqn.params.get("axis", -1))
    if along % run.rank(eqn.inputs[0]) in run.lost(eqn.inputs[0]):
        raise NotZero(eqn)
    return [operands[0], Scaled(NOTHING)]


def _product(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    """Products of matrices: a contraction needs zeros in one of the operands."""
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left, right = operands
    gone = run.lost(eqn.inputs[0])
    for i, j in zip(left_sum, right_sum, strict=True):
        if i in gone and i not in left.zero and j not in right.zero:
            raise NotZero(eqn)
    zero = {
        at
        for at, (i, j) in enumerate(zip(left_batch, right_batch, strict=True))
        if i in left.zero or j in right.zero
    }
    at = len(left_batch)
    for value, x, used in (
        (eqn.inputs[0], left, {*left_sum, *left_batch}),
        (eqn.inputs[1], right, {*right_sum, *right_batch}),
    ):
        for axis in range(run.rank(value)):
            if axis not in used:
                zero |= {at} if axis in x.zero else set()
                at += 1
    log = plus(left.log, right.log)
    return [Scaled(log, frozenset(zero), left.empty or right.empty)]


def _ragged(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    """Products of rows with the matrix of their group."""
    ragged = eqn.params["ragged_dot_dimension_numbers"]
    dims, groups = ragged.dot_dimension_numbers, ragged.rhs_group_dimensions
    left, right, *sizes = operands
    run.unscaled(eqn, sizes)
    [(i, *rest)], [(j, *_)] = dims[0][:1], dims[0][1:]
    if rest or any(dims[1]) or set(ragged.lhs_ragged_dimensions) == {i}:
        return run.other(eqn, operands)
    if i in run.lost(eqn.inputs[0]) and i not in left.zero and j not in right.zero:
        raise NotZero(eqn)
    kept = [k for k in range(run.rank(eqn.inputs[1])) if k not in {j, *groups}]
    first = run.rank(eqn.inputs[0]) - 1
    zero = {first + at for at, axis in enumerate(kept) if axis in right.zero}
    log = plus(left.log, right.log)
    return [Scaled(log, frozenset(zero), left.empty or right.empty)]


def _convolution(
    run: Comparison, eqn: Equation, operands: list[Scaled]
) -> list[Scaled]:
    images, kernel = operands
    dims = eqn.params["dimension_numbers"]
    features, produced, contracted = dims.lhs_spec[1], *dims.rhs_spec[:2]
    lost = run.lost(eqn.inputs[0])
    if eqn.params["batch_group_count"] != 1:
        run.refuse_lost(eqn)
    zero = {dims.out_spec[0]} if dims.lhs_spec[0] in images.zero else set()
    width = run.old.shapes[eqn.operand(1)][contracted]
    if width == 1 and eqn.params["feature_group_count"] > 1:
        made = features in images.zero or produced in kernel.zero
    else:
        made = produced in kernel.zero
        if features in lost and not (
            features in images.zero or contracted in kernel.zero
        ):
            raise NotZero(eqn)
    zero |= {dims.out_spec[1]} if made else set()
    log = plus(images.log, kernel.log)
    return [Scaled(log, frozenset(zero), images.empty or kernel.empty)]


Rule = Callable[[Comparison, Equation, list[Scaled]], list[Scaled]]

_RULES: dict[str, Rule] = {
    **dict.fromkeys("add add_any complex select_n sub".split(), _alike),
    **dict.fromkeys(
        "abs conj copy copy_p imag neg real reduce_precision".split(), _same
    ),
    **dict.fromkeys(
        """device_put layout_constraint mesh_cast name neg
        optimization_barrier pbroadcast pcast pmax pmin ppermute psum psum_invariant
        pvary real reduce_precision reduce_window_max reduce_window_min
        reduce_window_sum reshard shard sharding_constraint stop_gradient
        unshard""".split(),
        _same,
    ),
    **dict.fromkeys(
        """asin asinh atan atanh ceil erf erf_inv expm1 floor log1p round sin sinh tan
        tanh""".split(),
        _odd,
    ),
    **dict.fromkeys(("clamp", "max", "min"), _bounded),
    **dict.fromkeys("eq ge gt le lt ne".split(), _comparing),
    **dict.fromkeys(("is_finite", "zeros_like"), _invariant),
    **dict.fromkeys(
        """argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_sum
        reduce_xor""".split(),
        _reduce,
    ),
    **dict.fromkeys(("cummax", "cummin", "cumsum", "sort"), _in_order),
    "cbrt": _fixed_power(1 / 3),
    "conv_general_dilated": _convolution,
    "convert_element_type": _convert,
    "div": _divide,
    "fft": _fft,
    "dot_general": _product,
    "integer_pow": _integer_power,
    "join": _join,
    "mul": _multiply,
    "pow": _any_power,
    "ragged_dot_general": _ragged,
    "rsqrt": _fixed_power(-1 / 2),
    "sign": _sign,
    "sqrt": _fixed_power(1 / 2),
    "square": _fixed_power(2),
    "top_k": _top_k,
}
