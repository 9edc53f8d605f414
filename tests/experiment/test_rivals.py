"""Every rival of TPP is a choice in the config, has its effect and resumes."""

import json

import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.end_to_end.runs import assert_same_end
from tests.experiment.test_errors import small_config
from tpp_jax.errors import TPPError
from tpp_jax.experiment import run
from tpp_jax.experiment.choosing import with_random_weights
from tpp_jax.experiment.measures import read_grams
from tpp_jax.experiment.methods import Stage
from tpp_jax.experiment.setup import make_setup
from tpp_jax.graph.naming import named_leaves
from tpp_jax.training import feeds

pytestmark = pytest.mark.usefixtures("sketches")

SHORT = {
    "eval_every": 6,
    "checkpoint_every": 5,
    "prune.ratios": "net.0:0.8,net.6:0.5",
    "prune.skip": "",
    "prune.rounds": 3,
    "prune.grow.granularity": 0.1,
    "prune.grow.every": 2,
    "prune.grow.ceiling": 0.4,
    "prune.grow.steps": 12,
}
GREG2 = ["grow", "regularize", "stabilize", "slice", "finetune"]
# Method → its phases except pretrain, and the batch at which it is killed.
METHODS = {
    "tpp": (GREG2[1:], 12),
    "oneshot": (["slice", "finetune"], 8),
    "extra": (["slice", "extra", "finetune"], 13),
    "scratch": (["slice", "finetune"], 8),
    "greg2": (GREG2, 7),
    "group_lasso": (["grow", "slice", "finetune"], 8),
    "iterative": (
        ["slice", "finetune", "slice_2", "finetune_2", "slice_3", "finetune_3"],
        7 + 6,
    ),
    "compensated": (["slice", "finetune"], 8),
    "compensated_tpp": (["refit", *GREG2[1:]], 7),
}


class Killed(BaseException):
    """An exception that nothing catches, so that nothing is saved."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folder of a trained network that all methods start from."""
    workdir = tmp_path_factory.mktemp("none")
    config = small_config(**SHORT, **{"prune.method": "none", "pretrain.epochs": 12})
    summary = run.train(config, workdir)
    return workdir / "dense", summary


@pytest.fixture(scope="module")
def finished(dense, tmp_path_factory):
    """Folder and summary of an undisturbed run, by method."""
    done = {}

    def of(method):
        if method not in done:
            workdir = tmp_path_factory.mktemp(method)
            done[method] = workdir, run.train(config_of(method, dense), workdir)
        return done[method]

    return of


def config_of(method, dense, **fields):
    every = 4 if method == "iterative" else 0
    given = {"init.model": str(dense[0]), "prune.method": method}
    return small_config(**{**SHORT, **given, "jacobian_every": every, **fields})


@pytest.mark.parametrize("method", METHODS)
def test_a_method_goes_through_its_phases_and_prunes_as_planned(finished, method):
    _, summary = finished(method)
    assert [phase["name"] for phase in summary["phases"]] == METHODS[method][0]
    layers = summary["layers"]
    assert layers["net.0"] == {"kept": 20, "total": 100}
    assert layers["net.6"] == {"kept": 50, "total": 100}
    assert layers["net.2"] == {"kept": 100, "total": 100}
    assert summary["last_accuracy"] == summary["pruned"]["accuracy"]
    assert summary["best_accuracy"] >= summary["last_accuracy"]
    rows = [
        row["test_accuracy"]
        for row in history(finished(method)[0])
        if row["phase"] == METHODS[method][0][-1] and "test_accuracy" in row
    ]
    # With one learning rate, its first stage is the entire fine-tuning.
    assert summary["trainability_accuracy"] == pytest.approx(np.mean(rows))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("method", list(METHODS)[2:])
def test_a_method_killed_in_its_own_phase_ends_as_if_it_had_not_been(
    finished, dense, tmp_path, monkeypatch, method
):
    batches, original = [], feeds.Resident.train_data

    def train_data(self, *args):
        batches.append(None)
        if len(batches) == METHODS[method][1]:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(feeds.Resident, "train_data", train_data)
        with pytest.raises(Killed):
            run.train(config_of(method, dense), tmp_path)
    run.train(config_of(method, dense), tmp_path)
    undisturbed, _ = finished(method)
    assert_same_end(tmp_path, undisturbed)
    grams = [read_grams(folder / "gram.npz") for folder in (tmp_path, undisturbed)]
    assert grams[0].keys() == grams[1].keys()
    for name in grams[0]:
        np.testing.assert_array_equal(*(gram[name] for gram in grams))


def history(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps(summary):
    return {phase["name"]: phase["steps"] for phase in summary["phases"]}


def test_none_trains_and_keeps_the_dense_network_alone(dense):
    folder, summary = dense
    assert [phase["name"] for phase in summary["phases"]] == ["pretrain"]
    assert summary["pruned"] is None and summary["best_accuracy"] is None
    assert summary["dense"]["accuracy"] == summary["phases"][0]["accuracy"]
    assert summary["speedup"] == 1 and summary["sparsity"] == 0
    assert not (folder.parent / "model").exists()


def test_extra_trains_the_small_network_for_as_many_steps_as_tpp(finished):
    tpp_steps, extra = (steps(finished(name)[1]) for name in ("tpp", "extra"))
    assert extra["extra"] == tpp_steps["regularize"] + tpp_steps["stabilize"] == 29
    assert extra["finetune"] == tpp_steps["finetune"] == 22


def test_extra_and_one_shot_cut_the_same_channels(finished):
    plans = [
        tpp.load_model_info(finished(name)[0] / "model")["plan"]
        for name in ("oneshot", "extra", "tpp")
    ]
    assert plans[0] == plans[1] == plans[2]
    one_shot, cut = finished("oneshot")[1], finished("oneshot")[1]["phases"][0]
    assert cut["accuracy_before"] == one_shot["dense"]["accuracy"]
    assert cut["accuracy_after"] == one_shot["one_shot"]["accuracy_after"]


def test_scratch_starts_from_weights_of_its_own_width(dense):
    config = config_of("scratch", dense, **{"finetune.epochs": 0})
    setup = make_setup(config)
    small = tpp.prune(setup.model, setup.plan)
    fresh = with_random_weights(small, Stage("slice").key(0))
    ours = named_leaves(nnx.state(fresh))
    theirs = named_leaves(nnx.state(small))
    for name, leaf in ours.items():
        assert leaf.shape == theirs[name].shape and leaf.dtype == theirs[name].dtype
        assert not np.any(leaf == theirs[name])
    # U(±1/√fan_in): 20 inputs instead of 100.
    kernel = np.asarray(ours["net.2.kernel"])
    assert kernel.shape == (20, 100)
    assert 0.95 * 20**-0.5 < np.abs(kernel).max() <= 20**-0.5
    assert np.abs(ours["net.2.bias"]).max() <= 20**-0.5
    again = with_random_weights(small, Stage("slice").key(1))
    assert not np.any(
        named_leaves(nnx.state(again))["net.0.kernel"] == ours["net.0.kernel"]
    )


def test_iterative_pruning_takes_a_share_of_what_is_left_in_every_round(finished):
    workdir, summary = finished("iterative")
    assert steps(summary)["finetune"] == 22 // 3
    plan = tpp.load_model_info(workdir / "model")["plan"]
    assert (len(plan["net.0"]), len(plan["net.6"]), len(plan["net.2"])) == (20, 50, 100)
    assert plan["net.0"] == sorted(set(plan["net.0"])) and max(plan["net.0"]) < 100
    # Each cut and each end of a phase reports a Jacobian.
    for phase in summary["phases"]:
        assert sum(phase["jacobian"]["counts"]) == 16 * 10
        assert len(phase["jacobian"]["edges"]) == 51
    rows = [row for row in history(workdir) if "jsv_mean" in row]
    assert [row["step"] for row in rows] == [4, 7, 11, 14, 18, 21]
    assert rows[-1]["jsv_mean"] == summary["phases"][-1]["jacobian"]["mean"]
    assert all(r["jsv_min"] <= r["jsv_mean"] <= r["jsv_max"] for r in rows)


def test_greg2_chooses_by_the_weights_that_all_shrank(finished):
    rows = [row for row in history(finished("greg2")[0]) if row["phase"] == "grow"]
    grown = [row["strength"] for row in rows if "loss" in row]
    np.testing.assert_allclose(grown, [0.2, 0.3], rtol=1e-6)  # after 5 and 8 steps


def test_group_lasso_logs_its_penalty_which_falls(finished):
    rows = history(finished("group_lasso")[0])
    found = [row["group_lasso"] for row in rows if "group_lasso" in row]
    assert len(found) == 3 and sorted(found, reverse=True) == found


def test_tpp_logs_the_norm_of_what_it_prunes_and_keeps_gram_matrices(finished):
    workdir, _ = finished("tpp")
    norms = [row["pruned_norm"] for row in history(workdir) if "pruned_norm" in row]
    assert norms[0] > 1 and norms[-1] == 0
    gram = np.load(workdir / "gram.npz")
    assert str(gram["layer"]) == "net.0" and gram["pruned"].sum() == 80
    chosen, regularized = gram["chosen"], gram["regularized"]
    assert chosen.shape == (100, 100) and chosen.dtype == np.float32
    assert np.diag(chosen).mean() == pytest.approx(1)
    assert not regularized[gram["pruned"]].any()
    kept = ~gram["pruned"]
    np.testing.assert_array_equal(regularized[kept][:, kept], gram["cut"])


def test_the_layer_of_the_report_must_be_one_that_is_pruned(dense):
    config = config_of("tpp", dense, report_layer="net.2")
    with pytest.raises(
        TPPError, match=r"'net.2', but the layers with pruned filters are net.0, net.6"
    ):
        make_setup(config)


@pytest.mark.usefixtures("no_pictures")
def test_kernels_made_anew_by_orthp_give_a_linear_network_singular_values_of_one(
    dense, tmp_path
):
    # Decreasing widths, since a bottleneck has no isometry.
    fields = {"prune.ratios": "*net*:0.5", "prune.skip": "net.12"}
    fields |= {"prune.reinitialize": "orthp", "jacobian_every": 50}
    fields |= {"finetune.epochs": 0}
    summary = run.train(config_of("oneshot", dense, **fields), tmp_path)
    cut = summary["phases"][0]
    assert cut["jacobian"]["min"] == pytest.approx(1, abs=1e-4)
    assert cut["jacobian"]["max"] == pytest.approx(1, abs=1e-4)
    assert cut["jacobian"]["condition"] == pytest.approx(1, abs=1e-4)
    assert cut["accuracy"] != cut["accuracy_after"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kind", ["kernel", "convolution"])
def test_a_penalty_while_fine_tuning_makes_kernels_more_orthogonal(
    dense, tmp_path, kind
):
    fields = {"finetune.orthogonality": kind, "finetune.orthogonality_weight": 1.0}
    fields["prune.ratios"] = "net.0:0.8"
    run.train(config_of("oneshot", dense, **fields), tmp_path)
    found = [row["orthogonality"] for row in history(tmp_path) if "loss" in row]
    assert len(found) == 5 and sorted(found, reverse=True) == found
