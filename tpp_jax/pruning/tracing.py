"""A traced function as a flat list of equations over numbered values.

Groups and FLOPs are both read off a jaxpr. Here the jaxpr is made, from abstract shapes
alone, and its nested calls (``jit``, ``custom_jvp``, ``remat``…) are unfolded, so that
what reads it is one loop over plain primitives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.extend import core as jex_core

from tpp_jax.pruning.naming import layer_name, leaf_name

# Calls that only wrap another jaxpr: the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}


class Equation(NamedTuple):
    """One primitive applied to numbered values; ``None`` is a scalar literal."""

    primitive: str
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    params: dict[str, Any]


class Trace(NamedTuple):
    """A function's computation.

    Attributes:
      leaves: parameter leaf name → value number.
      trainable: names of the leaves that are trained (``nnx.Param``; all of a plain
        parameter tree), the others being statistics.
      inputs: value numbers of the other arguments' leaves.
      constants: value numbers of the arrays that the function closed over.
      outputs: value numbers of the results, ``None`` for scalar literals.
      equations: the primitives in order of execution.
      shapes: shape of every value, by number.
      origin: for a value computed from one parameter leaf alone (by casts, transposes,
        reshapes, a normalisation of the weight…), that leaf's name.
    """

    leaves: dict[str, int]
    trainable: frozenset[str]
    inputs: tuple[int, ...]
    constants: tuple[int, ...]
    outputs: tuple[int | None, ...]
    equations: tuple[Equation, ...]
    shapes: tuple[tuple[int, ...], ...]
    origin: dict[int, str]


class Layer(NamedTuple):
    """A convolution or dense layer met in a trace.

    Attributes:
      name: dotted name, ``layer1.0.conv1``.
      kernel: name of its weight leaf.
      equation: the ``conv_general_dilated`` or ``dot_general``.
      operand: which input of the equation the weight is.
    """

    name: str
    kernel: str
    equation: Equation
    operand: int


def as_function(
    model: nnx.Module | Callable[..., Any], params: Any = None
) -> tuple[Callable[..., Any], Any, frozenset[str]]:
    """Splits a model into a pure function and its parameter tree.

    Args:
      model: an NNX module, which is left untouched and run in evaluation mode, or a
        function ``fn(params, *inputs)``.
      params: the function's parameter pytree (arrays or ``jax.ShapeDtypeStruct``).

    Returns:
      ``(fn, params, names of the trainable leaves)``.

    Raises:
      TypeError: a function without ``params`` or with a bare array, which has no name,
        or an object that is neither.
    """
    if isinstance(model, nnx.Module):
        graphdef, state = nnx.split(model)
        trainable = nnx.filter_state(state, nnx.Param)

        def fn(state: Any, *inputs: Any) -> Any:
            merged = nnx.merge(graphdef, state)
            merged.eval()
            return merged(*inputs)

        return fn, state, _names(trainable)
    if not callable(model):
        raise TypeError(f"expected an nnx.Module or a function, got {type(model)}")
    if params is None:
        raise TypeError("a plain function needs its parameters: pass params=tree")
    if "" in _names(params):
        raise TypeError("the parameters are a bare array: put it in a dict, for a name")
    return model, params, _names(params)


def _names(tree: Any) -> frozenset[str]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return frozenset(leaf_name(path) for path, _ in paths)


def trace(
    model: nnx.Module | Callable[..., Any], *inputs: Any, params: Any = None
) -> Trace:
    """Traces a model abstractly; nothing is computed and nothing allocated.

    Args:
      model: see :func:`as_function`.
      *inputs: example inputs, arrays or ``jax.ShapeDtypeStruct``.
      params: the parameters of a plain function.

    Returns:
      The computation with all nested calls unfolded.
    """
    fn, params, trainable = as_function(model, params)
    named = jax.tree_util.tree_leaves_with_path(params)
    closed = jax.make_jaxpr(fn)(params, *inputs)
    builder = _Builder()
    numbers = [builder.number(var) for var in closed.jaxpr.invars]
    leaves = {leaf_name(path): n for (path, _), n in zip(named, numbers, strict=False)}
    constants = [builder.number(var, "") for var in closed.jaxpr.constvars]
    builder.origin.update({n: name for name, n in leaves.items()})
    outputs = builder.unfold(closed.jaxpr, dict(builder.numbers))
    return Trace(
        leaves=leaves,
        trainable=trainable,
        inputs=tuple(numbers[len(leaves) :]),
        constants=tuple(constants) + tuple(builder.constants),
        outputs=tuple(outputs),
        equations=tuple(builder.equations),
        shapes=tuple(builder.shapes),
        origin={n: name for n, name in builder.origin.items() if name},
    )


def layers(traced: Trace, repeated: bool = False) -> list[Layer]:
    """Lists the convolution and dense layers in order of execution.

    A layer is a ``conv_general_dilated`` or ``dot_general`` one of whose operands comes
    from a parameter alone.

    Args:
      traced: the computation.
      repeated: whether a layer that runs twice is listed twice, or at its first use.
    """
    found: dict[Any, Layer] = {}
    for eqn in traced.equations:
        if eqn.primitive not in ("conv_general_dilated", "dot_general"):
            continue
        for operand in (1, 0):
            kernel = traced.origin.get(eqn.inputs[operand])
            if kernel is not None and len(traced.shapes[traced.leaves[kernel]]) > 1:
                layer = Layer(layer_name(kernel), kernel, eqn, operand)
                found.setdefault(eqn.outputs if repeated else kernel, layer)
                break
    return list(found.values())


class _Builder:
    """Numbers values and unfolds calls while walking a jaxpr."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.equations: list[Equation] = []
        self.constants: list[int] = []
        # "" marks a value that depends on no parameter, None one that depends on an
        # input or on several leaves.
        self.origin: dict[int, str | None] = {}

    def number(self, var: Any, origin: str | None = None) -> int:
        n = len(self.shapes)
        self.numbers[var] = n
        self.shapes.append(tuple(np.shape(var.aval)))
        self.origin[n] = origin
        return n

    def unfold(self, jaxpr: Any, env: dict[Any, int | None]) -> list[int | None]:
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            inputs = [self._read(var, env) for var in eqn.invars]
            if name in _CALLS:
                inner = eqn.params[_CALLS[name]]
                consts = getattr(inner, "consts", ())
                inner = getattr(inner, "jaxpr", inner)
                scope = dict(zip(inner.invars, inputs, strict=True))
                for var, _ in zip(inner.constvars, consts, strict=True):
                    scope[var] = self.number(var, "")
                    self.constants.append(scope[var])
                outputs = self.unfold(inner, scope)
                env.update(zip(eqn.outvars, outputs, strict=True))
                continue
            outputs = [self.number(var) for var in eqn.outvars]
            env.update(zip(eqn.outvars, outputs, strict=True))
            origin = self._origin_of(inputs)
            self.origin.update(dict.fromkeys(outputs, origin))
            self.equations.append(
                Equation(name, tuple(inputs), tuple(outputs), eqn.params)
            )
        return [self._read(var, env) for var in jaxpr.outvars]

    def _read(self, var: Any, env: dict[Any, int | None]) -> int | None:
        if isinstance(var, jex_core.Literal):
            return None
        return env[var]

    def _origin_of(self, inputs: list[int | None]) -> str | None:
        origins = {self.origin[n] for n in inputs if n is not None} - {""}
        if len(origins) > 1 or None in origins:
            return None
        return origins.pop() if origins else ""
