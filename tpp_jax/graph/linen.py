"""Running a Flax Linen module on sliced variables.

A Linen module declares the width of every layer and checks it against the parameters.
Here the arrays decide: existing parameters are used without the check, and the few
sizes that a layer computes with follow them. This is done by intercepting methods
(``flax.linen.intercept_methods``); the module itself is not modified.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import linen, nnx

from tpp_jax.graph.fields import Field, Values, own_fields, with_values
from tpp_jax.graph.nnx_layers import NumGroups, Shape, follow_layer, modules

# Recurrent cell of Flax → the layer in it whose kernel contracts the hidden state.
_RECURRENT = {
    linen.LSTMCell: "hi",
    linen.OptimizedLSTMCell: "hi",
    linen.GRUCell: "hr",
    linen.MGUCell: "hf",
    linen.SimpleCell: "h",
    linen.ConvLSTMCell: "hh",
}


def linen_apply(module: linen.Module, plan: Any = None) -> Callable[..., Any]:
    """Returns ``module.apply`` for variables of any width, without trying it.

    See :func:`tpp_jax.linen_apply`, which tries the plan on the module first.

    Args:
      module: Linen module.
      plan: Plan by which the variables were sliced, or None.
    """
    widths = (
        arrays_decide()
        if plan is None
        else arrays_decide(plan.kept_blocks, plan.groups.shapes, plan.field_values())
    )

    @functools.wraps(module.apply)
    def apply(*args: Any, **kwargs: Any) -> Any:
        with linen.intercept_methods(widths):
            return module.apply(*args, **kwargs)

    return apply


def arrays_decide(
    num_groups: NumGroups = lambda *_: None,
    shapes: Mapping[str, Shape] | None = None,
    values: Values | None = None,
) -> Callable[..., Any]:
    """Returns an interceptor that runs Linen's layers with the widths of their arrays.

    Args:
      num_groups: Function that gives the number of groups of a ``GroupNorm``, see
        :func:`tpp_jax.graph.nnx_layers.follow_layer`.
      shapes: Variable name → its shape before the cut, where known.
      values: Path of a module → name of an attribute → value that it is set to.
    """

    def interceptor(
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: linen.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if module.scope is None:  # a helper without variables, not part of the network
            return method(*args, **kwargs)
        called = context.method_name == "__call__"
        if called and isinstance(module, nnx.bridge.ToLinen):
            kwargs = kwargs | {
                "nnx_method": _following(module, kwargs, num_groups, shapes or {})
            }
        inputs = args[0] if called and args else kwargs.get("inputs")
        with contextlib.ExitStack() as stack:
            # An attribute that setup computes from unpruned numbers is set by itself.
            if values and context.method_name != "setup":
                own = values.get(".".join(module.path), {})
                stack.enter_context(_attributes(module, **with_values(module, own)))
            stack.enter_context(_attributes(module, param=_Param(module)))
            for layer, sizes in _static_sizes(module, inputs, num_groups, shapes or {}):
                stack.enter_context(_attributes(layer, **sizes))
            return method(*args, **kwargs)

    return interceptor


def linen_fields(run: Callable[[], Any]) -> dict[Field, type]:
    """Finds the integer attributes of a model's modules that are not Flax's own.

    Args:
      run: Function that runs the model; the modules that it calls are examined.

    Returns:
      Attribute → class of the module that has it.
    """
    found: dict[Field, type] = {}

    def note(
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: linen.module.InterceptorContext,
    ) -> Any:
        inner = context.module
        own = type(inner).__module__.partition(".")[0] != "flax"
        if own and inner.scope is not None:  # Flax's layers follow their arrays
            path = ".".join(inner.path)
            # vars() includes the attributes that setup sets.
            found.update(own_fields(inner, path, vars(inner)))
        return method(*args, **kwargs)

    with linen.intercept_methods(note):
        run()
    return found


class _Param:
    """Replacement of ``module.param`` that does not check the shape."""

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
    """Sets attributes of a frozen module within a context."""
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
    module: linen.Module,
    inputs: Any,
    num_groups: NumGroups,
    shapes: Mapping[str, Shape],
) -> Iterator[tuple[linen.Module, dict[str, Any]]]:
    """Yields layers and the sizes that they compute with, as in their arrays."""
    if isinstance(module, linen.GroupNorm):
        if sizes := _group_norm(module, num_groups, shapes):
            yield module, sizes
    elif isinstance(module, linen.RNN):
        cell = module.cell
        if cell.scope is not None and (features := _hidden_features(cell, shapes)):
            yield cell, {"features": features}
    elif sizes := _kernel_sizes(module, inputs):
        yield module, sizes


def _kernel_sizes(module: linen.Module, inputs: Any) -> dict[str, Any]:
    """Returns the sizes that a layer computes with and that its kernel determines."""
    with_kernel = linen.Conv | linen.DenseGeneral | linen.Einsum
    kernel = _shape(module, "kernel") if isinstance(module, with_kernel) else None
    match module:
        case linen.Conv(feature_group_count=groups) if groups > 1:
            if kernel and inputs is not None and kernel[-2]:
                groups = inputs.shape[-1] // kernel[-2]
                return {"feature_group_count": groups, "features": kernel[-1]}
        case linen.DenseGeneral(features=features) if kernel:
            alone = isinstance(features, int)
            last = kernel[-1] if alone else kernel[len(kernel) - len(features) :]
            return {"features": last}
        case linen.MultiHeadDotProductAttention():
            # By default it divides the width of its input by the number of heads.
            if query := _shape(module, "query", "kernel"):
                *_, heads, size = query
                return {"num_heads": heads, "qkv_features": heads * size}
        case linen.Einsum() if kernel:
            return {"shape": kernel}
        case linen.Embed():
            if table := _shape(module, "embedding"):
                return {"num_embeddings": table[0], "features": table[1]}
    return {}


def _shape(module: linen.Module, *path: str) -> Shape | None:
    """Returns the shape of a module's parameter, None if there is no such parameter."""
    if module.scope is None:
        return None
    value = module.scope.get_variable("params", path[0])
    for key in path[1:]:
        value = value.get(key) if isinstance(value, Mapping) else None
    value = linen.meta.unbox(value)
    return None if value is None else tuple(value.shape)


def _group_norm(
    module: linen.GroupNorm, num_groups: NumGroups, shapes: Mapping[str, Shape]
) -> dict[str, Any]:
    array = "scale" if module.use_scale else "bias"
    leaf = ".".join((*module.path, array))
    old = module.num_groups
    if old is None and leaf in shapes and module.group_size:
        old = shapes[leaf][-1] // module.group_size
    number = num_groups(leaf, old) if old else None
    return {} if number is None else {"num_groups": number, "group_size": None}


def _hidden_features(
    cell: linen.RNNCellBase, shapes: Mapping[str, Shape]
) -> int | None:
    """Returns the width of a cell's state, which its recurrent kernels contract.

    A user's cell is taken to be like Flax's only if that was so before the cut: if it
    has kernels with the names of Flax's that contracted its ``features``.
    """
    if name := _RECURRENT.get(type(cell)):
        kernel = _shape(cell, name, "kernel")
        return kernel[-2] if kernel else None
    old = getattr(cell, "features", None)
    for name in dict.fromkeys(_RECURRENT.values()):
        before = shapes.get(".".join((*cell.path, name, "kernel")), ())
        kernel = _shape(cell, name, "kernel")
        if kernel and len(before) > 1 and before[-2] == old:
            return kernel[-2]
    return None


def _following(
    module: nnx.bridge.ToLinen,
    kwargs: Mapping[str, Any],
    num_groups: NumGroups,
    shapes: Mapping[str, Shape],
) -> Callable[..., Any]:
    """Returns a method for ``ToLinen`` to call on its NNX module.

    ``ToLinen`` creates the module, sets its arrays and calls the method. This method
    first sets the sizes of the module's layers to those of the arrays.
    """
    method = kwargs.get("nnx_method") or "__call__"
    prefix = "".join(f"{part}." for part in module.path)
    own = {
        name.removeprefix(prefix): shape
        for name, shape in shapes.items()
        if name.startswith(prefix)
    }

    def call(made: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        for path, layer in modules(made):
            follow_layer(layer, path, lambda leaf, n: num_groups(prefix + leaf, n), own)
        function = getattr(type(made), method) if isinstance(method, str) else method
        return function(made, *args, **kwargs)

    return call
