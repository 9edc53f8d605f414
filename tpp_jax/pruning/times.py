"""What the widths of a model's groups cost on a machine: measured times, as data."""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Float

from tpp_jax.errors import TPPError, TPPTypeError
from tpp_jax.graph.records import Groups
from tpp_jax.pruning.axes import sizes_of

_NOT_READ = "the data are not those of a latency table: pass what to_json() returned"

EVEN = 8
"""Widths that this number divides are interpolated among such widths alone."""

STEP = 2 * EVEN
"""Widths are measured around multiples of this number."""

# A width is as fast as another if its time is at most this much longer.
_AS_FAST = 1.02


class Size(NamedTuple):
    """A size that follows the widths of groups: a quotient of products.

    Attributes:
      up: Factor, and the numbers of the axes that multiply it.
      down: Factor and axes that divide it.
    """

    up: tuple[int, tuple[int, ...]]
    down: tuple[int, tuple[int, ...]] = (1, ())

    def of(self, axes: Sequence[int]) -> int:
        """Returns the size, from the sizes of all axes."""
        up, down = (
            factor * math.prod(axes[axis] for axis in along) for factor, along in self
        )
        return up // down if down else 0


class TimedShape(NamedTuple):
    """Times of one product at a grid of widths.

    Attributes:
      widths: Widths of the grid along each of its axes, ascending.
      seconds: Time at each point of the grid, the last axis varying fastest.
    """

    widths: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]

    def at(self, sizes: Sequence[int]) -> float:
        """Returns the time at any widths, multilinear between points of the grid.

        Widths that :data:`EVEN` divides are interpolated among such widths, and others
        among others, since most machines compute the former faster.

        Args:
          sizes: A width for each axis of the grid.
        """
        if 0 in sizes:
            return 0.0
        corners = [
            _between(widths, n) for widths, n in zip(self.widths, sizes, strict=True)
        ]
        times = np.reshape(self.seconds, [len(widths) for widths in self.widths])
        return sum(
            math.prod(share for _, share in chosen)
            * float(times[tuple(i for i, _ in chosen)])
            for chosen in itertools.product(*corners)
        )


def _between(widths: Sequence[int], n: int) -> list[tuple[int, float]]:
    """Returns the places of the two nearest widths of the same kind, and their shares.

    Beyond the widths of its kind, a width is between those of any kind.
    """
    alike = [i for i, w in enumerate(widths) if (w % EVEN == 0) == (n % EVEN == 0)]
    if not alike or not widths[alike[0]] <= n <= widths[alike[-1]]:
        alike = list(range(len(widths)))
    right = bisect.bisect_left(alike, n, key=lambda i: widths[i])
    high = alike[min(right, len(alike) - 1)]
    low = alike[max(right - 1, 0)]
    if widths[high] <= n or low == high:
        return [(high, 1.0)]
    if widths[low] >= n:
        return [(low, 1.0)]
    share = (n - widths[low]) / (widths[high] - widths[low])
    return [(low, 1 - share), (high, share)]


class TimedLayer(NamedTuple):
    """A product in the computation of the model.

    Attributes:
      shape: Index of its shape among the timed ones.
      sizes: Width along each axis of the shape's grid.
      times: Number of times that it runs.
    """

    shape: int
    sizes: tuple[Size, ...]
    times: int


class Measured(NamedTuple):
    """A network that was timed.

    Attributes:
      counts: Number of channels of each group.
      seconds: Duration of a call.
    """

    counts: tuple[int, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Measured times of a model's layers at several widths, which predict all others.

    The predicted time of a network is the sum of the times of its products, that of its
    other operations, taken as proportional to the number of their results, and a
    constant; the three weights are fitted to networks that were timed.

    Attributes:
      device: Name of the device.
      groups: Names of all groups of the model, in order of execution.
      sizes: Number of channels of each group.
      axes: Axes of the computation: pairs of a number of positions and the indices of
        the groups that they belong to.
      shapes: Times of the distinct shapes of convolutions and other products.
      layers: Convolutions and other products, in order of execution.
      elements: Numbers of results of all other operations, as factors and axes.
      weights: Factor of the sum of the products' times; seconds for each result of the
        other operations; and constant seconds.
      measured: Networks that were timed; the first one is dense.

    Example:
      >>> time_of_w1 = TimedShape(((2, 4),), (0.001, 0.003))
      >>> table = LatencyTable(
      ...     device="cpu",
      ...     groups=("w1",),
      ...     sizes=(4,),
      ...     axes=(((4, (0,)),),),
      ...     shapes=(time_of_w1,),
      ...     layers=(TimedLayer(0, (Size((1, (0,))),), 1),),
      ...     elements=(),
      ...     weights=(1.0, 0.0, 0.002),
      ...     measured=(Measured((4,), 0.005),),
      ... )
      >>> table.seconds({}), table.seconds({"w1": 3}), table.dense_seconds
      (0.005, 0.004, 0.005)
    """

    device: str
    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    axes: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]
    shapes: tuple[TimedShape, ...]
    layers: tuple[TimedLayer, ...]
    elements: tuple[tuple[int, tuple[int, ...]], ...]
    weights: tuple[float, float, float]
    measured: tuple[Measured, ...]

    @property
    def dense_seconds(self) -> float:
        """Measured duration of a call of the dense network."""
        return self.measured[0].seconds

    def seconds(self, counts: Mapping[str, int]) -> float:
        """Returns the predicted duration of a call of the pruned network.

        Args:
          counts: Group name → number of kept channels; other groups are not pruned.

        Raises:
          TPPError: A group is unknown.
        """
        for name in counts:
            if name not in self.groups:
                raise TPPError(
                    f"the latency table has no group {name!r}: its groups are "
                    f"{', '.join(self.groups)}"
                )
        named = zip(self.groups, self.sizes, strict=True)
        return float(
            np.dot(self.weights, self.parts([counts.get(n, size) for n, size in named]))
        )

    def parts(self, counts: Sequence[int]) -> Float[np.ndarray, "3"]:
        """Returns what the weights multiply.

        Args:
          counts: Number of kept channels of each group.
        """
        axes = sizes_of(self.axes, list(zip(counts, self.sizes, strict=True)))
        products = sum(
            layer.times
            * self._time(layer.shape, tuple(n.of(axes) for n in layer.sizes))
            for layer in self.layers
        )
        elements = sum(Size(one).of(axes) for one in self.elements)
        return np.array([products, elements, 1.0])

    def fast_widths(self, name: str) -> tuple[int, ...]:
        """Returns the widths of a group that are worthwhile on this machine, ascending.

        Of multiples of 16 and other widths that were measured, a width is worthwhile if
        it is more than two percent faster than the next worthwhile one above it. Only
        operations that the group's channels run through count, and other groups are not
        pruned.

        Args:
          name: Name of a group.
        """
        group = self.groups.index(name)

        def seconds(width: int) -> float:
            return self.seconds({name: width})

        without = seconds(0)
        found = [self.sizes[group]]
        for width in reversed(self._widths(group)[:-1]):
            own = seconds(width) - without
            if own * _AS_FAST < seconds(found[-1]) - without:
                found.append(width)
        return tuple(reversed(found))

    def _widths(self, group: int) -> list[int]:
        """Returns the widths of a group that may be worthwhile, ascending.

        At these widths a layer was measured, or has a multiple of :data:`STEP`.
        """
        mine = [
            i
            for i, runs in enumerate(self.axes)
            if any(group in through for _, through in runs)
        ]

        def follows(n: Size) -> bool:
            return any(axis in mine for axis in (*n.up[1], *n.down[1]))

        own = {layer for layer in self.layers if any(map(follows, layer.sizes))}
        axes = sizes_of(self.axes, [(n, n) for n in self.sizes])
        runs = [self.axes[i] for i in mine]
        widths = []
        for width in range(1, self.sizes[group] + 1):
            counts = [(n, n) for n in self.sizes]
            counts[group] = width, self.sizes[group]
            for i, size in zip(mine, sizes_of(runs, counts), strict=True):
                axes[i] = size
            if width == self.sizes[group] or any(
                n.of(axes) in grid or n.of(axes) % STEP == 0
                for layer in own
                for n, grid in zip(
                    layer.sizes, self.shapes[layer.shape].widths, strict=True
                )
                if follows(n)
            ):
                widths.append(width)
        return widths

    @functools.cached_property
    def _known(self) -> dict[tuple[int, tuple[int, ...]], float]:
        return {}

    def _time(self, shape: int, sizes: tuple[int, ...]) -> float:
        key = shape, sizes
        if key not in self._known:
            self._known[key] = self.shapes[shape].at(sizes)
        return self._known[key]

    def to_json(self) -> dict[str, Any]:
        """Returns the content as plain data, ready for JSON."""
        return {
            field.name: _as_lists(getattr(self, field.name))
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Reads the result of :meth:`to_json`.

        Args:
          content: Data that was read from JSON.

        Raises:
          TPPError: The data are something else.
        """
        try:
            own = {
                field.name: _as_tuples(content[field.name])
                for field in dataclasses.fields(cls)
            }
            own["shapes"] = tuple(TimedShape(*one) for one in own["shapes"])
            own["layers"] = tuple(
                TimedLayer(shape, tuple(Size(*size) for size in sizes), times)
                for shape, sizes, times in own["layers"]
            )
            own["measured"] = tuple(Measured(*one) for one in own["measured"])
            table = cls(**own)
            table.seconds({})
            complete = len(table.groups) == len(table.sizes) and table.dense_seconds > 0
        except (TypeError, KeyError, ValueError, IndexError) as error:
            raise TPPError(_NOT_READ) from error
        if not complete:
            raise TPPError(_NOT_READ)
        return table


def _as_lists(value: Any) -> Any:
    return [*map(_as_lists, value)] if isinstance(value, tuple) else value


def _as_tuples(value: Any) -> Any:
    return (*map(_as_tuples, value),) if isinstance(value, list) else value


def check_table(table: LatencyTable, groups: Groups) -> None:
    """Raises if times were measured with other groups.

    Raises:
      TPPError: The groups have other names or sizes.
      TPPTypeError: The argument is not a :class:`LatencyTable`.
    """
    if not isinstance(table, LatencyTable):
        raise TPPTypeError(
            f"the table is a {type(table).__name__}: pass the result of "
            "tpp_jax.latency_table(...)"
        )
    here = {group.name: group.size for group in groups}
    there = dict(zip(table.groups, table.sizes, strict=True))
    if here != there:
        differing = sorted(
            name
            for name in here.keys() | there.keys()
            if here.get(name) != there.get(name)
        )
        more = ", …" if len(differing) > 3 else ""
        raise TPPError(
            f"the latency table is that of other groups: {', '.join(differing[:3])}"
            f"{more} differ. Measure it with the groups that are planned"
        )
