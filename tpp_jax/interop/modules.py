"""Modules of other libraries as modules of Flax NNX, for runs."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx
from jaxtyping import Array

from tpp_jax import models
from tpp_jax.errors import TPPError
from tpp_jax.interop.equinox_modules import EquinoxModel, is_equinox

_TRAINS = "train", "training", "is_training"
_RESTS = "deterministic", "use_running_average", "inference"


def as_nnx(module: Any, *inputs: Any, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a network as a module of NNX.

    Args:
      module: Module of NNX, which is returned as it is, of Linen or of Equinox.
      *inputs: Inputs for a batch of one example, or their shapes and types.
      rngs: Random streams for the weights of a Linen module, and for dropout.

    Raises:
      TPPError: If it is none of these, or an Equinox module with a state.
    """
    if isinstance(module, nnx.Module):
        return module
    if isinstance(module, linen.Module):
        return LinenModel(module, *inputs, rngs=rngs)
    if is_equinox(module):
        return EquinoxModel(module, rngs=rngs)
    raise TPPError(
        f"the model is of type {type(module).__name__}, must be a module of "
        "flax.nnx, flax.linen or equinox"
    )


def as_function(module: nnx.Module) -> Callable[..., Any]:
    """Returns a network in evaluation mode as a pure function of its inputs."""
    graphdef, state = nnx.split(module)

    def apply(*inputs: Any) -> Any:
        model: Any = nnx.merge(graphdef, state, copy=True)
        model.eval()
        return model(*inputs)

    return apply


def name_of(model: nnx.Module) -> str:
    """Returns the name of a network: that of a network of the package, or its class."""
    spec = getattr(model, "spec", None)
    if isinstance(spec, models.ModelSpec):
        return spec.name
    if isinstance(model, EquinoxModel):
        return model.name
    return type(model.linen if isinstance(model, LinenModel) else model).__name__


class LinenModel(nnx.Module):
    """A Linen module with its variables, in the two modes of an NNX module.

    If its ``__call__`` has an argument for the mode (``train``, ``training``,
    ``is_training``, ``deterministic`` or ``use_running_average``), this module passes
    it. In training, all collections except the parameters are renewed.

    Args:
      module: Linen module.
      *inputs: Inputs to initialise it with, or their shapes and types.
      rngs: Random streams for the weights, and later for dropout.
    """

    def __init__(self, module: linen.Module, *inputs: Any, rngs: nnx.Rngs) -> None:
        parameters = inspect.signature(module.__call__).parameters
        names = [name for name in (*_TRAINS, *_RESTS) if name in parameters]
        self.mode = names[0] if names else ""
        self.deterministic = False

        def variables(*inputs: Any) -> Any:
            keywords: dict[str, Any] = self._keywords()
            return module.init(jax.random.key(0), *inputs, **keywords)

        made = jax.eval_shape(variables, *inputs)
        self.renewed = tuple(sorted(set(made) - {"params"}))
        zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), inputs)
        self.linen = module
        bridge = nnx.bridge.ToNNX(module, rngs)
        self.module = bridge.lazy_init(*zeros, **self._keywords())

    def __call__(self, *inputs: Any, **kwargs: Any) -> Array:
        """Applies the Linen module."""
        renewed = () if self.deterministic else self.renewed
        kwargs = self._keywords() | kwargs
        return self.module(*inputs, mutable=[*renewed] or False, **kwargs)

    def _keywords(self) -> dict[str, bool]:
        if not self.mode:
            return {}
        return {self.mode: self.deterministic == (self.mode in _RESTS)}
