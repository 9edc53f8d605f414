"""The sizes that the layers of Flax NNX keep next to their arrays.

A layer of NNX keeps the widths that it was made with as plain integers. Some compute
with them, all show them to their users: after a cut they have to be those of the
arrays. They are in the table here, by type.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from flax import nnx
from flax.core import FrozenDict

Shape = tuple[int, ...]
NumGroups = Callable[[str, int], int | None]


class _Layer(NamedTuple):
    """What the table asks of a layer, as it is or as it was before the cut.

    Attributes:
      module: the layer.
      shape: ``shape("kernel")``, the shape of one of its arrays, ``None`` if it has no
        such array.
      groups: ``groups("kernel", n)``, how many of n groups the last axis of an array
        has, ``None`` if that is not known.
    """

    module: nnx.Module
    shape: Callable[[str], Shape | None]
    groups: NumGroups

    def last(self, *names: str) -> int | None:
        """Returns the length of the last axis of the first array that exists."""
        found = [shape for name in names if (shape := self.shape(name))]
        return found[0][-1] if found else None


def follow_layers(
    model: nnx.Module,
    num_groups: NumGroups,
    shapes: Mapping[str, Shape] | None = None,
) -> None:
    """Sets the static sizes of all layers of Flax to what their arrays say, in place.

    Args:
      model: with arrays of other widths than it was made with.
      num_groups: ``num_groups(leaf, number)`` gives the number of groups that the last
        axis of an array falls into, which the array does not tell: those of a
        ``GroupNorm``, by its scale's name, or of a grouped convolution, by its
        kernel's. Given are the array's name and the old number; ``None`` is returned
        where it is not known. A norm without arrays asks in the same way how many
        features it has, by its name and ``num_features``.
      shapes: array name → its shape before the cut. If given, only sizes that agreed
        with the arrays before are set: a class of one's own may mean something else.
    """
    for path, module in modules(model):
        if _is_known(type(module)):
            _follow_own_arrays(module, path, num_groups, shapes or {})


def modules(root: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yields a module and all inside it with their dotted paths, each once.

    A module that is found in two places has the path that its arrays have in the
    model's ``nnx.state``: the first in the order of the names.

    ``nnx.iter_modules`` looks at every variable too and takes fourteen times as long,
    which would be a tenth of the time to find a network's groups.
    """
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        kind = _kind(type(node))
        if kind == "module":
            yield path, node
        ordered = kind == "sequence"
        node = vars(node) if kind in ("module", "pytree") else node
        items = enumerate(node) if ordered else node.items()
        inside = [(key, value) for key, value in items if _kind(type(value))]
        if ordered:
            inside.reverse()
        elif len(inside) > 1:
            inside.sort(key=lambda item: _by_number_or_name(item[0]), reverse=True)
        stack += [
            (f"{path}.{key}" if path else str(key), value) for key, value in inside
        ]


@functools.cache
def _kind(of: type) -> str:
    """Returns what a value of a type may hold modules as, ``""`` if it holds none."""
    if issubclass(of, nnx.Pytree):
        return "module" if issubclass(of, nnx.Module) else "pytree"
    if issubclass(of, (list, tuple)):
        return "sequence"
    return "mapping" if issubclass(of, dict) else ""


def _by_number_or_name(key: Any) -> tuple[bool, int, str]:
    """Sorts the keys of an NNX node as NNX does: ``nnx.List`` keeps numbers as text."""
    text = str(key)
    return (False, int(text), "") if text.isdecimal() else (True, 0, text)


def _follow_own_arrays(
    module: nnx.Module, path: str, num_groups: NumGroups, shapes: Mapping[str, Shape]
) -> None:
    def named(array: str) -> str:
        return f"{path}.{array}" if path else array

    def now(array: str) -> Shape | None:
        found: Any = module
        for part in array.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nnx.Variable):  # its shape, without a look at its rights
            found = found.get_raw_value()
        return None if found is None else tuple(found.shape)

    def before(array: str) -> Shape | None:
        return None if now(array) is None else shapes[named(array)]

    def groups(array: str, number: int) -> int | None:
        return num_groups(named(array), number)

    sizes = _known_sizes(_Layer(module, now, groups))
    old = _known_sizes(_Layer(module, before, lambda _, number: number))
    for name, size in sizes.items():
        own = getattr(module, name, old.get(name))
        if size is not None and own not in (None, size) and old.get(name, own) == own:
            if name in vars(module):  # a number as before: NNX need not look at it
                vars(module)[name] = size
            else:
                setattr(module, name, size)


def _known_sizes(layer: _Layer) -> dict[str, Any]:
    """Returns what the table says of a layer, nothing where it does not apply.

    The layer may be of a class of one's own, with other arrays than its parent's; or
    the shapes that it had are not known, as of an array that two layers share and that
    has its name from the other one.
    """
    try:
        return _sizes(layer)
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def _sizes(layer: _Layer) -> dict[str, Any]:
    """Returns the sizes of a layer of Flax, by attribute, as its arrays have them.

    Axes are counted from the end, since a layer under ``nnx.vmap`` has more in front.
    """
    module, shape = layer.module, layer.shape
    match module:
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
            bias = shape("bias")
            return {
                "kernel_shape": shape("kernel")[-len(module.kernel_shape) :],
                "bias_shape": bias and bias[-len(module.bias_shape) :],
            }
        case nnx.Conv():
            kernel = shape("kernel")[-len(module.kernel_shape) :]
            groups = _conv_groups(layer)
            return {
                "kernel_shape": kernel,
                "in_features": kernel[-2] * groups,
                "out_features": kernel[-1],
                "feature_group_count": groups,
            }
        case nnx.ConvTranspose():
            kernel = shape("kernel")[-len(module.kernel_shape) :]
            inputs, outputs = kernel[-2:]
            if module.transpose_kernel:
                inputs, outputs = outputs, inputs
            return {
                "kernel_shape": kernel,
                "in_features": inputs,
                "out_features": outputs,
            }
        case nnx.Embed():
            number, features = shape("embedding")[-2:]
            return {"num_embeddings": number, "features": features}
        case nnx.BatchNorm():
            return {"num_features": layer.last("mean")}
        case nnx.LayerNorm() | nnx.RMSNorm() | nnx.InstanceNorm():
            width = layer.last("scale", "bias")
            if width is None:  # it has no arrays
                width = layer.groups("num_features", module.num_features)
            return {"num_features": width}
        case nnx.GroupNorm() if width := layer.last("scale", "bias"):
            array = "scale" if shape("scale") else "bias"
            number = layer.groups(array, module.num_groups) or module.num_groups
            return {
                "num_features": width,
                "num_groups": number,
                "group_size": width // number,
            }
        case nnx.LoRA():
            return {
                "in_features": shape("lora_a")[-2],
                "out_features": shape("lora_b")[-1],
            }
        case nnx.MultiHeadAttention():
            inputs, heads, size = shape("query.kernel")[-3:]
            kv_inputs, kv_heads, _ = shape("key.kernel")[-3:]
            return {
                "in_features": inputs,
                "in_kv_features": kv_inputs,
                "num_heads": heads,
                "num_kv_heads": kv_heads,
                "head_dim": size,
                "qkv_features": heads * size,
                "out_features": shape("out.kernel")[-1],
            }
        case nnx.LSTMCell():
            return _cell(shape("ii.kernel"), shape("hi.kernel"))
        case nnx.OptimizedLSTMCell() | nnx.GRUCell() | nnx.SimpleCell():
            return _cell(shape("dense_i.kernel"), shape("dense_h.kernel"))
    return {}


_KNOWN = (
    *(nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose),
    *(nnx.Embed, nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.InstanceNorm),
    *(nnx.GroupNorm, nnx.LoRA, nnx.MultiHeadAttention, nnx.LSTMCell),
    *(nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell),
)


@functools.cache
def _is_known(of: type) -> bool:
    """Reports whether the layers of a class are in the table of sizes."""
    return issubclass(of, _KNOWN)


def _cell(kernel: Shape, recurrent: Shape) -> dict[str, int]:
    return {"in_features": kernel[-2], "hidden_features": recurrent[-2]}


def _conv_groups(layer: _Layer) -> int:
    module = layer.module
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
