"""How the values of a cut network compare with those of the masked one.

Two things are followed through a computation: along which axes the masked network's
values are zero where channels are pruned, and by which factor the cut network's values
differ from them. A sum over pruned zeros is a sum over the kept channels alone; a
division by the number of channels gives another factor. The logarithm of a factor is a
sum of unknowns, one for each parameter that may be rescaled, and a number. Where values
are added, or a function that is not homogeneous is applied, factors have to agree:
these are the equations that :mod:`rescaling` solves.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from tpp_jax.graph import rules_computing
from tpp_jax.graph.rules import RULES
from tpp_jax.graph.tracing import Trace
from tpp_jax.graph.unfolding import Equation
from tpp_jax.pruning.zeros import ZEROS, renumbered

Log = Mapping[str, float]
"""Parameter → coefficient of its unknown; ``""`` → the number that is added."""

NOTHING: Log = {}
# A number that is added to keep a divisor from zero.
_LARGEST_EPSILON = 1e-2


class Scaled(NamedTuple):
    """A value of the cut network, compared with that of the masked one.

    Attributes:
      log: Logarithm of the factor between the kept entries; None if any factor holds,
        since they are zero or infinite.
      zero: Axes that lose positions at which the masked network's value is zero.
      empty: Whether the value is zero everywhere.
      number: The value if it is one number in the code.
    """

    log: Log | None
    zero: frozenset[int] = frozenset()
    empty: bool = False
    number: float | None = None


class Row(NamedTuple):
    """A sum of unknowns that must be zero.

    Attributes:
      log: The sum.
      equation: Equation that it comes from; None for an output of the model.
      epsilon: Number in that equation that it may be relaxed for.
    """

    log: Log
    equation: Equation | None
    epsilon: float | None = None


class NotZero(Exception):
    """An operation whose result depends on pruned channels that are not zero.

    Attributes:
      equation: The operation.
    """

    def __init__(self, equation: Equation) -> None:
        super().__init__(equation.primitive)
        self.equation = equation


def plus(a: Log | None, b: Log | None, times: float = 1.0) -> Log | None:
    """Returns ``a + times · b``; None if either is None."""
    if a is None or b is None:
        return None
    if not b:
        return a
    found = dict(a)
    for key, value in b.items():
        found[key] = found.get(key, 0.0) + times * value
    return {key: value for key, value in found.items() if abs(value) > 1e-12}


def compare(
    old: Trace,
    new: Trace,
    zero: Mapping[str, Collection[int]],
    unknown: Collection[str],
) -> list[Row]:
    """Compares a cut network with the masked one.

    Args:
      old: Trace of the unpruned network.
      new: Trace of the cut network, with the same operations.
      zero: Parameter → axes along which the masked network has zeros at pruned
        positions.
      unknown: Parameters that may be rescaled.

    Returns:
      Sums that are zero if both networks give the same outputs.

    Raises:
      NotZero: The networks differ whatever the factors are.
    """
    comparison = Comparison(old, new)
    values: dict[int, Scaled] = {}
    for n in (*old.inputs, *old.constants):
        values[n] = Scaled(NOTHING)
    for name, n in old.leaves.items():
        log = {name: 1.0} if name in unknown else NOTHING
        values[n] = Scaled(log, comparison.lost(n) & frozenset(zero.get(name, ())))
    # What a loop starts from may be zero, what it goes on with is not.
    sources = {n for e in old.equations if e.primitive == "join" for n in e.inputs}
    for before, after in zip(old.equations, new.equations, strict=True):
        pairs = zip(before.inputs, before.scalars, after.scalars, strict=True)
        operands = [
            values[n] if n is not None else _literal(number, other)
            for n, number, other in pairs
        ]
        found = comparison.results(before, operands)
        for n, one in zip(before.outputs, found, strict=True):
            lost = comparison.lost(n)
            if one.log is None and n in sources:
                one = Scaled({f"?{n}": 1.0}, lost if one.empty else frozenset())
            values[n] = one._replace(zero=lost if one.empty else one.zero & lost)
    for n in old.outputs:
        if n is not None and values[n].log:
            comparison.rows.append(Row(values[n].log or NOTHING, None))
    return comparison.rows


def _literal(before: Any, after: Any) -> Scaled:
    """Returns a number in the code, which may be another one in the cut network."""
    if before is None:  # what a loop carries
        return Scaled(NOTHING)
    number, other = float(before), float(after)
    if number == other == 0:
        return Scaled(None, empty=True, number=0.0)
    if not math.isfinite(number) and str(number) == str(other):
        return Scaled(None, number=number)
    if number == other:
        return Scaled(NOTHING, number=number)
    if number * other > 0 and math.isfinite(number) and math.isfinite(other):
        return Scaled({"": math.log(other / number)})
    return Scaled({"": math.inf})


class Comparison:
    """Rules of the primitives, and the rows that they add.

    Attributes:
      old: Trace of the unpruned network.
      new: Trace of the cut network.
      rows: Sums that have to be zero.
    """

    def __init__(self, old: Trace, new: Trace) -> None:
        self.old, self.new = old, new
        self.rows: list[Row] = []

    def lost(self, value: int | None) -> frozenset[int]:
        """Returns the axes of a value that lose positions."""
        if value is None:
            return frozenset()
        pairs = zip(self.old.shapes[value], self.new.shapes[value], strict=True)
        return frozenset(i for i, (a, b) in enumerate(pairs) if a != b)

    def results(self, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
        """Returns the results of an equation.

        Raises:
          NotZero: They depend on pruned channels that are not zero.
        """
        pairs = zip(eqn.inputs, eqn.scalars, strict=True)
        if any(n is None and scalar is None for n, scalar in pairs):
            return self.other(eqn, operands)
        rule = _RULES.get(eqn.primitive)
        if rule is not None:
            return rule(self, eqn, operands)
        if eqn.primitive in ZEROS:
            zero = [x.zero for x in operands]
            zero = ZEROS[eqn.primitive](eqn, zero, self.old.shapes, self.lost)
            return self._moved(eqn, operands, zero)
        return self.other(eqn, operands)

    def equal(self, eqn: Equation, operands: Sequence[Scaled]) -> Log | None:
        """Requires equal factors, and returns their logarithm."""
        logs = [x.log for x in operands if x.log is not None]
        added = [x.number for x in operands if x.number]
        epsilon = next((x for x in added if 0 < x <= _LARGEST_EPSILON), None)
        for log in logs[1:]:
            row = plus(log, logs[0], -1.0)
            if row:
                self.rows.append(Row(row, eqn, epsilon))
        return logs[0] if logs else None

    def unscaled(self, eqn: Equation, operands: Sequence[Scaled]) -> None:
        """Requires that operands are the same in both networks."""
        self.rows += [Row(x.log, eqn) for x in operands if x.log]

    def other(self, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
        """Any function, entry by entry if it meets pruned channels."""
        if RULES.get(eqn.primitive) is not rules_computing.elementwise:
            self.refuse_lost(eqn)
        self.unscaled(eqn, operands)
        return [Scaled(NOTHING) for _ in eqn.outputs]

    def refuse_lost(self, eqn: Equation) -> None:
        """Raises if an operation meets pruned channels."""
        if any(self.lost(n) for n in (*eqn.inputs, *eqn.outputs)):
            raise NotZero(eqn)

    def _moved(
        self, eqn: Equation, operands: list[Scaled], zero: Sequence[frozenset[int]]
    ) -> list[Scaled]:
        """Entries in other places, next to others of the same factor."""
        arrays = [
            x
            for i, x in enumerate(operands)
            if i == 0 or eqn.primitive in _SEVERAL or i in _MORE.get(eqn.primitive, ())
        ]
        log = self.equal(eqn, arrays) if arrays else NOTHING
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
            x.empty or (axis in x.zero and _rank(run, n) == rank)
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


def _rank(run: Comparison, value: int | None) -> int:
    return 0 if value is None else len(run.old.shapes[value])


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
    return lambda run, eqn, operands: _power_of(operands[0], power)


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
    summed = eqn.primitive == "reduce_sum"
    if gone and not x.empty and not (summed and gone <= x.zero):
        raise NotZero(eqn)
    zero = renumbered(x.zero, _along(eqn), _rank(run, eqn.inputs[0]))
    if eqn.primitive in ("argmax", "argmin"):
        return [Scaled(NOTHING, zero)]
    return [Scaled(x.log, zero, x.empty)]


def _in_order(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    """Sorts and partial sums, along an axis that keeps all of its positions."""
    if run.lost(eqn.inputs[0]) & _along(eqn):
        raise NotZero(eqn)
    return [x._replace(number=None) for x in operands]


def _top_k(run: Comparison, eqn: Equation, operands: list[Scaled]) -> list[Scaled]:
    along = eqn.params.get("reduction_dimension", eqn.params.get("axis", -1))
    if along % _rank(run, eqn.inputs[0]) in run.lost(eqn.inputs[0]):
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
        for axis in range(_rank(run, value)):
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
    kept = [k for k in range(_rank(run, eqn.inputs[1])) if k not in {j, *groups}]
    first = _rank(run, eqn.inputs[0]) - 1
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
    **dict.fromkeys("abs conj copy copy_p imag neg real reduce_precision".split(), _same),
    **dict.fromkeys(
        """device_put layout_constraint mesh_cast name
        optimization_barrier pbroadcast pcast pmax pmin ppermute psum psum_invariant
        pvary reshard reduce_window_max reduce_window_min reduce_window_sum shard
        sharding_constraint stop_gradient unshard""".split(),
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
