"""How the values of a cut network compare with those of the masked one.

Two things are followed through a computation: along which axes the masked network's
values are zero where channels are pruned, and by which factor the cut network's values
differ from them. A sum over pruned zeros is a sum over the kept channels alone; a
division by the number of channels gives another factor. The logarithm of a factor is a
sum of unknowns, one for each parameter that may be rescaled, and a number. Where values
are added, or a function that is not homogeneous is applied, factors have to agree:
these are the equations that :mod:`rescaling` solves.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tpp_jax.graph import rules_computing
from tpp_jax.graph.rules import RULES
from tpp_jax.graph.tracing import Trace
from tpp_jax.graph.unfolding import Equation

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


class Comparison:
    """Two traces of the same operations, and what their values have to meet.

    Attributes:
      old: Trace of the unpruned network.
      new: Trace of the cut network.
      means: Value numbers of sums over channels that are taken to be zero.
      rows: Sums of logarithms that have to be zero.
    """

    def __init__(
        self, old: Trace, new: Trace, means: frozenset[int] = frozenset()
    ) -> None:
        self.old, self.new, self.means = old, new, means
        self.rows: list[Row] = []

    def lost(self, value: int | None) -> frozenset[int]:
        """Returns the axes of a value that lose positions."""
        if value is None:
            return frozenset()
        pairs = zip(self.old.shapes[value], self.new.shapes[value], strict=True)
        return frozenset(i for i, (a, b) in enumerate(pairs) if a != b)

    def equal(self, eqn: Equation, operands: Sequence[Scaled]) -> Log | None:
        """Requires equal factors, and returns their logarithm."""
        logs = [x.log for x in operands if x.log is not None]
        added = [x.number for x in operands if x.number is not None]
        if eqn.primitive not in ("add", "max"):
            added = []
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

    def rank(self, value: int | None) -> int:
        """Returns the number of axes of a value, 0 for a literal."""
        return 0 if value is None else len(self.old.shapes[value])
