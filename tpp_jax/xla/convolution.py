"""Convolutions in the form that XLA's CPU backend runs fastest.

Other backends use XLA's convolution unchanged. Seven things make the convolutions of a
training step slow on a CPU, none of which is arithmetic:

- *Kernel gradients.* Their convolution needs the images as [channels, h, w, batch]. XLA
  fuses that transposition with the operations that computed the images and repeats
  them, batch norms and sums included, while reading memory in strides: half the time of
  a step of ResNet-56. A call that is not inlined prevents the fusion. The same holds
  for the gradient of the output, which is read in two layouts.
- *Images of one to four pixels*, as at the end of a CIFAR VGG: some sixty times slower
  than the same arithmetic as a matrix product.
- *1×1 convolutions*: about twice as slow as the equivalent matrix product.
- *Few output channels* of wide images, as in the first stage of ResNet-56: the products
  inside XLA's convolution are too narrow. Computing two neighbouring pixels at once
  makes them twice as wide: four fifths of the time, although a third more
  multiplications (by zero) are needed.
- *Thin layers*, as pruning leaves them, from or to few channels: two to six times
  slower than one product of all patches with the kernel, or of all pixels with all taps
  of the kernel. Where no gradient is needed, those from few channels are faster still
  as sums of shifted images, and those to few channels as sums of planes.
- *Depthwise convolutions*: eight to twenty-four times slower than the same arithmetic
  as sums of shifted images (:mod:`tpp_jax.xla.shifted`).
- *One thread*: XLA passes convolutions to a library, YNNPACK, that it runs on a single
  core, whereas its own kernels use all cores. See :func:`compiler_options`.

Results are the same up to float rounding; kernel gradients are the same to the bit.
docs/performance.md has the measurements.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from tpp_jax.xla.holding import held
from tpp_jax.xla.shifted import Pair, depthwise, from_few_channels

Images = Float[Array, "b h w c"]
Kernel = Float[Array, "kh kw c n"]

_CHANNELS_LAST = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
# Largest number of output pixels per image for which one matrix product is faster.
_FEW_PIXELS = 4
# Pixels are computed in pairs up to this many output channels and from this width on.
_FEW_OUTPUTS, _WIDE = 16, 32
# Largest number of products that are computed one by one for each output.
_FEW_PRODUCTS = 36
# Largest ratio of the size of a product's operands to that of images and outputs.
_THIN = 1.25
# YNNPACK computes only these: elementwise operations and convolutions are slower in it.
_CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    )
}
# Options of ``lax`` that only some convolutions set.
_SCALARS = "batch_group_count", "out_sharding", "preferred_element_type"
_DILATIONS = "lhs_dilation", "rhs_dilation"


def use_fast_convolutions(model: nnx.Module) -> None:
    """Switches the convolutions of a model to the fastest form for the backend.

    Changes ``nnx.Conv`` layers in place, on the CPU only. The changed layers do not
    support forward-mode differentiation (``jax.jvp``), so apply this to the copy of the
    model inside a compiled step.

    Args:
      model: Any module.
    """
    if jax.default_backend() != "cpu":
        return
    for _, layer in nnx.iter_modules(model):
        own = getattr(layer, "conv_general_dilated", None)
        if isinstance(layer, nnx.Conv) and own is lax.conv_general_dilated:
            layer.conv_general_dilated = conv_on_cpu


def convolve(images: Array, kernel: Array, **params: Any) -> Array:
    """Applies ``lax.conv_general_dilated`` in the fastest form for the backend.

    Args:
      images: Images in any layout; those of a depthwise convolution are moved to
        channels last.
      kernel: Kernel in any layout.
      **params: Parameters of the primitive, as an equation of a jaxpr has them.
    """
    if jax.default_backend() != "cpu":
        return lax.conv_general_dilated_p.bind(images, kernel, **params)
    dims, groups = params["dimension_numbers"], params["feature_group_count"]
    depthwise = 1 < groups == kernel.shape[dims.rhs_spec[0]] and images.ndim == 4
    if not depthwise or dims == _CHANNELS_LAST:
        return _compiled(images, kernel, **params)
    (n, c, *sides), (out, one, *taps), (first, last, *others) = dims
    result = _compiled(
        images.transpose(n, *sides, c),
        kernel.transpose(*taps, one, out),
        **(params | {"dimension_numbers": _CHANNELS_LAST}),
    )
    return result.transpose(np.argsort([first, *others, last]))


@functools.cache
def compiler_options() -> dict[str, str]:
    """Returns the XLA options of a program with convolutions, for ``jax.jit``.

    On the CPU they limit YNNPACK to the operations that it computes faster than XLA:
    reductions and single products. On other backends, and where jaxlib does not know
    the option, there are none. JAX accepts such options only in the outermost
    ``jax.jit``; ``jax.pmap`` does not accept them.
    """
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=_CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return dict(_CPU_OPTIONS)


def conv_on_cpu(
    images: Images,
    kernel: Kernel,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Images:
    """Computes ``lax.conv_general_dilated`` faster on the CPU.

    The docstring of the module describes how.

    Args:
      images: Batch of images, ``[b, h, w, c]``; other ranks are left to ``lax``.
      kernel: Kernel, ``[kh, kw, c, n]``.
      window_strides: Strides, as for ``lax``.
      padding: Padding, as for ``lax``.
      **options: Other options of ``lax.conv_general_dilated``. Dilation, groups of
        several channels, several filters for each channel, and half precision are left
        to ``lax``.

    Returns:
      Output of the convolution, ``[b, h', w', n]``.
    """
    groups = options.get("feature_group_count", 1)
    apart = 1 < groups == images.shape[-1] == kernel.shape[-1]
    plain = (
        options.get("dimension_numbers") == _CHANNELS_LAST
        and images.size > 0 < kernel.size
        and images.dtype in (jnp.float32, jnp.float64)
        and all(options.get(name) in (None, 1) for name in _SCALARS)
        and (groups == 1 or apart)
        and all(d == 1 for name in _DILATIONS for d in options.get(name) or ())
    )
    if not plain:
        return lax.conv_general_dilated(
            images, kernel, window_strides, padding, **options
        )
    sides, window = images.shape[1:3], kernel.shape[:2]
    strides = window_strides[0], window_strides[1]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(sides, window, strides, padding)
    rows, columns = ((low, high) for low, high in padding)
    pads = rows, columns
    if apart:
        return depthwise(images, kernel, strides, pads)
    case = _Case(strides, pads, options.get("precision"))
    taps = math.prod(window)
    pixels = math.prod(case.output_sides(sides, window))
    inputs, outputs = kernel.shape[2:]
    if taps == 1 or pixels <= _FEW_PIXELS:
        return _gathered(images, kernel, case)
    across = strides[1] if sides[1] % strides[1] == 0 else 1
    if taps * inputs <= _THIN * outputs:
        called = trained = _gathered
    elif taps * outputs <= _THIN * across * inputs:
        called, trained = _in_planes, _scattered
    else:
        called = trained = _convolved
    if taps * inputs <= _FEW_PRODUCTS:
        called = _summed
    if called is trained:
        return trained(images, kernel, case)
    return _by_use(images, kernel, case, called, trained)


# Compiled as one where equations are run one by one.
_compiled = jax.jit(
    conv_on_cpu,
    static_argnames=(
        "window_strides",
        "padding",
        "dimension_numbers",
        "feature_group_count",
        "precision",
        *_DILATIONS,
        *_SCALARS,
    ),
)


class _Case(NamedTuple):
    """Settings of a convolution: all of its operands that are not arrays."""

    strides: Pair
    padding: tuple[Pair, Pair]
    precision: Any

    def output_sides(self, sides: Sequence[int], window: Sequence[int]) -> list[int]:
        """Returns height and width of the output."""
        each = zip(sides, window, self.strides, self.padding, strict=True)
        return [(n + sum(pad) - k) // stride + 1 for n, k, stride, pad in each]

    def convolve(self, images: Array, kernel: Array, layout: str = "NHWC") -> Array:
        """Applies XLA's convolution to images in any layout; the output is NHWC."""
        return lax.conv_general_dilated(
            images,
            kernel,
            self.strides,
            self.padding,
            dimension_numbers=(layout, "HWIO", "NHWC"),
            precision=self.precision,
        )


_Form = Callable[[Images, Kernel, _Case], Images]


def _gathered(images: Images, kernel: Kernel, case: _Case) -> Images:
    """Convolves by one product of all patches of the images with the kernel."""
    kh, kw, _, n = kernel.shape
    if kh * kw > 1:
        images = held(images)  # so that the taps do not each recompute them
    h, w = case.output_sides(images.shape[1:3], (kh, kw))
    patches = [_shifted(images, i, j, h, w, case) for i in range(kh) for j in range(kw)]
    flat = jnp.concatenate(patches, axis=-1).reshape(-1, math.prod(kernel.shape[:3]))
    product = jnp.dot(flat, kernel.reshape(-1, n), precision=case.precision)
    return product.reshape(-1, h, w, n)


def _scattered(images: Images, kernel: Kernel, case: _Case) -> Images:
    """Convolves by one product of all pixels with all taps, shifted and added up."""
    images, kernel, case = _columns_as_channels(images, kernel, case)
    kh, kw, c, n = kernel.shape
    flat = kernel.transpose(2, 0, 1, 3).reshape(c, -1)
    product = jnp.dot(images.reshape(-1, c), flat, precision=case.precision)
    taps = product.reshape(*images.shape[:3], kh, kw, n)
    return _sum_of_taps(taps.transpose(3, 4, 0, 1, 2, 5), case)


def _in_planes(images: Images, kernel: Kernel, case: _Case) -> Images:
    """The same with an image of its own for each output channel of each tap.

    Their sums are faster, and their gradients are slower.
    """
    images, kernel, case = _columns_as_channels(images, kernel, case)
    kh, kw, c, n = kernel.shape
    b, h, w, _ = images.shape
    flat = kernel.transpose(0, 1, 3, 2).reshape(-1, c)
    product = jnp.dot(flat, images.reshape(-1, c).T, precision=case.precision)
    planes = _sum_of_taps(product.reshape(kh, kw, n * b, h, w, 1), case)
    return jnp.moveaxis(planes.reshape(n, b, *planes.shape[1:3]), 0, -1)


def _sum_of_taps(taps: Float[Array, "kh kw b h w n"], case: _Case) -> Images:
    """Adds up what each tap of a kernel makes of all pixels."""
    kh, kw, _, *sides, _ = taps.shape
    h, w = case.output_sides(sides, (kh, kw))
    window = itertools.product(range(kh), range(kw))
    return functools.reduce(
        operator.add, [_shifted(taps[i, j], i, j, h, w, case) for i, j in window]
    )


def _summed(images: Images, kernel: Kernel, case: _Case) -> Images:
    """Convolves images of few channels by one product after the other."""
    return from_few_channels(images, kernel, case.strides, case.padding)


def _columns_as_channels(
    images: Images, kernel: Kernel, case: _Case
) -> tuple[Images, Kernel, _Case]:
    """Returns a convolution of stride one along the width, with the same output.

    The columns that a stride passes over become channels, which moves no pixel. So the
    product is not computed for pixels of which a tap reads only some.
    """
    (down, stride), (rows, (low, _)) = case.strides, case.padding
    b, h, w, c = images.shape
    if stride == 1 or w % stride:
        return images, kernel, case
    kh, kw, _, n = kernel.shape
    _, width = case.output_sides((h, w), (kh, kw))
    before = -low % stride
    after = -(before + kw) % stride
    taps = jnp.pad(kernel, ((0, 0), (before, after), (0, 0), (0, 0)))
    taps = taps.reshape(kh, -1, stride * c, n)
    low = (low + before) // stride
    high = width - 1 + taps.shape[1] - low - w // stride
    folded = images.reshape(b, h, w // stride, stride * c)
    return folded, taps, case._replace(strides=(down, 1), padding=(rows, (low, high)))


def _shifted(images: Images, i: int, j: int, h: int, w: int, case: _Case) -> Images:
    """Returns the pixels that one tap of the kernel reads, ``[b, h, w, c]``."""
    config = [(0, 0, 0)]
    for side, tap, size, stride, (low, _) in zip(
        images.shape[1:3], (i, j), (h, w), case.strides, case.padding, strict=True
    ):
        last = (size - 1) * stride + 1
        config.append((low - tap, last - side - low + tap, 0))  # negative: cropped
    padded = lax.pad(images, jnp.zeros((), images.dtype), [*config, (0, 0, 0)])
    return padded[:, :: case.strides[0], :: case.strides[1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _by_use(
    images: Images, kernel: Kernel, case: _Case, called: _Form, trained: _Form
) -> Images:
    """Convolves in one form, and where gradients are needed in another one."""
    del trained
    return called(images, kernel, case)


def _by_use_forward(
    images: Images, kernel: Kernel, case: _Case, called: _Form, trained: _Form
) -> tuple[Images, Callable[[Images], tuple[Images, Kernel]]]:
    del called
    return jax.vjp(lambda x, k: trained(x, k, case), images, kernel)


def _by_use_backward(
    case: _Case,
    called: _Form,
    trained: _Form,
    pull: Callable[[Images], tuple[Images, Kernel]],
    gradient: Images,
) -> tuple[Images, Kernel]:
    del case, called, trained
    return pull(gradient)


_by_use.defvjp(_by_use_forward, _by_use_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolved(images: Images, kernel: Kernel, case: _Case) -> Images:
    return _in_pairs(images, kernel, case)


def _forward(images: Images, kernel: Kernel, case: _Case) -> tuple[Images, Any]:
    return _in_pairs(images, kernel, case), (images, kernel)


def _backward(
    case: _Case, operands: tuple[Images, Kernel], gradient: Images
) -> tuple[Images, Kernel]:
    images, kernel = operands
    gradient = held(gradient)  # read in two layouts, and computed by a batch norm
    if case.strides == (1, 1):
        # The same as JAX's gradient, but as a convolution that can pair its pixels.
        rotated = kernel[::-1, ::-1].swapaxes(2, 3)
        around = zip(kernel.shape[:2], case.padding, strict=True)
        padding = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in around)
        by_images = _in_pairs(gradient, rotated, case._replace(padding=padding))
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
    """Applies XLA's convolution, in pixel pairs for few outputs of wide images."""
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
