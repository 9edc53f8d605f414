"""Which attributes of a model may follow the channels of some groups.

An attribute is a candidate if it equals the size of an axis that the groups run along,
in an array of the module that keeps it. Whether it has to follow is for a trial to say.
"""

import collections
import dataclasses
import functools
import inspect
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from types import CodeType
from typing import Any

from tpp_jax.graph.comparing import Difference
from tpp_jax.graph.fields import Field, FieldSize, Parts
from tpp_jax.graph.records import Groups
from tpp_jax.pruning.source import Source

# Attempts to set attributes for a kind of groups.
_ATTEMPTS = 16


class Attributes:
    """The attributes of a model, and how they may follow its groups.

    Attributes:
      source: the model.
      groups: its groups.
    """

    def __init__(self, source: Source, groups: Groups) -> None:
        self.source = source
        self.groups = groups

    @functools.cached_property
    def fields(self) -> dict[Field, type]:
        """Every attribute → the class of the module that keeps it."""
        return self.source.fields()

    def classes_at(self, line: str) -> set[type]:
        """Returns the classes that a line of code is part of."""
        return {one for one in set(self.fields.values()) if line in _lines(one)}

    def same_class(self, line: str, other: str) -> bool:
        """Reports whether two lines of code are part of one class."""
        return not self.classes_at(line).isdisjoint(self.classes_at(other))

    @functools.cached_property
    def of_path(self) -> dict[str, list[Field]]:
        """Path of a module → its attributes."""
        found: dict[str, list[Field]] = {}
        for field in self.fields:
            found.setdefault(field.path, []).append(field)
        return found

    @functools.cache  # noqa: B019  lives as long as a call of channel_groups
    def around(self, path: str) -> str:
        """Returns how the leaves of a module begin, or of the first around it with any.

        A module without arrays works on those of the module that it is part of.
        """
        while path and not any(
            leaf.startswith(f"{path}.") for leaf in self.groups.shapes
        ):
            path = path.rpartition(".")[0]
        return f"{path}." if path else ""

    def of(
        self, members: Sequence[int], together: Mapping[str, str] | None = None
    ) -> "Candidates":
        """Returns the attributes that may follow some groups.

        Args:
          members: indices of the groups.
          together: name of a group → that of the one that loses the same channels.
        """
        return Candidates(self, tuple(members), together or {})


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The attributes that may follow some groups.

    Attributes:
      model: all attributes of the model.
      members: indices of the groups.
      together: name of a group → that of the one that loses the same channels.
    """

    model: Attributes
    members: tuple[int, ...]
    together: Mapping[str, str]

    def at(
        self, lines: Sequence[str], sizes: Sequence[FieldSize]
    ) -> Iterator[list[FieldSize]]:
        """Yields the candidates of the classes that lines of code are part of.

        The innermost line that there are any for counts. First come the attributes
        that the class's methods name and that follow channels of arrays that the module
        makes, at last all.

        Args:
          lines: of code, the innermost first.
          sizes: see :meth:`candidates`.
        """
        for line in lines if self.model.fields else ():
            classes = self.model.classes_at(line)
            known: list[FieldSize] = []
            for named, made in ((True, True), (True, False), (False, False)):
                found = self.candidates(sizes, classes, named=named, made=made)
                if found and found != known:
                    yield found
                    known = found
            if known:
                return

    def candidates(
        self,
        sizes: Sequence[FieldSize],
        classes: Set[type] | None = None,
        *,
        named: bool = False,
        made: bool = False,
    ) -> list[FieldSize]:
        """Lists attributes near the groups that equal a size of their channels.

        Args:
          sizes: attributes that follow already; one that may follow the members as well
            is listed with all that it is to follow.
          classes: if given, only the attributes of their modules are listed.
          named: whether only what methods of the module name is listed.
          made: whether channels that a module only takes in do not count.
        """
        groups, model = self.model.groups, self.model
        if not model.fields:
            return []
        leaves = {
            i: [m.leaf for m in groups[i].members if _counts(m.role, made)]
            for i in self.members
        }
        names = [self.together.get(group.name, group.name) for group in groups]
        known = {size.field: size for size in sizes}
        found = []
        for path, fields in model.of_path.items():
            owner = model.fields[fields[0]]
            if classes is not None and owner not in classes:
                continue
            inside = model.around(path)
            here = {
                i
                for i, own in leaves.items()
                if any(leaf.startswith(inside) for leaf in own)
            }
            if not here:
                continue
            ways = _Ways(groups.reading, here, names)
            words = _words(owner) if named else None
            for field in fields:
                if words is not None and field.word not in words:
                    continue
                before = known.get(field)
                size = ways.size(field, before)
                if size is not None and size != before:
                    found.append(size)
        return found


def settle(
    near: Candidates,
    attempt: Callable[[tuple[FieldSize, ...]], Difference | None],
    known: tuple[FieldSize, ...],
    fault: Difference,
) -> tuple[FieldSize, ...] | None:
    """Finds attributes with which a model holds, None if none are found.

    Those of the class are tried whose code a fault is in, then, if the fault moves to
    another place, those of the class there; at last those of any class.

    Args:
      near: what may be set.
      attempt: attributes that follow → what goes wrong with them.
      known: attributes that follow already.
      fault: what goes wrong with these.
    """
    tried: set[frozenset[FieldSize]] = set()

    def outcomes(
        sizes: tuple[FieldSize, ...], proposals: Iterable[list[FieldSize]]
    ) -> Iterator[tuple[tuple[FieldSize, ...], Difference | None]]:
        for found in itertools.chain.from_iterable(map(_selections, proposals)):
            both = extended(sizes, found)
            if len(tried) < _ATTEMPTS and frozenset(both) not in tried:
                tried.add(frozenset(both))
                yield both, attempt(both)

    def descend(
        sizes: tuple[FieldSize, ...], fault: Difference, seen: frozenset[str]
    ) -> tuple[FieldSize, ...] | None:
        later = None
        for both, after in outcomes(sizes, near.at(fault.lines, sizes)):
            if after is None:
                return both
            if not after.lines or after.lines[0] in seen:
                continue
            step = both, after, seen.union(after.lines[:1])
            if near.model.same_class(fault.lines[0], after.lines[0]):
                later = later or step
            elif (found := descend(*step)) is not None:
                return found
        return descend(*later) if later else None

    found = descend(known, fault, frozenset(fault.lines[:1]))
    if found is not None:
        return found
    wide = (near.candidates(known, made=made) for made in (True, False))
    for both, after in outcomes(known, wide):
        if after is None:
            return both
    return None


class _Ways:
    """In which ways a number may follow the channels of some groups.

    Attributes:
      reading: the labels of the model.
      here: indices of the groups.
      names: of all groups.
    """

    def __init__(self, reading: Any, here: set[int], names: list[str]) -> None:
        self.reading = reading
        self.here = here
        self.names = names

    def size(self, field: Field, before: FieldSize | None) -> FieldSize | None:
        """Returns how an attribute may follow, None if not or if that is unclear."""
        value = field.value if isinstance(field.value, tuple) else (field.value,)
        old = before.parts if before else (None,) * len(value)
        parts = tuple(map(self._parts, value, old))
        return FieldSize(field, parts) if any(p is not None for p in parts) else None

    def _parts(self, number: int, before: Parts | None) -> Parts | None:
        if before is None:
            return _way(self._numbers.get(number, set()), self.here, self.names)
        own = {self.names[i] for i in self.here}
        through = {name for _, names in before for name in names}
        if own <= through:
            return before
        both = {i for i, name in enumerate(self.names) if name in own | through}
        ways = self.reading.numbers(both, self.names)
        new = _way(_merged(ways.get(number, set())), both, self.names)
        names = {name for _, through in new or () for name in through}
        return new if own | through <= names else before

    @functools.cached_property
    def _numbers(self) -> dict[int, set[Parts]]:
        numbers = self.reading.numbers(self.here, self.names)
        return {number: _merged(ways) for number, ways in numbers.items()}


def extended(
    sizes: Iterable[FieldSize], found: Iterable[FieldSize]
) -> tuple[FieldSize, ...]:
    """Returns attributes that follow, others in place of those of the same name."""
    return tuple({size.field: size for size in (*sizes, *found)}.values())


def _selections(found: list[FieldSize]) -> Iterator[list[FieldSize]]:
    """Yields all attributes, those of all kinds but one, and those of one kind."""
    kinds = list(dict.fromkeys(size.field.declaration for size in found))
    if found:
        yield found
    if len(kinds) > 2:  # one of them is equal by chance
        for kind in kinds:
            yield [s for s in found if s.field.declaration != kind]
    if len(kinds) > 1:
        for kind in kinds:
            yield [s for s in found if s.field.declaration == kind]


def _counts(role: str, made: bool) -> bool:
    return not made or role != "contracted"


def _way(ways: set[Parts], groups: set[int], names: list[str]) -> Parts | None:
    """Returns the one way in which a number follows the channels, None if unclear.

    Axes of one size may differ in other groups that run along them, the dimensions of
    queries and of values: then the number follows the groups in question alone.
    """
    own = {names[i] for i in groups}
    fitting = [
        parts for parts in ways if any(own & set(through) for _, through in parts)
    ]
    if len(fitting) == 1:
        return fitting[0]
    alone = {_onto(parts, own) for parts in fitting}
    return alone.pop() if len(alone) == 1 else None


def _onto(parts: Parts, own: set[str]) -> Parts:
    """Leaves out of a size what does not belong to some groups."""
    sums: collections.Counter[tuple[str, ...]] = collections.Counter()
    for positions, through in parts:
        sums[tuple(sorted(own.intersection(through)))] += positions
    return tuple((n, through) for through, n in sorted(sums.items()))


def _merged(ways: set[Parts]) -> set[Parts]:
    """Returns ways without those that groups of one name make twice."""
    return {_onto(parts, {n for _, t in parts for n in t}) for parts in ways}


@functools.lru_cache(maxsize=256)
def _lines(cls: type) -> frozenset[str]:
    """Returns the lines of a class's code, as ``model.py:31``."""
    return frozenset(
        f"{pathlib.Path(code.co_filename).name}:{line}"
        for code in _codes(cls)
        for _, _, line in code.co_lines()
        if line
    )


@functools.lru_cache(maxsize=256)
def _words(cls: type) -> frozenset[str]:
    """Returns what a class's methods name, those that build a module left out."""
    found: set[str] = set()
    for code in _codes(cls, without=("__init__", "__post_init__", "setup")):
        found.update(code.co_names)
        found.update(one for one in code.co_consts if isinstance(one, str))
    return frozenset(found)


def _codes(cls: type, without: Sequence[str] = ()) -> Iterator[CodeType]:
    for name in {name for one in cls.__mro__[:-1] for name in vars(one)}:
        if name in without:
            continue
        try:
            function = inspect.unwrap(getattr(cls, name))
        except Exception:  # a descriptor of the user's
            continue
        function = getattr(function, "fget", None) or function
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            yield from _nested(code)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _nested(inner)
