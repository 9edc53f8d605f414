"""Parameters and floating-point operations of a model, read off its jaxpr."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from tpp_jax.pruning.groups import Groups, label_axes
from tpp_jax.pruning.labels import Channels, solve
from tpp_jax.pruning.tracing import Layer, Trace, layer_names, layers, trace


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
    """

    params: int
    flops: int
    layers: dict[str, LayerCount]


def count(
    model: nnx.Module | Callable[..., Any], *inputs: Any, params: Any = None
) -> Count:
    """Counts trainable parameters and FLOPs, by the convention of the pruning papers.

    Args:
      model: an NNX module or a function ``fn(params, *inputs)``.
      *inputs: example inputs, abstract will do; give a batch of one for the usual
        figure per image.
      params: for a function, its parameters.

    Returns:
      The totals and each layer's part. Element-wise work, norms and pooling are not
      counted. A padded border counts as if it were computed, as PyTorch's counters do.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> count(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), jnp.ones((1, 3))).flops
      30
    """
    traced = trace(model, *inputs, params=params)
    name_of = layer_names(traced)
    sizes: dict[str, int] = {}
    for leaf in traced.trainable:
        size = math.prod(traced.shapes[traced.leaves[leaf]])
        sizes[name_of(leaf)] = sizes.get(name_of(leaf), 0) + size
    found = {
        layer.name: LayerCount(_filters(traced, layer), sizes.get(layer.name, 0), 0)
        for layer in layers(traced)
    }
    # A layer that runs twice costs twice: FLOPs are summed over equations, not layers.
    for layer in layers(traced, repeated=True):
        one = found[layer.name]
        found[layer.name] = one._replace(flops=one.flops + _flops(traced, layer))
    return Count(
        params=sum(sizes.values()),
        flops=sum(one.flops for one in found.values()),
        layers=found,
    )


def _filters(traced: Trace, layer: Layer) -> int:
    if layer.equation.primitive == "conv_general_dilated":
        out_feature = layer.equation.params["dimension_numbers"].out_spec[1]
        return traced.shapes[layer.equation.outputs[0]][out_feature]
    (contracted, batch) = (
        side[layer.operand] for side in layer.equation.params["dimension_numbers"]
    )
    shape = traced.shapes[layer.equation.inputs[layer.operand]]
    gone = {*contracted, *batch}
    return math.prod(n for i, n in enumerate(shape) if i not in gone)


def _flops(traced: Trace, layer: Layer) -> int:
    eqn = layer.equation
    out = eqn.times * math.prod(traced.shapes[eqn.outputs[0]])
    shape = traced.shapes[eqn.inputs[layer.operand]]
    dims = eqn.params["dimension_numbers"]
    if eqn.primitive == "conv_general_dilated":
        return 2 * out * (math.prod(shape) // shape[dims.rhs_spec[0]])
    return 2 * out * math.prod(shape[i] for i in dims[0][layer.operand])


class Costs:
    """Size and cost of any pruned form of a model, from the trace of the whole one.

    Every parameter is as large as the product of its axes, and every convolution and
    dense layer costs twice the product of its output's axes and of those that it
    contracts. Here each axis is put down to the groups whose channels run along it, so
    that counts of kept channels are all that is needed; nothing is traced again.

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
        labels, axes = label_axes(traced, groups.joined)
        self._channels = solve(labels)
        self._groups = groups
        self._group_of = _groups_of_channels(groups, axes, self._channels)
        self._known: dict[bytes, int] = {}
        # Of each axis: pairs of a number of positions and the groups they belong to.
        self._axes: list[list[tuple[int, list[int]]]] = []
        # Of each parameter and each layer: a factor, and axes that multiply it.
        self._params = [
            self._product(1, axes[traced.leaves[leaf]]) for leaf in traced.trainable
        ]
        self._flops = []
        for layer in layers(traced, repeated=True):
            eqn = layer.equation
            dims = eqn.params["dimension_numbers"]
            kernel = axes[eqn.inputs[layer.operand]]
            if eqn.primitive == "conv_general_dilated":
                inner = [axis for i, axis in enumerate(kernel) if i != dims.rhs_spec[0]]
            else:
                inner = [kernel[i] for i in dims[0][layer.operand]]
            whole = [*axes[eqn.outputs[0]], *inner]
            self._flops.append(self._product(2 * eqn.times, whole))

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

        def total(products: list[tuple[int, list[int]]]) -> int:
            return sum(
                factor * math.prod(sizes[axis] for axis in along)
                for factor, along in products
            )

        return total(self._params), total(self._flops)

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
