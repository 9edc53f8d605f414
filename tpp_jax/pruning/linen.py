"""Running a Flax Linen module on sliced variables.

Linen declares the width of every layer in the module, and checks it against the
parameters. Here the arrays decide: a parameter that is there is taken as it is, and the
few sizes that a layer computes with follow it. Methods are intercepted for that
(``flax.linen.intercept_methods``); the module itself is left untouched.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from flax import linen

from tpp_jax.pruning.fields import Field, is_size


def linen_apply(module: linen.Module, plan: Any = None) -> Callable[..., Any]:
    """Returns ``module.apply`` for variables of any width.

    Args:
      module: a Linen module; for the variables that it was made with, the result is
        that of ``module.apply``.
      plan: the plan that the variables were sliced by; only a ``GroupNorm`` needs it,
        to tell fewer groups from smaller ones.

    Returns:
      A function with the arguments of ``module.apply``, for sliced variables too.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> module = linen.Sequential([linen.Dense(8), linen.relu, linen.Dense(2)])
      >>> variables = module.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> small = jax.tree.map(lambda x: x, variables)
      >>> first, last = small["params"]["layers_0"], small["params"]["layers_2"]
      >>> first.update(kernel=first["kernel"][:, :5], bias=first["bias"][:5])
      >>> last.update(kernel=last["kernel"][:5])
      >>> linen_apply(module)(small, jnp.ones((1, 4))).shape
      (1, 2)
    """

    @functools.wraps(module.apply)
    def apply(*args: Any, **kwargs: Any) -> Any:
        with linen.intercept_methods(functools.partial(_follow_arrays, plan)):
            return module.apply(*args, **kwargs)

    return apply


def _follow_arrays(
    plan: Any,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: linen.module.InterceptorContext,
) -> Any:
    module = context.module
    with contextlib.ExitStack() as stack:
        values = plan.field_values() if plan is not None else {}
        if values and module.scope is not None:
            own = values.get(".".join(module.path), {})
            stack.enter_context(_attributes(module, **own))
        stack.enter_context(_attributes(module, param=_Param(module)))
        for layer, sizes in _static_sizes(module, plan):
            stack.enter_context(_attributes(layer, **sizes))
        return method(*args, **kwargs)


def linen_fields(module: linen.Module, run: Callable[[], Any]) -> list[Field]:
    """Lists the whole numbers among the fields of a model's own Linen modules.

    Args:
      module: the model.
      run: runs the model; the modules that it meets are looked at.
    """
    found: dict[tuple[str, str], Field] = {}

    def note(
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: linen.module.InterceptorContext,
    ) -> Any:
        inner = context.module
        own = type(inner).__module__.partition(".")[0] != "flax"
        if own and inner.scope is not None:  # those of Flax follow their arrays
            path = ".".join(inner.path)
            for field in dataclasses.fields(inner):
                value = getattr(inner, field.name, None)
                if is_size(value):
                    found[path, field.name] = Field(path, field.name, value)
        return method(*args, **kwargs)

    with linen.intercept_methods(note):
        run()
    return list(found.values())


class _Param:
    """Takes the place of ``module.param``, without the check of the shape."""

    def __init__(self, module: linen.Module) -> None:
        self.module = module

    def __call__(
        self,
        name: str,
        init: Callable[..., Any],
        *args: Any,
        unbox: bool = True,
        **kwargs: Any,
    ) -> Any:
        if not self.module.has_variable("params", name):
            create = linen.Module.param
            return create(self.module, name, init, *args, unbox=unbox, **kwargs)
        value = self.module.get_variable("params", name)
        return linen.meta.unbox(value) if unbox else value


@contextlib.contextmanager
def _attributes(module: linen.Module, **values: Any) -> Iterator[None]:
    """Sets attributes of a module, which are frozen to its user, for a while."""
    before = {name: vars(module)[name] for name in values if name in vars(module)}
    for name, value in values.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                object.__setattr__(module, name, before[name])
            else:
                object.__delattr__(module, name)


def _static_sizes(
    module: linen.Module, plan: Any
) -> Iterator[tuple[linen.Module, dict[str, Any]]]:
    """Yields layers and the sizes that they compute with, as their arrays have them."""
    own = linen.meta.unbox(module.variables.get("params", {}))
    match module:
        case linen.Conv(feature_group_count=groups) if groups > 1 and "kernel" in own:
            *_, contracted, produced = own["kernel"].shape
            if contracted == 1:  # depthwise: the groups are the channels
                groups = produced * groups // module.features
            yield module, {"feature_group_count": groups, "features": produced}
        case linen.DenseGeneral(features=tuple(features)) if "kernel" in own:
            yield module, {"features": own["kernel"].shape[-len(features) :]}
        case linen.GroupNorm(num_groups=groups) if groups and plan is not None:
            scale = ".".join((*module.path, "scale"))
            yield module, {"num_groups": plan.kept_blocks(scale, groups)}
        case linen.RNN(cell=cell) if cell.scope is not None:
            recurrent = [
                layer["kernel"]
                for name, layer in cell.variables.get("params", {}).items()
                if name.startswith("h")
            ]
            if recurrent:
                yield cell, {"features": recurrent[0].shape[0]}
