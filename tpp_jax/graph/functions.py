"""Models of NNX, of Linen and plain functions as pure functions of their parameters."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.nnx.nn import dtypes
from jax.core import Tracer

from tpp_jax.errors import TPPTypeError
from tpp_jax.graph.linen import linen_apply
from tpp_jax.graph.naming import leaf_name
from tpp_jax.graph.nnx_layers import modules


@dataclasses.dataclass(frozen=True)
class Function:
    """A model as a pure function of its parameters.

    Attributes:
      call: Function ``call(params, *inputs, **kwargs)``.
      params: Tree of parameter arrays. Anything else that the user's tree holds (the
        activation functions and settings of an Equinox module) is part of ``call`` and
        None here.
      names: Dotted name of every leaf of ``params``, in order; each is unique.
      trainable: Names of the leaves that are trained.
      namesakes: Name of a leaf of a Linen collection (``ema.layer.kernel``) → name of
        the leaf that has the same path in another collection (``layer.kernel``).
      graphdef: Structure of an NNX module; None for other models.
    """

    call: Callable[..., Any]
    params: Any
    names: tuple[str, ...]
    trainable: frozenset[str]
    namesakes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    graphdef: nnx.GraphDef | None = None


def as_function(
    model: nnx.Module | linen.Module | Callable[..., Any],
    params: Any = None,
    plan: Any = None,
) -> Function:
    """Splits a model into a pure function and its parameter tree.

    Args:
      model: NNX module, which is not modified and runs in evaluation mode; Linen
        module; or function ``fn(params, *inputs)``.
      params: Parameter pytree of the function (arrays or ``jax.ShapeDtypeStruct``), or
        variables of the Linen module.
      plan: Plan by which the variables of a Linen module were sliced.

    Returns:
      The function, its parameters and their names.

    Raises:
      TPPTypeError: The model is none of these, or an ``nnx.bridge.Module``, which holds
        no arrays; a function comes without ``params`` or with a bare array, which has
        no name.
    """
    if isinstance(model, nnx.Module):
        check_module(model, params)
        return _nnx_function(model)
    if not callable(model):
        raise TPPTypeError(f"expected a Flax module or a function, got {type(model)}")
    if params is None:
        what = "Linen module needs its variables"
        if not isinstance(model, linen.Module):
            what = "plain function needs its parameters"
        raise TPPTypeError(f"a {what}: pass params=tree")
    if isinstance(model, linen.Module):
        trained = frozenset(_names(params.get("params", {})))
        names, namesakes = _without_collections(_names(params))
        return Function(linen_apply(model, plan), params, names, trained, namesakes)
    arrays, call = apart(model, params)
    names = _names(arrays)
    if "" in names:
        raise TPPTypeError(
            "the parameters are a bare array, which has no name: put it in a dict"
        )
    return Function(call, arrays, names, frozenset(names))


def check_module(model: nnx.Module, params: Any) -> None:
    """Refuses an NNX module that holds no arrays, or that comes with others."""
    if isinstance(model, nnx.bridge.Module):
        raise TPPTypeError(
            f"{type(model).__name__} is an nnx.bridge.Module, which holds no arrays: "
            "pass the function lambda variables, *inputs: model.apply(variables, "
            "*inputs) in its place, and params=variables"
        )
    if params is not None:
        raise TPPTypeError("an NNX module holds its parameters: leave params out")


def _nnx_function(model: nnx.Module) -> Function:
    try:
        graphdef, state = nnx.split(model, graph=False)
    except (TypeError, ValueError):  # parts of it are shared
        graphdef, state = nnx.split(model, graph=True)
    variables = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    names = _names(state)
    if len(names) == len(variables):  # one array in each variable
        pairs = zip(names, variables, strict=True)
        trained = [n for n, (_, one) in pairs if isinstance(one, nnx.Param)]
    else:
        trained = _names(nnx.filter_state(state, nnx.Param))

    def call(state: Any, *inputs: Any, **kwargs: Any) -> Any:
        merged = nnx.merge(graphdef, state)
        set_evaluation(merged)
        return merged(*inputs, **kwargs)

    return Function(call, state, names, frozenset(trained), graphdef=graphdef)


@dataclasses.dataclass(frozen=True)
class Structure:
    """The structure of an NNX module, compared by content.

    Attributes:
      form: Structure of the module as a pytree; that of its state if it has a graph.
      graphdef: Graph of a module with shared parts, None for others.
    """

    form: Any
    graphdef: nnx.GraphDef | None = None

    def call(
        self, adapt: Callable[[list[tuple[str, nnx.Module]]], None] | None = None
    ) -> Callable[..., Any]:
        """Returns ``call(leaves, *inputs, **kwargs)``, in evaluation mode.

        Args:
          adapt: Function that changes the modules, which it gets with their paths, in
            place before the outermost one runs.
        """

        def call(leaves: list[Any], *inputs: Any, **kwargs: Any) -> Any:
            merged = self.merge(leaves)
            found = list(modules(merged))
            if adapt is not None:
                adapt(found)
            if any(_has_own_eval(type(module)) for _, module in found):
                found = modules(merged)  # it may replace modules
            for _, module in found:
                _evaluate(module)
                _skip_promotion(module)
            return merged(*inputs, **kwargs)

        return call

    def merge(self, leaves: list[Any]) -> nnx.Module:
        """Returns the module with these arrays."""
        tree = jax.tree.unflatten(self.form, leaves)
        return tree if self.graphdef is None else nnx.merge(self.graphdef, tree)


def split_module(model: nnx.Module) -> tuple[Structure, Function]:
    """Splits a module into its structure and a function of a flat list of its arrays.

    A module without shared parts is split as a pytree, which takes a third of the time
    that NNX's own functions take.
    """
    met: list[nnx.Variable] = []

    def note(node: Any) -> bool:
        if _is_variable(type(node)):
            met.append(node)
        return False

    try:
        found, form = jax.tree_util.tree_flatten_with_path(model, is_leaf=note)
    except (TypeError, ValueError):  # its keys have no order
        found, form = [], None
    if len(found) == len({id(one) for one in met}) == len(met) and all(
        isinstance(leaf, _ARRAYS) for _, leaf in found
    ):
        names = tuple(leaf_name(path) for path, _ in found)
        pairs = zip(names, met, strict=True)
        trained = frozenset(n for n, one in pairs if isinstance(one, nnx.Param))
        structure, leaves = Structure(form), [leaf for _, leaf in found]
    else:
        function = _nnx_function(model)
        leaves, form = jax.tree.flatten(function.params)
        structure = Structure(form, function.graphdef)
        names, trained = function.names, function.trainable
    return structure, Function(structure.call(), leaves, names, trained)


_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


@functools.cache
def _is_variable(of: type) -> bool:
    return issubclass(of, nnx.Variable)


def apart(
    function: Callable[..., Any],
    tree: Any,
    adapt: Callable[[Any], Any] | None = None,
) -> tuple[Any, Callable[..., Any]]:
    """Separates the arrays of a parameter tree from its other leaves.

    Args:
      function: Function ``function(tree, *inputs, **kwargs)``.
      tree: First argument of the function.
      adapt: Function that changes the recombined tree before ``function`` is called.

    Returns:
      The tree with None in place of every leaf that is not an array, and a function of
      such a tree.
    """
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf if is_array(leaf) else None for leaf in leaves]

    def call(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        given = iter(jax.tree.leaves(params))
        combined = [next(given) if is_array(leaf) else leaf for leaf in leaves]
        tree = jax.tree.unflatten(structure, combined)
        return function(adapt(tree) if adapt else tree, *inputs, **kwargs)

    return jax.tree.unflatten(structure, arrays), call


def set_evaluation(model: nnx.Module) -> None:
    """Does the same as ``model.eval()``, faster: see :func:`nnx_layers.modules`."""
    for _, module in modules(model):
        _evaluate(module)


@functools.cache
def _has_own_eval(of: type[nnx.Module]) -> bool:
    return of.eval is not nnx.Module.eval


def _evaluate(module: nnx.Module) -> None:
    if _has_own_eval(type(module)):
        module.eval()
    own = vars(module)
    for name in ("deterministic", "use_running_average"):
        if name in own:  # it remains a bool, so NNX's checks can be skipped
            own[name] = True
        elif hasattr(module, name):
            setattr(module, name, True)


def _skip_promotion(module: nnx.Module) -> None:
    """Has a layer of Flax convert its arrays only if their types differ.

    What Flax calls without this takes a tenth of the time to trace a network.
    """
    own = vars(module)
    if own.get("promote_dtype") is dtypes.promote_dtype:
        own["promote_dtype"] = _promoted


def _promoted(
    arrays: tuple[Any, ...], /, *, dtype: Any = None, inexact: bool = True
) -> tuple[Any, ...]:
    """Does the same as Flax's ``promote_dtype``."""
    given = [one for one in arrays if one is not None]
    if given and all(isinstance(one, Tracer) for one in given):
        types = {(one.dtype, one.weak_type) for one in given}
        own = given[0].dtype
        numbers = not inexact or jnp.issubdtype(own, jnp.inexact)
        if types == {(own, False)} and dtype in (None, own) and numbers:
            return arrays
    return dtypes.promote_dtype(arrays, dtype=dtype, inexact=inexact)


def _names(tree: Any) -> tuple[str, ...]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return tuple(leaf_name(path) for path, _ in paths)


def _without_collections(
    names: tuple[str, ...],
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Removes the collection from the names of a Linen module's variables.

    An optimizer gets the parameters without their collection. If several collections
    have the same path, one leaf (the parameter, if there is one) is named by the path,
    and the others keep their full names.

    Returns:
      The names, and a mapping from each full name among them to the name of the leaf
      that has the same path.
    """
    rank = {"params": 0, "batch_stats": 1}
    own: dict[str, str] = {}
    for name in sorted(names, key=lambda name: rank.get(name.partition(".")[0], 2)):
        own.setdefault(name.partition(".")[2], name)
    paths = [name.partition(".")[2] for name in names]
    unique = [
        path if own[path] == name else name
        for name, path in zip(names, paths, strict=True)
    ]
    namesakes = {
        name: path for name, path in zip(unique, paths, strict=True) if name != path
    }
    return tuple(unique), namesakes


def is_array(leaf: Any) -> bool:
    """Reports whether a leaf is an array; other leaves (``True``) are settings."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
