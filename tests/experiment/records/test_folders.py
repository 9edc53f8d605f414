"""The folder of a run: its layout is checked, and its config is found."""

import errno
import json
import os
import shutil

import pytest

import tpp_jax as tpp
from tests.experiment.test_errors import small_config
from tpp_jax.analysis import latency
from tpp_jax.commands import inspect, profile
from tpp_jax.errors import TPPError
from tpp_jax.experiment import run
from tpp_jax.experiment.records import folders
from tpp_jax.experiment.records.progress import Progress

FOLDERS = ["checkpoints", "tensorboard", "dense", "model", "best"]
FILES = ["lock", "metrics.jsonl", "summary.json", "gram.npz", "report.html"]
FILES += ["config.json", "curves.png", "channels.svg"]


@pytest.mark.parametrize("name", FOLDERS + FILES)
def test_what_is_of_the_wrong_kind_is_named_before_any_training(tmp_path, name):
    path = tmp_path / name
    path.write_text("mine") if name in FOLDERS else path.mkdir()
    with pytest.raises(
        TPPError, match=f"{name} is not a .*, but a run has one there: move"
    ):
        run.train(small_config(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["tb", "tb/below"])
def test_a_file_in_the_way_of_tensorboard_is_named(tmp_path, name):
    (tmp_path / "tb").write_text("mine")
    with pytest.raises(TPPError, match=r"tb.* a file is in the way"):
        Progress(tmp_path / name)


def test_a_folder_that_there_cannot_be_is_refused(tmp_path):
    for name in ("x" * 300, "file/run"):
        (tmp_path / "file").write_text("")
        with pytest.raises(TPPError, match="the folder of the run cannot be"):
            run.train(small_config(), tmp_path / name)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EACCES, "the folder .* cannot be used: .*Permission denied"),
        (errno.EISDIR, "the folder .* cannot be used"),
        (errno.ENOSPC, "free disk space"),
    ],
)
def test_errors_of_the_system_about_the_folder_are_explained(tmp_path, number, message):
    with pytest.raises(TPPError, match=message), folders.errors_explained(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "metrics.jsonl"))


def test_errors_of_the_system_about_something_else_keep_their_trace(tmp_path):
    with pytest.raises(PermissionError), folders.errors_explained(tmp_path):
        raise PermissionError(errno.EACCES, "no", "/etc/shadow")


def test_a_text_is_replaced_as_a_whole(tmp_path, monkeypatch):
    file = tmp_path / "report.html"
    folders.write(file, "größer \udcff")
    assert file.read_text(encoding="utf-8") == "größer \\udcff"

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folders.write(file, "new")
    assert file.read_text(encoding="utf-8") == "größer \\udcff"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a run with another config than the one in the tests."""
    workdir = tmp_path_factory.mktemp("[old] runs") / "digits"
    fields = {"pretrain.epochs": 1, "prune.ratios": "net.2:0.25", "prune.skip": ""}
    run.train(small_config(**fields), workdir)
    return workdir


@pytest.mark.parametrize("given", [True, False])
def test_a_run_is_inspected_by_its_own_config(finished, capsys, given):
    inspect.inspect(small_config(), finished, given=given)
    shown = capsys.readouterr().out
    assert "with config.prune.ratios='net.2:0.25'" in shown
    told = f"The config of the run in {finished} is used and not the given one"
    assert (told in shown) == given
    assert ("prune.ratios was 'net.2:0.25', is '*net*:0.5'" in shown) == given
    (finished / "groups.svg").unlink()


def test_its_own_config_is_not_announced_where_it_is_the_one_given(finished, capsys):
    fields = {"pretrain.epochs": 1, "prune.ratios": "net.2:0.25", "prune.skip": ""}
    inspect.inspect(small_config(**fields), finished)
    assert "is used and not the given one" not in capsys.readouterr().out


def test_a_run_that_has_no_file_of_its_config_has_it_in_its_network(
    finished, tmp_path, capsys
):
    shutil.copytree(finished / "model", tmp_path / "model")
    inspect.inspect(small_config(), tmp_path)
    assert "with config.prune.ratios='net.2:0.25'" in capsys.readouterr().out


def test_data_that_has_moved_is_looked_for_where_it_is_said_to_be(finished):
    config = small_config(**{"data.dir": "/moved/there"})
    assert folders.config_of(finished, config, False).data.dir == "/moved/there"
    assert folders.config_of(finished, small_config(), False).data.dir == ""
    assert folders.config_of(finished.parent, config, True) is config


def test_a_run_that_is_not_finished_is_timed_by_its_own_config(
    finished, tmp_path, monkeypatch, capsys
):
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    monkeypatch.setattr(profile, "BATCH_SIZES", (1,))
    monkeypatch.setattr(latency, "_SECONDS", 0.0)
    profile.profile(small_config(**{"model.name": "mlp7_relu"}), tmp_path)
    shown = capsys.readouterr().out
    assert (
        "mlp7_linear, images 8×8×1" in shown
        and "is used and not the given one" in shown
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model_type": "bert"}', "\x00"])
def test_a_config_json_of_something_else_is_refused_and_left_alone(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(TPPError, match=r"config.json is not the config of a run"):
        inspect.inspect(small_config(), tmp_path)
    with pytest.raises(TPPError, match=r"config.json is not the config of a run"):
        run.train(small_config(), tmp_path)
    assert file.read_text() == text


def test_a_run_writes_its_config_down(finished):
    written = json.loads((finished / "config.json").read_text())
    assert written == json.loads((finished / "summary.json").read_text())["config"]
    assert written == tpp.load_model_info(finished / "model")["config"]


def test_a_report_that_a_kill_kept_from_being_drawn_is_drawn(finished, capsys):
    fields = {"pretrain.epochs": 1, "prune.ratios": "net.2:0.25", "prune.skip": ""}
    page = finished / "report.html"
    before = page.read_text()
    page.unlink()
    (finished / "curves.svg").unlink()
    summary = run.train(small_config(**fields), finished)
    assert summary["status"] == "done"
    assert page.read_text() == before and (finished / "curves.svg").exists()
    assert (
        f"Its report was missing and is drawn again: {page}" in capsys.readouterr().out
    )
    run.train(small_config(**fields), finished)
    assert "was missing" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{}", "[]", '{"config": {}}', "{", "\xff"])
def test_a_summary_that_is_none_is_named(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(TPPError, match=r"summary.json cannot be read .* Remove it"):
        run.train(small_config(), tmp_path)
