"""Our networks and PyTorch's, side by side in float64: outputs, gradients, averages.

Skipped where PyTorch and torchvision are not installed (the extra ``torch``).
"""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

import tpp_jax as tpp  # noqa: E402
from tests.interop.tensors import FILES  # noqa: E402
from tests.reference import filled  # noqa: E402
from tpp_jax.graph.naming import named_leaves  # noqa: E402
from tpp_jax.interop.layers import describe_layers  # noqa: E402
from tpp_jax.interop.places import places  # noqa: E402
from tpp_jax.interop.torch_files import read_torch  # noqa: E402
from tpp_jax.interop.torch_weights import load_torch, save_torch  # noqa: E402
from tpp_jax.models import layers, vit  # noqa: E402
from tpp_jax.models.resnet import overlapping_max_pool  # noqa: E402
from tpp_jax.models.vgg import VGG  # noqa: E402

TOLERANCE = 1e-9  # of the largest number of each array


@pytest.fixture(autouse=True)
def in_float64():
    torch.manual_seed(0)
    with jax.enable_x64(True):
        yield


class Sequence(nnx.List):
    def __call__(self, x):
        for layer in self:
            x = layer(x)
        return x


def assert_close(found, expected, what=""):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, what
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=TOLERANCE * scale + 1e-12, err_msg=what
    )


def random_averages(theirs):
    """Gives every batch norm averages and weights that do not hide a mistake."""
    for name, tensor in theirs.state_dict().items():
        if name.endswith(("running_var", "weight")) and tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("running_mean") or tensor.ndim == 1:
            tensor.normal_(0, 0.1)


def channels_first(x):
    return x.transpose(0, 3, 1, 2) if x.ndim == 4 else x


def assert_same_network(ours, theirs, shape):
    """Loads the weights and compares everything that a step sees."""
    theirs = theirs.double()
    random_averages(theirs)
    ours = load_torch(theirs.state_dict(), ours)
    x = np.random.default_rng(0).normal(size=shape)
    there = torch.from_numpy(channels_first(x).copy())

    ours.eval(), theirs.eval()
    expected = theirs(there).detach()
    graphdef, state = nnx.split(ours)
    y = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    assert_close(channels_first(np.asarray(y)), expected, "in evaluation")

    ours.train(), theirs.train()
    weight = np.random.default_rng(1).normal(size=y.shape)
    y = theirs(there)
    (y * torch.from_numpy(channels_first(weight).copy())).sum().backward()
    graphdef, params, rest = nnx.split(ours, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(params):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return (model(x) * weight).sum()

    @jax.jit
    def averages(params):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return model(x), nnx.state(model, nnx.BatchStat)

    found, after = averages(params)
    assert_close(channels_first(np.asarray(found)), y.detach(), "in training")
    there = {place.leaf: place for place in places(ours)}
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    buffers = theirs.state_dict()
    leaves = named_leaves(gradient(params))
    assert {there[leaf].name for leaf in leaves} == gradients.keys()
    for leaf, found in leaves.items():
        name = there[leaf].name
        assert_close(there[leaf].to_torch(np.asarray(found)), gradients[name], name)
    for leaf, found in named_leaves(after).items():
        assert_close(found, buffers[there[leaf].name], leaf)


def rngs():
    return nnx.Rngs(0)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups", "bias"),
    [
        (3, 1, 1, 1, False),
        (3, 2, 1, 1, True),
        (7, 2, 3, 1, False),
        (1, 2, 0, 1, False),
        (5, 1, 0, 2, True),
        (3, 2, 1, 4, False),
    ],
)
@pytest.mark.parametrize("size", [8, 9])
def test_convolutions(kernel, stride, padding, groups, bias, size):
    kwargs = {"stride": stride, "padding": padding, "groups": groups, "bias": bias}
    ours = Sequence([layers.conv(4, 8, kernel, **kwargs, rngs=rngs())])
    theirs = torch.nn.Sequential(torch.nn.Conv2d(4, 8, kernel, **kwargs))
    assert_same_network(ours, theirs, (2, size, size + 3, 4))


def test_dense_layers():
    ours = Sequence([layers.dense(5, 3, rngs=rngs())])
    assert_same_network(ours, torch.nn.Sequential(torch.nn.Linear(5, 3)), (4, 5))


def test_batch_norms():
    ours = Sequence([layers.BatchNorm(3, rngs=rngs())])
    theirs = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    assert_same_network(ours, theirs, (4, 5, 6, 3))


def test_layer_norms():
    ours = Sequence([vit._layer_norm(6, rngs())])
    theirs = torch.nn.Sequential(torch.nn.LayerNorm(6, eps=1e-6))
    assert_same_network(ours, theirs, (4, 3, 6))


def test_attention():
    ours = vit.SelfAttention(8, 2, rngs=rngs())

    class Attention(torch.nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    # PyTorch's names are then without the layer's own: in_proj_weight.
    outer = Sequence([ours])
    theirs = torch.nn.Sequential(Attention(8, 2, batch_first=True))
    assert_same_network(outer, theirs, (2, 5, 8))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (layers.max_pool, torch.nn.MaxPool2d(2)),
        (overlapping_max_pool, torch.nn.MaxPool2d(3, 2, padding=1)),
        (layers.relu, torch.nn.ReLU()),
        (layers.relu6, torch.nn.ReLU6()),
        (vit.Gelu(), torch.nn.GELU()),
        (layers.global_average_pool, lambda x: x.mean((2, 3))),
    ],
    ids=["pool", "overlapping pool", "relu", "relu6", "gelu", "average"],
)
@pytest.mark.parametrize("size", [6, 7])
def test_what_has_no_weights(ours, theirs, size):
    x = np.random.default_rng(0).normal(0, 4, size=(2, size, size + 1, 3))
    there = torch.from_numpy(channels_first(x).copy()).requires_grad_()
    y = theirs(there)
    weight = np.random.default_rng(1).normal(size=ours(x).shape)
    (y * torch.from_numpy(channels_first(weight).copy())).sum().backward()
    assert_close(channels_first(np.asarray(ours(jnp.asarray(x)))), y.detach())
    found = jax.grad(lambda x: (ours(x) * weight).sum())(jnp.asarray(x))
    assert_close(channels_first(np.asarray(found)), there.grad)


def abstract(name, **kwargs):
    return nnx.eval_shape(lambda: tpp.models.create(name, rngs=rngs(), **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_network_of_torchvision(name):
    theirs = torchvision.models.get_model(name, num_classes=7)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert_same_network(abstract(name, num_classes=7), theirs, (4, 64, 64, 3))


def test_a_vgg():
    """Small, with a dense layer on a flattened feature map of 7×7 pixels."""
    theirs = torchvision.models.VGG(
        torchvision.models.vgg.make_layers([4, "M", 6, "M"], batch_norm=True),
        num_classes=3,
        dropout=0.0,
    )
    theirs.classifier[0] = torch.nn.Linear(6 * 49, 20)
    theirs.classifier[3] = torch.nn.Linear(20, 20)
    theirs.classifier[6] = torch.nn.Linear(20, 3)
    ours = VGG(((4,), (6,)), num_classes=3, hidden=20, rngs=rngs())
    for side in (28, 40):
        assert_same_network(ours, theirs, (3, side, side, 3))
        theirs.zero_grad()


def test_an_mlp_on_images_with_channels():
    ours = abstract("mlp7_relu", image_shape=(5, 4, 3), num_classes=3)
    widths = [60, *[100] * 6, 3]
    net = []
    for before, after in itertools.pairwise(widths):
        net += [torch.nn.Linear(before, after), torch.nn.ReLU()]

    class MLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(*net[:-1])

        def forward(self, x):
            return self.net(x.flatten(1))

    assert_same_network(ours, MLP(), (3, 5, 4, 3))


def test_a_vision_transformer():
    sizes = vit.Architecture(patch=4, depth=2, width=16, heads=4, hidden=24)
    ours = vit.VisionTransformer(
        sizes, num_classes=3, image_shape=(8, 8, 3), rngs=rngs()
    )
    theirs = torchvision.models.VisionTransformer(
        image_size=8,
        patch_size=4,
        num_layers=2,
        num_heads=4,
        hidden_dim=16,
        mlp_dim=24,
        num_classes=3,
    )
    for parameter in theirs.parameters():  # the last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.3)
    assert_same_network(ours, theirs, (2, 8, 8, 3))


# Files


def test_pytorch_reads_the_fixtures_as_we_do():
    for path in FILES.glob("s*.pth"):
        expected = torch.load(path, weights_only=True)
        for name, tensor in read_torch(path).items():
            there = expected[name].detach()
            if there.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
                np.testing.assert_array_equal(tensor, there.numpy())


def half(ours):
    state = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(ours))
    return nnx.merge(nnx.graphdef(ours), state)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("change", [lambda ours: ours, half], ids=["float32", "half"])
def test_what_is_saved_is_loaded_by_pytorch_and_comes_back(suffix, change, tmp_path):
    with jax.enable_x64(False):
        ours = tpp.models.create("lenet5", rngs=rngs())
    ours = change(ours)
    path = tmp_path / f"lenet{suffix}"
    save_torch(ours, path)
    if suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
    else:
        tensors = torch.load(path, weights_only=True)
    for source in (path, tensors):
        back = named_leaves(nnx.state(load_torch(source, abstract("lenet5"))))
        for name, array in named_leaves(nnx.state(ours)).items():
            assert back[name].dtype == array.dtype
            np.testing.assert_array_equal(back[name], array)


def rebuilt(theirs, layers):
    """As docs/weights.md has it."""
    for name, layer in layers.items():
        theirs.set_submodule(name, getattr(torch.nn, layer.pop("type"))(**layer))
    return theirs


def test_a_transformer_is_rebuilt_in_pytorch_unless_heads_are_pruned(tmp_path):
    def create():
        return vit.VisionTransformer(
            vit.Architecture(patch=4, depth=1, width=16, heads=4, hidden=24),
            num_classes=3,
            image_shape=(8, 8, 3),
            rngs=rngs(),
        )

    ours = filled(create)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
    groups = tpp.channel_groups(ours, x)
    small = tpp.prune(ours, tpp.make_plan(groups, ours, "*mlp.0:0.5"))
    small.eval()
    save_torch(small, tmp_path / "small.pth")
    theirs = torchvision.models.VisionTransformer(8, 4, 1, 4, 16, 24)
    theirs = rebuilt(theirs, describe_layers(small)["layers"]).double().eval()
    theirs.load_state_dict(torch.load(tmp_path / "small.pth", weights_only=True))
    found = theirs(torch.from_numpy(channels_first(x).copy()))
    assert_close(small(x), found.detach())

    fewer = tpp.prune(ours, tpp.make_plan(groups, ours, "*in_proj:0.5"))
    with pytest.raises(TypeError, match="head_dim"):
        rebuilt(theirs, describe_layers(fewer)["layers"])
