"""Sizes and costs are exactly the original's, for every network and ratio recorded."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import tpp_jax as tpp
from tests.reference import GOLDEN, filled
from tpp_jax.graph.naming import named_leaves
from tpp_jax.pruning.flops import Costs

RECORDED = json.loads((GOLDEN / "flops.json").read_text())


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


@functools.cache
def dense(name):
    """Returns (abstract model, its groups, cheap weights, its count)."""
    model = nnx.eval_shape(
        lambda: tpp.models.create(
            name, num_classes=RECORDED[name]["num_classes"], rngs=nnx.Rngs(0)
        )
    )
    image = shape(1, *model.spec.image_shape)
    weights = {
        leaf: jnp.zeros(array.shape)
        for leaf, array in named_leaves(nnx.state(model)).items()
    }
    return model, tpp.channel_groups(model, image), weights, tpp.count(model, image)


@functools.cache
def pruned(name, ratios, skip=()):
    """Returns the count of the sliced network; the choice of channels is irrelevant."""
    model, groups, weights, _ = dense(name)
    plan = tpp.make_plan(groups, weights, ratios, skip=skip)
    graphdef, state = nnx.split(model)
    small = nnx.merge(graphdef, tpp.slice_tree(plan, state))
    return tpp.count(small, shape(1, *model.spec.image_shape))


ROWS = [
    (name, row) for name, recorded in RECORDED.items() for row in recorded["pruned"]
]


@pytest.mark.parametrize("name", RECORDED)
def test_parameters_and_flops_of_unpruned_networks_are_the_recorded_ones(name):
    *_, count = dense(name)
    assert (count.params, count.flops) == (
        RECORDED[name]["params"],
        RECORDED[name]["flops"],
    )


@pytest.mark.parametrize(
    ("name", "row"), ROWS, ids=[f"{name} {row['ratios']}" for name, row in ROWS]
)
def test_pruned_networks_have_the_recorded_size_cost_and_widths(name, row):
    count = pruned(name, row["ratios"], row["skip"])
    assert (count.params, count.flops) == (row["params"], row["flops"])
    kept = {layer: one.channels for layer, one in count.layers.items()}
    assert kept == row["kept"]
    speedup = dense(name)[-1].flops / count.flops
    assert speedup == pytest.approx(row["speedup"], rel=1e-12)


def speedup_and_sparsity(name, ratios, skip=()):
    *_, before = dense(name)
    after = pruned(name, ratios, skip)
    return before.flops / after.flops, 1 - after.params / before.params


@pytest.mark.parametrize(
    ("ratio", "speedup", "sparsity"),
    [
        (0.3, "1.452", "31.135"),
        (0.5, "1.993", "49.817"),
        (0.7, "3.593", "70.580"),
        (0.9, "11.578", "90.445"),
        (0.95, "19.846", "95.183"),
    ],
)
def test_the_paper_s_rows_for_resnet56(ratio, speedup, sparsity):
    got = speedup_and_sparsity("cifar_resnet56", f"*layer*.conv1:{ratio}")
    assert (f"{got[0]:.3f}", f"{100 * got[1]:.3f}") == (speedup, sparsity)


def test_the_row_of_resnet56_with_a_ratio_per_stage():
    ratios = "*layer[1-2]*.conv1:0.75,*layer3*.conv1:0.32"
    speedup, _ = speedup_and_sparsity("cifar_resnet56", ratios)
    assert f"{speedup:.4f}" == "2.5546"


@pytest.mark.parametrize(
    ("ratio", "speedup", "sparsity"),
    [
        (0.1, "1.226", "19.24"),
        (0.3, "1.965", "51.01"),
        (0.5, "3.609", "74.87"),
        (0.7, "8.891", "90.98"),
        (0.9, "45.529", "98.96"),
    ],
)
def test_the_paper_s_rows_for_vgg19_on_100_classes(ratio, speedup, sparsity):
    got = speedup_and_sparsity("cifar_vgg19", f"*features*:{ratio}", "features.0")
    assert f"{got[0]:.3f}" == speedup
    assert f"{100 * got[1]:.2f}" == sparsity


def test_the_dense_networks_have_the_published_multiply_adds():
    *_, resnet = dense("cifar_resnet56")
    assert (resnet.params, resnet.flops // 2) == (853_018, 125_485_696)
    *_, vgg = dense("cifar_vgg19")
    assert (vgg.params, vgg.flops // 2) == (20_081_188, 398_182_400)


def test_a_real_pruned_network_counts_as_its_shapes_do():
    model = filled(lambda: tpp.models.create("cifar_resnet56", rngs=nnx.Rngs(0)))
    image = jnp.ones((1, 32, 32, 3))
    groups = tpp.channel_groups(model, image)
    small = tpp.prune(model, tpp.make_plan(groups, model, {"*layer*.conv1": 0.9}))
    before, after = tpp.count(model, image), tpp.count(small, image)
    assert after == pruned("cifar_resnet56", "*layer*.conv1:0.9")
    assert f"{before.flops / after.flops:.3f}" == "11.578"
    assert f"{1 - after.params / before.params:.5f}" == "0.90445"


def test_layers_are_listed_in_order_of_execution():
    *_, count = dense("cifar_resnet20")
    assert list(count.layers)[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    # 16 filters of 3 · 3 · 3 weights at 32 · 32 places; no bias.
    assert count.layers["conv1"] == (16, 432, 2 * 432 * 32 * 32)
    assert count.layers["layer2.0.conv1"] == (32, 4608, 2 * 4608 * 16 * 16)
    assert count.layers["linear"] == (10, 650, 2 * 640)
    assert sum(layer.flops for layer in count.layers.values()) == count.flops
    norms = count.params - sum(layer.params for layer in count.layers.values())
    assert norms == 2 * (16 + 3 * 2 * (16 + 32 + 64))


def test_statistics_are_not_parameters_but_every_leaf_of_a_plain_tree_is():
    *_, count = dense("cifar_resnet20")
    assert count.params == 269_722

    def fn(p, x):
        return x @ p["w"] + p["mean"]

    params = {"w": shape(3, 5), "mean": shape(5)}
    assert tpp.count(fn, shape(1, 3), params=params).params == 20


def test_cost_grows_with_the_batch_and_the_image():
    def fn(p, x):
        return lax.conv_general_dilated(
            x,
            p["k"],
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    params = {"k": shape(3, 3, 2, 6)}
    one = tpp.count(fn, shape(1, 8, 8, 4), params=params)
    four = tpp.count(fn, shape(4, 8, 16, 4), params=params)
    # A grouped filter sees half of the input channels.
    assert one.flops == 2 * 4 * 4 * 6 * (3 * 3 * 2)
    assert four.flops == 8 * one.flops


def test_a_layer_that_runs_three_times_has_its_parameters_once():
    def fn(p, x):
        for _ in range(3):
            x = x @ p["w"]
        return x

    count = tpp.count(fn, shape(1, 4), params={"w": shape(4, 4)})
    assert count == (16, 3 * 2 * 16, {"w": (4, 16, 3 * 2 * 16)}, ())


def assert_costs_of_pruned_forms(fn, params, *inputs, shares=(0.3, 0.6, 0.9)):
    """Compares counts computed from the unpruned model with those of the sliced one."""
    groups = tpp.channel_groups(fn, *inputs, params=params)
    costs = Costs(groups)
    for share in shares:
        plan = tpp.make_plan(groups, params, {"*": share}, criterion="random")
        kept = {g.name: plan.kept_count(g) for g in plan.pruned_groups}
        small = tpp.count(fn, *inputs, params=tpp.slice_tree(plan, params))
        assert kept
        assert costs(kept) == (small.params, small.flops)
        assert costs(kept) < costs({})
    return {group.name: group.reason for group in groups}


def ones(**shapes):
    return {name: np.ones(dims, np.float32) for name, dims in shapes.items()}


def test_costs_follow_channels_that_a_layer_only_carries_along():
    # A layer over tokens runs once for each channel: an MLP-Mixer.
    def fn(p, x):
        h = jnp.swapaxes(x @ p["up"], 1, 2) @ p["mix"] @ p["back"]
        return jnp.swapaxes(h, 1, 2) @ p["down"]

    params = ones(up=(4, 10), mix=(6, 9), back=(9, 6), down=(10, 3))
    reasons = assert_costs_of_pruned_forms(fn, params, shape(2, 6, 4))
    assert [name for name, reason in reasons.items() if reason is None] == ["up", "mix"]


def test_costs_follow_kernels_that_are_cut_joined_or_transposed():
    def fn(p, x):
        a, b = jnp.split(x @ p["both"].T, 2, axis=-1)
        h = jnp.concatenate([a * b, x @ p["side"]], axis=-1)
        return h @ p["down"]

    params = ones(both=(16, 4), side=(4, 6), down=(14, 3))
    assert_costs_of_pruned_forms(fn, params, shape(2, 4))


def test_costs_follow_heads_and_their_dimensions():
    def fn(p, x):
        q, k, v = (jnp.einsum("nti,ihd->nhtd", x, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("nhtd,nhsd->nhts", q, k))
        return jnp.einsum("nhts,nhsd,hdo->nto", weights, v, p["o"])

    params = ones(q=(5, 4, 8), k=(5, 4, 8), v=(5, 4, 6), o=(4, 6, 3))
    reasons = assert_costs_of_pruned_forms(fn, params, shape(2, 7, 5))
    assert reasons == {
        "q": None,
        "q#2": None,
        "v#2": None,
        "o": "an output of the model",
    }


def test_costs_follow_grouped_convolutions_and_flattened_maps():
    def conv(x, kernel, groups=1):
        return lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def fn(p, x):
        x = jax.nn.relu(conv(x, p["first"]))
        x = conv(x, p["depthwise"], x.shape[-1])
        return x.reshape(len(x), -1) @ p["dense"]

    params = ones(first=(3, 3, 2, 8), depthwise=(3, 3, 1, 8), dense=(4 * 4 * 8, 3))
    assert_costs_of_pruned_forms(fn, params, shape(2, 4, 4, 2))


def test_costs_follow_loops_and_layers_that_run_twice():
    def fn(p, x):
        def step(h, x):
            h = jnp.tanh(x @ p["input"] + h @ p["hidden"])
            return h, h

        h, _ = lax.scan(step, jnp.zeros((2, 1)) @ p["start"], x)
        return jax.nn.relu(h @ p["twice"]) @ p["twice"].T @ p["out"]

    params = ones(start=(1, 8), input=(3, 8), hidden=(8, 8), twice=(8, 6), out=(8, 2))
    assert_costs_of_pruned_forms(fn, params, shape(5, 2, 3))


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_resnet8_b", "lenet5"])
def test_costs_of_networks_are_those_of_their_sliced_forms(name):
    model = nnx.eval_shape(lambda: tpp.models.create(name, rngs=nnx.Rngs(0)))
    image = shape(2, *model.spec.image_shape)
    graphdef, state = nnx.split(model)

    def fn(state, x):
        merged = nnx.merge(graphdef, state)
        merged.eval()
        return merged(x)

    weights = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    assert_costs_of_pruned_forms(fn, weights, image)


class Attention(nnx.Module):
    """Flax's attention has one size for the dimensions of queries and of values."""

    def __init__(self, rngs):
        self.embed = nnx.Linear(3, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            4, 8, qkv_features=24, decode=False, rngs=rngs
        )
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.attention(self.embed(x)))


def test_costs_follow_channels_that_are_pruned_together():
    model, x = filled(lambda: Attention(nnx.Rngs(0))), shape(2, 5, 3)
    groups = tpp.channel_groups(model, x)
    inner = groups["attention.query#2"]
    assert ("attention.value.kernel", 2) in {(m.leaf, m.axis) for m in inner.members}
    plan = tpp.make_plan(groups, model, {"*": 0.5})
    small = tpp.count(tpp.prune(model, plan), x)
    kept = {g.name: plan.kept_count(g) for g in plan.pruned_groups}
    assert kept["attention.query"] == 2
    assert kept["attention.query#2"] == 3
    assert Costs(groups)(kept) == (small.params, small.flops)


def test_costs_do_not_include_statistics():
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    groups = tpp.channel_groups(model, shape(1, 3))
    assert Costs(groups)({}) == (6, 0)
