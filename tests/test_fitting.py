"""``tpp.fit``: what it returns, calls back, keeps, continues and refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import tpp_jax as tpp
from tpp_jax.errors import TPPError


def examples(n, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, 4)).astype("float32")
    return x, (x[:, 0] > 0).astype("int64")


DATA = examples(32), examples(20, 1)


class Net(nnx.Module):
    def __init__(self, rngs, width=8):
        self.first = nnx.Linear(4, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


class Calls(tpp.Callback):
    """Everything that was called back, in order."""

    def __init__(self):
        self.steps, self.phases, self.saved = [], [], []

    def on_step(self, step, phase, metrics):
        self.steps.append((step, phase, set(metrics)))

    def on_phase(self, phase, model, result):
        self.phases.append((phase, model.first.kernel.shape, result["score"]))

    def on_checkpoint(self, step):
        self.saved.append(step)


def arrays(model):
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree.leaves_with_path(nnx.state(model, nnx.Not(nnx.RngKey)))
    }


def assert_equal(one, other):
    one, other = arrays(one), arrays(other)
    assert one.keys() == other.keys()
    for name, x in one.items():
        np.testing.assert_array_equal(x, other[name], err_msg=name)


class Fitted:
    """A trained network given to one run in a folder, and what was before."""

    def __init__(self, folder):
        self.model = Net(nnx.Rngs(0))
        self.model.eval()
        self.before = nnx.clone(self.model)
        self.calls = Calls()
        self.folder = folder
        self.result = self.run(callbacks=[self.calls])

    def run(self, **changes):
        given = {
            "ratios": {"first": 0.5},
            "method": "oneshot",
            "epochs": 2,
            "batch_size": np.int64(8),
            "learning_rate": np.float32(0.01),
            "config": {"checkpoint_every": 4, "log_every": 2},
            "folder": self.folder,
        }
        return tpp.fit(self.model, DATA, **(given | changes))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return Fitted(tmp_path_factory.mktemp("fit") / "run")


def test_the_networks_and_the_plan_belong_together(fitted):
    result = fitted.result
    assert_equal(result.dense, fitted.before)
    assert result.plan.kept["first"].shape == (4,)
    shapes = {leaf.shape for leaf in arrays(result.pruned).values()}
    assert shapes == {(), (4, 4), (4,), (4, 2), (2,)}
    result.pruned.eval()
    x, y = DATA[1]
    hits = np.asarray(result.pruned(x)).argmax(-1) == y
    assert 100 * hits.mean() == pytest.approx(result.summary["last_accuracy"])


def test_the_network_of_the_caller_is_left_untouched(fitted):
    assert_equal(fitted.model, fitted.before)
    assert fitted.model.norm.use_running_average and fitted.model.dropout.deterministic


def test_the_records(fitted):
    result = fitted.result
    assert result.summary["headline"]["name"] == "accuracy"
    assert result.summary["layers"]["first"] == {"kept": 4, "total": 8}
    assert result.summary["config"]["data"]["batch_size"] == 8
    phases = [row["phase"] for row in result.history]
    assert phases == ["pretrain", *["finetune"] * 5]
    assert {"test_accuracy", "test_loss"} <= result.history[-1].keys()
    assert result.folder == fitted.folder
    page = result.report.read_text()
    assert "<title>Net" in page and "test_fitting:Net" in page


def test_callbacks_hear_of_all_records_phases_and_checkpoints(fitted):
    calls, result = fitted.calls, fitted.result
    assert [(s, p) for s, p, _ in calls.steps] == [
        (row["step"], row["phase"]) for row in result.history
    ]
    widths = [(name, shape[1]) for name, shape, _ in calls.phases]
    assert widths == [("pretrain", 8), ("slice", 4), ("finetune", 4)]
    assert calls.saved == [4, 8]
    assert calls.phases[-1][2] == result.summary["last_accuracy"]


def test_the_same_call_returns_the_finished_run(fitted):
    calls = Calls()
    again = fitted.run(callbacks=[calls])
    assert not calls.steps
    assert_equal(again.pruned, fitted.result.pruned)
    assert again.summary == fitted.result.summary
    with pytest.raises(TPPError, match=r"another config \(finetune.epochs was 2, is 1"):
        fitted.run(epochs=1)


def test_without_a_folder_nothing_is_saved_and_the_result_is_the_same(fitted):
    calls = Calls()
    result = fitted.run(folder=None, callbacks=[calls])
    assert calls.phases == fitted.calls.phases and not calls.saved
    assert fitted.calls.saved and result.report is None
    assert_equal(result.pruned, fitted.result.pruned)


def test_a_run_that_a_callback_ended_continues_with_the_same_bits(fitted, tmp_path):
    class Fails(tpp.Callback):
        def on_checkpoint(self, step):
            raise RuntimeError(f"mine, at {step}")

    with pytest.raises(RuntimeError, match="mine, at 4"):
        fitted.run(folder=tmp_path / "run", callbacks=[Fails()])
    calls = Calls()
    result = fitted.run(folder=tmp_path / "run", callbacks=[calls])
    assert calls.steps[0][0] == 6
    assert_equal(result.pruned, fitted.result.pruned)
    lines = [
        {key: x for key, x in row.items() if not key.endswith("_per_second")}
        for row in result.history
    ]
    assert [row["step"] for row in lines] == [r["step"] for r in fitted.result.history]
    assert lines[-1] == fitted.result.history[-1]


def test_a_saved_network_that_was_pruned_is_pruned_again(fitted):
    start = {"init.model": str(fitted.folder / "model")}
    result = fast(Net, DATA, ratios={"first": 0.5}, config=start)
    assert_equal(result.dense, fitted.result.pruned)
    assert result.pruned.first.kernel.shape == (4, 2)


fast = functools.partial(tpp.fit, method="oneshot", epochs=1, batch_size=8)


class Dense(linen.Module):
    """A Linen network with a norm and a mode."""

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
        return linen.Dense(2)(linen.relu(x))


def test_trained_variables_of_linen_are_bound():
    variables = Dense().init(jax.random.key(3), DATA[0][0])
    bound = Dense().bind(variables)
    result = fast(bound, DATA, ratios={"*Dense_0": 0.5})
    given = variables["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(result.dense.module.Dense_0["kernel"], given)
    assert result.pruned.module.Dense_0["kernel"].shape == (4, 4)
    assert np.any(np.asarray(result.pruned.module.BatchNorm_0["mean"]) != 0)
    assert result.folder is None and result.report is None


class Mixture:
    """A task of several inputs, with words of its own."""

    headline = tpp.Headline("r2", better="higher")
    examples = "pairs"
    batch_size = 8

    def __init__(self):
        x, y = DATA[0]
        self.train = self.evaluation = {"a": x[:, :2], "b": x[:, 2:], "y": 1.0 * y}

    def model(self, rngs):
        class Sum(nnx.Module):
            def __init__(self):
                self.first = nnx.Linear(2, 6, rngs=rngs)
                self.other = nnx.Linear(2, 6, rngs=rngs)
                self.last = nnx.Linear(6, 1, rngs=rngs)
                self.scale = jnp.full(6, 0.5)  # an array that is in no variable

            def __call__(self, a, b):
                x = nnx.relu(self.first(a) + self.other(b))
                return self.last(x * self.scale)[:, 0]

        return Sum()

    def inputs(self, batch):
        return batch["a"], batch["b"]

    def loss(self, model, batch, *, key):
        del key
        return jnp.square(model(*self.inputs(batch)) - batch["y"]).mean()

    def report(self, means):
        return {**means, "r2": 1 - jnp.float32(means["loss"]) / 0.25}


def test_a_task_of_one_s_own():
    result = fast(Mixture, ratios={"first": 0.5})
    shapes = {getattr(result.pruned, x).kernel.shape for x in ("first", "other")}
    assert shapes == {(2, 3)} and result.pruned.scale.shape == (3,)
    row = next(row for row in result.history if "pairs_per_second" in row)
    assert row["r2"] == pytest.approx(1 - row["loss"] / 0.25, rel=1e-5)
    assert result.summary["last_r2"] == result.history[-1]["test_r2"]


class Lossy(Net):
    def loss(self):
        """A method that a network may have, which makes it no task."""


class Needs(Mixture):
    def __init__(self, size):
        self.size = size


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fast(Lossy, DATA, ratios={"nothing": 0.5}), "'nothing' matches no"),
        (lambda: fast(Needs), "is a class that needs arguments .*: pass an object"),
        (lambda: fast(Net, DATA, callbacks=[Calls]), "callbacks has Calls, must be"),
        (lambda: fast(Net, DATA, callbacks=3), "callbacks has int, must be a list"),
        (lambda: fast(lambda: Net(nnx.Rngs(0)), DATA), "calling the model of <lambda>"),
        (lambda: fast(Net, ({"x": DATA[0][0]},) * 2), r"be a pair \(inputs, labels\)"),
        (lambda: fast(Net, ((DATA[0][0], -DATA[0][1]),) * 2), "have the label -1"),
        (lambda: fast(Net, ((DATA[0][0], 3 + DATA[0][1]),) * 2), "the label 4, but"),
        (lambda: fast(Net, ((DATA[0][0], DATA[0][0]),) * 2), "have float32 labels"),
        (
            lambda: fast(Net, ((DATA[0][0], DATA[0][1][:, None]),) * 2),
            r"returns \(8, 2\) for labels \(8, 1\)",
        ),
    ],
)
def test_what_is_wrong_is_named_before_training(call, message):
    with pytest.raises(TPPError, match=message):
        call()
