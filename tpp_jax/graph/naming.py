"""Dotted names of pytree leaves: ``layer1.0.conv1.kernel``.

The names have the form that PyTorch users know, so that patterns written for PyTorch's
models also match here. They are the only link between a plan and the trees that it is
applied to.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey


def leaf_name(path: tuple[Any, ...]) -> str:
    """Returns the dotted name of a key path as given by ``jax.tree_util``.

    Flax NNX keeps an array inside a variable, whose key path ends in ``.value``. This
    last key is left out, so that an ``nnx.State``, its pure dict and a flat dict with
    dotted keys all give the same names.

    Args:
      path: Key path, a tuple of ``jax.tree_util`` keys.

    Returns:
      The name; ``""`` for the path of a bare leaf.

    Example:
      >>> import jax
      >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"a": [1]})
      >>> leaf_name(path)
      'a.0'
    """
    if path and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return ".".join(_key_name(key) for key in path)


def _key_name(key: Any) -> str:
    match key:
        case SequenceKey(idx=idx):
            return str(idx)
        case DictKey(key=tuple(parts)):  # from flax.traverse_util.flatten_dict
            return ".".join(map(str, parts))
        case DictKey(key=name) | FlattenedIndexKey(key=name):
            return str(name)
        case GetAttrKey(name=name):
            return name
        case _:
            return str(key)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree by dotted name, in the tree's own order."""
    return {
        leaf_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps ``fn(name, leaf, *rest_leaves)`` over pytrees of the same structure."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: fn(leaf_name(path), *leaves), tree, *rest
    )


def layer_name(leaf: str) -> str:
    """Returns the name of a leaf's layer: the leaf's name without its last part.

    A leaf at the root of the tree (``w1`` in a plain dict) is its own layer.

    Example:
      >>> layer_name("layer1.0.conv1.kernel"), layer_name("w1")
      ('layer1.0.conv1', 'w1')
    """
    return leaf.rpartition(".")[0] or leaf


def longest_known_suffix(name: str, known: Iterable[str]) -> str | None:
    """Returns the longest dotted suffix of ``name`` that is in ``known``, or None.

    An optimizer nests copies of the parameters in its own state
    (``0.trace.layer1.0.conv1.kernel``); the longest suffix names the parameter.
    ``known`` must contain *all* parameters, including those that are not pruned, so
    that ``layer1.0.conv1.kernel`` is not mistaken for a pruned ``conv1.kernel``.

    A key that is itself a path (``params/conv1/kernel``, as from
    ``flax.traverse_util.flatten_dict(tree, sep="/")``) is read as that path, unless the
    name of a parameter contains such a key.
    """
    found = _longest_suffix(name, known)
    if found is None and "/" in name:
        found = _longest_suffix(name.replace("/", "."), known)
        if found is None:
            plain = {one.replace("/", "."): one for one in known if "/" in one}
            found = plain.get(_longest_suffix(name.replace("/", "."), plain) or "")
    return found


def _longest_suffix(name: str, known: Iterable[str]) -> str | None:
    while name:
        if name in known:
            return name
        name = name.partition(".")[2]
    return None


def some(names: Iterable[str], most: int = 5) -> str:
    """Returns the first few names as text, for a message.

    Example:
      >>> some(["a", "b", "c"], most=2)
      'a, b and 1 more'
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
