"""Models as files of StableHLO and ONNX: they compute the same elsewhere."""

import json
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import linen, nnx

import tpp_jax as tpp
from tests.gallery import others
from tests.reference import filled
from tpp_jax.interop import comparing

IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
# A process that has JAX but neither Flax nor this library.
READER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("flax", "tpp_jax", "optax"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import pathlib
import numpy as np
from jax import export
net = export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
print(net.platforms)
np.save(sys.argv[2], net.call(np.load(sys.argv[3])))
"""


@pytest.fixture(scope="module")
def network():
    model = filled(
        lambda: tpp.models.create(
            "cifar_resnet8", image_shape=(8, 8, 1), rngs=nnx.Rngs(0)
        )
    )
    groups = tpp.channel_groups(model, IMAGES)
    return tpp.prune(model, tpp.make_plan(groups, model, 0.5))


@pytest.fixture(scope="module")
def expected(network):
    network.eval()
    return np.asarray(nnx.jit(lambda model, x: model(x))(network, IMAGES))


@pytest.fixture(scope="module")
def stablehlo(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("stablehlo") / "net.stablehlo"
    return tpp.export(network, path, IMAGES)


@pytest.fixture(scope="module")
def onnx_file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "missing" / "net.onnx"
    return tpp.export(network, path, IMAGES)


def run(path, **inputs):
    session = onnxruntime.InferenceSession(path.read_bytes())
    return session.run(None, inputs)


def test_a_process_with_jax_alone_reads_stablehlo(stablehlo, expected, tmp_path):
    images, outputs = tmp_path / "images.npy", tmp_path / "outputs.npy"
    np.save(images, np.concatenate([IMAGES, IMAGES]))
    arguments = [stablehlo.path, outputs, images]
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "('cpu', 'cuda', 'rocm', 'tpu')"
    both = np.concatenate([expected, expected])
    np.testing.assert_allclose(np.load(outputs), both, atol=1e-5 * expected.std())


def test_onnx_runtime_computes_the_same(onnx_file, expected):
    [found] = run(onnx_file.path, x=IMAGES)
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.std())
    [one] = run(onnx_file.path, x=IMAGES[1:2])
    np.testing.assert_allclose(one, expected[1:2], atol=1e-5 * expected.std())


def test_norms_are_folded_and_constants_computed_in_an_onnx_file(onnx_file):
    operations = onnx_file.operations
    assert operations["Conv"] == operations["Relu"] == 7
    assert not operations.keys() & {"Mul", "Sub", "Sqrt", "BatchNormalization"}
    assert operations["Transpose"] <= 3  # at the ends, and around the shortcuts
    model = onnx.load(onnx_file.path)
    constants = {one.name for one in model.graph.initializer}
    assert not [n for n in model.graph.node if n.input and {*n.input} <= constants]
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 21)]


@pytest.mark.parametrize("which", ["stablehlo", "onnx_file"])
def test_what_was_checked_is_returned_and_stored(which, network, request):
    checked = request.getfixturevalue(which)
    stored = json.loads(checked.path.with_name(f"{checked.path.name}.json").read_text())
    assert stored["difference"] == checked.difference < 1e-5
    assert stored["inputs"] == checked.inputs == {"x": "float32[batch, 8, 8, 1]"}
    assert checked.outputs == {"output": "float32[batch, 10]"}
    assert checked.batch_sizes == (3, 1)
    assert checked.bytes == checked.path.stat().st_size
    counted = tpp.count(network, IMAGES[:1])
    assert (checked.params, checked.flops) == (counted.params, counted.flops)


@pytest.mark.parametrize("suffix", ["stablehlo", "onnx"])
def test_nothing_is_left_where_outputs_differ(suffix, network, tmp_path):
    path = tmp_path / f"net.{suffix}"
    path.write_text("mine")
    with pytest.raises(tpp.TPPError, match="differ from the model's by"):
        tpp.export(network, path, IMAGES, tolerance=1e-12)
    assert path.read_text() == "mine"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


def several(params, x, options, *, scale, negate=False):
    """A function of several inputs, in containers, with outputs of both kinds."""
    y = (x @ params["w"] + options["shift"]) * scale
    return Pair(-y if negate else y, jnp.argmax(y, axis=-1))


@pytest.mark.parametrize("suffix", ["stablehlo", "onnx"])
def test_inputs_may_be_pytrees_keywords_and_constants(suffix, tmp_path):
    draws = np.random.default_rng(1)
    params = {"w": draws.normal(size=(4, 5)).astype(np.float32)}
    x, shift = (draws.normal(size=s).astype(np.float32) for s in ((3, 4), (5,)))
    scale = np.array(2, np.float32)
    checked = tpp.export(
        several,
        tmp_path / f"several.{suffix}",
        x,
        {"shift": shift},
        params=params,
        scale=scale,
        negate=True,
    )
    assert checked.inputs == {
        "x": "float32[batch, 4]",
        "options.shift": "float32[5]",
        "scale": "float32[]",
    }
    assert checked.outputs == {
        "output.first": "float32[batch, 5]",
        "output.second": "int32[batch]",
    }
    expected = several(params, x, {"shift": shift}, scale=scale, negate=True)
    if suffix == "onnx":
        found = run(checked.path, **{"x": x, "options.shift": shift, "scale": scale})
    else:
        net = jax.export.deserialize(bytearray(checked.path.read_bytes()))
        outputs = net.call(x, {"shift": shift}, scale=scale)
        found = [outputs["output.first"], outputs["output.second"]]
    np.testing.assert_allclose(found[0], expected.first, rtol=1e-5)
    np.testing.assert_array_equal(found[1], expected.second)


class Encoder(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(11, 8)(tokens)
        x = linen.LayerNorm()(x + linen.MultiHeadDotProductAttention(2)(x))
        return linen.Dense(3)(nnx.gelu(linen.Dense(16)(x)))


@pytest.mark.parametrize("suffix", ["stablehlo", "onnx"])
def test_sizes_of_the_users_own_are_free(suffix, tmp_path):
    model = Encoder()
    tokens = np.random.default_rng(2).integers(11, size=(2, 5)).astype(np.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    sizes = jax.export.symbolic_shape("batch, length")
    free = jax.ShapeDtypeStruct(sizes, jnp.int32)
    path = tmp_path / f"encoder.{suffix}"
    checked = tpp.export(model, path, free, params=variables)
    assert checked.inputs == {"tokens": "int32[batch, length]"}
    assert checked.outputs == {"output": "float32[batch, length, 3]"}
    if suffix == "onnx":
        [found] = run(path, tokens=tokens)
        expected = model.apply(variables, tokens)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_model_may_change_its_state_while_it_runs(tmp_path):
    create, inputs = others.MODELS["LSTM"]  # its carry starts with random numbers
    model = filled(lambda: create(rngs=nnx.Rngs(0)))
    before = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    checked = tpp.export(model, tmp_path / "lstm.onnx", *inputs)
    assert checked.difference < 1e-5
    assert checked.operations["Loop"] == 1
    after = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    jax.tree.map(np.testing.assert_array_equal, before, after)


class FixedBatch(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.layer(x).reshape(2, 3)


def test_a_model_of_one_batch_size_is_refused_with_the_remedy(tmp_path):
    model, x = FixedBatch(nnx.Rngs(0)), jnp.ones((3, 4))
    with pytest.raises(tpp.TPPError, match="pass dynamic_batch=False for"):
        tpp.export(model, tmp_path / "fixed.stablehlo", x)
    path = tmp_path / "fixed.stablehlo"
    checked = tpp.export(model, path, x, dynamic_batch=False)
    assert checked.inputs == {"x": "float32[3, 4]"}
    assert checked.batch_sizes == (3,)


def called_back(params, x):
    jax.debug.print("{}", x)  # dropped: the file has nowhere to print to
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(np.sin, shape, x @ params["w"])


@pytest.mark.parametrize("suffix", ["stablehlo", "onnx"])
def test_an_operation_without_an_equivalent_is_named(suffix, tmp_path):
    params = {"w": jnp.ones((4, 4))}
    with pytest.raises(tpp.TPPError) as raised:
        tpp.export(
            called_back, tmp_path / f"net.{suffix}", jnp.ones((2, 4)), params=params
        )
    assert "pure_callback (test_exporting.py:" in str(raised.value)
    assert "debug" not in str(raised.value)
    assert not [*tmp_path.iterdir()]


def pooled(params, x):
    """Pooling of all kinds, a ReLU6, and products over several axes."""
    x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
    x = nnx.avg_pool(x, (2, 2), strides=(1, 1), padding="VALID")
    x = jax.nn.relu6(5 * x)
    gate = x.mean((1, 2))
    x = jnp.einsum("bhwc,bc->bhwc", x, gate) + jnp.einsum("bhwc,bhwd->bcd", x, x)[
        :, None
    ].mean(-1, keepdims=True).mean(-2, keepdims=True)
    return jnp.einsum("bhwc,hwcd->bd", x, params["w"])


def test_pooling_and_products_become_single_operations_of_onnx(tmp_path):
    draws = np.random.default_rng(3)
    x = draws.normal(size=(2, 9, 9, 3)).astype(np.float32)
    params = {"w": draws.normal(size=(4, 4, 3, 2)).astype(np.float32)}
    checked = tpp.export(pooled, tmp_path / "pooled.onnx", x, params=params)
    kinds = checked.operations
    assert kinds["MaxPool"] == kinds["AveragePool"] == kinds["Clip"] == 1
    assert "Einsum" not in kinds and "Relu" not in kinds


def test_look_ups_in_weights_are_computed_when_the_file_is_written(tmp_path):
    """Their own rules compute too, and must not do so while they are compiled."""

    def net(p, x):
        return x + jnp.take(p["table"], jnp.arange(3), axis=0).sum()

    params = {"table": np.arange(35, dtype=np.float32).reshape(5, 7)}
    path = tmp_path / "net.stablehlo"
    checked = tpp.export(net, path, np.ones((2, 7), np.float32), params=params)
    assert checked.difference < 1e-6


def odd_forms(p, x, images):
    """Operations in forms that converters get wrong, or refuse."""
    window = {"window_dimensions": (1, 1, 2, 2), "padding": "VALID"}
    strides = {"window_strides": (1, 1, 2, 2)}
    y = x @ p["w"]  # in bfloat16
    low = jnp.asarray(jnp.floor(10 * x), jnp.int32)
    return {
        "input": x,
        "weight": p["v"],
        "twice": (y, y),
        "columns": jnp.einsum("bd,de->eb", x, p["v"]),
        "gram": jnp.einsum("bd,be->de", x, x),
        "remainders": (low % -3, low // 4, jax.lax.rem(x, jnp.float32(0.3)), x % 0.7),
        "edges": jnp.pad(images, ((0, 0), (1, 2), (2, 1), (0, 0)), mode="edge"),
        "channels_first": jax.lax.reduce_window(
            images, -jnp.inf, jax.lax.max, **window, **strides
        ),
        "volumes": nnx.avg_pool(images[..., None], (2, 2, 2), strides=(2, 2, 2)),
        "sum_of_batch": jax.lax.fori_loop(
            0, 3, lambda i, s: s + jnp.arange(x.shape[0]).sum(), 0
        ),
        "mean_of_batch": x / x.shape[0],
        "nan": jnp.log(x),
    }


@pytest.mark.parametrize("suffix", ["stablehlo", "onnx"])
def test_odd_forms_compute_the_same_for_other_batches(suffix, tmp_path):
    draws = np.random.default_rng(4)
    shapes = {"x": (3, 4), "images": (3, 8, 8, 4)}
    params = {"v": draws.normal(size=(4, 4)).astype(np.float32)}
    params["w"] = jnp.asarray(params["v"], jnp.bfloat16)
    given = [draws.normal(size=shape) for shape in shapes.values()]  # in float64
    checked = tpp.export(odd_forms, tmp_path / f"odd.{suffix}", *given, params=params)
    assert checked.inputs["x"] == "float32[batch, 4]"
    others = {
        name: draws.normal(size=(5, *shape[1:])).astype(np.float32)
        for name, shape in shapes.items()
    }
    expected = jax.tree.leaves(jax.jit(odd_forms)(params, *others.values()))
    if suffix == "onnx":
        found = run(checked.path, **others)
    else:
        net = jax.export.deserialize(bytearray(checked.path.read_bytes()))
        found = jax.tree.leaves(net.call(*others.values()))
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        wide = (np.asarray(value, np.float64) for value in (one, other))
        np.testing.assert_allclose(*wide, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", ["stablehlo", "onnx"])
def test_names_are_unique(suffix, tmp_path):
    def net(p, output):
        return {"a.b": output @ p["w"], "a": {"b": -output}}

    params = {"w": np.ones((2, 2), np.float32)}
    path = tmp_path / f"net.{suffix}"
    checked = tpp.export(net, path, np.ones((3, 2), np.float32), params=params)
    assert len({*checked.inputs, *checked.outputs}) == 3


def test_a_file_that_gives_nan_or_another_type_differs():
    a = np.array([1.0, 2.0, np.nan], np.float32)
    b = np.array([1.0, np.nan, np.nan], np.float32)
    assert comparing.difference([a], [a], ["output"]) == 0
    assert comparing.difference([a], [b], ["output"]) == np.inf
    assert comparing.difference([b], [a], ["output"]) == np.inf
    with pytest.raises(tpp.TPPError, match=r"float64\[3\] instead of float32\[3\]"):
        comparing.difference([a], [a.astype(np.float64)], ["output"])
    level = np.array([1000, 1000.0001], np.float32)  # their difference is rounding
    assert comparing.difference([level], [level[::-1]], ["output"]) < 1e-4


def test_outputs_that_do_not_depend_on_inputs_are_a_warning(tmp_path):
    zeros = nnx.initializers.zeros_init()
    model = nnx.Linear(3, 2, kernel_init=zeros, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="do not depend on its inputs"):
        tpp.export(model, tmp_path / "zero.stablehlo", jnp.ones((4, 3)))


def test_half_precision_is_compared_up_to_its_rounding(tmp_path):
    def create():
        half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
        layers = nnx.Linear(4, 8, **half), nnx.BatchNorm(8, **half), nnx.relu
        return nnx.Sequential(*layers, nnx.Linear(8, 8, **half))

    model = filled(create)
    x = np.random.default_rng(5).normal(size=(6, 4)).astype(np.float32)
    tpp.export(model, tmp_path / "half.stablehlo", x)
    with pytest.raises(tpp.TPPError, match=r"bfloat16 .*to float32, or export to"):
        tpp.export(model, tmp_path / "half.onnx", x)
    assert not [*tmp_path.glob("*.onnx*")]


def test_divided_weights_become_one_file(tmp_path):
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=explicit)
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    params = {"w": jax.device_put(np.eye(8, dtype=np.float32), divided)}
    path = tmp_path / "net.stablehlo"
    tpp.export(
        lambda p, x: x @ p["w"], path, np.ones((2, 8), np.float32), params=params
    )
    net = jax.export.deserialize(bytearray(path.read_bytes()))
    assert net.nr_devices == 1
    np.testing.assert_array_equal(net.call(np.ones((3, 8), np.float32)), 1)


def test_jax_is_as_before_after_a_conversion(onnx_file):
    assert onnx_file.difference < 1e-5  # jax2onnx was imported, and ran
    changed = [
        f"{module.__name__}.{name}"
        for module in (jnp, jax.nn, jax.lax, nnx, linen)
        for name, value in vars(module).items()
        if str(getattr(value, "__module__", "")).startswith("jax2onnx")
    ]
    assert not changed
