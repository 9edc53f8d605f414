"""Everything a user may get wrong, done: what each mistake says.

    python -m tests.bad_inputs     # writes docs/errors.md

Each case is a function of an empty folder that makes a mistake. It must end in a
``TPPError`` or ``ValueError`` of one or two sentences or, through launch.py, in exit
code 1 and one line.
"""

import contextlib
import io
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable

import tests.conftest  # noqa: F401  # isort: skip  simulates devices: before jax

from tests.end_to_end.starts import ROOT
from tests.mistakes.calls import library
from tests.mistakes.configs import command_lines, fields, patterns, tables
from tests.mistakes.data import data
from tests.mistakes.exports import exports
from tests.mistakes.folders import folders
from tests.mistakes.own import own
from tests.mistakes.runs import Cases, Make
from tests.mistakes.weights import weights
from tpp_jax.errors import TPPError

PAGE = ROOT / "docs" / "errors.md"


def message_of(title: str, make: Make, folder: pathlib.Path) -> str:
    """Makes the mistake in an empty folder; returns what it says, paths shortened.

    Raises:
      AssertionError: nothing was said, or not to a person.
    """
    said = ""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            done = make(folder)
    except (TPPError, ValueError) as error:
        said = str(error)
    else:
        assert getattr(done, "returncode", 0) == 1, f"{title}: no error"
        assert "Traceback" not in done.stderr, done.stderr
        lines = done.stderr.strip().splitlines()
        said = next(line for line in lines if line.startswith("error: "))
        said = said.removeprefix("error: ")
    said = said.replace(str(folder), "…").replace(str(ROOT) + "/", "")
    said = said.replace(str(ROOT), ".")
    said = re.sub(r"process \d+ on \S+\)", "process … on …)", said)
    assert len(said) > 10 and said.count("\n") <= 12, said
    return said


INTRODUCTION = """# What mistakes say

Every wrong input stops a run before it trains, or where it is met, with one message and
exit code 1; `--debug` shows the traceback as well. This page is made by making the
mistakes: `python -m tests.bad_inputs`.
"""


def page() -> str:
    """Returns the text of docs/errors.md, made by making every mistake."""
    return "\n".join([INTRODUCTION, *(f"{table(name)}\n" for name in SECTIONS)])


def table(section: str) -> str:
    """Returns one section of the page."""
    lines = [f"## {section}", "", "| mistake | message |", "|---|---|"]
    for title, make in SECTIONS[section]():
        with tempfile.TemporaryDirectory() as folder:
            said = message_of(title, make, pathlib.Path(folder).resolve())
        said = " ".join(said.split()).replace("|", "\\|").replace("<", "\\<")
        lines.append(f"| {title} | {said} |")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[], Cases]] = {
    "Fields of the config": fields,
    "Patterns of layers": patterns,
    "Command lines": command_lines,
    "Tables": tables,
    "Data": data,
    "Models, data and tasks of your own": own,
    "Folders of runs, checkpoints, saved models": folders,
    "Files of weights": weights,
    "Exported files": exports,
    "Calls of the library": library,
}


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.exit(0)
