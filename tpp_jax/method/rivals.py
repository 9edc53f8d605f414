"""Alternatives to TPP that shrink all filters before any is chosen, as transforms.

TPP and GReg-1 first choose the channels to prune and then shrink those. The transforms
here shrink every filter of the groups to be pruned, and training shows which are
dispensable.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from tpp_jax.errors import TPPError
from tpp_jax.graph.groups import Member
from tpp_jax.graph.naming import map_named
from tpp_jax.method.schedule import GrowingSchedule
from tpp_jax.pruning.filters import Filters, find_filters, pruned_filters
from tpp_jax.pruning.plan import Plan

_NO_PARAMS = "the transform needs the parameters: call update(updates, state, params)"


class GrowingState(NamedTuple):
    """State of :func:`add_growing_l2`.

    Attributes:
      step: Number of updates, int32.
      strength: Strength λ at the last update.
    """

    step: Int[Array, ""]
    strength: Float[Array, ""]


class GroupLassoState(NamedTuple):
    """State of :func:`add_group_lasso`.

    Attributes:
      penalty: Sum of ‖w_f‖ over all filters at the last update, unweighted.
    """

    penalty: Float[Array, ""]


def add_growing_l2(
    plan: Plan, schedule: GrowingSchedule
) -> optax.GradientTransformation:
    """Adds ``λ · W`` to the gradient of every filter of the groups that a plan prunes.

    The first part of GReg-2: λ is the same for all filters and grows slowly, so that
    the filters that matter least to the loss shrink most.

    Args:
      plan: Plan whose pruned groups are shrunk. All their channels are, even those that
        the plan keeps.
      schedule: Strength λ by step, counted from 0.

    Returns:
      A transform of gradients that needs ``params``; chain it before weight decay. It
      finds its parameters as :func:`tpp_jax.add_tpp_penalties` does.

    References:
      Wang et al., Neural Pruning via Growing Regularization, ICLR 2021, algorithm 2.
    """
    kernels = _kernels(plan)

    def init(params: optax.Params) -> GrowingState:
        find_filters(plan, kernels, params)
        zero = jnp.zeros((), jnp.result_type(float))
        return GrowingState(jnp.zeros((), jnp.int32), zero)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, GrowingState]:
        if params is None:
            raise TPPError(_NO_PARAMS)
        found = find_filters(plan, kernels, params)
        strength = schedule(state.step)

        def add(name: str, gradient: Array, parameter: Array) -> Array:
            for member in _filters(plan, found.get(name)):
                inside = _channels(member, parameter) >= 0
                factor = strength.astype(gradient.dtype) * inside
                factor = _along(factor, member, parameter)
                gradient = gradient + factor * parameter
            return gradient

        updates = map_named(add, updates, params)
        return updates, GrowingState(state.step + 1, strength)

    return optax.GradientTransformation(init, update)


def add_group_lasso(plan: Plan, weight: float = 1e-3) -> optax.GradientTransformation:
    """Adds ``weight · w_f / ‖w_f‖`` to the gradient of every filter (SSL).

    That is the gradient of the group lasso ``weight · Σ ‖w_f‖``, whose groups of
    weights are the filters w_f. The gradient has the same norm for small and for large
    filters, so entire filters vanish. At 0 the derivative is taken to be 0.

    Args:
      plan: Plan whose pruned groups are shrunk. All their channels are, even those that
        the plan keeps.
      weight: Weight of the penalty.

    Returns:
      A transform of gradients that needs ``params``; chain it before weight decay. It
      finds its parameters as :func:`tpp_jax.add_tpp_penalties` does.

    References:
      Wen et al., Learning Structured Sparsity in Deep Neural Networks, NeurIPS 2016.
    """
    kernels = _kernels(plan)

    def init(params: optax.Params) -> GroupLassoState:
        find_filters(plan, kernels, params)
        return GroupLassoState(jnp.zeros((), jnp.result_type(float)))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, GroupLassoState]:
        if params is None:
            raise TPPError(_NO_PARAMS)
        found = find_filters(plan, kernels, params)
        total = jnp.zeros_like(state.penalty)

        def add(name: str, gradient: Array, parameter: Array) -> Array:
            nonlocal total
            for member in _filters(plan, found.get(name)):
                norms, along = _norms(member, parameter)
                total = total + norms.sum().astype(total.dtype)
                factor = weight * jnp.where(
                    along > 0, 1 / jnp.where(along > 0, along, 1), 0
                )
                gradient = gradient + factor * parameter
            return gradient

        updates = map_named(add, updates, params)
        return updates, GroupLassoState(total)

    return optax.GradientTransformation(init, update)


def _norms(
    member: Member, parameter: Array
) -> tuple[Float[Array, "*steps size"], Float[Array, "..."]]:
    """Returns the norm ‖w_f‖ of each channel's filter, by channel and by position.

    The second array has, for each position along the axis, the norm of the filter that
    contains it, or 0 if no filter does; it broadcasts against the parameter. In layers
    of a loop that may keep different channels, each has filters of its own.
    """
    own = (member.axis, member.steps)
    others = [axis for axis in range(parameter.ndim) if axis not in own]
    squares = jnp.sum(jnp.square(parameter), axis=others, keepdims=True)
    squares = jnp.moveaxis(squares, member.axis, 0)
    channels = _channels(member, parameter)
    size = len(member.positions)
    # Positions that belong to no channel are summed after the last channel.
    totals = jax.ops.segment_sum(
        squares, np.where(channels < 0, size, channels), size + 1
    )
    norms = jnp.sqrt(totals[:size])
    outside = (channels < 0).reshape(-1, *[1] * (norms.ndim - 1))
    along = jnp.where(outside, 0, norms[channels])
    return norms, jnp.moveaxis(along, 0, member.axis)


def _kernels(plan: Plan) -> dict[str, Filters]:
    """Returns the kernels that produce the channels of the pruned groups."""
    return {
        name: one
        for name, one in pruned_filters(plan).items()
        if any(member.role == "produced" for member in one.members)
    }


def _filters(plan: Plan, kernel: Filters | None) -> list[Member]:
    """Returns the axes of a kernel that index filters of the pruned groups."""
    if kernel is None:
        return []
    return [
        member
        for group, member in plan.groups.members[kernel.members[0].leaf]
        if member.role == "produced" and plan.kept_count(group) < group.size
    ]


def _channels(member: Member, parameter: Array) -> Int[np.ndarray, " n"]:
    """Returns the channel at each position along a member's axis, -1 for none."""
    channels = np.full(parameter.shape[member.axis], -1)
    channels[member.positions] = np.arange(len(member.positions))[:, None]
    return channels


def _along(factor: Array, member: Member, parameter: Array) -> Array:
    """Reshapes a vector so that it broadcasts along a member's axis."""
    axes = range(parameter.ndim)
    return jnp.reshape(factor, [-1 if i == member.axis else 1 for i in axes])
