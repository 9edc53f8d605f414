"""Parameters and floating-point operations of a model, read off its jaxpr."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import linen, nnx

from tpp_jax.graph.labels import Channels
from tpp_jax.graph.layers import Layer, kernel_axes
from tpp_jax.graph.records import Groups
from tpp_jax.graph.rules import RULES
from tpp_jax.graph.tracing import Trace, layer_names, layers, source_line, trace

# Operations that are understood, but whose work is neither small nor counted.
_HEAVY = frozenset(
    "fft cholesky triangular_solve tridiagonal_solve lu qr svd eigh".split()
)


class LayerCount(NamedTuple):
    """One convolution or dense layer.

    Attributes:
      channels: number of its filters.
      params: entries of its own parameters (kernel and bias).
      flops: twice its multiply-adds.
    """

    channels: int
    params: int
    flops: int


class Count(NamedTuple):
    """A model's size and cost for one call on the given inputs.

    Attributes:
      params: entries of all trainable parameters, batch norms' included.
      flops: twice the multiply-adds of all convolution and dense layers.
      layers: layer name → its share, in order of execution.
      uncounted: operations that may hold much work and are not in ``flops``, each with
        the line of the model: kernels of one's own (Pallas, FFI), callbacks,
        decompositions of matrices, Fourier transforms, layers in a ``while`` loop,
        which are counted for one step.
    """

    params: int
    flops: int
    layers: dict[str, LayerCount]
    uncounted: tuple[str, ...] = ()


def count(
    model: nnx.Module | linen.Module | Callable[..., Any],
    *inputs: Any,
    params: Any = None,
    **kwargs: Any,
) -> Count:
    """Counts trainable parameters and FLOPs, by the convention of the pruning papers.

    Args:
      model: an NNX module, a Linen module or a function ``fn(params, *inputs)``.
      *inputs: example inputs, abstract will do; give a batch of one for the usual
        figure per image.
      params: for a function, its parameters, for a Linen module its variables.
      **kwargs: keyword arguments of the model, like ``inputs``.

    Returns:
      The totals and each layer's part. A layer is a product of activations with
      parameters, or with what is computed from parameters. Products of activations with
      activations (queries with keys), element-wise work, norms and pooling are not
      counted. A padded border counts as if it were computed, as PyTorch's counters do;
      the zeros that a transposed convolution puts between its inputs do not. Of the
      branches of a ``cond`` the most expensive one counts, of a ``while`` loop one step
      (see :attr:`Count.uncounted`), of a ``shard_map`` what all devices do together.

    Example:
      >>> from flax import linen, nnx
      >>> import jax.numpy as jnp
      >>> count(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), jnp.ones((1, 3))).flops
      30
    """
    traced = trace(model, *inputs, params=params, **kwargs)
    name_of = layer_names(traced)
    sizes: dict[str, int] = {}
    for leaf in traced.trainable:
        size = math.prod(traced.shapes[traced.leaves[leaf]])
        sizes[name_of(leaf)] = sizes.get(name_of(leaf), 0) + size
    found = {
        layer.name: LayerCount(_filters(traced, layer), sizes.get(layer.name, 0), 0)
        for layer in layers(traced)
    }
    # A layer that runs twice costs twice: FLOPs are summed over uses, not layers.
    uses = _read_uses(traced)
    costs = [
        factor * math.prod(traced.shapes[value][axis] for value, axis in along)
        for factor, along in (_work(traced, use) for use in uses)
    ]
    counts = _in_dearest_branches(costs, [use.equation.branches for use in uses])
    for use, cost, counted in zip(uses, costs, counts, strict=True):
        one = found[use.name]
        found[use.name] = one._replace(flops=one.flops + cost * counted)
    return Count(
        params=sum(sizes.values()),
        flops=sum(one.flops for one in found.values()),
        layers=found,
        uncounted=uncounted_work(traced),
    )


def _read_uses(traced: Trace) -> list[Layer]:
    """Lists the uses of layers that lead to an output; XLA leaves the others out."""
    uses = layers(traced, repeated=True)
    return [use for use in uses if traced.unread.isdisjoint(use.equation.outputs)]


def uncounted_work(traced: Trace) -> tuple[str, ...]:
    """Names the operations whose work is not counted; see :attr:`Count.uncounted`."""
    in_loops = {use.equation.outputs for use in traced.uses if use.equation.endless}
    found: dict[str, None] = {}
    for eqn in traced.equations:
        if not traced.unread.isdisjoint(eqn.outputs):
            continue
        line = source_line(eqn.source)
        where = f" ({line})" if line else ""
        if eqn.primitive not in RULES or eqn.primitive in _HEAVY:
            found[f"{eqn.primitive}{where}"] = None
        elif eqn.outputs in in_loops:
            found[f"{eqn.primitive} in a while loop{where}"] = None
    return tuple(found)


def _filters(traced: Trace, layer: Layer) -> int:
    operand = traced.shapes[layer.equation.inputs[layer.operand]]
    shape = traced.shapes[traced.leaves[layer.kernel]]
    produced, _ = kernel_axes(layer.equation, layer.operand, len(operand))
    total = 1
    for i in produced:
        own = [axis for leaf, axis in layer.axes[i] if leaf == layer.kernel]
        # A device's part of a kernel, or a half of it, is not all of its filters.
        parts = len(own) == 1 and shape[own[0]] % operand[i] == 0
        total *= shape[own[0]] if parts else operand[i]
    return total


def _work(traced: Trace, layer: Layer) -> tuple[int, list[tuple[int, int]]]:
    """Returns the FLOPs of one use of a layer: a factor, and axes that multiply it.

    An axis is a value of the trace and the number of one of its axes.
    """
    eqn = layer.equation
    [out] = eqn.outputs
    if eqn.primitive == "conv_general_dilated":
        dims = eqn.params["dimension_numbers"]
        taps = math.prod(
            _taps(
                traced.shapes[out][dims.out_spec[i]],
                traced.shapes[eqn.inputs[1]][dims.rhs_spec[i]],
                *(eqn.params[name][i - 2] for name in _SPACING),
                low,
            )
            for i, (low, _) in enumerate(eqn.params["padding"], start=2)
        )
        along = [(out, axis) for axis in dims.out_spec[:2]]
        return 2 * eqn.times * taps, [*along, (eqn.inputs[1], dims.rhs_spec[1])]
    rank = len(traced.shapes[eqn.inputs[0]])
    _, contracted = kernel_axes(eqn, 0, rank)
    axes = range(len(traced.shapes[out]))
    if eqn.primitive == "ragged_dot_general":
        ragged = eqn.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions
        if set(ragged) <= {*contracted}:  # each group contracts rows of its own
            axes = axes[1:]
    along = [(out, axis) for axis in axes]
    return 2 * eqn.times, along + [(eqn.inputs[0], axis) for axis in contracted]


_SPACING = ("window_strides", "lhs_dilation", "rhs_dilation")


def _taps(
    outputs: int, window: int, stride: int, spread: int, dilation: int, low: int
) -> int:
    """Counts the pairs of an output and a weight of a window that meet an input.

    Along one axis; the border counts as inputs, but not the zeros between inputs.

    Args:
      outputs: number of outputs.
      window: number of weights.
      stride: distance of the windows.
      spread: distance of the inputs: ``spread - 1`` zeros are put between two.
      dilation: distance of the weights.
      low: padding before the first input.
    """
    if spread == 1:
        return outputs * window
    places = np.arange(outputs)[:, None] * stride + np.arange(window) * dilation
    return int(((places - low) % spread == 0).sum())


def _in_dearest_branches(
    costs: Sequence[int], branches: Sequence[tuple[tuple[int, int], ...]]
) -> list[bool]:
    """Tells which costs count: of each ``cond``, those of its most expensive branch.

    Args:
      costs: of each use of a layer.
      branches: see :attr:`tpp_jax.graph.unfolding.Equation.branches`.
    """

    def dearest(uses: list[int], depth: int) -> tuple[int, list[int]]:
        chosen = [i for i in uses if len(branches[i]) == depth]
        total = sum(costs[i] for i in chosen)
        conds: dict[int, dict[int, list[int]]] = {}
        for i in uses:
            if len(branches[i]) > depth:
                cond, branch = branches[i][depth]
                conds.setdefault(cond, {}).setdefault(branch, []).append(i)
        for inside in conds.values():
            found = [dearest(some, depth + 1) for some in inside.values()]
            most, those = max(found, key=lambda pair: pair[0])
            total, chosen = total + most, chosen + those
        return total, chosen

    if not any(branches):
        return [True] * len(costs)
    counted = set(dearest(list(range(len(costs))), 0)[1])
    return [i in counted for i in range(len(costs))]


class Costs:
    """Size and cost of any pruned form of a model, from the trace of the whole one.

    Every parameter is as large as the product of its axes, and every convolution and
    dense layer costs twice the product of its output's axes and of those that it
    contracts (see :func:`count`). Here each axis is put down to the groups whose
    channels run along it, so that counts of kept channels are all that is needed;
    nothing is traced again.

    Example:
      >>> import jax.numpy as jnp
      >>> from tpp_jax.pruning.channels import channel_groups
      >>> def mlp(p, x):
      ...     return x @ p["w1"] @ p["w2"]
      >>> p = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
      >>> costs = Costs(channel_groups(mlp, jnp.ones((1, 4)), params=p))
      >>> costs({}), costs({"w1": 5})
      ((48, 96), (30, 60))
    """

    def __init__(self, groups: Groups) -> None:
        traced = groups.traced
        axes = groups.reading.axes
        self._channels = groups.reading.solution
        self._groups = groups
        self._group_of = _groups_of_channels(groups, axes, self._channels)
        self._known: dict[bytes, int] = {}
        # Of each axis: pairs of a number of positions and the groups they belong to.
        self._axes: list[list[tuple[int, list[int]]]] = []
        # Of each parameter and each layer: a factor, and axes that multiply it.
        self._params = [
            self._product(1, axes[traced.leaves[leaf]]) for leaf in traced.trainable
        ]
        uses = _read_uses(traced)
        self._branches = [use.equation.branches for use in uses]
        self._flops = []
        for use in uses:
            factor, along = _work(traced, use)
            whole = [axes[value][axis] for value, axis in along]
            self._flops.append(self._product(factor, whole))

    def __call__(self, kept: Mapping[str, int]) -> tuple[int, int]:
        """Returns the parameters and FLOPs, as :func:`count` has them, if pruned.

        Args:
          kept: group name → channels that stay; groups not named stay whole.
        """
        counts = [
            (kept.get(group.name, group.size), group.size) for group in self._groups
        ]
        sizes = []
        for parts in self._axes:
            size = 0
            for positions, through in parts:
                # Positions that several groups run through are all combinations of
                # their channels: the shares that stay multiply.
                for group in through:
                    positions = positions * counts[group][0] // counts[group][1]
                size += positions
            sizes.append(size)

        def each(products: list[tuple[int, list[int]]]) -> list[int]:
            return [
                factor * math.prod(sizes[axis] for axis in along)
                for factor, along in products
            ]

        flops = each(self._flops)
        counted = _in_dearest_branches(flops, self._branches)
        total = sum(itertools.compress(flops, counted))
        return sum(each(self._params)), total

    def _product(self, factor: int, axes: list[np.ndarray]) -> tuple[int, list[int]]:
        along = []
        for labels in axes:
            if (labels >= 0).any():
                along.append(self._axis(labels))
            else:
                factor *= len(labels)
        return factor, along

    def _axis(self, labels: np.ndarray) -> int:
        key = labels.tobytes()
        if key not in self._known:
            positions, channels = self._channels.of(labels)
            through, column = np.unique(self._group_of[channels], return_inverse=True)
            met = np.zeros((len(labels), len(through)), bool)
            met[positions, column] = True
            kinds, numbers = np.unique(met[:, through >= 0], axis=0, return_counts=True)
            through = through[through >= 0]
            self._known[key] = len(self._axes)
            self._axes.append(
                [
                    (int(n), through[kind].tolist())
                    for kind, n in zip(kinds, numbers, strict=True)
                ]
            )
        return self._known[key]


def _groups_of_channels(
    groups: Groups, axes: Mapping[int | None, list[np.ndarray]], solution: Channels
) -> np.ndarray:
    """Returns the index of the prunable group that each channel is of, or -1."""
    index = {group.name: i for i, group in enumerate(groups)}
    group_of = np.full(len(solution.stuck), -1)
    draws = np.random.default_rng(0)
    # Several channels of the trace may be one of a group: all members are looked at.
    for leaf, runs_through in groups.members.items():
        for axis, labels in enumerate(axes[groups.traced.leaves[leaf]]):
            here = [pair for pair in runs_through if pair[1].axis == axis]
            if not here:
                continue
            positions, channels = solution.of(labels)
            # A channel is known by its positions, which are known by the sum of a
            # random 64-bit number for each.
            marks = draws.integers(2**63, size=len(labels), dtype=np.uint64)
            channels, column = np.unique(channels, return_inverse=True)
            sums = np.zeros(len(channels), np.uint64)
            np.add.at(sums, column, marks[positions])
            for group, member in here:
                own = np.isin(sums, marks[member.positions].sum(axis=1))
                group_of[channels[own]] = index[group.name]
    return group_of
