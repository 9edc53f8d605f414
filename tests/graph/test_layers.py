"""Layers whose kernel is computed: from several leaves, by products, by the unknown."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

import tpp_jax as tpp
from tpp_jax.graph.tracing import layers
from tpp_jax.graph.ungrouped import ungrouped


def drawn(**shapes):
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=dims), jnp.float32)
        for name, dims in shapes.items()
    }


X = drawn(x=(2, 6))["x"]
HEAD = {"head": (16, 3)}


def network(kernel):
    """A network whose first layer has the kernel that is made of the parameters."""
    return lambda p, x: jax.nn.relu(x @ kernel(p)) @ p["head"]


def length_and_direction(p):
    return p["length"] * p["way"] / jnp.linalg.norm(p["way"], axis=0)


def kronecker(p):
    return jnp.kron(p["blocks"], p["inside"])


# kernel, shapes of its leaves, {group: (size, leaf → role along each axis, or None)}
COMPUTED = {
    "a direction and a length": (
        length_and_direction,
        {"way": (6, 16), "length": (16,)},
        {"way": (16, {"way": "produced", "length": "along", "head": "contracted"})},
    ),
    "a weight under a mask": (
        lambda p: jnp.where(p["seen"] > 0, p["weight"], 0),
        {"weight": (6, 16), "seen": (6, 16)},
        {"seen": (16, {"seen": "produced", "weight": "produced"})},
    ),
    "quantised, with a scale for each filter": (
        lambda p: jnp.round(p["codes"]) * p["scale"],
        {"codes": (6, 16), "scale": (1, 16)},
        {"codes": (16, {"codes": "produced", "scale": "along"})},
    ),
    "a weight and a product of low rank": (
        lambda p: p["weight"] + 0.5 * p["down"] @ p["up"],
        {"weight": (6, 16), "down": (6, 4), "up": (4, 16)},
        {
            "weight": (16, {"weight": "produced", "up": "produced"}),
            "down": (4, {"down": "produced", "up": "contracted"}),
        },
    ),
    "a product of low rank": (
        lambda p: p["down"] @ p["up"],
        {"down": (6, 4), "up": (4, 16)},
        {
            "down": (4, {"down": "produced", "up": "contracted"}),
            "up": (16, {"up": "produced", "head": "contracted"}),
        },
    ),
    "two kernels side by side": (
        lambda p: jnp.concatenate([p["left"], p["right"]], axis=1),
        {"left": (6, 10), "right": (6, 6)},
        {"left": (10, {"left": "produced"}), "right": (6, {"right": "produced"})},
    ),
    "the mean of two kernels": (
        lambda p: jnp.stack([p["one"], p["two"]]).mean(0),
        {"one": (6, 16), "two": (6, 16)},
        {"one": (16, {"one": "produced", "two": "produced"})},
    ),
    "a Kronecker product": (
        kronecker,
        {"blocks": (3, 8), "inside": (2, 2)},
        {"blocks": (8, {"blocks": "produced"}), "inside": (2, {"inside": "produced"})},
    ),
    "a matrix stored with heads": (
        lambda p: (p["weight"] * p["gain"]).reshape(6, -1),
        {"weight": (6, 4, 4), "gain": (4, 4)},
        {"weight": (4, {"weight": "produced"}), "weight#2": (4, {})},
    ),
}


@functools.cache
def computed(name):
    kernel, shapes, _ = COMPUTED[name]
    params = drawn(**shapes, **HEAD)
    fn = network(kernel)
    return fn, params, tpp.channel_groups(fn, X, params=params)


@pytest.mark.parametrize("name", COMPUTED)
def test_all_leaves_of_a_kernel_take_their_part(name):
    *_, groups = computed(name)
    expected = COMPUTED[name][2]
    found = {group.name: group for group in groups if group.name != "head"}
    assert found.keys() == expected.keys()
    for group, (size, roles) in expected.items():
        assert found[group].reason is None
        assert found[group].size == size
        members = {m.leaf: m.role for m in found[group].members}
        assert {leaf: members.get(leaf) for leaf in roles} == roles


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_cut_is_what_was_masked(name):
    fn, params, groups = computed(name)
    tpp.check_groups(fn, X, params=params, groups=groups)
    plan = tpp.make_plan(groups, params, 0.5)
    small = tpp.slice_tree(plan, params)
    assert all(np.size(small[k]) < np.size(params[k]) for k in params)
    masked = jax.tree.map(jnp.multiply, params, tpp.mask_tree(plan, params))
    if name == "a direction and a length":  # the norm of a masked filter is 0
        masked["way"] = params["way"]
    np.testing.assert_allclose(fn(small, X), fn(masked, X), atol=1e-4)


@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_kernel_costs_what_a_plain_one_does(name):
    fn, params, _ = computed(name)
    count = tpp.count(fn, X, params=params)
    inner = {"up": 2 * 6 * 4 * 16} if "low rank" in name else {}
    assert count.flops == 2 * 2 * 16 * (6 + 3) + sum(inner.values())


def test_complex_kernels_of_two_real_leaves():
    def fn(p, x):
        return jax.nn.relu(jnp.abs(x @ lax.complex(p["re"], p["im"]))) @ p["head"]

    params = drawn(re=(6, 16), im=(6, 16), **HEAD)
    groups = tpp.channel_groups(fn, X, params=params)
    members = {(m.leaf, m.axis): m.role for m in groups["re"].members}
    assert members == {
        ("re", 1): "produced",
        ("im", 1): "produced",
        ("head", 0): "contracted",
    }
    tpp.check_groups(fn, X, params=params, groups=groups)


class Wrapped(nnx.Module):
    """A convolution whose kernel another module normalises."""

    def __init__(self, wrapper, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        inner = nnx.Conv(8, 12, (3, 3), rngs=rngs)
        self.normed = wrapper(inner, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.normed(nnx.relu(self.first(x))))
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_wrappers_of_nnx_that_normalise_a_kernel(wrapper):
    net = Wrapped(wrapper, nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    groups = tpp.channel_groups(net, images)
    assert [(g.name, g.size, g.reason) for g in groups][:2] == [
        ("first", 8, None),
        ("normed.layer_instance", 12, None),
    ]
    kernel = "normed.layer_instance.kernel"
    roles = {(m.leaf, m.axis): m.role for g in groups for m in g.members}
    assert roles[kernel, 2] == "contracted" and roles[kernel, 3] == "produced"
    tpp.check_groups(net, images, groups=groups)
    flops = tpp.count(net, images).layers["normed.layer_instance"].flops
    plain = 2 * 2 * 36 * 9 * 8 * 12
    assert plain <= flops < 1.1 * plain


def test_a_norm_over_what_a_kernel_contracts_is_a_reduction():
    net = Wrapped(nnx.WeightNorm, nnx.Rngs(0))
    groups = tpp.channel_groups(net, jnp.ones((1, 6, 6, 3)))
    assert groups["first"].reduced
    assert not groups["normed.layer_instance"].reduced


def test_low_rank_adapters_of_nnx_that_are_not_merged():
    net = nnx.Sequential(
        nnx.LoRALinear(6, 16, lora_rank=4, rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Linear(16, 3, rngs=nnx.Rngs(1)),
    )
    groups = tpp.channel_groups(net, X)
    assert [(g.size, g.reason) for g in groups][:2] == [(16, None), (4, None)]
    tpp.check_groups(net, X, groups=groups)


def test_gates_that_a_cell_of_linen_puts_side_by_side():
    class Reader(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.RNN(linen.OptimizedLSTMCell(8), name="rnn")(x)
            return linen.Dense(3, name="head")(x[:, -1])

    x = jnp.ones((2, 4, 6))
    net = Reader()
    params = net.init(jax.random.key(0), x)
    groups = tpp.channel_groups(net, x, params=params)
    state, *_ = groups
    made = {m.leaf for m in state.members if m.role == "produced"}
    assert made == {
        f"OptimizedLSTMCell_0.{source}{gate}.kernel"
        for source in "hi"
        for gate in "ifgo"
    }
    assert state.size == 8 and state.reason is None
    # Four gates of 8, from 8 and from 6 numbers, at 4 steps of 2 sentences.
    flops = 2 * 2 * 4 * 32 * (8 + 6) + 2 * 2 * 8 * 3
    assert tpp.count(net, x, params=params).flops == flops


UNKNOWN = {
    "several leaves": lambda p: lax.linalg.lu(p["w"])[0] * p["v"],
    "one leaf": lambda p: lax.linalg.lu(p["w"])[0],
    "a circulant matrix": lambda p: p["c"][jnp.arange(6)[:, None] - jnp.arange(6)],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_channels_of_a_kernel_that_is_not_followed_are_listed(name):
    fn, params = network(UNKNOWN[name]), drawn(w=(6, 6), v=(6, 6), c=(6,), head=(6, 3))
    groups = tpp.channel_groups(fn, X, params=params)
    first, *_ = groups
    assert first.size == 6 and first.reason is not None
    assert tpp.count(fn, X, params=params).flops == 2 * 2 * 6 * (6 + 3)


def test_a_vector_that_is_contracted_is_a_layer_of_one_channel():
    def fn(p, x):
        return jax.nn.relu(x @ p["w"]) @ p["probe"]

    params = drawn(w=(6, 16), probe=(16,))
    count = tpp.count(fn, X, params=params)
    assert count.flops == 2 * 2 * 16 * (6 + 1)
    assert count.layers["probe"].channels == 1
    [group] = tpp.channel_groups(fn, X, params=params)
    assert {m.leaf: m.role for m in group.members} == {
        "w": "produced",
        "probe": "contracted",
    }


def test_channels_that_an_elementwise_product_makes_are_a_group():
    def fn(p, x):  # an embedding of numbers
        h = x[:, :, None] * p["scale"] + p["shift"]
        return jax.nn.relu(h).mean(1) @ p["head"]

    params = drawn(scale=(6, 16), shift=(6, 16), **HEAD)
    groups = tpp.channel_groups(fn, X, params=params)
    assert (groups["scale"].size, groups["scale"].reason) == (16, None)
    tpp.check_groups(fn, X, params=params, groups=groups)


def test_learned_queries_are_activations_and_not_a_kernel():
    def fn(p, x):
        q = p["learned"] @ p["query"] + p["bias"]
        weights = jax.nn.softmax(q @ (x @ p["key"]).T / jnp.sqrt(q.shape[-1]))
        return weights @ (x @ p["value"]) @ p["head"]

    params = drawn(
        learned=(1, 12), query=(12, 8), bias=(8,), key=(6, 8), value=(6, 16), **HEAD
    )
    groups = tpp.channel_groups(fn, X, params=params)
    assert groups.layers == ("query", "key", "value", "head")
    assert groups["query"].reduced  # by the product of queries and keys
    assert groups["learned"].size == 12


def test_a_use_with_activations_says_what_the_axes_of_a_kernel_are():
    def fn(p, x):  # a spectral norm, by one step of power iteration
        v = p["u"] @ p["w"].T
        size = (v @ p["w"] @ p["u"].T)[0, 0]
        return jax.nn.relu(x @ (p["w"] / size)) @ p["head"]

    params = drawn(w=(6, 16), u=(1, 16), **HEAD)
    groups = tpp.channel_groups(fn, X, params=params)
    roles = {(m.leaf, m.axis): m.role for m in groups["w"].members}
    assert roles["w", 1] == "produced"
    assert roles.keys() == {("w", 1), ("u", 1), ("head", 0)}


def test_parameters_of_no_group_are_told_with_the_reason():
    def fn(p, x):
        return jax.nn.relu((x * p["gain"] + p["offset"]) @ p["w"]) @ p["head"]

    params = drawn(gain=(6,), offset=(), spare=(4, 4), w=(6, 16), **HEAD)
    groups = tpp.channel_groups(fn, X, params=params)
    assert ungrouped(groups) == {
        "gain": "an input of the model (axis 0)",
        "offset": "a single number",
        "spare": "not used",
    }
    text = tpp.describe_groups(groups)
    assert "Parameters that no group runs through" in text
    assert "gain: an input of the model (axis 0)" in text


def test_the_names_and_kernels_of_plain_layers_are_as_written():
    def fn(p, x):
        h = jax.nn.relu(x @ p["a"]["kernel"].astype(jnp.bfloat16))
        return h @ p["b"]["kernel"].T

    params = {"a": {"kernel": jnp.ones((6, 4))}, "b": {"kernel": jnp.ones((3, 4))}}
    groups = tpp.channel_groups(fn, X, params=params)
    found = [(layer.name, layer.kernel) for layer in layers(groups.traced)]
    assert found == [("a", "a.kernel"), ("b", "b.kernel")]
