"""NNX models with layers of NNX and with Linen modules among them.

A Linen module in an NNX module (``nnx.bridge.ToNNX``) declares its own widths. In a
pruned model it runs with those of its arrays.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard, cast

import jax
from flax import linen, nnx

from tpp_jax.graph.functions import is_array, set_evaluation
from tpp_jax.graph.linen import arrays_decide
from tpp_jax.graph.naming import named_leaves
from tpp_jax.graph.nnx_layers import NumGroups, Shape, follow_layer, modules

# Array name → pairs of a number of groups that it may have had and the number left.
_Kept = tuple[tuple[str, tuple[tuple[int, int], ...]], ...]


class SlicedToNNX(nnx.bridge.ToNNX):
    """A Linen module in an NNX module that runs with the widths of its arrays.

    Attributes:
      to_nnx__kept: Numbers of groups of each ``GroupNorm``, which its arrays do not
        determine: array name, and pairs of the number that the module declares and the
        number that is left.
    """

    to_nnx__kept: _Kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module, with the arguments of its own ``__call__``."""
        kept = {name: dict(numbers) for name, numbers in self.to_nnx__kept}
        decide = arrays_decide(lambda leaf, n: kept.get(leaf, {}).get(n))
        with linen.intercept_methods(decide):
            return super().__call__(*args, **kwargs)


def follow_arrays(
    model: nnx.Module,
    num_groups: NumGroups,
    shapes: Mapping[str, Shape] | None = None,
) -> None:
    """Sets the sizes of all Flax layers in a model to those of their arrays, in place.

    Args:
      model: Model whose arrays have other widths than those that it was created with.
      num_groups: See :func:`tpp_jax.graph.nnx_layers.follow_layer`.
      shapes: Array name → its shape before the cut; Linen modules in the model need it.
    """
    follow_modules(modules(model), num_groups, shapes)


def follow_modules(
    found: Iterable[tuple[str, nnx.Module]],
    num_groups: NumGroups,
    shapes: Mapping[str, Shape] | None = None,
) -> None:
    """Does what :func:`follow_arrays` does, for modules with their paths."""
    for path, module in found:
        follow_layer(module, path, num_groups, shapes)
        if shapes and isinstance(module, nnx.bridge.ToNNX):
            _follow_linen(module, f"{path}." if path else "", num_groups, shapes)


def follow_inputs(model: nnx.Module, *inputs: Any, **kwargs: Any) -> None:
    """Sets ``num_features`` of the norms that have no arrays, in place.

    Such a norm computes only with the width of its input, which is found by running
    the model abstractly. A model without such a norm is not run.

    Args:
      model: Pruned model, all of whose other sizes are those of its arrays.
      *inputs: Example inputs of the model, as arrays or ``jax.ShapeDtypeStruct``.
      **kwargs: Keyword arguments of the model, like ``inputs``.
    """
    if not any(_is_bare_norm(module) for _, module in modules(model)):
        return
    widths: dict[str, int] = {}
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten((inputs, kwargs))
    arrays = [leaf for leaf in leaves if is_array(leaf)]

    def run(state: Any, arrays: list[Any]) -> Any:
        copy = nnx.merge(graphdef, state)
        set_evaluation(copy)
        for path, module in modules(copy):
            if _is_bare_norm(module):
                module.promote_dtype = _noting(widths, path, module.promote_dtype)
        given = iter(arrays)
        combined = [next(given) if is_array(leaf) else leaf for leaf in leaves]
        inputs, kwargs = jax.tree.unflatten(structure, combined)
        return jax.tree.leaves(copy(*inputs, **kwargs))

    jax.eval_shape(run, state, arrays)
    for path, module in modules(model):
        if (
            path in widths
            and _is_bare_norm(module)
            and module.num_features != widths[path]
        ):
            module.num_features = widths[path]


_Norm = nnx.LayerNorm | nnx.RMSNorm | nnx.InstanceNorm


def _is_bare_norm(module: nnx.Module) -> TypeGuard[_Norm]:
    """Reports whether a module is a norm over its last axis that has no arrays."""
    return (
        isinstance(module, _Norm)
        and module.feature_axes == -1
        and module.scale is None
        and getattr(module, "bias", None) is None
    )


def _noting(widths: dict[str, int], path: str, promote: Any) -> Any:
    """Returns a norm's ``promote_dtype`` that records the width of the norm's input."""

    def promote_dtype(arrays: tuple[Any, ...], /, **kwargs: Any) -> Any:
        widths[path] = arrays[0].shape[-1]
        return promote(arrays, **kwargs)

    return promote_dtype


def _follow_linen(
    module: nnx.bridge.ToNNX,
    prefix: str,
    num_groups: NumGroups,
    shapes: Mapping[str, Shape],
) -> None:
    now = {name: leaf.shape for name, leaf in named_leaves(nnx.state(module)).items()}
    before = {name: shapes.get(prefix + name, shape) for name, shape in now.items()}
    if before == now:
        return
    kept = dict(getattr(module, "to_nnx__kept", ()))
    for name, shape in before.items():
        layer, _, array = name.rpartition(".")
        norm = array in ("scale", "bias") and f"{layer}.kernel".strip(".") not in now
        if norm and len(shape) == 1 and shape != now[name]:
            width = shape[0]
            divisors = [(n, n) for n in range(1, width + 1) if width % n == 0]
            left = [
                (declared, num_groups(prefix + name, n))
                for declared, n in kept.get(name, divisors)
            ]
            kept[name] = tuple((n, number) for n, number in left if number is not None)
    object.__setattr__(module, "__class__", SlicedToNNX)
    cast(SlicedToNNX, module).to_nnx__kept = tuple(kept.items())


def group_counts(model: nnx.Module) -> dict[str, Any]:
    """Returns the sizes in a model that its arrays do not determine.

    These are numbers of groups, and the widths of norms without arrays.

    Returns:
      Layer path → number; for a layer of a Linen module in the model, a dict from the
      number that it declares (as text) to the number that is left. It can be written
      as JSON.
    """
    counts: dict[str, Any] = {}
    for path, module in modules(model):
        match module:
            case nnx.GroupNorm(num_groups=number):
                counts[path] = number
            case nnx.Conv(feature_group_count=number) if number > 1:
                counts[path] = number
            case _ if _is_bare_norm(module):
                counts[path] = module.num_features
            case SlicedToNNX(to_nnx__kept=kept):
                for name, numbers in kept:
                    layer = f"{path}.{name}".strip(".").rpartition(".")[0]
                    counts[layer] = {str(n): left for n, left in numbers}
    return counts


def counted_groups(counts: Mapping[str, Any]) -> NumGroups:
    """Returns a ``num_groups`` function that looks up :func:`group_counts`."""

    def num_groups(leaf: str, number: int) -> int | None:
        found = counts.get(leaf.rpartition(".")[0])
        return found.get(str(number)) if isinstance(found, Mapping) else found

    return num_groups
