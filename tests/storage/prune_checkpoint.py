"""Prunes a checkpoint in a process whose memory is limited, and prints its peak.

python -m tests.storage.prune_checkpoint FOLDER SIZE BYTES
"""

import pathlib
import sys
import threading

import jax
import numpy as np
from orbax.checkpoint.experimental import v1

import tpp_jax as tpp
from tests.limited_memory import peak
from tpp_jax.storage import orbax_trees


def net(params, x):
    for i in range(len(params)):
        x = jax.nn.relu(x @ params[f"{i}"]["w"]) @ params[f"{i}"]["v"]
    return x


def layers(width, size):
    """Yields blocks of kernels [width, width] of SIZE bytes in all."""
    draws = np.random.default_rng(0)
    for i in range(size // (8 * width**2)):
        pair = draws.normal(size=(2, width, width)).astype(np.float32)
        yield f"{i}", {"w": pair[0], "v": pair[1]}


def main(folder, size, extra):
    folder, width = pathlib.Path(folder), 1024
    # All of a small checkpoint would fit into 256 MiB.
    orbax_trees._BATCH_BYTES = 2**23
    for name, block in layers(width, int(size)):
        v1.partial.save(folder / "dense", {name: block})
    v1.partial.finalize(folder / "dense")
    shapes = v1.metadata(folder / "dense").metadata
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    x = jax.ShapeDtypeStruct((1, width), np.float32)
    groups = tpp.channel_groups(net, x, params=params)
    # The library's own arrays and programs, before anything large is read.
    few = {"0": next(layers(64, 8 * 64**2))[1]}
    v1.save(folder / "few", few)
    own = tpp.channel_groups(net, jax.ShapeDtypeStruct((1, 64), np.float32), params=few)
    tpp.prune_orbax(folder / "few", folder / "fewer", own, 0.5)
    threading.stack_size(2**18)  # Orbax's threads, whose stacks count as memory
    dense, small = folder / "dense", folder / "small"
    print(peak(lambda: tpp.prune_orbax(dense, small, groups, 0.5), int(extra)))


if __name__ == "__main__":
    main(*sys.argv[1:])
