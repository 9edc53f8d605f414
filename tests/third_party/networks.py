"""Networks that nobody of this project wrote: their registry.

Each network is one small function that builds a model of a package from PyPI, with
small sizes and random weights, and says how it is called. The functions are in files by
framework: ``nnx_networks``, ``linen_networks``, ``function_networks``.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Network:
    """A model and how it is called.

    Attributes:
      model: NNX module, Linen module or function ``fn(params, *inputs)``.
      inputs: Example inputs, concrete.
      params: Variables of a Linen module or parameters of a function.
      kwargs: Keyword arguments of the call.
      context: Makes the context that the model wants to be traced in.
    """

    model: Any
    inputs: tuple[Any, ...]
    params: Any = None
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    context: Callable[[], Any] = contextlib.nullcontext


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered network.

    Attributes:
      package: Name of the package on PyPI.
      module: Name of the module that is imported from it.
      name: Name of the network, unique in its package.
      build: Makes the network.
      heads: Patterns of the names of its groups of attention heads whose number is an
        attribute, or follows the arrays: they must be prunable.
      refused: Part of the reason why these heads cannot be pruned; empty if they can.
      narrows: Whether ``build(2)`` makes the same network of half the width, with as
        many heads, by its package's own code: what half of all channels cut, but of
        these heads, must come to.
    """

    package: str
    module: str
    name: str
    build: Callable[..., Network]
    heads: tuple[str, ...] = ()
    refused: str = ""
    narrows: bool = False

    def __str__(self) -> str:
        return f"{self.package}:{self.name}"

    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


NETWORKS: list[Entry] = []


def network(
    package: str,
    module: str | None = None,
    *,
    heads: tuple[str, ...] = (),
    refused: str = "",
    narrows: bool = False,
) -> Callable[[Callable[..., Network]], Callable[..., Network]]:
    """Registers the function that it decorates; its name is the network's."""

    def register(build: Callable[..., Network]) -> Callable[..., Network]:
        where, name = module or package.replace("-", "_"), build.__name__.rstrip("_")
        entry = Entry(package, where, name, build, heads, refused, narrows)
        NETWORKS.append(entry)
        return build

    return register


def images(*shape: int) -> jax.Array:
    """Draws floating-point inputs of a shape."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def tokens(*shape: int, vocabulary: int) -> jax.Array:
    """Draws token numbers of a shape."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(vocabulary, size=shape).astype(np.int32))
