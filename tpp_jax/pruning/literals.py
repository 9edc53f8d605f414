"""Numbers that are written into a computation and follow the widths of its arrays.

A mean divides by the number of its terms, a product of queries and keys is scaled by
the square root of theirs. Where only channels do so whose sums the model computes
anyway, that is to be expected; any other number has to be the same in a cut model.
"""

import dataclasses
import functools
import math
from collections.abc import Set
from typing import Any

import jax
import numpy as np

from tpp_jax.graph.comparing import Difference, Reading, Stays
from tpp_jax.graph.tracing import Trace, source_line
from tpp_jax.graph.unfolding import Equation

# Operations between a sum and its division that leave the number of terms alone.
_MOVES = {"reshape", "broadcast_in_dim", "squeeze", "convert_element_type", "transpose"}
# Powers of a width that networks scale by.
_POWERS = (1, -1, 1 / 2, -1 / 2, 1 / 4, -1 / 4)


@dataclasses.dataclass(frozen=True, eq=False)
class OtherNumber:
    """A number of the unpruned model in whose place a cut one has another.

    Attributes:
      before: the number, or an array.
      after: what stands in its place.
      source: where it was written.
      result: value number of what is computed with it first, if that is known.
    """

    before: Any
    after: Any
    source: Any
    result: int | None

    def difference(self) -> Difference:
        """Describes it to the user."""
        if np.ndim(self.after):
            return Difference("an array of other numbers enters its values")
        return Difference(
            f"the number {_short(self.after)} enters its values in place of "
            f"{_short(self.before)}",
            line=source_line(self.source),
        )


def other_numbers(old: Trace, new: Trace) -> list[OtherNumber]:
    """Lists the numbers that are written into one computation and not into the other.

    A scale ``1 / sqrt(width)``, or a factor that depends on a width otherwise: the cut
    network then computes something else than the masked one.

    Args:
      old: the trace of the whole model.
      new: that of the cut one, which does the same operations.
    """
    return [
        OtherNumber(before, after, source, result)
        for (before, _, result), (after, source, _) in zip(
            old.literals, new.literals, strict=False
        )
        if before is not after and not _is_same(before, after)
    ]


class Widths:
    """The widths of two traces, by which their numbers are explained.

    Attributes:
      old: the trace of the whole model.
      new: that of the cut one, which does the same operations.
      reading: the labels of the whole one.
      stays: what is left of them in the cut one.
      reduced: indices of the groups that sums run over.
    """

    def __init__(
        self, old: Trace, new: Trace, reading: Reading, stays: Stays, reduced: Set[int]
    ) -> None:
        self.old, self.new = old, new
        self.reading, self.stays = reading, stays
        self.reduced = reduced

    def followed(self, numbers: list[OtherNumber]) -> frozenset[int] | None:
        """Returns the groups that numbers follow in a way that has to be tried.

        A number may be that of the terms of a sum which it divides, in both
        computations, or a power of a width, in both. Reduced groups are left out.

        Returns:
          Indices of the groups; None if there may be others.
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
        """Returns the groups along all axes of which a number is a power.

        -1 stands for channels that are of no group.
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
    def _pairs(self) -> dict[tuple[int, int], list[np.ndarray]]:
        """Old and new width → the labels of the axes that have both."""
        found: dict[tuple[int, int], list[np.ndarray]] = {}
        for labels, width in self.stays.widths(self.reading):
            if len(labels) != width:
                found.setdefault((len(labels), width), []).append(labels)
        return found


def _is_power(number: Any, width: int, power: float) -> bool:
    """Reports whether a number is a power of a width, as exactly as its type can say.

    Most are computed in Python or in float32.
    """
    try:
        value = float(number)
    except (TypeError, ValueError):
        return False
    kind = getattr(number, "dtype", None)
    exact = float(width) ** power
    if kind is not None and kind.itemsize < 4:
        return bool(np.asarray(exact, kind) == np.asarray(number))
    return math.isclose(value, exact, rel_tol=4e-7)


def _is_same(one: Any, other: Any) -> bool:
    """Reports whether two numbers, or two arrays of one shape, are the same.

    What has another shape is compared as all arrays are; random keys are not.
    """
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return one == other or (one != one and other != other)
    if np.shape(one) != np.shape(other) or _is_key(one):
        return True
    one, other = np.asarray(one), np.asarray(other)
    return np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")


def _is_key(array: Any) -> bool:
    kind = getattr(array, "dtype", None)
    return kind is not None and jax.dtypes.issubdtype(kind, jax.dtypes.extended)


def _short(number: Any) -> str:
    try:
        return f"{float(number):.6g}"
    except (TypeError, ValueError):
        return str(number)[:40]
