"""Sums over rows of features, from which their moments follow."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_EXACT = jax.lax.Precision.HIGHEST
_WIDE = 512


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


def sums_of(
    rows: Float[Array, "stacks rows features"],
    diagonal: bool,
    used: Bool[Array, "stacks rows"] | None = None,
) -> Sums:
    """Returns the sums of rows; products are centred, so that float32 is enough.

    Args:
      rows: Rows of features.
      diagonal: Whether only squares are summed up.
      used: Whether a row is one of a stack; the same rows are then offered to all.
    """
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    if used is None:
        used = jnp.ones(rows.shape[1], rows.dtype)
        return jax.vmap(lambda own: _sums(own, used, diagonal))(rows)
    # One stack at a time: all experts' rows at once may not fit.
    return jax.lax.map(
        lambda own: _sums(rows[0], own.astype(rows.dtype), diagonal), used
    )


def _sums(
    rows: Float[Array, "rows features"], used: Float[Array, " rows"], diagonal: bool
) -> Sums:
    """Returns the sums of the used rows of one stack."""
    count = used.sum()
    mean = jnp.sum(rows * used[:, None], axis=0) / jnp.maximum(count, 1)
    centred = (rows - mean) * used[:, None]
    if diagonal:
        return Sums(count, mean, jnp.sum(jnp.square(centred), axis=0))
    return Sums(count, mean, gram(centred[None])[0])


def gram(
    rows: Float[Array, "stacks rows features"],
) -> Float[Array, "stacks features features"]:
    """Returns the products of features, summed over rows.

    Wide matrices are halved: the block above the diagonal serves for that below it.
    """
    width = rows.shape[-1]
    if width < _WIDE:
        return jnp.matmul(rows.swapaxes(1, 2), rows, precision=_EXACT)
    one, other = jnp.split(rows, [width // 2], axis=-1)
    across = jnp.matmul(one.swapaxes(1, 2), other, precision=_EXACT)
    upper = jnp.concatenate([gram(one), across], axis=2)
    lower = jnp.concatenate([across.swapaxes(1, 2), gram(other)], axis=2)
    return jnp.concatenate([upper, lower], axis=1)


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


def combined(parts: Sums) -> Sums:
    """Returns the sums over the rows of all parts, which the first axis numbers."""
    share = parts.rows / jnp.maximum(parts.rows.sum(0), 1)
    mean = jnp.sum(share[..., None] * parts.mean, axis=0)
    apart = parts.mean - mean
    weighted = parts.rows[..., None] * apart
    if parts.scatter.ndim == parts.mean.ndim:
        between = jnp.sum(weighted * apart, axis=0)
    else:
        between = jnp.einsum("psf,psg->sfg", weighted, apart, precision=_EXACT)
    return Sums(parts.rows.sum(0), mean, parts.scatter.sum(0) + between)
