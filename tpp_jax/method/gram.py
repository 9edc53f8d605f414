"""Penalties on the Gram matrix of a layer's filters, with closed-form gradients.

A kernel (HWIO of a convolution, IO of a dense layer) has its N filters on the last
axis; W is the matrix [N, D] of filters as rows and G = W Wᵀ. A penalty is

    L(W) = ‖R(G)‖²_F / N²

with a residual R that is an affine function of G, so that

    ∂L/∂W = (4 / N²) R(G) W.

The gradient depends only on the parameters, so it is added in an optax transform rather
than in the loss (TPP, section 3.2).

The filters of other kernels lie along several axes (heads, and the dimensions of each),
and a kernel may be a stack of kernels. The functions here do not reshape arrays, so
that sharded arrays keep their sharding.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import is_explicit

Target = Literal["decorrelate", "orthogonal", "relative"]
"""Target of the Gram matrix.

``"decorrelate"``: 0 in the rows and columns of pruned filters, diagonal included, while
the entries among kept filters are free (TPP). ``"orthogonal"``: the identity among the
kept filters and 0 for the pruned ones (the ablation "kernel orthogonality for
pruning"). ``"relative"``: that of ``"decorrelate"``, but the penalty is

    ‖R(G)‖²_F / 4e,    ∂/∂W = R(G) W / e,

where e, the mean of ‖w‖² over the kept filters w, counts as a constant. Its weight
means the same in layers of any size and scale: if the kept filters are orthogonal and
of equal norm, a weight of 1 pulls a pruned filter's component in their span to zero as
L2 of strength λ does. This is not in the paper.
"""


def gram_penalty(
    kernel: Float[Array, "*d n"],
    pruned: Bool[Array, " n"],
    target: Target = "decorrelate",
) -> Float[Array, ""]:
    """Returns the penalty of one layer, L(W) above.

    Args:
      kernel: Kernel of the layer, filters on the last axis.
      pruned: Mask of the filters to prune.
      target: Target of the Gram matrix; see :data:`Target`.

    Returns:
      A scalar of the kernel's type.

    Raises:
      TPPError: If the target is unknown, or the mask does not have an entry for each
        filter.

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
    """Returns the gradient of :func:`gram_penalty` with respect to the kernel.

    Args:
      kernel: Kernel of the layer, filters on the last axis.
      pruned: Mask of the filters to prune.
      target: Target of the Gram matrix; see :data:`Target`.

    Returns:
      An array of the kernel's shape and type.

    Raises:
      TPPError: If the target is unknown, or the mask does not fit the kernel.

    Example:
      >>> gram_penalty_grad(jnp.eye(2), jnp.array([True, False]))
      Array([[1., 0.],
             [0., 0.]], dtype=float32)
    """
    return gram_penalty_and_grad(kernel, pruned, target)[1]


def gram_penalty_and_grad(
    kernel: Float[Array, "..."],
    pruned: Bool[Array, "..."],
    target: Target = "decorrelate",
    filters: Sequence[int] = (-1,),
    batch: Sequence[int] = (),
) -> tuple[Float[Array, ""], Float[Array, "..."]]:
    """Returns the penalty and its gradient, which share one Gram matrix.

    Args:
      kernel: Kernel of the layer.
      pruned: Mask of the filters to prune, of the kernel's shape along ``filters``; or
        along ``batch`` and ``filters``, if it differs between the stacked kernels.
      target: Target of the Gram matrix; see :data:`Target`.
      filters: Axes of the kernel that together index its filters.
      batch: Axes along which separate kernels are stacked; their penalties are summed.

    Raises:
      TPPError: If the target is unknown, or the mask does not have the shape of the
        kernel's filters.
    """
    gram = _Gram(kernel, pruned, filters, batch)
    if target == "decorrelate":
        residual = jnp.where(gram.any_pruned, gram.matrix, 0)
    elif target == "relative":
        residual = jnp.where(gram.any_pruned, gram.matrix, 0)
        scaled = residual * (gram.size**2 / 4) / gram.energy(~gram.pruned)
        grad = gram.penalty_and_grad(scaled)[1]
        return jnp.sum(residual * scaled) / gram.size**2, grad
    elif target == "orthogonal":
        identity = gram.diagonal(1 - gram.pruned.astype(kernel.dtype))
        residual = gram.matrix - identity
    else:
        raise TPPError(
            f"unknown Gram target {target!r}: decorrelate, orthogonal or relative"
        )
    return gram.penalty_and_grad(residual)


def kept_penalty_and_grad(
    kernel: Float[Array, "..."],
    pruned: Bool[Array, "..."],
    filters: Sequence[int] = (-1,),
    batch: Sequence[int] = (),
) -> tuple[Float[Array, ""], Float[Array, "..."]]:
    """Returns the penalty ‖G − I‖²_F / N² among the kept filters, and its gradient.

    In an ablation, TPP also drives the kept filters to be orthonormal, and the two
    parts of the Gram matrix have separate weights.

    Args:
      kernel: Kernel of the layer.
      pruned: Mask of the filters to prune, as for :func:`gram_penalty_and_grad`.
      filters: Axes of the kernel that together index its filters.
      batch: Axes along which separate kernels are stacked; their penalties are summed.

    Example:
      >>> kept_penalty_and_grad(2 * jnp.eye(3), jnp.array([True, False, False]))[0]
      Array(2., dtype=float32)
    """
    gram = _Gram(kernel, pruned, filters, batch)
    residual = gram.matrix - gram.diagonal(jnp.ones_like(gram.pruned, kernel.dtype))
    return gram.penalty_and_grad(jnp.where(gram.any_pruned, 0, residual))


class _Gram:
    """The Gram matrices of a kernel.

    Attributes:
      matrix: Gram matrices, float ``[*batch, *filters, *filters]``.
      pruned: Mask of the filters to prune, bool ``[*batch, *filters]``; axes of the
        batch are 1 if it is the same for all kernels.
      any_pruned: Whether either filter is to be pruned, bool ``[*batch, *filters,
        *filters]``.
      size: Number of filters of one kernel.
    """

    def __init__(
        self,
        kernel: Array,
        pruned: Array,
        filters: Sequence[int],
        batch: Sequence[int],
    ) -> None:
        self.kernel = kernel
        self.batch = tuple(i % kernel.ndim for i in batch)
        self.filters = tuple(i % kernel.ndim for i in filters)
        both = {*self.batch, *self.filters}
        self.inputs = tuple(i for i in range(kernel.ndim) if i not in both)
        self.shape = tuple(kernel.shape[i] for i in self.filters)
        self.size = math.prod(self.shape)
        stacks = tuple(kernel.shape[i] for i in self.batch)
        if pruned.shape not in (self.shape, (*stacks, *self.shape)):
            where = "on its last axis" if len(self.shape) == 1 else "on its axes"
            raise TPPError(
                f"pruned has the shape {list(pruned.shape)}, but the kernel has "
                f"{' x '.join(map(str, self.shape))} filters, {where}: give a bool for "
                "each"
            )
        self.matrix = jax.lax.dot_general(
            kernel,
            kernel,
            ((self.inputs, self.inputs), (self.batch, self.batch)),
            out_sharding=self._sharding((*self.batch, *self.filters)),
        )
        ones = (1,) * (self.matrix.ndim - len(self.shape) - pruned.ndim)
        self.pruned = pruned.reshape(*ones, *pruned.shape)
        self.any_pruned = self._rows(self.pruned) | self._columns(self.pruned)

    def diagonal(self, values: Array) -> Array:
        """Returns the matrices with values ``[*batch, *filters]`` on their diagonal."""
        identity = jnp.eye(self.size, dtype=values.dtype)
        return identity.reshape(self.shape * 2) * self._rows(values)

    def energy(self, kept: Array) -> Array:
        """Returns the mean ‖w‖² of the filters in a mask, [*batch, 1, …]; 1 for 0."""
        diagonal = self.diagonal(kept.astype(self.matrix.dtype))
        axes = tuple(range(len(self.batch), self.matrix.ndim))
        total = jnp.sum(self.matrix * diagonal, axes, keepdims=True)
        own = tuple(range(len(self.batch), kept.ndim))
        count = self._rows(jnp.sum(kept, own, keepdims=True))
        return jnp.where(total > 0, total / jnp.maximum(count, 1), 1)

    def penalty_and_grad(self, residual: Array) -> tuple[Array, Array]:
        """Returns ‖R‖² / N², and its gradient with respect to the kernel."""
        n_batch, n = len(self.batch), len(self.filters)
        rows = tuple(range(n_batch, n_batch + n))
        scale = 1 / self.size**2
        penalty = scale * jnp.sum(jnp.square(residual))
        order = (*self.batch, *self.inputs, *self.filters)
        product = jax.lax.dot_general(
            self.kernel,
            residual,
            ((self.filters, rows), (self.batch, tuple(range(n_batch)))),
            out_sharding=self._sharding(order),
        )
        if order != tuple(range(self.kernel.ndim)):
            product = jnp.transpose(
                product, [order.index(i) for i in range(len(order))]
            )
        return penalty, 4 * scale * product

    def _rows(self, array: Array) -> Array:
        return array.reshape(*array.shape, *[1] * len(self.shape))

    def _columns(self, array: Array) -> Array:
        batch, filters = array.shape[: len(self.batch)], array.shape[len(self.batch) :]
        return array.reshape(*batch, *[1] * len(self.shape), *filters)

    def _sharding(self, axes: Sequence[int]) -> Any:
        """Returns the sharding of a result whose first axes are these of the kernel."""
        if not is_explicit(self.kernel):
            return None
        sharding = jax.typeof(self.kernel).sharding
        spec = (*sharding.spec, *[None] * self.kernel.ndim)
        return sharding.update(spec=PartitionSpec(*(spec[i] for i in axes)))
