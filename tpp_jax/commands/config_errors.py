"""Errors while a config is read, as one line for the author of the config."""

import os
import pathlib
import re
import sys
import traceback

from tpp_jax.commands import config_files
from tpp_jax.experiment.config import near_fields

_PACKAGE = f"{pathlib.Path(__file__).parents[1]}{os.sep}"


def explain(error: Exception) -> str | None:
    """Returns a message for a user from an error of reading a config and its flags.

    Args:
      error: Error from the code of the config, from ml_collections or from absl.

    Returns:
      One line; None for an error of this package that is not meant for users.
    """
    text = " ".join(str(error).replace("\\n", " ").replace("\\", "").split())
    trace = str(error)  # ml_collections passes on some errors as tracebacks
    if "Traceback (most recent call last)" not in trace:
        trace = "".join(traceback.format_exception(error))
    what, calls = _parts(trace)
    if what.startswith("tpp_jax.errors.TPPError: "):
        return what.partition(": ")[2]
    raised_in, _ = calls[-1]
    if _is_ours(raised_in):
        return None
    of_field = isinstance(error, AttributeError | KeyError)
    if isinstance(error, OSError | SyntaxError):
        what = text[max(text.find("[Errno"), 0) :]
    elif of_field and "ml_collections" in raised_in:
        if "has no attribute 'get_config'" not in text:
            name = text.rpartition("Attempting to lookup: ")[2]
            name = name.strip("\"'").partition("'")[0]
            return f"the config has no field '{name}'{near_fields(name)}"
        what = "it has no function get_config"
    else:
        own = [call for call in calls if _is_users(call[0])]
        what += f" ({', line '.join(own[-1])})" if own else ""
    return f"the config cannot be read: {what}"


def _is_ours(file: str) -> bool:
    own_config = file.startswith(f"{config_files.folder()}{os.sep}")
    return file.startswith(_PACKAGE) and not own_config


def _is_users(file: str) -> bool:
    other = re.search("/site-packages/|<", file) or file == sys.argv[0]
    return not other and not _is_ours(file)


def _parts(trace: str) -> tuple[str, list[tuple[str, str]]]:
    """Parses a traceback: what was raised, and the file and line of each call."""
    calls = re.findall('File "(.+)", line ([0-9]+)', trace)
    lines = trace.strip().splitlines()
    last = max((i for i, line in enumerate(lines) if line.startswith("  ")), default=-1)
    return " ".join(lines[last + 1 :]), calls or [("", "")]
