"""The plan that a config asks for, from a network's weights and some training data."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import optax
from flax import nnx
from jaxtyping import Array, Float

from tpp_jax import data
from tpp_jax.experiment.sections import PruneConfig
from tpp_jax.graph.groups import Groups
from tpp_jax.pruning.activations import activation_means
from tpp_jax.pruning.criteria import CRITERIA
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.planning import make_plan
from tpp_jax.pruning.statistics import hessian_diagonal, loss_gradient

Batches = Iterable[tuple[Float[Array, "b h w c"], Any]]
"""Pairs of normalised images and labels."""


def plan_for(
    prune: PruneConfig,
    groups: Groups,
    model: Any,
    seed: int,
    batches: Batches | None = None,
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
      batches: Training batches for the criteria that measure something on data, see
        :func:`training_batches`; not read by the others. Without them ``l1`` stands in
        for such criteria, to try the rest.
      scope: Scope in place of the config's.
      counts: Numbers of channels of each group to keep, in place of ratios and targets.
    """
    target = prune.flops or prune.params
    statistics, criterion = None, prune.criterion
    if criterion in CRITERIA and (needed := CRITERIA[criterion].statistics):
        if batches is None:
            criterion = "l1"
        else:
            statistics = _statistics(needed, model, batches, seed)
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


def training_batches(
    dataset: data.Dataset | data.Stream, batch_size: int, number: int, seed: int
) -> Iterator[tuple[Float[Array, "b h w c"], Any]]:
    """Yields the first training batches of a random order, normalised.

    Args:
      dataset: Data, in memory or streamed. Every process reads all of a batch.
      batch_size: Number of images in a batch.
      number: Number of batches; fewer if an epoch has not as many.
      seed: Seed of the order.
    """
    if isinstance(dataset, data.Stream):
        dataset = dataclasses.replace(dataset, shard=(0, 1))
    batches = dataset.train_batches(batch_size, seed)
    number = min(number, dataset.num_train // batch_size)
    with contextlib.closing(batches):
        for images, labels in itertools.islice(batches, number):
            yield data.normalize(images, dataset.mean, dataset.std), labels


def _statistics(kind: str, model: nnx.Module, batches: Batches, seed: int) -> Any:
    """Measures what a criterion needs."""

    def loss(model: nnx.Module, batch: tuple[Any, Any]) -> Any:
        logits = model(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    match kind:
        case "loss_gradient":
            return loss_gradient(loss, model, batches)
        case "hessian_diagonal":
            return hessian_diagonal(loss, model, batches, seed=seed)
        case "activation_means":
            return activation_means(model, (images for images, _ in batches))
    raise ValueError(kind)
