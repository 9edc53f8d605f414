"""Which leaves of a tree of parameters a plan has something to do with before the cut.

What is penalised, set to zero and watched on the way are the pruned *filters*: slices
of the kernels that produce channels, with the biases and norms that belong to them. The
next layer's inputs are not among them: they see only zeros once the filters are zero.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Bool

from tpp_jax.errors import TPPError
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
    """The pruned filters in one parameter, or what goes with them.

    Attributes:
      members: the axes along which something is pruned, none of them contracted.
      pruned: for each, bool ``[n]``: the positions along it that go.
      cut: the parameter's shape after the cut.
    """

    members: tuple[Member, ...]
    pruned: tuple[Bool[Array, " n"], ...]
    cut: tuple[int, ...]

    @property
    def kernel(self) -> Member | None:
        """The member that says how filters lie in a kernel some of which are pruned."""
        return next((m for m in self.members if m.axis in m.filters), None)

    @property
    def order(self) -> int:
        """Index of the layer in order of execution."""
        return self.members[0].order

    def mask(self, ndim: int, filters: tuple[int, ...] | None = None) -> Array:
        """Returns which entries of the parameter go, as bool that can be broadcast.

        Args:
          ndim: axes of the parameter.
          filters: if given, the mask is of these axes alone, ``[*filters]``.
        """
        axes = tuple(range(ndim)) if filters is None else filters
        found: Any = False
        for member, pruned in zip(self.members, self.pruned, strict=True):
            if member.axis in axes:
                shape = [-1 if axis == member.axis else 1 for axis in axes]
                found = found | pruned.reshape(shape)
        return found


def pruned_filters(plan: Plan) -> dict[str, Filters]:
    """Returns what a plan prunes in each parameter that is trained.

    Statistics (the mean and variance of a batch norm) are left out: no gradient ever
    reaches them.
    """
    expect_plan(plan)
    found, shapes = {}, cut_shapes(plan)
    for leaf, shape in shapes.items():
        keep = keep_masks(plan, leaf)
        members = {
            m.axis: m
            for _, m in plan.groups.members[leaf]
            if m.role != "contracted" and m.axis in keep
        }
        kernel = any(m.role in ("produced", "depthwise") for m in members.values())
        if members and (kernel or leaf in plan.groups.trainable):
            masks = tuple(~_array(keep[axis][0]) for axis in members)
            found[leaf] = Filters(tuple(members.values()), masks, shape)
    return found


def find_filters(
    plan: Plan, filters: dict[str, Filters], params: Any
) -> dict[str, Filters]:
    """Finds the planned parameters in a tree.

    A leaf is a parameter if its name ends in the parameter's. If several do (a moving
    average kept next to the parameters), it is the one of the very same name, or the
    one inside ``params``.

    Args:
      plan: what is pruned.
      filters: of the plan, from :func:`pruned_filters`.
      params: parameters, as an optimizer sees them; arrays or their shapes.

    Returns:
      Leaf name → the filters in it; nothing if the tree has been cut by the plan.
      Parameters that optax has masked out are left out.

    Raises:
      TPPError: a planned parameter is missing, there twice, or of a shape that it has
        neither before nor after the cut.
    """
    if not filters:
        return {}
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
            f"optax.masked hides all that the plan prunes: {some(list(filters))}. Let "
            "the mask through what the transforms of TPP are to shrink"
        )
    if missing:
        names = [leaf_name(path) or "(a bare array)" for path, _ in leaves]
        raise TPPError(
            f"the plan prunes {some(missing)}, and the parameters that the "
            "optimizer is given hold no leaf of that name: there is "
            f"{some(names) or 'nothing'}. "
            "Give it the tree that the plan was made for"
        )
    found, cut = {}, []
    for parameter, names in candidates.items():
        name = _the_parameter(parameter, names)
        whole, small = plan.groups.shapes[parameter], filters[parameter].cut
        if shapes[name] == whole:
            found[name] = filters[parameter]
        elif shapes[name] == small:
            cut.append(name)
        else:
            raise TPPError(
                f"{name} has shape {shapes[name]}: before the plan's cut it has "
                f"{whole}, after it {small}"
            )
    if found and cut:
        raise TPPError(
            f"{cut[0]} has been cut by the plan and {next(iter(found))} has not: slice "
            "all parameters, or none"
        )
    return found


def belongs_to_layer(plan: Plan, filters: Filters) -> bool:
    """Tells a kernel (or embedding) and its own bias from a norm's parameters."""
    made = any(m.role in ("produced", "depthwise") for m in filters.members)
    return made or layer_name(filters.members[0].leaf) in plan.groups.layers


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
        f"the parameters that the optimizer is given hold {parameter} more than once, "
        f"as {some(names)}: give it those alone that are trained, or leave the others "
        "out with optax.masked"
    )


def _covers(name: str, parameter: str) -> bool:
    """Tells whether a parameter may lie in a subtree: whether it starts as its name
    ends."""
    while name:
        if f"{parameter}.".startswith(f"{name}."):
            return True
        name = name.partition(".")[2]
    return False


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _array(mask: Any) -> Any:
    return mask if isinstance(mask, np.ndarray) else jax.numpy.asarray(mask)
