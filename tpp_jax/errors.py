"""Exceptions for mistakes in the use of the library, and the names in their messages.

What sets a value has one name in the library, ``data_dir``, and another one in a
config, ``config.data.dir``. A message names what its reader can set: whoever calls a
function for another kind of user renames it, see :func:`renamed`.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import pathlib
import re
import shlex
import urllib.parse
from collections.abc import Callable, Iterator


class TPPError(ValueError):
    """A mistake of the user, such as a wrong name, pattern or folder.

    The message is one or two sentences that name the cause and the fix. The command
    line prints only that message; any other exception is a defect of this library and
    keeps its traceback.
    """


class TPPTypeError(TPPError, TypeError):
    """A :class:`TPPError` about an argument that has the wrong type or is missing."""


def require(extra: str, *packages: str) -> None:
    """Checks that the optional packages that a function is about to import are there.

    Args:
      extra: Name of the extra in ``pyproject.toml`` that installs them.
      *packages: Names to import, such as ``"orbax.checkpoint"``.

    Raises:
      TPPError: If one of them is not installed.
    """
    for package in packages:
        if not _installed(package):
            raise TPPError(
                f"the package {package}, which is needed here, is not installed: "
                f"{install_command(extra)}"
            )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that this one is in
        return False


def install_command(extra: str) -> str:
    """Returns the shell command that adds an extra to this installation.

    Args:
      extra: Name of the extra in ``pyproject.toml``.

    Returns:
      In a checkout an editable installation of it; otherwise an installation from where
      pip has it: a folder, a repository or an index.

    Example:
      >>> install_command("onnx").startswith("pip install ")
      True
    """
    checkout = pathlib.Path(__file__).parents[1]
    if (checkout / "pyproject.toml").is_file():
        where = "." if checkout == pathlib.Path.cwd() else checkout
        return f"pip install -e {shlex.quote(f'{where}[{extra}]')}"
    place = _installed_from()
    if place.startswith("file:"):
        path = urllib.parse.unquote(urllib.parse.urlsplit(place).path)
        return f"pip install {shlex.quote(f'{path}[{extra}]')}"
    source = f" @ {place}" if place else ""
    return f"pip install {shlex.quote(f'tpp_jax[{extra}]{source}')}"


@functools.cache
def _installed_from() -> str:
    """Returns the URL that pip has installed this package from; "" for an index."""
    try:
        found = importlib.metadata.distribution("tpp_jax").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return ""
    record = json.loads(found or "{}")
    vcs = record.get("vcs_info", {}).get("vcs")
    return f"{vcs}+{record['url']}" if vcs else record.get("url", "")


@contextlib.contextmanager
def renamed(pattern: str, name: str | Callable[[re.Match[str]], str]) -> Iterator[None]:
    """Renames what messages of errors tell the user to set.

    Args:
      pattern: Regular expression of the names.
      name: Name for this user, or function from a match to it.
    """
    try:
        yield
    except TPPError as error:
        error.args = (re.sub(pattern, name, str(error)), *error.args[1:])
        raise
