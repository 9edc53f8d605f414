"""Vision transformers for ImageNet (Dosovitskiy et al. 2021), as torchvision has them.

The image is cut into patches, each patch becomes a vector, and in the encoder blocks
the vectors attend to one another. The logits are computed from an additional vector,
the class token.

Attributes have torchvision's names, except that ``self_attention.in_proj_weight`` is
``self_attention.in_proj.kernel`` here: one dense layer computes queries, keys and
values. The forward pass uses the size of a head, not the number of heads, so that heads
can be pruned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tpp_jax.errors import TPPError
from tpp_jax.models.layers import (
    Identity,
    Images,
    Logits,
    torch_default_init,
)

Tokens = Float[Array, "batch tokens width"]
Heads = Float[Array, "batch tokens heads size"]


class Architecture(NamedTuple):
    """Settings that distinguish the networks of this family.

    Attributes:
      patch: Height and width of a patch in pixels.
      depth: Number of encoder blocks.
      width: Size of the vector of a patch.
      heads: Number of heads of each attention; `width` is a multiple of it.
      hidden: Width inside the blocks' dense layers.
    """

    patch: int
    depth: int
    width: int
    heads: int
    hidden: int


ARCHITECTURES = {
    "vit_s_16": Architecture(patch=16, depth=12, width=384, heads=6, hidden=1536),
    "vit_b_16": Architecture(patch=16, depth=12, width=768, heads=12, hidden=3072),
}

_xavier_init = nnx.initializers.xavier_uniform()


class Gelu(nnx.Module):
    """The exact GELU as a module, for lists of layers."""

    def __call__(self, x: Tokens) -> Tokens:
        """Returns x·Φ(x), with Φ the normal distribution function."""
        return jax.nn.gelu(x, approximate=False)


class SelfAttention(nnx.Module):
    """Multi-head self-attention, [b, n, width] to the same shape.

    Args:
      width: Size of a token.
      heads: Number of heads; `width` is a multiple of it.
      rngs: Random streams for the initial weights.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.size = width // heads
        self.in_proj = nnx.Linear(width, 3 * width, kernel_init=_xavier_init, rngs=rngs)
        self.out_proj = nnx.Linear(
            width, width, kernel_init=torch_default_init, rngs=rngs
        )

    def __call__(self, x: Tokens) -> Tokens:
        """Returns the projected values, weighted by the attention."""

        def by_heads(y: Tokens) -> Heads:
            return y.reshape(*y.shape[:2], -1, self.size)

        query, key, value = map(by_heads, jnp.split(self.in_proj(x), 3, axis=-1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query * self.size**-0.5, key)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
        return self.out_proj(y.reshape(*x.shape[:2], -1))


class EncoderBlock(nnx.Module):
    """Attention and two dense layers, each after a layer norm and with a shortcut.

    Args:
      width: Size of a token.
      heads: Number of heads of the attention.
      hidden: Width between the dense layers.
      rngs: Random streams for the initial weights.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        def dense(before: int, after: int) -> nnx.Linear:
            return nnx.Linear(
                before,
                after,
                kernel_init=_xavier_init,
                bias_init=nnx.initializers.normal(1e-6),
                rngs=rngs,
            )

        self.ln_1 = _layer_norm(width, rngs)
        self.self_attention = SelfAttention(width, heads, rngs=rngs)
        self.ln_2 = _layer_norm(width, rngs)
        # The identity stands for torchvision's dropout, which is 0 in all its networks.
        self.mlp = nnx.List(
            [dense(width, hidden), Gelu(), Identity(), dense(hidden, width)]
        )

    def __call__(self, x: Tokens) -> Tokens:
        """Returns the tokens with the output of both parts added."""
        x = x + self.self_attention(self.ln_1(x))
        y = self.ln_2(x)
        for layer in self.mlp:
            y = layer(y)
        return x + y


class Encoder(nnx.Module):
    """Position embedding, blocks and a layer norm, [b, n, width] to the same shape.

    Args:
      tokens: Number n of tokens.
      architecture: Depth and sizes of the blocks.
      rngs: Random streams for the initial weights.
    """

    def __init__(
        self, tokens: int, architecture: Architecture, *, rngs: nnx.Rngs
    ) -> None:
        _, depth, width, heads, hidden = architecture
        start = nnx.initializers.normal(0.02)
        self.pos_embedding = nnx.Param(start(rngs.params(), (1, tokens, width)))
        self.layers = nnx.Dict(
            {
                f"encoder_layer_{i}": EncoderBlock(width, heads, hidden, rngs=rngs)
                for i in range(depth)
            }
        )
        self.ln = _layer_norm(width, rngs)

    def __call__(self, x: Tokens) -> Tokens:
        """Returns the encoded tokens."""
        x = x + self.pos_embedding[...]
        # The entries of a merged module are in alphabetical order, 10 before 2.
        for i in range(len(self.layers)):
            x = self.layers[f"encoder_layer_{i}"](x)
        return self.ln(x)


class VisionTransformer(nnx.Module):
    """A vision transformer, [b, h, w, in_channels] to logits [b, num_classes].

    Weights are initialised as in torchvision: by Xavier's uniform distribution in the
    blocks, zeros in the last layer, N(0, 0.02²) for the positions.

    Args:
      architecture: Depth and sizes of the network; see `ARCHITECTURES`.
      num_classes: Number of logits.
      image_shape: Shape of one image, (height, width, channels); height and width are
        multiples of the size of a patch.
      rngs: Random streams for the initial weights.

    Raises:
      TPPError: If height or width of the image is not a multiple of the patch size.

    Example:
      >>> tiny = Architecture(patch=4, depth=1, width=8, heads=2, hidden=16)
      >>> model = VisionTransformer(tiny, image_shape=(8, 8, 3), rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 8, 8, 3))).shape
      (2, 1000)
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        num_classes: int = 1000,
        image_shape: tuple[int, int, int] = (224, 224, 3),
        rngs: nnx.Rngs,
    ) -> None:
        patch, _, width, *_ = architecture
        height, breadth, channels = image_shape
        if height % patch or breadth % patch:
            raise TPPError(
                f"An image of {height}×{breadth} pixels cannot be cut into patches of "
                f"{patch}×{patch}; choose a size that is a multiple of {patch}."
            )
        self.conv_proj = nnx.Conv(
            channels,
            width,
            (patch, patch),
            strides=(patch, patch),
            padding="VALID",
            kernel_init=nnx.initializers.lecun_normal(),
            rngs=rngs,
        )
        self.class_token = nnx.Param(jnp.zeros((1, 1, width)))
        tokens = (height // patch) * (breadth // patch) + 1
        self.encoder = Encoder(tokens, architecture, rngs=rngs)
        head = nnx.Linear(
            width, num_classes, kernel_init=nnx.initializers.zeros, rngs=rngs
        )
        self.heads = nnx.Dict({"head": head})

    def __call__(self, x: Images) -> Logits:
        """Returns the logits of a batch of images."""
        x = self.conv_proj(x)
        batch, *_, width = x.shape
        x = x.reshape(batch, -1, width)
        first = jnp.broadcast_to(self.class_token[...], (batch, 1, width))
        x = self.encoder(jnp.concatenate([first, x], axis=1))
        return self.heads["head"](x[:, 0])


def _layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Returns a layer norm that subtracts the mean before it computes the variance."""
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
