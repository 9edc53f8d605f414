"""EfficientNet-Lite0 for ImageNet (Liu 2020), the EfficientNet for small devices.

EfficientNet-B0 (Tan and Le 2019) without squeeze-and-excitation and with ReLU6 in place
of swish: inverted residuals with depthwise convolutions of 3×3 and 5×5. Everything is
as in TensorFlow, where the published weights come from: padding ``"SAME"``, which with
stride 2 depends on the size of the image; batch norms with ε = 0.001 and a momentum of
0.99. Images are (x − 127)/128, of bytes x.

Attributes have the names of the PyTorch port (those of lukemelas/EfficientNet-PyTorch):
``_blocks.1._expand_conv.kernel`` is the first convolution of the second block.
"""

from flax import nnx

from tpp_jax.models.layers import (
    BatchNorm,
    Images,
    Logits,
    conv,
    fan_out_init,
    global_average_pool,
    relu6,
)

# Expansion, channels of the output, number of blocks, stride of the first block and
# size of the depthwise kernels.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
_STEM, _HEAD = 32, 1280

# A unit of the last layer starts in U(±1/√classes), as in TensorFlow's code.
_classifier_init = nnx.initializers.variance_scaling(1 / 3, "fan_out", "uniform")


class MBConvBlock(nnx.Module):
    """An inverted residual, [b, h, w, in_planes] to [b, h', w', planes].

    Its layers widen the input, filter each channel, and narrow the result.

    Args:
      in_planes: Number of channels of the input.
      planes: Number of channels of the output.
      expansion: Factor on the channels inside the block; 1 for no widening layer.
      stride: Stride of the depthwise convolution; 2 halves the image.
      size: Height and width of the depthwise kernels.
      rngs: Random streams for the initial weights.
    """

    def __init__(
        self,
        in_planes: int,
        planes: int,
        *,
        expansion: int,
        stride: int,
        size: int,
        rngs: nnx.Rngs,
    ) -> None:
        inner = expansion * in_planes
        self.widens = expansion != 1
        if self.widens:
            self._expand_conv = _conv(in_planes, inner, 1, rngs=rngs)
            self._bn0 = _norm(inner, rngs=rngs)
        self._depthwise_conv = _conv(
            inner, inner, size, stride=stride, groups=inner, rngs=rngs
        )
        self._bn1 = _norm(inner, rngs=rngs)
        self._project_conv = _conv(inner, planes, 1, rngs=rngs)
        self._bn2 = _norm(planes, rngs=rngs)
        self.adds = stride == 1 and in_planes == planes

    def __call__(self, x: Images) -> Images:
        """Returns the output of the layers, plus the input if the shapes agree."""
        y = relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite(nnx.Module):
    """EfficientNet-Lite0, [b, h, w, in_channels] to logits [b, num_classes].

    Kernels are initialised as in TensorFlow's code: N(0, 2/fan_out), where the fan_out
    of a depthwise kernel counts the outputs of one channel. The dropout and the random
    depth of the training are omitted.

    Args:
      stages: Stages of blocks; see `STAGES`.
      num_classes: Number of logits.
      in_channels: Number of channels of the images.
      rngs: Random streams for the initial weights.

    Example:
      >>> model = nnx.eval_shape(lambda: EfficientNetLite(rngs=nnx.Rngs(0)))
      >>> model._conv_head.kernel.shape
      (1, 1, 320, 1280)
    """

    def __init__(
        self,
        stages: tuple[tuple[int, int, int, int, int], ...] = STAGES,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        rngs: nnx.Rngs,
    ) -> None:
        self._conv_stem = _conv(in_channels, _STEM, 3, stride=2, rngs=rngs)
        self._bn0 = _norm(_STEM, rngs=rngs)
        blocks, channels = [], _STEM
        for expansion, planes, count, stride, size in stages:
            for step in (stride, *[1] * (count - 1)):
                blocks.append(
                    MBConvBlock(
                        channels,
                        planes,
                        expansion=expansion,
                        stride=step,
                        size=size,
                        rngs=rngs,
                    )
                )
                channels = planes
        self._blocks = nnx.List(blocks)
        self._conv_head = _conv(channels, _HEAD, 1, rngs=rngs)
        self._bn1 = _norm(_HEAD, rngs=rngs)
        self._fc = nnx.Linear(
            _HEAD, num_classes, kernel_init=_classifier_init, rngs=rngs
        )

    def __call__(self, x: Images) -> Logits:
        """Returns the logits of a batch of images."""
        x = relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = relu6(self._bn1(self._conv_head(x)))
        return self._fc(global_average_pool(x))


def _conv(
    in_features: int,
    out_features: int,
    size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    depthwise = nnx.initializers.normal((2 / size**2) ** 0.5)
    return conv(
        in_features,
        out_features,
        size,
        stride=stride,
        padding="SAME",
        groups=groups,
        kernel_init=fan_out_init if groups == 1 else depthwise,
        rngs=rngs,
    )


def _norm(channels: int, *, rngs: nnx.Rngs) -> BatchNorm:
    return BatchNorm(channels, momentum=0.99, epsilon=1e-3, rngs=rngs)
