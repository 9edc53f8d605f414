"""A small network of NNX, to be saved."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Net(nnx.Module):
    def __init__(self, width=4, rngs=None, layer=nnx.Linear, **kwargs):
        rngs = rngs or nnx.Rngs(0)
        self.first = layer(3, width, rngs=rngs, **kwargs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.last = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def filled(value, width=4):
    """A net whose every array holds one number."""
    net = Net(width)
    full = jax.tree.map(lambda x: jnp.full_like(x, value), nnx.state(net))
    nnx.update(net, full)
    return net


def number_of(net):
    """The one number that all arrays hold."""
    arrays = [np.unique(leaf) for leaf in jax.tree.leaves(nnx.state(net))]
    [number] = np.unique(np.concatenate(arrays))
    return number
