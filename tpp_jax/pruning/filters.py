"""The pruned filters in a tree of parameters, before the cut.

The transforms penalise, zero out and measure the pruned *filters*: slices of the
kernels that produce channels, with the biases and norms of these channels. The
corresponding inputs of the next layer are not included: they are only multiplied by
zeros once the filters are zero.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Bool

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import Positions
from tpp_jax.graph.groups import Member
from tpp_jax.graph.naming import (
    layer_name,
    leaf_name,
    longest_known_suffix,
    some,
)
from tpp_jax.pruning.masks import cut_shapes, keep_masks
from tpp_jax.pruning.plan import Plan, expect_plan


@dataclasses.dataclass(frozen=True)
class Filters:
    """The pruned filters in a kernel, or their entries in a bias or norm.

    Attributes:
      members: Axes along which positions are pruned, none of them contracted.
      pruned: For each axis, the positions that are pruned.
      cut: Shape of the parameter after the cut.
      groups: Names of the groups that run along these axes.
    """

    members: tuple[Member, ...]
    pruned: tuple[Positions, ...]
    cut: tuple[int, ...]
    groups: tuple[str, ...] = ()

    @property
    def kernel(self) -> Member | None:
        """Member whose axis enumerates filters; None if the parameter is no kernel."""
        return next((m for m in self.members if m.axis in m.filters), None)

    @property
    def order(self) -> int:
        """Index of the layer in order of execution."""
        return self.members[0].order

    def mask(
        self, ndim: int, filters: tuple[int, ...] | None = None
    ) -> Bool[Array, "..."] | Bool[np.ndarray, "..."]:
        """Returns a mask of the pruned entries, bool that can be broadcast.

        Args:
          ndim: Number of axes of the parameter.
          filters: Axes of the mask, in order; by default all of the parameter's.
        """
        axes = range(ndim) if filters is None else filters
        mask: Any = False
        for member, pruned in zip(self.members, self.pruned, strict=True):
            if member.axis in axes:
                mask = mask | pruned.over(member.axis, axes)
        return mask


def pruned_filters(plan: Plan) -> dict[str, Filters]:
    """Returns the pruned filters of each trained parameter, by its name.

    Statistics (the mean and variance of a batch norm) are not included, since they have
    no gradients.
    """
    expect_plan(plan)
    found, shapes = {}, cut_shapes(plan)
    for leaf, shape in shapes.items():
        keep = keep_masks(plan, leaf)
        pairs = {
            m.axis: (group.name, m)
            for group, m in plan.groups.members[leaf]
            if m.role != "contracted" and m.axis in keep
        }
        members = {axis: m for axis, (_, m) in pairs.items()}
        names = tuple(name for name, _ in pairs.values())
        kernel = any(m.role in ("produced", "depthwise") for m in members.values())
        if members and (kernel or leaf in plan.groups.trainable):
            gone = tuple(keep[axis].others() for axis in members)
            found[leaf] = Filters(tuple(members.values()), gone, shape, names)
    return found


def find_filters(
    plan: Plan, filters: dict[str, Filters], params: optax.Params
) -> dict[str, Filters]:
    """Finds the pruned parameters in a tree.

    A leaf is a parameter if its name ends in the parameter's. If several leaves match
    (a moving average next to the parameters), it is the one with exactly this name, or
    the one inside ``params``.

    Args:
      plan: Plan of the channels to keep.
      filters: Pruned filters of the plan, from :func:`pruned_filters`.
      params: Parameters, as an optimizer receives them; arrays or their shapes.

    Returns:
      Leaf name → the filters in it; nothing if the tree is already cut by the plan.
      Parameters that ``optax.masked`` hides are not included.

    Raises:
      TPPError: A pruned parameter is missing or ambiguous, or its shape is neither that
        before the cut nor that after it.
    """
    if not filters:
        return {}
    shapes, candidates = _candidates(plan, filters, params)
    found, cut = {}, []
    for parameter, names in candidates.items():
        name = _the_parameter(parameter, names)
        unpruned, small = plan.groups.shapes[parameter], filters[parameter].cut
        if shapes[name] == unpruned:
            found[name] = filters[parameter]
        elif shapes[name] == small:
            cut.append(name)
        else:
            raise TPPError(
                f"{name} has shape {shapes[name]}: before the plan's cut it has "
                f"{unpruned}, after it {small}"
            )
    if found and cut:
        raise TPPError(
            f"{cut[0]} has been cut by the plan and {next(iter(found))} has not: slice "
            "all parameters, or none"
        )
    return found


def _candidates(
    plan: Plan, filters: dict[str, Filters], params: optax.Params
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[str]]]:
    """Returns leaf name → shape, and parameter → names of the leaves that it may be.

    Raises:
      TPPError: There is no leaf for a pruned parameter.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    candidates: dict[str, list[str]] = {}
    hidden: set[str] = set()
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_masked)
    for path, leaf in leaves:
        name = leaf_name(path)
        if _is_masked(leaf):
            hidden.update(p for p in filters if _covers(name, p))
            continue
        parameter = longest_known_suffix(name, plan.groups.shapes)
        if parameter in filters:
            shapes[name] = np.shape(leaf)
            candidates.setdefault(parameter, []).append(name)
    missing = [p for p in filters if p not in candidates and p not in hidden]
    if not missing and not candidates:
        raise TPPError(
            "optax.masked hides all parameters that the plan prunes: "
            f"{some(list(filters))}. Include in the mask what the transforms of TPP "
            "are to shrink"
        )
    if missing:
        names = [leaf_name(path) or "(a bare array)" for path, _ in leaves]
        raise TPPError(
            f"the plan prunes {some(missing)}, but the optimizer's parameters have no "
            f"leaf of that name: they have {some(names) or 'no leaves'}. Give the "
            "optimizer the tree that the plan was made for"
        )
    return shapes, candidates


def belongs_to_layer(plan: Plan, filters: Filters) -> bool:
    """Reports whether a parameter is a layer's kernel or bias, not a norm's."""
    if makes_channels(filters):
        return True
    return layer_name(filters.members[0].leaf) in plan.groups.layers


def makes_channels(filters: Filters) -> bool:
    """Reports whether a parameter is a kernel that produces the pruned channels."""
    return any(m.role in ("produced", "depthwise") for m in filters.members)


def _the_parameter(parameter: str, names: list[str]) -> str:
    if parameter in names:
        return parameter
    inside = [
        name
        for name in names
        if "params" in name.replace("/", ".").removesuffix(parameter).split(".")
    ]
    for found in (inside, names):
        if len(found) == 1:
            return found[0]
    raise TPPError(
        f"the optimizer's parameters contain {parameter} more than once, as "
        f"{some(names)}: give it only the trained ones, or hide the others with "
        "optax.masked"
    )


def _covers(name: str, parameter: str) -> bool:
    """Reports whether a parameter may be in a subtree: it starts as its name ends."""
    while name:
        if f"{parameter}.".startswith(f"{name}."):
            return True
        name = name.partition(".")[2]
    return False


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)
