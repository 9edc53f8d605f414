"""The role of each axis of each parameter: it produces, contracts or scales channels.

Roles are read from the uses of kernels (layers.py). The groups and the criteria know
roles only.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from tpp_jax.graph.layers import Layer, kernel_axes
from tpp_jax.graph.records import Slot
from tpp_jax.graph.tracing import Trace, layers
from tpp_jax.graph.unfolding import Equation

_NOT_FOLLOWED = (
    "what a kernel is computed from: which of its axes become the kernel's is not "
    "understood"
)


@dataclasses.dataclass(frozen=True)
class Roles:
    """The roles of the axes of parameters.

    Attributes:
      of: Role of an axis of a leaf, ``"produced"``, ``"contracted"`` or
        ``"depthwise"``; other axes act on channels one by one.
      makers: Axes that produce channels where no axis of ``of`` does: the rank of two
        factors whose product is a kernel, a table whose rows are used unchanged.
      lost: Axes of kernels that are listed as channels although it is not known what
        becomes of them, with the reason.
    """

    of: dict[Slot, str]
    makers: frozenset[Slot]
    lost: dict[Slot, str]


def read_roles(traced: Trace, kinds: dict[str, str]) -> Roles:
    """Finds which axes of leaves produce channels, and which contract them.

    Args:
      traced: Computation of the model.
      kinds: Kinds of the unpruned model's kernels, from :func:`convolution_kinds`.
    """
    roles: dict[Slot, str] = {}
    found = layers(traced)
    inner = [use for use in traced.uses if use.inner]
    # A product with activations decides the roles of a kernel's axes. A product of
    # parameters only, such as an estimate of its largest singular value, comes second.
    for layer in [layer for layer in found if not layer.inner] + inner:
        seen = {leaf for leaf, _ in roles}
        depthwise = kind_of(layer.equation, traced, kinds) == "depthwise"
        for i, role in layer.roles.items():
            for leaf, axis in sorted(layer.axes[i]):
                if leaf != layer.kernel and _is_scale(traced, leaf, layer.kernel):
                    continue
                if role == "contracted" or not (layer.inner and leaf in seen):
                    produced = "depthwise" if depthwise else "produced"
                    role = produced if role == "produced" else role
                    roles.setdefault((leaf, axis), role)
    # A table that the model's inputs are looked up in makes channels too, and before
    # anything contracts them: an embedding whose transpose is the output layer.
    for lookup in traced.lookups:
        for leaf, axis in lookup.produced:
            if leaf == lookup.table or not _is_scale(traced, leaf, lookup.table):
                roles[leaf, axis] = "produced"
    makers = {
        slot for layer in inner for slot in _contracted_with(layer) if slot not in roles
    }
    lost = {
        slot: _NOT_FOLLOWED
        for layer in found
        for slot in _lost_axes(traced, layer, roles)
        if slot not in makers
    }
    return Roles(roles, frozenset(makers), lost)


def convolution_kinds(traced: Trace) -> dict[str, str]:
    """Returns the kinds of the kernels of convolutions, by name of the leaf.

    A convolution in groups of one input each is depthwise. A pruned one in groups of
    several may have one input left in each, and a pruned depthwise one a single group:
    only the unpruned model shows which kind it is.

    Args:
      traced: Computation of the unpruned model.

    Returns:
      ``"plain"``, ``"depthwise"`` or ``"grouped"`` for each such leaf.
    """
    kinds: dict[str, str] = {}
    for eqn in traced.equations:
        if eqn.primitive == "conv_general_dilated":
            kind = kind_of(eqn, traced, {})
            for leaf in traced.origin.get(eqn.operand(1), ()):
                kinds.setdefault(leaf, kind)
    return kinds


def kind_of(eqn: Equation, traced: Trace, kinds: dict[str, str]) -> str:
    """Returns ``"plain"``, ``"depthwise"`` or ``"grouped"`` for an equation.

    Args:
      eqn: Equation of any primitive; all but convolutions are plain.
      traced: Computation that contains it.
      kinds: Kinds in the unpruned model, by name of the leaf.
    """
    if eqn.primitive != "conv_general_dilated":
        return "plain"
    for leaf in traced.origin.get(eqn.operand(1), ()):
        if leaf in kinds:
            return kinds[leaf]
    if eqn.params["feature_group_count"] == 1:
        return "plain"
    width = traced.shapes[eqn.operand(1)][eqn.params["dimension_numbers"].rhs_spec[1]]
    return "depthwise" if width == 1 else "grouped"


def read_stacks(
    traced: Trace, roles: Roles, channels_at: Mapping[Slot, np.ndarray]
) -> dict[str, tuple[int, ...]]:
    """Finds the axes of each kernel along which separate kernels are stacked.

    The layer does not see such an axis, since a loop runs along it or one kernel is
    selected by its index; or its product has a batch along it.

    Args:
      traced: Computation of the model.
      roles: Roles from :func:`read_roles`.
      channels_at: Channels that run through each axis of a leaf.
    """
    found: dict[str, tuple[int, ...]] = {}
    for layer in traced.uses:
        leaf, value = layer.kernel, layer.equation.operand(layer.operand)
        batched = layer.equation.primitive != "conv_general_dilated"
        batch = set(range(len(layer.axes))) - layer.roles.keys() if batched else set()
        rank = len(traced.shapes[traced.leaves[leaf]])
        if rank < 3 or leaf in found or (value == traced.leaves[leaf] and not batch):
            continue
        there = {axes for i, axes in enumerate(layer.axes) if i not in batch}
        own = {axis for of, axis in frozenset().union(*there) if of == leaf}
        found[leaf] = tuple(axis for axis in range(rank) if axis not in own)
    return found | _alike_stacks(found, roles, channels_at)


def _alike_stacks(
    stacked: dict[str, tuple[int, ...]],
    roles: Roles,
    channels_at: Mapping[Slot, np.ndarray],
) -> dict[str, tuple[int, ...]]:
    """Finds stacked experts that all have the same inputs.

    Their product has no batch, but that of the layer after it has.
    """
    along = [channels_at[leaf, i] for leaf, found in stacked.items() for i in found]
    if not along:
        return {}
    experts = np.concatenate(along)
    produced = [slot for slot, role in roles.of.items() if role == "produced"]
    more = {}
    for leaf, axis in produced:
        channels = channels_at[leaf, axis]
        alone = sum(other == leaf for other, _ in produced) == 1
        if channels.size and not alone and np.isin(channels, experts).all():
            more[leaf] = tuple(sorted({*stacked.get(leaf, ()), axis}))
    return more


def read_filters(
    traced: Trace, roles: Roles, stacked: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Finds the axes of each kernel that together index its filters.

    Args:
      traced: Computation of the model.
      roles: Roles from :func:`read_roles`.
      stacked: Axes of stacks from :func:`read_stacks`.
    """
    produced: dict[str, list[int]] = {}
    for (leaf, axis), role in sorted(roles.of.items()):
        if role == "produced" and axis not in stacked.get(leaf, ()):
            produced.setdefault(leaf, []).append(axis)
    # The rows of a table are no filters, even if an output layer produces them.
    for lookup in traced.lookups:
        own = sorted(axis for leaf, axis in lookup.produced if leaf == lookup.table)
        produced[lookup.table] = own
    return {leaf: tuple(found) for leaf, found in produced.items()}


def read_orders(traced: Trace) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers every parameter leaf by its layer in order of execution.

    Args:
      traced: Computation of the model.

    Returns:
      The number of each leaf's layer, and the number of the equation that first needs
      the leaf; a kernel is needed by its layer, wherever it was transposed or cast.
    """
    orders: dict[str, int] = {}
    first_use: dict[str, int] = {}
    tables = {lookup.table for lookup in traced.lookups}
    found = layers(traced)
    kernels = {layer.kernel for layer in found if not layer.inner}
    at = {layer.equation.outputs[0]: i for i, layer in enumerate(found)}
    leaf_of: dict[int | None, str] = {n: leaf for leaf, n in traced.leaves.items()}
    current = 0
    for i, eqn in enumerate(traced.equations):
        for value in eqn.inputs:
            leaf = leaf_of.get(value)
            if leaf is not None:
                orders.setdefault(leaf, current)
                first_use.setdefault(leaf, i)
        if eqn.outputs and eqn.outputs[0] in at:
            current = at[eqn.outputs[0]]
            layer = found[current]
            # A kernel may have been cast long before its layer; but a tied embedding
            # makes channels when it is first looked up in.
            parts = () if layer.inner else layer.leaves
            for leaf in {layer.kernel, *parts} - tables:
                if leaf == layer.kernel or leaf not in kernels:
                    first_use[leaf] = i
                    orders[leaf] = current
    return orders, first_use


def _is_scale(traced: Trace, leaf: str, kernel: str) -> bool:
    """Reports whether a leaf is a factor for each channel, not a matrix of filters.

    Zeros in such a factor remove its channels, as those of a norm's scale do.
    """
    shape = traced.shapes[traced.leaves[leaf]]
    if shape == traced.shapes[traced.leaves[kernel]]:
        return False
    return sum(n > 1 for n in shape) < 2


def _contracted_with(layer: Layer) -> Iterator[Slot]:
    """Yields the axes of leaves that the kernel of an inner layer contracts."""
    other = 1 - layer.operand
    _, contracted = kernel_axes(layer.equation, other, len(layer.met))
    for i in contracted:
        yield from layer.met[i]


def _lost_axes(traced: Trace, layer: Layer, roles: dict[Slot, str]) -> Iterator[Slot]:
    """Yields axes of a layer's leaves that should produce its channels.

    These are axes of kernels none of whose axes is known to produce channels, because
    they are computed by an operation without a rule.
    """
    produced = [i for i, role in layer.roles.items() if role == "produced"]
    for leaf in layer.leaves:
        rank = len(traced.shapes[traced.leaves[leaf]])
        known = {axis: roles.get((leaf, axis)) for axis in range(rank)}
        if "produced" in known.values() or "depthwise" in known.values():
            continue
        if leaf != layer.kernel and _is_scale(traced, leaf, layer.kernel):
            continue
        alike = rank == len(layer.axes)
        axes = produced if alike else [rank - 1]
        yield from ((leaf, axis) for axis in axes if known.get(axis) is None)
