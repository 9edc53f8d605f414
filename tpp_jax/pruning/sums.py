"""Sums over rows of features, from which their moments follow."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Sums(NamedTuple):
    """Sums over rows from which moments follow; float, on the device or the host.

    Attributes:
      rows: Number of rows, ``[stacks]``.
      mean: Mean of each feature, ``[stacks, features]``.
      scatter: Sum of the products of the centred features, ``[stacks, features,
        features]``, or that of their squares, ``[stacks, features]``.
    """

    rows: Any
    mean: Any
    scatter: Any


def sums_of(rows: Float[Array, "stacks rows features"], diagonal: bool) -> Sums:
    """Returns the sums of rows; products are centred, so that float32 is enough."""
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    stacks, count, _ = rows.shape
    mean = rows.sum(1) / max(count, 1)
    centred = rows - mean[:, None]
    if diagonal:
        scatter = jnp.sum(jnp.square(centred), axis=1)
    else:
        product = "srf,srg->sfg"
        highest = jax.lax.Precision.HIGHEST
        scatter = jnp.einsum(product, centred, centred, precision=highest)
    return Sums(jnp.full(stacks, count, rows.dtype), mean, scatter)


def merge(one: Sums, other: Sums) -> Sums:
    """Returns the sums over the rows of both (Chan et al. 1979)."""
    rows = one.rows + other.rows
    share = other.rows / (rows + (rows == 0))
    apart = other.mean - one.mean
    weight = one.rows * share
    if one.scatter.ndim == one.mean.ndim:
        between = weight[:, None] * apart**2
    else:
        between = weight[:, None, None] * (apart[:, :, None] * apart[:, None, :])
    return Sums(
        rows,
        one.mean + share[:, None] * apart,
        one.scatter + other.scatter + between,
    )
