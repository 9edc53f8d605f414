"""Equinox modules as modules of Flax NNX, for runs."""

import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from tpp_jax.errors import TPPError
from tpp_jax.graph.fields import Skeleton


def is_equinox(module: Any) -> bool:
    """Reports whether an object is an Equinox module; does not import Equinox."""
    equinox = sys.modules.get("equinox")
    return equinox is not None and isinstance(module, equinox.Module)


class EquinoxModel(nnx.Module):
    """An Equinox module of one example, applied to a batch, in the two modes of NNX.

    Args:
      module: Equinox module, which maps one example; a ``key`` is passed in training if
        its ``__call__`` has one.
      rngs: Random streams for these keys.

    Attributes:
      net: Arrays, nested like the module; those of floating point are parameters.
      deterministic: Whether dropout is off.

    Raises:
      TPPError: If the module keeps a state.
    """

    def __init__(self, module: Any, *, rngs: nnx.Rngs) -> None:
        equinox: Any = sys.modules["equinox"]
        if any(isinstance(x, equinox.nn.StateIndex) for x in _parts(module)):
            raise TPPError(
                f"{type(module).__name__} keeps a state (a batch norm, say), which a "
                "run does not pass on: use a module without one, or a loop of your own"
            )
        arrays: dict[str, Any] = {}

        def take(value: Any, place: str) -> Any:
            if not isinstance(value, jax.Array | np.ndarray):
                return value
            floating = jnp.issubdtype(value.dtype, jnp.inexact)
            kind = nnx.Param if floating else nnx.Variable
            _put(arrays, place, kind(jnp.asarray(value)))
            return None

        self._skeleton = Skeleton(_rebuilt(module, take), "net")
        self.net = nnx.data(arrays)
        takes_key = "key" in inspect.signature(type(module).__call__).parameters
        self.rngs = rngs.fork() if takes_key else None
        self.deterministic = False

    def __call__(self, *inputs: Array) -> Any:
        """Applies the module to a batch."""
        equinox: Any = sys.modules["equinox"]
        module = equinox.nn.inference_mode(self.module(), self.deterministic)
        if self.rngs is None or self.deterministic:
            return jax.vmap(module)(*inputs)
        keys = jax.random.split(self.rngs(), len(inputs[0]))
        return jax.vmap(lambda key, *x: module(*x, key=key))(keys, *inputs)

    def module(self) -> Any:
        """Returns the Equinox module, with the current arrays."""

        def give(value: Any, place: str) -> Any:
            array = _get(self.net, place)
            return value if array is None else array[...]

        return _rebuilt(self._skeleton.tree, give)

    @property
    def name(self) -> str:
        """Name of the module's class."""
        return type(self._skeleton.tree).__name__


def _rebuilt(node: Any, change: Callable[[Any, str], Any], place: str = "") -> Any:
    """Returns a module whose leaves a function of their values and places changed."""

    def at(name: Any) -> str:
        return f"{place}.{name}" if place else str(name)

    if is_equinox(node):
        new = copy.copy(node)
        for field in dataclasses.fields(node):
            value = _rebuilt(getattr(node, field.name), change, at(field.name))
            object.__setattr__(new, field.name, value)
        return new
    if isinstance(node, dict):
        return {key: _rebuilt(value, change, at(key)) for key, value in node.items()}
    if type(node) in (list, tuple):
        return type(node)(_rebuilt(x, change, at(i)) for i, x in enumerate(node))
    return change(node, place)


def _parts(module: Any) -> list[Any]:
    """Returns a module and all that is in it."""
    found = [module]
    inner: list[Any] = []
    if is_equinox(module):
        inner = [getattr(module, field.name) for field in dataclasses.fields(module)]
    elif isinstance(module, dict):
        inner = list(module.values())
    elif type(module) in (list, tuple):
        inner = list(module)
    return found + [part for value in inner for part in _parts(value)]


def _put(tree: dict[str, Any], place: str, value: Any) -> None:
    *folders, name = place.split(".")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[name] = value


def _get(tree: Any, place: str) -> Any:
    for name in place.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return None
        tree = tree[name]
    return None if isinstance(tree, dict) else tree
