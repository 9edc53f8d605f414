"""Plans that remove whole branches: emptied groups, and which blocks do least."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.models import Decoder, DecoderConfig, generate

TOKENS = np.random.default_rng(0).integers(0, 30, (2, 9))
BOTH = {"*.mlp.gate_proj": 0.25, "layers.1.*": 1}


@functools.cache
def decoder():
    config = DecoderConfig(
        vocabulary=30,
        width=16,
        depth=3,
        heads=4,
        kv_heads=2,
        head_size=4,
        hidden=24,
        qk_norm=True,
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda w: 5 * w, nnx.state(model, nnx.Param)))
    return model, tpp.channel_groups(model, TOKENS)


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, state):
    return nnx.merge(graphdef, state)(TOKENS)


def logits(model):
    return np.asarray(run(*nnx.split(model)))


def plan_of(ratios, **options):
    model, groups = decoder()
    return tpp.make_plan(groups, model, ratios, min_channels=0, **options)


def widths(plan):
    return {group.name: plan.kept_count(group) for group in plan.pruned_groups}


def masked(plan):
    model = nnx.clone(decoder()[0])
    weights = nnx.state(model, nnx.Param)
    masks = tpp.mask_tree(plan, weights)
    nnx.update(model, jax.tree.map(jnp.multiply, weights, masks))
    return model


def test_widths_and_depth_go_in_one_plan():
    model, groups = decoder()
    plan = plan_of(BOTH)
    assert widths(plan) == {
        "layers.0.mlp.gate_proj": 18,
        "layers.1.self_attn.q_proj": 0,
        "layers.1.mlp.gate_proj": 0,
        "layers.2.mlp.gate_proj": 18,
    }
    small = tpp.prune(model, plan)
    assert small.layers[1].mlp.down_proj.kernel.shape == (0, 16)
    np.testing.assert_allclose(logits(small), logits(masked(plan)), atol=1e-5)
    again = tpp.Plan.from_dict(plan.to_dict(), groups)
    assert again == plan and hash(again) == hash(plan)
    counts = dict.fromkeys(widths(plan_of({"layers.1.*": 1})), 0)
    by_counts = tpp.make_plan(groups, model, counts=counts)
    assert by_counts == plan_of({"layers.1.*": 1})


def test_a_target_is_met_by_what_is_left():
    model, _ = decoder()
    dense = tpp.count(model, TOKENS)
    plan = plan_of({"*.q_proj": 0.1, **BOTH}, params=0.5)
    assert widths(plan)["layers.1.self_attn.q_proj"] == 0
    small = tpp.count(tpp.prune(model, plan), TOKENS)
    assert 0.45 < small.params / dense.params <= 0.5


def test_a_cache_of_no_heads_generates_text():
    small = tpp.prune(decoder()[0], plan_of({"layers.1.self_attn.*": 1}))
    prompt = TOKENS[:, :3]
    assert small.empty_cache(2, 5).layers[1].keys.shape == (2, 5, 0, 4)
    found = generate(small, prompt, 3)
    likely = jax.jit(lambda tokens: small(tokens))(found)[:, 2:-1].argmax(-1)
    np.testing.assert_array_equal(found[:, 3:], likely)


def test_a_small_network_is_pruned_again_and_refit(tmp_path):
    model, _ = decoder()
    small = tpp.prune(model, plan_of(BOTH))
    groups = tpp.channel_groups(small, TOKENS)
    moments = tpp.input_moments(small, [TOKENS])
    plan = tpp.make_plan(
        groups, small, {"*.gate_proj": 0.5}, criterion="wanda", statistics=moments
    )
    assert set(widths(plan)) == {f"layers.{i}.mlp.gate_proj" for i in (0, 2)}
    assert np.isfinite(logits(tpp.prune(small, plan))).all()
    halves = tpp.make_plan(groups, small, {"embed_tokens": 0.5})
    assert tpp.prune(small, halves).layers[1].mlp.up_proj.kernel.shape == (8, 0)
    tpp.save_model(tmp_path / "model", small)
    loaded = tpp.load_model(tmp_path / "model", model)
    np.testing.assert_array_equal(logits(loaded), logits(small))


def test_what_is_lost_is_made_up_for_by_the_layers_behind():
    model, _ = decoder()
    plan = plan_of({"*.mlp.gate_proj": 0.5, "layers.1.*": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few rows
        refit = tpp.compensate(model, plan, [TOKENS, TOKENS[::-1]])
    errors = [
        np.square(logits(m) - logits(model)).mean()
        for m in (refit, tpp.prune(model, plan))
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("target", ["decorrelate", "orthogonal", "relative"])
def test_penalties_empty_a_layer_and_the_cut_is_free(target):
    model, _ = decoder()
    plan = plan_of(BOTH)
    schedule = tpp.growing_schedule(
        granularity=1.0, every=1, stabilize=40, zero_out_every=1
    )
    tx = optax.chain(
        tpp.add_tpp_penalties(plan, schedule, gram_weight=1.0, target=target),
        optax.sgd(0.01),
        tpp.zero_pruned(plan, schedule),
    )
    params = nnx.state(model, nnx.Param)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(schedule.total_steps):
        params, state = step(params, state)
    now = tpp.status(state, plan, params)
    assert now.ready and now.gram is not None and np.isfinite(now.gram)
    trained = nnx.clone(model)
    nnx.update(trained, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = tpp.prune(trained, plan, opt_state=state)
    np.testing.assert_allclose(logits(small), logits(trained), rtol=1e-4, atol=1e-5)
    left = nnx.state(small, nnx.Param)
    updates, _ = tx.update(left, tpp.slice_tree(plan, state), left)
    assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_transforms_pass_over_empty_kernels():
    small = tpp.prune(decoder()[0], plan_of(BOTH))
    params = nnx.state(small, nnx.Param)
    groups = tpp.channel_groups(small, TOKENS)
    plan = tpp.make_plan(groups, small, {"embed_tokens": 0.5})
    schedule = tpp.growing_schedule(
        granularity=1.0, every=1, stabilize=60, zero_out_every=1
    )
    tx = optax.chain(
        tpp.add_orthogonality(),
        tpp.add_tpp_penalties(plan, schedule, kept_weight=0.1),
        tpp.zero_pruned(plan, schedule),
    )
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    remade = tpp.reinitialize(params, "kaiming", key=jax.random.key(0))
    for tree in (updates, remade):
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def residual(p, x, way):
    h = jnp.maximum(x @ p["up"], 0)
    if way == "mean":
        h = h * h.mean(-1, keepdims=True)  # the branch is empty: nothing is undefined
    if way == "gate":
        return x + h @ p["down"] * h.mean(-1, keepdims=True)
    if way == "norm":
        h = h / jnp.linalg.norm(h @ p["down"], axis=-1, keepdims=True)
    y = h @ p["down"]
    if way == "unit":
        y = y / jnp.sqrt(jnp.sum(y**2, -1, keepdims=True))
    if way == "max":
        return x + y * jnp.max(h, axis=-1, keepdims=True, initial=-jnp.inf)
    return y if way == "alone" else x + y


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("", None),
        ("mean", None),
        ("norm", None),
        ("gate", "not a number"),
        ("unit", "not a number"),
        ("max", "not a number"),
        ("alone", "no longer depends on the inputs"),
    ],
)
def test_only_what_is_defined_without_channels_may_be_emptied(way, message):
    draws = np.random.default_rng(0)
    params = {"up": draws.normal(size=(4, 6)), "down": draws.normal(size=(6, 4))}
    x = draws.normal(size=(3, 4)).astype(np.float32)

    def fn(p, x):
        return residual(p, x, way)

    groups = tpp.channel_groups(fn, x, params=params)
    if message is not None:
        with pytest.raises(tpp.TPPError, match=f"0 of the 6 channels of up.*{message}"):
            tpp.make_plan(groups, params, counts={"up": 0})
        return
    plan = tpp.make_plan(groups, params, {"up": 1}, min_channels=0)
    np.testing.assert_array_equal(fn(tpp.prune(fn, plan, params), x), x)


def test_a_block_of_a_resnet_becomes_its_shortcut():
    model = tpp.models.create(
        "cifar_resnet8", num_classes=10, image_shape=(8, 8, 1), rngs=nnx.Rngs(0)
    )
    model.eval()
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    groups = tpp.channel_groups(model, x)
    scores = tpp.depth_scores(model, groups, [x], "layer{}.0.*")
    assert all(0 < score < 2 for score in scores.values())
    plan = tpp.make_plan(groups, model, {"layer1.*": 1}, min_channels=0)
    assert widths(plan) == {"layer1.0.conv1": 0}
    small, weights = tpp.prune(model, plan), nnx.state(model, nnx.Param)
    zeros = nnx.clone(model)
    nnx.update(zeros, jax.tree.map(jnp.multiply, weights, tpp.mask_tree(plan, weights)))
    forward = nnx.jit(lambda model: model(x))
    np.testing.assert_allclose(forward(small), forward(zeros), rtol=1e-4, atol=1e-5)
    refit = tpp.compensate(model, plan, [x, x])
    again = tpp.recalibrate(refit, [x], like=model, plan=plan)
    assert jnp.isfinite(forward(again)).all()
    small.train()
    gradients = nnx.jit(nnx.grad(lambda model: (model(x) ** 2).mean()))(small)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
    with pytest.raises(tpp.TPPError, match="no longer depends"):
        tpp.make_plan(groups, model, counts={"conv1": 0})


@pytest.mark.parametrize(
    ("ratios", "options", "message"),
    [
        ({"layers.1.*": 1.0}, {}, "min_channels=0.* takes 1"),
        ({"layers.1.*": 1.5}, {"min_channels": 0}, r"1.5 .* is not in \[0, 1\)"),
        (1.0, {"min_channels": 0}, r"every group is not in \[0, 1\)"),
        ({"*.down_proj": 1}, {"min_channels": 0}, "produced by layers outside of it"),
    ],
)
def test_emptying_has_to_be_meant(ratios, options, message):
    model, groups = decoder()
    with pytest.raises(tpp.TPPError, match=message):
        tpp.make_plan(groups, model, ratios, **options)


def test_scores_are_the_changes_of_the_stream():
    model, groups = decoder()
    found = tpp.depth_scores(model, groups, [TOKENS])
    x, expected = model.embed_tokens(TOKENS), {}
    for i, layer in enumerate(model.layers):
        y = layer(x, jnp.arange(9))[0]
        norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
        expected[f"layers.{i}.*"] = float(jnp.mean(1 - jnp.sum(x * y, -1) / norms))
        x = y
    assert found == pytest.approx(expected, rel=1e-4)
    apart = tpp.depth_scores(
        model, groups, [TOKENS], ["layers.{}.self_attn.*", "layers.{}.mlp.*"]
    )
    assert len(apart) == 6 and all(value > 0 for value in apart.values())


def test_scores_by_loss_are_those_of_the_cut_networks():
    model, groups = decoder()

    def loss(model, tokens):
        return jnp.mean(model(tokens) ** 2)

    found = tpp.depth_scores(model, groups, [TOKENS], loss=loss)
    dense = np.mean(logits(model) ** 2)
    for block, score in found.items():
        small = tpp.prune(model, plan_of({block: 1}))
        assert score == pytest.approx(np.mean(logits(small) ** 2) - dense, abs=1e-3)
    least = tpp.least_blocks(found, 2)
    assert set(widths(plan_of(least))) == {
        f"{block[:-1]}{part}"
        for block in least
        for part in ("self_attn.q_proj", "mlp.gate_proj")
    }


def test_blocks_that_cannot_be_scored_are_named():
    model, groups = decoder()
    with pytest.raises(tpp.TPPError, match="matches no layer"):
        tpp.depth_scores(model, groups, [TOKENS], "blocks.{}.*")
    with pytest.raises(tpp.TPPError, match="no batch"):
        tpp.depth_scores(model, groups, [])
    with pytest.raises(tpp.TPPError, match="cannot remove 4 of 3 blocks"):
        tpp.least_blocks(dict.fromkeys("abc", 0.0), 4)
    params = {"w1": np.ones((3, 4)), "w2": np.ones((4, 3))}

    def plain(p, x):
        return x @ p["w1"] @ p["w2"]

    found = tpp.channel_groups(plain, np.ones((1, 3)), params=params)
    with pytest.raises(tpp.TPPError, match="not added to a stream"):
        tpp.depth_scores(plain, found, [np.ones((1, 3))], "w1", params=params)


def test_the_key_value_cache_is_a_target():
    model, groups = decoder()
    plan = tpp.make_plan(groups, model, kv_cache=0.5)
    assert widths(plan) == {f"layers.{i}.self_attn.q_proj": 1 for i in range(3)}

    def size(model):
        cache = model.empty_cache(1, 1)
        return sum(past.keys.size + past.values.size for past in cache.layers)

    ratios = {"*.q_proj#3": 0.5, "*.v_proj#2": 0.5, "layers.1.*": 1}
    plan = plan_of(ratios, kv_cache=0.45)
    assert 0.4 * size(model) < size(tpp.prune(model, plan)) <= 0.45 * size(model)
    named = tpp.make_plan(groups, model, kv_cache=0.5, cached="*.k_proj,*.v_proj")
    assert widths(named) == widths(tpp.make_plan(groups, model, kv_cache=0.5))
