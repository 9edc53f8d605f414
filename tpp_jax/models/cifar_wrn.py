"""Wide residual networks for 32×32 images (Zagoruyko & Komodakis 2016).

Three stages of pre-activation blocks at 16k, 32k and 64k channels, 6n + 4 layers in
all: WRN-28-10 has n = 4 and k = 10. Batch norm and ReLU come before each convolution,
and nothing follows a block's addition. In a block that changes the number of channels
both paths start from the normalised input, and the shortcut is a 1×1 convolution. The
paper's optional dropout within blocks is omitted.

Attributes have the names of the usual PyTorch implementation, so the path of an array
is, say, ``block2.layer.0.conv1.kernel``.
"""

import functools

import jax.numpy as jnp
from flax import nnx

from tpp_jax.errors import TPPError
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

_conv = functools.partial(conv, kernel_init=fan_out_init)

# Depth and width of the networks in the paper's tables, and of the teachers and
# students in papers on distillation and pruning.
USUAL = (
    *((16, width) for width in (1, 2, 4, 8, 10)),
    *((22, width) for width in (2, 8)),
    *((28, width) for width in (2, 10, 12)),
    *((40, width) for width in (1, 2, 4, 8)),
)


class PreActivationBlock(nnx.Module):
    """Two 3×3 convolutions, each after batch norm and ReLU, and a shortcut around them.

    [b, h, w, in_planes] to [b, h/stride, w/stride, planes].

    Args:
      in_planes: Number of channels of the input.
      planes: Number of channels of the output of each convolution.
      stride: Stride of the first convolution; 2 halves the image. A block that halves
        the image must also change the number of channels.
      rngs: Random streams for the initial weights.
    """

    def __init__(
        self, in_planes: int, planes: int, *, stride: int, rngs: nnx.Rngs
    ) -> None:
        self.bn1 = BatchNorm(in_planes, rngs=rngs)
        self.conv1 = _conv(in_planes, planes, 3, stride=stride, padding=1, rngs=rngs)
        self.bn2 = BatchNorm(planes, rngs=rngs)
        self.conv2 = _conv(planes, planes, 3, padding=1, rngs=rngs)
        self.projects = in_planes != planes
        if self.projects:
            self.convShortcut = _conv(in_planes, planes, 1, stride=stride, rngs=rngs)

    def __call__(self, x: Images) -> Images:
        """Returns the sum of both paths."""
        y = relu(self.bn1(x))
        shortcut = self.convShortcut(y) if self.projects else x
        return shortcut + self.conv2(relu(self.bn2(self.conv1(y))))


class Stage(nnx.Module):
    """A sequence of blocks, the first of which may change the shape.

    Args:
      in_planes: Number of channels of the input.
      planes: Number of channels of the output.
      count: Number of blocks.
      stride: Stride of the first block.
      rngs: Random streams for the initial weights.
    """

    def __init__(
        self, in_planes: int, planes: int, count: int, *, stride: int, rngs: nnx.Rngs
    ) -> None:
        first = PreActivationBlock(in_planes, planes, stride=stride, rngs=rngs)
        rest = [
            PreActivationBlock(planes, planes, stride=1, rngs=rngs)
            for _ in range(count - 1)
        ]
        self.layer = Blocks([first, *rest])

    def __call__(self, x: Images) -> Images:
        """Applies the blocks in order."""
        return self.layer(x)


class CifarWRN(nnx.Module):
    """A wide ResNet, [b, h, w, in_channels] to logits [b, num_classes].

    Convolutions are initialised from N(0, 2/fan_out), the dense layer as by default in
    PyTorch but with a bias of zero.

    Args:
      depth: Number of layers, 6n + 4.
      width: Factor k on the 16, 32 and 64 channels of the stages; the first convolution
        always has 16 channels.
      num_classes: Number of logits.
      in_channels: Number of channels of the images.
      rngs: Random streams for the initial weights.

    Raises:
      TPPError: If the depth or the width is invalid.

    Example:
      >>> model = CifarWRN(10, 1, num_classes=10, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        rngs: nnx.Rngs,
    ) -> None:
        count, rest = divmod(depth - 4, 6)
        if count < 1 or rest:
            raise TPPError(
                f"A wide ResNet has 6n + 4 layers, which {depth} is not; choose one of "
                "10, 16, 22, 28, 34, 40, …"
            )
        if width < 1:
            raise TPPError(f"The width of a wide ResNet is at least 1, not {width}.")
        planes = [16 * width, 32 * width, 64 * width]
        self.conv1 = _conv(in_channels, 16, 3, padding=1, rngs=rngs)
        self.block1 = Stage(16, planes[0], count, stride=1, rngs=rngs)
        self.block2 = Stage(planes[0], planes[1], count, stride=2, rngs=rngs)
        self.block3 = Stage(planes[1], planes[2], count, stride=2, rngs=rngs)
        self.bn1 = BatchNorm(planes[2], rngs=rngs)
        self.fc = dense(planes[2], num_classes, rngs=rngs)
        self.fc.bias = nnx.Param(jnp.zeros(num_classes))

    def __call__(self, x: Images) -> Logits:
        """Returns the logits of a batch of images."""
        x = self.conv1(x)
        for stage in (self.block1, self.block2, self.block3):
            x = stage(x)
        return self.fc(global_average_pool(relu(self.bn1(x))))
