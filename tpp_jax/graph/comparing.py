"""Whether a cut model computes what its groups say, read off a second trace.

The labels of the first trace say of every axis of every array which positions stay
when channels go. The model, traced again with the narrower arrays, must do the same
operations in the same order, on arrays of just these shapes, and wherever an operation
picks positions by number, on just these positions.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import numpy as np

from tpp_jax.graph.fields import Parts
from tpp_jax.graph.labels import Channels, Labels
from tpp_jax.graph.tracing import Equation, Trace, source_line, source_lines


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """The labels that groups were read off.

    Attributes:
      labels: what was collected.
      axes: value number → the labels of each of its axes.
      solution: the labels expressed in channels.
      channels: for each group the channel of the solution that each of its own is.
    """

    labels: Labels
    axes: dict[int | None, list[np.ndarray]]
    solution: Channels
    channels: tuple[np.ndarray, ...]

    @functools.cached_property
    def group_of(self) -> np.ndarray:
        """int64 ``[components]``: the group that each channel is of, or -1."""
        found = np.full(len(self.solution.stuck), -1)
        for i, channels in enumerate(self.channels):
            found[channels] = i
        return found

    @functools.cached_property
    def noisy(self) -> frozenset[int]:
        """The groups whose channels random numbers are drawn for."""
        channels = [self.solution.of(axis)[1] for axis in self.labels.noise]
        groups = np.concatenate([self.group_of[one] for one in channels] or [[]])
        return frozenset(int(i) for i in groups if i >= 0)

    @functools.cached_property
    def distinct(self) -> tuple[dict[int, list[int]], list[np.ndarray], np.ndarray]:
        """Value number → numbers of its axes' labels; these labels; where each ends."""
        numbers: dict[int, int] = {}
        arrays: list[np.ndarray] = []
        of: dict[int, list[int]] = {}
        for value, axes in self.axes.items():
            if value is None:
                continue
            own = []
            for labels in axes:
                number = numbers.setdefault(id(labels), len(arrays))
                if number == len(arrays):
                    arrays.append(labels)
                own.append(number)
            of[value] = own
        ends = np.cumsum([len(labels) for labels in arrays], dtype=np.int64)
        return of, arrays, ends

    @functools.cached_property
    def _flat(self) -> np.ndarray:
        _, arrays, _ = self.distinct
        return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)

    def stays(self, masks: Sequence[np.ndarray | None]) -> "Stays":
        """Returns what is left of every axis.

        Args:
          masks: for each group, bool ``[size]``, True for the channels that stay, or
            None for a group that keeps all.
        """
        solution = self.solution
        keep = np.ones(len(solution.stuck), bool)
        for channels, mask in zip(self.channels, masks, strict=True):
            if mask is not None:
                keep[channels] = mask
        defined = np.flatnonzero(solution.defined)
        parts = solution.parts[defined]
        while defined.size:  # a position stays if all that define it do
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
        return Stays(of, kept, starts, ends, counts)

    def groups_along(self, value: int, axis: int) -> set[int]:
        """Returns the indices of the groups that run along an axis of a value."""
        _, channels = self.solution.of(self.axes[value][axis])
        return set(np.unique(self.group_of[channels]).tolist()) - {-1}

    @functools.cached_property
    def sizes(self) -> list[tuple[int, frozenset[int], np.ndarray, np.ndarray]]:
        """Of every axis that groups run along: its size, the groups, and where.

        The last two are positions and the group of a channel at each, or -1.
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
          groups: their indices.
          names: the names of all groups.

        Returns:
          Size of an axis → in which ways axes of this size follow the channels.
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
    size: int, positions: np.ndarray, group_of: np.ndarray, names: Sequence[str]
) -> Parts:
    """Returns how the size of an axis follows the channels that run along it.

    Args:
      size: of the axis.
      positions: with ``group_of``, the group of a channel at a position, or -1.
      group_of: see ``positions``.
      names: of the groups.
    """
    through, column = np.unique(group_of, return_inverse=True)
    met = np.zeros((size, len(through)), bool)
    met[positions, column] = True
    kinds, numbers = np.unique(met[:, through >= 0], axis=0, return_counts=True)
    through = through[through >= 0]
    return tuple(
        (int(n), tuple(names[i] for i in through[kind]))
        for kind, n in zip(kinds, numbers, strict=True)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Stays:
    """What is left of every axis of every value."""

    of: dict[int, list[int]]
    kept: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    counts: list[int]

    def shape(self, value: int) -> tuple[int, ...]:
        """Returns the shape that a value has after the cut."""
        return tuple([self.counts[i] for i in self.of[value]])

    def widths(self, reading: Reading) -> Iterable[tuple[np.ndarray, int]]:
        """Returns the labels of every distinct axis, and its size after the cut."""
        _, arrays, _ = reading.distinct
        return zip(arrays, self.counts, strict=True)

    def mask(self, value: int, axis: int) -> np.ndarray:
        """Returns bool ``[n]``, True for the positions of an axis that stay."""
        i = self.of[value][axis]
        return self.kept[self.starts[i] : self.ends[i]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where a cut model departs from what its groups say.

    Attributes:
      text: what is different, to be read by the user.
      groups: indices of the groups that the place speaks of; none if that is unclear.
      old_size: whether an operation keeps the old size of an axis, which leaves no
        doubt that the groups along it are at fault.
      line: of the user's code, ``model.py:31``, if known.
      lines: that line and those it was called from, the innermost first.
      order: whether other operations are done, or in another order.
    """

    text: str
    groups: frozenset[int] = frozenset()
    old_size: bool = False
    line: str = ""
    lines: tuple[str, ...] = ()
    order: bool = False


def difference(
    old: Trace, new: Trace, reading: Reading, stays: Stays
) -> Difference | None:
    """Compares the trace of a cut model with what the labels of the whole one say.

    Args:
      old: the trace of the whole model.
      new: that of the cut one.
      reading: the labels of the whole one.
      stays: what is to be left of them.

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
            return Difference(_other_way(before, after), here, lines=lines, order=True)
        for value in before.outputs:
            expected, found = stays.shape(value), new.shapes[value]
            if expected != found:
                return _other_shape(old, before, reading, value, expected, found)
        if not _same_settings(before, after, stays, old):
            return Difference(
                f"'{before.primitive}' has other settings{_at(after)}",
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


def _groups_through(eqn: Equation, old: Trace, reading: Reading) -> frozenset[int]:
    """Returns the groups that run along the operands of an operation."""
    return frozenset(
        i
        for value in eqn.inputs
        if value is not None
        for axis in range(len(old.shapes[value]))
        for i in reading.groups_along(value, axis)
    )


def _other_way(before: Equation, after: Equation) -> str:
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


# Settings that are sizes: those of results are compared as shapes, those that pick
# positions by the rules below.
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


def _same_settings(before: Equation, after: Equation, stays: Stays, old: Trace) -> bool:
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
    return compare is None or compare(before, after, stays, old)


def _is_plain(setting: Any) -> bool:
    """Reports whether a setting is made of numbers and names, to be compared."""
    if isinstance(setting, tuple):
        return all(map(_is_plain, setting))
    return setting is None or isinstance(setting, (bool, int, float, str))


def _same_slice(before: Equation, after: Equation, stays: Stays, old: Trace) -> bool:
    [value] = before.inputs
    assert value is not None
    for axis, n in enumerate(old.shapes[value]):
        keep = stays.mask(value, axis)
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


def _same_windows(before: Equation, after: Equation, stays: Stays, old: Trace) -> bool:
    value = before.inputs[0]
    assert value is not None
    sizes = zip(
        before.params["slice_sizes"],
        after.params["slice_sizes"],
        old.shapes[value],
        stays.shape(value),
        strict=True,
    )
    # A window is as wide as it was, or as wide as the axis, if it was that before.
    return all(b == a if a != whole else b == left for a, b, whole, left in sizes)


def _same_groups(before: Equation, after: Equation, stays: Stays, old: Trace) -> bool:
    groups = before.params["feature_group_count"]
    dims = before.params["dimension_numbers"]
    images, kernel = before.inputs
    assert images is not None and kernel is not None
    depthwise = groups > 1 and old.shapes[kernel][dims.rhs_spec[1]] == 1
    if depthwise and old.shapes[images][dims.lhs_spec[1]] == groups:
        groups = stays.shape(images)[dims.lhs_spec[1]]
    return after.params["feature_group_count"] == groups


_POSITIONS: dict[str, Callable[[Equation, Equation, Stays, Trace], bool]] = {
    "slice": _same_slice,
    "dynamic_slice": _same_windows,
    "gather": _same_windows,
    "conv_general_dilated": _same_groups,
}


def lines_of(traced: Trace) -> dict[str, list[Equation]]:
    """Returns line of the user's code → the equations that come from it."""
    found: dict[str, list[Equation]] = collections.defaultdict(list)
    for equation in traced.equations:
        line = source_line(equation.source)
        if line:
            found[line].append(equation)
    return found
