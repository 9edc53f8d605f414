"""Mean absolute activations of each layer, measured on data.

The model runs equation by equation, as JAX traced it, and the outputs of each kernel
are averaged along the way. This works for any model that can be traced.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jaxtyping import Array, Float

from tpp_jax.graph.functions import as_function
from tpp_jax.graph.unfolding import check_length
from tpp_jax.pruning.replay import evaluate, replay
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

    For the criterion ``activation``. The output of a layer is taken before its bias is
    added, and averaged over examples and positions. The outputs of an embedding are the
    rows that the inputs select.

    Args:
      model: NNX module (runs in evaluation mode, not modified), Linen module or
        function ``fn(params, *inputs)``.
      batches: Batches of equal size; each an array, or a tuple if the model has several
        inputs.
      params: Parameter pytree of a function, or variables of a Linen module.
      **kwargs: Keyword arguments of the model, the same for all batches.

    Returns:
      Leaf name of the kernel → an array that can be broadcast to the kernel's shape:
      ``[1, 1, 1, channels]`` for a convolution. Kernels that are reshaped or cut before
      they are used, and kernels inside loops, are not included.

    Raises:
      TPPError: There is no batch.

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
    call = functools.partial(function.call, **kwargs)
    measure = jax.jit(functools.partial(_measure, call, function.names))
    runs = (batch if isinstance(batch, tuple) else (batch,) for batch in batches)
    return mean_of(measure, ((function.params, inputs) for inputs in runs))


def _measure(
    call: Callable[..., Any],
    names: Sequence[str],
    params: optax.Params,
    inputs: tuple[Any, ...],
) -> Means:
    """Returns the mean outputs of kernels in one call of ``call(params, *inputs)``.

    Args:
      call: Function of the parameters and the inputs.
      names: Names of the parameters' leaves.
      params: Parameters.
      inputs: Inputs.
    """
    closed = jax.make_jaxpr(call)(params, *inputs)
    check_length(closed.jaxpr)
    arrays = dict(zip(names, jax.tree.leaves(params), strict=True))
    leaves = [
        _Value(leaf, {name: tuple(range(jnp.ndim(leaf)))})
        for name, leaf in arrays.items()
    ]
    others = [_Value(leaf, None) for leaf in jax.tree.leaves(inputs)]
    meter = _Meter({name: jnp.shape(leaf) for name, leaf in arrays.items()})
    meter.run(closed.jaxpr, closed.consts, [*leaves, *others])
    return {
        name: functools.reduce(jnp.add, means) / len(means)
        for name, means in (meter.inner | meter.found).items()
    }


# Primitives that move or mix the axes of an operand even if its shape is the same.
_MIXED = frozenset(
    "reshape rev conv_general_dilated scan while cond fft cholesky lu qr "
    "triangular_solve".split()
)

# For each axis of an array, the axis of a leaf that it is; None if it is of no leaf.
_Axes = tuple[int | None, ...]


class _Value(NamedTuple):
    """An array, and the parameters that it is computed from.

    Attributes:
      array: Value of the array.
      leaves: Name of each leaf that the array is computed from → the leaf's axes that
        its axes are; None if the array depends on an input.
    """

    array: Any
    leaves: dict[str, _Axes] | None


class _Meter:
    """Runs a jaxpr and records the mean outputs of kernels.

    Attributes:
      shape_of: Leaf name → its shape.
      found: Leaf name → the means of each product with activations.
      inner: Leaf name → the means of each product with other parameters.
    """

    def __init__(self, shape_of: dict[str, tuple[int, ...]]) -> None:
        self.shape_of = shape_of
        self.found: dict[str, list[Array]] = {}
        self.inner: dict[str, list[Array]] = {}

    def run(
        self, jaxpr: Any, constants: Sequence[Any], arguments: list[_Value]
    ) -> list[_Value]:
        """Returns the outputs of a jaxpr."""
        return replay(
            jaxpr, constants, arguments, lambda array: _Value(array, {}), self._equation
        )

    def _equation(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        results = evaluate(eqn, [value.array for value in values])
        match eqn.primitive.name:
            case "conv_general_dilated":
                self._convolution(eqn, values, results[0])
            case "dot_general":
                self._product(eqn, values, results[0])
            case "gather" if values[1].leaves is None:
                self._lookup(eqn, values[0], results[0])
        return [
            _Value(result, _leaves(eqn, values, jnp.shape(result)))
            for result in results
        ]

    def _convolution(self, eqn: Any, values: list[_Value], output: Array) -> None:
        dims = eqn.params["dimension_numbers"]
        became = {dims.rhs_spec[0]: dims.out_spec[1]}
        if _is_kernel(values[1], became, (dims.rhs_spec[1],)):
            self._record(values[1], output, became, bool(values[0].leaves))

    def _product(self, eqn: Any, values: list[_Value], output: Array) -> None:
        contracted, batch = eqn.params["dimension_numbers"]
        free = [
            [i for i in range(jnp.ndim(value.array)) if i not in (*summed, *shared)]
            for value, summed, shared in zip(values, contracted, batch, strict=True)
        ]
        # Axes of the output: batch axes, then the free ones of the left operand, then
        # those of the right.
        first = len(batch[0]), len(batch[0]) + len(free[0])
        for operand in (1, 0):
            kernel, inner = values[operand], bool(values[1 - operand].leaves)
            if not any(len(self.shape_of[leaf]) > 1 for leaf in kernel.leaves or ()):
                continue
            became = {axis: i for i, axis in enumerate(batch[operand])}
            for i, axis in enumerate(free[operand]):
                became[axis] = first[operand] + i
            low_rank = operand == 1 and not batch[operand] and not inner
            if low_rank or _is_kernel(kernel, became, contracted[operand]):
                self._record(kernel, output, became, inner)
                break

    def _lookup(self, eqn: Any, table: _Value, output: Array) -> None:
        dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        indexed = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
        kept = [axis for axis in range(len(sizes)) if axis not in indexed]
        if all(sizes[axis] == table.array.shape[axis] for axis in kept):
            became = dict(zip(kept, dims.offset_dims, strict=True))
            self._record(table, output, became, inner=False)

    def _record(
        self, kernel: _Value, output: Array, became: dict[int, int], inner: bool
    ) -> None:
        """Records the mean of an output.

        Args:
          kernel: Kernel that produced the output.
          output: Output of the layer.
          became: Axis of the kernel → axis of the output that it became.
          inner: Whether the other operand is computed from parameters.
        """
        known = self.inner if inner else self.found
        rest = [axis for axis in range(output.ndim) if axis not in became.values()]
        size = jnp.abs(output).astype(jnp.promote_types(output.dtype, jnp.float32))
        for leaf, axes in (kernel.leaves or {}).items():
            # The parameter's axes in the order of the output.
            by_output = sorted(became, key=lambda axis: became[axis])
            own = [i for i in (axes[axis] for axis in by_output) if i is not None]
            if len(own) < len(became) or len(self.shape_of[leaf]) < 2:
                continue
            order = np.argsort(own).tolist()
            means = jnp.transpose(jnp.mean(size, axis=rest), order)
            shape = self.shape_of[leaf]
            means = means.reshape([n if i in own else 1 for i, n in enumerate(shape)])
            found = known.setdefault(leaf, [means])
            # A layer may run several times; products with its transpose do not count.
            if found[0] is not means and found[0].shape == means.shape:
                found.append(means)


def _is_kernel(
    kernel: _Value, became: dict[int, int], contracted: Sequence[int]
) -> bool:
    """Reports whether an operand is a kernel, and not learned queries, for example.

    One leaf of a kernel has both the produced and the contracted axes; see
    :mod:`tpp_jax.graph.layers`.
    """
    leaves = kernel.leaves or {}
    return len(leaves) == 1 or any(
        None not in [axes[axis] for axis in (*became, *contracted)]
        for axes in leaves.values()
    )


def _leaves(
    eqn: Any, values: list[_Value], shape: tuple[int, ...]
) -> dict[str, _Axes] | None:
    """Returns the leaves that a result depends on, and which of their axes it has.

    None if the result depends on an input.
    """
    found: dict[str, _Axes] = {}
    for i, value in enumerate(values):
        if value.leaves is None:
            return None
        for leaf, axes in value.leaves.items():
            moved = _moved(eqn, i, values, axes, shape)
            known = found.get(leaf, moved)
            # A weight may be divided by its norm: the axes are those of the weight.
            found[leaf] = known if known.count(None) <= moved.count(None) else moved
    return found


def _moved(
    eqn: Any, operand: int, values: list[_Value], axes: _Axes, shape: tuple[int, ...]
) -> _Axes:
    """Returns the axes of a leaf that a result has, given those of one operand."""
    nothing = (None,) * len(shape)
    own = jnp.shape(values[operand].array)
    match eqn.primitive.name:
        case "transpose":
            return tuple(axes[i] for i in eqn.params["permutation"])
        case "dot_general":
            contracted, batch = eqn.params["dimension_numbers"]
            not_free = {*contracted[operand], *batch[operand]}
            free = [axis for i, axis in enumerate(axes) if i not in not_free]
            # Axes of the result: batch axes, then the left operand's, then the right's.
            first = len(batch[0]) if operand == 0 else len(shape) - len(free)
            return (*nothing[:first], *free, *nothing[first + len(free) :])
        case name if name in _MIXED:
            return nothing
    return axes if own == shape else nothing
