"""Layout of a picture of the groups: layers in rows, groups in columns."""

from typing import NamedTuple

from tpp_jax.graph.groups import Group, Groups
from tpp_jax.graph.naming import layer_name
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.slicing import keep_masks


class Row(NamedTuple):
    """A layer, or a norm or another array that channels pass.

    Attributes:
      name: Name of the layer.
      shape: Shape of its kernel, ``3×3×16×16 → 3×3×16×8``; "" without a kernel.
      is_layer: Whether it is a convolution or dense layer.
    """

    name: str
    shape: str
    is_layer: bool


class Lane(NamedTuple):
    """The place of a group.

    Attributes:
      group: Group of the lane.
      column: Number of the column from the left.
      roles: Roles in which the group runs through the arrays of a row, by row.
    """

    group: Group
    column: int
    roles: dict[int, frozenset[str]]

    @property
    def first(self) -> int:
        """First row of the group."""
        return min(self.roles)

    @property
    def last(self) -> int:
        """Last row of the group."""
        return max(self.roles)


def place_groups(groups: Groups, plan: Plan | None) -> tuple[list[Row], list[Lane]]:
    """Places layers in rows, in order of execution, and groups in lanes next to them.

    A bias is in the row of its kernel, a norm in a separate row below the layer that
    runs before it. A group gets the leftmost column that is free from its first to its
    last row.

    Args:
      groups: Groups of the model.
      plan: Plan whose shapes are shown in the rows, if any.

    Returns:
      The rows from top to bottom, and the lanes in the order of their first rows.
    """
    members = [member for group in groups for member in group.members]
    members.sort(key=lambda m: m.order)
    kernels: dict[str, list[str]] = {}  # layer → its kernels
    place: dict[str, tuple[int, bool]] = {}  # kernel, or layer without one → sort key
    for member in members:
        if member.role != "along" and member.leaf not in place:
            kernels.setdefault(layer_name(member.leaf), []).append(member.leaf)
            place[member.leaf] = (member.order, False)
    for member in members:
        layer = layer_name(member.leaf)
        if layer not in kernels:
            place.setdefault(layer, (member.order, True))
    homes = sorted(place, key=place.__getitem__)
    row_of = {home: i for i, home in enumerate(homes)}

    rows = []
    for home in homes:
        _, is_norm = place[home]
        layer = layer_name(home)
        # The kernels of a layer that has several are named.
        name = home if is_norm or len(kernels[layer]) > 1 else layer
        shape = "" if is_norm else _shape_change(home, groups, plan)
        rows.append(Row(name, shape, not is_norm))

    found = []
    for group in groups:
        roles: dict[int, frozenset[str]] = {}
        for member in group.members:
            layer = layer_name(member.leaf)
            home = (
                member.leaf if member.leaf in place else kernels.get(layer, [layer])[0]
            )
            row = row_of[home]
            roles[row] = roles.get(row, frozenset()) | {member.role}
        found.append(Lane(group, 0, roles))
    return rows, _in_columns(found)


def _in_columns(lanes: list[Lane]) -> list[Lane]:
    """Assigns every lane the leftmost column that is free in all of its rows."""
    ends: list[int] = []  # last occupied row by column
    placed = []
    for lane in sorted(lanes, key=lambda lane: (lane.first, -lane.last)):
        free = (c for c, end in enumerate(ends) if end < lane.first)
        column = next(free, len(ends))
        ends[column : column + 1] = [lane.last]
        placed.append(lane._replace(column=column))
    return placed


def _shape_change(leaf: str, groups: Groups, plan: Plan | None) -> str:
    """Returns the shape of a kernel as text, before and after the cut."""
    before = groups.shapes[leaf]
    kept = keep_masks(plan, leaf) if plan is not None else {}
    after = [kept[i].number if i in kept else n for i, n in enumerate(before)]
    texts = ["×".join(map(str, shape)) for shape in (before, after)]
    return " → ".join(dict.fromkeys(texts))
