"""The plan that a config asks for, from a network's weights and some training data."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from tpp_jax.experiment.sections import PruneConfig
from tpp_jax.graph.groups import Groups
from tpp_jax.pruning.activations import activation_means
from tpp_jax.pruning.criteria import CRITERIA
from tpp_jax.pruning.moments import input_moments
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.planning import make_plan
from tpp_jax.pruning.statistics import hessian_diagonal, loss_gradient
from tpp_jax.training.task import Task


def plan_for(
    prune: PruneConfig,
    groups: Groups,
    model: Any,
    seed: int,
    task: Task | None = None,
    *,
    scope: str = "",
    counts: Mapping[str, int] | None = None,
) -> Plan:
    """Makes the plan that a config asks for, from a model's weights.

    Args:
      prune: The config's ``prune`` part.
      groups: Groups of the model.
      model: Network with its weights, or these by name.
      seed: Seed of the run, for the criteria that draw random numbers.
      task: Task for the criteria that measure something on its data. Without one
        ``l1`` stands in for these criteria, to try the rest.
      scope: Scope in place of the config's.
      counts: Numbers of channels of each group to keep, in place of ratios and targets.
    """
    target = prune.flops or prune.params
    statistics, criterion = None, prune.criterion
    if criterion in CRITERIA and (needed := CRITERIA[criterion].statistics):
        if task is None:
            criterion = "l1"
        else:
            statistics = _statistics(needed, model, task, prune.batches, seed)
    amount: dict[str, Any] = {"counts": counts}
    if counts is None:
        amount = dict(
            ratios=None if target and not prune.ratios else prune.ratios,
            flops=prune.flops or None,
            params=prune.params or None,
            skip=prune.skip,
            scope=scope or prune.scope,
            round_to=prune.round_to,
            min_channels=prune.min_channels,
        )
    return make_plan(
        groups,
        model,
        criterion=criterion,
        statistics=statistics,
        reduce=prune.reduce,
        seed=seed,
        **amount,
    )


def _statistics(
    needed: str, model: nnx.Module, task: Task, number: int, seed: int
) -> Any:
    """Measures what a criterion needs on the first training batches.

    Args:
      needed: Name of what is measured.
      model: Network with its weights.
      task: Task whose data and loss are used.
      number: Number of batches; fewer if an epoch has not as many.
      seed: Seed of the order of the data and of random vectors.
    """
    batches = itertools.islice(task.samples(seed), number)
    key = jax.random.key(seed)

    def loss(model: nnx.Module, batch: Any) -> Any:
        return task.loss(model, batch, key)[0]

    match needed:
        case "loss_gradient":
            return loss_gradient(loss, model, batches)
        case "hessian_diagonal":
            return hessian_diagonal(loss, model, batches, seed=seed)
        case "activation_means":
            return activation_means(model, map(task.inputs, batches))
        case "input_moments":
            return input_moments(model, map(task.inputs, batches), diagonal=True)
    raise ValueError(needed)
