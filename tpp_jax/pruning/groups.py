"""Coupled-channel groups of any traced function: which channels live and die together.

A *channel* is a set of positions in parameter arrays that only make sense together: row
c of a convolution kernel's output axis, entry c of the batch norm after it, slice c of
the next kernel's input axis. A *group* is a set of channels that occupy the same
arrays: the sixteen channels of ``layer1.0.conv1``, say. Both are read off the jaxpr;
there is no table of architectures.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from tpp_jax.errors import TPPError
from tpp_jax.pruning.functions import is_array
from tpp_jax.pruning.labels import Labels, NotUnderstood, solve
from tpp_jax.pruning.records import Group, Groups, Member, Slot, Supposition
from tpp_jax.pruning.rules import apply_rule
from tpp_jax.pruning.tracing import (
    Layer,
    Trace,
    layer_names,
    layers,
    lookups,
    source_line,
)


def read_groups(
    traced: Trace,
    inputs: tuple[Any, ...],
    strict: bool = False,
    joined: tuple[tuple[Slot, Slot], ...] = (),
) -> tuple[Groups, list[Supposition]]:
    """Reads the coupled-channel groups off a traced computation.

    Args:
      traced: the computation.
      inputs: the example inputs that it was traced with.
      strict: see :func:`tpp_jax.channel_groups`.
      joined: pairs of axes whose channels are to go together, whatever is read.

    Returns:
      The groups, and what they rest on: that the sizes which reshapes, splits and
      broadcasts are told would be others if there were fewer channels.
    """
    layer_list = layers(traced)
    labels, axes = label_axes(traced, joined)
    solution = solve(labels)
    roles = _roles(layer_list, axes, traced)
    orders, first_use = _orders(traced, layer_list)
    name_of = layer_names(traced)

    slots = [
        (leaf, axis)
        for leaf, value in traced.leaves.items()
        for axis in range(len(traced.shapes[value]))
    ]
    rows = [solution.of(axes[traced.leaves[leaf]][axis]) for leaf, axis in slots]
    channels_at = {slot: row[1] for slot, row in zip(slots, rows, strict=True)}
    stacked = _stacked(layer_list, labels, axes, traced)
    _stack_alike(stacked, roles, channels_at)
    filters = _filters(roles, stacked, axes, traced)
    groups: list[tuple[tuple[int, ...], Group]] = []
    channels_of: list[np.ndarray] = []
    for channels, members_at in _alike_channels(rows, solution.stuck):
        members = []
        for slot in members_at:
            leaf, axis = slots[slot]
            role = roles.get((leaf, axis), "along")
            positions = _positions_of(channels, *rows[slot])
            member = Member(leaf, axis, positions, role, orders.get(leaf, 0))
            if role == "produced":
                batch, own = stacked.get(leaf, ()), filters.get(leaf, ())
                member = dataclasses.replace(member, batch=batch, filters=own)
            members.append(member)
        members.sort(key=lambda m: first_use.get(m.leaf, 0))
        makers = [m for m in members if m.role in ("produced", "depthwise")]
        produced = [m for m in members if m.role == "produced"]
        if not produced:
            continue
        # Channels are counted in the order of the first layer that produces them.
        rank = np.argsort(produced[0].positions.min(axis=1))
        code = solution.stuck[channels[0]]
        names = tuple(dict.fromkeys(name_of(m.leaf) for m in makers))
        group = Group(
            name=name_of(produced[0].leaf),
            size=len(channels),
            producers=names,
            members=tuple(
                dataclasses.replace(m, positions=m.positions[rank]) for m in members
            ),
            inner=False,
            reason=None if code < 0 else _explain(*labels.reasons[code]),
            reduced=bool(solution.reduced[channels].any()),
        )
        key = (first_use[produced[0].leaf], *_grain(group, produced[0].leaf))
        if strict and code >= 0 and isinstance(labels.reasons[code][0], NotUnderstood):
            raise TPPError(
                f"the channels of {group.name} meet {group.reason}. Without "
                "strict=True they are left whole"
            )
        groups.append((key, group))
        channels_of.append(channels)
    order = sorted(range(len(groups)), key=lambda i: groups[i][0])
    channels_of = [channels_of[i] for i in order]
    found = Groups(
        groups=_with_unique_names([groups[i][1] for i in order]),
        layers=tuple(dict.fromkeys(layer.name for layer in layer_list)),
        shapes={leaf: traced.shapes[n] for leaf, n in traced.leaves.items()},
        inputs=jax.tree.map(lambda x: _abstract(x) if is_array(x) else x, inputs),
        traced=traced,
        joined=joined,
    )
    group_of = np.full(len(solution.stuck), -1)
    for i, channels in enumerate(channels_of):
        group_of[channels] = i
    suppositions = [
        Supposition(int(i), part, source, told)
        for axis, part, source, told in labels.supposed
        for i in np.unique(group_of[solution.of(axis)[1]])
        if i >= 0 and found[int(i)].reason is None
    ]
    return found, suppositions


def _explain(reason: str, source: Any) -> str:
    line = source_line(source)
    return f"{reason} ({line})" if line else str(reason)


def label_axes(
    traced: Trace, joined: tuple[tuple[Slot, Slot], ...] = ()
) -> tuple[Labels, dict[int | None, list[np.ndarray]]]:
    """Runs the rules over the whole computation; returns each value's labels."""
    labels = Labels()
    axes: dict[int | None, list[np.ndarray]] = {None: []}
    for value in traced.leaves.values():
        axes[value] = [labels.fresh(n) for n in traced.shapes[value]]
    for value in traced.inputs:
        axes[value] = [
            labels.stuck(n, "an input of the model") for n in traced.shapes[value]
        ]
    for value in traced.constants:
        axes[value] = [
            labels.stuck(n, "an array built into the model")
            for n in traced.shapes[value]
        ]
    for eqn in traced.equations:
        operands = [axes[n] for n in eqn.inputs]
        shapes = [traced.shapes[n] for n in eqn.outputs]
        results = apply_rule(labels, eqn, operands, shapes)
        if eqn.primitive == "dot_general" and not any(
            n in traced.origin for n in eqn.inputs
        ):
            (contracted, _), _ = eqn.params["dimension_numbers"]
            labels.reduced += [operands[0][i] for i in contracted]
            # Functions of attention are particular about the sizes that they are given.
            for i, axis in enumerate(operands[0] + operands[1]):
                labels.suppose(axis, i)
        axes.update(zip(eqn.outputs, results, strict=True))
    labels.source = None
    for pair in joined:
        labels.tie(*(axes[traced.leaves[leaf]][axis] for leaf, axis in pair))
    labels.fix_all([axes[n] for n in traced.outputs], "an output of the model")
    return labels, axes


def _roles(
    layer_list: list[Layer], axes: dict[int | None, list[np.ndarray]], traced: Trace
) -> dict[tuple[str, int], str]:
    """Tells which axis of each kernel produces channels, which one contracts them."""
    roles: dict[tuple[str, int], str] = {}
    for layer in layer_list:
        eqn = layer.equation
        dims = eqn.params["dimension_numbers"]
        if eqn.primitive == "conv_general_dilated":
            width = traced.shapes[eqn.inputs[layer.operand]][dims.rhs_spec[1]]
            depthwise = width == 1 and eqn.params["feature_group_count"] > 1
            by_axis = {dims.rhs_spec[0]: "depthwise" if depthwise else "produced"}
            by_axis |= {dims.rhs_spec[1]: "contracted"}
        else:
            contracted, batch = (side[layer.operand] for side in dims)
            rank = len(traced.shapes[eqn.inputs[layer.operand]])
            by_axis = dict.fromkeys(set(range(rank)) - set(batch), "produced")
            by_axis |= dict.fromkeys(contracted, "contracted")
        value = eqn.inputs[layer.operand]
        if value == traced.leaves[layer.kernel]:
            for i, role in by_axis.items():
                roles.setdefault((layer.kernel, i), role)
            continue
        operand = axes[value]
        # The kernel may have been transposed or reshaped on its way here: its own
        # labels tell which of its axes ended up where.
        for axis, own in enumerate(axes[traced.leaves[layer.kernel]]):
            for i, role in by_axis.items():
                if operand[i] is own or np.isin(operand[i], own).any():
                    roles.setdefault((layer.kernel, axis), role)
    # A table that the model's inputs are looked up in makes channels too, and before
    # anything contracts them: an embedding whose transpose is the output layer.
    for table, result in lookups(traced):
        for axis, own in enumerate(axes[traced.leaves[table]]):
            if any(np.isin(found, own).any() for found in axes[result]):
                roles[table, axis] = "produced"
    return roles


def _stacked(
    layer_list: list[Layer],
    labels: Labels,
    axes: dict[int | None, list[np.ndarray]],
    traced: Trace,
) -> dict[str, tuple[int, ...]]:
    """Finds the axes of each kernel along which kernels of their own are stacked.

    Such an axis is gone before the layer, since a loop runs along it or one kernel is
    taken out by its index; or the product is one of batches along it.
    """
    found: dict[str, tuple[int, ...]] = {}
    for layer in layer_list:
        eqn, value = layer.equation, layer.equation.inputs[layer.operand]
        batch: tuple[int, ...] = ()
        if eqn.primitive == "dot_general":
            batch = eqn.params["dimension_numbers"][1][layer.operand]
        leaf = traced.leaves[layer.kernel]
        rank = len(traced.shapes[leaf])
        if rank < 3 or (value == leaf and not batch) or layer.kernel in found:
            continue
        there = [own for i, own in enumerate(axes[value]) if i not in batch]
        found[layer.kernel] = tuple(
            axis
            for axis, own in enumerate(axes[leaf])
            if not any(own is one or np.isin(one, own).any() for one in there)
            and not any(_share_parts(labels, own, one) for one in there)
        )
    return found


def _stack_alike(
    stacked: dict[str, tuple[int, ...]],
    roles: dict[Slot, str],
    channels_at: dict[Slot, np.ndarray],
) -> None:
    """Adds the experts of a layer that all experts' inputs are the same for.

    Its product is not one of batches, but that of the layer after it is.
    """
    along = [channels_at[leaf, i] for leaf, found in stacked.items() for i in found]
    if not along:
        return
    experts = np.concatenate(along)
    produced = [slot for slot, role in roles.items() if role == "produced"]
    for leaf, axis in produced:
        channels = channels_at[leaf, axis]
        alone = sum(other == leaf for other, _ in produced) == 1
        if channels.size and not alone and np.isin(channels, experts).all():
            stacked[leaf] = tuple(sorted({*stacked.get(leaf, ()), axis}))


def _share_parts(labels: Labels, one: np.ndarray, other: np.ndarray) -> bool:
    """Tells whether two axes have to do with each other, by way of reshapes."""
    return bool(np.isin(_with_parts(labels, one), _with_parts(labels, other)).any())


def _with_parts(labels: Labels, axis: np.ndarray) -> np.ndarray:
    """Returns the labels of an axis and those that they are defined by."""
    known = np.unique(axis[axis >= 0])
    while True:
        parts = [
            parts[np.isin(whole, known)].reshape(-1)
            for whole, parts in labels.definitions
        ]
        more = np.unique(np.concatenate([known, *parts]))
        more = more[more >= 0]
        if len(more) == len(known):
            return known
        known = more


def _filters(
    roles: dict[tuple[str, int], str],
    stacked: dict[str, tuple[int, ...]],
    axes: dict[int | None, list[np.ndarray]],
    traced: Trace,
) -> dict[str, tuple[int, ...]]:
    """Finds the axes of each kernel that index its filters together."""
    produced: dict[str, list[int]] = {}
    for (leaf, axis), role in sorted(roles.items()):
        if role == "produced" and axis not in stacked.get(leaf, ()):
            produced.setdefault(leaf, []).append(axis)
    # The words of a table are no filters, even if an output layer produces them.
    for table, result in lookups(traced):
        produced[table] = [
            axis
            for axis, own in enumerate(axes[traced.leaves[table]])
            if any(np.isin(found, own).any() for found in axes[result])
        ]
    return {leaf: tuple(found) for leaf, found in produced.items()}


def _orders(
    traced: Trace, layer_list: list[Layer]
) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers every parameter leaf by its layer in order of execution.

    Returns:
      ``(leaf → number of its layer, leaf → number of the equation that first needs
      it)``; a kernel is needed by its layer, wherever it was transposed or cast.
    """
    orders: dict[str, int] = {}
    first_use: dict[str, int] = {}
    tables = {table for table, _ in lookups(traced)}
    at = {layer.equation.outputs[0]: i for i, layer in enumerate(layer_list)}
    current = 0
    for i, eqn in enumerate(traced.equations):
        for value in eqn.inputs:
            leaf = traced.origin.get(value)
            if leaf is not None:
                orders.setdefault(leaf, current)
                first_use.setdefault(leaf, i)
        if eqn.outputs and eqn.outputs[0] in at:
            current = at[eqn.outputs[0]]
            # A kernel may have been cast long before its layer; but a tied embedding
            # makes channels when it is first looked up in.
            if layer_list[current].kernel not in tables:
                first_use[layer_list[current].kernel] = i
                orders[layer_list[current].kernel] = current
    return orders, first_use


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
    # A channel's signature is the sum of a random 64-bit number for each of its slots:
    # equal sums mean equal slots, but for a chance of 2^-64 a pair.
    weights = np.random.default_rng(0).integers(
        2**63, size=len(rows) + stuck.max(initial=-1) + 2, dtype=np.uint64
    )
    signature = weights[len(rows) + stuck + 1]
    seen = np.zeros(len(stuck), bool)
    for (_, channels), weight in zip(rows, weights, strict=False):
        np.add.at(signature, channels, weight)
        seen[channels] = True
    present = np.flatnonzero(seen)
    bundle = np.zeros(len(stuck), np.int64)
    _, bundle[present] = np.unique(signature[present], return_inverse=True)
    slots_of: dict[int, list[int]] = {}
    for slot, (_, channels) in enumerate(rows):
        for number in set(bundle[channels].tolist()):
            slots_of.setdefault(number, []).append(slot)
    by_bundle = present[np.argsort(bundle[present], kind="stable")]
    ends = np.flatnonzero(np.diff(bundle[by_bundle])) + 1
    for chosen in np.split(by_bundle, ends):
        slots = slots_of.get(int(bundle[chosen[0]]), [])
        for channels in _apart(chosen, *rows[slots[0]]):
            yield channels, slots


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
    if len(row) == len(channels) and (np.diff(positions) > 0).all():
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
    channels: np.ndarray, positions: np.ndarray, row: np.ndarray
) -> np.ndarray:
    """Returns int64 ``[len(channels), m]``: where each channel stands along an axis."""
    if len(row) == len(channels):  # as most often: each stands at one position
        return positions[np.argsort(row)][:, None]
    order = np.lexsort((positions, row))
    start = np.searchsorted(row[order], channels)
    m = np.searchsorted(row[order], channels[0], side="right") - start[0]
    return positions[order[start[:, None] + np.arange(m)]]


def _grain(group: Group, leaf: str) -> tuple[bool, int, int, int]:
    """Ranks groups that run through one layer's filters: what is to be named first.

    The coarser come first: those whose channels take up more neighbouring filters, or
    an axis further left. What cannot be pruned comes last.
    """
    [own, *_] = [m for m in group.members if m.role == "produced" and m.leaf == leaf]
    breaks = np.flatnonzero(np.diff(own.positions[0]) != 1)
    runs = np.diff([-1, *breaks, own.positions.shape[1] - 1])
    first = int(own.positions.min())
    return group.reason is not None, own.axis, -int(runs.max()), first


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
    taken: set[str] = set()
    unique = []
    for group in groups:
        own = next(member for member in group.members if member.role == "produced")
        grain = _grain(group, own.leaf)[:3]
        outer = sum(
            _grain(other, own.leaf)[:3] < grain
            and (
                member.axis != own.axis
                or bool(np.isin(own.positions, member.positions).any())
            )
            for other, member in through[own.leaf]
        )
        name = group.name
        if outer:
            name = f"{group.name}#{outer + 1}"
        if name in taken:
            name = f"{name}@{own.positions.min()}"
        taken.add(name)
        unique.append(dataclasses.replace(group, name=name, inner=outer > 0))
    return tuple(unique)
