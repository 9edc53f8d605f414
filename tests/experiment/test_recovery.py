"""Repair at the cut and distillation, in runs of a small residual network."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.end_to_end.runs import arrays_of, assert_same_end, history_of, summary_of
from tests.experiment.test_errors import small_config
from tests.experiment.test_lockstep import assert_alike, counting
from tests.experiment.test_reliability import stop_at
from tpp_jax.errors import TPPError
from tpp_jax.experiment import planning, run
from tpp_jax.experiment.refitting import calibration_inputs, written_back
from tpp_jax.experiment.setup import make_setup
from tpp_jax.reports.tables import scores
from tpp_jax.training.classification import ImageClassification

pytestmark = pytest.mark.usefixtures("sketches")

RESNET = {
    "model.name": "cifar_resnet8",
    "data.batch_size": 256,  # five steps per epoch
    "pretrain.epochs": 8,
    "pretrain.learning_rate": "0.05",
    "finetune.distillation.weight": 0.5,
    "finetune.distillation.activations": "*layer*.conv2",
    "prune.method": "compensated_tpp",
    "prune.ratios": "*layer*.conv1:0.6",
    "prune.skip": "",
    "prune.schedule.granularity": 0.5,
    "prune.schedule.stabilize": 12,
    "prune.calibration_examples": 700,
}
PRETRAINED = 40
REGULARIZED = PRETRAINED + 4 + 13


def resnet_config(**fields):
    return small_config(**{**RESNET, **fields})


@pytest.fixture(scope="module")
def refit(tmp_path_factory):
    """Folder of a run with a refit network as the start of TPP, and a teacher."""
    workdir = tmp_path_factory.mktemp("refit")
    run.train(resnet_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def cut(refit, tmp_path_factory):
    """Folder of a run that starts from the same network and cuts at once."""
    workdir = tmp_path_factory.mktemp("cut")
    given = {"init.model": str(refit / "dense"), "prune.method": "compensated"}
    run.train(resnet_config(**given, **{"finetune.epochs": 0}), workdir)
    return workdir


# While TPP regularizes, when the teacher only waits, and while it teaches.
@pytest.mark.parametrize("step", [PRETRAINED + 3, REGULARIZED + 2])
def test_a_run_that_distils_ends_with_the_same_bits_if_it_is_stopped(
    tmp_path, monkeypatch, refit, step
):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(SystemExit):
            run.train(resnet_config(), tmp_path)
    run.train(resnet_config(), tmp_path)
    assert_same_end(tmp_path, refit)


def test_the_distance_to_the_teacher_is_recorded(refit):
    rows = [row for row in history_of(refit) if "loss" in row]
    taught = {row["phase"] for row in rows if "distillation" in row}
    assert taught == {"finetune"}
    assert [row["distillation"] for row in rows if row["phase"] == "finetune"] > [0]
    assert (
        0 < next(row["activations"] for row in rows if row["phase"] == "finetune") < 1
    )


def test_a_refit_network_scores_as_the_pruned_one_does(refit, cut):
    phases = {phase["name"]: phase for phase in summary_of(refit)["phases"]}
    assert list(phases) == [
        *("pretrain", "refit", "regularize", "stabilize", "slice", "finetune")
    ]
    [repaired, _] = summary_of(cut)["phases"]
    assert phases["refit"]["accuracy"] == repaired["accuracy"]
    assert phases["slice"]["accuracy_before"] == phases["slice"]["accuracy_after"]


def test_a_repair_is_recorded_step_by_step_and_saves_what_a_cut_loses(cut):
    summary = summary_of(cut)
    [repaired, finetune] = summary["phases"]
    assert repaired["accuracy_after"] == summary["one_shot"]["accuracy_after"]
    assert repaired["accuracy_compensated"] > repaired["accuracy_after"] + 20
    assert repaired["accuracy"] == repaired["accuracy_recalibrated"]
    assert repaired["accuracy"] > repaired["accuracy_after"] + 20
    assert finetune["accuracy"] == repaired["accuracy"]  # no steps
    assert [name for name, _ in scores(summary)] == [
        *("dense", "cut at once (one-shot)", "layers behind the cut refit"),
        *("batch statistics measured again", "fine-tuned"),
    ]
    page = (cut / "report.html").read_text()
    assert "layers behind the cut refit" in page


def test_a_repaired_network_is_what_the_library_returns(refit, cut):
    dense = tpp.load_model(refit / "dense")
    config = resnet_config()
    setup = make_setup(config)
    plan = tpp.Plan.from_dict(tpp.load_model_info(cut / "model")["plan"], setup.groups)
    inputs = list(calibration_inputs(setup.task("criteria"), 700, config.seed))
    assert sum(len(x) for (x,) in inputs) == 700
    small = tpp.compensate(dense, plan, inputs)
    small = tpp.recalibrate(small, inputs, like=dense, plan=plan)
    ours = arrays_of(cut)
    for name, array in tpp.graph.naming.named_leaves(nnx.state(small)).items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    # Written back into the unpruned shape, it computes the same.
    wide = written_back(dense, plan, small)
    assert wide.layer1[0].conv1.kernel.shape == dense.layer1[0].conv1.kernel.shape
    wide.eval()
    small.eval()
    x = jnp.asarray(inputs[0][0][:32])
    np.testing.assert_allclose(wide(x), small(x), rtol=1e-4, atol=1e-4)


MLP = {
    "steps_per_dispatch": 5,
    "pretrain.epochs": 0,
    "prune.method": "compensated",
    "finetune.distillation.weight": 0.5,
}


@pytest.fixture(scope="module")
def singly(tmp_path_factory):
    """Folders of runs of two seeds without batch norms."""
    folders = [tmp_path_factory.mktemp("singly") / str(seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        run.train(small_config(**MLP, seed=seed), folder)
    return folders


def test_two_devices_repair_and_distil_like_one(tmp_path, singly):
    run.train(small_config(**{**MLP, "num_devices": 2}), tmp_path)
    for one, two in zip(*map(history_of, (singly[0], tmp_path)), strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() & {"loss", "distillation", "test_loss"}:
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6)


def test_seeds_that_distil_advance_together(tmp_path, monkeypatch, singly):
    configs = [small_config(**MLP, seed=seed) for seed in (0, 1)]
    folders, sizes = [tmp_path / str(i) for i in (0, 1)], counting(monkeypatch)
    ends = run.train_together(configs, folders)
    assert [end["status"] for end in ends] == ["done"] * 2 and set(sizes) == {2}
    for folder, other in zip(folders, singly, strict=True):
        assert_alike(folder, other)


def test_a_network_without_batch_norms_has_nothing_to_measure_again(singly):
    pretrain, repaired, _ = summary_of(singly[0])["phases"]
    assert pretrain["steps"] == 0 and "accuracy_recalibrated" not in repaired
    assert repaired["accuracy"] == repaired["accuracy_compensated"]


def test_nothing_is_distilled_without_weight():
    assert make_setup(small_config(**MLP)).distils("finetune")
    fields = {**MLP, "finetune.distillation.weight": 0.0}
    assert not make_setup(small_config(**fields)).distils("finetune")


def test_activations_alone_may_be_distilled_if_their_layers_keep_all_channels():
    fields = {**MLP, "finetune.distillation.weight": 0.0}
    name = "finetune.distillation.activations"
    assert make_setup(small_config(**fields, **{name: "net.12"})).distils("finetune")
    with pytest.raises(TPPError, match=r"outputs of net\.0 .*keep all channels"):
        make_setup(small_config(**fields, **{name: "net.0"}))


def test_moments_for_criteria_are_those_of_the_calibration_examples():
    config = small_config(
        **{"prune.criterion": "wanda", "prune.calibration_examples": 90}
    )
    task = ImageClassification(tpp.data.load("digits"), "mlp7_linear", batch_size=64)
    model = task.model(nnx.Rngs(0))
    groups = tpp.channel_groups(model, *task.example_inputs())
    plan = planning.plan_for(config.prune, groups, model, config.seed, task)
    first, second, *_ = (task.inputs(x)[0] for x in task.samples(config.seed))
    moments = tpp.input_moments(model, [first, second[:26]])
    fields = {"skip": "net.12", "criterion": "wanda", "statistics": moments}
    expected = tpp.make_plan(groups, model, config.prune.ratios, **fields)
    assert plan.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"method": "scratch", "compensate": True},
            "compensate is set, but the method",
        ),
        ({"method": "scratch", "recalibrate": True}, "starts from random weights"),
        (
            {"method": "compensated", "reinitialize": "orthp"},
            r"reinitialize='orthp' replaces .* config.prune.method='compensated' fits",
        ),
        ({"method": "scratch"}, "a teacher, but the method 'scratch' has no dense"),
    ],
    ids=str,
)
def test_a_repair_or_a_teacher_without_use_is_refused(fields, message):
    config = small_config(**{"finetune.distillation.weight": 0.5})
    config.prune.update(fields)
    with pytest.raises(TPPError, match=message):
        make_setup(config)
