"""Transformers: their groups, derived by hand from the architecture."""

import functools
import pathlib
import re

import pytest
from flax import nnx

import tpp_jax as tpp
from tests.gallery import transformers
from tests.gallery.expected import free, positions, slots, whole, within

WRITTEN = "a size written into the model"


def fused(name, parts):
    """Groups of one layer for queries, keys and values, reshaped to (3, heads, size).

    Heads and the dimensions of a head can be pruned, the axis of three cannot.
    """
    return [
        free(name, size=4),
        within(f"{name}#2", size=4),
        within(f"{name}#3", size=3, why=parts),
    ]


def modular(name):
    """Groups of three layers for queries, keys and values.

    Functions that compute attention require equal sizes of queries, keys and values.
    """
    query, key, value = (f"{name}.{layer}" for layer in ("query", "key", "value"))
    return [free(query, key, value, size=4), within(f"{query}#2", key, value, size=4)]


def blocks(*layers):
    """Returns the names of layers in both blocks."""
    return [f"blocks.{i}.{layer}" for i in (0, 1) for layer in layers]


def vision_transformer():
    groups = [free("patch", *blocks("attention.proj", "mlp.down"), size=16)]
    for block in ("blocks.0", "blocks.1"):
        groups += fused(f"{block}.attention.qkv", "an axis that is indexed")
        groups += [free(f"{block}.mlp.up", size=32)]
    return [*groups, whole("head", size=10)]


def modular_vision_transformer():
    writers = blocks("attention.attention.out", "mlp.down")
    groups = [free("patch", *writers, size=16)]
    for block in ("blocks.0", "blocks.1"):
        groups += modular(f"{block}.attention.attention")
        groups += [free(f"{block}.mlp.up", size=32)]
    return [*groups, whole("head", size=10)]


def swin():
    def block(name, size):
        qkv = f"{name}.attention.qkv"
        return [
            free(qkv, size=4),
            within(f"{qkv}#2", size=size),
            within(f"{qkv}#3", size=3, why="an axis that is indexed"),
            free(f"{name}.mlp.up", size=8 * size),
        ]

    return [
        free("patch", "block1.attention.proj", "block1.mlp.down", size=16),
        *block("block1", 4),
        # Four pixels of 16 channels go in; what comes out are channels of their own.
        free("merge.reduction", "block2.attention.proj", "block2.mlp.down", size=32),
        *block("block2", 8),
        whole("head", size=10),
    ]


def mixer():
    return [
        free("patch", *blocks("channels.down"), size=16),
        free("blocks.0.tokens.up", size=24),
        # What the MLP across patches writes are patches: they stay.
        whole(*blocks("tokens.down"), size=16, why="a spatial axis of a convolution"),
        free("blocks.0.channels.up", size=32),
        free("blocks.1.tokens.up", size=24),
        free("blocks.1.channels.up", size=32),
        whole("head", size=10),
    ]


def gpt2():
    groups = [
        free("tokens", *blocks("attention.c_proj", "mlp.down"), size=16),
        # The vocabulary: the table's other axis.
        within("tokens#2", size=19, why="an axis that is indexed"),
    ]
    for block in ("blocks.0", "blocks.1"):
        # A split into three equal parts is no group of its own.
        name = f"{block}.attention.c_attn"
        groups += fused(name, parts=None)[:2]
        groups += [free(f"{block}.mlp.up", size=32)]
    return groups


def llama():
    groups = [free("embed", *blocks("attention.o", "mlp.down"), size=32)]
    for block in ("blocks.0", "blocks.1"):
        q, k, v = (f"{block}.attention.{layer}" for layer in "qkv")
        groups += [
            free(q, k, v, size=2),  # key-value heads, each with its two query heads
            within(f"{q}#2", size=2),  # the first and the second of these two
            # Frequencies are computed from the size of a head, for pairs.
            within(f"{q}#3", k, size=4, why="positions that are counted"),
            within(f"{v}#2", size=8, why=WRITTEN),
            free(f"{block}.mlp.gate", f"{block}.mlp.up", size=24),
        ]
    return [*groups, whole("head", size=19)]


def bert():
    writers = blocks("output", "mlp.down")
    groups = [free("words", "segments", *writers, size=16)]
    for block in ("blocks.0", "blocks.1"):
        # The size of a head is an attribute, which follows its dimensions.
        groups += [*modular(block), free(f"{block}.mlp.up", size=32)]
    return [*groups, free("pooler", size=12), whole("classifier", size=3)]


def linen_decoder():
    writers = [f"block{i}.{name}" for i in (0, 1) for name in ("attention.out", "down")]
    groups = [free("tokens", *writers, size=16)]
    for block in ("block0", "block1"):
        query, key, value = (
            f"{block}.attention.{layer}" for layer in ("query", "key", "value")
        )
        groups += [
            free(query, key, value, size=4),
            # Linen takes values of any size.
            within(f"{query}#2", key, size=4),
            within(f"{value}#2", size=4),
            free(f"{block}.up", size=32),
        ]
    return [*groups, whole("head", size=19)]


GROUPS = {
    "ViT": vision_transformer,
    "modular ViT": modular_vision_transformer,
    "Swin": swin,
    "Mixer": mixer,
    "GPT-2": gpt2,
    "Llama": llama,
    "BERT": bert,
    "Linen decoder": linen_decoder,
}


@functools.cache
def groups_of(name):
    if name == "Linen decoder":
        model, variables = transformers.linen_decoder()
        return tpp.channel_groups(model, transformers.TOKENS, params=variables)
    create, inputs = transformers.MODELS[name]
    return tpp.channel_groups(nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0))), *inputs)


def norms(*names, leaves=("scale", "bias")):
    return {(f"{name}.{leaf}", 0) for name in names for leaf in leaves}


@pytest.mark.parametrize("name", GROUPS)
def test_the_groups_are_those_of_the_architecture(name):
    # A reason ends with the line of the model that it comes from.
    found = [
        (g.name, g.producers, g.size, g.inner, g.reason and g.reason.split(" (")[0])
        for g in groups_of(name)
    ]
    assert found == GROUPS[name]()


@pytest.mark.parametrize(
    ("group", "code"), [("q#3", "frequency = "), ("v#2", ".reshape(heads)")]
)
def test_a_reason_names_the_line_of_the_model(group, code):
    reason = groups_of("Llama")[f"blocks.0.attention.{group}"].reason
    [first, *_] = re.findall(r"transformers\.py:(\d+)", reason)
    source = pathlib.Path(transformers.__file__).read_text().splitlines()
    assert code in source[int(first) - 1]


def test_the_class_token_and_the_positions_go_with_the_stream():
    stream = groups_of("ViT")["patch"]
    assert stream.reduced
    assert slots(stream, "produced") == {
        ("patch.kernel", 3),
        *((f"{name}.kernel", 1) for name in blocks("attention.proj", "mlp.down")),
    }
    assert slots(stream, "contracted") == {
        *((f"{name}.kernel", 0) for name in blocks("attention.qkv", "mlp.up")),
        ("head.kernel", 0),
    }
    assert slots(stream, "along") == {
        ("class_token", 2),
        ("positions", 2),
        ("patch.bias", 0),
        *((f"{name}.bias", 0) for name in blocks("attention.proj", "mlp.down")),
        *norms("norm", *blocks("norm1", "norm2")),
    }


@pytest.mark.parametrize(
    ("name", "layer", "out"),
    [("ViT", "attention.qkv", "proj"), ("GPT-2", "attention.c_attn", "c_proj")],
)
def test_a_head_is_the_same_part_of_queries_keys_and_values(name, layer, out):
    group = groups_of(name)[f"blocks.1.{layer}"]
    own = [list(range(4 * h, 4 * h + 4)) for h in range(4)]
    heads = [[16 * part + i for part in range(3) for i in head] for head in own]
    assert positions(group, f"blocks.1.{layer}.kernel") == heads
    assert positions(group, f"blocks.1.{layer}.bias") == heads
    assert positions(group, f"blocks.1.attention.{out}.kernel") == own
    assert len(group.members) == 3


def test_each_head_keeps_its_own_relative_bias():
    for block in ("block1", "block2"):
        group = groups_of("Swin")[f"{block}.attention.qkv"]
        bias = f"{block}.attention.relative_bias"
        assert (bias, 1) in slots(group, "along")
        assert positions(group, bias) == [[0], [1], [2], [3]]


def test_merged_patches_repeat_the_channels_of_the_map_four_times():
    stream = groups_of("Swin")["patch"]
    four = [[c, 16 + c, 32 + c, 48 + c] for c in range(16)]
    assert positions(stream, "merge.reduction.kernel") == four
    assert positions(stream, "merge.norm.scale") == four
    assert positions(stream, "patch_norm.bias") == [[c] for c in range(16)]


def test_mlps_across_patches_and_across_channels_do_not_meet():
    groups = groups_of("Mixer")
    assert slots(groups["blocks.1.tokens.up"], "contracted") == {
        ("blocks.1.tokens.down.kernel", 0)
    }
    assert not any("tokens" in m.leaf for m in groups["patch"].members)


def test_a_tied_table_is_the_first_to_write_the_stream_and_the_last_to_read_it():
    stream = groups_of("GPT-2")["tokens"]
    assert slots(stream, "produced") == {
        ("tokens.embedding", 1),
        *((f"{name}.kernel", 1) for name in blocks("attention.c_proj", "mlp.down")),
    }
    assert slots(stream, "contracted") == {
        (f"{name}.kernel", 0) for name in blocks("attention.c_attn", "mlp.up")
    }
    assert ("positions.embedding", 1) in slots(stream, "along")
    assert norms("norm", *blocks("norm1", "norm2")) < slots(stream, "along")


def test_a_key_value_head_goes_with_its_query_heads():
    groups = groups_of("Llama")
    q, k, v, o = (f"blocks.0.attention.{layer}.kernel" for layer in "qkvo")
    both = groups["blocks.0.attention.q"]
    assert positions(both, q) == [list(range(16)), list(range(16, 32))]
    assert positions(both, o) == positions(both, q)
    assert positions(both, k) == [list(range(8)), list(range(8, 16))]
    assert positions(both, v) == positions(both, k)
    # Or one of the two query heads of every key-value head goes: first or second.
    one = groups["blocks.0.attention.q#2"]
    first = [*range(8), *range(16, 24)]
    assert positions(one, q) == [first, [i + 8 for i in first]]
    assert {m.leaf for m in one.members} == {q, o}


def test_a_rotary_pair_is_a_dimension_of_each_half_of_every_head():
    pairs = groups_of("Llama")["blocks.0.attention.q#3"]
    for layer, heads in (("q", 4), ("k", 2)):
        places = positions(pairs, f"blocks.0.attention.{layer}.kernel")
        assert places == [[4 * half + i for half in range(2 * heads)] for i in range(4)]


def test_the_gate_goes_with_what_it_gates():
    group = groups_of("Llama")["blocks.1.mlp.gate"]
    assert slots(group, "produced") == {
        ("blocks.1.mlp.gate.kernel", 1),
        ("blocks.1.mlp.up.kernel", 1),
    }
    assert slots(group, "contracted") == {("blocks.1.mlp.down.kernel", 0)}
    assert not group.reduced


def test_three_embeddings_are_one_stream_which_norms_do_not_end():
    stream = groups_of("BERT")["words"]
    assert {
        ("words.embedding", 1),
        ("segments.embedding", 1),
    } < slots(stream, "produced")
    assert {
        ("positions.embedding", 1),
        *norms("norm", *blocks("norm1", "norm2")),
    } < slots(stream, "along")
    readers = blocks("query", "key", "value", "mlp.up")
    assert slots(stream, "contracted") == {
        *((f"{name}.kernel", 0) for name in readers),
        ("pooler.kernel", 0),
    }


def test_linen_variables_are_named_by_their_place_without_the_collection():
    groups = groups_of("Linen decoder")
    leaves = {m.leaf for m in groups["block0.attention.query"].members}
    assert {"block0.attention.query.bias", "block0.attention.out.kernel"} < leaves
