"""Penalties that keep filters orthogonal during training: KernOrth and OrthConv.

A kernel (HWIO of a convolution, IO of a dense layer) has its N filters on the last
axis; W is the matrix [N, D] of filters as rows.

    KernOrth   ‖W Wᵀ − I‖, or ‖Wᵀ W − I‖ if N > D      (Xie et al. 2017)
    OrthConv   ‖conv(K, K) − I‖, filters against filters (Wang et al. 2020)

OrthConv also requires a filter to be orthogonal to shifted copies of the others, with
the shifts of the convolution. TPP's tables compare it with both, added before or after
pruning with weight 0.1. TPP's own penalty on the filters to prune is in
:mod:`tpp_jax.method.gram`, and so is "kernel orthogonality for pruning" (its target
``"orthogonal"``).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tpp_jax.errors import TPPError
from tpp_jax.graph.naming import map_named
from tpp_jax.method.isometry import Layers, kernels_of

Norm = Literal["frobenius", "mean_square"]
"""Norm of a residual R. ``"frobenius"``: ‖R‖_F, whose gradient has the same size far
from the minimum and near it; ``"mean_square"``: the mean of R²."""

Side = Literal["smaller", "filters", "inputs"]
"""Gram matrix in the penalty. ``"filters"``: W Wᵀ [N, N]; ``"inputs"``: Wᵀ W [D, D];
``"smaller"``: the smaller of the two."""

Penalty = Literal["kernorth", "orthconv"]
"""Penalty of :func:`add_orthogonality`."""


class OrthogonalityState(NamedTuple):
    """State of :func:`add_orthogonality`.

    Attributes:
      penalty: Sum over layers of the penalty at the last update, unweighted.
    """

    penalty: Float[Array, ""]


def kernel_orthogonality(
    kernel: Float[Array, "*d n"], norm: Norm = "frobenius", side: Side = "smaller"
) -> Float[Array, ""]:
    """Returns how far a kernel's filters are from orthonormal: KernOrth.

    The side changes the value but not the minimum, since
    ‖W Wᵀ − I‖² = ‖Wᵀ W − I‖² + N − D; with the larger side the value is never 0.

    Args:
      kernel: Kernel of the layer, filters on the last axis.
      norm: Norm of the residual; see :data:`Norm`.
      side: Gram matrix to use; see :data:`Side`. The original's mean of squares uses
        ``"inputs"`` for a kernel with fewer filters than input channels, else
        ``"filters"``.

    Raises:
      TPPError: If the norm or the side is unknown.

    References:
      Xie et al., All You Need is Beyond a Good Init, CVPR 2017, section 3.

    Example:
      >>> kernel_orthogonality(2 * jnp.eye(3), "mean_square")
      Array(3., dtype=float32)
    """
    columns = _precise(kernel).reshape(-1, kernel.shape[-1])
    if side not in ("smaller", "filters", "inputs"):
        raise TPPError(f"unknown side {side!r}: choose smaller, filters or inputs")
    fewer_filters = columns.shape[1] <= columns.shape[0]
    if side == "filters" or (side == "smaller" and fewer_filters):
        gram = columns.T @ columns
    else:
        gram = columns @ columns.T
    return _size(gram - jnp.eye(len(gram), dtype=gram.dtype), norm)


def convolution_orthogonality(
    kernel: Float[Array, "*window c n"],
    stride: int = 1,
    padding: int | None = None,
    norm: Norm = "frobenius",
) -> Float[Array, ""]:
    """Returns how far a convolution is from orthogonal: OrthConv.

    The filters are convolved with one another, [N, N, *shifts]. Without a shift the
    result should be the identity, for all other shifts 0.

    Args:
      kernel: Kernel of the convolution, HWIO, with any number of spatial axes.
      stride: Stride of the layer.
      padding: Padding on every side; by default ⌊(k − 1) / stride⌋ · stride for a
        window of k, which gives all shifts at which two filters overlap. The released
        original uses 1, and a stride of 2, for every layer; with a window of 3 the
        shifts are then −1 and 1, and the identity is the target at 1.
      norm: Norm of the residual; see :data:`Norm`.

    Raises:
      TPPError: If the norm is unknown, the kernel has no window, or the stride or
        padding is out of range.

    References:
      Wang et al., Orthogonal Convolutional Neural Networks, CVPR 2020, equation 6.

    Example:
      >>> kernel = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2))
      >>> convolution_orthogonality(kernel)
      Array(0., dtype=float32)
    """
    *window, _, filters = kernel.shape
    if not window:
        raise TPPError(
            "a dense layer's kernel has no window to shift: use kernel_orthogonality"
        )
    if stride < 1 or (padding is not None and padding < 0):
        raise TPPError(
            f"stride {stride} and padding {padding}: the stride must be at least 1, "
            "the padding at least 0"
        )
    pads = [(w - 1) // stride * stride if padding is None else padding for w in window]
    axes = "".join(chr(ord("0") + i) for i in range(len(window)))
    kernel = _precise(kernel)
    shifted = jax.lax.conv_general_dilated(
        jnp.moveaxis(kernel, -1, 0),
        kernel,
        [stride] * len(window),
        [(pad, pad) for pad in pads],
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )
    middle = tuple(size // 2 for size in shifted.shape[1:-1])
    unshifted = (slice(None), *middle)
    identity = jnp.eye(filters, dtype=shifted.dtype)
    return _size(shifted.at[unshifted].add(-identity), norm)


def add_orthogonality(
    weight: float = 0.1,
    kind: Penalty = "kernorth",
    *,
    layers: Layers = "*",
    skip: Sequence[str] | str = (),
    norm: Norm = "frobenius",
    side: Side = "smaller",
    stride: int = 1,
    padding: int | None = None,
) -> optax.GradientTransformation:
    """Adds ``weight`` times the gradient of an orthogonality penalty to the kernels'.

    Chain it before weight decay and the optimizer. It applies to the parameters called
    ``kernel``. Skip layers whose kernel is not a matrix of filters with the same input
    channels, such as depthwise and grouped convolutions.

    Args:
      weight: Weight of the sum over layers; 0.1 in the paper.
      kind: Penalty, ``"kernorth"`` or ``"orthconv"``; the latter is KernOrth for dense
        layers and windows of one pixel, which have no shifts.
      layers: Layers whose kernels are penalised.
      skip: Patterns of layers to omit. For OrthConv the original omits the first
        convolution.
      norm: Norm of the residual; see :data:`Norm`.
      side: Gram matrix for KernOrth; see :data:`Side`.
      stride: Stride for OrthConv. If the strides of layers differ, chain one transform
        for each.
      padding: Padding for OrthConv; see :func:`convolution_orthogonality`. The released
        original uses ``stride=2, padding=1``.

    Returns:
      A transform of gradients that needs ``params``.

    Raises:
      TPPError: If the kind or the norm is unknown; from ``init`` or ``update``, if a
        pattern matches no kernel.

    References:
      Wang & Fu, Trainability Preserving Neural Pruning, ICLR 2023, section 4.

    Example:
      >>> params = {"dense": {"kernel": 2 * jnp.eye(2)}}
      >>> tx = optax.chain(add_orthogonality(0.1), optax.sgd(1.0))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> round(float(state[0].penalty), 3)
      4.243
    """
    if kind not in ("kernorth", "orthconv"):
        raise TPPError(f"unknown kind {kind!r}: choose 'kernorth' or 'orthconv'")
    _check_norm(norm)

    def penalty_of(kernel: Array) -> Float[Array, ""]:
        if kind == "orthconv" and max(kernel.shape[:-2], default=1) > 1:
            return convolution_orthogonality(kernel, stride, padding, norm)
        return kernel_orthogonality(kernel, norm, side)

    def init(params: optax.Params) -> OrthogonalityState:
        kernels_of(params, layers, skip)  # to report a wrong pattern immediately
        return OrthogonalityState(jnp.zeros((), jnp.result_type(float)))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, OrthogonalityState]:
        if params is None:
            raise TPPError(
                "the transform needs the parameters: "
                "call update(updates, state, params)"
            )
        names = kernels_of(params, layers, skip)
        total = jnp.zeros_like(state.penalty)

        def add(name: str, gradient: Array, parameter: Array) -> Array:
            nonlocal total
            if name not in names or not parameter.size:
                return gradient
            penalty, grad = jax.value_and_grad(penalty_of)(parameter)
            total = total + penalty.astype(total.dtype)
            return gradient + weight * grad.astype(gradient.dtype)

        updates = map_named(add, updates, params)
        return updates, OrthogonalityState(total)

    return optax.GradientTransformation(init, update)


def _check_norm(norm: Norm) -> None:
    if norm not in ("frobenius", "mean_square"):
        raise TPPError(f"unknown norm {norm!r}: choose frobenius or mean_square")


def _size(residual: Float[Array, "..."], norm: Norm) -> Float[Array, ""]:
    _check_norm(norm)
    if norm == "mean_square":
        return jnp.mean(jnp.square(residual))
    # The root has no derivative at 0, where this gives 0 instead of NaN.
    total = jnp.sum(jnp.square(residual))
    positive = total > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1)), 0)


def _precise(kernel: Array) -> Array:
    kernel = jnp.asarray(kernel)
    return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
