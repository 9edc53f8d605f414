"""A cut array has the type and the devices of the original, and memory of its own."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import tpp_jax as tpp
from tpp_jax.graph.arrays import fitting

P = PartitionSpec
PARAMS = {
    "w1": np.arange(16 * 24, dtype=np.float32).reshape(16, 24),
    "b1": np.arange(24, dtype=np.float32),
    "w2": np.arange(24 * 8, dtype=np.float32).reshape(24, 8),
}


def net(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"]


GROUPS = tpp.channel_groups(net, jnp.ones((1, 16)), params=PARAMS)


def plan_for(count):
    return tpp.make_plan(GROUPS, PARAMS, counts={"w1": count})


PLAN = plan_for(16)
EXPECTED = {
    "w1": PARAMS["w1"][:, PLAN.kept["w1"]],
    "b1": PARAMS["b1"][PLAN.kept["w1"]],
    "w2": PARAMS["w2"][PLAN.kept["w1"]],
}


def assert_cut(small, expected=EXPECTED):
    for name, leaf in expected.items():
        np.testing.assert_array_equal(small[name], leaf, err_msg=name)


@pytest.mark.parametrize(
    "dtype", [np.float64, np.int64, np.float16, bool, "<U3", object]
)
def test_numpy_parameters_remain_numpy_arrays_of_their_dtype(dtype):
    params = {name: array.astype(dtype) for name, array in PARAMS.items()}
    small = tpp.slice_tree(PLAN, params)
    for name, leaf in small.items():
        assert type(leaf) is np.ndarray and leaf.dtype == params[name].dtype
    assert_cut(small, {name: a.astype(dtype) for name, a in EXPECTED.items()})


def test_other_leaves_are_returned_bit_for_bit():
    record = np.array([(1, 2.5)], dtype=[("step", np.int64), ("loss", np.float64)])
    others = {
        "tokens": np.array(2**40),
        "loss": np.float64(1 / 3),
        "history": np.array([1 / 3, 2**-1074]),
        "mask": np.array([True, False]),
        "names": np.array(["a", "longer"]),
        "things": np.array([None, {"a": 1}], dtype=object),
        "record": record,
        "steps": 2**70,
        "rate": 0.1,
        "run": "run 7",
        "on": True,
        "activation": jax.nn.relu,
        "dtype": jnp.bfloat16,
    }
    out = tpp.slice_tree(PLAN, {"params": PARAMS, **others})
    for name, leaf in others.items():
        if isinstance(leaf, np.ndarray):
            assert out[name].dtype == leaf.dtype and out[name].shape == leaf.shape
            assert out[name].tolist() == leaf.tolist()
        else:
            assert out[name] is leaf
    mask = tpp.mask_tree(PLAN, {"params": PARAMS, **others})
    assert mask["run"] == mask["activation"] == mask["rate"] == 1
    assert mask["record"].shape == (1,) and mask["tokens"].dtype == jnp.int32


def test_a_leaf_named_like_a_parameter_that_is_not_an_array_is_returned():
    marks = {"w1": True, "b1": "frozen", "w2": jax.nn.relu}
    assert tpp.slice_tree(PLAN, {"params": PARAMS, "labels": marks})["labels"] == marks


def test_numpy_arrays_are_not_shared():
    tree = {**PARAMS, "uncut": np.zeros(3)}
    small = tpp.slice_tree(tpp.make_plan(GROUPS, PARAMS, {}), tree)
    for name, leaf in tree.items():
        assert not np.shares_memory(small[name], leaf)
    fixed = np.zeros(3)
    fixed.flags.writeable = False
    assert tpp.slice_tree(PLAN, {**PARAMS, "fixed": fixed})["fixed"] is fixed


@pytest.mark.parametrize("kept", [16, 24])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_either_tree_may_be_donated(kept, jit):
    cut = functools.partial(tpp.slice_tree, plan_for(kept))
    cut = jax.jit(cut) if jit else cut
    spend = jax.jit(lambda tree: tree, donate_argnums=0)
    for donated in (0, 1):
        rest = {"step": jnp.int32(3), "key": jax.random.key(0), "other": jnp.ones(7)}
        whole = jax.tree.map(jnp.array, PARAMS) | rest
        both = [whole, cut(whole)]
        jax.block_until_ready(spend(both[donated]))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(both[donated]))
        other = both[1 - donated]
        assert int(other["step"]) == 3
        assert jax.random.bits(other["key"]) == jax.random.bits(jax.random.key(0))


def test_a_pruned_module_may_be_donated():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.cut = nnx.Linear(4, 8, rngs=rngs)
            self.uncut = nnx.Linear(8, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.norm(self.uncut(nnx.relu(self.cut(x)))))

    model = Net(nnx.Rngs(0))
    x = jnp.ones((2, 4))
    plan = tpp.make_plan(tpp.channel_groups(model, x), model, {"cut": 0.5})
    small = tpp.prune(model, plan)
    state = nnx.state(small, nnx.Param)
    double = jax.jit(lambda s: jax.tree.map(lambda a: a * 2, s), donate_argnums=0)
    jax.block_until_ready(double(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(model)))
    model(x)


def test_an_array_remains_on_its_device():
    device = jax.devices()[3]
    small = tpp.slice_tree(PLAN, jax.device_put(PARAMS, device))
    assert all(leaf.devices() == {device} for leaf in small.values())
    assert_cut(small)
    free = tpp.slice_tree(PLAN, jax.tree.map(jnp.asarray, PARAMS))
    assert not any(leaf.committed for leaf in free.values())


def mesh_of(kind, shape=(4, 2)):
    return jax.make_mesh(shape, ("x", "y"), axis_types=(kind,) * 2)


SPECS = {"w1": P("y", "x"), "b1": P("x"), "w2": P(("x", "y"))}


def sharded(mesh, specs=SPECS, tree=PARAMS):
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
        for name, leaf in tree.items()
    }


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_are_cut_on_their_devices(kind):
    mesh = mesh_of(kind)
    params = sharded(mesh)
    small = tpp.slice_tree(PLAN, params)
    for name, leaf in small.items():
        assert leaf.sharding == params[name].sharding
        assert leaf.addressable_shards[0].data.size == EXPECTED[name].size // math.prod(
            mesh.shape[axis] for axis in jax.tree.leaves(tuple(SPECS[name]))
        )
    assert_cut(small)
    # Uncut arrays are copied, shard by shard.
    uncut = tpp.slice_tree(PLAN, {**params, "other": params["b1"]})["other"]
    assert uncut.sharding == params["b1"].sharding
    pointers = [
        {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
        for array in (uncut, params["b1"])
    ]
    assert pointers[0].isdisjoint(pointers[1])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_are_cut_without_the_host(kind, monkeypatch):
    params = sharded(mesh_of(kind))

    def copied(self, dtype=None, copy=None):
        del dtype, copy
        raise AssertionError(f"an array of shape {self.shape} is copied to the host")

    monkeypatch.setattr(type(params["w1"]), "__array__", copied)
    with pytest.raises(AssertionError):
        np.asarray(params["w1"])
    with jax.transfer_guard_device_to_host("disallow"):
        small = tpp.slice_tree(PLAN, params)
    monkeypatch.undo()
    assert_cut(small)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_axes_of_the_mesh_that_do_not_divide_the_new_size_are_left_out(kind):
    mesh = mesh_of(kind)
    small = tpp.slice_tree(plan_for(6), sharded(mesh))
    # 4 devices do not divide 6 channels, nor do 4 · 2; but y still divides 16.
    specs = {name: leaf.sharding.spec for name, leaf in small.items()}
    assert specs == {"w1": P("y", None), "b1": P(None), "w2": P(None)}
    small = tpp.slice_tree(plan_for(12), sharded(mesh))
    assert small["w2"].sharding.spec == P("x")
    specs = SPECS | {"w2": P(("y", "x"))}
    small = tpp.slice_tree(plan_for(6), sharded(mesh, specs))
    assert small["w2"].sharding.spec == P("y")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("traced", [False, True], ids=["static plan", "traced plan"])
def test_sharded_arrays_are_cut_under_jit(kind, traced):
    mesh = mesh_of(kind)
    params = sharded(mesh)
    for context in (False, True):
        with jax.set_mesh(mesh) if context else contextlib.nullcontext():
            if traced:
                small = jax.jit(tpp.slice_tree)(PLAN, params)
            else:
                small = jax.jit(lambda tree: tpp.slice_tree(PLAN, tree))(params)
        assert_cut(small)
        if kind == AxisType.Explicit:
            assert {n: a.sharding.spec for n, a in small.items()} == {
                **SPECS,
                "w2": P(("x", "y"), None),
            }


def test_masks_have_the_sharding_of_the_tree():
    for kind in (AxisType.Auto, AxisType.Explicit):
        params = sharded(mesh_of(kind))
        mask = tpp.mask_tree(PLAN, params)
        for name, leaf in mask.items():
            assert leaf.sharding == params[name].sharding
            kept = (params[name] * leaf).sum()
            assert float(kept) == EXPECTED[name].sum()


def test_abstract_arrays_keep_their_sharding():
    mesh = mesh_of(AxisType.Auto)
    single = SingleDeviceSharding(jax.devices()[2])
    for count, spec in ((16, P(None, "x")), (6, P(None, None))):
        abstract = {
            "w1": jax.ShapeDtypeStruct(
                (16, 24), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "x"))
            ),
            "b1": jax.ShapeDtypeStruct((24,), jnp.int8, sharding=single),
            "w2": jax.ShapeDtypeStruct((24, 8), jnp.float32, weak_type=True),
        }
        small = tpp.slice_tree(plan_for(count), abstract)
        assert small["w1"] == jax.ShapeDtypeStruct(
            (16, count), jnp.bfloat16, sharding=NamedSharding(mesh, spec)
        )
        assert small["b1"].sharding == single and small["b1"].shape == (count,)
        assert small["w2"].sharding is None and small["w2"].weak_type


def test_a_fitting_sharding_has_as_many_axes_as_divide():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    cases = [
        (P("a", "b"), (6, 8), P("a", "b")),
        (P("a", "b"), (3, 8), P(None, "b")),
        (P(("a", "b")), (6, 5), P(("a",))),
        (P(("b", "a")), (6, 5), P(None)),
        (P(("b", "a")), (4, 5), P(("b",))),
        (P(), (3, 5), P()),
    ]
    for spec, shape, expected in cases:
        found = fitting(NamedSharding(mesh, spec), shape)
        assert found.spec == expected, (spec, shape)
        found.shard_shape(shape)


def test_nothing_is_compiled_for_arrays_of_one_device():
    tree = jax.tree.map(jnp.asarray, PARAMS) | {"other": jnp.ones(1237)}
    compiled = []
    listen = jax.monitoring.register_event_duration_secs_listener
    listen(lambda event, *_, **__: compiled.append(event) if "compile" in event else 0)
    tpp.slice_tree(PLAN, tree)
    assert compiled == []
    jax.jit(lambda x: x * 1237)(tree["other"])
    assert compiled
