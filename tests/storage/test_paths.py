"""Folders of any name: what is saved in them is there, and is read back."""

import pathlib
import tempfile

import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.experiment.test_errors import small_config
from tpp_jax.commands.evaluate import evaluate
from tpp_jax.errors import TPPError
from tpp_jax.experiment import run
from tpp_jax.experiment.records.checkpoints import Checkpoints
from tpp_jax.graph.naming import named_leaves
from tpp_jax.storage.paths import plain

NAMES = [
    "[old]x",
    "a[0-9]b",
    "a\\b",
    "$\\frac$",
    "gs:",
    "a*b?",
    "größe",
    "a\udcff",
    "a",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_checkpoints_and_models_come_back_from_a_folder_of_any_name(tmp_path, name):
    folder = tmp_path / name
    arrays = {"x": np.arange(4.0), "y": np.ones((2, 3), np.int32)}
    for step in (3, 7):
        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoints.save(step, arrays, {"step": step})
        checkpoints.close()
    checkpoints = Checkpoints(folder / "checkpoints")
    found, meta, damaged = checkpoints.restore()
    checkpoints.close()
    assert (meta, damaged) == ({"step": 7}, [])
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array)

    model = tpp.models.create("mlp7_relu", image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    for _ in range(2):  # the second replaces the first
        tpp.save_model(folder / "model", model)
    loaded = named_leaves(nnx.state(tpp.load_model(folder / "model")))
    for key, array in named_leaves(nnx.state(model)).items():
        np.testing.assert_array_equal(loaded[key], array)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "model"]
    assert [path.name for path in tmp_path.iterdir()] == [name]  # and not elsewhere


def test_a_path_that_is_understood_is_left_as_it_is(tmp_path):
    with plain(tmp_path / "a b-c", new=True) as path:
        assert path == tmp_path / "a b-c"
    assert not list(tmp_path.iterdir())


def test_links_are_removed_again(tmp_path):
    with plain(tmp_path / "[x]" / "new", new=True) as path:
        assert path.parent.resolve() == (tmp_path / "[x]").resolve()
        path.mkdir()
    assert (tmp_path / "[x]" / "new").is_dir()
    assert not path.parent.is_symlink()
    assert not path.parents[1].exists()
    assert pathlib.Path(tempfile.gettempdir()) in path.parents


def test_a_new_folder_whose_own_name_is_misread_is_refused(tmp_path):
    message = r"misreads one of .* use another folder"
    with pytest.raises(TPPError, match=message), plain(tmp_path / "[x]", new=True):
        pass


def test_a_run_in_a_folder_of_brackets_is_continued_and_evaluated(
    tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "[old]" / "[b]x[/b] $\\frac$"
    config = small_config(**{"pretrain.epochs": 1})
    with monkeypatch.context() as patch:
        # As if killed once the dense network is trained.
        patch.setattr(run.choosing, "choose", _killed)
        with pytest.raises(KeyboardInterrupt):
            run.train(config, workdir)
    summary = run.train(config, workdir)
    shown = capsys.readouterr().out
    assert f"Continuing the run in {workdir} from pretrain, step 22." in shown
    measured = evaluate(workdir)
    assert measured["accuracy"] == pytest.approx(summary["pruned"]["accuracy"])


def _killed(*_):
    raise KeyboardInterrupt
