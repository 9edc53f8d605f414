"""Attributes of modules and static fields follow the channels of their groups."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import tpp_jax as tpp
from tests.pruning.masking import masked, masked_module

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


class Attention(nnx.Module):
    """Attention with its numbers of heads as attributes."""

    def __init__(self, rngs, width=24, heads=6, kv_heads=3):
        size = width // heads
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        self.layers = 3  # equal to the number of key-value heads by coincidence
        self.q = nnx.Linear(width, heads * size, rngs=rngs)
        self.k = nnx.Linear(width, kv_heads * size, rngs=rngs)
        self.v = nnx.Linear(width, kv_heads * size, rngs=rngs)
        self.o = nnx.Linear(heads * size, width, rngs=rngs)

    def __call__(self, x):
        n, t, _ = x.shape
        q = self.q(x).reshape(n, t, self.heads, self.size)
        k = self.k(x).reshape(n, t, self.kv_heads, self.size)
        v = self.v(x).reshape(n, t, self.kv_heads, self.size)
        for _ in range(self.layers):
            x = x + 1.0
        return self.o(nnx.dot_product_attention(q, k, v).reshape(n, t, -1)) + x


def heads_of(groups, layer):
    return [g for g in groups if layer in g.producers and g.reason is None]


def test_numbers_of_heads_that_are_attributes_follow():
    net, x = Attention(nnx.Rngs(0)), array(2, 5, 24)
    groups = tpp.channel_groups(net, x)
    found = {(g.size, *g.producers) for g in groups if g.reason is None}
    assert (3, "q", "k", "v") in found  # key-value heads with their queries
    [group] = [g for g in groups if (g.size, *g.producers) == (3, "q", "k", "v")]
    plan = tpp.make_plan(groups, net, counts={group.name: 2})
    small = tpp.prune(net, plan)
    assert (small.heads, small.kv_heads, small.size) == (4, 2, 4)
    assert (net.heads, net.kv_heads, net.size, small.layers) == (6, 3, 4, 3)
    np.testing.assert_allclose(
        small(x), masked_module(net, plan, x), rtol=1e-4, atol=1e-5
    )


def test_attributes_of_a_pruned_module_are_saved(tmp_path):
    net, x = Attention(nnx.Rngs(0)), array(2, 5, 24)
    groups = tpp.channel_groups(net, x)
    group = heads_of(groups, "k")[0]
    plan = tpp.make_plan(groups, net, counts={group.name: 2})
    small = tpp.prune(net, plan)
    tpp.save_model(tmp_path / "small", small, plan)
    loaded = tpp.load_model(tmp_path / "small", Attention(nnx.Rngs(1)))
    assert (loaded.heads, loaded.kv_heads) == (4, 2)
    np.testing.assert_array_equal(loaded(x), small(x))


class Config:
    def __init__(self, heads, width):
        self.heads, self.width = heads, width


class LinenAttention(linen.Module):
    """Attention with its number of heads in a configuration and its size from setup."""

    config: Config

    def setup(self):
        self.size = self.config.width // self.config.heads
        self.qkv = linen.Dense(3 * self.config.width)
        self.o = linen.Dense(self.config.width)

    def __call__(self, x):
        n, t, _ = x.shape
        parts = jnp.split(self.qkv(x), 3, axis=-1)
        q, k, v = (y.reshape(n, t, self.config.heads, self.size) for y in parts)
        return self.o(linen.dot_product_attention(q, k, v).reshape(n, t, -1))


class LinenNet(linen.Module):
    config: Config

    @linen.compact
    def __call__(self, x):
        return LinenAttention(self.config, name="attention")(x) + x


def test_fields_of_linen_modules_follow():
    config = Config(heads=4, width=32)
    net, x = LinenNet(config), array(2, 5, 32)
    variables = net.init(jax.random.key(0), x)
    groups = tpp.channel_groups(net, x, params=variables)
    heads, *_ = heads_of(groups, "attention.qkv")
    assert heads.size == 4
    plan = tpp.make_plan(groups, variables, counts={heads.name: 3})
    small = tpp.prune(net, plan, variables)
    found = tpp.linen_apply(net, plan)(small, x)
    np.testing.assert_allclose(
        found, masked(net.apply, plan, variables, x), rtol=1e-4, atol=1e-5
    )
    assert config.heads == 4


class EquinoxAttention(eqx.Module):
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width, heads, key):
        self.qkv = eqx.nn.Linear(width, 3 * width, key=key)
        self.out = eqx.nn.Linear(width, width, key=key)
        self.heads = heads

    def __call__(self, x):
        parts = jnp.split(jax.vmap(self.qkv)(x), 3, axis=-1)
        q, k, v = (part.reshape(len(x), self.heads, -1) for part in parts)
        y = jax.nn.dot_product_attention(q[None], k[None], v[None])[0]
        return jax.vmap(self.out)(y.reshape(len(x), -1))


def test_static_fields_of_equinox_modules_follow_also_in_a_training_state():
    net, x = EquinoxAttention(24, 4, jax.random.key(0)), array(3, 5, 24)

    def call(net, x):
        return jax.vmap(net)(x)

    groups = tpp.channel_groups(call, x, params=net)
    heads, *_ = heads_of(groups, "qkv")
    plan = tpp.make_plan(groups, net, counts={heads.name: 3})
    small = tpp.slice_tree(plan, {"model": net, "step": 3})["model"]
    assert (small.heads, net.heads) == (3, 4)
    np.testing.assert_allclose(
        call(small, x), masked(call, plan, net, x), rtol=1e-4, atol=1e-5
    )


class Halves(nnx.Module):
    """A fused projection that is split at an attribute, in unequal parts."""

    def __init__(self, rngs, left=12, right=6):
        self.left = left
        self.both = nnx.Linear(5, left + right, rngs=rngs)
        self.one = nnx.Linear(left, 2, rngs=rngs)
        self.other = nnx.Linear(right, 2, rngs=rngs)

    def __call__(self, x):
        left, right = jnp.split(self.both(x), [self.left], axis=-1)
        return self.one(nnx.relu(left)) + self.other(nnx.relu(right))


def test_unequal_parts_follow_their_attributes():
    net, x = Halves(nnx.Rngs(0)), array(3, 5)
    groups = tpp.channel_groups(net, x)
    assert sorted(g.size for g in groups if g.reason is None) == [6, 12]
    plan = tpp.make_plan(groups, net, 0.5)
    small = tpp.prune(net, plan)
    assert (small.left, small.both.kernel.shape) == (6, (5, 9))
    np.testing.assert_allclose(
        small(x), masked_module(net, plan, x), rtol=1e-4, atol=1e-5
    )


def test_unequal_parts_of_hard_coded_sizes_are_kept():
    def net(p, x):
        left, right = jnp.split(x @ p["both"], [12], axis=-1)
        return left @ p["one"] + right @ p["other"]

    params = {"both": array(5, 18), "one": array(12, 2), "other": array(6, 2)}
    groups = tpp.channel_groups(net, array(3, 5), params=params)
    left = next(g for g in groups if g.size == 12)
    assert "a size written into the model (test_trial_attributes.py:" in left.reason
