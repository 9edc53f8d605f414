"""Exceptions for mistakes in the use of the library."""

import importlib.util


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
                f"pip install 'tpp_jax[{extra}]'"
            )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that this one is in
        return False
