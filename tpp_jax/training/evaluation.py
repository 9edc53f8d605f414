"""Accuracy and loss on a test set, of a network at hand or of a finished run."""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpp_jax import data
from tpp_jax.errors import TPPError
from tpp_jax.pruning.flops import count
from tpp_jax.training import parallel
from tpp_jax.training.checkpoints import load_model, load_model_info
from tpp_jax.training.step import Images, StepConfig, graphdef_of, make_eval_step

_BATCH = 512  # images of one step, rounded up to fill the devices evenly


class Evaluator:
    """Measures accuracy and loss on the whole test set, compiled once per width."""

    def __init__(
        self, model: nnx.Module, dataset: data.Dataset, devices: list[jax.Device]
    ) -> None:
        n, batch = len(dataset.test_images), _BATCH
        batch = math.ceil(min(batch, n) / len(devices)) * len(devices)
        padding = -n % batch
        images = Images(
            np.pad(dataset.test_images, ((0, padding), (0, 0), (0, 0), (0, 0))),
            np.pad(dataset.test_labels, (0, padding), constant_values=-1),
        )
        self._starts = range(0, n, batch)
        self._devices = devices
        self._images = parallel.replicate(images, devices)
        config = StepConfig(batch, 0, False, dataset.mean, dataset.std)
        step = make_eval_step(
            graphdef_of(model, training=False), config, parallel.axis_name(devices)
        )
        self._step = parallel.on_devices(step, devices)

    def __call__(self, params: nnx.State, stats: nnx.State) -> dict[str, float]:
        """Returns ``accuracy`` in percent and mean ``loss``."""
        params, stats = parallel.replicate((params, stats), self._devices)
        sums = [
            self._step(params, stats, self._images, np.int32(start))
            for start in self._starts
        ]
        sums = jax.tree.map(lambda *values: float(sum(values)), *jax.device_get(sums))
        return {
            "accuracy": 100 * sums["hits"] / sums["images"],
            "loss": sums["loss"] / sums["images"],
        }


def evaluate(workdir: str | pathlib.Path, data_dir: str = "") -> dict[str, Any]:
    """Restores a finished run's pruned network and measures it again.

    Args:
      workdir: of the run; nothing else of it is needed.
      data_dir: where the data is now, if it has moved since.

    Returns:
      ``accuracy`` in percent, ``loss``, ``params``, ``flops``.

    Raises:
      TPPError: the run is not finished, or its model cannot be read.
    """
    folder = pathlib.Path(workdir) / "model"
    if not folder.is_dir():
        raise TPPError(
            f"there is no finished run in {workdir}: it has no folder 'model'. Run "
            "launch.py with the same --workdir and its config to finish it"
        )
    settings = load_model_info(folder)["config"].get("data")
    if settings is None:
        raise TPPError(f"{folder} does not tell its data: it is not of a finished run")
    model = load_model(folder)
    dataset = data.load(
        settings["name"], data_dir or settings["dir"] or None, settings["pad_to"]
    )
    evaluator = Evaluator(model, dataset, jax.local_devices())
    params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    example = jax.ShapeDtypeStruct((1, *dataset.test_images.shape[1:]), jnp.float32)
    size = count(model, example)
    return {
        **evaluator(params, stats),
        "params": size.params,
        "flops": size.flops,
    }
