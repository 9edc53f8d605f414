"""Networks of the gallery that are built on depthwise and grouped convolutions.

As in convnets.py: the real blocks, tiny widths, written as users write them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tests.gallery.convnets import Bottleneck, ConvNorm, identity

Activation = Callable[[jax.Array], jax.Array]


class InvertedResidual(nnx.Module):
    """MobileNetV2: 1x1 up, depthwise, 1x1 down without an activation."""

    def __init__(
        self, n_in: int, n_out: int, stride: int, expansion: int, *, rngs: nnx.Rngs
    ):
        hidden = expansion * n_in
        if expansion != 1:
            self.expand = ConvNorm(n_in, hidden, act=nnx.relu6, rngs=rngs)
        else:
            self.expand = None
        self.depthwise = ConvNorm(
            hidden, hidden, 3, stride, groups=hidden, act=nnx.relu6, rngs=rngs
        )
        self.project = ConvNorm(hidden, n_out, act=identity, rngs=rngs)
        self.residual = stride == 1 and n_in == n_out

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.residual else y


class MobileNetV2(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = ConvNorm(3, 10, 3, 2, act=nnx.relu6, rngs=rngs)
        blocks, n_in = [], 10
        for expansion, n_out, stride in [(1, 8, 1), (3, 12, 2), (3, 12, 1)]:
            blocks.append(InvertedResidual(n_in, n_out, stride, expansion, rngs=rngs))
            n_in = n_out
        self.blocks = nnx.List(blocks)
        self.last = ConvNorm(n_in, 20, act=nnx.relu6, rngs=rngs)
        self.head = nnx.Linear(20, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x).mean(axis=(1, 2)))


class SqueezeExcite(nnx.Module):
    """A gate for each channel from the means of all; MobileNetV3's is hard."""

    def __init__(self, channels: int, squeezed: int, *, rngs: nnx.Rngs):
        self.squeeze = nnx.Linear(channels, squeezed, rngs=rngs)
        self.excite = nnx.Linear(squeezed, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = nnx.relu(self.squeeze(x.mean(axis=(1, 2))))
        gate = nnx.hard_sigmoid(self.excite(gate))
        return x * gate[:, None, None, :]


class MobileBlockV3(nnx.Module):
    def __init__(
        self,
        n_in: int,
        hidden: int,
        n_out: int,
        size: int,
        stride: int,
        squeeze: bool,
        act: Activation,
        *,
        rngs: nnx.Rngs,
    ):
        self.expand = ConvNorm(n_in, hidden, act=act, rngs=rngs)
        self.depthwise = ConvNorm(
            hidden, hidden, size, stride, groups=hidden, act=act, rngs=rngs
        )
        self.se = SqueezeExcite(hidden, hidden // 4, rngs=rngs) if squeeze else None
        self.project = ConvNorm(hidden, n_out, act=identity, rngs=rngs)
        self.residual = stride == 1 and n_in == n_out

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.depthwise(self.expand(x))
        if self.se is not None:
            y = self.se(y)
        y = self.project(y)
        return x + y if self.residual else y


class MobileNetV3(nnx.Module):
    """Squeeze-and-excitation in some blocks, ReLU first and hard swish later."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = ConvNorm(3, 8, 3, 2, act=nnx.hard_swish, rngs=rngs)
        self.blocks = nnx.List(
            [
                MobileBlockV3(8, 16, 8, 3, 1, True, nnx.relu, rngs=rngs),
                MobileBlockV3(8, 20, 12, 3, 2, False, nnx.relu, rngs=rngs),
                MobileBlockV3(12, 24, 12, 5, 1, True, nnx.hard_swish, rngs=rngs),
            ]
        )
        self.last = ConvNorm(12, 24, act=nnx.hard_swish, rngs=rngs)
        self.hidden = nnx.Linear(24, 16, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.last(x).mean(axis=(1, 2))
        return self.head(nnx.hard_swish(self.hidden(x)))


class MBConv(nnx.Module):
    """EfficientNet's block; the gate is made by 1x1 convolutions on 1x1 images."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        expansion: int,
        size: int,
        stride: int,
        *,
        rngs: nnx.Rngs,
    ):
        hidden = expansion * n_in
        if expansion != 1:
            self.expand = ConvNorm(n_in, hidden, act=nnx.silu, rngs=rngs)
        else:
            self.expand = None
        self.depthwise = ConvNorm(
            hidden, hidden, size, stride, groups=hidden, act=nnx.silu, rngs=rngs
        )
        self.squeeze = nnx.Conv(hidden, n_in // 4, (1, 1), rngs=rngs)
        self.excite = nnx.Conv(n_in // 4, hidden, (1, 1), rngs=rngs)
        self.project = ConvNorm(hidden, n_out, act=identity, rngs=rngs)
        self.residual = stride == 1 and n_in == n_out

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        gate = jnp.mean(y, axis=(1, 2), keepdims=True)
        gate = nnx.sigmoid(self.excite(nnx.silu(self.squeeze(gate))))
        y = self.project(gate * y)
        return x + y if self.residual else y


class EfficientNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = ConvNorm(3, 8, 3, 2, act=nnx.silu, rngs=rngs)
        blocks, n_in = [], 8
        for expansion, n_out, size, stride in [
            (1, 8, 3, 1),
            (3, 12, 5, 2),
            (3, 12, 5, 1),
        ]:
            blocks.append(MBConv(n_in, n_out, expansion, size, stride, rngs=rngs))
            n_in = n_out
        self.blocks = nnx.List(blocks)
        self.last = ConvNorm(n_in, 20, act=nnx.silu, rngs=rngs)
        self.head = nnx.Linear(20, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x).mean(axis=(1, 2)))


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Interleaves the channels of ``groups`` parts, so that they mix later."""
    y = x.reshape(*x.shape[:-1], groups, -1)
    return y.swapaxes(-1, -2).reshape(x.shape)


class ShuffleUnit(nnx.Module):
    """ShuffleNetV2: one half passes by (or is strided), the other is convolved."""

    def __init__(self, n_in: int, n_out: int, stride: int, *, rngs: nnx.Rngs):
        half = n_out // 2
        if stride != 1:
            self.left = nnx.Sequential(
                ConvNorm(n_in, n_in, 3, stride, n_in, identity, rngs=rngs),
                ConvNorm(n_in, half, rngs=rngs),
            )
        else:
            self.left = None
        self.right = nnx.Sequential(
            ConvNorm(half if stride == 1 else n_in, half, rngs=rngs),
            ConvNorm(half, half, 3, stride, half, identity, rngs=rngs),
            ConvNorm(half, half, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.left is None:
            left, right = jnp.split(x, 2, axis=-1)
        else:
            left, right = self.left(x), x
        x = jnp.concatenate([left, self.right(right)], axis=-1)
        return channel_shuffle(x, 2)


class ShuffleNetV2(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = ConvNorm(3, 8, 3, 2, rngs=rngs)
        self.units = nnx.List(
            [
                ShuffleUnit(8, 16, 2, rngs=rngs),
                ShuffleUnit(16, 16, 1, rngs=rngs),
                ShuffleUnit(16, 24, 2, rngs=rngs),
                ShuffleUnit(24, 24, 1, rngs=rngs),
            ]
        )
        self.last = ConvNorm(24, 20, rngs=rngs)
        self.head = nnx.Linear(20, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(self.stem(x), (3, 3), strides=(2, 2), padding="SAME")
        for unit in self.units:
            x = unit(x)
        return self.head(self.last(x).mean(axis=(1, 2)))


class ResNeXt(nnx.Module):
    """Bottlenecks whose 3x3 convolution has four groups."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = ConvNorm(3, 8, 3, 2, rngs=rngs)
        blocks, n_in = [], 8
        for width, stride in [(8, 1), (8, 1), (16, 2)]:
            n_out = 2 * width
            blocks.append(Bottleneck(n_in, width, n_out, stride, 4, rngs=rngs))
            n_in = n_out
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(n_in, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class ConvNeXtBlock(nnx.Module):
    """Depthwise 7x7, layer norm, a wide MLP on each pixel, a learned scale."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.depthwise = nnx.Conv(
            channels, channels, (7, 7), feature_group_count=channels, rngs=rngs
        )
        self.norm = nnx.LayerNorm(channels, rngs=rngs)
        self.up = nnx.Linear(channels, 4 * channels, rngs=rngs)
        self.down = nnx.Linear(4 * channels, channels, rngs=rngs)
        self.scale = nnx.Param(1e-6 * jnp.ones(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(self.depthwise(x))
        y = self.down(nnx.gelu(self.up(y)))
        return x + self.scale * y


class ConvNeXt(nnx.Module):
    """A stem of 4x4 patches; stages joined by a layer norm and a 2x2 convolution."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 8, (4, 4), strides=(4, 4), rngs=rngs)
        self.stem_norm = nnx.LayerNorm(8, rngs=rngs)
        self.stage1 = nnx.List([ConvNeXtBlock(8, rngs=rngs) for _ in range(2)])
        self.down_norm = nnx.LayerNorm(8, rngs=rngs)
        self.down = nnx.Conv(8, 12, (2, 2), strides=(2, 2), rngs=rngs)
        self.stage2 = nnx.List([ConvNeXtBlock(12, rngs=rngs)])
        self.head_norm = nnx.LayerNorm(12, rngs=rngs)
        self.head = nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem_norm(self.stem(x))
        for block in self.stage1:
            x = block(x)
        x = self.down(self.down_norm(x))
        for block in self.stage2:
            x = block(x)
        return self.head(self.head_norm(x.mean(axis=(1, 2))))


class RegNetBlock(nnx.Module):
    """RegNetY's X block: groups of a fixed width, and a gate before the last 1x1."""

    def __init__(
        self, n_in: int, n_out: int, stride: int, group_width: int, *, rngs: nnx.Rngs
    ):
        groups = n_out // group_width
        self.conv1 = ConvNorm(n_in, n_out, rngs=rngs)
        self.conv2 = ConvNorm(n_out, n_out, 3, stride, groups, rngs=rngs)
        self.squeeze = nnx.Linear(n_out, n_in // 4, rngs=rngs)
        self.excite = nnx.Linear(n_in // 4, n_out, rngs=rngs)
        self.conv3 = ConvNorm(n_out, n_out, act=identity, rngs=rngs)
        if n_in != n_out or stride != 1:
            self.shortcut = ConvNorm(n_in, n_out, 1, stride, act=identity, rngs=rngs)
        else:
            self.shortcut = None

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        y = self.conv2(self.conv1(x))
        gate = nnx.relu(self.squeeze(y.mean(axis=(1, 2))))
        gate = nnx.sigmoid(self.excite(gate))
        y = self.conv3(jnp.einsum("bhwc,bc->bhwc", y, gate))
        return nnx.relu(shortcut + y)


class RegNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = ConvNorm(3, 8, 3, 2, rngs=rngs)
        blocks, n_in = [], 8
        for n_out, stride in [(12, 2), (12, 1), (16, 2)]:
            blocks.append(RegNetBlock(n_in, n_out, stride, 4, rngs=rngs))
            n_in = n_out
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(n_in, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))
