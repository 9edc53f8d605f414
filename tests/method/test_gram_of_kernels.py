"""One Gram penalty for each kernel, however it is stored and wherever it lives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tpp_jax as tpp
from tests.sharded.checks import collectives
from tpp_jax.method.gram import gram_penalty_and_grad, kept_penalty_and_grad
from tpp_jax.method.gram_rows import rows_penalty_and_grad
from tpp_jax.method.rivals import add_growing_l2

P = PartitionSpec
SCHEDULE = tpp.growing_schedule(
    granularity=1.0, every=1, stabilize=40, zero_out_every=1
)


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


def added(plan, params, **options):
    """What the penalties add at full strength, and the Gram energy that is reported."""
    tx = tpp.add_tpp_penalties(plan, SCHEDULE, **options)
    state = tx.init(params)._replace(step=jnp.int32(3))
    updates, state = jax.jit(tx.update)(
        jax.tree.map(jnp.zeros_like, params), state, params
    )
    return updates, float(state.gram)


def members(groups, leaf):
    return {m.axis: m for g in groups for m in g.members if m.leaf == leaf}


def scanned(p, x):
    def layer(h, w):
        return h + jax.nn.relu(h @ w["up"]) @ w["down"], None

    return jax.lax.scan(layer, x, p)[0]


def scanned_and_cast(p, x):
    def layer(h, w):
        up = (2.0 * w["up"]).astype(jnp.float32)
        return h + jax.nn.relu(h @ up) @ w["down"], None

    return jax.lax.scan(layer, x, p)[0]


def indexed(p, x):
    for i in range(3):
        x = x + jax.nn.relu(x @ p["up"][i]) @ p["down"][i]
    return x


def experts(p, x):
    x = jnp.broadcast_to(x, (3, *x.shape))
    hidden = jax.nn.relu(jnp.einsum("ebd,edf->ebf", x, p["up"]))
    return jnp.einsum("ebf,efd->ebd", hidden, p["down"]).sum(0)


def mapped(p, x):
    one = lambda up, down: jax.nn.relu(x @ up) @ down  # noqa: E731
    return jax.vmap(one)(p["up"], p["down"]).sum(0)


def pruned_by_layer(plan, group):
    """Returns the pruned channels of each of three layers; the same for all of some."""
    pruned = plan.pruned(group.name)
    return np.broadcast_to(pruned, (3, pruned.shape[-1]))


STACKS = (scanned, scanned_and_cast, indexed, experts, mapped)


@pytest.mark.parametrize("fn", STACKS, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("target", ["decorrelate", "orthogonal", "relative"])
def test_stacked_kernels_are_penalised_one_by_one(fn, target):
    params = drawn({"up": (3, 4, 6), "down": (3, 6, 4)})
    groups = tpp.channel_groups(fn, jnp.ones((2, 4)), params=params)
    assert members(groups, "up")[2].batch == (0,)
    [group] = [g for g in groups if g.size == 6]
    plan = tpp.make_plan(groups, params, counts={group.name: 4})
    got, energy = added(plan, params, gram_weight=1.0, l2=False, target=target)
    each = [
        gram_penalty_and_grad(kernel, np.isin(np.arange(6), gone), target)
        for kernel, gone in zip(params["up"], pruned_by_layer(plan, group), strict=True)
    ]
    np.testing.assert_allclose(got["up"], [grad for _, grad in each], 1e-4, 1e-5)
    np.testing.assert_allclose(energy, sum(penalty for penalty, _ in each), rtol=1e-5)


def test_whole_experts_that_are_pruned_shrink_and_are_not_decorrelated():
    params = drawn({"up": (3, 4, 6), "down": (3, 6, 4)})
    groups = tpp.channel_groups(mapped, jnp.ones((2, 4)), params=params)
    [group] = [g for g in groups if g.size == 3]
    plan = tpp.make_plan(groups, params, counts={group.name: 2})
    got, energy = added(plan, params, gram_weight=1.0)
    [gone] = plan.pruned(group.name)
    expected = jnp.zeros_like(params["up"]).at[gone].set(params["up"][gone])
    np.testing.assert_allclose(got["up"], expected)
    assert energy == 0


def test_a_transposed_stack_is_one_too():
    def fn(p, x):
        def layer(h, w):
            return h + jax.nn.relu(h @ w["up"].T) @ w["down"], None

        return jax.lax.scan(layer, x, p)[0]

    params = drawn({"up": (3, 6, 4), "down": (3, 6, 4)})
    plan = tpp.make_plan(
        tpp.channel_groups(fn, jnp.ones((2, 4)), params=params), params, 0.5
    )
    got, _ = added(plan, params, gram_weight=1.0, l2=False)
    for i in range(3):
        mask = np.isin(np.arange(6), plan.pruned("up")[i])
        expected = tpp.gram_penalty_grad(params["up"][i].T, mask).T
        np.testing.assert_allclose(got["up"][i], expected, 1e-4, 1e-5)


def flat(p, x):
    q, k, v = ((x @ p[n]).reshape(*x.shape[:2], -1, 8) for n in "qkv")
    return jax.nn.dot_product_attention(q, k, v).reshape(*x.shape[:2], -1) @ p["o"]


def by_heads(p, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) for n in "qkv")
    return jnp.einsum("bthe,hef->btf", jax.nn.dot_product_attention(q, k, v), p["o"])


def heads_first(p, x):
    q, k, v = (jnp.einsum("btd,hde->bthe", x, p[n]) for n in "qkv")
    return jnp.einsum("bthe,hef->btf", jax.nn.dot_product_attention(q, k, v), p["o"])


def attention():
    params = drawn({n: (12, 32) for n in "qkv"} | {"o": (32, 12)}, seed=2)
    split = {n: params[n].reshape(12, 4, 8) for n in "qkv"}
    split["o"] = params["o"].reshape(4, 8, 12)
    first = {n: a.transpose(1, 0, 2) for n, a in split.items() if n != "o"}
    return params, split, {**first, "o": split["o"]}


OPTIONS = ({}, {"l2": False}, {"target": "orthogonal"}, {"kept_weight": 0.3})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_penalty_of_heads_is_the_same_in_every_layout(options):
    x = drawn({"x": (2, 5, 12)}, seed=3)["x"]
    found, energies = [], []
    for fn, params in zip((flat, by_heads, heads_first), attention(), strict=True):
        groups = tpp.channel_groups(fn, x, params=params)
        plan = tpp.make_plan(groups, params, counts={"q": 2}, scores={"q": range(4)})
        updates, energy = added(plan, params, gram_weight=1.0, **options)
        if fn is heads_first:
            updates = {n: updates[n].transpose(1, 0, 2) for n in "qkv"}
        found.append({n: np.reshape(updates[n], (12, 32)) for n in "qkv"})
        energies.append(energy)
    for other in found[1:]:
        for n in "qkv":
            assert np.any(found[0][n])
            np.testing.assert_allclose(other[n], found[0][n], 1e-3, 1e-4)
    np.testing.assert_allclose(energies, energies[0], rtol=1e-5)


def test_heads_and_dimensions_of_one_kernel_have_one_penalty():
    x = drawn({"x": (2, 5, 12)}, seed=3)["x"]
    _, params, _ = attention()
    groups = tpp.channel_groups(by_heads, x, params=params)
    assert members(groups, "q")[1].filters == members(groups, "q")[2].filters == (1, 2)
    counts = {"q": 3, "q#2": 6}
    plan = tpp.make_plan(groups, params, counts=counts)
    got, energy = added(plan, params, gram_weight=1.0)
    kept = np.zeros((4, 8), bool)
    kept[np.ix_(plan.kept["q"], plan.kept["q#2"])] = True
    total = 0.0
    for n in "qkv":
        penalty, grad = gram_penalty_and_grad(params[n].reshape(12, 32), ~kept.ravel())
        expected = (
            np.reshape(grad, (12, 4, 8)) + ~kept * params[n]
        )  # L2 once, not twice
        np.testing.assert_allclose(got[n], expected, 1e-4, 1e-4)
        total += float(penalty)
    np.testing.assert_allclose(energy, total, rtol=1e-5)
    # The zero-out clears both.
    tx = tpp.zero_pruned(plan, SCHEDULE)
    state = tx.init(params)._replace(step=jnp.int32(50))
    updates, _ = tx.update(params, state, params)
    np.testing.assert_array_equal(
        updates["q"], np.where(kept, params["q"], -params["q"])
    )


def test_a_tied_table_s_words_are_no_filters():
    def fn(p, tokens):
        return jax.nn.relu(p["table"][tokens] @ p["up"]) @ p["down"] @ p["table"].T

    params = drawn({"table": (50, 4), "up": (4, 8), "down": (8, 4)})
    groups = tpp.channel_groups(fn, jnp.ones((2, 3), jnp.int32), params=params)
    assert members(groups, "table")[1].filters == (1,)
    plan = tpp.make_plan(groups, params, counts={"table": 2})
    got, _ = added(plan, params, gram_weight=1.0, l2=False)
    mask = np.isin(np.arange(4), plan.pruned("table"))
    expected = tpp.gram_penalty_grad(params["table"], mask)
    np.testing.assert_allclose(got["table"], expected, 1e-4, 1e-3)


@pytest.mark.parametrize("penalty", [gram_penalty_and_grad, kept_penalty_and_grad])
@pytest.mark.parametrize(
    ("shape", "filters", "batch"),
    [
        ((3, 3, 4, 5), (3,), ()),
        ((5, 4), (0,), ()),
        ((2, 4, 5), (2,), (0,)),
        ((4, 3, 5), (1, 2), ()),
        ((3, 4, 5), (0, 2), ()),
        ((2, 4, 3, 5), (2, 3), (0,)),
        ((4, 2, 5, 3), (-2,), (1, -1)),
    ],
)
def test_gradients_are_those_of_the_penalties(penalty, shape, filters, batch):
    kernel = drawn({"k": shape})["k"]
    size = [shape[i] for i in filters]
    pruned = np.random.default_rng(1).random(size) < 0.4

    def value(kernel):
        return penalty(kernel, pruned, filters=filters, batch=batch)[0]

    expected, gradient = jax.value_and_grad(value)(kernel)
    found = penalty(kernel, pruned, filters=filters, batch=batch)
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-3, atol=1e-4)


def mlp(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"]


MLP = drawn({"w1": (16, 24), "b1": (24,), "w2": (24, 8)})
SPECS = (
    {"w1": P(None, "x"), "b1": P("x"), "w2": P("x", None)},
    {"w1": P("x", None), "b1": P(), "w2": P(None, "y")},
    {"w1": P("y", "x"), "b1": P(("x", "y")), "w2": P(("x", "y"), None)},
)


@functools.cache
def mlp_plan():
    groups = tpp.channel_groups(mlp, jnp.ones((1, 16)), params=MLP)
    return tpp.make_plan(groups, MLP, 0.5)


TRANSFORMS = {
    "penalties": functools.partial(tpp.add_tpp_penalties, kept_weight=0.1),
    "orthogonal": functools.partial(tpp.add_tpp_penalties, target="orthogonal"),
    "relative": functools.partial(tpp.add_tpp_penalties, target="relative"),
    "zeroing": tpp.zero_pruned,
    "growing": add_growing_l2,
}


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("specs", SPECS, ids=["filters", "inputs", "both"])
def test_sharded_parameters_get_the_updates_of_one_device(kind, transform, specs):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    tx = TRANSFORMS[transform](mlp_plan(), SCHEDULE)

    def updates(params, update):
        state = tx.init(params)._replace(step=jnp.int32(30))
        return update(params, state, params)[0]

    want = updates(MLP, tx.update)
    put = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in MLP.items()}
    with jax.set_mesh(mesh):
        inside = updates(put, jax.jit(tx.update))
    for got in (inside, updates(put, jax.jit(tx.update)), updates(put, tx.update)):
        for name, leaf in got.items():
            np.testing.assert_allclose(leaf, want[name], 1e-4, 1e-3, err_msg=name)
            assert leaf.sharding.is_equivalent_to(put[name].sharding, leaf.ndim)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_sharded_stacks_and_heads(kind):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
    kernel = drawn({"k": (2, 6, 4, 8)})["k"]
    pruned = np.arange(4)[:, None] + np.arange(8) < 4
    want = gram_penalty_and_grad(kernel, pruned, filters=(2, 3), batch=(0,))
    for spec in (P("x", None, "y"), P(None, "x", None, "y"), P(None, None, "x", "y")):
        there = jax.device_put(kernel, NamedSharding(mesh, spec))
        for jit in (False, True):
            fn = functools.partial(gram_penalty_and_grad, filters=(2, 3), batch=(0,))
            got = (jax.jit(fn) if jit else fn)(there, pruned)
            np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
            np.testing.assert_allclose(got[1], want[1], 1e-4, 1e-4)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_status_of_sharded_parameters(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    put = {
        n: jax.device_put(a, NamedSharding(mesh, s))
        for (n, a), s in zip(MLP.items(), SPECS[2].values(), strict=True)
    }
    plan = mlp_plan()
    state = tpp.zero_pruned(plan, SCHEDULE).init(put)
    now, there = tpp.status(state, plan, MLP), tpp.status(state, plan, put)
    np.testing.assert_allclose(there.pruned_norm, now.pruned_norm, rtol=1e-5)
    assert (there.zeroed, there.layers, there.ready) == (0, 1, False)


@pytest.mark.parametrize("target", ["decorrelate", "relative"])
@pytest.mark.parametrize(
    ("shape", "axis", "batch", "own"),
    [
        ((5, 9), 1, (), False),
        ((9, 5), 0, (), False),
        ((3, 3, 4, 9), 3, (), False),
        ((4, 5, 9), 2, (0,), False),
        ((5, 4, 9), 2, (1,), True),
        ((3, 9, 2, 5), 1, (0, 2), True),
    ],
)
def test_the_rows_of_pruned_filters_are_enough(shape, axis, batch, own, target):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        kernel = jnp.asarray(rng.normal(size=shape))
        stacks = tuple(shape[i] for i in batch) if own else ()
        ranks = rng.permuted(np.broadcast_to(np.arange(9), (*stacks, 9)), axis=-1)
        options = dict(filters=(axis,), batch=batch)
        want = gram_penalty_and_grad(kernel, ranks < 4, target, **options)
        rows = jax.jit(rows_penalty_and_grad, static_argnums=(2, 3, 4, 5))
        got = rows(kernel, ranks < 4, 4, target, axis, batch)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("spec", [P("x", "y"), P(None, ("x", "y")), P("y")])
def test_divided_kernels_exchange_pruned_filters_alone(spec, kind):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
    kernel = drawn({"k": (32, 48)})["k"]
    there = jax.device_put(kernel, NamedSharding(mesh, spec))
    pruned = np.arange(48) % 4 == 1
    want = gram_penalty_and_grad(kernel, pruned)
    rows = jax.jit(rows_penalty_and_grad, static_argnums=(2, 3, 4))
    arguments = there, pruned, 12, "decorrelate", 1
    got = rows(*arguments)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], 1e-4, 1e-4)
    assert got[1].sharding.is_equivalent_to(there.sharding, 2)
    moved = collectives(rows.lower(*arguments).compile().as_text())
    assert moved and all(size <= 12 * 48 for _, size in moved), moved
