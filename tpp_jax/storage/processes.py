"""Several processes, on one host or many, that train as one.

Every process runs the same program on the devices of all of them, and computes the same
plan, the same numbers, the same end. Only the first one writes: metrics, pictures, the
summary. Checkpoints are written by all together, as Orbax does, so the folder of the
run must be one that all hosts share.
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
    """Another process of the run is gone, and nothing can be done together any more."""


def is_first() -> bool:
    """Tells whether this process is the one that writes."""
    return jax.process_index() == 0


def largest(number: int) -> int:
    """Returns the largest of the numbers that the processes have; all must ask."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def check_alike(workdir: pathlib.Path, config: str) -> None:
    """Sees to it that all processes have one config, and one folder.

    Args:
      workdir: in which the first one has made its lock.
      config: as text.

    Raises:
      TPPError: they do not.
    """
    if jax.process_count() == 1:
        return
    number = zlib.crc32(config.encode()) >> 1  # an int32
    if largest(number) != -largest(-number):
        raise TPPError(
            "the processes of the run were started with different configs: give all of "
            "them the same flags, but for --process_id"
        )
    if largest(not (workdir / "lock").exists()):
        raise TPPError(
            f"{workdir} is not one folder that all processes of the run see: put it on "
            "a disk that their hosts share"
        )


def wait_for_all(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def losses_told() -> Iterator[None]:
    """Tells of a process that died what the computation says of a broken connection.

    Raises:
      LostProcess: another process is lost.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise LostProcess(
            "another process of the run is lost "
            f"({' '.join(str(error).split())[:200]}). Start all of them again: they go "
            "on from the last checkpoint"
        ) from error
