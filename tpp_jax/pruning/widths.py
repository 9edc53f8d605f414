"""How many channels the groups of a model have when they are tried."""

import collections
from collections.abc import Iterator

from tpp_jax.graph.records import Groups


def kinds_of(groups: Groups, lines: dict[int, set[tuple[str, int]]]) -> list[list[int]]:
    """Puts groups together that rest on the same lines of code, the coarser first."""
    kinds: dict[object, list[int]] = {}
    for i, group in enumerate(groups):
        if group.reason is None and group.size > 1:
            key = frozenset(lines.get(i, ())), group.inner, group.size
            kinds.setdefault(key, []).append(i)
    return sorted(kinds.values(), key=lambda kind: groups[kind[0]].inner)


def trial_sizes(groups: Groups, kinds: list[list[int]]) -> dict[int, int]:
    """Chooses about half of the channels of each group.

    Each kind loses another number, so that two that are wrong do not make up for each
    other, and none is left with a number that is a size of something else in the model,
    where there are numbers enough.
    """
    sizes = {n for shape in groups.traced.shapes for n in shape}
    taken: set[int] = set()
    times: dict[int, collections.Counter[int]] = {}
    fewer = {}
    for kind in kinds:
        size = groups[kind[0]].size
        own = times.setdefault(size, collections.Counter())
        near = [n for off in range(max(size // 3, 1)) for n in _beside(size, off)]
        others = [n for n in near if n not in taken]
        n = next((n for n in others if n not in sizes), None)
        n = n or next(iter(others), None) or _least_used(size, own)
        taken.add(n)
        own[n] += 1
        fewer |= dict.fromkeys(kind, n)
    return fewer


def _beside(size: int, off: int) -> Iterator[int]:
    """Yields the numbers of channels that are off from half of them by some."""
    half = size // 2
    yield from (n for n in (half - off, half + off)[: 1 + (off > 0)] if 0 < n < size)


def _least_used(size: int, times: collections.Counter[int]) -> int:
    """Returns a smaller number, near half of it; one only if there is no other."""
    numbers = range(2, size) if size > 2 else range(1, 2)
    return min(numbers, key=lambda n: (times[n], abs(n - size // 2)))


def other_size(size: int, first: int) -> int:
    """Returns a round number of channels, for models that insist on one."""
    return max(size // 2 if first != size // 2 else size // 4, 1)
