"""Objects that define a part of a task become tasks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import tpp_jax as tpp
from tpp_jax.errors import TPPError
from tpp_jax.headline import Headline
from tpp_jax.training.evaluation import Evaluator
from tpp_jax.training.own import check_task, complete
from tpp_jax.training.step import StepConfig
from tpp_jax.training.structure import split

DEVICES = jax.devices()[:1]


def waves(n, seed=0):
    x = np.random.default_rng(seed).uniform(-1, 1, (n, 3)).astype("float32")
    return x, np.sin(x.sum(1))


class Arrays:
    """Data in arrays, and the least that a task needs."""

    train, evaluation = waves(96), waves(37, 1)

    def model(self, rngs):
        return nnx.Linear(3, 1, rngs=rngs)

    def loss(self, model, batch):
        x, y = batch
        error = model(x)[:, 0] - y
        return jnp.square(error).mean(), {"bias": error.mean()}


class Source:
    """Random access to examples, as Grain's sources have it."""

    def __init__(self, arrays):
        self._arrays = arrays

    def __len__(self):
        return len(self._arrays[0])

    def __getitem__(self, i):
        return tuple(array[i] for array in self._arrays)


class Sources(Arrays):
    train, evaluation = Source(Arrays.train), Source(Arrays.evaluation)


class Steps:
    """Batches by their number."""

    model, loss = Arrays.model, Arrays.loss

    def train_batches(self, key, step):
        del key
        x, y = Arrays.train
        place = step * 16 % 96
        return x[place : place + 16], y[place : place + 16]

    def eval_batches(self):
        x, y = Arrays.evaluation
        yield x[:20], y[:20]
        yield x[20:], y[20:]


OWN = [Arrays, Sources, Steps]


@pytest.mark.parametrize("own", OWN)
def test_the_evaluation_is_the_mean_over_all_examples(own):
    task = complete(own(), batch_size=16)
    model = task.model(nnx.Rngs(0))
    evaluate = Evaluator(task, task.feed(DEVICES), StepConfig(), DEVICES, "pmap")
    x, y = Arrays.evaluation
    error = np.asarray(model(x))[:, 0] - y
    found = evaluate(model, *split(model))
    assert found["loss"] == pytest.approx(np.square(error).mean(), rel=1e-5)
    assert found["bias"] == pytest.approx(error.mean(), rel=1e-4)
    assert task.headline == Headline("loss", better="lower")
    [shape] = task.example_inputs()
    assert shape.shape == (1, 3) and shape.dtype == "float32"


@pytest.mark.parametrize(("own", "steps"), [(Arrays, 6), (Sources, 6), (Steps, 1)])
def test_the_length_of_an_epoch(own, steps):
    task = complete(own(), batch_size=16)
    assert (task.batch_size, task.steps_per_epoch) == (16, steps)
    batches = list(task.samples(seed=0))
    assert len(batches) == steps and batches[0][0].shape == (16, 3)


def test_batches_from_random_access_depend_on_the_step_alone():
    task = complete(Sources(), batch_size=40)
    feed = task.feed(DEVICES)
    key = jax.random.key(1)
    feed.begin(key, 0)
    seen = [feed.train_data(i)[0] for i in range(5)]
    for start in (1, 2, 4):
        feed.begin(key, start)
        again = feed.train_data(start)[0]
        np.testing.assert_array_equal(again[0], seen[start][0])
    first, second = (np.concatenate([x[0] for x in seen[i : i + 2]]) for i in (0, 2))
    assert len(np.unique(first, axis=0)) == len(np.unique(second, axis=0)) == 80
    assert not np.array_equal(first, second)
    feed.close()


def test_a_model_of_linen_and_inputs_of_its_own():
    class Own:
        batch_size = 4

        def __init__(self):
            self.train = self.evaluation = {"x": np.ones((8, 3), "float32")}

        def model(self, rngs):
            del rngs
            return linen.Dense(2)

        def inputs(self, batch):
            return batch["x"]

        def loss(self, model, batch, key):
            return model(batch["x"] + jax.random.normal(key)).mean()

    task = complete(Own())
    groups = tpp.channel_groups(task.model(nnx.Rngs(0)), *task.example_inputs())
    assert groups.shapes["module.kernel"] == (3, 2)


def broken(**changes):
    return type("Own", (Arrays,), changes)()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (broken(loss=None), "has no function loss"),
        (broken(model=3), "has no function model"),
        (broken(train=None), "has no data"),
        (broken(train=(np.ones(3), np.ones(4))), "must be the examples"),
        (broken(train=(np.ones((0, 3)), np.ones(0))), "no examples"),
        (broken(batch_size=200), "batch size is 200, but Own has 96"),
        (broken(batch_size=200, steps_per_epoch=1), "batch size is 200"),
        (broken(headline=3), "headline of the task is 3"),
        (broken(headline="top5_accuracy"), "of which less is better"),
        (broken(train=object()), "the shapes object: their first axes must be"),
        (broken(train=range(2**40)), "examples, more than can be put in random order"),
        (broken(inputs=3), "inputs of the task Own is no function"),
        (broken(eval_batches=[]), "eval_batches of the task Own is no function"),
        (broken(feed=3), "has a feed, but lacks"),
    ],
)
def test_what_is_missing_is_named(own, message):
    with pytest.raises(TPPError, match=message):
        complete(own, "Own")


def with_metric(make, name="own"):
    def loss(self, model, batch):
        del self
        return model(batch[0]).mean(), {name: make(model(batch[0]))}

    return broken(loss=loss)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (broken(loss=lambda self, model, batch: model(batch[0])), "one number"),
        (with_metric(lambda x: x), "'own' of the loss of Own is of shape"),
        (with_metric(lambda x: {"a": x.mean()}), "is of type dict, must be one number"),
        (broken(loss=lambda self, model, batch: (0.0, batch[0])), "dict of mean"),
        (broken(loss=lambda self, model, batch: [0.0, {}]), "of type list"),
        (broken(loss=lambda self, model, batch: jnp.int32(3)), "int32, which has no"),
        (broken(model=lambda self: None), "calling the model of Own fails with Type"),
        (broken(evaluation={"x": np.ones((8, 3))}), "define inputs"),
        (broken(model=lambda self, rngs: jnp.sin), "must be a module of"),
    ],
)
def test_what_does_not_fit_is_named(own, message):
    task = complete(own, "Own", 8)

    def use():
        model = task.model(nnx.Rngs(0))
        task.loss(model, next(task.samples(0)), jax.random.key(0))

    with pytest.raises(TPPError, match=message):
        use()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            broken(loss=lambda self, model, batch: model(batch[0][:, 1:]).mean()),
            r"calling the loss of Own fails with Type.* \(line \d+ of .*test_own.py\)",
        ),
        (
            broken(report=lambda self, means: {"root": means["mae"] ** 0.5}),
            "report of Own, given those of training, fails with KeyError: 'mae'",
        ),
        (
            broken(inputs=lambda self, batch: batch),
            "calling the network on the inputs of Own fails with TypeError",
        ),
        (with_metric(jnp.mean, "step"), "has a metric 'step', a name that each row"),
    ],
)
def test_what_fails_in_training_is_found_before(own, message):
    task = complete(own, "Own", 8)
    with pytest.raises(TPPError, match=message):
        check_task(task, task.model(nnx.Rngs(0)), "Own")


def keyed(model, batch, *, key):
    return model(batch[0]).mean() + jax.random.normal(key)


def weighted(model, batch, weight=0.1):
    return weight * model(batch[0]).mean()


@pytest.mark.parametrize(
    ("loss", "draws"),
    [
        (keyed, True),
        (lambda model, batch, rng: keyed(model, batch, key=rng), True),
        (lambda model, batch, key=None: keyed(model, batch, key=key), True),
        (weighted, False),
        (functools.partial(weighted, weight=2.0), False),
        (functools.partial(lambda m, b, w: w * m(b[0]).mean(), w=2.0), False),
        (functools.partial(lambda m, b, key, w: w * keyed(m, b, key=key), w=1), True),
    ],
)
def test_a_loss_gets_a_key_if_it_has_a_parameter_for_one(loss, draws):
    task = complete(broken(loss=staticmethod(loss)), batch_size=16)
    model, batch = task.model(nnx.Rngs(0)), next(task.samples(0))
    found = {float(task.loss(model, batch, jax.random.key(i))[0]) for i in range(2)}
    assert len(found) == 1 + draws


def test_means_are_added_up_in_single_precision():
    def loss(self, model, batch):
        del self
        value = model(batch[0]).mean().astype("bfloat16")
        return value, {"finite": jnp.isfinite(value), "n": jnp.int8(100), "one": 1}

    own = broken(loss=loss, report=lambda self, means: jax.tree.map(jnp.sqrt, means))
    task = complete(own, batch_size=16)
    model, batch = task.model(nnx.Rngs(0)), next(task.samples(0))
    value, metrics = task.loss(model, batch, jax.random.key(0))
    assert {x.dtype for x in (value, *metrics.values())} == {jnp.dtype("float32")}
    per_example = task.metrics(model, batch)
    assert all(x.dtype == jnp.float32 for x in per_example.values())
    assert type(task.report({"loss": 4.0})["loss"]) is float


def test_more_steps_than_a_pass_continue_with_the_next_pass():
    task = complete(broken(train=Sources.train, steps_per_epoch=5), batch_size=40)
    feed = task.feed(DEVICES)
    feed.begin(jax.random.key(0), 0)
    assert [len(feed.train_data(i)[0][0]) for i in range(5)] == [40] * 5
    feed.close()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            broken(augment=lambda self, key, batch: jax.random.normal(key)),
            "calling augment of Own with one key for each example fails",
        ),
        (
            broken(train=Sources.train, augment=lambda self, keys, batch: batch),
            "has augment, which changes data in arrays, but its data are made",
        ),
    ],
)
def test_an_augment_that_cannot_be_used(own, message):
    with pytest.raises(TPPError, match=message):
        complete(own, "Own", 8).feed(DEVICES)


def test_batches_of_a_step_that_do_not_split_over_devices():
    own = Steps()
    own.train_batches = lambda key, step: waves(7 if step else 16)
    feed = complete(own, "Own").feed(jax.devices()[:2])
    feed.begin(jax.random.key(0), 0)
    feed.train_data(0)
    with pytest.raises(TPPError, match="step 1 of Own has 7 examples, which do not"):
        feed.train_data(1)
    feed.close()


def test_the_network_of_the_user_keeps_its_mode():
    mine = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    mine.eval()
    own = broken(model=lambda self, rngs: mine)
    made = complete(own, batch_size=16).model(nnx.Rngs(0))
    assert mine.deterministic and not made.deterministic
