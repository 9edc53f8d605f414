"""Taking pruned channels out of any pytree that mirrors the parameters.

Parameters, batch statistics, optimizer moments, averages: wherever an array of the
model (or a copy of it inside an optimizer's state) is found by name, the pruned
positions of each of its axes are cut out, or masked.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool

from tpp_jax.pruning.naming import longest_known_suffix, map_named
from tpp_jax.pruning.plan import Plan


def keep_masks(plan: Plan, leaf: str) -> dict[int, tuple[Bool[Array, " n"], int]]:
    """Tells which positions of a parameter's axes stay.

    Args:
      plan: what is pruned.
      leaf: dotted name of the parameter.

    Returns:
      Axis → (bool ``[n]``, True where the position stays; how many stay), for the axes
      that lose something.
    """
    masks: dict[int, tuple[Any, int]] = {}
    for group, member in plan.groups.members.get(leaf, ()):
        gone = group.size - plan.kept_count(group)
        if not gone:
            continue
        n = plan.groups.shapes[leaf][member.axis]
        mask, count = masks.get(member.axis, (np.ones(n, bool), n))
        kept = plan.kept[group.name]
        if isinstance(kept, np.ndarray):
            stays = np.zeros(group.size, bool)
            stays[kept] = True
            mask = mask.copy()
            mask[member.positions] = stays[:, None]
        else:
            stays = jnp.zeros(group.size, bool).at[kept].set(True)
            mask = jnp.asarray(mask).at[member.positions].set(stays[:, None])
        masks[member.axis] = mask, count - gone * member.positions.shape[1]
    return masks


def slice_tree(plan: Plan, tree: Any) -> Any:
    """Cuts the pruned channels out of a pytree.

    Args:
      plan: what is pruned; may be traced.
      tree: any pytree whose leaves are named like the model's parameters, or end in
        such a name: ``nnx.State``, dicts, optax states. Leaves may also be
        ``jax.ShapeDtypeStruct``.

    Returns:
      The same structure with smaller arrays. Kept channels stay in ascending order.
      Leaves that are no copy of a parameter are returned as they are.

    Raises:
      ValueError: a leaf has a parameter's name and another shape.
    """

    def cut(name: str, leaf: Any) -> Any:
        parameter = _parameter(plan, name, leaf)
        for axis, (mask, count) in keep_masks(plan, parameter).items():
            if isinstance(leaf, jax.ShapeDtypeStruct):
                shape = (*leaf.shape[:axis], count, *leaf.shape[axis + 1 :])
                leaf = jax.ShapeDtypeStruct(shape, leaf.dtype)
            elif isinstance(mask, np.ndarray):
                leaf = jnp.take(leaf, np.flatnonzero(mask), axis=axis)
            else:
                leaf = jnp.take(leaf, jnp.nonzero(mask, size=count)[0], axis=axis)
        return leaf

    return map_named(cut, tree)


def mask_tree(plan: Plan, tree: Any) -> Any:
    """Returns a pytree of 1 where :func:`slice_tree` keeps and 0 where it cuts.

    Args:
      plan: what is pruned; may be traced.
      tree: as for :func:`slice_tree`.

    Returns:
      Arrays of the tree's shapes and dtypes (float32 for leaves that are not numbers).
      ``tree * mask`` computes what the sliced tree computes, unless the network
      normalises over channels (layer norm, softmax).
    """

    def mark(name: str, leaf: Any) -> Any:
        number = jnp.issubdtype(leaf.dtype, jnp.number)
        mask = jnp.ones(leaf.shape, leaf.dtype if number else jnp.float32)
        for axis, (keep, _) in keep_masks(plan, _parameter(plan, name, leaf)).items():
            shape = [-1 if i == axis else 1 for i in range(mask.ndim)]
            mask = mask * jnp.reshape(keep, shape).astype(mask.dtype)
        return mask

    return map_named(mark, tree)


def prune(model: nnx.Module, plan: Plan) -> nnx.Module:
    """Returns a smaller model; the given one is untouched.

    Args:
      model: the model that the plan was made for.
      plan: what is pruned.

    Returns:
      A new module of the same class with narrower layers.

    Raises:
      ValueError: the sliced model does not run, since a layer has a size of its own
        written into it.
    """
    graphdef, state = nnx.split(model)
    small = nnx.merge(graphdef, slice_tree(plan, state))

    def run(state: Any, *inputs: Any) -> Any:
        merged = nnx.merge(graphdef, state)
        merged.eval()
        return merged(*inputs)

    try:
        jax.eval_shape(run, nnx.state(small), *plan.groups.inputs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the sliced {type(model).__name__} does not run: one of its layers has a "
            "size written into it that does not follow its arrays. Skip that layer's "
            f"channels in the plan. The layer says: {error}"
        ) from error
    return small


def _parameter(plan: Plan, name: str, leaf: Any) -> str:
    """Returns the parameter that a leaf is a copy of, ``""`` if of none."""
    parameter = longest_known_suffix(name, plan.groups.shapes)
    if parameter is None or parameter not in plan.groups.members:
        return ""
    shape = plan.groups.shapes[parameter]
    if np.shape(leaf) != shape:
        raise ValueError(
            f"cannot slice {name} of shape {np.shape(leaf)}: the parameter {parameter} "
            f"of the planned model has shape {shape}"
        )
    return parameter
