"""Slicing a model that is given away never needs the memory of two."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tpp_jax as tpp
from tpp_jax.graph.naming import named_leaves
from tpp_jax.pruning import slicing

LAYERS, WIDTH = 8, 64


def net(params, x):
    for i in range(LAYERS):
        x = jax.nn.relu(x @ params[f"up{i}"] + params[f"bias{i}"]) @ params[f"down{i}"]
    return x


def host_params():
    draws = np.random.default_rng(0)
    shapes = {"up": (16, WIDTH), "bias": (WIDTH,), "down": (WIDTH, 16)}
    return {
        f"{name}{i}": draws.normal(size=shape).astype(np.float32)
        for i in range(LAYERS)
        for name, shape in shapes.items()
    }


SPECS = {"up": P("data", "model"), "bias": P("model"), "down": P("model", "data")}
INPUT = jax.ShapeDtypeStruct((4, 16), jnp.float32)


def placed(kind):
    if kind == "one device":
        return jax.tree.map(jnp.asarray, host_params())
    axes = AxisType.Auto if kind == "auto" else AxisType.Explicit
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axes,) * 2)
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, SPECS[name.rstrip("01234567")]))
        for name, leaf in host_params().items()
    }


@pytest.fixture(scope="module")
def plan():
    params = host_params()
    groups = tpp.channel_groups(net, INPUT, params=params)
    return tpp.make_plan(groups, params, {"up*": 0.5}, round_to=8)


def bytes_alive(known):
    """Bytes on all devices, those of arrays from before excepted."""
    return sum(
        # Asking for the shards would make arrays of them, which are alive then.
        math.prod(array.sharding.shard_shape(array.shape))
        * array.dtype.itemsize
        * len(array.sharding.device_set)
        for array in jax.live_arrays()
        if id(array) not in known and not array.is_deleted()
    )


@pytest.mark.parametrize("kind", ["one device", "auto", "explicit"])
@pytest.mark.parametrize("donate", [False, True])
def test_one_array_is_needed_in_addition_and_not_all(plan, kind, donate, monkeypatch):
    before = [*jax.live_arrays()]
    known = {id(array) for array in before}
    params = placed(kind)
    jax.block_until_ready(params)
    whole, most = bytes_alive(known), 0
    own = slicing.put_back

    def put_back(*arguments):
        nonlocal most
        result = own(*arguments)
        most = max(most, bytes_alive(known))
        return result

    monkeypatch.setattr(slicing, "put_back", put_back)
    small = tpp.slice_tree(plan, params, donate=donate)
    largest = max(leaf.nbytes for leaf in host_params().values())
    # Positions that are kept are on the devices too, where arrays are cut there.
    assert (most < whole + 2 * largest) == donate
    assert (bytes_alive(known) < 0.6 * whole) == donate
    for name, leaf in tpp.slice_tree(plan, host_params()).items():
        np.testing.assert_array_equal(small[name], leaf)
    assert all(leaf.is_deleted() == donate for leaf in params.values())


def test_a_module_that_is_given_away_cannot_be_used_any_more():
    def model():
        return tpp.models.create("cifar_resnet8", num_classes=10, rngs=nnx.Rngs(0))

    given, x = model(), jnp.ones((2, 32, 32, 3))
    groups = tpp.channel_groups(given, x)
    plan = tpp.make_plan(groups, given, {"*conv1": 0.5}, skip="conv1")
    wanted = tpp.prune(given, plan)(x)
    uncut = given.linear.kernel[...]
    small = tpp.prune(given, plan, donate=True)
    np.testing.assert_array_equal(small(x), wanted)
    assert small.linear.kernel[...] is uncut  # handed over
    with pytest.raises(RuntimeError, match="deleted"):
        given(x)
    with pytest.raises(tpp.TPPError, match="donated"):
        tpp.save_model("nowhere", given)


def test_arrays_that_were_rescaled_are_given_away_too():
    """With zeros in pruned channels, scales of root mean squares change first."""

    def normed(params, x):
        x = x @ params["enter"]
        x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        return (x * params["scale"]) @ params["leave"]

    draws = np.random.default_rng(0)
    shapes = {"enter": (4, 8), "scale": (8,), "leave": (8, 3)}
    params = {n: jnp.asarray(draws.normal(size=s)) for n, s in shapes.items()}
    x = jnp.asarray(draws.normal(size=(5, 4)), jnp.float32)
    groups = tpp.channel_groups(normed, x, params=params)
    plan = tpp.make_plan(groups, params, 0.5)
    zeros = jax.tree.map(jnp.multiply, params, tpp.mask_tree(plan, params))
    wanted = normed(zeros, x)
    small = tpp.prune(normed, plan, zeros, donate=True)
    np.testing.assert_allclose(normed(small, x), wanted, rtol=1e-4, atol=1e-5)
    assert all(leaf.is_deleted() for leaf in zeros.values())


def test_nothing_is_deleted_if_the_cut_is_refused():
    def two(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    other = {"up": jnp.ones((3, 6)), "down": jnp.ones((6, 2))}
    groups = tpp.channel_groups(two, jnp.ones((1, 3)), params=params)
    plan = tpp.make_plan(groups, params, 0.5)
    with pytest.raises(tpp.TPPError, match="shape"):
        tpp.prune(two, plan, other, donate=True)
    with pytest.raises(tpp.TPPError, match="shape"):
        tpp.slice_tree(plan, {**params, "down": other["down"]}, donate=True)
    assert not any(leaf.is_deleted() for leaf in [*params.values(), *other.values()])


def test_one_array_under_several_names_is_cut_under_each(plan):
    params = placed("one device")
    state = {"params": params, "ema": dict(params), "step": jnp.int32(3)}
    small = tpp.slice_tree(plan, state, donate=True)
    wanted = tpp.slice_tree(plan, host_params())
    for part in ("params", "ema"):
        for name, leaf in wanted.items():
            np.testing.assert_array_equal(small[part][name], leaf)
    assert all(leaf.is_deleted() for leaf in params.values())
    assert int(small["step"]) == 3


def test_arrays_that_share_memory_are_cut_each_and_kept_where_not_cut(plan):
    params = placed("one device")
    others = {n: jax.device_put(leaf, leaf.sharding) for n, leaf in params.items()}
    tree = {"params": params, "ema": others, "uncut": {"copy of up0": None}}
    tree["uncut"]["copy of up0"] = jax.device_put(params["up0"], params["up0"].sharding)
    small = tpp.slice_tree(plan, tree, donate=True)
    wanted = tpp.slice_tree(plan, host_params())
    for part in ("params", "ema"):
        for name, leaf in wanted.items():
            np.testing.assert_array_equal(small[part][name], leaf)
    whole = small["uncut"]["copy of up0"]
    np.testing.assert_array_equal(whole, host_params()["up0"])


def test_an_array_that_was_donated_before_is_an_error_before_any_is_deleted(plan):
    params = placed("one device")
    params["up7"].delete()
    with pytest.raises(tpp.TPPError, match="up7 is deleted: it was donated before"):
        tpp.slice_tree(plan, params, donate=True)
    assert sum(leaf.is_deleted() for leaf in params.values()) == 1


def test_the_state_of_an_optimizer(plan):
    params = placed("one device")
    tx = optax.adam(1e-3)
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    wanted = tpp.slice_tree(plan, state)
    small = tpp.slice_tree(plan, state, donate=True)
    for name, leaf in named_leaves(wanted).items():
        np.testing.assert_array_equal(named_leaves(small)[name], leaf, err_msg=name)


def test_arrays_of_numpy_and_of_a_computation_are_not_deleted(plan):
    params = host_params()
    small = tpp.slice_tree(plan, params, donate=True)
    assert small["up0"].shape == (16, WIDTH // 2) and params["up0"].shape == (16, WIDTH)
    traced = jax.jit(lambda tree: tpp.slice_tree(plan, tree, donate=True))
    given = jax.tree.map(jnp.asarray, params)
    np.testing.assert_array_equal(traced(given)["up0"], small["up0"])
    constant = jax.jit(lambda: tpp.slice_tree(plan, given, donate=True)["up0"])
    np.testing.assert_array_equal(constant(), small["up0"])
    assert not any(leaf.is_deleted() for leaf in given.values())
