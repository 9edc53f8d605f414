"""Fields of a config: one declaration for the default, the checks and the docs.

A config is a frozen dataclass whose fields are made by :func:`field` from a default, a
line of documentation and bounds. Its sections are dataclasses too.
"""

import dataclasses
import json
import math
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeGuard, TypeVar

import ml_collections

from tpp_jax.errors import TPPError
from tpp_jax.experiment.dotted import is_dotted
from tpp_jax.training.optimizers import MOST_STEPS


class Declared(Protocol):
    """A section of a config, or a config: an instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T")
S = TypeVar("S", bound=Declared)
Value = bool | int | float | str | dict[str, Any]
Tree = Mapping[str, Any] | ml_collections.ConfigDict
"""A config as nested dicts."""

# Steps are counted and parameters are computed in 32 bits.
_MOST_INT, _MOST_FLOAT = MOST_STEPS, 3e38

OPEN = "kwargs"
"""Name of the fields whose value is a dict of the user's own names and values."""

_NOUNS = {
    dict: "a dict of names and values",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """A field of a config.

    Bounds apply to numbers, which may not be infinite or NaN.

    Attributes:
      name: Full name, with dots between the sections.
      default: Value unless a config sets another.
      types: Possible types of a value; an int is a valid float.
      doc: Meaning and unit, in one line.
      least: Smallest value.
      above: Largest value that is too small, instead of ``least``.
      below: Smallest value that is too large.
      most: Largest value; None for the limit of 32 bits.
      least_above_zero: Smallest value other than 0.
      choices: Possible values of a text; empty for any.
      is_path: Whether a text is empty or the path of a file or folder.
      dotted: Whether a text may also be the dotted path of a user's own object.
    """

    name: str
    default: Value
    types: tuple[type, ...]
    doc: str
    least: float = 0
    above: float | None = None
    below: float | None = None
    most: float | None = None
    least_above_zero: float | None = None
    choices: tuple[str, ...] = ()
    is_path: bool = False
    dotted: bool = False

    def check(self, value: Any) -> None:
        """Checks a value of the field.

        Args:
          value: Value of any type.

        Raises:
          TPPError: The value has the wrong type, is out of bounds or is not among the
            choices.
        """
        if dict in self.types:
            return _check_keywords(f"config.{self.name}", value)
        wanted = (*self.types, int) if float in self.types else self.types
        # In Python, True is an int.
        odd = isinstance(value, bool) and bool not in self.types
        if odd or not isinstance(value, wanted):
            nouns = " or ".join(_NOUNS[one] for one in self.types)
            raise TPPError(f"config.{self.name} is {_short(value)}, must be {nouns}")
        own = self.dotted and isinstance(value, str) and is_dotted(value)
        if self.choices and value not in self.choices and not own:
            choices = [*map(repr, self.choices), *(["a dotted path"] * self.dotted)]
            raise TPPError(
                f"unknown config.{self.name} {value!r}: choose {' or '.join(choices)}"
            )
        bad = ""
        if self.is_path and (problem := _path_problem(str(value))):
            bad = f"which is not a path: {problem}"
        elif not isinstance(value, str | bool) and (limit := self._missed(value)):
            bad = f"must be {limit}"
        if bad:
            raise TPPError(f"config.{self.name} is {_short(value)}, {bad}")

    def _missed(self, value: float) -> str:
        """Returns the limit that a number violates, or an empty text."""
        low, fits = f"at least {self.least}", self.least <= value
        if self.above is not None:
            low, fits = f"above {self.above}", self.above < value
        if not abs(value) < math.inf:  # true for NaN too
            return f"finite and {low}"
        if not fits:
            return low
        if self.below is not None and not value < self.below:
            return f"below {self.below}"
        if 0 < value < (self.least_above_zero or 0):
            return f"0 or at least {self.least_above_zero}"
        most = self.most
        if most is None:
            most = _MOST_FLOAT if isinstance(value, float) else _MOST_INT
        return "" if value <= most else f"at most {most}"

    @property
    def values(self) -> str:
        """Description of the possible values, in Markdown."""
        if self.choices:
            choices = [f"`{choice or repr('')}`" for choice in self.choices]
            return ", ".join([*choices, *(["dotted path"] * self.dotted)])
        if self.is_path:
            return "path"
        nouns = " or ".join(_NOUNS[one].removeprefix("a ") for one in self.types)
        free = self.types[0] in (bool, str, dict)
        return nouns if free else f"{nouns}, {self._bounds}"

    @property
    def _bounds(self) -> str:
        if self.above is not None:
            return f"above {self.above}"
        if self.least_above_zero is not None:
            return f"0, or {self.least_above_zero} or more"
        if self.below is not None:
            return f"from {self.least} to below {self.below}"
        if self.most is not None:
            return f"{self.least} to {self.most}"
        return f"{self.least} or more"


def field(default: T, doc: str, **rules: Any) -> T:
    """Declares a field, or a section, of a config.

    Args:
      default: Default value; of a section, an instance of its dataclass.
      doc: Meaning and unit, in one line.
      **rules: Bounds and choices, named like the attributes of :class:`Field`. The
        choices of a field with a ``Literal`` annotation are taken from it.

    Returns:
      A dataclass field, with the type of its default for type checkers.
    """
    metadata = {"doc": doc, **rules}
    made: Any = dataclasses.field(default=default, metadata=metadata)
    if isinstance(default, dict):
        made = dataclasses.field(default_factory=dict, metadata=metadata)
    return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a config.

    Attributes:
      name: Full name; empty for the config itself.
      doc: Description in one line.
      defaults: Section with all defaults.
      fields: Fields of the section, without those of sections inside it.
    """

    name: str
    doc: str
    defaults: Declared
    fields: tuple[Field, ...]


def sections_of(config: Declared, name: str = "", doc: str = "") -> list[Section]:
    """Returns the sections of a config, each followed by its own sections.

    Args:
      config: Instance of a config's dataclass with all defaults.
      name: Full name of this section.
      doc: Description of this section.
    """
    hints = typing.get_type_hints(type(config))
    fields, inner = [], []
    for one in dataclasses.fields(config):
        full = f"{name}.{one.name}" if name else one.name
        default: Any = getattr(config, one.name)
        if _is_section(default):
            inner += sections_of(default, full, **one.metadata)
            continue
        rules, hint = dict(one.metadata), hints[one.name]
        if typing.get_origin(hint) is Literal:
            rules["choices"], hint = typing.get_args(hint), str
        is_union = isinstance(hint, types.UnionType)
        wanted = typing.get_args(hint) if is_union else (hint,)
        wanted = tuple(typing.get_origin(one) or one for one in wanted)
        fields.append(Field(name=full, default=default, types=wanted, **rules))
    own = Section(name=name, doc=doc, defaults=config, fields=tuple(fields))
    return [own, *inner]


def _is_section(value: object) -> TypeGuard[Declared]:
    return dataclasses.is_dataclass(value)


def flat(config: Tree, prefix: str = "") -> dict[str, Any]:
    """Returns the value of each field of a config, by the field's full name."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name == OPEN:
            found[f"{prefix}{name}"] = plain(value)
        elif isinstance(value, Mapping | ml_collections.ConfigDict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def build(section: type[S], config: Tree) -> S:
    """Converts nested dicts to an instance of a config's dataclass, without checks.

    Args:
      section: Dataclass of the config or of a section.
      config: Values of all its fields.
    """
    values: dict[str, Any] = {}
    for one in dataclasses.fields(section):
        value, default = config[one.name], one.default
        inner: Any = value  # a field's value, or the dict of a section
        values[one.name] = (
            build(type(default), inner) if _is_section(default) else plain(value)
        )
    return section(**values)


def plain(value: Any) -> Any:
    """Returns a value with plain dicts in place of ConfigDicts, at any depth."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {name: plain(x) for name, x in value.items()}
    return [plain(x) for x in value] if isinstance(value, list | tuple) else value


def _check_keywords(name: str, value: Any) -> None:
    """Raises a TPPError unless a value can be keyword arguments kept as JSON."""
    found = plain(value)
    if not isinstance(found, dict):
        raise TPPError(f"{name} is {_short(value)}, must be {_NOUNS[dict]}")
    for key in found:
        if not (isinstance(key, str) and key.isidentifier()):
            raise TPPError(
                f"{name} has the key {_short(key)}, which cannot be the name of an "
                "argument"
            )
    try:
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TPPError(
            f"{name} is {_short(found)}, which cannot be written as JSON ({error}): "
            "use numbers, texts, lists and dicts"
        ) from error


def _path_problem(path: str) -> str:
    """Returns why a text cannot be a path, or an empty text."""
    try:
        pathlib.Path(path).exists()
        return "it contains a zero byte" if "\0" in path else ""
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
