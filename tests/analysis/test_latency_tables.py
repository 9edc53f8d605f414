"""Tables of times: what is measured, for models of every kind."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

import tpp_jax as tpp
from tpp_jax.analysis import latency_tables
from tpp_jax.analysis.latency_tables import grid_of, latency_table
from tpp_jax.analysis.products import products_of
from tpp_jax.errors import TPPError, TPPTypeError
from tpp_jax.pruning.axes import Axes, sizes_of


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    """Shortens the timing: how exact it is does not matter here."""
    monkeypatch.setattr(latency_tables, "_SECONDS_OF_A_PRODUCT", 0.0)
    monkeypatch.setattr(latency_tables, "_SECONDS_OF_A_NETWORK", 0.0)


class Net(nnx.Module):
    """A convolution, a depthwise one and a dense layer."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.depthwise = nnx.Conv(6, 6, (3, 3), feature_group_count=6, rngs=rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.depthwise(nnx.relu(self.conv(x)))).mean((1, 2)))


def dense_pair(p, x):
    return jnp.tanh(x @ p["w1"]) @ p["w2"]


PAIR = {"w1": jnp.ones((4, 6)), "w2": jnp.ones((6, 2))}


def assert_sound(table, groups):
    """Checks what holds for all tables."""
    assert table.groups == tuple(g.name for g in groups)
    assert table.sizes == tuple(g.size for g in groups)
    assert table.device == jax.devices()[0].device_kind
    first = table.measured[0]
    assert first.counts == table.sizes and first.seconds == table.dense_seconds
    assert all(network.seconds > 0 for network in table.measured)
    assert all(w >= 0 for w in table.weights) and any(table.weights)
    for shape in table.shapes:
        assert len(shape.seconds) == np.prod([len(w) for w in shape.widths])
        assert all(0 <= t < 10 for t in shape.seconds)
    assert table.seconds({}) > 0
    assert tpp.LatencyTable.from_json(table.to_json()) == table


def test_each_distinct_shape_of_an_nnx_module_is_timed_where_it_varies():
    model = Net(nnx.Rngs(0))
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    groups = tpp.channel_groups(model, image)
    batch = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)
    table = latency_table(model, batch, groups)
    assert_sound(table, groups)
    # The outputs of the first, the channels of the second, the inputs of the third.
    assert [shape.widths for shape in table.shapes] == [((1, 5, 6),)] * 3
    assert [layer.shape for layer in table.layers] == [0, 1, 2]
    plan = tpp.make_plan(groups, model, {"conv": 0.5}, round_to="fast", table=table)
    assert plan.kept_count(groups["conv"]) in table.fast_widths("conv")
    # Other operations: those on feature maps, at the batch size that is timed.
    per_channel = sum(n for n, along in table.elements if along)
    assert per_channel >= 4 * 8 * 8 * 2


def test_equal_shapes_are_timed_once():
    x = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    model = nnx.eval_shape(
        lambda: tpp.models.create(
            "mlp7_linear", image_shape=(8, 8, 1), rngs=nnx.Rngs(0)
        )
    )
    groups = tpp.channel_groups(model, x)
    traced = groups.traced
    axes = Axes(groups)
    products = list(products_of(traced, axes))
    full = sizes_of(axes.runs, [(g.size, g.size) for g in groups])
    assert len(products) == 7
    assert [n.of(full) for n in products[1].sizes] == [1, 1, 100, 100]
    assert len({repr(p.operation) for p in products}) == 1


@pytest.mark.parametrize("several", [False, True])
def test_functions_and_linen_modules_have_tables(several):
    x = jnp.ones((8, 4))
    inputs = [x] if several else x
    groups = tpp.channel_groups(dense_pair, x[:1], params=PAIR)
    table = latency_table(dense_pair, inputs, groups, params=PAIR)
    assert_sound(table, groups)
    plan = tpp.make_plan(groups, PAIR, latency=1.0, table=table)
    assert table.seconds({"w1": plan.kept_count(groups["w1"])}) <= table.seconds({})
    module = linen.Sequential([linen.Dense(6), linen.relu, linen.Dense(2)])
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    groups = tpp.channel_groups(module, x[:1], params=variables)
    assert_sound(latency_table(module, inputs, groups, params=variables), groups)


def test_groups_that_were_pickled_will_do():
    groups = tpp.channel_groups(dense_pair, jnp.ones((1, 4)), params=PAIR)
    plain = groups.replace(_traced=None, reading=None, source=None)
    table = latency_table(dense_pair, jnp.ones((8, 4)), plain, params=PAIR)
    assert len(table.measured) == len(latency_tables._SHARES)


def test_networks_that_the_model_does_not_allow_are_left_out():
    def even(p, x):
        x = x @ p["w1"]
        if x.shape[-1] % 2:
            raise ValueError("the width must be even")
        return x @ p["w2"]

    params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
    groups = tpp.channel_groups(even, jnp.ones((1, 4)), params=params)
    table = latency_table(even, jnp.ones((8, 4)), groups, params=params)
    assert [network.counts[0] for network in table.measured] == [8, 6, 4, 2]
    assert_sound(table, groups)


def test_of_a_model_that_cannot_be_pruned_the_dense_network_is_timed():
    def fixed(p, x):
        return (x @ p["w1"]).reshape(-1, 6) @ p["w2"]

    groups = tpp.channel_groups(fixed, jnp.ones((1, 4)), params=PAIR)
    table = latency_table(fixed, jnp.ones((8, 4)), groups, params=PAIR)
    assert_sound(table, groups)
    assert len(table.measured) == 1
    assert table.seconds({}) == pytest.approx(table.dense_seconds)


class Attention(nnx.Module):
    """Attention, whose products of activations are timed too."""

    def __init__(self, rngs):
        self.attend = nnx.MultiHeadAttention(4, 8, decode=False, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(x + self.attend(x))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_sizes_of_products_are_those_of_a_pruned_network(batch):
    model = nnx.eval_shape(lambda: Attention(nnx.Rngs(0)))
    groups = tpp.channel_groups(model, jax.ShapeDtypeStruct((batch, 5, 8), jnp.float32))
    kept = {g.name: g.size // 2 for g in groups if g.reason is None}
    scores = {g.name: jnp.arange(g.size) for g in groups if g.reason is None}
    plan = tpp.make_plan(groups, model, counts=kept, scores=scores)
    small = tpp.channel_groups(tpp.prune(model, plan), *groups.inputs)

    def work(of, counts):
        axes = Axes(of)
        products = list(products_of(of.traced, axes))
        sizes = sizes_of(axes.runs, counts)
        return [[n.of(sizes) for n in p.sizes] for p in products]

    expected = work(small, [(g.size, g.size) for g in small])
    assert (
        work(groups, [(kept.get(g.name, g.size), g.size) for g in groups]) == expected
    )
    assert len(expected) == 4 + 2 + 1  # projections, products of activations, head


def test_a_grouped_convolution_is_timed_at_shapes_that_exist():
    def fn(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=dims)
        x = lax.conv_general_dilated(
            x,
            p["b"],
            (1, 1),
            "SAME",
            dimension_numbers=dims,
            feature_group_count=2,
        )
        return x.mean((1, 2)) @ p["c"]

    shapes = {"a": (1, 1, 3, 8), "b": (3, 3, 4, 12), "c": (12, 2)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    x = jnp.ones((1, 4, 4, 3))
    groups = tpp.channel_groups(fn, x, params=params)
    axes = Axes(groups)
    _, grouped, _ = products_of(groups.traced, axes)
    full = sizes_of(axes.runs, [(g.size, g.size) for g in groups])
    assert [n.of(full) for n in grouped.sizes] == [2, 4, 6]
    for point in itertools.product((1, 2), (1, 4), (1, 6)):
        images, kernel = map(jnp.ones, grouped.operation.shapes(point))
        out = grouped.operation.call(point, for_cpu=False)(images, kernel)
        assert out.shape == (1, 4, 4, point[0] * point[2])
    assert_sound(latency_table(fn, x, groups, params=params), groups)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 10, 16, 48, 64, 65, 344, 1280])
def test_a_grid_is_small_and_has_widths_of_both_kinds(size):
    grid = grid_of(size)
    assert list(grid) == sorted(set(grid)) and len(grid) <= 15
    assert {1, size} <= {*grid} <= {*range(1, size + 1)}
    if size > 8:
        assert 8 in grid and any(n % 8 and n > size / 2 for n in grid)


def test_mistakes_are_named():
    groups = tpp.channel_groups(dense_pair, jnp.ones((1, 4)), params=PAIR)
    with pytest.raises(TPPTypeError, match="the groups are a dict"):
        latency_table(dense_pair, jnp.ones((1, 4)), PAIR, params=PAIR)
    wider = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
    with pytest.raises(TPPError, match="groups are those of another model"):
        latency_table(dense_pair, jnp.ones((1, 4)), groups, params=wider)
