"""Convolutions as sums of shifted images, each times one tap of the kernel.

XLA's CPU backend fuses such a sum into one vectorised loop, together with what is done
to the output. It computes a convolution of as many groups as channels in a generic
loop, which is eight to twenty-four times slower, and one from few channels as a product
that is too narrow, two to ten times slower. docs/performance.md has the measurements.
"""

import functools
import itertools
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tpp_jax.xla.holding import held

Images = Float[Array, "b h w c"]
Kernel = Float[Array, "kh kw c n"]
DepthwiseKernel = Float[Array, "kh kw 1 c"]
Pair = tuple[int, int]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(
    images: Images, kernel: DepthwiseKernel, strides: Pair, padding: tuple[Pair, Pair]
) -> Images:
    """Convolves every channel of images with a filter of its own.

    Args:
      images: Batch of images, ``[b, h, w, c]``.
      kernel: One filter for each channel, ``[kh, kw, 1, c]``.
      strides: Strides along height and width.
      padding: Zeros before and after, along height and width; negative numbers crop.

    Returns:
      Output of the convolution, ``[b, h', w', c]``.
    """
    products = [x * tap[0] for x, tap in _windows(images, kernel, strides, padding)]
    return functools.reduce(operator.add, products)


def from_few_channels(
    images: Images, kernel: Kernel, strides: Pair, padding: tuple[Pair, Pair]
) -> Images:
    """Convolves images of few channels.

    Args:
      images: Batch of images, ``[b, h, w, c]``.
      kernel: Filters, ``[kh, kw, c, n]``; a sum of kh · kw · c products is computed.
      strides: Strides along height and width.
      padding: Zeros before and after, along height and width; negative numbers crop.

    Returns:
      Output of the convolution, ``[b, h', w', n]``.
    """
    products = [
        x[..., i : i + 1] * tap[i]
        for x, tap in _windows(images, kernel, strides, padding)
        for i in range(kernel.shape[2])
    ]
    return functools.reduce(operator.add, products)


def _windows(
    images: Images, kernel: Kernel, strides: Pair, padding: tuple[Pair, Pair]
) -> Iterator[tuple[Images, Float[Array, "c n"]]]:
    """Yields what each tap of the kernel reads, and the tap."""
    padded = _padded(images, padding)
    sides = _output_sides(padded, kernel, strides)
    for tap in itertools.product(*map(range, kernel.shape[:2])):
        yield _window(padded, tap, sides, strides), kernel[tap]


def _forward(
    images: Images, kernel: DepthwiseKernel, strides: Pair, padding: tuple[Pair, Pair]
) -> tuple[Images, Any]:
    # Of training: a batch norm reads the output several times.
    return held(depthwise(images, kernel, strides, padding)), (images, kernel)


def _backward(
    strides: Pair,
    padding: tuple[Pair, Pair],
    operands: tuple[Images, DepthwiseKernel],
    gradient: Images,
) -> tuple[Images, DepthwiseKernel]:
    images, kernel = operands
    gradient = held(gradient)
    # The output of a stride is an output of stride one with gaps. Its rows that no
    # window reached, at the end of the images, get zeros.
    gaps, around = [(0, 0, 0)], []
    for side, taps, size, stride, (low, high) in zip(
        images.shape[1:3],
        kernel.shape[:2],
        gradient.shape[1:3],
        strides,
        padding,
        strict=True,
    ):
        full = side + low + high - taps + 1
        gaps.append((0, full - (size - 1) * stride - 1, stride - 1))
        around.append((taps - 1 - low, taps - 1 - high))
    zero = jnp.zeros((), gradient.dtype)
    spread = lax.pad(gradient, zero, [*gaps, (0, 0, 0)])
    rotated = kernel[::-1, ::-1]
    by_images: Images = depthwise(spread, rotated, (1, 1), (around[0], around[1]))
    by_kernel = _by_kernel(_padded(images, padding), gradient, kernel, strides)
    return by_images, by_kernel


depthwise.defvjp(_forward, _backward)


def _by_kernel(
    padded: Images, gradient: Images, kernel: DepthwiseKernel, strides: Pair
) -> DepthwiseKernel:
    """Returns the gradient of the kernel, summed image by image.

    Sums over all images at once are reductions that XLA does not vectorise.
    """
    taps = list(itertools.product(*map(range, kernel.shape[:2])))
    sides = gradient.shape[1:3]

    def add(total: Array, image: tuple[Array, Array]) -> tuple[Array, None]:
        read, above = image
        windows = [_window(read[None], tap, sides, strides)[0] for tap in taps]
        return total + jnp.stack([(w * above).sum((0, 1)) for w in windows]), None

    start = jnp.zeros((len(taps), gradient.shape[-1]), gradient.dtype)
    total, _ = lax.scan(add, start, (padded, gradient))
    return total.reshape(kernel.shape)


def _padded(images: Images, padding: tuple[Pair, Pair]) -> Images:
    """Returns images with zeros around them, computed once for all taps."""
    config = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    return held(lax.pad(held(images), jnp.zeros((), images.dtype), config))


def _window(
    padded: Images, tap: tuple[int, ...], sides: tuple[int, ...], strides: Pair
) -> Images:
    """Returns the pixels that one tap of the kernel reads, ``[b, h', w', c]``."""
    (i, j), (h, w), (down, right) = tap, sides, strides
    return padded[
        :, i : i + (h - 1) * down + 1 : down, j : j + (w - 1) * right + 1 : right
    ]


def _output_sides(padded: Images, kernel: Kernel, strides: Pair) -> Pair:
    each = zip(padded.shape[1:3], kernel.shape[:2], strides, strict=True)
    h, w = ((side - taps) // stride + 1 for side, taps, stride in each)
    return h, w
