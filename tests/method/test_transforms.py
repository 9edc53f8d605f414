"""The penalties and the zero-out as optax transforms, term by term."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.reference import filled
from tpp_jax.graph.naming import named_leaves
from tpp_jax.models.layers import BatchNorm, conv, dense


class Small(nnx.Module):
    """A convolution with bias and norm, and two dense layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = conv(2, 6, 3, padding=1, bias=True, rngs=rngs)
        self.bn = BatchNorm(6, rngs=rngs)
        self.hidden = dense(6, 4, rngs=rngs)
        self.out = dense(4, 3, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.bn(self.conv(x))).mean((1, 2))
        return self.out(jax.nn.relu(self.hidden(x)))


IMAGES = np.random.default_rng(0).normal(size=(4, 4, 4, 2)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0])
# Strength 0, 0.5, 1 from step 0, 2, 4 on; layer i is zeroed out from step 4 + 3(i + 1).
SCHEDULE = tpp.growing_schedule(granularity=0.5, every=2, stabilize=7, zero_out_every=3)
STEP_OF_STRENGTH_HALF = jnp.int32(3)


@functools.cache
def small():
    """(the model, its parameters, a plan that prunes conv and hidden)."""
    model = filled(lambda: Small(nnx.Rngs(0)))
    groups = tpp.channel_groups(model, IMAGES)
    plan = tpp.make_plan(groups, model, "conv:0.5,hidden:0.25")
    return model, nnx.state(model, nnx.Param), plan


def penalty_gradients(schedule=SCHEDULE, step=STEP_OF_STRENGTH_HALF, **options):
    """What the transform adds at one step, by leaf name, and its new state."""
    _, params, plan = small()
    tx = tpp.add_tpp_penalties(plan, schedule, **options)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params)._replace(step=step)
    added, state = jax.jit(tx.update)(zeros, state, params)
    return named_leaves(added), state


def expected_gradients(strength, gram_weight=1000.0, bn=True, l2=True):
    """The method's formulas, written out leaf by leaf."""
    _, params, plan = small()
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    out = {name: np.zeros_like(leaf) for name, leaf in leaves.items()}
    for layer in ("conv", "hidden"):
        kernel = leaves[f"{layer}.kernel"]
        pruned = np.isin(np.arange(kernel.shape[-1]), plan.pruned(layer))
        gram = tpp.gram_penalty_grad(kernel, pruned)
        out[f"{layer}.kernel"] += gram_weight * strength * np.asarray(gram)
        shrunk = [f"{layer}.kernel", f"{layer}.bias"] * l2
        shrunk += ["bn.scale", "bn.bias"] * (bn and layer == "conv")
        for name in shrunk:
            out[name] += strength * pruned * leaves[name]
    return out


@pytest.mark.parametrize(
    "options",
    [{}, {"gram_weight": 0.0}, {"gram_weight": 10.0}, {"bn": False}, {"l2": False}],
    ids=str,
)
def test_gradients_are_those_of_the_formulas_and_each_switch_takes_out_its_term(
    options,
):
    added, _ = penalty_gradients(**options)
    expected = expected_gradients(0.5, **options)
    assert added.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(
            added[name], gradient, rtol=1e-5, atol=1e-5, err_msg=name
        )


def test_only_the_pruned_layers_their_biases_and_norms_are_touched():
    added, _ = penalty_gradients()
    touched = {name for name, gradient in added.items() if np.any(gradient)}
    assert touched == {
        *("conv.kernel", "conv.bias", "bn.scale", "bn.bias"),
        *("hidden.kernel", "hidden.bias"),
    }
    kept = small()[2].kept["conv"]
    for name in ("conv.bias", "bn.scale", "bn.bias"):
        assert not np.any(added[name][kept])


def test_nothing_is_added_while_the_strength_is_zero():
    added, state = penalty_gradients(step=jnp.int32(1))
    assert not any(np.any(gradient) for gradient in added.values())
    assert state.strength == 0
    assert state.gram > 0  # still reported


@pytest.mark.parametrize("step", [2, 3])
def test_a_gram_penalty_of_every_second_step_is_twice_as_large(step: int):
    due = step % 2 == 0
    added, state = penalty_gradients(step=jnp.int32(step), gram_every=2)
    expected = expected_gradients(0.5, gram_weight=2000.0 if due else 0.0)
    for name, gradient in expected.items():
        np.testing.assert_allclose(
            added[name], gradient, rtol=1e-5, atol=1e-5, err_msg=name
        )
    # The energy is that of the last such step, of which there was none before this.
    assert state.gram == (penalty_gradients()[1].gram if due else 0)


@pytest.mark.parametrize("number", [0, 1.5, "2"])
def test_a_number_of_steps_that_is_none_is_an_error(number):
    with pytest.raises(tpp.TPPError, match=r"gram_every is .* an integer above 0"):
        penalty_gradients(gram_every=number)


def test_the_penalties_are_added_to_the_gradients_of_the_loss():
    _, params, plan = small()
    tx = tpp.add_tpp_penalties(plan, SCHEDULE)
    state = tx.init(params)._replace(step=STEP_OF_STRENGTH_HALF)
    ones = jax.tree.map(jnp.ones_like, params)
    out, _ = jax.jit(tx.update)(ones, state, params)
    for name, gradient in penalty_gradients()[0].items():
        np.testing.assert_allclose(named_leaves(out)[name], gradient + 1, rtol=1e-5)


def test_the_state_tells_step_strength_and_penalty():
    _, params, plan = small()
    tx = tpp.add_tpp_penalties(plan, SCHEDULE)
    state = tx.init(params)
    assert state._fields == ("step", "strength", "gram")
    assert jax.tree.map(float, tuple(state)) == (0, 0, 0)
    _, state = penalty_gradients()
    assert (int(state.step), float(state.strength)) == (4, 0.5)
    expected = sum(
        tpp.gram_penalty(
            named_leaves(params)[f"{layer}.kernel"],
            np.isin(np.arange(n), plan.pruned(layer)),
        )
        for layer, n in (("conv", 6), ("hidden", 4))
    )
    np.testing.assert_allclose(state.gram, expected, rtol=1e-5)


def optimizer(plan, schedule, learning_rate=0.1, zero_out=tpp.zero_pruned, **options):
    return optax.chain(
        tpp.add_tpp_penalties(plan, schedule, **options),
        optax.add_decayed_weights(5e-4),
        optax.sgd(learning_rate, momentum=0.9),
        zero_out(plan, schedule),
    )


def test_the_states_can_be_found_and_set_inside_a_chain():
    _, params, plan = small()
    state = optimizer(plan, SCHEDULE).init(params)
    assert float(optax.tree_utils.tree_get(state, "strength")) == 0
    assert float(optax.tree_utils.tree_get(state, "gram")) == 0
    assert len(optax.tree_utils.tree_get_all_with_path(state, "step")) == 2
    state = optax.tree_utils.tree_set(state, step=jnp.int32(7))
    assert int(state[0].step) == int(state[-1].step) == 7


@pytest.mark.parametrize("make", [tpp.add_tpp_penalties, tpp.zero_pruned])
def test_parameters_must_be_given(make):
    _, params, plan = small()
    tx = make(plan, SCHEDULE)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))


def zeroed_leaves(step):
    """Names of the leaves of which an update at this step leaves some entries zero."""
    _, params, plan = small()
    tx = tpp.zero_pruned(plan, SCHEDULE)
    updates = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(tx.update)(
        updates, tx.init(params)._replace(step=jnp.int32(step)), params
    )
    assert state == (step + 1, step, False)
    after = named_leaves(optax.apply_updates(params, updates))
    mask = named_leaves(tpp.mask_tree(plan, params))
    zeroed = set()
    for name, leaf in named_leaves(params).items():
        if np.all(after[name] == leaf + 1):
            continue
        zeroed.add(name)
        np.testing.assert_array_equal(
            after[name], np.where(_produced_mask(mask[name]), leaf + 1, 0)
        )
    return zeroed


def _produced_mask(mask):
    """A mask without what the pruned inputs of a kernel cut out."""
    mask = np.asarray(mask)
    return mask.reshape(-1, mask.shape[-1]).any(axis=0) if mask.ndim > 1 else mask > 0


def test_layers_are_zeroed_out_one_after_the_other():
    conv_leaves = {"conv.kernel", "conv.bias", "bn.scale", "bn.bias"}
    hidden_leaves = {"hidden.kernel", "hidden.bias"}
    expected = {6: set(), 7: conv_leaves, 9: conv_leaves}
    expected |= {step: conv_leaves | hidden_leaves for step in (10, 11, 100)}
    assert {step: zeroed_leaves(step) for step in expected} == expected


def test_the_zero_out_leaves_the_momentum_alone():
    _, params, plan = small()
    tx = optimizer(plan, SCHEDULE)
    state = optax.tree_utils.tree_set(tx.init(params), step=jnp.int32(11))
    ones = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(tx.update)(ones, state, params)
    pruned = plan.pruned("conv")
    after = named_leaves(optax.apply_updates(params, updates))
    assert not np.any(after["conv.kernel"][..., pruned])
    [(_, trace)] = optax.tree_utils.tree_get_all_with_path(state, "trace")
    assert np.all(named_leaves(trace)["conv.bias"][pruned] != 0)


def test_a_stabilize_phase_that_ends_before_the_last_layer_s_turn_is_refused():
    _, _, plan = small()
    for stabilize in (5, 0):
        short = tpp.growing_schedule(stabilize=stabilize, zero_out_every=3)
        with pytest.raises(ValueError, match=r"before layer 1 .* at least 6 steps"):
            tpp.zero_pruned(plan, short)
    tpp.zero_pruned(plan, tpp.growing_schedule(stabilize=6, zero_out_every=3))


def test_a_plan_that_prunes_nothing_changes_nothing():
    model, params, plan = small()
    plan = tpp.make_plan(plan.groups, model, {})
    schedule = tpp.growing_schedule(granularity=1.0, every=1, stabilize=0)
    ones = jax.tree.map(jnp.ones_like, params)
    for tx in (
        tpp.add_tpp_penalties(plan, schedule),
        tpp.zero_pruned(plan, schedule),
    ):
        state = tx.init(params)._replace(step=jnp.int32(5))
        out, state = tx.update(ones, state, params)
        chex.assert_trees_all_equal(out, ones)
    assert state.step == 6


def test_a_whole_run_is_one_compiled_program():
    model, params, plan = small()
    tx = optimizer(plan, SCHEDULE, learning_rate=0.01)
    graphdef, _, stats = nnx.split(model, nnx.Param, ...)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        def loss(params):
            logits = nnx.merge(graphdef, params, stats, copy=True)(IMAGES)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, LABELS
            ).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(SCHEDULE.total_steps):
        params, state = step(params, state)
    assert int(state[0].step) == SCHEDULE.total_steps
    for layer in ("conv", "hidden"):
        kernel = named_leaves(params)[f"{layer}.kernel"]
        assert not np.any(kernel[..., plan.pruned(layer)])
        assert np.all(np.any(kernel[..., plan.kept[layer]], axis=-2))


def test_one_program_serves_plans_of_equal_counts():
    model, params, plan = small()
    ones = jax.tree.map(jnp.ones_like, params)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def penalties(plan, step):
        tx = tpp.add_tpp_penalties(plan, SCHEDULE)
        return tx.update(ones, tx.init(params)._replace(step=step), params)

    for criterion in ("l1", "random"):
        plan = tpp.make_plan(
            plan.groups, model, "conv:0.5,hidden:0.25", criterion=criterion, seed=1
        )
        got = penalties(plan, STEP_OF_STRENGTH_HALF)
        tx = tpp.add_tpp_penalties(plan, SCHEDULE)
        state = tx.init(params)._replace(step=STEP_OF_STRENGTH_HALF)
        chex.assert_trees_all_close(got, tx.update(ones, state, params), rtol=1e-4)


def test_each_group_may_have_its_own_strength():
    plain, _ = penalty_gradients()
    found, state = penalty_gradients(strengths={"*": 3.0, "hidden": 0.5})
    for name, gradient in found.items():
        factor = 0.5 if name.startswith("hidden") else 3.0  # the norm follows conv
        np.testing.assert_allclose(gradient, factor * plain[name], rtol=1e-5, atol=1e-7)
    assert float(state.strength) == 0.5  # that of the schedule
    same, _ = penalty_gradients(strengths="conv:1")
    chex.assert_trees_all_equal(same, plain)


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ({"conv9": 2.0}, "'conv9' matches no layer"),
        ({"conv": -1.0}, "must be a number of at least 0"),
        ("conv", "cannot read the strength 'conv'"),
        (2.0, "strengths"),
    ],
)
def test_a_strength_that_cannot_be_is_named(strengths, message):
    _, _, plan = small()
    with pytest.raises(tpp.TPPError, match=message):
        tpp.add_tpp_penalties(plan, SCHEDULE, strengths=strengths)
