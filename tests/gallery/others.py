"""Recurrent networks, a diffusion U-Net, graph networks, experts, and plain functions.

Written as their users write them, a few channels wide; see ``transformers.py``.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx


class Recurrent(nnx.Module):
    """Reads a sentence with one recurrent layer and classifies its last state."""

    def __init__(self, cell, hidden=8, *, rngs):
        self.embed = nnx.Embed(19, 6, rngs=rngs)
        self.rnn = nnx.RNN(cell(6, hidden, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(hidden, 3, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[:, -1])


class TwoLayerGRU(nnx.Module):
    """A recurrent layer on top of another, of different widths."""

    def __init__(self, *, rngs):
        self.lower = nnx.RNN(nnx.GRUCell(5, 8, rngs=rngs), rngs=rngs)
        self.upper = nnx.RNN(nnx.GRUCell(8, 6, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.upper(self.lower(x)).mean(1))


class BidirectionalLSTM(nnx.Module):
    """One layer reads forwards, one backwards; a dense layer reads both."""

    def __init__(self, *, rngs):
        forward, backward = (
            nnx.RNN(nnx.OptimizedLSTMCell(5, 8, rngs=rngs), rngs=rngs) for _ in "ab"
        )
        self.both = nnx.Bidirectional(forward, backward, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.both(x).mean(1))


class ResBlock(nnx.Module):
    """Two convolutions beside a shortcut; the time is added to every pixel."""

    def __init__(self, inputs, outputs, time, rngs):
        self.norm1 = nnx.GroupNorm(inputs, num_groups=4, rngs=rngs)
        self.conv1 = nnx.Conv(inputs, outputs, (3, 3), rngs=rngs)
        self.time = nnx.Linear(time, outputs, rngs=rngs)
        self.norm2 = nnx.GroupNorm(outputs, num_groups=4, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), rngs=rngs)
        if inputs != outputs:
            self.shortcut = nnx.Conv(inputs, outputs, (1, 1), rngs=rngs)
        else:
            self.shortcut = lambda x: x

    def __call__(self, x, time):
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = y + self.time(nnx.silu(time))[:, None, None]
        return self.shortcut(x) + self.conv2(nnx.silu(self.norm2(y)))


class PixelAttention(nnx.Module):
    """Every pixel attends to every other."""

    def __init__(self, width, heads, rngs):
        self.norm = nnx.GroupNorm(width, num_groups=4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)

    def __call__(self, x):
        pixels = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + self.attention(pixels).reshape(x.shape)


class DiffusionUNet(nnx.Module):
    """The U-Net of DDPM (Ho et al., 2020), with one level below the images' own."""

    def __init__(self, *, rngs):
        self.time1 = nnx.Linear(12, 24, rngs=rngs)
        self.time2 = nnx.Linear(24, 20, rngs=rngs)
        self.stem = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.down = ResBlock(16, 16, 20, rngs)
        self.downsample = nnx.Conv(16, 16, (3, 3), strides=2, rngs=rngs)
        self.middle1 = ResBlock(16, 32, 20, rngs)
        self.attention = PixelAttention(32, 4, rngs)
        self.middle2 = ResBlock(32, 32, 20, rngs)
        self.upsample = nnx.Conv(32, 16, (3, 3), rngs=rngs)
        self.up1 = ResBlock(32, 16, 20, rngs)
        self.up2 = ResBlock(32, 16, 20, rngs)
        self.norm = nnx.GroupNorm(16, num_groups=4, rngs=rngs)
        self.out = nnx.Conv(16, 3, (3, 3), rngs=rngs)

    def __call__(self, images, steps):
        time = self.time2(nnx.silu(self.time1(sinusoids(steps, 12))))
        stem = self.stem(images)
        down = self.down(stem, time)
        x = self.middle1(self.downsample(down), time)
        x = self.middle2(self.attention(x), time)
        batch, height, width, channels = x.shape
        x = jax.image.resize(x, (batch, 2 * height, 2 * width, channels), "nearest")
        x = self.up1(jnp.concatenate([self.upsample(x), down], axis=-1), time)
        x = self.up2(jnp.concatenate([x, stem], axis=-1), time)
        return self.out(nnx.silu(self.norm(x)))


def sinusoids(steps, width):
    """Tells a time step by waves of many lengths."""
    frequency = jnp.exp(-jnp.log(10000.0) * jnp.arange(width // 2) / (width // 2))
    angle = steps[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class GCN(nnx.Module):
    """Graph convolutions (Kipf and Welling, 2017): neighbours' features are averaged.

    The second layer has a shortcut.
    """

    def __init__(self, *, rngs):
        self.conv1 = nnx.Linear(7, 16, use_bias=False, rngs=rngs)
        self.conv2 = nnx.Linear(16, 16, use_bias=False, rngs=rngs)
        self.conv3 = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, nodes, adjacency):
        x = nnx.relu(adjacency @ self.conv1(nodes))
        x = x + nnx.relu(adjacency @ self.conv2(x))
        return adjacency @ self.conv3(x)


class MessagePassing(nnx.Module):
    """One round of messages along the edges of a graph (Gilmer et al., 2017)."""

    def __init__(self, rngs):
        self.message1 = nnx.Linear(2 * 16 + 4, 24, rngs=rngs)
        self.message2 = nnx.Linear(24, 12, rngs=rngs)
        self.update = nnx.Linear(16 + 12, 16, rngs=rngs)

    def __call__(self, nodes, edges, senders, receivers):
        pairs = [nodes[senders], nodes[receivers], edges]
        messages = nnx.relu(self.message1(jnp.concatenate(pairs, axis=-1)))
        messages = nnx.relu(self.message2(messages))
        heard = jax.ops.segment_sum(messages, receivers, num_segments=len(nodes))
        return nodes + self.update(jnp.concatenate([nodes, heard], axis=-1))


class GraphNetwork(nnx.Module):
    """Two rounds of messages; the graph is classified by the sum of its nodes."""

    def __init__(self, *, rngs):
        self.embed = nnx.Linear(7, 16, rngs=rngs)
        self.rounds = nnx.List([MessagePassing(rngs) for _ in range(2)])
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, nodes, edges, senders, receivers):
        x = self.embed(nodes)
        for messages in self.rounds:
            x = messages(x, edges, senders, receivers)
        return self.head(x.sum(0))


class Experts(nnx.Module):
    """MLPs of which each token is sent to the best two (Shazeer et al., 2017)."""

    def __init__(self, width, hidden, experts, rngs):
        self.router = nnx.Linear(width, experts, use_bias=False, rngs=rngs)
        self.up = nnx.Param(rngs.normal((experts, width, hidden)))
        self.down = nnx.Param(rngs.normal((experts, hidden, width)))

    def __call__(self, x):
        logits = self.router(x)
        best, chosen = jax.lax.top_k(logits, 2)
        choices = jax.nn.one_hot(chosen, logits.shape[-1])
        weights = jnp.einsum("btk,btke->bte", jax.nn.softmax(best), choices)
        hidden = nnx.gelu(jnp.einsum("btd,edh->bteh", x, self.up[...]))
        y = jnp.einsum("bteh,ehd->bted", hidden, self.down[...])
        return jnp.einsum("bted,bte->btd", y, weights)


class MixtureOfExperts(nnx.Module):
    """A dense layer, a mixture of experts beside a shortcut, a dense layer."""

    def __init__(self, *, rngs):
        self.embed = nnx.Linear(7, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.experts = Experts(16, 24, 4, rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        return self.head(x + self.experts(self.norm(x)))


def decoder(params, tokens):
    """A transformer in plain JAX: the layers' parameters are stacked and scanned."""

    def layer(x, p):
        q, k, v = jnp.einsum("btd,dnhs->nbths", normalise(x, p["norm1"]), p["qkv"])
        scores = jnp.einsum("bqhs,bkhs->bhqk", q, k) / jnp.sqrt(q.shape[-1])
        weights = jax.nn.softmax(scores)
        x = x + jnp.einsum("bhqk,bkhs,hsd->bqd", weights, v, p["out"])
        hidden = jax.nn.gelu(normalise(x, p["norm2"]) @ p["up"])
        return x + hidden @ p["down"], None

    x = params["embed"][tokens] + params["positions"][: tokens.shape[1]]
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    return normalise(x, params["norm"]) @ params["head"]


def normalise(x, scale):
    """RMS norm."""
    return scale * x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def decoder_parameters(layers=2, width=16, heads=4, size=4, hidden=24, length=8):
    """Returns the shapes of :func:`decoder`'s parameters."""
    return {
        "embed": shape(19, width),
        "positions": shape(length, width),
        "layers": {
            "norm1": shape(layers, width),
            "qkv": shape(layers, width, 3, heads, size),
            "out": shape(layers, heads, size, width),
            "norm2": shape(layers, width),
            "up": shape(layers, width, hidden),
            "down": shape(layers, hidden, width),
        },
        "norm": shape(width),
        "head": shape(width, 19),
    }


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    """A dense layer of one example, as Equinox has it: the kernel is [out, in]."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return self.weight @ x + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Autoencoder:
    """A module that is a pytree: its methods are written for a single example."""

    encoder: list[Dense]
    decoder: list[Dense]
    slope: float = dataclasses.field(default=0.1, metadata={"static": True})

    def __call__(self, x):
        for layer in self.encoder:
            x = jax.nn.leaky_relu(layer(x), self.slope)
        for layer in self.decoder[:-1]:
            x = jax.nn.leaky_relu(layer(x), self.slope)
        return self.decoder[-1](x)


def autoencoder(model, batch):
    """Applies the module to each example of a batch."""
    return jax.vmap(model)(batch)


def autoencoder_parameters(widths=(10, 12, 6)):
    """Returns an :class:`Autoencoder` of shapes."""
    there = list(itertools.pairwise(widths))
    back = [(outputs, inputs) for inputs, outputs in reversed(there)]
    encoder, decoder = (
        [Dense(shape(outputs, inputs), shape(outputs)) for inputs, outputs in pairs]
        for pairs in (there, back)
    )
    return Autoencoder(encoder, decoder)


TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)
EDGES = jax.ShapeDtypeStruct((9,), jnp.int32)

# name: (what makes the model, examples of its inputs)
MODELS = {
    "LSTM": (functools.partial(Recurrent, nnx.OptimizedLSTMCell), (TOKENS,)),
    "GRU": (functools.partial(Recurrent, nnx.GRUCell), (TOKENS,)),
    "two-layer GRU": (TwoLayerGRU, (shape(2, 6, 5),)),
    "bidirectional LSTM": (BidirectionalLSTM, (shape(2, 6, 5),)),
    "diffusion U-Net": (DiffusionUNet, (shape(2, 8, 8, 3), shape(2))),
    "GCN": (GCN, (shape(6, 7), shape(6, 6))),
    "message passing": (GraphNetwork, (shape(6, 7), shape(9, 4), EDGES, EDGES)),
    "mixture of experts": (MixtureOfExperts, (shape(2, 6, 7),)),
}

# name: (the function, its parameters' shapes, examples of its inputs)
FUNCTIONS = {
    "plain decoder": (decoder, decoder_parameters(), (TOKENS,)),
    "pytree of modules": (autoencoder, autoencoder_parameters(), (shape(2, 10),)),
}
