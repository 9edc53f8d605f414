"""A config that starts from a trained decoder, with a small one in its place."""

import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from configs import smollm2_135m_tpp
from tests.end_to_end.runs import summary_of
from tpp_jax.experiment import run
from tpp_jax.experiment.config import check_values
from tpp_jax.interop import trained_decoders

WORDS = "a cut keeps what the layers behind it read".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A decoder with a tokenizer of words, and a text."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate([*WORDS, "?"])}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token="?")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = tpp.models.DecoderConfig(
        vocabulary=12, width=8, depth=1, heads=2, kv_heads=1, head_size=4, hidden=16
    )
    model = tpp.models.Decoder(config, rngs=nnx.Rngs(0))
    weights, text = (tmp_path_factory.mktemp(name) for name in ("weights", "text"))
    tpp.save_hf(model, weights, tokenizer)
    words = np.random.default_rng(0).choice(WORDS, (20, 60))
    (text / "words.txt").write_text("\n".join(map(" ".join, words)))
    return str(weights), str(text)


def small_config(weights, text):
    config = smollm2_135m_tpp.get_config()
    config.model.kwargs.weights = config.data.kwargs.weights = weights
    config.data.kwargs.update({"source": text, "train": 160, "held_out": 40})
    config.data.length, config.data.batch_size = 8, 4
    config.num_devices = 1
    config.prune.calibration_examples = 16
    config.prune.schedule.granularity = 500.0
    config.prune.schedule.every = 1
    config.prune.schedule.stabilize = 10
    return config


@pytest.mark.usefixtures("no_pictures")
def test_the_config_prunes_trains_and_distils_a_decoder(folders, tmp_path):
    run.train(small_config(*folders), tmp_path)
    summary = summary_of(tmp_path)
    assert summary["layers"]["layers.0.mlp.gate_proj"] == {"kept": 12, "total": 16}
    # Random weights predict nothing; the words of the text are among 12 tokens.
    assert summary["pruned"]["perplexity"] < summary["dense"]["perplexity"] < 13
    small = trained_decoders.decoder(nnx.Rngs(0), folders[0])
    assert small.layers[0].mlp.up_proj.kernel.shape == (8, 16)


def test_the_text_has_the_tokens_of_the_model(folders):
    text = trained_decoders.text(folders[1], folders[0], train=50)
    assert len(text.train) == 50 and text.vocabulary == 12
    assert set(text.held_out) <= set(range(len(WORDS)))


def test_the_config_is_valid_as_it_stands():
    check_values(smollm2_135m_tpp.get_config())
