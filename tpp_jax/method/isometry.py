"""Reinitialisation of kernels so that signals keep their norm: alternatives to TPP.

Removing filters shrinks the singular values of a layer, and of a network's Jacobian.
These recipes restore them after pruning, at the cost of the learned weights. A kernel
(HWIO of a convolution, IO of a dense layer) is read as the matrix W [N, D] of its N
filters as rows, and its rows, or its columns if N > D, are made orthogonal with norm g,
the gain of the activation that follows.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from tpp_jax.errors import TPPError
from tpp_jax.graph.naming import (
    layer_name,
    longest_known_suffix,
    map_named,
    named_leaves,
)
from tpp_jax.graph.nnx_layers import modules
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.ratios import parse_patterns

Activation = Literal["linear", "relu", "leaky_relu", "tanh", "sigmoid"]
Layers = str | Sequence[str] | Plan
"""Selection of kernels: ``fnmatch`` patterns of layer names, separated by commas or in
a sequence; or a plan, for the layers whose filters it prunes."""

GAINS: Mapping[Activation, float] = MappingProxyType(
    {
        "linear": 1.0,
        "relu": math.sqrt(2),
        "leaky_relu": math.sqrt(2 / (1 + 0.01**2)),
        "tanh": 5 / 3,
        "sigmoid": 1.0,
    }
)
"""Factors by which a kernel must scale signals up to compensate for the activation that
follows (PyTorch's ``calculate_gain``)."""

Kernel = Float[Array, "*d n"]
Recipe = Callable[[Kernel, Activation, PRNGKeyArray | None], Kernel]


@functools.partial(jax.jit, static_argnames="activation")
def orthogonalize(kernel: Kernel, activation: Activation = "relu") -> Kernel:
    """Orthogonalises a kernel by its own QR decomposition: OrthP.

    With Wᵀ = Q R if N < D, else W = Q R:

        W ← g · (Q · sign(diag R))ᵀ   or   g · Q · sign(diag R).

    The signs make the decomposition unique. Filters that are zero remain zero. (A dense
    layer with N > D after a flattened feature map has its inputs in another order in
    PyTorch, and therefore another orthogonal matrix.)

    Args:
      kernel: Kernel of the layer, filters on the last axis.
      activation: Activation that follows the layer, a name in :data:`GAINS`.

    References:
      Wang et al., Dynamical Isometry: The Missing Ingredient for Neural Network
      Pruning, 2021.

    Example:
      >>> orthogonalize(jnp.array([[3.0], [4.0]]), "linear").round(1)
      Array([[0.6],
             [0.8]], dtype=float32)
    """
    # If N > D, Q depends on the order of W's columns. PyTorch's order is used: all
    # pixels of a channel, then the next channel.
    channels_first = jnp.moveaxis(_wide(kernel), -2, 0)
    columns = channels_first.reshape(-1, kernel.shape[-1])  # [D, N], W transposed
    if columns.shape[0] > columns.shape[1]:
        orthogonal = _signed_q(columns)
    else:
        orthogonal = _signed_q(columns.T).T
    scaled = _gain(activation) * orthogonal.reshape(channels_first.shape)
    return jnp.moveaxis(scaled, 0, -2).astype(kernel.dtype)


@functools.partial(jax.jit, static_argnames="activation")
def delta_orthogonalize(
    kernel: Kernel, gaussian: Float[Array, "m m"], activation: Activation = "relu"
) -> Kernel:
    """Returns a kernel that is orthogonal at the middle of its window, 0 elsewhere.

    A convolution with it preserves the norm of an entire image, not only of one window.
    The middle is a block [I, O] of the orthogonal matrix from the QR decomposition of a
    random matrix.

    Args:
      kernel: Kernel of the layer, HWIO or IO; only its shape and type matter.
      gaussian: Matrix of normal random numbers, with m = max(I, O).
      activation: Activation that follows the layer, a name in :data:`GAINS`.

    Raises:
      TPPError: If the random matrix has another size.

    References:
      Xiao et al., Dynamical Isometry and a Mean Field Theory of CNNs, ICML 2018.

    Example:
      >>> kernel = delta_orthogonalize(jnp.ones((3, 3, 1, 2)), jnp.eye(2), "linear")
      >>> jnp.abs(kernel[1, 1]).tolist(), float(jnp.abs(kernel).sum())
      ([[1.0, 0.0]], 1.0)
    """
    ins, outs = kernel.shape[-2:]
    size = max(ins, outs)
    if gaussian.shape != (size, size):
        raise TPPError(
            f"a kernel of shape {list(kernel.shape)} needs a random matrix of "
            f"[{size}, {size}], not {list(gaussian.shape)}"
        )
    block = _signed_q(_wide(gaussian))[:outs, :ins].T
    middle = tuple((width - 1) // 2 for width in kernel.shape[:-2])
    scaled = (_gain(activation) * block).astype(kernel.dtype)
    return jnp.zeros_like(kernel).at[middle].set(scaled)


def approximate_isometry(
    kernel: Kernel, steps: int = 40, learning_rate: float = 1e-3
) -> Kernel:
    """Returns the kernel after some descent steps on ``mean((W Wᵀ − I)²)``.

    The learned weights are kept in part. As in the original, Adam's state is reset in
    each step, so a step is almost the learning rate times the sign of the gradient, and
    no weight changes by more than ``steps * learning_rate``.

    Args:
      kernel: Kernel of the layer, filters on the last axis.
      steps: Number of steps.
      learning_rate: Largest change of a weight in one step.

    References:
      Lee et al., A Signal Propagation Perspective for Pruning Neural Networks at
      Initialization, ICLR 2020, section 4.

    Example:
      >>> round(float(approximate_isometry(jnp.full((1, 1), 0.5), 100, 1e-3)[0, 0]), 3)
      0.6
    """
    filters = kernel.shape[-1]
    columns = _wide(kernel).reshape(-1, filters)

    def step(_: int, columns: Array) -> Array:
        residual = columns.T @ columns - jnp.eye(filters, dtype=columns.dtype)
        gradient = 4 / filters**2 * (columns @ residual)
        return columns - learning_rate * gradient / (jnp.abs(gradient) + 1e-8)

    columns = jax.lax.fori_loop(0, steps, step, columns)
    return columns.reshape(kernel.shape).astype(kernel.dtype)


def _draw(initializer: Callable[[float], Any]) -> Recipe:
    def recipe(kernel: Kernel, activation: Activation, key: Any) -> Kernel:
        return initializer(_gain(activation))(key, kernel.shape, kernel.dtype)

    return recipe


def _draw_delta(kernel: Kernel, activation: Activation, key: Any) -> Kernel:
    size = max(kernel.shape[-2:])
    return delta_orthogonalize(kernel, jax.random.normal(key, (size, size)), activation)


_variance = jax.nn.initializers.variance_scaling
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "orthp": lambda kernel, activation, _: orthogonalize(kernel, activation),
        "approximate_isometry": lambda kernel, *_: approximate_isometry(kernel),
        "orthogonal": _draw(jax.nn.initializers.orthogonal),
        "delta_orthogonal": _draw_delta,
        "kaiming": _draw(lambda gain: _variance(gain**2, "fan_in", "normal")),
        "xavier": _draw(lambda gain: _variance(gain**2, "fan_avg", "normal")),
    }
)
"""Reinitialisations by name. ``orthp`` and ``approximate_isometry`` start from the
kernel's weights. The others draw new ones: ``orthogonal`` (Saxe et al. 2014),
``delta_orthogonal``, and normal numbers with the variance of He et al. 2015
(``kaiming``) or Glorot & Bengio 2010 (``xavier``).
"""
_FROM_WEIGHTS = ("orthp", "approximate_isometry")


def reinitialize(
    model: nnx.Module | Any,
    recipe: str | Recipe,
    *,
    layers: Layers = "*",
    activation: Activation = "relu",
    key: PRNGKeyArray | None = None,
) -> Any:
    """Returns the model with reinitialised kernels; biases and norms are kept.

    Args:
      model: NNX module, which is not modified, or pytree of parameters.
      recipe: Name in :data:`RECIPES`, or a function ``(kernel, activation, key)``.
      layers: Layers whose kernels are reinitialised; by default all, including the
        classifier, as in the original.
      activation: Activation that follows the layers, a name in :data:`GAINS`.
      key: PRNG key for the recipes that draw; the draw of a kernel depends only on the
        key and the kernel's name.

    Returns:
      A module of the same class, or a pytree of the same structure.

    Raises:
      TPPError: If the recipe or activation is unknown, a recipe that draws has no key,
        or a pattern matches no kernel.

    Example:
      >>> params = {"dense": {"kernel": 5 * jnp.ones((1, 1)), "bias": jnp.ones(1)}}
      >>> reinitialize(params, "orthp", activation="linear")["dense"]["kernel"]
      Array([[1.]], dtype=float32)
    """
    remake = _find_recipe(recipe, key)
    _gain(activation)
    graphdef, tree = None, model
    if isinstance(model, nnx.Module):
        graphdef, tree = nnx.split(model)
    names = kernels_of(model, layers)

    def fresh(name: str, leaf: Array) -> Array:
        if name not in names or not leaf.size:
            return leaf
        # A number from the name, so that the draw does not depend on other layers.
        own = (
            None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))
        )
        return remake(leaf, activation, own)

    tree = map_named(fresh, tree)
    return tree if graphdef is None else nnx.merge(graphdef, tree)


def kernels_of(
    model: nnx.Module | Any, layers: Layers = "*", skip: Sequence[str] | str = ()
) -> frozenset[str]:
    """Returns the dotted names of some layers' kernels.

    In an NNX module these are kernels of convolutions and dense layers; in a pytree,
    floating-point leaves called ``kernel`` with two or more axes. The name of Linen's
    collection ``params`` is not part of a layer's name.

    Args:
      model: NNX module or pytree of parameters.
      layers: Selection of layers; see :data:`Layers`.
      skip: Patterns of layers to omit.

    Raises:
      TPPError: If a pattern or a plan matches no kernel.

    Example:
      >>> sorted(kernels_of({"a": {"kernel": jnp.eye(2)}, "b": {"kernel": jnp.eye(2)}}))
      ['a.kernel', 'b.kernel']
    """
    by_path = dict(modules(model)) if isinstance(model, nnx.Module) else None
    leaves = named_leaves(nnx.state(model) if by_path is not None else model)
    kernels = {
        name: layer_name(name).removeprefix("params.")
        for name, leaf in leaves.items()
        if name.rpartition(".")[2] == "kernel"
        and jnp.ndim(leaf) >= 2
        and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        and (
            by_path is None
            or isinstance(by_path.get(layer_name(name)), (nnx.Conv, nnx.Linear))
        )
    }
    planned = isinstance(layers, Plan)
    wanted = _planned(kernels, layers) if planned else _matching(kernels, layers)
    return wanted - _matching(kernels, skip)


def _matching(
    kernels: Mapping[str, str], patterns: Sequence[str] | str
) -> frozenset[str]:
    names: set[str] = set()
    for pattern in parse_patterns(patterns):
        matched = {k for k, layer in kernels.items() if fnmatchcase(layer, pattern)}
        if not matched:
            raise TPPError(
                f"the pattern {pattern!r} matches no layer with a kernel; there are "
                f"for example {list(kernels.values())[:5]}"
            )
        names |= matched
    return frozenset(names)


def _planned(kernels: Mapping[str, str], plan: Plan) -> frozenset[str]:
    pruned = {
        member.leaf
        for group in plan.pruned_groups
        for member in group.members
        if member.role != "contracted"
    }
    known = plan.groups.shapes
    names = frozenset(k for k in kernels if longest_known_suffix(k, known) in pruned)
    if not names:
        raise TPPError(
            "the plan prunes no filter of this model's kernels: it is for another "
            "model, or keeps all channels"
        )
    return names


def _find_recipe(recipe: str | Recipe, key: PRNGKeyArray | None) -> Recipe:
    if callable(recipe):
        return recipe
    if recipe not in RECIPES:
        raise TPPError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    if key is None and recipe not in _FROM_WEIGHTS:
        raise TPPError(f"{recipe!r} draws kernels: pass key=jax.random.key(seed)")
    return RECIPES[recipe]


def _gain(activation: Activation) -> float:
    if activation not in GAINS:
        choices = ", ".join(GAINS)
        raise TPPError(f"unknown activation {activation!r}: choose one of {choices}")
    return GAINS[activation]


def _wide(array: Array) -> Array:
    """Returns the array in at least single precision, which QR needs."""
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _signed_q(matrix: Float[Array, "a b"]) -> Float[Array, "a b"]:
    q, r = jnp.linalg.qr(matrix)
    return q * jnp.sign(jnp.diag(r))
