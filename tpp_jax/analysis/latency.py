"""Latency of networks and their layers, dense and pruned, on this machine."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from tpp_jax.graph.layers import Layer
from tpp_jax.graph.tracing import Trace, layers, trace
from tpp_jax.pruning.flops import count
from tpp_jax.xla.blocks import hold_blocks
from tpp_jax.xla.convolution import (
    compiler_options,
    conv_on_cpu,
    use_fast_convolutions,
)

_LEAST_CALLS = 5
_SECONDS = 1.0  # least total duration of all calls of one network


class Pair(NamedTuple):
    """Time and FLOPs of a dense and a pruned network, or of a layer of both.

    Attributes:
      dense_seconds: Median duration of a call of the dense network.
      pruned_seconds: Median duration of a call of the pruned network.
      dense_flops: FLOPs of the dense network for one example.
      pruned_flops: FLOPs of the pruned network for one example.
    """

    dense_seconds: float
    pruned_seconds: float
    dense_flops: int
    pruned_flops: int

    @property
    def speedup(self) -> float:
        """Ratio of the dense to the pruned duration."""
        return self.dense_seconds / self.pruned_seconds

    @property
    def flops_speedup(self) -> float:
        """Ratio of the dense to the pruned FLOPs."""
        return self.dense_flops / self.pruned_flops

    @property
    def realised(self) -> float | None:
        """Share of the time saved, divided by the share of the FLOPs saved.

        0 if the pruned network is as slow as the dense one, negative if it is slower;
        None if no FLOPs were saved.
        """
        saved = 1 - self.pruned_flops / self.dense_flops
        if not saved:
            return None
        return (1 - self.pruned_seconds / self.dense_seconds) / saved


def compare(
    dense: nnx.Module,
    pruned: nnx.Module,
    inputs: Sequence[jax.ShapeDtypeStruct],
    batch_size: int,
    dtype: str = "float32",
) -> Pair:
    """Measures the evaluation of both networks, with alternating calls.

    Args:
      dense: Dense network; not modified.
      pruned: The same network, sliced.
      inputs: Shapes and types of the networks' inputs for a batch of one example.
      batch_size: Number of examples per call.
      dtype: Type of the computation, parameters included.
    """
    zeros = zeros_of(inputs, batch_size, dtype)
    calls = [forward_call(model, zeros, dtype) for model in (dense, pruned)]
    before, after = (count(model, *inputs).flops for model in (dense, pruned))
    return Pair(*medians(calls), dense_flops=before, pruned_flops=after)


def compare_layers(
    dense: nnx.Module,
    pruned: nnx.Module,
    inputs: Sequence[jax.ShapeDtypeStruct],
    batch_size: int,
    dtype: str = "float32",
) -> dict[str, Pair]:
    """Measures every convolution and dense layer separately, at the shapes that it has.

    Args:
      dense: Dense network; not modified.
      pruned: The same network, sliced.
      inputs: Shapes and types of the networks' inputs for a batch of one example.
      batch_size: Number of examples per call.
      dtype: Type of the computation, parameters included.

    Returns:
      Pairs by layer name. They exclude the operations between layers.
    """
    batch = _batch(inputs, batch_size, "float32")
    traces = [trace(model, *batch) for model in (dense, pruned)]
    by_name = [
        {layer.name: layer for layer in layers(traced) if _can_be_timed(layer)}
        for traced in traces
    ]
    counts = [count(model, *inputs).layers for model in (dense, pruned)]
    pairs: dict[str, Pair] = {}
    known: dict[Any, tuple[float, ...]] = {}
    for name in by_name[0]:
        # Layers of equal shapes take the same time, so each shape is measured once.
        both = [(t, found[name]) for t, found in zip(traces, by_name, strict=True)]
        shapes = tuple(_shapes(*one) for one in both)
        key = shapes, str(sorted(both[0][1].equation.params.items(), key=str))
        if key not in known:
            known[key] = tuple(medians([_layer_call(*one, dtype) for one in both]))
        before, after = (layer_counts[name].flops for layer_counts in counts)
        pairs[name] = Pair(*known[key], dense_flops=before, pruned_flops=after)
    return pairs


def _can_be_timed(layer: Layer) -> bool:
    return layer.equation.primitive in ("dot_general", "conv_general_dilated")


def _batch(
    inputs: Sequence[jax.ShapeDtypeStruct], size: int, dtype: str
) -> list[jax.ShapeDtypeStruct]:
    """Returns shapes and types of a batch; numbers that are not integers are cast."""
    return [
        jax.ShapeDtypeStruct(
            (size, *x.shape[1:]),
            dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype,
        )
        for x in inputs
    ]


def forward_call(
    model: nnx.Module, inputs: Sequence[jax.Array], dtype: str
) -> Callable[[], Any]:
    """Returns a compiled call of a network's evaluation.

    Args:
      model: Network; not modified.
      inputs: Arguments of the call.
      dtype: Type of the parameters.
    """
    graphdef, state = nnx.split(model)
    state = jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        state,
    )

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def call(state: nnx.State, *inputs: jax.Array) -> Any:
        merged = nnx.merge(graphdef, state)
        merged.eval()
        use_fast_convolutions(merged)
        hold_blocks(merged)
        return merged(*inputs)

    return lambda: call(state, *inputs)


def _shapes(traced: Trace, layer: Layer) -> tuple[tuple[int, ...], ...]:
    return tuple(traced.shapes[n] for n in layer.equation.inputs if n is not None)


def _layer_call(traced: Trace, layer: Layer, dtype: str) -> Callable[[], Any]:
    params = layer.equation.params
    operands = [jnp.zeros(shape, dtype) for shape in _shapes(traced, layer)]
    if layer.equation.primitive == "dot_general":
        names = ["dimension_numbers"]
        call = lax.dot_general
    else:
        names = ["window_strides", "padding", "lhs_dilation", "rhs_dilation"]
        names += ["dimension_numbers", "feature_group_count"]
        on_cpu = jax.default_backend() == "cpu"
        call = conv_on_cpu if on_cpu else lax.conv_general_dilated
    call = functools.partial(call, **{name: params[name] for name in names})
    call = jax.jit(call, compiler_options=compiler_options())
    return lambda: call(*operands)


def zeros_of(
    inputs: Sequence[jax.ShapeDtypeStruct], batch_size: int, dtype: str
) -> list[jax.Array]:
    """Returns a batch of zeros.

    Args:
      inputs: Shapes and types for a batch of one example.
      batch_size: Number of examples.
      dtype: Type of what is not an integer.
    """
    return [jnp.zeros(x.shape, x.dtype) for x in _batch(inputs, batch_size, dtype)]


def medians(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Returns the median duration of each call in seconds; the calls alternate.

    Args:
      calls: Functions that return arrays.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        jax.block_until_ready(call())
    begun = time.perf_counter()
    while len(
        seconds[-1]
    ) < _LEAST_CALLS or time.perf_counter() - begun < _SECONDS * len(calls):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
    return [float(np.median(times)) for times in seconds]


def as_json(pairs: Mapping[str, Pair]) -> dict[str, dict[str, float | None]]:
    """Returns pairs as plain data, including the ratios.

    Args:
      pairs: Pairs by name.
    """
    return {
        name: pair._asdict()
        | {
            "speedup": pair.speedup,
            "flops_speedup": pair.flops_speedup,
            "realised": pair.realised,
        }
        for name, pair in pairs.items()
    }
