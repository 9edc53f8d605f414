"""Every notebook runs from top to bottom, and can be read before it runs."""

import json
import re

import pytest

from tests.docs.conftest import ROOT

FILES = sorted(ROOT.glob("notebooks/*.ipynb"))


def cells(file, kind):
    loaded = json.loads(file.read_text(encoding="utf-8"))
    return [
        "".join(cell["source"]) for cell in loaded["cells"] if cell["cell_type"] == kind
    ]


def test_there_are_notebooks():
    assert len(FILES) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_runs(file, tmp_path, monkeypatch, capsys):
    """Its cells are read as Jupyter reads them; pictures are drawn, but not shown."""
    manager = pytest.importorskip("IPython.core.inputtransformer2")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    if file.stem == "export":
        for package in ("jax2onnx", "onnxruntime"):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    pyplot.switch_backend("agg")
    monkeypatch.setattr(pyplot, "show", lambda: None)
    read = manager.TransformerManager().transform_cell
    namespace = {"__name__": "notebook"}
    for i, source in enumerate(cells(file, "code")):
        exec(compile(read(source), f"{file.name}, cell {i}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert re.search(r"\d\.\d", printed)
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    assert figures
    for figure in figures:
        figure.canvas.draw()
        pyplot.close(figure)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_has_no_outputs_and_opens_in_colab(file):
    loaded = json.loads(file.read_text(encoding="utf-8"))
    for cell in loaded["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    first = cells(file, "markdown")[0]
    assert first.startswith("# ")
    assert f"/github/tpp-jax/tpp_jax/blob/main/notebooks/{file.name}" in first
    lines = cells(file, "code")[0].splitlines()
    # It installs nothing where the library is there already.
    assert lines[0] == "try:"
    assert lines[1].strip() == "import tpp_jax as tpp"
    assert lines[2] == "except ImportError:"
    assert re.match(r"    %pip install .*github\.com/tpp-jax/tpp_jax\"$", lines[3])


def test_the_page_of_the_notebooks_lists_all():
    text = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert all(f"(../notebooks/{file.name})" in text for file in FILES)
