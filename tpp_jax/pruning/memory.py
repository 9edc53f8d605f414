"""Peak memory of a model's activations, from the lifetimes of values in its jaxpr."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import linen, nnx
from jaxtyping import Int

from tpp_jax.graph.records import Groups
from tpp_jax.graph.tracing import Trace, trace
from tpp_jax.pruning.axes import Axes, values

VIEWS = frozenset({"reshape", "squeeze", "expand_dims"})
"""Operations whose result is the same memory under another shape."""


class Memory:
    """Peak bytes of a model's activations, pruned in any way.

    Example:
      >>> import jax.numpy as jnp
      >>> from tpp_jax.pruning.channels import channel_groups
      >>> def mlp(p, x):
      ...     return jnp.tanh(x @ p["w1"]) @ p["w2"]
      >>> p = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
      >>> memory = Memory(channel_groups(mlp, jnp.ones((1, 4)), params=p))
      >>> memory({}), memory({"w1": 5})  # the tanh: 2 · 8 · 4 bytes
      (64, 40)
    """

    def __init__(self, groups: Groups) -> None:
        """Prepares the sizes.

        Args:
          groups: All groups of the model.
        """
        traced = groups.traced
        self._lives = _lives(traced)
        self._axes = Axes(groups)
        self._products = [
            self._axes.product(
                _itemsize(traced.dtypes[value]),
                [(value, axis) for axis in range(len(traced.shapes[value]))],
            )
            for value in self._lives.values
        ]

    def __call__(self, kept: Mapping[str, int]) -> int:
        """Returns the peak in bytes for a pruned model.

        Args:
          kept: Group name → number of kept channels; other groups are not pruned.
        """
        sizes = self._axes.sizes(kept)
        return self._lives.peak(values(self._products, sizes))


def activation_bytes(
    model: nnx.Module | linen.Module | Callable[..., Any],
    *inputs: Any,
    params: Any = None,
    **kwargs: Any,
) -> int:
    """Returns the peak size of all intermediate arrays of a call that are alive.

    An array is alive from the operation that computes it to the last one that reads it,
    or to the end if it is an output. Inputs, parameters and what is computed from
    parameters alone are not counted; a reshape is the same memory as its operand.
    Nothing is fused, as if each operation wrote its result to memory, so a compiled
    program may need less.

    Args:
      model: NNX module, Linen module or function ``fn(params, *inputs)``.
      *inputs: Example inputs, which may be abstract.
      params: Parameter pytree of a function, or variables of a Linen module.
      **kwargs: Keyword arguments of the model, like ``inputs``.
    """
    traced = trace(model, *inputs, params=params, **kwargs)
    lives = _lives(traced)
    return lives.peak(
        [
            _itemsize(traced.dtypes[value]) * math.prod(traced.shapes[value])
            for value in lives.values
        ]
    )


class _Lives(NamedTuple):
    """First and last operation of the life of each intermediate array.

    Attributes:
      values: Value numbers of the arrays.
      first: Index of the operation that computes each.
      last: Index of the last operation that reads each.
    """

    values: list[int]
    first: Int[np.ndarray, " values"]
    last: Int[np.ndarray, " values"]

    def peak(self, sizes: list[int]) -> int:
        """Returns the largest sum of the sizes of what is alive at one operation."""
        if not sizes:
            return 0
        change = np.zeros(int(self.last.max()) + 2, np.int64)
        np.add.at(change, self.first, sizes)
        np.subtract.at(change, self.last + 1, sizes)
        return int(np.cumsum(change).max())


def _lives(traced: Trace) -> _Lives:
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    memory_of: dict[int, int] = {}
    for i, eqn in enumerate(traced.equations):
        if not traced.unread.isdisjoint(eqn.outputs):
            continue
        read = [memory_of.get(n, n) for n in eqn.inputs if n is not None]
        last.update((n, i) for n in read if n in first)
        for n in eqn.outputs:
            if traced.origin.get(n):
                continue
            if eqn.primitive in VIEWS:
                memory_of[n] = read[0]
            else:
                first[n] = last[n] = i
    for n in traced.outputs:
        if n is not None and memory_of.get(n, n) in first:
            last[memory_of.get(n, n)] = len(traced.equations)
    return _Lives(
        list(first), np.array([*first.values()], int), np.array([*last.values()], int)
    )


def _itemsize(dtype: Any) -> int:
    return getattr(dtype, "itemsize", 4)
