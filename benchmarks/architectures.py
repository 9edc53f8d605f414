"""Networks that only the benchmarks need: DenseNet-121, ConvNeXt-T, a Llama shape.

The first two have the layers and names of torchvision's, without drop-out and
stochastic depth. The third has the sizes of Llama 2 with 7 billion parameters. All can
be created abstractly with ``nnx.eval_shape``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tpp_jax.models.layers import (
    BatchNorm,
    Identity,
    Images,
    Logits,
    conv,
    dense,
    global_average_pool,
    relu,
)
from tpp_jax.models.resnet import overlapping_max_pool
from tpp_jax.models.vit import Gelu

Tokens = Int[Array, "batch tokens"]
Vectors = Float[Array, "batch tokens width"]


class DenseLayer(nnx.Module):
    """Norm, 1×1 convolution, norm, 3×3 convolution; concatenated with the input.

    [b, h, w, in_planes] to [b, h, w, in_planes + growth].
    """

    def __init__(
        self, in_planes: int, inner: int, growth: int, *, rngs: nnx.Rngs
    ) -> None:
        self.norm1 = BatchNorm(in_planes, rngs=rngs)
        self.conv1 = conv(in_planes, inner, 1, rngs=rngs)
        self.norm2 = BatchNorm(inner, rngs=rngs)
        self.conv2 = conv(inner, growth, 3, padding=1, rngs=rngs)

    def __call__(self, x: Images) -> Images:
        y = self.conv1(relu(self.norm1(x)))
        y = self.conv2(relu(self.norm2(y)))
        return jnp.concatenate([x, y], axis=-1)


class DenseBlock(nnx.Module):
    """A sequence of dense layers, named ``denselayer1``, ``denselayer2``, …"""

    def __init__(
        self, in_planes: int, depth: int, growth: int, *, rngs: nnx.Rngs
    ) -> None:
        self.depth = depth
        for i in range(depth):
            layer = DenseLayer(in_planes + i * growth, 4 * growth, growth, rngs=rngs)
            setattr(self, f"denselayer{i + 1}", layer)

    def __call__(self, x: Images) -> Images:
        for i in range(self.depth):
            x = getattr(self, f"denselayer{i + 1}")(x)
        return x


class Transition(nnx.Module):
    """Halves the channels with a 1×1 convolution and the image with average pooling."""

    def __init__(self, in_planes: int, planes: int, *, rngs: nnx.Rngs) -> None:
        self.norm = BatchNorm(in_planes, rngs=rngs)
        self.conv = conv(in_planes, planes, 1, rngs=rngs)

    def __call__(self, x: Images) -> Images:
        x = self.conv(relu(self.norm(x)))
        return nnx.avg_pool(x, (2, 2), strides=(2, 2))


class DenseNetFeatures(nnx.Module):
    """All layers of a DenseNet before its pooling; the output has ``channels``."""

    def __init__(self, blocks: tuple[int, ...], growth: int, *, rngs: nnx.Rngs) -> None:
        self.count = len(blocks)
        self.conv0 = conv(3, 2 * growth, 7, stride=2, padding=3, rngs=rngs)
        self.norm0 = BatchNorm(2 * growth, rngs=rngs)
        channels = 2 * growth
        for i, depth in enumerate(blocks, start=1):
            block = DenseBlock(channels, depth, growth, rngs=rngs)
            setattr(self, f"denseblock{i}", block)
            channels += depth * growth
            if i < self.count:
                transition = Transition(channels, channels // 2, rngs=rngs)
                setattr(self, f"transition{i}", transition)
                channels //= 2
        self.norm5 = BatchNorm(channels, rngs=rngs)
        self.channels = channels

    def __call__(self, x: Images) -> Images:
        x = overlapping_max_pool(relu(self.norm0(self.conv0(x))))
        for i in range(1, self.count + 1):
            x = getattr(self, f"denseblock{i}")(x)
            if i < self.count:
                x = getattr(self, f"transition{i}")(x)
        return self.norm5(x)


class DenseNet(nnx.Module):
    """A densely connected network (Huang et al. 2017), by default DenseNet-121."""

    def __init__(
        self,
        blocks: tuple[int, ...] = (6, 12, 24, 16),
        growth: int = 32,
        *,
        num_classes: int = 1000,
        rngs: nnx.Rngs,
    ) -> None:
        self.features = DenseNetFeatures(blocks, growth, rngs=rngs)
        self.classifier = dense(self.features.channels, num_classes, rngs=rngs)

    def __call__(self, x: Images) -> Logits:
        return self.classifier(global_average_pool(relu(self.features(x))))


class ConvNeXtBlock(nnx.Module):
    """A depthwise 7×7 convolution, a layer norm and two dense layers, with a shortcut.

    `block` has the indices of torchvision's Sequential, which transposes the channels
    at 1 and 6.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.block = nnx.List(
            [
                conv(width, width, 7, padding=3, groups=width, bias=True, rngs=rngs),
                Identity(),
                _layer_norm(width, rngs),
                dense(width, 4 * width, rngs=rngs),
                Gelu(),
                dense(4 * width, width, rngs=rngs),
                Identity(),
            ]
        )
        self.layer_scale = nnx.Param(jnp.full(width, 1e-6))

    def __call__(self, x: Images) -> Images:
        y = x
        for layer in self.block:
            y = layer(y)
        return x + self.layer_scale[...] * y


class ConvNeXt(nnx.Module):
    """A ConvNeXt (Liu et al. 2022), by default ConvNeXt-T."""

    def __init__(
        self,
        blocks: tuple[int, ...] = (3, 3, 9, 3),
        widths: tuple[int, ...] = (96, 192, 384, 768),
        *,
        num_classes: int = 1000,
        rngs: nnx.Rngs,
    ) -> None:
        features: list[nnx.Module] = []
        before = 3
        for width, depth in zip(widths, blocks, strict=True):
            size = 2 if features else 4
            shrink = conv(before, width, size, stride=size, bias=True, rngs=rngs)
            if features:
                layers = [_layer_norm(before, rngs), shrink]
            else:
                layers = [shrink, _layer_norm(width, rngs)]
            stage = [ConvNeXtBlock(width, rngs=rngs) for _ in range(depth)]
            features += [nnx.List(layers), nnx.List(stage)]
            before = width
        self.features = nnx.List(features)
        self.classifier = nnx.List(
            [
                _layer_norm(before, rngs),
                Identity(),
                dense(before, num_classes, rngs=rngs),
            ]
        )

    def __call__(self, x: Images) -> Logits:
        for stage in self.features:
            for layer in stage:
                x = layer(x)
        x = global_average_pool(x)
        for layer in self.classifier:
            x = layer(x)
        return x


class LlamaShape(NamedTuple):
    """The sizes of a Llama; by default those of Llama 2 with 7 billion parameters."""

    depth: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 32
    hidden: int = 11008
    vocabulary: int = 32000


class LlamaAttention(nnx.Module):
    """Causal attention with rotary positions and possibly fewer key-value heads."""

    def __init__(self, shape: LlamaShape, *, rngs: nnx.Rngs) -> None:
        size = shape.width // shape.heads
        self.scale = size**-0.5

        def project(heads: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                shape.width, (heads, size), use_bias=False, rngs=rngs
            )

        self.q_proj = project(shape.heads)
        self.k_proj = project(shape.kv_heads)
        self.v_proj = project(shape.kv_heads)
        self.o_proj = nnx.LinearGeneral(
            (shape.heads, size), shape.width, axis=(-2, -1), use_bias=False, rngs=rngs
        )

    def __call__(self, x: Vectors) -> Vectors:
        q, k, v = rotate(self.q_proj(x)), rotate(self.k_proj(x)), self.v_proj(x)
        each = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, each, axis=2), jnp.repeat(v, each, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q * self.scale, k)
        n = x.shape[1]
        scores = jnp.where(jnp.tri(n, dtype=bool), scores, -jnp.inf)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return self.o_proj(y)


class LlamaMLP(nnx.Module):
    """SwiGLU: one dense layer gates another."""

    def __init__(self, shape: LlamaShape, *, rngs: nnx.Rngs) -> None:
        def dense(before: int, after: int) -> nnx.Linear:
            return nnx.Linear(before, after, use_bias=False, rngs=rngs)

        self.gate_proj = dense(shape.width, shape.hidden)
        self.up_proj = dense(shape.width, shape.hidden)
        self.down_proj = dense(shape.hidden, shape.width)

    def __call__(self, x: Vectors) -> Vectors:
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nnx.Module):
    """Attention and gated dense layers, each with a norm before and a shortcut."""

    def __init__(self, shape: LlamaShape, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = nnx.RMSNorm(shape.width, epsilon=1e-5, rngs=rngs)
        self.self_attn = LlamaAttention(shape, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(
            shape.width, epsilon=1e-5, rngs=rngs
        )
        self.mlp = LlamaMLP(shape, rngs=rngs)

    def __call__(self, x: Vectors) -> Vectors:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
    """A Llama (Touvron et al. 2023), int [b, n] to logits [b, n, vocabulary]."""

    def __init__(self, shape: LlamaShape, *, rngs: nnx.Rngs) -> None:
        self.embed_tokens = nnx.Embed(shape.vocabulary, shape.width, rngs=rngs)
        self.layers = nnx.List(
            [LlamaBlock(shape, rngs=rngs) for _ in range(shape.depth)]
        )
        self.norm = nnx.RMSNorm(shape.width, epsilon=1e-5, rngs=rngs)
        self.lm_head = nnx.Linear(
            shape.width, shape.vocabulary, use_bias=False, rngs=rngs
        )

    def __call__(self, tokens: Tokens) -> Float[Array, "batch tokens vocabulary"]:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def rotate(
    x: Float[Array, "batch tokens heads size"],
) -> Float[Array, "batch tokens heads size"]:
    """Rotates the pair (i, i + size/2) of dimensions by position · 10000^(−2i/size)."""
    first, second = jnp.split(x, 2, axis=-1)
    half = first.shape[-1]
    speed = 10_000.0 ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None] * speed
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate(turned, axis=-1)


def _layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
