"""Plans: which channels of each group are kept."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from tpp_jax.errors import TPPError, TPPTypeError
from tpp_jax.graph.records import Group, Groups

Indices = (
    Int[Array, " k"]
    | Int[np.ndarray, " k"]
    | Int[Array, "steps k"]
    | Int[np.ndarray, "steps k"]
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The channels of each group that are kept, as a pytree of their indices.

    The number of kept channels is static (a shape), their indices are an array: slicing
    and penalties can be jitted, and vmapped over plans with equal counts. Plans that
    are not traced compare, hash, copy and pickle by content.

    Attributes:
      kept: Group name → int32 ``[k]``, ascending, for every prunable group; ``[steps,
        k]`` for one with :attr:`Group.steps`, whose layers keep different channels.
      groups: Groups of the unpruned model.

    Example:
      >>> import jax.numpy as jnp
      >>> import tpp_jax as tpp
      >>> def mlp(p, x):
      ...     return x @ p["w1"] @ p["w2"]
      >>> p = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
      >>> groups = tpp.channel_groups(mlp, jnp.ones((1, 4)), params=p)
      >>> plan = Plan.from_dict({"w1": [0, 2, 5]}, groups)
      >>> plan.to_dict(), plan.kept_count(groups["w1"])
      ({'w1': [0, 2, 5]}, 3)
    """

    kept: Mapping[str, Indices]
    groups: Groups = dataclasses.field(metadata={"static": True})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        if self is other:
            return True
        return (
            self.kept.keys() == other.kept.keys()
            and all(np.array_equal(self.kept[k], other.kept[k]) for k in self.kept)
            and self.groups == other.groups
        )

    def __hash__(self) -> int:
        kept = frozenset(
            (name, np.shape(indices), np.asarray(indices, np.int64).tobytes())
            for name, indices in self.kept.items()
        )
        return hash((kept, self.groups))

    @property
    def pruned_groups(self) -> tuple[Group, ...]:
        """The groups that lose at least one channel, in order of execution."""
        return tuple(
            g for g in self.groups if self.kept_count(g) < g.size and g.reason is None
        )

    def kept_count(self, group: Group) -> int:
        """Returns the number of channels of a group that are kept."""
        kept = self.kept.get(group.name)
        return group.size if kept is None else kept.shape[-1]

    def kept_blocks(self, leaf: str, blocks: int) -> int | None:
        """Returns the number of blocks of a parameter's channels that are not empty.

        Args:
          leaf: Name of a parameter: the scale of a group norm, whose channels may lie
            along any axis (under ``nn.scan`` it has two), or a kernel whose outputs are
            its last axis.
          blocks: Number of equal blocks of neighbouring positions.

        Returns:
          The number of blocks with a kept position; None if there is no such parameter
          or it does not divide into such blocks.
        """
        shape = self.groups.shapes.get(leaf)
        members = self.groups.members.get(leaf, ())
        axes = {member.axis for _, member in members}
        along = len(axes) == 1 and all(member.role == "along" for _, member in members)
        axis = axes.pop() if along else -1
        if not shape or shape[axis] % blocks:
            return None
        kept = np.ones(shape[axis], bool)
        for group, member in members:
            if member.axis == axis % len(shape) and self.kept_count(group) < group.size:
                # Layers that keep different channels empty equally many blocks.
                gone = np.atleast_2d(self.pruned(group.name))[0]
                kept[member.positions[gone]] = False
        return int(kept.reshape(blocks, -1).any(axis=1).sum())

    def field_values(self) -> dict[str, dict[str, int | tuple[int, ...]]]:
        """Returns module path → attribute → its value in the pruned model."""
        values: dict[str, dict[str, int | tuple[int, ...]]] = {}
        for size in self.groups.sizes:
            value = size.value(
                lambda name: (
                    self.kept_count(self.groups[name]),
                    self.groups[name].size,
                )
            )
            values.setdefault(size.field.path, {})[size.field.name] = value
        return values

    def pruned(self, name: str) -> Int[np.ndarray, " p"] | Int[np.ndarray, "steps p"]:
        """Returns the pruned channels of a group, ascending; not for traced plans."""
        kept = np.asarray(self.kept[name])
        gone = np.ones((*kept.shape[:-1], self.groups[name].size), bool)
        np.put_along_axis(gone, kept, False, axis=-1)
        return np.nonzero(gone)[-1].reshape(*kept.shape[:-1], -1)

    def of_step(self, step: int) -> "Plan":
        """Returns the plan with the channels that a step of all loops keeps in all."""
        kept = {
            name: indices if indices.ndim == 1 else indices[min(step, len(indices) - 1)]
            for name, indices in self.kept.items()
        }
        return Plan(kept, self.groups)

    def then(self, later: "Plan") -> "Plan":
        """Returns the plan that is equivalent to this one followed by another.

        Args:
          later: Plan for the model that this plan results in.
        """
        kept = {}
        for name, first in self.kept.items():
            first, second = np.asarray(first), later.kept.get(name)
            if second is not None:
                steps = np.broadcast_shapes(first.shape[:-1], second.shape[:-1])
                first = np.broadcast_to(first, (*steps, first.shape[-1]))
                second = np.broadcast_to(second, (*steps, second.shape[-1]))
                first = np.take_along_axis(first, second, axis=-1)
            kept[name] = first
        return Plan(kept, self.groups)

    def to_dict(self) -> dict[str, list[Any]]:
        """Returns the kept indices as plain data, ready for JSON."""
        return {name: np.asarray(kept).tolist() for name, kept in self.kept.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Sequence[Any]], groups: Groups) -> "Plan":
        """Returns a plan from the data of :meth:`to_dict`.

        Args:
          data: Group name → indices of its kept channels, ascending, for every prunable
            group; a list of such lists, equally long, if each layer of a loop keeps its
            own.
          groups: Groups of the model that the plan was made for.

        Raises:
          TPPError: The data names other groups, or channels that they do not have.
        """
        sizes = {g.name: g.size for g in groups if g.reason is None}
        if not isinstance(data, Mapping):
            raise TPPError(f"a plan is a dict of group → kept indices, not {data!r}")
        if sizes.keys() != data.keys():
            differing = sorted(sizes.keys() ^ data.keys())
            raise TPPError(
                f"the plan is for another model: groups {differing} do not match"
            )
        for name, indices in data.items():
            rows, steps = [indices], groups[name].steps
            if steps and isinstance(indices, Sequence) and len(indices) == steps:
                rows = indices if isinstance(indices[0], Sequence) else rows
            if not all(_ascending(row, sizes[name]) for row in rows) or any(
                len(row) != len(rows[0]) for row in rows
            ):
                own = f" in each of {steps} layers" if steps else ""
                raise TPPError(
                    f"the plan is for another model: {name} has {sizes[name]} "
                    f"channels{own}, and {indices!r} are not ascending indices of them"
                )
        kept = {name: np.asarray(data[name], np.int32) for name in sizes}
        return cls(kept, groups)


def _ascending(indices: Any, size: int) -> bool:
    """Reports whether something is a list of ascending indices."""
    return (
        isinstance(indices, Sequence)
        and all(type(i) is int and 0 <= i < size for i in indices)
        and not (np.diff(indices) <= 0).any()
    )


def expect_plan(plan: Any) -> None:
    """Raises if an argument is not a plan.

    Raises:
      TPPTypeError: The argument is not a :class:`Plan`.
    """
    if not isinstance(plan, Plan):
        hint = ", or tpp_jax.Plan.from_dict(...)" if isinstance(plan, Mapping) else ""
        raise TPPTypeError(
            f"the plan is a {type(plan).__name__}, not a Plan: pass the result of "
            f"tpp_jax.make_plan(...){hint}"
        )
