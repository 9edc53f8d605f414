"""Sizes that a model's modules keep as attributes, and how they follow the channels.

A module of one's own keeps a number of heads as an attribute; an Equinox module keeps
all its sizes as static fields of dataclasses next to its arrays. If the model holds
with fewer channels once such a number is set to what is left, it is set at every cut.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

# Longer lists and dicts are data: a vocabulary, a schedule.
_LONGEST = 64
# How deep settings are nested: module.config.text.heads.
_DEEPEST = 4

Values = Mapping[str, Mapping[str, Any]]
"""Path of a module → name of a field → its value."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A whole number, or a tuple of them, that a module keeps as an attribute.

    Attributes:
      path: dotted path of the module, ``""`` for the outermost.
      name: the attribute's name, ``num_heads``, or the path to a number in what the
        module keeps: ``config.text.num_heads``, ``heads.0``, ``sizes.query``.
      value: what it is in the unpruned model.
      owner: name of the module's class.
    """

    path: str
    name: str
    value: int | tuple[int, ...]
    owner: str = ""

    @property
    def kind(self) -> tuple[str, str]:
        """What it has in common with the same attribute of other modules."""
        return self.owner, self.name

    @property
    def word(self) -> str:
        """What code that reads it names: the last of its names that is no index."""
        names = self.name.split(".")
        return next((name for name in reversed(names) if not name.isdigit()), "")


Parts = tuple[tuple[int, tuple[str, ...]], ...]
"""A number that follows channels: pairs of positions and the groups they belong to."""


@dataclasses.dataclass(frozen=True)
class FieldSize:
    """An attribute that has to follow the channels of groups.

    Attributes:
      field: the attribute.
      parts: for the number, or each number of the tuple, how it follows; None for one
        that stays.
    """

    field: Field
    parts: tuple[Parts | None, ...]

    @property
    def groups(self) -> set[str]:
        """Names of the groups that it follows."""
        return {
            name
            for parts in self.parts
            for _, through in parts or ()
            for name in through
        }

    def value(self, kept: Callable[[str], tuple[int, int]]) -> int | tuple[int, ...]:
        """Returns the attribute's value in the pruned model.

        Args:
          kept: group name → (channels that stay, channels).
        """
        old = self.field.value
        numbers = old if isinstance(old, tuple) else (old,)
        new = tuple(
            number if parts is None else size_of(parts, kept)
            for number, parts in zip(numbers, self.parts, strict=True)
        )
        return new if isinstance(old, tuple) else new[0]


def size_of(parts: Parts, kept: Callable[[str], tuple[int, int]]) -> int:
    """Returns how many positions of an axis stay.

    Positions that several groups run through are all combinations of their channels:
    the shares that stay multiply.
    """
    total = 0
    for positions, through in parts:
        for name in through:
            stay, size = kept(name)
            positions = positions * stay // size
        total += positions
    return total


def own_fields(
    module: Any, path: str, attributes: Mapping[str, Any]
) -> dict[Field, type]:
    """Finds the whole numbers among a module's attributes.

    Args:
      module: the module.
      path: of the module.
      attributes: its attributes; the configurations, lists and dicts among them are
        looked into.

    Returns:
      Attribute → the module's class.
    """
    owner = type(module)
    return {
        Field(path, name, value, owner.__name__): owner
        for key, inner in attributes.items()
        if not key.startswith("_")
        for name, value in _sizes_in(inner, key, _DEEPEST)
    }


def _sizes_in(
    node: Any, name: str, depth: int
) -> Iterator[tuple[str, int | tuple[int, ...]]]:
    if is_size(node):
        yield name, tuple(node) if isinstance(node, list) else node
    elif depth and _is_setting(node):
        for key, value in _entries(node):
            if not str(key).startswith("_") and "." not in str(key):
                yield from _sizes_in(value, f"{name}.{key}", depth - 1)


def with_values(module: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the attributes of a module that are to be set.

    Args:
      module: the module.
      values: name of a :class:`Field` → its value. Configurations, lists and dicts are
        copied: other modules may share them.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        outer, _, inner = name.partition(".")
        before = found[outer] if outer in found else getattr(module, outer, None)
        found[outer] = _with_value(before, inner, value)
    return found


def _with_value(node: Any, name: str, value: Any) -> Any:
    """Returns a copy of a node with another value somewhere in it."""
    if not name:
        several = isinstance(value, (list, tuple))
        return (list if isinstance(node, list) else tuple)(value) if several else value
    outer, _, inner = name.partition(".")
    for key, before in _entries(node):
        if str(key) == outer:
            return _changed(node, {key: _with_value(before, inner, value)})
    return node


def fields_of_tree(tree: Any, path: str = "") -> dict[Field, type]:
    """Finds the whole numbers in the dataclasses of a tree, with their paths.

    Args:
      tree: dataclasses, dicts, lists and tuples, nested.
      path: of the tree itself.

    Returns:
      Attribute → class of the dataclass that keeps it.
    """
    found: dict[Field, type] = {}
    if _is_dataclass(tree):
        found |= own_fields(tree, path, dict(_items(tree)))
    for name, value in _items(tree):
        if not _is_config(value):
            found |= fields_of_tree(value, f"{path}.{name}" if path else str(name))
    return found


def follow_fields(tree: Any, sizes: Sequence[FieldSize], values: Values) -> Any:
    """Sets attributes of a model in a tree that may hold it at any depth.

    Args:
      tree: the model, or dicts, lists, tuples and dataclasses around it.
      sizes: attributes that follow the channels.
      values: what they are to be.

    Returns:
      The tree with a changed copy of every model in it: of whatever has all of the
      attributes, with the values of the unpruned model.
    """
    if not sizes:
        return tree
    if all(_find(tree, size.field) == size.field.value for size in sizes):
        return set_fields_of_tree(tree, values)
    changes = {}
    for name, value in _items(tree):
        changed = follow_fields(value, sizes, values)
        if changed is not value:
            changes[name] = changed
    return _changed(tree, changes)


def _find(tree: Any, field: Field) -> Any:
    """Returns the value of an attribute, None if there is none."""
    for key in f"{field.path}.{field.name}".strip(".").split("."):
        found = [value for name, value in _entries(tree) if str(name) == key]
        if not found:
            return None
        tree = found[0]
    return tuple(tree) if isinstance(tree, list) else tree


def set_fields_of_tree(tree: Any, values: Values, path: str = "") -> Any:
    """Returns a copy of a tree with other numbers in the fields of its dataclasses.

    Args:
      tree: as for :func:`fields_of_tree`.
      values: what to set; see :data:`Values`.
      path: of the tree itself.
    """
    changes: dict[Any, Any] = {}
    if _is_dataclass(tree):
        changes |= with_values(tree, values.get(path, {}))
    for name, value in _items(tree):
        inner = f"{path}.{name}" if path else str(name)
        if any(p == inner or p.startswith(inner + ".") for p in values):
            value = changes.get(name, value)
            changes[name] = set_fields_of_tree(value, values, inner)
    return _changed(tree, changes)


def _changed(tree: Any, changes: Mapping[Any, Any]) -> Any:
    if not changes:
        return tree
    if isinstance(tree, dict):
        changed = copy.copy(tree)
        changed.update(changes)
        return changed
    if _is_mapping(tree):
        return type(tree)({**dict(tree.items()), **changes})
    if isinstance(tree, (list, tuple)):
        items = [changes.get(i, value) for i, value in enumerate(tree)]
        named = hasattr(tree, "_fields")
        return type(tree)(*items) if named else type(tree)(items)
    changed = copy.copy(tree)
    for name, value in changes.items():
        object.__setattr__(changed, name, value)
    return changed


def _items(node: Any) -> list[tuple[Any, Any]]:
    if _is_dataclass(node):
        names = [field.name for field in dataclasses.fields(node)]
        return [(name, getattr(node, name)) for name in names if hasattr(node, name)]
    if _is_mapping(node):
        return list(node.items())
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    return []


def _entries(node: Any) -> list[tuple[Any, Any]]:
    """Returns the parts of a node, those of a plain object with settings included."""
    return _items(node) or list(getattr(node, "__dict__", {}).items())


def _is_mapping(node: Any) -> bool:
    """Reports whether a node is a dict or like one, a frozen one or a ConfigDict."""
    return isinstance(node, Mapping) or type(node).__name__.endswith("ConfigDict")


def _is_dataclass(node: Any) -> bool:
    return dataclasses.is_dataclass(node) and not isinstance(node, type)


def _is_config(value: Any) -> bool:
    """Reports whether an attribute is a collection of settings, and no module."""
    if callable(value) or isinstance(value, (Mapping, list, tuple, str)):
        return False
    if any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value)):
        return False
    named = type(value).__name__.endswith(
        ("Config", "ConfigDict", "Args", "Spec", "Params")
    )
    return _is_dataclass(value) or (named and hasattr(value, "__dict__"))


def _is_setting(value: Any) -> bool:
    """Reports whether an attribute may hold sizes somewhere in it."""
    if isinstance(value, (Mapping, list, tuple)):
        return len(value) <= _LONGEST
    return _is_config(value)


def is_size(value: Any) -> bool:
    """Reports whether a field may hold sizes: a whole number, or some in a row."""
    numbers = value if isinstance(value, (list, tuple)) and value else (value,)
    if len(numbers) > _LONGEST:
        return False
    return all(type(n) is int for n in numbers) and max(numbers) > 1
