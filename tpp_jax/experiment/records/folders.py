"""The folder of a run or a sweep: its layout and the config in it."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_collections

from tpp_jax.errors import TPPError
from tpp_jax.experiment.config import differences, with_defaults
from tpp_jax.experiment.fields import flat
from tpp_jax.experiment.own import check_known
from tpp_jax.experiment.records.terminal import say
from tpp_jax.saving import load_model_info

CONFIG = "config.json"
ORIGIN = "origin.json"

_FOLDERS = ("checkpoints", "tensorboard", "dense", "model", "best", "cells")
_PICTURES = ("curves", "channels", "profile", "jacobian", "gram")
_FILES = (CONFIG, "lock", "metrics.jsonl", "summary.json", "gram.npz", "report.html")
_FILES += ("table.json", "table.md", "table.csv", "profile.json", "groups.svg")
_FILES += ("groups_phone.svg", ORIGIN)
_FILES += tuple(f"{name}.{end}" for name in _PICTURES for end in ("png", "svg"))

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def make(workdir: pathlib.Path) -> None:
    """Creates the folder of a run if it is missing, and checks its layout.

    Raises:
      TPPError: It cannot be created, or a file is in the place of a folder or the
        reverse.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TPPError(f"the folder of the run cannot be created: {error}") from error
    check_layout(workdir)


def check_layout(workdir: pathlib.Path) -> None:
    """Checks that names in a run's folder are files and folders as the run has them.

    Raises:
      TPPError: A file is in the place of a folder, or the reverse.
    """
    for name in _FOLDERS + _FILES:
        path, folder = workdir / name, name in _FOLDERS
        try:
            wrong = path.exists() and not (path.is_dir() if folder else path.is_file())
        except OSError as error:
            raise TPPError(f"the folder of the run cannot be read: {error}") from error
        if wrong:
            raise TPPError(
                f"{path} is not a {'folder' if folder else 'file'}, but a run has one "
                "there: move it away, or use another --workdir"
            )


@contextlib.contextmanager
def errors_explained(workdir: pathlib.Path) -> Iterator[None]:
    """Turns operating-system errors about a folder into a TPPError.

    Raises:
      TPPError: An OSError concerned the folder, something in it or a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DISK:
            raise TPPError(
                f"{workdir} can no longer be written to ({error}). The checkpoints in "
                "it are intact: free disk space, and the same command continues"
            ) from error
        paths = [os.fsdecode(x) for x in (error.filename, error.filename2) if x]
        if not any(_within(path, workdir) for path in paths):
            raise
        raise TPPError(
            f"the folder {workdir} cannot be used: {error}. Fix this, or use another "
            "--workdir"
        ) from error


def _within(path: str, folder: pathlib.Path) -> bool:
    return pathlib.Path(path).absolute().is_relative_to(folder.absolute())


def write(file: pathlib.Path, text: str) -> None:
    """Writes a text in UTF-8; a killed run leaves the old or the new file."""
    partial = file.with_name(file.name + ".partial")
    # Lone surrogates, which stand for bytes that are not UTF-8, become \\udc….
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, file)


def read_if_legible(file: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a file of JSON; empty if there is none, or it is damaged.

    For files that only the report shows: without them it is still drawn.
    """
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_config(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """Writes the config of a run, for people and :func:`own_config`.

    Raises:
      TPPError: A file of that name is not a config.
    """
    own_config(workdir)
    write(workdir / CONFIG, json.dumps(config, indent=2))


def config_of(
    workdir: str | pathlib.Path | None, config: ml_collections.ConfigDict, given: bool
) -> ml_collections.ConfigDict:
    """Returns the config of the run in a folder, or another one without a run.

    Args:
      workdir: Folder of a run; None for no folder.
      config: Config to use without a run. Its ``data.dir``, if set, is always used,
        since the data may have moved.
      given: Whether the user asked for ``config``, so that a message appears if it is
        not used.

    Raises:
      TPPError: The run's config cannot be read.
    """
    own = None if workdir is None else own_config(pathlib.Path(workdir))
    if own is None:
        return config
    if given and (found := differences(own, config.to_dict())):
        more = f" and {len(found) - 3} more fields" if found[3:] else ""
        say(
            f"The config of the run in {workdir} is used and not the given one "
            f"({'; '.join(found[:3])}{more}). Omit --workdir to use the given config."
        )
    check_known(own, config, str(workdir))
    used = ml_collections.ConfigDict(with_defaults(own))
    if moved := flat(config).get("data.dir"):
        used.update_from_flattened_dict({"data.dir": moved})
    return used


def own_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the config of the run in a folder, a nested dict; None without a run.

    Raises:
      TPPError: The file of the config cannot be read.
    """
    for name in (CONFIG, "summary.json"):
        file = workdir / name
        if not file.exists():
            continue
        try:
            content = json.loads(file.read_bytes())
            found = content if name == CONFIG else content["config"]
            for section in ("model", "data", "prune"):
                found[section].keys()
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise TPPError(
                f"{file} is not the config of a run ({type(error).__name__}), but a "
                "run has its config there: move it away, or use another --workdir"
            ) from error
        return found
    for name in ("model", "dense"):  # earlier versions wrote no config file
        if (workdir / name).is_dir():
            return load_model_info(workdir / name)["config"]
    return None
