"""Penalties on the Gram matrix of a layer's filters, with closed-form gradients.

A kernel (HWIO of a convolution, IO of a dense layer) has its N filters on the last
axis; W is the matrix [N, D] of filters as rows and G = W Wᵀ. A penalty is

    L(W) = ‖R(G)‖²_F / N²

with a residual R that is linear in G but for a constant, so that

    ∂L/∂W = (4 / N²) R(G) W.

The gradient depends on the parameters alone, which is why it belongs in an optax
transform and not in the loss (TPP, section 3.2).
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tpp_jax.errors import TPPError

Target = Literal["decorrelate", "orthogonal"]
"""What the Gram matrix is driven to.

``"decorrelate"``: 0 in every row and column of a pruned filter, its diagonal included,
and whatever it is among the kept ones (TPP). ``"orthogonal"``: the identity among the
kept filters and 0 for the pruned ones (the ablation "kernel orthogonality for
pruning").
"""


def gram_penalty(
    kernel: Float[Array, "*d n"],
    pruned: Bool[Array, " n"],
    target: Target = "decorrelate",
) -> Float[Array, ""]:
    """Returns the penalty of one layer, L(W) above.

    Args:
      kernel: float, filters on the last axis.
      pruned: which filters are to be pruned.
      target: see :data:`Target`.

    Example:
      >>> gram_penalty(jnp.eye(3), jnp.array([True, False, False]))
      Array(0.11111111, dtype=float32)
    """
    return gram_penalty_and_grad(kernel, pruned, target)[0]


def gram_penalty_grad(
    kernel: Float[Array, "*d n"],
    pruned: Bool[Array, " n"],
    target: Target = "decorrelate",
) -> Float[Array, "*d n"]:
    """Returns the gradient of :func:`gram_penalty` with respect to the kernel."""
    return gram_penalty_and_grad(kernel, pruned, target)[1]


def gram_penalty_and_grad(
    kernel: Float[Array, "*d n"],
    pruned: Bool[Array, " n"],
    target: Target = "decorrelate",
) -> tuple[Float[Array, ""], Float[Array, "*d n"]]:
    """Returns the penalty and its gradient, sharing the one Gram matrix.

    Raises:
      TPPError: an unknown target, or a mask that is not of the kernel's filters.
    """
    if pruned.shape != kernel.shape[-1:]:
        raise TPPError(
            f"pruned has the shape {list(pruned.shape)}, but the kernel has "
            f"{kernel.shape[-1]} filters, on its last axis: give a bool for each"
        )
    columns = kernel.reshape(-1, kernel.shape[-1])
    gram = columns.T @ columns
    if target == "decorrelate":
        residual = jnp.where(pruned[:, None] | pruned[None, :], gram, 0)
    elif target == "orthogonal":
        residual = gram - jnp.diag(1 - pruned.astype(gram.dtype))
    else:
        raise TPPError(f"unknown Gram target {target!r}: decorrelate or orthogonal")
    return _penalty_and_grad(kernel, columns, residual)


def kept_penalty_and_grad(
    kernel: Float[Array, "*d n"], pruned: Bool[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, "*d n"]]:
    """Returns the penalty ‖G − I‖²_F / N² among the kept filters, and its gradient.

    With it TPP also asks of the kept filters to be orthonormal: an ablation, in which
    the two parts of the Gram matrix have weights of their own.

    Args:
      kernel: float, filters on the last axis.
      pruned: which filters are to be pruned.

    Example:
      >>> kept_penalty_and_grad(2 * jnp.eye(3), jnp.array([True, False, False]))[0]
      Array(2., dtype=float32)
    """
    columns = kernel.reshape(-1, kernel.shape[-1])
    residual = columns.T @ columns - jnp.eye(len(pruned), dtype=columns.dtype)
    residual = jnp.where(pruned[:, None] | pruned[None, :], 0, residual)
    return _penalty_and_grad(kernel, columns, residual)


def _penalty_and_grad(
    kernel: Float[Array, "*d n"],
    columns: Float[Array, "d n"],
    residual: Float[Array, "n n"],
) -> tuple[Float[Array, ""], Float[Array, "*d n"]]:
    scale = 1 / kernel.shape[-1] ** 2
    penalty = scale * jnp.sum(jnp.square(residual))
    return penalty, (4 * scale * (columns @ residual)).reshape(kernel.shape)
