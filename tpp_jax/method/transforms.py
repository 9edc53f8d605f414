"""The method as optax gradient transforms: wrap your optimizer, keep your loss.

    tx = optax.chain(
        add_tpp_penalties(plan, schedule),
        optax.add_decayed_weights(5e-4),
        optax.sgd(1e-3, momentum=0.9),
        zero_pruned(plan, schedule),
    )

All state lives in the optimizer's state: checkpoints and parallelism come free.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from tpp_jax.errors import TPPError
from tpp_jax.method.gram import (
    Target,
    gram_penalty_and_grad,
    kept_penalty_and_grad,
)
from tpp_jax.method.schedule import GrowingSchedule
from tpp_jax.pruning.groups import Member
from tpp_jax.pruning.naming import layer_name, map_named
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.slicing import keep_masks

_NO_PARAMS = "the transform needs the parameters: call update(updates, state, params)"


class TPPState(NamedTuple):
    """State of :func:`add_tpp_penalties`.

    Attributes:
      step: int32, updates done.
      strength: λ of the last update.
      gram: Σ over pruned layers of the Gram penalty at the last update, unweighted.
    """

    step: Int[Array, ""]
    strength: Float[Array, ""]
    gram: Float[Array, ""]


class ZeroPrunedState(NamedTuple):
    """State of :func:`zero_pruned`: ``step``, int32, updates done."""

    step: Int[Array, ""]


def add_tpp_penalties(
    plan: Plan,
    schedule: GrowingSchedule,
    gram_weight: float = 1000.0,
    bn: bool = True,
    l2: bool = True,
    target: Target = "decorrelate",
    kept_weight: float = 0.0,
) -> optax.GradientTransformation:
    """Adds the gradients of the TPP penalties (method steps 2–4).

    For every layer with filters P to prune, with λ the strength at this step: to the
    kernel ``gram_weight · λ · ∂L_gram/∂W`` and, on P, ``λ · W``; to the layer's bias on
    P, ``λ · b``; to the scale and bias of the norm after it on P, ``λ · γ`` and
    ``λ · β``.

    Args:
      plan: which filters are pruned.
      schedule: λ by step, counted from 0.
      gram_weight: weight of the Gram penalty; 0 leaves it out (ablation, GReg-1).
      bn: whether norms' scales and biases are shrunk.
      l2: whether pruned filters and their biases are.
      target: of the Gram matrix, see :data:`tpp_jax.method.gram.Target`.
      kept_weight: weight of ‖W Wᵀ − I‖² / N² among the kept filters, which does not
        grow with λ (ablation; 0.1 in the original).

    Returns:
      A transform of gradients that needs ``params``; to stand before weight decay and
      the optimizer, as in the module's example.

    References:
      Wang & Fu, Trainability Preserving Neural Pruning, ICLR 2023, section 3.2.
    """

    def init(params: Any) -> TPPState:
        del params
        zero = jnp.zeros((), jnp.result_type(float))
        return TPPState(jnp.zeros((), jnp.int32), zero, zero)

    def update(
        updates: Any, state: TPPState, params: Any = None
    ) -> tuple[Any, TPPState]:
        if params is None:
            raise TPPError(_NO_PARAMS)
        strength = schedule(state.step)
        penalties = []

        def add(name: str, gradient: Array, parameter: Array) -> Array:
            for member, pruned in _pruned_members(plan, name):
                factor = strength.astype(gradient.dtype)
                if member.role == "produced" and gram_weight:
                    filters_last = jnp.moveaxis(parameter, member.axis, -1)
                    mask = _once_known(gradient, pruned)
                    penalty, grad = gram_penalty_and_grad(filters_last, mask, target)
                    penalties.append(penalty.astype(strength.dtype))
                    grad = jnp.moveaxis(grad, -1, member.axis)
                    gradient = gradient + gram_weight * factor * grad
                if member.role == "produced" and kept_weight:
                    filters_last = jnp.moveaxis(parameter, member.axis, -1)
                    _, grad = kept_penalty_and_grad(filters_last, pruned)
                    grad = jnp.moveaxis(grad, -1, member.axis)
                    gradient = gradient + kept_weight * grad
                if l2 if _belongs_to_producer(plan, member) else bn:
                    coefficient = factor * _along(pruned, member.axis, parameter)
                    gradient = gradient + coefficient * parameter
            return gradient

        updates = map_named(add, updates, params)
        gram = sum(penalties, jnp.zeros((), strength.dtype))
        return updates, TPPState(state.step + 1, strength, gram)

    return optax.GradientTransformation(init, update)


def zero_pruned(plan: Plan, schedule: GrowingSchedule) -> optax.GradientTransformation:
    """Sets pruned filters to exact zero, layer by layer (method, stabilize phase).

    From step ``schedule.zero_out_step(index)`` on, with the layer's index in order of
    execution, every update leaves the layer's pruned filters, their biases and the next
    norm's scale and bias at zero. The optimizer's momentum is left alone. (The original
    leaves the biases of layers without a norm nonzero; then its sliced network is not
    what the unsliced one was. Here they are zeroed too.)

    Args:
      plan: which filters are pruned.
      schedule: tells when each layer's turn is.

    Returns:
      A transform to stand last in the chain; it needs ``params``.

    Raises:
      TPPError: the stabilize phase ends before the last layer's turn.
    """
    last = max(
        (
            m.order
            for g in plan.pruned_groups
            for m in g.members
            if m.role != "contracted"
        ),
        default=-1,
    )
    if schedule.zero_out_step(last) > schedule.total_steps - 1:
        raise TPPError(
            f"the stabilize phase of {schedule.stabilize} steps ends before layer "
            f"{last} is zeroed out: with zero_out_every={schedule.zero_out_every} it "
            f"needs at least {(last + 1) * schedule.zero_out_every} steps"
        )

    def init(params: Any) -> ZeroPrunedState:
        del params
        return ZeroPrunedState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: ZeroPrunedState, params: Any = None
    ) -> tuple[Any, ZeroPrunedState]:
        if params is None:
            raise TPPError(_NO_PARAMS)

        def zero(name: str, change: Array, parameter: Array) -> Array:
            for member, pruned in _pruned_members(plan, name):
                due = state.step >= schedule.zero_out_step(member.order)
                cleared = due & _along(pruned, member.axis, parameter)
                change = jnp.where(cleared, -parameter, change)
            return change

        return map_named(zero, updates, params), ZeroPrunedState(state.step + 1)

    return optax.GradientTransformation(init, update)


def _pruned_members(plan: Plan, leaf: str) -> list[tuple[Member, Bool[Array, " n"]]]:
    """Lists the axes of a parameter along which whole channels are pruned.

    The contracted axis of the next kernel is not among them: its slices see only zeros
    once the channels are gone, and go with the slicing.
    """
    keep = keep_masks(plan, leaf)
    members = {
        m.axis: m
        for _, m in plan.groups.members.get(leaf, ())
        if m.role != "contracted"
    }
    return [
        (member, ~jnp.asarray(keep[axis][0]))
        for axis, member in members.items()
        if axis in keep
    ]


def _belongs_to_producer(plan: Plan, member: Member) -> bool:
    """Tells a kernel (or embedding) and its own bias from a norm's parameters."""
    made = member.role in ("produced", "depthwise")
    return made or layer_name(member.leaf) in plan.groups.layers


def _once_known(gradient: Array, pruned: Bool[Array, " n"]) -> Bool[Array, " n"]:
    """Returns the same mask, as something that waits for a finite gradient.

    A penalty is of parameters alone: XLA would compute its gradient before the loss's,
    and hold that of all layers through the backward pass.
    """
    return pruned | jnp.isnan(gradient.reshape(-1)[0])


def _along(mask: Bool[Array, " n"], axis: int, array: Array) -> Array:
    """Shapes a vector so that it runs along one axis of an array."""
    return mask.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
