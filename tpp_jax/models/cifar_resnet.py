"""Residual networks for 32×32 images (He et al. 2016, section 4.2).

Three stages of basic blocks at 16, 32 and 64 channels (times a width), 6n + 2 layers in
all. Where a stage halves the image and doubles the channels, the shortcut either
subsamples and pads with zero channels (option A, which the paper uses for CIFAR,
without parameters) or is a 1×1 convolution with batch norm (option B).

Attributes have the names of the PyTorch implementations, so the path of an array, say
``layer2.0.conv1.kernel``, matches the same pattern strings.
"""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import lax

from tpp_jax.errors import TPPError
from tpp_jax.models.layers import (
    BatchNorm,
    Images,
    Logits,
    conv,
    dense,
    every_second,
    global_average_pool,
    relu,
)
from tpp_jax.xla.blocks import Blocks

DEPTHS = (8, 20, 32, 44, 56, 110, 1202)

Option = Literal["A", "B"]


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions and a shortcut around them.

    [b, h, w, in_planes] to [b, h/stride, w/stride, planes].

    Args:
      in_planes: Number of channels of the input.
      planes: Number of channels of the output of each convolution.
      stride: Stride of the first convolution; 2 halves the image.
      option: Shortcut of a block that changes the shape: "A" subsamples and adds
        channels of zeros, planes // 4 on either side; "B" is a 1×1 convolution and a
        batch norm, named ``downsample.0`` and ``downsample.1``.
      rngs: Random streams for the initial weights.
    """

    def __init__(
        self,
        in_planes: int,
        planes: int,
        *,
        stride: int,
        option: Option,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv1 = conv(in_planes, planes, 3, stride=stride, padding=1, rngs=rngs)
        self.bn1 = BatchNorm(planes, rngs=rngs)
        self.conv2 = conv(planes, planes, 3, padding=1, rngs=rngs)
        self.bn2 = BatchNorm(planes, rngs=rngs)
        # The only width that a forward pass depends on. It remains right as long as the
        # channels between blocks are kept; those inside a block may be pruned.
        self.pad_channels = 0
        self.projects = False
        if stride != 1 or in_planes != planes:
            if option == "A":
                self.pad_channels = planes // 4
            else:
                self.projects = True
                self.downsample = nnx.List(
                    [
                        conv(in_planes, planes, 1, stride=stride, rngs=rngs),
                        BatchNorm(planes, rngs=rngs),
                    ]
                )

    def __call__(self, x: Images) -> Images:
        """Returns the sum of both paths after a ReLU."""
        y = relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return relu(y + self.shortcut(x))

    def shortcut(self, x: Images) -> Images:
        """Returns the input in the shape of the output of the convolutions."""
        if self.projects:
            projection, norm = self.downsample
            return norm(projection(x))
        if self.pad_channels:
            both = (self.pad_channels, self.pad_channels, 0)
            zero = jnp.zeros((), x.dtype)
            return lax.pad(every_second(x), zero, [(0, 0, 0)] * 3 + [both])
        return x


class CifarResNet(nnx.Module):
    """A CIFAR ResNet, [b, h, w, in_channels] to logits [b, num_classes].

    Weights are initialised as by default in PyTorch, from U(±1/√fan_in).

    Args:
      blocks: Number of basic blocks in each of the three stages.
      num_classes: Number of logits.
      width: Factor on the 16, 32 and 64 channels of the stages; 16·width must be an
        even integer.
      option: Shortcut of the blocks that change the shape; see `BasicBlock`.
      in_channels: Number of channels of the images.
      rngs: Random streams for the initial weights.

    Raises:
      TPPError: If the width, the option or the number of stages is invalid.

    Example:
      >>> model = CifarResNet((1, 1, 1), num_classes=10, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        num_classes: int = 10,
        width: float = 1,
        option: Option = "A",
        in_channels: int = 3,
        rngs: nnx.Rngs,
    ) -> None:
        if len(blocks) != 3 or min(blocks) < 1:
            raise TPPError(
                f"A CIFAR ResNet has three stages of at least one block, not {blocks}."
            )
        if option not in ("A", "B"):
            raise TPPError(f'The shortcut option is "A" or "B", not {option!r}.')
        planes = int(16 * width)
        if planes != 16 * width or planes < 2 or planes % 2:
            raise TPPError(
                f"A width of {width} gives {16 * width} channels in the first stage; "
                "choose one that gives an even integer."
            )

        def stage(in_planes: int, planes: int, count: int, stride: int) -> Blocks:
            first = BasicBlock(
                in_planes, planes, stride=stride, option=option, rngs=rngs
            )
            rest = [
                BasicBlock(planes, planes, stride=1, option=option, rngs=rngs)
                for _ in range(count - 1)
            ]
            return Blocks([first, *rest])

        self.conv1 = conv(in_channels, planes, 3, padding=1, rngs=rngs)
        self.bn1 = BatchNorm(planes, rngs=rngs)
        self.layer1 = stage(planes, planes, blocks[0], 1)
        self.layer2 = stage(planes, 2 * planes, blocks[1], 2)
        self.layer3 = stage(2 * planes, 4 * planes, blocks[2], 2)
        self.linear = dense(4 * planes, num_classes, rngs=rngs)

    def __call__(self, x: Images) -> Logits:
        """Returns the logits of a batch of images."""
        x = relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return self.linear(global_average_pool(x))


def blocks_of_depth(depth: int) -> tuple[int, int, int]:
    """Returns the blocks per stage of the network with `depth` = 6n + 2 layers.

    >>> blocks_of_depth(56)
    (9, 9, 9)
    """
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        raise TPPError(f"A CIFAR ResNet has 6n + 2 layers, which {depth} is not.")
    return (n, n, n)
