"""A traced function as a flat list of equations over numbered values.

Groups and FLOPs are both read from a jaxpr. It is made here, from abstract shapes
alone; unfolding.py replaces nested calls, loops and branches by their operations.
"""

import collections
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import os
import pathlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen, nnx

from tpp_jax.graph.functions import Function, as_function, is_array
from tpp_jax.graph.layers import Layer, Lookup, find_layers, find_lookups
from tpp_jax.graph.naming import layer_name
from tpp_jax.graph.unfolding import LASTING, Builder, Equation, Value, check_length

# Libraries of layers: messages name a line of theirs if there is none of the user's.
_LAYERS = ("flax", "equinox", "haiku", "einops")


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """A function's computation.

    Attributes:
      leaves: Value number of each parameter leaf, by name.
      trainable: Names of the leaves that are trained (``nnx.Param``; all of a plain
        parameter tree); the others are statistics.
      inputs: Value numbers of the other arguments' leaves.
      constants: Value numbers of the arrays that the function closed over.
      outputs: Value numbers of the results, ``None`` for scalar literals.
      equations: Primitives in order of execution.
      unread: Value numbers of results of layers that no output depends on. XLA drops
        them, but the model's own code computes them with any widths.
      shapes: Shape of every value, by number.
      origin: Names of the leaves that a value is computed from, for values computed
        from parameter leaves alone (by casts, transposes, a normalisation of the
        weight, a product with a mask…).
      input_names: Path of each of ``inputs`` among the arguments, ``[1]['mask']``.
      output_names: Path of each of ``outputs`` in what the model returns.
      literals: Numbers that are literals in the code, in order, each with its source
        (see :func:`source_line`) and the value number of the first result computed with
        it; then the arrays that the function closed over.
      loops: For each ``scan``, the value numbers of what all of its steps have in
        common or hand on, as seen inside of it.
      dtypes: Type of the numbers of every value, by number.
    """

    leaves: dict[str, int]
    trainable: frozenset[str]
    inputs: tuple[int, ...]
    constants: tuple[int, ...]
    outputs: tuple[int | None, ...]
    equations: tuple[Equation, ...]
    unread: frozenset[int]
    shapes: tuple[tuple[int, ...], ...]
    origin: dict[int, tuple[str, ...]]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    literals: tuple[tuple[Any, Any, int | None], ...] = ()
    loops: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[Any, ...] = ()

    @functools.cached_property
    def uses(self) -> tuple[Layer, ...]:
        """Every use of a kernel, in order of execution; named by :func:`layers`."""
        read = self.leaves, self.origin, self.equations, self.shapes
        return find_layers(*read, self.trainable)

    @functools.cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers in order of execution, each at its first use."""
        return tuple(_layers(self, lambda use: use.kernel))

    @functools.cached_property
    def lookups(self) -> tuple[Lookup, ...]:
        """The look-ups of inputs in tables."""
        read = self.leaves, self.origin, self.equations, self.shapes
        return find_lookups(self.inputs, *read)


def trace(
    model: nnx.Module | linen.Module | Callable[..., Any],
    *inputs: Any,
    params: Any = None,
    plan: Any = None,
    **kwargs: Any,
) -> Trace:
    """Traces a model abstractly; nothing is computed and nothing allocated.

    Args:
      model: Model as in :func:`as_function`.
      *inputs: Example inputs, arrays or ``jax.ShapeDtypeStruct``; other objects
        (``True``, a string) are passed to the model unchanged.
      params: Parameters of a plain function, or variables of a Linen module.
      plan: Plan of the cut if the variables of a Linen module were sliced.
      **kwargs: Keyword arguments of the model, like ``inputs``.

    Returns:
      The computation with all nested calls unfolded.
    """
    return trace_function(as_function(model, params, plan), inputs, kwargs)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses Python's garbage collector.

    A trace makes many small objects that all remain, which it would go through again
    and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@collector_paused()
def trace_function(
    function: Function, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Trace:
    """Traces a pure function of its parameters; see :func:`trace`."""
    arguments, structure = jax.tree.flatten((inputs, dict(kwargs)))
    arrays = [leaf for leaf in arguments if is_array(leaf)]

    def call(leaves: list[Any], arrays: list[Any]) -> Any:
        given = iter(arrays)
        whole = [next(given) if is_array(leaf) else leaf for leaf in arguments]
        inputs, kwargs = jax.tree.unflatten(structure, whole)
        return function.call(jax.tree.unflatten(form, leaves), *inputs, **kwargs)

    # As a flat list: each further pass through a model's state takes time.
    leaves, form = jax.tree.flatten(function.params)
    given = _types(leaves), _types(arrays)
    closed, returned = jax.make_jaxpr(call, return_shape=True)(*given)
    jaxpr = closed.jaxpr
    check_length(jaxpr)
    builder = Builder()
    numbers = [builder.number(var) for var in jaxpr.invars]
    places = dict(zip(function.names, numbers, strict=False))
    constants = [builder.number(var, ()) for var in jaxpr.constvars]
    builder.origin.update({n: (name,) for name, n in places.items()})
    variables = [*jaxpr.invars, *jaxpr.constvars]
    scope: dict[Any, Value] = dict(zip(variables, [*numbers, *constants], strict=True))
    found = builder.unfold(jaxpr, scope)
    outputs = [n if isinstance(n, int) else None for n in found]
    others = tuple(numbers[len(places) :])
    equations, unread = _needed(builder.equations, outputs, builder.origin)
    shapes = tuple(builder.shapes)
    used = {n for eqn in equations for n in eqn.inputs} | set(outputs)
    own = _without_copies(places, function.namesakes, used, shapes)
    origin = _origins(builder.origin, places, own)
    return Trace(
        leaves=own,
        trainable=function.trainable,
        inputs=others,
        constants=tuple(constants) + tuple(builder.constants),
        outputs=tuple(outputs),
        equations=equations,
        unread=unread,
        shapes=shapes,
        origin=origin,
        input_names=_places(inputs, is_array) + _places(dict(kwargs), is_array),
        output_names=_places(returned, lambda _: True),
        literals=(*builder.literals, *((array, None, None) for array in closed.consts)),
        loops=tuple(builder.loops),
        dtypes=tuple(builder.dtypes),
    )


def _types(leaves: list[Any]) -> list[Any]:
    """Returns abstract leaves as JAX's own types, which it takes up much faster.

    A model has few different ones, and JAX asks for the type of each several times.
    """
    known: dict[tuple[Any, ...], Any] = {}
    found = []
    for leaf in leaves:
        if type(leaf) is jax.ShapeDtypeStruct and leaf.sharding is None:
            key = leaf.shape, leaf.dtype, leaf.weak_type
            if key not in known:
                known[key] = jax.typeof(leaf)
            leaf = known[key]
        found.append(leaf)
    return found


def _places(tree: Any, wanted: Callable[[Any], bool]) -> tuple[str, ...]:
    """Returns the path of each wanted leaf of a tree, as Python code."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return tuple(jax.tree_util.keystr(path) for path, leaf in leaves if wanted(leaf))


def _origins(
    origin: Mapping[int, tuple[str, ...] | None],
    leaves: Mapping[str, int],
    own: Mapping[str, int],
) -> dict[int, tuple[str, ...]]:
    """Returns the kept names of the leaves that each value is computed from."""
    if len(own) == len(leaves):
        return {n: names for n, names in origin.items() if names}
    name_of = {value: name for name, value in own.items()}
    renamed = {
        n: tuple(name_of[leaves[name]] for name in names if leaves[name] in name_of)
        for n, names in origin.items()
        if names
    }
    return {n: names for n, names in renamed.items() if names}


def _without_copies(
    leaves: dict[str, int],
    namesakes: Mapping[str, str],
    used: set[int | None],
    shapes: Sequence[tuple[int, ...]],
) -> dict[str, int]:
    """Leaves out copies of parameters that a model holds and never reads.

    A collection with the paths and shapes of the parameters (their moving averages)
    holds such copies. They are cut like the parameter, whose name is the end of theirs.
    If a model reads only the copy, the parameter is left out, and the copy gets its
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
    equations: list[Equation],
    outputs: list[int | None],
    origin: Mapping[int, tuple[str, ...] | None],
) -> tuple[tuple[Equation, ...], frozenset[int]]:
    """Leaves out equations whose results are not used.

    One is a slice of which the model reads only the shape. Values that a loop carries
    from step to step are kept, and so are those that branches depend on, and operations
    of parameters on activations.

    Args:
      equations: All equations.
      outputs: Value numbers of the outputs.
      origin: Leaves that each value is computed from, or None if it depends on inputs.

    Returns:
      The kept equations, and the results among them that no output depends on.
    """

    def leading_to(ends: set[int]) -> set[int]:
        found = set(ends)
        for eqn in reversed(equations):
            if eqn.primitive in LASTING or not found.isdisjoint(eqn.outputs):
                found.update(n for n in eqn.inputs if n is not None)
                found.update(eqn.outputs)
        return found

    read = leading_to({n for n in outputs if n is not None})
    meetings = set()
    for eqn in equations:
        if read.isdisjoint(eqn.outputs):
            kinds = {bool(origin[n]) for n in eqn.inputs if n is not None}
            if len(kinds) == 2:
                meetings.update(eqn.outputs)
    kept = leading_to(read | meetings) if meetings else read
    return (
        tuple(eqn for eqn in equations if not kept.isdisjoint(eqn.outputs)),
        frozenset(kept - read),
    )


def layers(traced: Trace, repeated: bool = False) -> list[Layer]:
    """Lists the convolution and dense layers in order of execution.

    A layer is a product one of whose operands is computed from parameters alone.

    Args:
      traced: Computation of the model.
      repeated: Whether a layer that runs twice is listed twice, or at its first use.
    """
    if repeated:
        return _layers(traced, lambda use: use.equation.outputs)
    return list(traced.layers)


def _layers(traced: Trace, key_of: Callable[[Layer], Any]) -> list[Layer]:
    name_of = layer_names(traced)
    found: dict[Any, Layer] = {}
    for use in traced.uses:
        key = key_of(use)
        # A use with activations says more about a kernel than one with parameters.
        if key not in found or (found[key].inner and not use.inner):
            found[key] = dataclasses.replace(use, name=name_of(use.kernel))
    return list(found.values())


def layer_names(traced: Trace) -> Callable[[str], str]:
    """Returns a function from a leaf's name to that of its layer.

    It is the leaf's without the last part, unless several kernels would have that name,
    as in the tree ``{"layers": {"up": ..., "down": ...}}``.

    Args:
      traced: Computation of the model.
    """
    kernels = {use.kernel for use in traced.uses}
    owners = collections.Counter(layer_name(kernel) for kernel in kernels)

    def name_of(leaf: str) -> str:
        alone = leaf not in kernels or owners[layer_name(leaf)] == 1
        return layer_name(leaf) if alone else leaf

    return name_of


def source_line(source: Any) -> str:
    """Returns the user's line that an equation comes from, as ``model.py:31``.

    Args:
      source: Source of an equation, :attr:`Equation.source`.

    Returns:
      The innermost line of the model that is not in JAX, in this package or in a
      library of layers; otherwise the innermost line of such a library other than Flax;
      otherwise ``""``.
    """
    return next(source_lines(source), "")


def source_lines(source: Any) -> Iterator[str]:
    """Yields all such lines that an equation comes from, the innermost first."""
    traceback = getattr(source, "traceback", None)
    library = []
    for frame in traceback.frames if traceback is not None else ():
        name = frame.file_name
        if name == __file__:  # frames further out called the model
            break
        owner = _owner(name)
        if owner is None:
            yield f"{os.path.basename(name)}:{frame.line_num}"
        elif owner not in ("jax", "flax", ""):
            library.append(f"{os.path.basename(name)}:{frame.line_num}")
    yield from library


def lines_of_error(error: BaseException) -> Iterator[str]:
    """Yields the user's lines that an error came through, the innermost first."""
    library = []
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = frame.f_code.co_filename
        if name == __file__:  # frames further out called the model
            break
        owner = _owner(name)
        line = f"{pathlib.Path(name).name}:{number}"
        if owner is None:
            yield line
        elif owner not in ("jax", "jaxlib", "flax", ""):
            library.append(line)
    yield from library


def raised_in(error: BaseException, package: str) -> bool:
    """Reports whether an error was raised by code of a package."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(
        frame.f_globals.get("__name__", "").partition(".")[0] == package
        for frame in frames[-2:]
    )


# Frames of these packages are never the user's; the networks of `models` are.
_TRACERS = tuple(
    f"{pathlib.Path(__file__).parents[1] / name}{os.sep}"
    for name in ("graph", "pruning")
)


@functools.cache
def _owner(file_name: str) -> str | None:
    """Returns the library of a file, ``""`` for this one, None for the user's.

    Names of folders are compared in full: ``site-packages/jaxfoo`` is not JAX.
    """
    if file_name.startswith("<"):
        return ""
    if file_name.startswith(_TRACERS):
        return ""
    for name, folder in _folders().items():
        if file_name.startswith(folder + os.sep):
            return name
    return None


@functools.cache
def _folders() -> dict[str, str]:
    """Returns where JAX and the libraries of layers are installed."""
    found = {}
    for name in ("jax", "jaxlib", *_LAYERS):
        spec = importlib.util.find_spec(name)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found[name] = folder
    return found
