"""Distillation: the loss, and the step that learns from a teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.training.test_step import assert_alike, digits_task, small_mlp
from tests.training.test_task import Regression
from tpp_jax.errors import TPPError
from tpp_jax.models import CifarResNet
from tpp_jax.training import parallel
from tpp_jax.training.distillation import (
    Teacher,
    distillation_loss,
    distilled,
    distilled_from_outputs,
)
from tpp_jax.training.evaluation import teacher_outputs
from tpp_jax.training.feeds import TaughtResident
from tpp_jax.training.state import arrays_of, initial_state, teacher_arrays
from tpp_jax.training.step import StepConfig, make_train_step
from tpp_jax.training.structure import structure_of
from tpp_jax.training.watching import watch

TEMPERATURE = 3.0


def teacher_of(model, weight):
    return Teacher(structure_of(model, training=False), weight, TEMPERATURE)


def two_steps(pupil, dense, weight, n_devices=1, **fields):
    """Returns the state after two steps, and the metrics of the second."""
    config, devices = StepConfig(**fields), jax.devices()[:n_devices]
    task = digits_task(dtype=config.dtype)
    feed, tx = task.feed(devices, config.accumulate), optax.sgd(0.1)
    step = make_train_step(
        structure_of(pupil, training=True),
        tx,
        task.loss,
        config,
        feed.train_batch,
        parallel.axis_name(devices),
        None if weight is None else teacher_of(dense, weight),
    )
    run = parallel.on_devices(step, devices, donate=0)
    teacher = None if weight is None else dense
    state = initial_state(pupil, tx, False, 0, None, teacher)
    state, key = parallel.replicate((state, jax.random.key(1)), devices)
    feed.begin(jax.random.key(2), 0)
    metrics = {}
    for i in range(2):
        state, metrics = run(state, key, *feed.train_data(i))
    return jax.device_get(state), {name: float(x) for name, x in metrics.items()}


@pytest.fixture(scope="module")
def mlps():
    """A network that learns, and its teacher."""
    return small_mlp(), nnx.merge(
        *jax.tree.map(lambda leaf: 1.5 * leaf, nnx.split(small_mlp()))
    )


@pytest.fixture(scope="module")
def alone(mlps):
    return two_steps(*mlps, weight=0.3)


def test_the_loss_is_the_divergence_of_the_softened_outputs():
    ours, theirs = np.random.default_rng(0).normal(size=(2, 4, 5, 7))
    soft = [
        np.exp(x / 3) / np.exp(x / 3).sum(-1, keepdims=True) for x in (ours, theirs)
    ]
    expected = 9 * (soft[1] * np.log(soft[1] / soft[0])).sum(-1).mean()
    found = distillation_loss(jnp.asarray(ours), jnp.asarray(theirs), 3.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(jnp.asarray(ours), jnp.asarray(ours))) == 0


def test_its_gradient_at_a_high_temperature_is_that_of_the_squared_distance():
    # Hinton et al. 2015, equation 4, for logits of mean zero.
    rng = np.random.default_rng(1)
    ours, theirs = (x - x.mean(-1, keepdims=True) for x in rng.normal(size=(2, 3, 5)))
    gradient = jax.grad(distillation_loss)(
        jnp.asarray(ours), jnp.asarray(theirs), 300.0
    )
    np.testing.assert_allclose(gradient, (ours - theirs) / (5 * 3), atol=1e-3)


def test_the_weight_divides_the_loss_between_labels_and_teacher(mlps):
    pupil, dense = mlps
    task = digits_task()
    batch, key = next(task.samples(0)), jax.random.key(0)
    plain, _ = task.loss(pupil, batch, key)
    logits = [model(*task.inputs(batch)) for model in (pupil, dense)]
    own = distillation_loss(*logits, TEMPERATURE)
    for weight in (0.0, 0.25, 1.0):
        fn = distilled(task.loss, dense, weight, TEMPERATURE)
        value, metrics = fn(pupil, batch, key)
        expected = (1 - weight) * plain + weight * own
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert metrics.keys() == {"accuracy", "distillation"}


@pytest.mark.parametrize("n_devices", [1, 2])
def test_outputs_computed_in_advance_give_the_same_steps(mlps, n_devices):
    pupil, dense = mlps
    devices, config = jax.devices()[:n_devices], StepConfig()
    task = dataclasses.replace(digits_task(), crop_padding=0, flip=False)
    feed = task.feed(devices)
    outputs = teacher_outputs(task, feed, dense, config)
    taught = TaughtResident(feed, outputs)
    states = []
    for source, loss, teacher in (
        (feed, task.loss, dense),
        (taught, distilled_from_outputs(task.loss, 0.3, TEMPERATURE), None),
    ):
        step = make_train_step(
            structure_of(pupil, training=True),
            optax.sgd(0.1),
            loss,
            config,
            source.train_batch,
            parallel.axis_name(devices),
            None if teacher is None else teacher_of(teacher, 0.3),
        )
        run = parallel.on_devices(step, devices, donate=0)
        state = initial_state(pupil, optax.sgd(0.1), False, 0, None, teacher)
        state, key = parallel.replicate((state, jax.random.key(1)), devices)
        source.begin(jax.random.key(2), 0)
        for i in range(2):
            state, metrics = run(state, key, *source.train_data(i))
        states.append((jax.device_get(state.params), jax.device_get(metrics)))
    assert_alike(*states, rtol=1e-5, atol=1e-6)


def test_outputs_are_fixed_only_for_images_that_no_step_changes():
    plain = dataclasses.replace(digits_task(), crop_padding=0, flip=False)
    assert plain.fixed_inputs
    for change in ({"crop_padding": 1}, {"flip": True}, {"mixup": 0.2}, {"cutmix": 1}):
        assert not dataclasses.replace(plain, **change).fixed_inputs


def test_no_weight_trains_as_without_a_teacher(mlps):
    without, plain = two_steps(*mlps, weight=None)
    state, metrics = two_steps(*mlps, weight=0.0)
    assert_alike(state.params, without.params, rtol=1e-6, atol=1e-7)
    assert metrics["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert metrics["distillation"] > 0


def test_a_step_leaves_the_teacher_alone_and_out_of_the_arrays(mlps, alone):
    _, dense = mlps
    state, _ = alone
    named = teacher_arrays(dense)
    own = {f"teacher.{n}" for n in arrays_of(state) if n.startswith("model.")}
    assert {n.replace("teacher.", "teacher.model.") for n in named} == own
    for array, leaf in zip(named.values(), jax.tree.leaves(state.teacher), strict=True):
        np.testing.assert_array_equal(array, leaf)
    assert not any(name.startswith("teacher") for name in arrays_of(state))


def test_two_devices_distil_like_one(mlps, alone):
    state, metrics = two_steps(*mlps, weight=0.3, n_devices=2)
    assert_alike(state.params, alone[0].params, rtol=1e-5, atol=1e-6)
    assert metrics == pytest.approx(alone[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "rtol"),
    [({"remat": True}, 1e-5), ({"accumulate": 2}, 1e-5), ({"dtype": "bfloat16"}, 0.1)],
    ids=str,
)
def test_the_arithmetic_of_a_step_applies_to_the_teacher_too(mlps, alone, fields, rtol):
    _, metrics = two_steps(*mlps, 0.3, **fields)
    assert metrics == pytest.approx(alone[1], rel=rtol, abs=1e-6)


def test_a_teacher_gets_the_inputs_of_its_pupil_also_if_they_are_mixed(mlps):
    pupil, _ = mlps
    task = digits_task(mixup=1.0)
    fn = distilled(task.loss, pupil, 0.5, TEMPERATURE)
    value, metrics = fn(pupil, next(task.samples(0)), jax.random.key(0))
    assert float(metrics["distillation"]) == 0 and float(value) > 0


def test_a_teacher_is_evaluated_and_a_wider_one_teaches_a_narrower():
    narrow, wide = (
        CifarResNet((1, 1, 1), width=width, in_channels=1, rngs=nnx.Rngs(0))
        for width in (0.25, 0.5)
    )
    state, metrics = two_steps(narrow, wide, weight=1.0)
    before = nnx.state(wide, nnx.BatchStat)
    assert_alike(state.teacher[1], before, rtol=0, atol=0)
    assert metrics["loss"] == pytest.approx(metrics["distillation"], rel=1e-6)
    assert metrics["distillation"] > 0


def test_a_task_without_logits_cannot_be_distilled():
    task = Regression()
    model, batch = task.model(nnx.Rngs(0)), next(task.samples(0))
    fn = distilled(task.loss, model, 0.5, 1.0)
    with pytest.raises(TPPError, match=r"shapes \(\d+,\).*needs the same logits"):
        fn(model, batch, jax.random.key(0))
    never = distilled(lambda model, batch, key: (jnp.zeros(()), {}), model, 0.5, 1.0)
    with pytest.raises(TPPError, match="never calls the model"):
        never(model, batch, jax.random.key(0))


def test_activations_are_distilled_relative_to_those_of_the_teacher(mlps):
    task = digits_task()
    batch = next(task.samples(0))
    images = task.inputs(batch)[0].reshape(16, -1)
    ours, theirs = (model.net[0](images) for model in mlps)
    expected = jnp.sum((ours - theirs) ** 2) / jnp.sum(theirs**2)
    plain, _ = task.loss(mlps[0], batch, None)
    (pupil, state), (dense, arrays) = map(nnx.split, mlps)

    @jax.jit
    def taught(state, arrays):
        fn = distilled(task.loss, nnx.merge(dense, arrays), 0.0, 1.0, "net.0", 2.0)
        return fn(nnx.merge(pupil, state), batch, None)

    loss, metrics = taught(state, arrays)
    assert metrics.keys() == {"accuracy", "activations"}
    np.testing.assert_allclose(metrics["activations"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, plain + 2 * expected, rtol=1e-5)


def test_only_activations_of_equal_widths_are_distilled(mlps):
    task = digits_task()
    batch = next(task.samples(0))

    def taught(patterns):
        return distilled(task.loss, nnx.clone(mlps[1]), 0.5, 1.0, patterns)

    narrow = tpp.models.MLP(7, image_shape=(8, 8, 1), hidden=20, rngs=nnx.Rngs(0))
    for patterns, message in (
        ("net.0", r"net.0 have the shapes \(16, 20\) and \(16, 100\)"),
        ("conv*", r"'conv\*' of activations chooses no layer of this MLP"),
    ):
        with pytest.raises(TPPError, match=message):
            taught(patterns)(narrow, batch, None)


@pytest.mark.parametrize(("patterns", "rolled_from"), [("", 2), ("layer1.0", None)])
def test_blocks_stay_rolled_unless_activations_inside_are_kept(patterns, rolled_from):
    model = CifarResNet((2, 1, 1), in_channels=1, rngs=nnx.Rngs(0))
    model.layer1.rolled_from = 2
    assert list(watch(model, patterns)) == [name for name in [patterns] if name]
    assert model.layer1.rolled_from == rolled_from
