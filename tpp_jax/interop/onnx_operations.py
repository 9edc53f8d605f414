"""Operations of a jaxpr in the forms that jax2onnx converts best.

During a conversion jax2onnx replaces functions such as ``jnp.matmul`` and
``nnx.max_pool`` by one operation each, which it converts to one operation of ONNX. The
same work in the terms of ``lax`` becomes several of them, or is converted for some
ranks and fixed sizes only.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from tpp_jax.interop.programs import Step, bind


def emitter() -> Step:
    """Returns a function that applies an operation while jax2onnx traces a program.

    One of the operands is traced. The function is for one program, since the best form
    of an operation may depend on the one before.
    """
    relus: dict[int, tuple[Any, Any]] = {}  # by identity: the result and the operand

    def emit(eqn: Any, values: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        result = _FORMS[name](eqn, values) if name in _FORMS else None
        if name == "min":
            result = _clipped(relus, values)
        if result is None:
            return bind(eqn, values)
        if name == "max":
            operand = values[isinstance(values[1], Tracer)]
            relus[id(result)] = result, operand
        return [result]

    return emit


def _clipped(relus: dict[int, tuple[Any, Any]], values: list[Any]) -> Any:
    """Returns the minimum of a ReLU and a number, as ReLU6 has it, as one operation."""
    for value, other in (values, values[::-1]):
        if id(value) not in relus or isinstance(other, Tracer):
            continue
        number = float(np.ravel(other)[0])
        if number > 0 and _is_all(other, number):
            return jnp.clip(relus[id(value)][1], 0.0, number)
    return None


def _relu(_: Any, values: list[Any]) -> Any:
    """Returns the maximum with zero."""
    for value, other in (values, values[::-1]):
        if isinstance(value, Tracer) and _is_all(other, 0):
            return jax.nn.relu(value)
    return None


def _pad(eqn: Any, values: list[Any]) -> Any:
    value, number = values
    config = eqn.params["padding_config"]
    if isinstance(number, Tracer) or any(
        low < 0 or high < 0 or between for low, high, between in config
    ):
        return None
    widths = [(low, high) for low, high, _ in config]
    return jnp.pad(value, widths, constant_values=np.asarray(number).item())


def _product(eqn: Any, values: list[Any]) -> Any:
    """Returns a product of any axes as a product of matrices."""
    (by, by_right), (along, along_right) = eqn.params["dimension_numbers"]
    result = eqn.outvars[0].aval
    if jnp.promote_types(*(x.dtype for x in values)) != result.dtype:
        return None
    left, right = (_converted(x, result.dtype) for x in values)
    free = [i for i in range(left.ndim) if i not in (*along, *by)]
    others = [i for i in range(right.ndim) if i not in (*along_right, *by_right)]
    left = _moved(left, [*along, *free, *by])
    right = _moved(right, [*along_right, *by_right, *others])
    shared, rows = left.shape[: len(along)], left.shape[len(along) :][: len(free)]
    contracted = _joined(left.shape[len(along) + len(free) :])
    columns = _joined(right.shape[len(along) + len(by) :])
    if not by:
        left = _shaped(left, (*left.shape, *[1] * len(others)))
        over = [1] * len(free)
        return jnp.multiply(
            left, _shaped(right, (*shared, *over, *right.shape[len(along) :]))
        )
    if along:  # otherwise several axes of rows are as good as one
        rows = (_joined(rows),)
    if any(size is None for size in (contracted, columns, *rows)):
        return None
    left = _shaped(left, (*shared, *rows, contracted))
    right = _shaped(right, (*shared, contracted, columns))
    return _shaped(jnp.matmul(left, right), result.shape)


def _pooled(function: Callable[..., Any], border: float) -> Callable[..., Any]:
    """Returns the form of a pooling over some axes, all others of which are kept."""

    def form(eqn: Any, values: list[Any]) -> Any:
        [value] = values
        window, strides = (
            tuple(eqn.params[name]) for name in ("window_dimensions", "window_strides")
        )
        dilations = {*eqn.params["base_dilation"], *eqn.params["window_dilation"]}
        padding = tuple(map(tuple, eqn.params["padding"]))
        settings = zip(window, strides, padding, strict=True)
        kept = [i for i, one in enumerate(settings) if one == (1, 1, (0, 0))]
        if len(kept) < 2 or dilations != {1} or not _is_plain_float(value.dtype):
            return None
        if any(map(any, padding)):
            value = jnp.pad(value, padding, constant_values=border)
        # First axes of examples and last ones of channels, as images have them.
        pooled_axes = [i for i in range(value.ndim) if i not in kept]
        if len(pooled_axes) < value.ndim - 2:  # one-dimensional windows of images
            pooled_axes = sorted({*pooled_axes, *kept[1:-1]})
        ends = [i for i in range(value.ndim) if i not in pooled_axes]
        order = [ends[0], *pooled_axes, ends[1]]
        pooled = function(
            _moved(value, order),
            window_shape=tuple(window[i] for i in pooled_axes),
            strides=tuple(strides[i] for i in pooled_axes),
            padding="VALID",
        )
        pooled = _moved(pooled, [order.index(i) for i in range(value.ndim)])
        return pooled * math.prod(window) if function is nnx.avg_pool else pooled

    return form


def _max_pooled(eqn: Any, values: list[Any]) -> Any:
    return _pooled(nnx.max_pool, -math.inf)(eqn, values)


def _summed(eqn: Any, values: list[Any]) -> Any:
    return _pooled(nnx.avg_pool, 0.0)(eqn, values)


def _joined_arrays(eqn: Any, values: list[Any]) -> Any:
    """Returns a concatenation without empty arrays, which jax2onnx makes larger."""
    axis = eqn.params["dimension"]
    kept = [x for x in values if x.shape[axis] != 0]
    if len(kept) == len(values) or not kept:
        return None
    return jnp.concatenate(kept, axis)


def _remainder(_: Any, values: list[Any]) -> Any:
    return jnp.fmod(*values)


_FORMS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "max": _relu,
    "pad": _pad,
    "dot_general": _product,
    "concatenate": _joined_arrays,
    "rem": _remainder,
    "reduce_window_max": _max_pooled,
    "reduce_window_sum": _summed,
}


def _is_all(value: Any, number: float) -> bool:
    if isinstance(value, Tracer):
        return False
    return bool(np.all(np.asarray(value) == number))


def _is_plain_float(dtype: Any) -> bool:
    return jnp.dtype(dtype) in (jnp.float32, jnp.float64, jnp.float16)


def _joined(sizes: Sequence[Any]) -> Any:
    """Returns the size of several axes as one; None if it is not known."""
    product = math.prod(sizes)
    return product if len(sizes) == 1 or isinstance(product, int) else None


def _converted(value: Any, dtype: Any) -> Any:
    if value.dtype == dtype:
        return value
    is_traced = isinstance(value, Tracer)
    return value.astype(dtype) if is_traced else np.asarray(value).astype(dtype)


def _moved(value: Any, order: Sequence[int]) -> Any:
    if list(order) == list(range(len(order))):
        return value
    if isinstance(value, Tracer):
        return jnp.transpose(value, tuple(order))
    return np.asarray(value).transpose(order)


def _shaped(value: Any, shape: Sequence[Any]) -> Any:
    if tuple(value.shape) == tuple(shape):
        return value
    if isinstance(value, Tracer):
        return jnp.reshape(value, tuple(shape))
    return np.asarray(value).reshape(shape)
