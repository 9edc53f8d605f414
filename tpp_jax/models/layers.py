"""The layers the models are built of, with PyTorch's arithmetic.

Flax and PyTorch disagree in small things that change the numbers: how the running
variance of a batch norm is estimated, how a strided convolution is padded, how weights
start.  This file settles them once, in PyTorch's favour, so that networks trained there
run here unchanged and the published results can be compared.

Nothing here looks at the declared number of channels after construction: the shapes of
the arrays decide, so the same graph definition also runs with fewer channels.
"""

import functools
from typing import Any

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

# PyTorch's default, kaiming_uniform_(a=√5), written out: gain² = 2/(1 + 5) = 1/3, that
# is U(±1/√fan_in).
torch_default_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# kaiming_normal_() with its default fan_in and ReLU gain; a plain normal, as PyTorch's,
# where Flax's own he_normal truncates.
kaiming_normal_init = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
# kaiming_normal_(mode="fan_out")
fan_out_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def uniform_bias_init(fan_in: int) -> nnx.Initializer:
    """PyTorch's default start of a bias, U(±1/√fan_in) of the layer's kernel."""
    bound = fan_in**-0.5

    def init(
        key: jax.Array,
        shape: tuple[int, ...],
        dtype: Any = jnp.float32,
        out_sharding: Any = None,  # newer initialisers are called with it
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
    padding: int = 0,
    groups: int = 1,
    bias: bool = False,
    kernel_init: nnx.Initializer = torch_default_init,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square 2-d convolution, padded and initialised as `torch.nn.Conv2d`.

    Args:
      in_features: channels of the input, [b, h, w, in_features].
      out_features: channels of the output.
      kernel_size: height and width of the kernel, [k, k, in_features/groups, out].
      stride: step in both directions.
      padding: zeros on each of the four sides.  Explicit, since "SAME" with stride 2
        pads one side only and shifts the image by a pixel against PyTorch.
      groups: number of independent channel groups.
      bias: whether to add one value per output channel.
      kernel_init: start of the kernel; U(±1/√fan_in) unless told.
      rngs: source of the random start.

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
        padding=((padding, padding), (padding, padding)),
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=kernel_init,
        bias_init=uniform_bias_init(fan_in),
        rngs=rngs,
    )
    layer.kernel_start = kernel_init  # to start anew at another width
    return layer


def dense(
    in_features: int,
    out_features: int,
    *,
    kernel_init: nnx.Initializer = torch_default_init,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A dense layer with bias, [..., in] to [..., out], started as `torch.nn.Linear`.

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
    layer.kernel_start = kernel_init  # to start anew at another width
    return layer


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation over all axes but the last, as PyTorch computes it.

    In training, y = (x − μ)/√(σ² + ε)·scale + bias with the batch's mean μ and biased
    variance σ²; the stored averages follow mean ← m·mean + (1 − m)·μ and
    var ← m·var + (1 − m)·σ²·n/(n − 1), with n the number of values per channel.
    (Flax's own layer stores the biased variance.)  In evaluation the stored averages
    take the place of μ and σ².

    `model.train()` and `model.eval()` choose between the two.  With `axis_name` set,
    statistics are those of the whole batch over all devices of that axis, each of which
    must hold the same number of examples and the same stored averages.

    Statistics have the precision of the input and never less than float32; the output
    has that of the input, so that float32 parameters do not widen a bfloat16 network.

    Args:
      num_features: number of channels at construction; the arrays rule afterwards.
      momentum: m above.  PyTorch calls 1 − m its momentum, so its 0.1 is 0.9 here.
      epsilon: ε above.
      axis_name: name of the mapped axis to average over, or None.
      rngs: accepted as every Flax layer does; scale starts at 1 and bias at 0.

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
        # Made here and not by Flax, which would draw two random keys per layer only to
        # fill them with constants: a third of the time to build a deep network.
        self.use_scale = self.use_bias = True
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))

    def __call__(
        self, x: Features, use_running_average: bool | None = None
    ) -> Features:
        """Normalise x, [..., c]; in training also update the stored averages.

        Args:
          x: at least two axes, channels last.
          use_running_average: overrides the layer's own flag when not None.

        Raises:
          TPPError: in training with one value per channel, which has no variance.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        scale, bias = self.scale[...], self.bias[...]
        if use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var = self._batch_statistics(x)

        return _normalise(x, mean, var, scale, bias, self.epsilon)

    def _batch_statistics(self, x: Features) -> tuple[Statistic, Statistic]:
        """The batch's mean and biased variance; updates the stored averages.

        The variance is taken in two passes, E[(x − μ)²].  The single pass
        E[x²] − μ² loses all digits in float32 once |μ| is a thousand times σ, and was
        not faster on the CPU: forward and backward of three 16-channel convolutions
        with batch norms took 37 ms either way.
        """
        axes = tuple(range(x.ndim - 1))
        count = x.size // x.shape[-1]
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = x.mean(axes)
        var = jnp.square(x - mean).mean(axes)
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
        # m·old + (1 − m)·new, written so that a float64 batch is not rounded to the
        # float32 of the stored averages.
        old_mean, old_var = self.mean[...], self.var[...]
        new_mean = old_mean + (1 - self.momentum) * (mean - old_mean)
        new_var = old_var + (1 - self.momentum) * (unbiased - old_var)
        # Replaced as a whole: an assignment to [...] would cast to the stored type, and
        # takes time quadratic in the depth of the network while tracing.
        self.mean.set_value(lax.stop_gradient(new_mean))
        self.var.set_value(lax.stop_gradient(new_var))
        return mean, var

    def _across_devices(
        self, mean: Statistic, var: Statistic
    ) -> tuple[Statistic, Statistic]:
        """Join per-device statistics into the whole batch's, in one collective.

        Var = E[var_d + (mean_d − c)²] − (mean − c)² holds for any c.  The stored mean
        is close to every mean_d, so that nothing cancels, and the same on all devices,
        so that it need not be communicated first.
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
    """(x − mean)/√(var + epsilon)·scale + bias, in the precision of x.

    Jitted, as `relu` is, so that a network of many alike layers is traced once for
    each shape: 37 µs a layer, where the ten operations alone take 340 µs to trace.
    """
    shape = (1,) * (x.ndim - 1) + (-1,)
    mean, var = mean.reshape(shape), var.reshape(shape)
    scale, bias = scale.reshape(shape), bias.reshape(shape)
    y = (x - mean) * (lax.rsqrt(var + epsilon) * scale) + bias
    return y.astype(x.dtype)  # statistics are wider than a half-precision x


@jax.jit
def relu(x: Features) -> Features:
    """max(x, 0), with derivative 0 at 0.

    Jitted, because JAX's own traces its rule for the derivative at every use. In
    bfloat16 the CPU goes through float32, which gives the same numbers: as of jax 0.11
    and 0.12 XLA computes rubbish there where it fuses two maxima with the same constant
    into one sum, as in ``mean(relu(x) + relu(2 * x))``.
    """
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return jax.nn.relu(x.astype(jnp.float32)).astype(x.dtype)
    return jax.nn.relu(x)


relu6 = jax.jit(jax.nn.relu6)


class Relu(nnx.Module):
    """max(x, 0), with derivative 0 at 0; a module, to have a place in a list."""

    def __call__(self, x: Features) -> Features:
        return relu(x)


class Identity(nnx.Module):
    """x itself: the activation of a linear network."""

    def __call__(self, x: Features) -> Features:
        return x


class MaxPool(nnx.Module):
    """Maximum over 2×2 windows; see `max_pool`."""

    def __call__(self, x: Images) -> Images:
        return max_pool(x)


def every_second(x: Images, row: int = 0, column: int = 0) -> Images:
    """x[:, row::2, column::2], [b, h, w, c] to half the height and width.

    >>> every_second(jnp.ones((1, 5, 4, 3))).shape
    (1, 3, 2, 3)
    """
    return lax.slice(x, (0, row, column, 0), x.shape, (1, 2, 2, 1))


def max_pool(x: Images) -> Images:
    """Maximum over 2×2 windows, [b, h, w, c] to [b, ⌊h/2⌋, ⌊w/2⌋, c].

    The maximum of four strided slices, since the gradient of XLA's reduce_window is
    slow on the CPU: 55 ms for 64×32×32×64 values, against 3 ms for this.  Equal maxima
    share the gradient, where PyTorch gives it to the first; after a ReLU this matters
    only for equal positive values.

    Raises:
      TPPError: if the images have less than two rows or columns.

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
    """Mean over all pixels, [b, h, w, c] to [b, c]."""
    return x.mean((1, 2))
