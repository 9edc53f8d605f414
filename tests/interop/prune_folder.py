"""Prunes a folder of weights in a process whose memory is limited, and prints its peak.

python -m tests.interop.prune_folder FOLDER TARGET BYTES
"""

import pathlib
import resource
import sys

import tpp_jax as tpp
from tpp_jax.interop import pruned_folders


def status(field):
    """Returns a number of bytes that Linux reports of this process."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def main(folder, target, extra):
    # Files of 1 GiB would hold all of a small model.
    pruned_folders._FILE_BYTES = 2**24
    # The library's own arrays and programs, before anything large is read.
    small = pathlib.Path(folder) / "small"
    tpp.prune_hf(small, small / "pruned", {"*.mlp.gate_proj": 0.25})
    limit = status("VmData") + int(extra)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = status("VmHWM")
    tpp.prune_hf(folder, target, {"*.mlp.gate_proj": 0.25})
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
