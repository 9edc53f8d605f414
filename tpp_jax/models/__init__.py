"""Flax NNX networks: for images, created by name, and decoder language models.

They have no code for pruning.

    >>> from flax import nnx
    >>> model = create("cifar_resnet20", num_classes=10, rngs=nnx.Rngs(0))
    >>> model.spec
    ModelSpec(name='cifar_resnet20', num_classes=10, image_shape=(32, 32, 3))

Images are [batch, height, width, channels] of any float type; outputs are logits,
[batch, classes]. `names()` lists all networks.
"""

import dataclasses
import difflib
import re
from functools import partial

from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.models import (
    cifar_resnet,
    cifar_vgg,
    cifar_wrn,
    mlp,
    mobilenet,
    resnet,
    vgg,
    vit,
)
from tpp_jax.models.cifar_resnet import CifarResNet
from tpp_jax.models.cifar_vgg import CifarVGG
from tpp_jax.models.cifar_wrn import CifarWRN
from tpp_jax.models.decoder import Cache, Decoder, DecoderConfig, RopeScaling
from tpp_jax.models.efficientnet import EfficientNetLite
from tpp_jax.models.generation import generate
from tpp_jax.models.layers import BatchNorm
from tpp_jax.models.lenet import LeNet5
from tpp_jax.models.mlp import MLP
from tpp_jax.models.mobilenet import MobileNetV2
from tpp_jax.models.resnet import ResNet
from tpp_jax.models.small import small_decoder
from tpp_jax.models.vgg import VGG
from tpp_jax.models.vit import VisionTransformer
from tpp_jax.models.vocabulary import frequent_tokens, keep_tokens

__all__ = [
    "MLP",
    "VGG",
    "BatchNorm",
    "Cache",
    "CifarResNet",
    "CifarVGG",
    "CifarWRN",
    "Decoder",
    "DecoderConfig",
    "EfficientNetLite",
    "LeNet5",
    "MobileNetV2",
    "ModelSpec",
    "ResNet",
    "RopeScaling",
    "VisionTransformer",
    "create",
    "frequent_tokens",
    "generate",
    "keep_tokens",
    "names",
    "small_decoder",
    "spec_of",
]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The arguments of `create`, which suffice to build the same architecture again.

    Attributes:
      name: Name given to `create`.
      num_classes: Number of logits.
      image_shape: Shape of one image, (height, width, channels).
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]


# Shortcut option of a CIFAR ResNet by the suffix of its name.
_SHORTCUTS: dict[str, cifar_resnet.Option] = {"": "A", "_b": "B"}

# Class of each network by name, with the arguments that set it apart in its family.
_NETWORKS: dict[str, partial[nnx.Module]] = {
    **{
        f"cifar_resnet{depth}{suffix}": partial(
            CifarResNet, cifar_resnet.blocks_of_depth(depth), option=option
        )
        for depth in cifar_resnet.DEPTHS
        for suffix, option in _SHORTCUTS.items()
    },
    **{f"cifar_wrn{d}_{k}": partial(CifarWRN, d, k) for d, k in cifar_wrn.USUAL},
    **{f"cifar_vgg{d}": partial(CifarVGG, w) for d, w in cifar_vgg.WIDTHS.items()},
    "cifar_mobilenet_v2": partial(MobileNetV2, mobilenet.CIFAR_STAGES, stem_stride=1),
    **{
        f"mlp{depth}_{activation}": partial(MLP, depth, linear=activation == "linear")
        for depth in mlp.DEPTHS
        for activation in ("linear", "relu")
    },
    "lenet5": partial(LeNet5),
    "lenet5_linear": partial(LeNet5, linear=True),
    **{
        name: partial(ResNet, architecture)
        for name, architecture in resnet.ARCHITECTURES.items()
    },
    **{name: partial(VGG, stages) for name, stages in vgg.STAGES.items()},
    "mobilenet_v2": partial(MobileNetV2),
    "efficientnet_lite0": partial(EfficientNetLite),
    **{
        name: partial(VisionTransformer, architecture)
        for name, architecture in vit.ARCHITECTURES.items()
    },
}


def names() -> tuple[str, ...]:
    """Returns the names of all networks, sorted by family and depth.

    `create` accepts more names than these. The name of a CIFAR ResNet may end in `_x2`,
    `_x3`, …, a factor on its channels: ``cifar_resnet20_x4``, ``cifar_resnet56_b_x2``.
    A wide ResNet may have any depth of 6n + 4 and any width: ``cifar_wrn22_5``.

    Returns:
      The names as :func:`create` takes them.

    Example:
      >>> "cifar_resnet56" in names()
      True
    """
    return tuple(_NETWORKS)


def create(
    name: str,
    *,
    num_classes: int = 10,
    image_shape: tuple[int, int, int] | None = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Builds a network with random weights, in training mode.

    Args:
      name: Name from `names()`, or of one of the forms described there.
      num_classes: Number of logits.
      image_shape: Shape of one image, (height, width, channels); by default
        (32, 32, 3) for CIFAR networks, (32, 32, 1) for the MLPs and LeNet-5,
        (224, 224, 3) for ImageNet networks.
      rngs: Random streams for the initial weights.

    Returns:
      The module, from images [b, h, w, c] to logits [b, num_classes]. Its static
      attribute `spec` is the `ModelSpec` that builds it again.

    Raises:
      TPPError: If no network has that name.

    Example:
      >>> import jax.numpy as jnp
      >>> model = create("lenet5", rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 32, 32, 1))).shape
      (2, 10)
    """
    network = _find(name)
    if image_shape is None:
        if name.startswith(("mlp", "lenet")):
            image_shape = (32, 32, 1)
        else:
            side = 32 if name.startswith("cifar") else 224
            image_shape = (side, side, 3)
    height, width, channels = image_shape
    if network.func in (MLP, VisionTransformer):  # their arrays depend on image size
        sizes = {"image_shape": (height, width, channels)}
    else:
        sizes = {"in_channels": channels}
    model = network(num_classes=num_classes, rngs=rngs, **sizes)
    spec = ModelSpec(name, num_classes, (height, width, channels))
    # NNX modules take attributes that their class does not declare.
    model.spec = spec  # pyright: ignore[reportAttributeAccessIssue]
    return model


def spec_of(model: nnx.Module) -> ModelSpec:
    """Finds the spec of a network of this package.

    Args:
      model: Network that `create` made or that was loaded from a file.

    Returns:
      The arguments of `create` that made the network.

    Raises:
      TPPError: If the network has no spec, since it is not a network of this package.

    Example:
      >>> spec_of(create("lenet5", rngs=nnx.Rngs(0))).num_classes
      10
    """
    spec = getattr(model, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise TPPError(f"{type(model).__name__} is not a network of tpp_jax.models")
    return spec


def _find(name: str) -> partial[nnx.Module]:
    """Returns the function that builds the network of that name."""
    if name in _NETWORKS:
        return _NETWORKS[name]
    if wide := re.fullmatch("cifar_wrn([1-9][0-9]*)_([1-9][0-9]*)", name):
        return partial(CifarWRN, int(wide[1]), int(wide[2]))
    widened = re.fullmatch("(cifar_resnet[^x]+)_x([1-9][0-9]*)", name)
    if widened and widened[1] in _NETWORKS:
        return partial(_NETWORKS[widened[1]], width=int(widened[2]))
    near = ", ".join(difflib.get_close_matches(name, names())) or "none"
    raise TPPError(
        f"There is no network named {name!r} (similar names: {near});"
        " tpp_jax.models.names() lists all."
    )
