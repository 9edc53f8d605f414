"""What each axis of each parameter does: produce channels, contract them, act on them.

Read off the uses of kernels (layers.py); channels.py and the criteria know roles only.
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
      of: axis of a leaf → ``"produced"``, ``"contracted"`` or ``"depthwise"``; what is
        not in it acts on channels one by one.
      makers: axes that produce channels where no axis of ``of`` does: the rank of two
        factors whose product is a kernel, a table whose rows are used as they are.
      lost: axes of kernels that are listed as channels though it is not known what
        becomes of them, with the reason.
    """

    of: dict[Slot, str]
    makers: frozenset[Slot]
    lost: dict[Slot, str]


def read_roles(traced: Trace, kinds: dict[str, str]) -> Roles:
    """Tells which axes of leaves produce channels, and which contract them.

    Args:
      traced: the computation.
      kinds: from :func:`convolution_kinds`, of the unpruned model.
    """
    roles: dict[Slot, str] = {}
    found = layers(traced)
    inner = [use for use in traced.uses if use.inner]
    # A product with activations says what the axes of a kernel are; one of parameters
    # only, such as an estimate of its largest singular value, has the second word.
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
    """Returns leaf name → ``"depthwise"`` or ``"grouped"``, for kernels in groups.

    A convolution in groups of one input each is depthwise. Once it is pruned, one in
    groups of several may be left with one input each as well, and a depthwise one with
    a single group: which one it is, is seen in the unpruned model only.
    """
    kinds: dict[str, str] = {}
    for eqn in traced.equations:
        if eqn.primitive == "conv_general_dilated":
            kind = kind_of(eqn, traced, {})
            for leaf in traced.origin.get(eqn.inputs[1], ()):
                kinds.setdefault(leaf, kind)
    return kinds


def kind_of(eqn: Equation, traced: Trace, kinds: dict[str, str]) -> str:
    """Returns ``"plain"``, ``"depthwise"`` or ``"grouped"`` for an equation.

    Args:
      eqn: any equation; all but convolutions are plain.
      traced: the computation that it is of.
      kinds: leaf name → kind in the unpruned model.
    """
    if eqn.primitive != "conv_general_dilated":
        return "plain"
    for leaf in traced.origin.get(eqn.inputs[1], ()):
        if leaf in kinds:
            return kinds[leaf]
    if eqn.params["feature_group_count"] == 1:
        return "plain"
    width = traced.shapes[eqn.inputs[1]][eqn.params["dimension_numbers"].rhs_spec[1]]
    return "depthwise" if width == 1 else "grouped"


def read_stacks(
    traced: Trace, roles: Roles, channels_at: Mapping[Slot, np.ndarray]
) -> dict[str, tuple[int, ...]]:
    """Finds the axes of each kernel along which kernels of their own are stacked.

    Such an axis is gone before the layer, since a loop runs along it or one kernel is
    taken out by its index; or the product is one of batches along it.

    Args:
      traced: the computation.
      roles: from :func:`read_roles`.
      channels_at: axis of a leaf → the channels that run through it.
    """
    found: dict[str, tuple[int, ...]] = {}
    for layer in traced.uses:
        leaf, value = layer.kernel, layer.equation.inputs[layer.operand]
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
    """Finds the experts of a layer that all experts' inputs are the same for.

    Its product is not one of batches, but that of the layer after it is.
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
    """Finds the axes of each kernel that index its filters together.

    Args:
      traced: the computation.
      roles: from :func:`read_roles`.
      stacked: from :func:`read_stacks`.
    """
    produced: dict[str, list[int]] = {}
    for (leaf, axis), role in sorted(roles.of.items()):
        if role == "produced" and axis not in stacked.get(leaf, ()):
            produced.setdefault(leaf, []).append(axis)
    # The words of a table are no filters, even if an output layer produces them.
    for lookup in traced.lookups:
        own = sorted(axis for leaf, axis in lookup.produced if leaf == lookup.table)
        produced[lookup.table] = own
    return {leaf: tuple(found) for leaf, found in produced.items()}


def read_orders(traced: Trace) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers every parameter leaf by its layer in order of execution.

    Returns:
      ``(leaf → number of its layer, leaf → number of the equation that first needs
      it)``; a kernel is needed by its layer, wherever it was transposed or cast.
    """
    orders: dict[str, int] = {}
    first_use: dict[str, int] = {}
    tables = {lookup.table for lookup in traced.lookups}
    found = layers(traced)
    kernels = {layer.kernel for layer in found if not layer.inner}
    at = {layer.equation.outputs[0]: i for i, layer in enumerate(found)}
    leaf_of = {value: leaf for leaf, value in traced.leaves.items()}
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
    """Tells a factor for each channel from a matrix of filters.

    Zeros in it take its channels out, as those of a norm's scale do.
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

    It is for kernels of which nothing is known to do so: those that an operation
    without a rule has gone over.
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
