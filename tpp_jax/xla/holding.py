"""Arrays that XLA computes once, where it would fuse and repeat their computation."""

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array


def held(x: Array) -> Array:
    """Returns the same array, which XLA then computes once and keeps.

    Otherwise XLA may fuse the computation of the array into each of its uses and repeat
    it there. The CPU backend does not fuse across a call that is not inlined; it drops
    ``lax.optimization_barrier`` before fusion.

    Args:
      x: Any array.
    """
    with set_xla_metadata(inlineable="false"):
        return _same(x)


@jax.jit
def _same(x: Array) -> Array:
    return jnp.copy(x)  # JAX removes the call of a function that does nothing
