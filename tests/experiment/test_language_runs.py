"""Runs of language modelling: resumed, on two devices, and several at once."""

import functools

import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.end_to_end.runs import history_of, summary_of
from tests.experiment.test_errors import small_config
from tests.experiment.test_reliability import stop_at
from tests.training.test_language import BATCH, LENGTH, TEXT, VOCABULARY
from tpp_jax.experiment import run
from tpp_jax.graph.naming import named_leaves
from tpp_jax.saving import load_model
from tpp_jax.training.language import LanguageModelling

pytestmark = pytest.mark.usefixtures("no_pictures")

SIZES = {"width": 8, "depth": 1, "heads": 2, "kv_heads": 1, "hidden": 12}


def task(config):
    network = functools.partial(
        tpp.models.small_decoder, vocabulary=VOCABULARY, **SIZES
    )
    return LanguageModelling(TEXT, network, LENGTH, config.data.batch_size)


def config_of(**fields):
    own = {"task.name": f"{__name__}:task", "data.batch_size": BATCH}
    ratios = {"prune.ratios": "*mlp.gate_proj:0.5", "prune.skip": ""}
    adamw = {
        f"{phase}.{name}": value
        for phase in ("pretrain", "finetune")
        for name, value in (("optimizer", "adamw"), ("learning_rate", "0.01"))
    }
    return small_config(**own, **ratios, **adamw, **fields)


def arrays_of(workdir):
    model = load_model(workdir / "model", task(config_of()).model(nnx.Rngs(0)))
    return named_leaves(nnx.state(model))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    run.train(config_of(), workdir)
    return workdir


def test_a_run_prunes_a_language_model_and_reports_its_perplexity(alone):
    summary = summary_of(alone)
    assert summary["headline"]["name"] == "perplexity"
    assert summary["pruned"]["perplexity"] < 0.9 * VOCABULARY
    assert summary["pruned"]["params"] < summary["dense"]["params"]
    assert arrays_of(alone)["layers.0.mlp.up_proj.kernel"].shape == (8, 6)
    names = {name for row in history_of(alone) for name in row}
    assert {"perplexity", "test_perplexity", "test_bits_per_byte"} <= names


def test_a_stopped_run_ends_with_the_same_bits(alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 20)
        with pytest.raises(SystemExit):
            run.train(config_of(), tmp_path)
    run.train(config_of(), tmp_path)
    for name, array in arrays_of(alone).items():
        np.testing.assert_array_equal(arrays_of(tmp_path)[name], array, err_msg=name)
    assert history_of(tmp_path) == history_of(alone)


def test_runs_on_two_devices_at_once_are_those_of_one(alone, tmp_path):
    configs = [config_of(seed=seed, num_devices=2) for seed in (0, 1)]
    folders = [tmp_path / str(seed) for seed in (0, 1)]
    ends = run.train_together(configs, folders)
    assert [end["status"] for end in ends] == ["done"] * 2
    for name, array in arrays_of(alone).items():
        found = arrays_of(folders[0])[name]
        np.testing.assert_allclose(found, array, 1e-3, 1e-4, err_msg=name)
    assert ends[1]["pruned"]["perplexity"] != ends[0]["pruned"]["perplexity"]
