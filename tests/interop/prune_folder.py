"""Prunes a folder of weights in a process whose memory is limited, and prints its peak.

python -m tests.interop.prune_folder FOLDER TARGET BYTES
"""

import pathlib
import sys

import tpp_jax as tpp
from tests.limited_memory import peak
from tpp_jax.interop import pruned_folders

RATIOS = {"*.mlp.gate_proj": 0.25}


def main(folder, target, extra):
    # Files of 1 GiB would hold all of a small model.
    pruned_folders._FILE_BYTES = 2**24
    # The library's own arrays and programs, before anything large is read.
    small = pathlib.Path(folder) / "small"
    tpp.prune_hf(small, small / "pruned", RATIOS)
    print(peak(lambda: tpp.prune_hf(folder, target, RATIOS), int(extra)))


if __name__ == "__main__":
    main(*sys.argv[1:])
