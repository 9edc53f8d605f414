"""LeNet-5 for 32×32 images (LeCun et al. 1998), with max pooling.

The third layer is a convolution, as in the original paper: for a 32×32 image its 5×5
kernel covers its entire input, and its output is one pixel.
"""

from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.models.layers import Features, Images, Logits, conv, dense, max_pool, relu


class LeNet5(nnx.Module):
    """LeNet-5, [b, 32, 32, in_channels] to logits [b, num_classes].

    Weights and biases are initialised as by default in PyTorch, from U(±1/√fan_in).

    Args:
      num_classes: Number of logits.
      in_channels: Number of channels of the images.
      linear: Whether to omit the ReLUs. The max poolings remain, so the network is only
        piecewise linear.
      rngs: Random streams for the initial weights.

    Example:
      >>> import jax.numpy as jnp
      >>> LeNet5(rngs=nnx.Rngs(0))(jnp.ones((2, 32, 32, 1))).shape
      (2, 10)
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 1,
        linear: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv1 = conv(in_channels, 6, 5, bias=True, rngs=rngs)
        self.conv2 = conv(6, 16, 5, bias=True, rngs=rngs)
        self.conv3 = conv(16, 120, 5, bias=True, rngs=rngs)
        self.fc4 = dense(120, 84, rngs=rngs)
        self.fc5 = dense(84, num_classes, rngs=rngs)
        self.linear = linear

    def __call__(self, x: Images) -> Logits:
        """Returns the logits of a batch of images."""
        x = max_pool(self.activate(self.conv1(x)))
        x = max_pool(self.activate(self.conv2(x)))
        x = self.activate(self.conv3(x))
        if x.shape[1:3] != (1, 1):
            raise TPPError(
                "LeNet-5 takes images of 32×32 pixels: its third convolution should "
                f"leave one pixel, but leaves {x.shape[1]}×{x.shape[2]}."
            )
        x = x.reshape(x.shape[0], x.shape[3])
        x = self.activate(self.fc4(x))
        return self.fc5(x)

    def activate(self, x: Features) -> Features:
        """Applies a ReLU, or nothing in the linear variant."""
        return x if self.linear else relu(x)
