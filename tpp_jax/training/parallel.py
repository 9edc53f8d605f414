"""Programs for several devices: the only file that uses pmap and shard_map.

A step is written once, as a function of ``(state, ...)`` for one device, with
collectives over the axis named :data:`AXIS`. State and data are replicated; each device
processes its own share of the batch, chosen by its index on the axis. The axis runs
over the devices of all processes; a process passes and receives its own copies.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpp_jax.errors import TPPError
from tpp_jax.xla.convolution import compiler_options

AXIS = "batch"

Api = Literal["pmap", "shard_map"]
"""JAX's APIs for several devices; their results are the same."""

Device = Any
"""A ``jax.Device``. jaxlib has no stub of that class, so type checkers refuse its name
in annotations."""


def on_devices(
    fn: Callable[..., Any],
    devices: Sequence[Device],
    donate: int | None = None,
    split: int | None = None,
    accumulate: int = 1,
    api: Api = "pmap",
) -> Callable[..., Any]:
    """Compiles a per-device function for some devices.

    Args:
      fn: Function of pytrees that returns a replicated pytree. With several devices it
        runs under an axis named ``AXIS``; with one it is jitted without the axis.
      devices: Devices to run on, those of all processes.
      donate: Index of the argument whose buffers may be reused.
      split: Index of the argument whose arrays are split over the devices along their
        first axis; a process holds its own part. All other arguments are replicated.
      accumulate: Number of accumulated parts along that axis; each part is split over
        the devices.
      api: JAX's API for several devices.

    Returns:
      A function of the same arguments and results. Arguments should be placed by
      :func:`replicate` once, so that they are not copied at every call.
    """
    donated = () if donate is None else (donate,)
    if len(devices) == 1:
        return _jitted(fn, donated)

    n = len(_own(devices))
    compile_for = _pmapped if api == "pmap" else _shard_mapped
    compiled = functools.cache(
        lambda arity: compile_for(fn, devices, donated, split, arity)
    )

    def call(*args: Any) -> Any:
        given = list(args)
        if split is not None:
            order = [
                places_of(i, n, _length(args[split]), accumulate) for i in range(n)
            ]
            given[split] = jax.tree.map(lambda x: x[np.concatenate(order)], args[split])
        return compiled(len(args))(*given)

    return call


def _length(tree: Any) -> int:
    return len(jax.tree.leaves(tree)[0])


def _pmapped(
    fn: Callable[..., Any],
    devices: Sequence[Device],
    donated: tuple[int, ...],
    split: int | None,
    arity: int,
) -> Callable[..., Any]:
    def per_device(place: Any, *args: Any) -> Any:
        del place  # pmap needs a mapped argument; fn calls axis_index instead
        return fn(*args)

    n = len(_own(devices))
    mapped = jax.pmap(
        per_device,
        axis_name=AXIS,
        in_axes=(0, *(0 if i == split else None for i in range(arity))),
        out_axes=None,
        devices=list(devices),
        donate_argnums=tuple(i + 1 for i in donated),
    )

    def call(*args: Any) -> Any:
        given = list(args)
        if split is not None:
            given[split] = jax.tree.map(
                lambda x: x.reshape(n, -1, *x.shape[1:]), args[split]
            )
        return mapped(np.arange(n), *given)

    return call


def _shard_mapped(
    fn: Callable[..., Any],
    devices: Sequence[Device],
    donated: tuple[int, ...],
    split: int | None,
    arity: int,
) -> Callable[..., Any]:
    mesh = Mesh(np.asarray(devices), (AXIS,))
    mapped = jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=tuple(PartitionSpec(*[AXIS] * (i == split)) for i in range(arity)),
        out_specs=PartitionSpec(),
        check_vma=False,  # fn returns equal results on all devices
    )
    compiled = _jitted(mapped, donated)
    if jax.process_count() == 1:
        return compiled

    def call(*args: Any) -> Any:
        arrays = [
            jax.tree.map(lambda x, i=i: _global(x, mesh, i == split), arg)
            for i, arg in enumerate(args)
        ]
        return compiled(*arrays)

    return call


def _jitted(fn: Callable[..., Any], donated: tuple[int, ...]) -> Callable[..., Any]:
    return jax.jit(fn, donate_argnums=donated, compiler_options=compiler_options())


def _own(devices: Sequence[Device]) -> list[Device]:
    """Returns the devices of this process."""
    return [d for d in devices if d.process_index == jax.process_index()]


def _global(x: Any, mesh: Mesh, split: bool) -> Any:
    """Makes a global array from each process's part or full copy."""
    if split:
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        return jax.make_array_from_process_local_data(sharding, x)
    if not isinstance(x, jax.Array) or not x.is_fully_addressable:
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _global(jax.random.key_data(x), mesh, split)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    copies = [shard.data for shard in x.addressable_shards]
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_single_device_arrays(x.shape, sharding, copies)


def places_of(device: Any, n_devices: int, batch_size: int, accumulate: int) -> Any:
    """Returns the positions in the batch that one device processes, in order.

    A device gets an equal share of each accumulated part, so that the parts of all
    devices together are the parts of a single device.

    Args:
      device: Index of the device on the axis.
      n_devices: Number of devices on the axis.
      batch_size: Number of examples in the batch of these devices together.
      accumulate: Number of accumulated parts.

    Example:
      >>> places_of(device=1, n_devices=2, batch_size=8, accumulate=2).tolist()
      [2, 3, 6, 7]
    """
    share = batch_size // (n_devices * accumulate)
    starts = np.arange(accumulate)[:, None] * (batch_size // accumulate)
    return (starts + np.arange(share)).reshape(-1) + device * share


def replicate(tree: Any, devices: Sequence[Device]) -> Any:
    """Puts a copy of every array on every device of this process."""
    tree, own = local(tree), _own(devices)
    if len(devices) == 1:
        return jax.device_put(tree, devices[0])
    mesh = Mesh(np.asarray(own), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def local(tree: Any) -> Any:
    """Returns this process's copies of arrays that are replicated over processes."""
    return jax.tree.map(
        lambda x: (
            x.addressable_data(0)
            if isinstance(x, jax.Array) and not x.is_fully_addressable
            else x
        ),
        tree,
    )


def axis_name(devices: Sequence[Device]) -> str | None:
    """Returns the axis of a step's collectives; None for a single device."""
    return AXIS if len(devices) > 1 else None


def check_batch_size(
    batch_size: int,
    devices: Sequence[Device],
    accumulate: int = 1,
    pairs: bool = False,
    field: str = "config.data.batch_size",
) -> None:
    """Checks that the global batch splits evenly.

    Args:
      batch_size: Number of examples in the batch of all devices together.
      devices: Devices that the batch is split over.
      accumulate: Number of parts in which each device computes its share.
      pairs: Whether a part must hold an even number of images, as mixing needs.
      field: Where the batch size is set, for the message.

    Raises:
      TPPError: It does not.
    """
    n = len(devices) * accumulate * (2 if pairs else 1)
    if batch_size % n:
        near = max(batch_size // n, 1) * n, (batch_size // n + 1) * n
        over = f"{len(devices)} devices"
        if accumulate > 1:
            over += f" in {accumulate} parts each (config.accumulate)"
        over += " in pairs of images, which mixup and cutmix need" if pairs else ""
        raise TPPError(
            f"the batch of {batch_size} does not split over {over}: set "
            f"{field} to {near[0]} or {near[1]}"
        )
