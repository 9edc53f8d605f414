"""docs/errors.md holds what every mistake says today."""

import re

import pytest

from tests.bad_inputs import INTRODUCTION, PAGE, SECTIONS, table


def _own(text):
    """Leaves out text in brackets, which may quote other libraries."""
    return re.sub(r"\([^()]*\)", "(…)", text)


@pytest.mark.usefixtures("sketches")
@pytest.mark.parametrize("section", SECTIONS)
def test_every_mistake_says_what_the_page_says(section):
    # To write the page again: python -m tests.bad_inputs
    assert _own(table(section)) in _own(PAGE.read_text())


def test_the_page_has_all_sections_and_no_others():
    text = PAGE.read_text()
    assert text.startswith(INTRODUCTION)
    assert [s.partition("\n")[0] for s in text.split("## ")[1:]] == list(SECTIONS)
