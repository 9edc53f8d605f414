"""A small decoder whose arrays are divided over a mesh, and the same on one device."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tpp_jax.graph.naming import map_named
from tpp_jax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocabulary=64,
    width=32,
    depth=2,
    heads=8,
    kv_heads=4,
    head_size=4,
    hidden=64,
    tied=True,
)
RATIOS = {"*gate_proj": 0.5, "*q_proj": 0.0}
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocabulary, (8, 16))

# Columns of the first layers and rows of the second ones, as in Megatron-LM.
_SPECS = {
    "embed_tokens.embedding": P("model"),
    **{f"{name}_proj.kernel": P(None, "model") for name in ("q", "k", "v")},
    "gate_proj.kernel": P("data", "model"),
    "up_proj.kernel": P(None, "model"),
    "o_proj.kernel": P("model"),
    "down_proj.kernel": P("model"),
}


class Case(NamedTuple):
    """A model as a function, its parameters and tokens, and its loss."""

    fn: object
    params: object
    tokens: object
    loss: object
    mesh: object = None

    def placed(self, tree):
        """Returns a tree whose scalars are on all devices of the mesh."""
        if self.mesh is None:
            return tree
        everywhere = NamedSharding(self.mesh, P())
        return jax.tree.map(lambda x: x if x.ndim else place(x, everywhere), tree)


@functools.cache
def parts():
    """The structure and the arrays of the decoder, on one device."""
    return nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))


def call(params, tokens):
    """The decoder as a function of its arrays."""
    return nnx.merge(parts()[0], params)(tokens)


def cross_entropy(logits, tokens):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
    )
    return jnp.mean(losses)


def spec_of(name, shape):
    """The division of a parameter, by the end of its name."""
    del shape
    return next((spec for end, spec in _SPECS.items() if name.endswith(end)), P())


@functools.cache
def on_one_device():
    return Case(call, parts()[1], TOKENS, lambda p, t: cross_entropy(call(p, t), t))


def divided(mesh):
    """The same, divided over a mesh with the axes ``data`` and ``model``."""

    def put(name, leaf):
        return place(leaf, NamedSharding(mesh, spec_of(name, leaf.shape)))

    fn, loss = call, on_one_device().loss
    if AxisType.Explicit in mesh.axis_types:
        # The decoder leaves it to the compiler how activations are divided.
        out = NamedSharding(mesh, P("data", None, "model"))
        fn = jax.sharding.auto_axes(call, out_sharding=out)
        loss = jax.sharding.auto_axes(loss, out_sharding=NamedSharding(mesh, P()))
    tokens = place(TOKENS, NamedSharding(mesh, P("data")))
    return Case(fn, map_named(put, parts()[1]), tokens, loss, mesh)


def place(array, sharding):
    """Returns an array whose parts are on this process's devices."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])
