"""A smaller vocabulary changes neither logits nor the encoding of what is kept."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.models import Decoder, DecoderConfig, frequent_tokens, keep_tokens

tokenizers = pytest.importorskip("tokenizers")
TEXT = "the thin man and the other thing, then the end of the hand. " * 3
OTHER = "ÄÖ zebra quartz\n\t漢字 the thing"


@functools.cache
def trained():
    """A tokenizer of byte-pair encoding with a template that names a special token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    words = "zebra quartz quail zebras the then thing other and hand end " * 20
    tokenizer.train_from_iterator([words, TEXT], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 1)]
    )
    return tokenizer


@functools.cache
def decoder(tied):
    config = DecoderConfig(
        vocabulary=trained().get_vocab_size() + 5,  # rows that no token has
        width=16,
        depth=1,
        heads=2,
        kv_heads=1,
        head_size=8,
        hidden=16,
        tied=tied,
    )
    return Decoder(config, rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def logits(model, tokens):
    return np.asarray(run(*nnx.split(model), jnp.asarray(tokens)))


def test_texts_are_encoded_and_decoded_as_before():
    kept = frequent_tokens(trained(), TEXT)
    assert 258 < len(kept) < trained().get_vocab_size()
    _, small = keep_tokens(decoder(True), kept, trained())
    assert small.get_vocab_size() == len(kept)
    ids = small.encode(TEXT).ids
    assert [kept[i] for i in ids] == trained().encode(TEXT).ids
    assert small.decode(ids) == TEXT
    others = small.encode(OTHER).ids
    assert small.decode(others) == OTHER
    assert len(others) > len(trained().encode(OTHER).ids)
    assert small.id_to_token(others[-1]) == "<end>"


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_kept_tokens(tied, tmp_path):
    model = decoder(tied)
    kept = frequent_tokens(trained(), TEXT, at_least=3)
    small, tokenizer = keep_tokens(model, kept, trained())
    assert small.config.vocabulary == len(kept)
    assert small.embed_tokens.embedding.shape == (len(kept), 16)
    ids = np.array([tokenizer.encode(TEXT).ids[:20]])
    before = logits(model, np.array(kept)[ids])
    np.testing.assert_allclose(logits(small, ids), before[..., kept], atol=1e-6)
    assert model.embed_tokens.embedding.shape[0] == model.config.vocabulary
    tpp.save_hf(small, tmp_path, tokenizer)
    again, read = tpp.load_hf(tmp_path)
    np.testing.assert_array_equal(logits(again, ids), logits(small, ids))
    assert read.encode(TEXT).ids == tokenizer.encode(TEXT).ids


def test_a_list_of_tokens_needs_no_tokenizer_and_the_cut_model_is_pruned_on():
    small, tokenizer = keep_tokens(decoder(True), [9, 3, 3, 20])
    assert tokenizer is None and small.config.vocabulary == 3
    groups = tpp.channel_groups(small, jnp.zeros((1, 4), int))
    plan = tpp.make_plan(groups, small, {"*.gate_proj": 0.5})
    assert tpp.prune(small, plan)(jnp.zeros((1, 4), int)).shape == (1, 4, 3)


def with_processor(kind):
    content = json.loads(trained().to_str())
    pair = {"sep": ["<end>", 1], "cls": ["<pad>", 0]}
    content["post_processor"] = {
        "type": "Sequence",
        "processors": [{"type": kind, **pair}],
    }
    if kind == "RobertaProcessing":
        content["post_processor"]["processors"][0] |= {
            "trim_offsets": True,
            "add_prefix_space": False,
        }
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("kind", ["RobertaProcessing", "BertProcessing"])
def test_special_tokens_are_renumbered_wherever_they_are_named(kind):
    tokenizer = with_processor(kind)
    kept = frequent_tokens(tokenizer, TEXT)
    _, small = keep_tokens(decoder(True), kept, tokenizer)
    assert [kept[i] for i in small.encode(TEXT).ids] == tokenizer.encode(TEXT).ids


def test_what_cannot_be_cut_is_refused():
    model, words = decoder(True), {"a": 0, "b": 1}
    for tokens in ([], [-1], [10_000]):
        with pytest.raises(tpp.TPPError, match="numbers from 0 to"):
            keep_tokens(model, tokens)
    with pytest.raises(tpp.TPPError, match="which are not kept"):
        keep_tokens(model, [0, 1, 280], trained())
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    level = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "a"))
    for tokenizer in (plain, level):
        with pytest.raises(tpp.TPPError, match="no token for each byte"):
            frequent_tokens(tokenizer, "ab")
    with pytest.raises(tpp.TPPError, match=r"no tokenizers\.Tokenizer"):
        keep_tokens(model, [0], object())
    with pytest.raises(tpp.TPPError, match=r"no tpp_jax\.models\.Decoder"):
        keep_tokens(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), [0])
