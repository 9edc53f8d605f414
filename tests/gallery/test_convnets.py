"""Convolutional networks: their groups as derived by hand; proved; cut to half and run.

The networks are in convnets.py and grouped_convnets.py, their groups in
convnet_groups.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import tpp_jax as tpp
from tests.gallery.convnet_groups import NETWORKS
from tests.reference import filled
from tpp_jax.graph.naming import map_named


@functools.cache
def network(name):
    """``(model, variables)``, every array drawn; the variables of a Linen module."""
    create, shape, _ = NETWORKS[name]
    if issubclass(create, nnx.Module):
        return filled(lambda: create(nnx.Rngs(0))), None
    shapes = jax.eval_shape(create().init, jax.random.key(0), jnp.zeros(shape))
    rng = np.random.default_rng(0)

    def draw(_, leaf):
        if leaf.ndim == 1:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        fan_in = np.prod(leaf.shape[:-1])
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(leaf.dtype)

    return create(), map_named(draw, shapes)


@functools.cache
def groups_of(name):
    model, variables = network(name)
    images = jax.ShapeDtypeStruct(NETWORKS[name][1], jnp.float32)
    return tpp.channel_groups(model, images, params=variables)


def slots(group, *roles):
    """The parameter axes that a group runs through in one of these roles."""
    return {(m.leaf, m.axis) for m in group.members if m.role in roles}


def norm(name):
    return {(f"{name}.{leaf}", 0) for leaf in ("scale", "bias", "mean", "var")}


def positions(group, leaf):
    """Where each channel of a group stands in an array, in ascending order."""
    [member] = [m for m in group.members if m.leaf == leaf]
    return np.sort(member.positions, axis=1).tolist()


def every(first, size):
    """Channels that take up one place each: ``[[first], [first + 1], ...]``."""
    return [[first + i] for i in range(size)]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_groups_are_those_of_the_architecture(name):
    # A reason goes on with the line of the model that it comes from.
    found = [
        (g.name, g.size, g.producers, g.reason and g.reason.partition(" (")[0])
        for g in groups_of(name)
    ]
    assert found == NETWORKS[name][2]


def test_a_residual_stream_runs_through_the_norms_that_come_before_it():
    stream = groups_of("pre-activation ResNet")["stem"]
    assert slots(stream, "produced") == {
        ("stem.kernel", 3),
        ("blocks.0.conv2.kernel", 3),
        ("blocks.1.conv2.kernel", 3),
    }
    assert slots(stream, "along") == (
        norm("blocks.0.norm1") | norm("blocks.1.norm1") | norm("blocks.2.norm1")
    )
    assert slots(stream, "contracted") == {
        ("blocks.0.conv1.kernel", 2),
        ("blocks.1.conv1.kernel", 2),
        ("blocks.2.conv1.kernel", 2),
        ("blocks.2.shortcut.kernel", 2),
    }


def test_a_dense_layer_adds_its_channels_behind_all_earlier_ones():
    groups = groups_of("DenseNet")
    grown = groups["block1.0.conv2"]
    assert slots(grown, "produced") == {("block1.0.conv2.kernel", 3)}
    assert slots(grown, "along") == norm("block1.1.norm1") | norm("transition_norm")
    assert slots(grown, "contracted") == {
        ("block1.1.conv1.kernel", 2),
        ("transition.kernel", 2),
    }
    # Eight channels of the stem, four of the first layer, four of the second.
    assert positions(groups["stem"], "transition.kernel") == every(0, 8)
    assert positions(grown, "transition.kernel") == every(8, 4)
    assert positions(groups["block1.1.conv2"], "transition.kernel") == every(12, 4)
    assert positions(groups["transition"], "head.kernel") == every(0, 8)
    assert positions(groups["block2.1.conv2"], "norm.var") == every(12, 4)


def test_branches_stand_side_by_side_and_pooling_passes_them_on():
    groups = groups_of("Inception")
    first = 0
    for branch, size in [
        ("branch1", 6),
        ("branch3.layers.1", 8),
        ("branch5.layers.2", 5),
        ("pool_projection", 4),
    ]:
        group = groups[f"mixed.{branch}.conv"]
        reader, last = "reduction.reduce.conv.kernel", "last.conv.kernel"
        assert slots(group, "contracted") == {(reader, 2), (last, 2)}
        assert positions(group, reader) == every(first, size)
        # The ten channels of the strided branch come before the pooled ones.
        assert positions(group, last) == every(10 + first, size)
        first += size


def test_a_skip_meets_what_was_upsampled_in_the_next_kernel():
    groups = groups_of("U-Net")
    skip, up = groups["down.0.conv2.conv"], groups["up.1"]
    assert slots(skip, "contracted") == {
        ("down.1.conv1.conv.kernel", 2),
        ("merge.1.conv1.conv.kernel", 2),
    }
    assert positions(skip, "merge.1.conv1.conv.kernel") == every(0, 6)
    assert positions(up, "merge.1.conv1.conv.kernel") == every(6, 6)
    assert slots(up, "produced", "along") == {("up.1.kernel", 3), ("up.1.bias", 0)}
    assert ("up.1.kernel", 2) in slots(groups["merge.0.conv2.conv"], "contracted")


def test_a_flattened_channel_enters_the_head_once_for_each_pixel():
    last = groups_of("VGG")["convs.3"]
    pixels = 8 * np.arange(4 * 4)
    assert positions(last, "fc1.kernel") == [(c + pixels).tolist() for c in range(8)]


def test_a_channel_of_shuffled_pixels_is_made_by_a_filter_for_each():
    groups = groups_of("super-resolution")
    for leaf in ("up.kernel", "up.bias"):
        blocks = [[c, c + 6, c + 12, c + 18] for c in range(6)]
        assert positions(groups["up"], leaf) == blocks
    assert positions(groups["up"], "last.kernel") == every(0, 6)


def test_a_gate_and_a_depthwise_kernel_go_with_the_channels_they_act_on():
    block = groups_of("MobileNetV3")["blocks.0.expand.conv"]
    assert slots(block, "produced") == {
        ("blocks.0.expand.conv.kernel", 3),
        ("blocks.0.se.excite.kernel", 1),
    }
    assert slots(block, "depthwise") == {("blocks.0.depthwise.conv.kernel", 3)}
    assert slots(block, "contracted") == {
        ("blocks.0.se.squeeze.kernel", 0),
        ("blocks.0.project.conv.kernel", 2),
    }
    assert slots(block, "along") == {
        ("blocks.0.se.excite.bias", 0),
        *norm("blocks.0.expand.norm"),
        *norm("blocks.0.depthwise.norm"),
    }
    squeezed = groups_of("MobileNetV3")["blocks.0.se.squeeze"]
    assert slots(squeezed, "produced", "contracted", "along") == {
        ("blocks.0.se.squeeze.kernel", 1),
        ("blocks.0.se.squeeze.bias", 0),
        ("blocks.0.se.excite.kernel", 0),
    }


def test_shuffled_channels_go_in_the_pattern_that_shuffling_and_halving_leave():
    # Left and right are interleaved, so channel w of one goes with channel w of the
    # other; halved, so w goes with w + 4; and each of the next unit's channels meets
    # one of the half that passes by.
    stream = groups_of("ShuffleNetV2")["units.0.left.layers.1.conv"]
    halves = [[0, 4], [1, 5], [2, 6], [3, 7]]
    neighbours = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert positions(stream, "units.0.left.layers.1.conv.kernel") == halves
    assert positions(stream, "units.0.right.layers.2.conv.kernel") == halves
    assert positions(stream, "units.1.right.layers.0.conv.kernel") == neighbours
    assert positions(stream, "units.1.right.layers.2.conv.kernel") == neighbours
    for reader in ("left.layers.0", "left.layers.1", "right.layers.0"):
        fours = [[4 * c, 4 * c + 1, 4 * c + 2, 4 * c + 3] for c in range(4)]
        assert positions(stream, f"units.2.{reader}.conv.kernel") == fours


def test_the_groups_of_a_convolution_lose_the_same_channels():
    groups = groups_of("ResNeXt")  # blocks.2: four groups of four
    strided = [[c, c + 4, c + 8, c + 12] for c in range(4)]
    inner = groups["blocks.2.conv1.conv"]
    assert positions(inner, "blocks.2.conv1.conv.kernel") == strided
    [grouped] = [m for m in inner.members if m.leaf == "blocks.2.conv2.conv.kernel"]
    assert (grouped.axis, grouped.role) == (2, "contracted")
    assert grouped.positions.tolist() == every(0, 4)
    outer = groups["blocks.2.conv2.conv"]
    assert positions(outer, "blocks.2.conv2.conv.kernel") == strided
    assert positions(outer, "blocks.2.conv3.conv.kernel") == strided
    # In RegNet the gate is coupled with them: three groups of four.
    gated = groups_of("RegNet")["blocks.0.conv2.conv"]
    strided = [[c, c + 4, c + 8] for c in range(4)]
    assert positions(gated, "blocks.0.excite.kernel") == strided
    assert positions(gated, "blocks.0.squeeze.kernel") == strided


def test_convnexts_stream_runs_through_norms_scales_and_depthwise_kernels():
    groups = groups_of("ConvNeXt")
    stream = groups["down"]
    assert slots(stream, "produced") == {
        ("down.kernel", 3),
        ("stage2.0.down.kernel", 1),
    }
    assert slots(stream, "depthwise") == {("stage2.0.depthwise.kernel", 3)}
    assert slots(stream, "contracted") == {
        ("stage2.0.up.kernel", 0),
        ("head.kernel", 0),
    }
    assert slots(stream, "along") == {
        ("down.bias", 0),
        ("stage2.0.depthwise.bias", 0),
        ("stage2.0.norm.scale", 0),
        ("stage2.0.norm.bias", 0),
        ("stage2.0.down.bias", 0),
        ("stage2.0.scale", 0),
        ("head_norm.scale", 0),
        ("head_norm.bias", 0),
    }
    reduced = [group.name for group in groups if group.reduced]
    assert reduced == ["stem", "down"]


def test_linens_statistics_go_with_the_stream_of_their_block():
    stream = groups_of("Linen ResNet")["LinenBlock_1.Conv_1"]
    assert slots(stream, "produced") == {
        ("LinenBlock_1.Conv_1.kernel", 3),
        ("LinenBlock_1.shortcut.kernel", 3),
    }
    assert slots(stream, "along") == {
        *norm("LinenBlock_1.BatchNorm_1"),
        ("LinenBlock_1.shortcut.bias", 0),
    }
    assert slots(stream, "contracted") == {("fc.kernel", 0)}


def callable_of(model, variables, plan=None):
    """``(fn, arrays)`` of a network; with a plan, of the smaller one."""
    if isinstance(model, linen.Module):
        variables = variables if plan is None else tpp.slice_tree(plan, variables)
        return tpp.linen_apply(model, plan), variables
    small = model if plan is None else tpp.prune(model, plan)
    small.eval()
    graphdef, state = nnx.split(small)
    return lambda state, images: nnx.merge(graphdef, state)(images), state


def compiled(fn):
    # Compiling takes most of the time here; these networks need no fast code.
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def masked(leaf, mask):
    # On the host: on a device a product is compiled for every shape.
    return np.asarray(leaf) * np.asarray(mask) if leaf.dtype == jnp.float32 else leaf


def entries(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_every_group_can_go(name):
    _, shape, expected = NETWORKS[name]
    images = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    (model, variables), groups = network(name), groups_of(name)
    prunable = [group for group, *_, reason in expected if reason is None]
    ratios = dict.fromkeys(prunable, 0.5)
    plan = tpp.make_plan(groups, variables or model, ratios)
    assert [group.name for group in plan.pruned_groups] == prunable

    dense, arrays = callable_of(model, variables)
    small, fewer = callable_of(model, variables, plan)
    assert entries(fewer) < 0.6 * entries(arrays)
    dense, small = compiled(dense), compiled(small)
    whole, cut = dense(arrays, images), small(fewer, images)
    assert cut.shape == whole.shape
    assert np.isfinite(cut).all()
    if name != "ConvNeXt":  # its layer norms run over the channels
        zeroed = jax.tree.map(masked, arrays, tpp.mask_tree(plan, arrays))
        zeroed = dense(zeroed, images)
        np.testing.assert_allclose(cut, zeroed, atol=1e-4 * np.std(whole))
        assert np.abs(zeroed - whole).max() > 0.1 * np.std(whole)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_groups_hold_on_numbers(name):
    _, shape, expected = NETWORKS[name]
    model, variables = network(name)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    checks = tpp.check_groups(model, images, params=variables, groups=groups_of(name))
    assert [one.name for one in checks.groups] == [
        group for group, *_, reason in expected if reason is None
    ]
    # Had the channels changed places in one layer only, it would have been noticed.
    assert all(one.influence > 100 * one.permuted for one in checks.groups)
