"""The step on one or several devices, in one or many per dispatch; evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.models import CifarResNet, MobileNetV2
from tpp_jax.training import parallel
from tpp_jax.training.classification import ImageClassification, Images
from tpp_jax.training.evaluation import Evaluator
from tpp_jax.training.feeds import epoch_order
from tpp_jax.training.optimizers import sgd
from tpp_jax.training.step import (
    StepConfig,
    TrainState,
    is_expensive,
    make_train_step,
    make_train_steps,
)
from tpp_jax.training.structure import structure_of

CONFIG = StepConfig()


def small_resnet():
    return CifarResNet((1, 1, 1), width=0.25, in_channels=1, rngs=nnx.Rngs(0))


def small_mlp():
    """A network without batch norm that compiles quickly."""
    return tpp.models.create(
        "mlp7_relu", num_classes=10, image_shape=(8, 8, 1), rngs=nnx.Rngs(0)
    )


def digits(n=64):
    dataset = tpp.data.load("digits")
    return dataset._replace(
        train_images=dataset.train_images[:n],
        train_labels=dataset.train_labels[:n],
        mean=(0.3,),
        std=(0.4,),
    )


def digits_task(dataset=None, **recipe):
    dataset = dataset or digits()
    return ImageClassification(
        dataset, batch_size=16, crop_padding=1, flip=True, **recipe
    )


def tpp_optimizer(model, rate=1e-2):
    groups = tpp.channel_groups(model, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    plan = tpp.make_plan(groups, model, "*layer*.conv1:0.5")
    schedule = tpp.growing_schedule(
        granularity=0.1, every=2, stabilize=30, zero_out_every=2
    )
    return optax.chain(
        tpp.add_tpp_penalties(plan, schedule),
        sgd(rate, 0.9, 5e-4),
        tpp.zero_pruned(plan, schedule),
    )


def initial_state(model, tx, average=False):
    params = nnx.state(model, nnx.Param)
    stats = nnx.state(model, nnx.BatchStat)
    averages = (params, stats) if average else None
    state = TrainState(jnp.int32(0), params, stats, tx.init(params), averages)
    return jax.tree.map(jnp.copy, state)


def trained(model, tx, devices, steps, config=CONFIG, api="pmap", **recipe):
    """Trains some steps; returns the loss of each and the last state."""
    losses, states = followed(model, tx, devices, steps, config, api, **recipe)
    return losses, states[-1]


def followed(model, tx, devices, steps, config=CONFIG, api="pmap", **recipe):
    """Trains some steps; returns the loss and the state after each."""
    task = digits_task(dtype=config.dtype, **recipe)
    feed = task.feed(devices, config.accumulate)
    axis = parallel.axis_name(devices)
    graphdef = structure_of(model, training=True)
    step = make_train_step(graphdef, tx, task.loss, config, feed.train_batch, axis)
    run = parallel.on_devices(step, devices, donate=0, api=api)
    state = initial_state(model, tx, average=config.ema > 0)
    state = parallel.replicate(state, devices)
    key = parallel.replicate(jax.random.key(1), devices)
    feed.begin(jax.random.key(2), 0)
    losses, states = [], []
    for i in range(steps):
        state, metrics = run(state, key, *feed.train_data(i))
        losses.append(float(metrics["loss"]))
        states.append(jax.device_get(state))
    return losses, states


def assert_alike(tree, other, rtol, atol):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@functools.cache
def fifty_steps(n_devices, api):
    model = small_resnet()
    devices = jax.devices()[:n_devices]
    return trained(model, tpp_optimizer(model, 1e-3), devices, 50, api=api)


@pytest.mark.parametrize("api", ["pmap", "shard_map"])
@pytest.mark.parametrize("n_devices", [2, 4, 8])
def test_several_devices_train_like_one(n_devices, api):
    one, state_one = fifty_steps(1, "pmap")
    several, state = fifty_steps(n_devices, api)
    np.testing.assert_allclose(several, one, rtol=1e-5)
    assert_alike(state_one, state, rtol=1e-3, atol=2e-5)


def test_pmap_and_shard_map_give_the_same_bits():
    for a, b in zip(
        jax.tree.leaves(fifty_steps(4, "pmap")),
        jax.tree.leaves(fifty_steps(4, "shard_map")),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_batch_norm_may_leave_each_device_to_itself():
    model = small_resnet()
    tx = sgd(0.1, 0.0, 0.0)
    apart = CONFIG._replace(sync_bn=False)
    losses, state = trained(model, tx, jax.devices()[:4], 1, apart)
    # As on one device that accumulates the same four shares.
    expected, one = trained(
        model, tx, jax.devices()[:1], 1, CONFIG._replace(accumulate=4)
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert_alike(one.params, state.params, rtol=1e-4, atol=1e-6)
    together, _ = trained(model, tx, jax.devices()[:4], 1)
    assert abs(together[0] - losses[0]) > 1e-4
    # The statistics kept for evaluation are the mean over devices.
    whole = trained(model, tx, jax.devices()[:1], 1)[1].stats
    means, of_all = state.stats["bn1"]["mean"], whole["bn1"]["mean"]
    np.testing.assert_allclose(means, of_all, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_not_finite_can_be_left_out():
    model, tx, devices = small_mlp(), optax.sgd(0.1, momentum=0.9), jax.devices()[:4]
    graphdef = structure_of(model, training=True)
    # A standard deviation of zero makes every black pixel 0/0.
    task = digits_task(digits()._replace(mean=(0.0,), std=(0.0,)))
    feed = task.feed(devices)
    feed.begin(jax.random.key(2), 0)
    args = parallel.replicate(jax.random.key(1), devices), *feed.train_data(0)
    start = initial_state(model, tx)
    for skip in (False, True):
        config = CONFIG._replace(skip_nonfinite=skip)
        step = make_train_step(
            graphdef, tx, task.loss, config, feed.train_batch, parallel.AXIS
        )
        run = parallel.on_devices(step, devices)
        after, metrics = run(parallel.replicate(start, devices), *args)
        assert int(after.step) == 1
        assert np.isfinite(metrics["loss"]) == skip
        unchanged = jax.tree.leaves(after)[1:], jax.tree.leaves(start)[1:]
        same = all((a == b).all() for a, b in zip(*unchanged, strict=True))
        assert same == skip
    assert metrics["skipped"] == 1


def test_four_devices_mix_smooth_average_and_work_in_parts_like_one():
    model = small_mlp()
    config = CONFIG._replace(ema=0.99, accumulate=2)
    recipe = {"label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0}
    (one, state_one), (four, state_four) = (
        trained(model, optax.sgd(0.1), jax.devices()[:n], 6, config, **recipe)
        for n in (1, 4)
    )
    np.testing.assert_allclose(four, one, rtol=1e-5)
    assert_alike(state_one.average, state_four.average, rtol=1e-3, atol=1e-5)
    plain, _ = trained(model, optax.sgd(0.1), jax.devices()[:1], 6)
    assert abs(np.subtract(plain, one)).min() > 1e-4


def test_smoothed_labels_are_those_of_the_definition():
    model, still, devices = small_mlp(), optax.sgd(0.0), jax.devices()[:1]
    losses = {
        share: trained(model, still, devices, 1, label_smoothing=share)
        for share in (0.0, 0.3, 1.0)
    }
    [[exact], [smooth], [uniform]] = [loss for loss, _ in losses.values()]
    # Cross-entropy is linear in its target, of which 0.3 is spread over ten classes.
    assert smooth == pytest.approx(0.7 * exact + 0.3 * uniform, rel=1e-5)


def test_the_average_follows_the_weights_and_forgets_the_start():
    model = small_mlp()
    config = CONFIG._replace(ema=0.5)
    _, states = followed(model, optax.sgd(0.1), jax.devices()[:1], 8, config)
    expected = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    for t, state in enumerate(states):
        decay = min(0.5, (1 + t) / (10 + t))
        expected = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * new,
            expected,
            (state.params, state.stats),
        )
        assert_alike(state.average, expected, rtol=1e-5, atol=1e-6)
    assert state.network is state.average


def test_a_batch_in_parts_gives_the_gradient_of_the_whole():
    # Without batch norm, whose statistics differ between parts.
    model = small_mlp()
    whole, state = trained(model, optax.sgd(0.1), jax.devices()[:1], 5)
    parts = CONFIG._replace(accumulate=4)
    found, state_of_parts = trained(model, optax.sgd(0.1), jax.devices()[:1], 5, parts)
    np.testing.assert_allclose(found, whole, rtol=1e-5)
    assert_alike(state.params, state_of_parts.params, rtol=1e-4, atol=1e-6)


def test_batch_statistics_follow_part_after_part():
    model, devices = small_resnet(), jax.devices()[:1]
    parts = CONFIG._replace(accumulate=4)
    _, state = trained(model, optax.sgd(0.1), devices, 1, parts)
    task = digits_task()
    feed = task.feed(devices)
    feed.begin(jax.random.key(2), 0)
    key = jax.random.fold_in(jax.random.key(1), 0)
    batch = feed.train_batch(0, key, *feed.train_data(0))
    x = model.conv1(*task.inputs(batch))
    mean = np.zeros(x.shape[-1])
    for part in np.split(np.asarray(x), 4):
        mean = 0.9 * mean + 0.1 * part.mean((0, 1, 2))
    np.testing.assert_allclose(state.stats["bn1"]["mean"][...], mean, atol=1e-6)


def test_bfloat16_keeps_parameters_and_statistics_and_trains_alike():
    model = small_resnet()
    half = CONFIG._replace(dtype="bfloat16")
    tx = tpp_optimizer(model)
    exact, _ = trained(model, tx, jax.devices()[:1], 10)
    found, state = trained(model, tx, jax.devices()[:1], 10, half)
    np.testing.assert_allclose(found, exact, rtol=0.05)
    assert found != exact
    kept = state.params, state.stats, state.opt_state
    floats = [x for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def lowered(config):
    model = small_resnet()
    task = digits_task(dtype=config.dtype)
    feed = task.feed(jax.devices()[:1])
    feed.begin(jax.random.key(2), 0)
    graphdef, tx = structure_of(model, training=True), optax.sgd(0.1)
    step = make_train_step(graphdef, tx, task.loss, config, feed.train_batch)
    args = initial_state(model, tx), jax.random.key(1), *feed.train_data(0)
    return jax.jit(step).lower(*args)


def test_in_bfloat16_no_convolution_is_left_in_float32():
    text = lowered(CONFIG._replace(dtype="bfloat16")).as_text()
    convolutions = [line for line in text.splitlines() if ".convolution" in line]
    assert len(convolutions) > 10
    assert all("bf16" in line and "xf32" not in line for line in convolutions)


def test_computing_again_keeps_convolutions_only_and_changes_no_result():
    model = small_resnet()
    again = CONFIG._replace(remat=True)
    plain, state = trained(model, optax.sgd(0.1), jax.devices()[:1], 3)
    found, other = trained(model, optax.sgd(0.1), jax.devices()[:1], 3, again)
    np.testing.assert_allclose(found, plain, rtol=1e-6)
    assert_alike(state, other, rtol=1e-4, atol=1e-6)
    # The barrier keeps XLA from sharing repeated computations. (Its CPU backend
    # removes it, so memory use is no evidence here.)
    assert "optimization_barrier" in lowered(again).as_text()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    images = jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.float32)

    def kept(run):
        residuals = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], params, images)
        return sum(x.size for x in jax.tree.leaves(residuals))

    def run(params, x):
        return nnx.merge(graphdef, params, rest, copy=True)(x).sum()

    assert kept(jax.checkpoint(run, policy=is_expensive)) < 0.6 * kept(run)


def test_several_steps_in_one_dispatch_equal_single_steps():
    model = small_resnet()
    tx = tpp_optimizer(model)
    task = digits_task()
    feed = task.feed(jax.devices()[:1])
    feed.begin(jax.random.key(2), 0)
    graphdef = structure_of(model, training=True)
    step = make_train_step(graphdef, tx, task.loss, CONFIG, feed.train_batch)
    key, images = jax.random.key(1), feed.train_data(0)
    single = jax.jit(make_train_steps(step, loop=False))
    state, sums = initial_state(model, tx), []
    for _ in range(3):
        state, metrics = single(state, key, np.int32(1), *images)
        sums.append(metrics["loss"])
    looped = jax.jit(make_train_steps(step, loop=True))
    state_looped, mean = looped(initial_state(model, tx), key, np.int32(3), *images)
    assert int(state_looped.step) == 3
    np.testing.assert_allclose(mean["loss"], np.mean(sums), rtol=1e-5)
    assert_alike(state.params, state_looped.params, rtol=1e-4, atol=1e-6)


def test_a_phase_compiles_once_and_moves_nothing_between_host_and_device():
    model = small_resnet()
    tx = tpp_optimizer(model)
    task = digits_task()
    feed = task.feed(jax.devices()[:1])
    feed.begin(jax.random.key(2), 0)
    graphdef = structure_of(model, training=True)
    step = jax.jit(
        make_train_step(graphdef, tx, task.loss, CONFIG, feed.train_batch),
        donate_argnums=0,
    )
    state = parallel.replicate(initial_state(model, tx), jax.devices()[:1])
    key = parallel.replicate(jax.random.key(1), jax.devices()[:1])
    args = key, *feed.train_data(0)
    state, _ = step(state, *args)
    with jax.transfer_guard("disallow"):
        for _ in range(5):
            state, _ = step(state, *args)
    assert step._cache_size() == 1


def test_a_thousand_steps_take_no_more_memory_than_ten():
    model = small_mlp()
    task = digits_task()
    feed = task.feed(jax.devices()[:1])
    feed.begin(jax.random.key(2), 0)
    tx = sgd(1e-3, 0.9, 5e-4)
    graphdef = structure_of(model, training=True)
    step = make_train_step(graphdef, tx, task.loss, CONFIG, feed.train_batch)
    steps = parallel.on_devices(step, jax.devices()[:1], donate=0)
    state = parallel.replicate(initial_state(model, tx), jax.devices()[:1])
    key, held = jax.random.key(1), []
    for i in range(1000):
        state, _ = steps(state, key, *feed.train_data(i))
        if i in (9, 999):
            held.append(sum(x.nbytes for x in jax.live_arrays()))
    assert held[0] == held[1]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA:CPU's own count")
def test_the_penalties_take_at_most_five_percent_more_memory():
    """They depend only on parameters, but must not be computed early and held."""
    model = tpp.models.create("cifar_vgg11", rngs=nnx.Rngs(0))
    images = jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.uint8)
    plan = tpp.make_plan(tpp.channel_groups(model, images), model, 0.5)
    plain, graphdef = sgd(1e-3, 0.9, 5e-4), structure_of(model, training=True)
    penalties = tpp.add_tpp_penalties(plan, tpp.growing_schedule())
    nothing = np.zeros((0, 32, 32, 3), np.uint8), np.zeros(0, np.int32)
    dataset = tpp.data.Dataset(*nothing, *nothing, 10, (0.4,) * 3, (0.3,) * 3)
    loss = ImageClassification(dataset).loss

    def bytes_held(tx):
        step = make_train_step(graphdef, tx, loss, CONFIG, lambda step, key, x: x)
        batch = Images(images, jax.ShapeDtypeStruct((128,), jnp.int32))
        arguments = initial_state(model, tx), jax.random.key(0), batch
        compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
        held = compiled.memory_analysis()
        return held.argument_size_in_bytes + held.temp_size_in_bytes

    assert bytes_held(optax.chain(penalties, plain)) <= 1.05 * bytes_held(plain)


def test_an_epoch_visits_every_image_once_and_each_epoch_otherwise():
    orders = [np.asarray(epoch_order(jax.random.key(0), e, 100)) for e in (0, 0, 1)]
    np.testing.assert_array_equal(np.sort(orders[0]), np.arange(100))
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()


@pytest.mark.parametrize("n_devices", [1, 4])
def test_evaluation_counts_the_last_partial_batch_exactly(n_devices):
    dataset = digits()
    images = np.tile(dataset.test_images, (2, 1, 1, 1))[:519]
    labels = np.tile(dataset.test_labels, 2)[:519]
    dataset = dataset._replace(test_images=images, test_labels=labels)
    model = small_resnet()
    devices = jax.devices()[:n_devices]
    task = digits_task(dataset)
    evaluate = Evaluator(task, task.feed(devices), CONFIG, devices)
    state = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    found = evaluate(model, *state)
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


def test_one_evaluator_measures_a_network_and_what_is_left_of_it():
    # Depthwise convolutions store their number of channels as an attribute.
    stages = ((1, 8, 1, 1), (2, 8, 1, 1))
    model = MobileNetV2(stages=stages, stem_stride=1, in_channels=1, rngs=nnx.Rngs(0))
    groups = tpp.channel_groups(model, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    small = tpp.prune(model, tpp.make_plan(groups, model, "features.2.*:0.5"))
    dataset, devices = digits(), jax.devices()[:1]
    task = digits_task(dataset)
    evaluate = Evaluator(task, task.feed(devices), CONFIG, devices)
    for network in (model, small):
        state = nnx.state(network, nnx.Param), nnx.state(network, nnx.BatchStat)
        found = evaluate(network, *state)
        network.eval()
        images = tpp.data.normalize(dataset.test_images, dataset.mean, dataset.std)
        hits = jnp.argmax(network(images), -1) == dataset.test_labels
        assert found["accuracy"] == pytest.approx(100 * float(hits.mean()))


def test_a_batch_that_does_not_split_names_the_nearest_sizes():
    with pytest.raises(
        ValueError, match=r"62 does not split over 4 devices.* 60 or 64"
    ):
        parallel.check_batch_size(62, jax.devices()[:4])
