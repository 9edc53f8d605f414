"""A cut of zeros is free where norms and other reductions run over the channels."""

import functools
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
from tpp_jax.errors import TPPError

X = jax.random.normal(jax.random.key(1), (4, 3))


class Nnx(nnx.Module):
    """Two root mean squares over one stream; a large epsilon, so that it matters."""

    def __init__(self, norm=nnx.RMSNorm, width=8, epsilon=0.1, *, rngs):
        self.first = nnx.Linear(3, width, rngs=rngs)
        self.norm1 = norm(width, epsilon=epsilon, rngs=rngs)
        self.inner = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = norm(width, epsilon=epsilon, rngs=rngs)
        self.last = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        x = x + nnx.gelu(self.inner(self.norm1(x)))
        return self.last(self.norm2(x))


class Linen(linen.Module):
    """The same in Linen, without a gelu before the stream."""

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


def cut(model, groups, params, kept):
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
    plan, zero = cut(model, groups, params, kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = tpp.prune(model, plan, zero)
    np.testing.assert_allclose(model(small, X), model(zero, X), rtol=2e-5, atol=2e-6)
    plain = tpp.slice_tree(plan, zero)
    assert np.abs(model(plain, X) - model(zero, X)).max() > 1e-3  # it was needed
    again = tpp.slice_tree(plan, tpp.rescale(model, plan, zero))
    jax.tree.map(np.testing.assert_array_equal, again, small)


def modules(norm):
    """Returns a module of a kind, and its inputs."""
    if norm == "group norm":
        return Nnx(functools.partial(nnx.GroupNorm, num_groups=4), rngs=nnx.Rngs(0)), X
    if norm == "Llama":
        tokens = jax.random.randint(jax.random.key(2), (2, 6), 0, 19)
        return transformers.Llama(rngs=nnx.Rngs(0)), tokens
    width = int(norm)
    return Nnx(width=width, rngs=nnx.Rngs(0)), X


@pytest.mark.parametrize("name", ["8", "12", "Llama"])
def test_a_cut_of_zeros_leaves_a_module_as_it_is(name):
    model, x = modules(name)
    graphdef, state = nnx.split(model)
    plan, zero = cut(model, tpp.channel_groups(model, x), state, 1)
    counts = {g.name: max(1, g.size * 3 // 8) for g in plan.pruned_groups}
    plan = tpp.make_plan(plan.groups, state, counts=counts)
    zero = jax.tree.map(jnp.multiply, state, tpp.mask_tree(plan, state))
    before = nnx.merge(graphdef, zero)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = tpp.prune(before, plan)
    np.testing.assert_allclose(after(x), before(x), rtol=1e-5, atol=1e-5)
    assert np.abs(tpp.prune(model, plan)(x) - before(x)).max() > 1e-3
    checks = tpp.check_groups(model, x)
    assert checks.masked < 1e-5 and not checks.unproved
