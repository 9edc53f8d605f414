"""Transformers as their users write them, a few channels wide.

What is small here is only the numbers: every model has the wiring of its full-sized
original. Where a user would write a number of heads into a reshape, these leave it to
follow from the arrays, so that heads can be taken out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx


class Mlp(nnx.Module):
    """The two dense layers of a transformer's block."""

    def __init__(self, width, hidden, rngs):
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


class FusedAttention(nnx.Module):
    """Attention whose queries, keys and values come out of one dense layer (timm)."""

    def __init__(self, width, heads, rngs):
        self.size = width // heads
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, -1, self.size)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        weights = jax.nn.softmax(q @ k.swapaxes(-2, -1) * self.size**-0.5)
        y = (weights @ v).transpose(0, 2, 1, 3)
        return self.proj(y.reshape(batch, length, -1))


class ModularAttention(nnx.Module):
    """The attention that Flax has, attending to its own input."""

    def __init__(self, width, heads, rngs):
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(x)


class EncoderBlock(nnx.Module):
    """A pre-norm block: attention, then an MLP, each beside a shortcut."""

    def __init__(self, width, heads, attention, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = attention(width, heads, rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = Mlp(width, 2 * width, rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
    """ViT (Dosovitskiy et al., 2021): a class token before a row of patches."""

    def __init__(self, attention=FusedAttention, width=16, heads=4, *, rngs):
        self.patch = nnx.Conv(3, width, (4, 4), strides=4, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(rngs.normal((1, 5, width)))
        self.blocks = nnx.List(
            [EncoderBlock(width, heads, attention, rngs) for _ in range(2)]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images):
        x = self.patch(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.tile(self.class_token[...], (x.shape[0], 1, 1))
        x = jnp.concatenate([token, x], axis=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class WindowAttention(nnx.Module):
    """Attention within a window, with a bias for each pair's relative place."""

    def __init__(self, width, heads, window, rngs):
        self.size, self.window = width // heads, window
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.proj = nnx.Linear(width, width, rngs=rngs)
        self.relative_bias = nnx.Param(rngs.normal(((2 * window - 1) ** 2, heads)))

    def __call__(self, x, mask=None):
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, -1, self.size)
        q, k, v = jnp.unstack(qkv.transpose(2, 0, 3, 1, 4))
        scores = q * self.size**-0.5 @ k.swapaxes(-2, -1)
        bias = self.relative_bias[...][relative_places(self.window).reshape(-1)]
        scores += bias.reshape(length, length, -1).transpose(2, 0, 1)
        if mask is not None:
            windows = len(mask)
            scores = scores.reshape(-1, windows, *scores.shape[1:]) + mask[:, None]
            scores = scores.reshape(n, *scores.shape[2:])
        y = jax.nn.softmax(scores, axis=-1) @ v
        return self.proj(y.transpose(0, 2, 1, 3).reshape(n, length, -1))


def relative_places(window):
    """Numbers, for each pair of places in a window, how the one lies to the other."""
    place = np.stack(np.mgrid[:window, :window], axis=-1).reshape(-1, 2)
    down, across = np.moveaxis(place[:, None] - place + window - 1, -1, 0)
    return down * (2 * window - 1) + across


class SwinBlock(nnx.Module):
    """Attention in windows, which are shifted in every other block."""

    def __init__(self, width, heads, window, shift, rngs):
        self.window, self.shift = window, shift
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = WindowAttention(width, heads, window, rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = Mlp(width, 2 * width, rngs)

    def __call__(self, x):
        _, height, width, _ = x.shape
        y, mask = self.norm1(x), None
        if self.shift:
            y = jnp.roll(y, (-self.shift, -self.shift), axis=(1, 2))
            mask = shifted_window_mask(height, width, self.window, self.shift)
        y = self.attention(partition(y, self.window), mask)
        y = unpartition(y, self.window, height, width)
        if self.shift:
            y = jnp.roll(y, (self.shift, self.shift), axis=(1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))


def partition(x, window):
    """Cuts an image into windows, each of which becomes a sequence."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // window, window, width // window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window**2, channels)


def unpartition(x, window, height, width):
    """Puts the windows together again."""
    down, across = height // window, width // window
    x = x.reshape(-1, down, across, window, window, x.shape[-1])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x.shape[-1])


def shifted_window_mask(height, width, window, shift):
    """Keeps places apart that only the shift has brought into one window."""
    region = np.zeros((1, height, width, 1), np.float32)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(cuts):
        for j, columns in enumerate(cuts):
            region[:, rows, columns] = 3 * i + j
    region = partition(region, window)[..., 0]
    return np.where(region[:, None] == region[:, :, None], 0.0, -100.0)


class PatchMerging(nnx.Module):
    """Halves the map: the four pixels of a square become one of twice the width."""

    def __init__(self, width, rngs):
        self.norm = nnx.LayerNorm(4 * width, rngs=rngs)
        self.reduction = nnx.Linear(4 * width, 2 * width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(jnp.concatenate(corners, axis=-1)))


class Swin(nnx.Module):
    """Swin (Liu et al., 2021): a block with shifted windows, one on a smaller map."""

    def __init__(self, width=16, heads=4, window=2, *, rngs):
        self.patch = nnx.Conv(3, width, (2, 2), strides=2, rngs=rngs)
        self.patch_norm = nnx.LayerNorm(width, rngs=rngs)
        self.block1 = SwinBlock(width, heads, window, shift=1, rngs=rngs)
        self.merge = PatchMerging(width, rngs)
        self.block2 = SwinBlock(2 * width, heads, window, shift=0, rngs=rngs)
        self.norm = nnx.LayerNorm(2 * width, rngs=rngs)
        self.head = nnx.Linear(2 * width, 10, rngs=rngs)

    def __call__(self, images):
        x = self.block1(self.patch_norm(self.patch(images)))
        x = self.block2(self.merge(x))
        return self.head(self.norm(x).mean((1, 2)))


class MixerBlock(nnx.Module):
    """One MLP across the patches, one across the channels."""

    def __init__(self, patches, width, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.tokens = Mlp(patches, 24, rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.channels = Mlp(width, 2 * width, rngs)

    def __call__(self, x):
        x = x + self.tokens(self.norm1(x).swapaxes(1, 2)).swapaxes(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nnx.Module):
    """MLP-Mixer (Tolstikhin et al., 2021)."""

    def __init__(self, width=16, *, rngs):
        self.patch = nnx.Conv(3, width, (2, 2), strides=2, rngs=rngs)
        self.blocks = nnx.List([MixerBlock(16, width, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images):
        x = self.patch(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class CausalAttention(nnx.Module):
    """GPT-2's attention: one dense layer split into three, and a causal mask."""

    def __init__(self, width, heads, rngs):
        self.size = width // heads
        self.c_attn = nnx.Linear(width, 3 * width, rngs=rngs)
        self.c_proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.size)
        q, k, v = (y.reshape(heads) for y in jnp.split(self.c_attn(x), 3, axis=-1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(self.size)
        causal = jnp.tril(jnp.ones((length, length), bool))
        scores = jnp.where(causal, scores, jnp.finfo(scores.dtype).min)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
        return self.c_proj(y.reshape(batch, length, -1))


class GPT2(nnx.Module):
    """GPT-2 (Radford et al., 2019): the head's kernel is the table of tokens."""

    def __init__(self, vocabulary=19, length=8, width=16, heads=4, *, rngs):
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List(
            [EncoderBlock(width, heads, CausalAttention, rngs) for _ in range(2)]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.tokens.attend(self.norm(x))


class GroupedQueryAttention(nnx.Module):
    """Two query heads to each key-value head; rotary positions."""

    def __init__(self, width, heads, kv_heads, rngs):
        self.size = size = width // heads
        self.q = nnx.Linear(width, heads * size, use_bias=False, rngs=rngs)
        self.k = nnx.Linear(width, kv_heads * size, use_bias=False, rngs=rngs)
        self.v = nnx.Linear(width, kv_heads * size, use_bias=False, rngs=rngs)
        self.o = nnx.Linear(heads * size, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.size)
        q, k = rotate(self.q(x).reshape(heads)), rotate(self.k(x).reshape(heads))
        v = self.v(x).reshape(heads)
        each = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, each, axis=2), jnp.repeat(v, each, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(self.size)
        causal = jnp.tril(jnp.ones((length, length), bool))
        scores = jnp.where(causal, scores, -jnp.inf)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
        return self.o(y.reshape(batch, length, -1))


def rotate(x):
    """Turns pairs of dimensions by angles that grow along the sequence (RoPE)."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(parts, axis=-1)


class SwiGLU(nnx.Module):
    """A dense layer gated by another."""

    def __init__(self, width, hidden, rngs):
        self.gate = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class LlamaBlock(nnx.Module):
    """A pre-norm block without a bias anywhere."""

    def __init__(self, width, heads, kv_heads, rngs):
        self.norm1 = nnx.RMSNorm(width, rngs=rngs)
        self.attention = GroupedQueryAttention(width, heads, kv_heads, rngs)
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.mlp = SwiGLU(width, 24, rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Llama(nnx.Module):
    """Llama (Touvron et al., 2023), with the grouped queries of its later versions."""

    def __init__(self, vocabulary=19, width=32, heads=4, kv_heads=2, *, rngs):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.blocks = nnx.List(
            [LlamaBlock(width, heads, kv_heads, rngs) for _ in range(2)]
        )
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PostNormBlock(nnx.Module):
    """BERT's block: three dense layers for attention, a norm after each sum."""

    def __init__(self, width, heads, rngs):
        self.size = width // heads
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.output = nnx.Linear(width, width, rngs=rngs)
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = Mlp(width, 2 * width, rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x, mask):
        heads = (*x.shape[:2], -1, self.size)
        q, k, v = (f(x).reshape(heads) for f in (self.query, self.key, self.value))
        y = nnx.dot_product_attention(q, k, v, mask=mask[:, None, None])
        x = self.norm1(x + self.output(y.reshape(*x.shape[:2], -1)))
        return self.norm2(x + self.mlp(x))


class Bert(nnx.Module):
    """BERT (Devlin et al., 2019) with its pooler, classifying pairs of sentences."""

    def __init__(self, vocabulary=19, length=8, width=16, heads=4, *, rngs):
        self.words = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.segments = nnx.Embed(2, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.blocks = nnx.List([PostNormBlock(width, heads, rngs) for _ in range(2)])
        self.pooler = nnx.Linear(width, 12, rngs=rngs)
        self.classifier = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, tokens, segments, mask):
        x = self.words(tokens) + self.segments(segments)
        x = self.norm(x + self.positions(jnp.arange(tokens.shape[1])))
        for block in self.blocks:
            x = block(x, mask)
        return self.classifier(jnp.tanh(self.pooler(x[:, 0])))


class LinenBlock(linen.Module):
    """A pre-norm block in Flax Linen."""

    heads: int
    hidden: int

    @linen.compact
    def __call__(self, x, mask):
        y = linen.LayerNorm(name="norm1")(x)
        attention = linen.MultiHeadDotProductAttention(self.heads, name="attention")
        x = x + attention(y, mask=mask)
        y = linen.LayerNorm(name="norm2")(x)
        y = linen.gelu(linen.Dense(self.hidden, name="up")(y))
        return x + linen.Dense(x.shape[-1], name="down")(y)


class LinenDecoder(linen.Module):
    """A small language model in Flax Linen, without tied weights."""

    vocabulary: int = 19
    length: int = 8
    width: int = 16
    heads: int = 4

    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(self.vocabulary, self.width, name="tokens")(tokens)
        normal = linen.initializers.normal()
        positions = self.param("positions", normal, (self.length, self.width))
        x = x + positions[: tokens.shape[1]]
        for i in range(2):
            block = LinenBlock(self.heads, 2 * self.width, name=f"block{i}")
            x = block(x, linen.make_causal_mask(tokens))
        x = linen.LayerNorm(name="norm")(x)
        return linen.Dense(self.vocabulary, name="head")(x)


IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)

# name: (what makes the model, examples of its inputs)
MODELS = {
    "ViT": (VisionTransformer, (IMAGES,)),
    "modular ViT": (
        functools.partial(VisionTransformer, ModularAttention),
        (IMAGES,),
    ),
    "Swin": (Swin, (IMAGES,)),
    "Mixer": (Mixer, (IMAGES,)),
    "GPT-2": (GPT2, (TOKENS,)),
    "Llama": (Llama, (TOKENS,)),
    "BERT": (Bert, (TOKENS, TOKENS, jax.ShapeDtypeStruct((2, 6), bool))),
}


def linen_decoder():
    """Returns the Linen model and its variables' shapes."""
    model = LinenDecoder()
    return model, jax.eval_shape(model.init, jax.random.key(0), TOKENS)
