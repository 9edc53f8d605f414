"""Models as pure functions of their parameters: NNX, Linen and plain ones alike."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen, nnx

from tpp_jax.errors import TPPTypeError
from tpp_jax.graph.linen import linen_apply
from tpp_jax.graph.naming import leaf_name
from tpp_jax.graph.nnx_layers import modules


@dataclasses.dataclass(frozen=True)
class Function:
    """A model as a pure function of its parameters.

    Attributes:
      call: ``call(params, *inputs, **kwargs)``.
      params: the tree of parameter arrays. Whatever else the user's tree holds (the
        activation functions and settings of an Equinox module) is part of ``call``, and
        None here.
      names: the dotted name of every leaf of ``params``, in order; each is unique.
      trainable: names of the leaves that are trained.
      namesakes: name of a leaf of a Linen collection (``ema.layer.kernel``) → name of
        the leaf that has the same path in another one (``layer.kernel``).
      graphdef: of an NNX module, its structure.
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
      model: an NNX module, which is left untouched and run in evaluation mode; a Linen
        module; or a function ``fn(params, *inputs)``.
      params: the function's parameter pytree (arrays or ``jax.ShapeDtypeStruct``), or
        the Linen module's variables.
      plan: the plan by which a Linen module's variables were sliced.

    Raises:
      TPPTypeError: a function without ``params`` or with a bare array, which has no
        name, or an object that is neither; an ``nnx.bridge.Module``, which is in
        between.
    """
    if isinstance(model, nnx.bridge.Module):
        raise TPPTypeError(
            f"{type(model).__name__} is an nnx.bridge.Module, which holds no arrays: "
            "pass the function lambda variables, *inputs: model.apply(variables, "
            "*inputs) in its place, and params=variables"
        )
    if isinstance(model, nnx.Module):
        if params is not None:
            raise TPPTypeError("an NNX module holds its parameters: leave params out")
        graphdef, state = nnx.split(model)
        call = merged_call(graphdef)
        variables = jax.tree_util.tree_leaves_with_path(
            state, is_leaf=lambda node: isinstance(node, nnx.Variable)
        )
        names = _names(state)
        if len(names) == len(variables):  # one array each
            pairs = zip(names, variables, strict=True)
            trained = [n for n, (_, one) in pairs if isinstance(one, nnx.Param)]
        else:
            trained = _names(nnx.filter_state(state, nnx.Param))
        return Function(call, state, names, frozenset(trained), graphdef=graphdef)
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
            "the parameters are a bare array: put it in a dict, for a name"
        )
    return Function(call, arrays, names, frozenset(names))


def merged_call(
    graphdef: nnx.GraphDef, adapt: Callable[[nnx.Module], None] | None = None
) -> Callable[..., Any]:
    """Returns ``call(state, *inputs, **kwargs)``, in evaluation mode.

    Args:
      graphdef: the module's structure.
      adapt: called with the module before it runs, to change it in place.
    """

    def call(state: Any, *inputs: Any, **kwargs: Any) -> Any:
        merged = nnx.merge(graphdef, state)
        if adapt is not None:
            adapt(merged)
        set_evaluation(merged)
        return merged(*inputs, **kwargs)

    return call


def apart(
    function: Callable[..., Any],
    tree: Any,
    adapt: Callable[[Any], Any] | None = None,
) -> tuple[Any, Callable[..., Any]]:
    """Separates the arrays of a parameter tree from what else it holds.

    Args:
      function: ``function(tree, *inputs, **kwargs)``.
      tree: its first argument.
      adapt: called with the tree put together again, before the function is.

    Returns:
      The tree with None in place of everything that is not an array, and a function of
      such a tree.
    """
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf if is_array(leaf) else None for leaf in leaves]

    def call(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        given = iter(jax.tree.leaves(params))
        whole = [next(given) if is_array(leaf) else leaf for leaf in leaves]
        tree = jax.tree.unflatten(structure, whole)
        return function(adapt(tree) if adapt else tree, *inputs, **kwargs)

    return jax.tree.unflatten(structure, arrays), call


def set_evaluation(model: nnx.Module) -> None:
    """Does what ``model.eval()`` does, faster: see :func:`nnx_layers.modules`."""
    for _, module in modules(model):
        if type(module).eval is not nnx.Module.eval:
            module.eval()
        own = vars(module)
        for name in ("deterministic", "use_running_average"):
            if name in own:  # a setting as before: NNX need not look at it
                own[name] = True
            elif hasattr(module, name):
                setattr(module, name, True)


def _names(tree: Any) -> tuple[str, ...]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return tuple(leaf_name(path) for path, _ in paths)


def _without_collections(
    names: tuple[str, ...],
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Takes the collections off the names of a Linen module's variables.

    An optimizer sees the parameters alone. Where a path is found in several
    collections, one leaf has the path as its name, that of a parameter if there is one,
    and the others keep their full names.

    Returns:
      The names, and the full ones of these → the name that the same path has.
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
    """Reports whether a leaf is traced; others (``True``, a function) are settings."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
