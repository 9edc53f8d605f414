"""A model without its arrays, kept so that it can be traced again with narrower ones.

Groups are read off a first trace. To verify them, the model is traced again with the
narrower arrays that a plan leaves.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding

from tpp_jax.graph.arrays import fitting
from tpp_jax.graph.bridge import follow_modules
from tpp_jax.graph.fields import (
    Field,
    fields_of_module,
    fields_of_tree,
    set_fields_of_modules,
    set_fields_of_tree,
)
from tpp_jax.graph.functions import (
    Function,
    Structure,
    apart,
    as_function,
    check_module,
    is_array,
    split_module,
)
from tpp_jax.graph.linen import linen_apply, linen_fields
from tpp_jax.graph.nnx_layers import modules
from tpp_jax.graph.tracing import Trace, trace_function


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A model and the inputs that it is traced with.

    Attributes:
      model: Structure of an NNX module, Linen module, or function.
      function: Model as a pure function of a flat list of its abstract parameters.
      form: Structure of the parameter tree.
      tree: Abstract parameter tree of a function, as the user passed it; None for Flax
        modules.
      inputs: Abstract example inputs; those that are not arrays are unchanged.
      kwargs: Keyword arguments, like the inputs.
      met: Attributes of the Linen modules that were called when the model was traced,
        with the classes of the modules.
      rescalings: Plan → what :func:`rescaling.find_rescaling` found for it.
    """

    model: Any
    function: Function
    form: Any
    tree: Any
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    met: dict[Field, type] = dataclasses.field(default_factory=dict)
    rescalings: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, model: Any, params: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> "Source":
        """Creates the source of a model.

        Args:
          model: Model, as in :func:`tpp_jax.channel_groups`.
          params: Its parameters, or None for an NNX module.
          inputs: Example inputs.
          kwargs: Keyword arguments.
        """
        inputs, given = abstract((inputs, dict(kwargs)))
        if isinstance(model, nnx.Module):
            check_module(model, params)
            structure, function = split_module(model)
            function = dataclasses.replace(function, params=abstract(function.params))
            return cls(structure, function, structure.form, None, inputs, given)
        function = as_function(model, params)
        leaves, form = jax.tree.flatten(function.params)
        function = dataclasses.replace(
            function, params=abstract(leaves), call=_of_leaves(function.call, form)
        )
        tree = None if isinstance(model, linen.Module) else abstract(params)
        return cls(model, function, form, tree, inputs, given)

    @property
    def given(self) -> Any:
        """Abstract parameter tree, as the user passed it."""
        if self.tree is not None:
            return self.tree
        return jax.tree.unflatten(self.form, self.function.params)

    def trace(self) -> Trace:
        """Traces the unpruned model."""
        if not isinstance(self.model, linen.Module):
            return trace_function(self.function, self.inputs, self.kwargs)
        made: list[Trace] = []
        found = linen_fields(
            lambda: made.append(
                trace_function(self.function, self.inputs, self.kwargs)
            ),
        )
        self.met.clear()
        self.met.update(found)
        return made[0]

    def trace_cut(self, plan: Any, shapes: Mapping[str, tuple[int, ...]]) -> Trace:
        """Traces the model with narrower arrays.

        Args:
          plan: Plan of the cut.
          shapes: Name of a parameter leaf → its shape after the cut.

        Raises:
          Exception: Any exception that the model raises with arrays of these shapes.
        """
        return trace_function(self.cut(plan, shapes), self.inputs, self.kwargs)

    def cut(
        self,
        plan: Any,
        shapes: Mapping[str, tuple[int, ...]],
        prepare: Callable[[nnx.Module], None] | None = None,
    ) -> Function:
        """Returns the model as a function of narrower arrays.

        Args:
          plan: Plan of the cut.
          shapes: Name of a parameter leaf → its shape after the cut.
          prepare: Function that changes an NNX module in place before it runs.
        """
        # A copy of a parameter in another collection is cut as the parameter is.
        copies = self.function.namesakes
        names = self.function.names
        cut = (shapes[name if name in shapes else copies[name]] for name in names)
        return dataclasses.replace(
            self.function,
            call=self._call_cut(plan, prepare),
            params=_with_shapes(self.function.params, cut),
        )

    def fields(self) -> dict[Field, type]:
        """Finds the integer attributes of the model's modules.

        Returns:
          Attribute → class of the module that has it.
        """
        if isinstance(self.model, Structure):
            return _fields_of_nnx(self.model.merge(self.function.params))
        if isinstance(self.model, linen.Module):
            if not self.met:
                self.trace()
            return dict(self.met)
        return fields_of_tree(self.tree)

    def _call_cut(
        self, plan: Any, prepare: Callable[[nnx.Module], None] | None
    ) -> Callable[..., Any]:
        if isinstance(self.model, Structure):

            def change(found: list[tuple[str, nnx.Module]]) -> None:
                adapt(found, plan)
                if prepare is not None:
                    prepare(found[0][1])

            return self.model.call(change)
        if isinstance(self.model, linen.Module):
            return _of_leaves(linen_apply(self.model, plan), self.form)
        values = plan.field_values()
        _, call = apart(
            self.model, self.tree, lambda tree: set_fields_of_tree(tree, values)
        )
        return _of_leaves(call, self.form)


def _of_leaves(call: Callable[..., Any], form: Any) -> Callable[..., Any]:
    """Converts a function of a parameter tree to one of a flat list of its leaves."""

    def flat(leaves: list[Any], *inputs: Any, **kwargs: Any) -> Any:
        return call(jax.tree.unflatten(form, leaves), *inputs, **kwargs)

    return flat


def adapt(found: list[tuple[str, nnx.Module]], plan: Any) -> None:
    """Sets all attributes of cut NNX modules that are sizes, in place.

    Args:
      found: Modules with their paths.
      plan: Plan of the cut.
    """
    follow_modules(found, plan.kept_blocks, plan.groups.shapes)
    if values := plan.field_values():
        set_fields_of_modules(found, values)


def _fields_of_nnx(root: nnx.Module) -> dict[Field, type]:
    found: dict[Field, type] = {}
    for path, module in modules(root):
        if type(module).__module__.partition(".")[0] != "flax":
            found |= fields_of_module(module, path)
    return found  # Flax's layers follow their arrays


def abstract(tree: Any) -> Any:
    """Returns a tree with the shapes and dtypes of its arrays in their place.

    Other leaves are unchanged. Arrays on a mesh with explicit axes keep their sharding,
    which is part of their type. A NumPy dtype becomes the one that JAX converts it to.
    """
    known: dict[tuple[Any, ...], jax.ShapeDtypeStruct] = {}

    def describe(leaf: Any) -> Any:
        if not is_array(leaf):
            return leaf
        given = isinstance(leaf, jax.ShapeDtypeStruct)
        dtype = leaf.dtype if given else jax.typeof(leaf).dtype
        sharding = getattr(leaf, "sharding", None)
        if _is_explicit(sharding) and not jnp.issubdtype(
            # A random key has the sharding of its data, which has one axis more.
            leaf.dtype,
            jax.dtypes.prng_key,
        ):
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)
        return _struct(known, leaf.shape, dtype)

    return jax.tree.map(describe, tree)


def _is_explicit(sharding: Any) -> bool:
    return isinstance(sharding, NamedSharding) and any(
        axis_type == AxisType.Explicit for axis_type in sharding.mesh.axis_types
    )


def _struct(
    known: dict[tuple[Any, ...], jax.ShapeDtypeStruct],
    shape: tuple[int, ...],
    dtype: Any,
) -> jax.ShapeDtypeStruct:
    """Returns an abstract array, the same for the same shape and dtype.

    A model has many arrays of few shapes, and creating an abstract array is slow.
    """
    key = shape, dtype
    if key not in known:
        known[key] = jax.ShapeDtypeStruct(shape, dtype)
    return known[key]


def _with_shapes(
    leaves: Iterable[jax.ShapeDtypeStruct], shapes: Iterable[tuple[int, ...]]
) -> list[jax.ShapeDtypeStruct]:
    """Returns abstract arrays with other shapes, and their shardings fitted to them."""
    known: dict[tuple[Any, ...], jax.ShapeDtypeStruct] = {}
    found = []
    for leaf, shape in zip(leaves, shapes, strict=True):
        if leaf.shape == shape:
            found.append(leaf)
        elif leaf.sharding is None:
            found.append(_struct(known, shape, leaf.dtype))
        else:
            sharding = fitting(leaf.sharding, shape)
            found.append(jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding))
    return found
