"""Removal of channels with a refit of the kernels that read them: ``compensate``."""

import collections
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen, nnx
from jaxtyping import Bool, Float

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import on_host, placed
from tpp_jax.graph.functions import Function, as_function, is_array
from tpp_jax.graph.naming import some
from tpp_jax.pruning import readiness
from tpp_jax.pruning.cutting import check_plan, prune
from tpp_jax.pruning.masks import keep_masks
from tpp_jax.pruning.moments import ConsumerMoments, Moments, input_moments
from tpp_jax.pruning.plan import Plan, expect_plan
from tpp_jax.pruning.ridge import Damping, Errors, refit
from tpp_jax.pruning.sequence import kept_features, refit_in_order

# With fewer rows the fit follows the calibration data more than the network.
_ROWS_PER_FEATURE = 3


def compensate(
    model: nnx.Module | linen.Module | Callable[..., Any],
    plan: Plan,
    batches: Iterable[Any] | None = None,
    params: Any = None,
    *,
    moments: Moments | None = None,
    damping: Damping = None,
    sequential: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Prunes a model and refits the layers that read the pruned channels.

    Each consumer of a pruned channel is refit in closed form, so that with the kept
    inputs K alone its outputs are as near as possible to those with all inputs. Around
    the weights that are there, ridge regression gives

        ``W_K += (C_KK + δ·mean(diag C_KK)·I)⁻¹ C_KP W_P``

    where C are covariances of what the layer reads in the unpruned network and P the
    pruned inputs. The shift of the mean, ``W_Pᵀμ_P - ΔW_Kᵀμ_K``, is added to the bias
    of the layer, or subtracted from the running mean of the batch norm behind it. If
    there is neither, C are second moments about zero. No labels are needed.

    Args:
      model: Model that the plan was made for: NNX module, Linen module or function
        ``fn(params, *inputs)``; not modified.
      plan: Plan of the channels to keep; not traced.
      batches: Batches for :func:`tpp_jax.input_moments`; may be left out with
        ``moments``.
      params: Variables of a Linen module, or parameter pytree of a function.
      moments: Moments measured before on the same model, of all groups that are pruned.
      damping: Share δ of the mean variance that is added to all variances. By default
        it grows with the number of kept features for each row of data:
        ``max(0.1·features/rows, 1e-4)``. Zero gives the least-squares solution.
        ``"held-out"`` keeps back the last fifth of the batches, at least one, and
        chooses for each layer the damping whose refit is best on them; the layer is
        then refit to all batches.
      sequential: Whether the layers are refit once more in order of execution, from
        what they read in the pruned network, with the layers before them refit, to what
        they gave in the unpruned one. All batches are in memory. Layers that are read
        in loops or several times keep their first refit. By default, if batches are
        given and a norm or softmax runs over pruned channels, which changes what the
        layers behind it read.
      **kwargs: Keyword arguments of the model when moments are measured.

    Returns:
      The result of :func:`tpp_jax.prune`: a new NNX module, or the smaller tree.

    Raises:
      TPPError: The plan does not fit the model, there are neither batches nor moments
        (or no batches for what needs them), the moments are of other groups, or the
        damping is negative.

    Warns:
      UserWarning: A layer that reads pruned channels is not refit (the message says
        why), or there are fewer than 3 rows of data for each feature of a layer and the
        damping is not chosen on held-out batches.

    References:
      An et al. 2024, "Fluctuation-based adaptive structured pruning for large language
      models"; Frantar and Alistarh 2022, "Optimal brain compression".

    Example:
      >>> import jax.numpy as jnp
      >>> import tpp_jax as tpp
      >>> def net(p, x):
      ...     return x @ p["w1"] @ p["w2"]
      >>> p = {"w1": jnp.array([[1.0, 2.0, 2.0]]), "w2": jnp.ones((3, 1))}
      >>> x = jnp.array([[1.0], [2.0], [3.0]])
      >>> groups = tpp.channel_groups(net, x, params=p)
      >>> plan = tpp.make_plan(groups, p, counts={"w1": 1})
      >>> small = tpp.compensate(net, plan, [x], p, damping=0)
      >>> net(p, x).ravel().tolist(), net(small, x).ravel().round(4).tolist()
      ([5.0, 10.0, 15.0], [5.0, 10.0, 15.0])
    """
    expect_plan(plan)
    _check_damping(damping)
    check_plan(plan, model, params)
    if sequential is None:
        reduced = any(group.reduced for group in plan.pruned_groups)
        sequential = reduced and batches is not None
    kept_back = 0
    if sequential or damping == "held-out":
        batches, kept_back = _split(batches, damping)
    held = None
    measure = functools.partial(
        input_moments, model, params=params, groups=plan.pruned_groups, **kwargs
    )
    if kept_back and isinstance(batches, list):
        moments = measure(batches[:-kept_back])
        held = measure(batches[-kept_back:])
    elif moments is None:
        if batches is None:
            raise TPPError("a refit needs data: pass batches, or moments")
        moments = measure(batches)
    function = as_function(model, params)
    leaves = _leaves(function)
    changed, cautions = refit_all(plan, moments, leaves, damping, held)
    for caution in cautions:
        warnings.warn(caution, UserWarning, stacklevel=2)
    full = with_leaves(function, params, leaves | changed)
    own = isinstance(model, nnx.Module)
    small = prune(full, plan) if own else prune(model, plan, full)
    # Filters of zeros leave nothing to refit, and their cut may rescale the others.
    if not sequential or readiness.measure(plan, function.params).all_zero:
        return small
    pruned = as_function(small) if own else as_function(model, small, plan)
    exact = refit_in_order(
        function, pruned, plan, moments, list(batches or ()), kept_back, damping, kwargs
    )
    leaves = _leaves(pruned)
    leaves |= {leaf: like_leaf(leaves[leaf], x) for leaf, x in exact.items()}
    return with_leaves(pruned, small, leaves)


def _leaves(function: Function) -> dict[str, Any]:
    return dict(zip(function.names, jax.tree.leaves(function.params), strict=True))


def _check_damping(damping: Damping) -> None:
    if damping in (None, "held-out"):
        return
    if not isinstance(damping, int | float | np.number) or not damping >= 0:
        raise TPPError(f"the damping is {damping!r}, must be at least 0, or 'held-out'")


def _split(batches: Iterable[Any] | None, damping: Damping) -> tuple[list[Any], int]:
    """Returns all batches, and how many of the last ones the damping is chosen on."""
    found = list(batches or ())
    kept_back = max(len(found) // 5, 1) if damping == "held-out" else 0
    if len(found) <= kept_back:
        raise TPPError(
            f"there are {len(found)} batches: a refit in sequence needs them, and a "
            "damping that is chosen on held-out batches at least two"
        )
    return found, kept_back


def with_leaves(function: Function, params: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns an NNX module, or a tree of parameters, with other arrays.

    Args:
      function: The model as a function of its parameters.
      params: Parameters as the user gave them.
      leaves: All arrays by name, in order.
    """
    if function.graphdef is not None:
        structure = jax.tree.structure(function.params)
        state = jax.tree.unflatten(structure, list(leaves.values()))
        return nnx.merge(function.graphdef, state)
    own, structure = jax.tree.flatten(params)
    arrays = iter(leaves.values())
    changed = [next(arrays) if is_array(leaf) else leaf for leaf in own]
    return jax.tree.unflatten(structure, changed)


def _check_groups(plan: Plan, moments: Moments) -> None:
    """Raises if moments are not those of the groups that a plan prunes."""
    for group in plan.pruned_groups:
        for member in group.members:
            entries = moments.of(member.leaf)
            known = any(member.axis in entry.positions for entry in entries)
            known = known or member.leaf in moments.skipped
            if member.role == "contracted" and not known:
                raise TPPError(
                    f"the moments are not those of {member.leaf}, which reads the "
                    f"channels of {group.name}: measure them for all groups that "
                    "are pruned"
                )


def refit_all(
    plan: Plan,
    moments: Moments,
    leaves: Mapping[str, Any],
    damping: Damping = None,
    held: Moments | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Returns the refit kernels and biases by name, unpruned, and texts of warnings.

    Args:
      plan: Plan of the channels to keep; not traced.
      moments: Moments of all groups that are pruned.
      leaves: Parameters of the unpruned model by name.
      damping: Share of the mean variance that is added, as for :func:`compensate`.
      held: Moments on held-out batches, on which the damping is chosen.

    Raises:
      TPPError: The moments are of other groups.
    """
    _check_groups(plan, moments)
    exact: dict[str, np.ndarray] = {}
    changed: dict[str, Any] = {}
    left = collections.Counter(
        leaf for e in moments.consumers for leaf in _leaves_of(e)
    )
    not_refit = {
        leaf: why for leaf, why in moments.skipped.items() if keep_masks(plan, leaf)
    }
    few = []

    def flat(leaf: str) -> np.ndarray:
        if leaf not in exact:
            exact[leaf] = on_host(leaves[leaf]).astype(np.float64).reshape(-1)
        return exact[leaf]

    for i, entry in enumerate(moments.consumers):
        keep = kept_features(plan, entry)
        few_rows = (entry.rows < _ROWS_PER_FEATURE * keep.sum(axis=1)).any()
        if not keep.all():
            if entry.fixed is not None:
                not_refit[entry.leaf] = entry.fixed
            elif held is None and few_rows:
                few.append(entry.leaf)
            bias = None if entry.bias is None else flat(entry.bias.leaf)
            other = None if held is None else held.consumers[i]
            _refit(entry, other, keep, flat(entry.leaf), bias, damping)
        for leaf in _leaves_of(entry):
            left[leaf] -= 1
            if not left[leaf] and leaf in exact:  # no more copies than are needed
                changed[leaf] = like_leaf(leaves[leaf], exact.pop(leaf))
    cautions = []
    if not_refit:
        reasons = [f"{leaf} ({why})" for leaf, why in not_refit.items()]
        cautions.append(
            f"layers that read pruned channels are not refit: {some(reasons)}"
        )
    if few:
        cautions.append(
            f"there are fewer than {_ROWS_PER_FEATURE} rows of data for each feature "
            f"that is refit in {some(few)}: the refit follows the calibration data "
            "more than the network. Give more batches, or a larger damping"
        )
    return changed, cautions


def _leaves_of(entry: ConsumerMoments) -> set[str]:
    """Returns the names of the parameters that a refit changes."""
    return {entry.leaf} if entry.bias is None else {entry.leaf, entry.bias.leaf}


def _refit(
    entry: ConsumerMoments,
    held: ConsumerMoments | None,
    keep: Bool[np.ndarray, "stacks features"],
    weights: Float[np.ndarray, " n"],
    bias: Float[np.ndarray, " m"] | None,
    damping: Damping,
) -> None:
    """Refits a consumer, in place.

    Args:
      entry: Moments of what it reads.
      held: The same on the data on which the damping is chosen.
      keep: Features that are kept of each stack.
      weights: All weights of its parameter, flat.
      bias: All entries of the parameter that takes up a shift, flat.
      damping: Damping of the fit.
    """
    index = entry.weight_index()
    for s, rows in enumerate(entry.rows):
        if not rows:  # an expert that no example was sent to
            continue
        own = keep[s]
        lost = weights[index[s][~own]]
        shift = lost.T @ entry.mean[s][~own]
        if entry.fixed is None and entry.covariance is not None:
            errors = _errors(entry, s, own, lost)
            others = None if held is None else _errors(held, s, own, lost)
            change, shift = refit(errors, others, damping, bias is not None)
            weights[index[s][own]] += change
        if bias is not None and entry.bias is not None:
            bias[entry.bias.index[s]] += entry.bias.sign * shift


def _errors(
    entry: ConsumerMoments,
    stack: int,
    keep: Bool[np.ndarray, " features"],
    lost: Float[np.ndarray, "lost outputs"],
) -> Errors:
    """Returns the errors of a consumer's outputs without the features that are lost."""
    assert entry.covariance is not None
    moments, mean = entry.covariance[stack], entry.mean[stack]
    return Errors(
        entry.rows[stack],
        moments[keep][:, keep],
        moments[keep][:, ~keep] @ lost,
        mean[keep],
        lost.T @ mean[~keep],
    )


def like_leaf(leaf: Any, values: np.ndarray) -> Any:
    """Returns values as an array of a leaf's shape, type, and place."""
    array = values.reshape(leaf.shape).astype(leaf.dtype)
    if not isinstance(leaf, jax.Array):
        return array
    return placed(array, leaf.sharding if leaf.committed else None)
