"""Decoders in the folders of transformers, compared with recordings of it."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.interop.decoder_sizes import small
from tpp_jax.interop.decoder_config import config_of
from tpp_jax.models import Decoder

FOLDER = pathlib.Path(__file__).parent / "decoders"
FAMILIES = sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_transformers(family):
    model, tokenizer = tpp.load_hf(FOLDER / family)
    recorded = np.load(FOLDER / family / "logits.npz")
    found = jax.jit(model)(recorded["tokens"])
    np.testing.assert_allclose(found, recorded["logits"], rtol=1e-4, atol=1e-5)
    assert tokenizer is None
