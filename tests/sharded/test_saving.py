"""Models whose arrays a mesh divides are saved and loaded part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tpp_jax as tpp
from tests.sharded.checks import assert_divided_alike, assert_equal
from tests.sharded.decoder import CONFIG, divided, parts, spec_of
from tpp_jax.graph.naming import named_leaves
from tpp_jax.models import Decoder
from tpp_jax.storage import items
from tpp_jax.storage.contents import content_sum


@pytest.fixture
def model(mesh):
    return nnx.merge(parts()[0], divided(mesh).params)


@pytest.fixture
def template():
    return nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))


@pytest.mark.usefixtures("only_scores_reach_the_host")
def test_no_array_is_whole_on_the_host(model, template, mesh, tmp_path, monkeypatch):
    tpp.save_model(tmp_path / "m", model)

    def sharding(name, shape):
        return NamedSharding(mesh, spec_of(name, shape))

    loaded = tpp.load_model(tmp_path / "m", template, sharding=sharding)
    monkeypatch.undo()
    assert_divided_alike(nnx.state(loaded), nnx.state(model))
    assert_equal(nnx.state(loaded), parts()[1], 0)


def test_a_model_is_loaded_into_other_parts(model, template, mesh, tmp_path):
    tpp.save_model(tmp_path / "m", model)
    here = tpp.load_model(tmp_path / "m", template)
    assert_equal(nnx.state(here), parts()[1], 0)
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(nnx.state(here)))
    # The last axis of the mesh does not divide the frequencies, two numbers.
    rows = NamedSharding(mesh, P("model"))
    loaded = tpp.load_model(tmp_path / "m", template, sharding=rows)
    assert_equal(nnx.state(loaded), parts()[1], 0)
    for name, leaf in named_leaves(nnx.state(loaded)).items():
        divides = leaf.shape[0] % 4 == 0
        assert leaf.sharding.spec == (P("model") if divides else P(None)), name
    # What one device saved can be divided too.
    tpp.save_model(tmp_path / "one", here)
    loaded = tpp.load_model(tmp_path / "one", template, sharding=rows)
    assert_equal(nnx.state(loaded), parts()[1], 0)
    assert loaded.layers[0].mlp.up_proj.kernel[...].sharding == rows
    read = items.restore_arrays(tmp_path / "one", rows)  # by the devices themselves
    assert read["layers.0.mlp.up_proj.kernel"].sharding == rows
    assert all(isinstance(array, jax.Array) for array in read.values())


def test_a_flipped_bit_in_a_part_is_noticed(mesh, tmp_path):
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    there = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
    tpp.save_model(tmp_path / "m", {"x": there})
    sums = content_sum(x)
    assert content_sum(there) == sums
    x[5, 7] = -x[5, 7]
    assert content_sum(x) != sums
    files = [f for f in (tmp_path / "m").rglob("*") if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    for sharding in (None, there.sharding):
        with pytest.raises(tpp.TPPError, match="damaged"):
            tpp.load_model(tmp_path / "m", sharding=sharding)


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "int8", "bool", "uint16", "complex64", "float64"]
)
def test_checksums_do_not_depend_on_the_division(dtype, mesh):
    with jax.enable_x64(True):
        x = np.asarray(jnp.arange(-8, 56).reshape(8, 8) % 7).astype(jnp.dtype(dtype))
        found = {
            content_sum(jax.device_put(x, NamedSharding(mesh, spec)))
            for spec in (P("data"), P(None, "model"), P(("model", "data")))
        }
        assert found == {content_sum(x)}


@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        ("data", "the sharding of w is 'data'"),
        (lambda name, shape: P("data"), r"the sharding of w is P\('data',?\)"),
        ("long", "more axes than its shape"),
    ],
)
def test_shardings_that_are_none_are_mistakes(sharding, message, mesh, tmp_path):
    if sharding == "long":
        long = NamedSharding(mesh, P(None, "data"))
        sharding = lambda name, shape: long  # noqa: E731
    tpp.save_model(tmp_path / "m", {"w": np.ones(4, np.float32) + jnp.zeros(4)})
    with pytest.raises(tpp.TPPError, match=message):
        tpp.load_model(tmp_path / "m", sharding=sharding)
