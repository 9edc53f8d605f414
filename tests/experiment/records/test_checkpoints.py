"""A saved model says what it is, and comes back bit for bit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.experiment.records.checkpoints import Checkpoints
from tpp_jax.graph.naming import named_leaves
from tpp_jax.models import MLP


@pytest.fixture(scope="module")
def pruned():
    model = tpp.models.create("mlp7_relu", image_shape=(4, 4, 1), rngs=nnx.Rngs(0))
    groups = tpp.channel_groups(model, jnp.ones((1, 4, 4, 1)))
    plan = tpp.make_plan(groups, model, "*net*:0.8", skip="net.12")
    return tpp.prune(model, plan), plan


def test_a_pruned_model_comes_back_bit_for_bit(tmp_path, pruned):
    model, plan = pruned
    tpp.save_model(tmp_path / "m", model, plan, metrics={"accuracy": 90.5})
    loaded = tpp.load_model(tmp_path / "m")
    ours, theirs = named_leaves(nnx.state(model)), named_leaves(nnx.state(loaded))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(theirs[name], array)
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 1))
    np.testing.assert_array_equal(loaded(x), model(x))
    info = tpp.load_model_info(tmp_path / "m")
    assert info["model"]["name"] == "mlp7_relu"
    assert info["metrics"] == {"accuracy": 90.5}
    assert info["plan"] == json.loads(json.dumps(plan.to_dict()))


class Grouped(nnx.Module):
    """Layers that keep sizes beside their arrays."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 16, (1, 1), rngs=rngs)
        self.norm = nnx.GroupNorm(16, num_groups=4, rngs=rngs)
        self.depthwise = nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=rngs)
        self.head = nnx.Conv(16, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.head(self.depthwise(nnx.relu(self.norm(self.conv(x)))))


def test_sizes_that_layers_keep_beside_their_arrays_come_back_too(tmp_path):
    model, x = Grouped(), jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    plan = tpp.make_plan(tpp.channel_groups(model, x), model, 0.5)
    small = tpp.prune(model, plan)
    assert small.depthwise.feature_group_count == small.norm.num_features == 8
    tpp.save_model(tmp_path / "m", small, plan)
    loaded = tpp.load_model(tmp_path / "m", model)
    assert nnx.graphdef(loaded) == nnx.graphdef(small)
    np.testing.assert_array_equal(loaded(x), small(x))


def test_saving_again_replaces_the_model(tmp_path, pruned):
    model, plan = pruned
    for accuracy in (1, 2):
        tpp.save_model(tmp_path / "m", model, plan, metrics={"accuracy": accuracy})
    assert tpp.load_model_info(tmp_path / "m")["metrics"] == {"accuracy": 2}


def test_metrics_may_be_numpy_s_and_jax_s_numbers(tmp_path, pruned):
    metrics = {
        "accuracy": np.float32(90.5),
        "steps": np.int64(3),
        "loss": jnp.float32(0.25),
        "pruned": {"flops": 7, "widths": np.array([1, 2]), "note": "as text"},
        "done": np.bool_(True),
    }
    tpp.save_model(tmp_path / "m", *pruned, metrics=metrics)
    assert tpp.load_model_info(tmp_path / "m")["metrics"] == {
        "accuracy": 90.5,
        "steps": 3,
        "loss": 0.25,
        "pruned": {"flops": 7, "widths": [1, 2], "note": "as text"},
        "done": True,
    }


def test_a_model_of_ones_own_needs_a_module_of_its_class(tmp_path):
    def own(hidden):
        return MLP(
            3,
            num_classes=2,
            image_shape=(2, 2, 1),
            hidden=hidden,
            linear=False,
            rngs=nnx.Rngs(0),
        )

    tpp.save_model(tmp_path / "own", own(5))
    with pytest.raises(ValueError, match="pass load_model an unpruned module"):
        tpp.load_model(tmp_path / "own")
    loaded = tpp.load_model(tmp_path / "own", own(9))
    assert named_leaves(nnx.state(loaded))["net.0.kernel"].shape == (4, 5)
    other = tpp.models.create("lenet5", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="not those of this LeNet5"):
        tpp.load_model(tmp_path / "own", other)


def test_a_missing_or_damaged_model_is_told(tmp_path, pruned):
    with pytest.raises(ValueError, match="no saved model"):
        tpp.load_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        tpp.load_model(tmp_path / "empty")
    tpp.save_model(tmp_path / "m", *pruned)
    for file in (tmp_path / "m" / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        tpp.load_model(tmp_path / "m")


def saved(folder, *steps):
    """Checkpoints of a run, the arrays of each filled with its step."""
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, {"model.w": jnp.full(300, step)}, {"step": step})
    checkpoints.close()


def restored(folder):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore()
    finally:
        checkpoints.close()


def test_the_last_two_checkpoints_of_a_run_are_kept(tmp_path):
    assert restored(tmp_path) is None
    saved(tmp_path, 1, 2, 3)
    arrays, meta, damaged = restored(tmp_path)
    np.testing.assert_array_equal(arrays["model.w"], np.full(300, 3))
    assert meta == {"step": 3} and damaged == []
    assert sorted(d.name for d in tmp_path.iterdir()) == ["2", "3"]


def files_of(folder):
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def cut_short(folder):
    for file in files_of(folder):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_bits(folder):
    for file in files_of(folder / "arrays"):
        content = bytearray(file.read_bytes())
        for place in range(0, len(content), 40):
            content[place] ^= 1
        file.write_bytes(content)


def change_a_digit(folder):
    """What is still readable, and not what was written."""
    [file] = (folder / "meta").glob("*metadata*")
    file.write_text(file.read_text().replace('"step": 2', '"step": 7'))


def lose_the_arrays(folder):
    shutil.rmtree(folder / "arrays")


def lose_the_json(folder):
    shutil.rmtree(folder / "meta")


DAMAGES = [cut_short, flip_bits, change_a_digit, lose_the_arrays, lose_the_json]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(tmp_path, damage):
    saved(tmp_path, 1, 2)
    before = [file.read_bytes() for file in files_of(tmp_path / "2")]
    damage(tmp_path / "2")
    assert before != [file.read_bytes() for file in files_of(tmp_path / "2")]
    arrays, meta, [told] = restored(tmp_path)
    np.testing.assert_array_equal(arrays["model.w"], np.ones(300))
    assert meta == {"step": 1}
    assert "checkpoint of step 2 is damaged" in told and "damaged-2" in told
    saved(tmp_path, 2)  # the step can be saved again
    assert restored(tmp_path)[1] == {"step": 2}
    assert (tmp_path / "damaged-2").is_dir()


def test_if_all_checkpoints_are_damaged_nothing_is_begun_anew(tmp_path):
    saved(tmp_path, 1, 2)
    for step in ("1", "2"):
        cut_short(tmp_path / step)
    with pytest.raises(ValueError, match=r"none of the checkpoints .* Remove that"):
        restored(tmp_path)
    assert sorted(d.name for d in tmp_path.iterdir()) == ["1", "2"]


def test_a_saved_model_of_which_a_bit_has_flipped_is_refused(tmp_path, pruned):
    tpp.save_model(tmp_path / "m", *pruned)
    flip_bits(tmp_path / "m")
    with pytest.raises(ValueError, match="cannot be read"):
        tpp.load_model(tmp_path / "m")
