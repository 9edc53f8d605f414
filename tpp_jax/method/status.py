"""The progress of a run of TPP, from the optimizer's state and the parameters."""

import dataclasses
from typing import Any

import jax
import optax
from jax.core import Tracer

from tpp_jax.errors import TPPError
from tpp_jax.graph.naming import named_leaves
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.readiness import UNDONE, at, find_states, measure
from tpp_jax.pruning.rescaling import find_rescaling


@dataclasses.dataclass(frozen=True)
class Status:
    """The progress of a run of TPP.

    Attributes:
      step: Number of updates.
      strength: Strength λ at the last update; None without ``add_tpp_penalties``.
      gram: Gram energy: the sum over pruned layers of the Gram penalty at the last
        update, unweighted; None without ``add_tpp_penalties``.
      pruned_norm: Euclidean norm of the pruned filters, their biases and the scales and
        biases of the norms after them.
      zeroed: Number of layers whose pruned filters are exactly zero.
      layers: Number of layers of which filters are pruned.
      ready: Whether :func:`tpp_jax.prune` changes nothing: all that it removes is zero
        where it is produced and where it is read, and a norm or other reduction over
        the channels is the same without them once some parameters are rescaled. What
        the network's operations do to zeros is not known for a plan from a pickle.
      reason: Reason why the run is not ready; None if it is.
    """

    step: int
    strength: float | None
    gram: float | None
    pruned_norm: float
    zeroed: int
    layers: int
    ready: bool
    reason: str | None


def status(opt_state: Any, plan: Plan, params: optax.Params) -> Status:
    """Returns the progress of a run of TPP.

    Args:
      opt_state: State of an optimizer that contains :func:`tpp_jax.add_tpp_penalties`
        or :func:`tpp_jax.zero_pruned` at any depth: optax's chains and wrappers,
        ``nnx.Optimizer``, a training state.
      plan: Plan of the run; its arrays are concrete.
      params: Current parameters, before or after the cut, as the optimizer sees them.

    Returns:
      Numbers on the host; after the cut the norm is 0 and the run is ready.

    Raises:
      TPPError: If there is no such state or more than one, the transforms are chained
        in a wrong order, a parameter of the plan is missing, or a value is traced.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import tpp_jax as tpp
      >>> def net(p, x):
      ...     return x @ p["w1"] @ p["w2"]
      >>> p = {"w1": jnp.eye(4), "w2": jnp.ones((4, 2))}
      >>> groups = tpp.channel_groups(net, jnp.ones((1, 4)), params=p)
      >>> plan = tpp.make_plan(groups, p, 0.5)
      >>> schedule = tpp.growing_schedule(
      ...     granularity=0.5, every=1, stabilize=1, zero_out_every=1)
      >>> tx = optax.chain(
      ...     tpp.add_tpp_penalties(plan, schedule), optax.sgd(0.1),
      ...     tpp.zero_pruned(plan, schedule))
      >>> state = tx.init(p)
      >>> for _ in range(schedule.total_steps):
      ...     updates, state = tx.update(p, state, p)
      ...     p = optax.apply_updates(p, updates)
      >>> now = status(state, plan, p)
      >>> now.step, now.strength, f"{now.zeroed} of {now.layers}", now.ready
      (4, 1.0, '1 of 1', True)
    """
    named = named_leaves(opt_state)
    states = find_states(named)
    path = states.zeroing if states.penalties is None else states.penalties
    if path is None:
        raise TPPError(
            "there is no state of add_tpp_penalties or zero_pruned in the optimizer's "
            "state: pass the state of the optimizer that they are chained into"
        )
    numbers = {"step": named[at(path, "step")]}
    if states.penalties is not None:
        for field in ("strength", "gram"):
            numbers[field] = named[at(states.penalties, field)]
    leaves = (numbers, jax.tree.leaves(params), jax.tree.leaves(plan))
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(leaves)):
        raise TPPError("status returns numbers on the host: call it outside of jit")
    if states.zeroing is not None and named[at(states.zeroing, "undone")]:
        raise TPPError(UNDONE)
    progress = measure(plan, params)
    reason = None
    if not progress.all_zero:
        reason = (
            f"the pruned filters are not zero: {progress.zeroed} of {progress.layers} "
            "layers are"
        )
    elif not progress.cut and (problem := _problem(plan)):
        reason = f"the cut changes what the network computes: {problem}"
    return Status(
        step=int(numbers["step"]),
        strength=float(numbers["strength"]) if "strength" in numbers else None,
        gram=float(numbers["gram"]) if "gram" in numbers else None,
        pruned_norm=progress.norm,
        zeroed=progress.zeroed,
        layers=progress.layers,
        ready=reason is None,
        reason=reason,
    )


def _problem(plan: Plan) -> str | None:
    """Returns what a cut of zeros changes; None if it changes nothing."""
    if not plan.pruned_groups:
        return None
    source = plan.groups.source
    if source is not None:
        return find_rescaling(plan, source).problem
    reduced = [group.name for group in plan.pruned_groups if group.reduced]
    if not reduced:
        return None
    return (
        f"a norm, softmax or other reduction runs over channels of {reduced[0]}, and "
        "the plan comes from a pickle, which does not contain the model"
    )
