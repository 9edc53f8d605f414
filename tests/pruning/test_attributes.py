"""Attributes follow the channels of their groups if the model then works."""

import dataclasses
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import tpp_jax as tpp
from tests.pruning.masking import masked, masked_module

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def group_of(groups, layer, size):
    """Returns the only prunable group of a size that a layer produces."""
    [found] = [
        group
        for group in groups
        if layer in group.producers and group.size == size and group.reason is None
    ]
    return found


def attend(q, k, v, scale):
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k) * scale
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), v)


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class Attention(nnx.Module):
    """Attention with heads, their size, and a product and a root of these."""

    def __init__(self, rngs, width=24, heads=4, size=5):
        self.heads, self.size = heads, size
        self.inner = heads * size
        self.scale = size**-0.5
        self.q = nnx.Linear(width, self.inner, rngs=rngs)
        self.k = nnx.Linear(width, self.inner, rngs=rngs)
        self.v = nnx.Linear(width, self.inner, rngs=rngs)
        self.o = nnx.Linear(self.inner, width, rngs=rngs)

    def __call__(self, x):
        q, k, v = (
            layer(x).reshape(*x.shape[:2], self.heads, self.size)
            for layer in (self.q, self.k, self.v)
        )
        y = attend(q, k, v, self.scale)
        return self.o(y.reshape(*x.shape[:2], self.inner)) + x


def test_one_attribute_follows_queries_and_values_together():
    net, x = Attention(nnx.Rngs(0)), array(2, 6, 24)
    groups = tpp.channel_groups(net, x)
    sizes, heads = group_of(groups, "v", 5), group_of(groups, "v", 4)
    assert {"q", "k", "v"} <= set(sizes.producers)
    plan = tpp.make_plan(groups, net, counts={heads.name: 3, sizes.name: 2})
    small = tpp.prune(net, plan)
    assert (small.heads, small.size, small.inner) == (3, 2, 6)
    assert (net.heads, net.size, net.inner) == (4, 5, 20)
    assert small.scale == net.scale  # the same as with masked channels
    same(small(x), masked_module(net, plan, x))
    assert tpp.check_groups(net, x, groups=groups).masked < 1e-3


def test_all_attributes_of_a_pruned_module_are_saved(tmp_path):
    net, x = Attention(nnx.Rngs(0)), array(2, 6, 24)
    groups = tpp.channel_groups(net, x)
    sizes = group_of(groups, "v", 5)
    plan = tpp.make_plan(groups, net, counts={sizes.name: 3})
    small = tpp.prune(net, plan)
    tpp.save_model(tmp_path / "small", small, plan)
    loaded = tpp.load_model(tmp_path / "small", Attention(nnx.Rngs(1)))
    assert (loaded.heads, loaded.size, loaded.inner) == (4, 3, 12)
    np.testing.assert_array_equal(loaded(x), small(x))


class Grouped(nnx.Module):
    """Attention with as many key-value heads as queries for each of them."""

    def __init__(self, rngs, width=24, heads=4, kv_heads=2, size=6):
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        self.repeats = heads // kv_heads
        self.q = nnx.Linear(width, heads * size, rngs=rngs)
        self.k = nnx.Linear(width, kv_heads * size, rngs=rngs)
        self.v = nnx.Linear(width, kv_heads * size, rngs=rngs)
        self.o = nnx.Linear(heads * size, width, rngs=rngs)

    def __call__(self, x):
        q = self.q(x).reshape(*x.shape[:2], self.heads, self.size)
        k = self.k(x).reshape(*x.shape[:2], self.kv_heads, self.size)
        v = self.v(x).reshape(*x.shape[:2], self.kv_heads, self.size)
        k, v = (jnp.repeat(y, self.repeats, axis=2) for y in (k, v))
        return self.o(attend(q, k, v, 0.3).reshape(*x.shape[:2], -1))


def test_of_equal_attributes_each_follows_its_own_group():
    net, x = Grouped(nnx.Rngs(0)), array(2, 6, 24)
    groups = tpp.channel_groups(net, x)
    kv = group_of(groups, "k", 2)
    small = tpp.prune(net, tpp.make_plan(groups, net, counts={kv.name: 1}))
    assert (small.heads, small.kv_heads, small.repeats) == (2, 1, 2)
    [queries] = [
        g for g in groups if g.producers == ("q",) and g.size == 2 and g.reason is None
    ]
    plan = tpp.make_plan(groups, net, counts={queries.name: 1})
    small = tpp.prune(net, plan)
    assert (small.heads, small.kv_heads, small.repeats) == (2, 2, 1)
    same(small(x), masked_module(net, plan, x))


class Mixed(nnx.Module):
    """Layers with as many heads as dimensions, each of which follows another."""

    def __init__(self, rngs, inputs, heads=4, size=4):
        self.heads, self.size = heads, size
        self.linear = nnx.Linear(inputs, heads * size, rngs=rngs)
        self.weight = nnx.Param(array(1, heads, size))

    def __call__(self, x):
        h = self.linear(x).reshape(-1, self.heads, self.size)
        h = h * jax.nn.sigmoid(jnp.sum(h * self.weight, -1, keepdims=True))
        return jax.nn.relu(h.reshape(-1, self.heads * self.size))


class Row(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = Mixed(rngs, 6), Mixed(rngs, 16)
        self.last = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.second(self.first(x)))


def test_a_module_follows_the_channels_that_it_produces_not_its_inputs():
    net, x = Row(nnx.Rngs(0)), array(5, 6)
    groups = tpp.channel_groups(net, x)
    assert all(g.reason is None for g in groups if "last" not in g.producers)
    first = next(g for g in groups if g.producers == ("first.linear",) and not g.inner)
    plan = tpp.make_plan(groups, net, counts={first.name: 3})
    small = tpp.prune(net, plan)
    numbers = [(m.heads, m.size) for m in (small.first, small.second)]
    assert numbers[1] == (4, 4) and sorted(numbers[0]) == [3, 4]
    same(small(x), masked_module(net, plan, x))


# Places of the numbers.


@dataclasses.dataclass
class Text:
    heads: int = 4
    width: int = 24


@dataclasses.dataclass
class Config:
    text: Text
    layers: int = 4  # equal to the heads by coincidence


class LinenAttention(linen.Module):
    config: Config

    @linen.compact
    def __call__(self, x):
        text = self.config.text
        size = text.width // text.heads
        dense = {name: linen.Dense(text.width, name=name) for name in "qkv"}
        q, k, v = (
            layer(x).reshape(*x.shape[:2], text.heads, size) for layer in dense.values()
        )
        return linen.Dense(24, name="o")(attend(q, k, v, 0.4).reshape(*x.shape[:2], -1))


class LinenNet(linen.Module):
    config: Config

    @linen.compact
    def __call__(self, x):
        for i in range(self.config.layers // 4):
            x = x + LinenAttention(self.config, name=f"layer_{i}")(x)
        return x


def test_a_width_that_heads_divide_in_a_nested_configuration_follows_both():
    config = Config(Text())
    net, x = LinenNet(config), array(2, 5, 24)
    variables = net.init(jax.random.key(0), x)
    groups = tpp.channel_groups(net, x, params=variables)
    heads, sizes = group_of(groups, "layer_0.v", 4), group_of(groups, "layer_0.v", 6)
    plan = tpp.make_plan(groups, variables, counts={heads.name: 3, sizes.name: 5})
    small = tpp.prune(net, plan, variables)
    found = tpp.linen_apply(net, plan)(small, x)
    same(found, masked(net.apply, plan, variables, x))
    assert (config.text.heads, config.text.width, config.layers) == (4, 24, 4)
    values = plan.field_values()["layer_0"]
    assert values == {"config.text.heads": 3, "config.text.width": 15}
    assert tpp.check_groups(net, x, params=variables, groups=groups).masked < 1e-3


class Fused(eqx.Module):
    """Splits a projection at numbers in a list, a dict or an object."""

    both: eqx.nn.Linear
    one: eqx.nn.Linear
    other: eqx.nn.Linear
    sizes: object = eqx.field(static=True)
    read: object = eqx.field(static=True)

    def __call__(self, x):
        left, right = self.read(self.sizes)
        one, other = jax.lax.split(jax.vmap(self.both)(x), (left, right), axis=1)
        return jax.vmap(self.one)(one) + jax.vmap(self.other)(jnp.tanh(other))


class SizesConfig(types.SimpleNamespace):
    def __hash__(self):
        return hash((self.left, self.right))


class Hashed(dict):
    def __hash__(self):
        return hash(tuple(self.items()))


HOLDERS = {
    "tuple": ((12, 8), lambda s: s),
    "list of tuples": (((12, "left"), (8, "right")), lambda s: (s[0][0], s[1][0])),
    "dict": (Hashed(left=12, right=8), lambda s: (s["left"], s["right"])),
    "object": (SizesConfig(left=12, right=8), lambda s: (s.left, s.right)),
    "dict in a dict": (
        Hashed(part=Hashed(left=12, right=8)),
        lambda s: (s["part"]["left"], s["part"]["right"]),
    ),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_numbers_in_containers_follow(name):
    sizes, read = HOLDERS[name]
    keys = jax.random.split(jax.random.key(0), 3)
    net = Fused(
        eqx.nn.Linear(5, 20, key=keys[0]),
        eqx.nn.Linear(12, 3, key=keys[1]),
        eqx.nn.Linear(8, 3, key=keys[2]),
        sizes,
        read,
    )
    x = array(4, 5)

    def call(net, x):
        return net(x)

    groups = tpp.channel_groups(call, x, params=net)
    left, right = group_of(groups, "both", 12), group_of(groups, "both", 8)
    plan = tpp.make_plan(groups, net, counts={left.name: 5, right.name: 7})
    for small in (tpp.prune(call, plan, net), tpp.slice_tree(plan, [net])[0]):
        assert read(small.sizes) == (5, 7) and type(small.sizes) is type(sizes)
        same(call(small, x), masked(call, plan, net, x))
    assert read(net.sizes) == (12, 8)


class Listed(nnx.Module):
    """A module with its numbers in a list and a dict."""

    def __init__(self, rngs):
        self.shape = [4, 3]
        self.widths = {"middle": 9}
        self.a = nnx.Linear(5, 12, rngs=rngs)
        self.b = nnx.Linear(12, 9, rngs=rngs)
        self.c = nnx.Linear(9, 2, rngs=rngs)

    def __call__(self, x):
        h = self.a(x).reshape(len(x), *self.shape)
        h = jax.nn.relu(h - jnp.max(h, axis=-1, keepdims=True)).reshape(len(x), -1)
        h = self.b(h)
        return self.c(jax.nn.relu(h) + jnp.ones(self.widths["middle"]))


def test_lists_and_dicts_of_nnx_modules_follow_and_are_saved(tmp_path):
    net, x = Listed(nnx.Rngs(0)), array(4, 5)
    groups = tpp.channel_groups(net, x)
    heads, middle = group_of(groups, "a", 4), group_of(groups, "b", 9)
    plan = tpp.make_plan(groups, net, counts={heads.name: 3, middle.name: 5})
    small = tpp.prune(net, plan)
    assert (list(small.shape), dict(small.widths)) == ([3, 3], {"middle": 5})
    assert (list(net.shape), dict(net.widths)) == ([4, 3], {"middle": 9})
    assert small(x).shape == (4, 2)
    tpp.save_model(tmp_path / "small", small, plan)
    loaded = tpp.load_model(tmp_path / "small", Listed(nnx.Rngs(1)))
    assert (list(loaded.shape), dict(loaded.widths)) == ([3, 3], {"middle": 5})
    np.testing.assert_array_equal(loaded(x), small(x))


class Core(eqx.Module):
    """A module without arrays that requires its number of heads."""

    heads: int = eqx.field(static=True)

    def __call__(self, q, k, v):
        if q.shape[-2] != self.heads:
            raise ValueError(f"expected {self.heads} heads, got {q.shape[-2]}")
        return attend(q, k, v, 0.5)


class Outer(eqx.Module):
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    core: Core
    heads: int = eqx.field(static=True)

    def __init__(self, width, heads, key):
        self.qkv = eqx.nn.Linear(width, 3 * width, key=key)
        self.out = eqx.nn.Linear(width, width, key=key)
        self.core = Core(heads)
        self.heads = heads

    def __call__(self, x):
        parts = jnp.split(jax.vmap(self.qkv)(x), 3, axis=-1)
        q, k, v = (part.reshape(len(x), self.heads, -1) for part in parts)
        return jax.vmap(self.out)(self.core(q, k, v).reshape(len(x), -1))


def test_attributes_of_several_classes_follow_also_without_arrays():
    net, x = Outer(24, 4, jax.random.key(0)), array(3, 5, 24)

    def call(net, x):
        return jax.vmap(net)(x)

    groups = tpp.channel_groups(call, x, params=net)
    heads = group_of(groups, "qkv", 4)
    plan = tpp.make_plan(groups, net, counts={heads.name: 3})
    small = tpp.prune(call, plan, net)
    assert (small.heads, small.core.heads, net.core.heads) == (3, 3, 4)
    same(call(small, x), masked(call, plan, net, x))


# Attributes that cannot follow.


def test_several_pairs_that_hold_only_together_are_all_joined():
    def alike(q, v):
        q = q.reshape(len(q), 2, -1)
        v = v.reshape(len(v), 2, -1)
        if q.shape != v.shape:
            raise ValueError("as many queries as values")
        return (jax.nn.relu(q) * jnp.sum(v, -1, keepdims=True)).reshape(len(q), -1), v

    def net(p, x):
        q, v = alike(x @ p["q1"], x @ p["v1"])
        h = q @ p["o1"] + v.reshape(len(v), -1) @ p["p1"]
        q, v = alike(h @ p["q2"], h @ p["v2"])
        return q @ p["o2"] + v.reshape(len(v), -1) @ p["p2"]

    params = {"q1": array(5, 8), "v1": array(5, 8), "o1": array(8, 6)}
    params |= {"q2": array(6, 12), "v2": array(6, 12), "o2": array(12, 3)}
    params |= {"p1": array(8, 6), "p2": array(12, 3)}
    groups = tpp.channel_groups(net, array(4, 5), params=params)
    for layers, size in (({"q1", "v1"}, 4), ({"q2", "v2"}, 6)):
        [group] = [
            g
            for g in groups
            if g.size == size and g.reason is None and layers & set(g.producers)
        ]
        assert layers <= set(group.producers)


class Twice(nnx.Module):
    """A module with one number for two sizes that are pruned separately."""

    def __init__(self, rngs, width=12):
        self.width = width
        self.a = nnx.Linear(5, width, rngs=rngs)
        self.b = nnx.Linear(width, width, rngs=rngs)
        self.c = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x):
        h = jax.nn.relu(self.a(x).reshape(-1, self.width))
        return self.c(jax.nn.relu(self.b(h).reshape(-1, self.width)))


def test_one_attribute_for_two_sizes_follows_them_together_or_not_at_all():
    net, x = Twice(nnx.Rngs(0)), array(4, 5)
    groups = tpp.channel_groups(net, x)
    for counts in ({g.name: 7} for g in groups if g.reason is None):
        plan = tpp.make_plan(groups, net, counts=counts)
        small = tpp.prune(net, plan)
        assert small.width == small.a.kernel.shape[1] == small.b.kernel.shape[1]
        same(small(x), masked_module(net, plan, x))


def test_a_number_that_is_no_attribute_is_refused_with_its_line():
    class Closed(nnx.Module):
        def __init__(self, rngs, heads=4):
            self.a = nnx.Linear(5, 12, rngs=rngs)
            self.b = nnx.Linear(12, 2, rngs=rngs)
            self.split = lambda h: h.reshape(len(h), heads, 3)

        def __call__(self, x):
            h = self.split(self.a(x))
            return self.b((h - h.max(axis=1, keepdims=True)).reshape(len(x), -1))

    groups = tpp.channel_groups(Closed(nnx.Rngs(0)), array(4, 5))
    own = [group for group in groups if "a" in group.producers]
    assert own
    for group in own:
        assert "a size written into the model (test_attributes.py:" in group.reason


class Sized(eqx.Module):
    """A width that is a leaf of the tree here, and a static field in its norm."""

    first: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    last: eqx.nn.Linear
    width: int

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(4, 12, key=keys[0])
        self.norm = eqx.nn.LayerNorm(12)
        self.last = eqx.nn.Linear(12, 3, key=keys[1])
        self.width = 12

    def __call__(self, x):
        h = self.norm(jax.nn.relu(self.first(x))).reshape(1, self.width)
        return self.last(h[0])


def test_an_optimizer_of_arrays_alone_follows_the_static_fields():
    net, tx = Sized(jax.random.key(0)), optax.adam(1e-3)
    groups = tpp.channel_groups(lambda net, x: net(x), jnp.ones(4), params=net)
    assert {size.field.name for size in groups.sizes} == {"width", "shape"}
    plan = tpp.make_plan(groups, net, 0.5)
    small = tpp.slice_tree(plan, net)
    assert (small.width, small.norm.shape) == (6, (6,))
    state = tpp.slice_tree(plan, tx.init(eqx.filter(net, eqx.is_array)))
    expected = tx.init(eqx.filter(small, eqx.is_array))
    assert jax.tree.structure(state) == jax.tree.structure(expected)


class Heads(nnx.Module):
    """A kernel of heads, which compares what it reads with its own sizes."""

    def __init__(self, shape, rngs):
        self.shape = shape
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (*shape, 6)))

    def __call__(self, x):
        assert x.shape[-2:] == self.shape, f"{x.shape[-2:]} are not {self.shape}"
        return jnp.einsum("...hd,hdo->...o", x, self.kernel[...])


class EqualSizes(nnx.Module):
    """As many heads as dimensions of each."""

    def __init__(self, rngs):
        make = nnx.LinearGeneral
        self.q, self.k, self.v = (make(6, (8, 8), rngs=rngs) for _ in range(3))
        self.out = Heads((8, 8), rngs)

    def __call__(self, x):
        return self.out(attend(self.q(x), self.k(x), self.v(x), 1.0))


def test_of_equal_numbers_in_a_tuple_the_right_one_follows():
    model, x = EqualSizes(nnx.Rngs(0)), array(2, 3, 6)
    groups = tpp.channel_groups(model, x)
    plan = tpp.make_plan(groups, model, {"q": 0.5, "v#2": 0.25})
    small = tpp.prune(model, plan)
    assert small.out.shape == (4, 6)
    same(small(x), masked_module(model, plan, x))
