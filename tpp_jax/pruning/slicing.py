"""Removal of pruned channels from any pytree that mirrors the parameters.

Arrays of the model (parameters, batch statistics) and their copies (optimizer moments,
averages) are found by name. The pruned positions of each of their axes are removed, or
masked.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import (
    Positions,
    buffer_of,
    cut,
    delete,
    is_spread,
    put_back,
)
from tpp_jax.graph.fields import follow_fields
from tpp_jax.graph.functions import is_array
from tpp_jax.graph.naming import leaf_name, map_named, named_leaves, some
from tpp_jax.pruning.copies import Copies, Copy, with_new_products
from tpp_jax.pruning.masks import cut_shapes, keep_masks
from tpp_jax.pruning.plan import Plan, expect_plan
from tpp_jax.pruning.readiness import warn_if_early


def slice_tree(plan: Plan, tree: Any, *, donate: bool = False) -> Any:
    """Removes the pruned channels from a pytree.

    Args:
      plan: Plan of the channels to keep; may be traced.
      tree: Pytree whose leaves have the names of the model's parameters, or names that
        end in them: ``nnx.State``, dict, optax state, training state. Leaves may also
        be ``jax.ShapeDtypeStruct``. The states of optax's Adafactor, SM3, NovoGrad and
        L-BFGS, which have other shapes, are cut along the axes that they keep.
      donate: Whether the tree is given away: each JAX array is deleted as soon as it is
        cut, and those that keep their shape are returned themselves (or copied, on
        several devices). So the memory of one array is needed in addition, not that of
        all. Traced arrays belong to the computation that they are traced for, and NumPy
        arrays to whoever holds them; neither is deleted.

    Returns:
      The same structure with smaller arrays. Kept channels keep their ascending order.
      Leaves that are not copies of a parameter keep their values, and leaves that are
      not arrays are the same objects. NumPy arrays remain NumPy arrays of the same
      dtype. JAX arrays remain on their devices, with the same sharding; along axes of
      the mesh that do not divide the new size they are replicated. No array shares
      memory with the given tree, so that either may be donated, unless ``donate`` is
      set.

    Warns:
      UserWarning: The tree contains ``params`` and the state of TPP's transforms, and
        the filters that are removed are not zero.

    Raises:
      TPPError: A leaf has the name of a parameter and another shape, the state of an
        optimizer cannot be cut, or no array of the tree has the name of a parameter.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import tpp_jax as tpp
      >>> def mlp(p, x):
      ...     return x @ p["w1"] @ p["w2"]
      >>> p = {"w1": jnp.arange(32.0).reshape(4, 8), "w2": jnp.ones((8, 2))}
      >>> groups = tpp.channel_groups(mlp, jnp.ones((1, 4)), params=p)
      >>> plan = tpp.make_plan(groups, p, 0.25)
      >>> jax.tree.map(jnp.shape, slice_tree(plan, {"momentum": p}))
      {'momentum': {'w1': (4, 6), 'w2': (6, 2)}}
    """
    expect_plan(plan)
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [leaf_name(path) for path, _ in paths]
    named = dict(zip(names, [leaf for _, leaf in paths], strict=True))
    # All of them before the first array is deleted, since they may raise.
    found = find_cuts(plan, named)
    warn_if_early(plan, named)
    leaves = [named[found[name][0]] for name in names]
    cuts = [found[name][1] for name in names]
    if donate:
        _check_alive(names, leaves)
        small = _cut_in_turn(leaves, cuts)
    else:
        small = put_back(
            [cut(*each) for each in zip(leaves, cuts, strict=True)], leaves
        )
    if plan.pruned_groups:
        changed = with_new_products(dict(zip(names, small, strict=True)))
        small = [changed.get(n, leaf) for n, leaf in zip(names, small, strict=True)]
    result = jax.tree.unflatten(structure, small)
    return follow_fields(result, plan.groups.sizes, plan.field_values())


def find_cuts(
    plan: Plan, named: Mapping[str, Any]
) -> dict[str, tuple[str, dict[int, Positions]]]:
    """Returns how the leaves of a tree are cut.

    Args:
      plan: Plan of the channels to keep.
      named: Leaves by name; of arrays only shapes and types are read.

    Returns:
      Leaf → the leaf whose array is cut for it (see :class:`Copy`), and the positions
      to keep of each axis.

    Raises:
      TPPError: As :func:`slice_tree`.
    """
    copies = Copies(plan.groups, cut_shapes(plan), named)
    _check_some_match(copies)
    found = {name: copies.find(name) for name in named}
    return {
        name: (copy.source, _cuts(plan, copy)) if copy else (name, {})
        for name, copy in found.items()
    }


def _check_alive(names: list[str], leaves: list[Any]) -> None:
    for name, leaf in zip(names, leaves, strict=True):
        known = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
        if known and leaf.is_deleted():
            raise TPPError(f"{name} is deleted: it was donated before")


def _cut_in_turn(leaves: list[Any], cuts: list[dict[int, Positions]]) -> list[Any]:
    """Returns arrays without their pruned positions, and deletes those that had any.

    Arrays on several devices are copied where they are not cut, since others may share
    their memory unnoticed.
    """
    memory = [buffer_of(leaf) for leaf in leaves]
    changed = [
        bool(own) or is_spread(leaf) for leaf, own in zip(leaves, cuts, strict=True)
    ]
    last = {buffer: i for i, buffer in enumerate(memory)}
    same = {buffer for buffer, new in zip(memory, changed, strict=True) if not new}
    small = []
    for i, (leaf, own) in enumerate(zip(leaves, cuts, strict=True)):
        small += put_back([cut(leaf, own)], [leaf]) if changed[i] else [leaf]
        traced = isinstance(small[-1], Tracer)
        if last[memory[i]] == i and memory[i] not in same and not traced:
            jax.block_until_ready(small[-1])
            delete(leaf)
    return small


def mask_tree(plan: Plan, tree: Any) -> Any:
    """Returns a pytree that is 1 where :func:`slice_tree` keeps and 0 where it cuts.

    Args:
      plan: Plan of the channels to keep; may be traced.
      tree: Pytree whose leaves have the names of the model's parameters, or names that
        end in them, as for :func:`slice_tree`.

    Returns:
      Arrays with the shapes, dtypes and shardings of the tree (float32 for leaves that
      are not numbers, a single 1 for leaves that are not arrays). A model computes the
      same with ``tree * mask`` as with the sliced tree, unless it normalises over
      channels (layer norm, softmax); :func:`tpp_jax.prune` of the masked tree makes up
      for root mean squares.

    Raises:
      TPPError: A leaf has the name of a parameter and another shape, the state of an
        optimizer cannot be cut, or no array of the tree has the name of a parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> import tpp_jax as tpp
      >>> def mlp(p, x):
      ...     return x @ p["w1"] @ p["w2"]
      >>> p = {"w1": jnp.array([[3.0, -1.0, 2.0, 4.0]]), "w2": jnp.ones((4, 1))}
      >>> groups = tpp.channel_groups(mlp, jnp.ones((1, 1)), params=p)
      >>> mask_tree(tpp.make_plan(groups, p, 0.5), p)["w1"].tolist()
      [[1.0, 0.0, 0.0, 1.0]]
    """
    expect_plan(plan)
    copies = Copies(plan.groups, cut_shapes(plan), named_leaves(tree))
    _check_some_match(copies)

    def mask_of(name: str, leaf: Any) -> Any:
        if not is_array(leaf):
            return np.float32(1)
        number = jnp.issubdtype(leaf.dtype, jnp.number)
        # On the host: a device would compile a program for every shape.
        mask: Any = np.ones(leaf.shape, leaf.dtype if number else np.float32)
        copy = copies.find(name)
        for axis, kept in (_cuts(plan, copy) if copy else {}).items():
            mask = mask * kept.over(axis, range(mask.ndim)).astype(mask.dtype)
        if not isinstance(mask, np.ndarray):
            return mask
        concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
        # A random key may have the sharding of its numbers, which have one more axis.
        placed = concrete and leaf.committed and number
        return jax.device_put(mask, leaf.sharding if placed else None)

    return map_named(mask_of, tree)


def _cuts(plan: Plan, copy: Copy) -> dict[int, Positions]:
    """Returns the positions of :func:`keep_masks` by the axes of a copy.

    Raises:
      TPPError: Layers of a loop keep different channels, and the copy, a moment of an
        optimizer that is the same for all layers, cannot be cut.
    """
    masks = keep_masks(plan, copy.parameter)
    cuts = {i: masks[axis] for i, axis in enumerate(copy.axes) if axis in masks}
    for i, kept in cuts.items():
        if kept.steps is None:
            continue
        if kept.steps not in copy.axes:
            raise TPPError(
                f"{copy.source} has no axis for the layers of {copy.parameter}, which "
                "keep different channels: initialise the optimizer again with the "
                "pruned parameters"
            )
        cuts[i] = kept._replace(steps=copy.axes.index(kept.steps))
    return cuts


def _check_some_match(copies: Copies) -> None:
    """Raises if a tree has numeric arrays but none has the name of a parameter."""
    if not copies.cut or not copies.numeric:
        return
    if not any(copies.is_named(name) for name in copies.shapes):
        raise TPPError(
            f"no leaf of the tree has the name of a parameter that the plan cuts: the "
            f"tree has {some(copies.numeric)}, the plan cuts {some(copies.cut)}. Pass "
            "a tree whose leaves have the parameters' names, or names that end in them"
        )
