"""The place of every array of a module in a state dict of PyTorch.

A place is a name there, and a layout that differs in the order of the axes. Loading and
saving read the same list.
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
# The pixels of feature maps that are flattened, by the dense layer behind: its inputs
# are (height, width, channels) here and (channels, height, width) in PyTorch.
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
    """Where an array of a module is found in a state dict.

    Attributes:
      leaf: Our name.
      name: PyTorch's.
      is_kernel: Whether the axes are in another order: PyTorch has (out, in, *window),
        we have (*window, in, out).
      pixels: (height, width) of the flattened feature map that the kernel is applied
        to; None if there is none, or it is flattened in PyTorch's order.
    """

    leaf: str
    name: str
    is_kernel: bool
    pixels: tuple[int, int] | None

    def shape(self, ours: Shape) -> Shape:
        """Returns the shape in PyTorch of an array of this shape here."""
        return (*ours[:-3:-1], *ours[:-2]) if self.is_kernel else tuple(ours)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Returns an array of ours in PyTorch's layout."""
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
        """Returns a tensor of PyTorch in our layout."""
        if not self.is_kernel:
            return tensor
        if self.pixels:
            out, height, width = len(tensor), *self.pixels
            tensor = tensor.reshape(out, -1, height, width).transpose(0, 2, 3, 1)
            tensor = tensor.reshape(out, -1)
        return tensor.transpose(*range(2, tensor.ndim), 1, 0)


def places(model: nnx.Module, flattened: Flattened | None = None) -> list[Place]:
    """Returns the place of every array of a model, in the order of its state.

    Raises:
      TPPError: A layer has no counterpart in PyTorch, or ``flattened`` is wrong.
    """
    by_path = dict(modules(model))
    leaves = named_leaves(nnx.split(model, nnx.RngState, ...)[2])
    pixels = dict(flattened or {})
    if isinstance(model, MLP) and "net.0" not in pixels:
        if not hasattr(model, "spec"):
            raise TPPError(
                "this MLP does not tell the shape of its images: pass "
                'flattened={"net.0": (height, width)}'
            )
        pixels["net.0"] = model.spec.image_shape[:2]
    for layer, size in pixels.items():
        rows = leaves[f"{layer}.kernel"].shape if f"{layer}.kernel" in leaves else ()
        if len(rows) != 2 or rows[0] % math.prod(size):
            raise TPPError(
                f"flattened has {layer}: {size}, which is no dense layer of this "
                f"{type(model).__name__} with that many inputs for each channel"
            )
    return [_place(leaf, by_path, pixels) for leaf in leaves]


def _place(leaf: str, by_path: Mapping[str, nnx.Module], pixels: Flattened) -> Place:
    layer, _, kind = leaf.rpartition(".")
    module = by_path.get(layer)
    if not isinstance(module, LAYERS):
        # A parameter of somebody's own module keeps its name and layout. Flax's lists
        # and dicts are nobody's layers.
        ours = type(module).__module__.startswith("flax.")
        if ours and not isinstance(module, (nnx.List, nnx.Dict)):
            raise TPPError(
                f"{layer} is a {type(module).__name__}, whose layout in PyTorch is not "
                "known here: convert its arrays by hand"
            )
        return Place(leaf, leaf, is_kernel=False, pixels=None)
    is_kernel, kind = kind == "kernel", _NAMES.get(kind, kind)
    parent = by_path.get(layer.rpartition(".")[0])
    fused = isinstance(parent, SelfAttention) and layer.endswith("in_proj")
    name = f"{layer}_{kind}" if fused else f"{layer}.{kind}"
    return Place(leaf, name, is_kernel, pixels.get(layer) if is_kernel else None)
