"""Loads a folder of weights into eight devices, and prints by how much memory grew.

python -m tests.sharded.load_folder FOLDER
"""

import json
import pathlib
import re
import sys

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import tpp_jax as tpp


def peak():
    """The most memory that the process has used so far, in bytes.

    The number of ``resource.getrusage`` includes that of the process that started it.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def main(folder):
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    jax.block_until_ready(jax.device_put(0.0, jax.devices()[7]))
    before = peak()
    everywhere = NamedSharding(mesh, PartitionSpec("model", "data"))
    model, _ = tpp.load_hf(folder, sharding=everywhere)
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    held = [part.data.nbytes for x in leaves for part in x.addressable_shards]
    print(json.dumps([peak() - before, sum(held)]))


if __name__ == "__main__":
    main(sys.argv[1])
