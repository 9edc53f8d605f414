"""The place of every array of a module in a state dict of PyTorch.

A place is a name in PyTorch, and a layout that differs in the order of the axes.
Loading and saving use the same list.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.graph.naming import named_leaves
from tpp_jax.graph.nnx_layers import modules
from tpp_jax.models.mlp import MLP
from tpp_jax.models.vit import SelfAttention

Shape = tuple[int, ...]
# Height and width of flattened feature maps, by the dense layer that follows. The order
# of its inputs is (height, width, channels) here, (channels, height, width) in PyTorch.
Flattened = Mapping[str, tuple[int, int]]

_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
LAYERS = (
    *(nnx.Conv, nnx.Linear, nnx.Embed),
    *(nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.RMSNorm),
)


class Place(NamedTuple):
    """The place of an array of a module in a state dict.

    Attributes:
      leaf: Name of the array in the module.
      name: Name of the array in PyTorch.
      is_kernel: Whether the order of the axes differs: (out, in, *window) in PyTorch,
        (*window, in, out) here.
      pixels: Height and width of the flattened feature map that the kernel is applied
        to; None if there is none, or it is flattened in PyTorch's order.
    """

    leaf: str
    name: str
    is_kernel: bool
    pixels: tuple[int, int] | None

    def shape(self, ours: Shape) -> Shape:
        """Returns the shape in PyTorch of an array that has this shape here.

        Args:
          ours: Shape of the array in the module.
        """
        return (*ours[:-3:-1], *ours[:-2]) if self.is_kernel else tuple(ours)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Returns an array of the module in PyTorch's layout.

        Args:
          array: Array in the layout of the module.
        """
        if not self.is_kernel:
            return array
        n = array.ndim
        array = array.transpose(n - 1, n - 2, *range(n - 2))
        if self.pixels:
            out, height, width = len(array), *self.pixels
            array = array.reshape(out, height, width, -1).transpose(0, 3, 1, 2)
            array = array.reshape(out, -1)
        return array

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Returns a tensor of PyTorch in the layout of the module.

        Args:
          tensor: Array in PyTorch's layout.
        """
        if not self.is_kernel:
            return tensor
        if self.pixels:
            out, height, width = len(tensor), *self.pixels
            tensor = tensor.reshape(out, -1, height, width).transpose(0, 2, 3, 1)
            tensor = tensor.reshape(out, -1)
        return tensor.transpose(*range(2, tensor.ndim), 1, 0)


def places(model: nnx.Module, flattened: Flattened | None = None) -> list[Place]:
    """Returns the place of every array of a model, in the order of its state.

    Args:
      model: Module whose arrays are placed.
      flattened: Height and width of each flattened feature map, by the name of the
        dense layer that follows.

    Raises:
      TPPError: If a layer has no counterpart in PyTorch, or ``flattened`` is wrong.
    """
    by_path = dict(modules(model))
    leaves = named_leaves(nnx.split(model, nnx.RngState, ...)[2])
    pixels = dict(flattened or {})
    if isinstance(model, MLP) and "net.0" not in pixels:
        spec = getattr(model, "spec", None)
        if spec is None:
            raise TPPError(
                "the shape of this MLP's images is unknown: pass "
                'flattened={"net.0": (height, width)}'
            )
        pixels["net.0"] = spec.image_shape[:2]
    for layer, size in pixels.items():
        rows = leaves[f"{layer}.kernel"].shape if f"{layer}.kernel" in leaves else ()
        if len(rows) != 2 or rows[0] % math.prod(size):
            raise TPPError(
                f"flattened has {layer}: {size}, but no dense layer of this "
                f"{type(model).__name__} has that name and that many inputs per channel"
            )
    return [_place(leaf, by_path, pixels) for leaf in leaves]


def _place(leaf: str, by_path: Mapping[str, nnx.Module], pixels: Flattened) -> Place:
    layer, _, variable = leaf.rpartition(".")
    module = by_path.get(layer)
    if not isinstance(module, LAYERS):
        # A parameter of a user's module keeps its name and layout, and so does one in a
        # list or dict of Flax, which belongs to no layer.
        ours = type(module).__module__.startswith("flax.")
        if ours and not isinstance(module, (nnx.List, nnx.Dict)):
            raise TPPError(
                f"{layer} is a {type(module).__name__}, whose layout in PyTorch is "
                "unknown: convert its arrays by hand"
            )
        return Place(leaf, leaf, is_kernel=False, pixels=None)
    is_kernel, theirs = variable == "kernel", _NAMES.get(variable, variable)
    parent = by_path.get(layer.rpartition(".")[0])
    fused = isinstance(parent, SelfAttention) and layer.endswith("in_proj")
    name = f"{layer}_{theirs}" if fused else f"{layer}.{theirs}"
    return Place(leaf, name, is_kernel, pixels.get(layer) if is_kernel else None)
