"""VGG networks with batch norm for 32×32 images (Simonyan & Zisserman 2015).

`features` is one list in the order of PyTorch's Sequential: convolution, batch norm and
ReLU, with a pooling after some of them. An array is thus found at, say,
``features.3.kernel`` where PyTorch has ``features.3.weight``. As usual on CIFAR, a
global average and one dense layer replace the last pooling and the large dense layers.
"""

from collections.abc import Sequence
from typing import Literal

from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.models.layers import (
    BatchNorm,
    Images,
    Logits,
    MaxPool,
    Relu,
    conv,
    dense,
    global_average_pool,
    kaiming_normal_init,
)

Widths = Sequence[int | Literal["M"]]

# Four poolings: the last features of a 32×32 image are 2×2, averaged.
WIDTHS: dict[int, Widths] = {
    11: (64, "M", 128, "M", *(256,) * 2, "M", *(512,) * 2, "M", *(512,) * 2),
    13: (64, 64, "M", 128, 128, "M", *(256,) * 2, "M", *(512,) * 2, "M", *(512,) * 2),
    16: (64, 64, "M", 128, 128, "M", *(256,) * 3, "M", *(512,) * 3, "M", *(512,) * 3),
    19: (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4),
}


class CifarVGG(nnx.Module):
    """A VGG with batch norm, [b, h, w, in_channels] to logits [b, num_classes].

    Convolutions are 3×3 without bias. All kernels are initialised as by PyTorch's
    kaiming_normal_ with its default fan_in, from N(0, 2/fan_in), as in the paper's base
    models; torchvision's ImageNet VGGs use fan_out.

    Args:
      widths: Number of output channels of each convolution, with "M" for each 2×2 max
        pooling.
      num_classes: Number of logits.
      in_channels: Number of channels of the images.
      rngs: Random streams for the initial weights.

    Raises:
      TPPError: If `widths` has no convolution, or entries other than widths and "M".

    Example:
      >>> import jax.numpy as jnp
      >>> model = CifarVGG([8, "M", 16], num_classes=10, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 16, 16, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        widths: Widths,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        rngs: nnx.Rngs,
    ) -> None:
        features: list[nnx.Module] = []
        channels = in_channels
        for width in widths:
            if width == "M":
                features.append(MaxPool())
                continue
            if not isinstance(width, int) or width < 1:
                raise TPPError(
                    f'Widths of a VGG are positive integers or "M", not {width!r}.'
                )
            kernel = conv(
                channels,
                width,
                3,
                padding=1,
                kernel_init=kaiming_normal_init,
                rngs=rngs,
            )
            features += [kernel, BatchNorm(width, rngs=rngs), Relu()]
            channels = width
        if not any(isinstance(layer, nnx.Conv) for layer in features):
            raise TPPError(f"A VGG needs at least one convolution, not {widths!r}.")
        self.features = nnx.List(features)
        self.classifier = dense(
            channels, num_classes, kernel_init=kaiming_normal_init, rngs=rngs
        )

    def __call__(self, x: Images) -> Logits:
        """Returns the logits of a batch of images."""
        for layer in self.features:
            x = layer(x)
        return self.classifier(global_average_pool(x))
