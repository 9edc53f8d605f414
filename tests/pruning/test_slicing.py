"""Slicing is exact: the sliced network computes the same as the masked one."""

import functools

import chex
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
from tpp_jax.models import MLP, CifarResNet, CifarVGG, CifarWRN, LeNet5
from tpp_jax.models.layers import BatchNorm, conv, dense, max_pool
from tpp_jax.pruning.slicing import keep_masks


class Concatenating(nnx.Module):
    """Two branches side by side, one norm over both, flattened into a dense layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.left = conv(3, 4, 3, padding=1, bias=True, rngs=rngs)
        self.right = conv(3, 3, 1, rngs=rngs)
        self.bn = BatchNorm(7, rngs=rngs)
        self.first = dense(2 * 2 * 7, 6, rngs=rngs)
        self.last = dense(6, 3, rngs=rngs)

    def __call__(self, x):
        x = jnp.concatenate([self.left(x), jnp.tanh(self.right(x))], axis=-1)
        x = max_pool(jax.nn.sigmoid(self.bn(x)))
        x = x.reshape(x.shape[0], -1)
        return self.last(jax.nn.gelu(self.first(x)))


class Recurrent(nnx.Module):
    """One dense layer applied three times."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.enter = dense(3, 5, rngs=rngs)
        self.again = dense(5, 5, rngs=rngs)
        self.leave = dense(5, 2, rngs=rngs)

    def __call__(self, x):
        x = self.enter(x)
        for _ in range(3):
            x = self.again(jax.nn.relu(x))
        return self.leave(x)


FAMILIES = {
    "resnet A": (
        lambda: CifarResNet((1, 1, 1), width=0.25, option="A", rngs=nnx.Rngs(0)),
        (2, 8, 8, 3),
    ),
    "resnet B": (
        lambda: CifarResNet((1, 1, 1), width=0.25, option="B", rngs=nnx.Rngs(0)),
        (2, 8, 8, 3),
    ),
    "wide resnet": (lambda: CifarWRN(10, 1, rngs=nnx.Rngs(0)), (2, 8, 8, 3)),
    "vgg": (
        lambda: CifarVGG((4, "M", 6, 5, "M", 8), num_classes=5, rngs=nnx.Rngs(0)),
        (2, 8, 8, 3),
    ),
    "mlp relu": (
        lambda: MLP(4, image_shape=(3, 3, 2), hidden=6, rngs=nnx.Rngs(0)),
        (2, 3, 3, 2),
    ),
    "mlp linear": (
        lambda: MLP(3, image_shape=(3, 3, 1), linear=True, hidden=7, rngs=nnx.Rngs(0)),
        (2, 3, 3, 1),
    ),
    "lenet": (lambda: LeNet5(num_classes=4, rngs=nnx.Rngs(0)), (2, 32, 32, 1)),
    "concatenating": (lambda: Concatenating(nnx.Rngs(0)), (2, 4, 4, 3)),
    "recurrent": (lambda: Recurrent(nnx.Rngs(0)), (2, 3)),
}


@functools.cache
def network(family):
    """Returns (model with random weights, its groups, inputs, masked run)."""
    create, shape = FAMILIES[family]
    model = filled(create)
    model.eval()
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    graphdef, state = nnx.split(model)

    @jax.jit
    def masked(mask):
        return nnx.merge(graphdef, jax.tree.map(jnp.multiply, state, mask))(x)

    return model, tpp.channel_groups(model, x), x, masked


@functools.cache
def keeping(n):
    return st.sets(st.integers(0, n - 1), min_size=1).map(sorted)


def plans(groups):
    """Draws a plan that keeps some channels of each prunable group."""
    kept = {g.name: keeping(g.size) for g in groups if g.reason is None}
    return st.fixed_dictionaries(kept).map(
        lambda data: tpp.Plan.from_dict(data, groups)
    )


def every_second(groups, start=0):
    """Returns a plan that does not depend on the weights."""
    kept = {
        g.name: np.arange(g.size, dtype=np.int32)[start::2]
        for g in groups
        if g.reason is None
    }
    return tpp.Plan(kept, groups)


def assert_equal_leaves(one, other, rtol=0.0, atol=0.0):
    one, other = named_leaves(one), named_leaves(other)
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        assert leaf.dtype == other[name].dtype
        np.testing.assert_allclose(leaf, other[name], rtol, atol, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4)
@given(data=st.data())
def test_the_sliced_network_equals_the_masked_network(family, data):
    model, groups, x, masked = network(family)
    plan = data.draw(plans(groups))
    graphdef, state = nnx.split(model)

    @jax.jit  # one compilation for all the cutting and the network
    def sliced(state):
        return nnx.merge(graphdef, tpp.slice_tree(plan, state))(x)

    logits, expected = sliced(state), masked(tpp.mask_tree(plan, state))
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=10)
@given(data=st.data())
def test_slicing_keeps_exactly_the_entries_that_the_mask_marks(data):
    model, groups, _, _ = network("concatenating")
    plan = data.draw(plans(groups))
    state = nnx.state(model)
    state_leaves, mask = named_leaves(state), named_leaves(tpp.mask_tree(plan, state))
    sliced = jax.jit(functools.partial(tpp.slice_tree, plan))(state)
    for name, leaf in named_leaves(sliced).items():
        kept = np.asarray(state_leaves[name])[np.asarray(mask[name]) == 1]
        np.testing.assert_array_equal(np.asarray(leaf).reshape(-1), kept)
        assert set(np.unique(mask[name])) <= {0, 1}
        for axis, (keep, count, _) in keep_masks(plan, name).items():
            assert leaf.shape[axis] == count == keep.sum()


def test_an_empty_plan_changes_nothing():
    model, groups, _, _ = network("resnet A")
    plan = tpp.make_plan(groups, model, {})
    assert_equal_leaves(nnx.state(tpp.prune(model, plan)), nnx.state(model))


def test_slicing_takes_every_form_of_the_same_tree():
    model, groups, _, _ = network("vgg")
    plan = every_second(groups)
    state = nnx.state(model)
    expected = named_leaves(tpp.slice_tree(plan, state))
    assert expected["features.4.kernel"].shape == (3, 3, 2, 3)
    flat = named_leaves(state)
    forms = {
        "pure dict": nnx.to_pure_dict(state),
        "flat dict": flat,
        "tuple": (state, {"average": flat}),
        "numpy": jax.tree.map(np.asarray, nnx.to_pure_dict(state)),
    }
    for form, tree in forms.items():
        sliced = tpp.slice_tree(plan, tree)
        assert jax.tree.structure(sliced) == jax.tree.structure(tree)
        for name, leaf in named_leaves(sliced).items():
            name = name.removeprefix("0.").removeprefix("1.average.")
            np.testing.assert_array_equal(leaf, expected[name], err_msg=form)


def test_abstract_leaves_are_sliced_to_abstract_leaves():
    model, groups, _, _ = network("concatenating")
    plan = every_second(groups)
    state = nnx.state(model)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.int8), state)
    sliced = named_leaves(tpp.slice_tree(plan, abstract))
    for name, leaf in named_leaves(tpp.slice_tree(plan, state)).items():
        assert sliced[name] == jax.ShapeDtypeStruct(leaf.shape, jnp.int8)
    assert sliced["first.kernel"].shape == (2 * 2 * (2 + 2), 3)


def test_leaves_that_are_not_copies_of_a_parameter_are_unchanged():
    model, groups, _, _ = network("vgg")
    others = {"count": jnp.int32(3), "key": jax.random.key(0), "kernel": jnp.ones(9)}
    tree = {"params": nnx.state(model), "others": others}
    sliced = tpp.slice_tree(every_second(groups), tree)["others"]
    for name in ("count", "kernel"):
        np.testing.assert_array_equal(sliced[name], others[name])
    np.testing.assert_array_equal(
        jax.random.bits(sliced["key"], 3), jax.random.bits(others["key"], 3)
    )
    mask = tpp.mask_tree(every_second(groups), tree)["others"]
    assert jax.tree.map(jnp.shape, mask) == {"count": (), "key": (), "kernel": (9,)}


def test_a_leaf_of_a_wrong_shape_is_refused():
    model, groups, _, _ = network("vgg")
    plan = every_second(groups)
    small = tpp.slice_tree(plan, nnx.state(model))
    for apply in (tpp.slice_tree, tpp.mask_tree):
        with pytest.raises(ValueError, match=r"cannot slice classifier\..*the planned"):
            apply(plan, small)
    with pytest.raises(
        ValueError, match=r"0\.trace\.features\.0\.kernel of shape \(2,"
    ):
        tpp.slice_tree(plan, {"0": {"trace": {"features.0.kernel": np.ones((2, 4))}}})


def test_a_leaf_is_not_confused_with_one_whose_name_it_ends_in():
    # conv1 loses channels, layer1.0.conv1 none; both end in conv1.kernel.
    model, groups, _, _ = network("resnet B")
    plan = tpp.make_plan(groups, model, "conv1:0.5")
    assert [group.name for group in plan.pruned_groups] == ["conv1"]
    sliced = named_leaves(tpp.slice_tree(plan, {"ema": nnx.state(model)}))
    assert sliced["ema.conv1.kernel"].shape == (3, 3, 3, 2)
    assert sliced["ema.layer1.0.conv1.kernel"].shape == (3, 3, 2, 4)
    assert sliced["ema.layer2.0.conv1.kernel"].shape == (3, 3, 2, 8)
    assert sliced["ema.layer3.0.conv1.kernel"].shape == (3, 3, 8, 16)


def test_a_leaf_is_not_confused_with_one_that_cannot_be_pruned():
    def fn(p, x):
        return jax.nn.relu(jnp.sort(x @ p["deep"]["w"], axis=1) @ p["w"]) @ p["z"]

    params = {"w": np.ones((4, 6)), "z": np.ones((6, 2)), "deep": {"w": np.eye(4)}}
    plan = every_second(tpp.channel_groups(fn, np.ones((1, 4)), params=params))
    assert plan.kept.keys() == {"w"}
    sliced = tpp.slice_tree(plan, {"momentum": params})
    assert jax.tree.map(np.shape, sliced) == {
        "momentum": {"w": (4, 3), "z": (3, 2), "deep": {"w": (4, 4)}}
    }


def test_pruning_does_not_modify_the_given_model():
    model, groups, x, _ = network("vgg")
    model = nnx.clone(model)
    model.train()
    before = jax.tree.map(np.array, nnx.state(model))
    graphdef = nnx.graphdef(model)
    small = tpp.prune(model, every_second(groups))
    assert type(small) is type(model)
    small.features[1].mean[...] = jnp.zeros(2)
    # Unpruned arrays are not shared: changing one model does not change the other.
    small.classifier.bias[...] = jnp.zeros(5)
    small(x)
    assert nnx.graphdef(model) == graphdef
    assert_equal_leaves(nnx.state(model), before)


def test_a_pruned_model_is_in_the_mode_of_the_given_one_and_can_be_trained():
    model, groups, x, _ = network("resnet A")
    model = nnx.clone(model)
    model.train()
    small = tpp.prune(model, every_second(groups))
    before = np.array(small.layer3[0].bn1.mean[...])
    nnx.jit(lambda m, x: m(x))(small, x)
    assert before.shape == (8,)
    assert not np.allclose(small.layer3[0].bn1.mean[...], before)


def test_a_pruned_model_can_be_pruned_again():
    model, groups, x, _ = network("mlp relu")
    small = tpp.prune(model, every_second(groups))
    again = tpp.channel_groups(small, x)
    smaller = tpp.prune(small, every_second(again))
    assert smaller.net[2].kernel.shape == (2, 2)
    once = tpp.prune(
        model,
        tpp.Plan.from_dict(
            {name: kept.tolist()[::4] for name, kept in _all(groups).items()}, groups
        ),
    )
    assert_equal_leaves(nnx.state(smaller), nnx.state(once))


def _all(groups):
    return {g.name: np.arange(g.size) for g in groups if g.reason is None}


class Stubborn(nnx.Module):
    """A network that flattens to a hard-coded size."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = conv(3, 4, 1, rngs=rngs)
        self.dense = dense(16, 2, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.conv(x).reshape(-1, 16))


def test_a_hard_coded_size_of_a_layer_is_reported():
    model = filled(lambda: Stubborn(nnx.Rngs(0)))
    groups = tpp.channel_groups(model, jnp.ones((3, 2, 2, 3)))
    reason = groups["conv"].reason
    assert reason.startswith("a size written into the model (test_slicing.py:")
    assert "cannot reshape" in reason


def test_a_plan_may_be_traced():
    model, groups, _, _ = network("concatenating")
    plan = every_second(groups)
    state = nnx.state(model)
    for apply in (tpp.slice_tree, tpp.mask_tree):
        assert_equal_leaves(jax.jit(apply)(plan, state), apply(plan, state))


def test_one_program_serves_plans_of_equal_counts():
    model, groups, _, _ = network("mlp relu")
    state = nnx.state(model)
    chex.clear_trace_counter()
    cut = jax.jit(
        chex.assert_max_traces(lambda plan, tree: tpp.slice_tree(plan, tree), n=1)
    )
    for start in (0, 1):
        plan = every_second(groups, start)
        assert_equal_leaves(cut(plan, state), tpp.slice_tree(plan, state))


def test_slicing_can_be_vmapped_over_plans_of_equal_counts():
    model, groups, _, _ = network("mlp relu")
    state = nnx.state(model)
    both = [every_second(groups, start) for start in (0, 1)]
    stacked = jax.tree.map(lambda *kept: jnp.stack(kept), *both)
    for apply in (tpp.slice_tree, tpp.mask_tree):
        out = jax.jit(jax.vmap(apply, in_axes=(0, None)))(stacked, state)
        for i, plan in enumerate(both):
            assert_equal_leaves(
                jax.tree.map(lambda a, i=i: a[i], out), apply(plan, state)
            )


OPTIMIZERS = (
    optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)),
    optax.adam(1e-2),
)


def stepper(model, x):
    """Returns the result of one step of every optimizer on one gradient."""
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    labels = np.arange(len(x)) % 3

    @jax.jit
    def step(params, rest, states):
        def loss(params):
            net = nnx.merge(graphdef, params, rest, copy=True)
            return optax.softmax_cross_entropy_with_integer_labels(
                net(x), labels
            ).mean()

        grads = jax.grad(loss)(params)
        out = [
            tx.update(grads, state, params)
            for tx, state in zip(OPTIMIZERS, states, strict=True)
        ]
        return tuple((optax.apply_updates(params, u), state) for u, state in out)

    return step, rest


@pytest.mark.parametrize("family", ["concatenating", "recurrent"])
def test_slicing_then_stepping_is_stepping_the_masked_network_then_slicing(family):
    model, groups, x, _ = network(family)
    x = np.concatenate([x, x[::-1] + 1])
    model = nnx.clone(model)
    model.train()
    plan = every_second(groups, start=1)
    params = nnx.state(model, nnx.Param)
    # Random moments, as after a few steps.
    rng = np.random.default_rng(2)
    states = tuple(
        jax.tree.map(
            lambda a: jnp.asarray(a + rng.uniform(0, 0.01, a.shape), a.dtype),
            tx.init(params),
        )
        for tx in OPTIMIZERS
    )

    step, rest = stepper(model, x)
    masked = jax.tree.map(jnp.multiply, params, tpp.mask_tree(plan, params))
    rest = jax.tree.map(jnp.multiply, rest, tpp.mask_tree(plan, rest))
    expected = tpp.slice_tree(plan, step(masked, rest, states))

    small, small_rest = stepper(tpp.prune(model, plan), x)
    got = small(tpp.slice_tree(plan, params), small_rest, tpp.slice_tree(plan, states))
    # Adam divides by a root of a small number: relative errors of 1e-6 grow there.
    assert_equal_leaves(got, expected, rtol=1e-3, atol=1e-5)
