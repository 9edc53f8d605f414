"""Checkpoints of Orbax that are pruned without being loaded."""

import gc
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.experimental import v1

import tpp_jax as tpp
from tests.limited_memory import peak_of
from tpp_jax.storage import orbax_trees

INPUTS = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


@pytest.fixture(scope="module")
def model():
    return tpp.models.create(
        "cifar_resnet8", num_classes=4, image_shape=(8, 8, 3), rngs=nnx.Rngs(0)
    )


@pytest.fixture(scope="module")
def groups(model):
    return tpp.channel_groups(model, INPUTS)


@pytest.fixture(scope="module")
def plan(groups, model):
    return tpp.make_plan(groups, model, 0.5)


@pytest.fixture(scope="module")
def tree(model):
    """A training state with all that Orbax can save."""
    params = nnx.state(model, nnx.Param)
    return {
        "model": nnx.state(model),
        "optimizer": optax.adam(1e-3).init(params),
        "average": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params),
        "lists": [jnp.ones(2), [np.float64(2)], (), {}, None, (1, 2.5)],
        "step": 7,
        "seed": jax.random.key_data(jax.random.key(1)),
    }


def write_standard(folder, tree):
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder, tree)
    return folder


def write_pytree(folder, tree):
    with ocp.PyTreeCheckpointer() as saver:
        saver.save(folder, tree)
    return folder


def write_managed(folder, tree):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(3, args=ocp.args.StandardSave(tree))
    return folder / "3"


def write_items(folder, tree):
    items = {"state": ocp.args.StandardSave(tree), "more": ocp.args.JsonSave({"a": 1})}
    with ocp.CheckpointManager(folder) as manager:
        manager.save(3, args=ocp.args.Composite(**items))
    return folder / "3"


def write_v1(folder, tree):
    v1.save(folder, tree, custom_metadata={"by": "me"})
    return folder


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.shape(a) == np.shape(b)
        assert getattr(a, "dtype", type(a)) == getattr(b, "dtype", type(b))
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    "write", [write_standard, write_pytree, write_managed, write_items, write_v1]
)
def test_a_tree_is_cut_as_in_memory(tmp_path, monkeypatch, tree, plan, write):
    folder = write(tmp_path / "dense", tree)
    small = jax.device_get(tpp.slice_tree(plan, tree))
    small = v1.load(write_v1(tmp_path / "wanted", small))
    monkeypatch.setattr(orbax_trees, "_BATCH_BYTES", 50_000)

    assert tpp.prune_orbax(folder, tmp_path / "small", plan) is plan

    assert_same(v1.load(tmp_path / "small"), small)
    custom = v1.metadata(tmp_path / "small").custom_metadata
    assert custom == v1.metadata(folder).custom_metadata
    with ocp.PyTreeCheckpointer() as reader:
        assert_same(reader.restore(tmp_path / "small" / "state"), small)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["dense", "small", "wanted"]


def test_what_was_written_is_loaded_into_the_pruned_model(tmp_path, model, plan):
    write_v1(tmp_path / "dense", nnx.state(model))
    tpp.prune_orbax(tmp_path / "dense", tmp_path / "small", plan)
    small = tpp.prune(model, plan)
    structure, state = nnx.split(small)
    mesh = jax.make_mesh((8,), ("data",))

    def divided(x):
        axis = next((i for i, n in enumerate(x.shape) if n and n % 8 == 0), x.ndim)
        spec = PartitionSpec(*[None] * axis, "data") if axis < x.ndim else None
        sharding = NamedSharding(mesh, spec or PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    loaded = v1.load(tmp_path / "small", jax.tree.map(divided, state))

    kernels = [x for x in jax.tree.leaves(loaded) if x.ndim == 4]
    assert any(not x.sharding.is_fully_replicated for x in kernels)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    small.eval()
    again = nnx.merge(
        structure, jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), loaded)
    )
    again.eval()
    images = jnp.ones((2, 8, 8, 3))
    np.testing.assert_array_equal(again(images), small(images))


def test_the_weights_on_disk_are_scored(tmp_path, tree, model, groups):
    abstract = nnx.eval_shape(lambda: model)
    folder = write_standard(tmp_path / "dense", {"state": tree})
    found = tpp.prune_orbax(
        folder,
        tmp_path / "small",
        tpp.channel_groups(abstract, INPUTS),
        {"*conv1": 0.5},
        at="state.model",
    )
    assert found == tpp.make_plan(groups, model, {"*conv1": 0.5})


def test_parameters_are_less_deep_than_moments(tmp_path):
    def net(p, x):
        return jnp.tanh(x @ p["w1"]) @ p["w2"]

    key = jax.random.key(0)
    params = {"w1": jax.random.normal(key, (4, 8)), "w2": jnp.ones((8, 2))}
    groups = tpp.channel_groups(net, jnp.ones((1, 4)), params=params)
    moments = optax.adam(1e-3).init(jax.tree.map(lambda x: x[..., ::-1], params))
    state = {"params": params, "opt_state": moments}
    write_standard(tmp_path / "dense", state)
    found = tpp.prune_orbax(tmp_path / "dense", tmp_path / "small", groups, 0.5)
    assert found == tpp.make_plan(groups, params, 0.5)
    # Parameters at the root of the tree have no path.
    write_standard(tmp_path / "bare", params)
    tpp.prune_orbax(tmp_path / "bare", tmp_path / "few", groups, params=0.6)
    assert v1.load(tmp_path / "few")["w1"].shape == (4, 4)

    write_standard(tmp_path / "twice", {"ema": params, "params": params})
    with pytest.raises(tpp.TPPError, match=r"has w1 as ema\.w1, params\.w1: pass"):
        tpp.prune_orbax(tmp_path / "twice", tmp_path / "no", groups, 0.5)
    tpp.prune_orbax(tmp_path / "twice", tmp_path / "yes", groups, 0.5, at="ema")
    with pytest.raises(tpp.TPPError, match="has no parameters of the model at here"):
        tpp.prune_orbax(tmp_path / "twice", tmp_path / "no", groups, 0.5, at="here")
    assert not (tmp_path / "no").exists()


def test_variables_of_linen_in_a_training_state(tmp_path):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.BatchNorm(use_running_average=True)(linen.Dense(8)(x)))
            return linen.Dense(2)(x)

    net, x = Net(), jnp.ones((1, 4))
    variables = net.init(jax.random.key(0), x)
    moments = optax.adam(1e-3).init(variables["params"])
    state = {**variables, "opt_state": moments}
    write_pytree(tmp_path / "dense", state)
    groups = tpp.channel_groups(net, x, params=variables)
    found = tpp.prune_orbax(tmp_path / "dense", tmp_path / "small", groups, 0.5)
    assert found == tpp.make_plan(groups, variables, 0.5)
    small = tpp.slice_tree(found, state)
    loaded = v1.load(tmp_path / "small")
    assert_same(jax.tree.leaves(loaded), jax.tree.leaves(jax.device_get(small)))


def test_after_an_interruption_it_can_be_called_again(
    tmp_path, monkeypatch, model, plan
):
    write_v1(tmp_path / "dense", nnx.state(model))
    monkeypatch.setattr(orbax_trees, "_BATCH_BYTES", 50_000)
    read, calls = orbax_trees._Saved.read, []

    def interrupted(saved, places):
        calls.append(places)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(saved, places)

    with monkeypatch.context() as patch:
        patch.setattr(orbax_trees._Saved, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tpp.prune_orbax(tmp_path / "dense", tmp_path / "small", plan)
    assert [x.name for x in tmp_path.iterdir()] == ["dense"]
    tpp.prune_orbax(tmp_path / "dense", tmp_path / "small", plan)
    assert_same(
        jax.tree.leaves(v1.load(tmp_path / "small")),
        jax.tree.leaves(tpp.slice_tree(plan, nnx.state(model))),
    )


def test_mistakes_get_a_message(tmp_path, model, plan):
    def refused(words, folder, *given, target="small", **more):
        with pytest.raises(tpp.TPPError, match=words):
            tpp.prune_orbax(tmp_path / folder, tmp_path / target, *given, **more)
        assert not (tmp_path / "small").exists()

    state = nnx.state(model)
    write_standard(tmp_path / "dense", state)
    refused("there is no checkpoint at .*nowhere", "nowhere", plan)
    refused("prune_orbax has a plan", "dense", plan, 0.5)
    refused("the plan is a float, not a Plan", "dense", 0.5)
    refused("exists and is not an empty folder", "dense", plan, target="dense")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no")
    refused("cannot be read as a checkpoint of one tree", "text", plan)
    write_managed(tmp_path / "run", state)
    refused("or that of a step of a CheckpointManager", "run", plan)
    write_standard(tmp_path / "other", {"head": jnp.ones((3, 4))})
    refused("no leaf of the tree has the name of a parameter", "other", plan)
    write_standard(tmp_path / "twice_cut", tpp.slice_tree(plan, state))
    refused("cannot slice .* the planned model has shape", "twice_cut", plan)
    names = {"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}, "state": state}
    write_standard(tmp_path / "names", names)
    refused(r"two leaves of the name a\.b", "names", plan)
    lbfgs = optax.lbfgs().init(nnx.state(model, nnx.Param))
    write_standard(tmp_path / "lbfgs", {"model": state, "optimizer": lbfgs})
    refused("belongs to L-BFGS", "lbfgs", plan)


# Orbax leaves behind what waits for a failed read, until it is found as garbage.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_leaves_nothing(tmp_path, monkeypatch, model, plan):
    monkeypatch.setattr(orbax_trees, "_BATCH_BYTES", 1)  # one read at a time
    write_standard(tmp_path / "dense", nnx.state(model))
    files = [x for x in (tmp_path / "dense").rglob("*") if x.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    with pytest.raises(tpp.TPPError, match="could not be read to its end"):
        tpp.prune_orbax(tmp_path / "dense", tmp_path / "small", plan)
    gc.collect()
    assert [x.name for x in tmp_path.iterdir()] == ["dense"]


def test_names_that_orbax_misreads(tmp_path, model, plan):
    write_v1(tmp_path / "dense", nnx.state(model))
    odd = tmp_path / "run[1]"
    (tmp_path / "dense").rename(odd)
    tpp.prune_orbax(odd, tmp_path / "a b[2]", plan)
    (tmp_path / "a b[2]").rename(tmp_path / "small")
    assert len(jax.tree.leaves(v1.load(tmp_path / "small"))) > 10


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is of Linux")
def test_a_checkpoint_larger_than_the_memory(tmp_path):
    size = 2**28
    limit = size // 2
    assert peak_of("tests.storage.prune_checkpoint", tmp_path, size, limit) < limit
    small = v1.metadata(tmp_path / "small").metadata
    assert small["0"]["w"].shape == (1024, 512)
