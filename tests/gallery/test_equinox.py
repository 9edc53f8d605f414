"""Equinox modules are pytrees of parameters: they need no adapter."""

import equinox as eqx
import jax
import numpy as np

import tpp_jax as tpp


class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(3, 16, 3, padding=1, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(4, 16, key=keys[1])
        self.mlp = eqx.nn.MLP(16, 5, 32, 2, key=keys[2])

    def __call__(self, image):
        x = jax.nn.relu(self.conv(image))
        x = x.reshape(x.shape[0], -1).T
        x = x + self.attention(x, x, x)
        return self.mlp(x.mean(0))


def test_an_equinox_module_is_pruned_and_runs():
    net = eqx.filter_eval_shape(Net, jax.random.key(0))
    # Arrays are the parameters; sizes and functions stay as they are.
    params, static = eqx.partition(net, lambda leaf: hasattr(leaf, "dtype"))

    def fn(params, images):
        return jax.vmap(eqx.combine(params, static))(images)

    images = np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)
    groups = tpp.channel_groups(fn, images, params=params)
    found = {g.name: (g.size, g.producers) for g in groups if g.reason is None}
    dimensions = "attention.query_proj#2", "attention.value_proj#2"
    assert found == {
        "conv": (16, ("conv", "attention.output_proj")),
        dimensions[0]: (4, ("attention.query_proj", "attention.key_proj")),
        dimensions[1]: (4, ("attention.value_proj",)),
        "mlp.layers.0": (32, ("mlp.layers.0",)),
        "mlp.layers.1": (32, ("mlp.layers.1",)),
    }
    # Its attention has the number of heads written into it.
    assert "a size written into the model" in groups["attention.query_proj"].reason
    checks = tpp.check_groups(fn, images, params=params, groups=groups)
    assert checks.masked < 1e-5
