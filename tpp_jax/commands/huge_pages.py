"""Memory of a command in huge pages."""

import os
import pathlib
import sys

_TUNABLES = "GLIBC_TUNABLES"
_MODES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def start_again_with() -> None:
    """Replaces this process by one that uses huge pages, where that is faster.

    XLA allocates the memory of each step again. With pages of 4 KiB, the system spends
    up to a fifth of a step on a CPU on creating them; with huge pages, almost nothing.
    glibc reads the setting when a process starts, so the command is started again. A
    ``GLIBC_TUNABLES`` that the user has set is respected.

    The function returns if there is nothing to gain: the system is not Linux, gives
    huge pages to all processes or to none, or this process does more than run the
    command, such as a notebook.
    """
    if sys.platform != "linux" or _TUNABLES in os.environ or not _on_request():
        return
    if _started_by_itself():
        os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _on_request() -> bool:
    try:
        return "[madvise]" in _MODES.read_text()
    except OSError:
        return False


def _started_by_itself() -> bool:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    as_module = spec is not None and spec.name == "tpp_jax.__main__"
    return as_module or sys.argv[0] in sys.orig_argv
