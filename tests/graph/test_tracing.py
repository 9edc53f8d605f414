"""Reasons: which input or output is meant, and which line of whose code."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.graph.layers import Layer
from tpp_jax.graph.records import Supposition
from tpp_jax.graph.tracing import Trace


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


PARAMS = {"stem": shape(6, 16), "up": shape(16, 8), "head": shape(16, 3)}


def returning(outputs):
    def fn(p, x):
        stream = x @ p["stem"]
        return outputs(stream, jax.nn.relu(stream @ p["up"]), stream @ p["head"])

    return tpp.channel_groups(fn, shape(2, 6), params=PARAMS)


def test_of_several_outputs_the_one_that_channels_come_out_of_is_named():
    groups = returning(lambda stream, inner, logits: (logits, {"stream": stream}))
    assert groups["stem"].reason == "an output of the model [1]['stream']"
    assert groups["head"].reason == "an output of the model [0]"
    groups = returning(
        lambda stream, inner, logits: {"a": [stream, inner], "b": logits}
    )
    assert groups["stem"].reason == "an output of the model ['a'][0]"
    assert groups["up"].reason == "an output of the model ['a'][1]"


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"logits": x}])
def test_a_single_output_needs_no_name(wrap):
    groups = returning(lambda stream, inner, logits: wrap(logits))
    assert groups["stem"].reason is None
    assert groups["head"].reason == "an output of the model"


def test_what_layers_compute_for_nothing_follows_the_channels_too():
    def fn(p, x):
        stream = x @ p["stem"]
        auxiliary = stream @ p["up"] + p["bias"]  # a head that training reads
        jax.nn.softmax(auxiliary)
        return stream @ p["head"]

    params = PARAMS | {"bias": shape(8)}
    groups = tpp.channel_groups(fn, shape(2, 6), params=params)
    assert [(g.name, g.size, g.reason) for g in groups] == [
        ("stem", 16, None),
        ("up", 8, None),
        ("head", 3, "an output of the model"),
    ]
    count = tpp.count(fn, shape(2, 6), params=params)
    assert count.flops == 2 * 2 * 16 * (6 + 3)
    assert count.layers["up"].flops == 0


def test_of_several_inputs_the_one_that_channels_meet_is_named():
    def fn(p, x, more):
        return (x @ p["stem"] * more["gate"]) @ p["head"]

    more = {"gate": shape(2, 16), "unused": shape(3)}
    params = {"stem": shape(6, 16), "head": shape(16, 3)}
    groups = tpp.channel_groups(fn, shape(2, 6), more, params=params)
    assert groups["stem"].reason == "an input of the model [1]['gate']"
    groups = tpp.channel_groups(
        lambda p, more: fn(p, jnp.ones((2, 6)), more),
        {"gate": shape(2, 16)},
        params=params,
    )
    assert groups["stem"].reason == "an input of the model"


def test_an_input_given_by_its_name_is_named_by_it():
    def fn(p, x, *, gate):
        return (x @ p["stem"] * gate) @ p["head"]

    params = {"stem": shape(6, 16), "head": shape(16, 3)}
    groups = tpp.channel_groups(fn, shape(2, 6), gate=shape(2, 16), params=params)
    assert groups["stem"].reason == "an input of the model ['gate']"


WRITTEN = """
def halves(x):
    return x.reshape(2, 4, 8)

def net(p, x, reshape=halves):
    h = reshape(x @ p['stem'])
    return h.sum(1) @ p['head']
"""


def function_at(*place):
    """A network that is written in a file of this name, next to JAX's folder."""
    site = pathlib.Path(jax.__file__).parent.parent
    names = {}
    exec(compile(WRITTEN, str(site.joinpath(*place)), "exec"), names)
    return names


def reason_of(fn):
    params = {"stem": shape(6, 32), "head": shape(8, 3)}
    return tpp.channel_groups(fn, shape(2, 6), params=params)["stem"].reason


@pytest.mark.parametrize("package", ["jaxfoo", "flaxen", "jax_tools", "equinox2"])
def test_a_package_is_not_taken_for_a_library_that_its_name_begins_with(package):
    fn = function_at(package, "model.py")["net"]
    assert "(model.py:3)" in reason_of(fn)


@pytest.mark.parametrize("library", ["jax", "flax"])
def test_lines_of_jax_and_flax_are_not_named(library):
    halves = function_at(library, "inside.py")["halves"]

    def net(p, x):
        return halves(x @ p["stem"]).sum(1) @ p["head"]

    assert "(test_tracing.py:" in reason_of(net)


def test_a_line_of_a_library_of_layers_is_named_where_there_is_no_other():
    halves = function_at("equinox", "nn", "layer.py")["halves"]

    def net(p, x):
        return halves(x @ p["stem"]).sum(1) @ p["head"]

    assert "(test_tracing.py:" in reason_of(net)
    assert "(layer.py:3)" in reason_of(function_at("equinox", "nn", "layer.py")["net"])


@pytest.mark.parametrize("record", [Trace, Layer, Supposition])
def test_what_is_read_off_a_model_is_no_tree_of_arrays(record):
    assert not issubclass(record, tuple)


class Grouped(nnx.Module):
    """A convolution in four groups of two inputs, between two other layers."""

    def __init__(self, multiplier, rngs):
        self.a = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.g = nnx.Conv(8, 8 * multiplier, (3, 3), feature_group_count=4, rngs=rngs)
        self.h = nnx.Linear(8 * multiplier, 5, rngs=rngs)

    def __call__(self, x):
        return self.h(nnx.relu(self.g(nnx.relu(self.a(x)))).mean((1, 2)))


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_a_grouped_convolution_left_with_one_input_a_group_is_no_depthwise_one(
    multiplier,
):
    net = Grouped(multiplier, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    groups = tpp.channel_groups(net, x)
    plan = tpp.make_plan(groups, net, {"a": 0.5})
    small = tpp.prune(net, plan)
    assert small.g.kernel.shape == (3, 3, 1, 8 * multiplier)
    graph, state = nnx.split(net)
    masked = jax.tree.map(jnp.multiply, state, tpp.mask_tree(plan, state))
    expected = nnx.merge(graph, masked)(x)
    assert jnp.allclose(small(x), expected, atol=1e-5)
    tpp.check_groups(net, x, groups=groups)
