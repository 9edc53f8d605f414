"""The Gram penalty from the rows of pruned filters, beside that of the whole matrix.

    python -m benchmarks.gram_rows

Kernels of several networks, with a quarter and with half of their filters pruned. Both
are measured in turns, in processor time; what is recorded is the median of five ratios
(below 1, the rows take less). Results are written to ``results/gram_rows_cpu.json``.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from tpp_jax.method.gram import gram_penalty_and_grad
from tpp_jax.method.gram_rows import rows_penalty_and_grad

KERNELS = {
    "ResNet-56, stage 1": (3, 3, 16, 16),
    "ResNet-56, stage 3": (3, 3, 64, 64),
    "VGG-19, 512 channels": (3, 3, 512, 512),
    "SmolLM2-135M, MLP": (576, 1536),
}


def main() -> None:
    load, rows = machine.load(), {}
    for name, shape in KERNELS.items():
        for share in (0.25, 0.5):
            rows[f"{name}, {share:.0%}"] = ratio = measured(shape, share)
            print(f"{name:22} {share:4.0%} pruned: {ratio:.2f}", flush=True)
    machine.write("gram_rows", {"ratios": rows, "load": load})


def measured(shape: tuple[int, ...], share: float) -> float:
    """Returns the time from the rows over that from the whole matrix."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
    n = shape[-1]
    count = int(n * share)
    mask = jnp.asarray(rng.permutation(n) < count)
    by_rows = functools.partial(
        rows_penalty_and_grad, count=count, target="decorrelate", axis=len(shape) - 1
    )
    ways = [jax.jit(gram_penalty_and_grad), jax.jit(by_rows)]
    times = 300 if n < 100 else 10
    ratios = []
    for _ in range(6):  # the first is compilation
        whole, rows = (_seconds(way, kernel, mask, times) for way in ways)
        ratios.append(rows / whole)
    return round(statistics.median(ratios[1:]), 3)


def _seconds(way: Callable[..., Any], kernel: Any, mask: Any, times: int) -> float:
    before, result = time.process_time(), None
    for _ in range(times):
        result = way(kernel, mask)
    jax.block_until_ready(result)
    return time.process_time() - before


if __name__ == "__main__":
    main()
