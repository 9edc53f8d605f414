"""Metrics of a finished run's pruned network: --mode=evaluate."""

import dataclasses
import pathlib
from typing import Any

import jax

from tpp_jax.errors import TPPError
from tpp_jax.experiment.fields import build
from tpp_jax.experiment.sections import DataConfig, ModelConfig
from tpp_jax.experiment.tasks import make_task, open_data
from tpp_jax.pruning.flops import count
from tpp_jax.saving import load_model, load_model_info
from tpp_jax.training.evaluation import Evaluator
from tpp_jax.training.step import StepConfig
from tpp_jax.training.structure import split


def evaluate(workdir: str | pathlib.Path, data_dir: str = "") -> dict[str, Any]:
    """Measures the pruned network of a finished run again.

    Args:
      workdir: Folder of the run, of which only ``model/`` is needed.
      data_dir: Folder of the data; "" if they have not moved.

    Returns:
      The metrics that the run's task reports (``accuracy`` in percent and ``loss`` for
      image classification), ``params`` and ``flops``.

    Raises:
      TPPError: The run is not finished, or its model cannot be read.
    """
    folder = pathlib.Path(workdir) / "model"
    if not folder.is_dir():
        raise TPPError(
            f"there is no finished run in {workdir}: it has no folder 'model'. Run "
            "launch.py with this --workdir and the config of the run to finish it"
        )
    config = load_model_info(folder)["config"]
    if "data" not in config:
        raise TPPError(
            f"{folder} does not name its data: it is not from a finished run"
        )
    model = load_model(folder)
    # Runs of earlier versions lack the newest fields.
    network = build(ModelConfig, dataclasses.asdict(ModelConfig()) | config["model"])
    settings = build(DataConfig, dataclasses.asdict(DataConfig()) | config["data"])
    if data_dir:
        settings = dataclasses.replace(settings, dir=data_dir)
    task = make_task(network, settings, open_data(settings))
    devices = jax.local_devices()
    evaluator = Evaluator(task, task.feed(devices), StepConfig(network.dtype), devices)
    params, stats = split(model)
    size = count(model, *task.example_inputs())
    return {
        **evaluator(model, params, stats),
        "params": size.params,
        "flops": size.flops,
    }
