"""An experiment: oneDNN's convolutions in a training step on a CPU.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.onednn

PyTorch uses oneDNN's convolutions. jaxlib for x86-64 contains them too, behind a custom
call of XLA's compiler passes that released versions do not make. Here ``jax.ffi`` makes
the call, for the 3×3 convolutions of ResNet-56: the three convolutions of each layer
alone, then the complete step, alternating with the library's own.

The library does not use oneDNN, since the call is not a stable interface: jaxlib cannot
serialize a program that contains it, as the compilation cache requires, and a shape for
which oneDNN has no fast kernel is slower by orders of magnitude.
"""

import argparse
import functools
import json
import statistics
import time
import unittest.mock
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, step
from tpp_jax.xla import convolution, holding
from tpp_jax.xla.convolution import compiler_options

LAYERS = (("stage 1", 32, 16), ("stage 2", 16, 32), ("stage 3", 8, 64))
BATCH_SIZE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    layers = []
    print(f"{'layer':<10}{'':<20}{'ours':>10}{'oneDNN':>10}")
    for name, side, channels in LAYERS:
        for what, functions, arguments in _cases(side, channels):
            programs = [
                jax.jit(fn, compiler_options=compiler_options()) for fn in functions
            ]
            results = [np.asarray(program(*arguments)) for program in programs]
            scale = np.abs(results[0]).max()
            np.testing.assert_allclose(results[1], results[0], atol=1e-5 * scale)
            calls = [functools.partial(p, *arguments) for p in programs]
            ours, theirs = (1e3 * seconds for seconds in _medians(calls, rounds))
            layers.append({"layer": name, "what": what, "ours": ours, "onednn": theirs})
            print(f"{name:<10}{what:<20}{ours:>7.2f} ms{theirs:>7.2f} ms")
    options = argparse.Namespace(
        model="cifar_resnet56", ratios="*layer*.conv1:0.9", batch_size=BATCH_SIZE
    )
    options.half, options.ours = False, True
    sides = [_step(options)]
    with unittest.mock.patch.object(convolution, "_convolved", _by_onednn):
        jax.clear_caches()
        sides.append(_step(options))
    ours, theirs = _medians(sides, rounds)
    print(f"{'ResNet-56':<10}{'training step':<20}{ours:>8.3f} s{theirs:>8.3f} s")
    result = {"batch_size": BATCH_SIZE, "milliseconds": layers}
    result["step_seconds"] = {"ours": ours, "onednn": theirs}
    print(machine.write("onednn", result))


def _step(options: argparse.Namespace) -> Callable[[], Any]:
    sides, *_ = step._sides(options)
    return sides["plain"]


def _medians(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def _cases(side: int, channels: int) -> list[tuple[str, Sequence[Any], Sequence[Any]]]:
    """Returns the computations, ours and oneDNN's, and their arguments."""
    draws = np.random.default_rng(0)
    shape = BATCH_SIZE, side, side, channels
    images, gradient = (jnp.asarray(draws.normal(size=shape), jnp.float32),) * 2
    kernel = jnp.asarray(draws.normal(size=(3, 3, channels, channels)), jnp.float32)
    case = convolution._Case((1, 1), ((1, 1), (1, 1)), None)
    operands = images, kernel

    def both(backward: Callable[..., Any], i: int) -> Callable[..., Any]:
        return lambda images, gradient: backward(case, (images, kernel), gradient)[i]

    ours, theirs = convolution._backward, _backward
    ours_forward = functools.partial(convolution._in_pairs, case=case)
    return [
        ("forward", [ours_forward, functools.partial(_forward, case=case)], operands),
        ("images' gradient", [both(ours, 0), both(theirs, 0)], (images, gradient)),
        ("kernel's gradient", [both(ours, 1), both(theirs, 1)], (images, gradient)),
    ]


def _call(
    images: jax.Array,
    kernel: jax.Array,
    shape: Sequence[int],
    padding: Sequence[tuple[int, int]],
    strides: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    kernel_dims: tuple[int, int, int, int] = (2, 3, 0, 1),
) -> jax.Array:
    """OneDNN's convolution of NHWC images; ``kernel_dims`` are the dimensions of
    inputs, outputs, height and width.
    """
    image_dims = {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}
    inputs, outputs, *sides = kernel_dims
    names = {"input_feature_dim": inputs, "output_feature_dim": outputs}
    config = {
        "dims": 4,
        "feature_groups": 1,
        "input": {"data": image_dims},
        "kernel": {"filter": {**names, "spatial_dims": sides}},
        "output": {"data": image_dims},
        "window": {
            "pad_left": [low for low, _ in padding],
            "pad_right": [high for _, high in padding],
            "strides": list(strides),
            "window_dilations": list(dilation),
        },
    }
    call = jax.ffi.ffi_call(
        "__onednn$convolution",
        jax.ShapeDtypeStruct(tuple(shape), images.dtype),
        custom_call_api_version=1,
        legacy_backend_config=json.dumps({"onednn_conv_config": config}),
    )
    return call(images, kernel)


def _forward(images: jax.Array, kernel: jax.Array, case: Any) -> jax.Array:
    sides = case.output_sides(images.shape[1:3], kernel.shape[:2])
    shape = len(images), *sides, kernel.shape[3]
    return _call(images, kernel, shape, case.padding, case.strides)


def _backward(case: Any, operands: Any, gradient: jax.Array) -> tuple[Any, Any]:
    """Both gradients as forward convolutions, since oneDNN's call has no others.

    The gradient of the kernel has the batch as its input channels. Its images are
    concatenated to one image of height h and width w · c, so that a window dilated by c
    computes the outputs of all channels next to each other. This gives oneDNN's kernels
    enough output pixels; they are slow for the few pixels of a kernel.
    """
    images, kernel = operands
    if case.strides != (1, 1):
        return convolution._backward(case, operands, gradient)
    b, h, w, c = images.shape
    kh, kw, _, n = kernel.shape
    (top, bottom), (left, right) = case.padding
    by_images = _call(
        gradient,
        kernel[::-1, ::-1],
        images.shape,
        ((kh - 1 - top, kh - 1 - bottom), (kw - 1 - left, kw - 1 - right)),
        kernel_dims=(3, 2, 0, 1),
    )
    batch_last = holding.held(images).reshape(b, -1).T
    by_kernel = _call(
        batch_last.reshape(1, h, w * c, b),
        gradient,
        (1, kh, kw * c, n),
        ((top, bottom), (left * c, right * c)),
        dilation=(1, c),
        kernel_dims=(0, 3, 1, 2),
    )
    return by_images, by_kernel.reshape(kernel.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_onednn(images: jax.Array, kernel: jax.Array, case: Any) -> jax.Array:
    return _forward(images, kernel, case)


_by_onednn.defvjp(
    lambda images, kernel, case: (_forward(images, kernel, case), (images, kernel)),
    _backward,
)


if __name__ == "__main__":
    main()
