"""Attention, depthwise convolutions and wide ResNets; the gallery has many more."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tpp_jax as tpp


class InvertedResidual(nnx.Module):
    """MobileNetV3's block: expand, depthwise, squeeze-excite, project."""

    def __init__(self, rngs):
        self.expand = nnx.Conv(8, 32, (1, 1), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.middle = nnx.Conv(32, 32, (3, 3), feature_group_count=32, rngs=rngs)
        self.squeeze = nnx.Linear(32, 8, rngs=rngs)
        self.excite = nnx.Linear(8, 32, rngs=rngs)
        self.project = nnx.Conv(32, 8, (1, 1), rngs=rngs)

    def __call__(self, x):
        y = nnx.relu6(self.norm(self.expand(x)))
        y = nnx.hard_swish(self.middle(y))
        gate = nnx.relu(self.squeeze(y.mean((1, 2))))
        gate = nnx.sigmoid(self.excite(gate))
        return x + self.project(y * gate[:, None, None])


class Block(nnx.Module):
    """A transformer block with a fused qkv; heads by number or by their size."""

    def __init__(self, rngs, width=16, by_size=True):
        self.by_size = by_size
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def split(self, x):
        return x.reshape(*x.shape[:2], *((-1, 4) if self.by_size else (4, -1)))

    def __call__(self, x):
        q, k, v = (self.split(y) for y in jnp.split(self.qkv(self.norm1(x)), 3, -1))
        y = nnx.dot_product_attention(q, k, v)
        x = x + self.out(y.reshape(*x.shape[:2], -1))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class TextModel(nnx.Module):
    def __init__(self, rngs, by_size=True):
        self.embed = nnx.Embed(20, 16, rngs=rngs)
        self.blocks = nnx.List([Block(rngs, by_size=by_size) for _ in range(2)])
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Llama(nnx.Module):
    """Grouped-query attention with rotary positions, RMS norm and a gated MLP."""

    def __init__(self, rngs, width=16, heads=4, kv_heads=2, size=4):
        linear = nnx.LinearGeneral
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.q = linear(width, (heads, size), use_bias=False, rngs=rngs)
        self.k = linear(width, (kv_heads, size), use_bias=False, rngs=rngs)
        self.v = linear(width, (kv_heads, size), use_bias=False, rngs=rngs)
        self.o = linear((heads, size), width, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.gate = nnx.Linear(width, 32, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, 32, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(32, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        y = self.norm(x)
        q, k, v = rotate(self.q(y)), rotate(self.k(y)), self.v(y)
        each = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, each, axis=2), jnp.repeat(v, each, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        x = x + self.o(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v))
        return x + self.down(nnx.silu(self.gate(x)) * self.up(x))


def rotate(x):
    first, second = jnp.split(x, 2, axis=-1)
    angle = jnp.arange(x.shape[1])[:, None, None] * 0.1
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    parts = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate(parts, axis=-1)


def attention(rngs):
    return nnx.MultiHeadAttention(
        num_heads=4, in_features=16, qkv_features=32, decode=False, rngs=rngs
    )


TOKENS, SEQUENCE = (2, 5), (2, 5, 16)


def test_heads_and_the_dimensions_of_a_head_are_separate_groups():
    groups = tpp.channel_groups(attention(nnx.Rngs(0)), jnp.ones(SEQUENCE))
    found = [(g.name, g.size, g.inner) for g in groups if g.reason is None]
    # The attention function needs equal dimensions of values and queries.
    assert found == [("query", 4, False), ("query#2", 8, True)]
    assert groups["query#2"].producers == ("query", "key", "value")
    slots = {(m.leaf, m.axis) for m in groups["query"].members}
    assert {("value.kernel", 1), ("key.bias", 0), ("out.kernel", 0)} < slots
    assert ("out.kernel", 1) in {(m.leaf, m.axis) for m in groups["query#2"].members}


def test_a_wide_resnet_has_a_stream_for_each_stage_and_free_channels_in_each_block():
    model = nnx.eval_shape(lambda: tpp.models.create("cifar_wrn16_2", rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    groups = tpp.channel_groups(model, images)
    expected = {"conv1": 16}  # ends in the first block, both of whose paths project
    for stage, size in (
        ("block1.layer", 32),
        ("block2.layer", 64),
        ("block3.layer", 128),
    ):
        expected |= {f"{stage}.{block}.conv1": size for block in (0, 1)}
        stream = groups[f"{stage}.0.convShortcut"]
        assert stream.producers[1:] == (f"{stage}.0.conv2", f"{stage}.1.conv2")
        # Pre-activation: the norms come before the layers that read the stream.
        read = {m.leaf for m in stream.members if m.leaf.endswith(".scale")}
        assert f"{stage}.1.bn1.scale" in read and f"{stage}.0.bn2.scale" not in read
        expected[stream.name] = size
    assert {g.name: g.size for g in groups if g.reason is None} == expected
    assert tpp.check_groups(model, images, groups=groups).masked < 1e-5


def test_a_cifar_mobilenet_loses_half_of_every_group():
    model = nnx.eval_shape(
        lambda: tpp.models.create("cifar_mobilenet_v2", rngs=nnx.Rngs(0))
    )
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    groups = tpp.channel_groups(model, images)
    # One for each expansion (16), stream (7), both ends, and the classes.
    assert len(groups) == 16 + 7 + 2 + 1
    weights = jax.tree.map(lambda a: jnp.zeros(a.shape), nnx.state(model))
    half = tpp.prune(
        nnx.merge(nnx.graphdef(model), weights), tpp.make_plan(groups, weights, 0.5)
    )
    depthwise = half.features[2].conv[1][0]
    assert depthwise.kernel.shape == (3, 3, 1, 48)
    assert depthwise.feature_group_count == 48
    before, after = tpp.count(model, images), tpp.count(half, images)
    assert 0.25 < after.flops / before.flops < 0.3


def test_heads_and_dimensions_can_be_pruned_together():
    model, x = Llama(nnx.Rngs(0)), jnp.ones(SEQUENCE)
    groups = tpp.channel_groups(model, x)
    small = tpp.prune(model, tpp.make_plan(groups, model, {"k": 0.5, "v#2": 0.25}))
    assert small.v.kernel.shape == (16, 1, 3)
    assert small.q.kernel.shape == (16, 2, 4)
    assert small.o.kernel.shape == (2, 3, 16)


def test_rotary_pairs_stay_together():
    groups = tpp.channel_groups(Llama(nnx.Rngs(0)), jnp.ones(SEQUENCE))
    [pair] = [g for g in groups if g.inner and "k" in g.producers and g.size == 2]
    for member in pair.members:
        assert np.sort(member.positions, axis=1).tolist() == [[0, 2], [1, 3]]


def test_a_hard_coded_number_of_heads_is_detected():
    tokens = jnp.ones(TOKENS, jnp.int32)
    groups = tpp.channel_groups(TextModel(nnx.Rngs(0), by_size=False), tokens)
    for block in ("blocks.0", "blocks.1"):
        heads, dimensions = groups[f"{block}.qkv"], groups[f"{block}.qkv#2"]
        assert "a size written into the model (test_networks.py:" in heads.reason
        assert dimensions.reason is None
    groups = tpp.channel_groups(TextModel(nnx.Rngs(0), by_size=True), tokens)
    for block in ("blocks.0", "blocks.1"):
        assert groups[f"{block}.qkv"].reason is None
        assert "a size written into" in groups[f"{block}.qkv#2"].reason


def test_a_plan_of_overlapping_groups_can_be_traced():
    model, x = Llama(nnx.Rngs(0)), jnp.ones(SEQUENCE)
    groups = tpp.channel_groups(model, x)
    plan = tpp.make_plan(groups, model, {"k": 0.5, "v#2": 0.25})
    params = nnx.state(model, nnx.Param)
    concrete = tpp.slice_tree(plan, params)
    traced = jax.jit(lambda plan, tree: tpp.slice_tree(plan, tree))(plan, params)
    jax.tree.map(np.testing.assert_array_equal, concrete, traced)


def test_a_depthwise_kernel_shrinks_with_its_channels_but_is_not_decorrelated():
    model, x = InvertedResidual(nnx.Rngs(0)), jnp.ones((2, 8, 8, 8))
    groups = tpp.channel_groups(model, x)
    plan = tpp.make_plan(groups, model, {"expand": 0.5})
    schedule = tpp.growing_schedule(
        granularity=1.0, every=1, stabilize=9, zero_out_every=1
    )
    params = nnx.state(model, nnx.Param)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def gradients(**options):
        tx = tpp.add_tpp_penalties(plan, schedule, **options)
        state = tx.init(params)._replace(step=jnp.int32(1))
        return tx.update(zeros, state, params)[0]

    kernel = model.middle.kernel[...]
    gone = np.isin(np.arange(32), plan.kept["expand"], invert=True)
    np.testing.assert_allclose(gradients()["middle"]["kernel"][...], kernel * gone)
    assert not np.any(gradients(l2=False)["middle"]["kernel"][...])
    assert np.any(gradients(l2=False)["expand"]["kernel"][...])
