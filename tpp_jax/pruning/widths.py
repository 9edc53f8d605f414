"""The numbers of channels with which the groups of a model are tried."""

import collections
from collections.abc import Iterator

from tpp_jax.graph.records import Groups


def families_of(
    groups: Groups, lines: dict[int, set[tuple[str, int]]]
) -> list[list[int]]:
    """Lists families of groups: those that depend on the same lines of code.

    They are the groups of layers that are repeated, as in the blocks of a transformer.

    Args:
      groups: Groups of the model.
      lines: Index of a group → lines of code with sizes that are supposed to follow
        it, and the index of each size in its operation.

    Returns:
      Indices of the groups of each family; inner groups come last.
    """
    families: dict[object, list[int]] = {}
    for i, group in enumerate(groups):
        if group.reason is None and group.size > 1:
            key = frozenset(lines.get(i, ())), group.inner, group.size
            families.setdefault(key, []).append(i)
    return sorted(families.values(), key=lambda family: groups[family[0]].inner)


def trial_sizes(groups: Groups, families: list[list[int]]) -> dict[int, int]:
    """Chooses a number of channels near half for each group.

    If there are enough numbers, each family gets a different one, so that two wrong
    families do not compensate for each other, and no number is the size of another axis
    in the model.
    """
    sizes = {n for shape in groups.traced.shapes for n in shape}
    taken: set[int] = set()
    times: dict[int, collections.Counter[int]] = {}
    fewer = {}
    for family in families:
        size = groups[family[0]].size
        own = times.setdefault(size, collections.Counter())
        near = [n for off in range(max(size // 3, 1)) for n in _near_half(size, off)]
        others = [n for n in near if n not in taken]
        n = next((n for n in others if n not in sizes), None)
        n = n or next(iter(others), None) or _least_used(size, own)
        taken.add(n)
        own[n] += 1
        fewer |= dict.fromkeys(family, n)
    return fewer


def _near_half(size: int, off: int) -> Iterator[int]:
    """Yields the numbers of channels that differ by ``off`` from half of them."""
    half = size // 2
    yield from (n for n in (half - off, half + off)[: 1 + (off > 0)] if 0 < n < size)


def _least_used(size: int, times: collections.Counter[int]) -> int:
    """Returns a smaller number near half; one only if there is no other."""
    numbers = range(2, size) if size > 2 else range(1, 2)
    return min(numbers, key=lambda n: (times[n], abs(n - size // 2)))


def other_size(size: int, first: int) -> int:
    """Returns a round number of channels, for models that require one."""
    return max(size // 2 if first != size // 2 else size // 4, 1)
