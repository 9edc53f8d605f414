"""Models whose parts share arrays or modules are read like all others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp


class Twice(nnx.Module):
    """A layer that is used under two names, and a kernel that is."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.middle = nnx.Linear(8, 8, rngs=rngs)
        self.again = self.middle
        self.last = nnx.Linear(8, 3, rngs=rngs)
        self.kernel = self.last.kernel

    def __call__(self, x):
        h = jax.nn.relu(self.first(x))
        h = self.again(jax.nn.relu(self.middle(h)))
        return self.last(h) + h @ self.kernel


@pytest.mark.usefixtures("graphs")
def test_a_module_under_two_names_is_one_producer():
    model = Twice(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (5, 4))
    groups = tpp.channel_groups(model, x)
    assert [group.producers for group in groups if group.reason is None] == [
        ("first", "again")
    ]
    small = tpp.prune(model, tpp.make_plan(groups, model, 0.5))
    assert small.again is small.middle
    assert small.kernel is small.last.kernel
    assert small.middle.kernel.shape == (4, 4)
    mask = np.isin(np.arange(8), tpp.make_plan(groups, model, 0.5).kept["first"])
    masked = nnx.clone(model)
    for layer in (masked.first, masked.middle):
        layer.kernel[...] = layer.kernel[...] * mask
        layer.bias[...] = layer.bias[...] * mask
    np.testing.assert_allclose(small(x), masked(x), rtol=1e-5, atol=1e-6)
    assert jnp.isfinite(small(x)).all()
