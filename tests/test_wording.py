"""Messages name what their reader can set, and the installation that he has."""

import json
import pathlib
import re
import types

import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax import errors
from tpp_jax.errors import TPPError, install_command, renamed

ROOT = pathlib.Path(__file__).parents[1]


def test_a_checkout_is_installed_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert install_command("onnx") == "pip install -e '.[onnx]'"
    monkeypatch.chdir(tmp_path)
    assert install_command("onnx") == f"pip install -e '{ROOT}[onnx]'"


@pytest.mark.parametrize(
    ("record", "command"),
    [
        (None, "pip install 'tpp_jax[onnx]'"),
        (
            {"url": "file:///my%20code/tpp_jax", "dir_info": {}},
            "pip install '/my code/tpp_jax[onnx]'",
        ),
        (
            {"url": "file:///x/tpp_jax-0.1.0-py3-none-any.whl", "archive_info": {}},
            "pip install '/x/tpp_jax-0.1.0-py3-none-any.whl[onnx]'",
        ),
        (
            {"url": "https://h.org/a/b", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            "pip install 'tpp_jax[onnx] @ git+https://h.org/a/b'",
        ),
        (
            {"url": "https://h.org/b.tar.gz", "archive_info": {}},
            "pip install 'tpp_jax[onnx] @ https://h.org/b.tar.gz'",
        ),
    ],
)
def test_an_extra_comes_from_where_the_package_does(
    record, command, tmp_path, monkeypatch
):
    # What pip writes about an installation, by the specification of direct_url.json.
    text = None if record is None else json.dumps(record)
    distribution = types.SimpleNamespace(read_text=lambda name: text)
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "tpp_jax" / "errors.py"))
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: distribution)
    errors._installed_from.cache_clear()
    try:
        assert install_command("onnx") == command
    finally:
        errors._installed_from.cache_clear()


def test_no_other_place_words_how_to_install_an_extra():
    for file in (ROOT / "tpp_jax").rglob("*.py"):
        code = re.sub(r'"""(.*?)"""', "", file.read_text(), flags=re.S)
        assert not re.search(r"pip install [^-]*tpp_jax\[", code) or file.name == (
            "errors.py"
        ), file


def test_a_renamed_error_keeps_its_type_and_place():
    with pytest.raises(TPPError, match=r"^set --other to 1$") as caught:  # noqa: SIM117
        with renamed(r"\bname\b", "--other"):
            raise tpp.TPPTypeError("set name to 1")
    assert type(caught.value) is tpp.TPPTypeError
    assert caught.value.__cause__ is None


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.last = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


def fit(**arguments):
    rng = np.random.default_rng(0)
    part = rng.normal(size=(16, 4)).astype("float32"), np.arange(16) % 2
    return tpp.fit(Net, (part, part), **{"batch_size": 16, "epochs": 1} | arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ratios": 0.0}, r"ratios='\*:0.0' prunes nothing"),
        ({"method": "nope"}, r"\bmethod .*'nope'"),
        ({"epochs": -1}, r"\bepochs is -1"),
        ({"pretrain_epochs": -1}, r"\bpretrain_epochs is -1"),
        ({"learning_rate": -1.0}, r"\blearning_rate is -1"),
        ({"schedule": {"every": 0}}, r'schedule\["every"\] is 0'),
        ({"config": {"num_devices": 99}}, r'config\["num_devices"\] is 99'),
        ({"config": {"report_layer": "no"}}, r'config\["report_layer"\] is'),
        (
            {"config": {"finetune.distillation.weight": 2.0}},
            r'config\["finetune.distillation.weight"\] is 2.0',
        ),
    ],
)
def test_fit_names_its_arguments(arguments, said):
    with pytest.raises(TPPError, match=said) as caught:
        fit(**arguments)
    assert not re.search(r"--|\bconfig\.[a-z]", str(caught.value)), caught.value


def test_fit_names_its_folder(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(TPPError) as caught:
        fit(folder=tmp_path / "run")
    assert "--workdir" not in str(caught.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TPPError, match=r"config\.json") as caught:
        fit(folder=tmp_path)
    assert "another folder" in str(caught.value)


def test_data_are_named_as_the_library_names_them():
    with pytest.raises(TPPError, match=r"Point data_dir at .*--data_dir=/none") as one:
        tpp.data.load("mnist", "/none")
    assert "config" not in str(one.value)
    with pytest.raises(TPPError, match="'folder' needs data_dir: the folder"):
        tpp.data.open_stream("folder")


def test_the_page_of_calls_names_no_flag():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    calls = page.partition("## Calls of the library")[2].partition("\n## ")[0]
    messages = [row.split(" | ")[-1] for row in calls.splitlines() if row[:1] == "|"]
    assert len(messages) > 30
    for message in messages:
        assert not re.search(r"--config|--workdir|\bconfig\.[a-z]+\.", message), message
