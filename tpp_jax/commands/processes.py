"""The process of a command among those that run it together."""

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
    """Joins this process with the others, before anything uses a device.

    The processes communicate through Gloo on CPUs, NCCL on GPUs and the interconnect on
    TPUs.

    Args:
      coordinator: Address ``host:port`` of the first process, the same for all; or
        ``"auto"``, where JAX finds the others itself (Slurm, Open MPI, Cloud TPU,
        Kubernetes); or None, for a single process.
      num_processes: Total number of processes; not needed for ``"auto"``.
      process_id: Index of this process, from 0; not needed for ``"auto"``.
      timeout: Seconds to wait for the others to start, and until a process that no
        longer answers counts as lost.

    Raises:
      TPPError: the arguments do not go together, or the others cannot be reached.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise TPPError("--num_processes and --process_id need --coordinator too")
        return
    automatic = coordinator == AUTOMATIC
    if not automatic and (num_processes is None or process_id is None):
        raise TPPError(
            f"--coordinator={coordinator} needs --num_processes and --process_id too: "
            "how many processes there are, and which one this is, from 0"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Where the first process dies, JAX aborts the others and says why; the stacks of
    # all their threads would bury that.
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
            f"the processes of the run did not find each other by {coordinator!r} "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


def leave(message: str) -> NoReturn:
    """Ends this process with a message and exit code 1, whatever the others do.

    Python's normal exit waits in JAX for the other processes, and one may be lost.

    Args:
      message: Text for standard error.
    """
    if jax.process_count() == 1:
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
