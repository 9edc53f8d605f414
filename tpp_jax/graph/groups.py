"""Coupled-channel groups of any traced function: which channels live and die together.

A *channel* is a set of positions in parameter arrays that only make sense together: row
c of a convolution kernel's output axis, entry c of the batch norm after it, slice c of
the next kernel's input axis. A *group* is a set of channels that occupy the same
arrays: the sixteen channels of ``layer1.0.conv1``, say. Both are read off the jaxpr;
there is no table of architectures.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from tpp_jax.errors import TPPError
from tpp_jax.graph.comparing import Reading
from tpp_jax.graph.functions import is_array
from tpp_jax.graph.labels import Channels, Labels, NotUnderstood, solve
from tpp_jax.graph.layers import kernel_axes
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
    """Reads the coupled-channel groups off a traced computation.

    Args:
      traced: the computation.
      inputs: the example inputs that it was traced with.
      strict: see :func:`tpp_jax.channel_groups`.
      joined: pairs of axes whose channels are to go together, whatever is read.
      unpruned: the groups of the unpruned model, if this is a sliced form of it: which
        of its convolutions are depthwise is not seen once a single channel is left.

    Returns:
      The groups, and what they rest on: that the sizes which reshapes, splits and
      broadcasts are told would be others if there were fewer channels.
    """
    kinds = {} if unpruned is None else convolution_kinds(unpruned.traced)
    labels, axes = label_axes(traced, joined, kinds)
    solution = solve(labels)
    roles = read_roles(traced, kinds)
    orders, first_use = read_orders(traced)
    kernels = {use.kernel for use in traced.uses if not use.inner}
    name_of = layer_names(traced)

    slots = [
        (leaf, axis)
        for leaf, value in traced.leaves.items()
        for axis in range(len(traced.shapes[value]))
    ]
    rows = _rows(solution, [axes[traced.leaves[leaf]][axis] for leaf, axis in slots])
    channels_at = {slot: row[1] for slot, row in zip(slots, rows, strict=True)}
    stacked = read_stacks(traced, roles, channels_at)
    filters = read_filters(traced, roles, stacked)
    place = {slot: i for i, slot in enumerate(slots)}

    @functools.cache
    def sorted_rows(slot: Slot) -> tuple[np.ndarray, np.ndarray, bool]:
        positions, at = rows[place[slot]]
        if (at[1:] > at[:-1]).all():  # as most often
            return positions, at, True
        order = np.lexsort((positions, at))
        return positions[order], at[order], False

    known = {slot for slot, role in roles.of.items() if role == "produced"}
    known |= roles.makers | roles.lost.keys()
    groups: list[tuple[tuple[int, ...], Group]] = []
    channels_of: list[np.ndarray] = []
    for channels, members_at in _alike_channels(rows, solution.stuck):
        stuck = bool(solution.stuck[channels[0]] >= 0)
        if stuck and known.isdisjoint(slots[i] for i in members_at):
            continue  # the window of a convolution, and the like
        there = [slots[i] for i in members_at]
        there.sort(key=lambda slot: first_use.get(slot[0], 0))
        here = _roles_here(roles, there, stuck)
        if "produced" not in here.values():
            continue
        # A kernel comes before what else its layer is computed from.
        there.sort(key=lambda at: (first_use.get(at[0], 0), at[0] not in kernels))
        produced = [slot for slot in there if here[slot] == "produced"]
        # Channels are counted in the order of the first layer that produces them.
        first = _positions_of(channels, sorted_rows(produced[0]))
        channels = channels[np.argsort(first.min(axis=1))]
        members = []
        for leaf, axis in there:
            role, made = here[leaf, axis], here[leaf, axis] == "produced"
            positions = _positions_of(channels, sorted_rows((leaf, axis)))
            batch = stacked.get(leaf, ()) if made else ()
            own = filters.get(leaf, ()) if made else ()
            order = orders.get(leaf, 0)
            members.append(Member(leaf, axis, positions, role, order, batch, own))
        makers = [m.leaf for m in members if m.role in ("produced", "depthwise")]
        code = solution.stuck[channels[0]]
        names = tuple(dict.fromkeys(map(name_of, makers)))
        reason = None if code < 0 else _explain(*labels.reasons[code])
        if code < 0:
            reason = next((roles.lost[s] for s in produced if s in roles.lost), None)
        group = Group(
            name=name_of(produced[0][0]),
            size=len(channels),
            producers=names,
            members=tuple(members),
            inner=False,
            reason=reason,
            reduced=bool(solution.reduced[channels].any()),
        )
        leaf = produced[0][0]
        key = (first_use.get(leaf, 0), *_grain(group, leaf))
        if strict and code >= 0 and isinstance(labels.reasons[code][0], NotUnderstood):
            raise TPPError(
                f"the channels of {group.name} meet {group.reason}. Without "
                "strict=True they are left whole"
            )
        groups.append((key, group))
        channels_of.append(channels)
    order = sorted(range(len(groups)), key=lambda i: groups[i][0])
    reading = Reading(labels, axes, solution, tuple(channels_of[i] for i in order))
    found = Groups(
        groups=with_inner(_with_unique_names([groups[i][1] for i in order])),
        layers=tuple(dict.fromkeys(layer.name for layer in layers(traced))),
        shapes={leaf: traced.shapes[n] for leaf, n in traced.leaves.items()},
        inputs=jax.tree.map(lambda x: _abstract(x) if is_array(x) else x, inputs),
        traced=traced,
        joined=joined,
        reading=reading,
    )
    supposed = _rows(solution, [axis for axis, _, _ in labels.supposed])
    suppositions = [
        Supposition(i, part, source)
        for (_, channels), (_, part, source) in zip(
            supposed, labels.supposed, strict=True
        )
        for i in sorted(set(reading.group_of[channels].tolist()))
        if i >= 0 and found[i].reason is None
    ]
    return found, suppositions


def _explain(reason: str, source: Any) -> str:
    line = source_line(source)
    return f"{reason} ({line})" if line else str(reason)


def _roles_here(roles: Roles, slots: list[Slot], stuck: bool) -> dict[Slot, str]:
    """Returns the roles of the axes that some channels run through.

    Where none is known to produce them, it is a factor of a kernel that does, or a
    table that is used as it is, or else a kernel that was not followed.

    Args:
      roles: of the model.
      slots: the axes, in the order in which their leaves are first needed.
      stuck: whether the channels cannot be pruned.
    """
    here = {slot: roles.of.get(slot, "along") for slot in slots}
    if "produced" in here.values():
        return here
    makers = [slot for slot in slots if slot in roles.makers]
    if not makers:
        makers = [slot for slot in slots if slot in roles.lost]
    if not makers and not stuck and "contracted" in here.values():
        makers = [slot for slot in slots if here[slot] == "along"][:1]
    return here | dict.fromkeys(makers, "produced")


def label_axes(
    traced: Trace,
    joined: tuple[tuple[Slot, Slot], ...] = (),
    kinds: dict[str, str] | None = None,
) -> tuple[Labels, dict[int | None, list[np.ndarray]]]:
    """Runs the rules over the whole computation; returns each value's labels.

    Args:
      traced: the computation.
      joined: see :func:`read_groups`.
      kinds: of a sliced model's convolutions, see
        :func:`tpp_jax.graph.roles.convolution_kinds`.
    """
    labels = Labels()
    axes: dict[int | None, list[np.ndarray]] = {None: []}
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
    for eqn in traced.equations:
        operands = [axes[n] for n in eqn.inputs]
        shapes = [traced.shapes[n] for n in eqn.outputs]
        kind = kind_of(eqn, traced, kinds) if kinds else None
        results = apply_rule(labels, eqn, operands, shapes, kind)
        if eqn.primitive in ("dot_general", "ragged_dot_general") and not (
            eqn.outputs[0] in sure
            or any(len(traced.origin.get(n, ())) == 1 for n in eqn.inputs)
        ):
            _, contracted = kernel_axes(eqn, 0, len(operands[0]))
            labels.reduced += [operands[0][i] for i in contracted]
            # Functions of attention are particular about the sizes that they are given.
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
    """Says of several inputs or outputs which one is meant."""
    return [f"{what} {name}" if len(names) > 1 else what for name in names]


def _alike_channels(
    rows: list[tuple[np.ndarray, np.ndarray]], stuck: np.ndarray
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Bundles channels that occupy the same slots equally often.

    Args:
      rows: for each slot (an axis of a parameter leaf) ``(positions, channels)``.
      stuck: reason number of each channel, or -1.

    Yields:
      ``(channels, slots)`` of each bundle.
    """
    if not rows:
        return
    slot_of = np.repeat(np.arange(len(rows)), [len(row[1]) for row in rows])
    channel_at = np.concatenate([channels for _, channels in rows])
    # A channel's signature is the sum of a random 64-bit number for each of its slots:
    # equal sums mean equal slots, but for a chance of 2^-64 a pair.
    weights = np.random.default_rng(0).integers(
        2**63, size=len(rows) + stuck.max(initial=-1) + 2, dtype=np.uint64
    )
    signature = weights[len(rows) + stuck + 1]
    np.add.at(signature, channel_at, weights[slot_of])
    seen = np.zeros(len(stuck), bool)
    seen[channel_at] = True
    present = np.flatnonzero(seen)
    bundle = np.zeros(len(stuck), np.int64)
    _, bundle[present] = np.unique(signature[present], return_inverse=True)
    met = np.unique(bundle[channel_at] * len(rows) + slot_of)
    slots_of: dict[int, list[int]] = {}
    for number, slot in zip(*np.divmod(met, len(rows)), strict=True):
        slots_of.setdefault(int(number), []).append(int(slot))
    by_bundle = present[np.argsort(bundle[present], kind="stable")]
    ends = np.flatnonzero(np.diff(bundle[by_bundle])) + 1
    for chosen in np.split(by_bundle, ends):
        slots = slots_of.get(int(bundle[chosen[0]]), [])
        for channels in _apart(chosen, *rows[slots[0]]):
            yield channels, slots


def _rows(
    solution: Channels, axes: list[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns what :meth:`Channels.of` does for each of several axes, all at once."""
    if not axes:
        return []
    ends = np.cumsum([len(axis) for axis in axes])
    positions, channels = solution.of(np.concatenate(axes))
    if (np.diff(positions) < 0).any():  # some are made up of others
        order = np.argsort(positions, kind="stable")
        positions, channels = positions[order], channels[order]
    cuts = positions.searchsorted(ends[:-1])
    starts = [0, *ends[:-1].tolist()]
    return [
        (own - start, at)
        for own, start, at in zip(
            np.split(positions, cuts), starts, np.split(channels, cuts), strict=True
        )
    ]


def _apart(
    channels: np.ndarray, positions: np.ndarray, row: np.ndarray
) -> list[np.ndarray]:
    """Parts channels that share positions, as four heads and four dimensions do.

    Positions are all combinations of one head and one dimension: the channels of one
    kind are those that meet the same others.

    Args:
      channels: ascending.
      positions: positions of an axis that all of them run through.
      row: the channel at each of these.
    """
    if (positions[1:] > positions[:-1]).all():
        return [channels]
    here = np.isin(row, channels)
    positions, row = positions[here], np.searchsorted(channels, row[here])
    if len(np.unique(positions)) == len(positions):
        return [channels]
    incidence = np.zeros((len(channels), positions.max() + 1), np.int64)
    incidence[row, positions] = 1
    meets = incidence @ incidence.T > 0
    np.fill_diagonal(meets, False)
    _, kind = np.unique(meets, axis=0, return_inverse=True)
    return [channels[kind == k] for k in range(kind.max() + 1)]


def _positions_of(
    channels: np.ndarray, row: tuple[np.ndarray, np.ndarray, bool]
) -> np.ndarray:
    """Returns int64 ``[len(channels), m]``: where each channel stands along an axis.

    Args:
      channels: those of one group, in any order.
      row: positions along the axis and the channel at each, sorted by channel, and
        whether each channel is there once.
    """
    positions, at, once = row
    start = at.searchsorted(channels[0])
    there = slice(start, start + len(channels))
    if once and np.array_equal(at[there], channels):
        return positions[there, None]
    starts = at.searchsorted(channels)
    m = 1 if once else at.searchsorted(channels[0], side="right") - starts[0]
    return positions[starts[:, None] + np.arange(m)]


def _grain(group: Group, leaf: str) -> tuple[bool, int, int, int]:
    """Ranks groups that run through one layer's filters: what is to be named first.

    The coarser come first: those whose channels take up more neighbouring filters, or
    an axis further left. What cannot be pruned comes last.
    """
    [own, *_] = [m for m in group.members if m.role == "produced" and m.leaf == leaf]
    first, longest = int(own.positions.min()), 1
    if own.positions.shape[1] > 1:
        breaks = np.flatnonzero(np.diff(own.positions[0]) != 1)
        longest = int(np.diff([-1, *breaks, own.positions.shape[1] - 1]).max())
    return group.reason is not None, own.axis, -longest, first


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    """Returns an array's shape and the dtype that JAX gives it: int32 for an int64."""
    return jax.ShapeDtypeStruct(array.shape, jax.typeof(array).dtype)


def _with_unique_names(groups: list[Group]) -> tuple[Group, ...]:
    """Tells groups apart whose channels are produced by one layer.

    One that runs through the same filters as a coarser one is an inner group,
    ``conv#2``; one that stands beside another is named by where it starts, ``conv@16``.
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
        grain = _grain(group, own.leaf)[:3]
        coarser = [
            other
            for other, member in through[own.leaf]
            if _grain(other, own.leaf)[:3] < grain
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
