"""What criteria want to know beside the weights: gradients, curvature, activations.

Each function returns a tree named like the model's parameters, to be passed to
``make_plan(..., statistics=tree)``. Models are evaluated, not trained: batch norms use
their running statistics, dropout is off.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tpp_jax.errors import TPPError

Loss = Callable[[Any, Any], Float[Array, ""]]


def loss_gradient(loss: Loss, model: nnx.Module | Any, batches: Iterable[Any]) -> Any:
    """Returns the gradient of a loss by each parameter, the mean over batches.

    For the criteria ``taylor`` and ``taylor_fo``.

    Args:
      loss: ``loss(model, batch)``, a scalar, the mean over the batch's examples.
      model: an NNX module (left untouched) or a parameter pytree.
      batches: of equal size; each is what the loss takes.

    Returns:
      A tree like the model's parameters.

    Raises:
      TPPError: there is no batch.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(params, batch):
      ...     return jnp.sum(params["w"] ** 2 * batch)
      >>> loss_gradient(loss, {"w": jnp.array([1.0, 2.0])}, [0.0, 1.0])["w"].tolist()
      [1.0, 2.0]
    """
    call, params = _as_loss(loss, model)
    return mean_of(jax.jit(jax.grad(call)), ((params, batch) for batch in batches))


def hessian_diagonal(
    loss: Loss,
    model: nnx.Module | Any,
    batches: Iterable[Any],
    *,
    probes: int = 8,
    seed: int = 0,
) -> Any:
    """Estimates the diagonal of a loss's Hessian, the mean over batches.

    For the criterion ``hessian``. Hutchinson's estimate: the mean of ``z · (H z)`` over
    vectors ``z`` of random signs. It is exact where the Hessian is diagonal.

    Args:
      loss: as for :func:`loss_gradient`.
      model: likewise.
      batches: likewise.
      probes: random vectors for each batch; the error falls with their square root.
      seed: of the random vectors.

    Returns:
      A tree like the model's parameters.

    Raises:
      TPPError: there is no batch or no probe.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(params, batch):
      ...     return jnp.sum(params["w"] ** 3 * batch)
      >>> w = {"w": jnp.array([1.0, 2.0])}
      >>> hessian_diagonal(loss, w, [1.0])["w"].tolist()
      [6.0, 12.0]
    """
    call, params = _as_loss(loss, model)

    @jax.jit
    def estimate(params: Any, batch: Any, z: Any) -> Any:
        gradient = jax.grad(lambda p: call(p, batch))
        _, hz = jax.jvp(gradient, (params,), (z,))
        return jax.tree.map(jnp.multiply, z, hz)

    def signs(*place: int) -> Any:
        # On the host: on a device the draws of every shape would be compiled for.
        bits = np.random.default_rng((seed, *place))
        return jax.tree.map(
            lambda leaf: np.asarray(
                2 * bits.integers(2, size=jnp.shape(leaf)) - 1, jnp.result_type(leaf)
            ),
            params,
        )

    draws = (
        (params, batch, signs(i, probe))
        for i, batch in enumerate(batches)
        for probe in range(probes)
    )
    return mean_of(estimate, draws)


def _as_loss(loss: Loss, model: nnx.Module | Any) -> tuple[Loss, Any]:
    """Splits an NNX module off a loss, which becomes one of its parameters."""
    if not isinstance(model, nnx.Module):
        return loss, model
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def call(params: nnx.State, batch: Any) -> Float[Array, ""]:
        merged = nnx.merge(graphdef, params, rest, copy=True)
        merged.eval()
        return loss(merged, batch)

    return call, params


def mean_of(fn: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Any:
    """Returns the mean of what a function returns, a pytree, over several arguments.

    Raises:
      TPPError: there are none.
    """
    total, n = None, 0
    for each in arguments:
        # On the host: on a device the sum of every shape would be compiled for.
        value = jax.device_get(fn(*each))
        total = value if total is None else jax.tree.map(np.add, total, value)
        n += 1
    if total is None:
        raise TPPError("there is no batch to take statistics of")
    return jax.tree.map(lambda leaf: leaf / n, total)
