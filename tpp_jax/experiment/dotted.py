"""Python objects that a config names by a dotted path: ``my_package.my_file:name``."""

import importlib
from typing import Any

from tpp_jax.errors import TPPError


def is_dotted(text: str) -> bool:
    """Reports whether a field's value is meant as a dotted path, not as a name.

    Example:
      >>> is_dotted("my_package.my_file:score"), is_dotted("l1")
      (True, False)
    """
    return ":" in text


def load_object(path: str, what: str) -> Any:
    """Imports a module and returns an object that it defines.

    The command line finds modules that are installed and those in the working
    directory.

    Args:
      path: Dotted path, ``"package.module:name"``.
      what: Where the path is from, for messages: ``"config.prune.criterion"``.

    Returns:
      The object.

    Raises:
      TPPError: The path is not written so, or the module cannot be imported, or it has
        no such object.

    Example:
      >>> load_object("math:sqrt", "config.prune.criterion")(9.0)
      3.0
    """
    module, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise TPPError(
            f"{what} is {path!r}: write a dotted path as package.module:name, without "
            "folders and without .py"
        )
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a user's module does
        missing = getattr(error, "name", None) or ""
        if isinstance(error, ModuleNotFoundError) and _contains(missing, module):
            raise TPPError(
                f"{what} is {path!r}, but there is no module {missing}: start in the "
                "folder that contains it, or install its package"
            ) from None
        raise TPPError(
            f"{what} is {path!r}, but importing {module} failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    if not hasattr(found, name):
        raise TPPError(f"{what} is {path!r}, but {module} defines no {name}")
    return getattr(found, name)


def _contains(package: str, module: str) -> bool:
    """Reports whether a module is a package's or is the package itself."""
    return f"{module}.".startswith(f"{package}.")
