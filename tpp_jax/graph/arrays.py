"""Removing positions from an array, on the host or on any devices.

A NumPy array gives a NumPy array of the same dtype. A JAX array gives one on the same
device, or sharded over the same devices in the same way.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Bool, Int

from tpp_jax.errors import TPPError

Mask = Bool[Array | np.ndarray, " n"] | Bool[Array | np.ndarray, "steps n"]


class Positions(NamedTuple):
    """Some positions of an axis, such as those that are kept.

    Attributes:
      mask: True for these positions, bool ``[n]``; ``[steps, n]`` if each step of a
        loop over layers has its own.
      number: Number of these positions, the same in all steps.
      steps: Axis of the array that the loop goes through; None for a mask ``[n]``.
    """

    mask: Mask
    number: int
    steps: int | None = None

    def others(self) -> "Positions":
        """Returns the other positions of the axis."""
        return Positions(~self.mask, self.mask.shape[-1] - self.number, self.steps)

    def over(self, axis: int, axes: Sequence[int]) -> Any:
        """Returns the mask in a shape that broadcasts against an array.

        Args:
          axis: Axis that the positions are on.
          axes: Axes of the array, in order.
        """
        return spread(self.mask, axis, self.steps, axes)


def spread(values: Any, axis: int, steps: int | None, axes: Sequence[int]) -> Any:
    """Returns values along an axis in a shape that broadcasts against an array.

    Args:
      values: Array ``[n]``, or ``[steps, n]``.
      axis: Axis of the array that they lie along.
      steps: Axis that the loop goes through; None for ``[n]``.
      axes: Axes of the array, in order.
    """
    if steps is not None and axes.index(steps) > axes.index(axis):
        values = values.T
    sizes = iter(values.shape)
    return values.reshape([next(sizes) if i in (axis, steps) else 1 for i in axes])


Cuts = Mapping[int, Positions]
"""Axis → its positions that are kept."""

_BLOCK = 1 << 26  # bytes that the devices of several processes exchange at once


def fitting(sharding: Sharding, shape: tuple[int, ...]) -> Sharding | None:
    """Returns a sharding for the cut form of an array.

    Axes of the mesh that do not divide their axis of the cut array are left out, so
    that the array is replicated along them.

    Args:
      sharding: Sharding of the uncut array.
      shape: Shape of the cut array, with as many axes.

    Returns:
      The sharding; None if it does not fit and is not a ``NamedSharding``.
    """
    if not isinstance(sharding, NamedSharding):
        try:
            sharding.shard_shape(shape)
        except ValueError:
            return None
        return sharding
    return _fitting_named(sharding, shape)


def _fitting_named(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    spec = []
    for size, entry in itertools.zip_longest(shape, sharding.spec):
        if entry is None or entry is PartitionSpec.UNCONSTRAINED:
            spec.append(entry)
            continue
        names = entry if isinstance(entry, tuple) else (entry,)
        sizes = [sharding.mesh.shape[name] for name in names]
        fits = [size % math.prod(sizes[:i]) == 0 for i in range(len(names) + 1)]
        most = max(i for i, fit in enumerate(fits) if fit)
        spec.append(entry if most == len(names) else names[:most] or None)
    return sharding.update(spec=PartitionSpec(*spec[: len(sharding.spec)]))


def is_explicit(array: Any) -> bool:
    """Reports whether an array's type includes its sharding (explicit mesh axes)."""
    mesh = jax.typeof(array).sharding.mesh
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def is_spread(array: Any) -> bool:
    """Reports whether several devices hold an array, or parts of it."""
    if not isinstance(array, jax.Array) or isinstance(array, Tracer):
        return False
    return len(array.sharding.device_set) > 1


def is_divided(array: Any) -> bool:
    """Reports whether no device holds an array as a unit."""
    return is_spread(array) and not array.is_fully_replicated


def with_result_everywhere(
    fn: Callable[..., Array], sharding: Sharding
) -> Callable[..., Array]:
    """Returns a compiled function of divided arrays, whose result is on every device.

    The compiler decides how what is in between is divided, on explicit axes too.

    Args:
      fn: Function of arrays to an array.
      sharding: Sharding of one of the arguments.
    """
    if not isinstance(sharding, NamedSharding):
        return jax.jit(fn)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    function: Any = fn
    if AxisType.Explicit in sharding.mesh.axis_types:
        function = jax.sharding.auto_axes(fn, out_sharding=everywhere)
    return jax.jit(function, out_shardings=everywhere)


Shardings = Sharding | Callable[[str, tuple[int, ...]], Sharding | None]
"""Sharding for all arrays, or function of the name and shape of an array to its own.

Axes of a mesh that do not divide an array, or that it does not have, are left out.
"""


def sharding_for(
    shardings: Shardings | None, name: str, shape: tuple[int, ...]
) -> Sharding | None:
    """Returns the sharding of one array; None for the default device.

    Args:
      shardings: Sharding, or function that gives one for each array; None for none.
      name: Name of the array.
      shape: Its shape.

    Raises:
      TPPError: It is neither, or does not fit the array.
    """
    found: Any = shardings
    if callable(shardings):
        found = shardings(name, shape)
    elif isinstance(shardings, NamedSharding):
        spec = PartitionSpec(*shardings.spec[: len(shape)])
        found = shardings.update(spec=spec)
    if found is None:
        return None
    if not isinstance(found, Sharding):
        raise TPPError(
            f"the sharding of {name} is {found!r}: give a jax.sharding.Sharding, or a "
            "function (name, shape) that returns one"
        )
    if isinstance(found, NamedSharding) and len(found.spec) > len(shape):
        raise TPPError(
            f"the sharding of {name} has the spec {found.spec}, which has more axes "
            f"than its shape {shape}"
        )
    fitted = fitting(found, shape)
    if fitted is None:
        raise TPPError(f"the sharding of {name} does not divide its shape {shape}")
    return fitted


def placed(array: Any, sharding: Sharding | None) -> jax.Array:
    """Returns a JAX array of host data, of which each device gets its part.

    Args:
      array: NumPy array, the same in all processes.
      sharding: Sharding; None for the default device.
    """
    if sharding is None:
        return jnp.asarray(array)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def on_host(array: Any) -> np.ndarray:
    """Returns a copy of an array on the host, for what has to be computed there.

    If other processes hold parts of it, all processes must call this; the devices
    exchange a block of rows at a time.

    Args:
      array: Array on any devices.
    """
    remote = isinstance(array, jax.Array) and not array.is_fully_addressable
    if not remote or array.is_fully_replicated:
        return np.asarray(array)
    rows = max(_BLOCK * array.shape[0] // max(array.nbytes, 1), 1)
    blocks = []
    with jax.enable_x64(True):
        for start in range(0, array.shape[0], rows):
            size = min(rows, array.shape[0] - start)
            blocks.append(np.asarray(_rows(size, array.sharding)(array, start)))
    return np.concatenate(blocks)


@functools.lru_cache(maxsize=512)
def _rows(size: int, sharding: Sharding) -> Callable[..., Array]:
    """Returns a compiled function of an array to some rows, on every device."""

    def rows(array: Array, start: Int[Array, ""]) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, start, size)

    return with_result_everywhere(rows, sharding)


def cut(array: Any, cuts: Cuts) -> Any:
    """Returns an array without its pruned positions.

    Args:
      array: NumPy or JAX array, possibly traced, or a ``jax.ShapeDtypeStruct``.
      cuts: Positions that are kept along some axes; the masks may be traced.

    Returns:
      An array of the same type and dtype, with a sharding as of :func:`fitting`. A JAX
      array on a single device gives a NumPy array, for :func:`put_back`.
    """
    if not cuts:
        return array
    shape = tuple(cuts[i].number if i in cuts else n for i, n in enumerate(array.shape))
    if isinstance(array, jax.ShapeDtypeStruct):
        sharding = array.sharding and fitting(array.sharding, shape)
        return array.update(shape=shape, sharding=sharding)
    places = {axis: _positions(kept) for axis, kept in cuts.items()}
    steps = tuple((axis, kept.steps) for axis, kept in cuts.items())
    if any(isinstance(x, Tracer) for x in (array, *places.values())):
        return _taken(jnp.asarray(array), places, steps)
    if isinstance(array, jax.Array) and not _on_host(array):
        return _gather(fitting(array.sharding, shape), steps)(array, places)
    for axis, kept in cuts.items():
        # On the host, since a device would compile a program for every new shape.
        array = np.asarray(array)
        if kept.steps is None:
            array = np.take(array, places[axis], axis=axis)
        else:
            index = spread(places[axis], axis, kept.steps, range(array.ndim))
            array = np.take_along_axis(array, index, axis=axis)
    return array


def _positions(kept: Positions) -> Any:
    """Returns the kept positions, int ``[number]`` or ``[steps, number]``."""
    mask, number, steps = kept
    if isinstance(mask, np.ndarray):
        return np.nonzero(mask)[-1].reshape(*mask.shape[:-1], number)
    if steps is None:
        return jnp.nonzero(mask, size=number)[0]
    return jax.vmap(lambda own: jnp.nonzero(own, size=number)[0])(mask)


def put_back(arrays: list[Any], originals: list[Any]) -> list[Any]:
    """Moves cut arrays to the devices of the originals, and copies uncut ones.

    Args:
      arrays: Leaves of the pruned tree, from :func:`cut`.
      originals: Leaves that they were cut from, in the same order.

    Returns:
      Leaves that share no memory with the originals, so that they may be donated or
      changed in place. Immutable objects (Python's numbers, strings, functions) are
      returned themselves.
    """
    arrays = list(arrays)
    moving: list[int] = []
    places: list[Any] = []
    for i, (array, original) in enumerate(zip(arrays, originals, strict=True)):
        if isinstance(array, Tracer):
            continue
        if isinstance(original, jax.Array) and isinstance(array, np.ndarray):
            moving.append(i)
            places.append(original.sharding if original.committed else None)
        elif array is original and isinstance(array, jax.Array):
            if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
                arrays[i] = _copied_key(array)
            elif array.is_fully_addressable:
                moving.append(i)
                places.append(None)
            else:
                arrays[i] = _gather(array.sharding)(array, {})
        elif array is original and isinstance(array, np.ndarray):
            arrays[i] = array.copy() if array.flags.writeable else array
    # In one call, and not by jnp.array, which compiles a copy for every new shape.
    moved = jax.device_put([arrays[i] for i in moving], places, may_alias=False)
    for i, array in zip(moving, moved, strict=True):
        arrays[i] = array
    return arrays


def delete(leaf: Any) -> None:
    """Frees the memory of a JAX array that is not traced; does nothing with others."""
    if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
        leaf.delete()


def buffer_of(leaf: Any) -> int:
    """Returns a number for the memory of a leaf, which several arrays may share.

    That of an array on several devices is the array's own: asking for its parts would
    make arrays of them.
    """
    if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
        return id(leaf)
    extended = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    if extended or leaf.is_deleted() or is_spread(leaf):
        return id(leaf)
    return leaf.unsafe_buffer_pointer()


def _copied_key(key: jax.Array) -> jax.Array:
    """Returns a copy of a random key.

    A key may have the sharding of its data, which has one axis more, so that
    ``jax.device_put`` of the key itself fails.
    """
    numbers = jax.device_put(jax.random.key_data(key), may_alias=False)
    return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(key))


def _on_host(array: jax.Array) -> bool:
    """Reports whether an array is cut on the host: whether it is on a single device."""
    extended = jnp.issubdtype(array.dtype, jax.dtypes.extended)
    return len(array.sharding.device_set) == 1 and not extended


@functools.lru_cache(maxsize=512)
def _gather(
    sharding: Sharding | None, steps: tuple[tuple[int, int | None], ...] = ()
) -> Callable[..., Array]:
    """Returns a compiled :func:`_taken` whose result has the given sharding."""

    def gather(array: Array, kept: dict[int, Int[Array, "..."]]) -> Array:
        return _taken(array, kept, steps) if kept else jnp.copy(array)

    return jax.jit(gather, out_shardings=sharding)


def _taken(
    array: Array, kept: Mapping[int, Any], steps: tuple[tuple[int, int | None], ...]
) -> Array:
    """Takes the kept positions along axes, on the devices that hold the array."""
    loops = dict(steps)
    for axis, positions in kept.items():
        if (loop := loops[axis]) is None:
            array = taken_along(array, axis, positions)
            continue
        inner = axis - (axis > loop)
        own = functools.partial(taken_along, axis=inner)
        array = jax.vmap(
            lambda layer, there, own=own: own(layer, positions=there),
            in_axes=(loop, 0),
            out_axes=loop,
        )(array, positions)
    return array


def taken_along(array: Array, axis: int, positions: Any) -> Array:
    """Takes ascending positions along an axis, on the devices that hold the array."""
    sharding = None
    if is_explicit(array):
        shape = (*array.shape[:axis], len(positions), *array.shape[axis + 1 :])
        sharding = _fitting_named(jax.typeof(array).sharding, shape)
    return array.at[(slice(None),) * axis + (positions,)].get(
        mode="promise_in_bounds",
        indices_are_sorted=True,
        unique_indices=True,
        out_sharding=sharding,
    )
