"""Measurements of a network during a run, in addition to the task's metrics.

They are the Jacobian's singular values, the Gram matrix of a layer, the norm of the
filters to prune, and the early progress of fine-tuning.
"""

import functools
import math
import os
import pathlib
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tpp_jax.analysis.jacobian import jacobian_singular_values, summarize
from tpp_jax.errors import TPPError
from tpp_jax.experiment.phases import Phase
from tpp_jax.experiment.records.history import is_number
from tpp_jax.graph.groups import Member
from tpp_jax.graph.naming import layer_name, named_leaves
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.slicing import keep_masks

_BINS = 50


class JacobianMeter:
    """Function that measures Jacobian singular values, always at the same inputs."""

    def __init__(self, *inputs: Any) -> None:
        """Keeps the inputs.

        Args:
          *inputs: Inputs of the network for some examples, of which there must be one.

        Raises:
          TPPError: They are not one array of floating-point numbers.
        """
        types = [str(getattr(x, "dtype", type(x).__name__)) for x in inputs]
        dtypes = [x.dtype for x in inputs if hasattr(x, "dtype")]
        real = [x for x in dtypes if jnp.issubdtype(x, jnp.floating)]
        if not len(real) == len(types) == 1:
            raise TPPError(
                "config.jacobian_every is set, but the inputs of the network are "
                f"{', '.join(types)}: its Jacobian needs one array of "
                "floating-point numbers. Set it to 0"
            )
        self._inputs = inputs[0]

    def check(self, model: nnx.Module) -> None:
        """Raises a TPPError if a network has no Jacobian at the inputs."""
        measure = functools.partial(jacobian_singular_values, model)
        try:
            jax.eval_shape(measure, self._inputs[:1])
        except TPPError as error:
            raise TPPError(f"config.jacobian_every is set, but {error}") from error

    def __call__(self, model: nnx.Module) -> dict[str, Any]:
        """Measures a network, in evaluation mode and single precision.

        Returns:
          ``mean``, ``std``, ``min`` and ``max`` of the singular values; ``condition``,
          the mean over images of the largest divided by the smallest, None if it is
          infinite;
          ``edges`` and ``counts`` of a histogram of 50 bins.
        """
        # On the host: weights on several devices cannot be combined with images on one.
        graphdef, state = nnx.split(model)
        model = nnx.merge(graphdef, jax.device_get(state))
        values = np.asarray(jacobian_singular_values(model, self._inputs), np.float64)
        found = summarize(values)
        condition = float(found.condition_numbers.mean())
        counts, edges = np.histogram(values, _BINS)
        return {
            "mean": found.mean,
            "std": found.std,
            "min": found.min,
            "max": found.max,
            "condition": condition if math.isfinite(condition) else None,
            "edges": edges.tolist(),
            "counts": counts.tolist(),
        }


def jacobian_scalars(jacobian: Mapping[str, Any]) -> dict[str, float]:
    """Returns the finite numbers of a measurement by their names in the log."""
    names = "mean", "std", "min", "max", "condition"
    return {f"jsv_{n}": jacobian[n] for n in names if jacobian[n] is not None}


@jax.jit
def pruned_norm(plan: Plan, params: Any) -> Float[Array, ""]:
    """Returns the L2 norm of all filters that a plan prunes."""
    leaves, total = named_leaves(params), jnp.zeros(())
    for leaf, members in plan.groups.members.items():
        masks = keep_masks(plan, leaf)
        for axis in {m.axis for _, m in members if m.role == "produced"} & masks.keys():
            squares = jnp.square(leaves[leaf])
            gone = masks[axis].others().over(axis, range(squares.ndim))
            total += jnp.sum(squares, where=jnp.asarray(gone))
    return jnp.sqrt(total)


def report_layer(name: str, plan: Plan) -> Member:
    """Returns the filters of the layer whose Gram matrix is kept.

    Args:
      name: Name of the layer; "" for the first layer with pruned filters.
      plan: Plan of the pruning.

    Raises:
      TPPError: No filter of that layer is pruned.
    """
    if member := find_report_layer(name, plan):
        return member
    names = dict.fromkeys(layer_name(member.leaf) for member in _pruned_filters(plan))
    raise TPPError(
        f"config.report_layer is {name!r}, but the layers with pruned filters are "
        f"{', '.join(names)}: choose one of those"
    )


def find_report_layer(name: str, plan: Plan) -> Member | None:
    """Returns the result of :func:`report_layer`; None if no filter is pruned."""
    for member in _pruned_filters(plan):
        if name in ("", layer_name(member.leaf)):
            return member
    return None


def _pruned_filters(plan: Plan) -> list[Member]:
    members = [member for group in plan.pruned_groups for member in group.members]
    return [member for member in members if member.role == "produced"]


def save_gram(
    file: pathlib.Path, moment: str, model: nnx.Module, member: Member, plan: Plan
) -> None:
    """Adds a layer's Gram matrix W Wᵀ to an ``.npz`` file.

    All matrices in a file are divided by the mean diagonal of the first one, so that
    the mean squared norm of its filters is 1.

    Args:
      file: Path of the file, which is created if it is missing. It contains a float32
        [n, n] array for each matrix, ``layer``, ``pruned`` (bool [n], of the unpruned
        layer) and the divisor ``scale``.
      moment: Name of the matrix, which replaces an earlier one of that name.
      model: Network with its weights, before or after the cut.
      member: Filters of the layer.
      plan: Plan that prunes some of these filters.
    """
    content = read_grams(file)
    kernel = np.asarray(named_leaves(nnx.state(model))[member.leaf], np.float64)
    axis = member.axis
    pruned = np.asarray(keep_masks(plan, member.leaf)[axis].others().mask)
    if member.steps is not None:  # of layers in a loop, the first one's
        kernel = np.take(kernel, 0, axis=member.steps)
        axis -= axis > member.steps
        pruned = np.atleast_2d(pruned)[0]
    filters = np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)
    gram = filters @ filters.T
    if moment == "chosen" or "scale" not in content:
        content["scale"] = np.float64(np.diag(gram).mean() or 1)
    content |= {
        moment: (gram / content["scale"]).astype(np.float32),
        "layer": np.asarray(layer_name(member.leaf)),
        "pruned": pruned,
    }
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, **content)
    os.replace(partial, file)


def read_grams(file: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a file of :func:`save_gram`; empty if it is unreadable."""
    try:
        with np.load(file) as saved:
            return dict(saved)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}


def trainability_score(
    history: Iterable[Mapping[str, Any]],
    name: str,
    start: int,
    phase: Phase,
    schedule: str,
    metric: str = "test_accuracy",
) -> float | None:
    """Returns the mean of a test metric at the first learning rate of fine-tuning.

    Args:
      history: Rows with ``phase``, ``step`` and the metric.
      name: Name of the phase in these rows.
      start: Step of the run at which the phase starts.
      phase: Phase of fine-tuning.
      schedule: Name of its learning-rate schedule; only ``"step"`` has a first rate.
      metric: Name of the metric.

    Returns:
      The mean; None if nothing was measured at that rate.

    References:
      Wang et al., Dynamical Isometry: The Missing Ingredient for Neural Network
      Pruning, 2021.
    """
    if schedule != "step":
        return None
    steps = np.arange(phase.steps)
    rates = np.broadcast_to(np.asarray(phase.learning_rate(steps)), steps.shape)
    falls = np.flatnonzero(np.diff(rates) < 0)
    end = int(falls[0]) + 1 if falls.size else phase.steps
    found = [
        row[metric]
        for row in history
        if row.get("phase") == name
        and is_number(row.get(metric))
        and row["step"] <= start + end
    ]
    return float(np.mean(found)) if found else None
