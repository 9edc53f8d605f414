"""Groups and plans are tried on models of all libraries, with all their arguments."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.pruning.masking import masked, prunable
from tpp_jax.errors import TPPError

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(5, 12, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.b = nnx.Linear(12, 2, rngs=rngs)

    def __call__(self, x, *, scale, train):
        h = self.drop(nnx.relu(self.a(x)), deterministic=not train)
        return self.b(h * scale)


def test_keyword_arguments_are_passed_to_the_model():
    net, x, scale = Noisy(nnx.Rngs(0)), array(3, 5), jnp.ones((1, 1))
    kwargs = {"scale": scale, "train": False}
    groups = tpp.channel_groups(net, x, **kwargs)
    assert prunable(groups) == {"a"}
    assert tpp.count(net, x, **kwargs).flops == 2 * 3 * (5 * 12 + 12 * 2)
    assert tpp.check_groups(net, x, **kwargs).masked < 1e-5
    assert tpp.jacobian_singular_values(net, x, **kwargs).min() > 0
    means = tpp.activation_means(net, [x], **kwargs)
    assert means["a.kernel"].shape == (1, 12)
    small = tpp.prune(net, tpp.make_plan(groups, net, 0.5))
    assert small.a.kernel.shape == (5, 6)
    assert small(x, **kwargs).shape == (3, 2)


def test_a_missing_argument_is_not_reported_as_a_wrong_size():
    net, x = Noisy(nnx.Rngs(0)), array(3, 5)
    graphdef, state = nnx.split(net)

    def call(state, x):
        return nnx.merge(graphdef, state)(x, scale=1.0, train=False)

    plan = tpp.make_plan(tpp.channel_groups(call, x, params=state), net, 0.5)
    with pytest.raises(TPPError, match=r"cannot be called with the inputs.*'scale'"):
        tpp.prune(net, plan)


def test_equinox_modules_keep_their_functions_and_settings():
    key = jax.random.key(0)
    net = eqx.nn.Sequential(
        [
            eqx.nn.MLP(4, 10, 16, 2, key=key),
            eqx.nn.Dropout(0.3, inference=True),
            eqx.nn.LayerNorm(10),
            eqx.nn.Linear(10, 3, key=key),
        ]
    )
    x = array(5, 4)

    def call(net, x):
        return jax.vmap(lambda x: net(x, key=key))(x)

    groups = tpp.channel_groups(call, x, params=net)
    plan = tpp.make_plan(groups, net, {"layers.0.layers.[01]": 0.5})
    small = tpp.prune(call, plan, net)
    assert small.layers[0].activation is net.layers[0].activation
    np.testing.assert_allclose(
        call(small, x), masked(call, plan, net, x), rtol=1e-5, atol=1e-5
    )
    assert tpp.check_groups(call, x, params=net).masked < 1e-5
    # The norm compares its input with an attribute, which follows.
    plan = tpp.make_plan(groups, net, {"layers.0.layers.2": 0.5})
    small = tpp.prune(call, plan, net)
    assert small.layers[2].shape == (5,)
    assert call(small, x).shape == (5, 3)
    assert net.layers[2].shape == (10,)
