"""Repair of a network at the cut, from some training data without labels."""

import warnings
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from tpp_jax.graph.naming import map_named, named_leaves
from tpp_jax.pruning.compensation import compensate
from tpp_jax.pruning.cutting import prune
from tpp_jax.pruning.masks import keep_masks
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.recalibration import recalibrate
from tpp_jax.training.task import Task

Batches = Iterator[tuple[Array, ...]]
"""Inputs of a network, batch by batch."""


def calibration_inputs(task: Task, number: int, seed: int) -> Batches:
    """Yields the network's inputs for the first training examples, not augmented.

    Args:
      task: Task with the data.
      number: Number of examples, or all of an epoch if it has fewer.
      seed: Seed of the order of the data.
    """
    for batch in task.samples(seed):
        part = jax.tree.map(lambda x, n=number: x[:n], batch)
        inputs = task.inputs(part)
        yield inputs
        number -= len(inputs[0])
        if number <= 0:
            return


def repaired(
    model: nnx.Module,
    plan: Plan,
    inputs: Callable[[], Batches],
    *,
    refit: bool,
    renorm: bool,
    say: Callable[[str], None],
) -> Iterator[tuple[str, nnx.Module]]:
    """Yields the pruned network after each step of its repair, with the step's name.

    Args:
      model: Unpruned network.
      plan: Plan of the cut.
      inputs: Function that returns the calibration data from the start.
      refit: Whether the layers that read pruned channels are refit: ``compensated``.
      renorm: Whether the statistics of batch norms, if the network has any, are
        measured again: ``recalibrated``.
      say: Function that shows a warning.
    """
    # On one device: the measurements are not split over several.
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.device_get(state))
    small = None
    if refit:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            small = compensate(model, plan, inputs())
        for warning in caught:
            say(f"Note: {warning.message}.")
        yield "compensated", small
    if renorm and jax.tree.leaves(nnx.state(model, nnx.BatchStat)):
        small = prune(model, plan) if small is None else small
        small = recalibrate(small, inputs(), like=model, plan=plan)
        yield "recalibrated", small


def written_back(model: nnx.Module, plan: Plan, small: nnx.Module) -> nnx.Module:
    """Returns a network of the unpruned shape that computes what a pruned one does.

    The arrays of the pruned network stand at the kept positions. The pruned channels
    are still computed, but the layers that read them have weights of zero.

    Args:
      model: Unpruned network.
      plan: Plan of the cut.
      small: Network that was cut by the plan.
    """
    arrays = named_leaves(nnx.state(small))

    def write(name: str, leaf: Array) -> Array:
        value, every = np.array(leaf), np.ones(np.shape(leaf), bool)
        masks = {
            axis: np.asarray(kept.over(axis, range(value.ndim)))
            for axis, kept in keep_masks(plan, name).items()
        }
        for _, member in plan.groups.members.get(name, ()):
            if member.role == "contracted" and member.axis in masks:
                value = np.where(masks[member.axis], value, 0)
        for mask in masks.values():
            every &= mask
        # Kept entries are in the same order in both.
        value[every] = np.asarray(arrays[name]).reshape(-1)
        return jnp.asarray(value)

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, map_named(write, state))
