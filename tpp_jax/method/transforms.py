"""The method as optax gradient transforms: wrap your optimizer, keep your loss.

    tx = optax.chain(
        add_tpp_penalties(plan, schedule),
        optax.add_decayed_weights(5e-4),
        optax.sgd(1e-3, momentum=0.9),
        zero_pruned(plan, schedule),
    )

All state lives in the optimizer's state: checkpoints and parallelism come free. After
the cut both transforms change nothing, so that the same ``tx`` trains on with
``slice_tree(plan, opt_state)`` and the pruned parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import is_explicit
from tpp_jax.graph.naming import map_named
from tpp_jax.method.gram import (
    Target,
    gram_penalty_and_grad,
    kept_penalty_and_grad,
)
from tpp_jax.method.schedule import GrowingSchedule
from tpp_jax.pruning.filters import belongs_to_layer, find_filters, pruned_filters
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.readiness import UNDONE

_NO_PARAMS = "the transform needs the parameters: call update(updates, state, params)"


class TPPState(NamedTuple):
    """State of :func:`add_tpp_penalties`.

    Attributes:
      step: Int32, updates done.
      strength: λ of the last update.
      gram: Σ over pruned layers of the Gram penalty at the last update, unweighted.
    """

    step: Int[Array, ""]
    strength: Float[Array, ""]
    gram: Float[Array, ""]


class ZeroPrunedState(NamedTuple):
    """State of :func:`zero_pruned`.

    Attributes:
      step: Int32, updates done.
      cleared: Int32, the step of the last update, which set to zero what was due at
        that step; -1 before any.
      undone: Bool, whether the last update found something nonzero that the one before
        had set to zero: then the transform does not stand last in its chain.
    """

    step: Int[Array, ""]
    cleared: Int[Array, ""]
    undone: Bool[Array, ""]


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
      plan: Which filters are pruned.
      schedule: λ by step, counted from 0.
      gram_weight: Weight of the Gram penalty; 0 leaves it out (ablation, GReg-1).
      bn: Whether norms' scales and biases are shrunk.
      l2: Whether pruned filters and their biases are.
      target: Of the Gram matrix, see :data:`tpp_jax.method.gram.Target`.
      kept_weight: Weight of ‖W Wᵀ − I‖² / N² among the kept filters, which does not
        grow with λ (ablation; 0.1 in the original).

    Returns:
      A transform of gradients that needs ``params``; to stand before weight decay and
      the optimizer, as in the module's example (or after ``optax.scale_by_adam`` and
      before the learning rate, so that Adam does not rescale the penalties). Parameters
      are found by name as by :func:`tpp_jax.slice_tree`. What the plan has cut already
      is not penalised.

    Raises:
      TPPError: From ``init`` or ``update``: a parameter that the plan prunes is missing
        from the tree of parameters, is there twice, or has another shape.

    References:
      Wang & Fu, Trainability Preserving Neural Pruning, ICLR 2023, section 3.2.
    """

    filters = pruned_filters(plan)

    def init(params: Any) -> TPPState:
        find_filters(plan, filters, params)
        zero = jnp.zeros((), jnp.result_type(float))
        return TPPState(jnp.zeros((), jnp.int32), zero, zero)

    def update(
        updates: Any, state: TPPState, params: Any = None
    ) -> tuple[Any, TPPState]:
        if params is None:
            raise TPPError(_NO_PARAMS)
        found = find_filters(plan, filters, params)
        strength = schedule(state.step)
        penalties = []

        def add(name: str, gradient: Array, parameter: Array) -> Array:
            if name not in found:
                return gradient
            here = found[name]
            factor, kernel = strength.astype(gradient.dtype), here.kernel
            if kernel is not None and (gram_weight or kept_weight):
                axes = {"filters": kernel.filters, "batch": kernel.batch}
                shape = [parameter.shape[axis] for axis in axes["filters"]]
                mask = here.mask(parameter.ndim, axes["filters"])
                mask = jnp.broadcast_to(jnp.asarray(mask), shape)
            if kernel is not None and gram_weight:
                late = _once_known(gradient, mask)
                penalty, grad = gram_penalty_and_grad(parameter, late, target, **axes)
                penalties.append(penalty.astype(strength.dtype))
                gradient = gradient + gram_weight * factor * grad
            if kernel is not None and kept_weight:
                _, grad = kept_penalty_and_grad(parameter, mask, **axes)
                gradient = gradient + kept_weight * grad
            if l2 if belongs_to_layer(plan, here) else bn:
                coefficient = factor * here.mask(parameter.ndim)
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
      plan: Which filters are pruned.
      schedule: Tells when each layer's turn is.

    Returns:
      A transform to stand last in the chain; it needs ``params``. Parameters are found
      as by :func:`add_tpp_penalties`. What the plan has cut already is left alone.

    Raises:
      TPPError: The stabilize phase ends before the last layer's turn; from ``init`` or
        ``update``, as :func:`add_tpp_penalties`; from an ``update`` that is not traced,
        what the last one set to zero is so no more. (Under ``jit`` the state remembers
        that, and :func:`tpp_jax.status` raises.)
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

    filters = pruned_filters(plan)

    def init(params: Any) -> ZeroPrunedState:
        find_filters(plan, filters, params)
        none = jnp.full((), -1, jnp.int32)
        return ZeroPrunedState(jnp.zeros((), jnp.int32), none, jnp.zeros((), bool))

    def update(
        updates: Any, state: ZeroPrunedState, params: Any = None
    ) -> tuple[Any, ZeroPrunedState]:
        if params is None:
            raise TPPError(_NO_PARAMS)
        found = find_filters(plan, filters, params)
        undone = jnp.zeros((), bool)

        def zero(name: str, change: Array, parameter: Array) -> Array:
            nonlocal undone
            if name not in found:
                return change
            first = schedule.zero_out_step(found[name].order)
            pruned = found[name].mask(parameter.ndim)
            # A mask of the parameter's own shape has to be sharded as it is.
            pruned = pruned & jnp.ones_like(parameter, bool)
            was_zero = state.cleared >= first
            undone |= was_zero & jnp.any(pruned & (parameter != 0))
            return jnp.where((state.step >= first) & pruned, -parameter, change)

        updates = map_named(zero, updates, params)
        if not isinstance(undone, jax.core.Tracer) and undone:
            raise TPPError(UNDONE)
        return updates, ZeroPrunedState(state.step + 1, state.step, undone)

    return optax.GradientTransformation(init, update)


def _once_known(gradient: Array, pruned: Bool[Array, "..."]) -> Bool[Array, "..."]:
    """Returns the same mask, as something that waits for a finite gradient.

    A penalty is of parameters alone: XLA would compute its gradient before the loss's,
    and hold that of all layers through the backward pass.
    """
    if is_explicit(gradient):  # one entry of a sharded array cannot be taken there
        return jax.lax.optimization_barrier((pruned, gradient))[0]
    return pruned | jnp.isnan(gradient.reshape(-1)[0])
