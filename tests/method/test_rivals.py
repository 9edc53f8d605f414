"""Shrinking all filters: the gradients are those of their equations, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tpp_jax as tpp
from tpp_jax.method.rivals import add_group_lasso, add_growing_l2


def network(params, x):
    """Three dense layers; the first two produce groups, the second's is left whole."""
    hidden = jnp.maximum(x @ params["a"]["kernel"] + params["a"]["bias"], 0)
    return jnp.maximum(hidden @ params["b"]["kernel"], 0) @ params["c"]["kernel"]


@pytest.fixture
def setting():
    """(plan that prunes ``a`` alone, parameters, gradients), float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = {"a": {"kernel": (5, 6), "bias": (6,)}, "b": {"kernel": (6, 4)}}
        shapes["c"] = {"kernel": (4, 3)}
        is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
        params, grads = (
            jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s)), shapes, **is_shape)
            for _ in range(2)
        )
        params["a"]["kernel"] = params["a"]["kernel"].at[:, 2].set(0)
        groups = tpp.channel_groups(network, jnp.ones((1, 5)), params=params)
        yield tpp.make_plan(groups, params, {"a": 0.5}), params, grads


def changes(tx, params, grads, updates=1):
    """What a transform adds to the gradients in its last update, and its state."""
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(updates):
        new, state = step(grads, state, params)
    return jax.tree.map(lambda a, b: np.asarray(a - b), new, grads), state


def assert_only(added, expected):
    assert not added["a"]["bias"].any()
    assert not added["b"]["kernel"].any() and not added["c"]["kernel"].any()
    np.testing.assert_allclose(added["a"]["kernel"], expected, rtol=1e-12, atol=1e-15)
    assert added["a"]["kernel"].dtype == np.float64


def test_the_group_lasso_pulls_every_filter_alike_and_leaves_a_zero_one(setting):
    plan, params, grads = setting
    added, state = changes(add_group_lasso(plan, 0.3), params, grads)
    kernel = np.asarray(params["a"]["kernel"])
    norms = np.sqrt(np.sum(kernel**2, axis=0))
    expected = 0.3 * np.divide(kernel, norms, out=np.zeros((5, 6)), where=norms > 0)
    assert_only(added, expected)
    assert float(state.penalty) == pytest.approx(norms.sum(), rel=1e-12)


def test_the_growing_l2_shrinks_every_filter_in_proportion(setting):
    plan, params, grads = setting
    schedule = tpp.growing_schedule(granularity=0.1, every=2, ceiling=0.3)
    added, state = changes(add_growing_l2(plan, schedule), params, grads, updates=5)
    assert float(state.strength) == pytest.approx(0.2) and int(state.step) == 5
    assert_only(added, 0.2 * np.asarray(params["a"]["kernel"]))


@pytest.mark.parametrize("shrink", [add_group_lasso, add_growing_l2])
def test_the_parameters_are_needed(setting, shrink):
    plan, params, grads = setting
    schedule = tpp.growing_schedule(granularity=0.1)
    tx = shrink(plan, 0.1 if shrink is add_group_lasso else schedule)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(grads, tx.init(params))


def test_a_channel_of_several_positions_is_one_filter():
    """The four query heads of an attention, each of three dimensions."""

    def attention(params, x):
        split = [(x @ params[n]["kernel"]).reshape(2, -1, 3) for n in ("q", "k", "v")]
        weights = jax.nn.softmax(jnp.einsum("ihd,jhd->hij", split[0], split[1]))
        mixed = jnp.einsum("hij,jhd->ihd", weights, split[2])
        return mixed.reshape(2, -1) @ params["out"]["kernel"]

    rng = np.random.default_rng(1)
    params = {
        name: {"kernel": jnp.asarray(rng.normal(size=(12, 12)), jnp.float32)}
        for name in ("q", "k", "v", "out")
    }
    groups = tpp.channel_groups(attention, jnp.ones((2, 12)), params=params)
    heads = next(group for group in groups if group.size == 4 and not group.reason)
    plan = tpp.make_plan(groups, params, counts={heads.name: 2})
    grads = jax.tree.map(jnp.zeros_like, params)
    added, _ = changes(add_group_lasso(plan, 1.0), params, grads)
    kernel = np.asarray(params["q"]["kernel"]).reshape(12, 4, 3)
    norms = np.sqrt(np.sum(kernel**2, axis=(0, 2), keepdims=True))
    expected = (kernel / norms).reshape(12, 12)
    np.testing.assert_allclose(added["q"]["kernel"], expected, rtol=1e-5)
    assert not added["out"]["kernel"].any()


def test_a_group_lasso_makes_the_filters_vanish_that_nothing_holds(setting):
    plan, params, grads = setting
    tx = optax.chain(add_group_lasso(plan, 1.0), optax.sgd(0.01))
    state, still = tx.init(params), jax.tree.map(jnp.zeros_like, grads)
    before = np.linalg.norm(params["a"]["kernel"], axis=0)
    for _ in range(50):
        updates, state = tx.update(still, state, params)
        params = optax.apply_updates(params, updates)
    after = np.linalg.norm(params["a"]["kernel"], axis=0)
    # By the same length, whatever the filter's own was.
    np.testing.assert_allclose(before - after, np.where(before > 0, 0.5, 0), rtol=1e-9)
