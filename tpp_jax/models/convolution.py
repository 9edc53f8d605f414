"""Convolutions as XLA's CPU backend runs them best; elsewhere they are XLA's own.

Three things make the convolutions of a training step slow on a CPU, none of which is
arithmetic:

- *Kernel gradients.* Their convolution wants the images as [channels, h, w, batch]. XLA
  fuses that transposition with whatever made the images, and computes it again, batch
  norms and sums included, while reading memory in strides: half the time of a step of
  ResNet-56. A product with the identity matrix transposes as well, and is not fused.
- *Images of a pixel or four*, as at the end of a CIFAR VGG: some sixty times slower
  than the same arithmetic as a matrix product.
- *1×1 convolutions*: about twice as slow as the matrix product that they are.

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
from jaxtyping import Array, Float

Images = Float[Array, "b h w c"]
Kernel = Float[Array, "kh kw c n"]

_CHANNELS_LAST = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
# Output pixels of an image up to which one matrix product is faster.
_FEW_PIXELS = 4
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
    if window == (1, 1) or math.prod(case.output_sides(sides, window)) <= _FEW_PIXELS:
        return _as_product(images, kernel, case)
    return _as_convolution(images, kernel, case)


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


def _as_product(images: Images, kernel: Kernel, case: _Case) -> Images:
    """One product of all patches of the images with the kernel as a matrix."""
    kh, kw, c, n = kernel.shape
    h, w = case.output_sides(images.shape[1:3], (kh, kw))
    padded = jnp.pad(images, ((0, 0), *case.padding, (0, 0)))
    down, right = case.strides
    shifted = [
        padded[
            :, i : i + down * (h - 1) + 1 : down, j : j + right * (w - 1) + 1 : right
        ]
        for i in range(kh)
        for j in range(kw)
    ]
    patches = jnp.concatenate(shifted, axis=-1).reshape(-1, kh * kw * c)
    product = jnp.dot(patches, kernel.reshape(-1, n), precision=case.precision)
    return product.reshape(-1, h, w, n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _as_convolution(images: Images, kernel: Kernel, case: _Case) -> Images:
    return case.convolve(images, kernel)


def _forward(images: Images, kernel: Kernel, case: _Case) -> tuple[Images, Any]:
    return case.convolve(images, kernel), (images, kernel)


def _backward(
    case: _Case, operands: tuple[Images, Kernel], gradient: Images
) -> tuple[Images, Kernel]:
    images, kernel = operands
    by_images = jax.linear_transpose(lambda x: case.convolve(x, kernel), images)
    channels_first = _channels_first(images)
    by_kernel = jax.linear_transpose(
        lambda k: case.convolve(channels_first, k, "CHWN"), kernel
    )
    return *by_images(gradient), *by_kernel(gradient)


_as_convolution.defvjp(_forward, _backward)


def _channels_first(images: Images) -> Float[Array, "c h w b"]:
    """Transposes by a product with the identity, which is exact for finite numbers."""
    b, h, w, c = images.shape
    identity = jnp.eye(c, dtype=images.dtype)
    flat = jnp.einsum("dc,pc->dp", identity, images.reshape(-1, c), precision="highest")
    return flat.reshape(c, b, h, w).transpose(0, 2, 3, 1)
