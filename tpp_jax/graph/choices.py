"""Places that a model chooses along an axis, and what it does with them.

A mixture of experts takes the largest of its router's scores and then uses *where* they
were: it compares these integers with ``arange(experts)``, or looks up the experts'
weights. The integers are places on the axis of the scores. If all that happens to them
is that they are moved around, compared with other places, and used as indices, then
channels of the axis can be removed: the places are counted again among those left, and
the axes that they are compared with or index lose the same positions.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
from jax.lax import GatherScatterMode

from tpp_jax.graph.labels import Axes, Axis, Labels
from tpp_jax.graph.tracing import Trace
from tpp_jax.graph.unfolding import Equation

# Operations whose results are places, by the axes that are chosen from.
_CHOOSING = {"top_k": 1, "approx_top_k": 1, "argmax": 0, "argmin": 0}

# Operations whose results have the entries of their operand in other places.
_MOVING = frozenset(
    """
    all_gather all_gather_invariant broadcast_in_dim copy copy_p device_put
    layout_constraint loop_slice loop_stack mesh_cast name pbroadcast pcast pvary
    reshape reshard rev shard sharding_constraint slice split squeeze stop_gradient
    tile transpose unshard unstack
    """.split()
)
_BY_ENTRY = frozenset({"optimization_barrier", "sort"})
_COUNTING = frozenset(
    "add broadcast_in_dim convert_element_type reduce_sum reshape squeeze".split()
)
_MESSAGES = frozenset({"debug_callback", "debug_print"})


@dataclasses.dataclass(frozen=True)
class Places:
    """What the entries of an array of integers are places of.

    Attributes:
      sources: Values whose equations made them.
      columns: The same for each entry of the last axis, where these differ; None in
        place of entries that are no places.
      wrapped: Whether the length of the axis was added, as for negative indices.
    """

    sources: frozenset[int]
    columns: tuple[frozenset[int] | None, ...] | None = None
    wrapped: bool = False


class Choices:
    """The places that a computation chooses, and the axes that they are of so far.

    Attributes:
      places: Value number → what its entries are places of.
      followed: Values that are places all of whose uses are understood, and results of
        ragged products whose groups are counts of places.
      axes: Labels of the axis that places are of, by the value that they came from.
    """

    def __init__(
        self,
        places: Mapping[int, Places],
        followed: frozenset[int],
        shapes: Sequence[tuple[int, ...]],
    ) -> None:
        self.places, self.followed, self.shapes = places, followed, shapes
        self.axes: dict[int, Axis] = {}

    def free(self, eqn: Equation) -> frozenset[int]:
        """Returns the axes that an operation need not keep although it chooses.

        They are axes of its first operand; of its result for an ``iota``, and of the
        kernels for a ragged product.
        """
        if (at := _chosen(eqn)) is not None:
            axis = chosen_axis(eqn, self.shapes)
            if axis is None or at not in self.followed:
                return frozenset()
            return frozenset([axis])
        if eqn.primitive == "ragged_dot_general":
            dims = eqn.params["ragged_dot_dimension_numbers"]
            known = eqn.outputs[0] in self.followed
            return frozenset(dims.rhs_group_dimensions if known else ())
        return frozenset(axis for axis, _ in self._indexed(eqn))

    def tie(
        self, labels: Labels, eqn: Equation, operands: list[Axes], out: Axes
    ) -> None:
        """Ties the axes of places that an operation compares, or indexes with.

        Args:
          labels: Labels of the computation.
          eqn: Operation, to which its rule was applied.
          operands: Axes of its operands.
          out: Axes of its first result.
        """
        if (at := _chosen(eqn)) is not None:
            axis = chosen_axis(eqn, self.shapes)
            if axis is not None and at in self.followed:
                self.axes[at] = (operands[0] if operands else out)[axis]
        elif eqn.primitive in ("eq", "join", "ne"):
            given = [self.places[n] for n in _values(eqn) if n in self.places]
            sources = frozenset().union(*(one.sources for one in given))
            if len(given) == len(eqn.inputs) and sources <= self.followed:
                met = [self.axes[n] for n in sorted(sources)]
                functools.reduce(labels.tie, met)
        elif eqn.primitive == "ragged_dot_general":
            for axis in self.free(eqn):
                labels.tie(operands[1][axis], operands[2][-1])
        else:
            for axis, sources in self._indexed(eqn):
                for n in sorted(sources):
                    labels.tie(operands[0][axis], self.axes[n])

    def _indexed(self, eqn: Equation) -> list[tuple[int, frozenset[int]]]:
        """Returns the axes that places index, each with what they are places of."""
        axes = _index_axes(eqn)
        places = self.places.get(eqn.operand(1)) if axes else None
        if places is None:
            return []
        pairs = zip(axes, columns_of(places, len(axes)), strict=True)
        return [(axis, n) for axis, n in pairs if n is not None and n <= self.followed]


def find_choices(traced: Trace) -> Choices | None:
    """Finds the places that a computation chooses; None if there are none."""
    if not any(eqn.primitive in _CHOOSING for eqn in traced.equations):
        return None
    reader = _Reader(traced)
    for eqn in traced.equations:
        reader.read(eqn)
    for value in traced.outputs:
        reader.give_up([value])
    return Choices(reader.places, reader.followed(), traced.shapes)


class _Reader:
    """Follows places through a computation, from equation to equation.

    Attributes:
      places: Places so far, by value.
      length: Length of the axis that the places of a source are of.
      lost: Sources with a use that is not understood.
      along: Axis of places that the largest entries are along, by source.
      met: Sources that are compared with each other, or that one value may be of.
      never: Comparisons of places that hold for none.
      counts: Values that count or mark chosen places.
      whole: Values that are sums of marks or of integers.
      ragged: Results of ragged products whose groups are such counts.
      numbers: Values that are one number of the code.
      changing: Values that a loop or a branch puts others in place of.
    """

    def __init__(self, traced: Trace) -> None:
        self.shapes, self.dtypes = traced.shapes, traced.dtypes
        self.changing = {
            n for eqn in traced.equations if eqn.primitive == "join" for n in eqn.inputs
        }
        self.places: dict[int, Places] = {}
        self.length: dict[int, int] = {}
        self.counted: set[int] = set()  # sources that are ``arange``
        self.lost: set[int] = set()
        self.along: dict[int, int] = {}
        self.never: set[int | None] = set()
        self.met: list[frozenset[int]] = []
        self.counts: set[int] = set()
        self.whole: set[int] = set()
        self.ragged: set[int] = set()
        self.numbers: dict[int | None, float] = {}

    def read(self, eqn: Equation) -> None:
        """Notes what an equation does with places."""
        self._note_number(eqn)
        self._note_counts(eqn)
        if (value := _chosen(eqn)) is not None:
            self.give_up(eqn.inputs)
            self._begin(eqn, value)
            return
        if not any(n in self.places for n in eqn.inputs):
            return
        results = self._results(eqn)
        if results is None:
            self.give_up(eqn.inputs)
            return
        for value, places in zip(eqn.outputs, results, strict=True):
            if places is not None:
                self.places[value] = places

    def give_up(self, values: Sequence[int | None]) -> None:
        """Notes that places are used in a way that is not understood."""
        for value in values:
            if value in self.places:
                self.lost |= self.places[value].sources

    def followed(self) -> frozenset[int]:
        """Returns the sources whose uses are understood."""
        # Counted positions matter only where chosen places are compared with them.
        compared = {n for met in self.met if met - self.counted for n in met}
        lost = self.lost | (self.counted - compared)
        while more := {n for met in self.met if met & lost for n in met} - lost:
            lost |= more
        return frozenset(self.length.keys() - lost) | self.ragged

    def _begin(self, eqn: Equation, value: int) -> None:
        axis = chosen_axis(eqn, self.shapes)
        if axis is None:
            return
        of = value if eqn.primitive == "iota" else eqn.operand(0)
        self.places[value] = Places(frozenset([value]))
        self.length[value] = length = self.shapes[of][axis]
        if eqn.primitive == "iota":
            self.counted.add(value)
        elif self._discrete(of):
            self.lost.add(value)  # the first of equal ones is chosen
        elif eqn.primitive.endswith("top_k"):
            self.along[value] = axis
            if self.shapes[value][axis] == length:
                self.lost.add(value)  # all are chosen, and sorted

    def _results(self, eqn: Equation) -> Sequence[Places | None] | None:
        """Returns the places of an equation's results; None if it is not understood."""
        given = [self.places.get(n) if n is not None else None for n in eqn.inputs]
        name = eqn.primitive
        if name in _READERS:
            return _READERS[name](self, eqn, given)
        if name in _MESSAGES:
            return []
        if name.startswith("scatter"):
            return self._scatter(eqn, given)
        if any(one is not None and (one.wrapped or _mixed(one)) for one in given):
            return None
        if name in _BY_ENTRY:
            sorted_along = eqn.params.get("dimension")
            if any(
                self.along.get(n) == sorted_along for n in eqn.inputs if n in self.along
            ):
                return None  # what comes first is no longer the best
            return [one and Places(one.sources) for one in given]
        if name in _MOVING and given[0] is not None:
            return [Places(given[0].sources)] * len(eqn.outputs)
        return None

    def _convert(self, eqn: Equation, given: list[Places | None]):
        [one] = given
        integer = jnp.issubdtype(eqn.params["new_dtype"], jnp.integer)
        return [one] if integer and one and not one.wrapped else None

    def _join(self, eqn: Equation, given: list[Places | None]):
        """Several places in one: of a loop, of branches, of one of two arrays."""
        del eqn
        known = [
            one.sources
            for one in given
            if one is not None and not one.wrapped and not _mixed(one)
        ]
        sources = frozenset().union(*known)
        lengths = {self.length[n] for n in sources}
        if len(known) < len(given) or len(lengths) > 1:
            return None
        self.met.append(sources)
        return [Places(sources)]

    def _select(self, eqn: Equation, given: list[Places | None]):
        which, *cases = given
        if eqn.inputs[0] in self.never:
            return self._join(eqn, cases[:1])  # the rest is for negative indices
        return None if which else self._join(eqn, cases)

    def _concatenate(self, eqn: Equation, given: list[Places | None]):
        if any(one is not None and (one.wrapped or _mixed(one)) for one in given):
            return None
        sources = frozenset().union(*(one.sources for one in given if one))
        rank = len(self.shapes[eqn.outputs[0]])
        if eqn.params["dimension"] != rank - 1:
            return [Places(sources)] if None not in given else None
        columns = [
            one.sources if one else None
            for one, value in zip(given, eqn.inputs, strict=True)
            for _ in range(self.shapes[value][-1] if value is not None else 1)
        ]
        return [Places(sources, tuple(columns))]

    def _add(self, eqn: Equation, given: list[Places | None]):
        """The length of the axis, added to negative indices."""
        [places] = [one for one in given if one is not None] or [None]
        number = self._number(eqn)
        if places is None or _mixed(places) or len(eqn.inputs) != 2:
            return None
        fits = {self.length[n] for n in places.sources} == {number}
        return [dataclasses.replace(places, wrapped=True)] if fits else None

    def _bound(self, eqn: Equation, given: list[Places | None]):
        """No place is below 0: ``max(places, 0)``."""
        number = self._number(eqn)
        [places] = [one for one in given if one is not None] or [None]
        return [places] if number is not None and number <= 0 else None

    def _inside(self, eqn: Equation, given: list[Places | None]):
        """Whether places are below 0, or not below the length."""
        places, number = given[0], self._number(eqn)
        if places is None:
            return None
        if number == 0 and eqn.primitive == "lt" and not _mixed(places):
            self.never.add(eqn.outputs[0])
        lengths = {self.length[n] for n in places.sources}
        return [None] if number == 0 or lengths == {number} else None

    def _compare(self, eqn: Equation, given: list[Places | None]):
        one, other = given
        if one is None or other is None or one.wrapped or other.wrapped:
            return None
        sources = one.sources | other.sources
        if _mixed(one) or _mixed(other) or len({self.length[n] for n in sources}) > 1:
            return None
        self.met.append(sources)
        self.counts.add(eqn.outputs[0])
        return [None]

    def _gather(self, eqn: Equation, given: list[Places | None]):
        table, indices = given
        dims = eqn.params["dimension_numbers"]
        if table is not None and (table.wrapped or _mixed(table)):
            return None
        if table and indices is None and _fills(eqn):
            return None  # what stands for missing entries is no place
        sizes = eqn.params["slice_sizes"]
        single = [i for i in dims.start_index_map if sizes[i] == 1]
        fits = self._fits(eqn, indices, single)
        return [table and Places(table.sources)] if fits else None

    def _scatter(self, eqn: Equation, given: list[Places | None]):
        array, indices, updates = given
        dims = eqn.params["dimension_numbers"]
        if array or updates or not self._fits(eqn, indices, dims.inserted_window_dims):
            return None
        ones = [self.numbers.get(eqn.inputs[i]) for i in (0, 2)] == [0, 1]
        if ones and eqn.primitive in ("scatter-add", "scatter_add"):
            self.counts.add(eqn.outputs[0])
        return [None]

    def _fits(
        self, eqn: Equation, indices: Places | None, single: Sequence[int]
    ) -> bool:
        """Reports whether places index axes of the length that they are of.

        Args:
          eqn: Gather or scatter.
          indices: What its indices are places of.
          single: Axes of which each index takes one position.
        """
        if indices is None:
            return True
        axes, shape = _index_axes(eqn), self.shapes[eqn.operand(0)]
        columns = columns_of(indices, len(axes))
        return not indices.wrapped and all(
            axis in single and {self.length[n] for n in sources} == {shape[axis]}
            for axis, sources in zip(axes, columns, strict=True)
            if sources is not None
        )

    def _note_number(self, eqn: Equation) -> None:
        known = eqn.primitive in ("convert_element_type", "broadcast_in_dim")
        if known and eqn.outputs[0] not in self.changing:
            number = eqn.scalars[0] if eqn.scalars else None
            if number is None:
                number = self.numbers.get(eqn.inputs[0])
            if number is not None:
                self.numbers[eqn.outputs[0]] = number

    def _number(self, eqn: Equation) -> float | None:
        """Returns the only operand that is a number of the code."""
        found = [
            scalar if value is None else self.numbers.get(value)
            for scalar, value in zip(eqn.scalars, eqn.inputs, strict=True)
        ]
        known = [float(number) for number in found if number is not None]
        return known[0] if len(known) == 1 else None

    def _discrete(self, value: int) -> bool:
        """Reports whether a value holds marks or whole numbers, some of them equal."""
        known = value in self.counts or value in self.whole
        return known or not jnp.issubdtype(self.dtypes[value], jnp.inexact)

    def _note_counts(self, eqn: Equation) -> None:
        if eqn.primitive in _COUNTING:
            if self.counts.issuperset(eqn.inputs):
                self.counts.update(eqn.outputs)
            if all(n is not None and self._discrete(n) for n in eqn.inputs):
                self.whole.update(eqn.outputs)
        if eqn.primitive == "ragged_dot_general" and eqn.inputs[2] in self.counts:
            self.ragged.add(eqn.outputs[0])


_Reading = Callable[
    [_Reader, Equation, list[Places | None]], Sequence[Places | None] | None
]

_READERS: dict[str, _Reading] = {
    "add": _Reader._add,
    "concatenate": _Reader._concatenate,
    "convert_element_type": _Reader._convert,
    "eq": _Reader._compare,
    "gather": _Reader._gather,
    "ge": _Reader._inside,
    "join": _Reader._join,
    "lt": _Reader._inside,
    "max": _Reader._bound,
    "ne": _Reader._compare,
    "select_n": _Reader._select,
}


def chosen_axis(eqn: Equation, shapes: Sequence[tuple[int, ...]]) -> int | None:
    """Returns the axis that an equation's places are of; None if they are of several.

    Args:
      eqn: Equation of a top-k, an argmax or an ``iota``.
      shapes: Shape of every value.
    """
    if eqn.primitive == "iota":
        return eqn.params["dimension"]
    if eqn.primitive in ("argmax", "argmin"):
        axes = eqn.params["axes"]
        return axes[0] if len(axes) == 1 else None
    along = eqn.params.get("reduction_dimension", eqn.params.get("axis", -1))
    return along % len(shapes[eqn.operand(0)])


def columns_of(places: Places, number: int) -> Sequence[frozenset[int] | None]:
    """Returns what each of the entries of an index is a place of."""
    own = places.columns
    return own if own and len(own) == number else [places.sources] * number


def _chosen(eqn: Equation) -> int | None:
    """Returns the value that holds the places which an equation makes, if it does."""
    if eqn.primitive == "iota":
        return eqn.outputs[0]
    at = _CHOOSING.get(eqn.primitive)
    return None if at is None else eqn.outputs[at]


def _values(eqn: Equation) -> list[int]:
    """Returns the operands that are no literals."""
    return [value for value in eqn.inputs if value is not None]


def _index_axes(eqn: Equation) -> Sequence[int]:
    """Returns the axes that a gather or scatter indexes; none for another operation."""
    if eqn.primitive == "gather":
        return eqn.params["dimension_numbers"].start_index_map
    if eqn.primitive.startswith("scatter"):
        return eqn.params["dimension_numbers"].scatter_dims_to_operand_dims
    return ()


def _fills(eqn: Equation) -> bool:
    """Reports whether a gather has a number in place of entries that do not exist."""
    return eqn.params["mode"] == GatherScatterMode.FILL_OR_DROP


def _mixed(places: Places) -> bool:
    """Reports whether some entries are no places."""
    return places.columns is not None and None in places.columns
