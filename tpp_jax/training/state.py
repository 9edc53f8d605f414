"""Training states: made from a model, saved as named arrays, put into a model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tpp_jax.graph.naming import map_named, named_leaves
from tpp_jax.saving import with_arrays
from tpp_jax.training.step import TrainState
from tpp_jax.training.structure import split


def initial_state(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    average: bool,
    step: int,
    arrays: Mapping[str, Any] | None,
    teacher: nnx.Module | None = None,
) -> TrainState:
    """Returns the state that a phase starts or continues from.

    Args:
      model: Model with the parameters and batch statistics.
      tx: Optimizer.
      average: Whether moving averages are kept.
      step: Number of steps done in the phase.
      arrays: Arrays from :func:`arrays_of` to restore the optimizer's state and the
        averages from; None to initialise both.
      teacher: Network to distil; None for none.
    """
    params, stats = split(model)
    averages = (params, stats) if average else None
    if arrays is None:
        opt_state = tx.init(params)
    else:
        opt_state = jax.eval_shape(tx.init, params)
        opt_state = _filled(opt_state, unprefixed(arrays, "opt."))
        averages = _filled(averages, unprefixed(arrays, "average."))
    taught = None if teacher is None else split(teacher)
    state = TrainState(jnp.int32(step), params, stats, opt_state, averages, taught)
    # Copied, since the step donates its buffers and the model's are still needed.
    return jax.tree.map(jnp.copy, state)


def arrays_of(state: TrainState) -> dict[str, Any]:
    """Returns the arrays of a checkpoint.

    They are named ``model.<name>``, ``opt.<name>`` and ``average.<name>``. Those of the
    teacher are left out, since they belong to all phases, see :func:`teacher_arrays`.
    """
    trees = {
        "model": named_leaves(state.params) | named_leaves(state.stats),
        "opt": named_leaves(state.opt_state),
        "average": named_leaves(state.average),
    }
    return {f"{p}.{name}": x for p, named in trees.items() for name, x in named.items()}


def teacher_arrays(teacher: nnx.Module) -> dict[str, Any]:
    """Returns the arrays of a teacher for a checkpoint, named ``teacher.<name>``."""
    params, stats = split(teacher)
    named = named_leaves(params) | named_leaves(stats)
    return {f"teacher.{name}": leaf for name, leaf in named.items()}


def unprefixed(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the arrays whose names start with a prefix, by the rest of the name."""
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def with_state(model: nnx.Module, state: TrainState) -> nnx.Module:
    """Returns a model of the same structure with a state's parameters."""
    return with_arrays(model, unprefixed(arrays_of(state), "model."))


def _filled(tree: Any, arrays: Mapping[str, Any]) -> Any:
    return map_named(lambda name, _: jnp.asarray(arrays[name]), tree)
