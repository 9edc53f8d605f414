"""Learning rates read from text, and SGD in PyTorch's order."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tpp_jax.training.optimizers import learning_rate, sgd


def test_rates_change_at_the_given_epochs():
    rate = learning_rate("0:0.1,2:0.01,3:0.001", steps_per_epoch=10)
    found = [float(rate(t)) for t in (0, 19, 20, 29, 30, 99)]
    np.testing.assert_allclose(found, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_cosine_rises_for_a_tenth_and_falls_to_zero():
    rate = learning_rate("0.2", steps_per_epoch=10, kind="cosine", epochs=10)
    assert float(rate(0)) == 0
    assert float(rate(10)) == pytest.approx(0.2)
    assert float(rate(55)) == pytest.approx(0.1, rel=1e-3)
    assert float(rate(100)) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
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
def test_a_rate_that_cannot_be_is_refused(text, kind, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(text, 10, kind=kind, epochs=3)


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
