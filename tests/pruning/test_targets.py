"""Targets are met, as nearly as one channel allows, in every scope and network."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.reference import filled
from tpp_jax.errors import TPPError
from tpp_jax.models import CifarResNet, CifarVGG
from tpp_jax.pruning.flops import Costs


class Mobile(nnx.Module):
    """An inverted residual: expand, depthwise, squeeze and excite, project."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.expand = nnx.Conv(8, 24, (1, 1), rngs=rngs)
        self.norm = nnx.BatchNorm(24, rngs=rngs)
        self.depthwise = nnx.Conv(24, 24, (3, 3), feature_group_count=24, rngs=rngs)
        self.squeeze = nnx.Linear(24, 8, rngs=rngs)
        self.excite = nnx.Linear(8, 24, rngs=rngs)
        self.project = nnx.Conv(24, 8, (1, 1), rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        y = nnx.relu6(self.depthwise(nnx.relu6(self.norm(self.expand(x)))))
        gate = nnx.sigmoid(self.excite(nnx.relu(self.squeeze(y.mean((1, 2))))))
        x = x + self.project(y * gate[:, None, None])
        return self.head(x.mean((1, 2)))


class Transformer(nnx.Module):
    """Two blocks with attention; heads and their dimensions are separate groups."""

    def __init__(self, rngs):
        linear = nnx.LinearGeneral
        self.embed = nnx.Linear(5, 16, rngs=rngs)
        self.qkv = nnx.List([linear(16, (4, 6), rngs=rngs) for _ in range(6)])
        self.out = nnx.List(
            [linear((4, 6), 16, axis=(-2, -1), rngs=rngs) for _ in range(2)]
        )
        self.up = nnx.List([nnx.Linear(16, 32, rngs=rngs) for _ in range(2)])
        self.down = nnx.List([nnx.Linear(32, 16, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for i in range(2):
            q, k, v = (layer(x) for layer in self.qkv[3 * i : 3 * i + 3])
            x = x + self.out[i](nnx.dot_product_attention(q, k, v))
            x = x + self.down[i](nnx.gelu(self.up[i](x)))
        return self.head(x.mean(1))


NETWORKS = {
    "resnet": (
        lambda: CifarResNet((2, 1, 1), width=0.5, option="B", rngs=nnx.Rngs(0)),
        (1, 8, 8, 3),
    ),
    "vgg": (
        lambda: CifarVGG([8, "M", 16, 16, "M", 16], rngs=nnx.Rngs(0)),
        (1, 32, 32, 3),
    ),
    "mobile": (lambda: Mobile(nnx.Rngs(0)), (1, 8, 8, 3)),
    "transformer": (lambda: Transformer(nnx.Rngs(0)), (2, 7, 5)),
}


@functools.cache
def network(name):
    create, shape = NETWORKS[name]
    model, x = filled(create), jax.ShapeDtypeStruct(shape, jnp.float32)
    groups = tpp.channel_groups(model, x)
    return model, x, groups, tpp.count(model, x), Costs(groups)


def kept_counts(plan):
    return {g.name: plan.kept_count(g) for g in plan.groups if g.reason is None}


def by_costs(name, counts):
    params, flops = network(name)[-1](counts)
    return {"params": params, "flops": flops}


TARGETS = [
    {"flops": 0.5},
    {"params": 0.3},
    {"flops": 0.6, "round_to": 4},
    {"flops": 0.5, "min_channels": 3},
]


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("options", TARGETS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_target_is_met_and_one_step_fewer_would_miss_it(name, options, scope):
    model, _, groups, dense, _ = network(name)
    plan = tpp.make_plan(groups, model, criterion="lamp", scope=scope, **options)
    counts = kept_counts(plan)
    [target] = options.keys() & {"flops", "params"}
    allowed = options[target] * getattr(dense, target)
    step = options.get("round_to", 1)
    more = [
        by_costs(name, counts | {g.name: min(counts[g.name] + step, g.size)})[target]
        for g in plan.pruned_groups
    ]
    assert by_costs(name, counts)[target] <= allowed < max(more)
    for group in groups:
        if group.reason is None:
            n = counts[group.name]
            assert n == group.size or n % step == 0
            assert n >= min(options.get("min_channels", 1), group.size)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_solved_count_is_that_of_the_pruned_network(name):
    model, x, groups, dense, costs = network(name)
    assert costs({}) == (dense.params, dense.flops)
    plan = tpp.make_plan(groups, model, flops=0.5, params=0.6)
    small = tpp.count(tpp.prune(model, plan), x)
    assert costs(kept_counts(plan)) == (small.params, small.flops)
    assert small.flops <= 0.5 * dense.flops
    assert small.params <= 0.6 * dense.params


def test_both_targets_are_met():
    model, _, groups, dense, _ = network("vgg")
    for flops, params in ((0.3, 0.9), (0.9, 0.3)):
        plan = tpp.make_plan(groups, model, flops=flops, params=params)
        found = by_costs("vgg", kept_counts(plan))
        assert found["flops"] <= flops * dense.flops
        assert found["params"] <= params * dense.params


def test_a_target_alone_prunes_all_groups_but_inner_ones_by_equal_shares():
    model, _, groups, _, _ = network("transformer")
    plan = tpp.make_plan(groups, model, flops=0.25)
    prunable = [g for g in groups if g.reason is None]
    assert {g.inner for g in prunable} == {True, False}
    shares = []
    for group in prunable:
        if group.inner:
            assert plan.kept_count(group) == group.size
        else:
            shares.append((group.size, group.size - plan.kept_count(group)))
    # Each is the integer nearest to one share, except for the last pruned channel.
    low = max((removed - 0.5) / n for n, removed in shares)
    high = min((removed + 0.5) / n for n, removed in shares)
    assert low <= high


def test_ratios_are_relative_under_a_target():
    model, _, groups, _, _ = network("vgg")
    plans = [
        tpp.make_plan(groups, model, ratios, flops=0.5)
        for ratios in (
            {"*": 0.2, "features.0": 0.1},
            {"*": 0.6, "features.0": 0.3},
            "*:0.2,features.0:0.1",
        )
    ]
    assert plans[0].to_dict() == plans[1].to_dict() == plans[2].to_dict()
    first, *others = plans[0].groups
    lost = {g.name: 1 - plans[0].kept_count(g) / g.size for g in plans[0].groups}
    for group in others:
        if group.reason is None:
            assert lost[group.name] == pytest.approx(2 * lost[first.name], abs=1 / 8)


def test_unmatched_and_skipped_groups_are_not_pruned():
    model, _, groups, _, _ = network("resnet")
    plan = tpp.make_plan(groups, model, "layer*.conv1:0.5", flops=0.8)
    assert {g.name for g in plan.pruned_groups} == {
        f"layer{block}.conv1" for block in ("1.0", "1.1", "2.0", "3.0")
    }
    plan = tpp.make_plan(groups, model, flops=0.8, skip="layer*.conv1")
    assert not any(g.name.endswith(".conv1") for g in plan.pruned_groups)
    assert plan.pruned_groups


def test_a_target_of_1_prunes_nothing():
    model, _, groups, _, _ = network("mobile")
    for target in ({"flops": 1}, {"params": 1.0}):
        assert not tpp.make_plan(groups, model, **target).pruned_groups


def test_a_plain_function_and_its_parameters_need_no_model():
    params = {
        "mix": np.ones((6, 12), np.float32),
        "back": np.ones((12, 6), np.float32),
        "up": np.arange(80, dtype=np.float32).reshape(4, 20),
        "qk": np.ones((20, 16), np.float32),
        "down": np.ones((8, 3), np.float32),
    }

    def fn(p, x):
        h = jax.nn.relu(x @ p["up"])  # [n, tokens, channels]
        h = h + jnp.swapaxes(jnp.swapaxes(h, 1, 2) @ p["mix"] @ p["back"], 1, 2)
        q, k = jnp.split(p["qk"], 2, axis=1)  # a kernel cut in two
        return jax.nn.relu((h @ q) * (h @ k)) @ p["down"]

    x = jax.ShapeDtypeStruct((2, 6, 4), jnp.float32)
    groups = tpp.channel_groups(fn, x, params=params)
    plan = tpp.make_plan(groups, params, flops=0.4)
    assert {g.name for g in plan.pruned_groups} == {"up", "mix", "qk"}
    small = tpp.count(fn, x, params=tpp.slice_tree(plan, params))
    assert Costs(groups)(kept_counts(plan)) == (small.params, small.flops)
    assert small.flops <= 0.4 * tpp.count(fn, x, params=params).flops


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"flops": 0.001}, ["target flops=0.001 is out of reach", "of the flops rem"]),
        ({"flops": 0.3, "params": 0.001}, ["params=0.001 and flops=0.3", " and 0."]),
        ({"flops": 0.1, "round_to": 16}, ["lower round_to"]),
        ({"params": 0.1, "min_channels": 16}, ["lower min_channels"]),
        ({"params": 0.3, "ratios": {"layer1*": 0.5}}, ["match more layers"]),
        ({"flops": 0.5, "ratios": {}}, ["1.0000 of the flops remain"]),
        ({"flops": 0}, ["flops=0 is not in (0, 1]", "share of the model's flops"]),
        ({"params": 1.5}, ["params=1.5 is not in (0, 1]"]),
        ({"flops": math.nan}, ["flops=nan is not in (0, 1]"]),
        ({}, ["the amount to prune is missing", "flops=0.5"]),
        ({"ratios": 0.5, "min_channels": -1}, ["min_channels is -1"]),
        ({"kv_cache": 0.5}, ["'*.k_proj' matches no layer", "cached="]),
        ({"ratios": 1.0}, ["ratio 1.0 of every group is not in [0, 1)"]),
    ],
    ids=str,
)
def test_the_impossible_is_refused(options, messages):
    model, _, groups, _, _ = network("resnet")
    with pytest.raises(TPPError) as refused:
        tpp.make_plan(groups, model, **options)
    for message in messages:
        assert message in str(refused.value)


def test_the_error_says_what_can_be_reached():
    model, x, groups, dense, _ = network("resnet")
    with pytest.raises(TPPError) as refused:
        tpp.make_plan(groups, model, {"*layer3*": 0.5}, flops=0.1)
    [share] = [float(w) for w in str(refused.value).split() if w.startswith("0.")]
    plan = tpp.make_plan(groups, model, {"*layer3*": 0.99})
    least = tpp.count(tpp.prune(model, plan), x).flops / dense.flops
    assert share == pytest.approx(least, abs=1e-4)


def test_one_ratio_prunes_every_group_but_inner_ones():
    model, _, groups, _, _ = network("transformer")
    plan = tpp.make_plan(groups, model, 0.5)
    for group in groups:
        unpruned = group.reason is not None or group.inner
        expected = group.size if unpruned else group.size - math.ceil(group.size / 2)
        assert plan.kept_count(group) == expected
    assert not tpp.make_plan(groups, model, 0).pruned_groups


def blocks(widths, seed=0):
    """(parameters, groups) of residual blocks on a stream that cannot be pruned."""
    draws = np.random.default_rng(seed)
    params = {"stem": {"kernel": np.ones((2, 3))}} | {
        f"block{i}": {
            "up": {"kernel": (i + 1) * draws.uniform(1, 2, size=(3, n))},
            "down": {"kernel": np.ones((n, 3))},
        }
        for i, n in enumerate(widths)
    }

    def fn(p, x):
        x = x @ p["stem"]["kernel"]
        for i in range(len(widths)):
            block = p[f"block{i}"]
            x = x + jax.nn.relu(x @ block["up"]["kernel"]) @ block["down"]["kernel"]
        return x

    return params, tpp.channel_groups(fn, np.ones((1, 2)), params=params)


def test_in_isomorphic_scope_groups_of_equal_shape_share_their_total():
    params, groups = blocks((8, 8, 12, 12))
    plan = tpp.make_plan(groups, params, 0.5, scope="isomorphic")
    counts = [plan.kept_count(groups[f"block{i}.up"]) for i in range(4)]
    # The weights of each block are larger than those of the block before.
    assert counts[0] + counts[1] == 8 and counts[0] < counts[1]
    assert counts[2] + counts[3] == 12 and counts[2] < counts[3]
    everywhere = tpp.make_plan(groups, params, 0.5, scope="global")
    assert kept_counts(everywhere) != kept_counts(plan)
    assert sum(kept_counts(everywhere).values()) == sum(counts)


def test_the_lowest_scores_among_groups_of_equal_shape_are_pruned():
    params, groups = blocks((8, 8))
    plan = tpp.make_plan(groups, params, {"*": 0.25}, scope="isomorphic")
    scores = [np.abs(params[f"block{i}"]["up"]["kernel"]).mean(0) for i in range(2)]
    lowest = np.sort(np.concatenate(scores))[:4]
    pruned = [plan.pruned(f"block{i}.up") for i in range(2)]
    gone = np.concatenate([s[p] for s, p in zip(scores, pruned, strict=True)])
    np.testing.assert_array_equal(np.sort(gone), lowest)


def test_the_first_block_of_a_stage_has_the_shape_of_the_others():
    model = filled(
        lambda: CifarResNet((2, 2, 2), width=0.5, option="B", rngs=nnx.Rngs(0))
    )
    for layer in (model.layer2[0].conv1, model.layer3[1].conv1):
        layer.kernel[...] = layer.kernel[...] / 1000
    groups = tpp.channel_groups(model, jnp.ones((1, 8, 8, 3)))
    plan = tpp.make_plan(groups, model, "*layer*.conv1:0.5", scope="isomorphic")
    assert {
        name: n for name, n in kept_counts(plan).items() if name.endswith(".conv1")
    } == {
        "layer1.0.conv1": plan.kept_count(groups["layer1.0.conv1"]),
        "layer1.1.conv1": 8 - plan.kept_count(groups["layer1.0.conv1"]),
        "layer2.0.conv1": 1,
        "layer2.1.conv1": 15,
        "layer3.0.conv1": 31,
        "layer3.1.conv1": 1,
    }


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_no_group_keeps_fewer_than_the_minimum(scope):
    params, groups = blocks((4, 8, 8, 2))
    plan = tpp.make_plan(groups, params, 0.9, scope=scope, min_channels=3)
    assert kept_counts(plan) == {
        "block0.up": 3,
        "block1.up": 3,
        "block2.up": 3,
        "block3.up": 2,  # never had more
    }
