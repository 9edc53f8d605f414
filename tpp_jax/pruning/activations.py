"""How large the activations of each layer are, measured on data.

The model is run equation by equation, as JAX traced it, and what each kernel puts out
is averaged on the way: so it works for any model that can be traced.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.extend import core as jex_core
from jaxtyping import Array, Float

from tpp_jax.graph.functions import as_function
from tpp_jax.graph.unfolding import CALLS, check_length
from tpp_jax.pruning.statistics import mean_of

Means = dict[str, Float[Array, "..."]]


def activation_means(
    model: nnx.Module | linen.Module | Callable[..., Any],
    batches: Iterable[Any],
    *,
    params: Any = None,
    **kwargs: Any,
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
      **kwargs: keyword arguments of the model, the same for all batches.

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
        call = functools.partial(function.call, **kwargs)
        closed = jax.make_jaxpr(call)(params, *inputs)
        check_length(closed.jaxpr)
        leaves = [
            _Value(leaf, {name: tuple(range(jnp.ndim(leaf)))})
            for name, leaf in zip(function.names, jax.tree.leaves(params), strict=True)
        ]
        others = [_Value(leaf, None) for leaf in jax.tree.leaves(inputs)]
        meter = _Meter(shape_of)
        meter.run(closed.jaxpr, closed.consts, [*leaves, *others])
        found = meter.inner | meter.found
        return {name: sum(means) / len(means) for name, means in found.items()}

    runs = (batch if isinstance(batch, tuple) else (batch,) for batch in batches)
    return mean_of(measure, ((function.params, inputs) for inputs in runs))


# What leaves no axis of an operand where it was, though the shape may be the same.
_MIXED = frozenset(
    "reshape rev conv_general_dilated scan while cond fft cholesky lu qr "
    "triangular_solve".split()
)

# Of each axis of an array, which axis of a leaf it is, None if of another origin.
_Axes = tuple[int | None, ...]


class _Value(NamedTuple):
    """An array, and which parameters it is computed from.

    Attributes:
      array: its value.
      leaves: name of each leaf that it is computed from → which of the leaf's axes its
        own axes are; None if an input has a part in it.
    """

    array: Any
    leaves: dict[str, _Axes] | None


class _Meter:
    """Runs a jaxpr and notes the means of what kernels put out.

    Attributes:
      shape_of: leaf name → its shape.
      found: leaf name → the means of each use.
      inner: likewise, of products with what parameters make, not inputs.
    """

    def __init__(self, shape_of: dict[str, tuple[int, ...]]) -> None:
        self.shape_of = shape_of
        self.found: dict[str, list[Array]] = {}
        self.inner: dict[str, list[Array]] = {}

    def run(
        self, jaxpr: Any, constants: Sequence[Any], arguments: list[_Value]
    ) -> list[_Value]:
        built_in = [_Value(constant, {}) for constant in constants]
        env = dict(zip(jaxpr.constvars, built_in, strict=True))
        env |= zip(jaxpr.invars, arguments, strict=True)

        def read(var: Any) -> _Value:
            literal = isinstance(var, jex_core.Literal)
            return _Value(var.val, {}) if literal else env[var]

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
                self._convolution(eqn.params, values, results[0])
            case "dot_general":
                self._product(eqn.params, values, results[0])
            case "gather" if values[1].leaves is None:
                self._lookup(eqn.params, values[0], results[0])
        return [
            _Value(result, _leaves(eqn, values, jnp.shape(result)))
            for result in results
        ]

    def _convolution(self, params: Any, values: list[_Value], output: Array) -> None:
        dims = params["dimension_numbers"]
        place = {dims.rhs_spec[0]: dims.out_spec[1]}
        if _is_kernel(values[1], place, (dims.rhs_spec[1],)):
            self._note(values[1], output, place, bool(values[0].leaves))

    def _product(self, params: Any, values: list[_Value], output: Array) -> None:
        contracted, batch = params["dimension_numbers"]
        free = [
            [i for i in range(jnp.ndim(value.array)) if i not in (*gone, *shared)]
            for value, gone, shared in zip(values, contracted, batch, strict=True)
        ]
        # The output's axes: those of the batch, then the left's own, then the right's.
        first = len(batch[0]), len(batch[0]) + len(free[0])
        for operand in (1, 0):
            kernel, inner = values[operand], bool(values[1 - operand].leaves)
            if not any(len(self.shape_of[leaf]) > 1 for leaf in kernel.leaves or ()):
                continue
            place = {axis: i for i, axis in enumerate(batch[operand])}
            for i, axis in enumerate(free[operand]):
                place[axis] = first[operand] + i
            low_rank = operand == 1 and not batch[operand] and not inner
            if low_rank or _is_kernel(kernel, place, contracted[operand]):
                self._note(kernel, output, place, inner)
                break

    def _lookup(self, params: Any, table: _Value, output: Array) -> None:
        dims, sizes = params["dimension_numbers"], params["slice_sizes"]
        gone = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
        kept = [axis for axis in range(len(sizes)) if axis not in gone]
        if all(sizes[axis] == table.array.shape[axis] for axis in kept):
            place = dict(zip(kept, dims.offset_dims, strict=True))
            self._note(table, output, place, False)

    def _note(
        self, kernel: _Value, output: Array, place: dict[int, int], inner: bool
    ) -> None:
        """Notes the mean of an output.

        Args:
          kernel: what made it.
          output: the array.
          place: axis of the kernel → axis of the output that it became.
          inner: whether the other operand is made of parameters.
        """
        known = self.inner if inner else self.found
        rest = [axis for axis in range(output.ndim) if axis not in place.values()]
        size = jnp.abs(output).astype(jnp.promote_types(output.dtype, jnp.float32))
        for leaf, axes in (kernel.leaves or {}).items():
            # The parameter's axes in the order of the output.
            own = [axes[axis] for axis in sorted(place, key=place.get)]
            if None in own or len(self.shape_of[leaf]) < 2:
                continue
            means = jnp.transpose(jnp.mean(size, axis=rest), np.argsort(own))
            shape = self.shape_of[leaf]
            means = means.reshape([n if i in own else 1 for i, n in enumerate(shape)])
            found = known.setdefault(leaf, [means])
            # What a layer puts out each time it runs, but not what its transpose does.
            if found[0] is not means and found[0].shape == means.shape:
                found.append(means)


def _is_kernel(
    kernel: _Value, place: dict[int, int], contracted: Sequence[int]
) -> bool:
    """Tells a kernel from learned queries and the like; see layers.py.

    One leaf has both the axes that are produced and those that are contracted.
    """
    leaves = kernel.leaves or {}
    return len(leaves) == 1 or any(
        None not in [axes[axis] for axis in (*place, *contracted)]
        for axes in leaves.values()
    )


def _leaves(
    eqn: Any, values: list[_Value], shape: tuple[int, ...]
) -> dict[str, _Axes] | None:
    """Tells which leaves a result is computed from, and which axes of theirs it has."""
    found: dict[str, _Axes] = {}
    for i, value in enumerate(values):
        if value.leaves is None:
            return None
        for leaf, axes in value.leaves.items():
            moved = _moved(eqn, i, values, axes, shape)
            known = found.get(leaf, moved)
            # A weight may meet its own norm: the axes are those of the weight.
            found[leaf] = known if known.count(None) <= moved.count(None) else moved
    return found


def _moved(
    eqn: Any, operand: int, values: list[_Value], axes: _Axes, shape: tuple[int, ...]
) -> _Axes:
    """Returns which axes of a leaf a result has, from those of an operand."""
    nothing = (None,) * len(shape)
    own = jnp.shape(values[operand].array)
    match eqn.primitive.name:
        case "transpose":
            return tuple(axes[i] for i in eqn.params["permutation"])
        case "dot_general":
            contracted, batch = eqn.params["dimension_numbers"]
            gone = {*contracted[operand], *batch[operand]}
            free = [axis for i, axis in enumerate(axes) if i not in gone]
            # The result's axes: those of the batch, then the left's, then the right's.
            first = len(batch[0]) if operand == 0 else len(shape) - len(free)
            return (*nothing[:first], *free, *nothing[first + len(free) :])
        case name if name in _MIXED:
            return nothing
    return axes if own == shape else nothing
