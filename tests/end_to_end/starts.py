"""Starts launch.py many times without importing everything each time.

A process imports what a run imports, once, and forks for each start. What is forked has
the arguments, the environment and the files of its output that a process of its own
would have, runs the file as the main program, and ends as Python does. That the
command also starts by itself is tested where it is started by ``subprocess``.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import os
import pathlib
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import warnings

from tests.pictures import sketched
from tpp_jax.reports import plots

ROOT = pathlib.Path(__file__).parents[2]

# No module of the package is missing here that a run would import.
_IMPORTED = [
    *(f"tpp_jax.commands.{name}" for name in "command_line evaluate inspect".split()),
    *(f"tpp_jax.commands.{name}" for name in "processes profile report sweep".split()),
    *("tpp_jax.experiment.run", "tpp_jax.experiment.config_docs"),
    *("absl.app", "ml_collections.config_flags", "matplotlib.pyplot", "tensorboardX"),
    *("orbax.checkpoint", "sklearn.datasets", "grain", "PIL.Image"),
]


class Started:
    """A process that was started, used like that of ``subprocess.Popen``.

    Attributes:
      pid: Number of the process.
      returncode: Its exit code, minus the signal if one ended it; None while it runs.
    """

    def __init__(self, server: socket.socket, *message):
        self._output = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        status, other_end = os.pipe()
        files = [*(file.fileno() for file in self._output), other_end]
        socket.send_fds(server, [pickle.dumps(message)], files)
        os.close(other_end)
        self._status = os.fdopen(status)
        self.pid = int(self._status.readline())
        self.returncode = None

    def poll(self, wait: float = 0) -> int | None:
        """Returns the exit code if the process has ended, or does within a time."""
        if self.returncode is None and select.select([self._status], [], [], wait)[0]:
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def kill(self) -> None:
        """Ends the process without any warning."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 600) -> int:
        """Waits for the end; returns the exit code."""
        code = self.poll(timeout)
        if code is None:
            raise TimeoutError(f"process {self.pid} still runs")
        return code

    def said(self) -> bool:
        """Whether the process has written anything to its output."""
        return os.fstat(self._output[0].fileno()).st_size > 0

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Waits for the end; returns the output and the errors."""
        self.wait(timeout)
        said: list[str] = []
        for file in self._output:
            with file:
                file.seek(0)
                said.append(file.read().decode())
        return said[0], said[1]


class Separate(Started):
    """A process that imports everything itself, where forking is not safe."""

    def __init__(self, words: list[str], environment: dict[str, str], folder: str):
        self._output = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, *words],
            cwd=folder or ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output[0],
            stderr=self._output[1],
        )
        self.pid, self.returncode = self._process.pid, None

    def poll(self, wait: float = 0) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.returncode = self._process.wait(wait)
        return self.returncode

    def kill(self) -> None:
        self._process.kill()


def start(
    *arguments: str,
    program: str = "launch.py",
    locale: str = "",
    pictures: bool = True,
    folder: str | os.PathLike[str] = "",
    **variables: str,
) -> Started:
    """Starts launch.py or another program.

    Args:
      *arguments: What follows the program on the command line.
      program: File of the program.
      locale: Locale in place of the user's.
      pictures: Whether the pictures of a report are made, the slowest part of it.
      folder: Working directory; "" for the top of the checkout.
      **variables: Changes to the environment.
    """
    environment = _environment(locale) | variables
    program = os.fspath(ROOT / program)
    if sys.platform != "linux":
        return Separate([program, *arguments], environment, os.fspath(folder))
    words = [os.fsencode(word) for word in (program, *arguments)]
    values = {os.fsencode(k): os.fsencode(v) for k, v in environment.items()}
    return Started(_server(locale), words, values, pictures, os.fspath(folder))


def _environment(locale: str) -> dict[str, str]:
    plain = {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    return os.environ | {"COLUMNS": "100"} | (plain if locale else {})


@functools.cache
def _server(locale: str) -> socket.socket:
    """Returns the connection to a process that starts others, in a locale."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.end_to_end.starts", str(its.fileno())],
        cwd=ROOT,
        env=_environment(locale),
        pass_fds=[its.fileno()],
    )
    its.close()
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def _serve(requests: socket.socket) -> tuple[list[bytes], bool, str]:
    """Forks for each request, until there are no more; returns in what was forked."""
    while True:
        message, files, *_ = socket.recv_fds(requests, 2**20, 3)
        if not message:
            os._exit(0)
        if os.fork():
            for file in files:
                os.close(file)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass
        elif not _watch(files[2]):
            break
    requests.close()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, file in enumerate(files[:2], start=1):
        os.dup2(file, target)
    for file in files:
        os.close(file)
    words, environment, pictures, folder = pickle.loads(message)
    os.environb.clear()
    os.environb.update(environment)
    return words, pictures, folder


def _watch(status: int) -> bool:
    """Forks; waits, where it returns True, for the other, and writes how that ended."""
    pid = os.fork()
    if pid:
        os.write(status, f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(status, f"{code}\n".encode())
        os._exit(0)
    return False


if __name__ == "__main__":
    for module in _IMPORTED:
        importlib.import_module(module)
    # Threads of libraries for linear algebra, which know how to fork.
    warnings.filterwarnings("ignore", message="This process .* is multi-threaded")
    gc.freeze()  # what was imported is not looked through for garbage again
    gc.set_threshold(50_000, 20, 10)
    words, pictures, folder = _serve(socket.socket(fileno=int(sys.argv[1])))
    os.chdir(folder or ROOT)
    if not pictures:
        plots.save = sketched
    sys.argv = [os.fsdecode(word) for word in words]
    runpy.run_path(sys.argv[0], run_name="__main__")
