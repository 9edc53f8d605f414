"""How many channels each group loses, so that the sum of measured costs is least.

Each group has *levels*: the numbers of channels that it may lose, and what each costs.
Channels of several groups share layers, so what a level saves depends on the levels of
the others, and the exact optimum would need all combinations. Two greedy searches prune
by the lowest cost for what is saved, then put back what there is room for; the better
result is within some percent of the optimum for groups of a few channels, and nearer
for wider ones.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Curve = Float[np.ndarray, " levels"]
Shares = Float[np.ndarray, " targets"]


class Problem(NamedTuple):
    """Curves of costs, and a target.

    Attributes:
      removed: Number of channels that each level of each group removes, ascending from
        0.
      curves: Cost of each level of each group; that of level 0 is 0.
      shares: Function of the level of each group that returns what remains of the
        model, in each of the measures that have a target.
      wanted: Largest share of each measure.
    """

    removed: Sequence[Int[np.ndarray, " levels"]]
    curves: Sequence[Curve]
    shares: Callable[[Sequence[int]], Shares]
    wanted: Shares


class _Step(NamedTuple):
    """A change of one group's level, and what it costs for what it saves."""

    price: float
    level: int


def cheapest_levels(problem: Problem) -> list[int]:
    """Returns the level of each group.

    Args:
      problem: Curves and a target that the last levels meet.
    """
    found = [_put_back(problem, _prune(problem, clip)) for clip in (False, True)]
    return min(found, key=lambda levels: _cost(problem, levels))


def _cost(problem: Problem, levels: Sequence[int]) -> float:
    return sum(
        curve[level] for curve, level in zip(problem.curves, levels, strict=True)
    )


def _prune(problem: Problem, clip: bool) -> list[int]:
    """Raises levels until the target is met, by the lowest cost for what is saved.

    A step leads to the next corner of the curve's convex hull, or to the first level
    that meets the target.

    Args:
      problem: Curves and a target.
      clip: Whether savings beyond the target count for nothing.
    """
    levels = [0] * len(problem.curves)
    hulls = list(map(_hull, problem.removed, problem.curves))

    def excess(levels: Sequence[int]) -> Shares:
        return np.maximum(problem.shares(levels) - problem.wanted, 0)

    def best(group: int) -> _Step | None:
        before, curve = excess(levels), problem.curves[group]
        start, last = levels[group], len(problem.curves[group]) - 1
        if not before.any() or start == last:
            return None
        ends = [next(corner for corner in hulls[group] if corner > start)]
        if not excess(_with(levels, group, last)).any():
            ends.append(
                _first(
                    lambda n: not excess(_with(levels, group, n)).any(), start + 1, last
                )
            )
        steps = []
        for level in ends:
            after = _with(levels, group, level)
            if clip:
                saved = (before - excess(after)).sum()
            else:
                change = problem.shares(levels) - problem.shares(after)
                saved = change[before > 0].sum()
            # A step that saves nothing now may be needed: one of two branches.
            cost = curve[level] - curve[start]
            steps.append(_Step(cost / saved if saved > 0 else math.inf, level))
        return min(steps)

    _greedy(levels, best)
    return levels


def _put_back(problem: Problem, levels: list[int]) -> list[int]:
    """Lowers levels as far as the target allows, by the highest cost for the room."""
    levels = list(levels)

    def fits(levels: Sequence[int]) -> bool:
        return bool((problem.shares(levels) <= problem.wanted).all())

    def best(group: int) -> _Step | None:
        start, curve = levels[group], problem.curves[group]
        if start == 0 or not fits(_with(levels, group, start - 1)):
            return None
        lowest = _first(lambda n: fits(_with(levels, group, n)), 0, start - 1)
        ends = np.arange(lowest, start)
        removed = problem.removed[group]
        gains = (curve[start] - curve[ends]) / (removed[start] - removed[ends])
        level = int(ends[np.argmax(gains)])
        change = problem.shares(_with(levels, group, level)) - problem.shares(levels)
        room = max(change.sum(), 1e-12)
        return _Step((curve[level] - curve[start]) / room, level)

    _greedy(levels, best)
    return levels


def _greedy(levels: list[int], best: Callable[[int], _Step | None]) -> None:
    """Takes steps while there are any, the lowest price first.

    A price rises when other steps are taken, so that only those at the top of the queue
    are found again.
    """
    queue = [(-math.inf, group) for group in range(len(levels))]
    while queue:
        _, group = heapq.heappop(queue)
        step = best(group)
        if step is None:
            continue
        if queue and step.price > queue[0][0]:
            heapq.heappush(queue, (step.price, group))
            continue
        levels[group] = step.level
        heapq.heappush(queue, (-math.inf, group))


def _with(levels: Sequence[int], group: int, level: int) -> list[int]:
    return [*levels[:group], level, *levels[group + 1 :]]


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Returns the first number that a condition holds for, from ``low`` to ``high``.

    It holds for ``high`` and, if for a number, for all above it.
    """
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _hull(x: Int[np.ndarray, " levels"], y: Curve) -> list[int]:
    """Returns the indices of the corners of a curve's lower convex hull."""
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return corners
