"""Text is printed literally, on every terminal and in every pipe."""

import contextlib
import io
import re
import subprocess
import sys

import pytest
import rich.table

from tests.end_to_end.starts import ROOT
from tpp_jax.experiment.records.progress import Progress, duration
from tpp_jax.experiment.records.terminal import Terminal, printable, say

NAMES = ["runs/[old]x", "runs/[/b]", "[red]", "[link=x]y", ":smile:", "a[0]", "10%"]


def printed(print_, encoding="utf-8"):
    """Returns what a function prints to a stream of some encoding."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    with contextlib.redirect_stdout(stream):
        print_()
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_not_taken_for_markup(tmp_path, name):
    assert printed(lambda: say(f"in {name}.")) == f"in {name}.\n"
    with Progress(tmp_path / "tb") as progress:
        assert printed(lambda: progress.say(f"in {name}.")) == f"in {name}.\n"


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_table_are_not_taken_for_markup(name):
    table = rich.table.Table(title=name)
    table.add_column(name)
    table.add_row(name)
    shown = printed(lambda: Terminal(width=60).print(table))
    assert shown.count(name) == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_every_stream_can_show_every_text(encoding):
    text = "16 → 8, 3×3, 0.1 ± 0.2, 語 \udcff…"
    shown = printed(lambda: say(text), encoding)
    assert "16 " in shown and " 8, 3" in shown
    assert ("語" in shown) == (encoding == "utf-8")


def test_columns_stay_in_line_where_characters_are_replaced():
    for character in "×→…–±·∞Σλᵀ":
        assert len(printable(character, "ascii")) == 1
    assert printable("größer", "latin-1") == "größer"


def test_a_stream_of_no_encoding_is_one_of_unicode():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        say("16 → 8")
    assert out.getvalue() == "16 → 8\n"


def test_a_reader_that_leaves_does_not_end_what_writes():
    code = (
        "from tpp_jax.experiment.records.terminal import say\n"
        "import sys, time\n"
        "for i in range(3000): say(f'line {i}' * 8)\n"  # more than a pipe holds
        "sys.stderr.write('reached')\n"
    )
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" | head -1; exit ${{PIPESTATUS}}'],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, "reached")
    assert done.stdout == "line 0" * 8 + "\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00:00"),
        (59.6, "00:01:00"),
        (86_399, "23:59:59"),
        (86_400, "1 d 00:00:00"),
        (999_900, "11 d 13:45:00"),
        (400 * 86_400, "400 d 00:00:00"),
    ],
)
def test_a_time_shows_its_days(seconds, text):
    assert duration(seconds) == text


def test_a_line_shows_the_days_that_are_left(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def go():
        with Progress(tmp_path / "tb") as progress:
            progress.phase("finetune", 1_000_000, 0)
            progress.compiled(1)
            clock[0] += 2000.0
            progress.step(21, {})
            progress.line(21, {"loss": 1.0})

    shown = printed(go)
    # 999,979 steps of 100 s each.
    assert "left 1157 d 09:11:40" in shown
    assert " 0.01 step/s" in shown


def test_time_that_holds_compilation_gives_no_speed_but_what_is_left(
    tmp_path, monkeypatch
):
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def go():
        with Progress(tmp_path / "tb") as progress:
            progress.phase("finetune", 10_000_000, 0)
            clock[0] += 100.0
            progress.line(1000, {"loss": 1.0})

    shown = printed(go)
    assert "left 11 d 13:45:00" in shown and "step/s" not in shown


def test_neither_compilation_nor_an_evaluation_counts_as_speed(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with Progress(tmp_path / "tb", hidden=True) as progress:
        progress.phase("finetune", 1000, 100)
        clock[0] += 60.0  # compilation, and the first 10 steps
        assert progress.rate(110) is None
        progress.compiled(110)
        assert progress.rate(110) is None
        clock[0] += 5.0
        assert progress.rate(120) == 2.0
        with progress.pause():
            clock[0] += 30.0
            assert progress.rate(120) == 2.0
        clock[0] += 5.0
        assert progress.rate(130) == 2.0
        progress.phase("next", 1000, 0)
        assert progress.rate(1) is None


METRICS = {"loss": 0.1234, "accuracy": 98.25, "strength": 0.5, "gram_loss": 1e-5}
METRICS |= {"the_norm_of_everything_that_will_be_removed_by_the_cut": 1.0}


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_live_line_is_one_line_of_any_terminal(tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), Progress(tmp_path / "tb") as progress:
        progress.phase("regularize", 110_001, 0)
        progress.compiled(1)
        progress.step(50_000, METRICS)
        progress.line(50_000, METRICS)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]", plain) if line.strip()]
    assert any("compiling" in line for line in lines)
    live = [line for line in lines if "50000/110001" in line]
    assert live and all(len(line) <= width for line in live)
    assert "step/s" in live[0] or width < 60
    # Nothing is lost in the permanent lines, which only a long name makes too long.
    for name in METRICS:
        assert any(f"{name} " in line for line in lines)
    rest = [line for line in lines if "removed_by" not in line]
    assert all(len(line) <= width for line in rest)
