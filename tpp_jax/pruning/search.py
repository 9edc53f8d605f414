"""Finding the groups of a model that can be pruned, by trials.

The model is tried with fewer channels of all groups. If this fails, the groups at fault
are found with few more traces, by the line of code that fails.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from tpp_jax.graph.comparing import Difference
from tpp_jax.graph.fields import FieldSize
from tpp_jax.graph.records import Groups, Slot, Supposition
from tpp_jax.graph.tracing import source_line
from tpp_jax.pruning.arrangement import alike_slots
from tpp_jax.pruning.attributes import Attributes, extended, settle
from tpp_jax.pruning.literals import OtherNumber
from tpp_jax.pruning.source import Source
from tpp_jax.pruning.trial import HAIKU, Trial
from tpp_jax.pruning.widths import (
    apart,
    families_of,
    other_size,
    separated,
    trial_sizes,
)

# Attempts to join two families of groups neither of which can be pruned alone.
_PAIRS = 12
# Searches for groups that work together only because they lose as many channels.
_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of trying the groups of a model.

    Attributes:
      wrong: Index of a group → reason why it cannot be pruned.
      joined: Pairs of axes that can be pruned, but only together; if there are any, the
        groups have to be read and tried again.
      sizes: Attributes that have to follow the channels.
      scaled: Indices of groups whose number of channels is part of the computation, as
        with a mean over them.
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
      source: Model.
      groups: Groups read off its trace.
      suppositions: Sizes in operations that may follow the groups, which help to find
        groups at fault.
    """
    return _Search(source, groups, suppositions).verdict()


@dataclasses.dataclass(frozen=True, eq=False)
class _Attempt:
    """The result of a trial.

    Attributes:
      fault: First difference, None if there is none.
      numbers: Literal numbers that differ, see :class:`Trial`.
      suspects: Groups that these numbers may follow, see :class:`Trial`.
    """

    fault: Difference | None
    numbers: list[OtherNumber]
    suspects: frozenset[int] | None


class _Search:
    """Finds the groups of a model that cannot be pruned.

    Some groups *hold* if the model works with fewer channels of all of them.

    Attributes:
      source: Model.
      groups: Groups of the model.
      trial: Trial of the model.
      supposed: Index of a group → lines of code with sizes that may follow it.
      families: Families of groups, see :func:`families_of`.
      family_of: Index of a group → index of its family.
      fewer: Index of a group → its number of channels in a trial.
      rest: Groups that are being tried; in the end, those that hold.
      wrong: Index of a group → reason why it does not hold.
      failed: Groups of families that failed as they were tried.
      tied: Groups of one family that hold only together.
      sizes: Attributes that follow the channels.
      attributes: All attributes of the model.
      known: Results of the trials so far.
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
        self.families = families_of(groups, lines)
        self.family_of = {i: n for n, own in enumerate(self.families) for i in own}
        self.fewer = trial_sizes(groups, self.families)
        self.rest = set(self.fewer)
        self.wrong: dict[int, str] = {}
        self.failed: list[list[int]] = []
        self.tied: list[list[int]] = []
        self.sizes: tuple[FieldSize, ...] = ()
        self.attributes = Attributes(source, groups)
        self.known: dict[Any, _Attempt] = {}

    def verdict(self) -> Verdict:
        """Searches for the groups that hold."""
        if not self.rest:
            return Verdict({})
        self._search(self.rest)
        for _ in range(_ROUNDS):  # groups that compensate, found one after another
            together = self._compensating()
            if together is None:
                break
            self._search(self.rest, together)
        else:
            doubt = Difference("the model fails with other numbers of channels")
            self._refuse(self._compensating() or (), doubt)
            self.rest.difference_update(self.wrong)
        joined = self._only_together()
        if joined:
            return Verdict({}, joined)
        if self.tied and self.rest:
            self._search(self.rest)
        self._drop_idle_fields()
        scaled = self._with_other_numbers()
        return Verdict(self.wrong, (), self.sizes, frozenset(scaled))

    def _search(self, chosen: Set[int], suspects: Set[int] = frozenset()) -> None:
        """Sets ``rest`` to the groups of a choice that hold.

        Args:
          chosen: Groups to be tried.
          suspects: Groups among them to be tried one by one, since they may hold only
            together.
        """
        self.rest, together = set(chosen) - suspects, suspects
        suspects = set(suspects)
        fault = self.attempt(self.rest) if self.rest else None
        while fault is not None:
            blamed = self._families_of(fault.groups & self.rest) or self._culprit()
            helped, fault = self._with_fields(blamed, fault)
            if not helped:
                self.rest -= blamed
                suspects |= blamed
                fault = self.attempt(self.rest) if self.rest else None
        for family in self.families:
            members = [i for i in family if i in suspects]
            if together >= set(members):
                members = self._admit_alone(members)
            if members:
                self._admit(members)

    def _compensating(self) -> set[int] | None:
        """Returns groups that hold together but not separately, None if none do."""
        for some in apart(self.groups, self.rest, self.fewer, self.family_of):
            fault = self.attempt(some)
            if fault is not None:
                blamed = self._families_of(fault.groups & some)
                return blamed or self._families_of(some - self._alone(some))
        return None

    def _alone(self, chosen: set[int]) -> set[int]:
        """Returns groups with sizes and trial sizes that no other group has."""
        key = {i: (self.groups[i].size, self.fewer[i]) for i in self.rest}
        numbers = collections.Counter(key.values())
        return {i for i in chosen if numbers[key[i]] == 1}

    def _admit_alone(self, members: list[int]) -> list[int]:
        """Adds groups of one family to ``rest`` that hold without the others.

        Returns:
          All of the groups if they do not hold together.
        """
        if not members or self.attempt(self.rest.union(members)) is not None:
            return members
        rest = frozenset(self.rest)
        for some in separated(members, lambda part: not self.attempt(rest.union(part))):
            if len(some) > 1:
                self.tied.append(some)
            else:
                self.rest.update(some)
        return []

    def attempt(
        self,
        chosen: Iterable[int],
        sizes: tuple[FieldSize, ...] | None = None,
        values: bool = False,
    ) -> Difference | None:
        """Returns the fault of the model with fewer channels, None if there is none.

        Args:
          chosen: Indices of the groups that have fewer channels.
          sizes: Attributes that follow; by default those found so far.
          values: Whether the literal numbers must be the same, which does not hold for
            a mean over the channels.
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

    def _families_of(self, groups: Set[int]) -> set[int]:
        """Returns the families of some groups, without those that are not tried."""
        families = {self.family_of[i] for i in groups}
        return {i for own in families for i in self.families[own]} & self.rest

    def _culprit(self) -> set[int]:
        """Returns the first family that fails together with those before it."""
        families = [{i for i in own if i in self.rest} for own in self.families]
        families = [own for own in families if own]
        low, high = 0, len(families)
        while high - low > 1:
            middle = (low + high) // 2
            if self.attempt(set().union(*families[:middle])):
                high = middle
            else:
                low = middle
        return families[high - 1]

    def _admit(self, members: list[int]) -> None:
        """Adds groups of one family to ``rest`` if they hold with it."""
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
            # heads that is hard-coded in every block of a transformer.
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
        size = other_size(self.groups[members[0]], set(before.values()))
        self.fewer |= dict.fromkeys(members, size)
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
        """Returns the attributes that follow a group that holds.

        Attributes that follow only groups given up since are free to follow others.
        """
        names = {self.groups[i].name for i in self.rest}
        return tuple(size for size in self.sizes if size.groups & names)

    def _with_fields(
        self, blamed: Set[int], fault: Difference
    ) -> tuple[bool, Difference | None]:
        """Tries to set attributes for the blamed groups.

        Returns:
          Whether this helps, and the fault that is then left elsewhere.
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
        """Returns attributes with which the groups hold, None if none are found.

        Args:
          members: Indices of groups to be cut with those that hold.
          fault: Fault so far.
          together: Name of a group → name of a group that loses the same channels.
        """
        chosen = self.rest.union(members)
        return settle(
            self.attributes.of(members, together),
            lambda sizes: self.attempt(chosen, sizes),
            self._following(),
            fault,
        )

    def _drop_idle_fields(self) -> None:
        """Drops attributes that the model does not need."""
        # The innermost module is the most likely to compute with its attributes.
        sizes = sorted(self.sizes, key=lambda size: size.field.path.count("."))
        found = list(dict.fromkeys(size.field.declaration for size in sizes))
        self._drop_idle(found[:-1])
        self._drop_idle(found[-1:])

    def _drop_idle(self, declarations: list[tuple[str, str]]) -> None:
        """Drops the idle ones among some attributes, found by bisection."""
        if not declarations:
            return
        without = tuple(
            size for size in self.sizes if size.field.declaration not in declarations
        )
        if not self.attempt(self.rest, without):
            self.sizes = without
        elif len(declarations) > 1:
            self._drop_idle(declarations[: len(declarations) // 2])
            self._drop_idle(declarations[len(declarations) // 2 :])

    # Numbers of channels that are part of the computation.

    def _with_other_numbers(self) -> set[int]:
        """Finds groups whose cut changes a number that the model computes with.

        If such a number is an attribute that follows the channels, the groups are
        refused. If the code reads it from an array's shape, it is like the number in a
        mean: setting channels to zero is then not equivalent to removing them.

        Returns:
          The groups whose number is read from a shape.
        """
        full = self._attempt(self.rest, self.sizes)
        suspects = full.suspects if full.fault is None else None
        if suspects is not None and not suspects:
            return set()
        plain = [
            [i for i in family if i in self.rest and not self.groups[i].reduced]
            for family in self.families
            if suspects is None or not suspects.isdisjoint(family)
        ]
        follow = set().union(*(size.groups for size in self.sizes))
        follow = {i for i in self.rest if self.groups[i].name in follow}
        parts = (
            [family for family in plain if family and follow.isdisjoint(family)],
            [family for family in plain if not follow.isdisjoint(family)],
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
        self, families: list[list[int]]
    ) -> Iterator[tuple[list[int], Difference]]:
        """Yields the families whose cut changes a number, found by bisection."""
        if not families:
            return
        fault = self.attempt(itertools.chain(*families), values=True)
        if fault is None:
            return
        if len(families) == 1:
            yield families[0], fault
            return
        middle = len(families) // 2
        yield from self._numbered(families[:middle])
        yield from self._numbered(families[middle:])

    # Groups that hold only together.

    def _only_together(self) -> tuple[tuple[Slot, Slot], ...]:
        """Pairs groups that hold only together, of one family or of two.

        Examples are the dimensions of queries and of values, if a function that
        computes attention requires equal numbers of both.
        """
        found = list(self._tied_slots())
        pairs = itertools.combinations(self.failed, 2)
        alike = [
            (one, other)
            for one, other in pairs
            if [self.groups[i].size for i in one]
            == [self.groups[i].size for i in other]
        ]
        done: set[int] = set()
        for one, other in alike[:_PAIRS]:
            if not done.isdisjoint((*one, *other)):
                continue
            members = zip(one, other, strict=True)
            maybe = [alike_slots(self.groups, i, j) for i, j in members]
            slots = [pair for pair in maybe if pair is not None]
            if len(slots) == len(maybe) and self._hold_together(one, other):
                found += slots
                done.update(one, other)
        return tuple(found)

    def _tied_slots(self) -> Iterator[tuple[Slot, Slot]]:
        """Yields pairs of axes of the groups of one family that hold only together."""
        for members in self.tied:
            pairs = itertools.pairwise(members)
            slots = [alike_slots(self.groups, i, j) for i, j in pairs]
            if None not in slots:
                yield from (pair for pair in slots if pair is not None)
                continue
            names = " and ".join(self.groups[i].name for i in members[:3])
            reason = f"a model that works only with as many channels of {names}"
            self.wrong |= dict.fromkeys(members, reason)

    def _hold_together(self, one: list[int], other: list[int]) -> bool:
        """Reports whether groups hold if pairs of them lose as many channels."""
        before = dict(self.fewer)
        pairs = list(zip(one, other, strict=True))
        self.fewer |= {j: before[i] for i, j in pairs}
        fault = self.attempt(self.rest.union(one, other))
        holds = fault is None
        if fault is not None:
            names = {self.groups[j].name: self.groups[i].name for i, j in pairs}
            holds = self._settled([*one, *other], fault, names) is not None
        self.fewer = before
        return holds
