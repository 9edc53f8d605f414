"""Decoders in the folders of transformers, compared with recordings of it."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.interop.decoder_config import OWN_FAMILY, config_of
from tpp_jax.models import Decoder, DecoderConfig

FOLDER = pathlib.Path(__file__).parent / "decoders"
FAMILIES = sorted(path.name for path in FOLDER.iterdir())
TOKENS = np.load(FOLDER / "qwen2" / "logits.npz")["tokens"]


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def logits(model, tokens=TOKENS):
    return np.asarray(run(*nnx.split(model), tokens))


def pruned(family, ratios):
    model = tpp.load_hf(FOLDER / family)[0]
    groups = tpp.channel_groups(model, TOKENS)
    return tpp.prune(model, tpp.make_plan(groups, model, ratios, min_channels=0))


def settings(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_and_survive_saving(family, tmp_path):
    model, tokenizer = tpp.load_hf(FOLDER / family)
    recorded = np.load(FOLDER / family / "logits.npz")
    found = logits(model, recorded["tokens"])
    np.testing.assert_allclose(found, recorded["logits"], rtol=1e-4, atol=1e-5)
    assert tokenizer is None
    tpp.save_hf(model, tmp_path)
    assert settings(tmp_path)["model_type"] == settings(FOLDER / family)["model_type"]
    again = tpp.load_hf(tmp_path)[0]
    assert again.config == model.config
    np.testing.assert_array_equal(logits(again, recorded["tokens"]), found)


def opened_by_transformers(folder):
    transformers = pytest.importorskip("transformers", minversion="5")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_opens_what_was_saved(family, tmp_path):
    uniform = {"*.mlp.gate_proj": 0.5, "*.self_attn.q_proj": 0.5}
    small = pruned(family, uniform)
    tpp.save_hf(small, tmp_path)
    found = opened_by_transformers(tmp_path)
    np.testing.assert_allclose(logits(small), found, rtol=1e-4, atol=1e-5)


def test_a_layer_without_heads_and_units_is_left_out(tmp_path):
    small = pruned("smollm2", {"*.mlp.gate_proj": 0.5, "layers.0.*": 1})
    tpp.save_hf(small, tmp_path)
    again = tpp.load_hf(tmp_path)[0]
    assert settings(tmp_path)["num_hidden_layers"] == again.config.depth == 1
    np.testing.assert_allclose(logits(again), logits(small), rtol=1e-5, atol=1e-6)


def test_transformers_opens_what_was_left(tmp_path):
    small = pruned("smollm2", {"layers.1.*": 1})
    tpp.save_hf(small, tmp_path)
    found = opened_by_transformers(tmp_path)
    np.testing.assert_allclose(logits(small), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "ratios"),
    [
        ("smollm2", {"layers.0.mlp.*": 1, "layers.1.self_attn.*": 1}),
        ("qwen2", {"layers.0.mlp.gate_proj": 0.5, "layers.1.self_attn.q_proj": 0.5}),
        ("gemma", {"*.q_proj#2": 0.5, "embed_tokens": 0.25}),
        ("qwen3", {"*.q_proj#3": 0.25, "layers.0.self_attn.v_proj#2": 0.5}),
    ],
)
def test_every_pruned_decoder_is_read_back(family, ratios, tmp_path):
    small = pruned(family, ratios)
    tpp.save_hf(small, tmp_path)
    again = tpp.load_hf(tmp_path)[0]
    assert settings(tmp_path)["model_type"] == OWN_FAMILY
    assert config_of(again) == config_of(small)
    np.testing.assert_array_equal(logits(again), logits(small))


def test_rotary_frequencies_must_be_those_of_all_layers(tmp_path):
    tpp.save_hf(pruned("qwen3", {"*.q_proj#3": 0.25}), tmp_path)
    content = settings(tmp_path)
    for wrong in ([], content["tpp_jax"]["frequencies"][:1], [[1.0], ["a"]], None):
        content["tpp_jax"]["frequencies"] = wrong
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(tpp.TPPError, match="other frequencies than"):
            tpp.load_hf(tmp_path)


def test_weights_may_be_in_several_files(tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copy(FOLDER / "qwen2" / "config.json", tmp_path)
    tensors = load_file(FOLDER / "qwen2" / "model.safetensors")
    names = sorted(tensors)
    places = {name: f"{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        part = {name: tensors[name] for name in names if places[name] == file}
        save_file(part, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    one, several = (tpp.load_hf(path)[0] for path in (FOLDER / "qwen2", tmp_path))
    np.testing.assert_array_equal(logits(several), logits(one))


def test_the_tokenizer_is_kept(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    tpp.save_hf(tpp.load_hf(FOLDER / "qwen2")[0], tmp_path, tokenizer)
    assert tpp.load_hf(tmp_path)[1].encode("abba").ids == [0, 1, 1, 0]


def changed(folder, **values):
    shutil.copy(FOLDER / "qwen2" / "model.safetensors", folder)
    content = settings(FOLDER / "qwen2") | {"layer_types": None} | values
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gpt2"}, "describes a gpt2"),
        ({"model_type": None}, "describes a None"),
        ({"hidden_size": "16"}, "hidden_size: 16, which is no size"),
        ({"sliding_window": "4"}, "sliding_window: 4, which is no number of tokens"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: 1e-6, which is no positive number"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta: None, which is no"),
        ({"model_type": OWN_FAMILY}, "that tpp_jax did not write"),
        ({"model_type": OWN_FAMILY, "tpp_jax": {"depth": 1}}, "did not write"),
        ({"intermediate_size": 12}, "16×24 in the weights and 16×12 by"),
        ({"num_hidden_layers": 3}, "the weights have no model"),
        ({"num_hidden_layers": 1}, "and 11 more, which the settings do not imply"),
        ({"hidden_act": "relu2"}, "the activation relu2"),
        ({"num_key_value_heads": 3}, "cannot be shared out"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "of type yarn"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only a part"),
    ],
)
def test_other_settings_are_refused(values, message, tmp_path):
    changed(tmp_path, **values)
    with pytest.raises(tpp.TPPError, match=message):
        tpp.load_hf(tmp_path)


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(tpp.TPPError, match="there is no "):
        tpp.load_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(tpp.TPPError, match="damaged JSON"):
        tpp.load_hf(tmp_path)
    shutil.copy(FOLDER / "qwen2" / "config.json", tmp_path)
    with pytest.raises(tpp.TPPError, match="has none of "):
        tpp.load_hf(tmp_path)


def test_only_decoders_with_arrays_are_saved(tmp_path):
    with pytest.raises(tpp.TPPError, match="this Linear is no "):
        tpp.save_hf(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path)
    config = DecoderConfig(8, 4, 1, 1, 1, 4, 4)
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    with pytest.raises(tpp.TPPError, match="abstract"):
        tpp.save_hf(abstract, tmp_path)
