"""Description of the machine of a result, and the folder of results."""

import json
import os
import pathlib
import platform
from typing import Any

import jax

_DEFAULT = pathlib.Path(__file__).parent / "results"
RESULTS = pathlib.Path(os.environ.get("BENCHMARK_RESULTS") or _DEFAULT)


def describe() -> dict[str, Any]:
    """Returns the machine, the devices and the relevant versions."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            row for row in cpuinfo.read_text().splitlines() if "model name" in row
        ]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
    }


def load() -> float:
    """Returns the mean number of runnable processes in the last minute.

    If it is above zero before a measurement, the machine was shared with other work.
    """
    return round(os.getloadavg()[0], 2)


def busy() -> float:
    """Returns how many seconds all processors together have worked since the start.

    Those of this process included; 0 on a system without ``/proc/stat``.
    """
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system = stat.read_text().split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def write(name: str, result: dict[str, Any]) -> pathlib.Path:
    """Writes a result with a description of the machine; returns the file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}_{jax.default_backend()}.json"
    file.write_text(json.dumps({**result, "machine": describe()}, indent=2) + "\n")
    return file
