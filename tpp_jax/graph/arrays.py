"""Cutting positions out of one array, wherever it lives and whatever kind it is.

What is a NumPy array comes back as one, of the same dtype. A JAX array comes back where
it was: on its device, or on those that it was sharded over, by the same rule.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

Cuts = Mapping[int, tuple[Any, int]]  # axis → (bool mask of what stays, how many stay)


def fitting(sharding: Sharding, shape: tuple[int, ...]) -> Sharding | None:
    """Returns a sharding for an array of another shape.

    It is the same, but for axes of the mesh that do not divide their axis of the array:
    these are left out, so that the array is replicated along them.

    Args:
      sharding: of the uncut array, of as many axes.
      shape: of the cut array.

    Returns:
      The sharding; None for one that is not made of named axes and does not fit.
    """
    if not isinstance(sharding, NamedSharding):
        try:
            sharding.shard_shape(shape)
        except ValueError:
            return None
        return sharding
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
    """Tells whether an array's type says how it is sharded (explicit mesh axes)."""
    mesh = jax.typeof(array).sharding.mesh
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def cut(array: Any, cuts: Cuts) -> Any:
    """Returns an array without what does not stay.

    Args:
      array: a NumPy or JAX array, perhaps traced, or a ``jax.ShapeDtypeStruct``.
      cuts: what stays of which axes; may be traced.

    Returns:
      The same kind of array with the same dtype and sharding (see :func:`fitting`); a
      NumPy array for one of a single device, to be put there by :func:`put_back`.
    """
    if not cuts:
        return array
    shape = tuple(cuts[i][1] if i in cuts else n for i, n in enumerate(array.shape))
    if isinstance(array, jax.ShapeDtypeStruct):
        sharding = array.sharding and fitting(array.sharding, shape)
        return array.update(shape=shape, sharding=sharding)
    stays = {
        axis: np.flatnonzero(mask)
        if isinstance(mask, np.ndarray)
        else jnp.nonzero(mask, size=count)[0]
        for axis, (mask, count) in cuts.items()
    }
    if any(isinstance(x, jax.core.Tracer) for x in (array, *stays.values())):
        return _taken(jnp.asarray(array), stays)
    if isinstance(array, jax.Array) and not _on_host(array):
        return _gather(fitting(array.sharding, shape))(array, stays)
    for axis, positions in stays.items():
        # On the host: on a device every new shape would be compiled for.
        array = np.take(np.asarray(array), positions, axis=axis)
    return array


def put_back(arrays: list[Any], originals: list[Any]) -> list[Any]:
    """Puts what was cut back to where it came from, and copies what was not cut.

    Args:
      arrays: leaves of the pruned tree, from :func:`cut`.
      originals: the leaves that they came from, in the same order.

    Returns:
      Leaves that share no memory with the originals, so that they may be donated or
      changed in place. What cannot be changed (Python's numbers, strings, functions) is
      the same object.
    """
    arrays = list(arrays)
    moving: list[int] = []
    places: list[Any] = []
    for i, (array, original) in enumerate(zip(arrays, originals, strict=True)):
        if isinstance(array, jax.core.Tracer):
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
    # All at once, and not by jnp.array, which compiles a copy for every new shape.
    moved = jax.device_put([arrays[i] for i in moving], places, may_alias=False)
    for i, array in zip(moving, moved, strict=True):
        arrays[i] = array
    return arrays


def _copied_key(key: jax.Array) -> jax.Array:
    """Returns the same random key in memory of its own.

    A key may have the sharding of its numbers, which have an axis more: it cannot be
    put anywhere as it is.
    """
    numbers = jax.device_put(jax.random.key_data(key), may_alias=False)
    return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(key))


def _on_host(array: jax.Array) -> bool:
    """Tells whether an array is to be cut on the host: one of a single device is."""
    extended = jnp.issubdtype(array.dtype, jax.dtypes.extended)
    return len(array.sharding.device_set) == 1 and not extended


@functools.lru_cache(maxsize=512)
def _gather(sharding: Sharding | None) -> Any:
    """Returns a compiled :func:`_taken` whose result is sharded as is said."""

    def gather(array: Any, stays: dict[int, Any]) -> Any:
        return _taken(array, stays) if stays else jnp.copy(array)

    return jax.jit(gather, out_shardings=sharding)


def _taken(array: Any, stays: dict[int, Any]) -> Any:
    """Takes positions along axes, on the devices that hold the array."""
    for axis, positions in stays.items():
        where = (slice(None),) * axis + (positions,)
        sharding = None
        if is_explicit(array):
            shape = (*array.shape[:axis], len(positions), *array.shape[axis + 1 :])
            sharding = fitting(jax.typeof(array).sharding, shape)
        array = array.at[where].get(
            mode="promise_in_bounds",
            indices_are_sorted=True,
            unique_indices=True,
            out_sharding=sharding,
        )
    return array
