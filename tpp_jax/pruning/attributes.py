"""Finding the attributes of a model that may follow the channels of some groups.

An attribute is a candidate if it equals the size of an axis that the groups run along,
in an array of the module that has the attribute. A trial decides whether it has to
follow the groups.
"""

import collections
import dataclasses
import functools
import inspect
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from types import CodeType

from tpp_jax.graph.comparing import Difference, Reading
from tpp_jax.graph.fields import Field, FieldSize, Parts
from tpp_jax.graph.records import Groups
from tpp_jax.pruning.source import Source

# Attempts to set attributes for a family of groups.
_ATTEMPTS = 16


class Attributes:
    """The attributes of a model, and how they may follow its groups.

    Attributes:
      source: Model.
      groups: Groups of the model.
    """

    def __init__(self, source: Source, groups: Groups) -> None:
        self.source = source
        self.groups = groups

    @functools.cached_property
    def fields(self) -> dict[Field, type]:
        """Attribute → class of the module that has it."""
        return self.source.fields()

    def classes_at(self, line: str) -> set[type]:
        """Returns the classes whose code contains a line."""
        return {one for one in set(self.fields.values()) if line in _lines(one)}

    def same_class(self, line: str, other: str) -> bool:
        """Reports whether two lines are part of the code of the same class."""
        return not self.classes_at(line).isdisjoint(self.classes_at(other))

    @functools.cached_property
    def of_path(self) -> dict[str, list[Field]]:
        """Path of a module → attributes of the module."""
        found: dict[str, list[Field]] = {}
        for field in self.fields:
            found.setdefault(field.path, []).append(field)
        return found

    @functools.cache  # noqa: B019  lives as long as one call of channel_groups
    def around(self, path: str) -> str:
        """Returns the prefix of a module's leaves.

        A module without arrays works on those of the module that it is part of: the
        prefix is then that of the innermost module around it with arrays.
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
          members: Indices of the groups.
          together: Name of a group → name of a group that loses the same channels.
        """
        return Candidates(self, tuple(members), together or {})


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The attributes that may follow some groups.

    Attributes:
      model: All attributes of the model.
      members: Indices of the groups.
      together: Name of a group → name of a group that loses the same channels.
    """

    model: Attributes
    members: tuple[int, ...]
    together: Mapping[str, str]

    def at(
        self, lines: Sequence[str], sizes: Sequence[FieldSize]
    ) -> Iterator[list[FieldSize]]:
        """Yields the candidates of the classes whose code contains a line.

        The innermost line with any candidates counts. First come the attributes that
        methods of the class refer to and that follow channels produced in the module;
        last come all.

        Args:
          lines: Lines of code, innermost first.
          sizes: See :meth:`candidates`.
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
        """Lists attributes of modules near the groups that equal one of their sizes.

        Args:
          sizes: Attributes that already follow channels; one that may also follow the
            members is listed with all groups that it follows.
          classes: Classes whose modules are considered; by default all.
          named: Whether to list only attributes that methods of the module refer to.
          made: Whether to ignore channels that the module contracts but does not make.
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
    """Finds attributes with which a model works, None if none are found.

    First the attributes of the class are tried whose code has the fault; if the fault
    moves to another place, those of the class there; and finally those of any class.

    Args:
      near: Attributes that may be set.
      attempt: Function from attributes that follow to the fault with them.
      known: Attributes that already follow.
      fault: Fault with these.
    """
    attempts = _Attempts(near, attempt)
    found = attempts.follow(known, fault, frozenset(fault.lines[:1]))
    if found is not None:
        return found
    wide = (near.candidates(known, made=made) for made in (True, False))
    outcomes = attempts.outcomes(known, wide)
    return next((sizes for sizes, after in outcomes if after is None), None)


@dataclasses.dataclass
class _Attempts:
    """Attempts to set attributes, each of which is made once.

    Attributes:
      near: Attributes that may be set.
      attempt: Function from attributes that follow to the fault with them.
      tried: Attributes that were set so far.
    """

    near: Candidates
    attempt: Callable[[tuple[FieldSize, ...]], Difference | None]
    tried: set[frozenset[FieldSize]] = dataclasses.field(default_factory=set)

    def outcomes(
        self, sizes: tuple[FieldSize, ...], proposals: Iterable[list[FieldSize]]
    ) -> Iterator[tuple[tuple[FieldSize, ...], Difference | None]]:
        """Yields attributes that were set, and the fault that is left with them.

        Args:
          sizes: Attributes that already follow.
          proposals: Attributes that may be set in addition.
        """
        for found in itertools.chain.from_iterable(map(_selections, proposals)):
            both = extended(sizes, found)
            if len(self.tried) < _ATTEMPTS and frozenset(both) not in self.tried:
                self.tried.add(frozenset(both))
                yield both, self.attempt(both)

    def follow(
        self, sizes: tuple[FieldSize, ...], fault: Difference, seen: frozenset[str]
    ) -> tuple[FieldSize, ...] | None:
        """Sets attributes of the class with the fault, as long as the fault moves.

        Args:
          sizes: Attributes that already follow.
          fault: Fault with these.
          seen: Lines that had a fault before.

        Returns:
          The attributes with which the model works, None if none are found.
        """
        later = None
        for both, after in self.outcomes(sizes, self.near.at(fault.lines, sizes)):
            if after is None:
                return both
            if not after.lines or after.lines[0] in seen:
                continue
            step = both, after, seen.union(after.lines[:1])
            if self.near.model.same_class(fault.lines[0], after.lines[0]):
                later = later or step
            elif (found := self.follow(*step)) is not None:
                return found
        return self.follow(*later) if later else None


class _Ways:
    """The ways in which a number may follow the channels of some groups.

    Attributes:
      reading: Labels of the model.
      here: Indices of the groups.
      names: Names of all groups.
    """

    def __init__(self, reading: Reading, here: set[int], names: list[str]) -> None:
        self.reading = reading
        self.here = here
        self.names = names

    def size(self, field: Field, before: FieldSize | None) -> FieldSize | None:
        """Returns how an attribute may follow, None if it cannot or is unclear."""
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
    """Returns attributes that follow, with some of them added or replaced."""
    return tuple({size.field: size for size in (*sizes, *found)}.values())


def _selections(found: list[FieldSize]) -> Iterator[list[FieldSize]]:
    """Yields all attributes, all but those of one declaration, and those of one.

    Then all again, with one of the equal numbers of a tuple alone: of ``(8, 8)``, eight
    heads of eight dimensions.
    """
    declarations = list(dict.fromkeys(size.field.declaration for size in found))
    if found:
        yield found
    if len(declarations) > 2:  # one of them may be equal by coincidence
        for one in declarations:
            yield [size for size in found if size.field.declaration != one]
    if len(declarations) > 1:
        for one in declarations:
            yield [size for size in found if size.field.declaration == one]
    most = max((_equal_parts(size) for size in found), default=1)
    for k in range(most) if most > 1 else ():
        yield [_with_one_part(size, k) for size in found]


def _equal_parts(size: FieldSize) -> int:
    """Returns how many numbers of an attribute follow in the same way."""
    follows = [part for part in size.parts if part is not None]
    return len(follows) if len(set(follows)) == 1 else 1


def _with_one_part(size: FieldSize, k: int) -> FieldSize:
    """Returns an attribute whose k-th number alone follows, of several equal ones."""
    if _equal_parts(size) < 2:
        return size
    follows = [i for i, part in enumerate(size.parts) if part is not None]
    chosen = follows[min(k, len(follows) - 1)]
    parts = [part if i == chosen else None for i, part in enumerate(size.parts)]
    return FieldSize(size.field, tuple(parts))


def _counts(role: str, made: bool) -> bool:
    return not made or role != "contracted"


def _way(ways: set[Parts], groups: set[int], names: list[str]) -> Parts | None:
    """Returns the way in which a number follows the channels, None if unclear.

    Axes of the same size may differ in the other groups that run along them, such as
    the dimensions of queries and of values. The number then follows ``groups`` alone.
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
    """Returns the parts of a size without the groups that are not in ``own``."""
    sums: collections.Counter[tuple[str, ...]] = collections.Counter()
    for positions, through in parts:
        sums[tuple(sorted(own.intersection(through)))] += positions
    return tuple((n, through) for through, n in sorted(sums.items()))


def _merged(ways: set[Parts]) -> set[Parts]:
    """Returns ways without those that are equal once groups share names."""
    return {_onto(parts, {n for _, t in parts for n in t}) for parts in ways}


@functools.lru_cache(maxsize=256)
def _lines(cls: type) -> frozenset[str]:
    """Returns the lines of a class's code, in the form ``model.py:31``."""
    return frozenset(
        f"{pathlib.Path(code.co_filename).name}:{line}"
        for code in _codes(cls)
        for _, _, line in code.co_lines()
        if line
    )


@functools.lru_cache(maxsize=256)
def _words(cls: type) -> frozenset[str]:
    """Returns the identifiers in a class's methods but those that build a module."""
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
        except Exception:  # raised by a user's descriptor
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
