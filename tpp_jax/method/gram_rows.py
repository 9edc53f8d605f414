"""Gram penalties from the rows of pruned filters alone.

Of the N² entries of a Gram matrix, the penalties of TPP need those in the rows and
columns of the P pruned filters. From W_P Wᵀ, which has P rows, the gradient takes three
products of P·N·D multiplications in place of two of N·N·D, which pays up to half of the
filters. Of what is divided over devices, only the pruned filters are gathered.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from tpp_jax.graph.arrays import is_explicit, taken_along
from tpp_jax.method.gram import Target


def few_rows(
    kernel: Array,
    count: int,
    target: Target,
    filters: Sequence[int],
    batch: Sequence[int],
) -> bool:
    """Reports whether the rows of pruned filters take less than the entire matrix.

    Args:
      kernel: Kernel of the layer.
      count: Number of filters to prune.
      target: Target of the Gram matrix.
      filters: Axes of the kernel that together index its filters.
      batch: Axes along which separate kernels are stacked.
    """
    if target not in ("decorrelate", "relative") or len(filters) != 1:
        return False
    if batch and is_explicit(kernel):
        return False
    return 0 < 2 * count <= kernel.shape[filters[0]]


def rows_penalty_and_grad(
    kernel: Float[Array, "..."],
    pruned: Bool[Array, "..."],
    count: int,
    target: Target,
    axis: int,
    batch: Sequence[int] = (),
) -> tuple[Float[Array, ""], Float[Array, "..."]]:
    """Returns what :func:`tpp_jax.method.gram.gram_penalty_and_grad` returns.

    Args:
      kernel: Kernel of the layer.
      pruned: Mask of the filters to prune, ``[n]`` or ``[*batch, n]``.
      count: Number of filters to prune, of each kernel.
      target: ``"decorrelate"`` or ``"relative"``.
      axis: Axis of the filters.
      batch: Axes along which separate kernels are stacked, ascending; their penalties
        are summed.
    """
    kernel = jnp.asarray(kernel)
    if not batch:
        return _of_one(kernel, pruned, count, target, axis)
    first, *rest = batch
    inner = functools.partial(
        rows_penalty_and_grad,
        count=count,
        target=target,
        axis=axis - (axis > first),
        batch=[i - 1 for i in rest],
    )
    masks = 0 if pruned.ndim > 1 else None
    penalties, grads = jax.vmap(inner, in_axes=(first, masks), out_axes=(0, first))(
        kernel, pruned
    )
    return jnp.sum(penalties), grads


def _of_one(
    kernel: Array, pruned: Array, count: int, target: Target, axis: int
) -> tuple[Array, Array]:
    """Returns the penalty of one kernel and its gradient."""
    rank, n = kernel.ndim, kernel.shape[axis]
    inputs = tuple(i for i in range(rank) if i != axis)
    places: Int[Array, " p"] = jnp.nonzero(pruned, size=count)[0]
    own = taken_along(kernel, axis, places)
    spec = _spec(kernel)
    rows = jax.lax.dot_general(
        own, kernel, ((inputs, inputs), ((), ())), out_sharding=spec(None, axis)
    )
    of_kept = jnp.where(pruned, 0, rows)
    grad = jax.lax.dot_general(
        own, rows, (((axis,), (0,)), ((), ())), out_sharding=spec(*inputs, axis)
    )
    of_pruned = jax.lax.dot_general(
        kernel, of_kept, (((axis,), (1,)), ((), ())), out_sharding=spec(*inputs, None)
    )
    if axis != rank - 1:
        grad, of_pruned = (jnp.moveaxis(x, -1, axis) for x in (grad, of_pruned))
    # Gathered, since XLA:CPU adds columns to columns one number after the other.
    nearest = jnp.maximum(jnp.cumsum(pruned) - 1, 0)
    spread = of_pruned.at[(slice(None),) * axis + (nearest,)].get(
        mode="promise_in_bounds",
        indices_are_sorted=True,
        out_sharding=spec(*range(rank)),
    )
    shape = [n if i == axis else 1 for i in range(rank)]
    grad = grad + jnp.where(pruned.reshape(shape), spread, 0)
    energy = jnp.sum(jnp.square(rows)) + jnp.sum(jnp.square(of_kept))
    if target == "decorrelate":
        return energy / n**2, 4 / n**2 * grad
    squares = jnp.square(jnp.where(pruned.reshape(shape), 0, kernel))
    mean = jnp.sum(squares) / max(n - count, 1)
    mean = jnp.where(mean > 0, mean, 1)
    return energy / (4 * mean), grad / mean


def _spec(kernel: Array) -> Any:
    """Returns a function from axes of the kernel to a sharding of these."""
    explicit = is_explicit(kernel)

    def of(*axes: int | None) -> Any:
        if not explicit:
            return None
        sharding = jax.typeof(kernel).sharding
        spec = (*sharding.spec, *[None] * kernel.ndim)
        parts = (None if axis is None else spec[axis] for axis in axes)
        return sharding.update(spec=PartitionSpec(*parts))

    return of
