"""Equinox modules in runs."""

import equinox as eqx
import jax
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.errors import TPPError
from tpp_jax.interop.equinox_modules import EquinoxModel
from tpp_jax.interop.modules import as_nnx, name_of
from tpp_jax.training.structure import split

X = np.random.default_rng(0).normal(size=(4, 3, 6, 6)).astype("float32")


class Block(eqx.Module):
    """Layers with static sizes that have to follow the channels."""

    conv: eqx.nn.Conv2d
    depth: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    last: eqx.nn.LayerNorm

    def __init__(self, key):
        keys = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(3, 16, 3, padding=1, key=keys[0])
        self.depth = eqx.nn.Conv2d(16, 16, 3, padding=1, groups=16, key=keys[1])
        self.norm, self.last = eqx.nn.GroupNorm(4, 16), eqx.nn.LayerNorm(16)

    def __call__(self, x):
        x = self.norm(self.depth(jax.nn.relu(self.conv(x))))
        return self.last(jax.nn.relu(x).mean((1, 2)))


class Net(eqx.Module):
    blocks: list
    dropout: eqx.nn.Dropout
    head: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key)
        self.blocks, self.dropout = [Block(keys[0])], eqx.nn.Dropout(0.5)
        self.head = eqx.nn.MLP(16, 2, 12, 1, key=keys[1])

    def __call__(self, x, *, key=None):
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x, key=key))


NET = Net(jax.random.key(0))


@pytest.fixture(scope="module")
def pruned():
    """The model, half of whose channels are gone, its plan, and the unpruned one."""
    model = as_nnx(NET, rngs=nnx.Rngs(0))
    model.eval()
    groups = tpp.channel_groups(model, X[:1])
    plan = tpp.make_plan(groups, model, {"net.blocks.0.conv": 0.5, "*layers.0": 0.25})
    return tpp.prune(model, plan), plan, model


def test_a_module_is_applied_to_a_batch_in_both_modes():
    model = as_nnx(NET, rngs=nnx.Rngs(0))
    assert isinstance(model, EquinoxModel) and name_of(model) == "Net"
    first, second = model(X), model(X)
    assert not np.allclose(first, second)  # dropout
    model.eval()
    still = eqx.nn.inference_mode(NET)
    np.testing.assert_allclose(model(X), jax.vmap(still)(X), rtol=1e-5, atol=1e-6)
    params, rest = split(model)
    assert len(jax.tree.leaves(params)) == 12 and not jax.tree.leaves(rest)


def test_static_sizes_follow_the_channels(pruned):
    small, plan, model = pruned
    block = small.module().blocks[0]
    assert (block.depth.groups, block.norm.groups) == (8, 2)
    assert block.last.shape == (8,)
    assert small.module().head.layers[0].weight.shape == (9, 8)
    still = eqx.nn.inference_mode(sliced_as_a_tree(plan))
    np.testing.assert_allclose(small(X), jax.vmap(still)(X), rtol=1e-5, atol=1e-6)
    assert model.module().blocks[0].depth.groups == 16  # not touched


def sliced_as_a_tree(plan):
    """Returns the module cut by the same plan as a tree of parameters."""

    def call(net, x):
        return jax.vmap(net)(x)

    net = eqx.nn.inference_mode(NET)
    groups = tpp.channel_groups(call, X[:1], params=net)
    kept = {name.removeprefix("net."): each for name, each in plan.kept.items()}
    counts = {name: len(each) for name, each in kept.items()}
    made = tpp.make_plan(groups, net, counts=counts)
    assert all(np.array_equal(made.kept[name], each) for name, each in kept.items())
    return tpp.prune(call, made, net)


def test_a_saved_module_is_loaded_with_its_sizes(pruned, tmp_path):
    small, plan, _ = pruned
    tpp.save_model(tmp_path / "small", small, plan)
    loaded = tpp.load_model(tmp_path / "small", as_nnx(NET, rngs=nnx.Rngs(1)))
    loaded.eval()
    np.testing.assert_array_equal(loaded(X), small(X))


def test_a_run_trains_and_prunes_it():
    data = X, (X.mean((1, 2, 3)) > 0).astype("int32")
    tiny = {"granularity": 1.0, "every": 1, "stabilize": 6, "zero_out_every": 1}
    result = tpp.fit(
        NET,
        (data, data),
        ratios={"*layers.0": 0.25},
        epochs=1,
        batch_size=4,
        schedule=tiny,
        config={"num_devices": 1},
    )
    assert isinstance(result.pruned, EquinoxModel)
    assert result.pruned.module().head.layers[0].weight.shape == (9, 16)
    assert result.dense.module().head.layers[0].weight.shape == (12, 16)


def test_a_module_with_a_state_is_refused():
    norm = eqx.nn.BatchNorm(4, "batch", mode="ema")
    with pytest.raises(TPPError, match="keeps a state"):
        as_nnx(norm, rngs=nnx.Rngs(0))
