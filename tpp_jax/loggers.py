"""Callbacks that log a run to Weights & Biases or to MLflow.

    python launch.py --config=… --workdir=… --config.callbacks=tpp_jax.loggers:Wandb

or, from Python, ``tpp.fit(…, callbacks=[Wandb(project="pruning")])``. The package that
a logger writes to is imported when the logger is made.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from flax import nnx
from flax.traverse_util import flatten_dict

from tpp_jax.callbacks import Callback
from tpp_jax.errors import require


class Wandb(Callback):
    """Logs metrics to a run of Weights & Biases.

    Args:
      config: Config of the run, which is logged too; None for none.
      **settings: Arguments of ``wandb.init``, unless a run of it is active.
    """

    def __init__(self, config: Any = None, **settings: Any) -> None:
        require("loggers", "wandb")
        wandb = importlib.import_module("wandb")
        if config is not None:
            settings = {"config": dataclasses.asdict(config), **settings}
        self.run: Any = wandb.run or wandb.init(**settings)

    def on_step(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Logs metrics at a step of the run."""
        self.run.log({**metrics, "phase": phase}, step=step)

    def on_phase(
        self, phase: str, model: nnx.Module, result: Mapping[str, Any]
    ) -> None:
        """Writes the numbers of a phase to the summary."""
        del model
        self.run.summary.update(_numbers(phase, result))


class MLflow(Callback):
    """Logs metrics to a run of MLflow.

    Args:
      config: Config of the run, whose fields are logged as parameters; None for none.
      **settings: Arguments of ``mlflow.start_run``, unless a run of it is active.
    """

    def __init__(self, config: Any = None, **settings: Any) -> None:
        require("loggers", "mlflow")
        mlflow = importlib.import_module("mlflow")
        self._log = mlflow
        if mlflow.active_run() is None:
            mlflow.start_run(**settings)
        if config is not None:
            fields = flatten_dict(dataclasses.asdict(config), sep=".")
            mlflow.log_params(fields)

    def on_step(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Logs metrics at a step of the run."""
        del phase
        self._log.log_metrics(dict(metrics), step=step)

    def on_phase(
        self, phase: str, model: nnx.Module, result: Mapping[str, Any]
    ) -> None:
        """Logs the numbers of a phase, as metrics named ``phase/number``."""
        del model
        self._log.log_metrics(_numbers(phase, result))


def _numbers(phase: str, result: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{phase}/{name}": float(value)
        for name, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
