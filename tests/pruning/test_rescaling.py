"""A cut of zeros is free where norms and other reductions run over the channels."""

import functools
import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import tpp_jax as tpp
from tests.gallery import transformers
from tests.pruning.masking import masked
from tpp_jax.pruning.rescaling import find_rescaling

X = jax.random.normal(jax.random.key(1), (4, 3))


class Nnx(nnx.Module):
    """Norms over one stream; their epsilon is large, so that it matters."""

    def __init__(self, norm, width=8, act=nnx.relu, *, rngs):
        self.first = nnx.Linear(3, width, rngs=rngs)
        self.norm1 = norm(width, epsilon=0.1, rngs=rngs)
        self.inner = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = norm(width, epsilon=0.1, rngs=rngs)
        self.last = nnx.Linear(width, 2, rngs=rngs)
        self.act = act

    def __call__(self, x):
        x = self.first(x)
        x = x + self.act(self.inner(self.norm1(x)))
        return self.last(self.norm2(x))


class Linen(linen.Module):
    """Flax Linen's own norm."""

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(8)(x)
        x = x + linen.Dense(8)(linen.RMSNorm(epsilon=0.1)(x))
        return linen.Dense(2)(linen.RMSNorm(epsilon=0.1)(x))


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.RMSNorm
    last: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 8, key=one)
        self.norm = eqx.nn.RMSNorm(8, eps=0.1, use_bias=False)
        self.last = eqx.nn.Linear(8, 2, key=two)

    def __call__(self, x):
        return jax.vmap(lambda row: self.last(self.norm(self.first(row))))(x)


def rms(x, scale=None, epsilon=0.1):
    y = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + epsilon)
    return y if scale is None else y * scale


def gemma(p, x):
    """A scale that is added to one cannot be multiplied."""
    return rms(x @ p["a"], 1 + p["s"]) @ p["b"]


def without_scale(p, x):
    return rms(x @ p["a"]) @ p["b"]


def of_the_largest(p, x):
    """A norm by the length, kept from zero by a maximum."""
    x = x @ p["a"]
    length = jnp.linalg.norm(x, axis=-1, keepdims=True) / x.shape[-1] ** 0.5
    return x / jnp.maximum(length, 0.01) * p["s"] @ p["b"]


def post_norm(p, x):
    """What a norm returns is the stream that the next one reads."""
    x = rms(x @ p["a"], p["s"])
    x = rms(x + jax.nn.relu(x @ p["c"]) @ p["d"], p["t"])
    return x @ p["b"]


def scanned(p, x):
    """Layers of one loop."""

    def layer(x, p):
        return x + jax.nn.silu(rms(x, p["s"]) @ p["c"]) @ p["d"], None

    layers = {name: p["layers"][name] for name in "scd"}
    x, _ = jax.lax.scan(layer, x @ p["a"], layers)
    return rms(x, p["t"]) @ p["b"]


def recurrent(p, x):
    """A state that starts from zeros, which a norm reads at every step."""

    def step(state, row):
        state = rms(state @ p["c"] + row @ p["a"], p["s"])
        return state, state

    state, _ = jax.lax.scan(step, jnp.zeros(p["a"].shape[1]), x)
    return state @ p["b"]


def scores(p, x):
    """Queries and keys over the root of their size; only one of them may be scaled."""
    q, k = jax.nn.relu6(x @ p["a"]), jax.nn.relu(x @ p["c"])
    return jax.nn.softmax(q @ k.T / q.shape[-1] ** 0.5) @ x


def mean_of_channels(p, x):
    x = x @ p["a"]
    return jnp.mean(jnp.square(x), -1, keepdims=True) * p["s"] + x @ p["b"]


def tied(p, x):
    """A table that makes the stream and reads it."""
    tokens = jnp.argmax(x, -1)
    return rms(p["table"][tokens] @ p["c"] + p["table"][tokens], p["s"]) @ p["table"].T


SHAPES = {"a": (3, 8), "b": (8, 2), "c": (8, 8), "d": (8, 8), "s": (8,), "t": (8,)}
FUNCTIONS = {
    "an added scale": (gemma, "abs"),
    "no scale": (without_scale, "ab"),
    "a maximum": (of_the_largest, "abs"),
    "post-norm": (post_norm, "abcdst"),
    "a loop over layers": (scanned, "abt"),
    "a recurrent state": (recurrent, "abcs"),
    "queries and keys": (scores, "ac"),
    "a mean of squares": (mean_of_channels, "ab"),
    "a tied table": (tied, "cs"),
}


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def parameters(name):
    shapes = {leaf: SHAPES[leaf] for leaf in FUNCTIONS[name][1]}
    if name == "a loop over layers":
        shapes["layers"] = {leaf: (3, *SHAPES[leaf]) for leaf in "scd"}
    if name == "queries and keys":
        shapes["c"] = (3, 8)
    if name == "a mean of squares":
        shapes["s"] = (2,)
    if name == "a tied table":
        shapes["table"] = (3, 8)
    return drawn(shapes)


def cut(groups, params, kept):
    """Returns a plan that keeps some channels of all groups, and zeroed parameters."""
    plan = tpp.make_plan(
        groups, params, counts={g.name: kept for g in groups if g.reason is None}
    )
    mask = tpp.mask_tree(plan, params)
    return plan, jax.tree.map(lambda x, m: x * m, params, mask)


@pytest.mark.parametrize("kept", [3, 4, 7])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_cut_of_zeros_leaves_a_function_as_it_is(name, kept):
    model, params = FUNCTIONS[name][0], parameters(name)
    groups = tpp.channel_groups(model, X, params=params)
    assert any(group.reduced for group in groups)
    plan, zero = cut(groups, params, kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = tpp.prune(model, plan, zero)
    np.testing.assert_allclose(model(small, X), model(zero, X), rtol=2e-5, atol=2e-6)
    plain = tpp.slice_tree(plan, zero)
    assert np.abs(model(plain, X) - model(zero, X)).max() > 1e-3  # it was needed


def zeroed(model, plan):
    """Returns a module with zeros in place of the pruned channels."""
    graphdef, state = nnx.split(model)
    return nnx.merge(
        graphdef, jax.tree.map(jnp.multiply, state, tpp.mask_tree(plan, state))
    )


def assert_free(before, after, x):
    np.testing.assert_allclose(after(x), before(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [8, 12])
def test_a_cut_of_zeros_leaves_a_module_as_it_is(width):
    model = Nnx(nnx.RMSNorm, width, rngs=nnx.Rngs(0))
    plan = tpp.make_plan(tpp.channel_groups(model, X), model, counts={"first": 5})
    before = zeroed(model, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_free(before, tpp.prune(before, plan), X)
    assert before.norm1.scale[...].max() == 1  # is not modified
    assert np.abs(tpp.prune(model, plan)(X) - before(X)).max() > 1e-3
    checks = tpp.check_groups(model, X)
    assert checks.masked < 1e-5 and not checks.unproved


def test_a_language_model_with_root_mean_squares_is_cut_for_free():
    tokens = jax.random.randint(jax.random.key(2), (2, 6), 0, 19)
    model = transformers.Llama(rngs=nnx.Rngs(0))
    groups = tpp.channel_groups(model, tokens)
    counts = {"embed": 12} | {f"blocks.{i}.mlp.gate": 7 for i in (0, 1)}
    plan = tpp.make_plan(groups, model, counts=counts)
    before = zeroed(model, plan)
    assert_free(before, tpp.prune(before, plan), tokens)
    # A query head that is zero attends to all positions alike, which is no absence.
    plan = tpp.make_plan(groups, model, counts={"blocks.0.attention.q#2": 1})
    found = find_rescaling(plan, groups.source)
    assert re.search(r"'dot_general' \(transformers.py:\d+\) depends", found.problem)


def test_a_linen_module_is_cut_for_free():
    module = Linen()
    variables = module.init(jax.random.key(0), X)
    groups = tpp.channel_groups(module, X, params=variables)
    plan, zero = cut(groups, variables, 5)
    small = tpp.prune(module, plan, zero)
    found = tpp.linen_apply(module, plan)(small, X)
    np.testing.assert_allclose(found, module.apply(zero, X), rtol=1e-5, atol=1e-5)
    checks = tpp.check_groups(module, X, params=variables)
    assert checks.masked < 1e-5 and not checks.unproved


def test_an_equinox_module_is_cut_for_free():
    net = Equinox(jax.random.key(0))

    def call(net, x):
        return net(x)

    groups = tpp.channel_groups(call, X, params=net)
    plan = tpp.make_plan(groups, net, counts={"first": 3})
    arrays, rest = eqx.partition(net, eqx.is_array)
    arrays = jax.tree.map(jnp.multiply, arrays, tpp.mask_tree(plan, arrays))
    small = tpp.prune(call, plan, eqx.combine(arrays, rest))
    found = masked(call, plan, net, X)
    np.testing.assert_allclose(small(X), found, rtol=1e-5, atol=1e-5)


def test_blocks_of_a_group_norm_are_cut_for_free_and_channels_within_are_not():
    model = Nnx(functools.partial(nnx.GroupNorm, num_groups=4), rngs=nnx.Rngs(0))
    groups = tpp.channel_groups(model, X)
    blocks, within = (g for g in groups if g.reason is None)
    assert blocks.size == 4 and within.size == 2
    plan = tpp.make_plan(groups, model, counts={blocks.name: 2})
    before = zeroed(model, plan)
    assert_free(before, tpp.prune(before, plan), X)
    plan = tpp.make_plan(groups, model, counts={within.name: 1})
    with pytest.warns(UserWarning, match="'sub' .* subtracts a mean over the channels"):
        tpp.prune(zeroed(model, plan), plan)


def test_a_layer_norm_is_cut_for_free_if_its_means_are_zero():
    model = Nnx(nnx.LayerNorm, act=lambda x: x, rngs=nnx.Rngs(0))
    plan = tpp.make_plan(tpp.channel_groups(model, X), model, counts={"first": 4})
    before = zeroed(model, plan)
    with pytest.warns(UserWarning, match=r"test_rescaling.py:\d+\) subtracts a mean"):
        after = tpp.prune(before, plan)
    assert np.abs(after(X) - before(X)).max() > 1e-3
    kept = np.asarray(plan.kept["first"])
    for layer in (before.first, before.inner):
        for leaf in (layer.kernel, layer.bias):
            own = leaf[...][..., kept]
            centred = own - own.mean(-1, keepdims=True)
            leaf[...] = leaf[...].at[..., kept].set(centred)
    with pytest.warns(UserWarning, match="unless it is zero"):
        assert_free(before, tpp.prune(before, plan), X)


def softmax_over_channels(p, x):
    return jax.nn.softmax(x @ p["a"]) @ p["b"]


def not_zero_at_zero(p, x):
    return rms(jax.nn.sigmoid(x @ p["a"]), p["s"]) @ p["b"]


def not_homogeneous(p, x):
    return rms(jax.nn.gelu(x @ p["a"]), p["s"], 1e-6) @ p["b"]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (softmax_over_channels, r"'reduce_max' \(.*\) depends on pruned channels"),
        (not_zero_at_zero, r"'reduce_sum' \(.*\) depends on pruned channels"),
        (not_homogeneous, r"the epsilon 1e-06 in 'add' \(.*\) would have to follow"),
    ],
    ids=["softmax", "sigmoid", "gelu"],
)
def test_what_cannot_be_made_up_for_is_said(model, why):
    params = drawn({name: SHAPES[name] for name in "abs"})
    groups = tpp.channel_groups(model, X, params=params)
    plan, zero = cut(groups, params, 4)
    with pytest.warns(UserWarning, match=why):
        small = tpp.prune(model, plan, zero)
    if model is not_homogeneous:  # nearly the same
        np.testing.assert_allclose(model(small, X), model(zero, X), rtol=2e-3)


def test_a_cut_of_channels_that_are_not_zero_leaves_other_weights_as_they_are():
    params = parameters("post-norm")
    groups = tpp.channel_groups(post_norm, X, params=params)
    plan, _ = cut(groups, params, 4)
    plain = tpp.slice_tree(plan, params)
    small = tpp.prune(post_norm, plan, params)
    jax.tree.map(np.testing.assert_array_equal, small, plain)
    abstract = jax.eval_shape(lambda: params)
    assert tpp.prune(post_norm, plan, abstract)["a"].shape == (3, 4)
