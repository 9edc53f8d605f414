"""Convolutions and other products of a computation, to be timed alone at any widths."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from tpp_jax.graph.layers import kernel_axes
from tpp_jax.graph.tracing import Trace
from tpp_jax.graph.unfolding import Equation
from tpp_jax.pruning.axes import Axes
from tpp_jax.pruning.times import Size
from tpp_jax.xla.convolution import compiler_options, conv_on_cpu

Shape = tuple[int, ...]


class Operation(NamedTuple):
    """All of a product but its sizes. Equal ones take the same time at equal sizes.

    A convolution has three sizes: its number of feature groups, and the inputs and
    outputs of each. A product of matrices has four: the number of pairs of matrices,
    and their rows, contracted columns and produced columns. Each may be the product of
    several axes.

    Attributes:
      primitive: Name of the primitive.
      dtypes: Types of the operands.
      options: Parameters of the primitive that do not depend on the sizes.
      images: Shape of the images of a convolution; its width is replaced.
      kernel: Shape of the kernel of a convolution; its widths are replaced.
    """

    primitive: str
    dtypes: tuple[Any, Any]
    options: tuple[tuple[str, Any], ...]
    images: Shape = ()
    kernel: Shape = ()

    def shapes(self, sizes: Sequence[int]) -> tuple[Shape, Shape]:
        """Returns the shapes of both operands."""
        if self.primitive == "dot_general":
            batch, rows, contracted, columns = sizes
            return (batch, rows, contracted), (batch, contracted, columns)
        groups, inputs, outputs = sizes
        (_, features, *_), (produced, contracted, *_), _ = dict(self.options)[
            "dimension_numbers"
        ]
        images, kernel = list(self.images), list(self.kernel)
        images[features] = groups * inputs
        kernel[contracted], kernel[produced] = inputs, groups * outputs
        return tuple(images), tuple(kernel)

    def call(self, sizes: Sequence[int], for_cpu: bool) -> Callable[..., Any]:
        """Returns the compiled product as a function of both operands.

        Args:
          sizes: Sizes.
          for_cpu: Whether a convolution is computed in a form that suits a CPU.
        """
        options = dict(self.options)
        if self.primitive == "dot_general":
            numbers = ((2,), (1,)), ((0,), (0,))
            call = functools.partial(lax.dot_general, dimension_numbers=numbers)
        else:
            call = conv_on_cpu if for_cpu else lax.conv_general_dilated
            options["feature_group_count"] = sizes[0]
        return jax.jit(
            functools.partial(call, **options), compiler_options=compiler_options()
        )


class Product(NamedTuple):
    """A product in the computation of a model.

    Attributes:
      operation: All but its sizes.
      sizes: Sizes, which follow the widths of groups.
      times: Number of times that it runs.
    """

    operation: Operation
    sizes: tuple[Size, ...]
    times: int


def products_of(traced: Trace, axes: Axes) -> Iterator[Product]:
    """Yields the products that an output depends on, in order of execution.

    Args:
      traced: Computation of the model.
      axes: Axes of its arrays.
    """
    for eqn in traced.equations:
        if is_product(traced, eqn):
            of = _matrices if eqn.primitive == "dot_general" else _convolution
            left, right = eqn.operand(0), eqn.operand(1)
            operation, sizes = of(traced, eqn, axes, left, right)
            dtypes = traced.dtypes[left], traced.dtypes[right]
            yield Product(operation._replace(dtypes=dtypes), sizes, eqn.times)


def is_product(traced: Trace, eqn: Equation) -> bool:
    """Reports whether an operation is timed alone.

    Products of parameters with parameters are not, nor are those of several batches of
    kernels.
    """
    return (
        eqn.primitive in ("dot_general", "conv_general_dilated")
        and eqn.params.get("batch_group_count", 1) == 1
        and not traced.origin.get(eqn.outputs[0])
        and traced.unread.isdisjoint(eqn.outputs)
    )


def _matrices(
    traced: Trace, eqn: Equation, axes: Axes, left: int, right: int
) -> tuple[Operation, tuple[Size, ...]]:
    def size(value: int, along: Iterable[int]) -> Size:
        factor, numbers = axes.product(1, [(value, axis) for axis in along])
        return Size((factor, tuple(numbers)))

    rows, contracted = kernel_axes(eqn, 0, len(traced.shapes[left]))
    columns, _ = kernel_axes(eqn, 1, len(traced.shapes[right]))
    _, (batch, _) = eqn.params["dimension_numbers"]
    sizes = size(left, batch), size(left, rows), size(left, contracted)
    operation = Operation(eqn.primitive, (None, None), _options(eqn))
    return operation, (*sizes, size(right, columns))


def _convolution(
    traced: Trace, eqn: Equation, axes: Axes, left: int, right: int
) -> tuple[Operation, tuple[Size, ...]]:
    (_, features, *_), (produced, contracted, *_), _ = eqn.params["dimension_numbers"]

    def product(*along: tuple[int, int]) -> tuple[int, tuple[int, ...]]:
        factor, numbers = axes.product(1, along)
        return factor, tuple(numbers)

    images, inputs, outputs = (left, features), (right, contracted), (right, produced)
    if eqn.params["feature_group_count"] == 1:
        sizes = Size((1, ())), Size(product(inputs)), Size(product(outputs))
    else:
        groups = Size(product(images), product(inputs))
        each = Size(product(outputs, inputs), product(images))
        sizes = groups, Size(product(inputs)), each
    names = "window_strides", "padding", "lhs_dilation", "rhs_dilation"
    operation = Operation(
        eqn.primitive,
        (None, None),
        _options(eqn, *names, "dimension_numbers"),
        _without(traced.shapes[left], features),
        _without(traced.shapes[right], produced, contracted),
    )
    return operation, sizes


def _without(shape: Shape, *axes: int) -> Shape:
    return tuple(0 if i in axes else n for i, n in enumerate(shape))


def _options(eqn: Equation, *names: str) -> tuple[tuple[str, Any], ...]:
    names = (*names, "precision", "preferred_element_type")
    return tuple((name, eqn.params[name]) for name in names)
