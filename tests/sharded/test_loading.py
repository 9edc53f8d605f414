"""Folders of language models are loaded into a sharding, one tensor at a time."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import tpp_jax as tpp
from tests.sharded.checks import assert_divided_alike, assert_equal
from tests.sharded.decoder import CONFIG, divided, parts, spec_of
from tpp_jax.models import Decoder

ROOT = pathlib.Path(__file__).parents[2]


def save_in_files(model, folder, count):
    """Saves a model as a folder with several files of weights and their index."""
    tpp.save_hf(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        own = dict(list(tensors.items())[i::count])
        save_file(own, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(own, file)
    content = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(content)
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    save_in_files(nnx.merge(*parts()), folder, 3)
    return folder


def test_each_device_gets_its_part(folder, mesh):
    def sharding(name, shape):
        return NamedSharding(mesh, spec_of(name, shape))

    model, _ = tpp.load_hf(folder, sharding=sharding)
    assert_divided_alike(nnx.state(model), divided(mesh).params)
    assert_equal(nnx.state(model), parts()[1], 0)
    narrow, _ = tpp.load_hf(folder, sharding=sharding, param_dtype="bfloat16")
    kernel = narrow.layers[1].mlp.up_proj.kernel[...]
    assert kernel.dtype == "bfloat16" and kernel.sharding.spec == P(None, "model")


def test_one_sharding_is_fitted_to_every_parameter(folder, mesh):
    model, _ = tpp.load_hf(folder, sharding=NamedSharding(mesh, P("model", "data")))
    specs = {x.sharding.spec for x in jax.tree.leaves(nnx.state(model))}
    assert specs == {P("model", "data"), P("model"), P(None)}
    assert_equal(nnx.state(model), parts()[1], 0)


def test_a_sharding_that_is_none_is_a_mistake(folder):
    with pytest.raises(tpp.TPPError, match=r"the sharding of .* is 3: give a jax"):
        tpp.load_hf(folder, sharding=lambda name, shape: 3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_two_copies_of_a_model_are_in_memory(tmp_path):
    config = dataclasses.replace(CONFIG, vocabulary=16384, width=512, hidden=8192)
    shapes = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    size = save_in_files(model, tmp_path, 4)
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharded.load_folder", str(tmp_path)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    grown, loaded = json.loads(done.stdout.splitlines()[-1])
    assert size <= loaded < 1.01 * size
    # The model, one tensor (a quarter of it), and what the compiler needs by itself.
    assert grown < 1.9 * size, (grown, size)
