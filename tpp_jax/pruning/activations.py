"""How large the activations of each layer are, measured on data.

The model is run equation by equation, as JAX traced it, and what each kernel puts out
is averaged on the way: so it works for any model that can be traced.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.extend import core as jex_core
from jaxtyping import Array, Float

from tpp_jax.pruning.functions import as_function
from tpp_jax.pruning.statistics import mean_of
from tpp_jax.pruning.unfolding import CALLS

Means = dict[str, Float[Array, "..."]]


def activation_means(
    model: nnx.Module | linen.Module | Callable[..., Any],
    batches: Iterable[Any],
    *,
    params: Any = None,
) -> Means:
    """Returns the mean absolute output of each kernel, channel by channel.

    For the criterion ``activation``. A layer's output is taken before its bias is
    added, and averaged over everything but its channels: examples and places. A table
    that the inputs are looked up in (an embedding) puts out what is looked up.

    Args:
      model: an NNX module (run in evaluation mode, left untouched), a Linen module or a
        function ``fn(params, *inputs)``.
      batches: of equal size; each an array, or a tuple of the model's several inputs.
      params: for a function, its parameter pytree, for a Linen module its variables.

    Returns:
      Leaf name of the kernel → an array that can be broadcast to the kernel's shape:
      ``[1, 1, 1, channels]`` for a convolution. Kernels that are reshaped or cut before
      they are used, and those inside of loops, are not among them.

    Raises:
      TPPError: there is no batch.

    Example:
      >>> import jax.numpy as jnp
      >>> def mlp(p, x):
      ...     return jax.nn.relu(x @ p["w1"]) @ p["w2"]
      >>> p = {"w1": jnp.array([[1.0, -3.0]]), "w2": jnp.ones((2, 1))}
      >>> means = activation_means(mlp, [jnp.array([[1.0], [2.0]])], params=p)
      >>> means["w1"].tolist(), means["w2"].tolist()
      ([[1.5, 4.5]], [[1.5]])
    """
    function = as_function(model, params)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(function.params)]
    shape_of = dict(zip(function.names, shapes, strict=True))

    @jax.jit
    def measure(params: Any, inputs: tuple[Any, ...]) -> Means:
        closed = jax.make_jaxpr(function.call)(params, *inputs)
        leaves = [
            _Value(leaf, name, tuple(range(jnp.ndim(leaf))))
            for name, leaf in zip(function.names, jax.tree.leaves(params), strict=True)
        ]
        others = [_Value(leaf, None) for leaf in jax.tree.leaves(inputs)]
        meter = _Meter(shape_of)
        meter.run(closed.jaxpr, closed.consts, [*leaves, *others])
        return {name: sum(found) / len(found) for name, found in meter.found.items()}

    runs = (batch if isinstance(batch, tuple) else (batch,) for batch in batches)
    return mean_of(measure, ((function.params, inputs) for inputs in runs))


class _Value(NamedTuple):
    """An array, and which parameter it is.

    Attributes:
      array: its value.
      leaf: name of the one parameter that it was computed from, ``""`` if from none,
        None if from an input or from several.
      axes: which of that parameter's axes its own axes are; None if not known.
    """

    array: Any
    leaf: str | None
    axes: tuple[int, ...] | None = None


class _Meter:
    """Runs a jaxpr and notes the means of what kernels put out."""

    def __init__(self, shape_of: dict[str, tuple[int, ...]]) -> None:
        self.shape_of = shape_of
        self.found: dict[str, list[Array]] = {}

    def run(
        self, jaxpr: Any, constants: Sequence[Any], arguments: list[_Value]
    ) -> list[_Value]:
        built_in = [_Value(constant, "") for constant in constants]
        env = dict(zip(jaxpr.constvars, built_in, strict=True))
        env |= zip(jaxpr.invars, arguments, strict=True)

        def read(var: Any) -> _Value:
            literal = isinstance(var, jex_core.Literal)
            return _Value(var.val, "") if literal else env[var]

        for eqn in jaxpr.eqns:
            values = [read(var) for var in eqn.invars]
            if eqn.primitive.name in CALLS:
                inner = eqn.params[CALLS[eqn.primitive.name]]
                inside = getattr(inner, "jaxpr", inner)
                outputs = self.run(inside, getattr(inner, "consts", ()), values)
            else:
                outputs = self._equation(eqn, values)
            env |= zip(eqn.outvars, outputs, strict=True)
        return [read(var) for var in jaxpr.outvars]

    def _equation(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        arrays = [value.array for value in values]
        results = eqn.primitive.bind(*arrays, **eqn.params)
        if not eqn.primitive.multiple_results:
            results = [results]
        match eqn.primitive.name:
            case "conv_general_dilated":
                self._convolution(eqn.params, values[1], results[0])
            case "dot_general":
                self._product(eqn.params, values, results[0])
            case "gather" if values[1].leaf is None:
                self._lookup(eqn.params, values[0], results[0])
        leaves = {value.leaf for value in values} - {""}
        leaf = leaves.pop() if len(leaves) == 1 else (None if leaves else "")
        return [
            _Value(result, leaf, _axes(eqn, values, jnp.shape(result)))
            for result in results
        ]

    def _convolution(self, params: Any, kernel: _Value, output: Array) -> None:
        dims = params["dimension_numbers"]
        self._note(kernel, output, {dims.rhs_spec[0]: dims.out_spec[1]})

    def _product(self, params: Any, values: list[_Value], output: Array) -> None:
        contracted, batch = params["dimension_numbers"]
        free = [
            [i for i in range(jnp.ndim(value.array)) if i not in (*gone, *shared)]
            for value, gone, shared in zip(values, contracted, batch, strict=True)
        ]
        # The output's axes: those of the batch, then the left's own, then the right's.
        first = len(batch[0]), len(batch[0]) + len(free[0])
        for operand in (1, 0):
            kernel = values[operand]
            if kernel.leaf and len(self.shape_of[kernel.leaf]) > 1:
                place = {axis: i for i, axis in enumerate(batch[operand])}
                for i, axis in enumerate(free[operand]):
                    place[axis] = first[operand] + i
                self._note(kernel, output, place)
                break

    def _lookup(self, params: Any, table: _Value, output: Array) -> None:
        dims, sizes = params["dimension_numbers"], params["slice_sizes"]
        gone = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
        kept = [axis for axis in range(len(sizes)) if axis not in gone]
        if all(sizes[axis] == table.array.shape[axis] for axis in kept):
            self._note(table, output, dict(zip(kept, dims.offset_dims, strict=True)))

    def _note(self, kernel: _Value, output: Array, place: dict[int, int]) -> None:
        """Notes the mean of an output.

        Args:
          kernel: what made it.
          output: the array.
          place: axis of the kernel → axis of the output that it became.
        """
        if not kernel.leaf or kernel.axes is None:
            return
        rest = [axis for axis in range(output.ndim) if axis not in place.values()]
        size = jnp.abs(output).astype(jnp.promote_types(output.dtype, jnp.float32))
        # The parameter's axes in the order of the output.
        own = [kernel.axes[axis] for axis in sorted(place, key=place.get)]
        means = jnp.transpose(jnp.mean(size, axis=rest), np.argsort(own))
        shape = self.shape_of[kernel.leaf]
        means = means.reshape([n if i in own else 1 for i, n in enumerate(shape)])
        found = self.found.setdefault(kernel.leaf, [means])
        # What a layer puts out each time it runs, but not what its transpose does.
        if found[0] is not means and found[0].shape == means.shape:
            found.append(means)


def _axes(
    eqn: Any, values: list[_Value], shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Tells which axes of a parameter the axes of a result are, None if not known."""
    if eqn.primitive.name == "transpose" and values[0].axes is not None:
        return tuple(values[0].axes[i] for i in eqn.params["permutation"])
    if eqn.primitive.name in ("reshape", "rev", "dot_general"):
        return None
    alike = [v.axes for v in values if v.axes is not None and v.array.shape == shape]
    return alike[0] if alike else None
