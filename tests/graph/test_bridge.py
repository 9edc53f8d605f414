"""Linen modules in NNX modules, and NNX modules in Linen modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import tpp_jax as tpp

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)


class Body(nn.Module):
    """A Linen module with hard-coded widths, heads and groups."""

    @nn.compact
    def __call__(self, x):
        x = nn.GroupNorm(4)(nn.Dense(16)(x))
        x = nn.BatchNorm(use_running_average=True)(nn.relu(x))
        x = nn.MultiHeadDotProductAttention(4, qkv_features=16, out_features=12)(x)
        return nn.Dense(8)(x)

    def shout(self, x):
        return 2 * self(x)


class Around(nnx.Module):
    """An NNX module with a Linen module in it."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 6, rngs=rngs)
        self.body = nnx.bridge.ToNNX(Body(), rngs=rngs)
        self.last = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.body(self.first(x))))


def drawn(tree):
    rng = np.random.default_rng(0)

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(rng.uniform(0.1, 0.9, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, tree)


def times(leaf, keep):
    return leaf * keep if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


@pytest.fixture(scope="module")
def around():
    network = nnx.bridge.lazy_init(Around(nnx.Rngs(0)), X)
    network.body.to_nnx__rngs = None
    graphdef, state = nnx.split(network)
    return nnx.merge(graphdef, drawn(state))


def test_a_linen_module_in_an_nnx_one_is_pruned_and_runs(around):
    groups = tpp.channel_groups(around, X)
    sizes = {group.name: group.size for group in groups if group.reason is None}
    attention = "body.MultiHeadDotProductAttention_0"
    assert sizes == {
        "first": 6,
        "body.Dense_0": 4,
        "body.Dense_0#2": 4,
        f"{attention}.query": 4,
        f"{attention}.query#2": 4,
        f"{attention}.value#2": 4,
        f"{attention}.out": 12,
        "body.Dense_1": 8,
    }
    counts = {name: size // 2 for name, size in sizes.items()}
    small = tpp.prune(around, tpp.make_plan(groups, around, counts=counts))
    assert small.body.MultiHeadDotProductAttention_0["out"]["kernel"].shape == (2, 2, 6)
    assert small(X).shape == (2, 5, 2)
    assert tpp.check_groups(around, X, groups=groups).masked < 1e-5

    counts = {name: n for name, n in counts.items() if not groups[name].reduced}
    plan = tpp.make_plan(groups, around, counts=counts)
    graphdef, state = nnx.split(around)
    masked = jax.tree.map(times, state, tpp.mask_tree(plan, state))
    expected = nnx.merge(graphdef, masked)(X)
    found = nnx.jit(lambda model, x: model(x))(tpp.prune(around, plan), X)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_its_other_methods_run_as_well(around):
    groups = tpp.channel_groups(around, X)
    small = tpp.prune(around, tpp.make_plan(groups, around, 0.5)).body
    x = jnp.ones((2, 5, 3))
    np.testing.assert_allclose(small.shout(x), 2 * small(x), rtol=1e-6)


def test_fewer_groups_of_a_norm_are_distinguished_from_smaller_ones(around):
    groups = tpp.channel_groups(around, X)
    plans = [
        tpp.make_plan(groups, around, counts={name: 2})
        for name in ("body.Dense_0", "body.Dense_0#2")
    ]
    fewer, smaller = (tpp.prune(around, plan) for plan in plans)
    assert fewer.body.Dense_0["kernel"].shape == smaller.body.Dense_0["kernel"].shape
    again = [tpp.channel_groups(model, X)["body.Dense_0"] for model in (fewer, smaller)]
    assert [group.size for group in again] == [2, 4]


def test_pruned_twice_is_pruned_by_both_plans(around):
    first = tpp.make_plan(tpp.channel_groups(around, X), around, 0.5)
    small = tpp.prune(around, first)
    second = tpp.make_plan(tpp.channel_groups(small, X), small, 0.5)
    expected = tpp.prune(around, first.then(second))(X)
    np.testing.assert_allclose(tpp.prune(small, second)(X), expected, rtol=1e-5)


def test_it_is_saved_and_loaded(around, tmp_path):
    plan = tpp.make_plan(tpp.channel_groups(around, X), around, 0.5)
    small = tpp.prune(around, plan)
    tpp.save_model(tmp_path / "model", small, plan)
    loaded = tpp.load_model(tmp_path / "model", around)
    assert nnx.graphdef(loaded) == nnx.graphdef(small)
    np.testing.assert_array_equal(loaded(X), small(X))


def test_nothing_changes_if_nothing_is_cut(around):
    groups = tpp.channel_groups(around, X)
    same = tpp.prune(around, tpp.make_plan(groups, around, counts={}))
    assert type(same.body) is nnx.bridge.ToNNX
    np.testing.assert_array_equal(same(X), around(X))


class Inner(nnx.Module):
    """An NNX module whose layers have their sizes as attributes."""

    def __init__(self, width, rngs):
        self.up = nnx.Linear(6, width, rngs=rngs)
        self.norm = nnx.GroupNorm(width, 4, rngs=rngs)
        self.average = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.depthwise = nnx.Conv(
            width, width, (3,), feature_group_count=width, rngs=rngs
        )
        self.split = nnx.LinearGeneral(width, (4, 4), rngs=rngs)
        self.merge = nnx.LinearGeneral((4, 4), 8, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        x = self.average(self.norm(self.up(x)))
        return self.merge(self.split(self.depthwise(nnx.relu(x))))

    def shout(self, x):
        return 2 * self(x)


class Outer(nn.Module):
    """A Linen module with an NNX module in it."""

    method: str | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="first")(x)
        inner = nnx.bridge.ToLinen(Inner, args=(16,), name="inner")
        x = inner(x, nnx_method=self.method) if self.method else inner(x)
        return nn.Dense(2, name="last")(x)


@pytest.mark.parametrize("method", [None, "shout"])
def test_an_nnx_module_in_a_linen_one_is_pruned_and_runs(method):
    module = Outer(method)
    variables = drawn(jax.eval_shape(lambda: module.init(jax.random.key(0), X)))
    same = tpp.linen_apply(module)(variables, X)
    np.testing.assert_array_equal(same, module.apply(variables, X))
    groups = tpp.channel_groups(module, X, params=variables)
    sizes = {group.name: group.size for group in groups if group.reason is None}
    assert sizes == {
        "first": 6,
        "inner.up": 4,
        "inner.up#2": 4,
        "inner.split": 4,
        "inner.split#2": 4,
        "inner.merge": 8,
    }
    assert tpp.check_groups(module, X, params=variables, groups=groups).masked < 1e-5
    counts = {name: size // 2 for name, size in sizes.items()}
    plan = tpp.make_plan(groups, variables, counts=counts)
    small = tpp.slice_tree(plan, variables)
    assert small["params"]["inner"]["depthwise"]["kernel"].shape == (3, 1, 4)
    assert tpp.linen_apply(module, plan)(small, X).shape == (2, 5, 2)


class Between(nnx.bridge.Module):
    """An NNX module that is initialized and applied like a Linen module."""

    @nnx.bridge.compact
    def __call__(self, x):
        init = nnx.initializers.uniform()
        x = nnx.relu(x @ self.param("first", init, (x.shape[-1], 8)))
        return x @ self.param("last", init, (8, 2))


def test_a_bridge_module_is_refused_but_works_as_a_function():
    module = Between()
    variables = module.init(jax.random.key(0), X)
    with pytest.raises(tpp.errors.TPPError, match=r"nnx\.bridge\.Module.*apply"):
        tpp.channel_groups(module, X, params=variables)
    groups = tpp.channel_groups(
        lambda variables, x: module.apply(variables, x), X, params=variables
    )
    assert [group.size for group in groups if group.reason is None] == [8]
