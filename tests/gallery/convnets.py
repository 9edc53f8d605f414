"""Convolutional networks of the gallery, in small: real blocks, tiny widths.

Written as users write them, knowing nothing of pruning: sizes come from shapes where
people take them from shapes. Those built on depthwise and grouped convolutions are in
grouped_convnets.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen, nnx


def identity(x: jax.Array) -> jax.Array:
    return x


class ConvNorm(nnx.Module):
    """A convolution without a bias, its batch norm and an activation."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        size: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: Callable[[jax.Array], jax.Array] = nnx.relu,
        *,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            n_in,
            n_out,
            (size, size),
            strides=stride,
            feature_group_count=groups,
            use_bias=False,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(n_out, rngs=rngs)
        self.act = act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.act(self.norm(self.conv(x)))


class PreActivationBlock(nnx.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.BatchNorm(n_in, rngs=rngs)
        self.conv1 = nnx.Conv(n_in, n_out, (3, 3), stride, use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(n_out, rngs=rngs)
        self.conv2 = nnx.Conv(n_out, n_out, (3, 3), use_bias=False, rngs=rngs)
        if n_in != n_out or stride != 1:
            self.shortcut = nnx.Conv(
                n_in, n_out, (1, 1), stride, use_bias=False, rngs=rngs
            )
        else:
            self.shortcut = None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = nnx.relu(self.norm2(self.conv1(y)))
        return shortcut + self.conv2(y)


class PreActivationResNet(nnx.Module):
    """He et al. 2016, Identity Mappings: norm and ReLU come before each convolution."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        blocks, n_in = [], 8
        for n_out, stride in [(8, 1), (8, 1), (12, 2), (12, 1)]:
            blocks.append(PreActivationBlock(n_in, n_out, stride, rngs=rngs))
            n_in = n_out
        self.blocks = nnx.List(blocks)
        self.norm = nnx.BatchNorm(n_in, rngs=rngs)
        self.head = nnx.Linear(n_in, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


class Bottleneck(nnx.Module):
    """1x1 down, 3x3, 1x1 up; ResNeXt's has the 3x3 in groups."""

    def __init__(
        self,
        n_in: int,
        width: int,
        n_out: int,
        stride: int,
        groups: int = 1,
        *,
        rngs: nnx.Rngs,
    ):
        self.conv1 = ConvNorm(n_in, width, rngs=rngs)
        self.conv2 = ConvNorm(width, width, 3, stride, groups, rngs=rngs)
        self.conv3 = ConvNorm(width, n_out, act=identity, rngs=rngs)
        if n_in != n_out or stride != 1:
            self.downsample = ConvNorm(n_in, n_out, 1, stride, act=identity, rngs=rngs)
        else:
            self.downsample = None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv3(self.conv2(self.conv1(x)))
        if self.downsample is not None:
            x = self.downsample(x)
        return nnx.relu(x + y)


class BottleneckResNet(nnx.Module):
    """ResNet-50's stem and blocks: the output of a block is four times as wide."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = ConvNorm(3, 8, 7, 2, rngs=rngs)
        blocks, n_in = [], 8
        for width, stride in [(6, 1), (6, 1), (10, 2), (10, 1)]:
            blocks.append(Bottleneck(n_in, width, 4 * width, stride, rngs=rngs))
            n_in = 4 * width
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(n_in, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(self.stem(x), (3, 3), strides=(2, 2), padding="SAME")
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


class DenseLayer(nnx.Module):
    def __init__(self, n_in: int, growth: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.BatchNorm(n_in, rngs=rngs)
        self.conv1 = nnx.Conv(n_in, 4 * growth, (1, 1), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(4 * growth, rngs=rngs)
        self.conv2 = nnx.Conv(4 * growth, growth, (3, 3), use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(nnx.relu(self.norm1(x)))
        y = self.conv2(nnx.relu(self.norm2(y)))
        return jnp.concatenate([x, y], axis=-1)


class DenseNet(nnx.Module):
    """Every layer of a block reads all before it; transitions halve what comes out."""

    def __init__(self, rngs: nnx.Rngs, growth: int = 4):
        n = 2 * growth
        self.stem = nnx.Conv(3, n, (3, 3), use_bias=False, rngs=rngs)
        self.block1 = nnx.List(
            [DenseLayer(n + i * growth, growth, rngs=rngs) for i in range(2)]
        )
        n += 2 * growth
        self.transition_norm = nnx.BatchNorm(n, rngs=rngs)
        self.transition = nnx.Conv(n, n // 2, (1, 1), use_bias=False, rngs=rngs)
        n //= 2
        self.block2 = nnx.List(
            [DenseLayer(n + i * growth, growth, rngs=rngs) for i in range(2)]
        )
        n += 2 * growth
        self.norm = nnx.BatchNorm(n, rngs=rngs)
        self.head = nnx.Linear(n, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for layer in self.block1:
            x = layer(x)
        x = self.transition(nnx.relu(self.transition_norm(x)))
        x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        for layer in self.block2:
            x = layer(x)
        return self.head(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


class InceptionModule(nnx.Module):
    """Four branches side by side: 1x1, 3x3, 5x5 as two 3x3, and pooling."""

    def __init__(self, n_in: int, *, rngs: nnx.Rngs):
        self.branch1 = ConvNorm(n_in, 6, rngs=rngs)
        self.branch3 = nnx.Sequential(
            ConvNorm(n_in, 4, rngs=rngs), ConvNorm(4, 8, 3, rngs=rngs)
        )
        self.branch5 = nnx.Sequential(
            ConvNorm(n_in, 3, rngs=rngs),
            ConvNorm(3, 5, 3, rngs=rngs),
            ConvNorm(5, 5, 3, rngs=rngs),
        )
        self.pool_projection = ConvNorm(n_in, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        pooled = nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME")
        branches = [
            self.branch1(x),
            self.branch3(x),
            self.branch5(x),
            self.pool_projection(pooled),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionReduction(nnx.Module):
    """Halves the resolution: a strided branch beside the pooled input itself."""

    def __init__(self, n_in: int, *, rngs: nnx.Rngs):
        self.reduce = ConvNorm(n_in, 6, rngs=rngs)
        self.conv = ConvNorm(6, 10, 3, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        pooled = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        return jnp.concatenate([self.conv(self.reduce(x)), pooled], axis=-1)


class Inception(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = ConvNorm(3, 8, 3, rngs=rngs)
        self.mixed = InceptionModule(8, rngs=rngs)
        self.reduction = InceptionReduction(23, rngs=rngs)
        self.last = ConvNorm(33, 12, rngs=rngs)
        self.head = nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.last(self.reduction(self.mixed(self.stem(x))))
        return self.head(x.mean(axis=(1, 2)))


class DoubleConv(nnx.Module):
    def __init__(self, n_in: int, n_out: int, *, rngs: nnx.Rngs):
        self.conv1 = ConvNorm(n_in, n_out, 3, rngs=rngs)
        self.conv2 = ConvNorm(n_out, n_out, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv2(self.conv1(x))


class UNet(nnx.Module):
    """Two levels down by max pooling, two up by transposed convolution."""

    def __init__(self, rngs: nnx.Rngs, widths: tuple[int, ...] = (6, 8, 10)):
        self.down, self.up, self.merge = nnx.List(), nnx.List(), nnx.List()
        n_in = 3
        for width in widths:
            self.down.append(DoubleConv(n_in, width, rngs=rngs))
            n_in = width
        for width in reversed(widths[:-1]):
            self.up.append(
                nnx.ConvTranspose(n_in, width, (2, 2), strides=(2, 2), rngs=rngs)
            )
            self.merge.append(DoubleConv(2 * width, width, rngs=rngs))
            n_in = width
        self.head = nnx.Conv(n_in, 2, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        skips = []
        for i, block in enumerate(self.down):
            if i > 0:
                skips.append(x)
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            x = block(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(jnp.concatenate([skips.pop(), up(x)], axis=-1))
        return self.head(x)


class VGG(nnx.Module):
    """Plain convolutions with biases; the feature map is flattened for the head."""

    def __init__(self, rngs: nnx.Rngs, widths: tuple[int, ...] = (6, 6, 8, 8)):
        self.convs = nnx.List()
        n_in = 3
        for width in widths:
            self.convs.append(nnx.Conv(n_in, width, (3, 3), rngs=rngs))
            n_in = width
        self.fc1 = nnx.Linear(4 * 4 * n_in, 20, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.fc2 = nnx.Linear(20, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, conv in enumerate(self.convs):
            x = nnx.relu(conv(x))
            if i % 2:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return self.fc2(self.dropout(nnx.relu(self.fc1(x))))


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """Depth to space: factor² neighbouring blocks of channels become pixels."""
    b, h, w, _ = x.shape
    x = x.reshape(b, h, w, factor, factor, -1)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * factor, w * factor, -1)


class SuperResolution(nnx.Module):
    """ESPCN-like, four times larger: pixels shuffled once midway, once at the end."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 8, (5, 5), rngs=rngs)
        self.conv2 = nnx.Conv(8, 6, (3, 3), rngs=rngs)
        self.up = nnx.Conv(6, 4 * 6, (3, 3), rngs=rngs)
        self.last = nnx.Conv(6, 4 * 3, (3, 3), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.tanh(self.conv1(x))
        x = nnx.tanh(self.conv2(x))
        x = nnx.tanh(pixel_shuffle(self.up(x), 2))
        return pixel_shuffle(self.last(x), 2)


class LinenBlock(linen.Module):
    features: int
    stride: int = 1

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = linen.Conv(self.features, (3, 3), self.stride, use_bias=False)(x)
        y = linen.relu(linen.BatchNorm(use_running_average=True)(y))
        y = linen.Conv(self.features, (3, 3), use_bias=False)(y)
        y = linen.BatchNorm(use_running_average=True)(y)
        if x.shape != y.shape:
            x = linen.Conv(self.features, (1, 1), self.stride, name="shortcut")(x)
        return linen.relu(x + y)


class LinenResNet(linen.Module):
    """A basic ResNet in Flax Linen: two stages, compact style."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.relu(linen.Conv(8, (3, 3), name="stem")(x))
        for features, stride in [(8, 1), (12, 2)]:
            x = LinenBlock(features, stride)(x)
        x = linen.relu(linen.Dense(16, name="fc")(x.mean(axis=(1, 2))))
        return linen.Dense(10, name="head")(x)
