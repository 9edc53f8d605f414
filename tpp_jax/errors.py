"""The exceptions that stand for a mistake in how the library is used."""

import importlib.util


class TPPError(ValueError):
    """An error of the user's making, such as a wrong name, pattern or folder.

    Its message is one or two sentences that name the thing at fault and the fix. The
    command line prints that message alone; everything else that is raised is a defect
    of this library and keeps its traceback.
    """


class TPPTypeError(TPPError, TypeError):
    """A :class:`TPPError` about an argument of a wrong type, or one that is missing."""


def require(extra: str, *packages: str) -> None:
    """Checks that the optional packages that a function is about to import are there.

    Args:
      extra: Name of the extra in ``pyproject.toml`` that installs them.
      *packages: Names to import, such as ``"orbax.checkpoint"``.

    Raises:
      TPPError: one of them is not installed.
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
