"""``channel_groups``: the groups of a model, verified by trials."""

from collections.abc import Callable
from typing import Any

from flax import linen, nnx

from tpp_jax.errors import TPPError
from tpp_jax.graph.groups import read_groups
from tpp_jax.graph.records import Groups, Slot
from tpp_jax.graph.tracing import collector_paused
from tpp_jax.pruning.search import try_groups
from tpp_jax.pruning.source import Source


def channel_groups(
    model: nnx.Module | linen.Module | Callable[..., Any],
    *inputs: Any,
    params: Any = None,
    strict: bool = False,
    **kwargs: Any,
) -> Groups:
    """Finds the coupled-channel groups of a model.

    The groups are read off the model's jaxpr, and every group that is reported as
    prunable was tried: traced again with fewer channels in all of them, the model
    performs the same operations on narrower arrays. Groups that the model can only cut
    by the same number of channels are reported as one.

    Args:
      model: NNX module (run in evaluation mode, not modified), Linen module or function
        ``fn(params, *inputs)``.
      *inputs: Example inputs, as arrays or ``jax.ShapeDtypeStruct``; only their shapes
        and types are used. Other arguments (``True``, a string) are passed unchanged.
      params: Parameter pytree of a function, or variables of a Linen module; they may
        be abstract. Leaves that are not arrays (the functions and numbers of an Equinox
        module) are passed unchanged.
      strict: Whether to raise if channels meet an operation without a rule or a
        hard-coded size, instead of reporting them as unprunable with the reason.
      **kwargs: Keyword arguments of the model, like ``inputs``.

    Returns:
      The groups that have a producing layer, in order of execution. Channels that
      cannot be removed (outputs of the model, axes that meet an operation without a
      rule) are included, with the reason.

    Raises:
      TPPError: If ``strict`` is set and such a group is found.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> def mlp(p, x):
      ...     return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"]
      >>> p = {"w1": jnp.ones((4, 8)), "b1": jnp.ones(8), "w2": jnp.ones((8, 2))}
      >>> for g in channel_groups(mlp, jnp.ones((1, 4)), params=p):
      ...     print(g.name, g.size, g.reason)
      w1 8 None
      w2 2 an output of the model
    """
    source = Source.of(model, params, inputs, kwargs)
    with collector_paused():
        return _groups_of(source, strict)


def _groups_of(source: Source, strict: bool) -> Groups:
    traced = source.trace()
    groups, suppositions = read_groups(traced, source.inputs, strict)
    verdict = try_groups(source, groups, suppositions)
    joined: tuple[tuple[Slot, Slot], ...] = ()
    while verdict.joined:  # it ends, since each time there are fewer groups
        joined += verdict.joined
        groups, suppositions = read_groups(traced, source.inputs, strict, joined)
        verdict = try_groups(source, groups, suppositions)
    if strict and verdict.wrong:
        i, reason = min(verdict.wrong.items())
        raise TPPError(
            f"the channels of {groups[i].name} meet {reason}. Without strict=True they "
            "are left unpruned"
        )
    return groups.with_verdict(verdict.wrong, verdict.sizes, source, verdict.scaled)
