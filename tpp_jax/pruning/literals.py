"""Literal numbers in a computation that follow the widths of its arrays.

A mean divides by the number of its terms; a product of queries and keys is scaled by
the square root of their size. Such numbers are expected to change if the model sums
over the channels that they count. Any other number has to be the same in a cut model.
"""

import dataclasses
import functools
import math
from collections.abc import Set
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from tpp_jax.graph.comparing import Difference, Kept, Reading
from tpp_jax.graph.labels import Axis
from tpp_jax.graph.tracing import Trace, source_line
from tpp_jax.graph.unfolding import Equation

# Operations between a sum and its division that do not change the number of terms.
_MOVES = {"reshape", "broadcast_in_dim", "squeeze", "convert_element_type", "transpose"}
# Powers of a width that networks scale by.
_POWERS = (1, -1, 1 / 2, -1 / 2, 1 / 4, -1 / 4)


@dataclasses.dataclass(frozen=True, eq=False)
class OtherNumber:
    """A literal number that differs between the unpruned model and a cut one.

    Attributes:
      before: Number in the unpruned model, or an array.
      after: Number in the cut model, or an array.
      source: Source of the number, see :func:`tracing.source_line`.
      result: Value number of the first result computed with it, None if not known.
    """

    before: Any
    after: Any
    source: Any
    result: int | None

    def difference(self) -> Difference:
        """Describes the number to the user."""
        if np.ndim(self.after):
            return Difference("an array with other numbers appears in its computation")
        return Difference(
            f"the number {_short(self.after)} appears in its computation in place of "
            f"{_short(self.before)}",
            line=source_line(self.source),
        )


def other_numbers(old: Trace, new: Trace) -> list[OtherNumber]:
    """Lists the literal numbers that differ between two computations.

    Examples are a scale ``1 / sqrt(width)`` and a factor that depends on a width in
    some other way. The cut network then does not compute the same as the masked one.

    Args:
      old: Trace of the unpruned model.
      new: Trace of the cut model, with the same operations.
    """
    return [
        OtherNumber(before, after, source, result)
        for (before, _, result), (after, source, _) in zip(
            old.literals, new.literals, strict=False
        )
        if before is not after and not _is_same(before, after)
    ]


class Widths:
    """The widths of two traces, which explain their literal numbers.

    Attributes:
      old: Trace of the unpruned model.
      new: Trace of the cut model, with the same operations.
      reading: Labels of the unpruned model.
      kept: Positions that the cut keeps.
      reduced: Indices of the groups that sums run over.
    """

    def __init__(
        self, old: Trace, new: Trace, reading: Reading, kept: Kept, reduced: Set[int]
    ) -> None:
        self.old, self.new = old, new
        self.reading, self.kept = reading, kept
        self.reduced = reduced

    def followed(self, numbers: list[OtherNumber]) -> frozenset[int] | None:
        """Returns the groups that numbers may follow, which are to be tried.

        In both computations, a number may be the number of terms of the sum that it
        divides, which needs no trial, or a power of a width. Reduced groups are left
        out.

        Args:
          numbers: Numbers from :func:`other_numbers`.

        Returns:
          Indices of the groups; None if it may be any group.
        """
        found: set[int] = set()
        for number in numbers:
            if np.ndim(number.before) or np.ndim(number.after):
                return None
            if not self._is_mean(number):
                groups = self._groups_of_power(number)
                if not groups or -1 in groups:
                    return None
                found |= groups - self.reduced
        return frozenset(found)

    def _is_mean(self, number: OtherNumber) -> bool:
        divides = self._made_by.get(number.result)
        if divides is None or divides.primitive not in ("div", "mul"):
            return False
        [*operands] = {n for n in divides.inputs if n is not None}
        if len(operands) != 1:
            return False
        made = self._made_by.get(operands[0])
        while made is not None and made.primitive in _MOVES:
            made = self._made_by.get(made.inputs[0])
        if made is None or made.primitive != "reduce_sum":
            return False
        power = 1 if divides.primitive == "div" else -1
        pairs = (number.before, self.old.shapes), (number.after, self.new.shapes)
        return all(
            _is_power(value, self._terms(made, shapes), power)
            for value, shapes in pairs
        )

    def _terms(self, summed: Equation, shapes: tuple[tuple[int, ...], ...]) -> int:
        [value] = summed.inputs
        assert value is not None
        return math.prod(shapes[value][axis] for axis in summed.params["axes"])

    @functools.cached_property
    def _made_by(self) -> dict[int | None, Equation]:
        return {n: eqn for eqn in self.old.equations for n in eqn.outputs}

    def _groups_of_power(self, number: OtherNumber) -> set[int]:
        """Returns the groups along all axes of whose width a number is a power.

        -1 stands for channels that belong to no group.
        """
        found: set[int] = set()
        for (before, after), arrays in self._pairs.items():
            if any(
                _is_power(number.before, before, power)
                and _is_power(number.after, after, power)
                for power in _POWERS
            ):
                for labels in arrays:
                    _, channels = self.reading.solution.of(labels)
                    found.update(self.reading.group_of[channels].tolist())
        return found

    @functools.cached_property
    def _pairs(self) -> dict[tuple[int, int], list[Axis]]:
        """Old and new width → labels of the axes that have these widths."""
        found: dict[tuple[int, int], list[Axis]] = {}
        for labels, width in self.kept.widths(self.reading):
            if len(labels) != width:
                found.setdefault((len(labels), width), []).append(labels)
        return found


def _is_power(number: Any, width: int, power: float) -> bool:
    """Reports whether a number is a power of a width, within the precision of its type.

    Most numbers are computed in Python or in float32.
    """
    try:
        value = float(number)
    except (TypeError, ValueError):
        return False
    dtype = getattr(number, "dtype", None)
    exact = float(width) ** power if width or power > 0 else math.inf
    if dtype is not None and dtype.itemsize < 4:
        return bool(np.asarray(exact, dtype) == np.asarray(number))
    return math.isclose(value, exact, rel_tol=4e-7)


def _is_same(one: Any, other: Any) -> bool:
    """Reports whether two numbers, or two arrays of the same shape, are equal.

    Arrays of different shapes count as equal here, since shapes are compared
    separately; so do random keys.
    """
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return one == other or (one != one and other != other)
    if _is_scalar(one) and _is_scalar(other) and one.dtype == other.dtype:
        one, other = one.item(), other.item()  # much faster than to compare arrays
        return one == other or (one != one and other != other)
    if np.shape(one) != np.shape(other) or _is_key(one):
        return True
    one, other = np.asarray(one), np.asarray(other)
    return np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")


def _is_scalar(one: Any) -> TypeGuard[np.ndarray]:
    return isinstance(one, np.ndarray) and one.ndim == 0 and one.dtype.kind in "biufc"


def _is_key(array: Any) -> bool:
    dtype = getattr(array, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended)


def _short(number: Any) -> str:
    try:
        return f"{float(number):.6g}"
    except (TypeError, ValueError):
        return str(number)[:40]
