"""VGG networks with batch norm for ImageNet (Simonyan & Zisserman 2015).

`features` and `classifier` are lists in the order of torchvision's Sequentials, so an
array is found at, say, ``features.3.kernel`` or ``classifier.6.kernel``. For images of
32×32 pixels use `tpp_jax.models.CifarVGG`.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpp_jax.models.layers import (
    BatchNorm,
    Identity,
    Images,
    Logits,
    MaxPool,
    Relu,
    fan_out_init,
)

# Output channels of the convolutions of each stage; each stage ends with a pooling.
STAGES: dict[str, tuple[tuple[int, ...], ...]] = {
    "vgg11_bn": ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    "vgg13_bn": ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    "vgg16_bn": ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    "vgg19_bn": ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}

_SIDE = 7  # height and width of the input of the dense layers


class VGG(nnx.Module):
    """A VGG with batch norm, [b, h, w, in_channels] to logits [b, num_classes].

    Convolutions are 3×3 with bias. Their kernels are initialised from N(0, 2/fan_out),
    those of dense layers from N(0, 0.01²), biases to zero. torchvision's dropout layers
    in `classifier` are omitted, but their indices are kept.

    Args:
      stages: Output channels of the convolutions of each stage; see `STAGES`.
      num_classes: Number of logits.
      in_channels: Number of channels of the images.
      hidden: Width of the two dense layers before the last.
      rngs: Random streams for the initial weights.

    Example:
      >>> model = VGG([[8], [16]], num_classes=10, hidden=32, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 28, 28, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        stages: tuple[tuple[int, ...], ...],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        hidden: int = 4096,
        rngs: nnx.Rngs,
    ) -> None:
        features: list[nnx.Module] = []
        channels = in_channels
        for widths in stages:
            for width in widths:
                kernel = nnx.Conv(
                    channels,
                    width,
                    (3, 3),
                    padding=((1, 1), (1, 1)),
                    kernel_init=fan_out_init,
                    rngs=rngs,
                )
                features += [kernel, BatchNorm(width, rngs=rngs), Relu()]
                channels = width
            features.append(MaxPool())

        def dense(before: int, after: int) -> nnx.Linear:
            start = nnx.initializers.normal(0.01)
            return nnx.Linear(before, after, kernel_init=start, rngs=rngs)

        self.features = nnx.List(features)
        self.classifier = nnx.List(
            [
                dense(_SIDE * _SIDE * channels, hidden),
                Relu(),
                Identity(),
                dense(hidden, hidden),
                Relu(),
                Identity(),
                dense(hidden, num_classes),
            ]
        )

    def __call__(self, x: Images) -> Logits:
        """Returns the logits of a batch of images."""
        for layer in self.features:
            x = layer(x)
        x = average_pool_to(x, _SIDE)
        # PyTorch flattens channels first: the order of the dense layer's inputs.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        for layer in self.classifier:
            x = layer(x)
        return x


def average_pool_to(x: Images, side: int) -> Images:
    """Returns means over windows that cover the image, ``[b, side, side, c]``.

    Window i of n extends from pixel ⌊i·h/n⌋ to ⌈(i + 1)·h/n⌉, as in PyTorch's adaptive
    pooling: an image of side × side pixels is unchanged, pixels of a smaller one are
    repeated.

    >>> average_pool_to(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, :, :, 0].tolist()
    [[2.5, 4.5], [10.5, 12.5]]
    """
    if x.shape[1:3] == (side, side):
        return x
    rows, columns = (jnp.asarray(_windows(n, side), x.dtype) for n in x.shape[1:3])
    return jnp.einsum("bhwc,ih,jw->bijc", x, rows, columns)


def _windows(size: int, count: int) -> np.ndarray:
    """Returns the weight of each pixel in each window, float ``[count, size]``."""
    pixel, window = np.arange(size), np.arange(count)[:, None]
    starts, ends = window * size // count, -(-(window + 1) * size // count)
    inside = (pixel >= starts) & (pixel < ends)
    return inside / inside.sum(axis=1, keepdims=True)
