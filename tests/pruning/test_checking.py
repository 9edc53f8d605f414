"""check_groups accepts the groups of a model, and finds wrong ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp


def mlp(p, x):
    hidden = jax.nn.relu(x @ p["a"] + p["bias"])
    return jax.nn.relu(hidden @ p["b"]) @ p["c"]


PARAMS = {"a": (3, 6), "bias": (6,), "b": (6, 5), "c": (5, 2)}
PARAMS = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in PARAMS.items()}
INPUTS = jax.ShapeDtypeStruct((4, 3), jnp.float32)


def changed(groups, name, change):
    """Returns groups with one changed."""
    return groups.replace(all=tuple(change(g) if g.name == name else g for g in groups))


def test_a_network_is_proved_from_shapes_alone():
    checks = tpp.check_groups(mlp, INPUTS, params=PARAMS)
    assert [one.name for one in checks.groups] == ["a", "b"]
    for one in checks.groups:
        assert one.permuted < 1e-5 < 0.01 < one.influence
    assert checks.masked < 1e-5
    assert checks.unprunable == {"c": "an output of the model"}
    assert checks.unproved == ()


@pytest.mark.parametrize("leaf", ["bias", "b"])
def test_a_missing_or_shifted_member_is_found(leaf):
    groups = tpp.channel_groups(mlp, INPUTS, params=PARAMS)

    def without(group):
        members = tuple(m for m in group.members if m.leaf != leaf)
        return dataclasses.replace(group, members=members)

    def turned(group):
        return dataclasses.replace(
            group,
            members=tuple(
                dataclasses.replace(m, positions=np.roll(m.positions, 1))
                if m.leaf == leaf
                else m
                for m in group.members
            ),
        )

    for change in (without, turned):
        wrong = changed(groups, "a", change)
        with pytest.raises(ValueError, match="group a is wrong: when its channels"):
            tpp.check_groups(mlp, INPUTS, params=PARAMS, groups=wrong)


def normalised(p, x):
    hidden = x @ p["a"] + p["bias"]
    return (hidden / jnp.sum(jnp.abs(hidden) + 1, -1, keepdims=True)) @ p["b"] @ p["c"]


def test_a_reduction_that_is_overlooked_is_found():
    groups = tpp.channel_groups(normalised, INPUTS, params=PARAMS)
    assert groups["a"].reduced
    tpp.check_groups(normalised, INPUTS, params=PARAMS, groups=groups)
    wrong = changed(groups, "a", lambda g: dataclasses.replace(g, reduced=False))
    with pytest.raises(ValueError, match="masking half of the channels differs"):
        tpp.check_groups(normalised, INPUTS, params=PARAMS, groups=wrong)


def test_a_group_without_influence_is_not_counted_as_proved():
    def fn(p, x):
        return x @ p["c"] + 0.0 * jnp.sum(jax.nn.relu(x @ p["a"]) @ p["b"])

    params = PARAMS | {"c": jax.ShapeDtypeStruct((3, 2), jnp.float32)}
    assert "a" in tpp.check_groups(fn, INPUTS, params=params).unproved


def test_outputs_that_are_not_finite_prove_nothing():
    with pytest.raises(ValueError, match="not finite"):
        tpp.check_groups(lambda p, x: mlp(p, x) / 0.0, INPUTS, params=PARAMS)


def test_a_module_is_not_modified_and_may_be_abstract():
    def create():
        return tpp.models.create("cifar_resnet8", num_classes=4, rngs=nnx.Rngs(0))

    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    model = nnx.eval_shape(create)
    checks = tpp.check_groups(model, images)
    assert checks.masked < 1e-5 and len(checks.groups) == 4
    leaves = jax.tree.leaves(nnx.state(model))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
