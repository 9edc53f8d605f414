"""Groups of coupled channels of any traced function, which are pruned together.

A *channel* is a set of positions in parameter arrays that can only be removed together:
row c of a convolution kernel's output axis, entry c of the batch norm after it, slice c
of the next kernel's input axis. A *group* is a set of channels that occupy the same
arrays, such as the sixteen channels of ``layer1.0.conv1``. Both are read off the jaxpr;
there is no table of architectures.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from tpp_jax.errors import TPPError
from tpp_jax.graph.bundles import (
    Row,
    alike_channels,
    positions_of,
    rows_of,
    sorted_by_channel,
)
from tpp_jax.graph.choices import find_choices
from tpp_jax.graph.comparing import Reading
from tpp_jax.graph.functions import is_array
from tpp_jax.graph.labels import Axis, Channels, Labels, NotUnderstood, solve
from tpp_jax.graph.layers import kernel_axes
from tpp_jax.graph.loops import Loops
from tpp_jax.graph.records import Group, Groups, Member, Slot, Supposition, with_inner
from tpp_jax.graph.roles import (
    Roles,
    convolution_kinds,
    kind_of,
    read_filters,
    read_orders,
    read_roles,
    read_stacks,
)
from tpp_jax.graph.rules import apply_rule
from tpp_jax.graph.tracing import Trace, layer_names, layers, source_line


def read_groups(
    traced: Trace,
    inputs: tuple[Any, ...],
    strict: bool = False,
    joined: tuple[tuple[Slot, Slot], ...] = (),
    unpruned: Groups | None = None,
) -> tuple[Groups, list[Supposition]]:
    """Reads the groups of coupled channels off a traced computation.

    Args:
      traced: Computation.
      inputs: Example inputs that it was traced with.
      strict: See :func:`tpp_jax.channel_groups`.
      joined: Pairs of axes whose channels are to be pruned together in any case.
      unpruned: Groups of the unpruned model if this is a sliced form of it. A sliced
        convolution with a single channel left does not show whether it is depthwise.

    Returns:
      The groups, and their suppositions: that the sizes in reshapes, splits and
      broadcasts would be smaller if there were fewer channels.
    """
    kinds = {} if unpruned is None else convolution_kinds(unpruned.traced)
    labels, axes = label_axes(traced, joined, kinds)
    solution = solve(labels)
    leaves = _read_leaves(traced, axes, solution, kinds)
    read: list[tuple[Group, np.ndarray]] = []
    all_slots = list(leaves.rows)
    for channels, places in alike_channels([*leaves.rows.values()], solution.stuck):
        slots = [all_slots[i] for i in places]
        one = _read_group(leaves, labels, solution, channels, slots)
        if one is None:
            continue
        code = solution.stuck[channels[0]]
        if strict and code >= 0 and isinstance(labels.reasons[code][0], NotUnderstood):
            raise TPPError(
                f"the channels of {one[0].name} meet {one[0].reason}. Without "
                "strict=True they are left unpruned"
            )
        read.append(one)
    shapes = {leaf: traced.shapes[n] for leaf, n in traced.leaves.items()}
    loops = Loops(traced, axes, solution)
    read = [(loops.own_steps(*one, shapes), one[1]) for one in read]
    read.sort(key=lambda one: leaves.place(one[0]))
    reading = Reading(labels, axes, solution, tuple(channels for _, channels in read))
    found = Groups(
        groups=with_inner(_with_unique_names([group for group, _ in read])),
        layers=tuple(dict.fromkeys(layer.name for layer in layers(traced))),
        shapes=shapes,
        inputs=jax.tree.map(lambda x: _abstract(x) if is_array(x) else x, inputs),
        traced=traced,
        joined=joined,
        reading=reading,
    )
    return found, _suppositions(found, reading)


@dataclasses.dataclass(frozen=True, eq=False)
class _Leaves:
    """The axes of all parameters, and what is known about them.

    Attributes:
      rows: Axis of a leaf → positions along it, and the channel at each.
      roles: Roles of the slots.
      stacked: Leaf → axes along which kernels are stacked.
      filters: Leaf → axes that together index its filters.
      orders: Leaf → index of its layer in order of execution.
      first_use: Leaf → index of the equation that first needs it.
      kernels: Leaves that are kernels of layers.
      name_of: Function from the name of a leaf to that of its layer.
      by_channel: Rows sorted by channel so far; see :func:`sorted_by_channel`.
    """

    rows: dict[Slot, Row]
    roles: Roles
    stacked: dict[str, tuple[int, ...]]
    filters: dict[str, tuple[int, ...]]
    orders: dict[str, int]
    first_use: dict[str, int]
    kernels: set[str]
    name_of: Callable[[str], str]
    by_channel: dict[Slot, tuple[np.ndarray, np.ndarray, bool]] = dataclasses.field(
        default_factory=dict
    )

    @functools.cached_property
    def producing(self) -> set[Slot]:
        """Slots that produce channels, or may do so."""
        known = {slot for slot, role in self.roles.of.items() if role == "produced"}
        return known | self.roles.makers | self.roles.lost.keys()

    def positions(self, channels: np.ndarray, slot: Slot) -> Int[np.ndarray, "size m"]:
        """Returns the positions of channels along a slot."""
        if slot not in self.by_channel:
            self.by_channel[slot] = sorted_by_channel(self.rows[slot])
        return positions_of(channels, *self.by_channel[slot])

    def member(self, slot: Slot, role: str, channels: np.ndarray) -> Member:
        """Returns the member of a group at a slot."""
        leaf, axis = slot
        made = role == "produced"
        return Member(
            leaf,
            axis,
            self.positions(channels, slot),
            role,
            order=self.orders.get(leaf, 0),
            batch=self.stacked.get(leaf, ()) if made else (),
            filters=self.filters.get(leaf, ()) if made else (),
        )

    def place(self, group: Group) -> tuple[Any, ...]:
        """Returns a group's place in the order of execution."""
        leaf = next(m.leaf for m in group.members if m.role == "produced")
        return (self.first_use.get(leaf, 0), *_grain(group, leaf))


def _read_leaves(
    traced: Trace,
    axes: dict[int | None, list[Axis]],
    solution: Channels,
    kinds: dict[str, str],
) -> _Leaves:
    roles = read_roles(traced, kinds)
    orders, first_use = read_orders(traced)
    slots = [
        (leaf, axis)
        for leaf, value in traced.leaves.items()
        for axis in range(len(traced.shapes[value]))
    ]
    labels = [axes[traced.leaves[leaf]][axis] for leaf, axis in slots]
    rows = dict(zip(slots, rows_of(solution, labels), strict=True))
    channels_at = {slot: channels for slot, (_, channels) in rows.items()}
    stacked = read_stacks(traced, roles, channels_at)
    return _Leaves(
        rows,
        roles,
        stacked,
        read_filters(traced, roles, stacked),
        orders,
        first_use,
        kernels={use.kernel for use in traced.uses if not use.inner},
        name_of=layer_names(traced),
    )


def _read_group(
    leaves: _Leaves,
    labels: Labels,
    solution: Channels,
    channels: np.ndarray,
    slots: list[Slot],
) -> tuple[Group, np.ndarray] | None:
    """Returns a group and its channels in order, None if no layer produces them.

    Args:
      leaves: Axes of all parameters.
      labels: Labels and their reasons.
      solution: Labels expressed in channels.
      channels: Channels of the group.
      slots: Axes of parameters that they run through.
    """
    code = int(solution.stuck[channels[0]])
    if code >= 0 and leaves.producing.isdisjoint(slots):
        return None  # the window of a convolution, for instance
    first_use = leaves.first_use
    slots = sorted(slots, key=lambda slot: first_use.get(slot[0], 0))
    chosen = int(solution.chosen[channels].max())
    here = _roles_here(leaves.roles, slots, code >= 0, chosen > 0)
    if "produced" not in here.values():
        return None
    # A kernel comes before the other leaves that its layer is computed from.
    slots.sort(key=lambda at: (first_use.get(at[0], 0), at[0] not in leaves.kernels))
    produced = [slot for slot in slots if here[slot] == "produced"]
    # Channels are counted in the order of the first layer that produces them.
    first = leaves.positions(channels, produced[0])
    channels = channels[np.argsort(first.min(axis=1))]
    members = tuple(leaves.member(slot, here[slot], channels) for slot in slots)
    makers = [m.leaf for m in members if m.role in ("produced", "depthwise")]
    if code >= 0:
        reason = _explain(*labels.reasons[code])
    elif chosen >= len(channels):
        reason = f"a choice of {chosen} channels at once"
    else:
        lost = leaves.roles.lost
        reason = next((lost[slot] for slot in produced if slot in lost), None)
    group = Group(
        name=leaves.name_of(produced[0][0]),
        size=len(channels),
        producers=tuple(dict.fromkeys(map(leaves.name_of, makers))),
        members=members,
        inner=False,
        reason=reason,
        reduced=bool(solution.reduced[channels].any()),
        chosen=chosen,
    )
    return group, channels


def _suppositions(groups: Groups, reading: Reading) -> list[Supposition]:
    """Returns the suppositions of the groups that may be prunable."""
    supposed = reading.labels.supposed
    rows = rows_of(reading.solution, [axis for axis, _, _ in supposed])
    return [
        Supposition(i, part, source)
        for (_, channels), (_, part, source) in zip(rows, supposed, strict=True)
        for i in sorted(set(reading.group_of[channels].tolist()))
        if i >= 0 and groups[i].reason is None
    ]


def _explain(reason: str, source: Any) -> str:
    line = source_line(source)
    return f"{reason} ({line})" if line else str(reason)


def _roles_here(
    roles: Roles, slots: list[Slot], stuck: bool, chosen: bool
) -> dict[Slot, str]:
    """Returns the roles of the axes that some channels run through.

    If none of the axes is known to produce the channels, the producer is a factor of a
    kernel that does, or a table that is used directly, or else a kernel whose
    computation was not followed, or a table whose rows are chosen.

    Args:
      roles: Roles in the model.
      slots: Axes, in the order in which their leaves are first needed.
      stuck: Whether the channels cannot be pruned.
      chosen: Whether the model chooses among the channels.
    """
    here = {slot: roles.of.get(slot, "along") for slot in slots}
    if "produced" in here.values():
        return here
    makers = [slot for slot in slots if slot in roles.makers]
    if not makers:
        makers = [slot for slot in slots if slot in roles.lost]
    if not makers and not stuck and ("contracted" in here.values() or chosen):
        makers = [slot for slot in slots if here[slot] == "along"][:1]
    return here | dict.fromkeys(makers, "produced")


def label_axes(
    traced: Trace,
    joined: tuple[tuple[Slot, Slot], ...] = (),
    kinds: dict[str, str] | None = None,
) -> tuple[Labels, dict[int | None, list[Axis]]]:
    """Applies the rules to all equations of a computation.

    Args:
      traced: Computation.
      joined: See :func:`read_groups`.
      kinds: Kinds of a sliced model's convolutions, see
        :func:`tpp_jax.graph.roles.convolution_kinds`.

    Returns:
      The labels, and the axes of each value.
    """
    labels = Labels()
    axes: dict[int | None, list[Axis]] = {None: []}
    for value in traced.leaves.values():
        axes[value] = [labels.fresh(n) for n in traced.shapes[value]]
    inputs = _named("an input of the model", traced.input_names)
    for value, reason in zip(traced.inputs, inputs, strict=True):
        axes[value] = [labels.stuck(n, reason) for n in traced.shapes[value]]
    for value in traced.constants:
        axes[value] = [
            labels.stuck(n, "an array built into the model")
            for n in traced.shapes[value]
        ]
    sure = {use.equation.outputs[0] for use in traced.uses if use.sure}
    choices = find_choices(traced)
    for eqn in traced.equations:
        operands = [axes[n] for n in eqn.inputs]
        shapes = [traced.shapes[n] for n in eqn.outputs]
        kind = kind_of(eqn, traced, kinds) if kinds else None
        free = choices.free(eqn) if choices else frozenset()
        results = apply_rule(labels, eqn, operands, shapes, kind, free)
        if choices and results:
            choices.tie(labels, eqn, operands, list(results[0]))
        if eqn.primitive in ("dot_general", "ragged_dot_general") and not (
            eqn.outputs[0] in sure
            or any(
                n is not None and len(traced.origin.get(n, ())) == 1 for n in eqn.inputs
            )
        ):
            _, contracted = kernel_axes(eqn, 0, len(operands[0]))
            labels.reduced += [operands[0][i] for i in contracted]
            # Functions that compute attention check the sizes of their operands.
            for i, axis in enumerate(operands[0] + operands[1]):
                labels.suppose(axis, i)
        axes.update(zip(eqn.outputs, results, strict=True))
    labels.source = None
    for pair in joined:
        labels.tie(*(axes[traced.leaves[leaf]][axis] for leaf, axis in pair))
    outputs = _named("an output of the model", traced.output_names)
    for value, reason in zip(traced.outputs, outputs, strict=True):
        for axis in axes[value]:
            labels.fix(axis, reason)
    return labels, axes


def _named(what: str, names: tuple[str, ...]) -> list[str]:
    """Returns a description of each input or output, by name if there are several."""
    return [f"{what} {name}" if len(names) > 1 else what for name in names]


def _grain(group: Group, leaf: str) -> tuple[bool, bool, int, int, int]:
    """Returns a sort key of the groups that run through one layer's filters.

    Coarser groups come first: those whose channels take up more adjacent filters, or
    an axis further left. Groups that cannot be pruned come last, and before them those
    that the model chooses among.
    """
    [own, *_] = [m for m in group.members if m.role == "produced" and m.leaf == leaf]
    first, longest = int(own.positions.min()), 1
    if own.positions.shape[1] > 1:
        breaks = np.flatnonzero(np.diff(own.positions[0]) != 1)
        longest = int(np.diff([-1, *breaks.tolist(), own.positions.shape[1] - 1]).max())
    return group.reason is not None, group.chosen > 0, own.axis, -longest, first


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    """Returns an array's shape and the dtype that JAX gives it: int32 for an int64."""
    return jax.ShapeDtypeStruct(array.shape, jax.typeof(array).dtype)


def _with_unique_names(groups: list[Group]) -> tuple[Group, ...]:
    """Gives distinct names to groups whose channels the same layer produces.

    A group that runs through the same filters as a coarser one is an inner group,
    ``conv#2``; one next to another is named by its first position, ``conv@16``.
    """
    through: dict[str, list[tuple[Group, Member]]] = {}
    for group in groups:
        for member in group.members:
            if member.role == "produced":
                through.setdefault(member.leaf, []).append((group, member))
    named: dict[int, str] = {}
    outer: dict[int, list[Group]] = {}
    for group in groups:
        own = next(member for member in group.members if member.role == "produced")
        grain = _grain(group, own.leaf)[:4]
        coarser = [
            other
            for other, member in through[own.leaf]
            if _grain(other, own.leaf)[:4] < grain
            and (
                member.axis != own.axis
                or bool(np.isin(own.positions, member.positions).any())
            )
        ]
        name = group.name
        if coarser:
            name = f"{group.name}#{len(coarser) + 1}"
        if name in named.values():
            name = f"{name}@{own.positions.min()}"
        named[id(group)] = name
        outer[id(group)] = coarser
    return tuple(
        dataclasses.replace(
            group,
            name=named[id(group)],
            outer=tuple(named[id(other)] for other in outer[id(group)]),
        )
        for group in groups
    )
