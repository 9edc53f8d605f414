"""How long networks and their layers take, dense beside pruned, on this machine."""

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
_SECONDS = 1.0  # that all calls of one network together should take at least


class Pair(NamedTuple):
    """A dense and a pruned network, or a layer of both: seconds and FLOPs of a call.

    Attributes:
      dense_seconds: Median over calls.
      pruned_seconds: Likewise.
      dense_flops: Of one image.
      pruned_flops: Likewise.
    """

    dense_seconds: float
    pruned_seconds: float
    dense_flops: int
    pruned_flops: int

    @property
    def speedup(self) -> float:
        """How many times faster the pruned one is."""
        return self.dense_seconds / self.pruned_seconds

    @property
    def flops_speedup(self) -> float:
        """How many times fewer FLOPs it needs."""
        return self.dense_flops / self.pruned_flops

    @property
    def realised(self) -> float:
        """Share of the FLOPs speedup that the clock shows."""
        return self.speedup / self.flops_speedup


def compare(
    dense: nnx.Module,
    pruned: nnx.Module,
    image_shape: Sequence[int],
    batch_size: int,
    dtype: str = "float32",
) -> Pair:
    """Times both networks' evaluation, calls taking turns.

    Args:
      dense: A network; left untouched.
      pruned: The same, sliced.
      image_shape: ``(h, w, c)``.
      batch_size: Images of a call.
      dtype: Of the computation, parameters included.
    """
    images = jnp.zeros((batch_size, *image_shape), dtype)
    calls = [_forward(model, images) for model in (dense, pruned)]
    one = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    sizes = [count(model, one).flops for model in (dense, pruned)]
    return Pair(*_medians(calls), *sizes)


def compare_layers(
    dense: nnx.Module,
    pruned: nnx.Module,
    image_shape: Sequence[int],
    batch_size: int,
    dtype: str = "float32",
) -> dict[str, Pair]:
    """Times every convolution and dense layer alone, at the shapes that it has.

    Args:
      dense, pruned, image_shape, batch_size, dtype: as for :func:`compare`.

    Returns:
      Layer name → its pair. What stands between layers is not in them.
    """
    images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
    traces = [trace(model, images) for model in (dense, pruned)]
    kinds = [
        {layer.name: layer for layer in layers(traced) if _can_be_timed(layer)}
        for traced in traces
    ]
    one = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    counts = [count(model, one).layers for model in (dense, pruned)]
    found: dict[str, Pair] = {}
    known: dict[Any, tuple[float, ...]] = {}
    for name in kinds[0]:
        # Layers of equal shapes take equally long: each shape is timed once.
        both = [(t, kind[name]) for t, kind in zip(traces, kinds, strict=True)]
        shapes = tuple(_shapes(*one) for one in both)
        key = shapes, str(sorted(both[0][1].equation.params.items(), key=str))
        if key not in known:
            known[key] = tuple(_medians([_layer_call(*one, dtype) for one in both]))
        sizes = [layer_counts[name].flops for layer_counts in counts]
        found[name] = Pair(*known[key], *sizes)
    return found


def _can_be_timed(layer: Layer) -> bool:
    return layer.equation.primitive in ("dot_general", "conv_general_dilated")


def _forward(model: nnx.Module, images: jax.Array) -> Callable[[], Any]:
    graphdef, state = nnx.split(model)
    state = jax.tree.map(
        lambda x: (
            x.astype(images.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        ),
        state,
    )

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def call(state: nnx.State, images: jax.Array) -> Any:
        merged = nnx.merge(graphdef, state)
        merged.eval()
        use_fast_convolutions(merged)
        hold_blocks(merged)
        return merged(images)

    return lambda: call(state, images)


def _shapes(traced: Trace, layer: Layer) -> tuple[tuple[int, ...], ...]:
    return tuple(traced.shapes[n] for n in layer.equation.inputs)


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


def _medians(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Returns each call's median seconds; they take turns."""
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


def as_json(pairs: Mapping[str, Pair]) -> dict[str, dict[str, float]]:
    """Returns pairs as plain data, the ratios included."""
    return {
        name: pair._asdict()
        | {
            "speedup": pair.speedup,
            "flops_speedup": pair.flops_speedup,
            "realised": pair.realised,
        }
        for name, pair in pairs.items()
    }
