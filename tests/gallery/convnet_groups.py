"""The coupled-channel groups of the convolutional gallery, derived by hand.

They follow from the architectures alone: which layers write one stream, which read it,
what stands beside what.
"""

from tests.gallery import convnets, grouped_convnets

SMALL, LARGE = (2, 16, 16, 3), (2, 32, 32, 3)


def free(name, size, *others):
    """A group that can be pruned: its name, its size and its other producers."""
    return name, size, (name, *others), None


def output(name, size):
    """The channels that the model returns."""
    return name, size, (name,), "an output of the model"


def pixels(name, inner, size):
    """Blocks of a layer's filters that become neighbouring pixels."""
    return f"{name}#{inner}", size, (name,), "a spatial axis of a convolution"


# name: (model, shape of the images, its groups in order of execution)
NETWORKS = {
    "pre-activation ResNet": (
        convnets.PreActivationResNet,
        SMALL,
        [
            free("stem", 8, "blocks.0.conv2", "blocks.1.conv2"),
            free("blocks.0.conv1", 8),
            free("blocks.1.conv1", 8),
            free("blocks.2.shortcut", 12, "blocks.2.conv2", "blocks.3.conv2"),
            free("blocks.2.conv1", 12),
            free("blocks.3.conv1", 12),
            output("head", 10),
        ],
    ),
    "bottleneck ResNet": (
        convnets.BottleneckResNet,
        LARGE,
        [
            free("stem.conv", 8),
            free("blocks.0.conv1.conv", 6),
            free("blocks.0.conv2.conv", 6),
            free(
                "blocks.0.conv3.conv",
                24,
                "blocks.0.downsample.conv",
                "blocks.1.conv3.conv",
            ),
            free("blocks.1.conv1.conv", 6),
            free("blocks.1.conv2.conv", 6),
            free("blocks.2.conv1.conv", 10),
            free("blocks.2.conv2.conv", 10),
            free(
                "blocks.2.conv3.conv",
                40,
                "blocks.2.downsample.conv",
                "blocks.3.conv3.conv",
            ),
            free("blocks.3.conv1.conv", 10),
            free("blocks.3.conv2.conv", 10),
            output("head", 10),
        ],
    ),
    "DenseNet": (
        convnets.DenseNet,
        SMALL,
        [
            free("stem", 8),
            free("block1.0.conv1", 16),
            free("block1.0.conv2", 4),
            free("block1.1.conv1", 16),
            free("block1.1.conv2", 4),
            free("transition", 8),
            free("block2.0.conv1", 16),
            free("block2.0.conv2", 4),
            free("block2.1.conv1", 16),
            free("block2.1.conv2", 4),
            output("head", 10),
        ],
    ),
    "Inception": (
        convnets.Inception,
        SMALL,
        [
            free("stem.conv", 8),
            free("mixed.branch1.conv", 6),
            free("mixed.branch3.layers.0.conv", 4),
            free("mixed.branch3.layers.1.conv", 8),
            free("mixed.branch5.layers.0.conv", 3),
            free("mixed.branch5.layers.1.conv", 5),
            free("mixed.branch5.layers.2.conv", 5),
            free("mixed.pool_projection.conv", 4),
            free("reduction.reduce.conv", 6),
            free("reduction.conv.conv", 10),
            free("last.conv", 12),
            output("head", 10),
        ],
    ),
    "U-Net": (
        convnets.UNet,
        SMALL,
        [
            free("down.0.conv1.conv", 6),
            free("down.0.conv2.conv", 6),
            free("down.1.conv1.conv", 8),
            free("down.1.conv2.conv", 8),
            free("down.2.conv1.conv", 10),
            free("down.2.conv2.conv", 10),
            free("up.0", 8),
            free("merge.0.conv1.conv", 8),
            free("merge.0.conv2.conv", 8),
            free("up.1", 6),
            free("merge.1.conv1.conv", 6),
            free("merge.1.conv2.conv", 6),
            output("head", 2),
        ],
    ),
    "VGG": (
        convnets.VGG,
        SMALL,
        [
            free("convs.0", 6),
            free("convs.1", 6),
            free("convs.2", 8),
            free("convs.3", 8),
            free("fc1", 20),
            output("fc2", 10),
        ],
    ),
    "super-resolution": (
        convnets.SuperResolution,
        (2, 8, 8, 3),
        [
            free("conv1", 8),
            free("conv2", 6),
            free("up", 6),
            pixels("up", 2, size=2),
            pixels("up", 3, size=2),
            output("last", 12),
        ],
    ),
    "MobileNetV2": (
        grouped_convnets.MobileNetV2,
        SMALL,
        [
            free("stem.conv", 10, "blocks.0.depthwise.conv"),
            free("blocks.0.project.conv", 8),
            free("blocks.1.expand.conv", 24, "blocks.1.depthwise.conv"),
            free("blocks.1.project.conv", 12, "blocks.2.project.conv"),
            free("blocks.2.expand.conv", 36, "blocks.2.depthwise.conv"),
            free("last.conv", 20),
            output("head", 10),
        ],
    ),
    "MobileNetV3": (
        grouped_convnets.MobileNetV3,
        SMALL,
        [
            free("stem.conv", 8, "blocks.0.project.conv"),
            free(
                "blocks.0.expand.conv",
                16,
                "blocks.0.depthwise.conv",
                "blocks.0.se.excite",
            ),
            free("blocks.0.se.squeeze", 4),
            free("blocks.1.expand.conv", 20, "blocks.1.depthwise.conv"),
            free("blocks.1.project.conv", 12, "blocks.2.project.conv"),
            free(
                "blocks.2.expand.conv",
                24,
                "blocks.2.depthwise.conv",
                "blocks.2.se.excite",
            ),
            free("blocks.2.se.squeeze", 6),
            free("last.conv", 24),
            free("hidden", 16),
            output("head", 10),
        ],
    ),
    "EfficientNet": (
        grouped_convnets.EfficientNet,
        SMALL,
        [
            # The first block has no expansion: all of it works on the stream.
            free(
                "stem.conv",
                8,
                "blocks.0.depthwise.conv",
                "blocks.0.excite",
                "blocks.0.project.conv",
            ),
            free("blocks.0.squeeze", 2),
            free(
                "blocks.1.expand.conv",
                24,
                "blocks.1.depthwise.conv",
                "blocks.1.excite",
            ),
            free("blocks.1.squeeze", 2),
            free("blocks.1.project.conv", 12, "blocks.2.project.conv"),
            free(
                "blocks.2.expand.conv",
                36,
                "blocks.2.depthwise.conv",
                "blocks.2.excite",
            ),
            free("blocks.2.squeeze", 3),
            free("last.conv", 20),
            output("head", 10),
        ],
    ),
    "ShuffleNetV2": (
        grouped_convnets.ShuffleNetV2,
        LARGE,
        [
            free("stem.conv", 8, "units.0.left.layers.0.conv"),
            free(
                "units.0.left.layers.1.conv",
                4,
                "units.0.right.layers.2.conv",
                "units.1.right.layers.2.conv",
                "units.2.left.layers.0.conv",
            ),
            free("units.0.right.layers.0.conv", 8, "units.0.right.layers.1.conv"),
            free("units.1.right.layers.0.conv", 8, "units.1.right.layers.1.conv"),
            free(
                "units.2.left.layers.1.conv",
                6,
                "units.2.right.layers.2.conv",
                "units.3.right.layers.2.conv",
            ),
            free("units.2.right.layers.0.conv", 12, "units.2.right.layers.1.conv"),
            free("units.3.right.layers.0.conv", 12, "units.3.right.layers.1.conv"),
            free("last.conv", 20),
            output("head", 10),
        ],
    ),
    "ResNeXt": (
        grouped_convnets.ResNeXt,
        SMALL,
        [
            free("stem.conv", 8),
            # A channel of a grouped convolution is one of each of its four groups.
            free("blocks.0.conv1.conv", 2),
            free("blocks.0.conv2.conv", 2),
            free(
                "blocks.0.conv3.conv",
                16,
                "blocks.0.downsample.conv",
                "blocks.1.conv3.conv",
            ),
            free("blocks.1.conv1.conv", 2),
            free("blocks.1.conv2.conv", 2),
            free("blocks.2.conv1.conv", 4),
            free("blocks.2.conv2.conv", 4),
            free("blocks.2.conv3.conv", 32, "blocks.2.downsample.conv"),
            output("head", 10),
        ],
    ),
    "ConvNeXt": (
        grouped_convnets.ConvNeXt,
        LARGE,
        [
            free(
                "stem",
                8,
                "stage1.0.depthwise",
                "stage1.0.down",
                "stage1.1.depthwise",
                "stage1.1.down",
            ),
            free("stage1.0.up", 32),
            free("stage1.1.up", 32),
            free("down", 12, "stage2.0.depthwise", "stage2.0.down"),
            free("stage2.0.up", 48),
            output("head", 10),
        ],
    ),
    "RegNet": (
        grouped_convnets.RegNet,
        SMALL,
        [
            free("stem.conv", 8),
            free(
                "blocks.0.shortcut.conv",
                12,
                "blocks.0.conv3.conv",
                "blocks.1.conv3.conv",
            ),
            free("blocks.0.conv1.conv", 4),
            free("blocks.0.conv2.conv", 4, "blocks.0.excite"),
            free("blocks.0.squeeze", 2),
            free("blocks.1.conv1.conv", 4),
            free("blocks.1.conv2.conv", 4, "blocks.1.excite"),
            free("blocks.1.squeeze", 3),
            free("blocks.2.shortcut.conv", 16, "blocks.2.conv3.conv"),
            free("blocks.2.conv1.conv", 4),
            free("blocks.2.conv2.conv", 4, "blocks.2.excite"),
            free("blocks.2.squeeze", 3),
            output("head", 10),
        ],
    ),
    "Linen ResNet": (
        convnets.LinenResNet,
        SMALL,
        [
            free("stem", 8, "LinenBlock_0.Conv_1"),
            free("LinenBlock_0.Conv_0", 8),
            free("LinenBlock_1.Conv_0", 12),
            free("LinenBlock_1.Conv_1", 12, "LinenBlock_1.shortcut"),
            free("fc", 16),
            output("head", 10),
        ],
    ),
}
