"""Groups are read off the computation: tied axes, and what is kept and why."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import tpp_jax as tpp
from tests.reference import filled
from tpp_jax.graph.naming import named_leaves
from tpp_jax.models import MLP, CifarResNet, CifarVGG, LeNet5


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def groups_of(create, example):
    return tpp.channel_groups(nnx.eval_shape(create), example)


@functools.cache
def resnet(option):
    return groups_of(
        lambda: CifarResNet((1, 1, 1), width=0.25, option=option, rngs=nnx.Rngs(0)),
        shape(1, 8, 8, 3),
    )


@functools.cache
def vgg():
    return groups_of(lambda: CifarVGG([4, "M", 6], rngs=nnx.Rngs(0)), shape(1, 8, 8, 3))


def summary(groups):
    return [(g.name, g.size, g.producers, g.reason) for g in groups]


def slots(group, role=None):
    """Returns the axes of leaves that a group runs through."""
    return {(m.leaf, m.axis) for m in group.members if role in (None, m.role)}


def norm(name):
    return {(f"{name}.{leaf}", 0) for leaf in ("scale", "bias", "mean", "var")}


def positions(groups, name, leaf, axis):
    return next(
        m.positions for m in groups[name].members if (m.leaf, m.axis) == (leaf, axis)
    )


OUTPUT = "an output of the model"


def test_resnet_of_option_b_has_one_stream_per_stage():
    assert summary(resnet("B")) == [
        ("conv1", 4, ("conv1", "layer1.0.conv2"), None),
        ("layer1.0.conv1", 4, ("layer1.0.conv1",), None),
        ("layer2.0.conv1", 8, ("layer2.0.conv1",), None),
        ("layer2.0.conv2", 8, ("layer2.0.conv2", "layer2.0.downsample.0"), None),
        ("layer3.0.conv1", 16, ("layer3.0.conv1",), None),
        ("layer3.0.conv2", 16, ("layer3.0.conv2", "layer3.0.downsample.0"), None),
        ("linear", 10, ("linear",), OUTPUT),
    ]


def test_a_residual_stream_runs_through_all_that_add_to_it_and_read_it():
    stream = resnet("B")["layer2.0.conv2"]
    assert slots(stream, "produced") == {
        ("layer2.0.conv2.kernel", 3),
        ("layer2.0.downsample.0.kernel", 3),
    }
    assert slots(stream, "contracted") == {
        ("layer3.0.conv1.kernel", 2),
        ("layer3.0.downsample.0.kernel", 2),
    }
    assert slots(stream, "along") == norm("layer2.0.bn2") | norm(
        "layer2.0.downsample.1"
    )


@pytest.mark.parametrize("option", ["A", "B"])
def test_channels_inside_a_block_are_tied_to_their_norm_and_the_next_kernel(option):
    for block in ("layer1.0", "layer2.0", "layer3.0"):
        group = resnet(option)[f"{block}.conv1"]
        assert group.reason is None
        assert slots(group, "produced") == {(f"{block}.conv1.kernel", 3)}
        assert slots(group, "contracted") == {(f"{block}.conv2.kernel", 2)}
        assert slots(group, "along") == norm(f"{block}.bn1")
        for member in group.members:
            np.testing.assert_array_equal(member.positions[:, 0], np.arange(group.size))


def test_padded_shortcuts_tie_the_middle_channels_of_all_stages():
    # 4 channels; stage 2 has 2 + 4 + 2, stage 3 has 4 + (2 + 4 + 2) + 4.
    groups = resnet("A")
    stream = groups["conv1"]
    assert stream.reason is None
    assert stream.size == 4
    inner = ("layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2")
    assert stream.producers == ("conv1", *inner)
    for leaf, axis, first in [
        ("conv1.kernel", 3, 0),
        ("layer1.0.conv1.kernel", 2, 0),
        ("layer2.0.conv2.kernel", 3, 2),
        ("layer2.0.bn2.var", 0, 2),
        ("layer3.0.conv1.kernel", 2, 2),
        ("layer3.0.conv2.kernel", 3, 6),
        ("linear.kernel", 0, 6),
    ]:
        expected = np.arange(first, first + 4)[:, None]
        np.testing.assert_array_equal(positions(groups, "conv1", leaf, axis), expected)


def test_channels_that_meet_the_padding_of_a_shortcut_cannot_be_pruned():
    groups = resnet("A")
    assert [(g.name, g.size) for g in groups if g.reason] == [
        ("layer2.0.conv2", 4),
        ("layer3.0.conv2", 8),
        ("linear", 10),
    ]
    for stage, width in (("layer2", 2), ("layer3", 4)):
        assert groups[f"{stage}.0.conv2"].reason.startswith(
            f"padding of a fixed width ({width} before, {width} after) (cifar_resnet.py"
        )
    assert groups["layer2.0.conv2"].producers == ("layer2.0.conv2", "layer3.0.conv2")
    outer = positions(groups, "layer2.0.conv2", "layer2.0.conv2.kernel", 3)
    assert outer[:, 0].tolist() == [0, 1, 6, 7]
    outer = positions(groups, "layer3.0.conv2", "linear.kernel", 0)
    assert outer[:, 0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]


def test_vgg_channels_are_tied_to_the_norm_and_the_next_layer():
    groups = vgg()
    assert summary(groups) == [
        ("features.0", 4, ("features.0",), None),
        ("features.4", 6, ("features.4",), None),
        ("classifier", 10, ("classifier",), OUTPUT),
    ]
    assert slots(groups["features.0"]) == {
        ("features.0.kernel", 3),
        ("features.4.kernel", 2),
        *norm("features.1"),
    }
    assert slots(groups["features.4"]) == {
        ("features.4.kernel", 3),
        ("classifier.kernel", 0),
        *norm("features.5"),
    }
    assert slots(groups["classifier"]) == {
        ("classifier.kernel", 1),
        ("classifier.bias", 0),
    }


def test_mlp_groups():
    groups = groups_of(
        lambda: MLP(3, image_shape=(2, 2, 1), hidden=5, rngs=nnx.Rngs(0)),
        shape(1, 2, 2, 1),
    )
    assert summary(groups) == [
        ("net.0", 5, ("net.0",), None),
        ("net.2", 5, ("net.2",), None),
        ("net.4", 10, ("net.4",), OUTPUT),
    ]
    assert slots(groups["net.2"], "produced") == {("net.2.kernel", 1)}
    assert slots(groups["net.2"], "contracted") == {("net.4.kernel", 0)}
    assert slots(groups["net.2"], "along") == {("net.2.bias", 0)}


def test_lenet_groups_cross_the_flattening():
    groups = groups_of(lambda: LeNet5(rngs=nnx.Rngs(0)), shape(1, 32, 32, 1))
    assert summary(groups) == [
        ("conv1", 6, ("conv1",), None),
        ("conv2", 16, ("conv2",), None),
        ("conv3", 120, ("conv3",), None),
        ("fc4", 84, ("fc4",), None),
        ("fc5", 10, ("fc5",), OUTPUT),
    ]
    assert slots(groups["conv3"]) == {
        ("conv3.kernel", 3),
        ("conv3.bias", 0),
        ("fc4.kernel", 0),
    }


def mlp(p, x):
    return jax.nn.relu(x @ p["first"]["w"] + p["first"]["b"]) @ p["last"]


MLP_PARAMS = {"first": {"w": shape(3, 8), "b": shape(8)}, "last": shape(8, 2)}


def test_a_plain_function_and_its_parameter_tree_are_accepted():
    groups = tpp.channel_groups(mlp, shape(1, 3), params=MLP_PARAMS)
    assert summary(groups) == [
        ("first", 8, ("first",), None),
        ("last", 2, ("last",), OUTPUT),
    ]
    assert slots(groups["first"]) == {("first.w", 1), ("first.b", 0), ("last", 0)}
    assert repr(groups) == "Groups(2 groups, 1 prunable)"
    assert groups.shapes == {"first.w": (3, 8), "first.b": (8,), "last": (8, 2)}


def test_a_function_without_parameters_and_an_object_that_is_no_model_are_refused():
    with pytest.raises(TypeError, match="params=tree"):
        tpp.channel_groups(mlp, shape(1, 3))
    with pytest.raises(TypeError, match="a Flax module or a function"):
        tpp.channel_groups("resnet", shape(1, 3))
    with pytest.raises(TypeError, match="bare array"):
        tpp.channel_groups(jnp.dot, shape(3), params=shape(2, 3))


def test_a_kernel_may_be_transposed_before_its_layer():
    def fn(p, x):
        return jnp.einsum("hd,bd->bh", p["a"], x) @ p["b"].T

    params = {"a": shape(5, 3), "b": shape(2, 5)}
    groups = tpp.channel_groups(fn, shape(4, 3), params=params)
    assert summary(groups)[0] == ("a", 5, ("a",), None)
    assert slots(groups["a"], "produced") == {("a", 0)}
    assert slots(groups["a"], "contracted") == {("b", 1)}


def conv(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_a_flattened_feature_map_spreads_each_channel_over_the_dense_rows():
    def fn(p, x):
        y = jax.nn.relu(conv(x, p["conv"]))
        return y.reshape(y.shape[0], -1) @ p["dense"]

    params = {"conv": shape(3, 3, 2, 5), "dense": shape(4 * 6 * 5, 7)}
    groups = tpp.channel_groups(fn, shape(2, 4, 6, 2), params=params)
    assert summary(groups)[0] == ("conv", 5, ("conv",), None)
    rows = positions(groups, "conv", "dense", 0)
    # Position (h, w, c) of the map is row (6h + w)·5 + c.
    np.testing.assert_array_equal(rows, np.arange(120).reshape(24, 5).T)


def test_concatenated_channels_are_separate_groups_with_their_positions():
    def fn(p, x):
        both = jnp.concatenate([conv(x, p["a"]), conv(x, p["b"])], axis=-1)
        return conv(jax.nn.relu(both * p["scale"]), p["c"])

    params = {"a": shape(1, 1, 2, 3), "b": shape(1, 1, 2, 4), "c": shape(1, 1, 7, 6)}
    params["scale"] = shape(7)
    groups = tpp.channel_groups(fn, shape(1, 4, 4, 2), params=params)
    assert summary(groups) == [
        ("a", 3, ("a",), None),
        ("b", 4, ("b",), None),
        ("c", 6, ("c",), OUTPUT),
    ]
    assert positions(groups, "a", "c", 2)[:, 0].tolist() == [0, 1, 2]
    assert positions(groups, "b", "c", 2)[:, 0].tolist() == [3, 4, 5, 6]
    assert positions(groups, "b", "scale", 0)[:, 0].tolist() == [3, 4, 5, 6]


def test_a_layer_that_runs_twice_is_pruned_on_both_sides():
    def fn(p, x):
        hidden = jax.nn.relu(x @ p["in"])
        for _ in range(2):
            hidden = jax.nn.relu(hidden @ p["again"])
        return hidden @ p["out"]

    params = {"in": shape(3, 6), "again": shape(6, 6), "out": shape(6, 2)}
    groups = tpp.channel_groups(fn, shape(1, 3), params=params)
    assert summary(groups)[0] == ("in", 6, ("in", "again"), None)
    assert slots(groups["in"], "contracted") == {("again", 0), ("out", 0)}
    assert groups.layers == ("in", "again", "out")


def switch(p, h):
    scores = jnp.sum(h @ p["decides"], axis=0)
    branches = [jnp.tanh, jnp.square, jnp.sin, jnp.cos]
    return lax.switch(jnp.argmax(scores), branches, h)


def branch(p, h):
    return lax.cond((h @ p["decides"])[0, 1] > 0, jnp.tanh, jnp.square, h)


def loop(p, h):
    return lax.while_loop(lambda c: (c @ p["decides"])[0, 2] > 1, lambda c: c / 2, h)


def carried(p, h):
    start = h, h @ p["decides"]
    halve = lambda c: (c[0] / 2, c[1] / 2)  # noqa: E731
    return lax.while_loop(lambda c: c[1][0, 3] > 1, halve, start)[0]


@pytest.mark.parametrize("layer", [switch, branch, loop, carried])
def test_what_branches_and_loops_depend_on_is_kept(layer):
    def fn(p, x):
        return layer(p, x @ p["in"]) @ p["out"]

    params = {"in": shape(3, 6), "decides": shape(6, 4), "out": shape(6, 2)}
    groups = tpp.channel_groups(fn, shape(1, 3), params=params)
    assert groups["decides"].reason is not None
    assert groups["in"].reason is None
    assert tpp.count(fn, shape(1, 3), params=params).layers["decides"].flops == 48


def test_channels_are_followed_through_loops_and_branches():
    def fn(p, x):
        hidden = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x @ p["in"], p["all"])[
            0
        ]
        hidden = lax.cond(jnp.sum(x) > 0, jnp.tanh, jnp.square, hidden)
        hidden = lax.while_loop(lambda c: jnp.all(c < 9), lambda c: c + 1, hidden)
        return hidden @ p["last"]

    params = {"in": shape(3, 4), "all": shape(5, 4, 4), "last": shape(4, 2)}
    groups = tpp.channel_groups(fn, shape(1, 3), params=params)
    assert summary(groups) == [
        ("in", 4, ("in", "all"), None),
        ("last", 2, ("last",), OUTPUT),
    ]
    assert slots(groups["in"], "contracted") == {("all", 1), ("last", 0)}
    assert slots(groups["in"], "produced") == {("in", 1), ("all", 2)}
    # A layer in a loop costs its FLOPs in every iteration.
    assert tpp.count(fn, shape(1, 3), params=params).layers["all"].flops == 5 * 32


def grouped_convolution(groups, width):
    def fn(p, x):
        y = lax.conv_general_dilated(
            conv(x, p["first"]),
            p["middle"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return conv(y, p["last"])

    params = {"first": shape(1, 1, 3, 4), "middle": shape(3, 3, 4 // groups, width)}
    params["last"] = shape(1, 1, width, 2)
    return tpp.channel_groups(fn, shape(1, 4, 4, 3), params=params)


def test_a_depthwise_convolution_passes_its_input_channels_on():
    groups = grouped_convolution(groups=4, width=8)
    assert groups["first"].producers == ("first", "middle")
    assert positions(groups, "first", "middle", 3).tolist() == [
        [0, 1], [2, 3], [4, 5], [6, 7]
    ]  # fmt: skip
    assert positions(groups, "first", "last", 2).tolist() == [
        [0, 1], [2, 3], [4, 5], [6, 7]
    ]  # fmt: skip


def test_a_grouped_convolution_loses_the_same_channels_in_every_group():
    groups = grouped_convolution(groups=2, width=6)
    assert groups["first"].size == 2
    assert positions(groups, "first", "first", 3).tolist() == [[0, 2], [1, 3]]
    assert positions(groups, "first", "middle", 2).tolist() == [[0], [1]]
    assert groups["middle"].size == 3
    assert positions(groups, "middle", "last", 2).tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("wrap", ["jit", "checkpoint", "custom_jvp", "custom_vjp"])
def test_nested_calls_are_seen_through(wrap):
    def inner(x, w):
        return jax.nn.relu(x @ w)

    if wrap == "jit":
        call = jax.jit(inner)
    elif wrap == "checkpoint":
        call = jax.checkpoint(inner)
    elif wrap == "custom_jvp":
        call = jax.custom_jvp(inner)
        call.defjvp(lambda primals, tangents: (inner(*primals), inner(*tangents)))
    else:
        call = jax.custom_vjp(inner)
        call.defvjp(lambda x, w: (inner(x, w), None), lambda _, g: (g, g))

    params = {"a": shape(3, 4), "b": shape(4, 2)}
    groups = tpp.channel_groups(
        lambda p, x: call(call(x, p["a"]), p["b"]), shape(1, 3), params=params
    )
    assert summary(groups) == [("a", 4, ("a",), None), ("b", 2, ("b",), OUTPUT)]


def test_an_axis_of_size_one_is_not_coupled_with_the_axis_it_is_broadcast_to():
    def fn(p, x):
        gate = jax.nn.sigmoid(x @ p["gate"])  # [batch, 1]
        hidden = gate * jax.nn.relu(x @ p["wide"] + p["offset"])
        return hidden @ p["last"]

    params = {"gate": shape(3, 1), "wide": shape(3, 6), "last": shape(6, 2)}
    params["offset"] = shape(1, 1)
    groups = tpp.channel_groups(fn, shape(1, 3), params=params)
    assert slots(groups["wide"]) == {("wide", 1), ("last", 0)}
    assert groups["wide"].size == 6
    assert slots(groups["gate"]) == {("gate", 1)}


def test_a_fixed_slice_or_constant_keeps_the_channels_it_meets():
    def fn(p, x):
        halves = (x @ p["halved"])[:, :2]
        weighted = (x @ p["weighted"]) * np.linspace(1, 2, 4, dtype=np.float32)
        return halves @ p["a"] + weighted @ p["b"]

    params = {"halved": shape(3, 4), "weighted": shape(3, 4)}
    params |= {"a": shape(2, 2), "b": shape(4, 2)}
    groups = tpp.channel_groups(fn, shape(1, 3), params=params)
    assert groups["halved"].reason.startswith("a size written into the model (test_gr")
    assert groups["weighted"].reason == "an array built into the model"
    with pytest.raises(ValueError, match="halved meet a size written into the model"):
        tpp.channel_groups(fn, shape(1, 3), params=params, strict=True)


def test_normalizing_over_channels_is_recorded():
    def fn(p, x):
        return jax.nn.softmax(x @ p["a"]) @ p["b"]

    groups = tpp.channel_groups(
        fn, shape(1, 3), params={"a": shape(3, 4), "b": shape(4, 2)}
    )
    assert groups["a"].reason is None
    assert groups["a"].reduced
    assert not any(group.reduced for group in resnet("A"))


def test_layers_are_numbered_in_order_of_execution():
    order = {m.leaf: m.order for g in resnet("A") for m in g.members}
    layers = resnet("A").layers
    assert layers == (
        "conv1",
        *(f"layer{stage}.0.conv{i}" for stage in (1, 2, 3) for i in (1, 2)),
        "linear",
    )
    assert [order[f"{layer}.kernel"] for layer in layers] == list(range(8))
    assert order["layer2.0.bn1.scale"] == order["layer2.0.conv1.kernel"] == 3
    assert order["layer2.0.bn2.bias"] == order["layer2.0.conv2.kernel"] == 4
    assert order["linear.bias"] == 7


def test_order_of_execution_is_not_the_order_of_names():
    def fn(p, x):
        return jax.nn.relu(x @ p["z"] + p["c"]) @ p["a"]

    params = {"a": shape(4, 2), "c": shape(4), "z": shape(3, 4)}
    groups = tpp.channel_groups(fn, shape(1, 3), params=params)
    assert [g.name for g in groups] == ["z", "a"]
    assert groups.layers == ("z", "a")
    assert {m.leaf: m.order for m in groups["z"].members} == {"z": 0, "c": 0, "a": 1}


def test_the_batch_size_of_the_example_does_not_matter():
    def described(batch):
        return groups_of(
            lambda: CifarVGG([4], rngs=nnx.Rngs(0)), shape(batch, 4, 4, 3)
        ).all

    assert described(1) == described(4) == described(10)


def test_the_model_is_not_modified():
    model = filled(lambda: CifarVGG([4, "M", 6], rngs=nnx.Rngs(0)))
    model.train()
    graphdef, state = nnx.split(model)
    before = {name: np.array(leaf) for name, leaf in named_leaves(state).items()}
    groups = tpp.channel_groups(model, jnp.ones((2, 8, 8, 3)))
    assert summary(groups) == summary(vgg())  # with abstract shapes alone
    assert nnx.graphdef(model) == graphdef  # still in training mode
    after = named_leaves(nnx.state(model))
    assert after.keys() == before.keys()
    for name, leaf in before.items():
        np.testing.assert_array_equal(after[name], leaf)


def test_example_inputs_are_kept_as_shapes():
    [x] = resnet("A").inputs
    assert x == shape(1, 8, 8, 3)
