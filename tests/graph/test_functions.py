"""NNX modules run as functions: in evaluation mode, with the operations of Flax."""

import gc

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.graph import functions
from tpp_jax.graph.comparing import is_equal
from tpp_jax.graph.tracing import trace


class Network(nnx.Module):
    def __init__(self, dtype, param_dtype, rngs):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = nnx.Conv(3, 4, (3, 3), **types)
        self.norm = nnx.LayerNorm(4, **types)
        self.dense = nnx.Linear(4, 2, use_bias=False, **types)

    def __call__(self, x):
        return self.dense(jax.nn.relu(self.norm(self.conv(x))).mean((1, 2)))


def network(dtype, param_dtype):
    return nnx.eval_shape(lambda: Network(dtype, param_dtype, nnx.Rngs(0)))


@pytest.mark.parametrize("images", [jnp.float32, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_layers_convert_their_arrays_as_flax_does(
    monkeypatch, images, dtype, param_dtype
):
    model = network(dtype, param_dtype)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), images)
    found = trace(model, images)
    ours, *_ = tpp.channel_groups(model, images)
    monkeypatch.setattr(functions, "_skip_promotion", lambda module: None)
    plain, *_ = tpp.channel_groups(model, images)
    assert is_equal(found, trace(model, images))
    assert ours == plain


def test_traces_are_equal_only_with_equal_shapes_and_parameters():
    def fn(scale, axis, params, x):
        return jnp.sum(x @ params["w"], axis=axis, keepdims=True) * scale

    def traced(width, axis):
        params = {"w": jax.ShapeDtypeStruct((4, width), jnp.float32)}
        images = jax.ShapeDtypeStruct((width, 4), jnp.float32)
        return trace(lambda p, x: fn(2, axis, p, x), images, params=params)

    assert is_equal(traced(3, 0), traced(3, 0))
    assert not is_equal(traced(3, 0), traced(5, 0))
    assert not is_equal(traced(3, 0), traced(3, 1))


class Swapping(nnx.Module):
    """Replaces a module where evaluation begins."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.drop = nnx.data(None)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def eval(self, **attributes):
        del attributes
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.last(self.drop(self.first(x)))


def test_modules_made_where_evaluation_begins_are_evaluated():
    model = nnx.eval_shape(lambda: Swapping(nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((1, 3), jnp.float32)
    groups = tpp.channel_groups(model, images)
    assert [(g.name, g.size) for g in groups if g.reason is None] == [("first", 4)]
    names = {eqn.primitive for eqn in groups.traced.equations}
    assert names.isdisjoint({"random_bits", "threefry2x32", "random_wrap"})


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        tpp.channel_groups(network(None, jnp.float32), jnp.ones((1, 8, 8, 3)))
        assert gc.isenabled() is enabled
        with pytest.raises(AttributeError):
            tpp.channel_groups(network(None, jnp.float32), None)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
