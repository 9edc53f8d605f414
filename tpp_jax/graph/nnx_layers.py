"""The sizes that layers of Flax NNX have as attributes, next to their arrays.

A layer of NNX stores the widths that it was created with as plain integers. Some layers
compute with them, and users read them, so after a cut they have to be set to the sizes
of the arrays. The functions here compute them for each type of layer.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx
from flax.core import FrozenDict

Shape = tuple[int, ...]
NumGroups = Callable[[str, int], int | None]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer as it is, or as it was before the cut.

    Attributes:
      module: Layer.
      find_shape: Function from the name of an array to its shape, ``None`` if the layer
        has no such array.
      groups: Function from the name of an array and its old number of groups to the
        number of groups that its last axis has, ``None`` if that is not known.
    """

    module: nnx.Module
    find_shape: Callable[[str], Shape | None]
    groups: NumGroups

    def shape(self, name: str) -> Shape:
        """Returns the shape of one of its arrays.

        Raises:
          KeyError: The layer has no such array.
        """
        if (found := self.find_shape(name)) is None:
            raise KeyError(name)
        return found

    def last(self, *names: str) -> int | None:
        """Returns the length of the last axis of the first array that exists."""
        found = [shape for name in names if (shape := self.find_shape(name))]
        return found[0][-1] if found else None


def modules(root: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yields a module and all modules in it with their dotted paths, each once.

    A module that occurs in two places has the path that its arrays have in the model's
    ``nnx.state``: the first in the order of the names.

    ``nnx.iter_modules`` also visits every variable and takes fourteen times as long,
    which would be a tenth of the time to find a network's groups.
    """
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        container = _container(type(node))
        if container == "module":
            yield path, node
        ordered = container == "sequence"
        node = vars(node) if container in ("module", "pytree") else node
        items = enumerate(node) if ordered else node.items()
        inside = [(key, value) for key, value in items if _container(type(value))]
        if ordered:
            inside.reverse()
        elif len(inside) > 1:
            inside.sort(key=lambda item: _by_number_or_name(item[0]), reverse=True)
        stack += [
            (f"{path}.{key}" if path else str(key), value) for key, value in inside
        ]


@functools.cache
def _container(of: type) -> str:
    """Returns how values of a type contain modules, ``""`` if they contain none."""
    if issubclass(of, nnx.Pytree):
        return "module" if issubclass(of, nnx.Module) else "pytree"
    if issubclass(of, (list, tuple)):
        return "sequence"
    return "mapping" if issubclass(of, dict) else ""


def _by_number_or_name(key: Any) -> tuple[bool, int, str]:
    """Returns the place of a key in NNX's order; the keys of ``nnx.List`` are text."""
    text = str(key)
    return (False, int(text), "") if text.isdecimal() else (True, 0, text)


def follow_layer(
    module: nnx.Module,
    path: str,
    num_groups: NumGroups,
    shapes: Mapping[str, Shape] | None = None,
) -> None:
    """Sets the sizes of a layer of Flax to those of its arrays, in place.

    Args:
      module: Layer whose arrays have other widths than those that it was created with;
        modules of other classes are not changed.
      path: Path of the layer in its model.
      num_groups: Function ``num_groups(leaf, number)`` from the name of an array and
        its old number of groups to the number of groups that its last axis has now, or
        ``None`` if that is not known. Arrays do not determine these numbers: those of a
        ``GroupNorm``, by the name of its scale, and of a grouped convolution, by the
        name of its kernel. For a norm without arrays it gives the number of features,
        by the norm's name and ``num_features``.
      shapes: Array name → its shape before the cut. If given, only sizes that agreed
        with the arrays before the cut are set: in a user's class an attribute of the
        same name may mean something else.
    """
    if not _is_known(type(module)):
        return
    known = shapes or {}

    def named(array: str) -> str:
        return f"{path}.{array}" if path else array

    def now(array: str) -> Shape | None:
        found: Any = module
        for part in array.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nnx.Variable):  # its shape, without NNX's checks
            found = found.get_raw_value()
        return None if found is None else tuple(found.shape)

    def before(array: str) -> Shape | None:
        return None if now(array) is None else known[named(array)]

    def groups(array: str, number: int) -> int | None:
        return num_groups(named(array), number)

    sizes = _known_sizes(_Layer(module, now, groups))
    old = _known_sizes(_Layer(module, before, lambda _, number: number))
    for name, size in sizes.items():
        own = getattr(module, name, old.get(name))
        if size is not None and own not in (None, size) and old.get(name, own) == own:
            if name in vars(module):  # it remains a number: NNX's checks can be skipped
                vars(module)[name] = size
            else:
                setattr(module, name, size)


def _known_sizes(layer: _Layer) -> dict[str, Any]:
    """Returns the sizes of a layer, none if they cannot be found.

    The layer may be of a user's class with other arrays than its parent class; or its
    earlier shapes may not be known, as with an array that two layers share and that is
    named by the other layer.
    """
    try:
        return _sizes(layer)
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def _sizes(layer: _Layer) -> dict[str, Any]:
    """Returns the sizes of a layer of Flax, by attribute, as its arrays have them.

    Axes are counted from the end, since a layer under ``nnx.vmap`` has more in front.
    """
    for types, sizes in _SIZES.items():
        if isinstance(layer.module, types):
            return sizes(layer)
    return {}


def _dense_sizes(layer: _Layer) -> dict[str, Any]:
    shape = layer.shape
    match module := layer.module:
        case nnx.Linear():
            inputs, outputs = shape("kernel")[-2:]
            return {"in_features": inputs, "out_features": outputs}
        case nnx.LinearGeneral():
            batch, inputs, outputs = _last_parts(
                shape("kernel"),
                len(module.batch_axis),
                len(module.in_features),
                len(module.out_features),
            )
            return {
                "in_features": inputs,
                "out_features": outputs,
                "batch_axis": FrozenDict(zip(module.batch_axis, batch, strict=True)),
            }
        case nnx.Einsum():
            bias, own = layer.find_shape("bias"), module.bias_shape
            return {
                "kernel_shape": shape("kernel")[-len(module.kernel_shape) :],
                "bias_shape": bias and own and bias[-len(own) :],
            }
        case nnx.Embed():
            number, features = shape("embedding")[-2:]
            return {"num_embeddings": number, "features": features}
        case nnx.LoRA():
            return {
                "in_features": shape("lora_a")[-2],
                "out_features": shape("lora_b")[-1],
            }
    return {}


def _convolution_sizes(layer: _Layer) -> dict[str, Any]:
    match module := layer.module:
        case nnx.Conv():
            kernel = layer.shape("kernel")[-len(module.kernel_shape) :]
            groups = _conv_groups(module, layer)
            return {
                "kernel_shape": kernel,
                "in_features": kernel[-2] * groups,
                "out_features": kernel[-1],
                "feature_group_count": groups,
            }
        case nnx.ConvTranspose():
            kernel = layer.shape("kernel")[-len(module.kernel_shape) :]
            inputs, outputs = kernel[-2:]
            if module.transpose_kernel:
                inputs, outputs = outputs, inputs
            return {
                "kernel_shape": kernel,
                "in_features": inputs,
                "out_features": outputs,
            }
    return {}


def _norm_sizes(layer: _Layer) -> dict[str, Any]:
    match module := layer.module:
        case nnx.BatchNorm():
            return {"num_features": layer.last("mean")}
        case nnx.LayerNorm() | nnx.RMSNorm() | nnx.InstanceNorm():
            width = layer.last("scale", "bias")
            if width is None:  # it has no arrays
                width = layer.groups("num_features", module.num_features)
            return {"num_features": width}
        case nnx.GroupNorm() if width := layer.last("scale", "bias"):
            array = "scale" if layer.find_shape("scale") else "bias"
            number = layer.groups(array, module.num_groups) or module.num_groups
            return {
                "num_features": width,
                "num_groups": number,
                "group_size": width // number,
            }
    return {}


def _attention_sizes(layer: _Layer) -> dict[str, Any]:
    inputs, heads, size = layer.shape("query.kernel")[-3:]
    kv_inputs, kv_heads, _ = layer.shape("key.kernel")[-3:]
    return {
        "in_features": inputs,
        "in_kv_features": kv_inputs,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": size,
        "qkv_features": heads * size,
        "out_features": layer.shape("out.kernel")[-1],
    }


def _cell_sizes(layer: _Layer) -> dict[str, Any]:
    plain = isinstance(layer.module, nnx.LSTMCell)
    inputs, state = ("ii", "hi") if plain else ("dense_i", "dense_h")
    return {
        "in_features": layer.shape(f"{inputs}.kernel")[-2],
        "hidden_features": layer.shape(f"{state}.kernel")[-2],
    }


_SIZES: dict[tuple[type, ...], Callable[[_Layer], dict[str, Any]]] = {
    (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Embed, nnx.LoRA): _dense_sizes,
    (nnx.Conv, nnx.ConvTranspose): _convolution_sizes,
    (
        nnx.BatchNorm,
        nnx.LayerNorm,
        nnx.RMSNorm,
        nnx.InstanceNorm,
        nnx.GroupNorm,
    ): _norm_sizes,
    (nnx.MultiHeadAttention,): _attention_sizes,
    (nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell): _cell_sizes,
}


@functools.cache
def _is_known(of: type) -> bool:
    """Reports whether the sizes of a class's layers are known."""
    return any(issubclass(of, types) for types in _SIZES)


def _conv_groups(module: nnx.Conv, layer: _Layer) -> int:
    old = module.feature_group_count
    if old == 1:
        return 1
    if (number := layer.groups("kernel", old)) is not None:
        return number
    *_, contracted, produced = layer.shape("kernel")
    depthwise = contracted == 1 and module.in_features == old
    return produced * old // module.out_features if depthwise else old


def _last_parts(shape: Shape, *lengths: int) -> list[Shape]:
    """Splits off parts of the given lengths at the end of a shape."""
    ends = [len(shape) - sum(lengths[i:]) for i in range(len(lengths) + 1)]
    return [shape[i:j] for i, j in itertools.pairwise(ends)]
