"""Trying a cut on a model, by tracing the cut model and comparing the traces.

A jaxpr shows that an axis of 32 was reshaped to (4, 8), but not whether the model would
reshape an axis of 16 to (2, 8) or (4, 4), nor that its code compares two widths.
"""

import collections
import functools
from collections.abc import Iterable

import numpy as np

from tpp_jax.graph.comparing import (
    Difference,
    Kept,
    difference,
    is_equal,
    lines_of,
)
from tpp_jax.graph.groups import read_groups
from tpp_jax.graph.records import Groups
from tpp_jax.graph.tracing import Trace, lines_of_error, raised_in
from tpp_jax.pruning.arrangement import arrangement
from tpp_jax.pruning.emptying import undefined, without_empty
from tpp_jax.pruning.literals import OtherNumber, Widths, other_numbers
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.source import Source

HAIKU = (
    "Haiku, whose modules compare their parameters with the widths that they were given"
)


def blamed(source: Source, plan: Plan) -> tuple[Difference, list[str]] | None:
    """Finds what is wrong with a plan.

    Args:
      source: Model.
      plan: Plan to be tried.

    Returns:
      The first difference and the names of the groups at fault, as few as could be
      found; None if the model works with the plan.
    """
    trial = Trial(source, plan.groups)
    kept = {g.name: np.asarray(plan.kept[g.name]) for g in plan.pruned_groups}
    index = {g.name: i for i, g in enumerate(plan.groups)}
    values = False

    def fault_of(names: Iterable[str]) -> Difference | None:
        fault = trial.of({index[name]: kept[name] for name in names})
        if fault is None and values and trial.numbers:
            return trial.numbers[0].difference()
        return fault

    fault = fault_of(kept)
    values = fault is None and trial.suspects != frozenset()
    if values:
        # A mean over channels divides by their number, which is expected to change.
        kept = {g.name: kept[g.name] for g in plan.pruned_groups if not g.reduced}
        fault = fault_of(kept) if kept else None
    if fault is None:
        return None
    names = [name for name in kept if index[name] in fault.groups]
    if names:
        return fault, names
    # Bisection finds one group that fails alone, or a few that fail together.
    rest = list(kept)
    while len(rest) > 1:
        for half in (rest[: len(rest) // 2], rest[len(rest) // 2 :]):
            if found := fault_of(half):
                fault, rest = found, half
                break
        else:
            break
    return fault, rest


# Traces that do other work that are remembered.
_REFUTED = 4


class Trial:
    """Traces a model with fewer channels of some groups, and compares the traces.

    Attributes:
      source: Model.
      groups: Groups of the model.
      numbers: Numbers in the computation of the cut model that differ from those of the
        unpruned one, after a trial that found no other difference.
      suspects: Indices of groups that these numbers may follow, without reduced ones;
        None if it may be any group.
    """

    def __init__(self, source: Source, groups: Groups) -> None:
        self.source = source
        self.groups = groups
        self.numbers: list[OtherNumber] = []
        self.suspects: frozenset[int] | None = frozenset()

    def of(self, kept: dict[int, np.ndarray]) -> Difference | None:
        """Returns the first difference, None if there is none.

        Args:
          kept: Index of a group → channels that are kept; other groups keep all.
        """
        groups = self.groups
        everything = {
            group.name: kept.get(i, np.arange(group.size, dtype=np.int32))
            for i, group in enumerate(groups)
            if group.reason is None
        }
        plan = Plan(everything, groups)
        # Loops are read once: what one of their steps keeps is compared at a time.
        steps = max((len(own) for own in kept.values() if own.ndim > 1), default=1)
        plans = [plan.of_step(step) for step in range(steps)]
        plans = plans[:1] + [one for one in plans[1:] if one != plans[0]]
        old, reading = groups.traced, groups.reading
        positions = self._positions(plans[0])
        shapes = {leaf: positions.shape(value) for leaf, value in old.leaves.items()}
        self.numbers, self.suspects = [], frozenset()
        try:
            new = self.source.trace_cut(plans[0], shapes)
        except Exception as error:  # any that the user's code raises for odd shapes
            return self._raised(error, kept)
        emptied = any(indices.shape[-1] == 0 for indices in kept.values())
        if emptied:
            old, new = without_empty(old, new, positions)
        for one in plans:
            positions = self._positions(one)
            found = difference(old, new, reading, positions)
            if found is None and emptied:
                found = undefined(groups.traced, new)
            if found and found.order and self._rearranged(new, one, positions):
                return None
            if found is not None:
                return found
        self.numbers = other_numbers(old, new)
        if self.numbers:
            widths = Widths(old, new, reading, positions, self._reduced)
            self.suspects = widths.followed(self.numbers)
        return None

    def _positions(self, plan: Plan) -> Kept:
        """Returns the positions of all axes that a plan keeps."""
        masks: list[np.ndarray | None] = [None] * len(self.groups)
        for i, group in enumerate(self.groups):
            if group.reason is None and plan.kept_count(group) < group.size:
                masks[i] = mask = np.zeros(group.size, bool)
                mask[np.asarray(plan.kept[group.name])] = True
        return self.groups.reading.kept(masks)

    @functools.cached_property
    def _reduced(self) -> frozenset[int]:
        return frozenset(i for i, group in enumerate(self.groups) if group.reduced)

    def _rearranged(self, new: Trace, plan: Plan, positions: Kept) -> bool:
        """Reports whether a trace does the same work in another order.

        The order of a product of three arrays depends on their sizes. In this case the
        groups are read off the new trace, and must be where slicing leaves them.
        """
        old = self.groups.traced
        outputs = zip(old.outputs, new.outputs, strict=False)
        if (
            _work(old) != _work(new)
            or len(old.outputs) != len(new.outputs)
            or any(
                a is not None and (b is None or positions.shape(a) != new.shapes[b])
                for a, b in outputs
            )
        ):
            return False
        # An attribute that makes no difference has just been tried, most often.
        cut = positions.flat.tobytes()
        if any(cut == same and is_equal(new, one) for same, one in self._refuted):
            return False
        found, _ = read_groups(
            new, self.source.inputs, joined=self.groups.joined, unpruned=self.groups
        )
        alike = arrangement(found).issuperset(arrangement(self.groups, plan))
        if not alike:
            self._refuted.append((cut, new))
        return alike

    @functools.cached_property
    def _refuted(self) -> collections.deque[tuple[bytes, Trace]]:
        """The last traces that do other work, and the positions that were kept."""
        return collections.deque(maxlen=_REFUTED)

    def _raised(self, error: Exception, kept: Iterable[int]) -> Difference:
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        chosen = frozenset(kept)
        if raised_in(error, "haiku"):
            return Difference(f"{HAIKU}: {text}", chosen, old_size=True)
        lines = tuple(lines_of_error(error))
        for line in lines:
            here = self._groups_at(line) & chosen
            if here:
                return Difference(text, here, line=line, lines=lines)
        return Difference(text, line=lines[0] if lines else "", lines=lines)

    @functools.cached_property
    def _lines(self) -> dict[str, list[int]]:
        return {
            line: [
                n for eqn in eqns for n in (*eqn.inputs, *eqn.outputs) if n is not None
            ]
            for line, eqns in lines_of(self.groups.traced).items()
        }

    @functools.cache  # noqa: B019  a trial lives as long as one call of channel_groups
    def _groups_at(self, line: str) -> frozenset[int]:
        """Returns the groups that run through the operations of a line of code."""
        reading, shapes = self.groups.reading, self.groups.traced.shapes
        found: set[int] = set()
        for value in set(self._lines.get(line, ())):
            for axis in range(len(shapes[value])):
                found |= reading.groups_along(value, axis)
        return frozenset(found)


# Operations that only move data; their number depends on the order of the others.
_MOVES = {"transpose", "reshape", "broadcast_in_dim", "squeeze", "convert_element_type"}


def _work(traced: Trace) -> collections.Counter[str]:
    """Counts the operations of a trace that compute something."""
    return collections.Counter(
        eqn.primitive for eqn in traced.equations if eqn.primitive not in _MOVES
    )
