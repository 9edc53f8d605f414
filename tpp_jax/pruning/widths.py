"""The numbers of channels with which the groups of a model are tried."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Set

from tpp_jax.graph.records import Group, Groups

# Groups of a family that follow each other more closely lose different numbers.
_NEAR = 8
# Ways to divide a row of groups in two that are tried.
_ENDS = 5


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
            key = frozenset(lines.get(i, ())), group.inner, group.size, group.chosen
            families.setdefault(key, []).append(i)
    return sorted(families.values(), key=lambda family: groups[family[0]].inner)


def trial_sizes(groups: Groups, families: list[list[int]]) -> dict[int, int]:
    """Chooses a number of channels near half for each group.

    Groups of equal size get different numbers, so that two of them that the model can
    only cut together do not go unnoticed. If there are not enough numbers, families
    share none if possible; see :func:`apart`.

    As far as possible, no number is the size of another axis in the model, and no two
    groups of different sizes lose the same share of their channels.
    """
    sizes = {n for shape in groups.traced.shapes for n in shape}
    alike: dict[tuple[int, int], list[list[int]]] = {}
    for family in families:
        first = groups[family[0]]
        alike.setdefault((first.size, first.chosen), []).append(family)
    taken: set[int] = set()
    shares: set[float] = set()
    fewer: dict[int, int] = {}
    for (size, chosen), members in alike.items():
        near = _near_half(size, sum(map(len, members)), chosen)
        near.sort(key=lambda n: (n in sizes, n in taken, n / size in shares))
        for family, numbers in zip(members, _dealt(near, members), strict=True):
            fewer |= dict(zip(sorted(family), itertools.cycle(numbers), strict=False))
            taken.update(numbers)
            shares.update(n / size for n in numbers)
    return fewer


def _near_half(size: int, count: int, least: int) -> list[int]:
    """Returns at least ``count`` numbers of channels, if there are, the nearest first.

    One is among them only if there is no other: along an axis of size one, JAX
    broadcasts. None is smaller than ``least``, which is smaller than the size.
    """
    half = max(size // 2, least)
    low, high = max(half - count - 2, min(2, half)), min(half + count + 2, size - 1)
    near = range(max(low, least), high + 1)
    return sorted(near, key=lambda n: abs(n - half)) or [max(least, 1)]


def _dealt(numbers: list[int], families: list[list[int]]) -> list[list[int]]:
    """Deals numbers out to families, as many as each has groups if there are enough.

    If there are fewer numbers than families, some families get the same.
    """
    dealt: list[list[int]] = [[] for _ in families]
    open_ = list(range(len(families)))
    for number in numbers:
        if not open_:
            break
        i = min(open_, key=lambda i: len(dealt[i]))
        dealt[i].append(number)
        if len(dealt[i]) == len(families[i]):
            open_.remove(i)
    short = (i for i, own in enumerate(dealt) if not own)
    for i, number in zip(short, itertools.cycle(numbers), strict=False):
        dealt[i].append(number)
    return dealt


def other_size(group: Group, tried: set[int]) -> int:
    """Returns a round number of channels, for models that require one.

    Args:
      group: Group of channels.
      tried: Numbers that were tried before.
    """
    size = group.size
    return max(size // 4 if tried == {size // 2} else size // 2, group.chosen, 1)


def apart(
    groups: Groups,
    chosen: Set[int],
    fewer: Mapping[int, int],
    family_of: Mapping[int, int],
) -> Iterator[set[int]]:
    """Yields choices of groups that separate those with equal trial sizes.

    Of two such groups, there is a choice with only one if they are of different
    families or follow each other in one family that has few different numbers. Others
    of one family, which belong to repeated parts of a model, are left together: with
    few channels in many groups, it would take many trials to separate all.

    Args:
      groups: Groups of the model.
      chosen: Indices of the groups to be separated.
      fewer: Index of a group → number of its channels in a trial.
      family_of: Index of a group → index of its family.
    """
    alike: dict[tuple[int, int], dict[int, list[int]]] = {}
    for i in sorted(chosen):
        families = alike.setdefault((groups[i].size, fewer[i]), {})
        families.setdefault(family_of[i], []).append(i)
    numbers: dict[int, set[int]] = {}
    for i in chosen:
        numbers.setdefault(family_of[i], set()).add(fewer[i])
    code = {
        i: 2 * number + place % 2 * (len(numbers[family_of[i]]) < _NEAR)
        for families in alike.values()
        for number, own in enumerate(families.values())
        for place, i in enumerate(own)
    }
    alone = {i for each in alike.values() for i in _only(each)}
    for bit in range(max(code.values(), default=0).bit_length()):
        some = {i for i in code if code[i] >> bit & 1}
        if some:
            yield some | alone


def _only(families: dict[int, list[int]]) -> list[int]:
    found = [i for own in families.values() for i in own]
    return found if len(found) == 1 else []


def separated(
    members: list[int], holds: Callable[[list[int]], bool]
) -> Iterator[list[int]]:
    """Yields the smallest parts of some groups that hold without each other.

    Groups that hold only together are most often next to each other.

    Args:
      members: Indices of groups that hold together, in order of execution.
      holds: Function that reports whether some of them hold without the others.
    """
    ends = sorted(range(1, len(members)), key=lambda n: abs(2 * n - len(members)))
    for end in ends[:_ENDS]:
        parts = members[:end], members[end:]
        if all(map(holds, parts)):
            for part in parts:
                yield from separated(part, holds)
            return
    yield members
