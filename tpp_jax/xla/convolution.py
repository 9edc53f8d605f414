"""Convolutions as XLA's CPU backend runs them best; elsewhere they are XLA's own.

Six things make the convolutions of a training step slow on a CPU, none of which is
arithmetic:

- *Kernel gradients.* Their convolution wants the images as [channels, h, w, batch]. XLA
  fuses that transposition with whatever made the images, and computes it again, batch
  norms and sums included, while reading memory in strides: half the time of a step of
  ResNet-56. Behind a call that is not inlined there is nothing to fuse with.
- *Images of a pixel or four*, as at the end of a CIFAR VGG: some sixty times slower
  than the same arithmetic as a matrix product.
- *1×1 convolutions*: about twice as slow as the matrix product that they are.
- *Few outputs* of wide images, as in the first stage of ResNet-56: the products inside
  XLA's convolution are too narrow. For two neighbouring pixels at once they are twice
  as wide: four fifths of the time, for a third more multiplications, by zero.
- *Thin layers*, as pruning leaves them, from or to few channels: two to six times
  slower than one product with the pixels of all patches, or of all pixels with all taps
  of the kernel.
- *One thread*: XLA hands convolutions to a library, YNNPACK, that it runs on a single
  core, where its own kernels use them all. See :func:`compiler_options`.

Results are the same up to float rounding, those of the kernel gradients to the bit.
docs/performance.md has the measurements.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float

Images = Float[Array, "b h w c"]
Kernel = Float[Array, "kh kw c n"]

_CHANNELS_LAST = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
# Output pixels of an image up to which one matrix product is faster.
_FEW_PIXELS = 4
# Outputs of a pixel up to which, in images at least as wide, pixels go in pairs.
_FEW_OUTPUTS, _WIDE = 16, 32
# How much larger than images and outputs the product's operands may be.
_THIN = 1.25
# What YNNPACK may compute: elementwise work and convolutions are slower with it.
_CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    )
}
# Options of ``lax`` that only some convolutions set.
_SCALARS = "feature_group_count", "batch_group_count"
_SCALARS += "out_sharding", "preferred_element_type"
_DILATIONS = "lhs_dilation", "rhs_dilation"


def use_fast_convolutions(model: nnx.Module) -> None:
    """Makes the convolutions of a model be computed in the backend's fastest way.

    Changes ``nnx.Conv`` layers in place, on the CPU only. They can then no longer be
    differentiated forwards (``jax.jvp``): to be done to the copy in a compiled step.
    """
    if jax.default_backend() != "cpu":
        return
    for _, layer in nnx.iter_modules(model):
        own = getattr(layer, "conv_general_dilated", None)
        if isinstance(layer, nnx.Conv) and own is lax.conv_general_dilated:
            layer.conv_general_dilated = conv_on_cpu


@functools.cache
def compiler_options() -> dict[str, str]:
    """Returns what ``jax.jit`` should tell XLA of a program with convolutions.

    On the CPU that is to give YNNPACK only what it computes faster than XLA, reductions
    and single products; elsewhere, and for a jaxlib that knows no such option, nothing.
    It goes to the outermost ``jax.jit``, as JAX asks of all such options; ``jax.pmap``
    takes none.
    """
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=_CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return dict(_CPU_OPTIONS)


def held(x: Array) -> Array:
    """Returns the same array, which XLA then computes once and keeps.

    Otherwise it fuses what makes an array with everything that reads it, and computes
    it again for each. A call that is not to be inlined is what its CPU backend does not
    see through; ``lax.optimization_barrier`` is dropped before fusion there.
    """
    with set_xla_metadata(inlineable="false"):
        return _same(x)


@jax.jit
def _same(x: Array) -> Array:
    return jnp.copy(x)  # JAX would see through a function that does nothing


def conv_on_cpu(
    images: Images,
    kernel: Kernel,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Images:
    """``lax.conv_general_dilated``, faster on the CPU; see the module.

    Args:
      images: ``[b, h, w, c]``; those of other ranks are left to ``lax``.
      kernel: ``[kh, kw, c, n]``.
      window_strides: as for ``lax``.
      padding: likewise.
      **options: likewise. Dilation, groups and half precision are left to ``lax``.

    Returns:
      ``[b, h', w', n]``.
    """
    plain = (
        options.get("dimension_numbers") == _CHANNELS_LAST
        and images.dtype in (jnp.float32, jnp.float64)
        and all(options.get(name) in (None, 1) for name in _SCALARS)
        and all(d == 1 for name in _DILATIONS for d in options.get(name) or ())
    )
    if not plain:
        return lax.conv_general_dilated(
            images, kernel, window_strides, padding, **options
        )
    sides, window, strides = images.shape[1:3], kernel.shape[:2], tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(sides, window, strides, padding)
    case = _Case(strides, tuple(map(tuple, padding)), options.get("precision"))
    taps = math.prod(window)
    pixels = math.prod(case.output_sides(sides, window))
    inputs, outputs = kernel.shape[2:]
    if taps == 1 or pixels <= _FEW_PIXELS or taps * inputs <= _THIN * outputs:
        return _gathered(images, kernel, case)
    if taps * outputs <= _THIN * inputs:
        return _scattered(images, kernel, case)
    return _convolved(images, kernel, case)


class _Case(NamedTuple):
    """What of a convolution is not an array."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    precision: Any

    def output_sides(self, sides: Sequence[int], window: Sequence[int]) -> list[int]:
        """Returns height and width of the output."""
        each = zip(sides, window, self.strides, self.padding, strict=True)
        return [(n + sum(pad) - k) // stride + 1 for n, k, stride, pad in each]

    def convolve(self, images: Array, kernel: Array, layout: str = "NHWC") -> Array:
        """XLA's convolution, of images in any layout to NHWC."""
        return lax.conv_general_dilated(
            images,
            kernel,
            self.strides,
            self.padding,
            dimension_numbers=(layout, "HWIO", "NHWC"),
            precision=self.precision,
        )


def _gathered(images: Images, kernel: Kernel, case: _Case) -> Images:
    """One product of all patches of the images with the kernel as a matrix."""
    kh, kw, _, n = kernel.shape
    if kh * kw > 1:
        images = held(images)  # lest every tap computes them again
    h, w = case.output_sides(images.shape[1:3], (kh, kw))
    patches = [_shifted(images, i, j, h, w, case) for i in range(kh) for j in range(kw)]
    flat = jnp.concatenate(patches, axis=-1).reshape(-1, math.prod(kernel.shape[:3]))
    product = jnp.dot(flat, kernel.reshape(-1, n), precision=case.precision)
    return product.reshape(-1, h, w, n)


def _scattered(images: Images, kernel: Kernel, case: _Case) -> Images:
    """One product of all pixels with all taps of the kernel, shifted and added up."""
    kh, kw, c, n = kernel.shape
    h, w = case.output_sides(images.shape[1:3], (kh, kw))
    flat = kernel.transpose(2, 0, 1, 3).reshape(c, -1)
    product = jnp.dot(images.reshape(-1, c), flat, precision=case.precision)
    taps = product.reshape(*images.shape[:3], kh, kw, n)
    return sum(
        _shifted(taps[:, :, :, i, j], i, j, h, w, case)
        for i in range(kh)
        for j in range(kw)
    )


def _shifted(images: Images, i: int, j: int, h: int, w: int, case: _Case) -> Images:
    """Returns what one tap of the kernel sees, ``[b, h, w, c]``."""
    config = [(0, 0, 0)]
    for side, tap, size, stride, (low, _) in zip(
        images.shape[1:3], (i, j), (h, w), case.strides, case.padding, strict=True
    ):
        last = (size - 1) * stride + 1
        config.append((low - tap, last - side - low + tap, 0))  # below zero: cut off
    padded = lax.pad(images, jnp.zeros((), images.dtype), [*config, (0, 0, 0)])
    return padded[:, :: case.strides[0], :: case.strides[1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolved(images: Images, kernel: Kernel, case: _Case) -> Images:
    return _in_pairs(images, kernel, case)


def _forward(images: Images, kernel: Kernel, case: _Case) -> tuple[Images, Any]:
    return _in_pairs(images, kernel, case), (images, kernel)


def _backward(
    case: _Case, operands: tuple[Images, Kernel], gradient: Images
) -> tuple[Images, Kernel]:
    images, kernel = operands
    if case.strides == (1, 1):
        # As JAX would, but as a convolution that can go in pairs.
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        around = zip(kernel.shape[:2], case.padding, strict=True)
        padding = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in around)
        by_images = _in_pairs(gradient, turned, case._replace(padding=padding))
    else:
        transposed = jax.linear_transpose(lambda x: case.convolve(x, kernel), images)
        [by_images] = transposed(gradient)
    channels_first = held(images).transpose(3, 1, 2, 0)
    by_kernel = jax.linear_transpose(
        lambda k: case.convolve(channels_first, k, "CHWN"), kernel
    )
    return by_images, *by_kernel(gradient)


_convolved.defvjp(_forward, _backward)


def _in_pairs(images: Images, kernel: Kernel, case: _Case) -> Images:
    """XLA's convolution; for few outputs of a wide image, two pixels at once."""
    kh, kw, c, n = kernel.shape
    _, width = case.output_sides(images.shape[1:3], (kh, kw))
    few = n <= _FEW_OUTPUTS and width >= _WIDE and width % 2 == 0
    if not few or case.strides[1] != 1:
        return case.convolve(images, kernel)
    # The kernel for the left pixel and, a column further, for the right one.
    both = [jnp.pad(kernel, ((0, 0), (j, 1 - j), (0, 0), (0, 0))) for j in (0, 1)]
    doubled = jnp.stack(both, axis=3).reshape(kh, kw + 1, c, 2 * n)
    pairs = case._replace(strides=(case.strides[0], 2)).convolve(images, doubled)
    return pairs.reshape(*pairs.shape[:2], width, n)
