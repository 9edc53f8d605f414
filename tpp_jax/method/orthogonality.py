"""Penalties that keep filters orthogonal while training: KernOrth and OrthConv.

A kernel (HWIO of a convolution, IO of a dense layer) has its N filters on the last
axis; W is the matrix [N, D] of filters as rows.

    KernOrth   ‖W Wᵀ − I‖, or ‖Wᵀ W − I‖ if N > D      (Xie et al. 2017)
    OrthConv   ‖conv(K, K) − I‖, filters against filters (Wang et al. 2020)

OrthConv also asks of a filter to be orthogonal to the others shifted, as a convolution
shifts them. Both are rivals of TPP in its tables: added before pruning or after, with
weight 0.1. What TPP asks of the filters to be pruned is in :mod:`tpp_jax.method.gram`,
"kernel orthogonality for pruning" (its target ``"orthogonal"``) too.
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
"""How a residual R becomes one number: ``"frobenius"``: ‖R‖_F, whose gradient has the
same size far from the minimum and near it; ``"mean_square"``: the mean of R²."""

Side = Literal["smaller", "filters", "inputs"]
"""Which Gram matrix: ``"filters"``: W Wᵀ [N, N]; ``"inputs"``: Wᵀ W [D, D];
``"smaller"``: the smaller of both."""

Kind = Literal["kernorth", "orthconv"]


class OrthogonalityState(NamedTuple):
    """State of :func:`add_orthogonality`.

    Attributes:
      penalty: Σ over layers of the penalty at the last update, unweighted.
    """

    penalty: Float[Array, ""]


def kernel_orthogonality(
    kernel: Float[Array, "*d n"], norm: Norm = "frobenius", side: Side = "smaller"
) -> Float[Array, ""]:
    """Returns how far a kernel's filters are from orthonormal: KernOrth.

    The side changes the value and not the minimum's direction, as
    ‖W Wᵀ − I‖² = ‖Wᵀ W − I‖² + N − D; but of the larger side it is never 0.

    Args:
      kernel: Float, filters on the last axis.
      norm: See :data:`Norm`.
      side: See :data:`Side`. The original's mean of squares takes ``"inputs"`` for a
        kernel with fewer filters than input channels, else ``"filters"``.

    Raises:
      TPPError: An unknown norm or side.

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

    The filters are convolved with one another, [N, N, *shifts]; at no shift the result
    is to be the identity, and at all others 0.

    Args:
      kernel: Float, HWIO, of any number of spatial axes.
      stride: The layer's own.
      padding: On every side; by default ⌊(k − 1) / stride⌋ · stride for a window of k,
        all the shifts at which two filters overlap. The released original has 1, and a
        stride of 2, for every layer; with a window of 3 the shifts are then −1 and 1,
        and the identity is asked for at 1.
      norm: See :data:`Norm`.

    Raises:
      TPPError: An unknown norm, a kernel without a window, or a stride or padding out
        of range.

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
            f"stride {stride} and padding {padding}: the one must be at least 1, the "
            "other 0"
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
    kind: Kind = "kernorth",
    *,
    layers: Layers = "*",
    skip: Sequence[str] | str = (),
    norm: Norm = "frobenius",
    side: Side = "smaller",
    stride: int = 1,
    padding: int | None = None,
) -> optax.GradientTransformation:
    """Adds ``weight`` times the gradient of an orthogonality penalty to the kernels'.

    To stand before weight decay and the optimizer. The parameters' leaves called
    ``kernel`` are meant; leave out layers whose kernel is no matrix of filters that all
    see the same channels, such as depthwise and grouped convolutions.

    Args:
      weight: Of the sum over layers; 0.1 in the paper.
      kind: ``"kernorth"`` or ``"orthconv"``; the latter takes KernOrth for dense layers
        and windows of one pixel, which have no shifts.
      layers: Whose kernels.
      skip: Patterns of layers that are left out. For OrthConv the original leaves out
        the first convolution.
      norm: See :data:`Norm`.
      side: For KernOrth, see :data:`Side`.
      stride: For OrthConv. Where layers differ, chain one transform for each stride.
      padding: For OrthConv, see :func:`convolution_orthogonality`; the released
        original's is ``stride=2, padding=1``.

    Returns:
      A transform of gradients that needs ``params``.

    Raises:
      TPPError: An unknown kind or norm; when it meets the parameters, a pattern that
        matches no kernel.

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

    def init(params: Any) -> OrthogonalityState:
        kernels_of(params, layers, skip)  # to tell of a wrong pattern at once
        return OrthogonalityState(jnp.zeros((), jnp.result_type(float)))

    def update(
        updates: Any, state: OrthogonalityState, params: Any = None
    ) -> tuple[Any, OrthogonalityState]:
        if params is None:
            raise TPPError(
                "the transform needs the parameters: "
                "call update(updates, state, params)"
            )
        names = kernels_of(params, layers, skip)
        total = jnp.zeros_like(state.penalty)

        def add(name: str, gradient: Array, parameter: Array) -> Array:
            nonlocal total
            if name not in names:
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
    # The root has no derivative at 0; there 0 is the one to take, and not NaN.
    total = jnp.sum(jnp.square(residual))
    positive = total > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1)), 0)


def _precise(kernel: Array) -> Array:
    kernel = jnp.asarray(kernel)
    return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
