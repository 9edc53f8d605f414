"""Decoders in GGUF files, written by the format's own package."""

import pathlib

import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.interop.gguf_files import _LAYER, _OTHERS

gguf = pytest.importorskip("gguf")

FOLDER = pathlib.Path(__file__).parent / "decoders"
TOKENS = ["a", "b", "c", "ab", "Ġ", "1", "<end>", *map(str, range(33))]


def write(path, family, architecture, *, quantised=False, **tokenizer):
    """Writes a model of transformers as llama.cpp's converter does."""
    from safetensors.numpy import load_file

    model = tpp.load_hf(FOLDER / family)[0]
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.depth)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.epsilon)
    for name, value in {"model": "gpt2", "pre": "smollm", **tokenizer}.items():
        writer.add_string(f"tokenizer.ggml.{name}", value)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token == "<end>" else 1 for token in TOKENS])
    writer.add_token_merges(["a b"])
    for name, array in load_file(FOLDER / family / "model.safetensors").items():
        writer.add_tensor(*_as_gguf(name, array, config, architecture, quantised))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _as_gguf(name, array, config, architecture, quantised):
    ours = {theirs: short for short, theirs in {**_LAYER, **_OTHERS}.items()}
    layer, _, kind = name.rpartition(".")
    if layer.startswith("model.layers."):
        _, _, index, part = layer.split(".", 3)
        short = f"blk.{index}.{ours[part]}"
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(ours[part])
        if heads and architecture == "llama":  # convert_hf_to_gguf.py, permute
            pairs = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2)
            array = pairs.reshape(array.shape)
    else:
        short = ours[layer]
    if architecture == "gemma" and "norm" in layer:
        array = array + 1
    if quantised and array.ndim == 2:
        array = array.astype(np.float16)
    return f"{short}.{kind}", np.ascontiguousarray(array)


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("smollm2", "llama"),
        ("llama_biases", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("gemma", "gemma"),
    ],
)
def test_the_model_is_that_of_transformers(family, architecture, tmp_path):
    model = write(tmp_path / "m.gguf", family, architecture)
    found, _ = tpp.load_gguf(tmp_path / "m.gguf")
    assert found.config == model.config
    for mine, theirs in zip(
        *(nnx.to_flat_state(nnx.state(m)) for m in (found, model)), strict=True
    ):
        assert mine[0] == theirs[0]
        np.testing.assert_array_equal(mine[1][...], theirs[1][...])


def test_quantised_weights_become_numbers_again(tmp_path):
    model = write(tmp_path / "m.gguf", "smollm2", "llama", quantised=True)
    found, _ = tpp.load_gguf(tmp_path / "m.gguf")
    kernels = (m.layers[1].mlp.up_proj.kernel[...] for m in (found, model))
    mine, theirs = map(np.asarray, kernels)
    assert mine.dtype == np.float32
    np.testing.assert_array_equal(mine, theirs.astype(np.float16))


def test_the_tokenizer_merges_and_splits_digits(tmp_path):
    write(tmp_path / "m.gguf", "smollm2", "llama")
    tokenizer = tpp.load_gguf(tmp_path / "m.gguf")[1]
    ids = tokenizer.encode("abba ab11<end>").ids
    assert [TOKENS[i] for i in ids] == [*("ab", "b", "a", "Ġ", "ab"), "1", "1", "<end>"]
    assert tokenizer.decode(ids) == "abba ab11"


def test_a_model_with_another_tokenizer_is_read_without_it(tmp_path):
    write(tmp_path / "m.gguf", "smollm2", "llama", model="llama")
    with pytest.warns(UserWarning, match=r"take tokenizer\.json from"):
        assert tpp.load_gguf(tmp_path / "m.gguf")[1] is None


def test_other_files_are_refused(tmp_path):
    with pytest.raises(tpp.TPPError, match="there is no file"):
        tpp.load_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(tpp.TPPError, match="not a GGUF file, or is damaged"):
        tpp.load_gguf(tmp_path / "m.gguf")
    write(tmp_path / "n.gguf", "smollm2", "falcon")
    with pytest.raises(tpp.TPPError, match="of the architecture falcon"):
        tpp.load_gguf(tmp_path / "n.gguf")
