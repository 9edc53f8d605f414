"""What works on one device works on arrays that a mesh of eight devices divides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tpp_jax as tpp
from tests.sharded.checks import assert_divided_alike, assert_equal, collectives
from tests.sharded.decoder import RATIOS, divided, on_one_device
from tests.sharded.one_of_two import penalised
from tpp_jax.graph.naming import named_leaves
from tpp_jax.pruning.criteria import CRITERIA
from tpp_jax.pruning.scoring_on_devices import _program


@pytest.fixture(scope="module")
def many(mesh):
    return divided(mesh)


@pytest.fixture(scope="module")
def one():
    return on_one_device()


@pytest.fixture(scope="module")
def groups(many):
    return tpp.channel_groups(many.fn, many.tokens, params=many.params)


@pytest.fixture(scope="module")
def groups_of_one(one):
    return tpp.channel_groups(one.fn, one.tokens, params=one.params)


@pytest.fixture(scope="module")
def gradients(many, one):
    return [tpp.loss_gradient(c.loss, c.params, [c.tokens] * 2) for c in (many, one)]


@pytest.fixture(scope="module")
def moments(many, one):
    return [tpp.input_moments(c.fn, [c.tokens], c.params) for c in (many, one)]


@pytest.fixture(scope="module")
def plan(groups, many):
    return tpp.make_plan(groups, many.params, RATIOS)


@pytest.fixture(scope="module")
def plan_of_one(groups_of_one, one):
    return tpp.make_plan(groups_of_one, one.params, RATIOS)


@pytest.fixture(scope="module")
def trained(plan, many):
    """Parameters and the optimizer's state after three steps, and the HLO of one."""
    return penalised(plan, many, 3)


def test_groups_are_the_same(groups, groups_of_one):
    assert [(g.name, g.size, g.reason) for g in groups] == [
        (g.name, g.size, g.reason) for g in groups_of_one
    ]


@pytest.mark.usefixtures("only_scores_reach_the_host")
@pytest.mark.parametrize(
    "criterion", ["l1", "l2", "fpgm", "lamp", "random", "taylor", "taylor_fo", "wanda"]
)
def test_scores_are_computed_where_the_weights_are(
    criterion, groups, groups_of_one, many, one, gradients, moments
):
    statistics = [None, None]
    if criterion.startswith("taylor"):
        statistics = gradients
    elif criterion == "wanda":
        statistics = moments
    plans = [
        tpp.make_plan(
            found, c.params, 0.5, criterion=criterion, statistics=extra, check=False
        )
        for found, c, extra in zip(
            (groups, groups_of_one), (many, one), statistics, strict=True
        )
    ]
    # FPGM measures distances by differences of sums, with the rounding of each.
    assert plans[0].to_dict() == plans[1].to_dict()


def test_scores_move_no_kernel_between_devices(groups, many):
    leaves = named_leaves(many.params)
    members = {
        (m.axis, m.positions.tobytes(), leaves[m.leaf].sharding.spec): m
        for g in groups
        for m in g.members
        if m.role == "produced" and any(leaves[m.leaf].sharding.spec)
    }
    assert len(members) > 4
    for member in members.values():
        kernel = leaves[member.leaf]
        for name, arrays in (
            ("l1", [kernel]),
            ("l2", [kernel]),
            ("taylor", [kernel] * 2),
        ):
            program = _program(
                CRITERIA[name].score,
                member.axis,
                member.positions.shape,
                member.positions.tobytes(),
                member.positions.dtype.str,
                kernel.sharding,
            )
            with jax.enable_x64(True):
                text = program.lower(*arrays).compile().as_text()
            moved = collectives(text)
            assert all(size <= kernel.shape[member.axis] for _, size in moved), moved


def test_penalties_gather_pruned_filters_and_no_whole_kernel(trained, many):
    kernel = many.params["layers"][0]["mlp"]["up_proj"]["kernel"][...]
    moved = [size for kind, size in collectives(trained[2]) if kind == "all-gather"]
    assert max(moved, default=0) < kernel.size, sorted(moved)


def test_a_criterion_written_with_numpy_is_computed_on_the_host(groups, many, one):
    def spread(filters):
        return np.sort(filters, axis=1)[:, -1]

    plans = [
        tpp.make_plan(groups, c.params, RATIOS, criterion=spread, check=False)
        for c in (many, one)
    ]
    assert plans[0].to_dict() == plans[1].to_dict()


def test_gradients_are_divided_as_the_parameters(many, gradients):
    of_many, of_one = gradients
    assert_divided_alike(of_many, many.params)
    assert_equal(of_many, of_one)


def test_curvature_is_divided_as_the_parameters(mesh):
    def loss(params, batch):
        return jnp.mean(jnp.sum(jnp.sin(batch @ params["w"]) ** 2, axis=1))

    w, x = (np.random.default_rng(i).normal(size=(8, 8)) for i in range(2))
    put = {"w": jax.device_put(w, NamedSharding(mesh, P(None, "model")))}
    batch = jax.device_put(x, NamedSharding(mesh, P("data")))
    found = tpp.hessian_diagonal(loss, put, [batch, batch], probes=2)
    assert_divided_alike(found, put)
    w, x = jnp.asarray(w), jnp.asarray(x)
    assert_equal(found, tpp.hessian_diagonal(loss, {"w": w}, [x, x], probes=2))


def test_moments_are_the_same(moments):
    for entry, other in zip(*(m.consumers for m in moments), strict=True):
        assert entry.leaf == other.leaf
        np.testing.assert_allclose(
            entry.covariance, other.covariance, rtol=1e-4, atol=1e-6
        )


def test_penalties_are_the_same_and_leave_the_division(trained, plan_of_one, many, one):
    params, state, _ = trained
    params_of_one, state_of_one, _ = penalised(plan_of_one, one, 3)
    # Adam divides by roots of small gradients.
    assert_equal(params, params_of_one, 1e-3)
    assert_divided_alike(params, many.params)
    assert_divided_alike(state[0].mu, many.params)
    np.testing.assert_allclose(state[1].gram, state_of_one[1].gram, rtol=1e-4)


@pytest.mark.usefixtures("only_scores_reach_the_host")
def test_a_tree_and_the_optimizers_state_are_cut_on_their_devices(
    plan, plan_of_one, many, one, trained, monkeypatch
):
    small = tpp.slice_tree(plan, many.params)
    state = tpp.slice_tree(plan, trained[1])
    assert_divided_alike(small, many.params)
    assert_divided_alike(state[0].mu, many.params)
    pruned = tpp.prune(many.fn, plan, many.params)
    assert_divided_alike(pruned, many.params)
    pointers = [
        {
            shard.data.unsafe_buffer_pointer()
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
        }
        for tree in (small, many.params)
    ]
    assert pointers[0].isdisjoint(pointers[1])
    monkeypatch.undo()
    assert_equal(small, tpp.slice_tree(plan_of_one, one.params))
    assert_equal(pruned, small)


@pytest.mark.parametrize(
    "ratios",
    [{"*gate_proj": 0.3}, {"*q_proj": 0.3}, {"*v_proj#2": 0.3}, 0.35],
)
def test_counts_can_be_rounded_to_what_the_mesh_divides(ratios, groups, many):
    cut = {}
    for round_to in (1, "sharding"):
        plan = tpp.make_plan(groups, many.params, ratios, round_to=round_to)
        cut[round_to] = tpp.slice_tree(plan, many.params)
    assert_divided_alike(cut["sharding"], many.params)
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in cut.values()]
    assert sizes[0] <= sizes[1] < sum(x.size for x in jax.tree.leaves(many.params))
    if ratios == 0.35:
        with pytest.raises(AssertionError):
            assert_divided_alike(cut[1], many.params)
        plan = tpp.make_plan(
            groups, many.params, params=0.7, round_to="sharding", check=False
        )
        assert_divided_alike(tpp.slice_tree(plan, many.params), many.params)


def test_compensation_keeps_the_division(plan, plan_of_one, many, one, moments):
    small, wanted = (
        tpp.compensate(c.fn, p, params=c.params, moments=m, damping=0.1)
        for c, p, m in zip((many, one), (plan, plan_of_one), moments, strict=True)
    )
    assert_divided_alike(small, many.params)
    assert_equal(small, wanted)
