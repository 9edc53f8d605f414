"""Multilayer perceptrons, linear or with ReLU, which show trainability most clearly.

A deep *linear* network multiplies by a matrix, and its Jacobian is the product of its
kernels, so the effect of pruning on the singular values can be computed without data.
Dense layers have the even indices of `net`, activations the odd ones, as in PyTorch's
Sequential: ``net.0.kernel``, ``net.2.kernel``, …
"""

import itertools
import math

from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.models.layers import Identity, Images, Logits, Relu, dense

DEPTHS = (7, 20, 50)


class MLP(nnx.Module):
    """`depth` dense layers with biases, [b, h, w, c] to logits [b, num_classes].

    Images are flattened in the order of their axes, pixels before channels. With one
    channel that is also PyTorch's order; with several, `tpp_jax.load_torch` rearranges
    the rows of the first kernel.

    Weights and biases are initialised as by default in PyTorch, from U(±1/√fan_in).

    Args:
      depth: Number of dense layers, at least 1.
      num_classes: Number of logits.
      image_shape: Shape of one image, (height, width, channels).
      hidden: Width of all layers but the last.
      linear: Whether to omit the ReLUs.
      rngs: Random streams for the initial weights.

    Raises:
      TPPError: If `depth` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> model = MLP(7, linear=True, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 32, 32, 1))).shape
      (2, 10)
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        image_shape: tuple[int, int, int] = (32, 32, 1),
        hidden: int = 100,
        linear: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if depth < 1:
            raise TPPError(f"An MLP has at least one layer, not {depth}.")
        widths = [math.prod(image_shape), *[hidden] * (depth - 1), num_classes]
        activation = Identity if linear else Relu
        net: list[nnx.Module] = []
        for before, after in itertools.pairwise(widths):
            if net:
                net.append(activation())
            net.append(dense(before, after, rngs=rngs))
        self.net = nnx.List(net)

    def __call__(self, x: Images) -> Logits:
        """Returns the logits of a batch of images."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.net:
            x = layer(x)
        return x
