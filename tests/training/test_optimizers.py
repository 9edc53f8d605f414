"""Learning rates are read from text; optimizers are the chains of optax they name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tpp_jax.training.optimizers import OPTIMIZERS, learning_rate, optimizer, sgd


def test_rates_change_at_the_given_epochs():
    rate = learning_rate("0:0.1,2:0.01,3:0.001", steps_per_epoch=10)
    found = [float(rate(t)) for t in (0, 19, 20, 29, 30, 99)]
    np.testing.assert_allclose(found, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_a_cosine_falls_from_its_rate_to_zero_at_the_end_of_the_phase():
    rate = learning_rate("0.2", steps_per_epoch=10, schedule="cosine", epochs=4)
    expected = [0.1 * (1 + np.cos(np.pi * t / 40)) for t in range(41)]
    np.testing.assert_allclose([rate(t) for t in range(41)], expected, atol=1e-7)


def test_a_warm_up_rises_to_the_cosine_that_then_takes_the_rest_of_the_phase():
    rate = learning_rate(
        "0.2", steps_per_epoch=10, schedule="cosine", epochs=10, warmup_epochs=1.5
    )
    rise = [0.2 * t / 15 for t in range(15)]
    fall = [0.1 * (1 + np.cos(np.pi * t / 85)) for t in range(86)]
    found = [rate(t) for t in range(101)]
    np.testing.assert_allclose(found, rise + fall, atol=1e-7)


def test_a_warm_up_leaves_the_later_epochs_of_a_step_schedule_in_place():
    text = "0:0.1,2:0.01"
    warm = learning_rate(text, steps_per_epoch=10, warmup_epochs=0.5)
    plain = learning_rate(text, steps_per_epoch=10)
    found = [float(warm(t)) for t in (0, 1, 4, 5, 19, 20, 99)]
    expected = [0, 0.02, 0.08, 0.1, 0.1, 0.01, 0.01]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert [warm(t) for t in range(5, 40)] == [plain(t) for t in range(5, 40)]


@pytest.mark.parametrize(
    ("text", "schedule", "epochs", "warmup_epochs"),
    [("0.1", "cosine", 3, 3), ("0.1", "step", 3, 4), ("0:0.1,2:0.01", "step", 9, 2)],
)
def test_a_warm_up_that_does_not_end_in_time_is_refused(
    text, schedule, epochs, warmup_epochs
):
    with pytest.raises(ValueError, match=f"warmup_epochs is {warmup_epochs}"):
        learning_rate(
            text, 10, schedule=schedule, epochs=epochs, warmup_epochs=warmup_epochs
        )


def test_a_phase_of_no_epochs_may_have_any_warm_up():
    for schedule in ("step", "cosine"):
        assert (
            learning_rate("0.1", 10, schedule=schedule, epochs=0, warmup_epochs=2)(0)
            == 0
        )


@pytest.mark.parametrize(
    ("text", "schedule", "message"),
    [
        ("fast", "step", "cannot read the learning rate 'fast'"),
        ("0:0.1,x", "step", "cannot read"),
        ("1:0.1", "step", "must start at epoch 0"),
        ("0:0.1,5:0.01,2:0.1", "step", "ascending"),
        ("0:-1", "step", "negative"),
        ("0:0.1,2:0.01", "cosine", "one peak"),
        ("0.1", "sine", "unknown learning-rate schedule"),
    ],
)
def test_a_rate_that_cannot_be_is_refused(text, schedule, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(text, 10, schedule=schedule, epochs=3)


def test_sgd_decays_then_gathers_momentum_then_scales():
    tx = sgd(0.1, momentum=0.9, weight_decay=0.01)
    w, v = np.array([1.0, -2.0]), np.zeros(2)
    params = jnp.asarray(w)
    state = tx.init(params)
    for g in (np.array([0.5, 1.0]), np.array([-0.3, 0.2])):
        v = 0.9 * v + (g + 0.01 * w)
        w = w - 0.1 * v
        updates, state = tx.update(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, w, rtol=1e-6)


PARAMS = {
    "kernel": jnp.asarray([[1.0, -2.0], [0.5, 3.0]]),
    "norm": {"scale": jnp.asarray([1.0, 0.9]), "bias": jnp.asarray([0.2, -0.1])},
}


def after_three_steps(tx, params=PARAMS):
    """Returns the parameters after three steps whose gradients depend on the step."""
    state = tx.init(params)
    for scale in (1.0, -0.3, 0.7):
        grads = jax.tree.map(
            lambda p, s=scale: s * jnp.sin(3 * p.astype(float)), PARAMS
        )
        grads = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def several_axes(_):
    return {"kernel": True, "norm": {"scale": False, "bias": False}}


@pytest.mark.parametrize("penalties", [[], [optax.add_decayed_weights(0.7)]])
@pytest.mark.parametrize("decay_norms", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_the_chain_of_optax_that_its_fields_describe(
    name, decay_norms, penalties
):
    mask = None if decay_norms else several_axes
    decay = functools.partial(optax.add_decayed_weights, 0.1, mask)
    chains = {
        "sgd": [*penalties, decay(), optax.trace(0.8), optax.scale(-0.01)],
        "adamw": [
            optax.scale_by_adam(b1=0.8),
            *penalties,  # not divided by their own size
            decay(),
            optax.scale(-0.01),
        ],
        "lamb": [
            optax.scale_by_adam(b1=0.8, eps=1e-6),
            *penalties,
            decay(),
            optax.scale_by_trust_ratio(),
            optax.scale(-0.01),
        ],
    }
    make = functools.partial(optimizer, name, 0.01, momentum=0.8, weight_decay=0.1)
    tx = make(decay_norms=decay_norms, penalty=penalties[0] if penalties else None)
    found = after_three_steps(tx)
    expected = after_three_steps(optax.chain(*chains[name]))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected
    )


def test_nesterov_looks_ahead_along_the_velocity():
    w, v = np.asarray(PARAMS["kernel"], np.float64), 0.0
    tx = optimizer("sgd", 0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    params = {"w": PARAMS["kernel"]}
    state = tx.init(params)
    for g in (0.5, -0.3):
        d = g + 0.01 * w
        v = 0.9 * v + d
        w = w - 0.1 * (d + 0.9 * v)
        grads = {"w": jnp.full((2, 2), g)}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], w, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_decay_of_norms_only_arrays_of_several_axes_shrink(name):
    model = nnx.Linear(2, 3, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    tx = optimizer(name, 0.1, momentum=0.9, weight_decay=0.1, decay_norms=False)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    assert not np.any(updates["bias"][...])
    kernel, change = params["kernel"][...], updates["kernel"][...]
    np.testing.assert_allclose(change / kernel, change[0, 0] / kernel[0, 0], rtol=1e-5)
    assert change[0, 0] / kernel[0, 0] < 0


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"'adam'.*'sgd' or 'adamw' or 'lamb'"):
        optimizer("adam", 0.1, momentum=0.9, weight_decay=0.0)
