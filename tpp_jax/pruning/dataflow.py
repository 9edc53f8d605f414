"""A computation as values and operations, to be searched in both directions.

Other than in a :class:`tpp_jax.graph.tracing.Trace`, loops and branches are single
operations, and what is computed from parameters alone can be computed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tpp_jax.graph.functions import Function, is_array
from tpp_jax.graph.tracing import source_line
from tpp_jax.graph.unfolding import check_length
from tpp_jax.pruning.replay import evaluate, replay


@dataclasses.dataclass(eq=False)
class Value:
    """A value of a computation.

    Attributes:
      shape: Its shape.
      dtype: Its type.
      leaves: Names of the parameters that it is computed from; None if it depends on
        the model's inputs.
      maker: Operation that it is a result of; None for parameters and constants.
      array: The array, if it is built into the model.
      readers: Operations that read it, each as often as it does.
    """

    shape: tuple[int, ...]
    dtype: Any
    leaves: frozenset[str] | None
    maker: "Operation | None" = None
    array: Any = None
    readers: list["Operation"] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Operation:
    """An equation of a jaxpr with its operands and results."""

    eqn: Any
    operands: list[Value]
    results: list[Value]

    @property
    def primitive(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name

    def __str__(self) -> str:
        line = source_line(self.eqn.source_info)
        return f"{self.primitive} ({line})" if line else self.primitive


@dataclasses.dataclass(eq=False)
class Graph:
    """A computation in evaluation mode.

    Attributes:
      leaves: Parameters by name.
      operations: Operations that an output depends on, in order of execution.
      outputs: Results of the model.
    """

    leaves: dict[str, Value]
    operations: list[Operation]
    outputs: list[Value]

    @functools.cached_property
    def uses(self) -> dict[str, list[Operation]]:
        """For each parameter, the operations at which it meets activations.

        A parameter that a result of the model is computed from alone has no entry.
        """
        found: dict[str, list[Operation]] = {name: [] for name in self.leaves}
        for operation in self.operations:
            if operation.results and operation.results[0].leaves is None:
                for value in operation.operands:
                    for name in value.leaves or ():
                        found[name].append(operation)
        for value in self.outputs:
            for name in value.leaves or ():
                found.pop(name, None)
        return found

    def computing(
        self, values: Sequence[Value]
    ) -> Callable[[Mapping[str, Any]], list[Array]]:
        """Returns a compiled function from parameters by name to values.

        Args:
          values: Values that depend on parameters alone.
        """
        wanted, needed = set(values), []
        for operation in reversed(self.operations):
            if not wanted.isdisjoint(operation.results):
                wanted.update(operation.operands)
                needed.append(operation)

        @jax.jit
        def compute(leaves: Mapping[str, Any]) -> list[Array]:
            known = {self.leaves[name]: leaf for name, leaf in leaves.items()}

            def read(value: Value) -> Any:
                return known[value] if value in known else jnp.asarray(value.array)

            for operation in reversed(needed):
                operands = [read(value) for value in operation.operands]
                results = evaluate(operation.eqn, operands)
                known.update(zip(operation.results, results, strict=True))
            return [read(value) for value in values]

        return compute


def read_graph(
    function: Function, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Graph:
    """Traces a model; calls (of jitted functions…) are entered.

    Args:
      function: Model as a function of its parameters.
      inputs: Inputs, which may be abstract.
      kwargs: Keyword arguments, like the inputs.
    """
    call, arrays = with_arrays(function, inputs, kwargs)
    closed = jax.make_jaxpr(call)(function.params, arrays)
    check_length(closed.jaxpr)
    arguments = [var.aval for var in closed.jaxpr.invars]
    leaves = {
        name: Value(aval.shape, aval.dtype, frozenset([name]))
        for name, aval in zip(function.names, arguments, strict=False)
    }
    others = [Value(x.shape, x.dtype, None) for x in arguments[len(leaves) :]]
    operations = []

    def step(eqn: Any, operands: list[Value]) -> list[Value]:
        sources = [value.leaves for value in operands]
        known = [source for source in sources if source is not None]
        made = frozenset().union(*known) if len(known) == len(sources) else None
        operation = Operation(eqn, operands, [])
        for var in eqn.outvars:
            aval = var.aval
            shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
            operation.results.append(Value(shape, dtype, made, operation))
        operations.append(operation)
        return operation.results

    given = [*leaves.values(), *others]
    outputs = replay(closed.jaxpr, closed.consts, given, _built_in, step)
    return Graph(leaves, _needed(operations, outputs), outputs)


def with_arrays(
    function: Function, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """Separates the arrays among a model's arguments from other objects.

    Args:
      function: Model as a function of its parameters.
      inputs: Inputs.
      kwargs: Keyword arguments.

    Returns:
      A function ``call(params, arrays)``, and the arrays.
    """
    arguments, structure = jax.tree.flatten((inputs, dict(kwargs)))

    def call(params: Any, arrays: list[Any]) -> Any:
        given = iter(arrays)
        every = [next(given) if is_array(leaf) else leaf for leaf in arguments]
        own, named = jax.tree.unflatten(structure, every)
        return function.call(params, *own, **named)

    return call, [leaf for leaf in arguments if is_array(leaf)]


def _built_in(array: Any) -> Value:
    return Value(np.shape(array), jnp.result_type(array), frozenset(), array=array)


def _needed(operations: list[Operation], outputs: list[Value]) -> list[Operation]:
    """Returns the operations that outputs depend on; notes them with what they read."""
    wanted, needed = set(outputs), []
    for operation in reversed(operations):
        if not wanted.isdisjoint(operation.results):
            wanted.update(operation.operands)
            needed.append(operation)
            for value in operation.operands:
                value.readers.append(operation)
    return needed[::-1]
