"""Reads the recordings of the original PyTorch implementation (tests/golden)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpp_jax.graph.naming import map_named, named_leaves

GOLDEN = pathlib.Path(__file__).parent / "golden"


def from_torch(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames and transposes a PyTorch state dict to our names and layouts."""
    leaves = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight":
            kind = "scale" if tensor.ndim == 1 else "kernel"
            tensor = tensor.transpose(
                {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[tensor.ndim]
            )
        kind = {"running_mean": "mean", "running_var": "var"}.get(kind, kind)
        leaves[f"{layer}.{kind}"] = tensor
    return leaves


def section(recording, prefix: str) -> dict[str, np.ndarray]:
    """Returns the part ``prefix/...`` of a recording as leaves of ours."""
    part = {
        key.removeprefix(f"{prefix}/"): recording[key]
        for key in recording.files
        if key.startswith(f"{prefix}/")
    }
    return from_torch(part)


def with_leaves(model: nnx.Module, leaves: dict[str, np.ndarray], dtype) -> nnx.Module:
    """Returns a model of the same class holding these arrays, all of them used."""
    graphdef, state = nnx.split(model)
    assert named_leaves(state).keys() == leaves.keys()
    state = map_named(lambda name, _: jnp.asarray(leaves[name], dtype), state)
    return nnx.merge(graphdef, state)


def filled(create, seed: int = 0) -> nnx.Module:
    """Returns the model that ``create`` makes, with every array drawn by NumPy.

    Nothing is compiled, which takes most of the time when JAX draws the start. Norms'
    scales, biases and means are random too, so that no channel is like another.
    """
    graphdef, state = nnx.split(nnx.eval_shape(create))
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if name.endswith(".var"):
            array = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            fan_in = np.prod(leaf.shape[:-1])  # 1 for the arrays of one axis
            array = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        return jax.device_put(np.asarray(array, leaf.dtype))

    return nnx.merge(graphdef, map_named(draw, state))
