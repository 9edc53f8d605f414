"""Weights of PyTorch in our networks: every tensor in its place, none left over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.interop.networks import Tiny, abstract, assert_same, network
from tests.interop.tensors import FILES, tiny_weights
from tests.models.test_torchvision import RECORDED, to_ours, torch_tensor
from tests.reference import GOLDEN, filled, section
from tpp_jax.errors import TPPError
from tpp_jax.graph.naming import named_leaves
from tpp_jax.interop import torch_weights
from tpp_jax.interop.torch_weights import load_torch

QUICK = ("resnet18", "mobilenet_v2", "vit_b_16")


def assert_holds_tiny_weights(model):
    weights = tiny_weights()
    kernel = weights["conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(model.conv1.kernel[...], kernel)
    grouped = weights["blocks.0.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(model.blocks[0].kernel[...], grouped)
    np.testing.assert_array_equal(model.fc.kernel[...], weights["fc.weight"].T)
    for ours, theirs in [
        (model.blocks[0].bias, "blocks.0.bias"),
        (model.bn1.scale, "bn1.weight"),
        (model.bn1.bias, "bn1.bias"),
        (model.bn1.mean, "bn1.running_mean"),
        (model.bn1.var, "bn1.running_var"),
        (model.fc.bias, "fc.bias"),
    ]:
        np.testing.assert_array_equal(ours[...], weights[theirs])


@pytest.mark.parametrize(
    "name",
    [
        path.name
        for path in FILES.iterdir()
        if path.name[:2] in ("st", "wh", "ch", "wr")
    ],
)
def test_every_kind_of_file_fills_a_model(name):
    model = load_torch(FILES / name, abstract(Tiny))
    assert_holds_tiny_weights(model)
    assert model(jnp.ones((1, 8, 8, 3))).shape == (1, 2)


@pytest.mark.parametrize("wrap", [np.asarray, jnp.asarray])
def test_state_dicts_in_memory_fill_a_model(wrap):
    weights = {name: wrap(array) for name, array in tiny_weights().items()}
    assert_holds_tiny_weights(load_torch(weights, abstract(Tiny)))
    compiled = {f"_orig_mod.module.{name}": x for name, x in weights.items()}
    assert_holds_tiny_weights(load_torch(compiled, abstract(Tiny)))


def test_the_given_model_and_the_given_arrays_are_left_alone():
    model, weights = filled(Tiny), tiny_weights()
    before = jax.tree.map(jnp.copy, nnx.state(model))
    loaded = load_torch(weights, model)
    assert_same(model, nnx.merge(nnx.graphdef(model), before))
    weights["bn1.bias"][:] = 100
    assert_holds_tiny_weights(loaded)


def quick_or_slow(names, is_quick):
    slow = pytest.mark.slow
    return [n if is_quick(n) else pytest.param(n, marks=slow) for n in names]


ZOO = [name for name in RECORDED if name in tpp.models.names()]


@pytest.mark.parametrize("name", quick_or_slow(ZOO, QUICK.__contains__))
def test_imagenets_networks_have_torchvisions_names_and_shapes(name):
    model = network(name, num_classes=1000)
    leaves = named_leaves(nnx.state(model))
    found = {
        place.name: list(place.shape(leaves[place.leaf].shape))
        for place in torch_weights.places(model)
    }
    assert found == RECORDED[name]["params"]


def test_a_state_dict_of_torchvision_is_put_in_its_places():
    tensors = {
        key: torch_tensor(key, shape)
        for key, shape in RECORDED["resnet18"]["params"].items()
    }
    loaded = load_torch(tensors, network("resnet18", num_classes=1000))
    leaves, expected = named_leaves(nnx.state(loaded)), to_ours(tensors)
    assert leaves.keys() == expected.keys()
    for leaf, array in expected.items():
        np.testing.assert_array_equal(leaves[leaf], array, err_msg=leaf)


def test_the_originals_networks_fill_ours():
    """Its recordings, under its own names; option A and B, a VGG."""
    for file, name, classes in [
        ("resnet_a.npz", "cifar_resnet8", 10),
        ("resnet_b.npz", "cifar_resnet8_b", 7),
    ]:
        with np.load(GOLDEN / file) as recording:
            start = "start/"
            tensors = {
                key.removeprefix(start): recording[key]
                for key in recording.files
                if key.startswith(start)
            }
            expected = section(recording, "start")
        loaded = load_torch(tensors, network(name, num_classes=classes))
        for leaf, array in named_leaves(nnx.state(loaded)).items():
            np.testing.assert_array_equal(array, expected[leaf])


def test_the_originals_pruned_networks_fill_ours_and_give_its_logits():
    with np.load(GOLDEN / "resnet_a.npz") as recording:
        sliced = "sliced/"
        tensors = {
            key.removeprefix(sliced): recording[key]
            for key in recording.files
            if key.startswith(sliced)
        }
        images = recording["images"][0].transpose(0, 2, 3, 1)
        logits = recording["sliced_logits"]
    model = load_torch(tensors, network("cifar_resnet8"), pruned=True)
    assert model.layer1[0].conv1.kernel.shape == (3, 3, 16, 8)
    model.eval()
    np.testing.assert_allclose(model(jnp.asarray(images)), logits, atol=1e-5)


# Flattened feature maps


def test_an_mlp_sees_the_same_pixels():
    """PyTorch flattens channels first: the numbers of both layouts must meet."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 3, 4, 3)).astype(np.float32)
    create = tpp.models.mlp.MLP
    model = create(1, num_classes=5, image_shape=(3, 4, 3), rngs=nnx.Rngs(0))
    weight = rng.normal(size=(5, 36)).astype(np.float32)
    tensors = {"net.0.weight": weight, "net.0.bias": np.zeros(5, np.float32)}
    with pytest.raises(TPPError, match="pass flattened"):
        load_torch(tensors, model)
    loaded = load_torch(tensors, model, flattened={"net.0": (3, 4)})
    channels_first = image.transpose(0, 3, 1, 2).reshape(2, -1)
    np.testing.assert_allclose(loaded(image), channels_first @ weight.T, rtol=1e-5)


def test_an_mlp_by_name_knows_its_images():
    named = network("mlp7_relu", (4, 2, 3))
    model = filled(
        lambda: tpp.models.create("mlp7_relu", image_shape=(4, 2, 3), rngs=nnx.Rngs(0))
    )
    tensors = {}
    for i in range(0, 13, 2):
        tensors[f"net.{i}.weight"] = np.asarray(model.net[i].kernel[...]).T
        tensors[f"net.{i}.bias"] = np.asarray(model.net[i].bias[...])
    first = tensors["net.0.weight"].reshape(100, 4, 2, 3).transpose(0, 3, 1, 2)
    tensors["net.0.weight"] = first.reshape(100, 24)
    assert_same(load_torch(tensors, named), model)


@pytest.mark.parametrize("wrong", [{"conv1": (2, 2)}, {"fc": (3, 1)}, {"fd": (2, 2)}])
def test_a_flattening_that_cannot_be_is_refused(wrong):
    with pytest.raises(TPPError, match="flattened has"):
        load_torch(tiny_weights(), abstract(Tiny), flattened=wrong)


# What does not fit


def test_all_names_that_do_not_fit_are_told_at_once():
    weights = tiny_weights()
    weights["conv.weight"] = weights.pop("conv1.weight")
    weights["head.bias"] = np.ones(2)
    with pytest.raises(TPPError) as error:
        load_torch(weights, abstract(Tiny))
    assert str(error.value) == (
        "the weights are not those of this Tiny: they have no conv1.weight (but a "
        "conv.weight); the model has no conv.weight, head.bias"
    )


def test_a_long_list_of_names_is_cut():
    weights = {f"w{i}": np.ones(1) for i in range(20)}
    with pytest.raises(TPPError, match=r"they have no .* and \d+ more; .* has no w0, "):
        load_torch(weights, network("cifar_resnet8"))


def test_another_number_of_classes_is_told_as_such():
    weights = tiny_weights()
    weights["fc.weight"], weights["fc.bias"] = np.ones((7, 4)), np.ones(7)
    with pytest.raises(TPPError, match=r"7 outputs at fc.*has 2.*num_classes=7"):
        load_torch(weights, abstract(Tiny))


def test_other_shapes_are_told():
    weights = tiny_weights()
    weights["conv1.weight"] = np.ones((4, 3, 5, 5))
    message = r"other shapes than this Tiny: conv1.weight is 4×3×5×5 and not 4×3×3×3$"
    for pruned in (False, True):
        with pytest.raises(TPPError, match=message):
            load_torch(weights, abstract(Tiny), pruned=pruned)


def test_a_module_without_a_counterpart_is_told():
    model = nnx.List([nnx.LinearGeneral(2, (2, 2), rngs=nnx.Rngs(0))])
    with pytest.raises(TPPError, match="0 is a LinearGeneral"):
        load_torch({"0.weight": np.ones(2)}, model)


def test_the_random_state_of_a_dropout_stays():
    rngs = nnx.Rngs(3)
    model = nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])
    loaded = load_torch({"0.weight": np.ones((2, 2)), "0.bias": np.ones(2)}, model)
    x = jnp.ones((8, 8))
    np.testing.assert_array_equal(loaded[1](x), model[1](x))


# All of ours


def is_shallow(name):
    return int("".join(filter(str.isdigit, name.partition("_x")[0])) or 0) < 30


# JAX takes minutes to make the one of 1202 layers, which is that of 110 but deeper.
NAMES = [name for name in tpp.models.names() if "1202" not in name]


@pytest.mark.parametrize("name", quick_or_slow(NAMES, is_shallow))
def test_every_network_has_a_place_for_every_array(name):
    model = network(name, num_classes=1000)
    leaves = named_leaves(nnx.state(model))
    places = torch_weights.places(model)
    assert [place.leaf for place in places] == list(leaves)
    assert len({place.name for place in places}) == len(places)
