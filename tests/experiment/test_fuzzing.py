"""Any text or file is understood, or refused with one clear message."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

import tpp_jax as tpp
from tpp_jax.errors import TPPError
from tpp_jax.interop.torch_weights import load_torch
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.planning import make_plan
from tpp_jax.pruning.ratios import parse_patterns, parse_ratios
from tpp_jax.saving import load_model, save_model
from tpp_jax.training.optimizers import learning_rate

# Texts of the characters that have a meaning, and of any characters.
TEXTS = st.text("0123456789.:,-+*?[]e inf\x00layerconv", max_size=30) | st.text()


@pytest.fixture(scope="module")
def model():
    return tpp.models.create(
        "mlp7_linear", num_classes=10, image_shape=(8, 8, 1), rngs=nnx.Rngs(0)
    )


@pytest.fixture(scope="module")
def groups(model):
    return tpp.channel_groups(model, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))


def refused_clearly(error):
    """Checks that an error has one message for users."""
    assert 10 < len(str(error)) < 2000


@settings(max_examples=300)
@given(text=TEXTS)
def test_ratios_are_read_or_refused(text):
    try:
        ratios = parse_ratios(text)
    except ValueError as error:
        refused_clearly(error)
    else:
        assert all(isinstance(ratio, float) for ratio in ratios.values())


@settings(max_examples=200)
@given(ratios=TEXTS, skip=TEXTS)
def test_any_ratios_and_skips_make_a_plan_or_are_refused(model, groups, ratios, skip):
    try:
        plan = make_plan(groups, model, ratios, skip=parse_patterns(skip))
    except ValueError as error:
        refused_clearly(error)
    else:
        assert Plan.from_dict(plan.to_dict(), groups).to_dict() == plan.to_dict()


@settings(max_examples=300)
@given(
    text=TEXTS,
    schedule=st.sampled_from(["step", "cosine"]),
    epochs=st.integers(0, 10),
    warmup=st.floats(0, 10),
)
def test_learning_rates_are_read_or_refused(text, schedule, epochs, warmup):
    try:
        rate = learning_rate(
            text, 7, schedule=schedule, epochs=epochs, warmup_epochs=warmup
        )
    except TPPError as error:
        refused_clearly(error)
    else:
        assert np.isfinite(float(rate(0))) and float(rate(70)) >= 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=200)
@given(data=st.data())
def test_a_plan_of_any_json_is_read_or_refused(groups, data):
    good = {g.name: list(range(g.size)) for g in groups if g.reason is None}
    name = data.draw(st.sampled_from(sorted(good)))
    odd = data.draw(JSON | st.just({**good, name: data.draw(JSON)}))
    try:
        plan = Plan.from_dict(odd, groups)
    except ValueError as error:
        refused_clearly(error)
    else:
        assert not plan.pruned_groups or plan.to_dict() == odd


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(folder, model)
    return folder


@settings(max_examples=40)
@given(change=JSON, data=st.data())
def test_a_model_of_which_the_json_was_changed_is_refused(saved, change, data):
    file = saved / "meta" / "metadata"
    before = file.read_bytes()
    meta = json.loads(before)
    where = data.draw(st.sampled_from(sorted(meta)))
    assume(meta[where] != change)
    text = json.dumps({**meta, where: change}).encode()
    end = data.draw(st.just(len(text)) | st.integers(0, len(text)))
    file.write_bytes(text[:end])
    try:
        with pytest.raises(TPPError) as error:
            load_model(saved)
        refused_clearly(error.value)
    finally:
        file.write_bytes(before)


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_safetensors_file_is_refused(tmp_path_factory, model, data):
    arrays = {"net.0.weight": np.ones((100, 64), np.float32)}
    good = save(arrays)
    header = 8 + int.from_bytes(good[:8], "little")
    at = data.draw(st.integers(0, header - 1))
    byte = data.draw(st.integers(0, 255))
    bad = bytearray(good)
    bad[at] = byte
    length = data.draw(st.just(len(bad)) | st.integers(0, len(bad)))
    file = pathlib.Path(tmp_path_factory.getbasetemp()) / "fuzzed.safetensors"
    file.write_bytes(bytes(bad[:length]))
    with pytest.raises(TPPError) as error:  # even if intact, it lacks the other layers
        load_torch(file, model)
    refused_clearly(error.value)
