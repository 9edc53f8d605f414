"""Accuracy and loss on a test set, of a network at hand or of a finished run."""

import collections
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.pruning.flops import count
from tpp_jax.saving import load_model, load_model_info
from tpp_jax.training import parallel
from tpp_jax.training.feeds import Resident, Streamed, open_data, open_feed
from tpp_jax.training.step import StepConfig, graphdef_of, make_eval_step


class Evaluator:
    """Measures accuracy and loss on the whole test set, compiled once per width."""

    def __init__(
        self,
        feed: Resident | Streamed,
        config: StepConfig,
        devices: Sequence[jax.Device],
        kind: parallel.Kind = "pmap",
    ) -> None:
        """Args:
        feed: of the data.
        config: normalisation and precision.
        devices: that ``feed`` was opened for.
        kind: see :func:`parallel.on_devices`.
        """
        self._feed, self._config, self._devices = feed, config, devices
        self._kind: parallel.Kind = kind
        self._steps: dict[nnx.GraphDef, Callable[..., Any]] = {}

    def __call__(
        self, model: nnx.Module, params: nnx.State, stats: nnx.State
    ) -> dict[str, float]:
        """Returns ``accuracy`` in percent and mean ``loss``.

        Args:
          model: the structure; its arrays are not used.
          params: its parameters.
          stats: its batch statistics.
        """
        step = self._step(graphdef_of(model, training=False))
        params, stats = parallel.replicate((params, stats), self._devices)
        sums = collections.Counter()
        for arguments in self._feed.test_data():
            # Fetched at once: what has not run yet keeps its images in memory.
            sums.update(jax.device_get(step(params, stats, *arguments)))
        return {
            "accuracy": 100 * float(sums["hits"] / sums["images"]),
            "loss": float(sums["loss"] / sums["images"]),
        }

    def _step(self, graphdef: nnx.GraphDef) -> Callable[..., Any]:
        if graphdef not in self._steps:
            axis = parallel.axis_name(self._devices)
            step = make_eval_step(graphdef, self._config, self._feed.test_batch, axis)
            split = 2 if self._feed.split else None
            self._steps[graphdef] = parallel.on_devices(
                step, self._devices, split=split, kind=self._kind
            )
        return self._steps[graphdef]


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
    config = load_model_info(folder)["config"]
    if "data" not in config:
        raise TPPError(f"{folder} does not tell its data: it is not of a finished run")
    model = load_model(folder)
    settings = config["data"] | ({"dir": data_dir} if data_dir else {})
    dataset, devices = open_data(settings), jax.local_devices()
    feed = open_feed(dataset, settings, devices)
    dtype = config["model"]["dtype"]
    compute = StepConfig(dataset.mean, dataset.std, dataset.num_classes, dtype)
    params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    example = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
    size = count(model, example)
    return {
        **Evaluator(feed, compute, devices)(model, params, stats),
        "params": size.params,
        "flops": size.flops,
    }
