"""Scores of filters that several devices hold: only the scores reach the host.

A criterion that JAX can trace runs where the weights are, as one program for each shape
of a kernel; the compiler adds what the devices need to exchange, which are sums over
filters. A function that needs NumPy arrays cannot be traced: its weights are copied to
the host, if one process can reach all of them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import is_divided, is_spread, placed, with_result_everywhere
from tpp_jax.graph.records import Member

Score = Callable[..., Any]


def scores_on_devices(
    score: Score, member: Member, arrays: Sequence[Any], *, pure: bool
) -> Float[np.ndarray, " n"] | None:
    """Returns the scores of the filters of a kernel that several devices hold.

    Args:
      score: Function of filters ``[n, d]``, and of their statistics, to scores ``[n]``.
      member: Axis of the kernel that the channels run along.
      arrays: Kernel, and statistics that can be broadcast to its shape.
      pure: Whether the function's results depend on its arguments alone, so that its
        program can be kept for kernels of equal shape.

    Returns:
      The scores, float64 or float32; None if the function cannot be traced.

    Raises:
      TPPError: It cannot be traced, and other processes hold parts of the kernel.
    """
    kernel, *statistics = arrays
    others = [_like_kernel(array, kernel) for array in statistics]
    positions = np.ascontiguousarray(member.positions)
    make = _program if pure else _program.__wrapped__
    program = make(
        score,
        member.axis,
        positions.shape,
        positions.tobytes(),
        positions.dtype.str,
        kernel.sharding,
    )
    try:
        with jax.enable_x64(True):  # as on the host, where sums are float64
            return np.asarray(program(kernel, *others))
    except Exception as error:  # a function that needs NumPy arrays raises any error
        if kernel.is_fully_addressable:
            return None
        raise TPPError(
            f"the criterion {getattr(score, '__name__', score)!r} cannot be traced, "
            f"and parts of {member.leaf} are in other processes: write it with "
            "jax.numpy"
        ) from error


def can_score(array: Any) -> bool:
    """Reports whether an array is scored on its devices."""
    return is_divided(array) and isinstance(array.sharding, NamedSharding)


def _like_kernel(array: Any, kernel: jax.Array) -> Any:
    """Returns a statistic of the kernel's shape divided as the kernel is."""
    if np.shape(array) == kernel.shape and not is_spread(array):
        return placed(array, kernel.sharding)
    return array


@functools.lru_cache(maxsize=512)
def _program(
    score: Score,
    axis: int,
    shape: tuple[int, int],
    positions: bytes,
    dtype: str,
    sharding: NamedSharding,
) -> Callable[..., Array]:
    """Returns a compiled function of a kernel and statistics to scores."""
    where = np.frombuffer(positions, dtype).reshape(shape)

    def scores(kernel: Array, *statistics: Array) -> Array:
        arrays = [kernel]
        arrays += [jnp.broadcast_to(one, kernel.shape) for one in statistics]
        return jnp.asarray(score(*(_rows(array, axis, where) for array in arrays)))

    return with_result_everywhere(scores, sharding)


def _rows(array: Array, axis: int, positions: np.ndarray) -> Float[Array, "n d"]:
    """Returns filters as rows; the order of the entries in a row is any.

    Positions at equal distances become axes of their own, since entries that are
    gathered along a divided axis would be moved between devices.
    """
    array = jnp.moveaxis(array, axis, 0)
    steps = _steps(positions.reshape(-1))
    if steps is None:
        rows = array[positions]
    else:
        major = sorted(steps, reverse=True)
        rows = array.reshape(*(count for _, count in major), *array.shape[1:])
        # Channels first, then the heads that are far apart, which devices divide.
        channels = _axes_of_channels(steps, len(positions))
        first = [major.index(step) for step in channels]
        others = [i for i in range(rows.ndim) if i not in first]
        rows = rows.transpose(*first, *others)
    rows = rows.reshape(len(positions), -1)
    return rows.astype(jnp.float32) if rows.dtype.itemsize < 4 else rows


def _axes_of_channels(steps: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Returns the steps, slowest first, that lead from channel to channel."""
    found, total = [], 1
    for step in reversed(steps):
        if total == size:
            break
        found.append(step)
        total *= step[1]
    return found


def _steps(order: np.ndarray) -> list[tuple[int, int]] | None:
    """Returns distances and numbers of the nested loops that give an order.

    Args:
      order: Permutation of the positions of an axis.

    Returns:
      The distance and the number of positions of each loop, the innermost first; None
      if there are no such loops.
    """
    steps: list[tuple[int, int]] = []
    if order[0] != 0:
        return None
    done = 1
    while done < order.size:
        step, count = int(order[done]), 1
        while count * done < order.size and order[count * done] == count * step:
            count += 1
        steps.append((step, count))
        done *= count
    total = np.zeros(1, int)
    for step, count in steps:
        total = (np.arange(count)[:, None] * step + total).reshape(-1)
    sizes = [count for _, count in sorted(steps)]
    distances = [step for step, _ in sorted(steps)]
    dense = distances == [int(np.prod(sizes[:i])) for i in range(len(sizes))]
    return steps if dense and np.array_equal(total, order) else None
