"""Sizes of the axes of a computation, from the numbers of channels that groups keep."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tpp_jax.graph.labels import Channels
from tpp_jax.graph.records import Groups

Runs = Sequence[tuple[int, Sequence[int]]]
"""An axis: pairs of a number of positions and the indices of the groups that they
belong to."""

Product = tuple[int, list[int]]
"""A factor, and the numbers of the axes whose sizes multiply it."""


class Axes:
    """Axes of a model's arrays, expressed by the groups whose channels run along them.

    Sizes follow from the counts of kept channels without another trace.

    Attributes:
      runs: Axes that were asked for so far, by number.
    """

    def __init__(self, groups: Groups) -> None:
        """Prepares the axes.

        Args:
          groups: All groups of the model.
        """
        self._groups = groups
        self._labels = groups.reading.axes
        self._channels = groups.reading.solution
        self._group_of = _groups_of_channels(groups, self._labels, self._channels)
        self._known: dict[bytes, int] = {}
        self.runs: list[Runs] = []

    def product(self, factor: int, axes: Sequence[tuple[int, int]]) -> Product:
        """Returns a product of sizes.

        Args:
          factor: Factor.
          axes: Pairs of a value of the trace and the index of one of its axes.
        """
        along = []
        for value, axis in axes:
            labels = self._labels[value][axis]
            if (labels >= 0).any():
                along.append(self._number(labels))
            else:
                factor *= len(labels)
        return factor, along

    def sizes(self, kept: Mapping[str, int]) -> list[int]:
        """Returns the number of kept positions of each axis.

        Args:
          kept: Group name → number of kept channels; other groups are not pruned.
        """
        counts = [(kept.get(g.name, g.size), g.size) for g in self._groups]
        return sizes_of(self.runs, counts)

    def _number(self, labels: np.ndarray) -> int:
        key = labels.tobytes()
        if key not in self._known:
            positions, channels = self._channels.of(labels)
            through, column = np.unique(self._group_of[channels], return_inverse=True)
            met = np.zeros((len(labels), len(through)), bool)
            met[positions, column] = True
            rows, numbers = np.unique(met[:, through >= 0], axis=0, return_counts=True)
            through = through[through >= 0]
            self._known[key] = len(self.runs)
            self.runs.append(
                [
                    (int(n), through[row].tolist())
                    for row, n in zip(rows, numbers, strict=True)
                ]
            )
        return self._known[key]


def sizes_of(axes: Sequence[Runs], counts: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the number of kept positions of each axis.

    Args:
      axes: Axes.
      counts: Number of kept channels of each group, and number of all its channels.
    """
    sizes = []
    for runs in axes:
        size = 0
        for positions, through in runs:
            # Positions that several groups run through are all combinations of
            # their channels, so the kept shares multiply.
            for group in through:
                positions = positions * counts[group][0] // counts[group][1]
            size += positions
        sizes.append(size)
    return sizes


def values(products: Sequence[Product], sizes: Sequence[int]) -> list[int]:
    """Returns products of a factor and of the sizes of axes."""
    return [
        factor * math.prod(sizes[axis] for axis in along) for factor, along in products
    ]


def _groups_of_channels(
    groups: Groups, axes: Mapping[int | None, list[np.ndarray]], solution: Channels
) -> np.ndarray:
    """Returns int ``[channels]``: the group that each channel is in, -1 for none."""
    index = {group.name: i for i, group in enumerate(groups)}
    group_of = np.full(len(solution.stuck), -1)
    draws = np.random.default_rng(0)
    # Several channels of the trace may be one channel of a group, so that all members
    # are needed.
    for leaf, runs_through in groups.members.items():
        for axis, labels in enumerate(axes[groups.traced.leaves[leaf]]):
            here = [pair for pair in runs_through if pair[1].axis == axis]
            if not here:
                continue
            positions, channels = solution.of(labels)
            # A sum of marks, random 64-bit numbers, identifies the positions of a
            # channel.
            marks = draws.integers(2**63, size=len(labels), dtype=np.uint64)
            channels, column = np.unique(channels, return_inverse=True)
            sums = np.zeros(len(channels), np.uint64)
            np.add.at(sums, column, marks[positions])
            for group, member in here:
                own = np.isin(sums, marks[member.positions].sum(axis=1))
                group_of[channels[own]] = index[group.name]
    return group_of
