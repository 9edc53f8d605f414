"""Paths that Orbax and TensorStore understand, for folders whose names they do not.

Orbax treats ``[old]`` in the path of a folder as a pattern, finds none of the files
that it wrote, and leaves a checkpoint without arrays. TensorStore treats a backslash as
a slash and writes elsewhere. Neither supports bytes that are not UTF-8. Therefore they
get a link with a plain name.
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
    """Yields a path to a folder without characters that would be misread.

    Args:
      path: Path of the folder.
      new: Whether the folder will be created or replaced. The link then leads to its
        parent, which is created if missing.

    Yields:
      The absolute path itself, or one through a link that is removed afterwards.

    Raises:
      TPPError: If a link is impossible, or the last name of a new folder would be
        misread.
    """
    path = pathlib.Path(path).absolute()
    if not _MISREAD.search(str(path)):
        yield path
        return
    if jax.process_count() > 1 or (new and _MISREAD.search(path.name)):
        raise TPPError(
            f"checkpoints cannot be written to {path}, since Orbax misreads "
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
                f"the name of {path} would be misread by Orbax, and a link to it "
                f"cannot be created ({error}): use another folder"
            ) from error
        yield link / rest
    finally:
        shutil.rmtree(folder, ignore_errors=True)
