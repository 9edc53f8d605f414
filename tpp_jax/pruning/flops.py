"""Parameters and floating-point operations of a model, read off its jaxpr."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from tpp_jax.pruning.naming import layer_name
from tpp_jax.pruning.tracing import Layer, Trace, layers, trace


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
    sizes: dict[str, int] = {}
    for leaf in traced.trainable:
        size = math.prod(traced.shapes[traced.leaves[leaf]])
        sizes[layer_name(leaf)] = sizes.get(layer_name(leaf), 0) + size
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
