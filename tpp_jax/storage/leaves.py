"""Leaves of any pytree as arrays that Orbax can save, and back as they were.

Orbax saves arrays of numbers. What else a leaf may be (a typed PRNG key, an empty
array, text, a Python number) is described by a *note*, JSON-ready, from which and the
saved array the leaf is made again.
"""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives NumPy the names of its types)
import numpy as np
from flax.core import FrozenDict

from tpp_jax.errors import TPPError
from tpp_jax.graph.naming import leaf_name

Note = dict[str, Any]

_NATIVE = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16", "complex64", "complex128"),
}
_CONSTANTS = {"bool": bool, "int": int, "float": float, "str": str}


def unique_names(tree: Any) -> list[str]:
    """Returns a name of its own for every leaf of a tree, in order.

    It is the dotted name; where two leaves share it (``{"a": {"b": …}, "a.b": …}``),
    their places in the tree follow.
    """
    paths = jax.tree_util.tree_leaves_with_path(tree)
    names = [leaf_name(path) for path, _ in paths]
    seen: set[str] = set()
    twice = {name for name in names if name in seen or seen.add(name)}
    return [f"{n} [leaf {i}]" if n in twice else n for i, n in enumerate(names)]


def encode(leaves: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Note]]:
    """Returns the arrays to save, on the host, and a note of each leaf that needs one.

    Raises:
      TPPError: A leaf is abstract, traced or deleted, or an object that is no data.
    """
    notes: dict[str, Note] = {}
    on_device: dict[str, jax.Array] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in leaves.items():
        _check_concrete(name, leaf)
        if isinstance(leaf, jax.Array):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                notes[name] = {"key": str(jax.random.key_impl(leaf))}
                leaf = jax.random.key_data(leaf)
            on_device[name] = leaf
        elif isinstance(leaf, np.ndarray | np.generic) and _is_data(leaf.dtype):
            notes[name] = {"numpy": "array" if isinstance(leaf, np.ndarray) else "one"}
            arrays[name] = np.asarray(leaf)
        else:
            notes[name] = _note_of_constant(name, leaf)
    arrays |= jax.device_get(on_device)
    for name, array in list(arrays.items()):
        dtype = array.dtype
        if dtype.name not in _NATIVE or not dtype.isnative or not array.size:
            as_bytes = {"dtype": _text_of(dtype), "shape": list(array.shape)}
            notes[name] = {**notes.get(name, {}), **as_bytes}
            arrays[name] = np.frombuffer(array.tobytes() or b"\0", np.uint8)
    return arrays, notes


def decode(
    arrays: Mapping[str, Any], notes: Mapping[str, Note], *, exact: bool = True
) -> dict[str, Any]:
    """Returns the leaves that were saved, by name; a function is an :class:`Other`.

    Args:
      arrays: What was read.
      notes: The notes of :func:`encode`.
      exact: Whether a type that JAX does not have here is an error; otherwise it is
        rounded.

    Raises:
      TPPError: A leaf cannot be made here: 64 bits without ``jax.enable_x64``, or an
        unknown kind of PRNG key.
    """
    names = [*arrays, *(name for name in notes if name not in arrays)]
    return {
        name: _decoded(name, arrays.get(name), notes.get(name, {}), exact)
        for name in names
    }


class Other:
    """Stands for a saved leaf that is no data, such as a function."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name


def shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Returns the shape of a leaf and its dtype, or Python type, as text."""
    if isinstance(leaf, Other):
        return (), leaf.type_name
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return tuple(leaf.shape), str(leaf.dtype)
    return (), type(leaf).__name__


def _check_concrete(name: str, leaf: Any) -> None:
    what = None
    if isinstance(leaf, jax.ShapeDtypeStruct):
        what = "abstract: it has a shape and no numbers"
    elif isinstance(leaf, jax.core.Tracer):
        what = "traced: save_model cannot be called inside jit"
    elif isinstance(leaf, jax.Array) and leaf.is_deleted():
        what = "deleted: a compiled function that it was donated to has used it up"
    if what:
        raise TPPError(f"{name or 'the array'} cannot be saved, since it is {what}")


def _note_of_constant(name: str, leaf: Any) -> Note:
    if isinstance(leaf, complex):
        return {"constant": "complex", "value": [leaf.real, leaf.imag]}
    kind = type(leaf).__name__
    if _CONSTANTS.get(kind) is type(leaf):
        return {"constant": kind, "value": leaf}
    if callable(leaf):
        return {"other": kind}
    raise TPPError(
        f"{name or 'the tree'} cannot be saved, since it is a {kind}: only arrays, "
        "numbers and text can be"
    )


def _decoded(name: str, array: Any, note: Note, exact: bool) -> Any:
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
    dtype = np.asarray(array).dtype
    if exact and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TPPError(
            f"{name or 'the array'} was saved as {dtype}, which JAX has only under "
            "jax.enable_x64(True): load the model there"
        )
    if "key" in note:
        try:
            return jax.random.wrap_key_data(jnp.asarray(array), impl=note["key"])
        except ValueError as error:
            raise TPPError(
                f"{name or 'the array'} is a PRNG key of the kind {note['key']!r}, "
                "which is not known here"
            ) from error
    return jnp.asarray(array)


def _is_data(dtype: np.dtype) -> bool:
    return not dtype.hasobject and dtype.fields is None


def _text_of(dtype: np.dtype) -> str:
    """Returns a text that ``np.dtype`` makes the same type of."""
    try:
        if np.dtype(dtype.name) == dtype:
            return dtype.name
    except TypeError:
        pass
    return dtype.str


# The containers that a saved tree is rebuilt from without a template

_KINDS = {
    dict: "dict",
    collections.OrderedDict: "ordered",
    FrozenDict: "frozen",
    list: "list",
    tuple: "tuple",
}


def describe(tree: Any, names: list[str]) -> Any:
    """Returns the containers of a tree, JSON-ready, with its leaves' names in them.

    A container that is none of Python's own or Flax's FrozenDict is described by its
    type alone, and so is a dict with other keys than text and integers.
    """
    return _described(tree, iter(names))


def _described(node: Any, left: Iterator[str]) -> Any:
    kind = _KINDS.get(type(node))
    if node is None:
        return {"none": None}
    if kind in ("list", "tuple"):
        return {kind: [_described(part, left) for part in node]}
    if kind is not None and all(type(key) in (str, int) for key in node):
        # JAX has the leaves of all but an OrderedDict in the order of sorted keys.
        order = list(node) if kind == "ordered" else sorted(node)
        parts = {key: _described(node[key], left) for key in order}
        return {kind: [[key, parts[key]] for key in node]}
    if jax.tree_util.all_leaves([node]):
        return {"leaf": next(left)}
    for _ in jax.tree.leaves(node):
        next(left)
    return {"type": type(node).__name__}


def rebuild(description: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns the tree that :func:`describe` described.

    Raises:
      TPPError: It has a container or a leaf that cannot be made from data alone.
    """
    [(kind, content)] = description.items()
    if kind == "none":
        return None
    if kind == "leaf":
        if isinstance(leaves[content], Other):
            raise TPPError(
                f"{content} of the saved tree is a {leaves[content].type_name}, which "
                "is not saved: pass load_model a tree that has it"
            )
        return leaves[content]
    if kind == "type":
        raise TPPError(
            f"the saved tree holds a {content}: pass load_model a tree of the same "
            "structure to fill"
        )
    make = next(container for container, name in _KINDS.items() if name == kind)
    if kind in ("list", "tuple"):
        return make(rebuild(part, leaves) for part in content)
    return make({key: rebuild(part, leaves) for key, part in content})
