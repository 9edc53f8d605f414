"""Where a per-device function meets the devices: the only file that knows of pmap.

A step is written once, as a function of ``(state, ...)`` for one device, with
collectives over the axis named :data:`AXIS`. State and data are replicated; each device
works on its own share of the batch, which it picks by its place on the axis.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpp_jax.errors import TPPError

AXIS = "batch"


def on_devices(
    fn: Callable[..., Any], devices: Sequence[jax.Device], donate: int | None = None
) -> Callable[..., Any]:
    """Compiles a per-device function for some devices of this process.

    Args:
      fn: takes replicated pytrees and returns a replicated pytree. With several devices
        it runs under an axis named ``AXIS``; with one it is jitted without the axis.
      devices: what to run on.
      donate: index of the argument whose buffers may be reused.

    Returns:
      A function of the same arguments and results. Arguments should be placed by
      :func:`replicate` once, lest they be copied at every call.
    """
    donated = () if donate is None else (donate,)
    if len(devices) == 1:
        return jax.jit(fn, donate_argnums=donated)

    def per_device(place: Any, *args: Any) -> Any:
        del place  # pmap wants one mapped argument; fn asks axis_index instead
        return fn(*args)

    places = np.arange(len(devices))

    def call(*args: Any) -> Any:
        return compiled(len(args))(places, *args)

    cache: dict[int, Callable[..., Any]] = {}

    def compiled(arity: int) -> Callable[..., Any]:
        if arity not in cache:
            cache[arity] = jax.pmap(
                per_device,
                axis_name=AXIS,
                in_axes=(0, *(None,) * arity),
                out_axes=None,
                devices=list(devices),
                donate_argnums=tuple(i + 1 for i in donated),
            )
        return cache[arity]

    return call


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Puts a copy of every array on every device."""
    if len(devices) == 1:
        return jax.device_put(tree, devices[0])
    mesh = Mesh(np.asarray(devices), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def axis_name(devices: Sequence[jax.Device]) -> str | None:
    """Returns the axis that a step's collectives run over, None for a single device."""
    return AXIS if len(devices) > 1 else None


def check_batch_size(batch_size: int, devices: Sequence[jax.Device]) -> None:
    """Raises a TPPError unless the global batch splits evenly over the devices."""
    n = len(devices)
    if batch_size % n:
        near = max(batch_size // n, 1) * n, (batch_size // n + 1) * n
        raise TPPError(
            f"the batch of {batch_size} does not split over {n} devices: set "
            f"--config.data.batch_size to {near[0]} or {near[1]}"
        )
