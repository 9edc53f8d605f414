"""The metrics of a finished run's pruned network, measured again."""

import pathlib
from typing import Any

import jax
from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.experiment.tasks import make_task, open_data
from tpp_jax.pruning.flops import count
from tpp_jax.saving import load_model, load_model_info
from tpp_jax.training.evaluation import Evaluator
from tpp_jax.training.step import StepConfig


def evaluate(workdir: str | pathlib.Path, data_dir: str = "") -> dict[str, Any]:
    """Restores a finished run's pruned network and measures it again.

    Args:
      workdir: Folder of the run; nothing but ``model/`` in it is needed.
      data_dir: Folder of the data, if it has moved since.

    Returns:
      The metrics that the run's task reports, ``accuracy`` in percent and ``loss`` for
      the classification of images, and ``params`` and ``flops``.

    Raises:
      TPPError: The run is not finished, or its model cannot be read.
    """
    folder = pathlib.Path(workdir) / "model"
    if not folder.is_dir():
        raise TPPError(
            f"there is no finished run in {workdir}: it has no folder 'model'. Run "
            "launch.py with the same --workdir and its config to finish it"
        )
    config = load_model_info(folder)["config"]
    if "data" not in config:
        raise TPPError(f"{folder} does not name its data: it is not of a finished run")
    model = load_model(folder)
    settings = config["data"] | ({"dir": data_dir} if data_dir else {})
    task, devices = make_task(config, open_data(settings)), jax.local_devices()
    compute = StepConfig(config["model"]["dtype"])
    evaluator = Evaluator(task, task.feed(devices), compute, devices)
    params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    size = count(model, *task.example_inputs())
    return {
        **evaluator(model, params, stats),
        "params": size.params,
        "flops": size.flops,
    }
