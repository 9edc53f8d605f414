"""Every mistake stops a run early, with one message that names it and a fix."""

import json

import jax.numpy as jnp
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.errors import TPPError
from tpp_jax.experiment import run
from tpp_jax.experiment.config import default_config
from tpp_jax.experiment.setup import make_setup


def small_config(**fields):
    """Returns a config that trains a small network briefly, with some other fields."""
    config = default_config()
    values = {
        "model.name": "mlp7_linear",
        "data.name": "digits",
        "data.batch_size": 64,
        "data.crop_padding": 0,
        "data.flip": False,
        "pretrain.epochs": 2,
        "pretrain.learning_rate": "0.01",
        "prune.ratios": "*net*:0.5",
        "prune.skip": "net.12",
        "prune.schedule.granularity": 0.25,
        "prune.schedule.every": 2,
        "prune.schedule.stabilize": 20,
        "prune.schedule.zero_out_every": 2,
        "finetune.epochs": 1,
        "finetune.learning_rate": "0.01",
        "log_every": 5,
        "checkpoint_every": 20,
        "num_devices": 1,  # eight, simulated, take twice the time
        **fields,
    }
    for name, value in values.items():
        config.update_from_flattened_dict({name: value})
    return config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prune.ratios", "*conv*:0.5", "'\\*conv\\*' matches no layer"),
        ("prune.ratios", "net.0:1.0", "1.0 of 'net.0' is not in \\[0, 1\\)"),
        ("prune.ratios", "net.0:-0.1", "-0.1 of 'net.0' is not in \\[0, 1\\)"),
        ("prune.ratios", "net.12:0.5", "net.12, which cannot be pruned"),
        ("prune.ratios", "net.0", "write pattern:ratio"),
        ("prune.ratios", "*net*:0.0", "prunes nothing"),
        ("prune.skip", "conv1", "'conv1' matches no layer"),
        ("prune.criterion", "magic", "unknown criterion 'magic'"),
        ("prune.scope", "all", "unknown config.prune.scope 'all'"),
        ("prune.schedule.kind", "poly2", "needs regularize_steps"),
        ("prune.schedule.kind", "sine", "unknown schedule 'sine'"),
        ("prune.schedule.every", 0, "every is 0"),
        ("prune.schedule.stabilize", 3, "needs at least 12 steps"),
        ("model.name", "mlp7", "mlp7_relu"),
        ("data.name", "cifar11", "cifar10"),
        ("data.dir", "/nowhere", None),
        ("data.batch_size", 62, "56 or 64"),
        ("data.batch_size", 2000, "1437 training images"),
        ("num_devices", 99, "only"),
        ("log_every", 0, "must be at least 1"),
        ("pretrain.learning_rate", "quick", "cannot read the learning rate"),
        ("finetune.schedule", "sine", "unknown config.finetune.schedule 'sine'"),
        ("finetune.warmup_epochs", 1.5, "warmup_epochs is 1.5, but the learning rate"),
        ("init.model", "/nowhere/dense", "no saved model at /nowhere/dense"),
    ],
)
def test_a_wrong_field_is_named_before_any_training(tmp_path, field, value, message):
    config = small_config(**{"num_devices": 8, field: value})
    if message is None:  # the digits need no folder
        config.data.name = "mnist"
        message = "folder /nowhere does not exist"
    with pytest.raises(TPPError, match=message):
        run.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_field_and_a_missing_field_are_named():
    config = small_config()
    with config.unlocked():
        config.prune.ratoi = "x"
    with pytest.raises(TPPError, match=r"unknown field prune.ratoi.*prune.ratio"):
        make_setup(config)
    config = small_config()
    with config.unlocked():
        del config.prune.scope
    with pytest.raises(TPPError, match=r"no field prune.scope"):
        make_setup(config)


def test_a_dense_network_of_another_architecture_is_refused(tmp_path):
    model = tpp.models.create("mlp7_relu", image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    tpp.save_model(tmp_path / "dense", model)
    config = small_config(**{"init.model": str(tmp_path / "dense")})
    with pytest.raises(TPPError, match=r"is a mlp7_relu .* the config needs"):
        make_setup(config)


@pytest.mark.usefixtures("no_pictures")
def test_a_run_can_start_from_a_trained_network(tmp_path):
    first = run.train(small_config(), tmp_path / "first")
    config = small_config(**{"init.model": str(tmp_path / "first" / "dense")})
    second = run.train(config, tmp_path / "second")
    names = [phase["name"] for phase in second["phases"]]
    assert names == ["regularize", "stabilize", "slice", "finetune"]
    assert second["dense"]["accuracy"] == first["dense"]["accuracy"]
    weights = tmp_path / "dense.safetensors"
    tpp.save_torch(tpp.load_model(tmp_path / "first" / "dense"), weights)
    third = run.train(small_config(**{"init.torch": str(weights)}), tmp_path / "third")
    assert third["dense"] == second["dense"] and third["pruned"] == second["pruned"]


def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(tmp_path):
    config = small_config(**{"finetune.learning_rate": "1e6", "finetune.epochs": 20})
    with pytest.raises(TPPError, match=r"no longer finite at step \d+ of finetune"):
        run.train(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    rows = [
        json.loads(s) for s in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert {row["phase"] for row in rows} >= {"pretrain", "regularize", "stabilize"}
    dense = tpp.load_model(tmp_path / "dense")
    assert jnp.isfinite(dense(jnp.ones((1, 8, 8, 1)))).all()
