"""The step: one device or several, one step or many a dispatch, exact evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.models import CifarResNet
from tpp_jax.training import parallel
from tpp_jax.training.evaluation import Evaluator
from tpp_jax.training.optimizers import sgd
from tpp_jax.training.step import (
    Images,
    StepConfig,
    TrainState,
    epoch_order,
    graphdef_of,
    make_train_step,
    make_train_steps,
)

CONFIG = StepConfig(16, crop_padding=1, flip=True, mean=(0.3,), std=(0.4,))


def small_resnet():
    return CifarResNet((1, 1, 1), width=0.25, in_channels=1, rngs=nnx.Rngs(0))


def digits(n=64):
    dataset = tpp_dataset()
    return Images(dataset.train_images[:n], dataset.train_labels[:n])


def tpp_dataset():
    from tpp_jax.data import load

    return load("digits")


def tpp_optimizer(model):
    groups = tpp.channel_groups(model, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    plan = tpp.make_plan(groups, model, "*layer*.conv1:0.5")
    schedule = tpp.growing_schedule(
        granularity=0.1, every=2, stabilize=30, zero_out_every=2
    )
    return optax.chain(
        tpp.add_tpp_penalties(plan, schedule),
        sgd(1e-2, 0.9, 5e-4),
        tpp.zero_pruned(plan, schedule),
    )


def initial_state(model, tx):
    params = nnx.state(model, nnx.Param)
    stats = nnx.state(model, nnx.BatchStat)
    state = TrainState(jnp.int32(0), params, stats, tx.init(params))
    return jax.tree.map(jnp.copy, state)


def losses(model, tx, devices, steps):
    """Trains some steps; returns the loss of each and the state."""
    step = make_train_step(
        graphdef_of(model, training=True), tx, CONFIG, parallel.axis_name(devices)
    )
    run = parallel.on_devices(step, devices, donate=0)
    state = parallel.replicate(initial_state(model, tx), devices)
    key, images = parallel.replicate((jax.random.key(1), digits()), devices)
    found = []
    for i in range(steps):
        order = epoch_order(jax.random.key(2), i // 4, 64)
        state, metrics = run(state, key, parallel.replicate(order, devices), images)
        found.append(float(metrics["loss"]))
    return found, state


def test_four_devices_train_like_one():
    model = small_resnet()
    tx = tpp_optimizer(model)
    one, state_one = losses(model, tx, jax.devices()[:1], steps=30)
    four, state_four = losses(model, tx, jax.devices()[:4], steps=30)
    np.testing.assert_allclose(four, one, rtol=1e-5)
    for a, b in zip(
        jax.tree.leaves(state_one), jax.tree.leaves(state_four), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


def test_several_steps_in_one_dispatch_equal_single_steps():
    model = small_resnet()
    tx = tpp_optimizer(model)
    step = make_train_step(graphdef_of(model, training=True), tx, CONFIG)
    args = jax.random.key(1), jnp.arange(64, dtype=jnp.int32), digits()
    single = jax.jit(make_train_steps(step, loop=False))
    state, sums = initial_state(model, tx), []
    for _ in range(3):
        state, metrics = single(state, *args, np.int32(1))
        sums.append(metrics["loss"])
    looped = jax.jit(make_train_steps(step, loop=True))
    state_looped, mean = looped(initial_state(model, tx), *args, np.int32(3))
    assert int(state_looped.step) == 3
    np.testing.assert_allclose(mean["loss"], np.mean(sums), rtol=1e-5)
    for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(state_looped.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_phase_compiles_once_and_moves_nothing_between_host_and_device():
    model = small_resnet()
    tx = tpp_optimizer(model)
    step = jax.jit(
        make_train_step(graphdef_of(model, training=True), tx, CONFIG), donate_argnums=0
    )
    state = initial_state(model, tx)
    args = jax.device_put((jax.random.key(1), np.arange(64, dtype=np.int32), digits()))
    state, _ = step(state, *args)
    with jax.transfer_guard("disallow"):
        for _ in range(5):
            state, _ = step(state, *args)
    assert step._cache_size() == 1


def test_an_epoch_visits_every_image_once_and_each_epoch_otherwise():
    orders = [np.asarray(epoch_order(jax.random.key(0), e, 100)) for e in (0, 0, 1)]
    np.testing.assert_array_equal(np.sort(orders[0]), np.arange(100))
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()


@pytest.mark.parametrize("n_devices", [1, 4])
def test_evaluation_counts_the_last_partial_batch_exactly(n_devices):
    dataset = tpp_dataset()
    images = np.tile(dataset.test_images, (2, 1, 1, 1))[:519]
    labels = np.tile(dataset.test_labels, 2)[:519]
    dataset = dataset._replace(test_images=images, test_labels=labels)
    model = small_resnet()
    evaluate = Evaluator(model, dataset, jax.devices()[:n_devices])
    found = evaluate(nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat))
    model.eval()
    x = (images / 255 - np.array(dataset.mean)) / np.array(dataset.std)
    logits = np.asarray(model(jnp.asarray(x, jnp.float32)))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert found["accuracy"] == pytest.approx(
        100 * (logits.argmax(-1) == labels).mean()
    )
    assert found["loss"] == pytest.approx(
        -log_p[np.arange(519), labels].mean(), rel=1e-5
    )


def test_a_batch_that_does_not_split_names_the_nearest_sizes():
    with pytest.raises(ValueError, match="62 does not split over 4 devices.* 60 or 64"):
        parallel.check_batch_size(62, jax.devices()[:4])
