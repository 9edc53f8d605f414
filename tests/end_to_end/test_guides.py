"""What the guides show runs as it stands."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"


PAGES = (
    "index.md",
    "guide.md",
    "plans.md",
    "zeros.md",
    "recovery.md",
    "llm.md",
    "trainability.md",
    "config.md",
    "extend.md",
    "own_model.md",
    "sharded.md",
    "export.md",
)


@pytest.mark.usefixtures("sketches")
@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_guide_runs(name, tmp_path, monkeypatch):
    run_page(name, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Qwix calls older Flax
def test_the_recipes_of_quantisation_run(tmp_path, monkeypatch):
    pytest.importorskip("qwix")
    run_page("quantise.md", tmp_path, monkeypatch)


def test_the_recipes_for_litert_run(tmp_path, monkeypatch):
    for package in ("ai_edge_litert", "litert_converter", "litert_quantizer"):
        pytest.importorskip(package)
    run_page("litert.md", tmp_path, monkeypatch)


def run_page(name, tmp_path, monkeypatch):
    """All blocks of a page, one after the other, in one namespace.

    A block that starts with the name of a file is that file.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    text = (DOCS / name).read_text()
    namespace = {"__name__": "guide"}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S))
    assert blocks
    for block in blocks:
        if file := re.match(r"# (\w+\.py)\n", block.group(1)):
            (tmp_path / file[1]).write_text(block.group(1))
            continue
        line = text.count("\n", 0, block.start(1))
        code = "\n" * line + block.group(1)  # so that a traceback names the page's line
        exec(compile(code, str(DOCS / name), "exec"), namespace)
