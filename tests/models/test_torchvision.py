"""ImageNet's networks are torchvision's: names, shapes, counts and logits.

The recording holds no weights: a formula gives them, from each array's name. So equal
logits also tell that every array is where torchvision has it.
"""

import functools
import json
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from benchmarks.architectures import ConvNeXt, DenseNet
from tests.reference import GOLDEN, filled, from_torch
from tpp_jax.graph.naming import map_named, named_leaves
from tpp_jax.models import vit
from tpp_jax.models.resnet import overlapping_max_pool
from tpp_jax.models.vgg import VGG, average_pool_to
from tpp_jax.models.vit import VisionTransformer

RECORDED = json.loads((GOLDEN / "torchvision.json").read_text())
OF_THE_BENCHMARKS = {"densenet121": DenseNet, "convnext_tiny": ConvNeXt}
QUICK_TO_RUN = ("resnet18", "mobilenet_v2")


@functools.cache
def abstract(name):
    def create():
        if name in OF_THE_BENCHMARKS:
            return OF_THE_BENCHMARKS[name](rngs=nnx.Rngs(0))
        return tpp.models.create(name, num_classes=1000, rngs=nnx.Rngs(0))

    return nnx.eval_shape(create)


def to_ours(tensors):
    """As `from_torch`, with a transformer's fused projection and a ConvNeXt's scale."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("in_proj_weight", "in_proj.weight")
        name = name.replace("in_proj_bias", "in_proj.bias")
        renamed[name] = tensor.reshape(-1) if "layer_scale" in name else tensor
    # An array at the root, the class token, comes back with a dot in front.
    return {name.lstrip("."): array for name, array in from_torch(renamed).items()}


def torch_tensor(name, shape):
    """A weight by the formula of the recordings (tests/golden/README.md)."""
    s = zlib.crc32(name.encode()) % 1000 / 1000
    a = sines(math.prod(shape), 0.37 + s, 7 * s)
    if name.endswith("running_var"):
        a = 1 + 0.3 * a
    elif name.endswith("running_mean"):
        a = 0.1 * a
    elif len(shape) == 1:
        a = 1 + 0.1 * a if name.endswith("weight") else 0.05 * a
    else:
        a *= np.float32(1.4 * np.sqrt(2 / math.prod(shape[1:])))
    return a.reshape(shape)


def sines(count, rate, start):
    """``sin(arange(count) * rate + start)``, by the sines of sums: a tenth of the time.

    Place ``i`` is ``4096 * coarse + fine``.
    """
    coarse = np.arange(-(-count // 4096)) * (4096 * rate) + start
    fine = np.arange(min(count, 4096)) * rate
    parts = np.stack([np.sin(coarse), np.cos(coarse)], 1), [np.cos(fine), np.sin(fine)]
    left, right = (np.asarray(part, np.float32) for part in parts)
    return (left @ right).ravel()[:count]


def images(shape):
    i = np.arange(math.prod(shape))
    x = np.sin(0.11 * i) + 0.5 * np.cos(0.0173 * i)
    return x.reshape(shape).transpose(0, 2, 3, 1).astype(np.float32)


@pytest.mark.parametrize("name", RECORDED)
def test_names_shapes_and_counts_are_torchvisions(name):
    recorded = RECORDED[name]
    tensors = {
        key: np.broadcast_to(np.float32(0), shape)
        for key, shape in recorded["params"].items()
    }
    expected = {leaf: tensor.shape for leaf, tensor in to_ours(tensors).items()}
    state = nnx.state(abstract(name))
    assert {leaf: x.shape for leaf, x in named_leaves(state).items()} == expected
    params = jax.tree.leaves(nnx.filter_state(state, nnx.Param))
    assert sum(math.prod(x.shape) for x in params) == recorded["n_params"]


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK_TO_RUN else pytest.param(name, marks=pytest.mark.slow)
        for name in RECORDED
    ],
)
def test_logits_are_torchvisions(name):
    recorded = RECORDED[name]
    weights = to_ours(
        {key: torch_tensor(key, shape) for key, shape in recorded["params"].items()}
    )
    graphdef, state = nnx.split(abstract(name))
    state = map_named(lambda leaf, _: jax.device_put(weights.pop(leaf)), state)

    @jax.jit
    def logits(state, x):
        model = nnx.merge(graphdef, state)
        model.eval()
        return model(x)

    found = np.asarray(logits(state, images(recorded["input"])))
    tolerance = 1e-4 * recorded["logits_std"]
    np.testing.assert_allclose(
        found[:, :10], recorded["logits_first_10"], atol=tolerance, rtol=0
    )
    np.testing.assert_allclose(found.std(), recorded["logits_std"], rtol=1e-3)


@pytest.mark.parametrize("size", [6, 7])
def test_the_overlapping_pooling_is_a_reduce_window(size):
    x = np.random.default_rng(0).normal(size=(2, size, size + 1, 3)) - 5
    x = jnp.asarray(x, jnp.float32)
    window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
    padding = [(0, 0), (1, 1), (1, 1), (0, 0)]
    expected = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)
    np.testing.assert_array_equal(overlapping_max_pool(x), expected)


@pytest.mark.parametrize("size", [3, 7, 10])
def test_adaptive_pooling_takes_means_of_windows_that_cover_the_image(size):
    x = np.random.default_rng(0).normal(size=(1, size, 14, 2)).astype(np.float32)
    y = average_pool_to(jnp.asarray(x), 7)
    assert y.shape == (1, 7, 7, 2)
    for i in range(7):
        rows = slice(i * size // 7, -(-(i + 1) * size // 7))
        expected = x[0, rows, 2 * i : 2 * i + 2].mean((0, 1))
        np.testing.assert_allclose(y[0, i, i], expected, atol=1e-6)


def test_a_vgg_flattens_channels_first():
    model = filled(lambda: VGG(((2,),), num_classes=3, hidden=4, rngs=nnx.Rngs(0)))
    groups = tpp.channel_groups(model, jnp.ones((1, 14, 14, 3)))
    [dense] = [m for m in groups["features.0"].members if "classifier" in m.leaf]
    np.testing.assert_array_equal(dense.positions, np.arange(98).reshape(2, 49))


# More than ten blocks: in the alphabet, the eleventh comes before the third.
TINY = vit.Architecture(patch=4, depth=11, width=8, heads=2, hidden=12)


def tiny_transformer():
    return VisionTransformer(
        TINY, num_classes=3, image_shape=(8, 8, 3), rngs=nnx.Rngs(0)
    )


def test_merging_a_transformer_keeps_the_order_of_its_blocks():
    encoder = filled(tiny_transformer).encoder
    tokens = jnp.ones((1, 5, 8)) * jnp.arange(8)
    expected = tokens + encoder.pos_embedding[...]
    for i in range(TINY.depth):
        expected = encoder.layers[f"encoder_layer_{i}"](expected)
    expected = encoder.ln(expected)
    np.testing.assert_array_equal(encoder(tokens), expected)
    merged = nnx.merge(*nnx.split(encoder))
    np.testing.assert_array_equal(merged(tokens), expected)


def test_heads_hidden_units_and_the_stream_of_a_transformer_can_be_pruned():
    model = filled(tiny_transformer)
    x = jnp.ones((1, 8, 8, 3))
    groups = tpp.channel_groups(model, x)
    block = "encoder.layers.encoder_layer_0"
    names = (f"{block}.self_attention.in_proj", f"{block}.mlp.0", "conv_proj")
    found = [groups[name] for name in names]
    assert [(g.size, g.reason) for g in found] == [(2, None), (12, None), (8, None)]
    assert len(groups["conv_proj"].producers) == 1 + 2 * TINY.depth
    small = tpp.prune(model, tpp.make_plan(groups, model, 0.5))
    first = small.encoder.layers["encoder_layer_0"]
    assert first.self_attention.in_proj.kernel.shape == (4, 3 * 4)
    assert first.mlp[0].kernel.shape == (4, 6)
    assert small(x).shape == (1, 3)


def test_an_image_that_is_no_whole_number_of_patches_is_refused():
    with pytest.raises(ValueError, match=r"10×8 pixels.*multiple of 4"):
        VisionTransformer(TINY, image_shape=(10, 8, 3), rngs=nnx.Rngs(0))
