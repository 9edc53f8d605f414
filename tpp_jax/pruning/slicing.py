"""Taking pruned channels out of any pytree that mirrors the parameters.

Parameters, batch statistics, optimizer moments, averages: wherever an array of the
model (or a copy of it inside an optimizer's state) is found by name, the pruned
positions of each of its axes are cut out, or masked.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from tpp_jax.errors import TPPError
from tpp_jax.pruning.fields import follow_fields
from tpp_jax.pruning.naming import longest_known_suffix, map_named
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.records import Group, Member


def keep_masks(plan: Plan, leaf: str) -> dict[int, tuple[Bool[Array, " n"], int]]:
    """Tells which positions of a parameter's axes stay.

    Args:
      plan: what is pruned.
      leaf: dotted name of the parameter.

    Returns:
      Axis → (bool ``[n]``, True where the position stays; how many stay), for the axes
      that lose something.
    """
    cut = [
        (group, member)
        for group, member in plan.groups.members.get(leaf, ())
        if plan.kept_count(group) < group.size
    ]
    masks: dict[int, tuple[Any, int]] = {}
    for axis in dict.fromkeys(member.axis for _, member in cut):
        n = plan.groups.shapes[leaf][axis]
        here = [(group, member) for group, member in cut if member.axis == axis]
        mask = np.ones(n, bool)
        for group, member in here:
            stays = _stays(plan.kept[group.name], group.size)[:, None]
            if isinstance(mask, np.ndarray) and isinstance(stays, np.ndarray):
                mask[member.positions] &= stays
            else:
                rows = jnp.ones(n, bool).at[member.positions].set(stays)
                mask = jnp.asarray(mask) & rows
        if isinstance(mask, np.ndarray):
            masks[axis] = mask, int(mask.sum())
        else:
            masks[axis] = mask, _kept_positions(plan, n, here)
    return masks


def _stays(kept: Any, size: int) -> Any:
    """Returns bool ``[size]``, True for the kept channels."""
    if isinstance(kept, np.ndarray):
        stays = np.zeros(size, bool)
        stays[kept] = True
        return stays
    return jnp.zeros(size, bool).at[kept].set(True)


def _kept_positions(plan: Plan, n: int, here: list[tuple[Group, Member]]) -> int:
    """Counts the positions of an axis that stay, whichever channels they are.

    Where several groups run through one position (the heads and the channels of a head
    through an attention's projection), it stays if it stays for each of them: such
    positions are all combinations of the groups' channels, so the shares multiply.
    """
    through = np.zeros((n, len(here)), bool)
    for i, (_, member) in enumerate(here):
        through[member.positions.reshape(-1), i] = True
    total = 0
    for row, positions in zip(
        *np.unique(through, axis=0, return_counts=True), strict=True
    ):
        share = int(positions)
        for i in np.flatnonzero(row):
            group, _ = here[i]
            share = share * plan.kept_count(group) // group.size
        total += share
    return total


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
      TPPError: a leaf has a parameter's name and another shape.
    """

    def cut(name: str, leaf: Any) -> Any:
        parameter = _parameter(plan, name, leaf)
        for axis, (mask, count) in keep_masks(plan, parameter).items():
            if isinstance(leaf, jax.ShapeDtypeStruct):
                shape = (*leaf.shape[:axis], count, *leaf.shape[axis + 1 :])
                leaf = jax.ShapeDtypeStruct(shape, leaf.dtype)
            elif isinstance(mask, np.ndarray) and not isinstance(leaf, jax.core.Tracer):
                # On the host: on a device every new shape would be compiled for.
                leaf = np.take(np.asarray(leaf), np.flatnonzero(mask), axis=axis)
            else:
                leaf = jnp.take(leaf, jnp.nonzero(mask, size=count)[0], axis=axis)
        return leaf

    # All at once, and not by jnp.asarray, which compiles a copy for every new shape.
    leaves, structure = jax.tree.flatten(map_named(cut, tree))
    host = [i for i, leaf in enumerate(leaves) if isinstance(leaf, np.ndarray)]
    for i, leaf in zip(host, jax.device_put([leaves[i] for i in host]), strict=True):
        leaves[i] = leaf
    tree = jax.tree.unflatten(structure, leaves)
    return follow_fields(tree, plan.groups.sizes, plan.field_values())


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
        # On the host: on a device every new shape would be compiled for.
        mask: Any = np.ones(leaf.shape, leaf.dtype if number else np.float32)
        for axis, (keep, _) in keep_masks(plan, _parameter(plan, name, leaf)).items():
            shape = [-1 if i == axis else 1 for i in range(mask.ndim)]
            mask = mask * keep.reshape(shape).astype(mask.dtype)
        return jax.device_put(mask) if isinstance(mask, np.ndarray) else mask

    return map_named(mark, tree)


def _parameter(plan: Plan, name: str, leaf: Any) -> str:
    """Returns the parameter that a leaf is a copy of, ``""`` if of none."""
    parameter = longest_known_suffix(name, plan.groups.shapes)
    if parameter is None or parameter not in plan.groups.members:
        return ""
    shape = plan.groups.shapes[parameter]
    if np.shape(leaf) != shape:
        raise TPPError(
            f"cannot slice {name} of shape {np.shape(leaf)}: the parameter {parameter} "
            f"of the planned model has shape {shape}"
        )
    return parameter
