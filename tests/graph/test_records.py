"""Groups and plans are data: they compare, hash, copy and pickle by content."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpp_jax as tpp
from tpp_jax.errors import TPPError

EXAMPLE = jax.ShapeDtypeStruct((2, 4), jnp.float32)
SHAPES = {"w1": (4, 8), "b1": (8,), "w2": (8, 6), "w3": (6, 3)}


def net(p, x):
    hidden = jax.nn.relu(x @ p["w1"] + p["b1"])
    return jax.nn.relu(hidden @ p["w2"]) @ p["w3"]


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}


def made(ratio=0.5, seed=0):
    """Returns a plan made from newly found groups."""
    params = parameters(seed)
    return tpp.make_plan(tpp.channel_groups(net, EXAMPLE, params=params), params, ratio)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "flattened": lambda thing: jax.tree.unflatten(*reversed(jax.tree.flatten(thing))),
}


def test_plans_made_in_the_same_way_are_equal():
    one, other = made(), made()
    assert one.groups is not other.groups
    assert one == other and one.groups == other.groups
    assert hash(one) == hash(other) and hash(one.groups) == hash(other.groups)
    assert len({one, other}) == 1
    assert {one: "found"}[other] == "found"


def test_plans_that_differ_anywhere_are_not_equal():
    plan = made()
    assert plan != made(0.25)  # other counts
    assert plan != made(seed=1)  # other channels
    assert plan != "a plan" and plan.groups != "groups"
    groups = plan.groups
    assert groups != tpp.channel_groups(  # another batch size to trace again with
        net, jax.ShapeDtypeStruct((3, 4), jnp.float32), params=parameters()
    )
    changed = [dataclasses.replace(g, reduced=not g.reduced) for g in groups]
    for group, different in zip(groups, changed, strict=True):
        assert group != different and hash(group) != hash(different)
    [first, *_] = groups["w1"].members
    moved = dataclasses.replace(first, positions=np.roll(first.positions, 1))
    assert first != moved
    assert first == dataclasses.replace(first, positions=first.positions.copy())


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_plan_is_equal_to_it_and_cuts_equally(way):
    plan, params = made(), parameters()
    twin = COPIES[way](plan)
    assert twin == plan and hash(twin) == hash(plan)
    assert jax.tree.structure(twin) == jax.tree.structure(plan)
    for name, leaf in tpp.slice_tree(plan, params).items():
        np.testing.assert_array_equal(tpp.slice_tree(twin, params)[name], leaf)
    assert twin.to_dict() == plan.to_dict()
    assert tpp.make_plan(twin.groups, params, 0.5) == plan


def test_a_deep_copy_is_independent_of_the_original():
    plan = made()
    twin = copy.deepcopy(plan)
    twin.kept["w1"][0] = 7
    twin.groups["w1"].members[0].positions[0] = 7
    twin.groups.shapes["w1"] = (1, 1)
    assert plan == made() and twin != plan


def test_a_copy_reaches_targets_and_a_pickle_raises():
    plan, params = made(), parameters()
    expected = tpp.make_plan(plan.groups, params, flops=0.5)
    for way in ("copy", "deepcopy"):
        assert tpp.make_plan(COPIES[way](plan.groups), params, flops=0.5) == expected
    twin = COPIES["pickle"](plan.groups)
    assert tpp.describe_groups(twin) is not None
    with pytest.raises(TPPError, match="were pickled, and a pickle does not hold the"):
        tpp.make_plan(twin, params, flops=0.5)


def test_a_plan_can_be_sent_to_another_process(tmp_path):
    (tmp_path / "plan").write_bytes(pickle.dumps(made()))
    script = (
        "import pickle, sys, numpy as np, tpp_jax as tpp\n"
        "plan = pickle.load(open(sys.argv[1], 'rb'))\n"
        "small = tpp.slice_tree(plan, {'w1': np.arange(32.0).reshape(4, 8)})\n"
        "print(small['w1'][0].astype(int).tolist(), hash(plan) == hash(plan))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "plan")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"{made().kept['w1'].tolist()} True"


def test_equal_plans_share_one_compiled_program():
    params = parameters()
    chex.clear_trace_counter()
    cut = jax.jit(chex.assert_max_traces(lambda plan, p: tpp.slice_tree(plan, p), n=1))
    small = [cut(way(made()), params) for way in COPIES.values()]
    assert all(jax.tree.map(jnp.shape, one)["w2"] == (4, 3) for one in small)


def test_members_and_groups_are_not_pytrees():
    groups = made().groups
    assert jax.tree.leaves(groups["w1"]) == [groups["w1"]]
    assert jax.tree.leaves(groups["w1"].members[0]) == [groups["w1"].members[0]]
    with pytest.raises(dataclasses.FrozenInstanceError):
        groups["w1"].size = 3
