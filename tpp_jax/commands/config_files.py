"""The config files that come with the package, by name from any folder."""

import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Sequence

DEFAULT = "digits_resnet8_tpp.py"


def folder() -> pathlib.Path:
    """Returns the folder of the configs that come with the package.

    An installed package holds them; a checkout has them next to the package.
    """
    package = pathlib.Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find(name: str) -> str:
    """Returns the path of a config file.

    Args:
      name: Path of a file; or the name of one that comes with the package, such as
        ``"configs/tables/digits.py"``, ``"tables/digits.py"`` or ``"tables/digits"``.
        A colon and an argument of the config may follow.

    Returns:
      The path, with the argument; the name itself where there is no such file.
    """
    path, colon, argument = name.partition(":")
    if pathlib.Path(path).is_file():
        return name
    own = folder() / path.removeprefix("configs/")
    for file in (own, own.with_name(f"{own.name}.py")):
        if file.is_file():
            return f"{file}{colon}{argument}"
    return name


def found(arguments: Sequence[str]) -> list[str]:
    """Returns the words of a command with the path of the config after ``--config``.

    Args:
      arguments: The words after the program's name.
    """
    words, previous = [], ""
    for word in arguments:
        flag, equals, value = word.partition("=")
        if equals and flag in ("--config", "-config"):
            word = f"{flag}={find(value)}"
        elif previous in ("--config", "-config"):
            word = find(word)
        words.append(word)
        previous = word
    return words


def make_importable() -> None:
    """Lets a table import the configs that it starts from, as ``configs.….``.

    A package ``configs`` of the user is extended, and its files are preferred.
    """
    if importlib.util.find_spec("configs") is None:
        package = types.ModuleType("configs")
        package.__path__ = []
        sys.modules["configs"] = package
    package = importlib.import_module("configs")
    if str(folder()) not in package.__path__:
        package.__path__ = [*package.__path__, str(folder())]
