"""Measurements during a run: on which images, in which stage, of which layer."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.experiment.test_errors import small_config
from tests.reference import filled
from tpp_jax.errors import TPPError
from tpp_jax.experiment import measures
from tpp_jax.experiment.choosing import counts_of_round
from tpp_jax.experiment.config import FIELDS
from tpp_jax.experiment.methods import METHODS, Stage, stages_of
from tpp_jax.experiment.phases import Phase, training_phase
from tpp_jax.experiment.sections import METHOD_NAMES
from tpp_jax.experiment.setup import make_setup
from tpp_jax.training.classification import ImageClassification


@pytest.mark.parametrize("method", METHODS)
def test_stages_have_names_and_random_numbers_of_their_own(method):
    stages = stages_of(method, rounds=4)
    assert len({stage.name for stage in stages}) == len(stages)
    keys = [tuple(jax.random.key_data(stage.key(0)).tolist()) for stage in stages]
    assert len(set(keys)) == len(keys)
    given = stages_of(method, rounds=4, given=True)
    assert [s for s in stages if s.kind != "pretrain"] == list(given)


def test_the_phases_that_were_there_first_draw_what_they_always_drew():
    names = ("pretrain", "regularize", "stabilize", "slice", "finetune")
    for place, name in enumerate(names):
        expected = jax.random.fold_in(jax.random.key(3), place)
        assert jax.random.key_data(Stage(name).key(3)).tolist() == (
            jax.random.key_data(expected).tolist()
        )


def test_other_kinds_of_stages_draw_by_their_names():
    expected = jax.random.fold_in(jax.random.key(3), zlib.crc32(b"distil"))
    assert jax.random.key_data(Stage("distil").key(3)).tolist() == (
        jax.random.key_data(expected).tolist()
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_stage_of_a_method_that_trains_has_a_phase(method):
    setup = make_setup(small_config(**{"prune.method": method, "prune.rounds": 2}))
    kinds = {stage.kind for stage in setup.stages}
    assert (
        kinds - {"dense", "choose", "refit", "slice"} <= setup.phases(setup.plan).keys()
    )
    assert set(METHODS[method].repeated.split()) <= set(METHODS[method].stages.split())


def test_the_config_lists_the_methods():
    assert FIELDS["prune.method"].choices == METHOD_NAMES == tuple(METHODS)


@pytest.mark.parametrize(("n", "k"), [(100, 10), (16, 1), (512, 51), (7, 7)])
def test_rounds_take_the_same_share_each_and_end_at_the_goal(n, k):
    left = [counts_of_round({"a": n}, {"a": k}, r / 5)["a"] for r in range(1, 6)]
    assert left[-1] == k and sorted(left, reverse=True) == left
    exact = n * (k / n) ** (np.arange(1, 6) / 5)
    assert np.abs(left - exact).max() <= 0.5


def test_every_round_goes_through_the_whole_learning_rate():
    fields = small_config(**{"finetune.epochs": 12}).finetune
    fields.learning_rate = "0:0.1,6:0.01,9:0.001"
    whole, third = (training_phase("finetune", fields, 7, rounds=r) for r in (1, 3))
    assert (whole.steps, third.steps) == (84, 28)
    for step in range(28):
        assert float(third.learning_rate(step)) == float(whole.learning_rate(3 * step))


ROWS = [
    {"phase": "pretrain", "step": 100, "test_accuracy": 1.0},
    {"phase": "finetune", "step": 110, "test_accuracy": 50.0},
    {"phase": "finetune", "step": 115, "loss": 1.0},
    {"phase": "finetune", "step": 120, "test_accuracy": 60.0},
    {"phase": "finetune", "step": 121, "test_accuracy": 90.0},
]


@pytest.mark.parametrize(
    ("epochs", "rate", "expected"),
    [
        (4, "0:0.1,2:0.01", 55.0),  # ten steps per epoch: until step 120 of the run
        (4, "0.1", 200 / 3),
        (4, "0:0.1,0.5:0.01", None),
        (0, "0.1", None),
    ],
)
def test_trainability_is_the_mean_accuracy_at_the_first_learning_rate(
    epochs, rate, expected
):
    fields = small_config(**{"finetune.epochs": epochs}).finetune
    fields.learning_rate = rate
    phase = training_phase("finetune", fields, 10)
    rows = ROWS if epochs else ROWS[:1]
    found = measures.trainability_score(rows, "finetune", 100, phase, "step")
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_rate_that_falls_steadily_has_no_first_stage():
    rate = optax.cosine_decay_schedule(0.1, 40)
    phase = Phase("finetune", 40, optax.sgd(rate), rate, section="finetune")
    args = ROWS, "finetune", 100, phase, "cosine"
    assert measures.trainability_score(*args) is None


def meter_of(dataset, number):
    task = ImageClassification(dataset)
    return measures.JacobianMeter(*task.inputs(task.probes(number)))


def test_the_jacobian_is_measured_on_the_first_test_images_normalised():
    dataset = tpp.data.load("digits", pad_to=32)
    model = filled(lambda: tpp.models.create("lenet5", rngs=nnx.Rngs(0)))
    found = meter_of(dataset, 3)(model)
    images = dataset.test_images[:3] / 255
    images = (images - np.array(dataset.mean)) / np.array(dataset.std)
    values = tpp.jacobian_singular_values(model, jnp.asarray(images, jnp.float32))
    values = np.asarray(values, np.float64)
    for name in ("mean", "std", "min", "max"):
        assert found[name] == pytest.approx(getattr(values, name)(), rel=1e-4)
    condition = np.mean(values.max(axis=1) / values.min(axis=1))
    assert found["condition"] == pytest.approx(condition, rel=1e-3)
    assert sum(found["counts"]) == values.size == 30
    assert found["edges"][0] == found["min"] and found["edges"][-1] == found["max"]
    assert measures.jacobian_scalars(found)["jsv_mean"] == found["mean"]


def test_a_network_that_ignores_its_input_has_no_condition_number():
    dataset = tpp.data.load("digits", pad_to=32)
    model = tpp.models.create("lenet5", rngs=nnx.Rngs(0))
    model.fc5.kernel.set_value(jnp.zeros_like(model.fc5.kernel[...]))
    found = meter_of(dataset, 2)(model)
    assert (found["mean"], found["max"], found["condition"]) == (0, 0, None)
    assert "jsv_condition" not in measures.jacobian_scalars(found)


def test_the_norm_of_what_is_pruned_and_the_gram_matrix_of_a_layer(tmp_path):
    model = tpp.models.create("lenet5", rngs=nnx.Rngs(0))
    groups = tpp.channel_groups(model, jax.ShapeDtypeStruct((1, 32, 32, 1), "float32"))
    plan = tpp.make_plan(groups, model, "conv2:0.5,fc4:0.9")
    pruned = [
        np.asarray(layer.kernel[...])[..., plan.pruned(name)]
        for name, layer in (("conv2", model.conv2), ("fc4", model.fc4))
    ]
    expected = np.sqrt(sum(np.sum(np.square(x)) for x in pruned))
    norm = measures.pruned_norm(plan, nnx.state(model, nnx.Param))
    assert float(norm) == pytest.approx(expected, rel=1e-5)

    file, member = tmp_path / "gram.npz", measures.report_layer("fc4", plan)
    file.write_text("a truncated file")  # a kill may leave one
    measures.save_gram(file, "chosen", model, member, plan)
    measures.save_gram(file, "cut", tpp.prune(model, plan), member, plan)
    saved = np.load(file)
    w = np.asarray(model.fc4.kernel[...], np.float64).T
    scale = np.mean(np.sum(w**2, axis=1))
    np.testing.assert_allclose(saved["chosen"], w @ w.T / scale, rtol=1e-5, atol=1e-6)
    assert saved["cut"].shape == (8, 8) and saved["pruned"].sum() == 76
    assert np.flatnonzero(saved["pruned"]).tolist() == plan.pruned("fc4").tolist()
    # It has another scale, since its inputs were cut too.
    assert np.diag(saved["cut"]).max() < 1.2


@pytest.mark.parametrize(
    ("inputs", "types"),
    [
        ((np.ones((2, 3)), np.ones((2, 3))), "float64, float64"),
        ((np.ones((2, 3), int),), "int64"),
        (({"x": np.ones((2, 3))},), "dict"),
    ],
)
def test_jacobians_need_one_array_of_real_numbers(inputs, types):
    with pytest.raises(TPPError, match=f"inputs of the network are {types}: its"):
        measures.JacobianMeter(*inputs)


def test_a_network_without_a_jacobian_is_found_before_training():
    class Two(nnx.Module):
        def __call__(self, x):
            return x, x

    meter = measures.JacobianMeter(np.ones((2, 3), "float32"))
    meter.check(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(TPPError, match="jacobian_every is set, but the model returns"):
        meter.check(Two())
