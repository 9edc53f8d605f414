"""Flax NNX networks by name, plain: they know nothing of pruning.

    >>> from flax import nnx
    >>> model = create("cifar_resnet20", num_classes=10, rngs=nnx.Rngs(0))
    >>> model.spec
    ModelSpec(name='cifar_resnet20', num_classes=10, image_shape=(32, 32, 3))

Images are [batch, height, width, channels] of any float type; outputs are logits,
[batch, classes].  `names()` lists what there is.
"""

import dataclasses
import difflib
import re

from flax import nnx

from tpp_jax.models import cifar_resnet, cifar_vgg, mlp, resnet, vgg, vit
from tpp_jax.models.cifar_resnet import CifarResNet
from tpp_jax.models.cifar_vgg import CifarVGG
from tpp_jax.models.layers import BatchNorm
from tpp_jax.models.lenet import LeNet5
from tpp_jax.models.mlp import MLP
from tpp_jax.models.mobilenet import MobileNetV2
from tpp_jax.models.resnet import ResNet
from tpp_jax.models.vgg import VGG
from tpp_jax.models.vit import VisionTransformer

__all__ = [
    "MLP",
    "VGG",
    "BatchNorm",
    "CifarResNet",
    "CifarVGG",
    "LeNet5",
    "MobileNetV2",
    "ModelSpec",
    "ResNet",
    "VisionTransformer",
    "create",
    "names",
]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What `create` was asked for: enough to build the same architecture again.

    Attributes:
      name: the name given to `create`.
      num_classes: number of logits.
      image_shape: (height, width, channels) of one image.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]


def names() -> tuple[str, ...]:
    """All names that `create` knows, sorted by family and depth.

    A CIFAR ResNet's name may further end in `_x2`, `_x3`, …, a factor on its channels:
    ``cifar_resnet20_x4``, ``cifar_resnet56_b_x2``.
    """
    resnets = [f"cifar_resnet{d}{o}" for d in cifar_resnet.DEPTHS for o in ("", "_b")]
    vggs = [f"cifar_vgg{depth}" for depth in cifar_vgg.WIDTHS]
    mlps = [f"mlp{d}_{kind}" for d in mlp.DEPTHS for kind in ("linear", "relu")]
    small = (*resnets, *vggs, *mlps, "lenet5", "lenet5_linear")
    imagenet = (*resnet.ARCHITECTURES, *vgg.STAGES, "mobilenet_v2", *vit.ARCHITECTURES)
    return (*small, *imagenet)


def create(
    name: str,
    *,
    num_classes: int = 10,
    image_shape: tuple[int, int, int] | None = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Build a network with random weights, in training mode.

    Args:
      name: one of `names()`; CIFAR ResNets may end in a width factor, `_x4`.
      num_classes: number of logits.
      image_shape: (height, width, channels) of one image; by default (32, 32, 3) for
        CIFAR's networks, (32, 32, 1) for the MLPs and LeNet-5, (224, 224, 3) for
        ImageNet's.
      rngs: source of the random start.

    Returns:
      The module, from images [b, h, w, c] to logits [b, num_classes].  Its static
      attribute `spec` is the `ModelSpec` that builds it again.

    Raises:
      ValueError: if there is no network of that name.

    Example:
      >>> import jax.numpy as jnp
      >>> model = create("lenet5", rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 32, 32, 1))).shape
      (2, 10)
    """
    # The width factor is open-ended; everything before it is in the list.
    base, suffix, factor = name.partition("_x")
    is_cifar_resnet = base.startswith("cifar_resnet")
    if base not in names() or (
        suffix and not (is_cifar_resnet and re.fullmatch("[1-9][0-9]*", factor))
    ):
        near = ", ".join(difflib.get_close_matches(name, names())) or "none"
        raise ValueError(
            f"There is no network named {name!r} (near it: {near});"
            " tpp_jax.models.names() lists them all."
        )
    if image_shape is None:
        if base.startswith(("mlp", "lenet")):
            image_shape = (32, 32, 1)
        else:
            side = 32 if base.startswith("cifar") else 224
            image_shape = (side, side, 3)
    height, width, channels = image_shape
    depth = int("".join(filter(str.isdigit, base)))
    linear = base.endswith("_linear")

    model: nnx.Module
    if is_cifar_resnet:
        model = CifarResNet(
            cifar_resnet.blocks_of_depth(depth),
            num_classes=num_classes,
            width=int(factor or 1),
            option="B" if base.endswith("_b") else "A",
            in_channels=channels,
            rngs=rngs,
        )
    elif base.startswith("cifar_vgg"):
        model = CifarVGG(
            cifar_vgg.WIDTHS[depth],
            num_classes=num_classes,
            in_channels=channels,
            rngs=rngs,
        )
    elif base.startswith("mlp"):
        model = MLP(
            depth,
            num_classes=num_classes,
            image_shape=(height, width, channels),
            linear=linear,
            rngs=rngs,
        )
    elif base.startswith("lenet"):
        model = LeNet5(
            num_classes=num_classes, in_channels=channels, linear=linear, rngs=rngs
        )
    elif base in resnet.ARCHITECTURES:
        model = ResNet(
            resnet.ARCHITECTURES[base],
            num_classes=num_classes,
            in_channels=channels,
            rngs=rngs,
        )
    elif base in vgg.STAGES:
        model = VGG(
            vgg.STAGES[base], num_classes=num_classes, in_channels=channels, rngs=rngs
        )
    elif base in vit.ARCHITECTURES:
        model = VisionTransformer(
            vit.ARCHITECTURES[base],
            num_classes=num_classes,
            image_shape=(height, width, channels),
            rngs=rngs,
        )
    else:
        model = MobileNetV2(num_classes=num_classes, in_channels=channels, rngs=rngs)
    model.spec = ModelSpec(name, num_classes, (height, width, channels))
    return model
