"""The transforms find their parameters in any tree, and say so if they cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.traverse_util import flatten_dict

import tpp_jax as tpp
from tpp_jax.errors import TPPError
from tpp_jax.method.rivals import add_group_lasso, add_growing_l2

SCHEDULE = tpp.growing_schedule(granularity=0.5, every=1, stabilize=9, zero_out_every=1)
X = jnp.ones((2, 5))


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(6, name="up")(x)
        x = linen.relu(linen.BatchNorm(use_running_average=True, name="norm")(x))
        return linen.Dense(3, name="down")(x)


VARIABLES = Net().init(jax.random.key(0), X)
VARIABLES = jax.tree.map(lambda a: a + 0.5, VARIABLES)
PLAN = tpp.make_plan(
    tpp.channel_groups(Net(), X, params=VARIABLES), VARIABLES, {"up": 0.5}
)
PARAMS = VARIABLES["params"]
TRANSFORMS = {
    "penalties": lambda plan: tpp.add_tpp_penalties(plan, SCHEDULE, kept_weight=0.1),
    "zeroing": lambda plan: tpp.zero_pruned(plan, SCHEDULE),
    "growing": lambda plan: add_growing_l2(plan, SCHEDULE),
    "lasso": add_group_lasso,
}


def updates_of(make, tree, steps=6, plan=PLAN):
    """The last of some updates of gradients that are all 1."""
    tx = make(plan)
    state = tx.init(tree)
    ones = jax.tree.map(jnp.ones_like, tree)
    if optax.tree_utils.tree_get_all_with_path(state, "step"):
        state = optax.tree_utils.tree_set(state, step=jnp.int32(steps))
    return jax.jit(tx.update)(ones, state, tree)[0]


def assert_equal_trees(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, other)


FORMS = {
    "variables": (lambda p: {"params": p}, lambda t: t["params"]),
    "with statistics": (lambda p: {**VARIABLES, "params": p}, lambda t: t["params"]),
    "with an average": (lambda p: {"ema": p, "params": p}, lambda t: t["params"]),
    "wrapped": (lambda p: {"model": {"net": p}}, lambda t: t["model"]["net"]),
    "wrapped, with an average": (
        lambda p: {"params": {"net": p}, "ema": {"net": p}},
        lambda t: t["params"]["net"],
    ),
    "in a list": (lambda p: [jnp.ones(3), p], lambda t: t[1]),
    "flat, slashes": (
        lambda p: flatten_dict({"params": p}, sep="/"),
        lambda t: {
            layer: {kind: t[f"params/{layer}/{kind}"] for kind in PARAMS[layer]}
            for layer in PARAMS
        },
    ),
    "flat, tuples": (
        flatten_dict,
        lambda t: {
            layer: {kind: t[layer, kind] for kind in PARAMS[layer]} for layer in PARAMS
        },
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("form", FORMS)
def test_the_updates_are_those_of_the_parameters_alone(form, transform):
    into, out_of = FORMS[form]
    make, tree = TRANSFORMS[transform], into(PARAMS)
    expected = updates_of(make, PARAMS)
    assert any(np.any(leaf != 1) for leaf in jax.tree.leaves(expected))
    found = updates_of(make, tree)
    assert_equal_trees(out_of(found), expected)
    # Whatever else is in the tree is left alone: statistics, averages.
    untouched = into(jax.tree.map(jnp.zeros_like, PARAMS))
    for kind in ("batch_stats", "ema"):
        if isinstance(tree, dict) and kind in tree:
            ones = jax.tree.map(jnp.ones_like, untouched[kind])
            assert_equal_trees(found[kind], ones)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_statistics_of_a_whole_nnx_state_are_left_alone(transform):
    class Small(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(5, 6, rngs=rngs)
            self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
            self.down = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.norm(self.up(x))))

    model = Small(nnx.Rngs(0))
    plan = tpp.make_plan(tpp.channel_groups(model, X), model, {"up": 0.5})
    whole = updates_of(TRANSFORMS[transform], nnx.state(model), plan=plan)
    trained = updates_of(TRANSFORMS[transform], nnx.state(model, nnx.Param), plan=plan)
    assert_equal_trees(nnx.filter_state(whole, nnx.Param), trained)
    for leaf in jax.tree.leaves(nnx.filter_state(whole, nnx.BatchStat)):
        assert np.all(leaf == 1)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"other": PARAMS["up"]}, "prunes up.kernel.* no leaf .* they have other.bias"),
        ({"down": PARAMS["down"], "norm": PARAMS["norm"]}, "prunes up.kernel"),
        (list(jax.tree.leaves(PARAMS)), "they have 0, 1, 2, 3, 4 and 1 more"),
        (jnp.ones(99), r"they have \(a bare array\)"),
        ({"a": PARAMS, "b": PARAMS}, "more than once, as a.*, b"),
        ({"params": {"a": PARAMS, "b": PARAMS}}, "more than once"),
        ({}, "prunes up.kernel"),
    ],
    ids=[
        "other names",
        "a layer missing",
        "list",
        "vector",
        "twice",
        "twice in",
        "none",
    ],
)
def test_a_tree_without_the_planned_parameters_is_refused(transform, tree, message):
    tx = TRANSFORMS[transform](PLAN)
    with pytest.raises(TPPError, match=message):
        tx.init(tree)
    state = tx.init(PARAMS)
    with pytest.raises(TPPError, match=message):
        tx.update(tree, state, tree)


def test_a_missing_bias_is_named():
    tree = {**PARAMS, "up": {"kernel": PARAMS["up"]["kernel"]}}
    with pytest.raises(TPPError, match=r"the plan prunes up\.bias, but"):
        tpp.add_tpp_penalties(PLAN, SCHEDULE).init(tree)


def test_optax_flatten_is_refused():
    tx = optax.flatten(tpp.add_tpp_penalties(PLAN, SCHEDULE))
    with pytest.raises(TPPError, match="a bare array"):
        tx.init(PARAMS)


def test_a_plan_that_prunes_nothing_takes_any_tree():
    plan = tpp.make_plan(PLAN.groups, VARIABLES, {})
    for make in TRANSFORMS.values():
        tx = make(plan)
        tree = {"anything": jnp.ones(3)}
        out, _ = tx.update(tree, tx.init(tree), tree)
        assert_equal_trees(out, tree)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_is_masked_out_is_left_alone(transform):
    make = TRANSFORMS[transform]
    expected = updates_of(make, PARAMS)
    kernels = jax.tree.map(lambda a: a.ndim > 1, PARAMS)
    found = updates_of(lambda plan: optax.masked(make(plan), kernels), PARAMS)
    want = jax.tree.map(
        lambda kernel, update: update if kernel else jnp.ones_like(update),
        kernels,
        expected,
    )
    assert_equal_trees(found, want)
    nothing = jax.tree.map(lambda a: False, PARAMS)
    with pytest.raises(TPPError, match="the plan prunes"):
        optax.masked(make(PLAN), nothing).init(PARAMS)


def test_the_transforms_work_for_some_of_the_labels():
    labels = {layer: layer == "up" for layer in PARAMS}
    tx = optax.partition(
        {
            True: optax.chain(
                tpp.add_tpp_penalties(PLAN, SCHEDULE),
                optax.sgd(0.1),
                tpp.zero_pruned(PLAN, SCHEDULE),
            ),
            False: optax.sgd(0.1),
        },
        labels,
    )
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(SCHEDULE.total_steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    gone = PLAN.pruned("up")
    assert not np.any(params["up"]["kernel"][:, gone])
    assert np.all(params["norm"]["scale"][gone] != 0)  # not among the labels
