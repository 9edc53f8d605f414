"""Numbers of channels that the mesh of a sharded model divides."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jax.sharding import NamedSharding

from tpp_jax.graph.naming import longest_known_suffix, named_leaves
from tpp_jax.graph.records import Group, Groups


def multiples_of(
    groups: Groups, pruned: Sequence[Group], model: nnx.Module | Any
) -> dict[str, int]:
    """Returns the numbers whose multiples leave arrays divided as they are.

    Args:
      groups: All groups of the model.
      pruned: Groups that may lose channels.
      model: Model, or parameter pytree, whose arrays have a sharding; abstract ones
        may have one too. Arrays without a ``NamedSharding`` ask for nothing.

    Returns:
      Group name → number; 1 if any number of channels fits.
    """
    tree = nnx.state(model) if isinstance(model, nnx.Module) else model
    parts = _parts(groups, tree)
    users: dict[tuple[str, int], set[str]] = {}
    for group in pruned:
        for member in group.members:
            users.setdefault((member.leaf, member.axis), set()).add(group.name)
    found = {}
    for group in pruned:
        steps = [1]
        for member in group.members:
            divided = parts.get(member.leaf, {}).get(member.axis, 1)
            # Other groups on the axis may lose all but one channel.
            alone = len(users[member.leaf, member.axis]) == 1
            block = member.positions.shape[1] if alone else 1
            steps.append(divided // math.gcd(divided, block))
        found[group.name] = math.lcm(*steps)
    return found


def _parts(groups: Groups, tree: Any) -> Mapping[str, Mapping[int, int]]:
    """Returns the number of parts along each axis of each parameter."""
    found: dict[str, dict[int, int]] = {}
    for name, leaf in named_leaves(tree).items():
        sharding = getattr(leaf, "sharding", None)
        parameter = longest_known_suffix(name, groups.shapes)
        if parameter is None or not isinstance(sharding, NamedSharding):
            continue
        axes = found.setdefault(parameter, {})
        for axis, entry in enumerate(sharding.spec):
            names = entry if isinstance(entry, tuple) else (entry,)
            sizes = [sharding.mesh.shape.get(own, 1) for own in names]
            axes[axis] = math.lcm(axes.get(axis, 1), math.prod(sizes))
    return found
