"""What make_plan accepts besides ratios by pattern, and what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import tpp_jax as tpp
from tests.pruning.test_plan import counts, dense, resnet
from tests.reference import filled
from tpp_jax.errors import TPPError
from tpp_jax.models import CifarResNet, CifarVGG
from tpp_jax.pruning.ratios import parse_patterns, parse_ratios


def refusal(ratios, **options):
    model, groups = resnet()
    with pytest.raises(TPPError) as refused:
        tpp.make_plan(groups, model, ratios, **options)
    return str(refused.value)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, math.nan, math.inf])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    for ratios in ({"*conv1": ratio}, f"*conv1:{ratio}"):
        message = refusal(ratios)
        assert "'*conv1' is not in [0, 1)" in message
        assert str(ratio) in message


def test_a_pattern_that_matches_no_layer_names_near_ones():
    message = refusal("*layer*.conv1:0.5,layer1.0.convl:0.5")
    assert "'layer1.0.convl' matches no layer" in message
    assert "layer1.0.conv1" in message
    assert "'*bn1' matches no layer" in refusal("*bn1:0.5")
    assert "conv1" in refusal("qqq:0.5")  # similar to no name


def test_a_skip_pattern_that_matches_no_layer_is_refused():
    assert "'layer9*' matches no layer" in refusal("*conv1:0.5", skip="layer9*")


def test_a_pattern_of_nothing_but_unprunable_layers_is_refused():
    message = refusal("*conv1:0.5,linear:0.5")
    assert "'linear' asks to prune linear" in message
    assert "an output of the model" in message
    assert counts("layer1.0.conv1:0.5,linear:0") == {"layer1.0.conv1": 2}


@pytest.mark.parametrize("text", ["*conv1", "*conv1=0.5", ":0.5", "*conv1:half", "0.5"])
def test_malformed_ratios_are_refused(text):
    message = refusal(text)
    assert f"{text!r}" in message
    assert "'*layer*.conv1:0.5'" in message


def test_an_unknown_scope_criterion_or_rounding_is_refused():
    message = refusal("*conv1:0.5", scope="planet")
    assert "'planet'" in message
    assert "'local', 'global' or 'isomorphic'" in message
    message = refusal("*conv1:0.5", criterion="l7")
    assert "'l7'" in message
    assert "l1, l2, bn_scale" in message and "variance, obs, random" in message
    assert "round_to is 0" in refusal("*conv1:0.5", round_to=0)
    assert "give a number, or 'sharding'" in refusal("*conv1:0.5", round_to="mesh")


def test_a_criterion_that_gives_no_score_per_filter_is_refused():
    message = refusal("layer1.0.conv1:0.5", criterion=lambda filters: filters)
    assert "shape (4, 36) for layer1.0.conv1.kernel" in message


def test_groups_of_another_model_are_refused():
    _, groups = resnet()
    other = filled(lambda: CifarVGG([4, "M", 6], rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"groups are for another model.*missing"):
        tpp.make_plan(groups, other, "*conv1:0.5")
    wider = filled(
        lambda: CifarResNet((1, 1, 1), width=0.5, option="B", rngs=nnx.Rngs(0))
    )
    with pytest.raises(ValueError, match=r"of shape \(.*here it is of shape \("):
        tpp.make_plan(groups, wider, "*conv1:0.5")


def test_abstract_weights_are_refused():
    model, groups = resnet()
    shapes = jax.eval_shape(lambda: nnx.state(model))
    with pytest.raises(ValueError, match="is abstract: give the weights, or scores"):
        tpp.make_plan(groups, shapes, 0.5)


@given(st.text(alphabet=st.sampled_from("a*?[]:,.01-e \n") | st.characters()))
def test_any_text_is_read_as_ratios_or_refused(text):
    ratios = {}
    try:
        ratios = parse_ratios(text)
    except TPPError as error:
        message = str(error)
        assert "ratio" in message
    assert all(pattern and 0 <= ratio < 1 for pattern, ratio in ratios.items())


@given(
    st.dictionaries(
        st.text(alphabet="abc*?[]!.0123", min_size=1),
        st.floats(0, 1, exclude_max=True),
    )
)
def test_written_ratios_are_read_back(ratios):
    text = ",".join(f"{pattern}:{ratio!r}" for pattern, ratio in ratios.items())
    assert parse_ratios(text) == ratios


def test_patterns_are_separated_by_commas():
    assert parse_patterns(" a*, ,b ") == ["a*", "b"]
    assert parse_patterns(["a*", " b "]) == ["a*", "b"]
    assert parse_patterns("") == []


def test_counts_are_the_exact_numbers_of_kept_channels():
    params, groups = dense(20)
    plan = tpp.make_plan(groups, params, counts={"net.0": 7})
    assert plan.kept["net.0"].tolist() == sorted(
        np.argsort(params["net"][0]["kernel"][0])[-7:]
    )
    assert tpp.make_plan(groups, params, counts={}).pruned_groups == ()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"net.0": -1}, "cannot keep -1 channels of net.0, which has 20"),
        ({"net.0": 0}, "the output no longer depends on the inputs"),
        ({"net.0": 21}, "cannot keep 21 channels of net.0, which has 20"),
        ({"net.9": 3}, "there is no prunable group 'net.9'"),
    ],
)
def test_impossible_counts_are_refused(counts, message):
    params, groups = dense(20)
    with pytest.raises(ValueError, match=message):
        tpp.make_plan(groups, params, counts=counts)


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({"ratios": 0.5}, "ratios"),
        ({"ratios": {"net.0": 0.5}, "flops": 0.3}, "ratios and flops"),
        ({"params": 0.3}, "params"),
        ({"skip": "net.0"}, "skip"),
        ({"skip": ["net.0"]}, "skip"),
        ({"scope": "global"}, "scope"),
        ({"round_to": 8}, "round_to"),
        ({"round_to": "sharding"}, "round_to"),
        ({"min_channels": 4}, "min_channels"),
    ],
)
def test_counts_cannot_be_combined_with_other_amounts(others, named):
    params, groups = dense(20)
    with pytest.raises(TPPError, match=f"so {named} would be ignored"):
        tpp.make_plan(groups, params, counts={"net.0": 7}, **others)
    neutral = {"ratios": None, "skip": [], "scope": "local", "round_to": 1}
    plan = tpp.make_plan(groups, params, counts={"net.0": 7}, **neutral)
    assert plan.kept_count(groups["net.0"]) == 7


def test_the_user_s_scores_replace_the_criterion():
    params, groups = dense(6)
    scores = np.array([3, 1, 2, 0, 5, 4])
    for form in (scores, list(scores), jnp.asarray(scores, jnp.bfloat16)):
        plan = tpp.make_plan(groups, params, 0.5, scores={"net.0": form})
        assert plan.kept["net.0"].tolist() == [0, 4, 5]
    plan = tpp.make_plan(groups, params, counts={"net.0": 1}, scores={"net.0": scores})
    assert plan.kept["net.0"].tolist() == [4]


def test_scores_are_enough_for_an_abstract_model():
    model, groups = resnet()
    abstract = nnx.eval_shape(lambda: nnx.clone(model))
    rng = np.random.default_rng(0)
    scores = {g.name: rng.normal(size=g.size) for g in groups if g.reason is None}
    plan = tpp.make_plan(groups, abstract, 0.5, scores=scores)
    for name, score in scores.items():
        highest = np.sort(np.argsort(score)[len(score) // 2 :])
        np.testing.assert_array_equal(plan.kept[name], highest)
    assert plan == tpp.make_plan(groups, model, 0.5, scores=scores)
    # They compete across groups and meet targets like other scores.
    for options in ({"ratios": 0.5, "scope": "global"}, {"flops": 0.5}):
        chosen = tpp.make_plan(groups, abstract, scores=scores, **options)
        assert chosen == tpp.make_plan(groups, model, scores=scores, **options)
    with pytest.raises(TPPError, match="is abstract: give the weights, or scores"):
        tpp.make_plan(groups, abstract, 0.5, scores={"conv1": scores["conv1"]})


def test_groups_without_scores_of_their_own_are_scored_by_the_criterion():
    model, groups = resnet()
    name = "layer1.0.conv1"
    mixed = tpp.make_plan(groups, model, 0.5, scores={name: np.arange(4)})
    by_criterion = tpp.make_plan(groups, model, 0.5)
    assert mixed.kept[name].tolist() == [2, 3]
    for other in by_criterion.kept.keys() - {name}:
        np.testing.assert_array_equal(mixed.kept[other], by_criterion.kept[other])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"net.9": np.ones(6)}, "'net.9', which is not a group: the groups are net.0"),
        (
            {"net.0": np.ones(5)},
            r"scores of net.0 have shape \(5,\), but it has 6",
        ),
        ({"net.0": np.ones((6, 1))}, r"have shape \(6, 1\)"),
        ({"net.0": np.full(6, np.nan)}, "scores of net.0 contain nan"),
        ({"net.0": ["a"] * 6}, "have dtype <U1: give real numbers"),
        ({"net.0": np.ones(6, complex)}, "have dtype complex128: give real numbers"),
        ({"net.0": jax.ShapeDtypeStruct((6,), jnp.float32)}, "scores of net.0"),
    ],
)
def test_impossible_scores_are_refused(scores, message):
    params, groups = dense(6)
    with pytest.raises(TPPError, match=message):
        tpp.make_plan(groups, params, 0.5, scores=scores)


def test_an_unknown_criterion_is_refused_even_if_scores_replace_it():
    params, groups = dense(6)
    with pytest.raises(TPPError, match="unknown criterion 'l3'"):
        tpp.make_plan(groups, params, 0.5, scores={"net.0": range(6)}, criterion="l3")


@pytest.mark.parametrize(
    "amount",
    [
        {"ratios": [0.5]},
        {"ratios": {"net.0": "0.5"}},
        {"ratios": {"net.0": None}},
        {"ratios": True},
        {"counts": 4},
        {"counts": {"net.0": "4"}},
        {"counts": {"net.0": True}},
        {"ratios": 0.5, "scores": 5},
    ],
)
def test_an_amount_of_a_wrong_type_is_refused(amount):
    params, groups = dense(6)
    with pytest.raises(TPPError, match=r"ratio|counts|channels of net.0|scores"):
        tpp.make_plan(groups, params, **amount)


@pytest.mark.parametrize("ratio", [np.float32(0.5), jnp.float32(0.5), np.array(0.5)])
def test_a_ratio_may_be_a_number_of_numpy_or_jax(ratio):
    params, groups = dense(6)
    assert tpp.make_plan(groups, params, ratio) == tpp.make_plan(groups, params, 0.5)


def test_what_is_not_a_plan_is_refused():
    params, groups = dense(6)
    plan = tpp.make_plan(groups, params, 0.5)
    schedule = tpp.growing_schedule(granularity=0.1, every=1)
    for other in (groups, plan.to_dict(), params, None):
        for use in (
            lambda: tpp.slice_tree(other, params),  # noqa: B023
            lambda: tpp.mask_tree(other, params),  # noqa: B023
            lambda: tpp.check_plan(other),  # noqa: B023
            lambda: tpp.add_tpp_penalties(other, schedule),  # noqa: B023
        ):
            with pytest.raises(TPPError, match="not a Plan: pass the result"):
                use()
    with pytest.raises(TPPError, match="first, and then the model"):
        tpp.make_plan(params, groups, 0.5)
