"""Kernels, and the maps that are applied to each of their output channels.

Behind a product with a kernel there may be operations that multiply each channel with a
number, or add one to it: a bias, a batch norm in evaluation mode, a layer scale. Where
these numbers are computed from parameters alone, they are a *chain*. Chains are found
in the jaxpr of any model; no layer is known by its class.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tpp_jax.graph.naming import layer_name, some
from tpp_jax.pruning.dataflow import Graph, Operation, Value

Number = Float[np.ndarray, "..."]
Axes = Mapping[int, int]
"""Axis of an array → axis of another that it has become."""

_ARITHMETIC = {"add": "add", "add_any": "add", "sub": "sub", "mul": "mul", "div": "div"}
_UNCHANGED = frozenset(
    "convert_element_type copy copy_p sharding_constraint reshard mesh_cast pvary "
    "name".split()
)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One operation of a chain.

    Attributes:
      operation: The operation.
      kind: Its arithmetic: ``"add"``, ``"sub"``, ``"mul"`` or ``"div"``.
      first: Whether the channels are its first operand.
      operand: The other operand before it was broadcast.
      axes: Axis of that operand → axis of the kernel's parameter; others have size 1.
    """

    operation: Operation
    kind: str
    first: bool
    operand: Value
    axes: Axes

    @property
    def leaves(self) -> list[str]:
        """Names of the parameters that its operand is computed from."""
        return sorted(self.operand.leaves or ())

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies or divides."""
        return self.kind in ("mul", "div")

    @property
    def scales(self) -> bool:
        """Whether it multiplies with parameters."""
        return self.multiplies and bool(self.leaves)


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A product with a kernel, and what is done to each channel of its result.

    Attributes:
      product: The product.
      kernel: Name of the kernel's parameter.
      channels: Axis of that parameter → its size, for all axes that are channels of the
        result.
      steps: Operations behind the product, in order.
      end: Reason why the chain ends, or why the kernel cannot be changed.
    """

    product: Operation
    kernel: str
    channels: Mapping[int, int]
    steps: tuple[Step, ...]
    end: str

    @property
    def scales(self) -> bool:
        """Whether it multiplies with parameters."""
        return any(step.scales for step in self.steps)

    @property
    def name(self) -> str:
        """Names of the layers whose parameters it multiplies with."""
        return norm_name(leaf for s in self.steps if s.scales for leaf in s.leaves)

    @np.errstate(all="ignore")
    def affine(self, operands: Sequence[Any]) -> tuple[Number, Number]:
        """Returns what the chain multiplies each channel with, and what it then adds.

        Args:
          operands: Value of the operand of each step; more are not used.
        """
        factor, offset = np.float64(1), np.float64(0)
        for step, value in zip(self.steps, operands, strict=False):
            number = self._spread(step, np.asarray(value, np.float64))
            match step.kind, step.first:
                case "add", _:
                    offset = offset + number
                case "sub", True:
                    offset = offset - number
                case "sub", False:
                    factor, offset = -factor, number - offset
                case "mul", _:
                    factor, offset = factor * number, offset * number
                case _:
                    factor, offset = factor / number, offset / number
        sizes = tuple(self.channels.values())
        return np.broadcast_to(factor, sizes), np.broadcast_to(offset, sizes)

    def _spread(self, step: Step, number: Number) -> Number:
        """Returns an operand with one axis for each axis of the channels."""
        own = sorted(step.axes, key=lambda axis: step.axes[axis])
        ones = [axis for axis in range(number.ndim) if axis not in step.axes]
        sizes = {step.axes[axis]: number.shape[axis] for axis in own}
        shape = [sizes.get(axis, 1) for axis in self.channels]
        return number.transpose([*ones, *own]).reshape(shape)


def norm_name(leaves: Iterable[str]) -> str:
    """Returns the names of the layers that parameters belong to."""
    return some(dict.fromkeys(layer_name(leaf) for leaf in leaves))


def find_chains(graph: Graph) -> list[Chain]:
    """Returns a chain for each product of activations with what parameters make."""
    found = []
    for operation in graph.operations:
        if operation.primitive in ("conv_general_dilated", "dot_general"):
            own = [i for i, value in enumerate(operation.operands) if value.leaves]
            if len(own) == 1 and operation.results[0].leaves is None:
                found.append(_chain(graph, operation, own[0]))
    return found


def _chain(graph: Graph, product: Operation, side: int) -> Chain:
    kernel = product.operands[side]
    names = sorted(kernel.leaves or ())
    refused = Chain(product, some(names), {}, (), "")
    if len(names) > 1:
        end = f"its kernel is computed from several parameters: {some(names)}"
        return dataclasses.replace(refused, end=end)
    [name] = names
    leaf = graph.leaves[name]
    if graph.uses.get(name) != [product]:
        return dataclasses.replace(refused, end=f"{name} is also used elsewhere")
    path, start = back(kernel)
    if start is not leaf or not jnp.issubdtype(leaf.dtype, jnp.floating):
        end = f"its kernel is computed from {name} by {start.maker or 'other numbers'}"
        return dataclasses.replace(refused, end=end)
    axes = _through(path, _own_axes(leaf))
    places = _product_axes(product.eqn, side, len(kernel.shape))
    axes = {own: places[axis] for own, axis in axes.items() if axis in places}
    channels = {axis: leaf.shape[axis] for axis in sorted(axes)}
    steps, end = _steps(graph, product.results[0], axes)
    return _owned(graph, Chain(product, name, channels, tuple(steps), end))


def _product_axes(eqn: Any, side: int, rank: int) -> Axes:
    """Returns the axis of a product's result for each axis of a kernel that it has."""
    dims = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "conv_general_dilated":
        return {dims.rhs_spec[0]: dims.out_spec[1]} if side == 1 else {}
    contracted, batch = dims
    found = {axis: place for place, axis in enumerate(batch[side])}
    free = [i for i in range(rank) if i not in (*batch[side], *contracted[side])]
    # After the batch come the free axes of the left operand, then those of the right.
    ranks = [len(var.aval.shape) for var in eqn.invars]
    skipped = len(batch[0]) if side == 0 else ranks[0] - len(contracted[0])
    return found | {axis: skipped + place for place, axis in enumerate(free)}


def _steps(graph: Graph, value: Value, axes: Axes) -> tuple[list[Step], str]:
    """Returns the steps behind a product, and why there are no more of them.

    Args:
      graph: Computation.
      value: Result of the product.
      axes: Axis of the kernel's parameter → axis of the result.
    """
    steps: list[Step] = []
    while True:
        if value in graph.outputs or len(value.readers) != 1:
            source = f"{value.maker}" if steps else "the kernel"
            return steps, f"the result of {source} is also read elsewhere"
        [reader] = value.readers
        kind = _ARITHMETIC.get(reader.primitive)
        if kind is not None:
            step = _step(reader, kind, value, axes)
            if step is None:
                return steps, f"{reader} does not do the same to all of a channel"
            steps.append(step)
        else:
            moved = _moved(reader, axes)
            if moved is None or len(moved) < len(axes):
                return steps, f"{reader} comes in between"
            axes = moved
        value = reader.results[0]


def _step(operation: Operation, kind: str, value: Value, axes: Axes) -> Step | None:
    """Returns an operation as a step; None if it does not act on channels alone."""
    first = operation.operands[0] is value
    other = operation.operands[1 if first else 0]
    if other.leaves is None or (kind == "div" and not first):
        return None
    path, operand = back(other, only=("broadcast_in_dim", "reshape", "squeeze"))
    own = _own_axes(operand)
    lies = _through(path, own)
    channel = {place: axis for axis, place in axes.items()}
    if any(lies.get(axis) not in channel for axis in own):
        return None
    return Step(operation, kind, first, operand, {a: channel[lies[a]] for a in own})


def _owned(graph: Graph, chain: Chain) -> Chain:
    """Cuts off steps with parameters that are used elsewhere, and constants behind."""
    steps, end = list(chain.steps), chain.end
    while True:
        operations = {step.operation for step in steps}
        shared = [
            (i, leaf)
            for i, step in enumerate(steps)
            for leaf in step.leaves
            if leaf not in graph.uses or not operations.issuperset(graph.uses[leaf])
        ]
        if not shared:
            break
        i, leaf = shared[0]
        del steps[i:]
        end = f"{leaf} is also used elsewhere"
    while steps and not steps[-1].leaves:
        del steps[-1]
    return dataclasses.replace(chain, steps=tuple(steps), end=end)


def shorter(graph: Graph, chain: Chain) -> Chain:
    """Returns the chain up to its last multiplication with parameters."""
    last = max(i for i, step in enumerate(chain.steps) if step.scales)
    return _owned(graph, dataclasses.replace(chain, steps=chain.steps[:last]))


def _own_axes(value: Value) -> Axes:
    return {i: i for i, size in enumerate(value.shape) if size > 1}


def back(
    value: Value, only: Sequence[str] | None = None
) -> tuple[list[Operation], Value]:
    """Returns the operations that only moved the entries of a value, and their source.

    Args:
      value: Value that is computed from parameters alone.
      only: Primitives to go back through; None for all that move entries.
    """
    path: list[Operation] = []
    while value.maker is not None and _moved(value.maker, {}) is not None:
        if only is not None and value.maker.primitive not in only:
            break
        path.append(value.maker)
        value = value.maker.operands[0]
    return path[::-1], value


def _through(path: Sequence[Operation], axes: Axes) -> Axes:
    for operation in path:
        moved = _moved(operation, axes)
        assert moved is not None
        axes = moved
    return axes


def _moved(operation: Operation, axes: Axes) -> Axes | None:
    """Returns where axes are after an operation; None if it does more than move.

    Axes that are merged with others, reversed or cut are left out.
    """
    if len(operation.operands) != 1 or len(operation.results) != 1:
        return None
    params, [old], [new] = operation.eqn.params, operation.operands, operation.results
    match operation.primitive:
        case name if name in _UNCHANGED:
            both = (jnp.issubdtype(x.dtype, jnp.floating) for x in (old, new))
            return axes if all(both) else None
        case "transpose":
            place = params["permutation"].index
            return {own: place(axis) for own, axis in axes.items()}
        case "broadcast_in_dim":
            place = params["broadcast_dimensions"]
            return {own: place[axis] for own, axis in axes.items()}
        case "reshape" if params.get("dimensions") is None:
            return _reshaped(old.shape, new.shape, axes)
        case "squeeze" | "expand_dims":
            return _reshaped(old.shape, new.shape, axes)
        case "rev":
            gone = params["dimensions"]
        case "slice":
            pairs = enumerate(zip(old.shape, new.shape, strict=True))
            gone = [axis for axis, (before, after) in pairs if before != after]
        case _:
            return None
    return {own: axis for own, axis in axes.items() if axis not in gone}


def _reshaped(old: tuple[int, ...], new: tuple[int, ...], axes: Axes) -> Axes:
    """Returns where axes are after a reshape that leaves them as they are."""
    places = {
        (math.prod(new[:axis]), size): axis for axis, size in enumerate(new) if size > 1
    }
    found = {own: (math.prod(old[:axis]), old[axis]) for own, axis in axes.items()}
    return {own: places[key] for own, key in found.items() if key in places}


def other_scales(graph: Graph, folded: Sequence[Chain]) -> Iterator[tuple[str, str]]:
    """Yields the other multiplications of activations with parameters.

    Args:
      graph: Computation.
      folded: Chain of each product; without steps if it was not folded.

    Yields:
      Names of the layers whose parameters they are, and why they were not folded.
    """
    known = {step.operation for chain in folded for step in chain.steps}
    ends = {chain.product: chain.end for chain in folded}
    for operation in graph.operations:
        if operation.primitive in ("mul", "div") and operation not in known:
            value, other = operation.operands
            if value.leaves is not None and operation.primitive == "mul":
                value, other = other, value
            if value.leaves is None and other.leaves:
                yield norm_name(sorted(other.leaves)), _reason(graph, value, ends)


def _reason(graph: Graph, value: Value, ends: Mapping[Operation, str]) -> str:
    """Returns why what multiplies a value is not folded into a kernel."""
    while True:
        maker = value.maker
        if maker is None:
            return "it comes before all products"
        if maker in ends:
            return ends[maker]
        varying = [operand for operand in maker.operands if operand.leaves is None]
        passed = maker.primitive in _ARITHMETIC or _moved(maker, {}) is not None
        if len(varying) != 1 or not passed:
            return f"what it multiplies is a result of {maker}, not of a kernel"
        if value in graph.outputs or len(value.readers) != 1:
            return f"the result of {maker} is also read elsewhere"
        [value] = varying
