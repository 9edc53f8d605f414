"""What the guides show runs as it stands."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"


PAGES = "guide.md", "plans.md", "recovery.md", "trainability.md", "config.md"


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_guide_runs(name):
    """All blocks of a page, one after the other, in one namespace."""
    text = (DOCS / name).read_text()
    namespace = {"__name__": "guide"}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S))
    assert blocks
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        code = "\n" * line + block.group(1)  # so that a traceback names the page's line
        exec(compile(code, str(DOCS / name), "exec"), namespace)
