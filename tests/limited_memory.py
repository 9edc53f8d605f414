"""Programs that run in a process whose memory is limited, and print its peak."""

import os
import pathlib
import resource
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def peak_of(module, *arguments):
    """Runs a module that prints what :func:`peak` returns; returns the number."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


def peak(work, extra):
    """Calls a function in this process, which gets so many more bytes of memory.

    Returns:
      By how many bytes the peak of the process rose.
    """
    limit = _status("VmData") + extra
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = _status("VmHWM")
    work()
    return _status("VmHWM") - before


def _status(field):
    """Returns a number of bytes that Linux reports of this process."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])
