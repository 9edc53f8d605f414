"""Peak memory and time of each mode of launch.py.

    python -m benchmarks.jobs

On digits: a complete training run, then the other modes on its results, each in a
process of its own. The first process starts with an empty compilation cache, the others
use its cache. *Device* is the memory that JAX allocated on an accelerator; on the CPU
it is part of the memory of the process.
"""

import argparse
import json
import os
import pathlib
import resource
import runpy
import subprocess
import sys
import tempfile
import time

CONFIG = pathlib.Path(__file__).parents[1] / "configs/digits_resnet8_tpp.py"
NETWORKS = "cifar_resnet8", "cifar_resnet56"
MODES = "train", "evaluate", "report", "profile", "inspect"
_SAID = "jobs, measured: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--child", action="store_true", help="measure launch.py")
    options, flags = parser.parse_known_args()
    if options.child:
        _measure(flags)
        return
    from benchmarks import machine

    print(f"{'':<26}{'seconds':>10}{'host, GiB':>11}{'device, GiB':>13}")
    rows = {}
    for name in options.networks:
        with tempfile.TemporaryDirectory() as workdir:
            for mode in MODES:
                rows[f"{name}, {mode}"] = found = _run(name, mode, workdir)
                device = found["device_gib"]
                shown = f"{'–':>13}" if device is None else f"{device:>13.2f}"
                times = f"{found['seconds']:>10.1f}{found['host_gib']:>11.2f}"
                print(f"{name + ', ' + mode:<26}{times}{shown}", flush=True)
    print(machine.write("jobs", {"jobs": rows}))


def _run(name: str, mode: str, workdir: str) -> dict[str, float]:
    flags = [f"--mode={mode}", f"--workdir={workdir}"]
    if mode in ("train", "inspect"):
        flags += [f"--config={CONFIG}", f"--config.model.name={name}"]
        flags += ["--config.prune.schedule.zero_out_every=1"]  # for many layers
    command = [sys.executable, "-m", "benchmarks.jobs", "--child", *flags]
    environment = os.environ | {"XDG_CACHE_HOME": f"{workdir}/cache"}
    # As launch.py sets it when it is started directly.
    environment |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    said = [row for row in done.stdout.splitlines() if row.startswith(_SAID)]
    return json.loads(said[-1].removeprefix(_SAID))


def _measure(flags: list[str]) -> None:
    """Runs launch.py in this process and prints its time and memory."""
    start = time.perf_counter()
    launch = str(CONFIG.parents[1] / "launch.py")
    sys.argv = [launch, *flags]
    try:
        runpy.run_path(launch, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    seconds = time.perf_counter() - start
    import jax

    stats = [device.memory_stats() for device in jax.local_devices()]
    peak = max((x["peak_bytes_in_use"] for x in stats if x), default=None)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {
        "seconds": seconds,
        "host_gib": host / 2**30,
        "device_gib": None if peak is None else peak / 2**30,
    }
    print(_SAID + json.dumps(found))


if __name__ == "__main__":
    main()
