"""Which groups of a model it lets go, and what refuses to.

The model is tried with fewer channels of all groups. Where that fails, the groups at
fault are found with few more traces, by the line of code that fails.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from tpp_jax.graph.comparing import Difference
from tpp_jax.graph.fields import FieldSize
from tpp_jax.graph.records import Groups, Slot, Supposition
from tpp_jax.graph.tracing import source_line
from tpp_jax.pruning.attributes import Attributes, extended, settle
from tpp_jax.pruning.literals import OtherNumber
from tpp_jax.pruning.source import Source
from tpp_jax.pruning.trial import HAIKU, Trial
from tpp_jax.pruning.widths import kinds_of, other_size, trial_sizes

# Attempts to join two kinds of groups that the model refuses one by one.
_PAIRS = 12
# Searches for kinds that only hold together since they lose as many channels.
_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of the groups of a model.

    Attributes:
      wrong: index of a group → why it cannot be pruned.
      joined: pairs of axes that can be pruned, but only together; then the groups have
        to be read and tried again.
      sizes: attributes that have to follow the channels.
      scaled: indices of groups whose number of channels enters the model's values, as
        that of a mean does.
    """

    wrong: dict[int, str]
    joined: tuple[tuple[Slot, Slot], ...] = ()
    sizes: tuple[FieldSize, ...] = ()
    scaled: frozenset[int] = frozenset()


def try_groups(
    source: Source, groups: Groups, suppositions: Sequence[Supposition]
) -> Verdict:
    """Tries all groups that may be prunable.

    Args:
      source: the model.
      groups: what was read off its trace.
      suppositions: the sizes that operations are given, which helps to find faults.
    """
    return _Search(source, groups, suppositions).verdict()


class _Attempt(NamedTuple):
    """What came of a trial: see :class:`Trial`."""

    fault: Difference | None
    numbers: list[OtherNumber]
    suspects: frozenset[int] | None


class _Search:
    """Finds the groups of a model that cannot lose channels.

    Attributes:
      fewer: index of a group → how many channels it has in a trial.
      rest: the groups that are tried; in the end, those that hold together.
      wrong: index of a group → why it does not hold.
      sizes: attributes that follow the channels.
    """

    def __init__(
        self, source: Source, groups: Groups, suppositions: Sequence[Supposition]
    ) -> None:
        self.source = source
        self.groups = groups
        self.trial = Trial(source, groups)
        self.supposed: dict[int, dict[str, None]] = collections.defaultdict(dict)
        lines: dict[int, set[tuple[str, int]]] = collections.defaultdict(set)
        for one in suppositions:
            line = source_line(one.source)
            lines[one.group].add((line, one.part))
            self.supposed[one.group][line] = None
        self.kinds = kinds_of(groups, lines)
        self.kind_of = {i: n for n, kind in enumerate(self.kinds) for i in kind}
        self.fewer = trial_sizes(groups, self.kinds)
        self.rest = set(self.fewer)
        self.wrong: dict[int, str] = {}
        self.failed: list[list[int]] = []
        self.sizes: tuple[FieldSize, ...] = ()
        self.attributes = Attributes(source, groups)
        self.known: dict[Any, _Attempt] = {}

    def verdict(self) -> Verdict:
        if not self.rest:
            return Verdict({})
        self._search(self.rest)
        for _ in range(_ROUNDS):  # kinds that make up for each other, found one by one
            together = self._made_up()
            if together is None:
                break
            self._search(self.rest, together)
        else:
            doubt = Difference("with other numbers of channels it does not hold")
            self._refuse(self._made_up() or (), doubt)
            self.rest.difference_update(self.wrong)
        joined = self._only_together()
        if joined:
            return Verdict({}, joined)
        self._drop_idle_fields()
        scaled = self._with_other_numbers()
        return Verdict(self.wrong, (), self.sizes, frozenset(scaled))

    def _search(self, chosen: Set[int], suspects: Set[int] = frozenset()) -> None:
        """Parts groups into those that hold together and those that do not.

        Args:
          chosen: the groups; ``rest`` becomes those of them that hold.
          suspects: groups among them that are to be tried kind by kind in any case.
        """
        self.rest, suspects = set(chosen) - suspects, set(suspects)
        fault = self.attempt(self.rest) if self.rest else None
        while fault is not None:
            blamed = self._kinds_of(fault.groups & self.rest) or self._culprit()
            helped, fault = self._with_fields(blamed, fault)
            if not helped:
                self.rest -= blamed
                suspects |= blamed
                fault = self.attempt(self.rest) if self.rest else None
        for kind in self.kinds:
            members = [i for i in kind if i in suspects]
            if members:
                self._admit(members)

    def _made_up(self) -> set[int] | None:
        """Returns kinds that hold together and not apart, None if there are none."""
        for some in self._apart(self.rest):
            fault = self.attempt(some)
            if fault is not None:
                blamed = self._kinds_of(fault.groups & some)
                return blamed or self._kinds_of(some - self._alone(some))
        return None

    def _alone(self, chosen: set[int]) -> set[int]:
        """Returns groups of which no other kind loses as many channels."""
        numbers = collections.Counter(
            (self.groups[kind[0]].size, self.fewer[kind[0]]) for kind in self.kinds
        )
        return {i for i in chosen if numbers[self.groups[i].size, self.fewer[i]] == 1}

    def attempt(
        self,
        chosen: Iterable[int],
        sizes: tuple[FieldSize, ...] | None = None,
        values: bool = False,
    ) -> Difference | None:
        """Returns what goes wrong with fewer channels of the chosen groups.

        Args:
          chosen: indices of the groups.
          sizes: attributes that follow; those found so far if not given.
          values: whether the numbers that enter the computation must be the same. (They
            are not where a mean is taken over the channels.)
        """
        attempt = self._attempt(chosen, self.sizes if sizes is None else sizes)
        if attempt.fault is None and values and attempt.numbers:
            return attempt.numbers[0].difference()
        return attempt.fault

    def _attempt(
        self, chosen: Iterable[int], sizes: tuple[FieldSize, ...]
    ) -> "_Attempt":
        kept = {i: self.fewer[i] for i in sorted(chosen)}
        key = tuple(kept.items()), sizes
        if key not in self.known:
            self.trial.groups = self.groups.replace(sizes=sizes)
            fault = self.trial.of({i: np.arange(n) for i, n in kept.items()})
            numbers, suspects = self.trial.numbers, self.trial.suspects
            self.known[key] = _Attempt(fault, numbers, suspects)
        return self.known[key]

    def _apart(self, chosen: set[int]) -> Iterator[set[int]]:
        """Yields choices that tell kinds apart which lose as many channels."""
        alike: dict[tuple[int, int], list[int]] = {}
        for i in sorted(chosen):
            kinds = alike.setdefault((self.groups[i].size, self.fewer[i]), [])
            if self.kind_of[i] not in kinds:
                kinds.append(self.kind_of[i])
        place = {kind: n for kinds in alike.values() for n, kind in enumerate(kinds)}
        most = max(map(len, alike.values()), default=1)
        for bit in range((most - 1).bit_length()):
            yield {
                i
                for i in chosen
                if len(alike[self.groups[i].size, self.fewer[i]]) == 1
                or place[self.kind_of[i]] >> bit & 1
            }

    def _kinds_of(self, groups: Set[int]) -> set[int]:
        """Returns some groups and all others of their kinds that are tried."""
        kinds = {self.kind_of[i] for i in groups}
        return {i for kind in kinds for i in self.kinds[kind]} & self.rest

    def _culprit(self) -> set[int]:
        """Returns a kind of groups that fails after those before it do not."""
        kinds = [{i for i in kind if i in self.rest} for kind in self.kinds]
        kinds = [kind for kind in kinds if kind]
        low, high = 0, len(kinds)
        while high - low > 1:
            middle = (low + high) // 2
            if self.attempt(set().union(*kinds[:middle])):
                high = middle
            else:
                low = middle
        return kinds[high - 1]

    def _admit(self, members: list[int]) -> None:
        """Takes groups of one kind back if the model holds with them."""
        fault = self.attempt(self.rest.union(members))
        if fault is None:
            self.rest.update(members)
            return
        if self._admit_with_fields(members, fault):
            return
        if not fault.old_size and self._admit_with_other_sizes(members):
            return
        if len(members) > 1:
            # If neither the first nor the last holds, most likely none does: a size of
            # heads that is written into every block of a transformer.
            ends = [self.attempt(self.rest | {i}) for i in (members[0], members[-1])]
            if not all(ends):
                middle = len(members) // 2
                self._admit(members[:middle])
                self._admit(members[middle:])
                return
        self.failed.append(members)
        self._refuse(members, fault)

    def _admit_with_other_sizes(self, members: list[int]) -> bool:
        before = {i: self.fewer[i] for i in members}
        self.fewer |= {
            i: other_size(self.groups[i].size, self.fewer[i]) for i in members
        }
        if self.fewer != self.fewer | before and not self.attempt(
            self.rest.union(members)
        ):
            self.rest.update(members)
            return True
        self.fewer |= before
        return False

    def _refuse(self, members: Iterable[int], fault: Difference) -> None:
        for i in members:
            self.wrong[i] = self._explain(i, fault)

    def _explain(self, i: int, fault: Difference) -> str:
        if fault.text.startswith(HAIKU):
            return fault.text
        lines = [fault.line, *self.supposed.get(i, ())]
        places = list(dict.fromkeys(line for line in lines if line))[:2]
        if not places and fault.text.endswith(")"):  # the text names the line
            return f"a size written into the model: {fault.text}"
        where = ", ".join(places) or "a library"
        return f"a size written into the model ({where}): {fault.text}"

    # Attributes that follow the channels.

    def _following(self) -> tuple[FieldSize, ...]:
        """Returns the attributes that follow a group of those that hold together.

        What others were to follow, which were given up since, may follow anything.
        """
        names = {self.groups[i].name for i in self.rest}
        return tuple(size for size in self.sizes if size.groups & names)

    def _with_fields(
        self, blamed: Set[int], fault: Difference
    ) -> tuple[bool, Difference | None]:
        """Tries to set attributes for the blamed groups.

        Returns:
          Whether that helps, and what goes wrong elsewhere then.
        """
        near, known = self.attributes.of(sorted(blamed)), self._following()
        for found in near.at(fault.lines, known):
            sizes = extended(known, found)
            after = self.attempt(self.rest, sizes)
            if after is None or not set(after.lines[:1]) <= set(fault.lines):
                self.sizes = sizes
                return True, after
        found = near.candidates(known)
        if not found:
            return False, fault
        sizes = extended(known, found)
        after = self.attempt(self.rest, sizes)
        if after is not None and (
            after.groups & blamed or not after.groups or after.line == fault.line
        ):
            return False, fault
        self.sizes = sizes
        return True, after

    def _admit_with_fields(self, members: list[int], fault: Difference) -> bool:
        sizes = self._settled(members, fault)
        if sizes is None:
            return False
        self.rest.update(members)
        self.sizes = sizes
        return True

    def _settled(
        self,
        members: list[int],
        fault: Difference,
        together: Mapping[str, str] | None = None,
    ) -> tuple[FieldSize, ...] | None:
        """Returns attributes with which the model holds, None if none are found.

        Args:
          members: indices of groups to be cut with those that hold.
          fault: what goes wrong so far.
          together: name of a group → that of the one that loses the same channels.
        """
        chosen = self.rest.union(members)
        return settle(
            self.attributes.of(members, together),
            lambda sizes: self.attempt(chosen, sizes),
            self._following(),
            fault,
        )

    def _drop_idle_fields(self) -> None:
        """Forgets attributes that the model holds without."""
        # Most likely it is the innermost module that computes with its own.
        sizes = sorted(self.sizes, key=lambda size: size.field.path.count("."))
        kinds = list(dict.fromkeys(size.field.declaration for size in sizes))
        self._drop_idle(kinds[:-1])
        self._drop_idle(kinds[-1:])

    def _drop_idle(self, kinds: list[tuple[str, str]]) -> None:
        """Forgets attributes of some kinds, found by halving."""
        if not kinds:
            return
        without = tuple(s for s in self.sizes if s.field.declaration not in kinds)
        if not self.attempt(self.rest, without):
            self.sizes = without
        elif len(kinds) > 1:
            self._drop_idle(kinds[: len(kinds) // 2])
            self._drop_idle(kinds[len(kinds) // 2 :])

    # Numbers of channels that enter the values.

    def _with_other_numbers(self) -> set[int]:
        """Finds groups whose cut changes a number that the model computes with.

        Where such a number is an attribute that was to follow the channels, the groups
        are refused. Where the code takes it from an array's shape, it is as with a
        mean: zeros in place of channels are not the same as their absence.

        Returns:
          The groups of the second kind.
        """
        whole = self._attempt(self.rest, self.sizes)
        suspects = whole.suspects if whole.fault is None else None
        if suspects is not None and not suspects:
            return set()
        plain = [
            [i for i in kind if i in self.rest and not self.groups[i].reduced]
            for kind in self.kinds
            if suspects is None or not suspects.isdisjoint(kind)
        ]
        follow = set().union(*(size.groups for size in self.sizes))
        follow = {i for i in self.rest if self.groups[i].name in follow}
        parts = (
            [kind for kind in plain if kind and follow.isdisjoint(kind)],
            [kind for kind in plain if not follow.isdisjoint(kind)],
        )
        scaled: set[int] = set()
        for members, fault in itertools.chain(*map(self._numbered, parts)):
            names = {self.groups[i].name for i in members}
            if any(names & size.groups for size in self.sizes):
                self._refuse(members, fault)
                self.rest.difference_update(members)
            else:
                scaled.update(members)
        gone = {self.groups[i].name for i in self.wrong}
        self.sizes = tuple(s for s in self.sizes if not s.groups <= gone)
        return scaled

    def _numbered(
        self, kinds: list[list[int]]
    ) -> Iterator[tuple[list[int], Difference]]:
        """Yields the kinds whose cut changes a number, found by halving."""
        fault = self.attempt(itertools.chain(*kinds), values=True) if kinds else None
        if fault is None:
            return
        if len(kinds) == 1:
            yield kinds[0], fault
            return
        middle = len(kinds) // 2
        yield from self._numbered(kinds[:middle])
        yield from self._numbered(kinds[middle:])

    # Groups that hold only together.

    def _only_together(self) -> tuple[tuple[Slot, Slot], ...]:
        """Pairs groups of two kinds that are wrong alone and right together.

        The dimensions of queries and of values are such, for a function of attention
        that refuses to run unless there are as many of both.
        """
        pairs = itertools.combinations(self.failed, 2)
        alike = [
            (kind, other)
            for kind, other in pairs
            if [self.groups[i].size for i in kind]
            == [self.groups[i].size for i in other]
        ]
        found: list[tuple[Slot, Slot]] = []
        done: set[int] = set()
        for kind, other in alike[:_PAIRS]:
            if not done.isdisjoint((*kind, *other)):
                continue
            slots = [self._alike_slots(i, j) for i, j in zip(kind, other, strict=True)]
            if None not in slots and self._hold_together(kind, other):
                found += slots
                done.update(kind, other)
        return tuple(found)

    def _alike_slots(self, i: int, j: int) -> tuple[Slot, Slot] | None:
        """Returns an axis of each of two groups, which are alike but for the groups."""
        for one in self.groups[i].members:
            for other in self.groups[j].members:
                slots = (one.leaf, one.axis), (other.leaf, other.axis)
                if one.role == other.role == "produced" and self._layout(
                    slots[0], i
                ) == self._layout(slots[1], j):
                    return slots
        return None

    def _layout(self, slot: Slot, i: int) -> tuple[int, dict[int | None, bytes]]:
        """Returns how long an axis is and where the groups are, one of them unnamed."""
        leaf, axis = slot
        return self.groups.shapes[leaf][axis], {
            None if n == i else n: member.positions.tobytes()
            for n, group in enumerate(self.groups)
            for member in group.members
            if (member.leaf, member.axis) == slot
        }

    def _hold_together(self, kind: list[int], other: list[int]) -> bool:
        """Reports whether the model holds if groups lose as many channels, by pairs."""
        before = dict(self.fewer)
        pairs = list(zip(kind, other, strict=True))
        self.fewer |= {j: before[i] for i, j in pairs}
        fault = self.attempt(self.rest.union(kind, other))
        if fault is not None:
            names = {self.groups[j].name: self.groups[i].name for i, j in pairs}
            holds = self._settled([*kind, *other], fault, names) is not None
        self.fewer = before
        return fault is None or holds
