"""What is written for PyTorch, pruned or not, comes back and tells its sizes."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.interop.networks import Tiny, abstract, assert_same, network
from tests.interop.tensors import tiny_weights
from tests.reference import filled
from tpp_jax.errors import TPPError
from tpp_jax.graph.naming import named_leaves
from tpp_jax.interop import torch_weights
from tpp_jax.interop.torch_files import read_torch
from tpp_jax.interop.torch_weights import load_torch, save_torch


def pruned(name, image_shape, ratios=0.5, **kwargs):
    def create():
        return tpp.models.create(name, image_shape=image_shape, rngs=nnx.Rngs(0))

    model = filled(create)
    example = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    groups = tpp.channel_groups(model, example)
    return tpp.prune(model, tpp.make_plan(groups, model, ratios, **kwargs))


PRUNED = {
    "cifar_resnet8": (8, 8, 3),
    "mlp7_relu": (4, 2, 3),
    "lenet5": (32, 32, 2),
    "mobilenet_v2": (32, 32, 3),
}


@pytest.mark.parametrize("name", PRUNED)
def test_a_pruned_network_comes_back_bit_by_bit(name, tmp_path):
    shape = PRUNED[name]
    small = pruned(name, shape)
    path = tmp_path / "small.safetensors"
    save_torch(small, path)
    with pytest.raises(TPPError, match="pruned=True"):
        load_torch(path, network(name, shape))
    back = load_torch(path, network(name, shape), pruned=True)
    assert_same(back, small)
    assert nnx.graphdef(back) == nnx.graphdef(small)  # so static sizes too


def test_a_pruned_network_that_came_back_runs(tmp_path):
    small = pruned("mlp7_relu", (4, 2, 3))
    save_torch(small, tmp_path / "small.safetensors")
    empty = network("mlp7_relu", (4, 2, 3))
    back = load_torch(tmp_path / "small.safetensors", empty, pruned=True)
    x = np.random.default_rng(0).normal(size=(3, 4, 2, 3)).astype(np.float32)
    np.testing.assert_array_equal(back(x), small(x))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_types_are_kept(dtype, tmp_path):
    model = filled(Tiny)
    state = jax.tree.map(lambda x: x.astype(dtype), nnx.state(model))
    model = nnx.merge(nnx.graphdef(model), state)
    save_torch(model, tmp_path / "w.safetensors")
    assert_same(load_torch(tmp_path / "w.safetensors", abstract(Tiny)), model)


def test_float64_is_kept_where_jax_has_it():
    weights = {name: x.astype(np.float64) for name, x in tiny_weights().items()}
    assert load_torch(weights, abstract(Tiny)).fc.kernel.dtype == jnp.float32
    with jax.enable_x64(True):
        assert load_torch(weights, abstract(Tiny)).fc.kernel.dtype == jnp.float64


def narrow(weights, name, axis, count):
    return weights | {name: weights[name].take(range(count), axis)}


def test_widths_that_do_not_go_together_are_refused():
    model = network("lenet5")
    save = {place.name: place for place in torch_weights.places(model)}
    leaves = named_leaves(nnx.state(model))
    weights = {
        name: np.ones(place.shape(leaves[place.leaf].shape), np.float32)
        for name, place in save.items()
    }
    half = narrow(weights, "conv1.weight", 0, 3)
    with pytest.raises(TPPError, match="conv1 has arrays for 3 and for 6 channels"):
        load_torch(half, model, pruned=True)
    with pytest.raises(TPPError, match="do not fit each other in this LeNet5"):
        load_torch(narrow(half, "conv1.bias", 0, 3), model, pruned=True)
    both = narrow(narrow(half, "conv1.bias", 0, 3), "conv2.weight", 1, 3)
    small = load_torch(both, model, pruned=True)
    assert small(jnp.ones((1, 32, 32, 1))).shape == (1, 10)


def test_a_pruned_group_norm_is_refused():
    norm = nnx.List([nnx.GroupNorm(8, 4, rngs=nnx.Rngs(0))])
    weights = {"0.weight": np.ones(8, np.float32), "0.bias": np.ones(8, np.float32)}
    assert load_torch(weights, norm, pruned=True)[0].scale.shape == (8,)
    weights = {name: array[:4] for name, array in weights.items()}
    with pytest.raises(TPPError, match="0 is a pruned GroupNorm"):
        load_torch(weights, norm, pruned=True)


# What is written


def test_the_sizes_of_all_layers_are_told_beside_the_weights(tmp_path):
    save_torch(pruned("cifar_resnet8", (8, 8, 3)), tmp_path / "small.safetensors")
    told = json.loads((tmp_path / "small.safetensors.json").read_text())
    assert told["model"] == {
        "name": "cifar_resnet8",
        "num_classes": 10,
        "image_shape": [8, 8, 3],
    }
    assert told["class"] == "CifarResNet"
    assert told["layers"]["layer2.0.conv1"] == {
        "type": "Conv2d",
        "in_channels": told["layers"]["conv1"]["out_channels"],
        "out_channels": 16,
        "kernel_size": [3, 3],
        "stride": [2, 2],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "bias": False,
    }
    assert told["layers"]["layer2.0.bn1"] == {
        "type": "BatchNorm2d",
        "num_features": 16,
        "eps": 1e-5,
        "momentum": 0.1,
    }
    assert told["layers"]["linear"]["type"] == "Linear"


def test_a_depthwise_convolution_tells_its_groups(tmp_path):
    save_torch(filled(Tiny), tmp_path / "w.safetensors")
    told = json.loads((tmp_path / "w.safetensors.json").read_text())["layers"]
    assert told["blocks.0"]["groups"] == told["blocks.0"]["in_channels"] == 4
    assert list(told) == ["blocks.0", "bn1", "conv1", "fc"]


def test_a_transformers_attention_is_one_layer():
    layers = torch_weights.describe_layers(network("vit_s_16"))["layers"]
    block = "encoder.layers.encoder_layer_0"
    assert layers[f"{block}.self_attention"] == {
        "type": "MultiheadAttention",
        "embed_dim": 384,
        "num_heads": 6,
        "batch_first": True,
    }
    assert layers[f"{block}.ln_1"]["normalized_shape"] == [384]
    assert not any("in_proj" in name or "out_proj" in name for name in layers)


def test_parameters_of_ones_own_keep_their_name_and_shape(tmp_path):
    class Own(nnx.Module):
        def __init__(self):
            self.token = nnx.Param(jnp.ones((1, 2, 3)))
            self.scale = nnx.Param(jnp.array(2.0))

    save_torch(Own(), tmp_path / "own.safetensors")
    shapes = {k: x.shape for k, x in read_torch(tmp_path / "own.safetensors").items()}
    assert shapes == {"token": (1, 2, 3), "scale": ()}
    assert_same(load_torch(tmp_path / "own.safetensors", abstract(Own)), Own())


def test_an_abstract_model_has_nothing_to_save(tmp_path):
    with pytest.raises(TPPError, match="this Tiny is abstract"):
        save_torch(abstract(Tiny), tmp_path / "w.safetensors")


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(TPPError, match=r"end it in .safetensors or .pth"):
        save_torch(filled(Tiny), tmp_path / "weights.bin")


def test_pth_files_without_pytorch_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(TPPError, match=r"not installed.*\[torch\]"):
        save_torch(filled(Tiny), tmp_path / "weights.pth")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "w.safetensors"
    save_torch(filled(Tiny), path)
    before = path.read_bytes()

    def fail(_, partial):
        partial.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch_weights, "write_safetensors", fail)
    with pytest.raises(OSError, match="no space"):
        save_torch(filled(Tiny), path)
    assert path.read_bytes() == before
    assert {entry.name for entry in path.parent.iterdir()} == {
        path.name,
        f"{path.name}.json",
    }
