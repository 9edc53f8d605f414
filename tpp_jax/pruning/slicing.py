"""Taking pruned channels out of any pytree that mirrors the parameters.

Parameters, batch statistics, optimizer moments, averages: wherever an array of the
model (or a copy of it inside an optimizer's state) is found by name, the pruned
positions of each of its axes are cut out, or masked.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import cut, put_back
from tpp_jax.graph.fields import follow_fields
from tpp_jax.graph.functions import is_array
from tpp_jax.graph.naming import leaf_name, map_named, named_leaves, some
from tpp_jax.pruning.copies import Copies, Copy, with_new_products
from tpp_jax.pruning.masks import cut_shapes, keep_masks
from tpp_jax.pruning.plan import Plan, expect_plan
from tpp_jax.pruning.readiness import warn_if_early


def slice_tree(plan: Plan, tree: Any) -> Any:
    """Cuts the pruned channels out of a pytree.

    Args:
      plan: what is pruned; may be traced.
      tree: any pytree whose leaves are named like the model's parameters, or end in
        such a name: ``nnx.State``, dicts, optax states, training states. Leaves may
        also be ``jax.ShapeDtypeStruct``. Of optax's own optimizers that keep a
        parameter's statistics in another shape, those of Adafactor, SM3, NovoGrad and
        L-BFGS are cut along the axes that they keep.

    Returns:
      The same structure with smaller arrays. Kept channels stay in ascending order.
      Leaves that are no copy of a parameter keep their values, and leaves that are no
      arrays are the same objects. NumPy arrays stay NumPy arrays of the same dtype. JAX
      arrays stay where they are: sharded ones by the same rule, but replicated along
      those axes of the mesh that do not divide the new size. No array shares memory
      with the given tree, so that either may be donated.

    Warns:
      UserWarning: the tree holds ``params`` and the state of TPP's transforms, and the
        filters that are cut out are not zero.

    Raises:
      TPPError: a leaf has a parameter's name and another shape, an optimizer's state
        cannot be cut, or no array of the tree is named like a parameter.
    """
    expect_plan(plan)
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [leaf_name(path) for path, _ in paths]
    leaves = [leaf for _, leaf in paths]
    named = dict(zip(names, leaves, strict=True))
    copies = Copies(plan.groups, cut_shapes(plan), named)
    _check_some_match(copies)
    warn_if_early(plan, named)
    small = []
    for i, name in enumerate(names):
        copy = copies.find(name)
        if copy is not None:
            if copy.source != name:
                leaves[i] = named[copy.source]
            small.append(cut(leaves[i], _cuts(plan, copy)))
        else:
            small.append(leaves[i])
    small = put_back(small, leaves)
    if copies.cut:
        changed = with_new_products(copies, dict(zip(names, small, strict=True)))
        small = [
            changed.get(name, leaf) for name, leaf in zip(names, small, strict=True)
        ]
    whole = jax.tree.unflatten(structure, small)
    return follow_fields(whole, plan.groups.sizes, plan.field_values())


def mask_tree(plan: Plan, tree: Any) -> Any:
    """Returns a pytree of 1 where :func:`slice_tree` keeps and 0 where it cuts.

    Args:
      plan: what is pruned; may be traced.
      tree: as for :func:`slice_tree`.

    Returns:
      Arrays of the tree's shapes and dtypes (float32 for leaves that are not numbers, a
      single 1 for leaves that are no arrays), sharded as the tree is.
      ``tree * mask`` computes what the sliced tree computes, unless the network
      normalises over channels (layer norm, softmax).

    Raises:
      TPPError: as :func:`slice_tree`.
    """
    expect_plan(plan)
    copies = Copies(plan.groups, cut_shapes(plan), named_leaves(tree))
    _check_some_match(copies)

    def mark(name: str, leaf: Any) -> Any:
        if not is_array(leaf):
            return np.float32(1)
        number = jnp.issubdtype(leaf.dtype, jnp.number)
        # On the host: on a device every new shape would be compiled for.
        mask: Any = np.ones(leaf.shape, leaf.dtype if number else np.float32)
        copy = copies.find(name)
        for axis, (keep, _) in (_cuts(plan, copy) if copy else {}).items():
            shape = [-1 if i == axis else 1 for i in range(mask.ndim)]
            mask = mask * keep.reshape(shape).astype(mask.dtype)
        if not isinstance(mask, np.ndarray):
            return mask
        concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        # A random key may have the sharding of its numbers, which have an axis more.
        placed = concrete and leaf.committed and number
        return jax.device_put(mask, leaf.sharding if placed else None)

    return map_named(mark, tree)


def _cuts(plan: Plan, copy: Copy) -> dict[int, tuple[Any, int]]:
    """Returns the masks of :func:`keep_masks` for the axes of a copy."""
    masks = keep_masks(plan, copy.parameter)
    return {i: masks[axis] for i, axis in enumerate(copy.axes) if axis in masks}


def _check_some_match(copies: Copies) -> None:
    """Raises if a tree has arrays like parameters, and none has a parameter's name."""
    if not copies.cut or not copies.numeric:
        return
    if not any(copies.is_named(name) for name in copies.shapes):
        raise TPPError(
            f"nothing in the tree is named like a parameter that the plan cuts: it "
            f"holds {some(copies.numeric)}, the plan cuts {some(copies.cut)}. Pass a "
            "tree whose leaves have the parameters' names, or end in them"
        )
