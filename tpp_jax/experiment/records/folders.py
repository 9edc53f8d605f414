"""The folder of a run or a sweep: the kinds of its files, and the config in it."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_collections

from tpp_jax.errors import TPPError
from tpp_jax.experiment.config import differences
from tpp_jax.experiment.fields import flat
from tpp_jax.experiment.records.terminal import say
from tpp_jax.saving import load_model_info

CONFIG = "config.json"

_FOLDERS = ("checkpoints", "tensorboard", "dense", "model", "best", "cells")
_PICTURES = ("curves", "channels", "jacobian", "gram")
_FILES = (CONFIG, "lock", "metrics.jsonl", "summary.json", "gram.npz", "report.html")
_FILES += ("table.json", "table.md", "table.csv", "profile.json", "groups.svg")
_FILES += tuple(f"{name}.{kind}" for name in _PICTURES for kind in ("png", "svg"))

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def make(workdir: pathlib.Path) -> None:
    """Makes the folder of a run, and checks that the run can use what is there.

    Raises:
      TPPError: It cannot be made, or a file is in the place of a folder or the reverse.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TPPError(f"the folder of the run cannot be made: {error}") from error
    check_kinds(workdir)


def check_kinds(workdir: pathlib.Path) -> None:
    """Checks that files and folders in a run's folder are of the kind that it writes.

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
                f"{path} is no {'folder' if folder else 'file'}, but a run has one "
                "there: move it away, or use another --workdir"
            )


@contextlib.contextmanager
def errors_explained(workdir: pathlib.Path) -> Iterator[None]:
    """Turns errors of the system about the files in a folder into a TPPError.

    Raises:
      TPPError: An OSError was raised about the folder or something in it, or about a
        full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DISK:
            raise TPPError(
                f"{workdir} can no longer be written to ({error}). The checkpoints in "
                "it are whole: make room on the disk, and the same command goes on"
            ) from error
        paths = [os.fsdecode(x) for x in (error.filename, error.filename2) if x]
        if not any(_within(path, workdir) for path in paths):
            raise
        raise TPPError(
            f"the folder {workdir} cannot be used: {error}. Set that right, or use "
            "another --workdir"
        ) from error


def _within(path: str, folder: pathlib.Path) -> bool:
    return pathlib.Path(path).absolute().is_relative_to(folder.absolute())


def write(file: pathlib.Path, text: str) -> None:
    """Writes a text in UTF-8; a run killed meanwhile leaves the old file or the new."""
    partial = file.with_name(file.name + ".partial")
    # Lone surrogates, which stand for bytes that are no UTF-8, are written as \\udc….
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, file)


def write_config(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """Writes the config of a run, for people and :func:`own_config`.

    Raises:
      TPPError: There is a file of that name that holds no config.
    """
    own_config(workdir)
    write(workdir / CONFIG, json.dumps(config, indent=2))


def config_of(
    workdir: str | pathlib.Path | None, config: ml_collections.ConfigDict, given: bool
) -> ml_collections.ConfigDict:
    """Returns the config of the run in a folder, or a given one if there is no run.

    Args:
      workdir: Folder, if any.
      config: Config to use without a run. Its ``data.dir``, if set, is used in any
        case: the data may have moved.
      given: Whether the user asked for ``config``: if it is not used, a line says so.

    Raises:
      TPPError: The run's config cannot be read.
    """
    own = None if workdir is None else own_config(pathlib.Path(workdir))
    if own is None:
        return config
    if given and (found := differences(own, config.to_dict())):
        more = f" and {len(found) - 3} more fields" if found[3:] else ""
        say(
            f"The run in {workdir} is shown by its own config, not by the one given "
            f"({'; '.join(found[:3])}{more}). Leave --workdir out to see that one."
        )
    used = ml_collections.ConfigDict(own)
    if moved := flat(config).get("data.dir"):
        used.update_from_flattened_dict({"data.dir": moved})
    return used


def own_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the config of the run in a folder, a nested dict; None without a run.

    Raises:
      TPPError: The file that should hold it cannot be read.
    """
    for name in (CONFIG, "summary.json"):
        file = workdir / name
        if not file.exists():
            continue
        try:
            content = json.loads(file.read_bytes())
            found = content if name == CONFIG else content["config"]
            for part in ("model", "data", "prune"):
                found[part].keys()
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
                "run has its own there: move it away, or use another --workdir"
            ) from error
        return found
    for name in ("model", "dense"):  # an earlier version wrote no file of its own
        if (workdir / name).is_dir():
            return load_model_info(workdir / name)["config"]
    return None
