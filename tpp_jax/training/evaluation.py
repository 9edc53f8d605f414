"""Metrics of a network on a task's evaluation data."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tpp_jax.training import parallel
from tpp_jax.training.distillation import output_of
from tpp_jax.training.feeds import EVAL_BATCH, Resident
from tpp_jax.training.step import StepConfig, make_eval_step, merged
from tpp_jax.training.structure import Structure, split, structure_of
from tpp_jax.training.task import Batch, Feed, Task
from tpp_jax.xla.blocks import hold_blocks


def teacher_outputs(
    task: Task, feed: Resident, teacher: nnx.Module, config: StepConfig
) -> Array:
    """Returns the outputs of a network for all training examples, in their order.

    Args:
      task: Task whose loss calls the network; its inputs are the same in every step.
      feed: Feed with the examples.
      teacher: Network; its own mode does not matter.
      config: Arithmetic of the step.

    Raises:
      TPPError: The loss calls the network never, or more than once.
    """
    structure, (params, stats) = structure_of(teacher, training=False), split(teacher)

    @jax.jit
    def outputs(params: nnx.State, stats: nnx.State, batch: Batch) -> Array:
        model = merged(structure, params, stats, config.dtype)
        hold_blocks(model)
        return output_of(task.loss, model, batch)

    examples, found = feed.train_examples, []
    n = len(jax.tree.leaves(examples)[0])
    size = min(n, EVAL_BATCH)
    for start in range(0, n, size):
        start = min(start, n - size)  # the last batch overlaps the one before
        batch = jax.tree.map(lambda x, i=start: x[i : i + size], examples)
        found.append((start, outputs(params, stats, batch)))
    table = jnp.zeros((n, *found[0][1].shape[1:]), found[0][1].dtype)
    for start, rows in found:
        table = table.at[start : start + size].set(rows)
    return table


class Evaluator:
    """Metrics of networks on all evaluation data; compiled once per structure."""

    def __init__(
        self,
        task: Task,
        feed: Feed,
        config: StepConfig,
        devices: Sequence[parallel.Device],
        api: parallel.Api = "pmap",
    ) -> None:
        """Keeps the arguments; compilation happens at the first measurement.

        Args:
          task: Task whose metrics are measured.
          feed: Feed of the task's data.
          config: Arithmetic of the evaluation step.
          devices: Devices that ``feed`` was opened for.
          api: JAX's API for several devices.
        """
        self._task, self._feed, self._config = task, feed, config
        self._devices = devices
        self._api: parallel.Api = api
        self._steps: dict[Structure, Callable[..., Any]] = {}

    def __call__(
        self, model: nnx.Module, params: nnx.State, stats: nnx.State
    ) -> dict[str, float]:
        """Returns the metrics that the task reports.

        Args:
          model: Structure of the network; its arrays are not used.
          params: Parameters of the network.
          stats: Batch statistics of the network.
        """
        step = self._step(structure_of(model, training=False))
        params, stats = parallel.replicate((params, stats), self._devices)
        totals: Any = None
        for arguments in self._feed.eval_data():
            # Fetched immediately: a pending step keeps its batch in memory.
            found = jax.device_get(step(params, stats, *arguments))
            totals = (
                found if totals is None else jax.tree.map(operator.add, totals, found)
            )
        sums, n = totals
        return self._task.report({name: float(x / n) for name, x in sums.items()})

    def _step(self, structure: Structure) -> Callable[..., Any]:
        if structure not in self._steps:
            step = make_eval_step(
                structure,
                self._task.metrics,
                self._config,
                self._feed.eval_batch,
                parallel.axis_name(self._devices),
            )
            split = 2 if self._feed.split else None
            self._steps[structure] = parallel.on_devices(
                step, self._devices, split=split, api=self._api
            )
        return self._steps[structure]
