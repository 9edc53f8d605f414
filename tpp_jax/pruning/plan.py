"""What a run will do, as data: which channels of each group stay."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from tpp_jax.errors import TPPError, TPPTypeError
from tpp_jax.pruning.records import Group, Groups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Which channels stay: a pytree whose leaves are the kept indices.

    The number of channels kept is static (a shape), which channels they are is an
    array: slicing and penalties can be jitted, and vmapped over plans of equal counts.
    Concrete plans compare, hash, copy and pickle by content.

    Attributes:
      kept: group name → int32 ``[k]``, ascending, for every prunable group.
      groups: the groups of the unpruned model.
    """

    kept: dict[str, Int[Array, " k"]]
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
        """Returns how many of a group's channels stay."""
        kept = self.kept.get(group.name)
        return group.size if kept is None else kept.shape[-1]

    def kept_blocks(self, leaf: str, blocks: int) -> int | None:
        """Returns how many equal blocks of a parameter's channels keep something.

        Args:
          leaf: name of a parameter: a group norm's scale, whose channels may lie along
            any axis (under ``nn.scan`` it has two), or a kernel with its outputs last.
          blocks: number of blocks of neighbouring positions.

        Returns:
          The number; None if there is no such parameter or it has no such blocks.
        """
        shape = self.groups.shapes.get(leaf)
        here = self.groups.members.get(leaf, ())
        axes = {member.axis for _, member in here}
        along = len(axes) == 1 and all(member.role == "along" for _, member in here)
        axis = axes.pop() if along else -1
        if not shape or shape[axis] % blocks:
            return None
        stays = np.ones(shape[axis], bool)
        for group, member in here:
            if member.axis == axis % len(shape) and self.kept_count(group) < group.size:
                stays[member.positions[self.pruned(group.name)]] = False
        return int(stays.reshape(blocks, -1).any(axis=1).sum())

    def field_values(self) -> dict[str, dict[str, int | tuple[int, ...]]]:
        """Returns path of a module → attribute → its value in the pruned model."""
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

    def pruned(self, name: str) -> Int[np.ndarray, " p"]:
        """Returns the channels of a group that go, ascending (concrete plans only)."""
        return np.setdiff1d(np.arange(self.groups[name].size), self.kept[name])

    def then(self, later: "Plan") -> "Plan":
        """Returns the plan that does at once what this and a plan of its result do.

        Args:
          later: made for the model that this plan leaves.
        """
        whole = {name: np.arange(len(kept)) for name, kept in self.kept.items()}
        kept = {
            name: np.asarray(ours)[np.asarray(later.kept.get(name, whole[name]))]
            for name, ours in self.kept.items()
        }
        return Plan(kept, self.groups)

    def to_dict(self) -> dict[str, list[int]]:
        """Returns the kept indices as plain data, ready for JSON."""
        return {name: np.asarray(kept).tolist() for name, kept in self.kept.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Sequence[int]], groups: Groups) -> "Plan":
        """Rebuilds a plan from :meth:`to_dict` and the groups of the same model.

        Raises:
          TPPError: the data names other groups, or channels that they do not have.
        """
        sizes = {g.name: g.size for g in groups if g.reason is None}
        if not isinstance(data, Mapping):
            raise TPPError(f"a plan is a dict of group → kept indices, not {data!r}")
        if sizes.keys() != data.keys():
            odd = sorted(sizes.keys() ^ data.keys())
            raise TPPError(f"the plan is of another model: groups {odd} do not match")
        for name, indices in data.items():
            numbers = isinstance(indices, Sequence) and all(
                type(i) is int and 0 <= i < sizes[name] for i in indices
            )
            if not numbers or not indices or (np.diff(indices) <= 0).any():
                raise TPPError(
                    f"the plan is of another model: {name} has {sizes[name]} channels, "
                    f"and {indices!r} are not ascending indices of them"
                )
        kept = {name: np.asarray(data[name], np.int32) for name in sizes}
        return cls(kept, groups)


def expect_plan(plan: Any) -> None:
    """Raises if something else was given in place of a plan.

    Raises:
      TPPTypeError: it is no :class:`Plan`.
    """
    if not isinstance(plan, Plan):
        hint = ", or tpp_jax.Plan.from_dict(...)" if isinstance(plan, Mapping) else ""
        raise TPPTypeError(
            f"the plan is a {type(plan).__name__}, and not a Plan: give what "
            f"tpp_jax.make_plan(...) returned{hint}"
        )
