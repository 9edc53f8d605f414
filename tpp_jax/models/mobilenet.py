"""MobileNetV2 (Sandler et al. 2018) for ImageNet, as torchvision has it, and for CIFAR.

Inverted residuals: a block widens its input sixfold with a 1×1 convolution, filters
each channel separately, and narrows it again. Shortcuts connect the narrow ends, which
have no activation.

The network for 32×32 images halves them three times instead of five: the first
convolution and the second stage keep the size, as in the usual PyTorch implementations
for CIFAR (kuangliu/pytorch-cifar, huyvnphan/PyTorch_CIFAR10). Everything else follows
the paper, as in the second of these: 2,236,682 parameters for 10 classes. The first has
60,240 more, in 1×1 convolutions on the shortcuts that change the number of channels and
in a widening by 1, and it uses ReLU instead of ReLU6.

Attributes have torchvision's names: ``features.2.conv.0.0.kernel`` is the first
convolution of the second block.
"""

import jax
from flax import nnx

from tpp_jax.models.layers import (
    BatchNorm,
    Identity,
    Images,
    Logits,
    conv,
    fan_out_init,
    global_average_pool,
    relu6,
)

# Expansion, channels of the output, number of blocks and stride of the first block.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
CIFAR_STAGES = (STAGES[0], (6, 24, 2, 1), *STAGES[2:])


class Relu6(nnx.Module):
    """The function `relu6` as a module, for lists of layers."""

    def __call__(self, x: Images) -> Images:
        """Returns min(max(x, 0), 6)."""
        return relu6(x)


class InvertedResidual(nnx.Module):
    """An inverted residual, [b, h, w, in_planes] to [b, h', w', planes].

    Its layers widen the input, filter each channel, and narrow the result.

    Args:
      in_planes: Number of channels of the input.
      planes: Number of channels of the output.
      expansion: Factor on the channels inside the block; 1 for no widening layer.
      stride: Stride of the depthwise convolution; 2 halves the image.
      rngs: Random streams for the initial weights.
    """

    def __init__(
        self,
        in_planes: int,
        planes: int,
        *,
        expansion: int,
        stride: int,
        rngs: nnx.Rngs,
    ) -> None:
        inner = expansion * in_planes
        layers: list[nnx.Module] = []
        if expansion != 1:
            layers.append(_conv_norm_relu(in_planes, inner, 1, rngs=rngs))
        layers += [
            _conv_norm_relu(inner, inner, 3, stride=stride, groups=inner, rngs=rngs),
            conv(inner, planes, 1, kernel_init=fan_out_init, rngs=rngs),
            BatchNorm(planes, rngs=rngs),
        ]
        self.conv = nnx.List(layers)
        self.adds = stride == 1 and in_planes == planes

    def __call__(self, x: Images) -> Images:
        """Returns the output of the layers, plus the input if the shapes agree."""
        y = _run(self.conv, x)
        return x + y if self.adds else y


class MobileNetV2(nnx.Module):
    """MobileNetV2, [b, h, w, in_channels] to logits [b, num_classes].

    Convolutions are initialised from N(0, 2/fan_out), the dense layer from N(0, 0.01²)
    with a bias of zero. torchvision's dropout before the dense layer is omitted, but
    its index in `classifier` is kept.

    Args:
      stages: Stages of blocks; see `STAGES` and `CIFAR_STAGES`.
      stem_stride: Stride of the first convolution: 2 for ImageNet, 1 for CIFAR.
      num_classes: Number of logits.
      in_channels: Number of channels of the images.
      rngs: Random streams for the initial weights.

    Example:
      >>> model = nnx.eval_shape(lambda: MobileNetV2(rngs=nnx.Rngs(0)))
      >>> model.features[18][0].kernel.shape
      (1, 1, 320, 1280)
    """

    def __init__(
        self,
        stages: tuple[tuple[int, int, int, int], ...] = STAGES,
        *,
        stem_stride: int = 2,
        num_classes: int = 1000,
        in_channels: int = 3,
        rngs: nnx.Rngs,
    ) -> None:
        features: list[nnx.Module] = [
            _conv_norm_relu(in_channels, 32, 3, stride=stem_stride, rngs=rngs)
        ]
        channels = 32
        for expansion, planes, count, stride in stages:
            for step in (stride, *[1] * (count - 1)):
                features.append(
                    InvertedResidual(
                        channels, planes, expansion=expansion, stride=step, rngs=rngs
                    )
                )
                channels = planes
        features.append(_conv_norm_relu(channels, 1280, 1, rngs=rngs))
        self.features = nnx.List(features)
        classifier = nnx.Linear(
            1280, num_classes, kernel_init=nnx.initializers.normal(0.01), rngs=rngs
        )
        self.classifier = nnx.List([Identity(), classifier])

    def __call__(self, x: Images) -> Logits:
        """Returns the logits of a batch of images."""
        x = global_average_pool(_run(self.features, x))
        return _run(self.classifier, x)


def _conv_norm_relu(
    in_features: int,
    out_features: int,
    size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    rngs: nnx.Rngs,
) -> nnx.List:
    """Returns a convolution that keeps or halves the image, batch norm and ReLU6."""
    kernel = conv(
        in_features,
        out_features,
        size,
        stride=stride,
        padding=size // 2,
        groups=groups,
        kernel_init=fan_out_init,
        rngs=rngs,
    )
    return nnx.List([kernel, BatchNorm(out_features, rngs=rngs), Relu6()])


def _run(layers: nnx.List, x: jax.Array) -> jax.Array:
    """Applies layers, and lists of layers, in order."""
    for layer in layers:
        x = _run(layer, x) if isinstance(layer, nnx.List) else layer(x)
    return x
