"""Models as LiteRT files, run by LiteRT; they need the extra ``litert``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import tpp_jax as tpp
from tests.gallery import test_convnets as convnets
from tests.gallery import test_others as others
from tests.reference import filled
from tpp_jax.interop.exporting import export

pytest.importorskip("litert_converter")
pytest.importorskip("ai_edge_litert")
ROWS = np.asarray(np.random.default_rng(0).normal(size=(3, 4)), np.float32)


def test_a_pruned_network_is_convolutions_and_sums(tmp_path):
    net = filled(lambda: tpp.models.create("cifar_resnet8", rngs=nnx.Rngs(0)))
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    groups = tpp.channel_groups(net, images)
    small = tpp.prune(net, tpp.make_plan(groups, net, 0.5))
    file = export(small, tmp_path / "small.tflite", images, dynamic_batch=False)
    dense = export(net, tmp_path / "dense.tflite", images, dynamic_batch=False)
    assert file.difference < 1e-5
    assert file.bytes < 0.5 * dense.bytes
    # Its norms are gone, and so are the ReLUs, which are part of the convolutions.
    kinds = {"ADD", "CONV_2D", "FULLY_CONNECTED", "MEAN", "PAD", "STRIDED_SLICE"}
    assert set(file.operations) <= kinds
    assert file.operations["CONV_2D"] == 7


def two_outputs(p, x, more):
    return {"product": x @ p["w"], "sum": (more["state"] + 1).sum()}


def test_a_file_accepts_batches_of_any_size_and_names_what_it_takes(tmp_path):
    state = {"state": np.ones((3, 2), np.float32)}
    params = {"w": jnp.ones((4, 2))}
    file = export(two_outputs, tmp_path / "f.tflite", ROWS, state, params=params)
    assert file.batch_sizes == (3, 1)
    assert list(file.inputs) == ["x", "more.state"]
    assert list(file.outputs) == ["output.product", "output.sum"]


# What needs another form before it is converted.
FORMS = {
    "transposed convolution": lambda p, x: lax.conv_transpose(
        x.reshape(-1, 2, 2, 1), p["w"] * jnp.ones((3, 3, 1, 5)), (2, 2), "SAME"
    ),
    "one entry of an axis": lambda p, x: x.reshape(-1, 2, 2)[:, 1] * p["w"],
    "branches": lambda p, x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x * p["w"]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("any_batch", [True, False])
def test_operations_that_are_written_in_another_form(form, any_batch, tmp_path):
    file = tmp_path / "f.tflite"
    params, options = {"w": jnp.float32(2)}, {"dynamic_batch": any_batch}
    assert export(FORMS[form], file, ROWS, params=params, **options).difference < 1e-5


REFUSED = {
    "fft": lambda p, x: jnp.abs(jnp.fft.fft(x * p["w"])),
    "while": lambda p, x: lax.fori_loop(0, 3, lambda _, c: jnp.sin(c) * p["w"], x),
    "lapack_spotrf_ffi": lambda p, x: jnp.linalg.cholesky(x.T @ x + p["w"]),
    "STABLEHLO_SORT": lambda p, x: jnp.sort(x * p["w"]),
    "mul in bfloat16": lambda p, x: x.astype("bfloat16") * p["w"].astype("bfloat16"),
}


@pytest.mark.parametrize("operation", REFUSED)
def test_what_has_no_equivalent_is_refused_by_name(operation, tmp_path):
    file = tmp_path / "f.tflite"
    params = {"w": jnp.float32(2)}
    with pytest.raises(tpp.TPPError, match=f"has no operation for {operation}"):
        export(REFUSED[operation], file, ROWS, params=params, dynamic_batch=False)
    assert not list(tmp_path.iterdir())


def test_a_language_model(tmp_path):
    net = tpp.models.small_decoder(nnx.Rngs(0), depth=1, width=32, hidden=48)
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 256)
    assert export(net, tmp_path / "net.tflite", tokens).difference < 1e-4


# Networks of the gallery that are refused, and the operation that is named.
LOOPS = dict.fromkeys(
    ("LSTM", "GRU", "two-layer GRU", "bidirectional LSTM", "plain decoder"), "while"
)
WITHOUT = LOOPS | {"message passing": "scatter"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*convnets.NETWORKS, *others.EVERY])
def test_networks_of_the_gallery_are_converted_or_refused(name, tmp_path):
    if name in convnets.NETWORKS:
        model, params = convnets.network(name)
        inputs = [jax.ShapeDtypeStruct(convnets.NETWORKS[name][1], jnp.float32)]
    else:
        (model, params, _), inputs = others.network(name), others.examples(name)
    file, options = tmp_path / "f.tflite", {"params": params, "dynamic_batch": False}
    if name in WITHOUT:
        with pytest.raises(tpp.TPPError, match=WITHOUT[name]):
            export(model, file, *inputs, **options)
    else:
        assert export(model, file, *inputs, **options).difference < 1e-4
