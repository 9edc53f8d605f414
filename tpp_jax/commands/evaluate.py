"""Metrics of a finished run's pruned network: --mode=evaluate."""

import dataclasses
import pathlib
from typing import Any

import jax
from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.experiment.config import RunConfig, with_defaults
from tpp_jax.experiment.fields import Tree, build
from tpp_jax.experiment.own import check_known
from tpp_jax.experiment.setup import start_of
from tpp_jax.experiment.tasks import make_task
from tpp_jax.pruning.flops import count
from tpp_jax.saving import load_model, load_model_info
from tpp_jax.training.evaluation import Evaluator
from tpp_jax.training.step import StepConfig
from tpp_jax.training.structure import split
from tpp_jax.training.task import Task


def evaluate(
    workdir: str | pathlib.Path,
    data_dir: str = "",
    given: Tree | None = None,
) -> dict[str, Any]:
    """Measures the pruned network of a finished run again.

    Args:
      workdir: Folder of the run, of which only ``model/`` is needed.
      data_dir: Folder of the data; "" if they have not moved.
      given: Config of the run; needed only if it names code of the user's own.

    Returns:
      The metrics that the run's task reports (``accuracy`` in percent and ``loss`` for
      image classification), ``params`` and ``flops``.

    Raises:
      TPPError: The run is not finished, or its model cannot be read.
    """
    task, typed = finished_run(workdir, data_dir, given)
    model = load_network(pathlib.Path(workdir) / "model", task, typed)
    devices, arithmetic = jax.local_devices(), StepConfig(typed.model.dtype)
    evaluator = Evaluator(task, task.feed(devices), arithmetic, devices)
    params, stats = split(model)
    size = count(model, *task.example_inputs())
    return {
        **evaluator(model, params, stats),
        "params": size.params,
        "flops": size.flops,
    }


def finished_run(
    workdir: str | pathlib.Path, data_dir: str = "", given: Tree | None = None
) -> tuple[Task, RunConfig]:
    """Returns the task of a finished run, with its data, and its config.

    Args:
      workdir: Folder of the run, of which only ``model/`` is needed.
      data_dir: Folder of the data; "" if they have not moved.
      given: Config of the run; needed only if it names code of the user's own.

    Raises:
      TPPError: The run is not finished, or its data cannot be read.
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
    check_known(config, given or {}, str(workdir))
    typed = build(RunConfig, with_defaults(config))
    if data_dir:
        settings = dataclasses.replace(typed.data, dir=data_dir)
        typed = dataclasses.replace(typed, data=settings)
    return make_task(typed), typed


def load_network(folder: pathlib.Path, task: Task, config: RunConfig) -> nnx.Module:
    """Returns a network that a run has saved.

    Args:
      folder: Folder of the network.
      task: Task of the run, which makes networks of a user's own.
      config: Config of the run, which names the network that it started from.

    Raises:
      TPPError: It cannot be read, or is not that of the task.
    """
    if load_model_info(folder)["model"] is not None:
        return load_model(folder)
    return load_model(folder, start_of(task, config))
