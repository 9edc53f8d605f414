"""Whether a cut is free: what the optimizer's state and the parameters say of it."""

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpp_jax.errors import TPPError
from tpp_jax.graph.naming import named_leaves
from tpp_jax.pruning.filters import Filters, find_filters, pruned_filters
from tpp_jax.pruning.plan import Plan

UNDONE = (
    "zero_pruned set pruned filters to zero, and the next update found them nonzero: "
    "it must stand last in optax.chain, after the optimizer, and nothing else may "
    "write to the parameters"
)


class States(NamedTuple):
    """Where the transforms of TPP have their states in a tree.

    Attributes:
      penalties: path of the state of ``add_tpp_penalties`` (``"0"``), None without one.
      zeroing: path of the state of ``zero_pruned``, None without one.
    """

    penalties: str | None
    zeroing: str | None


class Progress(NamedTuple):
    """How far the pruned filters are driven to zero.

    Attributes:
      norm: Euclidean norm of all that a cut removes on the producing side.
      zeroed: how many layers have nothing but zeros there.
      layers: how many layers lose filters.
      all_zero: whether all of it is exactly zero, norms' scales and biases included.
      cut: whether the parameters have been cut already.
    """

    norm: float
    zeroed: int
    layers: int
    all_zero: bool
    cut: bool


def find_states(named: dict[str, Any]) -> States:
    """Finds the states of TPP's transforms by the names of their fields.

    Args:
      named: leaves of any tree by name: optax's states keep their fields' names as an
        ``nnx.State`` too.

    Raises:
      TPPError: there are several, or they stand in an order that cannot work.
    """
    found = _state_paths(named)
    for transform, paths in found.items():
        if len(paths) > 1:
            raise TPPError(
                f"there are {len(paths)} states of {transform}, at {', '.join(paths)}: "
                "pass the one that belongs to the plan"
            )
    states = States(*(paths[0] if paths else None for paths in found.values()))
    _check_order(states, named)
    return states


def at(path: str, field: str) -> str:
    """Returns the name of a field of the state at a path."""
    return f"{path}.{field}" if path else field


def _state_paths(named: dict[str, Any]) -> dict[str, list[str]]:
    """Returns the paths of all states of each transform."""
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


def measure(plan: Plan, params: Any) -> Progress:
    """Measures the pruned filters.

    Args:
      plan: what is pruned; concrete.
      params: parameters that mirror the model's, whole or already cut.

    Raises:
      TPPError: a planned parameter is not among them.
    """
    filters = pruned_filters(plan)
    found = find_filters(plan, filters, params)
    named = named_leaves(params)
    leaves = {name: named[name] for name in found}
    masks = {name: one.mask(np.ndim(leaves[name])) for name, one in found.items()}
    squares, nonzero = jax.device_get(_sums(leaves, masks))
    total = {one.order for one in filters.values() if _makes_channels(one)}
    left = {one.order for name, one in found.items() if nonzero[name]}
    return Progress(
        norm=math.sqrt(sum(float(square) for square in squares.values())),
        zeroed=len(total - left),
        layers=len(total),
        all_zero=not left,
        cut=bool(filters) and not found,
    )


def check_ready(opt_state: Any, plan: Plan, params: Any) -> None:
    """Warns if TPP is to drive filters to zero that are not zero when they are cut.

    Args:
      opt_state: the optimizer's state, or any tree that holds it.
      plan: what is pruned; concrete.
      params: the unpruned parameters.

    Warns:
      UserWarning: the state holds one of ``add_tpp_penalties`` or ``zero_pruned``, and
        the filters that the plan cuts are not exactly zero.

    Raises:
      TPPError: a planned parameter is not among ``params``, or the transforms stand in
        an order that cannot work.
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
        "zeroed), so the cut changes what the network computes: train on until "
        "tpp_jax.status(...).ready, with zero_pruned last in the optimizer's chain",
        UserWarning,
        stacklevel=3,
    )


def warn_if_early(plan: Plan, named: dict[str, Any]) -> None:
    """Does what :func:`check_ready` does for a tree that holds state and parameters.

    Args:
      plan: what is pruned.
      named: leaves of the tree by name. Nothing is done unless it has one optimizer
        with TPP in it and, elsewhere, the parameters, in something called ``params``,
        ``variables`` or ``model``; nor where something is traced or abstract.
    """
    paths = [path for found in _state_paths(named).values() for path in found]
    chains = {path.rpartition(".")[0] for path in paths}
    if len(chains) != 1 or "" in chains:
        return
    [chain] = chains
    names = "params", "variables", "model"
    beside = {
        name: leaf
        for name, leaf in named.items()
        if not name.startswith(f"{chain}.") and set(names) & set(name.split("."))
    }
    leaves = [
        *beside.values(),
        *plan.kept.values(),
        *(named[at(p, "step")] for p in paths),
    ]
    if any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in leaves):
        return
    state = {name: leaf for name, leaf in named.items() if name.startswith(f"{chain}.")}
    try:
        check_ready(state, plan, beside)
    except TPPError:  # no parameters, or several sets: nothing can be said
        return


def _check_order(states: States, named: dict[str, Any]) -> None:
    """Raises if transforms of one ``optax.chain`` stand in a wrong order."""
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
            "zero_pruned must stand last in optax.chain, after the optimizer: what "
            f"comes after it ({min(later)}) undoes what it does"
        )
    if states.penalties == f"{prefix}{int(place) - 1}":
        raise TPPError(
            "there is no optimizer between add_tpp_penalties and zero_pruned in "
            "optax.chain: the penalties are gradients, and must stand before the "
            "learning rate"
        )


def _makes_channels(filters: Filters) -> bool:
    return any(m.role in ("produced", "depthwise") for m in filters.members)


@jax.jit
def _sums(leaves: dict[str, Any], masks: dict[str, Any]) -> tuple[Any, Any]:
    """Returns the sum of squares of each leaf's pruned entries, and whether any is not
    zero (its square may be)."""
    squares, nonzero = {}, {}
    for name, leaf in leaves.items():
        # A mask of the leaf's own shape has to be sharded as it is.
        mask = masks[name] & jnp.ones_like(leaf, bool)
        size = jnp.where(mask, jnp.abs(leaf), 0)
        wide = size.astype(jnp.promote_types(size.dtype, jnp.float32))
        squares[name] = jnp.sum(jnp.square(wide))
        nonzero[name] = jnp.any(size != 0)
    return squares, nonzero
