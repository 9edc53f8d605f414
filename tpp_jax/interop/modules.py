"""Modules of other libraries as modules of Flax NNX, for runs."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, cast

import flax.core
import jax
from flax import linen, nnx
from jaxtyping import Array

from tpp_jax import models
from tpp_jax.errors import TPPError
from tpp_jax.interop.equinox_modules import EquinoxModel, is_equinox

_TRAINS = "train", "training", "is_training"
_RESTS = "deterministic", "use_running_average", "inference"


def as_nnx(module: Any, *inputs: Any, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a network as a module of NNX, in training mode.

    Args:
      module: Module of NNX, of which a copy with the same arrays is returned, of Linen
        or of Equinox.
      *inputs: Inputs for a batch of one example, or their shapes and types.
      rngs: Random streams for the weights of a Linen module, and for dropout.

    Raises:
      TPPError: If it is none of these, or an Equinox module with a state.
    """
    if isinstance(module, nnx.Module):
        copy = nnx.merge(*nnx.split(module))  # the user's keeps its mode
        copy.train()
        return copy
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

    If its ``__call__`` has arguments for the mode (``train``, ``training``,
    ``is_training``, ``deterministic``, ``use_running_average`` or ``inference``), this
    module passes them. In training, all collections except the parameters are renewed.

    Args:
      module: Linen module, whose variables are kept if it is bound to some.
      *inputs: Inputs to initialise it with, or their shapes and types.
      rngs: Random streams for the weights, and later for dropout.

    Raises:
      TPPError: The mode of the module cannot be set, or an attribute has no hash.
    """

    def __init__(self, module: linen.Module, *inputs: Any, rngs: nnx.Rngs) -> None:
        given: Any = None
        if module.scope is not None:
            unbound, given = module.unbind()
            module = cast(linen.Module, unbound)
        _check_attributes(module)
        self.modes = _modes_of(module)
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
        if given is not None:
            _put(given, made, bridge)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Array:
        """Applies the Linen module."""
        renewed = () if self.deterministic else self.renewed
        kwargs = self._keywords() | kwargs
        return self.module(*inputs, mutable=[*renewed] or False, **kwargs)

    def _keywords(self) -> dict[str, bool]:
        return {name: self.deterministic == (name in _RESTS) for name in self.modes}


def _modes_of(module: linen.Module) -> tuple[str, ...]:
    """Returns the names of the arguments of a module's call that set its mode."""
    names, known = inspect.signature(module.__call__).parameters, (*_TRAINS, *_RESTS)
    if found := tuple(name for name in known if name in names):
        return found
    if fixed := [name for name in known if name in _attributes(module)]:
        raise TPPError(
            f"{type(module).__name__} has its mode in the attribute {fixed[0]!r}, "
            f"which a run cannot change: make {fixed[0]} an argument of its __call__"
        )
    return ()


def _check_attributes(module: linen.Module) -> None:
    """Raises a TPPError unless programs can be kept by a module's attributes."""
    for name, value in _attributes(module).items():
        try:
            hash(value)
        except TypeError:
            raise TPPError(
                f"the attribute {name!r} of {type(module).__name__} is of type "
                f"{type(value).__name__}, which has no hash: use numbers, texts and "
                "tuples, or make it a variable"
            ) from None


def _attributes(module: linen.Module) -> dict[str, Any]:
    names = [one.name for one in dataclasses.fields(cast(Any, module))]
    return {x: getattr(module, x) for x in names if x not in ("parent", "name")}


def _put(given: Any, made: Any, module: nnx.Module) -> None:
    """Puts the variables that a Linen module is bound to into its bridge.

    Raises:
      TPPError: They are not those of the module.
    """
    given, made = map(flax.core.unfreeze, (given, made))
    ours, theirs = jax.tree.map(jax.numpy.shape, (made, given))
    if ours != theirs:
        raise TPPError(
            "the variables that the Linen module is bound to are not those that its "
            "initialisation makes: bind it to what init returned, or to trained values "
            "of it"
        )
    found = nnx.bridge.variables.linen_vars_to_nnx_attrs(given)
    for name, value in found.items():
        setattr(module, name, value)
