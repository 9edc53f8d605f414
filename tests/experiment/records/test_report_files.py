"""A report has what other modes left in the folder, and nothing that is damaged."""

import json

import pytest

from tests.reports.runs import EXPORTS, PROFILE
from tpp_jax.experiment.records import origin, report_files
from tpp_jax.headline import Headline

EXPORT = EXPORTS["pruned.onnx"]
DAMAGED = ["", "[]", "{", "null", "\x00", '{"networks": 1}', '{"networks": {"a": {}}}']


def test_what_the_modes_have_written_is_found(tmp_path):
    (tmp_path / "profile.json").write_text(json.dumps(PROFILE | {"model": "net"}))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "pruned.onnx.json").write_text(json.dumps(EXPORT))
    (tmp_path / "groups.svg").write_text("<svg/>")
    found = report_files.read(tmp_path)
    assert (found.profile, found.exports) == (PROFILE, EXPORTS)
    assert found.groups == ("<svg/>", "<svg/>") and found.table == ""


@pytest.mark.parametrize("content", DAMAGED)
def test_what_is_damaged_is_left_out(tmp_path, content):
    (tmp_path / "export").mkdir()
    names = "profile.json", "origin.json", "export/pruned.onnx.json"
    for name in names:
        (tmp_path / name).write_text(content)
    (tmp_path / "groups.svg").write_bytes(b"\xff")
    found = report_files.read(tmp_path)
    assert found == report_files.read(tmp_path / "nothing")
    assert origin.read_headline(tmp_path) is None


def test_a_run_of_a_sweep_knows_its_table(tmp_path):
    cell = tmp_path / "cells" / "tpp_0"
    cell.mkdir(parents=True)
    assert report_files.read(cell).table == ""
    (tmp_path / "table.json").write_text("{}")
    assert report_files.read(cell).table == "../../report.html"


def test_where_a_result_comes_from_is_read_as_it_was_written(tmp_path, monkeypatch):
    headline = Headline("rmse", "m", better="lower")
    monkeypatch.setattr("sys.argv", ["/a/b/launch.py", "--workdir=a b"])
    origin.record(tmp_path, headline)
    found = origin.read(tmp_path)
    assert found["command"] == "python launch.py '--workdir=a b'"
    assert found["version"].startswith("tpp_jax 0.") and "headline" not in found
    assert found.keys() == {"command", "date", "version", "machine", "devices"}
    assert origin.read_headline(tmp_path) == headline


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["/bin/tpp-jax", "--seed=1"], "tpp-jax --seed=1"),
        (["/x/tpp_jax/__main__.py"], "python -m tpp_jax"),
        ([""], "python"),
    ],
)
def test_a_command_is_named_as_it_was_given(monkeypatch, words, command):
    monkeypatch.setattr("sys.argv", words)
    assert origin.command() == command
