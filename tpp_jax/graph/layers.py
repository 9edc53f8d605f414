"""The layers of a computation: products of activations with what parameters make.

A kernel is most often one leaf of the parameters, perhaps transposed or cast. It may
also be computed from several: a direction and a length (weight normalisation), a weight
and a mask, a weight and two factors of low rank, the concatenated gates of a recurrent
cell. The same rules that follow the channels through a network (rules.py) find which
axis of which leaf has become which axis of the kernel.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tpp_jax.graph.labels import Axes, Channels, Labels, solve
from tpp_jax.graph.rules import apply_rule
from tpp_jax.graph.unfolding import Equation

PRODUCTS = ("conv_general_dilated", "dot_general", "ragged_dot_general")

LeafAxes = frozenset[tuple[str, int]]
"""Axes of parameter leaves."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A use of a kernel: a convolution or a dense layer.

    Attributes:
      kernel: Name of the leaf that names the layer: of all leaves that its kernel is
        computed from, the largest that has axes of both kinds, contracted and produced.
      equation: Equation of one of :data:`PRODUCTS`.
      operand: Number of the kernel among the equation's operands.
      leaves: Names of all leaves that the kernel is computed from.
      axes: Axes of leaves that have become each axis of the kernel.
      inner: Whether the other operand is computed from parameters too, as in a product
        of two factors of low rank.
      met: Axes of leaves that have become each axis of the other operand of an inner
        layer.
      sure: Whether the equation is certainly a layer, since one leaf has axes of both
        kinds. Otherwise it may be a product of activations that do not depend on the
        model's inputs, such as learned queries, with keys.
      name: Dotted name, ``layer1.0.conv1``.
    """

    kernel: str
    equation: Equation
    operand: int
    leaves: tuple[str, ...]
    axes: tuple[LeafAxes, ...]
    inner: bool
    met: tuple[LeafAxes, ...]
    sure: bool
    name: str = ""

    @property
    def roles(self) -> dict[int, str]:
        """Axis of the kernel → ``"produced"`` or ``"contracted"``."""
        produced, contracted = kernel_axes(self.equation, self.operand, len(self.axes))
        return dict.fromkeys(produced, "produced") | dict.fromkeys(
            contracted, "contracted"
        )


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A look-up of the model's inputs in a table of parameters: an embedding.

    Attributes:
      table: Name of the leaf, or of the largest one that the table is computed from.
      produced: Axes of leaves that are not indexed.
    """

    table: str
    produced: LeafAxes


def kernel_axes(
    eqn: Equation, operand: int, rank: int
) -> tuple[list[int], tuple[int, ...]]:
    """Returns the axes of an operand that a product keeps, and those it contracts.

    Axes that both operands share, a batch of matrices or the experts of a ragged
    product, are neither.

    Args:
      eqn: Equation of one of :data:`PRODUCTS`.
      operand: Number of the operand, 0 or 1.
      rank: Number of its axes.
    """
    if eqn.primitive == "conv_general_dilated":
        dims = eqn.params["dimension_numbers"]
        kept, gone, *_ = dims.rhs_spec if operand == 1 else dims.lhs_spec
        return [kept], (gone,)
    if eqn.primitive == "ragged_dot_general":
        ragged = eqn.params["ragged_dot_dimension_numbers"]
        dims, groups = ragged.dot_dimension_numbers, ragged.rhs_group_dimensions
    else:
        dims, groups = eqn.params["dimension_numbers"], ()
    contracted, batch = (tuple(side[operand]) for side in dims)
    gone = {*contracted, *batch, *(groups if operand == 1 else ())}
    return [i for i in range(rank) if i not in gone], contracted


def find_layers(
    leaves: Mapping[str, int],
    origin: Mapping[int, tuple[str, ...]],
    equations: Sequence[Equation],
    shapes: Sequence[tuple[int, ...]],
    trainable: frozenset[str] = frozenset(),
) -> tuple[Layer, ...]:
    """Lists every use of a kernel in order of execution, without names.

    The arguments are attributes of a :class:`tpp_jax.graph.tracing.Trace`.

    Args:
      leaves: Value number of each parameter leaf.
      origin: Names of the leaves that each value is computed from.
      equations: Equations of the computation.
      shapes: Shape of each value.
      trainable: Names of the leaves that are trained.
    """
    finder = _Finder(leaves, origin, equations, shapes, trainable)
    return tuple(finder.layers())


def find_lookups(
    inputs: Sequence[int],
    leaves: Mapping[str, int],
    origin: Mapping[int, tuple[str, ...]],
    equations: Sequence[Equation],
    shapes: Sequence[tuple[int, ...]],
) -> tuple[Lookup, ...]:
    """Lists the look-ups of the model's inputs in a table.

    Tables that are indexed by something built into the model (positions counted from 0)
    are not among them.

    Args:
      inputs: Value numbers of the model's inputs.
      leaves: Value number of each parameter leaf.
      origin: Names of the leaves that each value is computed from.
      equations: Equations of the computation.
      shapes: Shape of each value.
    """
    finder = _Finder(leaves, origin, equations, shapes)
    return tuple(finder.lookups(inputs))


class _Finder:
    def __init__(
        self,
        leaves: Mapping[str, int],
        origin: Mapping[int, tuple[str, ...]],
        equations: Sequence[Equation],
        shapes: Sequence[tuple[int, ...]],
        trainable: frozenset[str] = frozenset(),
    ) -> None:
        self.leaves, self.origin = leaves, origin
        self.equations, self.shapes = equations, shapes
        self.trainable = trainable
        # Values computed from a product of parameters with parameters.
        self.mixed: set[int] = set()

    def layers(self) -> Iterator[Layer]:
        for eqn in self.equations:
            if eqn.outputs and eqn.outputs[0] in self.origin:
                product = eqn.primitive in PRODUCTS
                if product or not self.mixed.isdisjoint(eqn.inputs):
                    self.mixed.update(eqn.outputs)
            if eqn.primitive in PRODUCTS:
                operands = [i for i in (1, 0) if eqn.inputs[i] in self.origin]
                found = (self._of_one_leaf(eqn, i, operands) for i in operands)
                layer = next(filter(None, found), None)
                if layer is None:
                    found = (self._of_several(eqn, i, operands) for i in operands)
                    layer = next(filter(None, found), None)
                if layer is not None:
                    yield layer

    def lookups(self, inputs: Sequence[int]) -> Iterator[Lookup]:
        varying = set(inputs)
        for eqn in self.equations:
            if varying.isdisjoint(eqn.inputs):
                continue
            varying.update(eqn.outputs)
            if eqn.primitive != "gather" or eqn.inputs[1] not in varying:
                continue
            table = eqn.inputs[0]
            if table is None or table not in self.origin:
                continue
            dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
            moved = {*dims.start_index_map, *dims.collapsed_slice_dims}
            moved |= {*dims.operand_batching_dims}
            axes = self._axes(table)
            whole = [
                axes[i]
                for i, n in enumerate(self.shapes[table])
                if i not in moved and sizes[i] == n
            ]
            largest = max(self.origin[table], key=self._size)
            yield Lookup(largest, frozenset().union(*whole))

    def _of_one_leaf(
        self, eqn: Equation, operand: int, operands: list[int]
    ) -> Layer | None:
        leaf, *others = self.origin[eqn.operand(operand)]
        if others or len(self._shape(leaf)) < 2:
            return None
        return self._layer(leaf, eqn, operand, operands, True)

    def _of_several(
        self, eqn: Equation, operand: int, operands: list[int]
    ) -> Layer | None:
        value, inner = eqn.operand(operand), len(operands) == 2
        mixed = value in self.mixed
        names, rank = self.origin[value], len(self.shapes[value])
        produced, contracted = kernel_axes(eqn, operand, rank)
        if (inner and mixed) or not contracted:
            return None
        axes = self._axes(value)
        makes = {leaf for i in produced for leaf, _ in axes[i]}
        takes = {leaf for i in contracted for leaf, _ in axes[i]}
        if mixed and not makes & takes:
            # Factors of low rank are on the right, where kernels are. Learned queries,
            # which are not computed from the inputs, are not, or have heads.
            batched = rank > len(produced) + len(contracted)
            if batched or operand == 0 or not makes or not takes:
                return None

        def importance(leaf: str) -> tuple[int, ...]:
            matrix, trained = len(self._shape(leaf)) > 1, leaf in self.trainable
            known = leaf in makes & takes, matrix, leaf in makes
            return *known, self._size(leaf), trained

        kernel = max(names, key=importance)
        return self._layer(kernel, eqn, operand, operands, bool(makes & takes))

    def _layer(
        self, kernel: str, eqn: Equation, operand: int, operands: list[int], sure: bool
    ) -> Layer:
        value, inner = eqn.operand(operand), len(operands) == 2
        met = self._axes(eqn.operand(1 - operand)) if inner else ()
        names, axes = self.origin[value], self._axes(value)
        return Layer(kernel, eqn, operand, names, axes, inner, met, sure)

    def _shape(self, leaf: str) -> tuple[int, ...]:
        return self.shapes[self.leaves[leaf]]

    def _size(self, leaf: str) -> int:
        return math.prod(self._shape(leaf))

    def _axes(self, value: int) -> tuple[LeafAxes, ...]:
        names = self.origin[value]
        if value == self.leaves[names[0]]:
            rank = len(self.shapes[value])
            return tuple(frozenset([(names[0], i)]) for i in range(rank))
        return self._weights.axes(value, names)

    @functools.cached_property
    def _weights(self) -> "_Weights":
        return _Weights(self.leaves, self.origin, self.equations, self.shapes)


class _Weights:
    """The axes of leaves, followed through what is computed from parameters alone."""

    def __init__(
        self,
        leaves: Mapping[str, int],
        origin: Mapping[int, tuple[str, ...]],
        equations: Sequence[Equation],
        shapes: Sequence[tuple[int, ...]],
    ) -> None:
        self.leaves = leaves
        self.labels = labels = Labels()
        self.axes_of: dict[int, Axes] = {}
        for n in leaves.values():
            self.axes_of[n] = [labels.fresh(size) for size in shapes[n]]

        def operand(n: int | None) -> Axes:
            if n is None:
                return []
            if n in self.axes_of:
                return self.axes_of[n]
            return [labels.stuck(size, "an array built in") for size in shapes[n]]

        for eqn in equations:
            if eqn.outputs and eqn.outputs[0] in origin:
                operands = [operand(n) for n in eqn.inputs]
                sizes = [shapes[n] for n in eqn.outputs]
                results = apply_rule(labels, eqn, operands, sizes)
                self.axes_of.update(zip(eqn.outputs, results, strict=True))

    def axes(self, value: int, names: tuple[str, ...]) -> tuple[LeafAxes, ...]:
        """Returns the axes of leaves that have become each axis of a value."""
        own = [
            (name, i, labels)
            for name in names
            for i, labels in enumerate(self.axes_of[self.leaves[name]])
        ]
        found = []
        for labels in self.axes_of[value]:
            # Most often a leaf has only been cast or transposed.
            same = [(name, i) for name, i, ours in own if ours is labels]
            if not same or len(names) > 1:
                there = self._parts(labels)
                same = [
                    (name, i)
                    for name, i, ours in own
                    if np.isin(self._parts(ours), there).any()
                ]
            found.append(frozenset(same))
        return tuple(found)

    @functools.cached_property
    def _solution(self) -> Channels:
        return solve(self.labels)

    def _parts(self, labels: np.ndarray) -> np.ndarray:
        """Returns the channels of an axis; of a merged axis, those of all its parts."""
        return np.unique(self._solution.of(labels)[1])
