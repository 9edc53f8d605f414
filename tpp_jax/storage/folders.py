"""Atomic replacement of folders: any interruption leaves the old or the new one.

A new folder is written inside a hidden work folder in the same parent, and replaces the
old one by two renames. Between the two, the old one is in the work folder, where
:func:`whereabouts` finds it.
"""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import socket
import time
import uuid
from collections.abc import Iterator

from tpp_jax.errors import TPPError

MANIFEST = "saved_model.json"
"""File of a saved model that lists all its other files."""

NEW = "new"
"""Name in a work folder of the folder that will replace the target."""

# Files that Orbax writes at the top of a saved model. Models of older versions of this
# library contain no others, and no manifest.
_OF_ORBAX = {"_CHECKPOINT_METADATA", "commit_success.txt", "_METADATA", "_sharding"}
# Files that file managers create in the folders they show.
_OF_SYSTEMS = {".DS_Store", "Thumbs.db", "desktop.ini"}
_DAY = 86_400  # seconds
_OF_THE_DISK = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO


def resolved(path: str | pathlib.Path) -> pathlib.Path:
    """Returns the absolute path that a path leads to, after following links.

    Args:
      path: Path to resolve.

    Raises:
      TPPError: If it leads in a circle.
    """
    circle = f"{path} is a link that leads in a circle"
    try:
        target = pathlib.Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise TPPError(circle) from error
    # From Python 3.13 on, `resolve` returns such links as they are.
    if any(part.is_symlink() for part in (target, *target.parents)):
        raise TPPError(circle)
    return target


def whereabouts(target: pathlib.Path) -> pathlib.Path:
    """Returns the location of a folder's content: its path or, mid-swap, another.

    Args:
      target: Resolved path of the folder.
    """
    if not target.exists():
        for work in _work_folders(target):
            if (work / "old").is_dir() and (work / NEW).is_dir():
                return work / "old"
    return target


def check_replaceable(target: pathlib.Path) -> None:
    """Checks that a target contains nothing but a saved model.

    Args:
      target: Resolved path of the folder to replace.

    Raises:
      TPPError: If it is a file, or a folder with files that are not of a saved model.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise TPPError(
            f"{target} is a file, which save_model does not replace: choose a separate "
            "folder for the model"
        )
    try:
        foreign = _foreign(target)
    except OSError as error:
        raise TPPError(
            f"{target} cannot be read ({error.strerror}), so save_model does not "
            "replace it"
        ) from error
    if foreign is not None:
        raise TPPError(
            f"{target} is not replaced, since it holds more than a saved model: "
            f"{foreign!r}. Choose a separate folder for the model"
        )


def _foreign(folder: pathlib.Path) -> str | None:
    """Returns a file in a folder that no saved model has; None if there is none."""
    names = sorted(e.name for e in folder.iterdir() if e.name not in _OF_SYSTEMS)
    if not names:
        return None
    if MANIFEST in names:
        try:
            known = {MANIFEST, *json.loads((folder / MANIFEST).read_text())["files"]}
        except (ValueError, KeyError, TypeError):
            return MANIFEST
        unknown = [name for name in files_in(folder) if name not in known]
        return next((n for n in unknown if n not in _OF_SYSTEMS), None)
    unknown = [name for name in names if name not in {"arrays", "meta", *_OF_ORBAX}]
    if unknown:
        return unknown[0]
    try:
        meta = json.loads((folder / "meta" / "metadata").read_text())
        ours = {"model", "plan", "config", "metrics"} <= set(meta)
    except (OSError, ValueError, TypeError):
        ours = False
    return None if ours else names[0]


def files_in(folder: pathlib.Path) -> list[str]:
    """Returns the relative paths of all files and links in a folder, sorted.

    Args:
      folder: Folder to search, with the folders in it.
    """
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [os.path.join(parent, name) for name in files + links]
    return sorted(pathlib.Path(file).relative_to(folder).as_posix() for file in found)


def _raise(error: OSError) -> None:
    raise error


@contextlib.contextmanager
def work_folder(
    target: pathlib.Path, shared: bool = False, make: bool = True
) -> Iterator[pathlib.Path]:
    """Creates a folder to write in, next to a target, and removes it in any case.

    The traces of killed processes are cleaned up first: a target that one of them had
    moved is restored, and their work folders are removed.

    Args:
      target: Resolved path of the folder to replace.
      shared: Whether several processes write into the same work folder.
      make: Whether this process creates and removes it.

    Yields:
      The path of the work folder.
    """
    tag = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    work = target.parent / f"{_prefix(target)}{'shared' if shared else tag}"
    if not make:
        yield work
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    current = whereabouts(target)
    if current != target:
        current.rename(target)
    for other in _work_folders(target):
        if other == work or _is_abandoned(other):
            shutil.rmtree(other, ignore_errors=True)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def swap(work: pathlib.Path, target: pathlib.Path) -> None:
    """Replaces a target by the new folder in a work folder.

    Args:
      work: Work folder with the complete folder ``new``; the old target is moved here.
      target: Resolved path of a folder, which need not exist.
    """
    new, old = work / NEW, work / "old"
    _to_disk(new)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _to_disk(target.parent, deep=False)


def why(error: Exception) -> str:
    """Returns the message of the system, which tensorstore wraps in long texts.

    Args:
      error: Exception raised while writing.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    known = (os.strerror(code) for code in _OF_THE_DISK)
    return next((words for words in known if words in text), text[:200])


def _prefix(target: pathlib.Path) -> str:
    return f".{target.name}.saving-"


def _work_folders(target: pathlib.Path) -> list[pathlib.Path]:
    if not target.parent.is_dir():
        return []
    prefix = _prefix(target)
    return sorted(f for f in target.parent.iterdir() if f.name.startswith(prefix))


def _is_abandoned(work: pathlib.Path) -> bool:
    """Returns whether the process that created a work folder has ended.

    A process on another machine is assumed to have ended after a day.
    """
    host, _, rest = (
        work.name.partition(".saving-")[2].rpartition("-")[0].rpartition("-")
    )
    if host == socket.gethostname() and rest.isdigit():
        try:
            os.kill(int(rest), 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
        return False
    try:
        return time.time() - work.stat().st_mtime > _DAY
    except OSError:
        return False


def _to_disk(folder: pathlib.Path, deep: bool = True) -> None:
    """Flushes a folder to disk, so that a later rename cannot precede its content."""
    entries = [folder, *(folder.rglob("*") if deep else ())]
    for entry in entries:
        try:
            file = os.open(entry, os.O_RDONLY)
        except OSError:
            continue  # not every system opens folders
        try:
            with contextlib.suppress(OSError):  # not every system supports fsync
                os.fsync(file)
        finally:
            os.close(file)
