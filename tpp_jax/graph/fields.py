"""Integer attributes of a model's modules, and how they follow the channels.

A user's module may have its number of heads as an attribute; an Equinox module has all
its sizes as static fields next to its arrays. If the model runs correctly with fewer
channels once such a number is set to the number that is left, every cut sets it.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

# Length of a list or dict of settings; longer ones are data: a vocabulary, a schedule.
_LONGEST = 64
# Depth of nested settings: module.config.text.heads.
_DEEPEST = 4

Values = Mapping[str, Mapping[str, Any]]
"""Path of a module → name of an attribute → its value."""


@dataclasses.dataclass(frozen=True)
class Field:
    """An attribute of a module that is an integer or a tuple of integers.

    Attributes:
      path: Dotted path of the module, ``""`` for the outermost one.
      name: Name of the attribute, ``num_heads``, or path to a number in an attribute:
        ``config.text.num_heads``, ``heads.0``, ``sizes.query``.
      value: Value in the unpruned model.
      owner: Name of the module's class.
    """

    path: str
    name: str
    value: int | tuple[int, ...]
    owner: str = ""

    @property
    def declaration(self) -> tuple[str, str]:
        """Name of the class and of the attribute, which all its instances share."""
        return self.owner, self.name

    @property
    def word(self) -> str:
        """Identifier in code that reads it: the last part of its name but indices."""
        names = self.name.split(".")
        return next((name for name in reversed(names) if not name.isdigit()), "")


Parts = tuple[tuple[int, tuple[str, ...]], ...]
"""A number that follows channels: numbers of positions, each with its groups."""


@dataclasses.dataclass(frozen=True)
class FieldSize:
    """An attribute that has to follow the channels of groups.

    Attributes:
      field: Attribute.
      parts: Parts of the number, or of each number of the tuple; None for a number
        that does not change.
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
          kept: Function from the name of a group to the number of its channels that
            are kept and the number of all.
        """
        old = self.field.value
        numbers = old if isinstance(old, tuple) else (old,)
        new = tuple(
            number if parts is None else size_of(parts, kept)
            for number, parts in zip(numbers, self.parts, strict=True)
        )
        return new if isinstance(old, tuple) else new[0]


def size_of(parts: Parts, kept: Callable[[str], tuple[int, int]]) -> int:
    """Returns the number of positions of an axis that are kept.

    Positions that several groups run through are all combinations of their channels,
    so that the kept shares of these groups multiply.
    """
    total = 0
    for positions, through in parts:
        for name in through:
            left, size = kept(name)
            positions = positions * left // size
        total += positions
    return total


def own_fields(
    module: Any, path: str, attributes: Mapping[str, Any]
) -> dict[Field, type]:
    """Finds the integers among a module's attributes.

    Args:
      module: Module.
      path: Path of the module.
      attributes: Attributes of the module; configurations, lists and dicts among them
        are searched too.

    Returns:
      Attribute → class of the module.
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
    """Returns new values of a module's attributes, by name.

    Configurations, lists and dicts are copied, since other modules may share them.

    Args:
      module: Module, which is not modified.
      values: Name of a :class:`Field` → its value.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        outer, _, inner = name.partition(".")
        before = found[outer] if outer in found else getattr(module, outer, None)
        found[outer] = _with_value(before, inner, value)
    return found


def _with_value(node: Any, name: str, value: Any) -> Any:
    """Returns a copy of a node with one number in it replaced."""
    if not name:
        several = isinstance(value, (list, tuple))
        return (list if isinstance(node, list) else tuple)(value) if several else value
    outer, _, inner = name.partition(".")
    for key, before in _entries(node):
        if str(key) == outer:
            return _changed(node, {key: _with_value(before, inner, value)})
    return node


class Skeleton:
    """A tree of dataclasses without its arrays, which an NNX module holds.

    The arrays are attributes of the module, at the same places below another name. Such
    a tree is compared by identity.

    Attributes:
      tree: Nested dataclasses, an Equinox module.
      name: Name of the attribute that has the arrays.
    """

    def __init__(self, tree: Any, name: str) -> None:
        self.tree, self.name = tree, name


def fields_of_module(module: Any, path: str) -> dict[Field, type]:
    """Finds the integers in a module's attributes, and in the trees that it holds.

    Args:
      module: NNX module.
      path: Path of the module.
    """
    found = own_fields(module, path, vars(module))
    for held in _skeletons(module).values():
        found |= fields_of_tree(held.tree, f"{path}.{held.name}".strip("."))
    return found


def set_fields_of_modules(found: Iterable[tuple[str, Any]], values: Values) -> None:
    """Sets attributes of NNX modules, and of the trees that they hold, in place.

    Args:
      found: Modules with their paths.
      values: New values; see :data:`Values`.
    """
    for path, module in found:
        for name, value in with_values(module, values.get(path, {})).items():
            setattr(module, name, value)
        for attribute, held in _skeletons(module).items():
            prefix = f"{path}.{held.name}".strip(".")
            inner = {
                name.removeprefix(prefix).strip("."): changed
                for name, changed in values.items()
                if f"{name}.".startswith(f"{prefix}.")
            }
            if inner:
                tree = set_fields_of_tree(held.tree, inner)
                setattr(module, attribute, Skeleton(tree, held.name))


def _skeletons(module: Any) -> dict[str, Skeleton]:
    return {n: x for n, x in vars(module).items() if isinstance(x, Skeleton)}


def fields_of_tree(tree: Any, path: str = "") -> dict[Field, type]:
    """Finds the integers in the dataclasses of a tree.

    Args:
      tree: Nested dataclasses, dicts, lists and tuples.
      path: Path of the tree itself.

    Returns:
      Field → its dataclass.
    """
    found: dict[Field, type] = {}
    if _is_dataclass(tree):
        found |= own_fields(tree, path, dict(_items(tree)))
    for name, value in _items(tree):
        if not _is_config(value):
            found |= fields_of_tree(value, f"{path}.{name}" if path else str(name))
    return found


_MISSING = object()


def follow_fields(tree: Any, sizes: Sequence[FieldSize], values: Values) -> Any:
    """Sets attributes of a model in a tree that contains it at any depth.

    Args:
      tree: Model, or dicts, lists, tuples and dataclasses around it.
      sizes: Attributes that follow the channels.
      values: New values of these attributes.

    Returns:
      The tree with a changed copy of every model in it. A model is recognized by having
      all of the attributes, with the values of the unpruned model. Attributes that are
      None are left alone: a model without anything but arrays, as optimizers have it,
      has such.
    """
    if not sizes:
        return tree
    found = {size.field: _find(tree, size.field) for size in sizes}
    own = [field for field, value in found.items() if value == field.value]
    if own and all(found[f] is None or f in own for f in found):
        chosen: dict[str, dict[str, Any]] = {}
        for field in own:
            new = values[field.path][field.name]
            chosen.setdefault(field.path, {})[field.name] = new
        return set_fields_of_tree(tree, chosen)
    changes = {}
    for name, value in _items(tree):
        changed = follow_fields(value, sizes, values)
        if changed is not value:
            changes[name] = changed
    return _changed(tree, changes)


def _find(tree: Any, field: Field) -> Any:
    """Returns the value of an attribute, ``_MISSING`` if the tree does not have it."""
    for key in f"{field.path}.{field.name}".strip(".").split("."):
        found = [value for name, value in _entries(tree) if str(name) == key]
        if not found:
            return _MISSING
        tree = found[0]
    return tuple(tree) if isinstance(tree, list) else tree


def set_fields_of_tree(tree: Any, values: Values, path: str = "") -> Any:
    """Returns a copy of a tree with new values in the fields of its dataclasses.

    Args:
      tree: Tree, as for :func:`fields_of_tree`.
      values: New values; see :data:`Values`.
      path: Path of the tree itself.
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
    """Returns the entries of a node; those of any other object are its attributes."""
    return _items(node) or list(getattr(node, "__dict__", {}).items())


def _is_mapping(node: Any) -> bool:
    """Reports whether a node is a mapping: a dict, a FrozenDict, a ConfigDict."""
    return isinstance(node, Mapping) or type(node).__name__.endswith("ConfigDict")


def _is_dataclass(node: Any) -> bool:
    return dataclasses.is_dataclass(node) and not isinstance(node, type)


def _is_config(value: Any) -> bool:
    """Reports whether an attribute is a collection of settings, not a module."""
    if callable(value) or isinstance(value, (Mapping, list, tuple, str)):
        return False
    if any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value)):
        return False
    named = type(value).__name__.endswith(
        ("Config", "ConfigDict", "Args", "Spec", "Params")
    )
    return _is_dataclass(value) or (named and hasattr(value, "__dict__"))


def _is_setting(value: Any) -> bool:
    """Reports whether an attribute may contain sizes at some depth."""
    if isinstance(value, (Mapping, list, tuple)):
        return len(value) <= _LONGEST
    return _is_config(value)


def is_size(value: Any) -> bool:
    """Reports whether a field may be a size: an integer, or a sequence of integers."""
    numbers: Sequence[Any] = (value,)
    if isinstance(value, (list, tuple)) and value:
        numbers = value
    if len(numbers) > _LONGEST:
        return False
    return all(type(n) is int for n in numbers) and max(numbers) > 1
