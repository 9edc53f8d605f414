"""A traced function as a flat list of equations over numbered values.

Groups and FLOPs are both read off a jaxpr. Here the jaxpr is made, from abstract shapes
alone, and its nested calls (``jit``, ``custom_jvp``, ``remat``…), loops and branches
are unfolded, so that what reads it is one loop over plain primitives.
"""

import collections
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
from flax import linen, nnx
from jax.extend import core as jex_core

from tpp_jax.pruning.functions import as_function, is_array
from tpp_jax.pruning.naming import layer_name

# Calls that only wrap another jaxpr: the parameter that holds it.
CALLS = {
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


# Files whose lines are not the user's.
_LIBRARIES = (
    *(str(pathlib.Path(module.__file__).parent) for module in (jax, flax)),
    str(pathlib.Path(__file__).parent),
    "<",
)


class Equation(NamedTuple):
    """One primitive applied to numbered values; ``None`` is a scalar literal.

    Besides JAX's primitives there are three that come from unfolding loops and
    branches: ``loop_slice`` takes one step's part of an array (its first axis goes),
    ``loop_stack`` puts the parts together again, ``join`` is one value of several
    sources.

    Attributes:
      source: where it was written, as JAX records it; see :func:`source_line`.
      times: how often it runs, where a ``scan`` tells.
    """

    primitive: str
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    params: dict[str, Any]
    source: Any = None
    times: int = 1


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


def trace(
    model: nnx.Module | linen.Module | Callable[..., Any],
    *inputs: Any,
    params: Any = None,
    plan: Any = None,
) -> Trace:
    """Traces a model abstractly; nothing is computed and nothing allocated.

    Args:
      model: see :func:`as_function`.
      *inputs: example inputs, arrays or ``jax.ShapeDtypeStruct``; whatever else is
        among them (``True``, a string) is handed to the model as it is.
      params: the parameters of a plain function, the variables of a Linen module.
      plan: if the variables of a Linen module were sliced, the plan of the cut.

    Returns:
      The computation with all nested calls unfolded.
    """
    function = as_function(model, params, plan)
    arguments, structure = jax.tree.flatten(inputs)
    arrays = [leaf for leaf in arguments if is_array(leaf)]

    def call(params: Any, arrays: list[Any]) -> Any:
        given = iter(arrays)
        whole = [next(given) if is_array(leaf) else leaf for leaf in arguments]
        return function.call(params, *jax.tree.unflatten(structure, whole))

    closed = jax.make_jaxpr(call)(function.params, arrays)
    builder = _Builder()
    jaxpr = closed.jaxpr
    numbers = [builder.number(np.shape(var.aval)) for var in jaxpr.invars]
    leaves = dict(zip(function.names, numbers, strict=False))
    inputs = tuple(numbers[len(leaves) :])
    constants = [builder.number(np.shape(var.aval), "") for var in jaxpr.constvars]
    builder.origin.update({n: name for name, n in leaves.items()})
    variables = [*jaxpr.invars, *jaxpr.constvars]
    scope = dict(zip(variables, [*numbers, *constants], strict=True))
    outputs = builder.unfold(jaxpr, scope)
    equations = _needed(builder.equations, outputs)
    used = {n for eqn in equations for n in eqn.inputs} | set(outputs)
    read = _without_copies(leaves, function.namesakes, used, builder.shapes)
    name_of = {value: name for name, value in read.items()}
    origin = {
        n: name_of.get(leaves[name]) for n, name in builder.origin.items() if name
    }
    return Trace(
        leaves=read,
        trainable=function.trainable,
        inputs=inputs,
        constants=tuple(constants) + tuple(builder.constants),
        outputs=tuple(outputs),
        equations=equations,
        shapes=tuple(builder.shapes),
        origin={n: name for n, name in origin.items() if name},
    )


def _without_copies(
    leaves: dict[str, int],
    namesakes: Mapping[str, str],
    used: set[int | None],
    shapes: Sequence[tuple[int, ...]],
) -> dict[str, int]:
    """Leaves out the copies of parameters that a model carries along and never reads.

    A collection with the paths and shapes of the parameters (their moving averages)
    holds such copies. They are cut as the parameter is, whose name their own ends in.
    Where a model reads the copy alone, the parameter is left out, and the copy has its
    name.
    """
    kept = dict(leaves)
    for copy, name in namesakes.items():
        value, own = kept[copy], kept[name]
        if shapes[value] != shapes[own]:
            continue
        if value not in used or own not in used:
            del kept[copy]
            kept[name] = own if own in used or value not in used else value
    return kept


def _needed(
    equations: list[Equation], outputs: list[int | None]
) -> tuple[Equation, ...]:
    """Leaves out what is computed for nothing, as a slice of which only the shape is
    asked for. What a loop carries from step to step is kept.
    """
    needed = {n for n in outputs if n is not None}
    kept = []
    for eqn in reversed(equations):
        if eqn.primitive == "join" or not needed.isdisjoint(eqn.outputs):
            needed.update(n for n in eqn.inputs if n is not None)
            kept.append(eqn)
    return tuple(reversed(kept))


def layers(traced: Trace, repeated: bool = False) -> list[Layer]:
    """Lists the convolution and dense layers in order of execution.

    A layer is a ``conv_general_dilated`` or ``dot_general`` one of whose operands comes
    from a parameter alone.

    Args:
      traced: the computation.
      repeated: whether a layer that runs twice is listed twice, or at its first use.
    """
    name_of = layer_names(traced)
    found: dict[Any, Layer] = {}
    for kernel, eqn, operand in _kernels(traced):
        layer = Layer(name_of(kernel), kernel, eqn, operand)
        found.setdefault(eqn.outputs if repeated else kernel, layer)
    return list(found.values())


def _kernels(traced: Trace) -> Iterator[tuple[str, Equation, int]]:
    """Yields every use of a kernel: its leaf, the equation, which operand it is."""
    for eqn in traced.equations:
        if eqn.primitive not in ("conv_general_dilated", "dot_general"):
            continue
        for operand in (1, 0):
            kernel = traced.origin.get(eqn.inputs[operand])
            if kernel is not None and len(traced.shapes[traced.leaves[kernel]]) > 1:
                yield kernel, eqn, operand
                break


def layer_names(traced: Trace) -> Callable[[str], str]:
    """Returns a function from a leaf's name to that of its layer.

    It is the leaf's without the last part, unless that would be the name of several
    kernels, as in the tree ``{"layers": {"up": ..., "down": ...}}``.
    """
    kernels = {kernel for kernel, _, _ in _kernels(traced)}
    owners = collections.Counter(layer_name(kernel) for kernel in kernels)

    def name_of(leaf: str) -> str:
        alone = leaf not in kernels or owners[layer_name(leaf)] == 1
        return layer_name(leaf) if alone else leaf

    return name_of


def lookups(traced: Trace) -> list[tuple[str, int]]:
    """Lists the look-ups of the model's inputs in a table: embeddings.

    Returns:
      ``(leaf name of the table, value of the result)``. Tables that are indexed by
      something built into the model (positions counted from 0) are not among them.
    """
    found = []
    varying = set(traced.inputs)
    for eqn in traced.equations:
        if varying.isdisjoint(eqn.inputs):
            continue
        varying.update(eqn.outputs)
        if eqn.primitive == "gather":
            table = traced.origin.get(eqn.inputs[0])
            if table is not None and eqn.inputs[1] in varying:
                found.append((table, eqn.outputs[0]))
    return found


class _Builder:
    """Numbers values and unfolds calls while walking a jaxpr."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.equations: list[Equation] = []
        self.constants: list[int] = []
        self.source: Any = None
        self.caller: Any = None
        # "" marks a value that depends on no parameter, None one that depends on an
        # input or on several leaves.
        self.origin: dict[int, str | None] = {}

    def number(self, shape: tuple[int, ...], origin: str | None = None) -> int:
        self.shapes.append(tuple(shape))
        n = len(self.shapes) - 1
        self.origin[n] = origin
        return n

    def unfold(
        self, jaxpr: Any, env: dict[Any, int | None], times: int = 1
    ) -> list[int | None]:
        for eqn in jaxpr.eqns:
            inputs = [self._read(var, env) for var in eqn.invars]
            self.source = self.caller or eqn.source_info
            match eqn.primitive.name:
                case name if name in CALLS:
                    before = self.caller
                    # JAX keeps what a jitted function does, with the lines of its
                    # first call: all of it is put down to the line of this call.
                    self.caller = self.source if name in ("jit", "pjit") else before
                    outputs = self._call(eqn.params[CALLS[name]], inputs, times)
                    self.caller = before
                case "scan":
                    outputs = self._scan(eqn, inputs, times)
                case "while":
                    outputs = self._while(eqn, inputs, times)
                case "cond":
                    outputs = self._cond(eqn, inputs, times)
                case name:
                    shapes = [np.shape(var.aval) for var in eqn.outvars]
                    outputs = self._equation(name, inputs, shapes, eqn.params, times)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [self._read(var, env) for var in jaxpr.outvars]

    def _equation(
        self,
        name: str,
        inputs: list[int | None],
        shapes: list[tuple[int, ...]],
        params: dict[str, Any] | None = None,
        times: int = 1,
    ) -> list[int]:
        origin = self._origin_of(inputs)
        outputs = [self.number(shape, origin) for shape in shapes]
        self.equations.append(
            Equation(
                name, tuple(inputs), tuple(outputs), params or {}, self.source, times
            )
        )
        return outputs

    def _call(
        self, closed: Any, inputs: list[int | None], times: int
    ) -> list[int | None]:
        inner = getattr(closed, "jaxpr", closed)
        scope = dict(zip(inner.invars, inputs, strict=True))
        for var in inner.constvars:
            scope[var] = self.number(np.shape(var.aval), "")
            self.constants.append(scope[var])
        return self.unfold(inner, scope, times)

    def _join(self, sources: list[int | None]) -> int | None:
        """Makes one value of several that must have the same channels."""
        known = [n for n in sources if n is not None]
        if len(known) < 2:
            return known[0] if known else None
        return self._equation("join", known, [self.shapes[known[0]]])[0]

    def _scan(self, eqn: Any, inputs: list[int | None], times: int) -> list[int | None]:
        length = eqn.params["length"]
        # How the operands are counted differs between versions of JAX; what is stacked
        # has one axis more outside the body than inside.
        body = eqn.params["jaxpr"].jaxpr
        n_stacked = _count_other_ranks(eqn.invars, body.invars)
        n_carry = len(eqn.outvars) - _count_other_ranks(eqn.outvars, body.outvars)
        n_consts = len(inputs) - n_carry - n_stacked
        carry, stacked = inputs[n_consts:][:n_carry], inputs[n_consts + n_carry :]
        parts = [
            None
            if n is None
            else self._equation("loop_slice", [n], [self.shapes[n][1:]])[0]
            for n in stacked
        ]
        arguments = [*inputs[:n_consts], *carry, *parts]
        results = self._call(eqn.params["jaxpr"], arguments, times * length)
        outputs = [
            self._join([first, last])
            for first, last in zip(carry, results[:n_carry], strict=True)
        ]
        for result, var in zip(results[n_carry:], eqn.outvars[n_carry:], strict=True):
            shape = np.shape(var.aval)
            sources = [] if result is None else [result]
            outputs += self._equation("loop_stack", sources, [shape])
        return outputs

    def _while(
        self, eqn: Any, inputs: list[int | None], times: int
    ) -> list[int | None]:
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = inputs[n_cond + n_body :]
        self._call(eqn.params["cond_jaxpr"], [*inputs[:n_cond], *carry], times)
        body = [*inputs[n_cond:][:n_body], *carry]
        results = self._call(eqn.params["body_jaxpr"], body, times)
        pairs = zip(carry, results, strict=True)
        return [self._join([first, last]) for first, last in pairs]

    def _cond(self, eqn: Any, inputs: list[int | None], times: int) -> list[int | None]:
        branches = [
            self._call(branch, inputs[1:], times) for branch in eqn.params["branches"]
        ]
        return [self._join(list(sources)) for sources in zip(*branches, strict=True)]

    def _read(self, var: Any, env: dict[Any, int | None]) -> int | None:
        if isinstance(var, jex_core.Literal):
            return None
        return env[var]

    def _origin_of(self, inputs: list[int | None]) -> str | None:
        origins = {self.origin[n] for n in inputs if n is not None} - {""}
        if len(origins) > 1 or None in origins:
            return None
        return origins.pop() if origins else ""


def source_line(source: Any) -> str:
    """Returns the user's line that an equation comes from, as ``model.py:31``.

    Args:
      source: :attr:`Equation.source`.

    Returns:
      The innermost line that is not in JAX, Flax or this file's neighbours; ``""`` if
      there is none.
    """
    traceback = getattr(source, "traceback", None)
    for frame in traceback.frames if traceback is not None else ():
        if not frame.file_name.startswith(_LIBRARIES):
            return f"{pathlib.Path(frame.file_name).name}:{frame.line_num}"
    return ""


def _count_other_ranks(outside: list[Any], inside: list[Any]) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(np.ndim(a.aval) != np.ndim(b.aval) for a, b in pairs)
