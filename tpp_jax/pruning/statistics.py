"""Statistics of the parameters that some criteria need: gradients and curvature.

Each function returns a tree like the model's parameters, which is passed to
``make_plan(..., statistics=tree)``. Models run in evaluation mode: batch norms use
their running statistics, dropout is off.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import is_spread

Loss = Callable[[Any, Any], Float[Array, ""]]


def loss_gradient(
    loss: Loss, model: nnx.Module | optax.Params, batches: Iterable[Any]
) -> optax.Updates:
    """Returns the gradient of a loss with respect to the parameters, averaged.

    For the criteria ``taylor`` and ``taylor_fo``.

    Args:
      loss: Function ``loss(model, batch)`` that returns a scalar, the mean over the
        examples of the batch.
      model: NNX module (not modified) or parameter pytree.
      batches: Batches of equal size, each in the form that the loss takes.

    Returns:
      The mean gradient over the batches, a tree like the model's parameters: NumPy
      arrays, or arrays that are divided over several devices as the parameters are.

    Raises:
      TPPError: There is no batch.

    References:
      Molchanov et al. 2019, "Importance estimation for neural network pruning".

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(params, batch):
      ...     return jnp.sum(params["w"] ** 2 * batch)
      >>> loss_gradient(loss, {"w": jnp.array([1.0, 2.0])}, [0.0, 1.0])["w"].tolist()
      [1.0, 2.0]
    """
    call, params = _as_loss(loss, model)
    gradient = _divided_as(params, jax.grad(call))
    return mean_of(gradient, ((params, batch) for batch in batches))


def hessian_diagonal(
    loss: Loss,
    model: nnx.Module | optax.Params,
    batches: Iterable[Any],
    *,
    probes: int = 8,
    seed: int = 0,
) -> optax.Params:
    """Estimates the diagonal of the Hessian of a loss, averaged over batches.

    For the criterion ``hessian``. Hutchinson's estimate: the mean of ``z · (H z)`` over
    vectors ``z`` of random signs. It is exact if the Hessian is diagonal.

    Args:
      loss: Function ``loss(model, batch)`` that returns a scalar, the mean over the
        examples of the batch.
      model: NNX module (not modified) or parameter pytree.
      batches: Batches of equal size, each in the form that the loss takes.
      probes: Number of random vectors per batch; the error falls with its square root.
      seed: Seed of the random vectors.

    Returns:
      The estimate, a tree like the model's parameters, as of :func:`loss_gradient`.

    Raises:
      TPPError: There is no batch, or ``probes`` is 0.

    References:
      Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix for
      Laplacian smoothing splines"; LeCun et al. 1990, "Optimal brain damage".

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(params, batch):
      ...     return jnp.sum(params["w"] ** 3 * batch)
      >>> w = {"w": jnp.array([1.0, 2.0])}
      >>> hessian_diagonal(loss, w, [1.0])["w"].tolist()
      [6.0, 12.0]
    """
    call, params = _as_loss(loss, model)

    def estimate(params: optax.Params, batch: Any, z: optax.Params) -> optax.Params:
        gradient = jax.grad(lambda p: call(p, batch))
        _, hz = jax.jvp(gradient, (params,), (z,))
        return jax.tree.map(jnp.multiply, z, hz)

    arguments = (
        (params, batch, _signs(params, (seed, i, probe)))
        for i, batch in enumerate(batches)
        for probe in range(probes)
    )
    return mean_of(_divided_as(params, estimate), arguments)


def _signs(params: optax.Params, seed: tuple[int, ...]) -> optax.Params:
    """Returns a tree like the parameters of random 1 and -1."""
    # On the host: a device would compile a program for every shape.
    rng = np.random.default_rng(seed)

    def signs(leaf: Any) -> Any:
        drawn = 2 * rng.integers(2, size=jnp.shape(leaf)) - 1
        drawn = np.asarray(drawn, jnp.result_type(leaf))
        return jax.device_put(drawn, leaf.sharding) if is_spread(leaf) else drawn

    return jax.tree.map(signs, params)


def _divided_as(params: optax.Params, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a compiled function whose results are divided as the parameters are.

    Args:
      params: Parameters; arrays on one device leave the place of the result open.
      fn: Function that returns a tree like the parameters.
    """
    places = jax.tree.map(lambda x: x.sharding if is_spread(x) else None, params)
    return jax.jit(fn, out_shardings=places)


def _as_loss(loss: Loss, model: nnx.Module | optax.Params) -> tuple[Loss, optax.Params]:
    """Turns a loss of a model into one of its parameters, and returns both."""
    if not isinstance(model, nnx.Module):
        return loss, model
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def call(params: nnx.State, batch: Any) -> Float[Array, ""]:
        merged = nnx.merge(graphdef, params, rest, copy=True)
        merged.eval()
        return loss(merged, batch)

    return call, params


def mean_of(fn: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Any:
    """Returns the mean of a function over several arguments.

    Args:
      fn: Function that returns a pytree of arrays.
      arguments: Positional arguments of each call.

    Raises:
      TPPError: There are no arguments.
    """
    total, n = None, 0
    for each in arguments:
        value = jax.tree.map(_on_host_or_spread, fn(*each))
        total = value if total is None else jax.tree.map(_sum, total, value)
        n += 1
    if total is None:
        raise TPPError("there is no batch to compute statistics from")
    return jax.tree.map(lambda leaf: leaf / n, total)


def _on_host_or_spread(array: Any) -> Any:
    # On the host: a device would compile a program for every shape.
    return array if is_spread(array) else jax.device_get(array)


def _sum(one: Any, other: Any) -> Any:
    return _add(one, other) if is_spread(one) else np.add(one, other)


_add = jax.jit(jnp.add, donate_argnums=0)
