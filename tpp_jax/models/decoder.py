"""Decoder language models: Llama, SmolLM2, Qwen 2 and 3, Mistral and Gemma.

They differ in a few settings only, which :class:`DecoderConfig` lists. Attributes have
the names of the implementations in Hugging Face transformers, without the leading
``model.``: ``layers.0.self_attn.q_proj.kernel`` for ``…q_proj.weight``.

The forward pass takes all widths from the arrays, so any of them can be pruned, in each
layer by itself: units of the MLPs, key-value heads with their queries, queries of a
key-value head, pairs of rotated dimensions, and the residual stream. The factor of the
attention scores is that of the original size of a head, and the rotary frequencies are
arrays of the model; both therefore stay right when dimensions are removed.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tpp_jax.errors import TPPError

Tokens = Int[Array, "batch tokens"]
Positions = Int[Array, " tokens"]
Stream = Float[Array, "batch tokens width"]
Heads = Float[Array, "batch tokens heads size"]
Logits = Float[Array, "batch tokens vocabulary"]
Frequency = Float[Array, " pairs"]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
_init = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies of models that were extended to longer texts.

    Attributes:
      kind: Method; "linear" divides all frequencies by the factor, "llama3" only the
        low ones.
      factor: Number by which frequencies are divided.
      low: Wavelengths above ``original_length / low`` are divided ("llama3").
      high: Wavelengths below ``original_length / high`` are kept; those between are
        interpolated ("llama3").
      original_length: Number of tokens of the texts before the extension ("llama3").
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and settings of a decoder.

    Sizes may differ between layers: a number stands for all layers, a tuple has one for
    each. A layer may have no heads or no units.

    Attributes:
      vocabulary: Number of tokens that exist.
      width: Size of the residual stream.
      depth: Number of layers.
      heads: Number of query heads, a multiple of ``kv_heads``.
      kv_heads: Number of heads of keys and values.
      head_size: Size of a head of queries and keys, an even number.
      hidden: Number of units of the MLPs.
      value_size: Size of a head of values; None for ``head_size``.
      query_scale: Factor of the attention scores; None for ``head_size^(-1/2)``.
      rope_base: Base of the rotary frequencies, ``base^(-2i/head_size)``.
      rope_scaling: Change of these frequencies; None for none.
      rope_pairs: Dimensions that are rotated together: i and i + size/2 ("halves"), or
        2i and 2i + 1 ("interleaved").
      window: Number of last tokens that a token attends to, itself included; None for
        all.
      activation: Activation of the gate: "silu", "gelu" or "gelu_tanh".
      epsilon: Number that the norms add to the mean square.
      tied: Whether the logits are computed by the embedding.
      qkv_bias: Whether the projections to queries, keys and values have biases.
      output_bias: Whether the projection behind the attention has one.
      mlp_bias: Whether the layers of the MLPs have them.
      qk_norm: Whether each query and key passes a norm before it is rotated.
      embedding_scale: Factor of the embedded tokens.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int | tuple[int, ...]
    kv_heads: int | tuple[int, ...]
    head_size: int | tuple[int, ...]
    hidden: int | tuple[int, ...]
    value_size: int | tuple[int, ...] | None = None
    query_scale: float | tuple[float | None, ...] | None = None
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_pairs: Literal["halves", "interleaved"] = "halves"
    window: int | tuple[int | None, ...] | None = None
    activation: str = "silu"
    epsilon: float = 1e-6
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    embedding_scale: float = 1.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          TPPError: If sizes contradict each other or a choice is unknown.
        """
        for name, value in vars(self).items():
            if isinstance(value, tuple) and len(value) != self.depth:
                raise TPPError(
                    f"{name} has {len(value)} entries for {self.depth} layers"
                )
        pairs = zip(self.of_layers("heads"), self.of_layers("kv_heads"), strict=True)
        for heads, kv_heads in pairs:
            if heads % kv_heads if kv_heads > 0 else heads or kv_heads:
                raise TPPError(
                    f"{heads} query heads cannot be shared out to {kv_heads} "
                    "key-value heads: heads must be a multiple of kv_heads"
                )
        for size in self.of_layers("head_size"):
            if size % 2:
                raise TPPError(
                    f"head_size is {size}, but its dimensions are rotated in pairs: "
                    "choose an even number"
                )
        if self.activation not in _ACTIVATIONS:
            raise TPPError(
                f"activation is {self.activation!r}; it can be "
                f"{', '.join(_ACTIVATIONS)}"
            )

    def of_layers(self, name: str) -> tuple[Any, ...]:
        """Returns the values of a field, one for each layer.

        Args:
          name: Name of the field.
        """
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * self.depth


class Frequencies(nnx.Variable):
    """Angular frequencies of rotary embeddings in radians per token; not trained."""


def rotary_frequencies(config: DecoderConfig, layer: int) -> Frequency:
    """Returns the angular frequency of each pair of dimensions, float32.

    Args:
      config: Settings of the model.
      layer: Position of the layer among all layers.

    References:
      Su et al. 2021, "RoFormer", section 3.2.2; Dubey et al. 2024, "The Llama 3 Herd of
      Models", section 3.4.
    """
    size = config.of_layers("head_size")[layer]
    exponents = jnp.arange(0, size, 2, dtype=jnp.float32) / size
    frequencies = config.rope_base**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_length * frequencies / (2 * jnp.pi)
    share = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return share * frequencies + (1 - share) * slow


class Past(NamedTuple):
    """Keys and values of one layer, with room for tokens to come.

    Attributes:
      keys: Rotated keys.
      values: Values.
    """

    keys: Heads
    values: Heads


class Cache(NamedTuple):
    """Keys and values of all layers for the tokens that were read so far.

    Attributes:
      layers: Keys and values by layer.
      length: Number of tokens that were read.
    """

    layers: tuple[Past, ...]
    length: Int[Array, ""]


class Attention(nnx.Module):
    """Causal self-attention with rotary positions, [b, n, width] to the same shape.

    Args:
      config: Settings of the model.
      layer: Position of the layer among all layers.
      dtype: Type of the computation; None for that of the arrays.
      param_dtype: Type of the parameters.
      rngs: Random streams for the initial weights.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        size = config.of_layers("head_size")[layer]
        value_size = config.of_layers("value_size")[layer] or size
        heads = config.of_layers("heads")[layer]
        kv_heads = config.of_layers("kv_heads")[layer]
        self.window = config.of_layers("window")[layer]
        self.interleaved = config.rope_pairs == "interleaved"
        self.scale = config.of_layers("query_scale")[layer] or size**-0.5
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def dense(before: int, after: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(before, after, use_bias=bias, kernel_init=_init, **types)

        self.q_proj = dense(config.width, heads * size, config.qkv_bias)
        self.k_proj = dense(config.width, kv_heads * size, config.qkv_bias)
        self.v_proj = dense(config.width, kv_heads * value_size, config.qkv_bias)
        self.o_proj = dense(heads * value_size, config.width, config.output_bias)
        if config.qk_norm:
            self.q_norm = nnx.RMSNorm(size, epsilon=config.epsilon, **types)
            self.k_norm = nnx.RMSNorm(size, epsilon=config.epsilon, **types)
        self.frequencies = Frequencies(rotary_frequencies(config, layer))

    def __call__(
        self, x: Stream, positions: Positions, past: Past | None = None
    ) -> tuple[Stream, Past | None]:
        """Returns the output, and the keys and values with the new ones written in."""
        batch, tokens, _ = x.shape
        size = 2 * self.frequencies[...].shape[0]
        query = self.q_proj(x).reshape(batch, tokens, -1, size)
        key = self.k_proj(x).reshape(batch, tokens, -1, size)
        # Without heads all of these are empty, and no size follows from the others.
        heads = max(key.shape[2], 1)
        shared = query.shape[2] // heads
        value = self.v_proj(x)
        value = value.reshape(batch, tokens, key.shape[2], value.shape[-1] // heads)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        angles = positions[:, None] * self.frequencies[...]
        cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
        query = _rotated(query, cos, sin, self.interleaved)
        key = _rotated(key, cos, sin, self.interleaved)
        seen = positions
        if past is not None:
            start = (0, positions[0], 0, 0)
            key = jax.lax.dynamic_update_slice(past.keys, key, start)
            value = jax.lax.dynamic_update_slice(past.values, value, start)
            past, seen = Past(key, value), jnp.arange(key.shape[1])
        query = query.reshape(batch, tokens, key.shape[2], shared, size)
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", query * self.scale, key)
        weights = _softmax(scores, _mask(positions, seen, self.window))
        y = jnp.einsum("bhgqk,bkhd->bqhgd", weights, value)
        return self.o_proj(y.reshape(batch, tokens, math.prod(y.shape[2:]))), past


def _rotated(x: Heads, cos: Array, sin: Array, interleaved: bool) -> Heads:
    """Returns heads whose pairs of dimensions are turned by the angles."""
    dtype = x.dtype
    if interleaved:
        first, second = x[..., ::2], x[..., 1::2]
    else:
        first, second = jnp.split(x, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        return jnp.stack(turned, axis=-1).reshape(x.shape).astype(dtype)
    return jnp.concatenate(turned, axis=-1).astype(dtype)


def _mask(positions: Positions, seen: Positions, window: int | None) -> Array:
    """Returns which positions may be attended to, [queries, keys]."""
    distance = positions[:, None] - seen[None, :]
    near = distance >= 0
    return near if window is None else near & (distance < window)


def _softmax(scores: Array, mask: Array) -> Array:
    """Returns the weights of the attention, computed in float32 at least."""
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    lowest = jnp.finfo(wide.dtype).min
    return jax.nn.softmax(jnp.where(mask, wide, lowest)).astype(scores.dtype)


class GatedMLP(nnx.Module):
    """Two dense layers, the first of which is gated, [..., width] to the same shape.

    Args:
      config: Settings of the model.
      layer: Position of the layer among all layers.
      dtype: Type of the computation; None for that of the arrays.
      param_dtype: Type of the parameters.
      rngs: Random streams for the initial weights.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        hidden = config.of_layers("hidden")[layer]

        def dense(before: int, after: int) -> nnx.Linear:
            return nnx.Linear(
                before,
                after,
                use_bias=config.mlp_bias,
                kernel_init=_init,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.gate_proj = dense(config.width, hidden)
        self.up_proj = dense(config.width, hidden)
        self.down_proj = dense(hidden, config.width)
        self.activation = config.activation

    def __call__(self, x: Stream) -> Stream:
        """Returns the output for each token by itself."""
        gate = _ACTIVATIONS[self.activation](self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Attention and an MLP, each after a norm and with a shortcut.

    Args:
      config: Settings of the model.
      layer: Position of the layer among all layers.
      dtype: Type of the computation; None for that of the arrays.
      param_dtype: Type of the parameters.
      rngs: Random streams for the initial weights.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, epsilon = config.width, config.epsilon
        self.input_layernorm = nnx.RMSNorm(width, epsilon=epsilon, **types)
        self.self_attn = Attention(config, layer, **types)
        self.post_attention_layernorm = nnx.RMSNorm(width, epsilon=epsilon, **types)
        self.mlp = GatedMLP(config, layer, **types)

    def __call__(
        self, x: Stream, positions: Positions, past: Past | None = None
    ) -> tuple[Stream, Past | None]:
        """Returns the stream, and the keys and values with the new ones written in."""
        y, past = self.self_attn(self.input_layernorm(x), positions, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), past


class Decoder(nnx.Module):
    """A decoder language model, tokens [b, n] to logits [b, n, vocabulary].

    Logit ``[i, j]`` is for the token after ``tokens[i, :j + 1]``.

    Args:
      config: Sizes and settings.
      dtype: Type of the computation, such as ``jnp.bfloat16``; None for that of the
        parameters. Norms and softmax are computed in float32 at least.
      param_dtype: Type of the parameters.
      rngs: Random streams for the initial weights, N(0, 0.02²).

    Example:
      >>> config = DecoderConfig(
      ...     vocabulary=50, width=16, depth=2, heads=4, kv_heads=2, head_size=4,
      ...     hidden=32,
      ... )
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 5), int)).shape
      (1, 5, 50)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed_tokens = nnx.Embed(
            config.vocabulary, config.width, embedding_init=_init, **types
        )
        self.layers = nnx.List(
            [DecoderLayer(config, i, **types) for i in range(config.depth)]
        )
        self.norm = nnx.RMSNorm(config.width, epsilon=config.epsilon, **types)
        if not config.tied:
            self.lm_head = nnx.Linear(
                config.width,
                config.vocabulary,
                use_bias=False,
                kernel_init=_init,
                **types,
            )

    def __call__(self, tokens: Tokens) -> Logits:
        """Returns the logits for the tokens that follow each token."""
        return self._logits(tokens, jnp.arange(tokens.shape[1]), None)[0]

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Returns the cache of :meth:`extend` before the first token.

        Args:
          batch: Number of texts.
          length: Largest number of tokens that it will hold, prompt included.
        """
        layers = []
        for layer in self.layers:
            attention = layer.self_attn
            size = 2 * attention.frequencies[...].shape[0]
            key, value = attention.k_proj.kernel[...], attention.v_proj.kernel[...]
            heads = key.shape[-1] // size
            value_size = value.shape[-1] // max(heads, 1)
            dtype = attention.k_proj.dtype or key.dtype
            layers.append(
                Past(
                    jnp.zeros((batch, length, heads, size), dtype),
                    jnp.zeros((batch, length, heads, value_size), dtype),
                )
            )
        return Cache(tuple(layers), jnp.zeros((), jnp.int32))

    def extend(self, tokens: Tokens, cache: Cache) -> tuple[Logits, Cache]:
        """Returns the logits of tokens that follow those in a cache, and the new cache.

        Args:
          tokens: Next tokens of each text. They must fit into the cache, which is not
            checked.
          cache: Keys and values of the tokens so far.

        Returns:
          The logits, and the cache with the new keys and values.
        """
        positions = cache.length + jnp.arange(tokens.shape[1])
        logits, layers = self._logits(tokens, positions, cache.layers)
        return logits, Cache(layers, cache.length + tokens.shape[1])

    def _logits(
        self, tokens: Tokens, positions: Positions, past: tuple[Past, ...] | None
    ) -> tuple[Logits, Any]:
        x = self.embed_tokens(tokens)
        if self.config.embedding_scale != 1:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        after = []
        for i, layer in enumerate(self.layers):
            x, kept = layer(x, positions, None if past is None else past[i])
            after.append(kept)
        x = self.norm(x)
        head = self.embed_tokens.attend if self.config.tied else self.lm_head
        return head(x), tuple(after)
