"""Text from a decoder, token by token."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from tpp_jax.errors import TPPError
from tpp_jax.models.decoder import Cache, Decoder, Tokens


def generate(
    model: Decoder,
    prompt: Tokens,
    tokens: int,
    *,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> Int[Array, "batch length"]:
    """Returns texts that continue prompts of equal length.

    Keys and values are cached. One program is compiled for each length of the prompt
    and number of tokens.

    Args:
      model: Decoder, pruned or not.
      prompt: Tokens to continue, at least one for each text.
      tokens: Number of tokens to add.
      temperature: Number that divides the logits before a token is drawn; 0 for the
        most likely token at each place.
      key: Random key; needed if the temperature is not 0.

    Returns:
      The prompts and what follows, [batch, length of the prompt + tokens].

    Raises:
      TPPError: If the prompt is empty, or the key is missing.

    Example:
      >>> from tpp_jax.models import DecoderConfig
      >>> config = DecoderConfig(
      ...     vocabulary=50, width=16, depth=1, heads=2, kv_heads=1, head_size=8,
      ...     hidden=32,
      ... )
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> generate(model, jnp.array([[1, 2, 3]]), 4).shape
      (1, 7)
    """
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise TPPError(
            f"the prompt has shape {prompt.shape}: it must be [batch, tokens], with at "
            "least one token"
        )
    if temperature and key is None:
        raise TPPError("tokens are drawn at random: pass key=jax.random.key(0)")
    if not temperature:
        key = None
    return _generate(*nnx.split(model), prompt, tokens, temperature, key)


@functools.partial(jax.jit, static_argnames=("graphdef", "tokens"))
def _generate(
    graphdef: Any,
    state: Any,
    prompt: Tokens,
    tokens: int,
    temperature: float,
    key: jax.Array | None,
) -> Tokens:
    model = nnx.merge(graphdef, state)
    batch, length = prompt.shape

    def step(carry: tuple[Array, Cache], i: Array) -> tuple[tuple[Array, Cache], Array]:
        logits, cache = carry
        if key is None:
            chosen = logits.argmax(-1)
        else:
            drawn = jax.random.fold_in(key, i)
            chosen = jax.random.categorical(drawn, logits / temperature)
        chosen = chosen.astype(prompt.dtype)
        logits, cache = model.extend(chosen[:, None], cache)
        return (logits[:, -1].astype(jnp.float32), cache), chosen

    cache = model.empty_cache(batch, length + tokens)
    logits, cache = model.extend(prompt, cache)
    first = logits[:, -1].astype(jnp.float32), cache
    _, added = jax.lax.scan(step, first, jnp.arange(tokens))
    return jnp.concatenate([prompt, added.T], axis=1)
