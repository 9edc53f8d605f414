"""Checksums of arrays, whole or held by devices in parts.

The words of an array (its bits, as 32-bit numbers) are added up, each times an odd
number that follows from its place: modulo 2³², so that the sum is exact in any order.
A flipped bit changes it. Devices add up their own parts, and only the sums are
exchanged; on the host the same sum is made of the same array.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tpp_jax.graph.arrays import is_divided, with_result_everywhere

_BLOCK = 1 << 20  # words that are added up at once on the host
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def content_sum(array: Any) -> int:
    """Returns the checksum of an array; the same for NumPy and divided arrays.

    Args:
      array: NumPy array, or JAX array of the same number types.
    """
    if is_divided(array):
        return int(_program(array.sharding)(array))
    array = np.ascontiguousarray(array)
    words = array.reshape(-1).view(f"u{min(array.itemsize, 4)}")
    total = np.uint32(0)
    for start in range(0, words.size, _BLOCK):
        block = words[start : start + _BLOCK].astype(np.uint32)
        places = np.arange(start, start + block.size, dtype=np.uint64)
        factors = (2 * places + 1).astype(np.uint32)
        total += np.sum(block * factors, dtype=np.uint32)
    return int(total)


@functools.lru_cache(maxsize=128)
def _program(sharding: Any) -> Callable[[Array], Array]:
    return with_result_everywhere(_sum, sharding)


def _sum(array: Array) -> Array:
    words = _words(array)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        own = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * np.uint32(size % 2**32) + own
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def _words(array: Array) -> Array:
    """Returns the bits of each entry, uint32; several words on an axis of their own."""
    if array.dtype == bool:
        return array.astype(jnp.uint32)
    if jnp.iscomplexobj(array):
        parts = [_words(array.real), _words(array.imag)]
        stacked = jnp.stack(parts, axis=array.ndim)
        return stacked.reshape(*array.shape, -1)
    word = _UNSIGNED.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
