"""The layers of the models, with PyTorch's arithmetic.

Flax and PyTorch differ in details that change the numbers: the estimate of the running
variance of a batch norm, the padding of a strided convolution, the initial weights. The
layers here follow PyTorch, so that networks trained with it run unchanged and results
can be compared with published ones.

After construction no layer uses its declared number of channels: the shapes of the
arrays decide, so the same graph definition also runs with fewer channels.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from tpp_jax.errors import TPPError

Images = Float[Array, "batch height width channels"]
Logits = Float[Array, "batch classes"]
Features = Float[Array, "*rest channels"]
Pooled = Float[Array, "batch channels"]
Statistic = Float[Array, "channels"]

# PyTorch's default, kaiming_uniform_(a=√5): gain² = 2/(1 + 5) = 1/3, which gives
# U(±1/√fan_in).
torch_default_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# kaiming_normal_() with its default fan_in and ReLU gain. The normal distribution is
# not truncated, as in PyTorch; that of Flax's he_normal is.
kaiming_normal_init = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
# kaiming_normal_(mode="fan_out")
fan_out_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def uniform_bias_init(fan_in: int) -> nnx.Initializer:
    """Returns PyTorch's default initialiser of a bias, U(±1/√fan_in) of the kernel."""
    bound = fan_in**-0.5

    def init(
        key: jax.Array,
        shape: tuple[int, ...],
        dtype: Any = jnp.float32,
        out_sharding: Any = None,  # newer versions of Flax pass it
    ) -> Array:
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def conv(
    in_features: int,
    out_features: int,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: int | Literal["SAME"] = 0,
    groups: int = 1,
    bias: bool = False,
    kernel_init: nnx.Initializer = torch_default_init,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Returns a square 2-d convolution, padded and initialised as `torch.nn.Conv2d`.

    Args:
      in_features: Number of channels of the input, [b, h, w, in_features].
      out_features: Number of channels of the output.
      kernel_size: Height and width of the kernel, [k, k, in_features/groups, out].
      stride: Stride in both directions.
      padding: Number of rows or columns of zeros on each of the four sides, or
        TensorFlow's "SAME". They differ: "SAME" with stride 2 pads one side more than
        the other, or only one, which shifts the image by a pixel compared with PyTorch.
      groups: Number of groups of channels that are convolved separately.
      bias: Whether to add one value per output channel.
      kernel_init: Initialiser of the kernel; U(±1/√fan_in) by default.
      rngs: Random streams for the initial weights.

    Example:
      >>> layer = conv(3, 8, 3, stride=2, padding=1, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 32, 32, 3))).shape
      (1, 16, 16, 8)
    """
    fan_in = kernel_size * kernel_size * in_features // groups
    layer = nnx.Conv(
        in_features,
        out_features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=padding if padding == "SAME" else ((padding, padding),) * 2,
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=kernel_init,
        bias_init=uniform_bias_init(fan_in),
        rngs=rngs,
    )
    _remember_init(layer, kernel_init)
    return layer


def dense(
    in_features: int,
    out_features: int,
    *,
    kernel_init: nnx.Initializer = torch_default_init,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """Returns a dense layer with bias, initialised as `torch.nn.Linear`.

    Args:
      in_features: Size of the last axis of the input, [..., in_features].
      out_features: Size of the last axis of the output.
      kernel_init: Initialiser of the kernel; U(±1/√fan_in) by default.
      rngs: Random streams for the initial weights.

    Example:
      >>> dense(4, 2, rngs=nnx.Rngs(0))(jnp.ones((5, 4))).shape
      (5, 2)
    """
    layer = nnx.Linear(
        in_features,
        out_features,
        kernel_init=kernel_init,
        bias_init=uniform_bias_init(in_features),
        rngs=rngs,
    )
    _remember_init(layer, kernel_init)
    return layer


def _remember_init(layer: nnx.Module, kernel_init: nnx.Initializer) -> None:
    """Keeps the initialiser, to initialise the kernel again at another width."""
    # NNX modules take attributes that their class does not declare.
    layer.kernel_start = kernel_init  # pyright: ignore[reportAttributeAccessIssue]


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation over all axes but the last, as PyTorch computes it.

    In training, y = (x − μ)/√(σ² + ε)·scale + bias with the batch's mean μ and biased
    variance σ²; the stored averages follow mean ← m·mean + (1 − m)·μ and
    var ← m·var + (1 − m)·σ²·n/(n − 1), with n the number of values per channel.
    (Flax's own layer stores the biased variance.) In evaluation the stored averages
    take the place of μ and σ².

    `model.train()` and `model.eval()` choose between the two modes. With `axis_name`
    set, statistics are those of the batch over all devices of that axis, each of which
    must hold the same number of examples and the same stored averages.

    Statistics have the precision of the input, but at least float32. The output has
    the precision of the input, so that float32 parameters do not widen a bfloat16
    network.

    Args:
      num_features: Number of channels at construction; later that of the arrays counts.
      momentum: Momentum m of the averages. PyTorch calls 1 − m the momentum, so its
        0.1 is 0.9 here.
      epsilon: Constant ε added to the variance.
      axis_name: Name of the mapped axis to average over, or None.
      rngs: Random streams, as every Flax layer takes them; scale is initially 1 and
        bias 0.

    Example:
      >>> layer = BatchNorm(3, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 4, 4, 3))).shape
      (2, 4, 4, 3)
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        axis_name: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            num_features,
            momentum=momentum,
            epsilon=epsilon,
            axis_name=axis_name,
            use_fast_variance=False,
            use_scale=False,
            use_bias=False,
            rngs=rngs,
        )
        # Flax would draw two random keys per layer, only to fill the arrays with
        # constants: a third of the time to build a deep network.
        self.use_scale = self.use_bias = True
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))

    # Flax's layer also takes a mask, which no model here needs.
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Features, use_running_average: bool | None = None
    ) -> Features:
        """Normalises x, [..., c]; in training mode also updates the stored averages.

        Args:
          x: Array of at least two axes, channels last.
          use_running_average: Whether to use the stored averages; None for the choice
            of `train()` and `eval()`.

        Raises:
          TPPError: If there is only one value per channel in training mode, which has
            no variance.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        # Flax's layer may lack scale and bias; this one does not.
        scale = self.scale[...]  # pyright: ignore[reportOptionalSubscript]
        bias = self.bias[...]  # pyright: ignore[reportOptionalSubscript]
        if use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var = self._batch_statistics(x)
            # Subtracted from the bias in place of x, so that the derivative by the mean
            # is that by the bias, times a factor, and needs no sum of its own over x.
            centre = lax.stop_gradient(mean)
            bias = bias - (mean - centre) * (lax.rsqrt(var + self.epsilon) * scale)
            mean = centre

        return _normalise(x, mean, var, scale, bias, self.epsilon)

    def _batch_statistics(self, x: Features) -> tuple[Statistic, Statistic]:
        """Returns the batch's mean and biased variance; updates the stored averages.

        The variance is computed in two passes, E[(x − μ)²]. The single pass
        E[x²] − μ² loses all digits in float32 once |μ| is a thousand times σ, and was
        not faster on the CPU: forward and backward pass of three 16-channel
        convolutions with batch norms took 37 ms either way. As E[(x − c)²] − (μ − c)²
        with the constant c = μ it has the same value and the same derivatives, but
        none of them needs a sum for the mean inside the square, which is zero.
        """
        axes = tuple(range(x.ndim - 1))
        count = math.prod(x.shape[:-1])
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = x.mean(axes)
        centre = lax.stop_gradient(mean)
        var = jnp.square(x - centre).mean(axes) - jnp.square(mean - centre)
        if self.axis_name is not None:
            count *= lax.axis_size(self.axis_name)
            mean, var = self._across_devices(mean, var)
        if count < 2:
            raise TPPError(
                "Batch normalisation in training mode needs more than one value per "
                f"channel, but the input has shape {x.shape}; use a larger batch or "
                "call model.eval()."
            )
        unbiased = var * (count / (count - 1))
        # Equals m·old + (1 − m)·new, but does not round a float64 batch to the float32
        # of the stored averages.
        old_mean, old_var = self.mean[...], self.var[...]
        new_mean = old_mean + (1 - self.momentum) * (mean - old_mean)
        new_var = old_var + (1 - self.momentum) * (unbiased - old_var)
        # An assignment to [...] would cast to the stored type, and its tracing takes
        # time quadratic in the depth of the network.
        self.mean.set_value(lax.stop_gradient(new_mean))
        self.var.set_value(lax.stop_gradient(new_var))
        return mean, var

    def _across_devices(
        self, mean: Statistic, var: Statistic
    ) -> tuple[Statistic, Statistic]:
        """Joins the statistics of all devices into the batch's, in one collective.

        Var = E[var_d + (mean_d − c)²] − (mean − c)² holds for any c. Here c is the
        stored mean: it is close to every mean_d, so that no digits cancel, and the same
        on all devices, so that it need not be communicated first.
        """
        centre = lax.stop_gradient(self.mean[...].astype(mean.dtype))
        offset = mean - centre
        both = jnp.stack([offset, var + jnp.square(offset)])
        offset, square = lax.pmean(both, self.axis_name)
        return centre + offset, jnp.maximum(square - jnp.square(offset), 0)


@functools.partial(jax.jit, static_argnames="epsilon")
def _normalise(
    x: Features,
    mean: Statistic,
    var: Statistic,
    scale: Statistic,
    bias: Statistic,
    epsilon: float,
) -> Features:
    """Returns (x − mean)/√(var + epsilon)·scale + bias, in the precision of x.

    Jitted, as `relu` is, so that it is traced only once for each shape: this takes
    37 µs per layer, whereas tracing the ten operations takes 340 µs.
    """
    shape = (1,) * (x.ndim - 1) + (-1,)
    mean, var = mean.reshape(shape), var.reshape(shape)
    scale, bias = scale.reshape(shape), bias.reshape(shape)
    y = (x - mean) * (lax.rsqrt(var + epsilon) * scale) + bias
    return y.astype(x.dtype)  # statistics are wider than a half-precision x


@jax.jit
def relu(x: Features) -> Features:
    """Returns max(x, 0), with derivative 0 at 0.

    Jitted, because `jax.nn.relu` traces its derivative rule at every use. On the CPU,
    bfloat16 is computed in float32, which gives the same numbers: in jax 0.11 and 0.12
    XLA's results are wrong where it fuses two bfloat16 maxima with the same constant
    into one sum, as in ``mean(relu(x) + relu(2 * x))``.
    """
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return jax.nn.relu(x.astype(jnp.float32)).astype(x.dtype)
    return jax.nn.relu(x)


relu6 = jax.jit(jax.nn.relu6)


class Relu(nnx.Module):
    """The function `relu` as a module, for lists of layers."""

    def __call__(self, x: Features) -> Features:
        """Returns max(x, 0)."""
        return relu(x)


class Identity(nnx.Module):
    """The identity: the activation of a linear network."""

    def __call__(self, x: Features) -> Features:
        """Returns x."""
        return x


class MaxPool(nnx.Module):
    """The function `max_pool` as a module, for lists of layers."""

    def __call__(self, x: Images) -> Images:
        """Returns the maxima over 2×2 windows."""
        return max_pool(x)


def every_second(x: Images, row: int = 0, column: int = 0) -> Images:
    """Returns x[:, row::2, column::2], half the height and width of [b, h, w, c].

    >>> every_second(jnp.ones((1, 5, 4, 3))).shape
    (1, 3, 2, 3)
    """
    return lax.slice(x, (0, row, column, 0), x.shape, (1, 2, 2, 1))


def max_pool(x: Images) -> Images:
    """Returns the maxima over 2×2 windows, [b, h, w, c] to [b, ⌊h/2⌋, ⌊w/2⌋, c].

    Computed as the maximum of four strided slices, since the gradient of XLA's
    reduce_window is slow on the CPU: 55 ms for 64×32×32×64 values, compared with 3 ms.
    Equal maxima share the gradient, whereas PyTorch gives it to the first; after a ReLU
    this matters only for equal positive values.

    Raises:
      TPPError: If the images have fewer than two rows or columns.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    b, h, w, c = x.shape
    if h < 2 or w < 2:
        raise TPPError(
            f"An image of {h}×{w} pixels cannot be pooled further; the network needs "
            "larger images."
        )
    if h % 2 or w % 2:  # PyTorch drops an odd last row or column
        x = lax.slice(x, (0, 0, 0, 0), (b, h - h % 2, w - w % 2, c))
    upper = jnp.maximum(every_second(x, 0, 0), every_second(x, 0, 1))
    lower = jnp.maximum(every_second(x, 1, 0), every_second(x, 1, 1))
    return jnp.maximum(upper, lower)


def global_average_pool(x: Images) -> Pooled:
    """Returns the means over all pixels, [b, h, w, c] to [b, c]."""
    return x.mean((1, 2))
