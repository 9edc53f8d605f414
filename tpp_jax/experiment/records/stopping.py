"""Signals that stop a run without loss, and the lock of a run's folder."""

import contextlib
import errno
import os
import pathlib
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from tpp_jax.errors import TPPError
from tpp_jax.experiment.records.terminal import say


class Stopped(SystemExit):
    """Raised when a signal has ended a run whose results are saved.

    The exit code is that of a shell: 128 + the number of the signal, so 143 for
    SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class Signals:
    """Context manager that records SIGTERM and SIGINT without ending the process.

    A second signal of the same number has its usual effect immediately.

    Attributes:
      asked: Number of the signal that arrived; 0 for none.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self.asked = signum
        signal.signal(signum, self._before[signum])


# Errors of a lock that another process holds; any other means that there are no locks.
_TAKEN = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Locks a run's folder against other processes, until this one ends or is killed.

    Some network and FUSE mounts have no locks. A folder there is used without a lock,
    and a message about it appears once.

    Raises:
      TPPError: Another process holds the lock, or the folder cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    try:
        file = (workdir / "lock").open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise TPPError(
            f"the folder of the run cannot be written to: {error}"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                file.seek(0)
                raise TPPError(
                    f"another run is using {workdir} "
                    f"({file.read(200).strip()}): use another --workdir, or wait until "
                    "it ends"
                ) from error
            _say_unlocked(workdir, error)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


_said: set[int] = set()


def _say_unlocked(workdir: pathlib.Path, error: OSError) -> None:
    """Prints a message, once per file system, that it has no locks."""
    device = workdir.stat().st_dev
    if device in _said:
        return
    _said.add(device)
    say(
        f"The file system of {workdir} has no locks ({error.strerror}), so nothing "
        "prevents a second run in the folder: start only one there."
    )
