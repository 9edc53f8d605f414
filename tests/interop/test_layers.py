"""Layers in PyTorch's words: the same layer, or a note that says what differs."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tpp_jax.interop.layers import describe_layers
from tpp_jax.interop.torch_weights import save_torch
from tpp_jax.models.layers import BatchNorm


def described(layer):
    return describe_layers(nnx.Dict(it=layer))["layers"]["it"]


def conv(window=(3, 3), **kwargs):
    return nnx.Conv(4, 8, window, rngs=nnx.Rngs(0), **kwargs)


SAID = {
    "valid": (conv(padding="VALID", strides=2), {"padding": [0, 0]}),
    "same": (conv(), {"padding": [1, 1]}),
    "same, dilated": (conv(kernel_dilation=(2, 3)), {"padding": [2, 3]}),
    "same, even": (conv((4, 3)), {"padding": "same"}),
    "same, even, dilated by two": (
        conv((2, 4), kernel_dilation=2),
        {"padding": [1, 3]},
    ),
    "same, strided, of one pixel": (conv((1, 1), strides=2), {"padding": [0, 0]}),
    "same, lower": (conv(padding="SAME_LOWER"), {"padding": [1, 1]}),
    "circular": (
        conv(padding="CIRCULAR", strides=2),
        {"padding": [1, 1], "padding_mode": "circular"},
    ),
    "circular, even": (
        conv((4, 4), padding="CIRCULAR"),
        {"padding": "same", "padding_mode": "circular"},
    ),
    "reflect": (
        conv((5, 3), padding="REFLECT"),
        {"padding": [2, 1], "padding_mode": "reflect"},
    ),
    "numbers": (conv(padding=((2, 2), (0, 0)), strides=(2, 1)), {"padding": [2, 0]}),
    "a number": (conv(padding=3), {"padding": [3, 3]}),
    "along one axis": (conv((3,)), {"padding": [1], "type": "Conv1d"}),
    "causal, of one pixel": (conv((1,), padding="CAUSAL"), {"padding": [0]}),
    "in space": (conv((3, 3, 3)), {"padding": [1, 1, 1], "type": "Conv3d"}),
}


@pytest.mark.parametrize(("layer", "expected"), SAID.values(), ids=SAID.keys())
def test_a_padding_that_pytorch_has_is_said_in_its_words(layer, expected):
    found = described(layer)
    assert "note" not in found
    assert {key: found[key] for key in expected} == expected
    assert ("padding_mode" in found) == ("padding_mode" in expected)


NOTED = {
    "same, strided": (conv(strides=2), "SAME with stride .2, 2. depends on the size"),
    "same, strided along one axis": (conv(strides=(1, 2)), "depends on the size"),
    "same, lower, even": (
        conv((2, 2), padding="SAME_LOWER"),
        r"it pads \[\[1, 0\], \[1, 0\]\].*pad\(x, \[1, 0, 1, 0\], 'constant'\)",
    ),
    "circular, even, strided": (
        conv((4, 3), padding="CIRCULAR", strides=2),
        r"it pads \[\[1, 2\], \[1, 1\]\].*pad\(x, \[1, 1, 1, 2\], 'circular'\)",
    ),
    "uneven numbers": (
        conv(padding=((0, 1), (2, 2)), strides=2),
        r"it pads \[\[0, 1\], \[2, 2\]\].*pad\(x, \[2, 2, 0, 1\], 'constant'\)",
    ),
    "causal": (
        conv((3,), padding="CAUSAL", kernel_dilation=2),
        r"it pads \[\[4, 0\]\]",
    ),
}
OTHERS = {
    "between its inputs": (conv(input_dilation=2), "inserts zeros between its inputs"),
    "a mask": (conv(mask=jnp.ones((3, 3, 4, 8))), "multiplies its kernel by a mask"),
    "four axes": (conv((1, 1, 1, 1)), "no convolution over 4 axes"),
    "its own function": (
        conv(conv_general_dilated=lambda *args, **more: None),
        "a custom function",
    ),
    "a batch norm with a scale alone": (
        nnx.BatchNorm(4, use_bias=False, rngs=nnx.Rngs(0)),
        "a scale and no bias",
    ),
    "a batch norm along another axis": (
        nnx.BatchNorm(4, axis=1, rngs=nnx.Rngs(0)),
        "channels are along the axes 1",
    ),
    "a layer norm with a bias alone": (
        nnx.LayerNorm(4, use_scale=False, rngs=nnx.Rngs(0)),
        "a bias and no scale",
    ),
    "a layer norm over other axes": (
        nnx.LayerNorm(4, reduction_axes=(-2, -1), rngs=nnx.Rngs(0)),
        r"over the axes \(-2, -1\)",
    ),
    "a group norm with a bias alone": (
        nnx.GroupNorm(4, 2, use_scale=False, rngs=nnx.Rngs(0)),
        "a bias and no scale",
    ),
}


@pytest.mark.parametrize(
    ("layer", "note"), [*NOTED.values(), *OTHERS.values()], ids=[*NOTED, *OTHERS]
)
def test_what_pytorch_does_not_have_is_a_note(layer, note):
    assert re.search(note, described(layer)["note"])


@pytest.mark.parametrize("layer", [layer for layer, _ in NOTED.values()])
def test_a_padding_that_pytorch_does_not_have_is_left_out(layer):
    assert "padding" not in described(layer)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (
            nnx.BatchNorm(4, use_bias=False, use_scale=False, rngs=nnx.Rngs(0)),
            {"type": "BatchNorm2d", "num_features": 4, "affine": False},
        ),
        (BatchNorm(4, rngs=nnx.Rngs(0)), {"type": "BatchNorm2d", "momentum": 0.1}),
        (
            nnx.BatchNorm(4, momentum=0.97, epsilon=1e-3, rngs=nnx.Rngs(0)),
            {"momentum": 0.03, "eps": 1e-3},
        ),
        (
            nnx.LayerNorm(4, use_bias=False, epsilon=1e-4, rngs=nnx.Rngs(0)),
            {"normalized_shape": [4], "bias": False, "eps": 1e-4},
        ),
        (
            nnx.LayerNorm(4, use_bias=False, use_scale=False, rngs=nnx.Rngs(0)),
            {"normalized_shape": [4], "elementwise_affine": False},
        ),
        (
            nnx.RMSNorm(4, epsilon=1e-4, rngs=nnx.Rngs(0)),
            {"type": "RMSNorm", "normalized_shape": [4], "eps": 1e-4},
        ),
        (
            nnx.GroupNorm(4, None, group_size=1, rngs=nnx.Rngs(0)),
            {"num_groups": 4, "num_channels": 4, "eps": 1e-6},
        ),
        (
            nnx.GroupNorm(4, 2, use_bias=False, use_scale=False, rngs=nnx.Rngs(0)),
            {"num_groups": 2, "num_channels": 4, "affine": False},
        ),
        (
            nnx.Embed(7, 3, rngs=nnx.Rngs(0)),
            {"type": "Embedding", "num_embeddings": 7, "embedding_dim": 3},
        ),
        (
            nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0)),
            {"type": "Linear", "in_features": 3, "bias": False},
        ),
    ],
)
def test_other_layers_are_said_in_pytorchs_words(layer, expected):
    found = described(layer)
    assert "note" not in found
    assert {key: found[key] for key in expected} == expected


def test_a_layer_of_ones_own_that_computes_otherwise_has_a_note():
    class Standardised(nnx.Conv):
        def __call__(self, x):
            return super().__call__(x - x.mean())

    class Named(nnx.Conv):
        """Computes what its parent does."""

    note = described(Standardised(4, 8, (3, 3), rngs=nnx.Rngs(0)))["note"]
    assert note == "it is a Standardised, which has a custom __call__"
    assert "note" not in described(Named(4, 8, (3, 3), rngs=nnx.Rngs(0)))


def test_the_note_stands_under_the_layers_name_in_the_file(tmp_path):
    net = nnx.Dict(stem=conv(strides=2), last=conv())
    save_torch(net, tmp_path / "net.safetensors")
    layers = json.loads((tmp_path / "net.safetensors.json").read_text())["layers"]
    assert "depends on the size" in layers["stem"]["note"]
    assert layers["last"]["padding"] == [1, 1] and "note" not in layers["last"]


# With PyTorch


ALL = {**SAID, **{name: case for name, case in NOTED.items() if "strided" not in name}}
WITH_PAD = {"circular, even, strided": NOTED["circular, even, strided"]}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", [*ALL, *WITH_PAD, "same, strided"])
@pytest.mark.parametrize("size", [8, 9, 11])
def test_a_layer_rebuilt_in_pytorch_computes_the_same(name, size, tmp_path):
    torch = pytest.importorskip("torch")
    layer, _ = (SAID | NOTED)[name]
    save_torch(nnx.Dict(it=layer), tmp_path / "w.safetensors")
    from safetensors.torch import load_file

    told = described(layer)
    axes = len(told["kernel_size"])
    x = np.random.default_rng(0).normal(size=(2, *[size] * axes, 4)).astype(np.float32)
    theirs_x = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    note = told.pop("note", "")
    if "padding" not in told and "pad(x, " in note:  # does what the note says
        arguments = note.split("pad(x, ")[1].split(")")[0]
        pads, mode = eval(arguments)
        theirs_x = torch.nn.functional.pad(theirs_x, pads, mode)
    elif note:
        pads = []
        for k, s in zip(told["kernel_size"], told["stride"], strict=True):
            total = max((-(-size // s) - 1) * s + k - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        theirs_x = torch.nn.functional.pad(theirs_x, pads)
    theirs = getattr(torch.nn, told.pop("type"))(**told)
    weights = load_file(tmp_path / "w.safetensors")
    theirs.load_state_dict({k.removeprefix("it."): v for k, v in weights.items()})
    with torch.no_grad():
        expected = np.moveaxis(theirs(theirs_x).numpy(), 1, -1)
    np.testing.assert_allclose(layer(x), expected, atol=1e-4)


@pytest.mark.parametrize("name", [*NOTED, *OTHERS])
def test_pytorch_refuses_a_layer_with_a_note(name):
    torch = pytest.importorskip("torch")
    layer, _ = (NOTED | OTHERS)[name]
    told = described(layer)
    make = getattr(torch.nn, told.pop("type"), None)
    with pytest.raises(TypeError):
        make(**told)
