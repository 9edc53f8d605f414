"""Folders of language models are pruned one tensor at a time."""

import json
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import tpp_jax as tpp
from tests.limited_memory import peak_of
from tests.sharded.test_loading import save_in_files
from tpp_jax.interop import pruned_folders
from tpp_jax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocabulary=50,
    width=16,
    depth=3,
    heads=4,
    kv_heads=2,
    head_size=8,
    hidden=32,
    qkv_bias=True,
)
TOKENS = np.arange(12)[None] % 50
CHOICES = {
    "units": ({"*.mlp.gate_proj": 0.5}, {}),
    "heads and pairs": ({"*.q_proj": 0.5, "*.q_proj#3": 0.5}, {}),
    "a block": ({"*.mlp.gate_proj": 0.5, "layers.1.*": 1}, {"min_channels": 0}),
    "all widths": (None, {"params": 0.6, "scope": "global", "criterion": "l2"}),
}


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    save_in_files(model, folder, 3)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def weights(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("kind", CHOICES)
def test_the_result_is_that_of_loading_pruning_and_saving(
    kind, model, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(pruned_folders, "_FILE_BYTES", 6000)
    ratios, choices = CHOICES[kind]
    plan = tpp.prune_hf(folder, tmp_path / "small", ratios, **choices)
    groups = tpp.channel_groups(model, np.zeros((1, 16), int))
    own = tpp.make_plan(groups, model, ratios, **choices)
    assert plan.to_dict() == own.to_dict()
    wanted = tpp.prune(model, own)
    tpp.save_hf(wanted, tmp_path / "wanted")
    found, expected = weights(tmp_path / "small"), weights(tmp_path / "wanted")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
    settings = [
        json.loads((tmp_path / name / "config.json").read_text())
        for name in ("small", "wanted")
    ]
    assert settings[0] == settings[1]
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    assert (tmp_path / "small" / "tokenizer_config.json").read_text() == "{}"
    small, _ = tpp.load_hf(tmp_path / "small")
    np.testing.assert_array_equal(small(TOKENS), wanted(TOKENS))


def test_a_pruned_folder_can_be_pruned_again(folder, tmp_path):
    tpp.prune_hf(folder, tmp_path / "once", {"*.q_proj#3": 0.5})
    tpp.prune_hf(tmp_path / "once", tmp_path / "twice", {"*.mlp.gate_proj": 0.5})
    small, _ = tpp.load_hf(tmp_path / "twice")
    assert small.config.head_size == 4 and small.config.hidden == 16
    once, _ = tpp.load_hf(tmp_path / "once")
    frequencies = small.layers[0].self_attn.frequencies[...]
    np.testing.assert_array_equal(
        frequencies, once.layers[0].self_attn.frequencies[...]
    )


def test_a_folder_with_files_is_not_written_into(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(tpp.TPPError, match="not an empty folder: name a new one"):
        tpp.prune_hf(folder, tmp_path, {"*.mlp.gate_proj": 0.5})
    with pytest.raises(tpp.TPPError, match="not an empty folder"):
        tpp.prune_hf(folder, folder, {"*.mlp.gate_proj": 0.5})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_larger_than_the_memory_is_pruned(tmp_path):
    large = DecoderConfig(
        vocabulary=4096,
        width=512,
        depth=12,
        heads=8,
        kv_heads=4,
        head_size=64,
        hidden=2048,
    )
    shapes = nnx.eval_shape(lambda: Decoder(large, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    size = save_in_files(model, tmp_path, 4)
    save_in_files(Decoder(CONFIG, rngs=nnx.Rngs(0)), tmp_path / "small", 2)
    limit, pruned = size // 2, tmp_path / "pruned"
    assert peak_of("tests.interop.prune_folder", tmp_path, pruned, limit) < limit
    assert tpp.load_hf(pruned)[0].config.hidden == 1536
