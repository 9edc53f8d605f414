"""What each group costs at several ratios, measured on data: ``sensitivity``.

Pruned channels are multiplied by zero, so that every plan has the same shapes and one
compiled program serves all of them. The plans run one after the other: vmapped weights
would make grouped convolutions, which are slower on a CPU.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from tpp_jax.errors import TPPError, TPPTypeError
from tpp_jax.graph.functions import Function, as_function, is_array, set_evaluation
from tpp_jax.graph.records import Group, Groups
from tpp_jax.pruning.compensation import refit_all
from tpp_jax.pruning.criteria import Criterion, Score
from tpp_jax.pruning.curves import Sensitivity
from tpp_jax.pruning.masks import keep_masks
from tpp_jax.pruning.moments import Moments
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.planning import best_channels
from tpp_jax.pruning.ratios import is_number, parse_patterns, ratios_of
from tpp_jax.pruning.scoring import channel_scores
from tpp_jax.pruning.targets import Limits

# Leaf → axis → bool, True for the positions that are kept.
Masks = dict[str, dict[int, Any]]


def sensitivity(
    model: nnx.Module | linen.Module | Callable[..., Any] | Any,
    groups: Groups,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Float[Array, ""]],
    params: Any = None,
    *,
    ratios: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 0.9),
    skip: Sequence[str] | str = (),
    criterion: str | Criterion | Score = "l1",
    statistics: Any = None,
    scores: Mapping[str, ArrayLike] | None = None,
    reduce: str = "mean",
    seed: int = 0,
    moments: Moments | None = None,
) -> Sensitivity:
    """Measures what a loss gains when each group alone loses some of its channels.

    For ``make_plan(..., sensitivity=...)``, which prunes insensitive groups more than
    others. All groups are measured that a single ratio would prune: those that can be
    pruned and are not inner. Every group and ratio takes one forward pass over the
    batches, all by one compiled program.

    Args:
      model: Model that the groups were found with: NNX module (runs in evaluation mode,
        not modified), Linen module or function ``fn(params, *inputs)``; or a parameter
        pytree, as for :func:`tpp_jax.loss_gradient`.
      groups: Groups from :func:`tpp_jax.channel_groups`.
      batches: Batches of equal size, each in the form that the loss takes.
      loss: Function ``loss(model, batch)`` that returns a scalar, the mean over the
        examples of the batch. Its ``model`` is the NNX module, a function of the inputs
        (with ``params``), or the parameter pytree. Labels are not needed: it may
        compare the outputs with those of the unpruned model, kept in the batch.
      params: Variables of a Linen module, or parameter pytree of a function.
      ratios: Shares of the channels to remove, each in (0, 1); of n channels
        ``ceil(ratio · n)``, at most ``floor(0.995 · n)``.
      skip: Patterns of layers that are not measured.
      criterion: Criterion that chooses the channels, as in :func:`tpp_jax.make_plan`,
        and as there the next four arguments.
      statistics: Statistics that the criterion needs.
      scores: Group name → the user's own scores.
      reduce: Function that combines the scores of several layers.
      seed: Seed of the random criterion.
      moments: Result of :func:`tpp_jax.input_moments`. With it, the layers that read
        the removed channels are refit as :func:`tpp_jax.compensate` does by default,
        and the costs are those that remain.

    Returns:
      The costs. Norms over the channels of a group (``group.reduced``) count removed
      channels as zeros.

    Raises:
      TPPError: There is no batch or no group to measure; a ratio is outside (0, 1); the
        loss is not a scalar, or not finite; or an argument of the scores is wrong.
      TPPTypeError: The model, the groups or the loss have another type.

    References:
      Li et al. 2017, "Pruning filters for efficient ConvNets".

    Example:
      >>> import jax.numpy as jnp
      >>> import tpp_jax as tpp
      >>> def mlp(p, x):
      ...     return x @ p["w1"] @ p["w2"]
      >>> p = {"w1": jnp.array([[1.0, 3.0]]), "w2": jnp.ones((2, 1))}
      >>> groups = tpp.channel_groups(mlp, jnp.ones((1, 1)), params=p)
      >>> def error(model, batch):
      ...     return jnp.mean((model(batch) - 4 * batch) ** 2)
      >>> batches = [jnp.array([[1.0], [2.0]])]
      >>> found = tpp.sensitivity(mlp, groups, batches, error, p, ratios=[0.5])
      >>> found.groups, found.costs.tolist(), found.baseline
      (('w1',), [[2.5]], 0.0)
    """
    _check_arguments(groups, loss, ratios)
    ascending = sorted(set(map(float, ratios)))
    measured = ratios_of(groups, 0.5, parse_patterns(skip))
    matched = [g for g in groups if g.name in measured and _removed(g, 0.5)]
    if not matched:
        raise TPPError(
            "there is no group to measure: all that could be pruned are skipped"
        )
    ranks = channel_scores(
        groups,
        model if params is None else params,
        matched,
        criterion=criterion,
        statistics=statistics,
        scores=scores,
        reduce=reduce,
        seed=seed,
    )
    function, run = with_loss(model, params, loss)
    leaves = dict(zip(function.names, jax.tree.leaves(function.params), strict=True))
    loss_of = mean_loss(function, run, list(batches))
    all_kept = all_kept_masks(groups, matched)
    baseline = loss_of(leaves, all_kept)
    if not math.isfinite(baseline):
        raise TPPError(f"the loss of the unpruned model is {baseline}")

    @functools.cache  # several ratios of a narrow group may be one number of channels
    def cost(name: str, removed: int) -> float:
        counts = {name: groups[name].size - removed}
        plan = Plan(best_channels(groups, counts, ranks), groups)
        changed = {} if moments is None else refit_all(plan, moments, leaves)[0]
        value = loss_of(leaves | changed, masks_of(plan, all_kept))
        if not math.isfinite(value):
            raise TPPError(
                f"the loss is {value} without {removed} of the {groups[name].size} "
                f"channels of {name}: skip that layer, or measure smaller ratios"
            )
        return value - baseline

    removed = [[_removed(g, ratio) for ratio in ascending] for g in matched]
    costs = [
        [cost(group.name, n) for n in row]
        for group, row in zip(matched, removed, strict=True)
    ]
    return Sensitivity(
        groups=tuple(g.name for g in matched),
        sizes=tuple(g.size for g in matched),
        ratios=tuple(ascending),
        removed=np.array(removed),
        costs=np.array(costs),
        baseline=baseline,
    )


def _removed(group: Group, ratio: float) -> int:
    """Returns the number of channels that ``make_plan`` removes by a ratio."""
    return min(math.ceil(ratio * group.size), Limits().most(group))


def with_loss(
    model: Any, params: Any, loss: Callable[[Any, Any], Any]
) -> tuple[Function, Callable[[Any, Any], Any]]:
    """Returns a model as a function, and a loss of its arrays and a batch."""
    if params is not None:
        function = as_function(model, params)
        return function, lambda arrays, batch: loss(
            functools.partial(function.call, arrays), batch
        )
    if not isinstance(model, nnx.Module) and not callable(model):
        function = as_function(lambda tree: tree, model)
        return function, lambda arrays, batch: loss(function.call(arrays), batch)
    function = as_function(model)
    graphdef = function.graphdef
    assert graphdef is not None  # only NNX modules hold their parameters

    def run(arrays: Any, batch: Any) -> Any:
        merged = nnx.merge(graphdef, arrays)
        set_evaluation(merged)
        return loss(merged, batch)

    return function, run


def mean_loss(
    function: Function,
    run: Callable[[Any, Any], Any],
    batches: Sequence[Any],
) -> Callable[[Mapping[str, Any], Masks], float]:
    """Returns a function of arrays and masks, by name, that runs all batches.

    Args:
      function: Model.
      run: Loss of the model's arrays and a batch.
      batches: Batches.

    Raises:
      TPPError: There is no batch, or the loss is not a scalar.
    """
    if not batches:
        raise TPPError("there is no batch to measure the loss on")
    structure = jax.tree.structure(function.params)

    @jax.jit
    def evaluate(leaves: Sequence[Any], masks: Masks, batch: Any) -> Array:
        arrays = []
        for name, leaf in zip(function.names, leaves, strict=True):
            for mask in masks.get(name, {}).values():
                # The mask must have the sharding of the leaf.
                whole = mask & jnp.ones_like(leaf, bool)
                leaf = jnp.where(whole, leaf, jnp.zeros_like(leaf))
            arrays.append(leaf)
        value = run(jax.tree.unflatten(structure, arrays), batch)
        if not is_array(value) or value.shape:
            what = f"an array of shape {value.shape}" if is_array(value) else "no array"
            raise TPPError(
                f"the loss is {what}, must be one number: return the mean over the "
                "examples of the batch"
            )
        return value

    def mean(leaves: Mapping[str, Any], masks: Masks) -> float:
        ordered = [leaves[name] for name in function.names]
        # All are dispatched before the first result is waited for.
        values = [evaluate(ordered, masks, batch) for batch in batches]
        return float(np.mean(jax.device_get(values), dtype=np.float64))

    return mean


def all_kept_masks(groups: Groups, matched: Sequence[Group]) -> Masks:
    """Returns masks that keep everything, of all axes that channels run along."""
    masks: Masks = {}
    for member in (member for group in matched for member in group.members):
        shape = groups.shapes[member.leaf]
        own = (member.axis, member.steps)
        every = np.ones([n if i in own else 1 for i, n in enumerate(shape)], bool)
        masks.setdefault(member.leaf, {})[member.axis] = every
    return masks


def masks_of(plan: Plan, all_kept: Masks) -> Masks:
    """Returns the masks of a plan, of the same axes: no plan needs another program."""
    masks = {}
    for leaf, axes in all_kept.items():
        own = {
            axis: kept.over(axis, range(len(plan.groups.shapes[leaf])))
            for axis, kept in keep_masks(plan, leaf).items()
        }
        masks[leaf] = {a: every & own.get(a, True) for a, every in axes.items()}
    return masks


def _check_arguments(groups: Any, loss: Any, ratios: Sequence[float]) -> None:
    if not isinstance(groups, Groups):
        raise TPPTypeError(
            f"the groups are a {type(groups).__name__}: pass the result of "
            "tpp_jax.channel_groups(...) after the model"
        )
    if not callable(loss):
        raise TPPTypeError(
            f"the loss is a {type(loss).__name__}: pass a function loss(model, batch) "
            "after the batches"
        )
    several = np.ndim(ratios) == 1 and len(ratios) > 0
    if not several or not all(is_number(r) and 0 < r < 1 for r in ratios):
        raise TPPError(
            f"the ratios are {ratios!r}, must be shares of the channels to remove, "
            "each in (0, 1), as in ratios=(0.25, 0.5, 0.75)"
        )
