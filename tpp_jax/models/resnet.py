"""Residual networks for ImageNet (He et al. 2016), as torchvision has them.

Four stages after a 7×7 convolution and a pooling. ResNet-18 and -34 have basic blocks
of two 3×3 convolutions, deeper networks bottlenecks of 1×1, 3×3, 1×1. A bottleneck
halves the image in its 3×3 convolution ("version 1.5"), and every shortcut that changes
the shape is a 1×1 convolution with a batch norm.

Attributes have torchvision's names, so the path of an array, say
``layer2.0.downsample.0.kernel``, is that of its weights.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax

from tpp_jax.models.layers import (
    BatchNorm,
    Images,
    Logits,
    conv,
    dense,
    fan_out_init,
    global_average_pool,
    relu,
)
from tpp_jax.xla.blocks import Blocks


class Architecture(NamedTuple):
    """Settings that distinguish the networks of this family.

    Attributes:
      blocks: Number of blocks in each of the four stages.
      bottleneck: Whether blocks are bottlenecks, whose outputs are four times as wide.
      width: Factor on the width inside the bottlenecks.
    """

    blocks: tuple[int, int, int, int]
    bottleneck: bool
    width: int = 1


ARCHITECTURES = {
    "resnet18": Architecture((2, 2, 2, 2), bottleneck=False),
    "resnet34": Architecture((3, 4, 6, 3), bottleneck=False),
    "resnet50": Architecture((3, 4, 6, 3), bottleneck=True),
    "resnet101": Architecture((3, 4, 23, 3), bottleneck=True),
    "resnet152": Architecture((3, 8, 36, 3), bottleneck=True),
    "wide_resnet50_2": Architecture((3, 4, 6, 3), bottleneck=True, width=2),
}


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions and a shortcut around them.

    [b, h, w, in_planes] to [b, h/stride, w/stride, planes].

    Args:
      in_planes: Number of channels of the input.
      planes: Number of channels of the output of each convolution.
      stride: Stride of the first convolution; 2 halves the image.
      rngs: Random streams for the initial weights.
    """

    def __init__(
        self, in_planes: int, planes: int, *, stride: int, rngs: nnx.Rngs
    ) -> None:
        self.conv1 = _conv(in_planes, planes, 3, stride=stride, rngs=rngs)
        self.bn1 = BatchNorm(planes, rngs=rngs)
        self.conv2 = _conv(planes, planes, 3, rngs=rngs)
        self.bn2 = BatchNorm(planes, rngs=rngs)
        self.projects = stride != 1 or in_planes != planes
        if self.projects:
            self.downsample = _projection(in_planes, planes, stride, rngs)

    def __call__(self, x: Images) -> Images:
        """Returns the sum of both paths after a ReLU."""
        y = relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.projects:
            for layer in self.downsample:
                x = layer(x)
        return relu(y + x)


class Bottleneck(nnx.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut around them.

    [b, h, w, in_planes] to [b, h/stride, w/stride, planes].

    Args:
      in_planes: Number of channels of the input.
      inner: Number of channels between the convolutions.
      planes: Number of channels of the output.
      stride: Stride of the 3×3 convolution; 2 halves the image.
      rngs: Random streams for the initial weights.
    """

    def __init__(
        self, in_planes: int, inner: int, planes: int, *, stride: int, rngs: nnx.Rngs
    ) -> None:
        self.conv1 = _conv(in_planes, inner, 1, rngs=rngs)
        self.bn1 = BatchNorm(inner, rngs=rngs)
        self.conv2 = _conv(inner, inner, 3, stride=stride, rngs=rngs)
        self.bn2 = BatchNorm(inner, rngs=rngs)
        self.conv3 = _conv(inner, planes, 1, rngs=rngs)
        self.bn3 = BatchNorm(planes, rngs=rngs)
        self.projects = stride != 1 or in_planes != planes
        if self.projects:
            self.downsample = _projection(in_planes, planes, stride, rngs)

    def __call__(self, x: Images) -> Images:
        """Returns the sum of both paths after a ReLU."""
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.projects:
            for layer in self.downsample:
                x = layer(x)
        return relu(y + x)


class ResNet(nnx.Module):
    """A ResNet for ImageNet, [b, h, w, in_channels] to logits [b, num_classes].

    Convolutions are initialised from N(0, 2/fan_out), the dense layer as by default in
    PyTorch.

    Args:
      architecture: Number and type of the blocks; see `ARCHITECTURES`.
      num_classes: Number of logits.
      in_channels: Number of channels of the images.
      rngs: Random streams for the initial weights.

    Example:
      >>> tiny = Architecture((1, 1, 1, 1), bottleneck=False)
      >>> model = nnx.eval_shape(lambda: ResNet(tiny, rngs=nnx.Rngs(0)))
      >>> model.layer4[0].conv1.kernel.shape
      (3, 3, 256, 512)
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        rngs: nnx.Rngs,
    ) -> None:
        blocks, bottleneck, width = architecture
        self.conv1 = _conv(in_channels, 64, 7, stride=2, rngs=rngs)
        self.bn1 = BatchNorm(64, rngs=rngs)
        channels = 64

        def stage(inner: int, count: int, stride: int) -> Blocks:
            nonlocal channels
            members: list[nnx.Module] = []
            for step in (stride, *[1] * (count - 1)):
                if bottleneck:
                    planes = 4 * inner
                    members.append(
                        Bottleneck(
                            channels, width * inner, planes, stride=step, rngs=rngs
                        )
                    )
                else:
                    planes = inner
                    members.append(BasicBlock(channels, planes, stride=step, rngs=rngs))
                channels = planes
            return Blocks(members)

        self.layer1 = stage(64, blocks[0], 1)
        self.layer2 = stage(128, blocks[1], 2)
        self.layer3 = stage(256, blocks[2], 2)
        self.layer4 = stage(512, blocks[3], 2)
        self.fc = dense(channels, num_classes, rngs=rngs)

    def __call__(self, x: Images) -> Logits:
        """Returns the logits of a batch of images."""
        x = relu(self.bn1(self.conv1(x)))
        x = overlapping_max_pool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(global_average_pool(x))


def overlapping_max_pool(x: Images) -> Images:
    """Returns the maxima over 3×3 windows with stride 2, padded by −∞.

    [b, h, w, c] to [b, ⌈h/2⌉, ⌈w/2⌉, c]. Computed along one axis after the other, each
    time as the maximum of three slices, since the gradient of XLA's reduce_window is
    slow on the CPU; see `tpp_jax.models.layers.max_pool`.

    >>> overlapping_max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    for axis in (1, 2):
        size = (x.shape[axis] + 1) // 2
        border = [(1, 1, 0) if i == axis else (0, 0, 0) for i in range(4)]
        x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), border)
        first, second, third = (
            lax.slice_in_dim(x, start, start + 2 * size - 1, 2, axis)
            for start in range(3)
        )
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


def _conv(
    in_features: int, out_features: int, size: int, *, stride: int = 1, rngs: nnx.Rngs
) -> nnx.Conv:
    """Returns a convolution without bias that keeps or halves the image."""
    return conv(
        in_features,
        out_features,
        size,
        stride=stride,
        padding=size // 2,
        kernel_init=fan_out_init,
        rngs=rngs,
    )


def _projection(in_planes: int, planes: int, stride: int, rngs: nnx.Rngs) -> nnx.List:
    """Returns a shortcut that changes the shape: 1×1 convolution and batch norm."""
    return nnx.List(
        [
            _conv(in_planes, planes, 1, stride=stride, rngs=rngs),
            BatchNorm(planes, rngs=rngs),
        ]
    )
