"""Models as programs for inference: weights are constants, what depends on them folded.

A program is a jaxpr that holds the weights. It is run operation by operation on traced
inputs, so that a compiler or a converter sees what is left of it: operations on
constants alone are computed here, and calls of functions are entered.
"""

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.core import Tracer, eval_context
from jax.extend import core as jex_core

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import on_host
from tpp_jax.graph.functions import apart, as_function, is_array
from tpp_jax.graph.naming import leaf_name
from tpp_jax.graph.tracing import source_line
from tpp_jax.graph.unfolding import CALLS
from tpp_jax.pruning.folding import folded_params
from tpp_jax.pruning.replay import replay

# Constants are broadcast in the file up to this many entries, above when it runs.
_MOST_ENTRIES = 1 << 20
_MOST_BYTES = 2**31 - 2**20  # of a file
# What only matters to the compiler, or to a mesh of devices.
_TRANSPARENT = frozenset({"optimization_barrier", "sharding_constraint", "copy_p"})
_PRINTS = frozenset({"debug_callback", "debug_print"})

Step = Callable[[Any, list[Any]], list[Any]]


@dataclasses.dataclass(frozen=True)
class Program:
    """A model with its weights and the shapes of its inputs.

    Attributes:
      call: The model itself: a function of the inputs' arrays, in the structure of
        arguments ``(inputs, kwargs)``, that returns its outputs.
      arguments: Shapes and types of these arrays, in that structure; None in place of
        arguments that are not arrays. Sizes may be symbolic.
      outputs: Shapes and types of the outputs, in their structure.
      input_names: Name of each array of ``arguments``.
      output_names: Name of each array of ``outputs``.
      jaxpr: The computation: a function of the weights and the inputs.
      weights: Arrays of the weights, norms folded into kernels.
    """

    call: Callable[[Any], Any]
    arguments: Any
    outputs: Any
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    jaxpr: Any
    weights: tuple[Any, ...]

    @property
    def size(self) -> int:
        """Number of bytes of the weights."""
        arrays = (*self.weights, *self.jaxpr.consts)
        numbers = (
            x for x in arrays if not jnp.issubdtype(x.dtype, jax.dtypes.extended)
        )
        return sum(jnp.dtype(x.dtype).itemsize * x.size for x in numbers)

    @property
    def inputs(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and types of the inputs' arrays, in order."""
        return jax.tree.leaves(self.arguments)

    def run(self, arrays: Sequence[Any], step: Step | None = None) -> list[Any]:
        """Returns the arrays of the outputs for traced arrays of the inputs.

        Args:
          arrays: Arrays of the inputs, in order.
          step: Function of an equation and its operands that returns the results;
            called only if an operand depends on the inputs.
        """
        jaxpr, last = self.jaxpr, step or bind

        def folded(eqn: Any, values: list[Any]) -> list[Any]:
            if eqn.primitive.name in _TRANSPARENT:
                return list(values)
            if eqn.primitive.name in _PRINTS and not eqn.outvars:
                return []
            if _can_be_computed(eqn, values):
                with eval_context():
                    return bind(eqn, values)
            same = _same_operand(eqn, values)
            return last(eqn, values) if same is None else [same]

        values = [*self.weights, *arrays]
        return replay(jaxpr.jaxpr, jaxpr.consts, values, lambda x: x, folded)

    @functools.cached_property
    def met(self) -> "Met":
        """Operations and types that depend on the inputs."""
        operations: dict[str, str] = {}
        types = {x.dtype: "" for x in self.inputs}

        def note(eqn: Any) -> None:
            line = source_line(eqn.source_info)
            if eqn.primitive.name not in CALLS:
                operations.setdefault(eqn.primitive.name, line)
            for var in eqn.outvars:
                types.setdefault(getattr(var.aval, "dtype", None), line)
            for jaxpr in jex_core.jaxprs_in_params(eqn.params):
                for inner in jaxpr.eqns:
                    note(inner)

        def step(eqn: Any, values: list[Any]) -> list[Any]:
            note(eqn)
            return bind(eqn, values)

        jax.eval_shape(lambda *arrays: self.run(arrays, step), *self.inputs)
        types.pop(None, None)
        for x in jax.tree.leaves(self.outputs):
            types.setdefault(x.dtype, "")
        return Met(operations, types)


class Met(NamedTuple):
    """What a program consists of.

    Attributes:
      operations: Primitives that depend on the inputs, and those inside them, with the
        line of the model that the first of each comes from, or "".
      types: Types of their results, and of the program's inputs and outputs, likewise.
    """

    operations: dict[str, str]
    types: dict[Any, str]


def program_of(
    model: nnx.Module | linen.Module | Callable[..., Any],
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    params: Any,
    dynamic_batch: bool,
) -> Program:
    """Traces a model in evaluation mode, with its weights as constants.

    Args:
      model: Model with concrete arrays.
      inputs: Inputs of the model.
      kwargs: Keyword arguments of the model.
      params: Parameters that come with the model, as for
        :func:`tpp_jax.channel_groups`.
      dynamic_batch: Whether the first axis of the inputs may have any size.

    Raises:
      TPPError: The weights are abstract, or the model does not accept batches of any
        size.
    """
    function = as_function(model, params)
    if any(
        isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(function.params)
    ):
        raise TPPError("the model's weights are abstract: there is nothing to export")
    own = jax.tree.map(_undivided, function.params)
    function = dataclasses.replace(function, params=own)

    # The weights are arguments, since a model may change its state while it runs.
    given, call = apart(
        lambda tree, params: function.call(params, *tree[0], **tree[1]),
        (inputs, kwargs),
    )
    names = _input_names(model, given)
    shapes = _shapes(given, names)
    fixed = all(_is_fixed(x.shape) for x in jax.tree.leaves(shapes))
    arguments = _with_any_batch(shapes) if dynamic_batch and fixed else shapes
    folded = folded_params(function, *jax.tree.map(with_sizes, (inputs, kwargs)))

    def flat(leaves: list[Any], tree: Any) -> Any:
        return call(tree, jax.tree.unflatten(jax.tree.structure(folded), leaves))

    weights = jax.tree.leaves(folded)
    try:
        jaxpr, outputs = jax.make_jaxpr(flat, return_shape=True)(weights, arguments)
    except Exception as error:
        if arguments is shapes:
            raise
        jax.eval_shape(flat, weights, shapes)  # raises if the batch is not the cause
        raise not_any_batch(error) from error
    if not jax.tree.leaves(outputs):
        raise TPPError("the model returns no arrays: there is nothing to export")
    run = jax.jit(call)
    return Program(
        call=lambda tree: run(tree, function.params),
        arguments=arguments,
        outputs=outputs,
        input_names=names,
        output_names=_output_names(outputs, names),
        jaxpr=jaxpr,
        weights=tuple(weights),
    )


def _shapes(given: Any, names: Sequence[str]) -> Any:
    """Returns shapes of inputs, and the types that JAX converts them to."""
    leaves, structure = jax.tree.flatten(given)
    if not leaves:
        raise TPPError("the inputs are missing: export(model, path, *inputs)")
    for x, name in zip(leaves, names, strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise TPPError(
                f"the input {name} is a random key, which files cannot have: leave it "
                "out if it is for dropout, or pass jax.random.key_data(key) to a model "
                "that calls jax.random.wrap_key_data"
            )
        if not jnp.issubdtype(x.dtype, np.number) and x.dtype != np.bool_:
            raise TPPError(
                f"the input {name} holds {x.dtype}: pass an array of numbers instead"
            )
    types = (jax.dtypes.canonicalize_dtype(x.dtype) for x in leaves)
    pairs = zip(leaves, types, strict=True)
    return structure.unflatten(
        [jax.ShapeDtypeStruct(x.shape, dtype) for x, dtype in pairs]
    )


def _undivided(x: Any) -> Any:
    """Returns an array that is not divided among devices, as the file's are not."""
    if not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1:
        return x
    return x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else on_host(x)


def check_size(program: Program) -> None:
    """Raises if the weights are too large for a file, whatever its format.

    All formats are protocol buffers or flatbuffers, whose offsets have 32 bits.
    """
    if program.size > _MOST_BYTES:
        raise TPPError(
            f"the weights take {program.size / 2**30:.1f} GiB, and a file holds 2 GiB: "
            "convert them to a smaller type, or save them with tpp_jax.save_model"
        )


def named(operations: dict[str, str]) -> str:
    """Returns operations and their lines as text.

    Args:
      operations: Name of each primitive and its line, or "".
    """
    return ", ".join(f"{x} ({line})" if line else x for x, line in operations.items())


def not_any_batch(error: Exception) -> TPPError:
    """Returns the error for a model that needs batches of one size.

    Args:
      error: What it raised for another size.
    """
    line = str(error).strip().partition("\n")[0].rstrip(".")
    return TPPError(
        f"the model does not accept a batch of any size ({line}): pass "
        "dynamic_batch=False for a file that accepts batches of this size only"
    )


def _with_any_batch(shapes: Any) -> Any:
    """Returns shapes whose first axis has a symbolic size, where it is the batch's."""
    first = jax.tree.leaves(shapes)[0]
    if not first.shape:
        raise TPPError(
            "the first input has no axes, so that its batch is unknown: pass "
            "dynamic_batch=False"
        )
    [batch] = jax.export.symbolic_shape("batch")

    def own(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not x.shape or x.shape[0] != first.shape[0]:
            return x
        return jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)

    return jax.tree.map(own, shapes)


def with_sizes(x: Any, sizes: Mapping[str, int] = MappingProxyType({})) -> Any:
    """Returns the shape and type of an array with numbers for its symbolic sizes.

    Args:
      x: Array, or its shape and type; other objects are returned as they are.
      sizes: Number for each symbolic size, by its name; 4 for those that are not here.

    Raises:
      TPPError: A size is an expression.
    """
    if not is_array(x) or _is_fixed(x.shape):
        return x
    for n in x.shape:
        if not isinstance(n, int) and not str(n).isidentifier():
            raise TPPError(
                f"the size {n} of an input cannot be tried: give every symbolic size a "
                "name of its own"
            )
    shape = (n if isinstance(n, int) else sizes.get(str(n), 4) for n in x.shape)
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def _is_fixed(shape: Sequence[Any]) -> bool:
    """Reports whether no size of a shape is symbolic."""
    return all(isinstance(size, int) for size in shape)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Returns the results of an operation.

    Args:
      eqn: Equation of a jaxpr.
      values: Operands.
    """
    results = eqn.primitive.bind(*values, **eqn.params)
    return list(results) if eqn.primitive.multiple_results else [results]


def _can_be_computed(eqn: Any, values: Sequence[Any]) -> bool:
    """Reports whether an operation is on constants, and its results are small."""
    if eqn.effects or any(isinstance(x, Tracer) for x in values):
        return False
    shapes = [getattr(var.aval, "shape", None) for var in eqn.outvars]
    if any(shape is None or not _is_fixed(shape) for shape in shapes):
        return False
    if _names_symbol(eqn):
        return False
    entries = sum(math.prod(shape) for shape in shapes if shape is not None)
    return entries <= max(_MOST_ENTRIES, 2 * sum(np.size(x) for x in values))


def _names_symbol(eqn: Any) -> bool:
    """Reports whether an operation, or one inside it, has a symbolic size in it."""
    values = [*eqn.params.values()]
    while values:
        value = values.pop()
        if isinstance(value, tuple | list):
            values += value
        elif jax.export.is_symbolic_dim(value):
            return True
    inner = jex_core.jaxprs_in_params(eqn.params)
    return any(_names_symbol(one) for jaxpr in inner for one in jaxpr.eqns)


def _same_operand(eqn: Any, values: Sequence[Any]) -> Any:
    """Returns the operand that an operation leaves as it is, if there is one."""
    name = eqn.primitive.name
    if name not in ("add", "sub", "mul", "div", "convert_element_type"):
        return None
    result = eqn.outvars[0].aval
    if name == "convert_element_type":
        pairs = [(values[0], None)]
    else:
        pairs = list(itertools.permutations(values, 2))
        pairs = pairs[:1] if name in ("sub", "div") else pairs
    neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1}.get(name)
    for value, other in pairs:
        alike = np.shape(value) == result.shape and value.dtype == result.dtype
        if not alike or not isinstance(value, Tracer):
            continue
        if name == "convert_element_type" or _is_all(other, neutral):
            return value
    return None


def _is_all(value: Any, number: float | None) -> bool:
    """Reports whether a value is a constant, all of whose entries are a number."""
    if number is None or isinstance(value, Tracer):
        return False
    return bool(np.all(np.asarray(value) == number))


def _input_names(model: Any, arguments: Any) -> tuple[str, ...]:
    """Returns the names of the inputs: those of the model's parameters, if known."""
    inputs, kwargs = arguments
    own = _parameters(model)
    found = []
    for i, value in enumerate(inputs):
        name = own[i] if i < len(own) else f"input_{i}"
        found += _names(value, name)
    for name, value in kwargs.items():
        found += _names(value, name)
    if len(set(found)) < len(found):
        return tuple(f"input_{i}" for i in range(len(found)))
    return tuple(found)


def _output_names(outputs: Any, taken: Sequence[str]) -> tuple[str, ...]:
    """Returns names of the outputs, other than those of the inputs."""
    found = _names(outputs, "output")
    if len({*found, *taken}) == len(found) + len(taken):
        return found
    free = (f"result_{i}" for i in itertools.count())
    return tuple(itertools.islice((x for x in free if x not in taken), len(found)))


def _parameters(model: Any) -> list[str]:
    """Returns the names of the positional parameters that inputs are passed to."""
    is_module = isinstance(model, nnx.Module | linen.Module)
    call = type(model).__call__ if is_module else model
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):
        return []
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [one.name for one in parameters if one.kind in kinds][1:]


def _names(tree: Any, name: str) -> tuple[str, ...]:
    """Returns a name for each array of a tree: a prefix, and its path in the tree."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return tuple(f"{name}.{leaf_name(path)}" if path else name for path in paths)


def shape_text(x: Any) -> str:
    """Returns the type and shape of an array as text, ``float32[batch, 32, 32, 3]``."""
    return f"{jnp.dtype(x.dtype).name}[{', '.join(map(str, x.shape))}]"
