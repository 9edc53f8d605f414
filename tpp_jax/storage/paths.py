"""Paths that Orbax and TensorStore understand, of folders whose names they do not.

Orbax takes ``[old]`` in the path of a folder for a pattern, finds none of the files
that it wrote, and leaves a checkpoint without arrays. TensorStore takes a backslash for
a slash and writes elsewhere. Neither takes bytes that are no UTF-8. So they are given a
link of a plain name.
"""

import contextlib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

import jax

from tpp_jax.errors import TPPError

_MISREAD = re.compile(r"[*?\[\\:\ud800-\udfff]")


@contextlib.contextmanager
def plain(path: str | pathlib.Path, *, new: bool = False) -> Iterator[pathlib.Path]:
    """Gives a path to a folder that holds no character that would be misread.

    Args:
      path: Of the folder.
      new: Whether it is to be made or replaced: then the link is to its parent, which
        is made if missing.

    Yields:
      The absolute path itself, or one through a link that is removed afterwards.

    Raises:
      TPPError: There can be no link, or the last name of a new folder is one that would
        be misread.
    """
    path = pathlib.Path(path).absolute()
    if not _MISREAD.search(str(path)):
        yield path
        return
    if jax.process_count() > 1 or (new and _MISREAD.search(path.name)):
        raise TPPError(
            f"checkpoints cannot be written to {path}, since their library misreads "
            "one of * ? [ \\ : in its name: use another folder"
        )
    target, rest = (path.parent, path.name) if new else (path, "")
    if new:
        target.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="tpp_jax-")
    try:
        link = pathlib.Path(folder) / "link"
        try:
            os.symlink(target, link, target_is_directory=True)
        except OSError as error:
            raise TPPError(
                f"the name of {path} would be misread by the library of checkpoints, "
                f"and a link to it cannot be made ({error}): use another folder"
            ) from error
        yield link / rest
    finally:
        shutil.rmtree(folder, ignore_errors=True)
