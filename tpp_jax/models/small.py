"""Small networks for quick experiments, made by one call."""

import dataclasses
from typing import Any

from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.models.decoder import Decoder, DecoderConfig


def small_decoder(
    rngs: nnx.Rngs,
    *,
    vocabulary: int = 256,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 344,
    tied: bool = True,
    **settings: Any,
) -> Decoder:
    """Builds a decoder of the kind of Llama, by default a small one for bytes.

    Its attention has rotary positions and heads of keys and values that are shared, and
    its MLPs have gates with SiLU.

    Args:
      rngs: Random streams for the initial weights.
      vocabulary: Number of tokens that exist.
      width: Size of the residual stream.
      depth: Number of layers.
      heads: Number of query heads, a multiple of ``kv_heads``.
      kv_heads: Number of heads of keys and values.
      hidden: Number of units of the MLPs.
      tied: Whether the logits are computed by the embedding.
      **settings: Other fields of :class:`DecoderConfig`; ``head_size`` is by default
        ``width / heads``.

    Returns:
      The network, from tokens [b, n] to logits [b, n, vocabulary].

    Raises:
      TPPError: If a setting is unknown or sizes contradict each other.

    Example:
      >>> from tpp_jax.graph.naming import named_leaves
      >>> model = small_decoder(nnx.Rngs(0))
      >>> sum(x.size for x in named_leaves(nnx.state(model, nnx.Param)).values())
      758912
    """
    known = [field.name for field in dataclasses.fields(DecoderConfig)]
    for name in settings:
        if name not in known:
            raise TPPError(
                f"a decoder has no setting {name!r}; it has {', '.join(known)}"
            )
    if "head_size" not in settings:
        if heads < 1 or width % heads:
            raise TPPError(
                f"the width {width} cannot be shared out to {heads} heads: choose a "
                "multiple, or set head_size"
            )
        settings["head_size"] = width // heads
    config = DecoderConfig(
        vocabulary=vocabulary,
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        tied=tied,
        **settings,
    )
    return Decoder(config, rngs=rngs)
