"""Conversion of the leaves of any pytree to arrays that Orbax can save, and back.

Orbax saves arrays of numbers. Other leaves (a typed PRNG key, an empty array, text, a
Python number) are described by a *note* in JSON; together with the saved array it
suffices to restore the leaf.
"""

import collections
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers the names of its types with NumPy)
import numpy as np
from flax.core import FrozenDict
from jax.core import Tracer

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import Shardings, is_divided, placed, sharding_for
from tpp_jax.graph.naming import leaf_name

Note = dict[str, Any]

_NATIVE = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16", "complex64", "complex128"),
}
_CONSTANTS = {"bool": bool, "int": int, "float": float, "str": str}


def unique_names(tree: Any) -> list[str]:
    """Returns a unique name for every leaf of a tree, in order.

    It is the dotted name, followed by the position in the tree if two leaves share the
    name (``{"a": {"b": …}, "a.b": …}``).

    Args:
      tree: Any pytree.
    """
    paths = jax.tree_util.tree_leaves_with_path(tree)
    names = [leaf_name(path) for path, _ in paths]
    seen: set[str] = set()
    twice = {name for name in names if name in seen or seen.add(name)}
    return [f"{n} [leaf {i}]" if n in twice else n for i, n in enumerate(names)]


def encode(leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Note]]:
    """Returns the arrays to save, on the host, and a note of each leaf that needs one.

    Arrays that devices hold in parts remain where they are.

    Args:
      leaves: Leaves by name.

    Raises:
      TPPError: If a leaf is abstract, traced or deleted, or is not data.
    """
    notes: dict[str, Note] = {}
    on_device: dict[str, jax.Array] = {}
    arrays: dict[str, Any] = {}
    for name, leaf in leaves.items():
        _check_concrete(name, leaf)
        if isinstance(leaf, jax.Array):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                notes[name] = {"key": str(jax.random.key_impl(leaf))}
                leaf = jax.random.key_data(leaf)
            if is_divided(leaf) and leaf.dtype.name in _NATIVE:
                arrays[name] = leaf
            else:
                on_device[name] = leaf
        elif isinstance(leaf, np.ndarray | np.generic) and _is_data(leaf.dtype):
            notes[name] = {"numpy": "array" if isinstance(leaf, np.ndarray) else "one"}
            arrays[name] = np.asarray(leaf)
        else:
            notes[name] = _note_of_constant(name, leaf)
    arrays |= jax.device_get(on_device)
    for name, array in list(arrays.items()):
        dtype = array.dtype
        if is_divided(array):
            continue
        if dtype.name not in _NATIVE or not dtype.isnative or not array.size:
            as_bytes = {"dtype": _text_of(dtype), "shape": list(array.shape)}
            notes[name] = {**notes.get(name, {}), **as_bytes}
            arrays[name] = np.frombuffer(array.tobytes() or b"\0", np.uint8)
    return arrays, notes


def decode(
    arrays: Mapping[str, Any],
    notes: Mapping[str, Note],
    *,
    exact: bool = True,
    shardings: Shardings | None = None,
) -> dict[str, Any]:
    """Returns the leaves that were saved, by name; a function is an :class:`Other`.

    Args:
      arrays: Arrays that were read, by name.
      notes: Notes from :func:`encode`.
      exact: Whether a type that JAX does not support in its current configuration is an
        error; otherwise the numbers are rounded.
      shardings: Shardings of JAX arrays; None for the default device.

    Raises:
      TPPError: If a leaf cannot be restored: it has 64 bits without
        ``jax.enable_x64``, or is a PRNG key of an unknown implementation; or a sharding
        does not fit.
    """
    names = [*arrays, *(name for name in notes if name not in arrays)]
    return {
        name: _decoded(name, arrays.get(name), notes.get(name, {}), exact, shardings)
        for name in names
    }


class Other:
    """A placeholder for a saved leaf that is not data, such as a function.

    Args:
      type_name: Name of the leaf's type.
    """

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name


def shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Returns the shape of a leaf and its dtype, or Python type, as text.

    Args:
      leaf: Leaf of a tree.
    """
    if isinstance(leaf, Other):
        return (), leaf.type_name
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return tuple(leaf.shape), str(leaf.dtype)
    return (), type(leaf).__name__


def _check_concrete(name: str, leaf: Any) -> None:
    problem = None
    if isinstance(leaf, jax.ShapeDtypeStruct):
        problem = "abstract: it has a shape but no numbers"
    elif isinstance(leaf, Tracer):
        problem = "traced: save_model cannot be called inside jit"
    elif isinstance(leaf, jax.Array) and leaf.is_deleted():
        problem = "deleted: it was donated to a compiled function"
    if problem:
        raise TPPError(f"{name or 'the array'} cannot be saved, since it is {problem}")


def _note_of_constant(name: str, leaf: Any) -> Note:
    if isinstance(leaf, complex):
        return {"constant": "complex", "value": [leaf.real, leaf.imag]}
    type_name = type(leaf).__name__
    if _CONSTANTS.get(type_name) is type(leaf):
        return {"constant": type_name, "value": leaf}
    if callable(leaf):
        return {"other": type_name}
    raise TPPError(
        f"{name or 'the tree'} cannot be saved, since it is a {type_name}: only "
        "arrays, numbers and text can be"
    )


def _decoded(
    name: str, array: Any, note: Note, exact: bool, shardings: Shardings | None
) -> Any:
    if "constant" in note:
        value = note["value"]
        return complex(*value) if note["constant"] == "complex" else value
    if "other" in note:
        return Other(note["other"])
    if "shape" in note:
        dtype, shape = np.dtype(note["dtype"]), tuple(note["shape"])
        content = np.asarray(array).tobytes() if 0 not in shape else b""
        array = np.frombuffer(content, dtype).reshape(shape).copy()
    if "numpy" in note:
        return array if note["numpy"] == "array" else np.asarray(array)[()]
    is_placed = isinstance(array, jax.Array)
    dtype = array.dtype if is_placed else np.asarray(array).dtype
    if exact and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TPPError(
            f"{name or 'the array'} was saved as {dtype}, which JAX has only under "
            "jax.enable_x64(True): load the model in that context"
        )
    if "key" in note:
        try:
            return jax.random.wrap_key_data(jnp.asarray(array), impl=note["key"])
        except ValueError as error:
            raise TPPError(
                f"{name or 'the array'} is a PRNG key of the implementation "
                f"{note['key']!r}, which is unknown"
            ) from error
    if is_placed:
        return array
    return placed(array, sharding_for(shardings, name, np.shape(array)))


def _is_data(dtype: np.dtype) -> bool:
    return not dtype.hasobject and dtype.fields is None


def _text_of(dtype: np.dtype) -> str:
    """Returns a text from which ``np.dtype`` creates the same type."""
    with contextlib.suppress(TypeError):
        if np.dtype(dtype.name) == dtype:
            return dtype.name
    return dtype.str


# Containers that can be rebuilt without a template

_CONTAINERS = {
    dict: "dict",
    collections.OrderedDict: "ordered",
    FrozenDict: "frozen",
    list: "list",
    tuple: "tuple",
}


def describe(tree: Any, names: list[str]) -> Any:
    """Returns the containers of a tree as JSON, with the names of its leaves.

    A container other than Python's or Flax's FrozenDict is described only by its type,
    and so is a dict with keys other than text and integers.

    Args:
      tree: Any pytree.
      names: Names of its leaves, in order.
    """
    return _described(tree, iter(names))


def _described(node: Any, names: Iterator[str]) -> Any:
    container = _CONTAINERS.get(type(node))
    if node is None:
        return {"none": None}
    if container in ("list", "tuple"):
        return {container: [_described(child, names) for child in node]}
    if container is not None and all(type(key) in (str, int) for key in node):
        # JAX sorts the keys of all dicts except an OrderedDict.
        order = list(node) if container == "ordered" else sorted(node)
        children = {key: _described(node[key], names) for key in order}
        return {container: [[key, children[key]] for key in node]}
    if jax.tree_util.all_leaves([node]):
        return {"leaf": next(names)}
    for _ in jax.tree.leaves(node):
        next(names)
    return {"type": type(node).__name__}


def rebuild(description: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns the tree that :func:`describe` described.

    Args:
      description: Description of the tree.
      leaves: Leaves by name.

    Raises:
      TPPError: If it has a container or a leaf that cannot be restored from data alone.
    """
    [(container, content)] = description.items()
    if container == "none":
        return None
    if container == "leaf":
        if isinstance(leaves[content], Other):
            raise TPPError(
                f"{content} of the saved tree is a {leaves[content].type_name}, which "
                "is not saved: pass load_model a tree that contains it"
            )
        return leaves[content]
    if container == "type":
        raise TPPError(
            f"the saved tree holds a {content}: pass load_model a tree of the same "
            "structure to fill"
        )
    make = next(cls for cls, name in _CONTAINERS.items() if name == container)
    if container in ("list", "tuple"):
        return make(rebuild(child, leaves) for child in content)
    return make({key: rebuild(child, leaves) for key, child in content})
