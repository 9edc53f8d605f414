"""Recurrent, diffusion and graph networks, plain functions: their groups by hand.

At the end every network of this file and of ``transformers.py`` is cut to half.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import tpp_jax as tpp
from tests.gallery import others, transformers
from tests.gallery.expected import free, positions, slots, whole, within
from tests.reference import filled
from tpp_jax.graph.naming import map_named


def normed(name, *more, size):
    """Channels that a norm takes in four groups.

    Whole groups can go, or the same channels of each.
    """
    return [free(name, *more, size=4), within(f"{name}#2", *more, size=size // 4)]


def recurrent(name, size):
    """What a cell makes of its input and of its state: all of its gates."""
    return free(f"{name}.cell.dense_i", f"{name}.cell.dense_h", size=size)


GROUPS = {
    "LSTM": [free("embed", size=6), recurrent("rnn", 8), whole("head", size=3)],
    "GRU": [free("embed", size=6), recurrent("rnn", 8), whole("head", size=3)],
    "two-layer GRU": [
        recurrent("lower", 8),
        recurrent("upper", 6),
        whole("head", size=3),
    ],
    "bidirectional LSTM": [
        recurrent("both.forward_rnn", 8),
        recurrent("both.backward_rnn", 8),
        whole("head", size=3),
    ],
    "diffusion U-Net": [
        free("time1", size=24),
        free("time2", size=20),
        # The first 16 channels are normed in fours and, beside 16 that come from
        # below, in eights: two of the small groups go at once. The channels of a
        # group go from whatever is normed beside them too.
        free("stem", "down.conv2", size=2),
        within("stem#2", "down.conv2", "upsample", "up1.shortcut", "up1.conv2", size=4),
        *normed("down.conv1", "down.time", size=16),
        *normed("downsample", size=16),
        *normed("middle1.conv1", "middle1.time", size=32),
        *normed(
            "middle1.shortcut",
            "middle1.conv2",
            "attention.attention.out",
            "middle2.conv2",
            size=32,
        ),
        free(
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
            size=4,
        ),
        within(
            "attention.attention.query#2",
            "attention.attention.key",
            "attention.attention.value",
            size=8,
        ),
        *normed("middle2.conv1", "middle2.time", size=32),
        free("upsample", size=2),
        *normed("up1.conv1", "up1.time", size=16),
        free("up1.shortcut", "up1.conv2", size=2),
        *normed("up2.conv1", "up2.time", size=16),
        *normed("up2.shortcut", "up2.conv2", size=16),
        whole("out", size=3),
    ],
    "GCN": [free("conv1", "conv2", size=16), whole("conv3", size=3)],
    "message passing": [
        free("embed", "rounds.0.update", "rounds.1.update", size=16),
        free("rounds.0.message1", size=24),
        free("rounds.0.message2", size=12),
        free("rounds.1.message1", size=24),
        free("rounds.1.message2", size=12),
        whole("head", size=3),
    ],
    "mixture of experts": [
        free("embed", "experts.down", size=16),
        free("experts.router", "experts.up", size=4),
        free("experts.up", size=24),
        whole("head", size=3),
    ],
    "plain decoder": [
        free("embed", "layers.out", "layers.down", size=16),
        free("layers.qkv", size=4),
        within("layers.qkv#2", size=4),
        within("layers.qkv#3", size=3, why="an axis that is indexed"),
        free("layers.up", size=24),
        whole("head", size=19),
    ],
    "pytree of modules": [
        free("encoder.0", size=12),
        free("encoder.1", size=6),
        free("decoder.0", size=12),
        whole("decoder.1", size=10),
    ],
}


@functools.cache
def network(name):
    """``(model, parameters of a function, inputs)``; the weights drawn at random."""
    models = transformers.MODELS | others.MODELS
    if name in models:
        create, inputs = models[name]
        return filled(lambda: create(rngs=nnx.Rngs(0))), None, inputs
    if name in others.FUNCTIONS:
        model, shapes, inputs = others.FUNCTIONS[name]
    else:
        model, shapes = transformers.linen_decoder()
        inputs = (transformers.TOKENS,)
    return model, drawn(shapes), inputs


def drawn(shapes):
    rng = np.random.default_rng(0)

    def draw(_, leaf):
        fan_in = np.prod(leaf.shape[:-1])
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), leaf.dtype)

    return map_named(draw, shapes)


@functools.cache
def groups_of(name):
    model, params, inputs = network(name)
    return tpp.channel_groups(model, *inputs, params=params)


def every(size, *firsts):
    """Channels that stand side by side, once from each of these places on."""
    return [[first + c for first in firsts] for c in range(size)]


@pytest.mark.parametrize("name", GROUPS)
def test_the_groups_are_those_of_the_architecture(name):
    # A reason goes on with the line of the model that it comes from.
    found = [
        (g.name, g.producers, g.size, g.inner, g.reason and g.reason.split(" (")[0])
        for g in groups_of(name)
    ]
    assert found == GROUPS[name]


@pytest.mark.parametrize(("name", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_the_gates_of_a_recurrent_cell_go_together(name, gates):
    cell = groups_of(name)["rnn.cell.dense_i"]
    of_gates = every(8, *range(0, 8 * gates, 8))
    assert positions(cell, "rnn.cell.dense_i.kernel") == of_gates
    assert positions(cell, "rnn.cell.dense_h.kernel", axis=1) == of_gates
    assert positions(cell, "rnn.cell.dense_h.kernel", axis=0) == every(8, 0)
    bias = "rnn.cell.dense_h.bias" if name == "LSTM" else "rnn.cell.dense_i.bias"
    assert positions(cell, bias) == of_gates
    assert slots(cell, "contracted") == {
        ("rnn.cell.dense_h.kernel", 0),
        ("head.kernel", 0),
    }
    assert not cell.reduced


def test_both_directions_are_read_side_by_side():
    groups = groups_of("bidirectional LSTM")
    forward, backward = groups[0], groups[1]
    assert positions(forward, "head.kernel") == every(8, 0)
    assert positions(backward, "head.kernel") == every(8, 8)


def test_a_layer_above_reads_the_state_of_the_one_below():
    groups = groups_of("two-layer GRU")
    lower, upper = groups[0], groups[1]
    assert ("upper.cell.dense_i.kernel", 0) in slots(lower, "contracted")
    assert slots(upper, "contracted") == {
        ("upper.cell.dense_h.kernel", 0),
        ("head.kernel", 0),
    }


def test_norm_groups_of_skipped_channels_are_those_of_the_concatenation():
    coarse, inner = (groups_of("diffusion U-Net")[name] for name in ("stem", "stem#2"))
    halves = [list(range(8)), list(range(8, 16))]
    assert positions(coarse, "stem.kernel") == halves
    assert positions(coarse, "down.norm1.scale") == halves
    for up in ("up1", "up2"):
        behind = [[16 + i for i in half] for half in halves]
        assert positions(coarse, f"{up}.norm1.scale") == behind
        assert positions(coarse, f"{up}.conv1.kernel") == behind
        assert positions(coarse, f"{up}.shortcut.kernel") == behind
    fours = [list(range(c, 16, 4)) for c in range(4)]
    assert positions(inner, "stem.kernel") == fours
    assert positions(inner, "upsample.kernel") == fours
    assert positions(inner, "up2.norm1.bias") == [
        list(range(c, 32, 4)) for c in range(4)
    ]
    # A sum over a group of a norm runs over its channels, not over the groups.
    assert inner.reduced and not coarse.reduced


def test_the_time_is_added_to_the_channels_of_a_convolution():
    groups = groups_of("diffusion U-Net")
    hidden = groups["middle1.conv1"]
    assert slots(hidden, "produced") == {
        ("middle1.conv1.kernel", 3),
        ("middle1.time.kernel", 1),
    }
    assert slots(hidden, "contracted") == {("middle1.conv2.kernel", 2)}
    blocks = ("down", "middle1", "middle2", "up1", "up2")
    assert slots(groups["time2"], "contracted") == {
        (f"{block}.time.kernel", 0) for block in blocks
    }


def test_messages_read_the_nodes_at_both_ends_of_an_edge():
    groups = groups_of("message passing")
    nodes, heard = groups["embed"], groups["rounds.1.message2"]
    for i in (0, 1):
        assert positions(nodes, f"rounds.{i}.message1.kernel") == every(16, 0, 16)
        assert positions(nodes, f"rounds.{i}.update.kernel", axis=0) == every(16, 0)
    # What is heard along the edges stands behind a node's own features.
    assert positions(heard, "rounds.1.update.kernel") == every(12, 16)
    assert not nodes.reduced and not heard.reduced


def test_a_neighbourhood_is_no_channel():
    hidden = groups_of("GCN")["conv1"]
    assert slots(hidden, "produced") == {("conv1.kernel", 1), ("conv2.kernel", 1)}
    assert slots(hidden, "contracted") == {("conv2.kernel", 0), ("conv3.kernel", 0)}


def test_all_experts_lose_the_same_hidden_channels():
    hidden = groups_of("mixture of experts")["experts.up"]
    assert slots(hidden, "produced") == {("experts.up", 2)}
    assert slots(hidden, "contracted") == {("experts.down", 1)}


def test_stacked_layers_lose_the_same_channels():
    groups = groups_of("plain decoder")
    assert slots(groups["layers.qkv"], "produced") == {("layers.qkv", 3)}
    assert slots(groups["layers.qkv"], "contracted") == {("layers.out", 1)}
    assert slots(groups["embed"], "along") == {
        ("positions", 1),
        ("layers.norm1", 1),
        ("layers.norm2", 1),
        ("norm", 0),
    }


def test_a_kernel_of_outputs_by_inputs_is_read_the_other_way_round():
    hidden = groups_of("pytree of modules")["encoder.1"]
    assert slots(hidden, "produced") == {("encoder.1.weight", 0)}
    assert slots(hidden, "contracted") == {("decoder.0.weight", 1)}
    assert slots(hidden, "along") == {("encoder.1.bias", 0)}


EVERY = (*transformers.MODELS, "Linen decoder", *GROUPS)


def examples(name):
    """Numbers in place of the shapes of a network's inputs."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        if leaf.dtype == jnp.float32:
            return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        if leaf.dtype == bool:
            return jnp.arange(leaf.size).reshape(leaf.shape) % 4 > 0
        return jnp.asarray(rng.integers(2, size=leaf.shape), leaf.dtype)

    return [draw(leaf) for leaf in network(name)[2]]


def callable_of(model, params, plan=None):
    """``(fn, parameters)`` of any model; of its sliced self with a plan."""
    if not isinstance(model, nnx.Module):
        fn = tpp.linen_apply(model, plan) if isinstance(model, linen.Module) else model
        return fn, params if plan is None else tpp.slice_tree(plan, params)
    graphdef, state = nnx.split(model if plan is None else tpp.prune(model, plan))

    def fn(state, *inputs):
        merged = nnx.merge(graphdef, state)
        merged.eval()
        return merged(*inputs)

    return fn, state


def run(fn, params, inputs):
    # Compiling takes most of the time here; these networks need no fast code.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(fn, compiler_options=options)(params, *inputs)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", EVERY)
def test_half_of_the_channels_can_go(name):
    model, params, _ = network(name)
    inputs = examples(name)
    outer = [g for g in groups_of(name) if g.reason is None and not g.inner]
    plan = tpp.make_plan(
        groups_of(name),
        model if params is None else params,
        {group.name: 0.5 for group in outer},
    )
    assert [g.name for g in plan.pruned_groups] == [g.name for g in outer]
    dense, weights = callable_of(model, params)
    small, fewer = callable_of(model, params, plan)
    y = run(small, fewer, inputs)
    assert y.shape == jax.eval_shape(dense, weights, *inputs).shape
    assert np.isfinite(y).all() and np.std(y) > 0
    assert size(fewer) < 0.75 * size(weights)
    if not any(group.reduced for group in outer):
        masked = jax.tree.map(keep, weights, tpp.mask_tree(plan, weights))
        np.testing.assert_allclose(y, run(dense, masked, inputs), atol=1e-5)


def keep(leaf, mask):
    return leaf * mask if leaf.dtype == jnp.float32 else leaf


@pytest.mark.parametrize("name", EVERY)
def test_the_groups_hold_on_numbers(name):
    model, params, inputs = network(name)
    checks = tpp.check_groups(model, *inputs, params=params, groups=groups_of(name))
    prunable = [g.name for g in groups_of(name) if g.reason is None]
    assert [one.name for one in checks.groups] == prunable
    # Had the channels changed places in one layer only, it would have been noticed.
    assert all(one.influence > 10 * one.permuted for one in checks.groups)
