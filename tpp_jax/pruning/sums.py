"""Sums over rows of features, from which their moments follow.

Matrices of products are symmetric. Where they are computed and added up, a matrix is a
tuple of *strips*: some of its rows, from the diagonal on. So three fifths of a wide
matrix are computed, moved and kept.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tpp_jax.xla.holding import held

# Most rows of a strip: narrower products take XLA longer than they save.
_STRIP = 384

Strips = tuple[Float[Array, "some rest"], ...]


class Sums(NamedTuple):
    """Sums over rows from which moments follow; float, on the device or the host.

    Attributes:
      rows: Number of rows, ``[stacks]``.
      mean: Mean of each feature, ``[stacks, features]``.
      scatter: Sum of the products of the centred features: strips ``[stacks, some,
        rest]``, or from :func:`filled` on ``[stacks, features, features]``. Or that of
        their squares, ``[stacks, features]``.
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
    # The sums have several passes: none shall repeat the computation of the rows.
    rows = held(rows.astype(jnp.promote_types(rows.dtype, jnp.float32)))
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
    return Sums(count, mean, gram(centred))


def gram(rows: Float[Array, "rows features"]) -> Strips:
    """Returns the products of features, summed over rows, as strips."""
    n = rows.shape[-1]
    width = -(-n // -(-n // _STRIP))
    return tuple(
        jax.lax.dot_general(
            rows[:, start : start + width],
            rows[:, start:],
            (((0,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )
        for start in range(0, n, width)
    )


def filled(sums: Sums) -> Sums:
    """Returns sums on the host with all entries of their matrices."""
    if not isinstance(sums.scatter, tuple):
        return sums
    stacks, n = sums.mean.shape
    scatter = np.empty((stacks, n, n), sums.mean.dtype)
    start = 0
    for strip in sums.scatter:
        stop = start + strip.shape[1]
        scatter[:, start:stop, start:] = strip
        scatter[:, stop:, start:stop] = strip[:, :, stop - start :].swapaxes(1, 2)
        start = stop
    return sums._replace(scatter=scatter)


def merge(one: Sums, other: Sums) -> Sums:
    """Returns the sums over the rows of both (Chan et al. 1979)."""
    rows = one.rows + other.rows
    share = other.rows / (rows + (rows == 0))
    apart = other.mean - one.mean
    between = _products((one.rows * share)[:, None] * apart, apart, one.scatter)
    scatter = jax.tree.map(
        lambda own, more, also: own + more + also, one.scatter, other.scatter, between
    )
    return Sums(rows, one.mean + share[:, None] * apart, scatter)


def combined(parts: Sums) -> Sums:
    """Returns the sums over the rows of all parts, which the first axis numbers."""
    share = parts.rows / jnp.maximum(parts.rows.sum(0), 1)
    mean = jnp.sum(share[..., None] * parts.mean, axis=0)
    apart = parts.mean - mean
    weighted = parts.rows[..., None] * apart
    between = jax.vmap(_products)(weighted, apart, parts.scatter)
    scatter = jax.tree.map(
        lambda own, more: (own + more).sum(0), parts.scatter, between
    )
    return Sums(parts.rows.sum(0), mean, scatter)


def _products(one: Any, other: Any, like: Any) -> Any:
    """Returns products of features, ``[stacks, features]``, in the form of others."""
    if not isinstance(like, tuple):
        squares = like.ndim == one.ndim
        return one * other if squares else one[:, :, None] * other[:, None, :]
    ends = np.cumsum([0, *(strip.shape[1] for strip in like)])
    return tuple(
        one[:, start:stop, None] * other[:, None, start:]
        for start, stop in itertools.pairwise(ends)
    )
