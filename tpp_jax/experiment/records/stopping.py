"""Ends a run early without losing anything, and locks the folder of a run."""

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
    """A signal asked the run to end, and everything it did is saved.

    The exit code is that of a shell: 128 + the signal's number, 143 for SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class Signals:
    """Records SIGTERM and SIGINT, which do not end the process; a context manager.

    A second one of the same kind has its usual effect at once.

    Attributes:
      asked: Number of the signal that came; 0 for none.
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


# Reported for a lock that another process holds; all else means "no locks here".
_TAKEN = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Locks a run's folder against other processes; a killed one leaves no lock behind.

    Some network and FUSE mounts have no locks. There a line says so once, and the
    folder is used without one.

    Raises:
      TPPError: Another process has the lock, or the folder cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
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
                    f"another run is at work in {workdir} "
                    f"({file.read(200).strip()}): use another --workdir, or wait for "
                    "it to end"
                ) from error
            _say_unlocked(workdir, error)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


_said: set[int] = set()


def _say_unlocked(workdir: pathlib.Path, error: OSError) -> None:
    """Says once for each file system that it has no locks: a sweep has many runs."""
    device = workdir.stat().st_dev
    if device in _said:
        return
    _said.add(device)
    say(
        f"The file system of {workdir} has no locks ({error.strerror}), so nothing "
        "keeps a second run out of the folder: start only one there."
    )
