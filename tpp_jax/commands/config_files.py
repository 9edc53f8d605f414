"""The config files of the package, found by name from any folder."""

import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Sequence

DEFAULT = "digits_resnet8_tpp.py"


def folder() -> pathlib.Path:
    """Returns the folder of the package's configs.

    An installed package contains them; a checkout has them next to the package.
    """
    package = pathlib.Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find(name: str) -> str:
    """Returns the path of a config file.

    Args:
      name: Path of a file, or the name of a config of the package, such as
        ``"configs/tables/digits.py"``, ``"tables/digits.py"`` or ``"tables/digits"``.
        A colon and an argument for the config may follow.

    Returns:
      The path with the argument; the given name if there is no such file.
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
    """Replaces the value of ``--config`` in a command by the path of the config.

    Args:
      arguments: Words after the program's name.
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
    """Makes the configs importable as ``configs.…``, which tables do.

    A package ``configs`` of the user is extended, and its files take precedence.
    """
    if importlib.util.find_spec("configs") is None:
        package = types.ModuleType("configs")
        package.__path__ = []
        sys.modules["configs"] = package
    package = importlib.import_module("configs")
    if str(folder()) not in package.__path__:
        package.__path__ = [*package.__path__, str(folder())]
