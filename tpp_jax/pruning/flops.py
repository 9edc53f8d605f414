"""Parameters and floating-point operations of a model, read off its jaxpr."""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import linen, nnx

from tpp_jax.graph.layers import Layer, kernel_axes
from tpp_jax.graph.records import Groups
from tpp_jax.graph.rules import BUILT_IN
from tpp_jax.graph.tracing import Trace, layer_names, layers, source_line, trace
from tpp_jax.pruning.axes import Axes, values

# Operations with rules whose work may be large and is not counted.
_HEAVY = frozenset(
    "fft cholesky triangular_solve tridiagonal_solve lu qr svd eigh".split()
)


class LayerCount(NamedTuple):
    """Size and cost of one convolution or dense layer.

    Attributes:
      channels: Number of filters.
      params: Number of entries of the kernel and the bias.
      flops: Twice the number of multiply-adds.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((3, 5))}
      >>> count(lambda p, x: x @ p["w"], jnp.ones((1, 3)), params=params).layers["w"]
      LayerCount(channels=5, params=15, flops=30)
    """

    channels: int
    params: int
    flops: int


class Count(NamedTuple):
    """Size of a model, and its cost for one call on the given inputs.

    Attributes:
      params: Number of entries of all trainable parameters, those of norms included.
      flops: Twice the number of multiply-adds of all convolution and dense layers.
      layers: Layer name → its size and cost, in order of execution.
      uncounted: Operations that may do much work that is not in ``flops``, each with
        the line of the model: custom kernels (Pallas, FFI), callbacks, matrix
        decompositions, Fourier transforms, and layers in a ``while`` loop, which are
        counted for one step.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((3, 5))}
      >>> total = count(lambda p, x: x @ p["w"], jnp.ones((1, 3)), params=params)
      >>> total.params, total.flops, total.uncounted
      (15, 30, ())
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
      model: NNX module, Linen module or function ``fn(params, *inputs)``.
      *inputs: Example inputs, which may be abstract; a batch of one gives the usual
        figure per image.
      params: Parameter pytree of a function, or variables of a Linen module.
      **kwargs: Keyword arguments of the model, like ``inputs``.

    Returns:
      The totals and the part of each layer. A layer is a product of activations with
      parameters, or with arrays computed from parameters. Products of activations with
      activations (queries with keys), element-wise work, norms and pooling are not
      counted. A padded border is counted as if it were computed, as by PyTorch's
      counters; the zeros that a transposed convolution puts between its inputs are not.
      Only the most expensive branch of a ``cond`` is counted, one step of a ``while``
      loop (see :attr:`Count.uncounted`), and all devices of a ``shard_map``.

    Raises:
      TPPTypeError: The model has another type, or ``params`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
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
    counts = _in_costliest_branches(costs, [use.equation.branches for use in uses])
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
    """Returns the uses of layers that an output depends on; XLA drops the others."""
    uses = layers(traced, repeated=True)
    return [use for use in uses if traced.unread.isdisjoint(use.equation.outputs)]


def uncounted_work(traced: Trace) -> tuple[str, ...]:
    """Returns the operations that are not counted; see :attr:`Count.uncounted`."""
    in_loops = {use.equation.outputs for use in traced.uses if use.equation.endless}
    found: dict[str, None] = {}
    for eqn in traced.equations:
        if not traced.unread.isdisjoint(eqn.outputs):
            continue
        line = source_line(eqn.source)
        where = f" ({line})" if line else ""
        if eqn.primitive not in BUILT_IN or eqn.primitive in _HEAVY:
            found[f"{eqn.primitive}{where}"] = None
        elif eqn.outputs in in_loops:
            found[f"{eqn.primitive} in a while loop{where}"] = None
    return tuple(found)


def _filters(traced: Trace, layer: Layer) -> int:
    """Returns the number of filters of a layer."""
    operand = traced.shapes[_operands(layer)[layer.operand]]
    shape = traced.shapes[traced.leaves[layer.kernel]]
    produced, _ = kernel_axes(layer.equation, layer.operand, len(operand))
    total = 1
    for i in produced:
        own = [axis for leaf, axis in layer.axes[i] if leaf == layer.kernel]
        # The operand may be a part of the kernel: a shard, or one half of it.
        is_part = len(own) == 1 and shape[own[0]] % max(operand[i], 1) == 0
        total *= shape[own[0]] if is_part else operand[i]
    return total


def _work(traced: Trace, layer: Layer) -> tuple[int, list[tuple[int, int]]]:
    """Returns the FLOPs of one use of a layer as a factor and axes that multiply it.

    Each axis is a pair: a value of the trace, and the index of one of its axes.
    """
    eqn = layer.equation
    left, right = _operands(layer)
    [out] = eqn.outputs
    if eqn.primitive == "conv_general_dilated":
        dims = eqn.params["dimension_numbers"]
        taps = math.prod(
            _taps(
                traced.shapes[out][dims.out_spec[i + 2]],
                traced.shapes[right][dims.rhs_spec[i + 2]],
                stride=eqn.params["window_strides"][i],
                spread=eqn.params["lhs_dilation"][i],
                dilation=eqn.params["rhs_dilation"][i],
                low=low,
            )
            for i, (low, _) in enumerate(eqn.params["padding"])
        )
        along = [(out, axis) for axis in dims.out_spec[:2]]
        return 2 * eqn.times * taps, [*along, (right, dims.rhs_spec[1])]
    rank = len(traced.shapes[left])
    _, contracted = kernel_axes(eqn, 0, rank)
    axes = range(len(traced.shapes[out]))
    if eqn.primitive == "ragged_dot_general":
        ragged = eqn.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions
        if set(ragged) <= {*contracted}:  # each ragged group contracts its own rows
            axes = axes[1:]
    along = [(out, axis) for axis in axes]
    return 2 * eqn.times, along + [(left, axis) for axis in contracted]


def _operands(layer: Layer) -> tuple[int, int]:
    """Returns the two values that a layer multiplies."""
    left, right = layer.equation.inputs[:2]
    # None stands for a scalar literal, which no product takes.
    assert left is not None and right is not None
    return left, right


def _taps(
    outputs: int, window: int, *, stride: int, spread: int, dilation: int, low: int
) -> int:
    """Counts the products of weights with inputs along one axis of a convolution.

    The padded border counts as inputs, the zeros between inputs do not.

    Args:
      outputs: Number of outputs.
      window: Number of weights.
      stride: Distance between windows.
      spread: Distance between inputs: there are ``spread - 1`` zeros between two.
      dilation: Distance between weights.
      low: Padding before the first input.
    """
    if spread == 1:
        return outputs * window
    places = np.arange(outputs)[:, None] * stride + np.arange(window) * dilation
    return int(((places - low) % spread == 0).sum())


def _in_costliest_branches(
    costs: Sequence[int], branches: Sequence[tuple[tuple[int, int], ...]]
) -> list[bool]:
    """Reports which costs are counted: those in the costliest branch of each ``cond``.

    Args:
      costs: Cost of each use of a layer.
      branches: Branches that each use is in; see
        :attr:`tpp_jax.graph.unfolding.Equation.branches`.
    """

    def costliest(uses: list[int], depth: int) -> tuple[int, list[int]]:
        """Returns the cost of some uses ``depth`` conds deep, and which are counted."""
        chosen = [i for i in uses if len(branches[i]) == depth]
        total = sum(costs[i] for i in chosen)
        conds: dict[int, dict[int, list[int]]] = {}
        for i in uses:
            if len(branches[i]) > depth:
                cond, taken = branches[i][depth]
                conds.setdefault(cond, {}).setdefault(taken, []).append(i)
        for inside in conds.values():
            found = [costliest(branch, depth + 1) for branch in inside.values()]
            cost, members = max(found, key=lambda pair: pair[0])
            total, chosen = total + cost, chosen + members
        return total, chosen

    if not any(branches):
        return [True] * len(costs)
    counted = set(costliest(list(range(len(costs))), 0)[1])
    return [i in counted for i in range(len(costs))]


class Costs:
    """Size and cost of a model pruned in any way, from the trace of the unpruned one.

    The size of a parameter is the product of its axes, and the cost of a convolution or
    dense layer is twice the product of the axes of its output and of those that it
    contracts (see :func:`count`). Each axis is expressed by the groups whose channels
    run along it, so that size and cost follow from the counts of kept channels without
    another trace.

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

    def __init__(self, groups: Groups, cached: Collection[str] = ()) -> None:
        """Prepares the costs.

        Args:
          groups: All groups of the model.
          cached: Names of the layers whose outputs :meth:`cache` counts.
        """
        traced = groups.traced
        self._axes = axes = Axes(groups)
        # For each parameter and each layer, a factor and the axes that multiply it.
        self._parameters = [
            axes.product(1, _all_axes(traced, traced.leaves[leaf]))
            for leaf in traced.trainable
        ]
        uses = _read_uses(traced)
        self._branches = [use.equation.branches for use in uses]
        self._flops = [axes.product(*_work(traced, use)) for use in uses]
        self._cached = []
        for layer in layers(traced):
            if layer.name in cached:
                value = _operands(layer)[layer.operand]
                rank = len(traced.shapes[value])
                made, _ = kernel_axes(layer.equation, layer.operand, rank)
                along = [(value, axis) for axis in made]
                self._cached.append(axes.product(layer.equation.times, along))

    def __call__(self, kept: Mapping[str, int]) -> tuple[int, int]:
        """Returns the parameters and FLOPs that :func:`count` gives for a pruned model.

        Args:
          kept: Group name → number of kept channels; other groups are not pruned.
        """
        sizes = self._axes.sizes(kept)
        flops = values(self._flops, sizes)
        counted = _in_costliest_branches(flops, self._branches)
        total = sum(itertools.compress(flops, counted))
        return sum(values(self._parameters, sizes)), total

    def cache(self, kept: Mapping[str, int]) -> int:
        """Returns the number of outputs, for each position, of the cached layers.

        Args:
          kept: Group name → number of kept channels; other groups are not pruned.
        """
        return sum(values(self._cached, self._axes.sizes(kept)))


def _all_axes(traced: Trace, value: int) -> list[tuple[int, int]]:
    return [(value, axis) for axis in range(len(traced.shapes[value]))]
