"""Cuts of channels that norms and other reductions run over.

With zeros in n - k of n channels a root mean square is √(k/n) times that of the other k
alone. If the scale behind it is multiplied by √(n/k), and what it is computed from by
√(k/n), so that the epsilon counts the same, then a cut changes nothing. Such factors
are found for any computation, as the solution of a few linear equations.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tpp_jax.graph.functions import is_array
from tpp_jax.graph.naming import longest_known_suffix, map_named, some
from tpp_jax.graph.tracing import source_line
from tpp_jax.graph.unfolding import Equation
from tpp_jax.pruning.filters import pruned_filters
from tpp_jax.pruning.literals import other_numbers
from tpp_jax.pruning.masks import cut_shapes
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.scale_rules import centrings, literal, results
from tpp_jax.pruning.scales import NOTHING, Comparison, NotZero, Row, Scaled
from tpp_jax.pruning.source import Source

# Costs of an epsilon that does not follow and of an equation that does not hold, to a
# factor's cost of one: each is paid only if nothing cheaper suffices.
_EPSILON, _BROKEN = 1e3, 1e6
# A kernel is rescaled if no scale or bias can be.
_KERNEL = 1.1


@dataclasses.dataclass(frozen=True)
class Rescaling:
    """What makes zeros in place of channels the same as their absence.

    Attributes:
      factors: Parameter → factor; empty if ``reason`` is not None.
      reason: Reason why no factors do; None if these do.
      epsilons: Numbers in the code, with their lines, that would have to follow the
        number of channels too; the factors are exact up to them.
      means: Lines at which a mean over the channels is subtracted; the factors are
        exact if it is zero.
    """

    factors: dict[str, float]
    reason: str | None = None
    epsilons: tuple[str, ...] = ()
    means: tuple[str, ...] = ()

    @property
    def problem(self) -> str | None:
        """What is different after the cut; None if nothing is."""
        if self.reason is not None:
            return self.reason
        if self.means:
            return (
                f"{some(self.means)} subtracts a mean over the channels, which zeros "
                "change unless it is zero"
            )
        if self.epsilons:
            return (
                f"the epsilon {some(self.epsilons)} would have to follow the number of "
                "channels too"
            )
        return None

    def apply(self, plan: Plan, tree: Any) -> Any:
        """Returns a tree of parameters, pruned or not, multiplied by the factors."""

        def scaled(name: str, leaf: Any) -> Any:
            known = longest_known_suffix(name, plan.groups.shapes)
            if known not in self.factors or not is_array(leaf):
                return leaf
            exact = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
            return (exact * self.factors[known]).astype(leaf.dtype)

        return map_named(scaled, tree) if self.factors else tree


def find_rescaling(plan: Plan, source: Source) -> Rescaling:
    """Finds factors that make a cut of zeros free.

    Args:
      plan: Plan of the channels to keep; not traced.
      source: Model that its groups were found in.
    """
    if plan not in source.rescalings:
        source.rescalings[plan] = _found(plan, source)
    return source.rescalings[plan]


def _found(plan: Plan, source: Source) -> Rescaling:
    plan = _with_one(plan)
    groups = plan.groups
    old = groups.traced if groups.source is source else source.trace()
    try:
        new = source.trace_cut(plan, {**groups.shapes, **cut_shapes(plan)})
    except Exception as error:  # any that the user's code raises for odd shapes
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        return Rescaling({}, f"the cut model does not run: {text}")
    same = [
        (a.primitive, a.inputs, a.outputs) == (b.primitive, b.inputs, b.outputs)
        for a, b in zip(old.equations, new.equations, strict=False)
    ]
    if not all(same) or len(old.equations) != len(new.equations):
        return Rescaling({}, "the cut network does the same in another order")
    if any(np.ndim(number.before) for number in other_numbers(old, new)):
        return Rescaling({}, "an array built into the model is another one")
    zero = {
        leaf: [member.axis for member in filters.members]
        for leaf, filters in pruned_filters(plan).items()
    }
    costs = _costs(plan, source)
    found = _compared(Comparison(old, new), zero, costs)
    subtracted = centrings(Comparison(old, new)) if found.reason is not None else {}
    if subtracted:
        known = Comparison(old, new, frozenset(subtracted))
        nearly = _compared(known, zero, costs)
        if nearly.reason is None:
            lines = dict.fromkeys(map(_place, subtracted.values()))
            return dataclasses.replace(nearly, means=tuple(lines))
    return found


def _with_one(plan: Plan) -> Plan:
    """Returns a plan whose groups keep at least one channel.

    The last channel of a group, a zero too, adds nothing to a sum.
    """
    kept = {
        name: k if np.size(k) else np.zeros((*np.shape(k)[:-1], 1), np.int32)
        for name, k in plan.kept.items()
    }
    return Plan(kept, plan.groups)


def _compared(
    comparison: Comparison,
    zero: Mapping[str, Sequence[int]],
    costs: Mapping[str, float],
) -> Rescaling:
    """Finds factors that make a cut network the same as the masked one.

    Args:
      comparison: Traces of the unpruned and of the cut network.
      zero: Parameter → axes along which the masked network has zeros at pruned
        positions.
      costs: Parameters that may be rescaled, and the cost of each factor.
    """
    try:
        _follow(comparison, zero, costs)
    except NotZero as error:
        place = _place(error.equation)
        reason = f"{place} depends on pruned channels, though their filters are zero"
        return Rescaling({}, reason)
    return _solved(comparison.rows, costs)


def _follow(
    comparison: Comparison,
    zero: Mapping[str, Sequence[int]],
    unknown: Collection[str],
) -> None:
    """Applies the rules to all operations, see :func:`_compared`.

    Raises:
      NotZero: The networks differ whatever the factors are.
    """
    old, new = comparison.old, comparison.new
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
            values[n] if n is not None else literal(number, other)
            for n, number, other in pairs
        ]
        found = results(comparison, before, operands)
        for n, one in zip(before.outputs, found, strict=True):
            lost = comparison.lost(n)
            if one.log is None and n in sources:
                one = Scaled({f"?{n}": 1.0}, lost if one.empty else frozenset())
            values[n] = one._replace(zero=lost if one.empty else one.zero & lost)
    for n in old.outputs:
        if n is not None and values[n].log:
            comparison.rows.append(Row(values[n].log or NOTHING, None))


def _costs(plan: Plan, source: Source) -> dict[str, float]:
    """Returns the parameters that may be rescaled, and what each factor costs.

    They are those that the channels of reduced groups run through.
    """
    function, shapes = source.function, plan.groups.shapes
    floats = {
        name
        for name, leaf in zip(function.names, function.params, strict=True)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    return {
        member.leaf: 1.0 if len(shapes[member.leaf]) < 2 else _KERNEL
        for group in plan.pruned_groups
        if group.reduced
        for member in group.members
        if member.leaf in floats
    }


def _solved(rows: Sequence[Row], costs: Mapping[str, float]) -> Rescaling:
    """Solves for the factors, as few as possible."""
    # Equal rows are one, which may be relaxed if all of them may.
    strict = sorted(reversed(rows), key=lambda row: row.epsilon is None)
    rows = [*{tuple(sorted(row.log.items())): row for row in strict}.values()]
    numbers = np.array([-row.log.get("", 0.0) for row in rows])
    if not np.isfinite(numbers).all():
        row = rows[int(np.flatnonzero(~np.isfinite(numbers))[0])]
        return Rescaling({}, f"a number in {_place(row.equation)} is another one")
    if not numbers.any():
        return Rescaling({})
    names = sorted({name for row in rows for name in row.log} - {""})
    at = {name: i for i, name in enumerate(names)}
    matrix = np.zeros((len(rows), len(names)))
    for i, row in enumerate(rows):
        for name in row.log.keys() - {""}:
            matrix[i, at[name]] = row.log[name]
    relaxed = [_BROKEN if row.epsilon is None else _EPSILON for row in rows]
    of_names = [costs.get(name, 0.0) for name in names]
    logs, slack = _least(matrix, numbers, of_names, relaxed)
    loose = np.flatnonzero(np.abs(slack) > 1e-6)
    for row in (rows[k] for k in loose):
        if row.epsilon is None:
            place = _place(row.equation)
            return Rescaling({}, f"no factors make up for the change of {place}")
    factors = {
        name: math.exp(log)
        for name, log in zip(names, logs, strict=True)
        if name in costs and abs(log) > 1e-9
    }
    epsilons = [f"{rows[k].epsilon:g} in {_place(rows[k].equation)}" for k in loose]
    return Rescaling(factors, None, tuple(dict.fromkeys(epsilons)))


def _least(
    matrix: Float[np.ndarray, "rows names"],
    numbers: Float[np.ndarray, " rows"],
    costs: Sequence[float],
    relaxed: Sequence[float],
) -> tuple[Float[np.ndarray, " names"], Float[np.ndarray, " rows"]]:
    """Returns the cheapest solution of equations, and by how much each is not met.

    Args:
      matrix: Coefficients of the unknowns.
      numbers: Right-hand sides.
      costs: Cost of the absolute value of each unknown.
      relaxed: Cost of the amount by which each equation is not met.
    """
    from scipy.optimize import linprog  # late: slow to import
    from scipy.sparse import csr_array, eye_array, hstack

    rows, names = matrix.shape
    one, sparse = eye_array(rows), csr_array(matrix)
    cost = np.concatenate([costs, costs, relaxed, relaxed])
    wide = hstack([sparse, -sparse, one, -one])
    found = linprog(cost, A_eq=wide, b_eq=numbers, bounds=(0, None)).x
    x = found[:names] - found[names : 2 * names]
    slack = found[2 * names :][:rows] - found[2 * names + rows :]
    used, met = np.abs(x) > 1e-9, np.abs(slack) <= 1e-6
    # The programme is solved to 1e-7 only.
    if used.any():
        x[used] = np.linalg.lstsq(matrix[met][:, used], numbers[met], rcond=None)[0]
    return x, slack


def _place(equation: Equation | None) -> str:
    """Returns a description of an operation, with the user's line."""
    if equation is None:
        return "an output of the model"
    line = source_line(equation.source)
    return f"'{equation.primitive}' ({line})" if line else f"'{equation.primitive}'"
