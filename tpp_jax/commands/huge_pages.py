"""A command's memory in huge pages."""

import os
import pathlib
import sys

_TUNABLES = "GLIBC_TUNABLES"
_MODES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def start_again_with() -> None:
    """Replaces this process by one whose memory lies in huge pages, where that helps.

    XLA allocates the memory of a step again in every step. In pages of 4 KiB the system
    spends up to a fifth of a step on a CPU on making them; in huge pages, next to
    nothing. glibc reads the setting when a process starts, so that the command is
    started again; a ``GLIBC_TUNABLES`` that the user has set is respected.

    Returns where nothing is to be gained: the system is not Linux, gives out huge pages
    to all or to none, or this process runs more than the command, as a notebook does.
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
