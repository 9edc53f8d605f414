"""Single convolutions: XLA's own compared with those of tpp_jax/xla/convolution.py.

    python -m benchmarks.convolutions

The layers are those of the README's networks, unpruned and pruned: forward, and forward
with both gradients. Both sides alternate. Times are medians; ratios are medians over
neighbouring calls. Inside a network the gain is larger than here: there the images come
from a batch norm, which XLA repeats inside the gradient of a kernel
(``benchmarks.step``, ``plain / lax``).
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import machine
from tpp_jax.xla.convolution import compiler_options, use_fast_convolutions

# Batch, side of the images, side of the kernel, channels in and out, groups if any.
LAYERS = {
    "ResNet-56, stage 1": (128, 32, 3, 16, 16),
    "ResNet-56, stage 3": (128, 8, 3, 64, 64),
    "VGG-19, 4 × 4 pixels": (128, 4, 3, 512, 512),
    "VGG-19, 2 × 2 pixels": (128, 2, 3, 512, 512),
    "ResNet-50, 1 × 1, narrowing": (16, 28, 1, 512, 128),
    "ResNet-50, 1 × 1, widening": (16, 28, 1, 128, 512),
    "ResNet-56 at 0.9, to 1 of 16": (128, 32, 3, 16, 1),
    "ResNet-56 at 0.9, from 1 of 16": (128, 32, 3, 1, 16),
    "ResNet-56 at 0.9, to 6 of 64": (128, 8, 3, 64, 6),
    "ResNet-56 at 0.9, from 6 of 64": (128, 8, 3, 6, 64),
    "MobileNetV2, depthwise, 56 × 56": (16, 56, 3, 144, 144, 144),
    "MobileNetV2, depthwise, 7 × 7": (16, 7, 3, 960, 960, 960),
    "EfficientNet, depthwise 5 × 5": (16, 14, 5, 672, 672, 672),
    "ConvNeXt, depthwise 7 × 7": (16, 28, 7, 192, 192, 192),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    columns = "forward, ms", "XLA's own", "ratio", "gradients, ms", "XLA's own", "ratio"
    print(f"{'':<32}" + "".join(f"{column:>15}" for column in columns))
    load, rows = machine.load(), {}
    for name, sizes in LAYERS.items():
        rows[name] = {job: _measure(sizes, job, rounds) for job in ("call", "grad")}
        shown = ""
        for found in rows[name].values():
            shown += f"{1e3 * found['ours']:>15.2f}{1e3 * found['lax']:>15.2f}"
            shown += f"{found['ratio']:>15.3f}"
        print(f"{name:<32}{shown}", flush=True)
    print(machine.write("convolutions", {"load": load, "layers": rows}))


def _measure(sizes: tuple[int, ...], job: str, rounds: int) -> dict[str, Any]:
    batch, side, window, inputs, outputs, *groups = sizes
    draws = np.random.default_rng(0)
    images = jnp.asarray(draws.normal(size=(batch, side, side, inputs)), jnp.float32)
    layer = nnx.Conv(
        inputs,
        outputs,
        (window, window),
        feature_group_count=math.prod(groups),
        use_bias=False,
        rngs=nnx.Rngs(0),
    )
    calls = {"lax": _call(layer, images, job, {})}
    use_fast_convolutions(layer)
    calls["ours"] = _call(layer, images, job, compiler_options())
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    for turn in range(rounds + 2):
        for side in list(calls)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(calls[side]())
            seconds[side].append(time.perf_counter() - start)
    warm = {side: times[2:] for side, times in seconds.items()}
    ratios = np.divide(warm["ours"], warm["lax"])
    low, ratio, high = (float(x) for x in np.percentile(ratios, (25, 50, 75)))
    medians = {side: float(np.median(times)) for side, times in warm.items()}
    return medians | {"ratio": ratio, "quartiles": [low, high]}


def _call(
    layer: nnx.Conv, images: jax.Array, job: str, options: dict[str, str]
) -> Callable[[], Any]:
    graphdef, state = nnx.split(layer)

    def forward(state: nnx.State, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(images)

    def loss(state: nnx.State, images: jax.Array) -> jax.Array:
        return jnp.sum(forward(state, images) ** 2)

    called = forward if job == "call" else jax.grad(loss, argnums=(0, 1))
    compiled = jax.jit(called, compiler_options=options)
    return lambda: compiled(state, images)


if __name__ == "__main__":
    main()
