"""The processes of a command that runs on several hosts."""

import faulthandler
import os
import sys
from typing import NoReturn

import jax

from tpp_jax.errors import TPPError

AUTOMATIC = "auto"


def connect(
    coordinator: str | None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 100,
) -> None:
    """Connects this process to the others; call it before anything uses a device.

    The processes communicate through Gloo on CPUs, NCCL on GPUs and the interconnect on
    TPUs.

    Args:
      coordinator: Address ``host:port`` of the first process, the same for all;
        ``"auto"`` where JAX finds the others itself (Slurm, Open MPI, Cloud TPU,
        Kubernetes); None for a single process.
      num_processes: Total number of processes; not needed for ``"auto"``.
      process_id: Index of this process, from 0; not needed for ``"auto"``.
      timeout: Seconds to wait for the others to start, and seconds without an answer
        after which a process counts as lost.

    Raises:
      TPPError: The arguments are incomplete, or the others cannot be reached.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise TPPError("--num_processes and --process_id need --coordinator too")
        return
    automatic = coordinator == AUTOMATIC
    if not automatic and (num_processes is None or process_id is None):
        raise TPPError(
            f"--coordinator={coordinator} needs --num_processes and --process_id too: "
            "the total number of processes and the index of this one, from 0"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # On CPUs, programs that wait for each other at the same time may wait for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # If the first process dies, JAX aborts the others with a message, which the stacks
    # of all their threads would hide.
    faulthandler.disable()
    try:
        jax.distributed.initialize(
            None if automatic else coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise TPPError(
            f"the processes of the run did not find each other at {coordinator!r} "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


def leave(message: str) -> NoReturn:
    """Ends this process immediately with a message and exit code 1.

    Python's normal exit waits in JAX for the other processes, one of which may be lost.

    Args:
      message: Text for standard error.
    """
    if jax.process_count() == 1:
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
