"""Decoder language models: their cache, rotary pairs, groups and generated text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.models import Decoder, DecoderConfig, generate
from tpp_jax.models.small import small_decoder

SIZES = DecoderConfig(
    vocabulary=30,
    width=16,
    depth=2,
    heads=(4, 2),
    kv_heads=2,
    head_size=4,
    hidden=(24, 16),
    qkv_bias=True,
    qk_norm=True,
    window=(3, None),
)
TOKENS = np.random.default_rng(0).integers(0, 30, (2, 9))


@functools.cache
def decoder(**changes):
    """A decoder with larger weights than at first, so that all parts count."""
    fields = {**vars(SIZES), **changes}
    model = Decoder(DecoderConfig(**fields), rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    larger = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape),
        nnx.state(model, nnx.Param),
    )
    nnx.update(model, larger)
    return model


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def logits_of(model, tokens=TOKENS):
    return np.asarray(run(*nnx.split(model), tokens))


@functools.cache
def dense_logits():
    return logits_of(decoder())


def test_a_cache_changes_nothing():
    model, found = decoder(), []
    extend, cache = nnx.jit(Decoder.extend), decoder().empty_cache(2, 12)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        logits, cache = extend(model, TOKENS[:, start:end], cache)
        found.append(logits)
    assert int(cache.length) == 9
    together = np.concatenate(found, axis=1)
    np.testing.assert_allclose(together, dense_logits(), rtol=1e-4, atol=1e-5)


def test_a_token_sees_those_before_it_and_within_the_window():
    model = decoder(depth=1, heads=4, hidden=24, window=3)
    changed = TOKENS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 30
    differs = (logits_of(model) != logits_of(model, changed)).any(axis=(0, 2))
    assert differs.tolist() == [False] * 4 + [True] * 3 + [False] * 2


def test_interleaved_pairs_are_halves_in_another_order():
    halves, interleaved = decoder(), decoder(rope_pairs="interleaved")
    order = np.array([0, 2, 1, 3])  # 0 and 2 are a pair of the halves
    model = nnx.clone(interleaved)
    for mine, theirs in zip(model.layers, halves.layers, strict=True):
        for name in ("q_proj", "k_proj"):
            layer, other = (getattr(x.self_attn, name) for x in (mine, theirs))
            kernel = other.kernel[...].reshape(16, -1, 4)[..., order]
            layer.kernel[...] = kernel.reshape(16, -1)
            layer.bias[...] = other.bias[...].reshape(-1, 4)[:, order].ravel()
        for name in ("q_norm", "k_norm"):
            layer, other = (getattr(x.self_attn, name) for x in (mine, theirs))
            layer.scale[...] = other.scale[...][order]
    np.testing.assert_allclose(logits_of(model), dense_logits(), rtol=1e-4, atol=1e-5)


def test_all_widths_can_be_pruned_and_every_group_holds():
    model = decoder()
    groups = tpp.channel_groups(model, TOKENS)
    kept = [group.name for group in groups if group.reason]
    assert kept == ["lm_head"]
    parts = ("q_proj", "q_proj#3", "v_proj#2")
    for name in (f"layers.0.self_attn.{part}" for part in (*parts, "q_proj#2")):
        assert groups[name].size > 1
    checks = tpp.check_groups(model, TOKENS)
    assert not checks.unproved
    assert checks.masked < 1e-5


def test_a_cut_of_heads_and_units_equals_zeros_and_trains():
    model = decoder()
    groups = tpp.channel_groups(model, TOKENS)
    halves = {"*.gate_proj": 0.5, "*.q_proj": 0.5, "*.v_proj#2": 0.5}
    plan = tpp.make_plan(groups, model, halves)
    masked, weights = nnx.clone(model), nnx.state(model, nnx.Param)
    masks = tpp.mask_tree(plan, weights)
    nnx.update(masked, jax.tree.map(jnp.multiply, weights, masks))
    small = tpp.prune(model, plan)
    assert small.layers[0].self_attn.o_proj.kernel.shape == (4, 16)
    found, expected = logits_of(small), logits_of(masked)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    grads = nnx.jit(nnx.grad(lambda model: model(TOKENS).var()))(small)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_text_is_generated_as_without_a_cache():
    model, prompt = decoder(), TOKENS[:, :3]
    found = generate(model, prompt, 4)
    assert (found[:, :3] == prompt).all()
    likely = logits_of(model, found)[:, 2:-1].argmax(-1)
    np.testing.assert_array_equal(found[:, 3:], likely)
    drawn = [
        generate(model, prompt, 4, temperature=5.0, key=jax.random.key(seed))
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def test_bfloat16_gives_nearly_the_same():
    half = Decoder(SIZES, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(half, nnx.state(decoder(), nnx.Param))
    logits = logits_of(half)
    assert logits.dtype == jnp.bfloat16
    both = [x.astype(np.float32).ravel() for x in (logits, dense_logits())]
    assert np.corrcoef(*both)[0, 1] > 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "3 query heads cannot be shared out to 2"),
        ({"head_size": 5}, "choose an even number"),
        ({"hidden": (1, 2, 3)}, "hidden has 3 entries for 2 layers"),
        ({"activation": "relu"}, "activation is 'relu'"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(tpp.TPPError, match=message):
        DecoderConfig(**{**vars(SIZES), **changes})


def test_a_small_decoder_is_made_by_one_call():
    sizes = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "hidden": 8}
    model = small_decoder(nnx.Rngs(0), **sizes, qk_norm=True)
    assert model(jnp.zeros((1, 5), int)).shape == (1, 5, 256)
    assert model.config.head_size == 8 and model.config.tied
    assert hasattr(model.layers[0].self_attn, "q_norm")
    assert small_decoder(nnx.Rngs(0), **sizes, head_size=4).config.head_size == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 2}, "no setting 'layers'; it has .*depth"),
        ({"heads": 3}, "width 128"),
    ],
)
def test_a_small_decoder_that_cannot_be_is_refused(changes, message):
    with pytest.raises(tpp.TPPError, match=message):
        small_decoder(nnx.Rngs(0), **changes)


def test_a_prompt_and_a_key_are_needed():
    with pytest.raises(tpp.TPPError, match="at least one token"):
        generate(decoder(), np.zeros((1, 0), int), 1)
    with pytest.raises(tpp.TPPError, match="pass key"):
        generate(decoder(), TOKENS, 1, temperature=1.0)


def test_a_model_of_seven_billion_parameters_is_planned_and_cut_without_arrays():
    config = DecoderConfig(
        vocabulary=32_000,
        width=4096,
        depth=32,
        heads=32,
        kv_heads=8,
        head_size=128,
        hidden=14_336,
    )
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    groups = tpp.channel_groups(model, jax.ShapeDtypeStruct((1, 16), jnp.int32))
    rng = np.random.default_rng(0)
    ends = (".mlp.gate_proj", ".self_attn.q_proj")
    chosen = [group for group in groups if group.name.endswith(ends)]
    scores = {group.name: rng.random(group.size) for group in chosen}
    plan = tpp.make_plan(groups, model, dict.fromkeys(scores, 0.25), scores=scores)
    small = tpp.prune(model, plan)
    assert small.layers[31].mlp.down_proj.kernel.shape == (10_752, 4096)
    assert small.layers[31].self_attn.k_proj.kernel.shape == (4096, 6 * 128)
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(one, nnx.Param)))
        for one in (model, small)
    ]
    assert sizes == [7_241_732_096, 5_496_901_632]
