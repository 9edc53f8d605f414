"""Models as pure functions of their parameters: NNX, Linen and plain ones alike."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from flax import linen, nnx

from tpp_jax.errors import TPPError
from tpp_jax.pruning.linen import linen_apply
from tpp_jax.pruning.naming import leaf_name
from tpp_jax.pruning.nnx_layers import modules


class Function(NamedTuple):
    """A model as a pure function of its parameters.

    Attributes:
      call: ``call(params, *inputs)``.
      params: the parameter tree.
      names: the dotted name of every leaf of ``params``, in order; each is unique.
      trainable: names of the leaves that are trained.
      namesakes: name of a leaf of a Linen collection (``ema.layer.kernel``) → name of
        the leaf that has the same path in another one (``layer.kernel``).
    """

    call: Callable[..., Any]
    params: Any
    names: tuple[str, ...]
    trainable: frozenset[str]
    namesakes: Mapping[str, str] = MappingProxyType({})


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
      TypeError: a function without ``params`` or with a bare array, which has no name,
        or an object that is neither.
      TPPError: an ``nnx.bridge.Module``, which is in between.
    """
    if isinstance(model, nnx.bridge.Module):
        raise TPPError(
            f"{type(model).__name__} is an nnx.bridge.Module, which holds no arrays: "
            "pass the function lambda variables, *inputs: model.apply(variables, "
            "*inputs) in its place, and params=variables"
        )
    if isinstance(model, nnx.Module):
        graphdef, state = nnx.split(model)

        def call(state: Any, *inputs: Any) -> Any:
            merged = nnx.merge(graphdef, state)
            set_evaluation(merged)
            return merged(*inputs)

        trained = frozenset(_names(nnx.filter_state(state, nnx.Param)))
        return Function(call, state, _names(state), trained)
    if not callable(model):
        raise TypeError(f"expected a Flax module or a function, got {type(model)}")
    if params is None:
        what = "Linen module needs its variables"
        if not isinstance(model, linen.Module):
            what = "plain function needs its parameters"
        raise TypeError(f"a {what}: pass params=tree")
    names = _names(params)
    if "" in names:
        raise TypeError("the parameters are a bare array: put it in a dict, for a name")
    if isinstance(model, linen.Module):
        trained = frozenset(_names(params.get("params", {})))
        names, namesakes = _without_collections(names)
        return Function(linen_apply(model, plan), params, names, trained, namesakes)
    return Function(model, params, names, frozenset(names))


def set_evaluation(model: nnx.Module) -> None:
    """Does what ``model.eval()`` does, faster: see :func:`nnx_layers.modules`."""
    for _, module in modules(model):
        if type(module).eval is not nnx.Module.eval:
            module.eval()
        for name in ("deterministic", "use_running_average"):
            if hasattr(module, name):
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
    """Tells whether an argument is traced; others (``True``, ``None``) are settings."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
