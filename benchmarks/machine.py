"""What a result was measured on, and where results go."""

import json
import os
import pathlib
import platform
from typing import Any

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """Returns the machine, the devices and the versions that matter."""
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
    """Returns how many processes wanted to run in the last minute, on average.

    Above zero before a measurement, other work shared the machine.
    """
    return round(os.getloadavg()[0], 2)


def write(name: str, result: dict[str, Any]) -> pathlib.Path:
    """Writes a result with the machine's description; returns the file."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}_{jax.default_backend()}.json"
    file.write_text(json.dumps({**result, "machine": describe()}, indent=2) + "\n")
    return file
