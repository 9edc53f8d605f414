"""Rivals of TPP that shrink all filters before any is chosen, as optax transforms.

TPP and GReg-1 choose the channels to prune first and shrink those. Here every filter of
the groups to be pruned is shrunk, and the training shows which can be spared.
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
      step: Int32, updates done.
      strength: λ of the last update.
    """

    step: Int[Array, ""]
    strength: Float[Array, ""]


class GroupLassoState(NamedTuple):
    """State of :func:`add_group_lasso`.

    Attributes:
      penalty: Σ ‖w_f‖ over all filters at the last update, unweighted.
    """

    penalty: Float[Array, ""]


def add_growing_l2(
    plan: Plan, schedule: GrowingSchedule
) -> optax.GradientTransformation:
    """Adds ``λ · W`` to the gradient of every filter of the groups that a plan prunes.

    The first part of GReg-2: λ is the same for all filters and grows slowly, so that
    those which the loss holds on to least shrink most.

    Args:
      plan: Whose pruned groups are meant, whatever it keeps of their channels.
      schedule: λ by step, counted from 0.

    Returns:
      A transform of gradients that needs ``params``; to stand before weight decay. It
      finds its parameters as :func:`tpp_jax.add_tpp_penalties` does.

    References:
      Wang et al., Neural Pruning via Growing Regularization, ICLR 2021, algorithm 2.
    """

    kernels = _kernels(plan)

    def init(params: Any) -> GrowingState:
        find_filters(plan, kernels, params)
        zero = jnp.zeros((), jnp.result_type(float))
        return GrowingState(jnp.zeros((), jnp.int32), zero)

    def update(
        updates: Any, state: GrowingState, params: Any = None
    ) -> tuple[Any, GrowingState]:
        if params is None:
            raise TPPError(_NO_PARAMS)
        found = find_filters(plan, kernels, params)
        strength = schedule(state.step)

        def add(name: str, gradient: Array, parameter: Array) -> Array:
            for member in _filters(plan, found.get(name)):
                inside = _channels(member, parameter) >= 0
                factor = strength.astype(gradient.dtype) * inside
                gradient = gradient + _along(factor, member, parameter) * parameter
            return gradient

        updates = map_named(add, updates, params)
        return updates, GrowingState(state.step + 1, strength)

    return optax.GradientTransformation(init, update)


def add_group_lasso(plan: Plan, weight: float = 1e-3) -> optax.GradientTransformation:
    """Adds ``weight · w_f / ‖w_f‖`` to the gradient of every filter (SSL).

    That is the gradient of the group lasso ``weight · Σ ‖w_f‖``, whose groups of
    weights are the filters w_f. It pulls a small filter as hard as a large one, and so
    makes filters vanish as wholes. At 0 its derivative is taken as 0.

    Args:
      plan: Whose pruned groups are meant, whatever it keeps of their channels.
      weight: Of the penalty.

    Returns:
      A transform of gradients that needs ``params``; to stand before weight decay. It
      finds its parameters as :func:`tpp_jax.add_tpp_penalties` does.

    References:
      Wen et al., Learning Structured Sparsity in Deep Neural Networks, NeurIPS 2016.
    """

    kernels = _kernels(plan)

    def init(params: Any) -> GroupLassoState:
        find_filters(plan, kernels, params)
        return GroupLassoState(jnp.zeros((), jnp.result_type(float)))

    def update(
        updates: Any, state: GroupLassoState, params: Any = None
    ) -> tuple[Any, GroupLassoState]:
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
                gradient = gradient + _along(factor, member, parameter) * parameter
            return gradient

        updates = map_named(add, updates, params)
        return updates, GroupLassoState(total)

    return optax.GradientTransformation(init, update)


def _norms(
    member: Member, parameter: Array
) -> tuple[Float[Array, " size"], Float[Array, " n"]]:
    """Returns ‖w_f‖ of each channel's filter, and at each position along the axis that
    of the filter which it is part of, 0 where it is of none."""
    others = [axis for axis in range(parameter.ndim) if axis != member.axis]
    squares = jnp.sum(jnp.square(parameter), axis=others)
    channels = _channels(member, parameter)
    size = len(member.positions)
    # What belongs to no channel is summed behind the last.
    totals = jax.ops.segment_sum(
        squares, np.where(channels < 0, size, channels), size + 1
    )
    norms = jnp.sqrt(totals[:size])
    return norms, jnp.where(channels < 0, 0, norms[channels])


def _kernels(plan: Plan) -> dict[str, Filters]:
    """Returns the kernels that make the channels of the pruned groups."""
    return {
        name: one
        for name, one in pruned_filters(plan).items()
        if any(member.role == "produced" for member in one.members)
    }


def _filters(plan: Plan, kernel: Filters | None) -> list[Member]:
    """Lists the axes of a kernel along which the pruned groups' filters stand."""
    if kernel is None:
        return []
    return [
        member
        for group, member in plan.groups.members[kernel.members[0].leaf]
        if member.role == "produced" and plan.kept_count(group) < group.size
    ]


def _channels(member: Member, parameter: Array) -> Int[np.ndarray, " n"]:
    """Returns the channel at each position along a member's axis, -1 where none is."""
    channels = np.full(parameter.shape[member.axis], -1)
    channels[member.positions] = np.arange(len(member.positions))[:, None]
    return channels


def _along(factor: Array, member: Member, parameter: Array) -> Array:
    """Shapes a vector so that it runs along a member's axis."""
    axes = range(parameter.ndim)
    return jnp.reshape(factor, [-1 if i == member.axis else 1 for i in axes])
