"""Metrics in Weights & Biases and in MLflow, offline."""

import time

import pytest

from tests.experiment.test_errors import small_config
from tpp_jax import loggers
from tpp_jax.experiment import run

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_run_is_logged_to_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    config = small_config(callbacks="tpp_jax.loggers:MLflow")
    summary = run.train(config, tmp_path / "run")
    logged = mlflow.active_run().info.run_id
    mlflow.end_run()
    found = mlflow.get_run(logged).data
    assert found.params["prune.ratios"] == "*net*:0.5"
    assert found.metrics["finetune/score"] == pytest.approx(summary["last_accuracy"])
    history = mlflow.MlflowClient().get_metric_history(logged, "test_accuracy")
    assert history[-1].value == pytest.approx(summary["last_accuracy"])


def test_a_run_is_logged_to_weights_and_biases(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = loggers.Wandb(dir=str(tmp_path), project="pruning")
    logger.on_step(3, "pretrain", {"loss": 0.5})
    logger.on_phase("slice", None, {"score": 97.5, "phase": "slice", "steps": 0})
    assert dict(logger.run.summary)["slice/score"] == 97.5
    assert wandb.run is logger.run
    logger.run.finish()
    [record] = tmp_path.rglob("*.wandb")
    # A process of wandb's own writes it, on a busy machine a while later.
    end = time.monotonic() + 60
    while b"slice/score" not in record.read_bytes() and time.monotonic() < end:
        time.sleep(0.1)
    assert b"slice/score" in record.read_bytes()
