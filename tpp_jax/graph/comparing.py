"""Checking on a second trace that a cut model computes what its groups imply.

The labels of the first trace determine, for every axis of every array, which positions
are kept when channels are pruned. The model, traced again with the narrower arrays,
must perform the same operations in the same order, on arrays of exactly these shapes,
and an operation that selects positions by number must select exactly these.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from tpp_jax.graph.fields import Parts
from tpp_jax.graph.labels import Axis, Channels, Labels
from tpp_jax.graph.tracing import Equation, Trace, source_line, source_lines


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """The labels that groups were read off.

    Attributes:
      labels: Labels and the facts collected about them.
      axes: Value number → labels of each of its axes.
      solution: Labels expressed in channels.
      channels: For each group, numbers of its channels in the solution.
    """

    labels: Labels
    axes: dict[int | None, list[Axis]]
    solution: Channels
    channels: tuple[Int[np.ndarray, " size"], ...]

    @functools.cached_property
    def group_of(self) -> Int[np.ndarray, " components"]:
        """Index of the group that each channel belongs to, or -1."""
        found = np.full(len(self.solution.stuck), -1)
        for i, channels in enumerate(self.channels):
            found[channels] = i
        return found

    @functools.cached_property
    def noisy(self) -> frozenset[int]:
        """Indices of the groups for whose channels random numbers are drawn."""
        channels = [self.solution.of(axis)[1] for axis in self.labels.noise]
        groups = np.concatenate([self.group_of[one] for one in channels] or [[]])
        return frozenset(int(i) for i in groups if i >= 0)

    @functools.cached_property
    def distinct(
        self,
    ) -> tuple[dict[int, list[int]], list[Axis], Int[np.ndarray, " axes"]]:
        """The distinct label vectors of all axes.

        Value number → indices of the vectors of its axes; the vectors; and where each
        ends in their concatenation.
        """
        numbers: dict[int, int] = {}
        arrays: list[Axis] = []
        of: dict[int, list[int]] = {}
        for value, axes in self.axes.items():
            if value is None:
                continue
            own = of[value] = []
            for labels in axes:
                number = numbers.get(id(labels))
                if number is None:
                    number = numbers[id(labels)] = len(arrays)
                    arrays.append(labels)
                own.append(number)
        ends = np.cumsum([len(labels) for labels in arrays], dtype=np.int64)
        return of, arrays, ends

    @functools.cached_property
    def _flat(self) -> Axis:
        _, arrays, _ = self.distinct
        return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)

    def kept(self, masks: Sequence[Bool[np.ndarray, " size"] | None]) -> "Kept":
        """Returns the positions of every axis that a cut keeps.

        Args:
          masks: For each group, a mask that is True for the channels that are kept, or
            None if all are.
        """
        solution = self.solution
        keep = np.ones(len(solution.stuck), bool)
        for channels, mask in zip(self.channels, masks, strict=True):
            if mask is not None:
                keep[channels] = mask
        defined = np.flatnonzero(solution.defined)
        parts = solution.parts[defined]
        while defined.size:  # a position is kept if all that define it are
            before = keep[defined]
            keep[defined] = (keep[parts] | (parts < 0)).all(axis=1)
            if np.array_equal(before, keep[defined]):
                break
        of, _, ends = self.distinct
        flat = self._flat
        kept = np.ones(len(flat), bool)
        free = flat >= 0
        kept[free] = keep[solution.component[flat[free]]]
        sums = np.concatenate([[0], np.cumsum(kept)])
        starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        counts = (sums[ends] - sums[starts]).tolist()
        return Kept(of, kept, starts, ends, counts)

    def groups_along(self, value: int, axis: int) -> set[int]:
        """Returns the indices of the groups that run along an axis of a value."""
        _, channels = self.solution.of(self.axes[value][axis])
        return set(np.unique(self.group_of[channels]).tolist()) - {-1}

    @functools.cached_property
    def sizes(
        self,
    ) -> list[tuple[int, frozenset[int], Int[np.ndarray, " m"], Int[np.ndarray, " m"]]]:
        """Distinct axes that groups run along.

        For each its size, the groups, and two vectors: positions, and the group of a
        channel at each, or -1.
        """
        found = []
        seen = set()
        _, arrays, _ = self.distinct
        for labels in arrays:
            if not (labels >= 0).any():
                continue
            positions, channels = self.solution.of(labels)
            groups = self.group_of[channels]
            through = frozenset(np.unique(groups).tolist()) - {-1}
            key = len(labels), through, positions.tobytes(), groups.tobytes()
            if through and key not in seen:
                seen.add(key)
                found.append((len(labels), through, positions, groups))
        return found

    def numbers(self, groups: Set[int], names: Sequence[str]) -> dict[int, set[Parts]]:
        """Returns the sizes of all axes that some groups run along.

        Args:
          groups: Indices of these groups.
          names: Names of all groups.

        Returns:
          Size of an axis → ways in which axes of this size follow the channels.
        """
        found: dict[int, set[Parts]] = {}
        for size, through, positions, group_of in self.sizes:
            if not groups.isdisjoint(through):
                parts = parts_of(size, positions, group_of, names)
                found.setdefault(size, set()).add(parts)
        for i in groups:
            size = len(self.channels[i])
            found.setdefault(size, set()).add(((size, (names[i],)),))
        return found


def parts_of(
    size: int,
    positions: Int[np.ndarray, " m"],
    group_of: Int[np.ndarray, " m"],
    names: Sequence[str],
) -> Parts:
    """Returns how the size of an axis follows the channels that run along it.

    Args:
      size: Size of the axis.
      positions: Positions along the axis; one with several channels is repeated.
      group_of: Group of the channel at each of these positions, or -1.
      names: Names of the groups.
    """
    through, column = np.unique(group_of, return_inverse=True)
    met = np.zeros((size, len(through)), bool)
    met[positions, column] = True
    sets, numbers = np.unique(met[:, through >= 0], axis=0, return_counts=True)
    through = through[through >= 0]
    return tuple(
        (int(n), tuple([names[int(i)] for i in through[own]]))
        for own, n in zip(sets, numbers, strict=True)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """The positions of every axis of every value that a cut keeps.

    Attributes:
      indices: Value number → for each axis, index of its distinct label vector.
      flat: Mask of the concatenated label vectors, True for positions that are kept.
      starts: Start of each vector in their concatenation.
      ends: End of each vector in their concatenation.
      counts: Number of positions of each vector that are kept.
    """

    indices: dict[int, list[int]]
    flat: Bool[np.ndarray, " labels"]
    starts: Int[np.ndarray, " axes"]
    ends: Int[np.ndarray, " axes"]
    counts: list[int]

    def shape(self, value: int) -> tuple[int, ...]:
        """Returns the shape that a value has after the cut."""
        return tuple([self.counts[i] for i in self.indices[value]])

    def widths(self, reading: Reading) -> Iterable[tuple[Axis, int]]:
        """Returns the labels of every distinct axis, and its size after the cut."""
        _, arrays, _ = reading.distinct
        return zip(arrays, self.counts, strict=True)

    def mask(self, value: int, axis: int) -> Bool[np.ndarray, " n"]:
        """Returns a mask of an axis, True for the positions that are kept."""
        i = self.indices[value][axis]
        return self.flat[self.starts[i] : self.ends[i]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A place where a cut model differs from what its groups imply.

    Attributes:
      text: Description of the difference, for the user.
      groups: Indices of the groups that run through this place; empty if not known.
      old_size: Whether an operation keeps the old size of an axis; then the groups
        along the axis are certainly at fault.
      line: Line of the user's code, ``model.py:31``; empty if not known.
      lines: This line and the lines that it was called from, innermost first.
      order: Whether other operations are performed, or in another order.
    """

    text: str
    groups: frozenset[int] = frozenset()
    old_size: bool = False
    line: str = ""
    lines: tuple[str, ...] = ()
    order: bool = False


def difference(
    old: Trace, new: Trace, reading: Reading, kept: Kept
) -> Difference | None:
    """Compares the trace of a cut model with what the unpruned model's labels imply.

    Args:
      old: Trace of the unpruned model.
      new: Trace of the cut model.
      reading: Labels of the unpruned model.
      kept: Positions that the cut keeps.

    Returns:
      The first difference in order of execution, None if there is none.
    """
    for before, after in zip(old.equations, new.equations, strict=False):
        if (
            before.primitive != after.primitive
            or before.inputs != after.inputs
            or before.outputs != after.outputs
        ):
            here = _groups_through(before, old, reading)
            lines = tuple(source_lines(after.source))
            return Difference(_branch(before, after), here, lines=lines, order=True)
        for value in before.outputs:
            expected, found = kept.shape(value), new.shapes[value]
            if expected != found:
                return _other_shape(old, before, reading, value, expected, found)
        if not _same_settings(before, after, kept, old):
            return Difference(
                f"'{before.primitive}' has other parameters{_at(after)}",
                _groups_through(before, old, reading),
                lines=tuple(source_lines(after.source)),
            )
    if len(old.equations) != len(new.equations) or old.outputs != new.outputs:
        longer = max(old, new, key=lambda trace: len(trace.equations))
        rest = longer.equations[min(len(old.equations), len(new.equations)) :]
        return Difference(
            "another branch of the model's own code is taken"
            + (_at(rest[0]) if rest else ""),
            order=True,
        )
    return None


def is_equal(one: Trace, other: Trace) -> bool:
    """Reports whether two traces are certainly of the same computation.

    Operations with different arrays as parameters count as different.
    """
    return (
        one.leaves == other.leaves
        and one.shapes == other.shapes
        and one.outputs == other.outputs
        and len(one.equations) == len(other.equations)
        and all(map(_is_equal, one.equations, other.equations))
    )


def _is_equal(one: Equation, other: Equation) -> bool:
    return (
        one.primitive == other.primitive
        and one.inputs == other.inputs
        and one.outputs == other.outputs
        and one.times == other.times
        and one.params.keys() == other.params.keys()
        and all(_is_same(own, other.params[name]) for name, own in one.params.items())
    )


def _is_same(setting: Any, other: Any) -> bool:
    try:
        return setting is other or bool(setting == other)
    except ValueError:  # arrays
        return False


def _groups_through(eqn: Equation, old: Trace, reading: Reading) -> frozenset[int]:
    """Returns the groups that run along the operands of an operation."""
    return frozenset(
        i
        for value in eqn.inputs
        if value is not None
        for axis in range(len(old.shapes[value]))
        for i in reading.groups_along(value, axis)
    )


def _branch(before: Equation, after: Equation) -> str:
    return f"another branch of the model's own code is taken{_at(after) or _at(before)}"


def _other_shape(
    old: Trace,
    equation: Equation,
    reading: Reading,
    value: int,
    expected: tuple[int, ...],
    found: tuple[int, ...],
) -> Difference:
    text = (
        f"'{equation.primitive}' gives the shape {list(found)} in place of "
        f"{list(expected)}{_at(equation)}"
    )
    lines = tuple(source_lines(equation.source))
    if len(found) != len(expected):
        return Difference(text, lines=lines)
    odd = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
    kept_old = [i for i in odd if found[i] == old.shapes[value][i]]
    groups = [reading.groups_along(value, i) for i in kept_old or odd]
    here = frozenset().union(*groups)
    return Difference(text, here, old_size=bool(kept_old), lines=lines)


def _at(equation: Equation) -> str:
    line = source_line(equation.source)
    return f" ({line})" if line else ""


# Settings that are sizes. Sizes of results are compared as shapes, and settings that
# select positions by the functions in _POSITIONS.
_SIZES = {
    "reshape": ("new_sizes", "dimensions"),
    "broadcast_in_dim": ("shape",),
    "iota": ("shape",),
    "random_bits": ("shape",),
    "rng_bit_generator": ("shape",),
    "rng_uniform": ("shape",),
    "split": ("sizes",),
    "tile": ("reps",),
    "slice": ("start_indices", "limit_indices", "strides"),
    "dynamic_slice": ("slice_sizes",),
    "gather": ("slice_sizes",),
    "conv_general_dilated": ("feature_group_count",),
    "reduce_window": ("window_dimensions",),
    "reduce_window_max": ("window_dimensions",),
    "reduce_window_min": ("window_dimensions",),
    "reduce_window_sum": ("window_dimensions",),
}


def _same_settings(before: Equation, after: Equation, kept: Kept, old: Trace) -> bool:
    if before.times != after.times:
        return False
    sizes = _SIZES.get(before.primitive, ())
    for name, setting in before.params.items():
        other = after.params.get(name)
        if setting is other or name in sizes:
            continue
        if _is_plain(setting) and _is_plain(other) and setting != other:
            return False
    compare = _POSITIONS.get(before.primitive)
    return compare is None or compare(before, after, kept, old)


_PLAIN = {type(None), bool, int, float, str}


def _is_plain(setting: Any) -> bool:
    """Reports whether a setting consists of numbers and names only."""
    if type(setting) in _PLAIN:
        return True
    if isinstance(setting, tuple):
        return all(map(_is_plain, setting))
    return isinstance(setting, (int, float, str))


def _same_slice(before: Equation, after: Equation, kept: Kept, old: Trace) -> bool:
    [value] = before.inputs
    assert value is not None
    for axis, n in enumerate(old.shapes[value]):
        keep = kept.mask(value, axis)
        taken = np.arange(n)[_range(before, axis)]
        moved = np.cumsum(keep) - 1
        expected = moved[taken[keep[taken]]]
        if not np.array_equal(np.arange(keep.sum())[_range(after, axis)], expected):
            return False
    return True


def _range(equation: Equation, axis: int) -> slice:
    params = equation.params
    step = params["strides"][axis] if params["strides"] else 1
    return slice(params["start_indices"][axis], params["limit_indices"][axis], step)


def _same_windows(before: Equation, after: Equation, kept: Kept, old: Trace) -> bool:
    value = before.inputs[0]
    assert value is not None
    sizes = zip(
        before.params["slice_sizes"],
        after.params["slice_sizes"],
        old.shapes[value],
        kept.shape(value),
        strict=True,
    )
    # A window that covered the axis still does; any other has the same size.
    return all(b == a if a != size else b == left for a, b, size, left in sizes)


def _same_groups(before: Equation, after: Equation, kept: Kept, old: Trace) -> bool:
    groups = before.params["feature_group_count"]
    dims = before.params["dimension_numbers"]
    images, kernel = before.inputs
    assert images is not None and kernel is not None
    depthwise = groups > 1 and old.shapes[kernel][dims.rhs_spec[1]] == 1
    if depthwise and old.shapes[images][dims.lhs_spec[1]] == groups:
        groups = kept.shape(images)[dims.lhs_spec[1]]
    return after.params["feature_group_count"] == groups


_POSITIONS: dict[str, Callable[[Equation, Equation, Kept, Trace], bool]] = {
    "slice": _same_slice,
    "dynamic_slice": _same_windows,
    "gather": _same_windows,
    "conv_general_dilated": _same_groups,
}


def lines_of(traced: Trace) -> dict[str, list[Equation]]:
    """Returns the equations that come from each line of the user's code."""
    found: dict[str, list[Equation]] = collections.defaultdict(list)
    for equation in traced.equations:
        line = source_line(equation.source)
        if line:
            found[line].append(equation)
    return found
