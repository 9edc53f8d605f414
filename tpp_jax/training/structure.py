"""The structure of a model without its arrays, from which a step is compiled."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key


class Structure(NamedTuple):
    """A model without its arrays, in training or evaluation mode.

    It contains no shapes of parameters, so the dense and the sliced network share it.

    Attributes:
      graphdef: Structure of the modules.
      rngs: Shapes and types of the random streams (those of dropout, say), by path.
      local: Whether modules other than batch norms have floating-point numbers that are
        not trained. If a step changes them, they are those of a device's share.
    """

    graphdef: nnx.GraphDef
    rngs: tuple[tuple[tuple[Any, ...], jax.ShapeDtypeStruct], ...]
    local: bool

    def streams(self, key: Key[Array, ""] | None) -> list[nnx.State]:
        """Returns the random streams for ``nnx.merge``; none if there are none.

        Args:
          key: Key that they start from; None for evaluation, which draws no numbers.
        """
        if not self.rngs:
            return []
        key = jax.random.key(0) if key is None else key
        found: list[Any] = []
        for i, (path, like) in enumerate(self.rngs):
            value = jnp.zeros(like.shape, jnp.uint32)
            if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
                own = jax.random.fold_in(key, i)
                value = jax.random.split(own, like.shape) if like.shape else own
            found.append((path, value))
        return [nnx.from_flat_state(found)]


NOT_TRAINED = nnx.Not(nnx.Any(nnx.Param, nnx.RngState))
"""Filter of a model's statistics: its arrays that are neither trained nor random. They
are batch statistics, which a step renews, and constants such as rotary frequencies."""


def structure_of(model: nnx.Module, *, training: bool) -> Structure:
    """Returns the structure of a model in training or evaluation mode."""
    copy = nnx.merge(*nnx.split(model))
    copy.train() if training else copy.eval()
    graphdef, rngs, _ = nnx.split(copy, nnx.RngState, ...)
    streams = tuple(
        (path, jax.ShapeDtypeStruct(jnp.shape(x), x.dtype))
        for path, x in nnx.to_flat_state(rngs)
    )
    norms = {path for path, m in nnx.iter_modules(copy) if isinstance(m, nnx.BatchNorm)}
    local = any(
        path[:-1] not in norms and jnp.issubdtype(x.dtype, jnp.floating)
        for path, x in nnx.to_flat_state(nnx.state(copy, NOT_TRAINED))
    )
    return Structure(graphdef, streams, local)


def split(model: nnx.Module) -> tuple[nnx.State, nnx.State]:
    """Returns the parameters and the statistics of a model."""
    return nnx.state(model, nnx.Param), nnx.state(model, NOT_TRAINED)
