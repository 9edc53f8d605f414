"""NNX models as they are written: their layers, and Linen modules among them.

A Linen module inside an NNX one (``nnx.bridge.ToNNX``) declares its own widths. In a
pruned model it is run with those of its arrays.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen, nnx

from tpp_jax.graph.functions import is_array, set_evaluation
from tpp_jax.graph.linen import arrays_decide
from tpp_jax.graph.naming import named_leaves
from tpp_jax.graph.nnx_layers import NumGroups, Shape, follow_layers, modules

# Array name → how many of n groups its channels fall into, for every n they could.
_Kept = tuple[tuple[str, tuple[tuple[int, int], ...]], ...]


class SlicedToNNX(nnx.bridge.ToNNX):
    """A Linen module inside an NNX one, run with the widths of its arrays.

    Attributes:
      to_nnx__kept: what the arrays do not tell, the numbers of groups of a
        ``GroupNorm``: array name, and pairs of the number that the module declares and
        the number that is left.
    """

    to_nnx__kept: _Kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kept = {name: dict(numbers) for name, numbers in self.to_nnx__kept}
        decide = arrays_decide(lambda leaf, n: kept.get(leaf, {}).get(n))
        with linen.intercept_methods(decide):
            return super().__call__(*args, **kwargs)


def follow_arrays(
    model: nnx.Module,
    num_groups: NumGroups,
    shapes: Mapping[str, Shape] | None = None,
) -> None:
    """Makes all layers of Flax in a model fit their arrays, in place.

    Args:
      model: with arrays of other widths than it was made with.
      num_groups: see :func:`tpp_jax.graph.nnx_layers.follow_layers`.
      shapes: array name → its shape before the cut; needed for Linen modules inside.
    """
    follow_layers(model, num_groups, shapes)
    for path, module in modules(model):
        if shapes and isinstance(module, nnx.bridge.ToNNX):
            _follow_linen(module, f"{path}." if path else "", num_groups, shapes)


def follow_inputs(model: nnx.Module, *inputs: Any, **kwargs: Any) -> None:
    """Sets ``num_features`` of the norms that have no arrays, in place.

    Such a norm computes with the width of its input alone, which is found by running
    the model abstractly. Nothing is run where there is no such norm.

    Args:
      model: as pruned, with all other sizes following its arrays.
      *inputs: example inputs, arrays or ``jax.ShapeDtypeStruct``, as the model takes
        them.
      **kwargs: keyword arguments of the same kinds.
    """
    if not any(_is_bare(module) for _, module in modules(model)):
        return
    widths: dict[str, int] = {}
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten((inputs, kwargs))
    arrays = [leaf for leaf in leaves if is_array(leaf)]

    def run(state: Any, arrays: list[Any]) -> Any:
        copy = nnx.merge(graphdef, state)
        set_evaluation(copy)
        for path, module in modules(copy):
            if _is_bare(module):
                module.promote_dtype = _noting(widths, path, module.promote_dtype)
        given = iter(arrays)
        whole = [next(given) if is_array(leaf) else leaf for leaf in leaves]
        inputs, kwargs = jax.tree.unflatten(structure, whole)
        return jax.tree.leaves(copy(*inputs, **kwargs))

    jax.eval_shape(run, state, arrays)
    for path, module in modules(model):
        if path in widths and module.num_features != widths[path]:
            module.num_features = widths[path]


def _is_bare(module: nnx.Module) -> bool:
    """Tells whether a module is a norm over its last axis that has no arrays."""
    norms = (nnx.LayerNorm, nnx.RMSNorm, nnx.InstanceNorm)
    return (
        isinstance(module, norms)
        and module.feature_axes == -1
        and module.scale is None
        and getattr(module, "bias", None) is None
    )


def _noting(widths: dict[str, int], path: str, promote: Any) -> Any:
    """Returns a norm's ``promote_dtype`` that notes the width of the norm's input."""

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
    module.to_nnx__kept = tuple(kept.items())


def group_counts(model: nnx.Module) -> dict[str, Any]:
    """Returns the numbers in a model that its arrays do not tell.

    They are the numbers of groups, and the widths of norms without arrays.

    Returns:
      Layer path → number, or for the layers of a Linen module inside → a dict from the
      number that it declares (as text) to the number that is left; JSON-ready.
    """
    counts: dict[str, Any] = {}
    for path, module in modules(model):
        match module:
            case nnx.GroupNorm(num_groups=number):
                counts[path] = number
            case nnx.Conv(feature_group_count=number) if number > 1:
                counts[path] = number
            case nnx.Module() if _is_bare(module):
                counts[path] = module.num_features
            case SlicedToNNX(to_nnx__kept=kept):
                for name, numbers in kept:
                    layer = f"{path}.{name}".strip(".").rpartition(".")[0]
                    counts[layer] = {str(n): left for n, left in numbers}
    return counts


def counted_groups(counts: Mapping[str, Any]) -> NumGroups:
    """Returns a ``num_groups`` that answers from :func:`group_counts`."""

    def num_groups(leaf: str, number: int) -> int | None:
        found = counts.get(leaf.rpartition(".")[0])
        return found.get(str(number)) if isinstance(found, Mapping) else found

    return num_groups
