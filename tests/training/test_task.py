"""A task other than classification uses the same step, feeds and evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.headline import Headline, headline_of
from tpp_jax.training import parallel
from tpp_jax.training.evaluation import Evaluator
from tpp_jax.training.feeds import Resident, Streamed
from tpp_jax.training.optimizers import sgd
from tpp_jax.training.state import initial_state, with_state
from tpp_jax.training.step import StepConfig, make_train_step
from tpp_jax.training.structure import structure_of
from tpp_jax.training.task import Feed, Task

N_TRAIN, N_EVAL, BATCH = 96, 37, 16


class Wave(nnx.Module):
    """A network of two inputs, a place and a time, with one number as output."""

    def __init__(self, rngs):
        self.of_place = nnx.Linear(2, 24, use_bias=False, rngs=rngs)
        self.of_time = nnx.Linear(1, 24, use_bias=False, rngs=rngs)
        self.norm = tpp.models.BatchNorm(24, rngs=rngs)
        self.hidden = nnx.Linear(24, 24, rngs=rngs)
        self.out = nnx.Linear(24, 1, rngs=rngs)

    def __call__(self, place, time):
        h = self.of_place(place) + self.of_time(time[:, None])
        h = nnx.relu(self.hidden(nnx.relu(self.norm(h))))
        return self.out(h)[:, 0]


def waves(n, seed):
    """Returns a batch with another structure than images: a dict with a tuple in it."""
    rng = np.random.default_rng(seed)
    place = rng.uniform(-1, 1, (n, 2)).astype(np.float32)
    time = rng.uniform(-1, 1, n).astype(np.float32)
    height = np.sin(2 * place.sum(1)) + time * place[:, 0]
    return {"where": (place, time), "height": height.astype(np.float32)}


class Regression:
    """A regression with squared errors, whose places are noisy in training."""

    headline = Headline("rms", "m", better="lower")
    examples = "waves"
    batch_size = examples_per_step = BATCH
    steps_per_epoch = N_TRAIN // BATCH
    blur = 0.01

    def __init__(self, streamed=False):
        self.streamed = streamed

    def model(self, rngs):
        return Wave(rngs)

    def example_inputs(self):
        return jax.ShapeDtypeStruct((1, 2), "float32"), jax.ShapeDtypeStruct((1,), "f4")

    def feed(self, devices, accumulate=1):
        train, evaluation = waves(N_TRAIN, 0), waves(N_EVAL, 1)
        if not self.streamed:
            return Resident(train, evaluation, BATCH, devices, accumulate, mirrored)

        def rows(data, chosen):
            return jax.tree.map(lambda x: x[chosen], data)

        def train_batches(key, step):
            seed = int(jax.random.bits(key, dtype=jnp.uint32))
            while True:
                rng = np.random.default_rng((seed, step))
                yield rows(train, rng.permutation(N_TRAIN)[:BATCH])
                step += 1

        def eval_batches(size):
            for start in range(0, N_EVAL, size):
                yield rows(evaluation, slice(start, start + size))

        return Streamed(train_batches, eval_batches, BATCH, devices)

    def loss(self, model, batch, key):
        place, time = batch["where"]
        place = place + self.blur * jax.random.normal(key, (2,))
        error = model(place, time) - batch["height"]
        return jnp.square(error).mean(), {"bias": error.mean()}

    def metrics(self, model, batch):
        error = model(*self.inputs(batch)) - batch["height"]
        return {"square": jnp.square(error), "bias": error}

    def report(self, means):
        rms = {"rms": means["square"] ** 0.5} if "square" in means else {}
        return {**means, **rms}

    def inputs(self, batch):
        return batch["where"]

    def probes(self, number):
        return jax.tree.map(lambda x: x[:number], waves(N_EVAL, 1))

    def samples(self, seed):
        yield waves(BATCH, seed)


def mirrored(keys, batch):
    """Changes the sign of some places and of the heights, odd functions of them."""
    signs = jnp.where(jax.vmap(jax.random.bernoulli)(keys), 1.0, -1.0)
    place, time = batch["where"]
    where = place * signs[:, None], time
    return {"where": where, "height": batch["height"] * signs}


def test_the_protocols_are_what_the_generic_code_needs():
    task: Task = Regression()
    feeds: list[Feed] = [task.feed(jax.devices()[:1])]
    assert not feeds[0].split


def trained(model, tx, steps, devices, feed, accumulate=1, api="pmap"):
    """Trains some steps; returns the loss of each and the model."""
    graphdef, config = (
        structure_of(model, training=True),
        StepConfig(accumulate=accumulate),
    )
    axis, select = parallel.axis_name(devices), feed.train_batch
    step = make_train_step(graphdef, tx, Regression().loss, config, select, axis)
    split = 2 if feed.split else None
    run = parallel.on_devices(step, devices, 0, split, accumulate, api)
    state = initial_state(model, tx, average=False, step=0, arrays=None)
    key, state = parallel.replicate((jax.random.key(1), state), devices)
    feed.begin(jax.random.key(2), 0)
    losses = []
    for i in range(steps):
        state, metrics = run(state, key, *feed.train_data(i))
        losses.append(float(metrics["loss"]))
    feed.close()
    assert metrics.keys() == {"loss", "bias"}
    return losses, with_state(model, parallel.local(state))


@functools.cache
def pruned_on(n_devices, streamed=False, api="pmap"):
    """Trains, regularizes and cuts; returns the losses and the measured metrics."""
    task, devices = Regression(streamed), jax.devices()[:n_devices]
    model, feed = task.model(nnx.Rngs(0)), task.feed(devices)
    evaluate = Evaluator(task, feed, StepConfig(), devices, api)
    groups = tpp.channel_groups(model, *task.example_inputs())
    plan = tpp.make_plan(groups, model, 0.5)
    schedule = tpp.growing_schedule(
        granularity=0.1, every=2, stabilize=20, zero_out_every=2
    )
    pruning = optax.chain(
        tpp.add_tpp_penalties(plan, schedule),
        sgd(0.02, 0.9, 0.0),
        tpp.zero_pruned(plan, schedule),
    )
    found = {"random": measured(evaluate, model)}
    losses, model = trained(model, optax.adam(0.02), 80, devices, feed, api=api)
    found["trained"] = measured(evaluate, model)
    steps = schedule.total_steps
    _, model = trained(model, pruning, steps, devices, feed, api=api)
    found["regularized"] = measured(evaluate, model)
    model = tpp.prune(model, plan)
    found["cut"] = measured(evaluate, model)
    return losses, found, model


def measured(evaluate, model):
    return evaluate(model, nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat))


@pytest.mark.parametrize("streamed", [False, True])
def test_another_task_is_trained_measured_and_pruned(streamed):
    _, found, small = pruned_on(1, streamed)
    assert small.hidden.kernel.shape == (12, 12)
    rms = {moment: metrics["rms"] for moment, metrics in found.items()}
    assert rms["trained"] < 0.5 * rms["random"]
    # Filters that the penalties have made zero are cut out without any loss.
    assert rms["cut"] == pytest.approx(rms["regularized"], rel=1e-5)
    assert rms["cut"] < 0.9 * rms["random"]
    small.eval()
    data = waves(N_EVAL, 1)
    error = np.asarray(small(*data["where"])) - data["height"]
    assert found["cut"]["rms"] == pytest.approx(np.sqrt(np.square(error).mean()), 1e-5)
    assert found["cut"]["bias"] == pytest.approx(error.mean(), abs=1e-6)
    assert found["cut"].keys() == {"square", "bias", "rms"}


@pytest.mark.parametrize(
    ("streamed", "api"), [(False, "pmap"), (True, "pmap"), (True, "shard_map")]
)
def test_two_devices_do_the_same_with_it(streamed, api):
    one, found_by_one, _ = pruned_on(1, streamed)
    two, found_by_two, _ = pruned_on(2, streamed, api=api)
    np.testing.assert_allclose(two[:20], one[:20], rtol=1e-4)
    for moment, metrics in found_by_two.items():
        assert metrics == pytest.approx(found_by_one[moment], rel=1e-3, abs=1e-4)


def test_two_devices_accumulate_the_parts_of_one():
    task, losses = Regression(), {}
    for n, accumulate in ((1, 1), (1, 2), (2, 2)):
        devices, model = jax.devices()[:n], task.model(nnx.Rngs(0))
        feed, tx = task.feed(devices, accumulate), optax.sgd(0.1)
        losses[n, accumulate], _ = trained(model, tx, 10, devices, feed, accumulate)
    np.testing.assert_allclose(losses[2, 2], losses[1, 2], rtol=1e-4)
    assert abs(np.subtract(losses[1, 1], losses[1, 2])).min() > 1e-7


def test_a_headline_knows_what_is_better_and_how_it_is_written():
    low, high = Headline("rms", "m", better="lower"), Headline("accuracy", "%")
    assert low.improves(1.0, 2.0) and not low.improves(2.0, 2.0)
    assert high.improves(2.0, 1.0) and not high.improves(1.0, 1.0)
    assert low.improves(9.0, None) and high.improves(0.0, None)
    assert (low.text(1.234), high.text(97)) == ("1.234 m", "97.00 %")
    assert headline_of({"headline": low.to_dict()}) == low
    assert headline_of({"dense": {"accuracy": 1.0}}) == high
