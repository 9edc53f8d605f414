"""The original's other variants: followed, in float64, by chains of our transforms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.method.test_recorded_variants import (
    assert_close_leaves,
    differentiated,
    eval_images,
    evaluate,
    follow,
)
from tests.reference import GOLDEN, filled, from_torch, section, with_leaves
from tpp_jax.graph.naming import map_named, named_leaves
from tpp_jax.method.gram import gram_penalty_and_grad, kept_penalty_and_grad
from tpp_jax.models import CifarResNet
from tpp_jax.pruning.criteria import l1


def always(_):
    """A strength that does not grow, for penalties that the original does not scale."""
    return jnp.ones((), jnp.float64)


def kept_towards_identity(plan, _):
    """Version 3: WWᵀ towards I, but 0 for the pruned filters, at full weight always."""
    fields = {"gram_weight": 1000.0, "bn": False, "l2": False, "target": "orthogonal"}
    return [tpp.add_tpp_penalties(plan, always, **fields)]


def columns_as_at_the_start(plan, start):
    """Version 4: that, and WᵀW towards what it was. Of no use beyond this recording, it
    shows that a penalty of one's own is a transform beside ours."""
    kernels = {f"{group.name}.kernel" for group in plan.pruned_groups}

    def as_columns(kernel):  # in PyTorch's order of the inputs, as the loss is a mean
        return kernel.reshape(-1, kernel.shape[-1])

    def penalty(kernel, first):
        w, w0 = as_columns(kernel), as_columns(first)
        return 1000 * jnp.mean(jnp.square(w @ w.T - w0 @ w0.T))

    def update(updates, state, params):
        def add(name, update, parameter, first):
            if name not in kernels:
                return update
            return update + jax.grad(penalty)(parameter, first)

        return map_named(add, updates, params, start), state

    init = optax.init_empty_state
    own = optax.GradientTransformation(init, update)
    return [*kept_towards_identity(plan, start), own]


def all_kernels_orthogonal(*_):
    """Version 2; where filters are fewer than input channels, WᵀW instead of WWᵀ."""
    add = functools.partial(tpp.add_orthogonality, 10.0, norm="mean_square")
    return [add(side="filters", skip="linear"), add(side="inputs", layers="linear")]


def all_filters_orthogonal(*_):
    """Version 2 without that exception."""
    return [tpp.add_orthogonality(10.0, norm="mean_square", side="filters")]


def random_as_the_original(filters):
    order = np.random.RandomState(42).permutation(len(filters))
    return np.argsort(order)


NO_GRAM = {"gram_weight": 0.0}
# Variant → criterion, schedule, fields of add_tpp_penalties, further transforms.
VARIANTS = {
    "base": ("l1", {}, {}, None),
    "no_l2_no_bn": ("l1", {}, {"l2": False, "bn": False}, None),
    "poly3": ("l1", {"kind": "poly3", "regularize_steps": 40}, {}, None),
    "max": (lambda filters: -l1(filters), {}, {}, None),
    "random": (random_as_the_original, {}, {}, None),
    "v3": ("l1", {}, NO_GRAM, kept_towards_identity),
    "v4": ("l1", {}, NO_GRAM, columns_as_at_the_start),
    "kernorth": ("l1", {}, NO_GRAM, all_kernels_orthogonal),
    "kernorth_filters": ("l1", {}, NO_GRAM, all_filters_orthogonal),
}


@pytest.fixture(scope="module")
def start():
    """(batches, recordings, model, groups, function that differentiates)."""
    batches, golden = (
        np.load(GOLDEN / f"{name}.npz") for name in ("ablations", "variants")
    )
    with jax.enable_x64(True):
        model = with_leaves(
            filled(lambda: CifarResNet((1, 1, 1), rngs=nnx.Rngs(0))),
            section(batches, "start"),
            jnp.float64,
        )
        groups = tpp.channel_groups(model, jnp.ones((1, 16, 16, 3)))
        yield batches, golden, model, groups, differentiated(model, batches)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_follows_the_recording(start, name):
    batches, golden, model, groups, differentiate = start
    criterion, growth, fields, further = VARIANTS[name]
    plan = tpp.make_plan(groups, model, "*layer*.conv1:0.5", criterion=criterion)
    settings = {"granularity": 0.05, "every": 2, "stabilize": 20, "zero_out_every": 2}
    schedule = tpp.growing_schedule(**settings, **growth)
    with jax.enable_x64(True):
        params = nnx.state(model, nnx.Param)
        tx = optax.chain(
            tpp.add_tpp_penalties(plan, schedule, **fields),
            *(further(plan, params) if further else ()),
            optax.add_decayed_weights(5e-4),
            optax.sgd(0.001, momentum=0.9),
            tpp.zero_pruned(plan, schedule),
        )
        ours = follow(nnx.clone(model), plan, tx, schedule.total_steps, differentiate)
        graphdef, state = nnx.split(ours["model"])
        logits = evaluate(graphdef, plan, state, eval_images(batches))
    names = ("loss_ce", "strength") if further else ("loss_ce", "strength", "loss_gram")
    for key in names:
        np.testing.assert_allclose(
            ours[key], golden[f"{name}/{key}"], rtol=1e-6, atol=1e-9, err_msg=key
        )
    theirs = section(golden, f"{name}/before_slicing")
    assert len(theirs) == 6
    assert_close_leaves(ours["before_slicing"], theirs)
    np.testing.assert_allclose(logits, golden[f"{name}/sliced_logits"], atol=1e-6)


@pytest.mark.parametrize("layer", ["conv3x3", "conv1x1", "linear"])
def test_the_strength_map_is_tpp_s_penalty_and_one_among_the_kept(layer):
    """Version 6: weights 0.1 among the kept filters and 370 in the rows and columns of
    the pruned ones, as at a strength of 0.37."""
    golden = np.load(GOLDEN / "variants.npz")
    kernel, grad = (
        from_torch({"x.weight": golden[f"v6/{layer}/{key}"]})["x.kernel"]
        for key in ("w", "grad")
    )
    pruned = np.isin(np.arange(kernel.shape[-1]), golden[f"v6/{layer}/pruned"])
    with jax.enable_x64(True):
        arguments = jnp.asarray(kernel, jnp.float64), jnp.asarray(pruned)
        parts = gram_penalty_and_grad(*arguments), kept_penalty_and_grad(*arguments)
        loss, ours = (
            370 * of_all + 0.1 * kept for of_all, kept in zip(*parts, strict=True)
        )
    np.testing.assert_allclose(loss, golden[f"v6/{layer}/loss"], rtol=1e-6)
    np.testing.assert_allclose(ours, grad, rtol=1e-5, atol=1e-6)


def test_the_kept_filters_penalty_does_not_wait_for_the_strength_to_grow(start):
    _, _, model, groups, _ = start
    plan = tpp.make_plan(groups, model, "layer1.0.conv1:0.5")
    params = nnx.state(model, nnx.Param)
    schedule = tpp.growing_schedule(granularity=0.05)
    still = jax.tree.map(jnp.zeros_like, params)
    with jax.enable_x64(True):
        tx = tpp.add_tpp_penalties(plan, schedule, kept_weight=0.1)
        added = named_leaves(tx.update(still, tx.init(params), params)[0])
        kernel = named_leaves(params)["layer1.0.conv1.kernel"]
        pruned = np.isin(np.arange(16), plan.pruned("layer1.0.conv1"))
        expected = 0.1 * kept_penalty_and_grad(kernel, jnp.asarray(pruned))[1]
    np.testing.assert_allclose(added["layer1.0.conv1.kernel"], expected, rtol=1e-12)
    assert not np.any(added["layer1.0.conv1.kernel"][..., pruned])
    assert not any(np.any(x) for n, x in added.items() if "layer1.0.conv1" not in n)
