"""The plan of a config, made from a network's weights and some training data."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.experiment.dotted import is_dotted, load_object
from tpp_jax.experiment.refitting import calibration_inputs
from tpp_jax.experiment.sections import PruneConfig
from tpp_jax.graph.groups import Groups
from tpp_jax.pruning.activations import activation_means
from tpp_jax.pruning.criteria import CRITERIA, Criterion
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
    """Makes the plan of a config from a model's weights.

    Args:
      prune: Section ``prune`` of the config.
      groups: Groups of the model.
      model: Network with its weights, or the weights by name.
      seed: Seed of the criteria that draw random numbers.
      task: Task whose data some criteria measure on. If it is None, ``l1`` replaces
        these criteria, so that the rest of the plan can be tried.
      scope: Scope that replaces the config's; "" for the config's.
      counts: Number of channels of each group to keep, which replaces ratios and
        targets.
    """
    target = prune.flops or prune.params
    statistics, criterion = None, _criterion(prune.criterion)
    if isinstance(criterion, Criterion) and criterion.statistics:
        if task is None:
            criterion = "l1"
        else:
            statistics = _statistics(criterion, groups, model, task, prune, seed)
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


def _criterion(name: str) -> Criterion | str:
    """Returns the criterion that a config names, or the name if it is another."""
    if not is_dotted(name):
        return CRITERIA.get(name, name)
    found = load_object(name, "config.prune.criterion")
    if not isinstance(found, Criterion):
        if not callable(found):
            raise TPPError(
                f"config.prune.criterion is {name!r}, of type {type(found).__name__}; "
                "it must be a function from filters [n, d] to scores [n], or a "
                "Criterion"
            )
        score: Any = found
        return Criterion(score)
    if found.statistics not in (None, *_MEASURED):
        raise TPPError(
            f"config.prune.criterion is {name!r}, whose statistics are "
            f"{found.statistics!r}: a run measures only {', '.join(_MEASURED)}"
        )
    return found


_MEASURED = (
    "loss_gradient",
    "hessian_diagonal",
    "activation_means",
    "input_moments",
)
"""Statistics that :func:`_statistics` measures."""


def _statistics(
    criterion: Criterion,
    groups: Groups,
    model: nnx.Module,
    task: Task,
    prune: PruneConfig,
    seed: int,
) -> Any:
    """Measures what a criterion needs on the first training examples.

    Args:
      criterion: Criterion that needs statistics.
      groups: Groups of the model.
      model: Network with its weights.
      task: Task whose data and loss are used.
      prune: Section ``prune`` of the config, with the amount of data.
      seed: Seed of the order of the data and of random vectors.
    """
    batches = itertools.islice(task.samples(seed), prune.batches)
    key = jax.random.key(seed)

    def loss(model: nnx.Module, batch: Any) -> Any:
        return task.loss(model, batch, key)[0]

    match criterion.statistics:
        case "loss_gradient":
            return loss_gradient(loss, model, batches)
        case "hessian_diagonal":
            return hessian_diagonal(loss, model, batches, seed=seed)
        case "activation_means":
            return activation_means(model, map(task.inputs, batches))
        case "input_moments":
            inputs = calibration_inputs(task, prune.calibration_examples, seed)
            diagonal = criterion.of == "consumers"
            return input_moments(model, inputs, groups=groups, diagonal=diagonal)
    raise ValueError(criterion.statistics)
