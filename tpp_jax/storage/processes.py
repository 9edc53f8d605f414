"""Several processes, on one host or many, that train one network.

Every process runs the same program on the devices of all processes, and computes the
same plan and the same numbers. Only the first process writes metrics, pictures and the
summary. Orbax writes checkpoints from all processes, so the hosts must share the folder
of the run.
"""

import contextlib
import pathlib
import zlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from tpp_jax.errors import TPPError


class LostProcess(TPPError):
    """Another process of the run has ended, so that the run cannot continue."""


def is_first() -> bool:
    """Returns whether this process is the one that writes."""
    return jax.process_index() == 0


def largest(number: int) -> int:
    """Returns the largest number of all processes; every process must call this.

    Args:
      number: Number of this process.
    """
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def check_shared(workdir: pathlib.Path, config: str) -> None:
    """Checks that all processes have the same config and the same folder.

    Args:
      workdir: Folder of the run, in which the first process has created its lock.
      config: Config as text.

    Raises:
      TPPError: If the configs or the folders differ.
    """
    if jax.process_count() == 1:
        return
    number = zlib.crc32(config.encode()) >> 1  # an int32
    if largest(number) != -largest(-number):
        raise TPPError(
            "the processes of the run were started with different configs: start all "
            "of them with the same flags, except --process_id"
        )
    if largest(not (workdir / "lock").exists()):
        raise TPPError(
            f"{workdir} is not the same folder for all processes of the run: put it on "
            "a disk that their hosts share"
        )


def wait_for_all(name: str) -> None:
    """Waits until all processes have called this function.

    Args:
      name: Name of the place, the same for all processes.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def explained_losses() -> Iterator[None]:
    """Reports a broken connection during a computation as the loss of a process.

    Raises:
      LostProcess: If another process has ended.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_loss(error):
            raise
        raise lost(error) from error


def is_loss(error: BaseException | None) -> bool:
    """Reports whether an error, or one that caused it, is a broken connection."""
    if jax.process_count() == 1 or error is None:
        return False
    broken = isinstance(error, jax.errors.JaxRuntimeError)
    return broken or is_loss(error.__cause__)


def lost(error: BaseException) -> LostProcess:
    """Returns the error to raise for the loss of a process."""
    return LostProcess(
        "another process of the run is lost "
        f"({' '.join(str(error).split())[:200]}). Start all of them again: they "
        "continue from the last checkpoint"
    )
