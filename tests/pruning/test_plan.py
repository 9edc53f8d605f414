"""Ratios become counts, and counts kept channels; the impossible is refused."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import tpp_jax as tpp
from tests.reference import filled
from tpp_jax.graph.naming import named_leaves
from tpp_jax.models import CifarResNet
from tpp_jax.pruning.ratios import parse_ratios


@functools.cache
def resnet():
    """A network of blocks 1, 1, 1 and the groups of its 4, 8 and 16 inner channels."""
    model = filled(
        lambda: CifarResNet((1, 1, 1), width=0.25, option="B", rngs=nnx.Rngs(0))
    )
    return model, tpp.channel_groups(model, jnp.ones((1, 8, 8, 3)))


@functools.cache
def dense(n):
    """One hidden layer ``net.0`` of n channels whose scores are 1 … n, shuffled."""
    params = {
        "net": [
            {"kernel": np.zeros((2, n), np.float32), "bias": np.zeros(n, np.float32)},
            {"kernel": np.zeros((n, 3), np.float32)},
        ]
    }
    params["net"][0]["kernel"][:] = np.random.default_rng(n).permutation(n) + 1

    def fn(p, x):
        hidden = jax.nn.relu(x @ p["net"][0]["kernel"] + p["net"][0]["bias"])
        return hidden @ p["net"][1]["kernel"]

    example = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    return params, tpp.channel_groups(fn, example, params=params)


def kept_count(n, ratio, **options):
    params, groups = dense(n)
    return len(tpp.make_plan(groups, params, {"net.0": ratio}, **options).kept["net.0"])


def counts(ratios, **options):
    model, groups = resnet()
    plan = tpp.make_plan(groups, model, ratios, **options)
    return {group.name: plan.kept_count(group) for group in plan.pruned_groups}


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [
        (0.9, {16: 1, 32: 3, 64: 6, 128: 12, 256: 25, 512: 51}),
        (0.95, {16: 1, 32: 1, 64: 3, 128: 6, 256: 12, 512: 25}),
        (0.3, {16: 11, 32: 22, 64: 44}),
        (0.5, {7: 3}),
        (0.999, {16: 1, 150: 1, 512: 3}),  # never more than 99.5 %
        (0.07, {100: 92}),  # 0.07 * 100 is 7.000000000000001 in binary
        (0.0, {16: 16}),
        (0.5, {1: 1}),
    ],
)
def test_kept_counts_follow_the_original_s_rule(ratio, kept):
    assert {n: kept_count(n, ratio) for n in kept} == kept


@given(st.sampled_from([1, 2, 16, 100]), st.floats(0, 1, exclude_max=True))
@settings(max_examples=40)
def test_a_layer_never_loses_all_its_channels(n, ratio):
    expected = n - min(math.ceil(ratio * n), math.floor(0.995 * n))
    assert kept_count(n, ratio) == expected >= 1


def test_the_channels_of_the_smallest_mean_absolute_weight_are_pruned():
    params, groups = dense(8)
    plan = tpp.make_plan(groups, params, "net.0:0.5")
    kernel = params["net"][0]["kernel"]
    np.testing.assert_array_equal(plan.kept["net.0"], np.flatnonzero(kernel[0] > 4))
    np.testing.assert_array_equal(plan.pruned("net.0"), np.flatnonzero(kernel[0] <= 4))


def test_kept_indices_are_ascending_int32_for_every_prunable_group():
    model, groups = resnet()
    plan = tpp.make_plan(groups, model, {"*conv1": 0.6})
    assert plan.kept.keys() == {g.name for g in groups if g.reason is None}
    for kept in plan.kept.values():
        assert kept.dtype == np.int32
        assert (np.diff(kept) > 0).all()


def test_scores_of_a_group_are_averaged_over_its_producers():
    params = {name: np.ones((2, 4), np.float32) for name in ("a", "b")}
    params["a"][:] = [1, 2, 3, 4]
    params["b"][:] = [9, 1, 1, 1]
    params["c"] = np.ones((4, 2), np.float32)
    groups = tpp.channel_groups(
        lambda p, x: (x @ p["a"] + x @ p["b"]) @ p["c"], np.ones((1, 2)), params=params
    )
    plan = tpp.make_plan(groups, params, "b:0.5")  # any producer names the group
    assert plan.to_dict() == {"a": [0, 3]}


def test_the_last_match_wins():
    assert counts("*layer*.conv1:0.5,*layer3*:0.25,layer1.0.conv1:0") == {
        "layer2.0.conv1": 4,
        "layer3.0.conv1": 12,
        "layer3.0.conv2": 12,
    }
    assert counts("*layer3*:0.25,*layer*.conv1:0.5") == {
        "layer1.0.conv1": 2,
        "layer2.0.conv1": 4,
        "layer3.0.conv1": 8,
        "layer3.0.conv2": 12,
    }


def test_layers_that_no_pattern_matches_are_not_pruned():
    assert counts("layer2.0.conv1:0.5") == {"layer2.0.conv1": 4}
    assert counts({}) == counts("") == counts({"*": 0.0}) == {}


def test_a_dict_and_the_original_s_string_mean_the_same():
    text = "*layer*.conv1:0.5, *layer3*.conv1:0.25,"
    pairs = {"*layer*.conv1": 0.5, "*layer3*.conv1": 0.25}
    assert parse_ratios(text) == parse_ratios(pairs) == pairs
    assert counts(text) == counts(pairs)


def test_a_pattern_may_contain_colons_and_brackets():
    assert parse_ratios("*layer[1-3]*:0.5,a:b:0.25") == {
        "*layer[1-3]*": 0.5,
        "a:b": 0.25,
    }
    assert counts("*layer[1-2]*.conv1:0.5") == {
        "layer1.0.conv1": 2,
        "layer2.0.conv1": 4,
    }


@pytest.mark.parametrize("skip", ["layer1*, *layer3*", ("layer1*", "*layer3*")])
def test_skipped_layers_are_not_pruned_whatever_the_ratios_are(skip):
    # The stream of stage 1 is named by the stem and produced by layer1.0.conv2 too.
    assert counts("*:0.5", skip=skip) == {"layer2.0.conv1": 4, "layer2.0.conv2": 4}


def test_a_pattern_of_all_layers_ignores_the_classifier_that_cannot_be_pruned():
    assert set(counts("*:0.5")) == {g.name for g in resnet()[1] if g.reason is None}


@pytest.mark.parametrize("round_to", [1, 2, 4, 8])
def test_kept_counts_are_rounded_up_to_a_multiple(round_to):
    kept = {ratio: kept_count(32, ratio, round_to=round_to) for ratio in (0.3, 0.9)}
    assert kept == {
        0.3: math.ceil(22 / round_to) * round_to,
        0.9: math.ceil(3 / round_to) * round_to,
    }
    assert kept_count(7, 0.1, round_to=round_to) <= 7


def chain_of_two():
    """Layers a (10 channels) and b (6): filters of constant, known magnitude."""
    params = {
        "a": np.tile(np.float32([1, 9, 8, 2, 7, 3, 6, 5, 10, 11]), (2, 1)),
        "b": np.tile(np.float32([4, 20, 21, 22, 0, 23]), (10, 1)),
        "c": np.ones((6, 2), np.float32),
    }
    groups = tpp.channel_groups(
        lambda p, x: x @ p["a"] @ p["b"] @ p["c"], np.ones((1, 2)), params=params
    )
    return params, groups


def test_global_scope_spends_the_same_total_on_the_lowest_scores():
    params, groups = chain_of_two()
    local = tpp.make_plan(groups, params, "a:0.5,b:0.5")
    assert local.pruned("a").tolist() == [0, 3, 5, 6, 7]
    assert local.pruned("b").tolist() == [0, 1, 4]
    everywhere = tpp.make_plan(groups, params, "a:0.5,b:0.5", scope="global")
    assert everywhere.pruned("a").tolist() == [0, 3, 4, 5, 6, 7]  # 1 2 7 3 6 5
    assert everywhere.pruned("b").tolist() == [0, 4]  # 4 0


def test_global_scope_does_not_prune_unmatched_groups():
    params, groups = chain_of_two()
    plan = tpp.make_plan(groups, params, "a:0.5", scope="global")
    assert plan.pruned("a").tolist() == [0, 3, 5, 6, 7]
    assert plan.pruned("b").tolist() == []


@pytest.mark.parametrize("ratio", [0.1, 0.8, 0.99])
def test_global_scope_empties_no_group(ratio):
    # All weights of one layer are far below those of the other.
    params, groups = chain_of_two()
    params = params | {"a": params["a"] / 1000}
    asked = tpp.make_plan(groups, params, {"[ab]": ratio})
    plan = tpp.make_plan(groups, params, {"[ab]": ratio}, scope="global")
    assert len(plan.kept["a"]) >= 1
    assert len(plan.kept["b"]) >= 1
    assert sum(map(len, plan.kept.values())) == sum(map(len, asked.kept.values()))


def test_global_scope_honours_round_to():
    params, groups = chain_of_two()
    plan = tpp.make_plan(groups, params, "a:0.5,b:0.5", scope="global", round_to=5)
    assert plan.kept["a"].tolist() == [1, 2, 4, 8, 9]  # 4 of 10 without rounding
    assert plan.kept["b"].tolist() == [0, 1, 2, 3, 5]  # 4 of 6


def test_a_criterion_may_be_any_function_of_the_filters():
    params, groups = dense(8)
    shapes = []

    def largest_first(filters):
        shapes.append(filters.shape)
        return -jnp.abs(filters).max(axis=1)

    plan = tpp.make_plan(groups, params, "net.0:0.5", criterion=largest_first)
    kernel = params["net"][0]["kernel"]
    np.testing.assert_array_equal(plan.kept["net.0"], np.flatnonzero(kernel[0] <= 4))
    assert shapes == [(8, 2)]


def test_l1_and_l2_weigh_outliers_differently():
    params = {"a": np.array([[3, 2], [0, 2]], np.float32), "b": np.ones((2, 2))}
    groups = tpp.channel_groups(
        lambda p, x: x @ p["a"] @ p["b"], np.ones((1, 2)), params=params
    )
    kept = {
        criterion: tpp.make_plan(groups, params, "a:0.5", criterion=criterion)
        for criterion in ("l1", "l2")
    }
    assert kept["l1"].to_dict() == {"a": [1]}
    assert kept["l2"].to_dict() == {"a": [0]}


def test_the_seed_decides_the_random_criterion():
    params, groups = dense(40)

    def kept(seed):
        plan = tpp.make_plan(groups, params, "net.0:0.5", criterion="random", seed=seed)
        return plan.kept["net.0"].tolist()

    assert kept(0) == kept(0)
    assert kept(0) != kept(1)
    assert len(kept(1)) == 20


def test_ties_are_broken_by_index():
    params = {"a": np.ones((2, 6)), "b": np.ones((6, 2))}
    groups = tpp.channel_groups(
        lambda p, x: x @ p["a"] @ p["b"], np.ones((1, 2)), params=params
    )
    assert tpp.make_plan(groups, params, "a:0.5").to_dict() == {"a": [3, 4, 5]}


def test_a_plan_survives_json():
    model, groups = resnet()
    plan = tpp.make_plan(groups, model, "*:0.5")
    again = tpp.Plan.from_dict(json.loads(json.dumps(plan.to_dict())), groups)
    assert again.groups is groups
    assert again.kept.keys() == plan.kept.keys()
    for name, kept in plan.kept.items():
        np.testing.assert_array_equal(again.kept[name], kept)
        assert again.kept[name].dtype == kept.dtype


@pytest.mark.parametrize(
    "bad", [[0, 1, 4], [-1, 0], [2, 1], [1, 1], "missing", "extra"]
)
def test_a_plan_of_another_model_is_refused(bad):
    model, groups = resnet()
    data = tpp.make_plan(groups, model, "*:0.5").to_dict()
    if bad == "missing":
        del data["layer1.0.conv1"]
        match = "'layer1.0.conv1'.* do not match"
    elif bad == "extra":
        data["layer9.conv1"] = [0]
        match = "'layer9.conv1'.* do not match"
    else:
        data["layer1.0.conv1"] = bad
        match = "layer1.0.conv1 has 4 channels"
    with pytest.raises(ValueError, match=match):
        tpp.Plan.from_dict(data, groups)


def test_the_leaves_of_a_plan_are_its_kept_indices():
    model, groups = resnet()
    plan = tpp.make_plan(groups, model, "*:0.5")
    leaves, tree = jax.tree.flatten(plan)
    assert len(leaves) == len(plan.kept)
    assert jax.tree.unflatten(tree, leaves).groups is groups


def test_a_pruned_network_is_pruned_again_with_its_optimizer():
    model, groups = resnet()
    x = jnp.ones((1, 8, 8, 3))
    tx = optax.adam(1e-3)
    state = jax.eval_shape(tx.init, nnx.state(model, nnx.Param))
    # Moments with the values of their parameter, to distinguish them.
    state = (state[0]._replace(mu=nnx.state(model, nnx.Param)), *state[1:])
    for ratio in (0.5, 0.25):
        plan = tpp.make_plan(groups, model, ratio, round_to=2)
        again = tpp.Plan.from_dict(json.loads(json.dumps(plan.to_dict())), groups)
        model = tpp.prune(model, again)
        state = tpp.slice_tree(again, state)
        groups = tpp.channel_groups(model, x)
    widths = {g.name: g.size for g in groups if g.reason is None}
    sizes = {g.name: g.size for g in resnet()[1] if g.reason is None}
    assert widths.keys() == sizes.keys()
    for name, n in sizes.items():
        once = math.ceil(n / 2 / 2) * 2
        assert widths[name] == math.ceil((once - math.ceil(once / 4)) / 2) * 2
    params = nnx.state(model, nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, state[0].mu, params)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_a_plan_of_a_plan_s_result_is_one_plan():
    model, groups = resnet()
    first = tpp.make_plan(groups, model, "layer[13]*.conv1:0.25")
    small = tpp.prune(model, first)
    groups_of_small = tpp.channel_groups(small, jnp.ones((1, 8, 8, 3)))
    second = tpp.make_plan(groups_of_small, small, "layer[23]*.conv1:0.5")
    twice = named_leaves(nnx.state(tpp.prune(small, second)))
    once = named_leaves(nnx.state(tpp.prune(model, first.then(second))))
    for name, leaf in twice.items():
        np.testing.assert_array_equal(once[name], leaf, err_msg=name)
    assert once["layer3.0.conv1.kernel"].shape[-1] == 6
