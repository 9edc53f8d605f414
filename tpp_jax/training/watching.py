"""Outputs of the layers inside a network, kept while a computation is traced."""

import fnmatch
from collections.abc import Iterator
from typing import Any

from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.graph.nnx_layers import modules
from tpp_jax.xla.blocks import Blocks

Outputs = dict[str, list[Any]]
"""Outputs of each call of a layer, by the layer's name."""


def watch(model: nnx.Module, patterns: str) -> Outputs:
    """Makes layers of a network keep what they return.

    Changes the network in place, so apply it to the copy inside a compiled step, whose
    outputs are values of that trace. Long sequences of blocks are not rolled any more.

    Args:
      model: Network.
      patterns: Patterns of layer names, separated by commas; empty for none.

    Returns:
      An entry for each chosen layer, to which each call of the layer appends.

    Raises:
      TPPError: If a pattern chooses no layer.
    """
    inside = {name: module for name, module in modules(model) if callable(module)}
    names = [name for name in inside if name]
    outputs: Outputs = {}
    for pattern in filter(None, map(str.strip, patterns.split(","))):
        chosen = fnmatch.filter(names, pattern)
        if not chosen:
            raise TPPError(
                f"the pattern {pattern!r} of activations chooses no layer of this "
                f"{type(model).__name__}; it has {', '.join(names[:5])}, …"
            )
        outputs |= {name: [] for name in chosen}
    for name, kept in outputs.items():
        _keep_outputs(inside[name], kept)
    for module in inside.values():
        if outputs and isinstance(module, Blocks):
            module.rolled_from = None  # a value inside a loop cannot be kept
    return outputs


def _keep_outputs(module: Any, kept: list[Any]) -> None:
    kind = type(module)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.__call__(self, *args, **kwargs)
        kept.append(result)
        return result

    # Python looks up __call__ in the class.
    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def pairs(ours: Outputs, theirs: Outputs) -> Iterator[tuple[str, Any, Any]]:
    """Yields the outputs of the same calls in two networks, with the layer's name.

    Args:
      ours: Outputs of a network.
      theirs: Outputs of another one, for the same inputs.

    Raises:
      TPPError: If their shapes differ, as behind a cut, or their numbers.
    """
    for name, kept in ours.items():
        if len(kept) != len(theirs[name]):
            raise TPPError(
                f"{name} is called {len(kept)} times in one network and "
                f"{len(theirs[name])} times in the other: choose other activations"
            )
        for mine, other in zip(kept, theirs[name], strict=True):
            shapes = [getattr(x, "shape", None) for x in (mine, other)]
            if None in shapes or shapes[0] != shapes[1]:
                raise TPPError(
                    f"the outputs of {name} have the shapes {shapes[0]} and "
                    f"{shapes[1]} in the pruned and the dense network: choose layers "
                    "whose outputs keep all channels"
                )
            yield name, mine, other
