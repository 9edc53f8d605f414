"""FLOPs where a computation branches, loops, is spread over devices, or is opaque."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec

import tpp_jax as tpp
from tpp_jax.pruning.flops import Costs


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def ones(**shapes):
    return {name: np.ones(dims, np.float32) for name, dims in shapes.items()}


def assert_costs_agree(fn, params, *inputs):
    """Checks that costs of the unpruned model equal counts of the sliced one."""
    groups = tpp.channel_groups(fn, *inputs, params=params)
    costs = Costs(groups)
    assert costs({})[1] == tpp.count(fn, *inputs, params=params).flops
    for share in (0.25, 0.5, 0.75):
        plan = tpp.make_plan(groups, params, share)
        small = tpp.count(fn, *inputs, params=tpp.slice_tree(plan, params))
        kept = {g.name: plan.kept_count(g) for g in plan.pruned_groups}
        assert kept and costs(kept) == (small.params, small.flops)


def experts(p, x, sizes):
    h = lax.ragged_dot(jax.nn.relu(x @ p["up"]), p["one"], sizes)
    return lax.ragged_dot(jax.nn.silu(h), p["two"], sizes) @ p["head"]


EXPERTS = dict(up=(6, 10), one=(4, 10, 32), two=(4, 32, 12), head=(12, 3))


def test_each_row_of_a_ragged_product_meets_one_expert():
    params, inputs = ones(**EXPERTS), (shape(8, 6), shape(4, dtype=jnp.int32))
    groups = tpp.channel_groups(experts, *inputs, params=params)
    assert [(g.name, g.size, g.reason) for g in groups if not g.inner][:3] == [
        ("up", 10, None),
        ("one", 32, None),
        ("two", 12, None),
    ]
    count = tpp.count(experts, *inputs, params=params)
    assert count.flops == 2 * 8 * (6 * 10 + 10 * 32 + 32 * 12 + 12 * 3)
    assert count.layers["one"].channels == 32
    assert count.uncounted == ()
    assert_costs_agree(experts, params, *inputs)


def test_cut_ragged_experts_equal_masked_ones():
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=v).astype(np.float32) for k, v in EXPERTS.items()}
    x, sizes = jnp.asarray(rng.normal(size=(8, 6))), jnp.array([2, 0, 5, 1])
    checks = tpp.check_groups(experts, x, sizes, params=params)
    assert {one.name for one in checks.groups} == {"up", "one", "two"}
    groups = tpp.channel_groups(experts, x, sizes, params=params)
    plan = tpp.make_plan(groups, params, flops=0.4)
    small = tpp.slice_tree(plan, params)
    left = tpp.count(experts, x, sizes, params=small).flops
    assert left <= 0.4 * tpp.count(experts, x, sizes, params=params).flops


def test_a_ragged_contraction_has_an_axis_of_groups():
    dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])

    def fn(p, x, sizes):  # the gradient of a mixture's kernel
        return lax.ragged_dot_general(x, x @ p["w"], sizes, dims)

    params, inputs = ones(w=(6, 5)), (shape(8, 6), shape(4, dtype=jnp.int32))
    [group] = tpp.channel_groups(fn, *inputs, params=params)
    assert group.reason.startswith("an output of the model")
    assert tpp.count(fn, *inputs, params=params).flops == 2 * 8 * 6 * 5


def test_the_most_expensive_branch_counts():
    def fn(p, x):
        def wide(h):
            return jax.nn.relu(h @ p["up"]) @ p["down"]

        def narrow(h):
            return lax.cond(h.sum() > 1, lambda h: h @ p["square"], jnp.sin, h)

        h = x @ p["first"]
        return lax.cond(h.sum() > 0, wide, narrow, h) @ p["last"]

    params = ones(first=(4, 8), up=(8, 16), down=(16, 8), square=(8, 8), last=(8, 2))
    count = tpp.count(fn, shape(3, 4), params=params)
    assert count.flops == 2 * 3 * (4 * 8 + 8 * 16 + 16 * 8 + 8 * 2)
    assert count.layers["square"].flops == 0
    assert sum(layer.flops for layer in count.layers.values()) == count.flops
    assert_costs_agree(fn, params, shape(3, 4))


def test_another_branch_may_be_the_most_expensive_once_pruned():
    def fn(p, x):
        return lax.cond(
            x.sum() > 0,
            lambda x: jax.nn.relu(x @ p["up"]) @ p["down"],
            lambda x: jnp.tanh(x @ p["one"]) @ p["two"],
            x,
        )

    params = ones(up=(4, 20), down=(20, 4), one=(4, 16), two=(16, 4))
    groups = tpp.channel_groups(fn, shape(1, 4), params=params)
    costs = Costs(groups)
    assert costs({})[1] == 2 * 2 * 4 * 20
    assert costs({"up": 5})[1] == 2 * 2 * 4 * 16


def looped(p, x):
    def more(h):
        return jax.nn.tanh(h @ p["w"])

    h = lax.while_loop(lambda h: h.sum() < 9, more, x @ p["first"])
    return h @ p["last"]


LOOPED = ones(first=(4, 8), w=(8, 8), last=(8, 2))


def test_a_loop_of_unknown_length_counts_one_step_and_is_named():
    count = tpp.count(looped, shape(1, 4), params=LOOPED)
    assert count.flops == 2 * (4 * 8 + 8 * 8 + 8 * 2)
    [name] = count.uncounted
    assert name.startswith("dot_general in a while loop (test_flops_control.py:")


def test_a_loop_without_layers_is_not_listed_as_uncounted():
    def fn(p, x):
        h = lax.while_loop(lambda h: h.sum() < 9, lambda h: 2 * h, x @ p["w"])
        return h @ p["v"]

    count = tpp.count(fn, shape(1, 4), params=ones(w=(4, 8), v=(8, 2)))
    assert count.uncounted == ()


def test_the_steps_of_a_loop_of_known_length_count():
    def fn(p, x):
        return lax.fori_loop(0, 5, lambda _, h: jnp.tanh(h @ p["w"]), x)

    count = tpp.count(fn, shape(1, 8), params=ones(w=(8, 8)))
    assert (count.flops, count.uncounted) == (5 * 2 * 64, ())


def doubled(x):
    def kernel(x_ref, o_ref):
        o_ref[...] = 2 * x_ref[...]

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, out_shape=out, interpret=True)(x)


def called(x):
    return jax.ffi.ffi_call("nobody", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


OPAQUE = {
    "pallas_call": doubled,
    "ffi_call": called,
    "pure_callback": lambda x: jax.pure_callback(np.sin, shape(*x.shape), x),
    "fft": lambda x: jnp.fft.fft(x, axis=0).real,
    "cholesky": lambda x: jnp.linalg.cholesky(x.T @ x).sum(0) + x,
}


@pytest.mark.parametrize("name", OPAQUE)
def test_uncounted_work_is_listed_and_prevents_a_flops_target(name):
    def fn(p, x):
        h = jax.nn.relu(OPAQUE[name](x) @ p["w"])
        return h @ p["v"]

    params = ones(w=(4, 8), v=(8, 2))
    count = tpp.count(fn, shape(3, 4), params=params)
    assert count.flops == 2 * 3 * 8 * (4 + 2)
    [left] = count.uncounted
    assert left.startswith(f"{name} (test_flops_control.py:")
    groups = tpp.channel_groups(fn, shape(3, 4), params=params)
    with pytest.raises(tpp.errors.TPPError, match=f"the work of {name} .*py:.*is not"):
        tpp.make_plan(groups, params, flops=0.5)
    plan = tpp.make_plan(groups, params, flops=0.5, allow_uncounted=True)
    assert len(plan.kept["w"]) == 4
    tpp.make_plan(groups, params, params=0.5)  # all parameters are counted
    tpp.make_plan(groups, params, 0.5)


def test_a_function_with_a_gradient_of_its_own_is_entered():
    @jax.custom_vjp
    def own(w, x):
        return x @ w

    own.defvjp(lambda w, x: (own(w, x), (w, x)), lambda kept, _: kept)

    def fn(p, x):
        return own(p["v"], jax.nn.relu(own(p["w"], x)))

    count = tpp.count(fn, shape(3, 4), params=ones(w=(4, 8), v=(8, 2)))
    assert (count.flops, count.uncounted) == (2 * 3 * 8 * (4 + 2), ())


def mesh():
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))


def sharded(p, x):
    def body(x, up, down, head):
        h = lax.psum(jax.nn.relu(x @ up) @ down, "model")
        return h @ head

    P = PartitionSpec
    spread = jax.shard_map(
        body,
        mesh=mesh(),
        in_specs=(P("data"), P(None, "model"), P("model"), P()),
        out_specs=P("data"),
    )
    return spread(x, p["up"], p["down"], p["head"])


SHARDED = dict(up=(6, 16), down=(16, 10), head=(10, 3))


def test_the_work_of_all_devices_is_counted_once():
    params = ones(**SHARDED)
    count = tpp.count(sharded, shape(4, 6), params=params)
    assert count.flops == 2 * 4 * (6 * 16 + 16 * 10 + 10 * 3)
    assert {name: one.channels for name, one in count.layers.items()} == {
        "up": 16,
        "down": 10,
        "head": 3,
    }
    assert_costs_agree(sharded, params, shape(4, 6))


def test_all_devices_lose_the_same_channels_of_their_shards():
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=v).astype(np.float32) for k, v in SHARDED.items()}
    groups = tpp.channel_groups(sharded, shape(4, 6), params=params)
    assert [(g.name, g.size, g.reason) for g in groups][:2] == [
        ("up", 8, None),
        ("down", 10, None),
    ]
    [own] = [m for m in groups["up"].members if m.leaf == "up"]
    assert own.positions.tolist() == [[i, i + 8] for i in range(8)]
    tpp.check_groups(sharded, shape(4, 6), params=params, groups=groups)


def test_channels_are_followed_through_gather_and_scatter_of_devices():
    P = PartitionSpec

    def fn(p, x):
        def body(x, up, down):
            h = lax.all_gather(jax.nn.relu(x @ up), "model", axis=1, tiled=True)
            h = lax.psum_scatter(h, "model", scatter_dimension=1, tiled=True)
            return lax.psum(h @ down, "model")

        spread = jax.shard_map(
            body,
            mesh=mesh(),
            in_specs=(P("data"), P(None, "model"), P("model")),
            out_specs=P("data"),
        )
        return spread(x, p["up"], p["down"])

    params = ones(up=(6, 16), down=(16, 3))
    groups = tpp.channel_groups(fn, shape(4, 6), params=params)
    assert (groups["up"].size, groups["up"].reason) == (8, None)
    plan = tpp.make_plan(groups, params, 0.5)
    small = tpp.slice_tree(plan, params)
    assert small["up"].shape == (6, 8)
    assert jax.eval_shape(fn, small, shape(4, 6)).shape == (4, 3)
