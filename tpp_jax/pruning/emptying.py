"""Groups that lose all their channels: what a model computes without them.

A branch whose arrays are empty contributes nothing, which is how blocks are removed by
a plan. A model may compute what is empty in any shape and order, so the operations on
empty arrays are left out before two traces are compared. What remains must not divide
by the number of the channels, and the outputs must still depend on the inputs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tpp_jax.graph.comparing import Difference, Kept
from tpp_jax.graph.tracing import Trace, source_line, source_lines
from tpp_jax.graph.unfolding import LASTING, Equation

IsEmpty = Callable[[int], bool]

# Results that are zero if all operands of the operation are.
_KEEP_ZERO = frozenset(
    "abs add add_any broadcast_in_dim concatenate convert_element_type copy copy_p "
    "cumsum dynamic_slice expand_dims gather imag max min neg pad real reduce_max "
    "reduce_min reduce_precision reduce_sum reshape rev select_n sign slice sqrt cbrt "
    "square squeeze stop_gradient sub tanh transpose erf sin".split()
)
_PRODUCTS = frozenset(("dot_general", "conv_general_dilated", "ragged_dot_general"))
_SUMS = _PRODUCTS | {"reduce_sum", "mul"}


def without_empty(old: Trace, new: Trace, kept: Kept) -> tuple[Trace, Trace]:
    """Returns two traces without the operations that compute nothing.

    Args:
      old: Trace of the unpruned model.
      new: Trace of the cut model.
      kept: Positions that the cut keeps.

    Returns:
      The first trace without the operations whose results are empty after the cut, and
      the second without those whose results are empty, with the value numbers of the
      first as far as the operations are the same.
    """

    def is_empty(value: int) -> bool:
        return 0 in kept.shape(value)

    def is_empty_now(value: int) -> bool:
        return 0 in new.shapes[value]

    before, after = _computing(old, is_empty), _computing(new, is_empty_now)
    number = _numbers(old, new, before, after)
    shapes = list(old.shapes)
    for n, same in number.items():
        both = is_empty(same) and is_empty_now(n)
        shapes[same] = kept.shape(same) if both else new.shapes[n]

    def renamed(n: int | None, same: int | None) -> int | None:
        if n is None:
            return None
        if same is not None and is_empty_now(n) and is_empty(same):
            shapes[same] = kept.shape(same)
            return same
        return number.get(n, -1 - n)

    equations = []
    for i, other in enumerate(after):
        operands = before[i].inputs if i < len(before) else ()
        padded = (*operands, *[None] * len(other.inputs))
        pairs = zip(other.inputs, padded, strict=False)
        equations.append(
            other._replace(
                inputs=tuple(renamed(*pair) for pair in pairs),
                outputs=tuple(number.get(n, -1 - n) for n in other.outputs),
            )
        )
    ends = [renamed(*pair) for pair in zip(new.outputs, old.outputs, strict=False)]
    changed = dataclasses.replace(
        new,
        shapes=tuple(shapes),
        leaves=dict(old.leaves),
        inputs=old.inputs,
        constants=old.constants,
        equations=tuple(equations),
        outputs=tuple(ends),
        literals=tuple(
            (value, source, None if n is None else number.get(n))
            for value, source, n in _literals(new, after)
        ),
    )
    first = dataclasses.replace(
        old, equations=tuple(before), literals=tuple(_literals(old, before))
    )
    return first, changed


def _numbers(
    old: Trace, new: Trace, before: Sequence[Equation], after: Sequence[Equation]
) -> dict[int, int]:
    """Returns the value of the first trace that each value of the second is."""
    number = {n: old.leaves[name] for name, n in new.leaves.items()}
    number |= dict(zip(new.inputs, old.inputs, strict=False))
    number |= dict(zip(new.constants, old.constants, strict=False))
    for one, other in zip(before, after, strict=False):
        if one.primitive != other.primitive or len(one.outputs) != len(other.outputs):
            break
        number |= dict(zip(other.outputs, one.outputs, strict=True))
    return number


def _computing(traced: Trace, is_empty: IsEmpty) -> list[Equation]:
    """Returns the operations that what is not empty depends on."""
    read = {n for n in (*traced.outputs, *traced.unread) if n is not None}
    found = []
    for eqn in reversed(traced.equations):
        needed = eqn.primitive in LASTING or not read.isdisjoint(eqn.outputs)
        if needed and not all(map(is_empty, eqn.outputs)):
            found.append(eqn)
            read.update(n for n in eqn.inputs if n is not None)
    return found[::-1]


def _literals(
    traced: Trace, equations: Sequence[Equation]
) -> list[tuple[Any, Any, int | None]]:
    """Returns the literals in some operations, and the arrays of the function."""
    made = {n for eqn in equations for n in eqn.outputs}
    return [one for one in traced.literals if one[2] is None or one[2] in made]


def undefined(old: Trace, new: Trace) -> Difference | None:
    """Finds an output that is undefined, or constant, because arrays are empty.

    Args:
      old: Trace of the unpruned model.
      new: Trace of the cut model, with the value numbers of the first.
    """
    culprit = _divisions_by_zero(new)
    for n, name in zip(new.outputs, new.output_names, strict=True):
        if n in culprit:
            eqn = culprit[n]
            line = source_line(eqn.source)
            at = f" by '{eqn.primitive}' ({line})" if line else ""
            return Difference(
                f"without any channel, the output{name} is not a number: it divides by "
                f"their number, or by what they add up to{at}",
                lines=tuple(source_lines(eqn.source)),
            )
    before, after = _reached(old), _reached(new)
    for n, same, name in zip(old.outputs, new.outputs, new.output_names, strict=True):
        if n in before and same not in after:
            return Difference(
                f"without any channel, the output{name} no longer depends on the "
                "inputs of the model"
            )
    return None


def _divisions_by_zero(new: Trace) -> dict[int | None, Equation]:
    """Returns the values that may not be finite, each with the operation to blame."""
    zero: set[int | None] = set()
    wrong: dict[int | None, Equation] = {}
    for eqn in new.equations:
        found = next((wrong[n] for n in eqn.inputs if n in wrong), None)
        if found is None and _divides_by_zero(eqn, zero, new.shapes):
            found = eqn
        for n in eqn.outputs:
            if 0 in new.shapes[n]:
                continue
            if found is not None:
                wrong[n] = found
            elif _is_zero(eqn, zero, new.shapes):
                zero.add(n)
    return wrong


def _empty(n: int | None, shapes: Sequence[tuple[int, ...]]) -> bool:
    return n is not None and n >= 0 and 0 in shapes[n]


def _divides_by_zero(
    eqn: Equation, zero: set[int | None], shapes: Sequence[tuple[int, ...]]
) -> bool:
    operands = _operands(eqn)

    def is_zero(i: int) -> bool:
        n, number = operands[i]
        return n in zero if n is not None else number == 0

    match eqn.primitive:
        case "div" | "rem":
            return is_zero(1)
        case "rsqrt" | "log" | "log2":
            return is_zero(0)
        case "mul":
            return any(abs(number) == float("inf") for _, number in operands)
        case "reduce_max" | "reduce_min" | "argmax" | "argmin":
            return _empty(eqn.inputs[0], shapes)
    return False


def _is_zero(
    eqn: Equation, zero: set[int | None], shapes: Sequence[tuple[int, ...]]
) -> bool:
    """Reports whether the results of an operation are zero whatever the inputs are."""
    values = [n for n in eqn.inputs if n is not None]
    if eqn.primitive in _SUMS and any(_empty(n, shapes) or n in zero for n in values):
        return True
    if eqn.primitive == "div":
        return eqn.inputs[0] in zero
    if eqn.primitive == "integer_pow":
        return eqn.params["y"] > 0 and eqn.inputs[0] in zero
    if eqn.primitive not in _KEEP_ZERO or not values or not zero.issuperset(values):
        return False
    return all(n is not None or number == 0 for n, number in _operands(eqn))


def _operands(eqn: Equation) -> list[tuple[int | None, float]]:
    """Returns each operand, and its number if it is a literal that is known."""
    found = []
    for i, n in enumerate(eqn.inputs):
        try:
            number = float(eqn.scalars[i])
        except (IndexError, TypeError, ValueError):
            number = float("nan")
        found.append((n, number))
    return found


def _reached(traced: Trace) -> set[int | None]:
    """Returns the values that depend on an input, through arrays with entries."""
    shapes = traced.shapes
    found: set[int | None] = {n for n in traced.inputs if 0 not in shapes[n]}
    before = -1
    while before != len(found):  # again, for what loops carry back
        before = len(found)
        for eqn in traced.equations:
            if not found.isdisjoint(eqn.inputs):
                found.update(n for n in eqn.outputs if not _empty(n, shapes))
    return found
