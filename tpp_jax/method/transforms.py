"""The method as optax gradient transforms: the optimizer is wrapped, the loss is kept.

    tx = optax.chain(
        add_tpp_penalties(plan, schedule),
        optax.add_decayed_weights(5e-4),
        optax.sgd(1e-3, momentum=0.9),
        zero_pruned(plan, schedule),
    )

All state is in the optimizer's state, so checkpoints and parallelism need no extra
code. After the cut both transforms change nothing, so the same ``tx`` continues with
``slice_tree(plan, opt_state)`` and the pruned parameters.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import is_explicit
from tpp_jax.graph.groups import Member
from tpp_jax.graph.naming import map_named, named_leaves
from tpp_jax.method.gram import (
    Target,
    gram_penalty_and_grad,
    kept_penalty_and_grad,
)
from tpp_jax.method.gram_rows import few_rows, rows_penalty_and_grad
from tpp_jax.method.schedule import GrowingSchedule
from tpp_jax.pruning.filters import (
    Filters,
    belongs_to_layer,
    find_filters,
    pruned_filters,
)
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.ratios import strengths_of
from tpp_jax.pruning.readiness import UNDONE

_NO_PARAMS = "the transform needs the parameters: call update(updates, state, params)"


class TPPState(NamedTuple):
    """State of :func:`add_tpp_penalties`.

    Attributes:
      step: Number of updates, int32.
      strength: Strength λ at the last update.
      gram: Sum over pruned layers of the Gram penalty at the last update, unweighted.
    """

    step: Int[Array, ""]
    strength: Float[Array, ""]
    gram: Float[Array, ""]


class ZeroPrunedState(NamedTuple):
    """State of :func:`zero_pruned`.

    Attributes:
      step: Number of updates, int32.
      cleared: Step of the last update, int32; -1 before the first. That update set to
        zero all filters that were due at its step.
      undone: Whether the last update found nonzero values that the one before had set
        to zero, bool. Then the transform is not the last in its chain.
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
    strengths: Mapping[str, float] | str = "",
    gram_every: int = 1,
) -> optax.GradientTransformation:
    """Adds the gradients of the TPP penalties to the updates.

    For every layer with filters P to prune, and the strength λ of the step, it adds
    ``gram_weight · λ · ∂L_gram/∂W`` and, on P, ``λ · W`` to the gradient of the kernel;
    on P, ``λ · b`` to that of the bias, and ``λ · γ`` and ``λ · β`` to those of the
    scale and bias of the norm that follows.

    Args:
      plan: Plan that says which filters are pruned.
      schedule: Strength λ by step, counted from 0.
      gram_weight: Weight of the Gram penalty; 0 for none (ablation, GReg-1). The
        default is the paper's, for convolutions; the target ``"relative"`` needs
        about 1.
      bn: Whether the scales and biases of norms are shrunk.
      l2: Whether pruned filters and their biases are shrunk.
      target: Target of the Gram matrix; see :data:`tpp_jax.method.gram.Target`.
      kept_weight: Weight of ‖W Wᵀ − I‖² / N² among the kept filters, which does not
        grow with λ (ablation; 0.1 in the original).
      strengths: Pattern of layers → factor on λ for the groups that it matches, or
        ``"pattern:factor,…"``; empty for the same λ in all groups.
      gram_every: Number of updates from one with the Gram penalty to the next. Its
        gradient is as many times as large, so that it adds up to the same, and costs a
        share of the time.

    Returns:
      A transform of gradients that needs ``params``. Chain it before weight decay and
      SGD, as in the module's example. With Adam, chain it behind
      ``optax.scale_by_adam`` and before the learning rate, so that Adam does not
      rescale the penalties. It finds parameters by name, as :func:`tpp_jax.slice_tree`
      does. Filters that are already cut are not penalised.

    Raises:
      TPPError: If a pattern of ``strengths`` matches no layer, or ``gram_every`` is not
        a positive integer; from ``init`` or ``update``, if a parameter that the plan
        prunes is missing from the tree of parameters, occurs twice, or has another
        shape.

    References:
      Wang & Fu, Trainability Preserving Neural Pruning, ICLR 2023, section 3.2.

    Example:
      >>> import tpp_jax as tpp
      >>> def net(p, x):
      ...     return x @ p["w1"] @ p["w2"]
      >>> p = {"w1": jnp.eye(2), "w2": jnp.ones((2, 1))}
      >>> groups = tpp.channel_groups(net, jnp.ones((1, 2)), params=p)
      >>> plan = tpp.make_plan(groups, p, 0.5)
      >>> schedule = tpp.growing_schedule(granularity=0.5, every=1, stabilize=100)
      >>> tx = optax.chain(add_tpp_penalties(plan, schedule), optax.sgd(1.0))
      >>> state = tx.init(p)
      >>> for step in range(2):  # λ is 0, then 0.5
      ...     updates, state = tx.update(jax.tree.map(jnp.zeros_like, p), state, p)
      >>> int(state[0].step), float(state[0].strength), float(state[0].gram)
      (2, 0.5, 0.25)
    """
    if not isinstance(gram_every, int) or gram_every < 1:
        raise TPPError(f"gram_every is {gram_every!r}, must be an integer above 0")
    filters = pruned_filters(plan)
    factors = strengths_of(plan.groups, strengths)

    def init(params: optax.Params) -> TPPState:
        find_filters(plan, filters, params)
        zero = jnp.zeros((), jnp.result_type(float))
        return TPPState(jnp.zeros((), jnp.int32), zero, zero)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, TPPState]:
        if params is None:
            raise TPPError(_NO_PARAMS)
        strength = schedule(state.step)
        parameters = named_leaves(params)
        found = {  # except in the parameters of a removed branch
            name: here
            for name, here in find_filters(plan, filters, params).items()
            if parameters[name].size
        }
        kernels = {
            name: gradient
            for name, gradient in named_leaves(updates).items()
            if name in found and found[name].kernel is not None
        }

        def factor(name: str) -> Array:
            own = max(factors[group] for group in found[name].groups)
            return own * strength

        with_gram = functools.partial(
            _add_gram,
            found=found,
            parameters=parameters,
            weights={name: gram_every * gram_weight * factor(name) for name in kernels},
            target=target,
        )
        energy = jnp.zeros((), strength.dtype)
        if gram_weight and gram_every == 1:
            kernels, energy = with_gram(kernels)
        elif gram_weight and kernels:
            kernels, energy = jax.lax.cond(
                state.step % gram_every == 0,
                with_gram,
                lambda unchanged: (unchanged, state.gram),
                kernels,
            )

        def add(name: str, gradient: Array, parameter: Array) -> Array:
            if name not in found:
                return gradient
            here, gradient = found[name], kernels.get(name, gradient)
            if here.kernel is not None and kept_weight:
                gradient = gradient + kept_weight * _kept_gradient(here, parameter)
            if l2 if belongs_to_layer(plan, here) else bn:
                own = factor(name).astype(gradient.dtype)
                coefficient = own * here.mask(parameter.ndim)
                gradient = gradient + coefficient * parameter
            return gradient

        updates = map_named(add, updates, params)
        return updates, TPPState(state.step + 1, strength, energy)

    return optax.GradientTransformation(init, update)


def zero_pruned(plan: Plan, schedule: GrowingSchedule) -> optax.GradientTransformation:
    """Sets pruned filters to exact zero, layer by layer (method, stabilize phase).

    From step ``schedule.zero_out_step(index)`` on, with the layer's index in order of
    execution, every update sets the layer's pruned filters, their biases and the scale
    and bias of the next norm to zero. The optimizer's momentum is not changed. (The
    original does not set the biases of layers without a norm to zero, so its sliced
    network differs from the unsliced one. Here they are set to zero too.)

    Args:
      plan: Plan that says which filters are pruned.
      schedule: Schedule that says when each layer is set to zero.

    Returns:
      A transform that must be the last in the chain; it needs ``params``. It finds
      parameters as :func:`add_tpp_penalties` does. Filters that are already cut are not
      changed.

    Raises:
      TPPError: If the stabilize phase ends before the last layer is set to zero; from
        ``init`` or ``update``, as for :func:`add_tpp_penalties`; from an ``update``
        that is not traced, if values that the last update set to zero are nonzero.
        (Under ``jit`` the state records that, and :func:`tpp_jax.status` raises.)

    Example:
      >>> import tpp_jax as tpp
      >>> def net(p, x):
      ...     return x @ p["w1"] @ p["w2"]
      >>> p = {"w1": jnp.eye(2), "w2": jnp.ones((2, 1))}
      >>> groups = tpp.channel_groups(net, jnp.ones((1, 2)), params=p)
      >>> plan = tpp.make_plan(groups, p, 0.5)
      >>> schedule = tpp.growing_schedule(
      ...     granularity=1.0, every=1, stabilize=1, zero_out_every=1)
      >>> tx = optax.chain(optax.sgd(0.0), zero_pruned(plan, schedule))
      >>> state = tx.init(p)
      >>> for step in range(schedule.total_steps):
      ...     updates, state = tx.update(p, state, p)
      ...     p = optax.apply_updates(p, updates)
      >>> p["w1"].tolist()
      [[0.0, 0.0], [0.0, 1.0]]
    """
    orders = [
        member.order
        for group in plan.pruned_groups
        for member in group.members
        if member.role != "contracted"
    ]
    last = max(orders, default=-1)
    if schedule.zero_out_step(last) > schedule.total_steps - 1:
        raise TPPError(
            f"the stabilize phase of {schedule.stabilize} steps ends before layer "
            f"{last} is zeroed out: with zero_out_every={schedule.zero_out_every} it "
            f"needs at least {(last + 1) * schedule.zero_out_every} steps"
        )

    filters = pruned_filters(plan)

    def init(params: optax.Params) -> ZeroPrunedState:
        find_filters(plan, filters, params)
        none = jnp.full((), -1, jnp.int32)
        return ZeroPrunedState(jnp.zeros((), jnp.int32), none, jnp.zeros((), bool))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ZeroPrunedState]:
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
            # A mask of the parameter's shape must have the parameter's sharding.
            pruned = pruned & jnp.ones_like(parameter, bool)
            was_zero = state.cleared >= first
            undone |= was_zero & jnp.any(pruned & (parameter != 0))
            return jnp.where((state.step >= first) & pruned, -parameter, change)

        updates = map_named(zero, updates, params)
        if not isinstance(undone, Tracer) and undone:
            raise TPPError(UNDONE)
        return updates, ZeroPrunedState(state.step + 1, state.step, undone)

    return optax.GradientTransformation(init, update)


def _add_gram(
    gradients: dict[str, Array],
    found: dict[str, Filters],
    parameters: dict[str, Array],
    weights: dict[str, Array],
    target: Target,
) -> tuple[dict[str, Array], Array]:
    """Adds weighted gradients of Gram penalties; returns the penalties' sum too."""
    added, penalties = {}, []
    for name, gradient in gradients.items():
        penalty, grad = _gram_penalty(found[name], parameters[name], gradient, target)
        added[name] = gradient + weights[name].astype(gradient.dtype) * grad
        penalties.append(penalty.astype(weights[name].dtype))
    return added, sum(penalties, jnp.zeros((), jnp.result_type(float)))


def _kept_gradient(found: Filters, parameter: Array) -> Array:
    kernel = found.kernel
    assert kernel is not None
    mask = _pruned_mask(found, kernel, parameter)
    return kept_penalty_and_grad(parameter, mask, kernel.filters, kernel.batch)[1]


def _gram_penalty(
    found: Filters, parameter: Array, gradient: Array, target: Target
) -> tuple[Array, Array]:
    """Returns the Gram penalty of a kernel and its gradient."""
    kernel = found.kernel
    assert kernel is not None
    filters, batch = kernel.filters, kernel.batch
    mask = _delayed(_pruned_mask(found, kernel, parameter), gradient)
    numbers = {
        member.axis: positions.number
        for member, positions in zip(found.members, found.pruned, strict=True)
    }
    count = numbers[kernel.axis]
    if few_rows(parameter, count, target, filters, batch):
        return rows_penalty_and_grad(parameter, mask, count, target, kernel.axis, batch)
    return gram_penalty_and_grad(parameter, mask, target, filters, batch)


def _pruned_mask(
    found: Filters, kernel: Member, parameter: Array
) -> Bool[Array, "..."]:
    """Returns which filters of a kernel are pruned, ``[*filters]``.

    ``[*batch, *filters]`` if layers of a loop keep different ones.
    """
    axes = kernel.filters
    if any(positions.steps is not None for positions in found.pruned):
        axes = (*kernel.batch, *axes)
    shape = [parameter.shape[axis] for axis in axes]
    mask = found.mask(parameter.ndim, axes)
    return jnp.broadcast_to(jnp.asarray(mask), shape)


def _delayed(pruned: Bool[Array, "..."], gradient: Array) -> Bool[Array, "..."]:
    """Returns the same mask, but makes it depend on a finite gradient.

    A penalty depends only on parameters: XLA would compute its gradient before that of
    the loss, and keep those of all layers in memory during the backward pass.
    """
    if is_explicit(gradient):  # where a single entry of a sharded array is unavailable
        return jax.lax.optimization_barrier((pruned, gradient))[0]
    # A slice, since a reshape would gather a gradient that devices divide.
    first = jax.lax.slice(gradient, (0,) * gradient.ndim, (1,) * gradient.ndim)
    return pruned | jnp.isnan(first.reshape(()))
