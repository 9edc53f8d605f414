"""Whether a cut changes the network, by the optimizer's state and the parameters."""

import contextlib
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from tpp_jax.errors import TPPError
from tpp_jax.graph.naming import named_leaves
from tpp_jax.pruning.filters import find_filters, makes_channels, pruned_filters
from tpp_jax.pruning.plan import Plan

UNDONE = (
    "zero_pruned set pruned filters to zero, and the next update found them nonzero: "
    "it must be last in optax.chain, after the optimizer, and nothing else may write "
    "to the parameters"
)


class States(NamedTuple):
    """Paths of the states of TPP's transforms in a tree.

    Attributes:
      penalties: Path of the state of ``add_tpp_penalties``, such as ``"0"``; None if
        there is none.
      zeroing: Path of the state of ``zero_pruned``; None if there is none.
    """

    penalties: str | None
    zeroing: str | None


class Progress(NamedTuple):
    """Distance of the pruned filters from zero.

    Attributes:
      norm: Euclidean norm of all pruned filters, with their biases and norms.
      zeroed: Number of layers whose part of this is exactly zero.
      layers: Number of layers that lose filters.
      all_zero: Whether all of this is exactly zero.
      cut: Whether the parameters have already been cut.
    """

    norm: float
    zeroed: int
    layers: int
    all_zero: bool
    cut: bool


def find_states(named: dict[str, Any]) -> States:
    """Finds the states of TPP's transforms by the names of their fields.

    Args:
      named: Leaves of a tree by name. The fields of an optax state have the same names
        in an ``nnx.State``.

    Raises:
      TPPError: There are several states of one transform, or the transforms are in a
        wrong order.
    """
    found = _state_paths(named)
    for transform, paths in found.items():
        if len(paths) > 1:
            raise TPPError(
                f"there are {len(paths)} states of {transform}, at {', '.join(paths)}: "
                "pass the one of this plan"
            )
    states = States(*(paths[0] if paths else None for paths in found.values()))
    _check_order(states, named)
    return states


def at(path: str, field: str) -> str:
    """Returns the name of a field of the state at a path."""
    return f"{path}.{field}" if path else field


def _state_paths(named: dict[str, Any]) -> dict[str, list[str]]:
    """Returns transform → paths of its states."""
    fields = {
        "add_tpp_penalties": ("gram", "step", "strength"),
        "zero_pruned": ("undone", "step", "cleared"),
    }
    found: dict[str, list[str]] = {transform: [] for transform in fields}
    for name in named:
        path, _, field = name.rpartition(".")
        for transform, (own, *others) in fields.items():
            if field == own and all(at(path, other) in named for other in others):
                found[transform].append(path)
    return found


def measure(plan: Plan, params: optax.Params) -> Progress:
    """Measures the pruned filters.

    Args:
      plan: Plan of the channels to keep; not traced.
      params: Parameters named like the model's, before or after the cut.

    Raises:
      TPPError: A pruned parameter is missing.
    """
    filters = pruned_filters(plan)
    found = find_filters(plan, filters, params)
    named = named_leaves(params)
    leaves = {name: named[name] for name in found}
    masks = {name: one.mask(np.ndim(leaves[name])) for name, one in found.items()}
    squares, nonzero = jax.device_get(_sums(leaves, masks))
    layers = {one.order for one in filters.values() if makes_channels(one)}
    not_zero = {one.order for name, one in found.items() if nonzero[name]}
    return Progress(
        norm=math.sqrt(sum(float(square) for square in squares.values())),
        zeroed=len(layers - not_zero),
        layers=len(layers),
        all_zero=not not_zero,
        cut=bool(filters) and not found,
    )


def check_ready(opt_state: optax.OptState, plan: Plan, params: optax.Params) -> None:
    """Warns if filters that TPP drives to zero are cut before they are zero.

    Args:
      opt_state: State of the optimizer, or any tree that contains it.
      plan: Plan of the channels to keep; not traced.
      params: Unpruned parameters.

    Warns:
      UserWarning: The state contains that of ``add_tpp_penalties`` or ``zero_pruned``,
        and the filters that the plan cuts are not exactly zero.

    Raises:
      TPPError: A pruned parameter is missing from ``params``, or the transforms are in
        a wrong order.
    """
    named = named_leaves(opt_state)
    states = find_states(named)
    path = states.penalties if states.zeroing is None else states.zeroing
    if path is None:
        return
    progress = measure(plan, params)
    if progress.all_zero:
        return
    step = int(named[at(path, "step")])
    warnings.warn(
        f"the filters to be cut are not zero after {step} updates (their norm is "
        f"{progress.norm:.3g}, and {progress.zeroed} of {progress.layers} layers are "
        "zeroed), so the cut changes what the network computes: continue the training "
        "until tpp_jax.status(...).ready, with zero_pruned last in optax.chain",
        UserWarning,
        stacklevel=3,
    )


def warn_if_early(plan: Plan, named: dict[str, Any]) -> None:
    """Calls :func:`check_ready` for a tree that contains both state and parameters.

    Does nothing unless the tree contains one optimizer with TPP's transforms and,
    outside of it, parameters below ``params``, ``variables`` or ``model``; nor if any
    of these is traced or abstract.

    Args:
      plan: Plan of the channels to keep.
      named: Leaves of the tree by name.
    """
    paths = [path for found in _state_paths(named).values() for path in found]
    chains = {path.rpartition(".")[0] for path in paths}
    if len(chains) != 1 or "" in chains:
        return
    [chain] = chains
    containers = {"params", "variables", "model"}
    params = {
        name: leaf
        for name, leaf in named.items()
        if not name.startswith(f"{chain}.") and containers & set(name.split("."))
    }
    leaves = [
        *params.values(),
        *plan.kept.values(),
        *(named[at(p, "step")] for p in paths),
    ]
    if any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in leaves):
        return
    state = {name: leaf for name, leaf in named.items() if name.startswith(f"{chain}.")}
    # Without parameters, or with several sets of them, readiness is unknown.
    with contextlib.suppress(TPPError):
        check_ready(state, plan, params)


def _check_order(states: States, named: dict[str, Any]) -> None:
    """Raises if transforms of one ``optax.chain`` are in a wrong order."""
    if states.zeroing is None:
        return
    chain, _, place = states.zeroing.rpartition(".")
    if not place.isdigit():
        return
    prefix = f"{chain}." if chain else ""
    later = {
        name
        for name in named
        if name.startswith(prefix)
        and (number := name.removeprefix(prefix).partition(".")[0]).isdigit()
        and int(number) > int(place)
    }
    if later:
        raise TPPError(
            "zero_pruned must be last in optax.chain, after the optimizer: a later "
            f"transform ({min(later)}) undoes its updates"
        )
    if states.penalties == f"{prefix}{int(place) - 1}":
        raise TPPError(
            "there is no optimizer between add_tpp_penalties and zero_pruned in "
            "optax.chain: the penalties are gradients, and must come before the "
            "learning rate"
        )


@jax.jit
def _sums(leaves: dict[str, Any], masks: dict[str, Any]) -> tuple[Any, Any]:
    """Returns the sum of squares of each leaf's pruned entries, and if any is nonzero.

    The square of a nonzero entry may be zero.
    """
    squares, nonzero = {}, {}
    for name, leaf in leaves.items():
        # The mask must have the sharding of the leaf.
        mask = masks[name] & jnp.ones_like(leaf, bool)
        size = jnp.where(mask, jnp.abs(leaf), 0)
        wide = size.astype(jnp.promote_types(size.dtype, jnp.float32))
        squares[name] = jnp.sum(jnp.square(wide))
        nonzero[name] = jnp.any(size != 0)
    return squares, nonzero
